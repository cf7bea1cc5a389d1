//! When tombstones expire: each service is looked at a few times in the lifetime of its tombstones, never on the path of a
//! registration.

use std::collections::BTreeSet;

use crate::model::ServiceKey;

/// Services that one sweep looks at. The slice of each is written again, so that the sweeps of many services that were removed at
/// once are spread out.
const MAX_SWEPT: usize = 16;

/// Microseconds for which a service is left alone after a sweep: its slice is not written again for every tombstone.
const MIN_INTERVAL: u64 = 3_600_000_000;

/// The services with tombstones, by the clock of what expires first.
#[derive(Debug, Default)]
pub(super) struct Expiries(BTreeSet<(u64, ServiceKey)>);

impl Expiries {
    /// `service`, which had no tombstones, has one of `clock`.
    pub(super) fn add(&mut self, clock: u64, service: ServiceKey) {
        self.0.insert((clock, service));
    }

    /// `service` was swept at `expired_before`, and keeps tombstones, the oldest of `oldest`.
    pub(super) fn add_again(&mut self, oldest: u64, expired_before: u64, service: ServiceKey) {
        self.add(oldest.max(expired_before.saturating_add(MIN_INTERVAL)), service);
    }

    /// Takes services with tombstones from before `expired_before`. There may be more.
    pub(super) fn take_due(&mut self, expired_before: u64) -> Vec<ServiceKey> {
        let mut due = Vec::new();
        while due.len() < MAX_SWEPT
            && self.0.first().is_some_and(|(clock, _)| *clock < expired_before)
            && let Some((_, service)) = self.0.pop_first()
        {
            due.push(service);
        }
        due
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
