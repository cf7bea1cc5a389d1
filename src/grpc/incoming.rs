//! Serves an accepted connection: a deadline for the handshake of TLS and for the preface of HTTP/2, then tonic, until
//! the connection is idle, old or evicted.

use std::{
    convert::Infallible,
    io,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{StreamExt as _, stream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::Notify,
    time::{sleep, timeout},
};
use tonic::{
    codegen::{Bytes, Service, http},
    transport::{Server, server::Connected},
};

use super::{memory::ConnectionMemory, metered::Metered, preface::Prefaced};
use crate::{
    metrics::CloseReason,
    net::{ConnectionHandle, Permit, Signal, tls::Alpn},
    security::{ListenerSecurity, Peer, SecuredStream, Security},
};

/// How long a connection without a call may stay open after its GOAWAY frame.
const GO_AWAY_TIMEOUT: Duration = Duration::from_secs(5);

/// As [`Lifetime::idle`], for a peer without an identity.
const UNAUTHENTICATED_IDLE: Duration = Duration::from_secs(10);

/// Limits on the life of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lifetime {
    /// For each the handshake of TLS, and the preface of HTTP/2; no other timeout applies before.
    pub(super) handshake: Duration,
    /// Time without a call.
    pub(super) idle: Duration,
    /// Total time, plus or minus a tenth. Open streams may continue after it.
    pub(super) max_age: Duration,
}

/// A connection that was accepted.
pub(super) struct AcceptedConnection {
    pub(super) stream: TcpStream,
    pub(super) permit: Permit,
    pub(super) memory: Arc<ConnectionMemory>,
    pub(super) listener: ListenerSecurity,
}

/// Serves one connection until it has ended.
pub(super) async fn serve_connection<S, B>(
    AcceptedConnection { stream, permit, memory, listener }: AcceptedConnection,
    security: Arc<Security>,
    server: Server,
    service: S,
    mut lifetime: Lifetime,
) where
    S: Service<http::Request<tonic::body::Body>, Response = http::Response<B>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
    B: tonic::codegen::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<tonic::codegen::StdError>,
{
    // Responses are small and the client waits for each, so Nagle's delay would only slow it down.
    let _ = stream.set_nodelay(true);
    let handle = permit.handle().clone();
    // Before h2: a peer that has said nothing costs little, and one that says nothing does not stay.
    let begun = async {
        let (stream, peer, certificate) = security.secure(stream, listener, Alpn::Http2, lifetime.handshake).await?;
        match timeout(lifetime.handshake, Prefaced::read_from(stream)).await {
            Ok(stream) => Some((stream.ok()?, peer, certificate)),
            Err(_) => {
                handle.count_closed(CloseReason::SlowRequest);
                None
            }
        }
    };
    let begun = tokio::select! {
        begun = begun => begun,
        // A peer that says nothing keeps neither its place nor the stop waiting.
        _ = handle.signalled(Signal::Drain) => None,
    };
    let Some((stream, peer, certificate)) = begun else { return };
    if peer.identity().is_err() {
        // Such a peer joins, or shows a token with each call: between calls it does not hold a descriptor for minutes.
        lifetime.idle = lifetime.idle.min(UNAUTHENTICATED_IDLE);
    }
    let connection = GrpcConnection { stream: Metered::new(stream, memory), permit, peer: Arc::new(peer) };
    // tonic stops when its stream of connections ends, so the stream stays pending after this one.
    let connections = stream::once(std::future::ready(Ok::<_, io::Error>(connection))).chain(stream::pending());
    let go_away = Notify::new();
    let served = server.serve_with_incoming_shutdown(service, connections, go_away.notified());
    let supervised = async {
        until_go_away(&handle, lifetime).await;
        go_away.notify_one();
        close_when_unused(&handle).await;
    };
    let ended = async {
        // tonic only reports errors of accepting, and it accepts nothing here.
        let _ = tokio::join!(served, supervised);
    };
    match certificate {
        None => ended.await,
        // Ends when the peer's certificate does not count any more. Dropping the server closes the connection.
        Some(certificate) => tokio::select! {
            () = ended => {}
            () = certificate.run() => {}
        },
    }
}

/// Waits until the connection should take no more calls: it is idle or old, the server stops, or the
/// connection has ended.
async fn until_go_away(handle: &ConnectionHandle, Lifetime { idle, max_age, .. }: Lifetime) {
    // Spread at random: clients that connected at the same time should not all reconnect at the same time.
    let mut old = pin!(sleep(max_age.mul_f64(0.9 + fastrand::f64() / 5.0)));
    let mut wait = idle;
    loop {
        tokio::select! {
            _ = handle.signalled(Signal::Drain) => return,
            () = &mut old => return handle.count_closed(CloseReason::MaxAge),
            () = sleep(wait) => match handle.idle_for() {
                Some(idle_for) if idle_for >= idle => return handle.count_closed(CloseReason::Idle),
                Some(idle_for) => wait = idle - idle_for,
                // In use. The time without a call begins when its last call ends.
                None => wait = idle,
            }
        }
    }
}

/// Closes a connection that stays open without a call after its GOAWAY frame.
async fn close_when_unused(handle: &ConnectionHandle) {
    loop {
        tokio::select! {
            _ = handle.signalled(Signal::Ended) => return,
            // h2 keeps a connection open until its last stream ends, and a client may keep it open without any.
            () = sleep(GO_AWAY_TIMEOUT) => {
                if handle.idle_for().is_some_and(|idle_for| idle_for >= GO_AWAY_TIMEOUT) {
                    handle.close();
                }
            }
        }
    }
}

/// The connection of a call, in the extensions of its request.
#[derive(Clone)]
pub(super) struct ConnectionInfo {
    /// Calls mark their connection as in use.
    pub(super) handle: ConnectionHandle,
    pub(super) memory: Arc<ConnectionMemory>,
    pub(super) peer: Arc<Peer>,
}

/// A connection that fails after [`Signal::Close`].
struct GrpcConnection {
    stream: Metered<Prefaced<SecuredStream>>,
    permit: Permit,
    peer: Arc<Peer>,
}

impl GrpcConnection {
    /// Fails after [`Signal::Close`]. Checked by reads and by writes: while a peer takes no responses, h2
    /// only writes.
    fn check_open(&self) -> io::Result<()> {
        if self.permit.handle().signal() >= Signal::Close {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        Ok(())
    }

    /// As [`GrpcConnection::check_open`], and wakes a pending read or write when the signal comes.
    fn poll_open<T>(&self, cx: &mut Context<'_>, pending: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if pending.is_pending() && self.permit.handle().poll_signal(cx, Signal::Close).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        pending
    }
}

impl Connected for GrpcConnection {
    type ConnectInfo = ConnectionInfo;

    fn connect_info(&self) -> ConnectionInfo {
        ConnectionInfo {
            handle: self.permit.handle().clone(),
            memory: self.stream.connect_info(),
            peer: Arc::clone(&self.peer),
        }
    }
}

impl AsyncRead for GrpcConnection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check_open()?;
        // The signal is looked at before, and its waker registered only if the read has to wait: a busy connection pays
        // one load.
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.poll_open(cx, read)
    }
}

impl AsyncWrite for GrpcConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check_open()?;
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.poll_open(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check_open()?;
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.poll_open(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
