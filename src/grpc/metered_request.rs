//! The messages of a call, charged to the memory of its connection until they are complete.

use std::{
    future::Future as _,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use tokio::time::{Sleep, sleep};
use tonic::{
    Status,
    body::Body,
    codegen::{Body as HttpBody, Bytes},
};

use super::{memory::ConnectionMemory, metered::FRAME_OVERHEAD};

/// How long a client may take for the rest of a message that it has begun, and for the one message of a call without a stream.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes before each message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// The messages of a call. The memory of each frame is released when all of it is read and the messages in it are
/// complete: tonic keeps the begin of a message until it has the rest.
pub(super) struct MeteredRequest {
    body: Body,
    memory: Arc<ConnectionMemory>,
    /// The rest of the frame that was read last.
    rest: Bytes,
    /// What that frame is charged until `rest` is empty: all of it, because `rest` keeps its buffer.
    charged: usize,
    begun: BegunMessage,
    /// Whether the one message of a call without a stream is still to come.
    awaits_message: bool,
    /// What earlier frames are charged for the begun message.
    charged_begun: usize,
    /// Runs while a message, or the rest of one, is awaited that has to come, for [`MESSAGE_TIMEOUT`].
    deadline: Option<Pin<Box<Sleep>>>,
    timeout: Duration,
    ended: bool,
}

/// How much of the last message was read.
#[derive(Debug, Default)]
struct BegunMessage {
    prefix: [u8; PREFIX_BYTES],
    /// Bytes of it that were read; 0 between messages.
    read: usize,
}

impl BegunMessage {
    fn read(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.read < PREFIX_BYTES {
                self.prefix[self.read] = bytes[0];
                self.read += 1;
                bytes = &bytes[1..];
            } else {
                let more = (self.len() - self.read).min(bytes.len());
                self.read += more;
                bytes = &bytes[more..];
            }
            if self.read >= PREFIX_BYTES && self.read == self.len() {
                self.read = 0;
            }
        }
    }

    /// Bytes of the message with its prefix, which must be complete.
    fn len(&self) -> usize {
        let [_, a, b, c, d] = self.prefix;
        PREFIX_BYTES + u32::from_be_bytes([a, b, c, d]) as usize
    }
}

impl MeteredRequest {
    /// Most bytes that tonic gets at once. tonic copies each piece behind the rest of the last message, into
    /// a buffer of 1 KiB that doubles when they do not fit, and that a waiting call keeps.
    const PIECE_BYTES: usize = 512;

    /// `is_stream`: any number of messages may come, at any time; else one does, at once.
    pub(super) fn new(body: Body, memory: Arc<ConnectionMemory>, is_stream: bool) -> Self {
        memory.request_opened();
        let (rest, begun) = (Bytes::new(), BegunMessage::default());
        let (deadline, timeout) = (None, MESSAGE_TIMEOUT);
        let awaits_message = !is_stream;
        Self {
            body,
            memory,
            rest,
            charged: 0,
            begun,
            awaits_message,
            charged_begun: 0,
            deadline,
            timeout,
            ended: false,
        }
    }

    fn next_piece(&mut self) -> http_body::Frame<Bytes> {
        let piece = self.rest.split_to(self.rest.len().min(Self::PIECE_BYTES));
        self.begun.read(&piece);
        self.awaits_message &= self.begun.read > 0;
        if self.rest.is_empty() {
            let charged = mem::take(&mut self.charged) + mem::replace(&mut self.charged_begun, self.begun.read);
            self.memory.release_received(charged - self.begun.read);
        }
        http_body::Frame::data(piece)
    }

    /// Ready when a message, or the rest of one, has been awaited for too long.
    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.begun.read == 0 && !self.awaits_message {
            self.deadline = None;
            return Poll::Pending;
        }
        let timeout = self.timeout;
        self.deadline.get_or_insert_with(|| Box::pin(sleep(timeout))).as_mut().poll(cx)
    }
}

impl HttpBody for MeteredRequest {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Status>>> {
        if self.rest.is_empty() {
            let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
                ready!(self.poll_deadline(cx));
                let err = format!("a message took longer than {:?}", self.timeout);
                return Poll::Ready(Some(Err(Status::deadline_exceeded(err))));
            };
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        self.charged = data.len() + FRAME_OVERHEAD;
                        self.rest = data;
                    }
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                end => {
                    self.ended = true;
                    return Poll::Ready(end);
                }
            }
        }
        Poll::Ready(Some(Ok(self.next_piece())))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }
}

impl Drop for MeteredRequest {
    fn drop(&mut self) {
        self.memory.release_received(self.charged + self.charged_begun);
        // h2 drops the unread frames of a call without a notification, so they are read and released here.
        let mut cx = Context::from_waker(Waker::noop());
        while !self.ended
            && let Poll::Ready(Some(Ok(frame))) = Pin::new(&mut self.body).poll_frame(&mut cx)
        {
            if let Ok(data) = frame.into_data() {
                self.memory.release_received(data.len() + FRAME_OVERHEAD);
            }
        }
        self.memory.request_closed();
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt as _, StreamBody};

    use super::*;
    use crate::{
        grpc::memory::{LIMITS, MemoryBudget},
        metrics::Metrics,
    };

    /// A request of these frames, which then waits for more, and the metrics that show what it is charged.
    fn request(frames: Vec<Vec<u8>>) -> (MeteredRequest, Arc<Metrics>) {
        let metrics = Arc::new(Metrics::new());
        let memory = MemoryBudget::new(LIMITS, Arc::clone(&metrics)).connection();
        frames.iter().for_each(|frame| memory.charge_received(frame.len() + FRAME_OVERHEAD));
        let frames = frames.into_iter().map(|frame| Ok::<_, Status>(http_body::Frame::data(Bytes::from(frame))));
        let frames = futures::StreamExt::chain(futures::stream::iter(frames), futures::stream::pending());
        (MeteredRequest::new(Body::new(StreamBody::new(frames)), memory, true), metrics)
    }

    /// A message of so many bytes with its prefix.
    fn message(bytes: usize) -> Vec<u8> {
        let mut message = vec![0; bytes];
        message[1..PREFIX_BYTES].copy_from_slice(&u32::try_from(bytes - PREFIX_BYTES).expect("short").to_be_bytes());
        message
    }

    async fn read(request: &mut MeteredRequest) -> usize {
        let piece = request.frame().await.expect("more").expect("a good frame");
        piece.into_data().expect("DATA").len()
    }

    #[tokio::test]
    async fn begun_message_is_charged_until_it_is_complete() {
        let all = [message(5), message(7), message(700)].concat();
        // In two pieces, wherever they are cut, and byte by byte.
        let cuts = (1..all.len()).map(|at| vec![all[..at].to_vec(), all[at..].to_vec()]);
        for frames in cuts.chain([all.iter().map(|byte| vec![*byte]).collect()]) {
            let (mut request, metrics) = request(frames);
            let mut seen = 0;
            while seen < all.len() {
                seen += read(&mut request).await;
                let begun = [0, 5, 12].into_iter().rfind(|begin| *begin <= seen).expect("0 is there");
                let complete = [5, 12, 712].contains(&seen);
                assert_eq!(request.begun.read, if complete { 0 } else { seen - begun }, "after {seen} bytes");
            }
            assert_eq!((request.charged_begun, metrics.grpc.buffered_bytes.get()), (0, 0));
        }
        let (mut request, metrics) = request(vec![all[..600].to_vec()]);
        while request.begun.read < 588 {
            read(&mut request).await;
        }
        assert_eq!(metrics.grpc.buffered_bytes.get(), 588);
        drop(request);
        assert_eq!(metrics.grpc.buffered_bytes.get(), 0);
    }

    #[tokio::test]
    async fn rest_of_a_message_has_a_deadline_and_the_next_message_has_none() {
        let timeout = Duration::from_millis(10);
        let (mut begun, _) = request(vec![message(100)[..50].to_vec()]);
        begun.timeout = timeout;
        assert_eq!(read(&mut begun).await, 50);
        let err = begun.frame().await.expect("an error").expect_err("too late");
        assert_eq!(err.code(), tonic::Code::DeadlineExceeded);
        let (mut complete, _) = request(vec![message(100)]);
        complete.timeout = timeout;
        assert_eq!(read(&mut complete).await, 100);
        let waited = tokio::time::timeout(10 * timeout, complete.frame()).await;
        assert!(waited.is_err(), "an idle stream stays open");
        let (mut unary, _) = request(Vec::new());
        (unary.timeout, unary.awaits_message) = (timeout, true);
        let err = unary.frame().await.expect("an error").expect_err("its message does not come");
        assert_eq!(err.code(), tonic::Code::DeadlineExceeded);
    }

    #[tokio::test]
    async fn frame_is_charged_until_all_of_it_is_read() {
        // Messages without content, of a prefix only.
        const FRAME: usize = 3_200 * PREFIX_BYTES;
        let metrics = Arc::new(Metrics::new());
        let memory = MemoryBudget::new(LIMITS, Arc::clone(&metrics)).connection();
        let frame = Ok::<_, Status>(http_body::Frame::data(Bytes::from_static(&[0; FRAME])));
        memory.charge_received(FRAME + FRAME_OVERHEAD);
        let mut request = MeteredRequest::new(Body::new(StreamBody::new(futures::stream::iter([frame]))), memory, true);
        let mut read = 0;
        while read < FRAME {
            // The rest of a frame keeps the buffer of the whole frame.
            assert_eq!(metrics.grpc.buffered_bytes.get(), (FRAME + FRAME_OVERHEAD) as i64, "after {read} bytes");
            let piece = request.frame().await.expect("more of the frame").expect("a good frame");
            read += piece.into_data().expect("DATA").len();
        }
        assert_eq!(metrics.grpc.buffered_bytes.get(), 0);
    }
}
