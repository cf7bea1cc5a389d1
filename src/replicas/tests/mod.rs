//! The protocol in a simulated world, history by history, each from one seed.
//!
//! Two or three replicas with journals, a Lease and slices behind compare-and-swap; requests that are a minute late or
//! carried out unseen, watches that lag, partitions, pauses (between a check and its answer, in the middle of a take-over),
//! crashes, old copies of directories, copies of living ones, lost disks, starts while the API server is away, deleted
//! Leases, slices edited by hand, namespaces deleted, wall clocks half a second off. A [`checker`] that knows nothing of the protocol holds every
//! acknowledged change against what is answered in the end.
//!
//! `cargo test --lib replicas` runs some hundred histories of each setup. For more, and for one:
//!
//! - `GANGPLANK_REPLICA_HISTORIES=1000000 cargo test --release --lib replicas -- --nocapture` runs a million of each on all cores,
//!   and counts how many go wrong without each rule.
//! - `GANGPLANK_REPLICA_SEED=7 cargo test --lib no_acknowledged_word_is_undone -- --nocapture` prints the traces of one seed.
//! - `GANGPLANK_REPLICA_SETUP=hand` takes only setups, and rules, with this in their names.

mod checker;
mod election;
mod plan;
mod random;
mod replica;
mod search;
mod world;

use plan::{Aim, Plan};
use search::{count, first_wrong, run};
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
    faults: Faults { lost_disks: true, old_copies: true, deleted_leases: true, edits: false, stopping_clocks: false },
    aims: &[],
    settle: 150 * SECOND,
};

/// Replicas that are away for longer than tombstones live.
const AWAY: Setup = Setup { away: 500 * SECOND, lifetime: TombstoneLifetime(60 * SECOND), ..SETUP };

/// Hands at the slices.
const EDITED: Setup = Setup { faults: Faults { edits: true, ..SETUP.faults }, aims: &[Aim::EditWhileWaiting], ..SETUP };

const LEASE_DELETED: Setup = Setup { aims: &[Aim::LeaseDeletedAfterAbsence], ..SETUP };

const RECEIVER_LOST: Setup = Setup { aims: &[Aim::ReceiverLost], ..SETUP };

const STARTED_ALONE: Setup = Setup { aims: &[Aim::StartAlone], ..SETUP };

/// Without older copies of directories, and without deleted Leases: an older copy of the same term brings back what was in a namespace that
/// was deleted meanwhile, and so does an older directory, if neither a Lease nor a slice is left that shows a higher term.
const NAMESPACES: Setup = Setup {
    replicas: 2,
    aims: &[Aim::NamespaceDeleted],
    faults: Faults { old_copies: false, deleted_leases: false, ..SETUP.faults },
    ..SETUP
};

const TWINS: Setup = Setup { aims: &[Aim::Twins, Aim::Twins, Aim::StartAlone], ..SETUP };

/// Setups in which the protocol must hold.
const SETUPS: &[(&str, Setup)] = &[
    ("three replicas", SETUP),
    ("two replicas and one slice", Setup { replicas: 2, slices: 1, changes: 50, ..SETUP }),
    ("many keys", Setup { slices: 4, addresses: 6, changes: 80, ..SETUP }),
    ("no room for tombstones", Setup { room: 0, ..SETUP }),
    ("room for one tombstone a slice", Setup { room: 1, ..SETUP }),
    ("room for three tombstones a slice", Setup { room: 3, slices: 1, addresses: 8, changes: 80, ..SETUP }),
    ("no room, away for longer than tombstones live", Setup { room: 0, ..AWAY }),
    ("room for one, away for longer than tombstones live", Setup { room: 1, ..AWAY }),
    (
        "room for three, away for longer than tombstones live",
        Setup { room: 3, slices: 1, addresses: 8, changes: 80, ..AWAY },
    ),
    ("away for longer than tombstones live", AWAY),
    ("Lease deleted after an absence", LEASE_DELETED),
    ("receiver of a hand-over lost", RECEIVER_LOST),
    ("started while the API server is away", STARTED_ALONE),
    (
        "started while the API server is away, two replicas",
        Setup { replicas: 2, slices: 1, changes: 50, ..STARTED_ALONE },
    ),
    ("copies of living directories", TWINS),
    ("namespaces deleted", NAMESPACES),
    ("namespaces deleted, three replicas", Setup { replicas: 3, ..NAMESPACES }),
    ("slices edited by hand", EDITED),
    ("slices edited by hand, room for one tombstone", Setup { room: 1, ..EDITED }),
];

/// Switches rules off.
type LeaveOut = fn(&mut Rules);

/// Histories in which a rule's need must show.
const MAX_SEARCH: u64 = 20_000;

/// Rules to leave out, and where a history then goes wrong that is right with them. Where two are left out
/// together, each is the other's second line: merging late writes saves what an unsafe confirmation or an outbox
/// cleared too early would lose, and the other way round.
///
/// Not in the list: `recreate_only_while_safe` alone, of whose absence merging leaves one wrong history in 10 000.
const NEEDED: &[(&str, LeaveOut, Setup)] = &[
    ("stamp_unchanged", |rules| rules.stamp_unchanged = false, SETUP),
    ("tombstone_for_absent", |rules| rules.tombstone_for_absent = false, SETUP),
    ("tombstones_in_slices", |rules| rules.tombstones_in_slices = false, SETUP),
    ("merge_by_stamp", |rules| rules.merge_by_stamp = false, SETUP),
    ("refuse_old_puts", |rules| rules.refuse_old_puts = false, AWAY),
    ("serve_only_while_safe", |rules| rules.serve_only_while_safe = false, SETUP),
    ("hold_after_missing_lease", |rules| rules.hold_after_missing_lease = false, SETUP),
    (
        "merge_late_writes and confirm_only_while_safe",
        |rules| (rules.merge_late_writes, rules.confirm_only_while_safe) = (false, false),
        LEASE_DELETED,
    ),
    (
        "merge_late_writes and outbox_waits_for_confirmation",
        |rules| (rules.merge_late_writes, rules.outbox_waits_for_confirmation) = (false, false),
        LEASE_DELETED,
    ),
    (
        "write_only_while_safe and confirm_only_while_safe",
        |rules| (rules.write_only_while_safe, rules.confirm_only_while_safe) = (false, false),
        RECEIVER_LOST,
    ),
    (
        "merge_late_writes and recreate_only_while_safe",
        |rules| (rules.merge_late_writes, rules.recreate_only_while_safe) = (false, false),
        LEASE_DELETED,
    ),
    ("acknowledge_hand_over_when_confirmed", |rules| rules.acknowledge_hand_over_when_confirmed = false, RECEIVER_LOST),
    ("directory_needs_newest_term", |rules| rules.directory_needs_newest_term = false, NAMESPACES),
    ("renew_identity", |rules| rules.renew_identity = false, TWINS),
    ("confirm_only_what_was_sent", |rules| rules.confirm_only_what_was_sent = false, EDITED),
];

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
                 again: GANGPLANK_REPLICA_SEED={seed} cargo test --lib no_acknowledged_word_is_undone -- --nocapture"
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
            let mut world = World::new(SETUP, seed, Plan::draw(&SETUP, seed), false);
            world.run();
            world.summary()
        };
        assert_eq!(history(), history(), "seed {seed}");
    }
}
