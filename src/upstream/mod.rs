//! Looks up the DNS names by which instances are registered, ahead of need and never while a query waits.
//!
//! [`Lookups`] holds one entry per name, one queue of timers, and at most [`MAX_LOOKUPS`] lookups at a time. It has no task
//! of its own: its owner calls [`Lookups::next`], which drives everything and returns what has changed.
//!
//! 1. A name is looked up at once, then again at 80 to 90 % of its TTL: not before 5 s, not after 5 min. After a failure
//!    the pauses grow from 1 s to 60 s.
//! 2. A and AAAA are asked for together. Each keeps its last good answer while the upstream servers fail, for
//!    [`UpstreamOptions::stale`]. NXDOMAIN is an answer. A server that says neither yes nor no is asked after the others.
//! 3. Bounded: aliases, addresses, servers' time, lookups at once. An answer cannot make this server ask itself, nor send
//!    pods to their own loopback.
//! 4. What is known of a name (`name.rs`) and the way through its aliases (`walk.rs`) are pure functions; `transport.rs` alone
//!    touches sockets.

mod lookup;
mod name;
mod servers;
#[cfg(test)]
mod tests;
mod timing;
mod transport;
mod walk;

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    future::poll_fn,
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use hickory_proto::rr::Name;
use tokio::time::Instant;
use tokio_util::time::{DelayQueue, delay_queue};

use self::{
    lookup::{Outcome, look_up},
    name::{Rules, TrackedName},
    servers::Servers,
    timing::Timing,
};
use crate::{
    metrics::{LabelEnum as _, Metrics, NameState},
    model::{DnsName, NameStatus, UnixMillis},
};

/// Most names that are looked up at one time. Each has a socket per family, and one more for each retransmission.
pub const MAX_LOOKUPS: usize = 64;

/// How many of these may be of names whose last lookup failed, or that were never looked up. A server that does not answer takes
/// seconds of each, and must not delay the names that are well.
const MAX_DOUBTFUL: usize = 48;

/// Most names that [`Lookups::next`] returns at once.
pub const MAX_BATCH: usize = 1024;

/// What lookups need to know.
#[derive(Debug, Clone)]
pub struct UpstreamOptions {
    /// The servers, in the order in which they are asked.
    pub servers: Vec<SocketAddr>,
    /// How long the last good answer is used while the servers fail.
    pub stale: Duration,
    /// Largest TTL that is served, in seconds: the zone's.
    pub max_ttl: u32,
    /// The zone of this server: no name in it is asked for, because the upstream servers would ask this one.
    pub zone: DnsName,
}

/// No server to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("names cannot be looked up without an upstream server")]
pub struct NoServer;

/// The names that are looked up, and how these lookups stand.
pub struct Lookups {
    zone: Arc<Name>,
    servers: Arc<Servers>,
    rules: Rules,
    metrics: Arc<Metrics>,
    names: HashMap<DnsName, Entry>,
    /// Names that wait for their first lookup, and those whose last one failed when there was no room for the next.
    waiting: VecDeque<(DnsName, u64)>,
    /// Names that wait for their next lookup.
    timers: DelayQueue<DnsName>,
    running: FuturesUnordered<BoxFuture<'static, Ended>>,
    /// How many of `running` count to [`MAX_DOUBTFUL`].
    doubtful: usize,
    /// Names that [`Lookups::next`] returns next; each once.
    changed: VecDeque<(DnsName, u64)>,
    last_id: u64,
}

struct Entry {
    /// Distinguishes it from an earlier entry of the same name.
    id: u64,
    tracked: TrackedName,
    timer: Option<delay_queue::Key>,
    /// Whether it is in `Lookups::changed`.
    changed: bool,
}

/// A lookup that has ended.
struct Ended {
    name: DnsName,
    id: u64,
    doubtful: bool,
    outcome: Outcome,
    took: Duration,
}

impl Lookups {
    /// Looks nothing up yet. Every name is unavailable until [`Lookups::want`].
    ///
    /// # Errors
    /// When there is no server.
    pub fn new(options: UpstreamOptions, metrics: Arc<Metrics>) -> Result<Self, NoServer> {
        Self::with_timing(options, metrics, Timing::new())
    }

    fn with_timing(options: UpstreamOptions, metrics: Arc<Metrics>, timing: Timing) -> Result<Self, NoServer> {
        let UpstreamOptions { servers, stale, max_ttl, zone } = options;
        if servers.is_empty() {
            return Err(NoServer);
        }
        for state in NameState::ALL {
            metrics.upstream.names.at(*state).set(0);
        }
        Ok(Self {
            zone: Arc::new(absolute(&zone)),
            servers: Arc::new(Servers::new(&servers, timing)),
            rules: Rules { stale, max_ttl, timing },
            metrics,
            names: HashMap::new(),
            waiting: VecDeque::new(),
            timers: DelayQueue::new(),
            running: FuturesUnordered::new(),
            changed: VecDeque::new(),
            doubtful: 0,
            last_id: 0,
        })
    }

    /// Begins to look `name` up, as soon as fewer than [`MAX_LOOKUPS`] others are. Has no effect on a name that is looked up
    /// already, whatever the number of instances that have it.
    pub fn want(&mut self, name: DnsName) {
        if self.names.contains_key(&name) {
            return;
        }
        self.last_id += 1;
        let id = self.last_id;
        let refused = self.zone.zone_of(&absolute(&name));
        let tracked = if refused {
            self.changed.push_back((name.clone(), id));
            TrackedName::refused("it is a name in the zone of this server, which would have to ask itself")
        } else {
            self.waiting.push_back((name.clone(), id));
            TrackedName::default()
        };
        self.metrics.upstream.names.at(tracked.state()).inc();
        self.names.insert(name, Entry { id, tracked, timer: None, changed: refused });
    }

    /// Looks `name` up no more, and reports nothing of it.
    pub fn forget(&mut self, name: &DnsName) {
        if let Some(entry) = self.names.remove(name) {
            self.metrics.upstream.names.at(entry.tracked.state()).dec();
            if let Some(timer) = entry.timer {
                self.timers.remove(&timer);
            }
        }
    }

    /// Waits until a lookup has ended, and returns every name whose status has changed since, at most [`MAX_BATCH`]: what it
    /// leads to, when that was confirmed, or why the last lookup failed. Nothing is lost when the future is dropped, but
    /// lookups make progress only while one is polled.
    pub async fn next(&mut self) -> Vec<(DnsName, NameStatus)> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Vec<(DnsName, NameStatus)>> {
        loop {
            while self.changed.len() < MAX_BATCH
                && let Poll::Ready(Some(ended)) = self.running.poll_next_unpin(cx)
            {
                self.end(ended);
            }
            if self.changed.len() >= MAX_BATCH || !self.begin(cx) {
                break;
            }
        }
        let batch = self.take_changed();
        if batch.is_empty() { Poll::Pending } else { Poll::Ready(batch) }
    }

    /// Begins lookups that are due, and returns whether it began one.
    fn begin(&mut self, cx: &mut Context<'_>) -> bool {
        let before = self.running.len();
        while self.doubtful < MAX_DOUBTFUL
            && self.running.len() < MAX_LOOKUPS
            && let Some((name, id)) = self.waiting.pop_front()
        {
            if self.names.get(&name).is_some_and(|entry| entry.id == id) {
                self.doubtful += 1;
                self.running.push(self.lookup(name, id, true));
            }
        }
        while self.running.len() < MAX_LOOKUPS
            && let Poll::Ready(Some(due)) = self.timers.poll_expired(cx)
        {
            let name = due.into_inner();
            let entry = self.names.get_mut(&name).expect("forget() removes the timer with the name");
            entry.timer = None;
            let id = entry.id;
            if !entry.tracked.is_doubtful() {
                self.running.push(self.lookup(name, id, false));
            } else if self.doubtful < MAX_DOUBTFUL {
                self.doubtful += 1;
                self.running.push(self.lookup(name, id, true));
            } else {
                self.waiting.push_back((name, id));
            }
        }
        self.running.len() > before
    }

    fn lookup(&self, name: DnsName, id: u64, doubtful: bool) -> BoxFuture<'static, Ended> {
        let (servers, zone, timing) = (Arc::clone(&self.servers), Arc::clone(&self.zone), self.rules.timing);
        Box::pin(async move {
            let begun = Instant::now();
            let outcome = look_up(&servers, &absolute(&name), &zone, &timing).await;
            Ended { name, id, doubtful, outcome, took: begun.elapsed() }
        })
    }

    fn end(&mut self, ended: Ended) {
        let Ended { name, id, doubtful, outcome, took } = ended;
        self.doubtful -= usize::from(doubtful);
        // Forgotten meanwhile, and perhaps wanted again.
        let Some(entry) = self.names.get_mut(&name).filter(|entry| entry.id == id) else { return };
        let (status, state) = (entry.tracked.status().clone(), entry.tracked.state());
        let (result, pause) = entry.tracked.apply(outcome, Instant::now(), UnixMillis::now(), &self.rules);
        self.metrics.upstream.observe(result, took);
        if entry.tracked.state() != state {
            self.metrics.upstream.names.at(state).dec();
            self.metrics.upstream.names.at(entry.tracked.state()).inc();
        }
        entry.timer = Some(self.timers.insert(name.clone(), pause));
        if !entry.changed && *entry.tracked.status() != status {
            entry.changed = true;
            self.changed.push_back((name, id));
        }
    }

    fn take_changed(&mut self) -> Vec<(DnsName, NameStatus)> {
        let mut batch = Vec::new();
        while batch.len() < MAX_BATCH
            && let Some((name, id)) = self.changed.pop_front()
        {
            if let Some(entry) = self.names.get_mut(&name).filter(|entry| entry.id == id) {
                entry.changed = false;
                batch.push((name, entry.tracked.status().clone()));
            }
        }
        batch
    }
}

impl fmt::Debug for Lookups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let running = self.running.len();
        f.debug_struct("Lookups").field("names", &self.names.len()).field("running", &running).finish_non_exhaustive()
    }
}

/// The name as hickory has it: no search list applies.
fn absolute(name: &DnsName) -> Name {
    Name::from_ascii(format!("{name}.")).expect("labels and lengths of a DnsName are those of RFC 1035")
}
