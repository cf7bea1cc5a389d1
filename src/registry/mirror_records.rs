//! The mirror's confirmations on their way to the journal, and the state of the comparison at the take-over.
//!
//! A confirmation does not need a sync of its own: it is journaled with the next batch, or after a
//! second, or when many are unsaved. A lost confirmation costs a comparison at the next start, and
//! nothing else unless another data directory has written to Kubernetes since.

use std::{
    mem,
    time::{Duration, Instant},
};

use super::restore::{LatestRecords, LocalState};
use crate::{model::ServiceKey, store::Record};

/// Confirmations that wait for the next batch's sync; with more, they are synced at once.
const MAX_UNSAVED: usize = 1024;

/// How long confirmations wait for the next batch's sync.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// The writer's records for the mirror. Stays empty without Kubernetes.
#[derive(Debug, Default)]
pub(super) struct MirrorRecords {
    comparison: ComparisonState,
    /// How many comparisons were begun.
    begun: u64,
    /// Of which take-over a comparison is begun.
    turn: u64,
    /// Confirmations that are not in the journal yet.
    unsaved: Vec<Record>,
    /// When `unsaved` has to be journaled; `None` if it is empty.
    save_at: Option<Instant>,
}

/// The state of the comparison with the EndpointSlices at the start.
#[derive(Debug, Default)]
enum ComparisonState {
    /// The EndpointSlices have not been read yet.
    Awaited(LocalState),
    /// The comparison runs, or its result is being applied.
    Running {
        /// Distinguishes it from one that was given up.
        number: u64,
        /// Records that were journaled since the comparison began. They are newer than its result.
        newer: LatestRecords,
    },
    /// The comparison is over or has failed, or the server runs without Kubernetes.
    #[default]
    Over,
}

impl MirrorRecords {
    /// `local` is one side of the comparison; `None` without Kubernetes.
    pub(super) fn new(local: Option<LocalState>) -> Self {
        Self { comparison: local.map_or(ComparisonState::Over, ComparisonState::Awaited), ..Self::default() }
    }

    /// The local side of the comparison; `None` after its begin.
    pub(super) fn awaited(&self) -> Option<&LocalState> {
        match &self.comparison {
            ComparisonState::Awaited(local) => Some(local),
            ComparisonState::Running { .. } | ComparisonState::Over => None,
        }
    }

    /// As [`MirrorRecords::awaited`], to change it.
    pub(super) fn awaited_mut(&mut self) -> Option<&mut LocalState> {
        match &mut self.comparison {
            ComparisonState::Awaited(local) => Some(local),
            ComparisonState::Running { .. } | ComparisonState::Over => None,
        }
    }

    /// Words that this process has to hand over; 0 while it writes itself.
    pub(super) fn outbox_len(&self) -> usize {
        self.awaited().map_or(0, |local| local.outbox.len())
    }

    pub(super) fn comparison_is_over(&self) -> bool {
        matches!(self.comparison, ComparisonState::Over)
    }

    /// Another comparison will follow, with this on its local side. One that runs is given up.
    pub(super) fn await_comparison(&mut self, local: LocalState) {
        self.comparison = ComparisonState::Awaited(local);
    }

    /// From now on only the take-over with this number may begin a comparison.
    pub(super) fn next_turn(&mut self) -> u64 {
        self.turn += 1;
        self.turn
    }

    /// Whether nothing has come after the take-over with this number.
    pub(super) fn is_current(&self, turn: u64) -> bool {
        self.turn == turn
    }

    /// Begins the comparison. Returns its number; `None` if it was begun before.
    pub(super) fn begin_comparison(&mut self) -> Option<(u64, LocalState)> {
        match mem::take(&mut self.comparison) {
            ComparisonState::Awaited(local) => {
                self.begun += 1;
                self.comparison = ComparisonState::Running { number: self.begun, newer: LatestRecords::default() };
                Some((self.begun, local))
            }
            other => {
                self.comparison = other;
                None
            }
        }
    }

    /// Removes from a part of the result of a comparison the instances that changed since it began; all of
    /// them if it has failed or was given up.
    pub(super) fn retain_current(&self, comparison: u64, records: &mut Vec<Record>) {
        match &self.comparison {
            ComparisonState::Running { number, newer } if *number == comparison => {
                // What was said while the comparison ran is later than anything that it compared.
                records.retain(|record| !newer.covers(record));
            }
            _ => records.clear(),
        }
    }

    /// Ends a comparison. Returns whether it was running.
    pub(super) fn end_comparison(&mut self, comparison: u64) -> bool {
        let runs = matches!(self.comparison, ComparisonState::Running { number, .. } if number == comparison);
        if runs {
            self.comparison = ComparisonState::Over;
        }
        runs
    }

    /// Keeps the records of a batch while the comparison is not over.
    pub(super) fn note(&mut self, records: &[Record]) {
        let outbox = match &mut self.comparison {
            // Accepted before the slices were read: a part of the outbox that the comparison has to bring to
            // Kubernetes.
            ComparisonState::Awaited(local) => &mut local.outbox,
            ComparisonState::Running { newer, .. } => newer,
            ComparisonState::Over => return,
        };
        outbox.add(records);
    }

    /// Adds confirmations: Kubernetes has each service up to its generation.
    pub(super) fn confirmed(&mut self, services: Vec<(ServiceKey, u64)>, now: Instant) {
        let records = services.into_iter().map(|(service, generation)| Record::Mirrored { service, generation });
        self.unsaved.extend(records);
        // From the oldest on: a steady flow of confirmations must not put the save off for ever.
        self.save_at.get_or_insert(now + SAVE_INTERVAL);
    }

    /// When the confirmations have to be journaled; `None` if there are none.
    pub(super) fn save_at(&self) -> Option<Instant> {
        self.save_at
    }

    /// Whether the confirmations have to be journaled without waiting for the next batch.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.unsaved.len() >= MAX_UNSAVED || self.save_at.is_some_and(|at| at <= now)
    }

    /// Takes the confirmations; the caller journals them.
    pub(super) fn take_unsaved(&mut self) -> Vec<Record> {
        self.save_at = None;
        mem::take(&mut self.unsaved)
    }
}
