//! Runs histories on all cores, and finds the ones that go wrong.

use std::{
    collections::BTreeMap,
    num::NonZero,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use super::{checker::Violation, plan::FaultPlan, setup::Setup, world::World};

/// Histories that a thread takes at a time.
const BATCH: u64 = 64;

/// One history. Returns what went wrong, and how many take-overs it had.
pub(super) fn run(setup: &Setup, seed: u64, trace: bool) -> (Vec<Violation>, u64) {
    let mut world = World::new(*setup, seed, FaultPlan::draw(setup, seed), trace);
    let found = world.run();
    (found, world.takeovers)
}

/// What many histories came to.
#[derive(Debug, Default)]
pub(super) struct Found {
    takeovers: u64,
    /// By what went wrong: in how many histories, and the lowest seed of them.
    pub(super) wrong: BTreeMap<Violation, (u64, u64)>,
}

impl Found {
    fn add(&mut self, seed: u64, (violations, takeovers): (Vec<Violation>, u64)) {
        self.takeovers += takeovers;
        for violation in violations {
            let (count, lowest) = self.wrong.entry(violation).or_insert((0, seed));
            *count += 1;
            *lowest = seed.min(*lowest);
        }
    }

    fn merge(&mut self, other: Self) {
        self.takeovers += other.takeovers;
        for (violation, (count, seed)) in other.wrong {
            let (all, lowest) = self.wrong.entry(violation).or_insert((0, seed));
            *all += count;
            *lowest = seed.min(*lowest);
        }
    }

    pub(super) fn lowest_seed(&self) -> Option<u64> {
        self.wrong.values().map(|(_, seed)| *seed).min()
    }
}

/// Runs the histories with the seeds from 1 on, and says how fast.
pub(super) fn count(name: &str, setup: &Setup, histories: u64) -> Found {
    let began = Instant::now();
    let found = run_all(setup, 1, histories);
    let rate = histories as f64 / began.elapsed().as_secs_f64();
    eprintln!(
        "{name}: {histories} histories ({rate:.0} a second), {} take-overs, wrong: {:?}",
        found.takeovers, found.wrong
    );
    found
}

/// The lowest seed below `end` whose history goes wrong.
pub(super) fn first_wrong(setup: &Setup, end: u64) -> Option<u64> {
    let step = BATCH * threads();
    (1..end).step_by(step as usize).find_map(|first| run_all(setup, first, step.min(end - first)).lowest_seed())
}

fn run_all(setup: &Setup, first: u64, histories: u64) -> Found {
    let next = AtomicU64::new(first);
    let end = first + histories;
    let all = Mutex::new(Found::default());
    thread::scope(|scope| {
        for _ in 0..threads() {
            scope.spawn(|| {
                let mut found = Found::default();
                loop {
                    let batch = next.fetch_add(BATCH, Ordering::Relaxed);
                    if batch >= end {
                        break;
                    }
                    for seed in batch..(batch + BATCH).min(end) {
                        found.add(seed, run(setup, seed, false));
                    }
                }
                all.lock().expect("no thread panicked").merge(found);
            });
        }
    });
    all.into_inner().expect("no thread panicked")
}

fn threads() -> u64 {
    thread::available_parallelism().map_or(1, NonZero::get) as u64
}
