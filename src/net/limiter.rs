//! Who may be connected, and who has to go when there is no room.

use std::{
    cmp::Reverse,
    collections::{HashMap, hash_map::Entry},
    net::{IpAddr, Ipv6Addr},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures::task::AtomicWaker;
use tokio::{sync::Notify, time::timeout};

use crate::metrics::{CloseReason, ConnectionMetrics, LabelEnum as _, ListenerKind};

/// How long a new connection waits for an evicted one to be gone.
const EVICTION_TIMEOUT: Duration = Duration::from_secs(1);

/// Most victims that one search remembers.
const MAX_CANDIDATES: usize = 64;

/// Which connections may be closed for a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EvictionPolicy {
    /// Those that are not in use. When all are in use the new one is refused.
    Unused,
    /// Any; those that are not in use first.
    Any,
}

/// What a connection is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Signal {
    /// Go on.
    Serve = 0,
    /// Finish what was begun, then end: the server stops.
    Drain = 1,
    /// End now.
    Close = 2,
    /// The connection has ended.
    Ended = 3,
}

impl Signal {
    fn of(number: u8) -> Self {
        match number {
            0 => Self::Serve,
            1 => Self::Drain,
            2 => Self::Close,
            _ => Self::Ended,
        }
    }
}

/// The connections of one kind of listener, within its share of descriptors.
#[derive(Debug)]
pub struct ConnectionLimiter {
    kind: ListenerKind,
    max: usize,
    max_per_peer: Option<usize>,
    policy: EvictionPolicy,
    metrics: Arc<ConnectionMetrics>,
    /// Where the clock of [`ConnectionState::last_used`] begins.
    started: Instant,
    accepting: AtomicBool,
    table: Mutex<ConnectionTable>,
    /// Signalled for each connection that ends.
    released: Notify,
}

#[derive(Debug, Default)]
struct ConnectionTable {
    next_id: u64,
    open: HashMap<u64, Arc<ConnectionState>>,
    per_peer: HashMap<IpAddr, usize>,
    /// What the last search for victims found, the idlest last. Checked again before use.
    candidates: Vec<Candidate>,
    draining: bool,
}

#[derive(Debug)]
struct Candidate {
    connection: Arc<ConnectionState>,
    last_used: u64,
}

#[derive(Debug)]
struct ConnectionState {
    id: u64,
    /// As [`peer_group`] returns it.
    peer: IpAddr,
    /// Requests, streams or answers that are not finished.
    in_use: AtomicUsize,
    /// When the peer last began or ended something, in microseconds of the limiter's clock.
    last_used: AtomicU64,
    signal: AtomicU8,
    /// Who reads and writes, and who looks after the connection; one task may be both.
    io_waker: AtomicWaker,
    owner_waker: AtomicWaker,
}

impl ConnectionState {
    fn signal(&self) -> Signal {
        Signal::of(self.signal.load(Ordering::Acquire))
    }

    /// Signals only become stronger.
    fn raise(&self, signal: Signal) {
        self.signal.fetch_max(signal as u8, Ordering::AcqRel);
        self.io_waker.wake();
        self.owner_waker.wake();
    }

    fn is_in_use(&self) -> bool {
        self.in_use.load(Ordering::Relaxed) > 0
    }
}

impl ConnectionLimiter {
    /// A limiter that admits `max` connections, and of one peer `max_per_peer`. A peer is an IPv4
    /// address or an IPv6 /64, because one host has all of those.
    #[must_use]
    pub fn new(
        kind: ListenerKind,
        max: usize,
        max_per_peer: Option<usize>,
        policy: EvictionPolicy,
        metrics: Arc<ConnectionMetrics>,
    ) -> Arc<Self> {
        metrics.max.at(kind).set(max as u64);
        Arc::new(Self {
            kind,
            max,
            max_per_peer,
            policy,
            metrics,
            started: Instant::now(),
            accepting: AtomicBool::new(true),
            table: Mutex::default(),
            released: Notify::new(),
        })
    }

    /// The kind of listener, as logs and metrics name it.
    pub(super) fn listener(&self) -> &'static str {
        self.kind.as_str()
    }

    /// Counts a failed accept. Returns whether it is the first of an outage.
    pub(super) fn accept_failed(&self) -> bool {
        self.metrics.accept_errors.at(self.kind).inc();
        self.accepting.swap(false, Ordering::Relaxed)
    }

    /// Notes that accepting works. Returns whether it failed before.
    pub(super) fn accept_succeeded(&self) -> bool {
        !self.accepting.load(Ordering::Relaxed) && !self.accepting.swap(true, Ordering::Relaxed)
    }

    /// Admits a connection of `peer`. Where there is no room, the idlest connection of the peer that
    /// has most is closed first.
    ///
    /// # Errors
    /// When the peer has as many as it may, nobody can be closed, or the server stops.
    pub async fn acquire(self: &Arc<Self>, peer: IpAddr) -> Result<Permit, CloseReason> {
        let peer = peer_group(peer);
        let admitted = async {
            let mut victim = None;
            loop {
                // Listens before it looks, so that no release is missed in between.
                let mut released = pin!(self.released.notified());
                released.as_mut().enable();
                if let Some(permit) = self.try_acquire(peer, &mut victim)? {
                    return Ok(permit);
                }
                released.await;
            }
        };
        let admitted = timeout(EVICTION_TIMEOUT, admitted).await.unwrap_or(Err(CloseReason::Full));
        admitted.inspect_err(|&reason| self.count_closed(reason))
    }

    /// `None` when `victim` was told to make room and has not ended yet.
    fn try_acquire(
        self: &Arc<Self>,
        peer: IpAddr,
        victim: &mut Option<Arc<ConnectionState>>,
    ) -> Result<Option<Permit>, CloseReason> {
        let mut table = self.table();
        if table.draining {
            return Err(CloseReason::Full);
        }
        if self.max_per_peer.is_some_and(|max| table.per_peer.get(&peer).is_some_and(|&count| count >= max)) {
            return Err(CloseReason::PeerFull);
        }
        if table.open.len() >= self.max {
            // Somebody else may have taken the place of an earlier victim.
            if victim.as_ref().is_none_or(|victim| victim.signal() == Signal::Ended) {
                let next = table.idlest(self.policy).ok_or(CloseReason::Full)?;
                drop(table);
                self.evict(&next);
                *victim = Some(next);
            }
            return Ok(None);
        }
        let id = table.next_id;
        table.next_id += 1;
        let connection = Arc::new(ConnectionState {
            id,
            peer,
            in_use: AtomicUsize::new(0),
            last_used: AtomicU64::new(self.now()),
            signal: AtomicU8::new(Signal::Serve as u8),
            io_waker: AtomicWaker::new(),
            owner_waker: AtomicWaker::new(),
        });
        table.open.insert(id, Arc::clone(&connection));
        *table.per_peer.entry(peer).or_default() += 1;
        drop(table);
        self.metrics.open.at(self.kind).inc();
        self.metrics.accepted.at(self.kind).inc();
        Ok(Some(Permit(ConnectionHandle { connection, limiter: Arc::clone(self) })))
    }

    /// Closes the connection that has been in use for longest without progress, of the peer that has
    /// most of those: it holds memory for answers that nobody reads.
    pub fn evict_stalled(&self) {
        let victim = self.table().most_stalled();
        if let Some(victim) = victim {
            self.evict(&victim);
        }
    }

    fn evict(&self, victim: &ConnectionState) {
        self.count_closed(CloseReason::Evicted);
        victim.raise(Signal::Close);
    }

    /// Tells all connections to finish, and admits no others.
    pub(super) fn drain(&self) {
        self.table().draining = true;
        self.raise_all(Signal::Drain);
    }

    /// Tells all connections to end now.
    pub(super) fn close_all(&self) {
        self.raise_all(Signal::Close);
    }

    fn raise_all(&self, signal: Signal) {
        let open: Vec<_> = self.table().open.values().cloned().collect();
        open.iter().for_each(|connection| connection.raise(signal));
    }

    fn count_closed(&self, reason: CloseReason) {
        self.metrics.closed.at((self.kind, reason)).inc();
    }

    /// Microseconds since the start.
    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn table(&self) -> MutexGuard<'_, ConnectionTable> {
        // Nothing panics while it holds the lock.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConnectionTable {
    /// The idlest connection of the peer that has most, which has not been told to close yet.
    fn idlest(&mut self, policy: EvictionPolicy) -> Option<Arc<ConnectionState>> {
        // A search looks at every connection. Under a flood of new ones each would search; so one
        // search serves several evictions.
        for found in [false, true] {
            if found {
                self.search(policy);
            }
            while let Some(Candidate { connection, last_used }) = self.candidates.pop() {
                let unchanged = connection.last_used.load(Ordering::Relaxed) == last_used;
                let evictable = policy == EvictionPolicy::Any || !connection.is_in_use();
                if unchanged && evictable && connection.signal() < Signal::Close {
                    return Some(connection);
                }
            }
        }
        None
    }

    fn most_stalled(&self) -> Option<Arc<ConnectionState>> {
        let in_use = || self.open.values().filter(|one| one.is_in_use() && one.signal() < Signal::Close);
        let mut counts: HashMap<IpAddr, usize> = HashMap::new();
        in_use().for_each(|one| *counts.entry(one.peer).or_default() += 1);
        let key = |one: &&Arc<ConnectionState>| (Reverse(counts[&one.peer]), one.last_used.load(Ordering::Relaxed));
        in_use().min_by_key(key).cloned()
    }

    fn search(&mut self, policy: EvictionPolicy) {
        let mut counts: Vec<(usize, IpAddr)> = self.per_peer.iter().map(|(&peer, &count)| (count, peer)).collect();
        counts.sort_unstable_by_key(|&(count, _)| Reverse(count));
        let Some(&(most, heaviest)) = counts.first() else { return };
        let second = counts.get(1).map_or(0, |&(count, _)| count);
        let evictable = |connection: &&Arc<ConnectionState>| {
            connection.signal() < Signal::Close && (policy == EvictionPolicy::Any || !connection.is_in_use())
        };
        let idleness =
            |connection: &Arc<ConnectionState>| (connection.is_in_use(), connection.last_used.load(Ordering::Relaxed));
        let of_heaviest = self.open.values().filter(|connection| connection.peer == heaviest).filter(evictable);
        let mut found: Vec<_> = of_heaviest.map(|one| (idleness(one), Arc::clone(one))).collect();
        // As long as the peer stays the heaviest; one at a time where peers have equally many.
        let mut wanted = (1 + most - second).min(MAX_CANDIDATES);
        if found.is_empty() {
            found = self.open.values().filter(evictable).map(|one| (idleness(one), Arc::clone(one))).collect();
            wanted = 1;
        }
        if found.len() > wanted {
            found.select_nth_unstable_by_key(wanted, |&(idleness, _)| idleness);
            found.truncate(wanted);
        }
        found.sort_unstable_by_key(|&(idleness, _)| Reverse(idleness));
        let candidate = |((_, last_used), connection)| Candidate { connection, last_used };
        self.candidates = found.into_iter().map(candidate).collect();
    }
}

/// An IPv4 address, or the /64 of an IPv6 address.
fn peer_group(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        v4 @ IpAddr::V4(_) => v4,
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
    }
}

/// The right of one connection to be open, until it is dropped.
#[derive(Debug)]
pub struct Permit(ConnectionHandle);

impl Permit {
    /// A reference for those who use or look after the connection.
    #[must_use]
    pub fn handle(&self) -> &ConnectionHandle {
        &self.0
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let ConnectionHandle { connection, limiter } = &self.0;
        let mut table = limiter.table();
        table.open.remove(&connection.id);
        if let Entry::Occupied(mut count) = table.per_peer.entry(connection.peer) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
        drop(table);
        limiter.metrics.open.at(limiter.kind).dec();
        connection.raise(Signal::Ended);
        limiter.released.notify_waiters();
    }
}

/// A reference to a connection that may have ended.
#[derive(Debug, Clone)]
pub struct ConnectionHandle {
    connection: Arc<ConnectionState>,
    limiter: Arc<ConnectionLimiter>,
}

impl ConnectionHandle {
    /// Marks the connection as in use until the value is dropped.
    #[must_use]
    pub fn begin_use(&self) -> InUse {
        self.connection.in_use.fetch_add(1, Ordering::Relaxed);
        self.touch();
        InUse(self.clone())
    }

    /// Notes that the peer did something.
    pub fn touch(&self) {
        self.connection.last_used.store(self.limiter.now(), Ordering::Relaxed);
    }

    /// How long the connection was not in use; `None` while it is.
    #[must_use]
    pub fn idle_for(&self) -> Option<Duration> {
        let idle = self.limiter.now().saturating_sub(self.connection.last_used.load(Ordering::Relaxed));
        (!self.connection.is_in_use()).then_some(Duration::from_micros(idle))
    }

    /// What the connection is told.
    #[must_use]
    pub fn signal(&self) -> Signal {
        self.connection.signal()
    }

    /// Tells the connection to end now.
    pub fn close(&self) {
        self.connection.raise(Signal::Close);
    }

    /// Counts that the server ended the connection.
    pub fn count_closed(&self, reason: CloseReason) {
        self.limiter.count_closed(reason);
    }

    /// Ready when the signal is `at_least` that. For the one task that reads and writes: an
    /// unchanged signal costs two atomic operations, no lock and no list of waiters.
    pub fn poll_signal(&self, cx: &mut Context<'_>, at_least: Signal) -> Poll<Signal> {
        Self::poll(&self.connection.io_waker, &self.connection, cx, at_least)
    }

    /// The same for the one task that looks after the connection.
    pub async fn signalled(&self, at_least: Signal) -> Signal {
        std::future::poll_fn(|cx| Self::poll(&self.connection.owner_waker, &self.connection, cx, at_least)).await
    }

    fn poll(waker: &AtomicWaker, connection: &ConnectionState, cx: &mut Context<'_>, at_least: Signal) -> Poll<Signal> {
        // Registered before the look: a signal in between wakes the task.
        waker.register(cx.waker());
        let signal = connection.signal();
        if signal >= at_least { Poll::Ready(signal) } else { Poll::Pending }
    }
}

/// A use of a connection that has not ended.
#[derive(Debug)]
pub struct InUse(ConnectionHandle);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.touch();
        self.0.connection.in_use.fetch_sub(1, Ordering::Relaxed);
    }
}
