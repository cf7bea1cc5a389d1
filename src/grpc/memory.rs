//! One budget for the memory that gRPC peers can make the server hold.
//!
//! Three kinds of memory grow when a peer is fast to send or slow to read: DATA frames that their call
//! has not read, registrations that are not answered, and responses that the peer has not read. Each is
//! charged to its connection and to the budget of the process. While the budget is spent, a connection
//! that holds more than its guaranteed part waits: its socket is not read, its streams read no more
//! messages, and their responses are not encoded. All other connections continue. A connection whose
//! peer has left a response unread for [`MemoryLimits::unread`] is closed.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use futures::task::AtomicWaker;
use tokio::time::{Sleep, sleep};
use tracing::warn;

use crate::metrics::{CloseReason, LabelEnum as _, ListenerKind, Metrics};

/// How much memory peers may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct MemoryLimits {
    /// Bytes of all connections together.
    pub(super) total: usize,
    /// Bytes of registrations that are read and not answered, of all connections together. Bounds the
    /// queue ahead of a new registrant to some 36 000 registrations.
    pub(super) unanswered: usize,
    /// Bytes of one connection: a part of the total, so that no connection can spend all of it.
    pub(super) per_connection: usize,
    /// Bytes of each kind (received, unanswered, unsent) that every connection may take, even when
    /// the total is spent.
    pub(super) guaranteed: usize,
    /// Bytes of encoded responses of one call that the peer has not read.
    pub(super) unsent_per_call: usize,
    /// How long a peer may read none of the encoded responses of a call.
    pub(super) unread: Duration,
}

pub(super) const LIMITS: MemoryLimits = MemoryLimits {
    total: 64 * 1024 * 1024,
    unanswered: 16 * 1024 * 1024,
    per_connection: 16 * 1024 * 1024,
    guaranteed: 8 * 1024,
    unsent_per_call: 16 * 1024,
    unread: Duration::from_secs(10),
};

/// Between two warnings about closed connections, so that an attack does not fill the log.
const WARN_INTERVAL: Duration = Duration::from_secs(60);

/// Between two checks of a spent budget: memory that other connections release wakes no waiting task.
const BUDGET_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Checks a spent budget at intervals. `None` while the budget has room.
#[derive(Debug, Default)]
pub(super) struct BudgetTimer(Option<Pin<Box<Sleep>>>);

impl BudgetTimer {
    /// Ready as soon as `has_room` returns true. `has_room` gets the task's waker, for memory whose
    /// release wakes the task before the interval is over.
    pub(super) fn poll_until(&mut self, cx: &mut Context<'_>, has_room: impl Fn(&Waker) -> bool) -> Poll<()> {
        loop {
            if has_room(cx.waker()) {
                self.0 = None;
                return Poll::Ready(());
            }
            let timer = self.0.get_or_insert_with(|| Box::pin(sleep(BUDGET_POLL_INTERVAL)));
            ready!(timer.as_mut().poll(cx));
            timer.as_mut().reset(tokio::time::Instant::now() + BUDGET_POLL_INTERVAL);
        }
    }
}

/// The budget of the process.
#[derive(Debug)]
pub(super) struct MemoryBudget {
    limits: MemoryLimits,
    used: AtomicUsize,
    unanswered: AtomicUsize,
    epoch: Instant,
    last_warning: Mutex<Option<Instant>>,
    metrics: Arc<Metrics>,
}

impl MemoryBudget {
    pub(super) fn new(limits: MemoryLimits, metrics: Arc<Metrics>) -> Arc<Self> {
        let last_warning = Mutex::new(None);
        let (used, unanswered) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Arc::new(Self { limits, used, unanswered, epoch: Instant::now(), last_warning, metrics })
    }

    /// The account of a new connection.
    pub(super) fn connection(self: &Arc<Self>) -> Arc<ConnectionMemory> {
        Arc::new(ConnectionMemory {
            budget: Arc::clone(self),
            used: AtomicUsize::new(0),
            unanswered: AtomicUsize::new(0),
            received: AtomicUsize::new(0),
            unsent_bytes: AtomicUsize::new(0),
            open_requests: AtomicUsize::new(0),
            reader: AtomicWaker::new(),
            unsent: Mutex::new(Vec::new()),
        })
    }

    /// Counts a connection that is closed because of its peer, and logs at most one a minute.
    pub(super) fn closed(&self, reason: CloseReason) {
        self.metrics.connections.closed.at((ListenerKind::Grpc, reason)).inc();
        let mut last = self.last_warning.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_none_or(|last| last.elapsed() >= WARN_INTERVAL) {
            *last = Some(Instant::now());
            warn!(
                reason = reason.as_str(),
                "a gRPC connection is closed; further ones are not logged for a minute, \
                 gangplank_connections_closed_total counts them"
            );
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// The memory of one connection.
#[derive(Debug)]
pub(super) struct ConnectionMemory {
    budget: Arc<MemoryBudget>,
    used: AtomicUsize,
    /// The part of `used` for registrations without an answer.
    unanswered: AtomicUsize,
    /// The part of `used` for DATA frames that no call has read.
    received: AtomicUsize,
    /// The part of `used` for responses that the peer has not read.
    unsent_bytes: AtomicUsize,
    /// Calls that can still read messages.
    open_requests: AtomicUsize,
    /// The connection's task, while it waits for memory to read its socket.
    reader: AtomicWaker,
    /// Calls that may have responses which the peer has not read.
    unsent: Mutex<Vec<Arc<Unsent>>>,
}

impl ConnectionMemory {
    /// Whether this connection may take more of one kind, of which it holds `used` bytes.
    fn has_room(&self, used: usize) -> bool {
        let MemoryLimits { total, per_connection, guaranteed, .. } = self.budget.limits;
        let room =
            // Relaxed throughout: each sum is a limit that may be passed by what a few threads add at once, and guards
            // no other memory.
            used < guaranteed || (self.used.load(Relaxed) < per_connection && self.budget.used.load(Relaxed) < total);
        if !room {
            self.budget.metrics.grpc.memory_waits.inc();
        }
        room
    }

    /// Whether another registration may be read.
    pub(super) fn may_submit(&self) -> bool {
        let unanswered = self.unanswered.load(Relaxed);
        let MemoryLimits { unanswered: total, guaranteed, .. } = self.budget.limits;
        let room = unanswered < guaranteed
            // At most a quarter for one connection, so that a bulk load does not stop all others.
            || (unanswered < total / 4 && self.budget.unanswered.load(Relaxed) < total);
        room && self.has_room(unanswered)
    }

    /// Whether another response may be encoded.
    fn may_encode(&self) -> bool {
        self.has_room(self.unsent_bytes.load(Relaxed))
    }

    /// Charges one registration.
    pub(super) fn charge_unanswered(&self, bytes: usize) {
        self.unanswered.fetch_add(bytes, Relaxed);
        // Counted for the connection and for all, so that neither check has to add up the other connections.
        self.budget.unanswered.fetch_add(bytes, Relaxed);
        self.charge(bytes);
    }

    /// Releases registrations that were answered or whose stream has ended.
    pub(super) fn release_unanswered(&self, bytes: usize) {
        self.unanswered.fetch_sub(bytes, Relaxed);
        self.budget.unanswered.fetch_sub(bytes, Relaxed);
        self.release(bytes);
    }

    /// Whether the socket may be read. Unsent responses do not count: the WINDOW_UPDATE frames that let
    /// them go have to be read from the same socket.
    pub(super) fn may_receive(&self) -> bool {
        self.has_room(self.received.load(Relaxed))
    }

    /// Wakes this task when the connection has released some memory.
    pub(super) fn register_reader(&self, waker: &std::task::Waker) {
        self.reader.register(waker);
    }

    fn charge(&self, bytes: usize) {
        self.used.fetch_add(bytes, Relaxed);
        self.budget.used.fetch_add(bytes, Relaxed);
        self.budget.metrics.grpc.buffered_bytes.inc_by(bytes as i64);
    }

    fn release(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Relaxed);
        self.budget.used.fetch_sub(bytes, Relaxed);
        self.budget.metrics.grpc.buffered_bytes.dec_by(bytes as i64);
        // Only its own connection: waking all would make each release cost as many wake-ups as there are connections.
        // The others poll.
        self.reader.wake();
    }

    /// Charges DATA frames that were received.
    pub(super) fn charge_received(&self, bytes: usize) {
        self.received.fetch_add(bytes, Relaxed);
        self.charge(bytes);
    }

    /// Releases DATA frames that a call has read; never more than was charged.
    pub(super) fn release_received(&self, bytes: usize) {
        // Saturating, because `request_closed` may have released the same frames already.
        let taken = self.received.fetch_update(Relaxed, Relaxed, |held| Some(held.saturating_sub(bytes)));
        let held = taken.unwrap_or_default();
        self.release(held.min(bytes));
    }

    pub(super) fn request_opened(&self) {
        self.open_requests.fetch_add(1, Relaxed);
    }

    /// Releases all received frames when no call is left that could read them: h2 has dropped them.
    /// Otherwise frames that arrived after the end of their call would stay charged for ever.
    pub(super) fn request_closed(&self) {
        if self.open_requests.fetch_sub(1, Relaxed) == 1 {
            self.release_received(usize::MAX);
        }
    }

    /// The account of a new call's responses.
    pub(super) fn responses(self: &Arc<Self>) -> Responses {
        /// Length of the list from which on ended calls are removed.
        const PRUNE_LEN: usize = 256;
        let unsent = Arc::new(Unsent::default());
        let mut calls = self.lock_unsent();
        // Amortised: a connection that makes calls one after the other would otherwise walk the list for each.
        if calls.len() >= PRUNE_LEN {
            calls.retain(Unsent::is_needed);
        }
        calls.push(Arc::clone(&unsent));
        drop(calls);
        Responses { memory: Arc::clone(self), unsent }
    }

    /// Whether the peer has left the responses of some call unread for too long.
    pub(super) fn is_unread(&self) -> bool {
        let now = self.budget.now();
        let deadline = u64::try_from(self.budget.limits.unread.as_millis()).unwrap_or(u64::MAX);
        let overdue = |call: &Arc<Unsent>| {
            call.bytes.load(Relaxed) > 0 && now.saturating_sub(call.progress.load(Relaxed)) >= deadline
        };
        let mut calls = self.lock_unsent();
        calls.retain(Unsent::is_needed);
        calls.iter().any(overdue)
    }

    /// Whether some response has not been read by the peer.
    pub(super) fn has_unsent(&self) -> bool {
        self.unsent_bytes.load(Relaxed) > 0
    }

    /// How often to check [`ConnectionMemory::is_unread`].
    pub(super) fn unread_interval(&self) -> Duration {
        self.budget.limits.unread / 8
    }

    pub(super) fn budget(&self) -> &MemoryBudget {
        &self.budget
    }

    fn lock_unsent(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Unsent>>> {
        // Each change of the list is one call, so a poisoned lock guards a consistent list.
        self.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ConnectionMemory {
    fn drop(&mut self) {
        // Calls and responses hold this value, so only unread frames are still charged.
        let left = self.used.load(Relaxed);
        self.release(left);
    }
}

/// The responses of one call that its peer has not read.
#[derive(Debug, Default)]
struct Unsent {
    bytes: AtomicUsize,
    /// When the peer last read some of them, or the first one was encoded: milliseconds since
    /// `MemoryBudget::epoch`.
    progress: AtomicU64,
    call: AtomicWaker,
}

impl Unsent {
    /// False for an ended call whose responses were all read.
    fn is_needed(self: &Arc<Self>) -> bool {
        // One reference is the list's own.
        Arc::strong_count(self) > 1 || self.bytes.load(Relaxed) > 0
    }
}

/// The account of the responses of one open call.
#[derive(Debug)]
pub(super) struct Responses {
    memory: Arc<ConnectionMemory>,
    unsent: Arc<Unsent>,
}

impl Responses {
    /// Whether another response may be encoded. If not, `waker` is woken when the peer has read some of
    /// this call's responses, but not when other calls release memory: the caller polls for that.
    pub(super) fn may_encode(&self, waker: &std::task::Waker) -> bool {
        let limit = self.memory.budget.limits.unsent_per_call;
        let may = || self.unsent.bytes.load(Relaxed) < limit && self.memory.may_encode();
        if may() {
            return true;
        }
        self.unsent.call.register(waker);
        // Again: memory that was released just before the waker was registered has woken no task.
        may()
    }

    /// Charges encoded responses until the returned bytes are dropped: the transport drops them after it
    /// has written them to the socket.
    pub(super) fn charged(&self, bytes: bytes::Bytes) -> bytes::Bytes {
        /// Bytes of a chunk besides its content: its part of the encoder's buffer, and h2's slot for the
        /// frame, in a slab that doubles when it grows and never shrinks.
        const CHUNK_OVERHEAD: usize = 1024;
        if bytes.is_empty() {
            return bytes;
        }
        let charge = bytes.len() + CHUNK_OVERHEAD;
        // The deadline counts from the first byte that waits: an idle stream is not behind.
        if self.unsent.bytes.fetch_add(charge, Relaxed) == 0 {
            self.unsent.progress.store(self.memory.budget.now(), Relaxed);
        }
        self.memory.unsent_bytes.fetch_add(charge, Relaxed);
        self.memory.charge(charge);
        let (memory, unsent) = (Arc::clone(&self.memory), Arc::clone(&self.unsent));
        bytes::Bytes::from_owner(UnsentChunk { bytes, charge, memory, unsent })
    }
}

impl Drop for Responses {
    fn drop(&mut self) {
        // The transport still holds responses of the ended call: they keep their charge and their deadline.
        if self.unsent.bytes.load(Relaxed) > 0 {
            return;
        }
        let mut calls = self.memory.lock_unsent();
        if let Some(index) = calls.iter().position(|other| Arc::ptr_eq(other, &self.unsent)) {
            calls.swap_remove(index);
        }
    }
}

/// An encoded response that is charged until it is dropped.
struct UnsentChunk {
    bytes: bytes::Bytes,
    charge: usize,
    memory: Arc<ConnectionMemory>,
    unsent: Arc<Unsent>,
}

impl AsRef<[u8]> for UnsentChunk {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for UnsentChunk {
    fn drop(&mut self) {
        self.unsent.progress.store(self.memory.budget.now(), Relaxed);
        self.unsent.bytes.fetch_sub(self.charge, Relaxed);
        self.memory.unsent_bytes.fetch_sub(self.charge, Relaxed);
        self.memory.release(self.charge);
        self.unsent.call.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    fn budget() -> Arc<MemoryBudget> {
        let limits = MemoryLimits {
            total: 1_000_000,
            unanswered: 400_000,
            per_connection: 600_000,
            guaranteed: 10_000,
            unsent_per_call: 16_000,
            unread: Duration::ZERO,
        };
        MemoryBudget::new(limits, Arc::new(Metrics::new()))
    }

    #[test]
    fn connection_has_its_guaranteed_part_when_the_budget_is_spent() {
        let budget = budget();
        let (first, second, third) = (budget.connection(), budget.connection(), budget.connection());
        first.charge_received(600_000);
        assert!(!first.may_receive(), "the part of one connection is spent");
        assert!(second.may_receive());
        second.charge_received(400_000);
        assert!(!second.may_receive(), "the budget is spent");
        assert!(third.may_receive() && third.may_submit(), "the guaranteed part is there");
        third.charge_received(10_000);
        assert!(!third.may_receive());
        first.release_received(300_000);
        assert!(third.may_receive() && second.may_receive());
        drop((first, second, third));
        assert_eq!(budget.used.load(Relaxed), 0, "a closed connection has released its memory");
        assert_eq!(budget.metrics.grpc.buffered_bytes.get(), 0);
    }

    #[test]
    fn received_registration_is_answered_when_the_budget_is_spent() {
        let budget = budget();
        let (first, second) = (budget.connection(), budget.connection());
        first.charge_received(600_000);
        second.charge_received(400_000);
        assert!(first.may_submit(), "a registration is read");
        first.charge_unanswered(10_000);
        assert!(!first.may_submit(), "its guaranteed part is spent");
        let (call, other) = (first.responses(), first.responses());
        assert!(call.may_encode(Waker::noop()), "and its response sent");
        let chunk = call.charged(bytes::Bytes::from_static(&[0; 10_000]));
        assert!(!other.may_encode(Waker::noop()), "unsent responses are bounded for all calls of a connection");
        drop(chunk);
        assert!(other.may_encode(Waker::noop()));
    }

    #[test]
    fn unanswered_registrations_of_one_connection_are_limited_to_a_quarter() {
        let budget = budget();
        let (bulk, other) = (budget.connection(), budget.connection());
        bulk.charge_unanswered(100_000);
        assert!(!bulk.may_submit() && bulk.may_receive());
        assert!(other.may_submit());
        bulk.release_unanswered(100_000);
        assert!(bulk.may_submit());
    }

    #[test]
    fn response_is_charged_and_unread_until_it_is_written() {
        let memory = budget().connection();
        let call = memory.responses();
        assert!(!memory.has_unsent() && !memory.is_unread());
        let chunk = call.charged(bytes::Bytes::from_static(&[0; 16_000]));
        assert!(!call.may_encode(Waker::noop()), "the call has as much unsent as it may");
        drop(call);
        assert!(memory.has_unsent() && memory.is_unread(), "also after the end of the call");
        drop(chunk);
        assert!(!memory.has_unsent() && !memory.is_unread());
        assert_eq!(memory.used.load(Relaxed), 0);
    }
}
