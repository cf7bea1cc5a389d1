//! Why the store cannot go on, in words that say what to do.

use std::{fmt, io, ops::Range, path::PathBuf, sync::Arc};

/// Why the store cannot go on.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// Another process has the data directory.
    #[error("the data directory {} is in use by {holder}: stop that process, or give this one a --data-dir of its own",
        dir.display())]
    Locked {
        /// The data directory.
        dir: PathBuf,
        /// The process that has it.
        holder: String,
    },
    /// Something in the data directory cannot be read or made at the start.
    #[error("cannot {doing} {}: {}", path.display(), advice(source))]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On this file or directory.
        path: PathBuf,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// What is stored is not what was written, and going on would lose some of it.
    #[error("{}", Damages(dir, damages))]
    Damaged {
        /// The data directory.
        dir: PathBuf,
        /// Each place.
        damages: Vec<Damage>,
    },
    /// A later version wrote this.
    #[error("{} was written by a newer gangplank ({what}): start that version again, this one would lose what it \
        does not know", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// What is not known here.
        what: String,
    },
    /// A write or sync of the journal failed, now or earlier.
    #[error("cannot {doing} {}: nothing is accepted until gangplank is restarted, because only a restart can tell \
        what reached the disk; {}", path.display(), advice(source))]
    Failed {
        /// What was tried.
        doing: &'static str,
        /// On this file or directory.
        path: PathBuf,
        /// What the system said.
        source: Arc<io::Error>,
    },
}

/// One damaged place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The file.
    pub path: PathBuf,
    /// Its octets that cannot be used; `None` for all of it.
    pub octets: Option<Range<u64>>,
    /// What is wrong with them.
    pub what: String,
    /// What they held, as far as their neighbours tell.
    pub loss: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(Range { start, end }) = self.octets {
            write!(f, " at offset {start} ({} octets)", end - start)?;
        }
        write!(f, ": {}; lost with it: {}", self.what, self.loss)
    }
}

/// The whole message about damage.
struct Damages<'a>(&'a PathBuf, &'a [Damage]);

impl fmt::Display for Damages<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "acknowledged registrations in {} cannot be read:", self.0.display())?;
        for damage in self.1 {
            write!(f, "\n  {damage}")?;
        }
        write!(
            f,
            "\nRestore the directory from a copy, or start with --accept-loss to go on with everything else; the \
             damaged files are then kept under names that end in .damaged"
        )
    }
}

/// What a person can do about it.
fn advice(err: &io::Error) -> &'static str {
    match err.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "the disk is full, free some space first",
        io::ErrorKind::PermissionDenied => "the user that runs gangplank needs to read and write there",
        io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only, choose another --data-dir or remount it",
        _ => "check the disk and the system's log first",
    }
}

/// Says what was tried, and on what, beside an error of the system.
pub(super) trait Trying<T> {
    /// At the start.
    fn trying(self, doing: &'static str, path: impl Into<PathBuf>) -> Result<T, StoreError>;
}

impl<T> Trying<T> for io::Result<T> {
    fn trying(self, doing: &'static str, path: impl Into<PathBuf>) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Io { doing, path: path.into(), source: Arc::new(source) })
    }
}
