//! Stamps what the writer accepts, so that any two words on an instance have an order wherever they meet.

use std::time::Duration;

use crate::model::{HybridClock, Stamp, UnixMillis};

/// The writer's clock, with the term and the generation under which it accepts.
#[derive(Debug, Default)]
pub(super) struct Stamper {
    clock: HybridClock,
    term: u64,
    generation: u64,
    /// Whether it was reported that the clock is ahead.
    reported: bool,
}

impl Stamper {
    /// `clock` is not behind any stamp in the store; `term` is 0 without Kubernetes.
    pub(super) fn new(clock: HybridClock, term: u64) -> Self {
        Self { clock, term, generation: 0, reported: false }
    }

    /// The term of the next stamp.
    pub(super) fn term(&self) -> u64 {
        self.term
    }

    /// Another term begins.
    pub(super) fn set_term(&mut self, term: u64) {
        self.term = term;
    }

    /// A batch begins, which will be `generation`.
    pub(super) fn set_generation(&mut self, generation: u64) {
        self.generation = generation;
    }

    /// The stamp of a command that arrived at `received`: later than every one before, even if the wall
    /// clock was set back.
    pub(super) fn next(&mut self, received: UnixMillis) -> Stamp {
        let clock = self.clock.next(received.0.saturating_mul(1_000));
        Stamp { clock, term: self.term, generation: self.generation }
    }

    /// The time by which ages of stamps are measured, in microseconds; `wall` is the wall clock.
    pub(super) fn now(&self, wall: UnixMillis) -> u64 {
        self.clock.now(wall.0.saturating_mul(1_000))
    }

    /// How far it is ahead of the wall clock, if that is further than clocks are apart: then one of the two was set wrong. Stamps go on
    /// behind it all the same, because the wall clock may be the wrong one.
    pub(super) fn lead(&self, wall: UnixMillis) -> Option<Duration> {
        let lead = self.clock.last().saturating_sub(wall.0.saturating_mul(1_000));
        (lead > HybridClock::MAX_LEAD).then(|| Duration::from_micros(lead))
    }

    /// As [`Stamper::lead`], once.
    pub(super) fn new_lead(&mut self, wall: UnixMillis) -> Option<Duration> {
        self.lead(wall).filter(|_| !std::mem::replace(&mut self.reported, true))
    }

    /// The wall clock is known to be right: the next stamp follows it, or `clock` if that is ahead.
    pub(super) fn reset(&mut self, clock: HybridClock) {
        self.clock = clock;
        self.reported = false;
    }

    /// The clock as it is.
    pub(super) fn clock(&self) -> HybridClock {
        self.clock
    }

    /// Takes note of a stamp of another writer.
    pub(super) fn observe(&mut self, stamp: Stamp) {
        self.clock.observe(stamp.clock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_grow_when_the_wall_clock_is_set_back_and_behind_those_of_others() {
        let mut stamper = Stamper::new(HybridClock::after(5_000_000), 3);
        stamper.set_generation(7);
        let first = stamper.next(UnixMillis(1));
        assert_eq!(first, Stamp { clock: 5_000_001, term: 3, generation: 7 });
        assert!(stamper.next(UnixMillis(1)) > first);
        assert_eq!(stamper.next(UnixMillis(6_000)).clock, 6_000_000);
        stamper.observe(Stamp { clock: 9_000_000, term: 9, generation: 9 });
        stamper.set_term(10);
        assert_eq!(stamper.next(UnixMillis(6_001)), Stamp { clock: 9_000_001, term: 10, generation: 7 });
    }
}
