//! An HTTP/2 client that does what it should not: it reads its socket only when it is told to.

use std::{
    future::{Future as _, poll_fn},
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    task::Poll,
    time::Duration,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::{
    RecvStream, SendStream,
    client::{Builder, Connection, ResponseFuture, SendRequest},
};
use http::Request;
use prost::Message;
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};

/// Windows that never stop the server: what it sends is stopped by TCP alone.
pub(crate) const NO_WINDOW: u32 = (1 << 31) - 1;

/// The windows of a client that says nothing about them.
pub(crate) const DEFAULT_WINDOW: u32 = 65_535;

/// Bytes of responses that the kernel keeps for a peer; Linux doubles it for its own use.
const RECEIVE_BUFFER: u32 = 4096;

/// A call, which is open until the value is dropped: then it is reset.
pub(crate) struct Call {
    response: ResponseFuture,
    pub(crate) body: SendStream<Bytes>,
}

/// One connection, with the calls that were begun on it.
pub(crate) struct Peer {
    requests: SendRequest<Bytes>,
    connection: Connection<TcpStream, Bytes>,
    to: SocketAddr,
    pub(crate) calls: Vec<Call>,
}

impl Peer {
    pub(crate) async fn connect(to: SocketAddr, window: u32) -> Self {
        Self::connect_from(Ipv4Addr::LOCALHOST, to, window).await
    }

    /// The same from an address of 127.0.0.0/8.
    pub(crate) async fn connect_from(from: Ipv4Addr, to: SocketAddr, window: u32) -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(SocketAddr::from((from, 0))).expect("all of 127.0.0.0/8 is here");
        // Otherwise the kernel takes megabytes of responses for a peer that reads nothing.
        socket.set_recv_buffer_size(RECEIVE_BUFFER).expect("above the least size");
        let stream = socket.connect(to).await.expect("it listens");
        let mut builder = Builder::new();
        builder.initial_window_size(window).initial_connection_window_size(window.max(DEFAULT_WINDOW));
        builder.max_concurrent_reset_streams(0);
        let (requests, connection) = builder.handshake(stream).await.expect("the preface is written");
        let mut peer = Self { requests, connection, to, calls: Vec::new() };
        // The server's settings say how many calls it takes at once.
        peer.drive(Duration::from_millis(50)).await;
        peer
    }

    /// Reads and writes for this long, or until the connection has ended.
    pub(crate) async fn drive(&mut self, duration: Duration) {
        let _ = timeout(duration, Pin::new(&mut self.connection)).await;
    }

    /// Begins a call with these messages, already framed. False when the connection is over.
    pub(crate) async fn call(&mut self, path: &str, messages: Bytes, end: bool) -> bool {
        let request = Request::post(format!("http://{}{path}", self.to))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .expect("a request");
        let (requests, connection) = (&mut self.requests, &mut self.connection);
        let ready = poll_fn(|cx| {
            if requests.poll_ready(cx).is_ready() {
                return Poll::Ready(true);
            }
            Pin::new(&mut *connection).poll(cx).map(|_| false)
        });
        if !timeout(Duration::from_secs(5), ready).await.unwrap_or(false) {
            return false;
        }
        let Ok((response, mut body)) = self.requests.send_request(request, false) else { return false };
        if body.send_data(messages, end).is_err() {
            return false;
        }
        self.calls.push(Call { response, body });
        true
    }

    /// Waits for the head of the response to the last call; false when the connection or the call is over.
    pub(crate) async fn answered(&mut self) -> bool {
        let Some(Call { response, .. }) = self.calls.last_mut() else { return false };
        let connection = &mut self.connection;
        let answered = poll_fn(|cx| match Pin::new(&mut *response).poll(cx) {
            Poll::Ready(response) => Poll::Ready(response.is_ok()),
            Poll::Pending => Pin::new(&mut *connection).poll(cx).map(|_| false),
        });
        timeout(Duration::from_secs(20), answered).await.unwrap_or(false)
    }

    /// Waits for the head of a response. Its body is not read: no window is updated.
    pub(crate) async fn head(&mut self, call: usize) -> RecvStream {
        let (response, connection) = (&mut self.calls[call].response, &mut self.connection);
        let answered = poll_fn(|cx| {
            if let Poll::Ready(response) = Pin::new(&mut *response).poll(cx) {
                return Poll::Ready(response.expect("a response"));
            }
            let ended = Pin::new(&mut *connection).poll(cx);
            assert!(ended.is_pending(), "the connection is over before the response");
            Poll::Pending
        });
        timeout(Duration::from_secs(20), answered).await.expect("a response in time").into_body()
    }
}

/// Messages as gRPC frames them.
pub(crate) fn framed<'a, M: Message + 'a>(messages: impl IntoIterator<Item = &'a M>) -> Bytes {
    let mut bytes = BytesMut::new();
    for message in messages {
        bytes.put_u8(0);
        bytes.put_u32(u32::try_from(message.encoded_len()).expect("small"));
        message.encode(&mut bytes).expect("BytesMut grows");
    }
    bytes.freeze()
}
