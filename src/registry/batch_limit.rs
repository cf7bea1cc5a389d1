//! How many commands one batch takes, so that the first of them is answered soon however many wait.
//!
//! Most of a batch's time goes by after its size is decided: a command costs about ten times as
//! much to apply as to decide. So the limit is set by what the commands of earlier batches cost.
//! The sync does not count, because it costs the same for one command as for a thousand: where it
//! is slow, larger batches are what keeps the throughput up.

use std::time::Duration;

/// What a batch may take, without its commit.
pub(super) const MAX_BATCH_TIME: Duration = Duration::from_millis(2);

/// What it may take at most where the commit takes long too: as long as the commit, up to this.
const MAX_SLOW_BATCH_TIME: Duration = Duration::from_millis(20);

/// Smaller batches say little of what a command costs: most of it is the fixed cost of a batch.
const MIN_OBSERVED_COMMANDS: u32 = 16;

/// The measured cost of commands.
#[derive(Debug)]
pub(super) struct BatchLimit {
    /// Time to decide and apply one, smoothed over about eight batches.
    per_command: Duration,
    /// How long the last commit took.
    commit: Duration,
}

impl BatchLimit {
    pub(super) fn new() -> Self {
        Self { per_command: Duration::from_micros(10), commit: Duration::ZERO }
    }

    /// Whether a batch of so many commands should not take more.
    pub(super) fn is_reached(&self, commands: usize) -> bool {
        let commands = u32::try_from(commands).unwrap_or(u32::MAX);
        self.per_command.saturating_mul(commands) >= self.commit.clamp(MAX_BATCH_TIME, MAX_SLOW_BATCH_TIME)
    }

    /// A batch of so many commands took `total`, of which `commit` was for the journal.
    pub(super) fn observe(&mut self, commands: usize, total: Duration, commit: Duration) {
        self.commit = commit;
        let commands = u32::try_from(commands).unwrap_or(u32::MAX);
        if commands >= MIN_OBSERVED_COMMANDS {
            let latest = total.saturating_sub(commit) / commands;
            self.per_command = (self.per_command * 7 + latest) / 8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    fn largest(limit: &BatchLimit) -> usize {
        (0..100_000).find(|commands| limit.is_reached(*commands)).expect("there is a limit")
    }

    fn after(batches: usize, commands: usize, total: Duration, commit: Duration) -> BatchLimit {
        let mut limit = BatchLimit::new();
        (0..batches).for_each(|_| limit.observe(commands, total, commit));
        limit
    }

    #[test]
    fn limit_is_what_two_milliseconds_suffice_for() {
        assert_eq!(largest(&BatchLimit::new()), 200);
        let slow = largest(&after(100, 100, 4 * MILLI, Duration::ZERO));
        assert!((50..=51).contains(&slow), "40 µs each, and the limit is {slow}");
        let fast = largest(&after(100, 1000, MILLI, Duration::ZERO));
        assert!((1900..=2000).contains(&fast), "1 µs each, and the limit is {fast}");
    }

    #[test]
    fn slow_commits_make_batches_larger_up_to_a_bound() {
        assert_eq!(largest(&after(1, 100, 11 * MILLI, 10 * MILLI)), 1000);
        assert_eq!(largest(&after(1, 100, 1001 * MILLI, 1000 * MILLI)), 2000);
    }

    #[test]
    fn fixed_cost_of_a_small_batch_is_not_taken_for_the_cost_of_a_command() {
        assert_eq!(largest(&after(100, 1, MILLI, Duration::ZERO)), 200);
    }
}
