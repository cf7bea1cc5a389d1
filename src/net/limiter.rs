//! Admits connections up to a limit, and evicts one for a new one at the limit.

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

/// How long a new connection waits for the end of an evicted one.
const EVICTION_TIMEOUT: Duration = Duration::from_secs(1);

/// Most candidates for eviction that one search keeps.
const MAX_CANDIDATES: usize = 64;

/// Which connections may be closed for a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EvictionPolicy {
    /// Connections that are not in use. If all are in use, the new one is refused.
    Unused,
    /// Any connection; those that are not in use first.
    Any,
}

/// The instruction to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Signal {
    /// Continue.
    Serve = 0,
    /// Finish the requests that have begun, then end: the server stops.
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
    /// The zero of [`ConnectionState::last_used`].
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
    /// The result of the last search, the idlest last. A candidate is checked again before its eviction.
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
    /// When the peer last began or ended a request, in microseconds since [`ConnectionLimiter::started`].
    last_used: AtomicU64,
    signal: AtomicU8,
    /// The task that reads and writes.
    io_waker: AtomicWaker,
    /// The task that closes the connection; can be the same task.
    owner_waker: AtomicWaker,
}

impl ConnectionState {
    fn signal(&self) -> Signal {
        Signal::of(self.signal.load(Ordering::Acquire))
    }

    /// Signals only become stronger.
    fn raise(&self, signal: Signal) {
        // Raised before the wakers are called. A task registers its waker before it looks at the signal, so it either
        // sees the signal or is woken.
        self.signal.fetch_max(signal as u8, Ordering::AcqRel);
        self.io_waker.wake();
        self.owner_waker.wake();
    }

    fn is_in_use(&self) -> bool {
        // A value that is a moment old only chooses another victim.
        self.in_use.load(Ordering::Relaxed) > 0
    }
}

impl ConnectionLimiter {
    /// A limiter that admits `max` connections, and `max_per_peer` of one peer. A peer is an IPv4 address
    /// or an IPv6 /64, because one host can have all addresses of a /64.
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

    /// Records a successful accept. Returns whether it ends an outage.
    pub(super) fn accept_succeeded(&self) -> bool {
        // The load first: a swap for every connection would write a line that all listeners share.
        !self.accepting.load(Ordering::Relaxed) && !self.accepting.swap(true, Ordering::Relaxed)
    }

    /// Admits a connection of `peer`. At the limit, the idlest connection of the peer with the most
    /// connections is closed first.
    ///
    /// `None` when the peer is at its limit, no connection can be evicted within a second, or the server stops.
    pub async fn acquire(self: &Arc<Self>, peer: IpAddr) -> Option<Permit> {
        let peer = peer_group(peer);
        let admitted = async {
            let mut victim = None;
            loop {
                // Enabled before the check, so that a release in between is not missed.
                let mut released = pin!(self.released.notified());
                released.as_mut().enable();
                if let Some(permit) = self.try_acquire(peer, &mut victim)? {
                    return Ok(permit);
                }
                released.await;
            }
        };
        let admitted = timeout(EVICTION_TIMEOUT, admitted).await.unwrap_or(Err(CloseReason::Full));
        admitted.inspect_err(|&reason| self.count_closed(reason)).ok()
    }

    /// `None` while `victim`, an evicted connection, has not ended yet.
    fn try_acquire(
        self: &Arc<Self>,
        peer: IpAddr,
        victim: &mut Option<Arc<ConnectionState>>,
    ) -> Result<Option<Permit>, CloseReason> {
        let mut table = self.table();
        // Under the same lock as `drain`: a connection is either admitted before, and gets the signal, or refused.
        if table.draining {
            return Err(CloseReason::Full);
        }
        // Before the total: a peer at its limit must not have others evicted for it.
        if self.max_per_peer.is_some_and(|max| table.per_peer.get(&peer).is_some_and(|&count| count >= max)) {
            return Err(CloseReason::PeerFull);
        }
        if table.open.len() >= self.max {
            // If the earlier victim has ended, another new connection has taken its place.
            if victim.as_ref().is_none_or(|victim| victim.signal() == Signal::Ended) {
                let next = table.idlest(self.policy).ok_or(CloseReason::Full)?;
                // Evicting wakes tasks, which may take the lock at once.
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

    /// Closes the connection that has been in use without progress for the longest time, of the peer with
    /// the most such connections. Such a connection holds memory for answers that its peer does not read.
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

    /// Sends [`Signal::Drain`] to all connections, and admits no more.
    pub(super) fn drain(&self) {
        self.table().draining = true;
        self.raise_all(Signal::Drain);
    }

    /// Sends [`Signal::Close`] to all connections.
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
        // No code panics while it holds the lock, so a poisoned lock guards a consistent table.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConnectionTable {
    /// The idlest connection of the peer with the most connections that is not being closed already.
    fn idlest(&mut self, policy: EvictionPolicy) -> Option<Arc<ConnectionState>> {
        // A search is O(connections). In a flood every new connection would search, so the candidates of
        // one search serve several evictions.
        // First what an earlier search has left, then one new search.
        for found in [false, true] {
            if found {
                self.search(policy);
            }
            while let Some(Candidate { connection, last_used }) = self.candidates.pop() {
                let unchanged = connection.last_used.load(Ordering::Relaxed) == last_used;
                let evictable = policy == EvictionPolicy::Any || !connection.is_in_use();
                // It may have been used, or have ended, since the search.
                if unchanged && evictable && connection.signal() < Signal::Close {
                    return Some(connection);
                }
            }
        }
        None
    }

    fn most_stalled(&self) -> Option<Arc<ConnectionState>> {
        // Counted by peer: one that opens many stalled connections loses its own, not those of others.
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
        // Only as many as the heaviest peer may lose before another one is the heaviest.
        let mut wanted = (1 + most - second).min(MAX_CANDIDATES);
        // The heaviest peer has none that may be closed: then the idlest of all.
        if found.is_empty() {
            found = self.open.values().filter(evictable).map(|one| (idleness(one), Arc::clone(one))).collect();
            wanted = 1;
        }
        if found.len() > wanted {
            // O(n), where sorting tens of thousands of connections under the lock would hold up every accept.
            found.select_nth_unstable_by_key(wanted, |&(idleness, _)| idleness);
            found.truncate(wanted);
        }
        found.sort_unstable_by_key(|&(idleness, _)| Reverse(idleness));
        let candidate = |((_, last_used), connection)| Candidate { connection, last_used };
        self.candidates = found.into_iter().map(candidate).collect();
    }
}

/// An IPv4 address, or the /64 of an IPv6 address: what limits by peer count as one.
#[must_use]
pub fn peer_group(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        // Mapped into IPv6, all of IPv4 would be in one /64.
        v4 @ IpAddr::V4(_) => v4,
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
    }
}

/// The permit of one open connection, until it is dropped.
#[derive(Debug)]
pub struct Permit(ConnectionHandle);

impl Permit {
    /// The handle of the connection, for its tasks.
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
        // After the table: who is woken below finds the room.
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
        // In use before it is touched, and below touched before it is unused: in between it never looks idle for long.
        self.connection.in_use.fetch_add(1, Ordering::Relaxed);
        self.touch();
        InUse(self.clone())
    }

    /// The peer, as the limits count it: an IPv4 address, or the first half of an IPv6 address.
    #[must_use]
    pub fn peer(&self) -> IpAddr {
        self.connection.peer
    }

    /// Records progress of the peer.
    pub fn touch(&self) {
        self.connection.last_used.store(self.limiter.now(), Ordering::Relaxed);
    }

    /// How long the connection has not been in use; `None` while it is in use.
    #[must_use]
    pub fn idle_for(&self) -> Option<Duration> {
        let idle = self.limiter.now().saturating_sub(self.connection.last_used.load(Ordering::Relaxed));
        (!self.connection.is_in_use()).then_some(Duration::from_micros(idle))
    }

    /// The strongest signal so far.
    #[must_use]
    pub fn signal(&self) -> Signal {
        self.connection.signal()
    }

    /// Sends [`Signal::Close`] to the connection.
    pub fn close(&self) {
        self.connection.raise(Signal::Close);
    }

    /// Counts that the server ends the connection.
    pub fn count_closed(&self, reason: CloseReason) {
        self.limiter.count_closed(reason);
    }

    /// Ready when the signal is at least `at_least`. For the one task that reads and writes: an unchanged
    /// signal costs two atomic operations, no lock and no list of waiters.
    pub fn poll_signal(&self, cx: &mut Context<'_>, at_least: Signal) -> Poll<Signal> {
        Self::poll(&self.connection.io_waker, &self.connection, cx, at_least)
    }

    /// The same for the one task that closes the connection.
    pub async fn signalled(&self, at_least: Signal) -> Signal {
        std::future::poll_fn(|cx| Self::poll(&self.connection.owner_waker, &self.connection, cx, at_least)).await
    }

    fn poll(waker: &AtomicWaker, connection: &ConnectionState, cx: &mut Context<'_>, at_least: Signal) -> Poll<Signal> {
        // Registered before the check, so that a signal in between wakes the task.
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
