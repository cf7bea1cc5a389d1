//! What this process knows of tokens and registrants.

use std::sync::{
    Arc, PoisonError, RwLock, RwLockReadGuard,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::watch;

use super::state::JoiningState;
use crate::metrics::JoiningMetrics;

/// What is stored, as far as it is known here.
#[derive(Debug)]
pub(super) struct JoiningTable {
    state: RwLock<JoiningState>,
    /// Whether what is not here does not exist.
    complete: AtomicBool,
    changes: watch::Sender<u64>,
    metrics: Arc<JoiningMetrics>,
}

impl JoiningTable {
    pub(super) fn new(metrics: Arc<JoiningMetrics>) -> Arc<Self> {
        let (state, complete) = (RwLock::default(), AtomicBool::new(false));
        Arc::new(Self { state, complete, changes: watch::Sender::new(0), metrics })
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, JoiningState> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it is this.
    pub(super) fn replace(&self, state: JoiningState) {
        self.apply(|known| *known = state);
        self.complete();
    }

    /// Applies a change of a part. What ends an identity is told with [`JoiningTable::ended`].
    pub(super) fn apply<T>(&self, change: impl FnOnce(&mut JoiningState) -> T) -> T {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut state);
        self.metrics.tokens.set(state.tokens.len() as u64);
        self.metrics.registrants.set(state.active() as u64);
        result
    }

    /// What is not here does not exist.
    pub(super) fn complete(&self) {
        self.complete.store(true, Ordering::Release);
    }

    pub(super) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// An identity may have ended. Not told of whatever else changes: each open connection looks.
    pub(super) fn ended(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// Changes whenever an identity may have ended.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}
