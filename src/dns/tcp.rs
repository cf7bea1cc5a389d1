//! DNS over TCP (RFC 7766, RFC 9210), with a limit on every resource that a peer can take.
//!
//! A connection is one task that reads the available octets, answers the questions, writes the answers
//! together and only then reads again. So the unanswered questions of a peer are bounded by one turn, and
//! the server does not read from a peer that does not read its answers. A turn that did not wait for the
//! peer ends with a yield, so that a fast peer does not delay the others. An idle connection holds a few
//! hundred bytes; the large buffer for an answer belongs to the thread.

use std::{
    cell::RefCell,
    io::{self, Read as _},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
    task::yield_now,
    time::{Instant, Sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    TcpLimits,
    answer::{MAX_TCP, Transport},
    responder::Responder,
};
use crate::{
    metrics::{CloseReason, Metrics},
    net::{self, ConnectionHandle, ConnectionLimiter, InUse, Permit, Signal},
};

/// Octets of the length before each message (RFC 1035 §4.2.2).
const PREFIX: usize = 2;

/// Octets of a header (RFC 1035 §4.1.1): no shorter message can be answered.
const HEADER: usize = 12;

/// Octets of one read: several questions, or a part of a long one.
const READ_SIZE: usize = 4096;

/// Octets of collected answers from which on they are written.
const WRITE_THRESHOLD: usize = 65_536;

/// Bytes of unread answers and unfinished questions of all peers together. Beyond this limit, the peer with
/// the most stalled connections loses one.
const MAX_HELD_BYTES: usize = 32 << 20;

thread_local! {
    /// Buffer for one answer: the length, which precedes the answer, is known only after it is written.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; MAX_TCP].into());
}

/// The state that the connections of all TCP listeners share.
#[derive(Debug)]
pub(super) struct TcpState {
    limits: TcpLimits,
    limiter: Arc<ConnectionLimiter>,
    held: AtomicUsize,
    metrics: Arc<Metrics>,
}

impl TcpState {
    pub(super) fn new(limits: TcpLimits, limiter: Arc<ConnectionLimiter>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { limits, limiter, held: AtomicUsize::new(0), metrics })
    }

    /// Counts `bytes` that are held while `connection` waits for its peer.
    fn hold(self: &Arc<Self>, bytes: usize, connection: &ConnectionHandle) -> Held {
        // Relaxed: the sum is a limit, not a lock, and a few connections may pass it together.
        let all = self.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.metrics.connections.dns_held_bytes.set(all as u64);
        let held = Held { bytes, shared: Arc::clone(self), _in_use: connection.begin_use() };
        if all > MAX_HELD_BYTES {
            self.limiter.evict_stalled();
        }
        held
    }
}

/// Counted bytes, until the value is dropped.
struct Held {
    bytes: usize,
    shared: Arc<TcpState>,
    _in_use: InUse,
}

impl Drop for Held {
    fn drop(&mut self) {
        // A sum for the limit of all connections. It guards nothing else.
        let before = self.shared.held.fetch_sub(self.bytes, Ordering::Relaxed);
        self.shared.metrics.connections.dns_held_bytes.set((before - self.bytes) as u64);
    }
}

/// Accepts until `stop`, then waits until the read questions of every connection are answered.
pub(super) async fn serve(listener: TcpListener, responder: Responder, shared: Arc<TcpState>, stop: CancellationToken) {
    // One deadline for the last answers, and one for the end of the connection.
    let grace = shared.limits.message * 2;
    net::serve(listener, Arc::clone(&shared.limiter), grace, stop, move |stream, permit| {
        let (responder, shared) = (responder.clone(), Arc::clone(&shared));
        async move { TcpConnection::new(stream, permit, responder, shared).serve().await }
    })
    .await;
}

/// Why a connection ends early: a limit, or the peer or the server ended it.
type EarlyEnd = Option<CloseReason>;

/// One connection.
struct TcpConnection {
    permit: Permit,
    stream: TcpStream,
    responder: Responder,
    shared: Arc<TcpState>,
    rng: fastrand::Rng,
    received: Vec<u8>,
    /// When the current wait ends, and the reason with which the connection is then closed.
    deadline: (Instant, CloseReason),
    /// Elapses at the deadline or before: a later deadline does not reset it, which would cost a lock of the
    /// runtime's timers.
    timer: Pin<Box<Sleep>>,
    /// Whether the task has waited for the peer since it last yielded.
    has_waited: bool,
}

/// The direction of a wait.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

impl TcpConnection {
    fn new(stream: TcpStream, permit: Permit, responder: Responder, shared: Arc<TcpState>) -> Self {
        // Answers are collected here, so Nagle's delay would only make them late.
        let _ = stream.set_nodelay(true);
        // A connection that never asks is idle from its begin on (RFC 7766 §6.2.3).
        let until = Instant::now() + shared.limits.idle;
        Self {
            permit,
            stream,
            responder,
            shared,
            rng: fastrand::Rng::new(),
            received: Vec::new(),
            deadline: (until, CloseReason::Idle),
            timer: Box::pin(sleep_until(until)),
            has_waited: false,
        }
    }

    async fn serve(mut self) {
        if let Err(reason) = self.answer_until_end().await {
            if let Some(reason) = reason {
                self.permit.handle().count_closed(reason);
            }
            if reason != Some(CloseReason::Malformed) {
                // The peer does not read the socket's buffer. A reset frees the buffer at once.
                let _ = socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
            }
        }
        let Self { permit, stream, .. } = self;
        // Released before the socket is closed, so that a peer that reconnects at once is admitted.
        drop(permit);
        drop(stream);
    }

    async fn answer_until_end(&mut self) -> Result<(), EarlyEnd> {
        while self.read().await? {
            let has_answered = self.answer_all().await?;
            self.deadline = match self.deadline {
                _ if self.received.is_empty() => self.after(self.shared.limits.idle, CloseReason::Idle),
                // The deadline counts from the first octet of a message: further octets do not extend it.
                (_, CloseReason::SlowRequest) if !has_answered => self.deadline,
                _ => self.after(self.shared.limits.message, CloseReason::SlowRequest),
            };
        }
        // The peer has closed its side, or the server stops: received questions are answered before the end.
        // Bounded: a peer that goes on sending must not hold up the stop.
        while self.received.len() < WRITE_THRESHOLD && self.read_from_socket() > 0 {}
        self.answer_all().await?;
        self.stream.shutdown().await.map_err(|_| None)
    }

    fn after(&self, time: Duration, reason: CloseReason) -> (Instant, CloseReason) {
        (Instant::now() + time, reason)
    }

    /// Waits for octets and reads them. Returns false when the peer has closed its side or the server stops.
    async fn read(&mut self) -> Result<bool, EarlyEnd> {
        // A peer whose octets are always there would keep the thread for itself.
        if !std::mem::take(&mut self.has_waited) {
            yield_now().await;
        }
        // The buffer of a long unfinished question counts, because its peer may never finish it.
        let _held =
            (self.received.len() > READ_SIZE).then(|| self.shared.hold(self.received.capacity(), self.permit.handle()));
        loop {
            if self.permit.handle().signal() >= Signal::Drain {
                return Ok(false);
            }
            match self.read_now()? {
                Some(octets) => return Ok(octets > 0),
                None => self.wait(Direction::Read).await?,
            }
        }
    }

    /// Reads the available octets without waiting; `None` if there are none.
    fn read_now(&mut self) -> Result<Option<usize>, EarlyEnd> {
        self.received.reserve(READ_SIZE);
        match self.stream.try_read_buf(&mut self.received) {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => Ok(None),
            read => read.map(Some).map_err(|_| None),
        }
    }

    /// Reads the available octets, also those that the runtime has not noticed yet: to the runtime a socket without news is empty.
    /// Returns how many.
    fn read_from_socket(&mut self) -> usize {
        let before = self.received.len();
        self.received.resize(before + READ_SIZE, 0);
        let read = (&*socket2::SockRef::from(&self.stream)).read(&mut self.received[before..]);
        let octets = read.unwrap_or(0);
        self.received.truncate(before + octets);
        octets
    }

    /// Answers every complete message and keeps the rest. Returns whether there was a complete message.
    async fn answer_all(&mut self) -> Result<bool, EarlyEnd> {
        let (mut taken, mut answers) = (0, Vec::new());
        loop {
            let turn = self.answer_some(taken, &mut answers);
            taken += turn.octets;
            if turn.octets > 0 {
                // Before the peer has its answers: it may open the connection that needs the place of an idle one.
                self.permit.handle().touch();
            }
            // RFC 7766 §6.2.1.1: the answers to pipelined questions are written together.
            self.write(&answers).await?;
            if turn.is_malformed {
                return Err(Some(CloseReason::Malformed));
            }
            if turn.octets == 0 {
                break;
            }
            answers.clear();
            if taken < self.received.len() && !std::mem::take(&mut self.has_waited) {
                yield_now().await;
            }
        }
        if taken == self.received.len() {
            // An idle connection keeps no buffer: there may be thousands.
            self.received = Vec::new();
        } else {
            self.received.drain(..taken);
        }
        Ok(taken > 0)
    }

    /// Answers the complete messages in `received` from `begin` on, up to the limits of one turn.
    fn answer_some(&mut self, begin: usize, answers: &mut Vec<u8>) -> ReadTurn {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut turn = ReadTurn { octets: 0, is_malformed: false };
            // At least one, or a turn would make no progress and the connection would spin.
            for _ in 0..self.shared.limits.pipelined.max(1) {
                let Some((message, octets)) = split_message(&self.received[begin + turn.octets..]) else { break };
                // Over UDP such packets get no answer. Over TCP they would cost work and keep the
                // connection open, so the connection is closed.
                if message.len() < HEADER || is_response(message) {
                    turn.is_malformed = true;
                    break;
                }
                turn.octets += octets;
                if let Some(len) = self.responder.respond(Transport::Tcp, &mut self.rng, message, scratch) {
                    let prefix = u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes();
                    answers.extend_from_slice(&prefix);
                    answers.extend_from_slice(&scratch[..len]);
                }
                if answers.len() >= WRITE_THRESHOLD {
                    break;
                }
            }
            turn
        })
    }

    /// Writes `answers`. The deadline is for all of them together, so a peer that reads steadily but too slowly
    /// loses the connection too.
    async fn write(&mut self, answers: &[u8]) -> Result<(), EarlyEnd> {
        let mut rest = answers;
        let mut held = None;
        while !rest.is_empty() {
            match self.stream.try_write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                    // Counted from the first wait on: answers that the kernel takes at once are not held.
                    if held.is_none() {
                        held = Some(self.shared.hold(answers.len(), self.permit.handle()));
                        self.deadline = self.after(self.shared.limits.message, CloseReason::SlowReader);
                    }
                    self.wait(Direction::Write).await?;
                }
                Err(_) => return Err(None),
            }
        }
        Ok(())
    }

    /// Waits until the stream is ready, the server stops (when reading), or the deadline passes.
    async fn wait(&mut self, direction: Direction) -> Result<(), EarlyEnd> {
        // Only a deadline that comes earlier moves the timer. A later one is noticed when the timer elapses.
        if self.deadline.0 < self.timer.deadline() {
            self.timer.as_mut().reset(self.deadline.0);
        }
        std::future::poll_fn(|cx| self.poll_wait(cx, direction)).await
    }

    fn poll_wait(&mut self, cx: &mut Context<'_>, direction: Direction) -> Poll<Result<(), EarlyEnd>> {
        // After the stop, answers are still written to their end.
        let at_least = if direction == Direction::Read { Signal::Drain } else { Signal::Close };
        if let Poll::Ready(signal) = self.permit.handle().poll_signal(cx, at_least) {
            return Poll::Ready(if signal == Signal::Drain { Ok(()) } else { Err(None) });
        }
        let ready = match direction {
            Direction::Read => self.stream.poll_read_ready(cx),
            Direction::Write => self.stream.poll_write_ready(cx),
        };
        if let Poll::Ready(ready) = ready {
            return Poll::Ready(ready.map_err(|_| None));
        }
        self.has_waited = true;
        // It may have been set for a deadline that has moved since.
        while self.timer.as_mut().poll(cx).is_ready() {
            let (until, reason) = self.deadline;
            if until <= Instant::now() {
                return Poll::Ready(Err(Some(reason)));
            }
            self.timer.as_mut().reset(until);
        }
        Poll::Pending
    }
}

/// The result of one turn: the octets of the answered messages.
struct ReadTurn {
    octets: usize,
    is_malformed: bool,
}

/// Whether QR is set (RFC 1035 §4.1.1): an answer to a response could start a loop of two servers.
fn is_response(message: &[u8]) -> bool {
    message[2] & 0x80 != 0
}

/// The first message of `received` and its octets including the length, if the message is complete.
fn split_message(received: &[u8]) -> Option<(&[u8], usize)> {
    let (prefix, rest) = received.split_first_chunk::<PREFIX>()?;
    let len = usize::from(u16::from_be_bytes(*prefix));
    rest.get(..len).map(|message| (message, PREFIX + len))
}
