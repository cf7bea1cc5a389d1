//! What a replica is in the [`election`](super::election), and what it does next.

use super::{
    lease::{LeaseRecord, RequestId, ResourceVersion},
    time::BootTime,
};

/// What a replica is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Follows what another writes.
    Follower,
    /// Waits for the answer to its write of the Lease.
    Acquiring(Tenure),
    /// Holds the Lease and puts the truth together; does not serve yet.
    TakingOver(Tenure),
    /// The one whose words count.
    Writer {
        /// Its term.
        term: u64,
    },
}

/// A tenure that begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenure {
    /// Its term.
    pub term: u64,
    /// The Lease as it was before; `None` where there was none.
    pub previous: Option<LeaseRecord>,
    /// How long the Lease must be held before slices are listed: after a Lease was missing, its last holder may
    /// still count on it.
    pub(super) listed_after: Option<BootTime>,
}

impl Tenure {
    /// A tenure that begins with the list of the slices.
    #[must_use]
    pub const fn new(term: u64, previous: Option<LeaseRecord>) -> Self {
        Self { term, previous, listed_after: None }
    }
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Read the Lease with a quorum read; the answer goes to [`lease_read`](super::election::Election::lease_read).
    ReadLease(RequestId),
    /// Write the Lease, if its version is `expected` (create it, if `None`); the answer goes to
    /// [`lease_written`](super::election::Election::lease_written).
    WriteLease {
        /// Which request this is.
        id: RequestId,
        /// Its version as it must be.
        expected: Option<ResourceVersion>,
        /// What it says then.
        record: LeaseRecord,
    },
    /// List all slices with a quorum read, and merge: [`taken_over`](super::election::Election::taken_over) or
    /// [`outranked`](super::election::Election::outranked) follows.
    TakeOver,
    /// This writer has a new term, though nobody else wrote: the Lease was missing or had gone back. All slices have to
    /// be written again under it.
    Rewrite,
    /// The Lease was renewed by a request that began at this time.
    Renewed(BootTime),
    /// This replica is a follower from now on.
    Deposed(Deposed),
    /// Another replica writes: registrations are refused from now on, and nothing is answered from the directory, not after
    /// another restart either.
    Followed,
}

/// Why a replica that was to write does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deposed {
    /// Somebody else has this higher term. What this directory holds besides its outbox is no longer the truth.
    Outranked(u64),
    /// The Lease is missing or went back, and this replica could not know whether another held it meanwhile. Its
    /// directory still holds what it held.
    LeaseLost,
    /// The Lease could not be had or kept during the take-over.
    NotAcquired,
}
