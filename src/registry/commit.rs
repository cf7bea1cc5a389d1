//! Step 2 of a batch: its records are durable before any of its changes is applied.
//!
//! After one failure no batch is committed until a restart: it is unknown which bytes reached the disk,
//! and a later successful sync does not prove that they did. DNS continues with the applied changes.

use tracing::error;

use super::{Status, Unavailable};
use crate::store::{DirectoryTerm, Journal, Record, StoreError};

/// The only writer of the journal.
#[derive(Debug)]
pub(super) struct Committer {
    journal: Journal,
    status: Status,
    /// The generation of the last batch.
    generation: u64,
}

impl Committer {
    /// `generation` is the generation that DNS serves.
    pub(super) fn new(journal: Journal, status: Status, generation: u64) -> Self {
        // A journal whose end could not be repaired is served from, and refuses registrations from the start.
        if let Err(err) = journal.usable() {
            fail(&status, &err);
        }
        Self { journal, status, generation }
    }

    /// The generation of the last batch.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// The next batch is later than `generation`.
    pub(super) fn advance_to(&mut self, generation: u64) {
        self.generation = self.generation.max(generation);
    }

    /// Checks that no commit has failed.
    ///
    /// # Errors
    /// After a failed commit.
    pub(super) fn usable(&self) -> Result<(), Unavailable> {
        match self.status.accepting() {
            Err(Unavailable::StorageFailed) => Err(Unavailable::StorageFailed),
            _ => Ok(()),
        }
    }

    /// Passes the records of all stored instances to `record`. Returns the term of the directory, and the changes that
    /// Kubernetes may lack. After a failed write: as of before it.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub(super) fn read_back(
        &mut self,
        record: &mut dyn FnMut(Record),
    ) -> Result<(DirectoryTerm, Vec<Record>), Unavailable> {
        self.journal.read_back(record).map_err(|err| fail(&self.status, &err))
    }

    /// Checks, for a batch that changes nothing, that the journal is still in place.
    ///
    /// # Errors
    /// When the data directory was removed.
    pub(super) fn check(&mut self) -> Result<(), Unavailable> {
        self.journal.check_in_place().map_err(|err| fail(&self.status, &err))
    }

    /// Appends the records of a batch and syncs. With `changes` the batch is a new generation.
    ///
    /// # Errors
    /// When the journal cannot be written, or an earlier write failed.
    pub(super) fn commit(&mut self, records: &[Record], changes: bool) -> Result<(), Unavailable> {
        let generation = self.generation + u64::from(changes);
        self.journal.append(generation, records).map_err(|err| fail(&self.status, &err))?;
        self.generation = generation;
        Ok(())
    }

    /// As [`Committer::commit`], for changes that were read from Kubernetes. They do not enter the
    /// outbox, because a later start would take the outbox's records for changes that Kubernetes lacks.
    ///
    /// # Errors
    /// When the journal cannot be written, or an earlier write failed.
    pub(super) fn commit_mirrored(&mut self, records: &[Record], changes: bool) -> Result<(), Unavailable> {
        let generation = self.generation + u64::from(changes);
        self.journal.append_mirrored(generation, records).map_err(|err| fail(&self.status, &err))?;
        self.generation = generation;
        Ok(())
    }
}

fn fail(status: &Status, err: &StoreError) -> Unavailable {
    let error = err as &dyn std::error::Error;
    error!(error, "the journal cannot be written: registrations are refused, DNS goes on; fix the disk, then restart");
    status.storage_failed(&err.to_string());
    Unavailable::StorageFailed
}
