//! The queue of services to reconcile, as client-go's workqueue.
//!
//! Level-triggered: a service is queued at most once, however often it changed, and what is written
//! is the state when its turn comes. A service that changes while it is reconciled is queued again
//! afterwards, debounced: filling a service costs a few large writes instead of many small ones.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use tokio::time::Instant;

use crate::model::ServiceKey;

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

/// The queue. Time is an argument.
#[derive(Debug, Default)]
pub(super) struct WorkQueue {
    items: HashMap<ServiceKey, QueueItem>,
    due: BTreeSet<(Instant, ServiceKey)>,
}

#[derive(Debug, Default)]
struct QueueItem {
    /// `None` while the service is being reconciled.
    due: Option<Instant>,
    running: bool,
    /// The service changed while it was being reconciled.
    dirty: bool,
    /// While debounced: the latest moment at which the service is due.
    debounced_until: Option<Instant>,
    failures: u32,
    /// Not due before this moment, whatever changes.
    not_before: Option<Instant>,
}

impl WorkQueue {
    /// `service` has changed: it is due now, unless it is debounced, backing off or running.
    pub(super) fn add(&mut self, service: ServiceKey, now: Instant) {
        let item = self.items.entry(service.clone()).or_default();
        if item.running {
            item.dirty = true;
        } else if let Some(until) = item.debounced_until {
            self.set_due(service, until.min(now + DEBOUNCE), false);
        } else {
            self.set_due(service, now, true);
        }
    }

    /// Takes the next service that is due. It counts as running until [`done`](Self::done),
    /// [`requeue_after`](Self::requeue_after), [`refused`](Self::refused) or
    /// [`failed`](Self::failed) is called for it.
    pub(super) fn next(&mut self, now: Instant) -> Option<ServiceKey> {
        if self.due.first()?.0 > now {
            return None;
        }
        let (_, service) = self.due.pop_first()?;
        let item = self.items.entry(service.clone()).or_default();
        *item = QueueItem { running: true, failures: item.failures, ..QueueItem::default() };
        Some(service)
    }

    /// When the next service is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// `service` is reconciled and leaves the queue, unless it changed meanwhile.
    pub(super) fn done(&mut self, service: ServiceKey, now: Instant) {
        let dirty = self.items.get(&service).is_some_and(|item| item.dirty);
        self.items.remove(&service);
        if dirty {
            self.items.entry(service.clone()).or_default().debounced_until = Some(now + MAX_DEBOUNCE);
            self.add(service, now);
        }
    }

    /// `service` is due again after `wait`, or when it changes.
    pub(super) fn requeue_after(&mut self, service: ServiceKey, wait: Duration, now: Instant) {
        let Some(item) = self.items.get_mut(&service) else { return };
        (item.running, item.failures) = (false, 0);
        let at = if item.dirty { now } else { now + wait };
        self.set_due(service, at, false);
    }

    /// `service` was refused: it is due again after `wait`, or when it changes, but not within
    /// `min_wait`, so that a refused write is not repeated at the rate of changes.
    pub(super) fn refused(&mut self, service: ServiceKey, wait: Duration, min_wait: Duration, now: Instant) {
        let Some(item) = self.items.get_mut(&service) else { return };
        (item.running, item.failures, item.not_before) = (false, 0, Some(now + min_wait));
        let at = if item.dirty { now } else { now + wait };
        self.set_due(service, at, false);
    }

    /// `service` failed: it is due again after a backoff that grows with each failure in a row. A
    /// change does not shorten the backoff, so that a service that cannot be written is not retried
    /// at the rate of changes.
    pub(super) fn failed(&mut self, service: ServiceKey, now: Instant) {
        let Some(item) = self.items.get_mut(&service) else { return };
        let doublings = item.failures.min(16);
        (item.running, item.failures) = (false, item.failures + 1);
        let backoff = FIRST_BACKOFF.saturating_mul(1 << doublings).min(MAX_BACKOFF);
        // Jitter, so that services that failed together are not retried together.
        self.set_due(service, now + backoff.mul_f64(0.5 + fastrand::f64() / 2.0), false);
    }

    /// Number of services that wait.
    pub(super) fn len(&self) -> usize {
        self.due.len()
    }

    fn set_due(&mut self, service: ServiceKey, at: Instant, only_sooner: bool) {
        let item = self.items.entry(service.clone()).or_default();
        let at = item.not_before.map_or(at, |not_before| not_before.max(at));
        if let Some(before) = item.due {
            if only_sooner && (before <= at || item.failures > 0) {
                return;
            }
            self.due.remove(&(before, service.clone()));
        }
        item.due = Some(at);
        self.due.insert((at, service));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Validator;

    fn key(name: &str) -> ServiceKey {
        Validator { zone_wire_len: 15, names_allowed: false }.service("prod", name).expect("valid")
    }

    #[test]
    fn service_is_queued_and_runs_once() {
        let (mut queue, now) = (WorkQueue::default(), Instant::now());
        queue.add(key("web"), now);
        queue.add(key("web"), now);
        assert_eq!(queue.next(now), Some(key("web")));
        queue.add(key("web"), now);
        assert_eq!((queue.next(now), queue.len()), (None, 0), "running");
        queue.done(key("web"), now);
        assert_eq!(queue.next(now + DEBOUNCE), Some(key("web")), "it changed while it ran");
        queue.done(key("web"), now);
        assert_eq!((queue.next(now), queue.next_due()), (None, None));
    }

    #[test]
    fn changes_while_running_are_debounced_with_a_limit() {
        let (mut queue, begun) = (WorkQueue::default(), Instant::now());
        queue.add(key("web"), begun);
        assert_eq!(queue.next(begun), Some(key("web")));
        queue.add(key("web"), begun);
        queue.done(key("web"), begun);
        assert_eq!(queue.next_due(), Some(begun + DEBOUNCE));
        let mut now = begun;
        while queue.next_due() > Some(now) {
            now += DEBOUNCE / 2;
            queue.add(key("web"), now);
        }
        assert_eq!(queue.next_due(), Some(begun + MAX_DEBOUNCE));
        assert_eq!(queue.next(now), Some(key("web")));
        queue.done(key("web"), now);
        queue.add(key("web"), now);
        assert_eq!(queue.next(now), Some(key("web")), "the next change is not debounced");
    }

    #[test]
    fn backoff_grows_with_failures_whatever_changes() {
        let (mut queue, mut now) = (WorkQueue::default(), Instant::now());
        queue.add(key("web"), now);
        let mut waits = Vec::new();
        for _ in 0..12 {
            assert_eq!(queue.next(now), Some(key("web")));
            queue.failed(key("web"), now);
            queue.add(key("web"), now);
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
        queue.add(key("web"), now);
        assert_eq!(queue.next(now), Some(key("web")));
        queue.requeue_after(key("web"), Duration::from_secs(30), now);
        assert_eq!((queue.next(now), queue.next_due()), (None, Some(now + Duration::from_secs(30))));
        queue.add(key("web"), now);
        assert_eq!(queue.next(now), Some(key("web")));
    }

    #[test]
    fn refused_service_is_not_retried_at_the_rate_of_changes() {
        let (mut queue, now) = (WorkQueue::default(), Instant::now());
        let (wait, min_wait) = (Duration::from_secs(30), Duration::from_secs(2));
        queue.add(key("web"), now);
        assert_eq!(queue.next(now), Some(key("web")));
        queue.refused(key("web"), wait, min_wait, now);
        assert_eq!(queue.next_due(), Some(now + wait));
        queue.add(key("web"), now);
        queue.add(key("web"), now);
        assert_eq!(queue.next_due(), Some(now + min_wait));
        let later = now + min_wait;
        assert_eq!(queue.next(later), Some(key("web")));
        queue.add(key("web"), later); // while it runs
        queue.refused(key("web"), wait, min_wait, later);
        assert_eq!(queue.next_due(), Some(later + min_wait));
    }
}
