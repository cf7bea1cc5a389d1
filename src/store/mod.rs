//! State that lasts: a journal and snapshots in one data directory.
//!
//! ```text
//! LOCK                  held by the process that has the directory; its pid
//! snapshot-0000000007   every instance as it stood at the end of segment 7
//! journal-0000000008    a closed segment: what changed since
//! journal-0000000009    the newest segment, to which batches are appended
//! *.tmp                 not finished; removed at the next start
//! *.damaged             set aside when somebody accepted a loss; never read again
//! ```
//!
//! What holds, and where it is seen to:
//!
//! 1. A batch that was acknowledged is on the disk, whole; one that was not is there whole or not
//!    at all (`journal.rs`).
//! 2. What is read back is what was written, or a start says where it is not (`frame.rs`,
//!    `recover.rs`). A start never goes on without acknowledged records unless told to.
//! 3. After a failed write or sync nothing is acknowledged until a restart (`journal.rs`).
//! 4. Compaction never makes a registration wait and never loses anything (`snapshot.rs`).
//! 5. The stored generation never goes back, and one process at a time has the directory.
//! 6. With [`Options::outbox`], what Kubernetes does not have is remembered until it has it,
//!    removals too; nothing is remembered of what it has (`outbox.rs`).
//!
//! What cannot be known: whether the last batch, damaged while gangplank was not running after
//! it was killed, had been acknowledged. Nothing on the disk vouches for it then, so it is taken
//! for torn, cut, and reported. After a clean stop, or one more start, a mark vouches for it.
//! Neither can it be known that somebody took the newest segment away, or cut it at the end of a
//! batch. Cut or damaged further up, or behind a mark, it is found.
//!
//! This is one directory of one process. There is no replication here, and no cache: the
//! registry holds the state, the store only remembers it.

mod error;
mod files;
mod format;
mod frame;
mod journal;
mod outbox;
mod recover;
mod snapshot;
mod walk;

#[cfg(test)]
mod tests;

use std::{
    fs,
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

pub use error::{Damage, StoreError};
pub use journal::Journal;

use crate::{
    metrics::Metrics,
    model::{Instance, InstanceId, ServiceKey, UnixMillis},
};
use error::Trying;

/// The file that is locked.
const LOCK: &str = "LOCK";

/// One thing to remember.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// The instance stands as it is here.
    Put {
        /// Under this service.
        service: ServiceKey,
        /// With these attributes.
        instance: Arc<Instance>,
    },
    /// The instance is gone.
    Remove {
        /// Under this service.
        service: ServiceKey,
        /// Which one.
        id: InstanceId,
    },
    /// Kubernetes has everything of a service up to a generation. Only for a store that keeps the
    /// outbox.
    Mirrored {
        /// Which service.
        service: ServiceKey,
        /// The highest generation of which it has everything.
        generation: u64,
    },
    /// The term under which this directory's process writes to Kubernetes; the last one counts.
    /// Only for a store that keeps the outbox.
    Term {
        /// 0 for none.
        term: u64,
    },
}

/// How the store is opened.
#[derive(Debug, Clone)]
pub struct Options {
    /// Go on although damage loses acknowledged records (`--accept-loss`).
    pub accept_loss: bool,
    /// A segment that has grown to this many octets is closed and compacted in the background.
    /// Default 64 MiB.
    pub segment_octets: u64,
    /// Keep what Kubernetes does not have yet (with `--kubernetes`). Default false.
    pub outbox: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { accept_loss: false, segment_octets: 64 << 20, outbox: false }
    }
}

/// A data directory that no other process can open while this value lives.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    lock: fs::File,
}

/// How far a recovery is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Octets read so far.
    pub read: u64,
    /// Octets to read in all.
    pub total: u64,
}

/// What a recovery found.
#[derive(Debug)]
pub struct Recovery {
    /// The highest generation stored; 0 for a new directory.
    pub generation: u64,
    /// What was cut or given up, in words for the log; empty when all was well.
    pub repairs: Vec<String>,
    /// The last term stored. 0 when there was none, or when the directory was opened without the
    /// outbox since: what is in Kubernetes is then not known to be ours in any way, and every
    /// instance that was read is one that Kubernetes may lack, whatever the outbox says.
    pub term: u64,
    /// What Kubernetes lacks, in order of generation: of each instance the last `Put` or `Remove`,
    /// where no [`Record::Mirrored`] of its service has come that covers it. It may name services
    /// of which nothing stands; those too must be reported as mirrored one day. After a crash, or
    /// an accepted loss, it may hold what Kubernetes has already. Empty without
    /// [`Options::outbox`].
    pub outbox: Vec<Record>,
}

impl DataDir {
    /// Creates `path` where it is absent, for this user only, and locks it.
    ///
    /// # Errors
    /// When another process holds it (which one is said), or the directory cannot be used.
    pub fn lock(path: &Path) -> Result<Self, StoreError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).trying("create", path)?;
        let file = path.join(LOCK);
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut lock = options.open(&file).trying("open", &file)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = lock.read_to_string(&mut holder);
                let holder = match holder.trim() {
                    "" => "another process".into(),
                    holder => holder.to_owned(),
                };
                return Err(StoreError::Locked { dir: path.into(), holder });
            }
            Err(fs::TryLockError::Error(err)) => return Err(err).trying("lock", &file),
        }
        // The lock is what counts. On a full disk the next one is told less, and that is all.
        if let Err(err) = write_holder(&mut lock) {
            tracing::warn!(file = %file.display(), %err, "cannot note the pid in the lock file");
        }
        Ok(Self { path: path.into(), lock })
    }

    /// Reads everything that is stored, in an order in which later records win, and opens the
    /// journal behind it. What was already given to `record` when an error comes must not be used.
    ///
    /// On a disk that cannot be written to, what is stored is read all the same; the journal then
    /// refuses every batch, and [`Journal::usable`] and the repairs say why.
    ///
    /// # Errors
    /// When something stored cannot be read, unless the loss is accepted.
    pub fn recover(
        self,
        options: &Options,
        metrics: Arc<Metrics>,
        record: &mut dyn FnMut(Record),
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Journal, Recovery), StoreError> {
        let disk = Arc::new(files::Disk::open(self.path.clone()).trying("open", &self.path)?);
        recover::Start { files: disk, dir: self.path, lock: Some(self.lock), options, metrics }.run(record, progress)
    }
}

/// Puts who we are into the lock file.
fn write_holder(lock: &mut fs::File) -> io::Result<()> {
    lock.set_len(0)?;
    lock.rewind()?;
    let since = humantime::format_rfc3339_seconds(UnixMillis::now().to_system_time());
    writeln!(lock, "process {} (pid), which took it at {since}", std::process::id())
}
