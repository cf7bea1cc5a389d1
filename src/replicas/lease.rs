//! The Lease: what it says, and what reading and writing it comes to.

/// A data directory's identity. It is the identity of a replica, too: two processes that run at the same time must never share
/// one, or each would take the Lease of the other for its own, at once, and neither would hand over to the other.
///
/// A directory may be copied while its replica runs: a volume's snapshot, a restored backup, `cp -a`. So the identity is stored
/// together with the boot id of the machine and the device and inode of the directory, and is drawn anew (random, written and
/// synced before anything else) whenever one of the three is another when the directory is opened, or the lock was not had. The
/// boot id alone would not do: `cp -a` and a second process are on the same boot. Everything else in the directory stays: its
/// outbox is handed over by both copies, and every word of it counts once, by its stamp.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirectoryId(pub u128);

/// How a process found its directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// The term under which the directory's words were written; 0 before the first.
    pub term: u64,
    /// Whether the directory knows that another replica wrote after it.
    pub followed: bool,
    /// Whether it is certainly the same directory on the same boot, and this process holds its lock: then no other process
    /// can be acting for it. If not, the directory has a new identity: see [`DirectoryId`].
    pub resume: bool,
}

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
