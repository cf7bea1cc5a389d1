//! The queue of services to reconcile, as client-go's workqueue with priorities and fair shares.
//!
//! Level-triggered: a service is queued at most once, however often it changed, and what is written
//! is the state when its turn comes. A service that changes while it is reconciled is queued again
//! afterwards, debounced: filling a service costs a few large writes instead of many small ones.
//!
//! Among the services that are due, live changes come before the comparison after a start and
//! repairs; within a priority the namespaces take turns. Concurrency is limited in total, per
//! namespace (less for one whose requests fail or hang), and for retries: no number of services
//! that cannot be written delays the others.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    model::ServiceKey,
    net::backoff::{doubled, jittered},
};

/// Services that are reconciled at once.
const MAX_CONCURRENT: usize = 32;

/// Services of one namespace that are reconciled at once.
const MAX_CONCURRENT_PER_NAMESPACE: usize = MAX_CONCURRENT / 2;

/// The same of a namespace in which requests fail: one for retries, one for what has not failed yet.
const MIN_CONCURRENT_PER_NAMESPACE: usize = 2;

/// Services that failed last time and are reconciled at once.
const MAX_CONCURRENT_RETRIES: usize = MAX_CONCURRENT / 4;

/// Services of [`Priority::Edited`] that are reconciled at once: who edits without end must not take the API server's time
/// from registrants.
const MAX_CONCURRENT_EDITED: usize = MAX_CONCURRENT / 4;

/// Services of [`Priority::Resync`] that are reconciled at once; the rest is free for live changes.
const MAX_CONCURRENT_RESYNCS: usize = MAX_CONCURRENT / 2;

/// The same of [`Priority::Merged`]: whoever sends words without end must not take the API server's time from registrants.
const MAX_CONCURRENT_MERGED: usize = 4;

/// Of so many services that are started one may be of a lower priority than the highest that waits.
const LOWER_PRIORITY_SHARE: u64 = 4;

/// Backoff after the first failure of a service; it doubles with each further one.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);

/// Longest backoff after failures.
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// A service that changed while it was reconciled is due when nothing more has come for this long.
/// Longer than the gap between messages of one stream, short beside the second for which an answer
/// waits for the mirror.
const DEBOUNCE: Duration = Duration::from_millis(20);

/// Longest time that debouncing delays a service.
const MAX_DEBOUNCE: Duration = Duration::from_millis(100);

/// Why a service is reconciled; the first comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Priority {
    /// A registration changed, and somebody may wait for the answer.
    Live,
    /// Somebody else changed its objects, or a DNS name among its instances leads elsewhere.
    Edited,
    /// The last reconcile failed.
    Retry,
    /// The comparison after a start, a recheck.
    Resync,
    /// Words of another process, which keeps them until they are written.
    Merged,
}

const PRIORITIES: [Priority; 5] =
    [Priority::Live, Priority::Edited, Priority::Retry, Priority::Resync, Priority::Merged];

/// The queue. Time is an argument.
#[derive(Debug, Default)]
pub(super) struct WorkQueue {
    items: HashMap<ServiceKey, QueueItem>,
    /// Services that are not due yet.
    delayed: BTreeSet<(Instant, ServiceKey)>,
    /// Services that are due, by priority.
    ready: [ReadyServices; PRIORITIES.len()],
    namespaces: HashMap<Box<str>, NamespaceShare>,
    /// Running services, by the priority that they were started with.
    running: [usize; PRIORITIES.len()],
    started: u64,
}

#[derive(Debug)]
struct QueueItem {
    priority: Priority,
    state: ItemState,
    /// The service changed while it was being reconciled: how, and how long that may wait.
    dirty: Option<(Priority, Duration)>,
    /// While debounced: the latest moment at which the service is due.
    debounced_until: Option<Instant>,
    failures: u32,
    /// Not due before this moment, whatever changes.
    not_before: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ItemState {
    Delayed(Instant),
    Ready,
    Running,
}

/// How many services of a namespace may run: halved by a failure, one more with a success.
#[derive(Debug)]
struct NamespaceShare {
    running: usize,
    retries: usize,
    limit: usize,
}

/// Services of one priority, first in, first out in each namespace.
#[derive(Debug, Default)]
struct ReadyServices {
    by_namespace: HashMap<Box<str>, VecDeque<ServiceKey>>,
    /// The namespaces with a service, in the order of their turns.
    turns: VecDeque<Box<str>>,
}

impl WorkQueue {
    /// `service` is to be reconciled: it is due now, unless it is debounced, backing off or running.
    pub(super) fn add(&mut self, service: ServiceKey, priority: Priority, now: Instant) {
        self.add_within(service, priority, Duration::ZERO, now);
    }

    /// As [`add`](Self::add), but it may wait for `delay`, unless something that may not comes in between.
    pub(super) fn add_within(&mut self, service: ServiceKey, priority: Priority, delay: Duration, now: Instant) {
        let Some(item) = self.items.get_mut(&service) else {
            self.items.insert(service.clone(), QueueItem::new(priority));
            return self.schedule(&service, now + delay);
        };
        match item.state {
            ItemState::Running => {
                let merge = |before: (Priority, Duration)| (before.0.min(priority), before.1.min(delay));
                item.dirty = Some(item.dirty.map_or((priority, delay), merge));
            }
            ItemState::Ready if item.failures == 0 && priority < item.priority => {
                // It moves ahead: the entry under the lower priority is removed.
                let before = std::mem::replace(&mut item.priority, priority);
                self.ready[before as usize].remove(&service);
                self.ready[priority as usize].push(service);
            }
            ItemState::Ready => {}
            ItemState::Delayed(due) => {
                if item.failures == 0 {
                    item.priority = item.priority.min(priority);
                }
                let at = match item.debounced_until {
                    Some(until) if delay.is_zero() => until.min(now + DEBOUNCE),
                    _ => due.min(now + delay),
                };
                self.schedule(&service, at);
            }
        }
    }

    /// Takes the next service that is due and within the limits. It counts as running until
    /// [`done`](Self::done), [`requeue_after`](Self::requeue_after) or [`failed`](Self::failed) is
    /// called for it.
    pub(super) fn next(&mut self, now: Instant) -> Option<ServiceKey> {
        while let Some((due, _)) = self.delayed.first()
            && *due <= now
            && let Some((_, service)) = self.delayed.pop_first()
        {
            let item = self.items.get_mut(&service).expect("what is delayed has an item");
            item.state = ItemState::Ready;
            self.ready[item.priority as usize].push(service);
        }
        if self.running.iter().sum::<usize>() >= MAX_CONCURRENT {
            return None;
        }
        // The lower priorities take turns.
        let turns = [Priority::Resync, Priority::Retry, Priority::Merged, Priority::Edited];
        let turn = match self.started % LOWER_PRIORITY_SHARE {
            0 => turns.into_iter().cycle().nth((self.started / LOWER_PRIORITY_SHARE % 4) as usize),
            _ => None,
        };
        let service = turn.into_iter().chain(PRIORITIES).find_map(|priority| self.take(priority))?;
        self.started += 1;
        Some(service)
    }

    fn take(&mut self, priority: Priority) -> Option<ServiceKey> {
        let running = self.running[priority as usize];
        match priority {
            Priority::Edited if running >= MAX_CONCURRENT_EDITED => return None,
            Priority::Retry if running >= MAX_CONCURRENT_RETRIES => return None,
            Priority::Resync if running >= MAX_CONCURRENT_RESYNCS => return None,
            Priority::Merged if running >= MAX_CONCURRENT_MERGED => return None,
            _ => {}
        }
        let namespaces = &self.namespaces;
        let service = self.ready[priority as usize]
            .pop(|namespace| namespaces.get(namespace).is_none_or(|share| share.has_room(priority)))?;
        self.running[priority as usize] += 1;
        let share = self.namespaces.entry(service.namespace().into()).or_default();
        share.running += 1;
        share.retries += usize::from(priority == Priority::Retry);
        let item = self.items.get_mut(&service).expect("what is ready has an item");
        *item = QueueItem { state: ItemState::Running, failures: item.failures, ..QueueItem::new(priority) };
        Some(service)
    }

    /// When the next service that is not due yet will be.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.delayed.first().map(|(at, _)| *at)
    }

    /// `service` is reconciled and leaves the queue, unless it changed meanwhile.
    pub(super) fn done(&mut self, service: &ServiceKey, now: Instant) {
        self.stopped(service, ShareChange::Grow);
        if let Some(item) = self.items.remove(service)
            && let Some((priority, delay)) = item.dirty
        {
            let debounced_until = delay.is_zero().then(|| now + MAX_DEBOUNCE);
            self.items.insert(service.clone(), QueueItem { debounced_until, ..QueueItem::new(priority) });
            self.schedule(service, now + delay.max(DEBOUNCE));
        }
    }

    /// `service` is due again after `wait`, or when it changes.
    pub(super) fn requeue_after(&mut self, service: &ServiceKey, wait: Duration, now: Instant) {
        self.stopped(service, ShareChange::Grow);
        let Some(item) = self.items.get_mut(service) else { return };
        let Some((priority, delay)) = item.dirty else {
            *item = QueueItem::new(Priority::Resync);
            return self.schedule(service, now + wait);
        };
        // Debounced as after `done`: a service may be requeued after every single change.
        let debounced_until = delay.is_zero().then(|| now + MAX_DEBOUNCE);
        *item = QueueItem { debounced_until, ..QueueItem::new(priority) };
        self.schedule(service, now + delay.max(DEBOUNCE));
    }

    /// `service` failed: it is due again after a backoff that grows with each failure in a row. A
    /// change does not shorten the backoff, so that a service that cannot be written is not retried
    /// at the rate of changes. With `suspect_namespace`, fewer services of its namespace run at once.
    pub(super) fn failed(&mut self, service: &ServiceKey, suspect_namespace: bool, now: Instant) {
        self.stopped(service, if suspect_namespace { ShareChange::Halve } else { ShareChange::Keep });
        let Some(item) = self.items.get_mut(service) else { return };
        let failures = item.failures + 1;
        let due = now + jittered(doubled(FIRST_BACKOFF, MAX_BACKOFF, item.failures));
        *item = QueueItem { failures, not_before: Some(due), ..QueueItem::new(Priority::Retry) };
        self.schedule(service, due);
    }

    /// Number of services that wait.
    pub(super) fn len(&self) -> usize {
        self.items.len() - self.running.iter().sum::<usize>()
    }

    fn stopped(&mut self, service: &ServiceKey, change: ShareChange) {
        let Some(item) = self.items.get(service) else { return };
        self.running[item.priority as usize] -= 1;
        let share = self.namespaces.entry(service.namespace().into()).or_default();
        share.running -= 1;
        share.retries -= usize::from(item.priority == Priority::Retry);
        share.limit = match change {
            ShareChange::Grow => (share.limit + 1).min(MAX_CONCURRENT_PER_NAMESPACE),
            ShareChange::Keep => share.limit,
            ShareChange::Halve => (share.limit / 2).max(MIN_CONCURRENT_PER_NAMESPACE),
        };
        if share.running == 0 && share.limit == MAX_CONCURRENT_PER_NAMESPACE {
            self.namespaces.remove(service.namespace());
        }
    }

    /// Makes a service that does not run due at `at`.
    fn schedule(&mut self, service: &ServiceKey, at: Instant) {
        let Some(item) = self.items.get_mut(service) else { return };
        if let ItemState::Delayed(before) = item.state {
            self.delayed.remove(&(before, service.clone()));
        }
        let at = item.not_before.map_or(at, |not_before| not_before.max(at));
        item.state = ItemState::Delayed(at);
        self.delayed.insert((at, service.clone()));
    }
}

/// What a result means for the share of its namespace.
#[derive(Debug, Clone, Copy)]
enum ShareChange {
    Grow,
    Keep,
    Halve,
}

impl QueueItem {
    fn new(priority: Priority) -> Self {
        // `schedule` follows wherever an item is made.
        let state = ItemState::Running;
        Self { priority, state, dirty: None, debounced_until: None, failures: 0, not_before: None }
    }
}

impl Default for NamespaceShare {
    fn default() -> Self {
        Self { running: 0, retries: 0, limit: MAX_CONCURRENT_PER_NAMESPACE }
    }
}

impl NamespaceShare {
    fn has_room(&self, priority: Priority) -> bool {
        self.running < self.limit
            && match priority {
                Priority::Retry => self.retries < self.limit / 2,
                // One is left for the others also where requests fail.
                Priority::Merged => self.running + 1 < self.limit,
                Priority::Live | Priority::Edited | Priority::Resync => true,
            }
    }
}

impl ReadyServices {
    fn push(&mut self, service: ServiceKey) {
        if let Some(services) = self.by_namespace.get_mut(service.namespace()) {
            return services.push_back(service);
        }
        self.turns.push_back(service.namespace().into());
        self.by_namespace.insert(service.namespace().into(), [service].into());
    }

    /// Takes the first service of the next namespace that has `room`; then it is the others' turn.
    fn pop(&mut self, has_room: impl Fn(&str) -> bool) -> Option<ServiceKey> {
        // Only namespaces that run something are passed over: a few dozen at most.
        let turn = self.turns.iter().position(|namespace| has_room(namespace))?;
        let namespace = self.turns.remove(turn)?;
        let services = self.by_namespace.get_mut(&namespace)?;
        let service = services.pop_front();
        if services.is_empty() {
            self.by_namespace.remove(&namespace);
        } else {
            self.turns.push_back(namespace);
        }
        service
    }

    fn remove(&mut self, service: &ServiceKey) {
        let Some(services) = self.by_namespace.get_mut(service.namespace()) else { return };
        services.retain(|other| other != service);
        if services.is_empty() {
            self.by_namespace.remove(service.namespace());
            self.turns.retain(|namespace| **namespace != *service.namespace());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::model::Validator;

    fn in_namespace(namespace: &str, name: &str) -> ServiceKey {
        Validator { zone_wire_len: 15, names_allowed: false }.service(namespace, name).expect("valid")
    }

    fn key(name: &str) -> ServiceKey {
        in_namespace("prod", name)
    }

    /// All that may run at once.
    fn take_all(queue: &mut WorkQueue, now: Instant) -> Vec<ServiceKey> {
        std::iter::from_fn(|| queue.next(now)).collect()
    }

    #[test]
    fn service_is_queued_and_runs_once() {
        let (mut queue, now) = (WorkQueue::default(), Instant::now());
        queue.add(key("web"), Priority::Live, now);
        queue.add(key("web"), Priority::Live, now);
        assert_eq!(queue.next(now), Some(key("web")));
        queue.add(key("web"), Priority::Live, now);
        assert_eq!((queue.next(now), queue.len()), (None, 0), "running");
        queue.done(&key("web"), now);
        assert_eq!(queue.next(now + DEBOUNCE), Some(key("web")), "it changed while it ran");
        queue.done(&key("web"), now);
        assert_eq!((queue.next(now), queue.next_due()), (None, None));
        assert!(queue.items.is_empty() && queue.namespaces.is_empty(), "{queue:?}");
    }

    #[test]
    fn changes_while_running_are_debounced_with_a_limit() {
        let (mut queue, begun) = (WorkQueue::default(), Instant::now());
        queue.add(key("web"), Priority::Live, begun);
        assert_eq!(queue.next(begun), Some(key("web")));
        queue.add(key("web"), Priority::Live, begun);
        queue.done(&key("web"), begun);
        assert_eq!(queue.next_due(), Some(begun + DEBOUNCE));
        let mut now = begun;
        while queue.next_due() > Some(now) {
            now += DEBOUNCE / 2;
            queue.add(key("web"), Priority::Live, now);
        }
        assert_eq!(queue.next_due(), Some(begun + MAX_DEBOUNCE));
        assert_eq!(queue.next(now), Some(key("web")));
        queue.done(&key("web"), now);
        queue.add(key("web"), Priority::Live, now);
        assert_eq!(queue.next(now), Some(key("web")), "the next change is not debounced");
    }

    #[test]
    fn what_may_wait_is_written_with_what_may_not() {
        let (mut queue, now, delay) = (WorkQueue::default(), Instant::now(), Duration::from_secs(1));
        let repeat = |queue: &mut WorkQueue, at| queue.add_within(key("web"), Priority::Live, delay, at);
        repeat(&mut queue, now);
        repeat(&mut queue, now + delay / 2);
        assert_eq!((queue.next(now + delay / 2), queue.next_due()), (None, Some(now + delay)));
        assert_eq!(queue.next(now + delay), Some(key("web")));
        // While it runs, as before.
        repeat(&mut queue, now + delay);
        queue.done(&key("web"), now + delay);
        assert_eq!((queue.next(now + delay), queue.next_due()), (None, Some(now + 2 * delay)));
        queue.add(key("web"), Priority::Live, now + delay);
        assert_eq!(queue.next(now + delay), Some(key("web")), "a change does not wait");
        repeat(&mut queue, now + delay);
        queue.add(key("web"), Priority::Live, now + delay);
        queue.done(&key("web"), now + delay);
        assert_eq!(queue.next_due(), Some(now + delay + DEBOUNCE));
    }

    #[test]
    fn backoff_grows_with_failures_whatever_changes() {
        let (mut queue, mut now) = (WorkQueue::default(), Instant::now());
        queue.add(key("web"), Priority::Live, now);
        let mut waits = Vec::new();
        for _ in 0..12 {
            assert_eq!(queue.next(now), Some(key("web")));
            queue.failed(&key("web"), true, now);
            queue.add(key("web"), Priority::Live, now);
            let due = queue.next_due().expect("requeued");
            waits.push(due - now);
            now = due;
        }
        assert!(waits[0] >= FIRST_BACKOFF / 2 && waits[0] <= FIRST_BACKOFF, "{waits:?}");
        assert!(waits[11] >= MAX_BACKOFF / 2 && waits[11] <= MAX_BACKOFF, "{waits:?}");
    }

    #[test]
    fn change_shortens_a_requeue() {
        let (mut queue, now) = (WorkQueue::default(), Instant::now());
        queue.add(key("web"), Priority::Live, now);
        assert_eq!(queue.next(now), Some(key("web")));
        queue.requeue_after(&key("web"), Duration::from_secs(30), now);
        assert_eq!((queue.next(now), queue.next_due()), (None, Some(now + Duration::from_secs(30))));
        queue.add(key("web"), Priority::Live, now);
        assert_eq!(queue.next(now), Some(key("web")));
    }

    #[test]
    fn live_change_is_next_whatever_waits_after_a_start() {
        let (mut queue, now) = (WorkQueue::default(), Instant::now());
        for n in 0..1000 {
            queue.add(key(&format!("s{n}")), Priority::Resync, now);
        }
        let running = take_all(&mut queue, now);
        assert_eq!(running.len(), MAX_CONCURRENT_RESYNCS);
        queue.add(in_namespace("other", "new"), Priority::Live, now);
        assert_eq!(queue.next(now), Some(in_namespace("other", "new")), "a slot is free for it");
        // In the same namespace, and also for one that waits already: with the next slot but one.
        queue.add(key("s900"), Priority::Live, now);
        queue.add(key("new"), Priority::Live, now);
        let mut next = Vec::new();
        for service in &running[..4] {
            queue.done(service, now);
            next.extend(queue.next(now));
        }
        assert!(next[..3].contains(&key("s900")) && next[..3].contains(&key("new")), "{next:?}");
        assert_eq!(queue.len(), 1000 + 1 - MAX_CONCURRENT_RESYNCS - 4);
    }

    #[test]
    fn edit_of_somebody_else_does_not_wait_behind_a_start() {
        let (mut queue, now) = (WorkQueue::default(), Instant::now());
        (0..1000).for_each(|n| queue.add(key(&format!("s{n}")), Priority::Resync, now));
        assert_eq!(take_all(&mut queue, now).len(), MAX_CONCURRENT_RESYNCS);
        // One that waits, and one that is new.
        queue.add(key("s900"), Priority::Edited, now);
        queue.add(in_namespace("other", "new"), Priority::Edited, now);
        assert_eq!(take_all(&mut queue, now).len(), 1, "its namespace has its share, and the other a slot");
        queue.done(&key("s0"), now);
        assert_eq!(queue.next(now), Some(key("s900")));
    }

    #[test]
    fn words_of_other_processes_leave_room_for_live_changes_of_their_namespace() {
        let (mut queue, now) = (WorkQueue::default(), Instant::now());
        for n in 0..1000 {
            queue.add(key(&format!("s{n}")), Priority::Merged, now);
        }
        let running = take_all(&mut queue, now);
        assert_eq!(running.len(), MAX_CONCURRENT_MERGED);
        for n in 0..MAX_CONCURRENT_PER_NAMESPACE - MAX_CONCURRENT_MERGED {
            queue.add(key(&format!("live{n}")), Priority::Live, now);
            assert_eq!(queue.next(now), Some(key(&format!("live{n}"))));
        }
        // Requests of the namespace fail: one of its two slots stays free for live changes.
        let mut failing = WorkQueue::default();
        failing
            .namespaces
            .insert("prod".into(), NamespaceShare { limit: MIN_CONCURRENT_PER_NAMESPACE, ..Default::default() });
        (0..10).for_each(|n| failing.add(key(&format!("s{n}")), Priority::Merged, now));
        assert_eq!(take_all(&mut failing, now).len(), 1);
    }

    #[test]
    fn lower_priorities_are_not_starved() {
        PRIORITIES[1..].iter().for_each(|&priority| is_not_starved(priority));
    }

    fn is_not_starved(priority: Priority) {
        let (mut queue, now) = (WorkQueue::default(), Instant::now());
        queue.add(key("old"), priority, now);
        let mut begun = 0;
        for n in 0..100 {
            queue.add(key(&format!("live{n}")), Priority::Live, now);
            let service = queue.next(now).expect("something is due");
            queue.done(&service, now);
            begun = n;
            if service == key("old") {
                break;
            }
        }
        assert!(begun < 20, "{begun} live changes came before it");
    }

    #[test]
    fn namespace_that_hangs_leaves_the_slots_to_the_others() {
        let (mut queue, mut now) = (WorkQueue::default(), Instant::now());
        for n in 0..1000 {
            queue.add(in_namespace("hanging", &format!("s{n}")), Priority::Live, now);
        }
        let mut hanging = take_all(&mut queue, now);
        assert_eq!(hanging.len(), MAX_CONCURRENT_PER_NAMESPACE);
        for _ in 0..10 {
            now += Duration::from_secs(10);
            hanging.iter().for_each(|service| queue.failed(service, true, now));
            hanging = take_all(&mut queue, now);
            assert!(hanging.len() <= MIN_CONCURRENT_PER_NAMESPACE, "{hanging:?}");
        }
        // One of its own that has not failed yet waits for one slot, the others' for none.
        for n in 0..10 {
            queue.add(key(&format!("s{n}")), Priority::Live, now);
        }
        assert_eq!(take_all(&mut queue, now).iter().filter(|service| service.namespace() == "prod").count(), 10);
        // The share grows again with each success.
        for _ in 0..MAX_CONCURRENT_PER_NAMESPACE {
            hanging.drain(..).for_each(|service| queue.done(&service, now));
            hanging = take_all(&mut queue, now);
        }
        assert!(hanging.len() > MIN_CONCURRENT_PER_NAMESPACE, "{hanging:?}");
    }

    #[test]
    fn retries_of_many_namespaces_do_not_fill_the_slots() {
        let (mut queue, now) = (WorkQueue::default(), Instant::now());
        let all: HashSet<_> = (0..MAX_CONCURRENT).map(|n| in_namespace(&format!("n{n}"), "web")).collect();
        all.iter().for_each(|service| queue.add(service.clone(), Priority::Live, now));
        assert_eq!(take_all(&mut queue, now).len(), MAX_CONCURRENT);
        all.iter().for_each(|service| queue.failed(service, true, now));
        let later = now + MAX_BACKOFF;
        assert_eq!(take_all(&mut queue, later).len(), MAX_CONCURRENT_RETRIES);
        queue.add(key("web"), Priority::Live, later);
        assert_eq!(queue.next(later), Some(key("web")));
    }
}
