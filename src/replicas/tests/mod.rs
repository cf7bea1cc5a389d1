//! The protocol in a simulated world, history by history, each from one seed.
//!
//! Two or three replicas with journals, a Lease and slices behind compare-and-swap; requests that are a minute late or
//! carried out unseen, watches that lag, partitions, pauses (between a check and its answer, in the middle of a take-over),
//! crashes, old copies of directories, copies of living ones, lost disks, starts while the API server is away, deleted
//! Leases, slices edited by hand, namespaces deleted, wall clocks half a second off. A [`checker`] that knows nothing of the
//! protocol holds every acknowledged change against what is answered in the end.
//!
//! `cargo test --lib replicas` runs some hundred histories of each setup. For more, and for one:
//!
//! - `GANGPLANK_REPLICA_HISTORIES=1000000 cargo test --release --lib replicas -- --nocapture` runs a million of each on all cores,
//!   and counts how many go wrong without each rule.
//! - `GANGPLANK_REPLICA_SEED=7 cargo test --lib no_acknowledged_word_is_undone -- --nocapture` prints the traces of one seed.
//! - `GANGPLANK_REPLICA_SETUP=hand` takes only setups, and rules, with this in their names.

mod aims;
mod checker;
mod election;
mod plan;
mod random;
mod replica;
mod search;
mod setup;
mod world;

use plan::FaultPlan;
use search::{count, first_wrong, run};
use setup::{Faults, MAX_SEARCH, NEEDED, SETUP, SETUPS, Setup};
use world::World;

use super::rules::Rules;

/// Histories of each setup; `GANGPLANK_REPLICA_HISTORIES` asks for more.
const HISTORIES: u64 = 250;

/// A number from the environment.
fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// The setups whose name contains `GANGPLANK_REPLICA_SETUP`, or all.
fn setups() -> impl Iterator<Item = (&'static str, Setup)> {
    let asked = std::env::var("GANGPLANK_REPLICA_SETUP").unwrap_or_default();
    SETUPS.iter().copied().filter(move |(name, _)| name.contains(&asked))
}

/// A history that goes wrong is run again with its trace; the same seed always gives the same history.
#[test]
fn no_acknowledged_word_is_undone() {
    if let Some(seed) = variable("GANGPLANK_REPLICA_SEED") {
        return replay(seed);
    }
    let histories = variable("GANGPLANK_REPLICA_HISTORIES").unwrap_or(HISTORIES);
    for (name, setup) in setups() {
        let wrong = count(name, &setup, histories).wrong;
        if let Some((violation, (_, seed))) = wrong.first_key_value() {
            run(&setup, *seed, true);
            panic!(
                "{name}: {violation:?} with seed {seed}: {wrong:?}\n\
                 again: GANGPLANK_REPLICA_SEED={seed} GANGPLANK_REPLICA_SETUP='{name}' \
                 cargo test --lib no_acknowledged_word_is_undone -- --nocapture"
            );
        }
    }
}

/// One history of each setup, with its trace.
fn replay(seed: u64) {
    for (name, setup) in setups() {
        eprintln!("=== {name}, seed {seed}");
        let (wrong, _) = run(&setup, seed, true);
        eprintln!("=== {name}, seed {seed}: wrong: {wrong:?}");
    }
}

/// With `GANGPLANK_REPLICA_HISTORIES`, how many of them go wrong without each rule is counted.
#[test]
fn leaving_a_rule_out_goes_wrong() {
    let asked = std::env::var("GANGPLANK_REPLICA_SETUP").unwrap_or_default();
    for &(name, leave_out, setup) in NEEDED.iter().filter(|(name, ..)| name.contains(&asked)) {
        let mut rules = Rules::ALL;
        leave_out(&mut rules);
        let without = Setup { rules, ..setup };
        if let Some(histories) = variable("GANGPLANK_REPLICA_HISTORIES") {
            count(&format!("without {name}"), &without, histories);
            continue;
        }
        let seed = first_wrong(&without, MAX_SEARCH).unwrap_or_else(|| panic!("without {name} nothing goes wrong"));
        eprintln!("without {name}: seed {seed}");
        assert_eq!(run(&setup, seed, false).0, [], "seed {seed} with {name}");
    }
}

/// The clock by which a writer measures its Lease has to run through suspensions.
#[test]
fn clock_that_stops_in_pauses_goes_wrong() {
    let stopping = Setup { faults: Faults { stopping_clocks: true, ..SETUP.faults }, ..SETUP };
    assert!(first_wrong(&stopping, MAX_SEARCH).is_some());
}

#[test]
fn same_seed_gives_the_same_history() {
    for seed in 1..=20 {
        let history = || {
            let mut world = World::new(SETUP, seed, FaultPlan::draw(&SETUP, seed), false);
            world.run();
            world.summary()
        };
        assert_eq!(history(), history(), "seed {seed}");
    }
}
