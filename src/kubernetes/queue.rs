//! Which services the mirror looks at next, and when.
//!
//! Level-triggered: a service stands in the queue once, however often it changed, and what is
//! written is what holds when its turn comes. A service that changes while it is being looked at
//! is looked at again afterwards, once it has been quiet for a moment: a service that is being
//! filled costs a few large writes instead of many small ones.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use tokio::time::Instant;

use crate::model::ServiceKey;

/// After the first failure a service waits so long, after each further one twice as long.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);

/// But never longer than this.
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// A service that changed while it was looked at is looked at again when so long nothing more came.
/// Longer than the messages of one stream are apart, and little beside the second for which an
/// answer waits.
const QUIET: Duration = Duration::from_millis(20);

/// But after this long at the latest.
const MAX_GATHERING: Duration = Duration::from_millis(100);

/// The queue. Time is an argument.
#[derive(Debug, Default)]
pub(super) struct Queue {
    entries: HashMap<ServiceKey, Entry>,
    due: BTreeSet<(Instant, ServiceKey)>,
}

#[derive(Debug, Default)]
struct Entry {
    /// When it is due, unless it runs.
    at: Option<Instant>,
    running: bool,
    /// To be looked at again once it has run.
    again: bool,
    /// While more changes are waited for: until when at most.
    gathering: Option<Instant>,
    failures: u32,
    /// Not due before this, whatever changes.
    not_before: Option<Instant>,
}

impl Queue {
    /// `service` has changed: it is due now, whatever it waited for, unless changes are gathered.
    pub(super) fn add(&mut self, service: ServiceKey, now: Instant) {
        let entry = self.entries.entry(service.clone()).or_default();
        if entry.running {
            entry.again = true;
        } else if let Some(until) = entry.gathering {
            self.set_due(service, until.min(now + QUIET), false);
        } else {
            self.set_due(service, now, true);
        }
    }

    /// The next service that is due. It runs until [`Queue::done`] or one of its siblings is called.
    pub(super) fn next(&mut self, now: Instant) -> Option<ServiceKey> {
        if self.due.first()?.0 > now {
            return None;
        }
        let (_, service) = self.due.pop_first()?;
        let entry = self.entries.entry(service.clone()).or_default();
        *entry = Entry { running: true, failures: entry.failures, ..Entry::default() };
        Some(service)
    }

    /// When the next service is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// `service` is as it should be.
    pub(super) fn done(&mut self, service: ServiceKey, now: Instant) {
        let again = self.entries.get(&service).is_some_and(|entry| entry.again);
        self.entries.remove(&service);
        if again {
            self.entries.entry(service.clone()).or_default().gathering = Some(now + MAX_GATHERING);
            self.add(service, now);
        }
    }

    /// `service` should be looked at after `wait` at the latest.
    pub(super) fn later(&mut self, service: ServiceKey, wait: Duration, now: Instant) {
        let Some(entry) = self.entries.get_mut(&service) else { return };
        (entry.running, entry.failures) = (false, 0);
        let at = if entry.again { now } else { now + wait };
        self.set_due(service, at, false);
    }

    /// `service` was refused and is tried again after `wait`, or when it changes, but not within
    /// `rest`: what is refused is not asked for at the rate at which it changes.
    pub(super) fn refused(&mut self, service: ServiceKey, wait: Duration, rest: Duration, now: Instant) {
        let Some(entry) = self.entries.get_mut(&service) else { return };
        (entry.running, entry.failures, entry.not_before) = (false, 0, Some(now + rest));
        let at = if entry.again { now } else { now + wait };
        self.set_due(service, at, false);
    }

    /// `service` failed and is tried again after a while; a change meanwhile does not make that
    /// shorter, so that a service that cannot be written is not tried at the rate at which it changes.
    pub(super) fn failed(&mut self, service: ServiceKey, now: Instant) {
        let Some(entry) = self.entries.get_mut(&service) else { return };
        let doublings = entry.failures.min(16);
        (entry.running, entry.failures) = (false, entry.failures + 1);
        let backoff = FIRST_BACKOFF.saturating_mul(1 << doublings).min(MAX_BACKOFF);
        // Between a half and the whole, so that what failed together does not come back together.
        self.set_due(service, now + backoff.mul_f64(0.5 + fastrand::f64() / 2.0), false);
    }

    /// Services that wait.
    pub(super) fn len(&self) -> usize {
        self.due.len()
    }

    fn set_due(&mut self, service: ServiceKey, at: Instant, only_sooner: bool) {
        let entry = self.entries.entry(service.clone()).or_default();
        let at = entry.not_before.map_or(at, |rested| rested.max(at));
        if let Some(before) = entry.at {
            if only_sooner && (before <= at || entry.failures > 0) {
                return;
            }
            self.due.remove(&(before, service.clone()));
        }
        entry.at = Some(at);
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
    fn a_service_stands_in_it_once_and_runs_once() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.add(key("web"), now);
        queue.add(key("web"), now);
        assert_eq!(queue.next(now), Some(key("web")));
        queue.add(key("web"), now);
        assert_eq!((queue.next(now), queue.len()), (None, 0), "it runs");
        queue.done(key("web"), now);
        assert_eq!(queue.next(now + QUIET), Some(key("web")), "it changed while it ran");
        queue.done(key("web"), now);
        assert_eq!((queue.next(now), queue.next_due()), (None, None));
    }

    #[test]
    fn what_changes_under_way_is_gathered_until_it_is_quiet_but_not_for_long() {
        let (mut queue, begun) = (Queue::default(), Instant::now());
        queue.add(key("web"), begun);
        assert_eq!(queue.next(begun), Some(key("web")));
        queue.add(key("web"), begun);
        queue.done(key("web"), begun);
        assert_eq!(queue.next_due(), Some(begun + QUIET));
        let mut now = begun;
        while queue.next_due() > Some(now) {
            now += QUIET / 2;
            queue.add(key("web"), now);
        }
        assert_eq!(queue.next_due(), Some(begun + MAX_GATHERING));
        assert_eq!(queue.next(now), Some(key("web")));
        queue.done(key("web"), now);
        queue.add(key("web"), now);
        assert_eq!(queue.next(now), Some(key("web")), "a change in rest is written at once");
    }

    #[test]
    fn what_fails_waits_longer_each_time_whatever_changes() {
        let (mut queue, mut now) = (Queue::default(), Instant::now());
        queue.add(key("web"), now);
        let mut waits = Vec::new();
        for _ in 0..12 {
            assert_eq!(queue.next(now), Some(key("web")));
            queue.failed(key("web"), now);
            queue.add(key("web"), now);
            let due = queue.next_due().expect("it comes back");
            waits.push(due - now);
            now = due;
        }
        assert!(waits[0] >= FIRST_BACKOFF / 2 && waits[0] <= FIRST_BACKOFF, "{waits:?}");
        assert!(waits[11] >= MAX_BACKOFF / 2 && waits[11] <= MAX_BACKOFF, "{waits:?}");
    }

    #[test]
    fn what_waits_on_purpose_comes_sooner_when_it_changes() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.add(key("web"), now);
        assert_eq!(queue.next(now), Some(key("web")));
        queue.later(key("web"), Duration::from_secs(30), now);
        assert_eq!((queue.next(now), queue.next_due()), (None, Some(now + Duration::from_secs(30))));
        queue.add(key("web"), now);
        assert_eq!(queue.next(now), Some(key("web")));
    }
    #[test]
    fn what_is_refused_is_not_asked_for_as_often_as_it_changes() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        let (wait, rest) = (Duration::from_secs(30), Duration::from_secs(2));
        queue.add(key("web"), now);
        assert_eq!(queue.next(now), Some(key("web")));
        queue.refused(key("web"), wait, rest, now);
        assert_eq!(queue.next_due(), Some(now + wait));
        queue.add(key("web"), now);
        queue.add(key("web"), now);
        assert_eq!(queue.next_due(), Some(now + rest));
        let later = now + rest;
        assert_eq!(queue.next(later), Some(key("web")));
        queue.add(key("web"), later); // while it runs
        queue.refused(key("web"), wait, rest, later);
        assert_eq!(queue.next_due(), Some(later + rest));
    }
}
