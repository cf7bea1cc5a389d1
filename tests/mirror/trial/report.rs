//! What the rounds showed, and what to do again when one fails.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
    time::Duration,
};

use super::plan::Plan;

/// All processes answer alike so long after a fault is over. Later ones are counted: a timed test is flaky by design.
pub(super) const MAX_EQUAL: Duration = Duration::from_secs(2);

/// What one round showed.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) what: String,
    pub(super) took: Duration,
    /// When all DNS was alike after the fault, where the load ended with it.
    pub(super) equal: Option<Duration>,
    /// For how long no process took a word.
    pub(super) gap: Duration,
}

#[derive(Debug, Default)]
pub(super) struct Report {
    rounds: Vec<Round>,
    /// How many words got each status; 0 is no answer.
    pub(super) statuses: BTreeMap<u32, usize>,
}

impl Report {
    pub(super) fn add(&mut self, round: Round) {
        self.rounds.push(round);
    }

    pub(super) fn rounds(&self) -> usize {
        self.rounds.len()
    }

    pub(super) fn join(mut self, other: Self) -> Self {
        self.rounds.extend(other.rounds);
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        self
    }

    pub(super) fn print(&self, processes: usize, took: Duration) {
        let rounds = self.rounds.len();
        let one =
            self.rounds.iter().map(|round| round.took).sum::<Duration>() / u32::try_from(rounds.max(1)).unwrap_or(1);
        println!("{rounds} rounds with {processes} processes: nothing wrong; {took:.0?}, {one:.1?} for each round");
        let acknowledged: usize = [200, 201, 202, 204, 404].iter().filter_map(|status| self.statuses.get(status)).sum();
        println!("{acknowledged} words acknowledged; by status (0: no answer): {:?}", self.statuses);
        let gap = self.rounds.iter().map(|round| round.gap).max().unwrap_or_default();
        let mut equal: Vec<_> = self.rounds.iter().filter_map(|round| Some((round.equal?, &round.what))).collect();
        equal.sort();
        if let Some((slowest, what)) = equal.last() {
            let late = equal.iter().filter(|(equal, _)| *equal > MAX_EQUAL);
            println!(
                "DNS alike within {MAX_EQUAL:?} in {} of {} rounds; p50 {:.2?}, the last after {slowest:.2?} ({what})",
                equal.len() - late.clone().count(),
                equal.len(),
                equal[equal.len() / 2].0,
            );
            late.for_each(|(equal, what)| println!("  {equal:.2?}: {what}"));
        }
        println!("no word was taken for {gap:.1?} at most");
    }
}

/// Prints how to repeat a round that fails, and tells the other lanes.
pub(super) struct RoundContext<'f> {
    pub(super) seed: u64,
    pub(super) processes: usize,
    pub(super) number: usize,
    pub(super) plan: Plan,
    pub(super) failed: &'f AtomicBool,
}

impl Drop for RoundContext<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.failed.store(true, SeqCst);
            let Self { seed, processes, number, plan, .. } = self;
            println!(
                "round {number} with {processes} processes failed: GANGPLANK_TRIAL_SEED={seed} GANGPLANK_TRIAL_FIRST={number} \
                 GANGPLANK_TRIAL_ROUNDS=1 repeats it alone; {plan:?}"
            );
        }
    }
}
