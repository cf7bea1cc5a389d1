//! What the journal has to learn about the mirror, and what the comparison at the start needs.
//!
//! Confirmations are not worth a sync of their own: they go into the journal with the next batch,
//! or after a second, or when there are many. One that is lost costs a comparison at the next
//! start, and nothing else as long as no other directory wrote since.

use std::{
    mem,
    time::{Duration, Instant},
};

use super::restore::{LocalState, Outbox};
use crate::{model::ServiceKey, store::Record};

/// Confirmations that wait for the next batch's sync before they get one of their own.
const MAX_UNSAVED: usize = 1024;

/// How long they wait for it.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// The writer's book-keeping for the mirror. Without a Kubernetes it stays empty.
#[derive(Debug, Default)]
pub(super) struct MirrorRecords {
    comparison: ComparisonState,
    /// What the mirror has reported and the journal does not have yet.
    unsaved: Vec<Record>,
    /// When it has to be in the journal.
    save_at: Option<Instant>,
}

/// How far the comparison with what Kubernetes held at the start is.
#[derive(Debug, Default)]
enum ComparisonState {
    /// Kubernetes has not been read yet.
    Awaited(LocalState),
    /// The comparison runs, or its result is being applied.
    Running {
        /// What was journaled since it began. It is newer than the result of the comparison.
        newer: Outbox,
    },
    /// The comparison is over, has failed, or there is no Kubernetes.
    #[default]
    Over,
}

impl MirrorRecords {
    /// `local` is one side of the comparison; `None` without a Kubernetes.
    pub(super) fn new(local: Option<LocalState>) -> Self {
        Self { comparison: local.map_or(ComparisonState::Over, ComparisonState::Awaited), ..Self::default() }
    }

    /// The local side of a comparison that has not begun.
    pub(super) fn awaited(&self) -> Option<&LocalState> {
        match &self.comparison {
            ComparisonState::Awaited(local) => Some(local),
            ComparisonState::Running { .. } | ComparisonState::Over => None,
        }
    }

    pub(super) fn comparison_is_over(&self) -> bool {
        matches!(self.comparison, ComparisonState::Over)
    }

    /// Begins the comparison, of which there is one only.
    pub(super) fn begin_comparison(&mut self) -> Option<LocalState> {
        match mem::take(&mut self.comparison) {
            ComparisonState::Awaited(local) => {
                self.comparison = ComparisonState::Running { newer: Outbox::default() };
                Some(local)
            }
            other => {
                self.comparison = other;
                None
            }
        }
    }

    /// Takes what was changed since the comparison began out of a part of its result. Everything is
    /// taken out once the comparison has failed.
    pub(super) fn retain_current(&self, records: &mut Vec<Record>) {
        match &self.comparison {
            ComparisonState::Running { newer } => records.retain(|record| !newer.names(record)),
            ComparisonState::Awaited(_) | ComparisonState::Over => records.clear(),
        }
    }

    /// Ends the comparison. Returns whether it had not ended before.
    pub(super) fn end_comparison(&mut self) -> bool {
        matches!(mem::take(&mut self.comparison), ComparisonState::Running { .. })
    }

    /// Notes what a batch journals while the comparison is not over. Returns the services of which
    /// Kubernetes may lack something for that.
    pub(super) fn note_unmirrored(&mut self, records: &[Record]) -> Vec<ServiceKey> {
        let outbox = match &mut self.comparison {
            ComparisonState::Awaited(local) => &mut local.outbox,
            ComparisonState::Running { newer } => newer,
            ComparisonState::Over => return Vec::new(),
        };
        outbox.add(records);
        let mut services: Vec<ServiceKey> = records.iter().filter_map(service_of).cloned().collect();
        services.dedup();
        services
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

    /// Takes what is unsaved; the caller writes it to the journal.
    pub(super) fn take_unsaved(&mut self) -> Vec<Record> {
        self.save_at = None;
        mem::take(&mut self.unsaved)
    }
}

fn service_of(record: &Record) -> Option<&ServiceKey> {
    match record {
        Record::Put { service, .. } | Record::Remove { service, .. } => Some(service),
        Record::Mirrored { .. } | Record::Term { .. } => None,
    }
}
