//! The CA that is in use.

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwapOption;
use tokio::sync::watch;

use super::{CaError, CertificateAuthority};

/// The CA that is in use: known from the start on, or, with Kubernetes, once its Secret was read. There it can be
/// replaced, too.
#[derive(Debug)]
pub struct CurrentCa {
    ca: ArcSwapOption<CertificateAuthority>,
    /// Where it is, for messages.
    place: String,
    /// Why it is not known.
    missing: Mutex<String>,
    changes: watch::Sender<u64>,
}

impl CurrentCa {
    /// The CA in the data directory.
    #[must_use]
    pub fn in_directory(ca: CertificateAuthority) -> Arc<Self> {
        let current = Self::pending("the data directory".into());
        current.ca.store(Some(Arc::new(ca)));
        Arc::new(current)
    }

    /// The CA in a place that is not read yet.
    pub(super) fn pending(place: String) -> Self {
        let missing = Mutex::new(format!("{place} is not read yet"));
        Self { ca: ArcSwapOption::empty(), place, missing, changes: watch::Sender::new(0) }
    }

    /// The CA.
    ///
    /// # Errors
    /// When it is not known yet, with the reason.
    pub fn get(&self) -> Result<Arc<CertificateAuthority>, CaError> {
        let missing = || CaError::Pending(self.missing.lock().unwrap_or_else(PoisonError::into_inner).clone());
        self.ca.load_full().ok_or_else(missing)
    }

    /// Where it is, for messages.
    #[must_use]
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Changes whenever the CA does.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    pub(super) fn set(&self, ca: CertificateAuthority) {
        self.ca.store(Some(Arc::new(ca)));
        self.changes.send_modify(|count| *count += 1);
    }

    pub(super) fn set_missing(&self, reason: String) {
        *self.missing.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }
}
