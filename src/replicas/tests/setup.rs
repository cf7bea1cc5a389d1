//! What histories are made of: the setups in which the protocol must hold, and those in which a rule's need shows.

use super::{
    super::{rules::Rules, word::TombstoneLifetime},
    aims::Aim,
    replica::Key,
    world::{Micros, SECOND},
};

/// What a history is made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setup {
    pub(super) rules: Rules,
    pub(super) replicas: usize,
    pub(super) slices: usize,
    pub(super) addresses: usize,
    /// Sets of ports of each address.
    pub(super) ports: usize,
    /// Most registrations and removals in a history.
    pub(super) changes: u64,
    /// Tombstones that a slice has room for.
    pub(super) room: usize,
    pub(super) lifetime: TombstoneLifetime,
    /// How far wall clocks are from the truth, at most.
    pub(super) skew: Micros,
    /// Longest absence of a replica.
    pub(super) away: Micros,
    /// Percent of registrations whose client repeats them on the next writer when its stream ends.
    pub(super) sustained: u64,
    pub(super) faults: Faults,
    /// Faults that are aimed at a rule, besides the others.
    pub(super) aims: &'static [Aim],
    /// How long after the last fault everything must be in order.
    pub(super) settle: Micros,
}

impl Setup {
    /// Every instance that there can be.
    pub(super) fn keys(&self) -> impl Iterator<Item = Key> + use<> {
        let Self { slices, addresses, ports, .. } = *self;
        let of_slice = move |slice| (0..addresses).map(move |address| (slice, address));
        (0..slices)
            .flat_map(of_slice)
            .flat_map(move |(slice, address)| (0..ports).map(move |ports| Key { slice, address, ports }))
    }
}

/// Kinds of faults beyond crashes, pauses, partitions and late requests.
#[derive(Debug, Clone, Copy)]
pub(super) struct Faults {
    pub(super) lost_disks: bool,
    pub(super) old_copies: bool,
    pub(super) deleted_leases: bool,
    /// Hands edit slices.
    pub(super) edits: bool,
    /// The clock by which a writer measures its Lease stops while its process is paused.
    pub(super) stopping_clocks: bool,
}

pub(super) const SETUP: Setup = Setup {
    rules: Rules::ALL,
    replicas: 3,
    slices: 2,
    addresses: 1,
    ports: 2,
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
pub(super) const AWAY: Setup = Setup { away: 500 * SECOND, lifetime: TombstoneLifetime(60 * SECOND), ..SETUP };

/// Hands at the slices.
pub(super) const EDITED: Setup =
    Setup { faults: Faults { edits: true, ..SETUP.faults }, aims: &[Aim::EditWhileWaiting], ..SETUP };

pub(super) const LEASE_DELETED: Setup = Setup { aims: &[Aim::LeaseDeletedAfterAbsence], ..SETUP };

pub(super) const LEASE_DELETED_UNSEEN: Setup = Setup { aims: &[Aim::LeaseDeletedUnseen], ..SETUP };

pub(super) const RECEIVER_LOST: Setup = Setup { aims: &[Aim::ReceiverLost], ..SETUP };

pub(super) const STARTED_ALONE: Setup = Setup { aims: &[Aim::StartAlone], ..SETUP };

/// Without deleted Leases: an older directory brings back what was in a namespace that was deleted meanwhile, if neither a Lease nor a
/// slice is left that shows that somebody wrote after it.
pub(super) const NAMESPACES: Setup = Setup {
    replicas: 2,
    aims: &[Aim::NamespaceDeleted],
    faults: Faults { old_copies: false, deleted_leases: false, ..SETUP.faults },
    ..SETUP
};

/// A copy of the writer's directory from the middle of a term takes the Lease after the writer. Few other changes: they would hide what
/// it brings back.
pub(super) const NAMESPACE_COPIES: Setup = Setup { aims: &[Aim::CopyOfATerm], changes: 8, ..NAMESPACES };

pub(super) const TWINS: Setup = Setup { aims: &[Aim::Twins, Aim::Twins, Aim::StartAlone], ..SETUP };

/// Setups in which the protocol must hold.
pub(super) const SETUPS: &[(&str, Setup)] = &[
    ("three replicas", SETUP),
    ("two replicas and one slice", Setup { replicas: 2, slices: 1, changes: 50, ..SETUP }),
    ("many keys", Setup { slices: 4, addresses: 3, changes: 80, ..SETUP }),
    ("no room for tombstones", Setup { room: 0, ..SETUP }),
    ("room for one tombstone a slice", Setup { room: 1, ..SETUP }),
    ("room for three tombstones a slice", Setup { room: 3, slices: 1, addresses: 4, changes: 80, ..SETUP }),
    ("no room, away for longer than tombstones live", Setup { room: 0, ..AWAY }),
    ("room for one, away for longer than tombstones live", Setup { room: 1, ..AWAY }),
    (
        "room for three, away for longer than tombstones live",
        Setup { room: 3, slices: 1, addresses: 4, changes: 80, ..AWAY },
    ),
    ("away for longer than tombstones live", AWAY),
    ("Lease deleted after an absence", LEASE_DELETED),
    ("Lease deleted unseen", LEASE_DELETED_UNSEEN),
    ("receiver of a hand-over lost", RECEIVER_LOST),
    ("started while the API server is away", STARTED_ALONE),
    (
        "started while the API server is away, two replicas",
        Setup { replicas: 2, slices: 1, changes: 50, ..STARTED_ALONE },
    ),
    ("copies of living directories", TWINS),
    ("namespaces deleted", NAMESPACES),
    ("namespaces deleted, three replicas", Setup { replicas: 3, ..NAMESPACES }),
    ("namespaces deleted, and older copies", NAMESPACE_COPIES),
    ("slices edited by hand", EDITED),
    ("slices edited by hand, room for one tombstone", Setup { room: 1, ..EDITED }),
];

/// Switches rules off.
pub(super) type LeaveOut = fn(&mut Rules);

/// Histories in which a rule's need must show.
pub(super) const MAX_SEARCH: u64 = 20_000;

/// Rules to leave out, and where a history then goes wrong that is right with them. Where two are left out
/// together, each is the other's second line: merging late writes saves what an unsafe confirmation or an outbox
/// cleared too early would lose, and the other way round; so does a writer that sees a slice with a higher term.
///
/// Not in the list: `recreate_only_while_safe` alone, of whose absence merging leaves one wrong history in 10 000.
pub(super) const NEEDED: &[(&str, LeaveOut, Setup)] = &[
    ("stamp_unchanged", |rules| rules.stamp_unchanged = false, SETUP),
    ("tombstone_for_absent", |rules| rules.tombstone_for_absent = false, SETUP),
    ("tombstones_in_slices", |rules| rules.tombstones_in_slices = false, SETUP),
    ("merge_by_stamp", |rules| rules.merge_by_stamp = false, SETUP),
    ("refuse_old_puts", |rules| rules.refuse_old_puts = false, AWAY),
    ("serve_only_while_safe", |rules| rules.serve_only_while_safe = false, SETUP),
    ("hold_after_missing_lease", |rules| rules.hold_after_missing_lease = false, LEASE_DELETED_UNSEEN),
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
        "slice_deposes and write_only_while_safe",
        |rules| (rules.slice_deposes, rules.write_only_while_safe) = (false, false),
        SETUP,
    ),
    (
        "slice_deposes and recreate_only_while_safe",
        |rules| (rules.slice_deposes, rules.recreate_only_while_safe) = (false, false),
        LEASE_DELETED,
    ),
    (
        "merge_late_writes and recreate_only_while_safe",
        |rules| (rules.merge_late_writes, rules.recreate_only_while_safe) = (false, false),
        LEASE_DELETED,
    ),
    ("acknowledge_hand_over_when_confirmed", |rules| rules.acknowledge_hand_over_when_confirmed = false, RECEIVER_LOST),
    ("directory_needs_newest_term", |rules| rules.directory_needs_newest_term = false, NAMESPACES),
    ("directory_needs_newest_generation", |rules| rules.directory_needs_newest_generation = false, NAMESPACE_COPIES),
    ("rank_ends_with_tenure", |rules| rules.rank_ends_with_tenure = false, NAMESPACE_COPIES),
    ("renew_identity", |rules| rules.renew_identity = false, TWINS),
    ("confirm_only_what_was_sent", |rules| rules.confirm_only_what_was_sent = false, EDITED),
];
