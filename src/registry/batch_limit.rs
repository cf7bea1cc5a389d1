//! How many commands one batch takes, so that the first of them is answered soon, however long the
//! queue is.
//!
//! Most of a batch's time is spent after its size is decided: a command costs about ten times as
//! much to apply as to decide. So the limit follows from the measured cost of commands in earlier
//! batches. The sync is not part of that cost, because one command costs as much to sync as a
//! thousand: on a slow disk, larger batches keep the throughput up.

use std::time::Duration;

/// Time that one batch may take, without its commit.
pub(super) const MAX_BATCH_TIME: Duration = Duration::from_millis(2);

/// The same where the commit is slow: a batch may take as long as its commit, up to this limit.
const MAX_SLOW_BATCH_TIME: Duration = Duration::from_millis(20);

/// Smaller batches are not measured: their time is mostly the fixed cost of a batch.
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
        // A guess until the first batch is measured: 200 commands.
        Self { per_command: Duration::from_micros(10), commit: Duration::ZERO }
    }

    /// Whether a batch of so many commands should not take more.
    pub(super) fn is_reached(&self, commands: usize) -> bool {
        let commands = u32::try_from(commands).unwrap_or(u32::MAX);
        // Where the disk takes longer than the commands, waiting for it longer does not help: the batch may grow with its sync.
        self.per_command.saturating_mul(commands) >= self.commit.clamp(MAX_BATCH_TIME, MAX_SLOW_BATCH_TIME)
    }

    /// Records that a batch of so many commands took `total`, of which the journal took `commit`.
    pub(super) fn observe(&mut self, commands: usize, total: Duration, commit: Duration) {
        self.commit = commit;
        let commands = u32::try_from(commands).unwrap_or(u32::MAX);
        if commands >= MIN_OBSERVED_COMMANDS {
            // Smoothed: one batch that was descheduled must not make the next ones small.
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
    fn limit_is_as_many_commands_as_fit_into_two_milliseconds() {
        assert_eq!(largest(&BatchLimit::new()), 200);
        let slow = largest(&after(100, 100, 4 * MILLI, Duration::ZERO));
        assert!((50..=51).contains(&slow), "40 µs each, and the limit is {slow}");
        let fast = largest(&after(100, 1000, MILLI, Duration::ZERO));
        assert!((1900..=2000).contains(&fast), "1 µs each, and the limit is {fast}");
    }

    #[test]
    fn slow_commit_raises_the_limit_up_to_a_bound() {
        assert_eq!(largest(&after(1, 100, 11 * MILLI, 10 * MILLI)), 1000);
        assert_eq!(largest(&after(1, 100, 1001 * MILLI, 1000 * MILLI)), 2000);
    }

    #[test]
    fn small_batch_does_not_change_the_cost_per_command() {
        assert_eq!(largest(&after(100, 1, MILLI, Duration::ZERO)), 200);
    }
}
