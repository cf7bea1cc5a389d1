//! Where listeners become connections.
//!
//! Whoever wraps connections in TLS and finds out who is at the other end does it in [`accepted`],
//! behind the deadline for the first octets, so that a slow handshake holds up nobody else.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::{Stream, stream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    time::Sleep,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::{Connected, TcpConnectInfo};
use tracing::{info, warn};

use crate::metrics::Metrics;

/// Pause after an accept that failed for a reason that lasts, such as no descriptors left (EMFILE):
/// the loop must neither spin nor end.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Octets that every HTTP/2 client sends first (RFC 9113 §3.4).
const PREFACE: usize = 24;

/// The connections of `listener`, without end. Their clients must have said the preface after
/// `handshake`; `cut` breaks all of them.
pub(super) fn connections(
    listener: TcpListener,
    handshake: Duration,
    metrics: Arc<Metrics>,
    cut: CancellationToken,
) -> impl Stream<Item = Result<Connection, io::Error>> {
    stream::unfold(listener, move |listener| {
        let (metrics, cut) = (Arc::clone(&metrics), cut.clone());
        async move {
            let stream = accept(&listener, &metrics).await;
            Some((Ok(accepted(stream, handshake, metrics, cut)), listener))
        }
    })
}

async fn accept(listener: &TcpListener, metrics: &Metrics) -> TcpStream {
    let mut failing = false;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if failing {
                    info!("gRPC connections are accepted again");
                }
                return stream;
            }
            // The peer went away before it was its turn: nothing is wrong here.
            Err(err) if is_peer_gone(err.kind()) => {}
            Err(err) => {
                metrics.grpc.accept_errors.inc();
                if !failing {
                    failing = true;
                    let error: &dyn std::error::Error = &err;
                    warn!(error, "gRPC connections cannot be accepted; trying again");
                }
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

fn is_peer_gone(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(kind, ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// What becomes of a connection that was accepted.
fn accepted(stream: TcpStream, handshake: Duration, metrics: Arc<Metrics>, cut: CancellationToken) -> Connection {
    // Answers are small, and each is awaited. Without it they are only slower.
    let _ = stream.set_nodelay(true);
    metrics.grpc.connections.inc();
    Connection {
        stream,
        greeting: Some((Box::pin(tokio::time::sleep(handshake)), 0)),
        cut: Box::pin(cut.cancelled_owned()),
        metrics,
    }
}

/// A connection that ends when it is silent at first, and when the server has no more time.
pub(super) struct Connection {
    stream: TcpStream,
    /// Until when the preface must be here, and how much of it is.
    greeting: Option<(Pin<Box<Sleep>>, usize)>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    metrics: Arc<Metrics>,
}

impl Connection {
    /// Checked on both ways: a connection that cannot write does not read either.
    fn check_cut(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.cut.as_mut().poll(cx).is_ready() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.metrics.grpc.connections.dec();
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check_cut(cx)?;
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if let Some((deadline, seen)) = &mut self.greeting {
            if read.is_pending() {
                ready!(deadline.as_mut().poll(cx));
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            *seen += buf.filled().len() - before;
            if *seen >= PREFACE {
                self.greeting = None;
            }
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
        self.check_cut(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, octets)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        octets: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check_cut(cx)?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, octets)
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
