//! A connection whose DATA frames are charged to its memory as they arrive. While that memory is spent,
//! the connection is not read.
//!
//! h2 holds the frames that a call has not read. Its windows bound their payload, but each frame costs
//! some 250 bytes besides, so that 32 KiB of frames of one byte take 8 MiB. So the frames are counted
//! here, by their headers, on their way to h2.

use std::{
    collections::HashSet,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};
use tonic::transport::server::Connected;

use super::{
    memory::{BudgetTimer, ConnectionMemory},
    preface::PREFACE,
};
use crate::metrics::CloseReason;

/// Bytes of a DATA frame besides its payload: its slot in h2.
pub(super) const FRAME_OVERHEAD: usize = 256;

/// A connection with its memory.
pub(super) struct Metered<T> {
    io: T,
    memory: Arc<ConnectionMemory>,
    received: FrameScanner,
    sent: FrameScanner,
    open: OpenStreams,
    budget_timer: BudgetTimer,
    /// Set while the peer has responses to read.
    unread_timer: Option<Pin<Box<Sleep>>>,
}

impl<T> Metered<T> {
    pub(super) fn new(io: T, memory: Arc<ConnectionMemory>) -> Self {
        Self {
            io,
            memory,
            // The preface comes before the first frame and is none.
            received: FrameScanner { payload: PREFACE.len(), ..FrameScanner::default() },
            sent: FrameScanner::default(),
            open: OpenStreams::default(),
            budget_timer: BudgetTimer::default(),
            unread_timer: None,
        }
    }

    /// Fails when the peer has left a response unread for too long. Checked by reads and by writes: while
    /// a peer takes no responses, h2 only writes.
    fn check_unread(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let interval = self.memory.unread_interval();
        let Some(timer) = &mut self.unread_timer else {
            if self.memory.has_unsent() {
                let mut timer = Box::pin(sleep(interval));
                // Registers the task with the timer, which cannot have elapsed yet.
                let _ = timer.as_mut().poll(cx);
                self.unread_timer = Some(timer);
            }
            return Ok(());
        };
        while timer.as_mut().poll(cx).is_ready() {
            if self.memory.is_unread() {
                self.memory.budget().closed(CloseReason::SlowReader);
                return Err(io::ErrorKind::TimedOut.into());
            }
            if !self.memory.has_unsent() {
                self.unread_timer = None;
                return Ok(());
            }
            timer.as_mut().reset(Instant::now() + interval);
        }
        Ok(())
    }

    fn poll_budget(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let memory = &self.memory;
        self.budget_timer.poll_until(cx, |waker| {
            let may_receive = memory.may_receive();
            if !may_receive {
                memory.register_reader(waker);
            }
            may_receive
        })
    }
}

impl<T> Connected for Metered<T> {
    type ConnectInfo = Arc<ConnectionMemory>;

    fn connect_info(&self) -> Self::ConnectInfo {
        Arc::clone(&self.memory)
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Metered<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.check_unread(cx)?;
        if this.poll_budget(cx).is_pending() {
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut this.io).poll_read(cx, buf);
        let (memory, open) = (&this.memory, &mut this.open);
        this.received.scan(&buf.filled()[before..], &mut |frame| match frame {
            Http2Frame::Headers { stream, .. } => open.insert(stream),
            // Charged before h2 sees the frame. The call releases it when it reads it.
            Http2Frame::Data { stream, len, .. } if open.contains(stream) => {
                memory.charge_received(len + FRAME_OVERHEAD);
            }
            Http2Frame::Reset { stream } => open.remove(stream),
            Http2Frame::Data { .. } | Http2Frame::GoAway { .. } => {}
        });
        read
    }
}

impl<T: AsyncWrite + Unpin> Metered<T> {
    fn scan_sent(&mut self, bytes: &[u8]) {
        let (memory, open) = (&self.memory, &mut self.open);
        self.sent.scan(bytes, &mut |frame| match frame {
            Http2Frame::Headers { stream, ends: true }
            | Http2Frame::Data { stream, ends: true, .. }
            | Http2Frame::Reset { stream } => open.remove(stream),
            // RFC 9113 §7: 0 is NO_ERROR, which the server sends when it stops or when the connection is old.
            Http2Frame::GoAway { code: 1.. } => memory.budget().closed(CloseReason::Malformed),
            Http2Frame::Headers { .. } | Http2Frame::Data { .. } | Http2Frame::GoAway { .. } => {}
        });
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Metered<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check_unread(cx)?;
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        // Only what the socket has taken: the rest is offered again.
        if let Poll::Ready(Ok(count)) = written {
            self.scan_sent(&bytes[..count]);
        }
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check_unread(cx)?;
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        if let Poll::Ready(Ok(mut count)) = written {
            for slice in slices {
                let part = count.min(slice.len());
                self.scan_sent(&slice[..part]);
                count -= part;
            }
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_unread(cx)?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Streams whose call the server has not ended. A peer may send DATA on an ended one for as long as it likes:
/// h2 drops those frames, and no call would release them.
#[derive(Debug, Default)]
struct OpenStreams {
    open: HashSet<u32>,
    last: u32,
}

impl OpenStreams {
    fn insert(&mut self, stream: u32) {
        // RFC 9113 §5.1.1: the ids of new streams grow. Another HEADERS frame holds the trailers of a request.
        if stream > self.last {
            self.last = stream;
            self.open.insert(stream);
        }
    }

    fn remove(&mut self, stream: u32) {
        self.open.remove(&stream);
    }

    fn contains(&self, stream: u32) -> bool {
        self.open.contains(&stream)
    }
}

/// A frame of HTTP/2, of the kinds that are counted (RFC 9113 §4.1, §6.1, §6.2, §6.4, §6.8).
#[derive(Debug, PartialEq, Eq)]
enum Http2Frame {
    /// One that h2 keeps until its call reads it: not an empty one in the middle of a message.
    Data {
        stream: u32,
        /// Without padding, which h2 does not keep either.
        len: usize,
        /// Whether the sender has ended the stream.
        ends: bool,
    },
    Headers {
        stream: u32,
        ends: bool,
    },
    Reset {
        stream: u32,
    },
    GoAway {
        /// The error code.
        code: u32,
    },
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const GOAWAY: u8 = 7;

/// Flags of DATA (RFC 9113 §6.1); END_STREAM also of HEADERS (§6.2).
const END_STREAM: u8 = 1;
const PADDED: u8 = 8;

/// Finds frames in a stream of bytes that arrives in arbitrary pieces. Keeps no payload.
#[derive(Debug, Default)]
struct FrameScanner {
    header: [u8; 9],
    header_len: usize,
    /// Bytes until the next header.
    payload: usize,
    /// The DATA frame whose first octet, the length of its padding, is still to come.
    padded: Option<DataHeader>,
    /// The first bytes of a GOAWAY's payload, and how many: the last stream's id and the error code.
    goaway: Option<([u8; 8], usize)>,
}

impl FrameScanner {
    fn scan(&mut self, mut bytes: &[u8], found: &mut dyn FnMut(Http2Frame)) {
        while !bytes.is_empty() {
            if self.payload > 0 {
                let (payload, rest) = bytes.split_at(self.payload.min(bytes.len()));
                self.payload -= payload.len();
                bytes = rest;
                if let Some(DataHeader { stream, len, flags }) = self.padded.take() {
                    // The length of the padding is itself a part of the payload (RFC 9113 §6.1).
                    let padding = 1 + usize::from(payload[0]);
                    found_data(DataHeader { stream, len: len.saturating_sub(padding), flags }, found);
                }
                if let Some((head, len)) = &mut self.goaway {
                    let part = payload.len().min(head.len() - *len);
                    head[*len..*len + part].copy_from_slice(&payload[..part]);
                    *len += part;
                    if *len == head.len() {
                        let [_, _, _, _, code @ ..] = *head;
                        self.goaway = None;
                        found(Http2Frame::GoAway { code: u32::from_be_bytes(code) });
                    }
                }
                continue;
            }
            let (part, rest) = bytes.split_at((self.header.len() - self.header_len).min(bytes.len()));
            self.header[self.header_len..self.header_len + part.len()].copy_from_slice(part);
            self.header_len += part.len();
            bytes = rest;
            if self.header_len == self.header.len() {
                let [a, b, c, kind, flags, stream @ ..] = self.header;
                // RFC 9113 §4.1: the first bit is reserved.
                let stream = u32::from_be_bytes(stream) & (u32::MAX >> 1);
                self.header_len = 0;
                self.payload = u32::from_be_bytes([0, a, b, c]) as usize;
                // Its error code is in the payload, which may arrive in another read.
                self.goaway = (kind == GOAWAY).then_some(([0; 8], 0));
                let data = DataHeader { stream, len: self.payload, flags };
                match kind {
                    DATA if flags & PADDED != 0 && self.payload > 0 => self.padded = Some(data),
                    DATA => found_data(data, found),
                    HEADERS => found(Http2Frame::Headers { stream, ends: flags & END_STREAM != 0 }),
                    RST_STREAM => found(Http2Frame::Reset { stream }),
                    _ => {}
                }
            }
        }
    }
}

/// What the header of a DATA frame says.
#[derive(Debug)]
struct DataHeader {
    stream: u32,
    len: usize,
    flags: u8,
}

fn found_data(DataHeader { stream, len, flags }: DataHeader, found: &mut dyn FnMut(Http2Frame)) {
    let ends = flags & END_STREAM != 0;
    if len > 0 || ends {
        found(Http2Frame::Data { stream, len, ends });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_found_in_pieces_of_any_size() {
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]); // SETTINGS without a payload
        bytes.extend([0, 0, 3, 0, 0, 0, 0, 0, 1, 7, 7, 7]); // DATA of three bytes
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 0, 1]); // DATA, empty
        bytes.extend([0, 0, 6, 0, 8, 0, 0, 0, 1, 3, 7, 7, 0, 0, 0]); // DATA of two bytes and three of padding
        bytes.extend([0, 0, 4, 0, 8, 0, 0, 0, 1, 3, 0, 0, 0]); // DATA, padding alone
        bytes.extend([0, 0, 0, 0, 1, 0, 0, 0, 1]); // DATA, empty, END_STREAM
        bytes.extend([0, 0, 9, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 11, b'x']); // GOAWAY with a text
        bytes.extend([0, 0, 2, 1, 5, 0, 0, 0, 3, 0x88, 0x88]); // HEADERS, END_STREAM
        bytes.extend([0, 0, 4, 3, 0, 128, 0, 0, 5, 0, 0, 0, 0]); // RST_STREAM with the reserved bit
        bytes.extend([0, 1, 0, 0, 0, 0, 0, 0, 3]); // DATA whose payload is still to come
        let expected = [
            Http2Frame::Data { stream: 1, len: 3, ends: false },
            Http2Frame::Data { stream: 1, len: 2, ends: false },
            Http2Frame::Data { stream: 1, len: 0, ends: true },
            Http2Frame::GoAway { code: 11 },
            Http2Frame::Headers { stream: 3, ends: true },
            Http2Frame::Reset { stream: 5 },
            Http2Frame::Data { stream: 3, len: 256, ends: false },
        ];
        for piece in 1..bytes.len() {
            let mut scanner = FrameScanner { payload: PREFACE.len(), ..FrameScanner::default() };
            let mut found = Vec::new();
            bytes.chunks(piece).for_each(|bytes| scanner.scan(bytes, &mut |frame| found.push(frame)));
            assert_eq!(found, expected, "in pieces of {piece}");
        }
    }
}
