//! The journal's side of a batch: its records are durable before anything of it is applied.
//!
//! After one failure nothing is committed any more: what reached the disk is unknown, and a later
//! sync that succeeds proves nothing. DNS goes on with what it has.

use tracing::error;

use super::{Status, Unavailable};
use crate::store::{Journal, Record, StoreError};

/// The one who writes the journal.
#[derive(Debug)]
pub(super) struct Committer {
    journal: Journal,
    status: Status,
    /// The generation of the last batch.
    generation: u64,
}

impl Committer {
    /// `generation` is the one that is served.
    pub(super) fn new(journal: Journal, status: Status, generation: u64) -> Self {
        if let Err(err) = journal.usable() {
            fail(&status, &err);
        }
        Self { journal, status, generation }
    }

    /// The generation of the last batch.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether a commit can succeed.
    ///
    /// # Errors
    /// After a failed commit.
    pub(super) fn usable(&self) -> Result<(), Unavailable> {
        match self.status.accepting() {
            Err(Unavailable::StorageFailed) => Err(Unavailable::StorageFailed),
            _ => Ok(()),
        }
    }

    /// For a batch that changes nothing: whether what it is about is still stored.
    ///
    /// # Errors
    /// When the data directory was removed.
    pub(super) fn check(&mut self) -> Result<(), Unavailable> {
        self.journal.check_in_place().map_err(|err| fail(&self.status, &err))
    }

    /// Appends the records of a batch and syncs. With `changes` the batch is a new generation.
    ///
    /// # Errors
    /// When the journal cannot be written, now or since before.
    pub(super) fn commit(&mut self, records: &[Record], changes: bool) -> Result<(), Unavailable> {
        let generation = self.generation + u64::from(changes);
        self.journal.append(generation, records).map_err(|err| fail(&self.status, &err))?;
        self.generation = generation;
        Ok(())
    }

    /// As [`Committer::commit`], for changes that come from Kubernetes: they are no part of the
    /// outbox, so a later start does not take them for something that only this directory knows.
    ///
    /// # Errors
    /// When the journal cannot be written, now or since before.
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
