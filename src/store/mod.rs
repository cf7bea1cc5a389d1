//! State that lasts: a journal and snapshots in one data directory.

use std::{path::Path, sync::Arc};

use crate::{
    metrics::Metrics,
    model::{Instance, InstanceId, ServiceKey},
};

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
}

/// How the store is opened.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Go on although damage loses acknowledged records (`--accept-loss`).
    pub accept_loss: bool,
    /// A segment that has grown to this many octets is closed and compacted in the background.
    pub segment_octets: u64,
}

/// A data directory that no other process can open while this value lives.
#[derive(Debug)]
pub struct DataDir {}

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
}

/// The open journal.
#[derive(Debug)]
pub struct Journal {}

/// Why the store cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("not written yet")]
pub struct StoreError;

impl DataDir {
    /// Creates `path` where it is absent and locks it.
    ///
    /// # Errors
    /// When another process holds it (which one is said), or the directory cannot be used.
    pub fn lock(_path: &Path) -> Result<Self, StoreError> {
        Err(StoreError)
    }

    /// Reads everything that is stored, in an order in which later records win, and opens the
    /// journal behind it.
    ///
    /// # Errors
    /// When something stored cannot be read, unless the loss is accepted.
    pub fn recover(
        self,
        _options: &Options,
        _metrics: Arc<Metrics>,
        _record: &mut dyn FnMut(Record),
        _progress: &mut dyn FnMut(Progress),
    ) -> Result<(Journal, Recovery), StoreError> {
        Err(StoreError)
    }
}

impl Journal {
    /// Appends one batch; when it returns, the batch is durable. May start a compaction in the
    /// background, for which it never waits.
    ///
    /// # Errors
    /// After the first error every later call fails too: what reached the disk is unknown until
    /// a restart reads it.
    pub fn append(&mut self, _generation: u64, _records: &[Record]) -> Result<(), StoreError> {
        Err(StoreError)
    }
}
