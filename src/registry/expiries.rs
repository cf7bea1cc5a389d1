//! Which services remember removals, and how much: for their expiry, and for the budget of the process.
//!
//! Each service is looked at a few times in the lifetime of its tombstones, never on the path of a registration. Beyond the budget
//! a removal drops older ones, of the services with the oldest: what was said before them counts no more, if it comes from another
//! process ([`Tombstones::refuse_before`](crate::replicas::tombstones::Tombstones::refuse_before)).

use std::{
    collections::{BTreeSet, HashMap},
    ops::Bound,
};

use crate::model::ServiceKey;

/// Services that one sweep looks at. The slice of each is written again, so that the sweeps of many services that were removed at
/// once are spread out.
const MAX_SWEPT: usize = 16;

/// Microseconds for which a service is left alone after a sweep: its slice is not written again for every tombstone.
const MIN_INTERVAL: u64 = 3_600_000_000;

/// Most bytes of all tombstones, as they are written: about 900 000 of them. In memory they take some three times as much.
const MAX_BYTES: usize = 64 << 20;

/// Services of which one removal drops tombstones, at most.
pub(super) const MAX_SHRUNK: usize = 16;

/// The services with tombstones, by the clock of what expires first.
#[derive(Debug)]
pub(super) struct Expiries {
    by_clock: BTreeSet<(u64, ServiceKey)>,
    /// How many of them each namespace has.
    by_namespace: HashMap<Box<str>, usize, foldhash::fast::RandomState>,
    bytes: usize,
    max_bytes: usize,
    /// Where the search for old tombstones stopped.
    shrunk_to: Option<(u64, ServiceKey)>,
}

impl Default for Expiries {
    fn default() -> Self {
        Self {
            by_clock: BTreeSet::new(),
            by_namespace: HashMap::default(),
            bytes: 0,
            max_bytes: MAX_BYTES,
            shrunk_to: None,
        }
    }
}

impl Expiries {
    /// Services with tombstones.
    pub(super) fn len(&self) -> usize {
        self.by_clock.len()
    }

    /// Services of a namespace with tombstones.
    pub(super) fn in_namespace(&self, namespace: &str) -> usize {
        self.by_namespace.get(namespace).copied().unwrap_or(0)
    }

    /// `service`, which had no tombstones, has one of `clock`.
    pub(super) fn add(&mut self, clock: u64, service: ServiceKey) {
        match self.by_namespace.get_mut(service.namespace()) {
            Some(count) => *count += 1,
            None => drop(self.by_namespace.insert(service.namespace().into(), 1)),
        }
        self.by_clock.insert((clock, service));
    }

    /// The tombstones of a service took `before` bytes, and take `after` now.
    pub(super) fn resize(&mut self, before: usize, after: usize) {
        // Added first: the sum is unsigned, and a service may shrink to nothing.
        self.bytes = (self.bytes + after).saturating_sub(before);
    }

    /// `service` was swept at `expired_before`, and keeps tombstones, the oldest of `oldest`.
    pub(super) fn add_again(&mut self, oldest: u64, expired_before: u64, service: ServiceKey) {
        self.add(oldest.max(expired_before.saturating_add(MIN_INTERVAL)), service);
    }

    /// Takes services with tombstones from before `expired_before`. There may be more.
    pub(super) fn take_due(&mut self, expired_before: u64) -> Vec<ServiceKey> {
        let mut due = Vec::new();
        while due.len() < MAX_SWEPT
            && self.by_clock.first().is_some_and(|(clock, _)| *clock < expired_before)
            && let Some((_, service)) = self.by_clock.pop_first()
        {
            self.taken(&service);
            due.push(service);
        }
        due
    }

    /// Takes the services whose tombstones expire by a clock behind `clock`. O(services).
    pub(super) fn take_behind(&mut self, clock: u64) -> Vec<ServiceKey> {
        let behind = self.by_clock.extract_if(.., |(expires, _)| *expires > clock);
        let behind: Vec<_> = behind.map(|(_, service)| service).collect();
        behind.iter().for_each(|service| self.taken(service));
        behind
    }

    fn taken(&mut self, service: &ServiceKey) {
        match self.by_namespace.get_mut(service.namespace()) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(self.by_namespace.remove(service.namespace())),
        }
    }

    /// The next service to drop tombstones of; `None` while all fit the budget. After the last one it begins again.
    pub(super) fn next_to_shrink(&mut self) -> Option<ServiceKey> {
        if self.bytes <= self.max_bytes {
            return None;
        }
        // Goes on where it stopped: the oldest service alone would lose all its tombstones first.
        let after = self.shrunk_to.take().map_or(Bound::Unbounded, Bound::Excluded);
        self.shrunk_to = self.by_clock.range((after, Bound::Unbounded)).next().cloned();
        self.shrunk_to.as_ref().map(|(_, service)| service.clone())
    }
}

#[cfg(test)]
impl Expiries {
    pub(super) fn with_budget(max_bytes: usize) -> Self {
        Self { max_bytes, ..Self::default() }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::VALIDATOR;

    #[test]
    fn services_are_swept_in_small_parts_and_left_alone_for_an_hour() {
        let key = |n: usize| VALIDATOR.service("prod", &format!("s{n}")).expect("valid");
        let mut expiries = Expiries::default();
        (0..40).for_each(|n| expiries.add(n as u64, key(n)));
        assert_eq!(expiries.take_due(0), []);
        let first = expiries.take_due(30);
        assert_eq!(first, (0..16).map(key).collect::<Vec<_>>());
        assert_eq!((expiries.take_due(30).len(), expiries.take_due(30).len()), (14, 0));
        expiries.add_again(30, 30, key(0));
        assert_eq!(expiries.take_due(MIN_INTERVAL).len(), 10, "without the one that was swept");
        assert_eq!(expiries.take_due(30 + MIN_INTERVAL + 1), [key(0)]);
    }
}
