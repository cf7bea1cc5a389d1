//! Whether registrations are accepted, and why not. Readiness, gRPC health and the errors of refused
//! submissions follow from the phase.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, time::timeout};

use super::{ReplicaStatus, Unavailable};
use crate::model::{ReplicaRole, ServerAddress};

/// How long a process that gave the Lease up waits to learn who has taken it, before it says that it does not write any more. A
/// process on standby takes it at once.
const SUCCESSOR_TIMEOUT: Duration = Duration::from_secs(3);

/// The process that writes to Kubernetes, as the Lease names it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeaseHolder {
    /// `holderIdentity` of the Lease.
    pub name: String,
    /// Where it takes registrations; empty if it does not say.
    pub addresses: Vec<ServerAddress>,
}

impl LeaseHolder {
    /// Who has the Lease; of a process that knows nobody, that it does not take the Lease itself.
    pub(super) fn has_the_lease(&self) -> &'static str {
        if self.name.is_empty() {
            "this gangplank does not take the Lease gangplank-writer now"
        } else {
            "another gangplank has the Lease gangplank-writer"
        }
    }

    /// `; register at ADDRESS`, if the address is known.
    #[must_use]
    pub fn hint(&self) -> String {
        if self.addresses.is_empty() {
            return String::new();
        }
        format!("; register at {}", ServerAddress::choice(&self.addresses))
    }
}

/// A process that accepted registrations does not any more.
#[derive(Debug, Clone)]
pub struct StoodDown {
    /// The process that writes, as far as it is known.
    pub holder: Arc<LeaseHolder>,
    /// Whether that is because its journal cannot be written.
    pub storage_failed: bool,
}

/// The phases of a registry's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// The store is being read; DNS does not answer from it yet.
    Recovering,
    /// DNS serves the stored services; the EndpointSlices are being read.
    Restoring,
    /// Another process writes to Kubernetes. This one follows it: once [`Status::is_readable`], DNS and readers are served.
    Standby(Arc<LeaseHolder>),
    /// Registrations are accepted.
    Ready,
    /// A write or sync failed with this error. DNS continues with the applied changes.
    StorageFailed(Arc<str>),
    /// The process is about to end; DNS answers until the drain timeout.
    Draining,
}

/// The shared [`Phase`]. A failure of the storage stays until a restart, and draining is final.
#[derive(Debug, Clone)]
pub struct Status {
    phase: watch::Sender<Phase>,
    /// The process that writes, while that is another one.
    holder: watch::Sender<Option<Arc<LeaseHolder>>>,
    /// Set once, and stays.
    readable: Arc<AtomicBool>,
    replica: Arc<ReplicaStatus>,
    /// Whether everything that was ever submitted is answered. Set once, and stays.
    quiet: Arc<AtomicBool>,
    /// Whether the clock is more than a second from the API server's, as far as is known.
    clock_is_wrong: Arc<AtomicBool>,
}

impl Status {
    pub(super) fn new() -> Self {
        Self::in_phase(Phase::Recovering)
    }

    fn in_phase(phase: Phase) -> Self {
        Self {
            phase: watch::Sender::new(phase),
            holder: watch::Sender::default(),
            readable: Arc::default(),
            replica: Arc::default(),
            quiet: Arc::default(),
            clock_is_wrong: Arc::default(),
        }
    }

    /// The current phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// A receiver of the current phase and of every later one.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// A receiver of the process that writes, while that is another one and as far as it is known; in every phase, the
    /// last one too.
    #[must_use]
    pub fn watch_holder(&self) -> watch::Receiver<Option<Arc<LeaseHolder>>> {
        self.holder.subscribe()
    }

    /// Waits until this process, after it has accepted registrations, stands down.
    pub fn deposed(&self) -> impl Future<Output = StoodDown> + Send + use<> {
        let (mut phases, mut holders) = (self.watch(), self.watch_holder());
        async move {
            let deposed = async {
                phases.wait_for(|phase| *phase == Phase::Ready).await?;
                let stopped = |phase: &Phase| matches!(phase, Phase::Standby(_) | Phase::StorageFailed(_));
                if let Phase::Standby(holder) = &*phases.wait_for(stopped).await? {
                    return Ok(StoodDown { holder: Arc::clone(holder), storage_failed: false });
                }
                // It has the Lease until Kubernetes has what it accepted.
                holders.wait_for(Option::is_some).await?;
                let addressed = |holder: &Option<Arc<LeaseHolder>>| {
                    holder.as_ref().is_some_and(|holder| !holder.addresses.is_empty())
                };
                // Without another process it stays unknown.
                let _ = timeout(SUCCESSOR_TIMEOUT, holders.wait_for(addressed)).await;
                let holder = holders.borrow().clone().unwrap_or_default();
                Ok::<_, watch::error::RecvError>(StoodDown { holder, storage_failed: true })
            };
            match deposed.await {
                Ok(stood_down) => stood_down,
                // The registry is gone: the stop ends everything.
                Err(_) => std::future::pending().await,
            }
        }
    }

    fn set_holder(&self, holder: Option<&LeaseHolder>) {
        self.holder.send_if_modified(|known| {
            let is_new = known.as_deref() != holder;
            if is_new {
                *known = holder.map(|holder| Arc::new(holder.clone()));
            }
            is_new
        });
    }

    /// Whether the catalog is complete: this process writes, or follows one that does. Stays so.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        // Pairs with `set_readable`: a reader that is let in sees the complete catalog.
        self.readable.load(Ordering::Acquire)
    }

    /// What this process knows of the replicas.
    #[must_use]
    pub fn replica(&self) -> &ReplicaStatus {
        &self.replica
    }

    /// How old what this process answers may be: the time since it certainly had everything that the writer has written to
    /// Kubernetes. `None` unless it follows another process.
    #[must_use]
    pub fn staleness(&self) -> Option<Duration> {
        let follows = match *self.phase.borrow() {
            Phase::Standby(_) => true,
            // It keeps the Lease for a while.
            Phase::StorageFailed(_) | Phase::Draining => self.replica.role() == ReplicaRole::Standby,
            Phase::Recovering | Phase::Restoring | Phase::Ready => false,
        };
        if follows && self.is_readable() { self.replica.watch_age() } else { None }
    }

    /// Whether everything that was ever submitted is answered, and nothing more will be.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.quiet.load(Ordering::Acquire)
    }

    pub(super) fn set_quiet(&self) {
        self.quiet.store(true, Ordering::Release);
    }

    /// The catalog is complete. Returns whether that is new.
    pub(super) fn set_readable(&self) -> bool {
        // A swap, so that one caller alone gets `true` and opens the zone.
        !self.readable.swap(true, Ordering::AcqRel)
    }

    /// Refuses all submissions from now on.
    pub fn drain(&self) {
        self.phase.send_replace(Phase::Draining);
    }

    pub(super) fn ready(&self) {
        self.set_readable();
        self.set_holder(None);
        self.phase.send_if_modified(|phase| {
            // Not from StorageFailed or Draining: a comparison that ends late must not reopen what was closed.
            let loading = matches!(phase, Phase::Recovering | Phase::Restoring | Phase::Standby(_));
            if loading {
                *phase = Phase::Ready;
            }
            loading
        });
    }

    pub(super) fn restoring(&self) {
        self.phase.send_if_modified(|phase| {
            let recovering = *phase == Phase::Recovering;
            if recovering {
                *phase = Phase::Restoring;
            }
            recovering
        });
    }

    /// The clock was compared with the API server's.
    pub(crate) fn set_clock_agrees(&self, agrees: bool) {
        // A hint of the moment; nothing else is published with it.
        self.clock_is_wrong.store(!agrees, Ordering::Relaxed);
    }

    /// Whether nothing may be accepted for the clock's sake.
    #[must_use]
    pub fn is_clock_wrong(&self) -> bool {
        self.clock_is_wrong.load(Ordering::Relaxed)
    }

    /// Another process writes. Returns whether that is new.
    pub(crate) fn standby(&self, holder: &LeaseHolder) -> bool {
        self.set_holder(Some(holder));
        self.phase.send_if_modified(|phase| {
            let new = match phase {
                Phase::Restoring => true,
                Phase::Standby(before) => &**before != holder,
                _ => false,
            };
            if new {
                *phase = Phase::Standby(Arc::new(holder.clone()));
            }
            new
        })
    }

    /// As [`Status::standby`], for a process that accepted registrations.
    pub(super) fn stand_down(&self, holder: LeaseHolder) {
        self.set_holder(Some(&holder));
        self.phase.send_if_modified(|phase| {
            let accepting = *phase == Phase::Ready;
            if accepting {
                *phase = Phase::Standby(Arc::new(holder));
            }
            accepting
        });
    }

    pub(super) fn storage_failed(&self, err: &str) {
        self.phase.send_if_modified(|phase| {
            // Draining stays: the process is about to end, whatever the disk does.
            let working = matches!(phase, Phase::Recovering | Phase::Restoring | Phase::Standby(_) | Phase::Ready);
            if working {
                *phase = Phase::StorageFailed(err.into());
            }
            working
        });
    }

    /// Whether submissions are accepted.
    ///
    /// # Errors
    /// Why not.
    pub fn accepting(&self) -> Result<(), Unavailable> {
        match &*self.phase.borrow() {
            Phase::Ready => Ok(()),
            Phase::Recovering | Phase::Restoring => Err(Unavailable::NotReady),
            Phase::Standby(holder) => Err(Unavailable::Standby(Arc::clone(holder))),
            Phase::StorageFailed(_) => Err(Unavailable::StorageFailed),
            Phase::Draining => Err(Unavailable::ShuttingDown),
        }
    }

    /// Why the writer did not answer. The writer has ended, so [`Phase::Ready`] is about to end.
    pub(super) fn refusal(&self) -> Unavailable {
        self.accepting().err().unwrap_or(Unavailable::ShuttingDown)
    }
}

#[cfg(test)]
impl Status {
    /// A registry in `phase`, for tests of its readers.
    pub(crate) fn at(phase: Phase) -> Self {
        Self::in_phase(phase)
    }

    /// As after a failure of the journal.
    pub(crate) fn fail_storage(&self) {
        self.storage_failed("the disk is full");
    }
}
