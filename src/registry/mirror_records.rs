//! What the journal has to learn about the mirror, and what the comparison at the start needs.
//!
//! Confirmations are not worth a sync of their own: they go into the journal with the next batch,
//! or after a second, or when there are many. One that is lost costs a comparison at the next
//! start, and nothing else as long as no other directory wrote since.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use super::restore::LocalState;
use crate::{model::ServiceKey, store::Record};

/// Confirmations that wait for the next batch's sync before they get one of their own.
const MAX_UNSAVED: usize = 1024;

/// How long they wait for it.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// The writer's book-keeping for the mirror. Without a Kubernetes it stays empty.
#[derive(Debug, Default)]
pub(super) struct MirrorRecords {
    /// What was stored, until it is compared with what Kubernetes holds.
    local: Option<LocalState>,
    /// What the mirror has reported and the journal does not have yet.
    unsaved: Vec<Record>,
    /// When it has to be in the journal.
    save_at: Option<Instant>,
}

impl MirrorRecords {
    /// `local` is what a comparison will be with; `None` without a Kubernetes.
    pub(super) fn new(local: Option<LocalState>) -> Self {
        Self { local, ..Self::default() }
    }

    /// What a comparison with Kubernetes is still to be made with.
    pub(super) fn local(&self) -> Option<&LocalState> {
        self.local.as_ref()
    }

    /// Begins the comparison. There is one only.
    pub(super) fn take_local(&mut self) -> Option<LocalState> {
        self.local.take()
    }

    /// Notes what a batch journals while the comparison is still to come. Returns the services of
    /// which Kubernetes may lack something for that.
    pub(super) fn note_unmirrored(&mut self, records: &[Record]) -> HashSet<ServiceKey> {
        self.local.as_mut().map_or_else(HashSet::new, |local| local.add(records))
    }

    /// Kubernetes has these services up to these generations.
    pub(super) fn confirmed(&mut self, services: Vec<(ServiceKey, u64)>, now: Instant) {
        let records = services.into_iter().map(|(service, generation)| Record::Mirrored { service, generation });
        self.unsaved.extend(records);
        self.save_at.get_or_insert(now + SAVE_INTERVAL);
    }

    /// When what is unsaved has to be in the journal, if there is something.
    pub(super) fn save_at(&self) -> Option<Instant> {
        self.save_at
    }

    /// Whether what is unsaved should not wait for the next batch.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.unsaved.len() >= MAX_UNSAVED || self.save_at.is_some_and(|at| at <= now)
    }

    /// What is unsaved, for whoever writes it to the journal now.
    pub(super) fn take_unsaved(&mut self) -> Vec<Record> {
        self.save_at = None;
        std::mem::take(&mut self.unsaved)
    }
}
