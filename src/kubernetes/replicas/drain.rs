//! How long a process that stops keeps the Lease.

use std::time::Duration;

use tokio::time::Instant;

/// How long for what is not mirrored yet. Nobody takes registrations meanwhile, so the rest is handed over to the next process that
/// writes, in the drain time. Half of the second within which that one takes them.
const MAX_HOLD: Duration = Duration::from_millis(500);

/// A drain that has begun.
#[derive(Debug, Clone, Copy)]
pub(super) struct Drain(Instant);

impl Drain {
    pub(super) const fn new(now: Instant) -> Self {
        Self(now)
    }

    /// Whether the Lease has to be given up, if `behind` services are not mirrored; `quiet` once nothing more is accepted.
    pub(super) fn must_release(self, behind: usize, quiet: bool, now: Instant) -> bool {
        // That nothing is behind says little while registrations that were read are still on their way to the writer.
        now - self.0 >= MAX_HOLD || behind == 0 && quiet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_is_kept_for_half_a_second_while_something_is_not_mirrored() {
        let begun = Instant::now();
        let at = |millis| begun + Duration::from_millis(millis);
        let drain = Drain::new(begun);
        assert!(!drain.must_release(0, false, at(0)) && drain.must_release(0, true, at(1)));
        let behind = (0..=10).map(|n| (20 - n, at(100 * n as u64)));
        let given_up = behind.map(|(behind, now)| drain.must_release(behind, true, now));
        assert_eq!(given_up.collect::<Vec<_>>().iter().position(|must| *must), Some(5), "although there is progress");
    }
}
