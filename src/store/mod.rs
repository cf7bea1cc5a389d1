//! Durable state: a journal and snapshots in one data directory.
//!
//! ```text
//! LOCK                  locked by the process that uses the directory; holds its pid
//! snapshot-0000000007   every instance at the end of segment 7
//! journal-0000000008    a closed segment: the changes after the snapshot
//! journal-0000000009    the active segment, to which batches are appended
//! clean-stop            the length of the active segment at the last clean stop
//! *.tmp                 unfinished; removed by the next start
//! *.corrupt             set aside when somebody accepted a loss; never read again
//! ```
//!
//! Invariants, and where they are kept:
//!
//! 1. An acknowledged batch is durable, whole. Any other batch is stored whole or not at all
//!    (`journal.rs`).
//! 2. What is read is what was written, or the start reports where it is not (`frame.rs`,
//!    `recover.rs`). A start never drops acknowledged records, except with [`StoreOptions::accept_loss`].
//! 3. After a failed write or sync nothing is acknowledged until a restart (`journal.rs`).
//! 4. Compaction never delays a registration and never loses anything (`compaction.rs`).
//! 5. Nothing is acknowledged once the directory is removed under the process (`disk.rs`).
//! 6. The stored generation never decreases, and one process at a time uses the directory.
//! 7. With [`StoreOptions::outbox`], every change that Kubernetes lacks is kept until Kubernetes has
//!    it, removals included (`outbox.rs`). Once a directory had a term, snapshots keep removals for the lifetime of
//!    tombstones, except those that a [`Record::RefuseBefore`] of their service covers (`compaction.rs`).
//!
//! Limits. If the last batch becomes corrupt after a crash and before the next start, nothing on the
//! disk shows whether the batch was acknowledged: it is taken for a torn write, cut off and reported.
//! After a clean stop, or one more start, a sync marker covers it. Nor can a start notice that
//! somebody removed or cut what was appended to the active segment since the last clean stop.
//!
//! The store is one directory of one process: no replication, no cache. The registry holds the
//! state in memory.

mod clean_stop;
mod compaction;
mod disk;
mod error;
mod format;
mod frame;
mod journal;
mod outbox;
mod reader;
mod recover;
mod scan;

#[cfg(test)]
mod tests;

use std::{
    fs,
    hash::BuildHasher as _,
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt as _, OpenOptionsExt},
    path::Path,
    sync::Arc,
};

pub use error::{Corruption, StoreError};
pub use journal::Journal;

use crate::{
    metrics::Metrics,
    model::{Instance, InstanceId, ServiceKey, Stamp, UnixMillis},
};
use disk::OsDirectory;
use error::IoContext;

/// The file that is locked.
const LOCK: &str = "LOCK";

/// A journal record.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// Adds an instance, or replaces the one with the same identity.
    Put {
        /// Its service.
        service: ServiceKey,
        /// Identity and attributes.
        instance: Arc<Instance>,
    },
    /// Removes an instance.
    Remove {
        /// Its service.
        service: ServiceKey,
        /// Its identity.
        id: InstanceId,
        /// When it was removed; the default in stores from before there were stamps.
        stamp: Stamp,
    },
    /// Removals of a service up to a clock are not remembered any more, because there was no room for them.
    RefuseBefore {
        /// The service.
        service: ServiceKey,
        /// The highest clock of such a removal: microseconds since 1970, see [`Stamp::clock`].
        clock: u64,
    },
    /// Kubernetes has every change of a service up to a generation. Only with [`StoreOptions::outbox`].
    Mirrored {
        /// The service.
        service: ServiceKey,
        /// The highest such generation.
        generation: u64,
    },
    /// The term of the directory; the last one counts. Only with [`StoreOptions::outbox`].
    Term(DirectoryTerm),
}

/// Under which term a directory wrote to Kubernetes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DirectoryTerm {
    /// 0 for none.
    pub term: u64,
    /// Whether another process is known to have written under a higher term since.
    pub followed: bool,
    /// The highest generation with a change that was published under `term`, as a start after that tenure noted it: whatever is
    /// stored from then on, until the next take-over, was not. `None` while the process runs that writes under `term`.
    pub published: Option<u64>,
}

impl DirectoryTerm {
    /// The term of a directory after which nobody is known to have written.
    #[must_use]
    pub const fn new(term: u64) -> Self {
        Self { term, followed: false, published: None }
    }
}

/// Settings of the store.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Start although acknowledged records are lost to corruption (`--accept-loss`). Default false.
    pub accept_loss: bool,
    /// Size in bytes at which a segment is closed and compacted in the background. Default 64 MiB.
    pub segment_bytes: u64,
    /// Keep the changes that Kubernetes lacks (with `--kubernetes`). Default false.
    pub outbox: bool,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { accept_loss: false, segment_bytes: 64 << 20, outbox: false }
    }
}

/// A locked data directory: no other process can open it while this value lives.
#[derive(Debug)]
pub struct DataDir(OsDirectory);

/// Progress of a recovery, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct RecoveryProgress {
    /// Read so far.
    pub read: u64,
    /// To read in total.
    pub total: u64,
}

/// The result of a recovery, besides the records.
#[derive(Debug)]
pub struct RecoveryReport {
    /// The highest generation stored; 0 for a new directory.
    pub generation: u64,
    /// The highest generation with a change of an instance. A start stores a generation without one, so what this directory knows is
    /// no newer than this.
    pub changed: u64,
    /// Log messages about torn writes that were cut off and losses that were accepted.
    pub repairs: Vec<String>,
    /// The last term stored. 0 when there was none, or when the directory was used without the
    /// outbox since: then Kubernetes may lack any instance that was read, whatever the outbox holds.
    pub term: DirectoryTerm,
    /// The changes that Kubernetes lacks, by generation: the last `Put` or `Remove` of each instance
    /// that no later [`Record::Mirrored`] of its service covers. It may name services without
    /// instances; the mirror has to confirm those too. After a crash or an accepted loss it may
    /// include changes that Kubernetes has. Empty without [`StoreOptions::outbox`].
    pub outbox: Vec<Record>,
    /// Whether removals are remembered: with [`StoreOptions::outbox`], and in a directory that ever had a term.
    pub tombstones: bool,
}

impl DataDir {
    /// Creates the directory `path` if it is absent, for this user only, and locks it.
    ///
    /// # Errors
    /// [`StoreError::Locked`] names the process that has it; [`StoreError::Io`] otherwise.
    pub fn lock(path: &Path) -> Result<Self, StoreError> {
        let dir = create_durably(path, &mut |dir| fs::File::open(dir)?.sync_all())
            .and_then(|()| fs::File::open(path))
            .io_context("create", path)?;
        let file = path.join(LOCK);
        let mut options = fs::OpenOptions::new();
        // Not truncated: until the lock is held, the pid in the file is that of another process.
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let (name, mut lock, writable) = match options.open(&file) {
            Ok(lock) => (Some(LOCK), lock, true),
            // flock needs no right to write. Without a lock file the directory itself is locked.
            Err(err) if err.kind() == io::ErrorKind::ReadOnlyFilesystem => match fs::File::open(&file) {
                Ok(lock) => (Some(LOCK), lock, false),
                Err(_) => (None, dir.try_clone().io_context("open", path)?, false),
            },
            Err(err) => return Err(err).io_context("open", &file),
        };
        // The kernel releases the lock with the process, also at `kill -9`: there is no stale lock to clear by hand.
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // For the message only. Whoever holds the lock may not have written its pid yet.
                let _ = lock.read_to_string(&mut holder);
                let holder = match holder.trim() {
                    "" => "another process".into(),
                    holder => holder.to_owned(),
                };
                return Err(StoreError::Locked { dir: path.into(), holder });
            }
            Err(fs::TryLockError::Error(err)) => return Err(err).io_context("lock", &file),
        }
        // Only the lock counts. On a full disk the error of the next process lacks the holder.
        if writable && let Err(err) = write_holder(&mut lock) {
            tracing::warn!(file = %file.display(), %err, "cannot note the pid in the lock file");
        }
        OsDirectory::new(path.into(), dir, name, lock).map(Self).io_context("open", path)
    }

    /// Identifies the directory on this machine since its boot. A copy of the directory has another identity, and
    /// so has the same volume on another machine.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn identity(&self) -> Result<u128, StoreError> {
        const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
        let path = self.0.path();
        let directory = fs::metadata(path).io_context("read", path)?;
        let boot = fs::read_to_string(BOOT_ID).io_context("read", Path::new(BOOT_ID))?;
        // Two halves of a hash that need not be stable: after a boot it is another one anyway.
        let half = |salt: u8| {
            let hasher = foldhash::quality::FixedState::with_seed(salt.into());
            u128::from(hasher.hash_one((&boot, directory.dev(), directory.ino())))
        };
        Ok(half(1) << 64 | half(2))
    }

    /// Passes every stored record to `record`, later ones after earlier ones, and opens the journal.
    /// After an error, records that were already passed must not be used.
    ///
    /// When the disk cannot be written, everything is read all the same; the journal then refuses
    /// every batch, and [`Journal::usable`] and the repairs say why.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`], unless the loss is accepted; [`StoreError::Newer`]; [`StoreError::Io`].
    pub fn recover(
        self,
        options: &StoreOptions,
        metrics: Arc<Metrics>,
        record: &mut dyn FnMut(Record),
        progress: &mut dyn FnMut(RecoveryProgress),
    ) -> Result<(Journal, RecoveryReport), StoreError> {
        let dir = self.0.path().to_owned();
        recover::StoreOpener { files: Arc::new(self.0), dir, options, metrics }.open(record, progress)
    }
}

/// Writes pid and time into the lock file, for the error of a second process.
fn write_holder(lock: &mut fs::File) -> io::Result<()> {
    lock.set_len(0)?;
    lock.rewind()?;
    let since = humantime::format_rfc3339_seconds(UnixMillis::now().to_system_time());
    writeln!(lock, "process {} (pid) since {since}", std::process::id())
}

/// Creates a directory and its missing ancestors, and syncs the parent of each: a directory whose
/// name is not durable is lost in a crash, with everything that was synced in it.
fn create_durably(path: &Path, sync: &mut dyn FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    // Without a lock file it is new, or the process was killed while it created it. Then the
    // names of its ancestors may not be durable either.
    if path.join(LOCK).exists() {
        return Ok(());
    }
    let ancestors = || path.ancestors().filter(|dir| !dir.as_os_str().is_empty());
    let missing: Vec<&Path> = ancestors().take_while(|dir| !dir.is_dir()).collect();
    for dir in missing.iter().rev() {
        match fs::DirBuilder::new().mode(0o700).create(dir) {
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
            done => done?,
        }
    }
    for dir in ancestors().collect::<Vec<_>>().into_iter().rev() {
        let parent = match dir.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => continue,
        };
        match sync(parent) {
            // One that existed may be closed to this user, who cannot have created anything in it.
            Err(_) if !missing.contains(&dir) => {}
            done => done?,
        }
    }
    Ok(())
}
