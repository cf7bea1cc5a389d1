//! The operator's HTTP listener: metrics, liveness, readiness, the services as JSON.
//!
//! It only reads, and never waits for the writer. It is plain HTTP/1.1 without identity: it
//! belongs on loopback or a management network. Connections are few and short-lived: there is a
//! cap on them, and deadlines for peers that send or read too slowly, so that nobody can keep the
//! probes out.

mod json;
mod pages;
mod readiness;

use std::{io, net::TcpListener as StdTcpListener, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use futures::future;
use hyper::{
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{
    metrics::{ListenerKind, Metrics},
    net::{self, ConnectionLimiter, EvictionPolicy, Permit, Signal},
    registry::{Snapshots, Status},
    zone::Zone,
};

/// What the pages are made from.
#[derive(Debug, Clone)]
pub struct Admin {
    /// Whether DNS can answer.
    pub zone: Arc<Zone>,
    /// What is registered.
    pub snapshots: Arc<Snapshots>,
    /// Whether registrations are accepted.
    pub status: Status,
    /// What was counted.
    pub metrics: Arc<Metrics>,
}

/// Limits on connections.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Connections of all listeners together; when there is no room, the idlest is closed.
    connections: usize,
    /// A request must arrive, and an idle connection ask again, within this long.
    request: Duration,
    /// A peer that takes nothing of its answer for this long is cut off.
    unread: Duration,
    /// After `stop`, answers that are under way may still take this long.
    grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            request: Duration::from_secs(10),
            unread: Duration::from_secs(10),
            grace: Duration::from_secs(2),
        }
    }
}

/// Serves on every listener, `connections` at once, until `stop`; answers under way then get two
/// seconds.
///
/// # Errors
/// When a listener cannot be watched. A failing accept is tried again and logged: probes must come
/// back when descriptors do.
pub async fn run(
    listeners: Vec<StdTcpListener>,
    admin: Admin,
    connections: usize,
    stop: CancellationToken,
) -> io::Result<()> {
    let listeners = listeners.into_iter().map(TcpListener::from_std).collect::<io::Result<_>>()?;
    run_within(Limits { connections, ..Limits::default() }, listeners, admin, stop).await;
    Ok(())
}

async fn run_within(limits: Limits, listeners: Vec<TcpListener>, admin: Admin, stop: CancellationToken) {
    let metrics = Arc::clone(&admin.metrics.connections);
    let limiter = ConnectionLimiter::new(ListenerKind::Admin, limits.connections, None, EvictionPolicy::Any, metrics);
    let router = pages::router(admin);
    let serve = |listener| {
        let router = router.clone();
        net::serve(listener, Arc::clone(&limiter), limits.grace, stop.clone(), move |stream, permit| {
            converse(stream, permit, router.clone(), limits)
        })
    };
    // Without a listener too this lasts until the stop.
    future::join(future::join_all(listeners.into_iter().map(serve)), stop.cancelled()).await;
}

/// One connection, request after request, until the peer closes it, a deadline passes, the server
/// stops or needs the room.
async fn converse(stream: TcpStream, permit: Permit, router: Router, limits: Limits) {
    cut_off_unread(&stream, limits.unread);
    let handle = permit.handle();
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.request);
    let pages = TowerToHyperService::new(router);
    let service = service_fn(|request| {
        handle.touch();
        pages.call(request)
    });
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let mut awaited = Signal::Drain;
    let ended = loop {
        tokio::select! {
            ended = connection.as_mut() => break ended,
            signal = handle.signalled(awaited) => {
                if signal > Signal::Drain {
                    return;
                }
                connection.as_mut().graceful_shutdown();
                awaited = Signal::Close;
            }
        }
    };
    if let Err(err) = ended {
        // A peer that went away, was too slow or does not speak HTTP: nobody has to act.
        debug!(error = %err, "an admin connection ended early");
    }
}

/// Lets the kernel cut a peer off that leaves its answer unread (RFC 5482 §2 describes the
/// timeout; Linux keeps it for a closed window too).
fn cut_off_unread(stream: &TcpStream, after: Duration) {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    if let Err(err) = socket2::SockRef::from(stream).set_tcp_user_timeout(Some(after)) {
        debug!(error = %err, "an admin connection without a limit on unread answers");
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    let _ = (stream, after);
}

#[cfg(test)]
mod tests;
