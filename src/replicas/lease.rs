//! The Lease: what it says, and what reading and writing it comes to.

/// A data directory's identity. It is the identity of a replica, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirectoryId(pub u128);

/// The version of the Lease as the API server knows it; only equality means anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ResourceVersion(pub u64);

/// What the Lease says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRecord {
    /// The holder's term: one more than any term before it.
    pub term: u64,
    /// Who holds it.
    pub holder: DirectoryId,
    /// The highest generation that the holder has published.
    pub generation: u64,
    /// Whether the holder has given it up: the next replica may take it at once.
    pub released: bool,
}

/// A Lease as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedLease {
    /// Its version, for compare-and-swap.
    pub version: ResourceVersion,
    /// What it says.
    pub record: LeaseRecord,
}

/// Which request an answer belongs to. An answer to a request that nobody waits for any more is ignored: it may
/// come minutes late.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RequestId(pub(super) u64);

/// What became of a write of the Lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseWrite {
    /// It was written; this is its version now.
    Written(ResourceVersion),
    /// It is not as the writer of it expected (409, 404, or AlreadyExists).
    Conflict,
    /// Nobody knows: the request timed out, or the API server failed.
    Unknown,
}
