//! Stamps: when a word was said, in an order that all replicas agree on.

use std::fmt;

/// When a word was said. Stamps are totally ordered: by clock, then term, then generation.
///
/// The clock comes first, not the term: a word that a deposed writer took late in its term may be
/// younger than the first words of the next term, and the younger word must win.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Stamp {
    /// Hybrid logical clock, microseconds since the Unix epoch. 0 for words from before there were stamps,
    /// which therefore rank below every stamped word.
    pub clock: u64,
    /// The writer's term; 0 without Kubernetes.
    pub term: u64,
    /// The writer's generation.
    pub generation: u64,
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.clock, self.term, self.generation)
    }
}

/// A hybrid logical clock: follows the wall clock, never repeats itself, and is never behind a
/// stamp that this replica has seen (Kulkarni et al., "Logical Physical Clocks", 2014).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HybridClock {
    /// The last value that was returned or seen, in microseconds since the Unix epoch.
    last: u64,
}

impl HybridClock {
    /// How far a stamp may be ahead of the wall clock, in microseconds. The clocks of two processes that can hold the Lease are
    /// about 2 s apart at most; what is further ahead comes from a clock that was set wrong, or from an edit of a slice.
    pub const MAX_LEAD: u64 = 5_000_000;

    /// The highest clock that a stamp can have at wall clock `wall`.
    #[must_use]
    pub const fn highest(wall: u64) -> u64 {
        wall.saturating_add(Self::MAX_LEAD)
    }

    /// A clock that goes on after `last`, the highest value that the directory holds.
    #[must_use]
    pub const fn after(last: u64) -> Self {
        Self { last }
    }

    /// The next value. `wall` is the wall clock in microseconds since the Unix epoch.
    pub fn next(&mut self, wall: u64) -> u64 {
        // Follows the wall clock when that is ahead, and counts on by itself when it was set back or two words fall
        // into one microsecond.
        self.last = wall.max(self.last.saturating_add(1));
        self.last
    }

    /// Takes note of a stamp from elsewhere.
    pub fn observe(&mut self, clock: u64) {
        self.last = self.last.max(clock);
    }

    /// The time by which ages are measured: the wall clock, or the clock where that is [a little](Self::MAX_LEAD) ahead. One stamp
    /// of next year must not make everything a year old.
    #[must_use]
    pub fn now(&self, wall: u64) -> u64 {
        wall.max(self.last.min(Self::highest(wall)))
    }

    /// The last value that was returned or seen.
    #[must_use]
    pub const fn last(&self) -> u64 {
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_never_repeats_when_the_wall_clock_stands_or_goes_back() {
        let mut clock = HybridClock::default();
        assert_eq!([clock.next(10), clock.next(10), clock.next(3)], [10, 11, 12]);
        clock.observe(100);
        assert_eq!((clock.next(50), clock.now(40), clock.now(500)), (101, 101, 500));
        clock.observe(HybridClock::MAX_LEAD + 51);
        assert_eq!(clock.now(50), HybridClock::MAX_LEAD + 50, "ages follow the wall clock");
    }

    #[test]
    fn clock_ranks_before_term_and_term_before_generation() {
        let stamp = |clock, term, generation| Stamp { clock, term, generation };
        assert!(stamp(2, 1, 1) > stamp(1, 9, 9));
        assert!(stamp(1, 2, 1) > stamp(1, 1, 9));
        assert!(stamp(1, 1, 2) > stamp(1, 1, 1));
        assert!(stamp(1, 0, 0) > Stamp::default(), "a word without a stamp ranks below");
    }
}
