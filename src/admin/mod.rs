//! The operator's HTTP listener: metrics, liveness, readiness, the services as JSON.
//!
//! The pages only read, and never wait for the writer. Beyond loopback they are served over TLS; whoever asks needs a
//! right to the path, except for `/livez` and `/readyz`. A request that names a host of somebody else is refused. A cap
//! on connections, and deadlines for peers that send or read too slowly, keep it open for probes.

mod access;
pub mod client;
mod host;
mod json;
mod pages;
mod readiness;
mod status;

use std::{future::pending, io, net::TcpListener as StdTcpListener, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use futures::future;
use hyper::{
    Request,
    body::Incoming,
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

use self::pages::PageContents;
pub use self::status::{KubernetesFlags, ProcessOptions};
use crate::{
    metrics::{ListenerKind, Metrics},
    net::{self, ConnectionLimiter, EvictionPolicy, Permit, Signal, tls::Alpn},
    registry::{Snapshots, Status},
    security::{ListenerSecurity, Security},
    zone::Zone,
};

/// The state that the pages show.
#[derive(Debug, Clone)]
pub struct Admin {
    /// The zone, for the readiness of DNS.
    pub zone: Arc<Zone>,
    /// The registered services, for lists.
    pub snapshots: Arc<Snapshots>,
    /// The phase of the registry, for the readiness of registrations.
    pub status: Status,
    /// The metrics of the process.
    pub metrics: Arc<Metrics>,
    /// Who may connect, and see what.
    pub security: Arc<Security>,
    /// Names by which the listener may be asked, beside IP addresses and `localhost`.
    pub hosts: Vec<String>,
    /// A process on standby whose answers may be older than this is not ready. `None`: any age is.
    pub max_staleness: Option<Duration>,
    /// What the process was started with.
    pub options: ProcessOptions,
}

/// Limits on connections.
#[derive(Debug, Clone, Copy)]
struct AdminLimits {
    /// Connections of all listeners together; at the limit, the idlest is closed for a new one.
    connections: usize,
    /// How long the handshake of TLS may take, and the first octet of a connection that may be TLS or not.
    handshake: Duration,
    /// How long the headers of a request may take to arrive, and how long a connection may be idle.
    request: Duration,
    /// How long a peer may read nothing of its response before its connection is closed.
    unread: Duration,
    /// How long unfinished responses may take after the stop.
    grace: Duration,
}

impl Default for AdminLimits {
    fn default() -> Self {
        Self {
            connections: 256,
            handshake: Duration::from_secs(5),
            request: Duration::from_secs(10),
            unread: Duration::from_secs(10),
            grace: Duration::from_secs(2),
        }
    }
}

/// The path of every page, with its parameters in braces, and whether everybody may see it.
pub fn pages() -> impl Iterator<Item = (&'static str, bool)> {
    pages::PAGES.iter().map(|page| (page.path, page.contents == PageContents::Health))
}

/// Serves at most `connections` connections on all listeners until `stop`. Unfinished responses then get
/// two seconds.
///
/// # Errors
/// When a listener cannot be registered with the runtime. A failed accept is logged and retried, so that
/// probes work again as soon as descriptors are free.
pub async fn run(
    listeners: Vec<(StdTcpListener, ListenerSecurity)>,
    admin: Admin,
    connections: usize,
    stop: CancellationToken,
) -> io::Result<()> {
    let from_std = |(listener, security)| Ok((TcpListener::from_std(listener)?, security));
    let listeners = listeners.into_iter().map(from_std).collect::<io::Result<_>>()?;
    run_within(AdminLimits { connections, ..AdminLimits::default() }, listeners, admin, stop).await;
    Ok(())
}

async fn run_within(
    limits: AdminLimits,
    listeners: Vec<(TcpListener, ListenerSecurity)>,
    admin: Admin,
    stop: CancellationToken,
) {
    let security = Arc::clone(&admin.security);
    let metrics = Arc::clone(&admin.metrics.connections);
    let limiter = ConnectionLimiter::new(ListenerKind::Admin, limits.connections, None, EvictionPolicy::Any, metrics);
    let router = pages::router(admin);
    let serve = |(socket, listener)| {
        let (router, security) = (router.clone(), Arc::clone(&security));
        net::serve(socket, Arc::clone(&limiter), limits.grace, stop.clone(), move |stream, permit| {
            serve_connection(stream, permit, listener, Arc::clone(&security), router.clone(), limits)
        })
    };
    // Without a listener too, this future must not end before the stop.
    future::join(future::join_all(listeners.into_iter().map(serve)), stop.cancelled()).await;
}

/// Serves the requests of one connection until the peer closes it, a deadline passes, the server stops or
/// the connection is evicted.
async fn serve_connection(
    stream: TcpStream,
    permit: Permit,
    listener: ListenerSecurity,
    security: Arc<Security>,
    router: Router,
    limits: AdminLimits,
) {
    // A handshake and a response are several writes, each of which would wait for the acknowledgement of the last.
    let _ = stream.set_nodelay(true);
    // hyper has no timeout for writing: without this one a peer that reads nothing would keep its connection, and a
    // list's permit.
    set_unread_timeout(&stream, limits.unread);
    let handle = permit.handle();
    let secured = tokio::select! {
        secured = security.secure(stream, listener, Alpn::Http1, limits.handshake) => secured,
        _ = handle.signalled(Signal::Drain) => None,
    };
    let Some((stream, peer, certificate)) = secured else { return };
    let peer = Arc::new(peer);
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.request);
    let pages = TowerToHyperService::new(router);
    let service = service_fn(|mut request: Request<Incoming>| {
        handle.touch();
        request.extensions_mut().insert(Arc::clone(&peer));
        pages.call(request)
    });
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    // Looks at the certificate as long as requests may come.
    let mut watched = pin!(async {
        match certificate {
            Some(certificate) => certificate.run().await,
            None => pending().await,
        }
    });
    let mut awaited = Signal::Drain;
    let ended = loop {
        tokio::select! {
            ended = connection.as_mut() => break ended,
            () = &mut watched => return,
            signal = handle.signalled(awaited) => {
                // Evicted, or the grace period is over: dropping the connection closes it.
                if signal > Signal::Drain {
                    return;
                }
                // Requests that have begun are answered. From here on only a stronger signal is of interest.
                connection.as_mut().graceful_shutdown();
                awaited = Signal::Close;
            }
        }
    };
    if let Err(err) = ended {
        // The peer disconnected, was too slow or does not speak HTTP: no action is needed.
        debug!(error = %err, "an admin connection ended early");
    }
}

/// Makes the kernel reset the connection of a peer that leaves its response unread for `after`. RFC 5482 §2
/// describes the timeout for unacknowledged data; Linux applies it to a closed window too.
fn set_unread_timeout(stream: &TcpStream, after: Duration) {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    if let Err(err) = socket2::SockRef::from(stream).set_tcp_user_timeout(Some(after)) {
        debug!(error = %err, "an admin connection without a limit on unread answers");
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    let _ = (stream, after);
}

#[cfg(test)]
mod tests;
