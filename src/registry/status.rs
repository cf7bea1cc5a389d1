//! Whether registrations are accepted, and why not: what readiness, gRPC health and refusals go by.

use std::sync::Arc;

use tokio::sync::watch;

use super::Unavailable;

/// Where the registry stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// What is stored is being read; DNS does not answer from it yet.
    Recovering,
    /// What is stored is served; what Kubernetes holds is being read.
    Restoring,
    /// All is well.
    Ready,
    /// A write or sync failed, as said here. DNS goes on with what it has.
    StorageFailed(Arc<str>),
    /// The process is about to end; DNS answers until the drain time is over.
    Draining,
}

/// The shared [`Phase`]. A failure of the storage is not undone, and draining is final.
#[derive(Debug, Clone)]
pub struct Status(watch::Sender<Phase>);

impl Status {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(Phase::Recovering))
    }

    /// Where the registry stands now.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.0.borrow().clone()
    }

    /// Sees this phase and every later one.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Phase> {
        self.0.subscribe()
    }

    /// No more registrations from now on.
    pub fn drain(&self) {
        self.0.send_replace(Phase::Draining);
    }

    pub(super) fn ready(&self) {
        self.0.send_if_modified(|phase| {
            let recovered = matches!(phase, Phase::Recovering | Phase::Restoring);
            if recovered {
                *phase = Phase::Ready;
            }
            recovered
        });
    }

    pub(super) fn restoring(&self) {
        self.0.send_if_modified(|phase| {
            let recovered = *phase == Phase::Recovering;
            if recovered {
                *phase = Phase::Restoring;
            }
            recovered
        });
    }

    pub(super) fn storage_failed(&self, err: &str) {
        self.0.send_if_modified(|phase| {
            let news = matches!(phase, Phase::Recovering | Phase::Restoring | Phase::Ready);
            if news {
                *phase = Phase::StorageFailed(err.into());
            }
            news
        });
    }

    pub(super) fn accepting(&self) -> Result<(), Unavailable> {
        match *self.0.borrow() {
            Phase::Ready => Ok(()),
            Phase::Recovering | Phase::Restoring => Err(Unavailable::NotReady),
            Phase::StorageFailed(_) => Err(Unavailable::StorageFailed),
            Phase::Draining => Err(Unavailable::ShuttingDown),
        }
    }

    /// Why the writer gave no answer: it is gone, so the phase cannot be [`Phase::Ready`] for long.
    pub(super) fn refusal(&self) -> Unavailable {
        self.accepting().err().unwrap_or(Unavailable::ShuttingDown)
    }
}

#[cfg(test)]
impl Status {
    /// A registry that stands at `phase`, for tests of those who read it.
    pub(crate) fn at(phase: Phase) -> Self {
        Self(watch::Sender::new(phase))
    }
}
