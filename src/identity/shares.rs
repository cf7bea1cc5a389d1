//! How much of a budget each asker may use, so that none uses it up for all others.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

/// Askers that are remembered. With more, those that have their whole burst again are forgotten.
const MAX_ASKERS: usize = 16_384;

/// The shares of askers `K`: each may ask so often at once, and then once in each interval (a token bucket).
#[derive(Debug)]
pub(super) struct Shares<K> {
    burst: u32,
    interval: Duration,
    /// When each has its whole burst again.
    full_at: HashMap<K, Instant>,
}

impl<K: Hash + Eq> Shares<K> {
    pub(super) fn new(burst: u32, interval: Duration) -> Self {
        Self { burst, interval, full_at: HashMap::new() }
    }

    /// How long `asker` has to wait before it asks, which is counted. `None` if that is longer than `max_wait`, or there are
    /// too many askers.
    pub(super) fn reserve(&mut self, asker: K, max_wait: Duration, now: Instant) -> Option<Duration> {
        if self.full_at.len() >= MAX_ASKERS && !self.full_at.contains_key(&asker) {
            self.full_at.retain(|_, full_at| *full_at > now);
            if self.full_at.len() >= MAX_ASKERS {
                return None;
            }
        }
        let entry = self.full_at.entry(asker).or_insert(now);
        let full_at = (*entry).max(now) + self.interval;
        let wait = full_at.duration_since(now).saturating_sub(self.interval * self.burst);
        (wait <= max_wait).then(|| {
            *entry = full_at;
            wait
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asker_has_its_burst_then_its_rate_and_costs_others_nothing() {
        let (interval, now) = (Duration::from_millis(10), Instant::now());
        let mut shares = Shares::new(5, interval);
        let mut reserve = |asker, now| shares.reserve(asker, 2 * interval, now);
        assert!((0..5).all(|_| reserve(1, now) == Some(Duration::ZERO)));
        assert_eq!([(); 3].map(|()| reserve(1, now)), [Some(interval), Some(2 * interval), None]);
        assert_eq!(reserve(2, now), Some(Duration::ZERO));
        assert_eq!(reserve(1, now + 7 * interval), Some(Duration::ZERO), "what was refused is not counted");
    }

    #[test]
    fn askers_without_end_are_forgotten() {
        let (interval, now) = (Duration::from_millis(10), Instant::now());
        let mut shares = Shares::new(5, interval);
        let asked = (0..2 * MAX_ASKERS).filter(|asker| shares.reserve(*asker, interval, now).is_some()).count();
        assert_eq!((asked, shares.full_at.len()), (MAX_ASKERS, MAX_ASKERS));
        assert!(shares.reserve(usize::MAX, interval, now + interval).is_some());
        assert_eq!(shares.full_at.len(), 1);
    }
}
