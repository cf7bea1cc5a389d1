//! Errors of the store. Each message has what the operator can do.

use std::{fmt, io, ops::Range, path::PathBuf, sync::Arc};

/// Why the data directory cannot be used, or a batch is not durable.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// Another process uses the data directory.
    #[error("the data directory {} is in use by {holder}: stop that process, or give this one a --data-dir of its own",
        dir.display())]
    Locked {
        /// The data directory.
        dir: PathBuf,
        /// That process: pid and time, as far as they are known.
        holder: String,
    },
    /// A file operation failed during the start.
    #[error("cannot {operation} {}: {}", path.display(), advice(source))]
    Io {
        /// The operation, as a verb.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: Arc<io::Error>,
    },
    /// Stored records are corrupt; a start would lose them.
    #[error("{}", CorruptionList(dir, corruptions))]
    Corrupt {
        /// The data directory.
        dir: PathBuf,
        /// Every corrupt range that was found.
        corruptions: Vec<Corruption>,
    },
    /// A later version wrote the file.
    #[error("{} was written by a newer gangplank ({what}): start that version again, this one would lose what it \
        does not know", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// What this version does not know.
        what: String,
    },
    /// The data directory, its lock or its active segment was removed or replaced. Only a restart clears it.
    #[error("{} was removed or replaced while gangplank runs: nothing is accepted until gangplank is restarted, \
        because what is written there would be lost; what is registered is still served", path.display())]
    Removed {
        /// What is no longer there.
        path: PathBuf,
    },
    /// A write or sync of the journal failed, in this call or an earlier one. Only a restart clears it.
    #[error("cannot {operation} {}: nothing is accepted until gangplank is restarted, because only a restart can tell \
        what reached the disk; {}", path.display(), advice(source))]
    JournalFailed {
        /// The operation, as a verb.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: Arc<io::Error>,
    },
}

/// A corrupt range of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corruption {
    /// The file.
    pub path: PathBuf,
    /// Offsets of its first byte and past its last; `None` for the whole file.
    pub bytes: Option<Range<u64>>,
    /// What is wrong.
    pub what: String,
    /// What is lost, as far as the records around it tell.
    pub loss: String,
}

impl fmt::Display for Corruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(Range { start, end }) = self.bytes {
            write!(f, " at offset {start} ({} bytes)", end - start)?;
        }
        write!(f, ": {}; lost with it: {}", self.what, self.loss)
    }
}

/// The message of [`StoreError::Corrupt`].
struct CorruptionList<'a>(&'a PathBuf, &'a [Corruption]);

impl fmt::Display for CorruptionList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "acknowledged registrations in {} cannot be read:", self.0.display())?;
        for corruption in self.1 {
            write!(f, "\n  {corruption}")?;
        }
        write!(
            f,
            "\nRestore the directory from a copy, or start with --accept-loss to go on with everything else; the \
             corrupt files are then kept under names that end in .corrupt"
        )
    }
}

/// What the operator can do about an error of the system.
fn advice(err: &io::Error) -> &'static str {
    match err.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "the disk is full, free some space first",
        io::ErrorKind::PermissionDenied => "the user that runs gangplank needs to read and write there",
        io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only, choose another --data-dir or remount it",
        _ => "check the disk and the system's log first",
    }
}

/// Adds operation and path to an error of the system.
pub(super) trait IoContext<T> {
    /// Turns it into [`StoreError::Io`].
    fn io_context(self, operation: &'static str, path: impl Into<PathBuf>) -> Result<T, StoreError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn io_context(self, operation: &'static str, path: impl Into<PathBuf>) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Io { operation, path: path.into(), source: Arc::new(source) })
    }
}
