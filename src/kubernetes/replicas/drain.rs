//! How long a process that stops keeps the Lease.

use std::time::Duration;

use tokio::time::Instant;

/// How long for what is not mirrored yet: while there is progress, and without. The rest is handed over to the next process that
/// writes.
const MAX_HOLD: Duration = Duration::from_secs(7);
const MAX_HOLD_WITHOUT_PROGRESS: Duration = Duration::from_secs(1);

/// What is known of a drain.
#[derive(Debug, Clone, Copy)]
pub(super) struct Drain {
    begun: Instant,
    /// The fewest services that were behind so far, and since when.
    fewest: (usize, Instant),
}

impl Drain {
    pub(super) const fn new(now: Instant) -> Self {
        Self { begun: now, fewest: (usize::MAX, now) }
    }

    /// Whether the Lease has to be given up, if `behind` services are not mirrored; `quiet` once nothing more is accepted.
    pub(super) fn must_release(&mut self, behind: usize, quiet: bool, now: Instant) -> bool {
        if behind < self.fewest.0 {
            self.fewest = (behind, now);
        }
        let late = now - self.begun >= MAX_HOLD || now - self.fewest.1 >= MAX_HOLD_WITHOUT_PROGRESS;
        late || behind == 0 && quiet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_is_kept_while_the_mirror_makes_progress() {
        let begun = Instant::now();
        let at = |millis| begun + Duration::from_millis(millis);
        let mut drain = Drain::new(begun);
        assert!(!drain.must_release(0, false, at(0)) && drain.must_release(0, true, at(1)));
        let mut drain = Drain::new(begun);
        assert!(!drain.must_release(3, true, at(0)) && !drain.must_release(3, true, at(999)));
        assert!(drain.must_release(3, true, at(1_000)), "no progress");
        let mut drain = Drain::new(begun);
        let steps: Vec<bool> = (0..=14).map(|n| drain.must_release(20 - n, false, at(500 * n as u64))).collect();
        assert_eq!(steps.iter().position(|must| *must), Some(14));
    }
}
