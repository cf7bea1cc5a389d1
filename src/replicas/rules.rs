//! The protocol's rules, each of which can be switched off in the simulation to see what then goes wrong.

/// Which rules hold. The server runs with all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// An answer says that Kubernetes has a word only if the Lease was safely held when that was seen, or renewed since.
    pub confirm_only_while_safe: bool,
    /// Slices are written only while the Lease is safely held.
    pub write_only_while_safe: bool,
    /// An outbox entry goes when its word is confirmed, not when the write of its slice succeeds.
    pub outbox_waits_for_confirmation: bool,
    /// A slice of this writer's term confirms only if it says what this writer sent last: hands keep annotations, or write them.
    pub confirm_only_what_was_sent: bool,
    /// A registration that changes nothing gets a new stamp.
    pub stamp_unchanged: bool,
    /// The removal of what is not there leaves a tombstone.
    pub tombstone_for_absent: bool,
    /// Slices hold tombstones.
    pub tombstones_in_slices: bool,
    /// A slice that was written late, under a lower term, is merged; otherwise it is overwritten.
    pub merge_late_writes: bool,
    /// Handed-over words count by their stamps; otherwise always.
    pub merge_by_stamp: bool,
    /// A put of an unknown key that is older than tombstones are kept is refused.
    pub refuse_old_puts: bool,
    /// A take-over ends in serving only if the Lease is still safely held.
    pub serve_only_while_safe: bool,
    /// After a Lease was missing, the new one is held for its duration before slices are listed.
    pub hold_after_missing_lease: bool,
    /// A writer whose Lease is missing or went back takes it again only while it is safe.
    pub recreate_only_while_safe: bool,
    /// A directory that is not certainly the same one on the same boot gets a new identity when it is opened.
    pub renew_identity: bool,
    /// The directory's words count at a take-over only if no slice and no Lease has a higher term than the directory.
    pub directory_needs_newest_term: bool,
    /// Nor a higher generation of the same term: then the directory is a copy from the middle of it.
    pub directory_needs_newest_generation: bool,
    /// A directory is as new as what was published under its term. What is said, or stored, after a start and before the next
    /// take-over does not make it newer.
    pub rank_ends_with_tenure: bool,
    /// A writer that sees a slice with a higher term writes and confirms no more.
    pub slice_deposes: bool,
    /// A handed-over word is acknowledged when it is confirmed, not when it is journaled.
    pub acknowledge_hand_over_when_confirmed: bool,
}

impl Rules {
    /// The protocol.
    pub const ALL: Self = Self {
        confirm_only_while_safe: true,
        write_only_while_safe: true,
        outbox_waits_for_confirmation: true,
        confirm_only_what_was_sent: true,
        stamp_unchanged: true,
        tombstone_for_absent: true,
        tombstones_in_slices: true,
        merge_late_writes: true,
        merge_by_stamp: true,
        refuse_old_puts: true,
        serve_only_while_safe: true,
        hold_after_missing_lease: true,
        recreate_only_while_safe: true,
        renew_identity: true,
        directory_needs_newest_term: true,
        directory_needs_newest_generation: true,
        rank_ends_with_tenure: true,
        slice_deposes: true,
        acknowledge_hand_over_when_confirmed: true,
    };
}
