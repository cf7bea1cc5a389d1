//! The operator's HTTP listener: metrics, liveness, readiness, the services as JSON.
//!
//! It only reads, and never waits for the writer. It is plain HTTP/1.1 without identity: it
//! belongs on loopback or a management network. Connections are few and short-lived: there is a
//! cap on them, and deadlines for peers that send or read too slowly, so that nobody can keep the
//! probes out.

mod json;
mod pages;
mod readiness;

use std::{io, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    metrics::Metrics,
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

/// What a connection may bytes.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Connections of all listeners together; the next one waits in the kernel's queue.
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

/// Serves on every listener until `stop`; answers under way then get two seconds.
///
/// # Errors
/// When a listener's task panicked. A failing accept is tried again and logged: probes must come
/// back when descriptors do.
pub async fn run(listeners: Vec<TcpListener>, admin: Admin, stop: CancellationToken) -> io::Result<()> {
    run_within(Limits::default(), listeners, admin, stop).await
}

async fn run_within(
    limits: Limits,
    listeners: Vec<TcpListener>,
    admin: Admin,
    stop: CancellationToken,
) -> io::Result<()> {
    let router = pages::router(admin);
    let permits = Arc::new(Semaphore::new(limits.connections));
    let mut serving = JoinSet::new();
    for listener in listeners {
        serving.spawn(serve(listener, router.clone(), limits, Arc::clone(&permits), stop.clone()));
    }
    while let Some(ended) = serving.join_next().await {
        ended.map_err(io::Error::other)?;
    }
    // Without a listener there is nothing to do until the end.
    stop.cancelled().await;
    Ok(())
}

/// One listener and its connections, until `stop` and the grace after it.
async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    permits: Arc<Semaphore>,
    stop: CancellationToken,
) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = async {
            let permit = Arc::clone(&permits).acquire_owned().await.expect("the semaphore is never closed");
            (accept(&listener).await, permit)
        };
        tokio::select! {
            () = stop.cancelled() => break,
            (stream, permit) = accepted => {
                let (router, stop) = (router.clone(), stop.clone());
                connections.spawn(async move {
                    converse(stream, router, limits, stop).await;
                    drop(permit);
                });
            }
            // Reaped as they end, so that the set holds the living only.
            Some(_) = connections.join_next() => {}
        }
    }
    drop(listener);
    let rest = async { while connections.join_next().await.is_some() {} };
    if timeout(limits.grace, rest).await.is_err() {
        debug!(connections = connections.len(), "admin connections cut off at the end of the grace");
        connections.shutdown().await;
    }
}

/// The next connection, however long it takes.
async fn accept(listener: &TcpListener) -> TcpStream {
    /// How long to wait before accept is tried again: without a free descriptor it fails at once,
    /// and would take a whole core.
    const PAUSE: Duration = Duration::from_millis(500);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            // The peer went away between its handshake and this call: its own business.
            Err(err) if err.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(err) => {
                warn!(error = %err, "the admin listener cannot accept; trying again");
                sleep(PAUSE).await;
            }
        }
    }
}

/// One connection, request after request, until the peer closes it, a deadline passes, or `stop`.
async fn converse(stream: TcpStream, router: Router, limits: Limits, stop: CancellationToken) {
    cut_off_unread(&stream, limits.unread);
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.request);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
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
