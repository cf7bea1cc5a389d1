//! The protocol in a simulated world, history by history, each from one seed.
//!
//! Two or three replicas with journals, a Lease and slices behind compare-and-swap; requests that are a minute late or
//! carried out unseen, watches that lag, partitions, pauses (between a check and its answer, in the middle of a take-over),
//! crashes, old copies of directories, lost disks, deleted Leases, wall clocks half a second off. A [`checker`] that knows
//! nothing of the protocol holds every acknowledged change against what is answered in the end.
//!
//! Not simulated yet: slices edited by hand, restarts while the API server is away for longer than a history, two processes
//! on copies of one directory.

mod checker;
mod election;
mod plan;
mod random;
mod replica;
mod world;

use std::collections::BTreeMap;

use checker::Violation;
use plan::Plan;
use world::{Faults, SECOND, Setup, World};

use super::{rules::Rules, word::TombstoneLifetime};

const SETUP: Setup = Setup {
    rules: Rules::ALL,
    replicas: 3,
    slices: 2,
    addresses: 2,
    changes: 24,
    room: usize::MAX,
    lifetime: TombstoneLifetime(1_000 * SECOND),
    skew: SECOND / 2,
    away: 60 * SECOND,
    sustained: 30,
    faults: Faults { lost_disks: true, old_copies: true, deleted_leases: true, stopping_clocks: false },
    settle: 150 * SECOND,
};

/// Replicas that are away for longer than tombstones live.
const AWAY: Setup = Setup { away: 500 * SECOND, lifetime: TombstoneLifetime(60 * SECOND), ..SETUP };

/// Setups in which the protocol must hold.
const SETUPS: [(&str, Setup); 6] = [
    ("three replicas", SETUP),
    ("two replicas and one slice", Setup { replicas: 2, slices: 1, changes: 50, ..SETUP }),
    ("many keys", Setup { slices: 4, addresses: 6, changes: 80, ..SETUP }),
    ("room for one tombstone a slice", Setup { room: 1, ..SETUP }),
    ("away for longer than tombstones live", AWAY),
    ("clocks that stop in pauses", Setup { faults: Faults { stopping_clocks: true, ..SETUP.faults }, ..SETUP }),
];

/// Switches rules off.
type LeaveOut = fn(&mut Rules);

/// Histories in which a rule's need must show.
const MAX_SEARCH: u64 = 20_000;

/// Rules to leave out, and where a history then goes wrong that is right with them. Where two are left out
/// together, each is the other's second line: merging late writes saves what an unsafe confirmation or an outbox
/// cleared too early would lose, and the other way round.
///
/// Not in the list, because tens of thousands of histories of these faults went right without them: `recreate_only_while_safe`,
/// `confirm_only_own_slices`, `directory_needs_newest_term` and `acknowledge_hand_over_when_confirmed` (one history went wrong
/// without it, 1 of 40 000). Faults have to be aimed at them before they are called needed, or dropped.
const NEEDED: &[(LeaveOut, Setup)] = &[
    (|rules| rules.stamp_unchanged = false, SETUP),
    (|rules| rules.tombstone_for_absent = false, SETUP),
    (|rules| rules.tombstones_in_slices = false, SETUP),
    (|rules| rules.merge_by_stamp = false, SETUP),
    (|rules| rules.refuse_old_puts = false, AWAY),
    (|rules| rules.serve_only_while_safe = false, SETUP),
    (|rules| rules.hold_after_missing_lease = false, SETUP),
    (|rules| (rules.merge_late_writes, rules.confirm_only_while_safe) = (false, false), SETUP),
    (|rules| (rules.merge_late_writes, rules.outbox_waits_for_confirmation) = (false, false), SETUP),
    (|rules| (rules.write_only_while_safe, rules.confirm_only_while_safe) = (false, false), SETUP),
];

/// Histories of each kind; `GANGPLANK_REPLICA_HISTORIES` asks for more.
fn histories(short: u64) -> u64 {
    std::env::var("GANGPLANK_REPLICA_HISTORIES").ok().map_or(short, |text| text.parse().expect("a number"))
}

fn run(setup: &Setup, seed: u64, trace: bool) -> (Vec<Violation>, u64) {
    let mut world = World::new(*setup, seed, Plan::draw(setup, seed), trace);
    let found = world.run();
    (found, world.takeovers)
}

/// Runs histories with the seeds from 1 on. Returns how many went wrong, by what.
fn count(name: &str, setup: &Setup, histories: u64) -> BTreeMap<Violation, (u64, u64)> {
    let mut wrong = BTreeMap::new();
    let mut takeovers = 0;
    for seed in 1..=histories {
        let (found, took) = run(setup, seed, false);
        takeovers += took;
        for violation in found {
            wrong.entry(violation).or_insert((0, seed)).0 += 1;
        }
    }
    eprintln!("{name}: {histories} histories, {takeovers} take-overs, wrong: {wrong:?}");
    wrong
}

/// `GANGPLANK_REPLICA_HISTORIES=1000000 cargo test --release replicas` runs a million of each kind. A history that goes wrong is
/// run again with its trace; the same seed always gives the same history.
#[test]
fn no_acknowledged_word_is_undone() {
    for (name, setup) in SETUPS {
        let wrong = count(name, &setup, histories(400));
        if let Some((violation, (_, seed))) = wrong.first_key_value() {
            run(&setup, *seed, true);
            panic!("{name}: {violation:?} with seed {seed}: {wrong:?}");
        }
    }
}

#[test]
fn leaving_a_rule_out_goes_wrong() {
    for (index, &(leave_out, setup)) in NEEDED.iter().enumerate() {
        let mut rules = Rules::ALL;
        leave_out(&mut rules);
        let without = Setup { rules, ..setup };
        let seed = (1..=MAX_SEARCH).find(|seed| !run(&without, *seed, false).0.is_empty());
        let seed = seed.unwrap_or_else(|| panic!("number {index}: nothing goes wrong"));
        eprintln!("number {index}: seed {seed}");
        assert_eq!(run(&setup, seed, false).0, [], "number {index}: with all rules");
    }
}

#[test]
fn same_seed_gives_the_same_history() {
    for seed in 1..=20 {
        let history = || {
            let mut world = World::new(SETUP, seed, Plan::draw(&SETUP, seed), false);
            world.run();
            world.summary()
        };
        assert_eq!(history(), history(), "seed {seed}");
    }
}
