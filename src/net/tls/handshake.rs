//! Handshakes within limits of time, number and bytes.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use rustls::{InvalidMessage, ServerConfig};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::oneshot,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

use super::{HandshakeError, MAX_HANDSHAKE_BYTES, ServerTlsStream};
use crate::metrics::HandshakeFailure;

/// The handshakes that are not complete.
pub(super) struct Handshakes {
    max: usize,
    table: Mutex<HandshakeTable>,
}

#[derive(Default)]
struct HandshakeTable {
    next_id: u64,
    /// By age, the oldest first. A handshake whose sender is dropped gives up.
    open: BTreeMap<u64, oneshot::Sender<Infallible>>,
}

impl Handshakes {
    pub(super) fn new(max: usize) -> Self {
        Self { max, table: Mutex::default() }
    }

    pub(super) async fn run(
        &self,
        stream: TcpStream,
        config: Arc<ServerConfig>,
        deadline: Duration,
    ) -> Result<ServerTlsStream, HandshakeError> {
        let handshake = async {
            // A client that says nothing takes no place among the handshakes.
            stream.readable().await.map_err(failure)?;
            let (_place, given_up) = self.begin();
            let limited = LimitedStream { io: stream, left: Some(MAX_HANDSHAKE_BYTES) };
            tokio::select! {
                accepted = TlsAcceptor::from(config).accept(limited) => accepted.map_err(failure),
                _ = given_up => Err(HandshakeError {
                    reason: HandshakeFailure::Evicted,
                    detail: "given up: too many handshakes at once, and this was the oldest".into(),
                }),
            }
        };
        let mut stream = timeout(deadline, handshake).await.unwrap_or_else(|_| {
            Err(HandshakeError {
                reason: HandshakeFailure::Timeout,
                detail: format!("not complete after {}", humantime::format_duration(deadline)),
            })
        })?;
        stream.get_mut().0.left = None;
        Ok(stream)
    }

    /// Begins a handshake. At the limit, the oldest is given up.
    fn begin(&self) -> (HandshakePermit<'_>, oneshot::Receiver<Infallible>) {
        let (sender, given_up) = oneshot::channel();
        let mut table = self.table();
        if table.open.len() >= self.max {
            table.open.pop_first();
        }
        let id = table.next_id;
        table.next_id += 1;
        table.open.insert(id, sender);
        (HandshakePermit { handshakes: self, id }, given_up)
    }

    fn table(&self) -> MutexGuard<'_, HandshakeTable> {
        // No code panics while it holds the lock, so a poisoned lock guards a consistent table.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of one handshake in the table, until it is dropped.
struct HandshakePermit<'a> {
    handshakes: &'a Handshakes,
    id: u64,
}

impl Drop for HandshakePermit<'_> {
    fn drop(&mut self) {
        self.handshakes.table().open.remove(&self.id);
    }
}

/// A stream that fails when the peer sends too much before its handshake is complete.
#[derive(Debug)]
pub struct LimitedStream<S> {
    io: S,
    /// Bytes that may be read; `None` after the handshake.
    left: Option<usize>,
}

impl<S: AsyncRead + Unpin> AsyncRead for LimitedStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Some(left) = self.left else { return Pin::new(&mut self.io).poll_read(cx, buf) };
        if left == 0 {
            return Poll::Ready(Err(io::ErrorKind::FileTooLarge.into()));
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        // The last read may exceed the limit by the size of its buffer.
        self.left = Some(left.saturating_sub(buf.filled().len() - before));
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for LimitedStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// What an error of the handshake means.
fn failure(err: io::Error) -> HandshakeError {
    let reason = match err.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(_)) => HandshakeFailure::BadCertificate,
        Some(rustls::Error::InvalidMessage(
            InvalidMessage::HandshakePayloadTooLarge | InvalidMessage::CertificatePayloadTooLarge,
        )) => HandshakeFailure::TooLarge,
        Some(rustls::Error::InvalidMessage(_)) => HandshakeFailure::NotTls,
        Some(rustls::Error::AlertReceived(_)) => HandshakeFailure::RefusedByPeer,
        Some(_) => HandshakeFailure::Protocol,
        None if err.kind() == io::ErrorKind::FileTooLarge => HandshakeFailure::TooLarge,
        None => HandshakeFailure::Closed,
    };
    HandshakeError { reason, detail: err.to_string() }
}
