//! What the log says of an API server that is away: one line when it is lost and one when it is
//! back, however many watches notice.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::error::WatchErrorKind;

/// Failures in a row after which a watch that was open counts as lost. Connections break now and
/// then, and the next attempt succeeds.
const FAILURES_BEFORE_OUTAGE: u32 = 2;

/// The watches of one API server.
#[derive(Debug)]
pub(super) struct Outages {
    /// URL of the API server.
    server: String,
    /// How many watches are lost.
    lost: Mutex<usize>,
}

impl Outages {
    pub(super) fn new(server: String) -> Self {
        Self { server, lost: Mutex::new(0) }
    }

    /// Adds a watch, which is not open yet.
    pub(super) fn watch(&self) -> WatchHealth<'_> {
        WatchHealth { outages: self, failures: 0, was_open: false, lost: false, forbidden: false }
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state of one watch.
#[derive(Debug)]
pub(super) struct WatchHealth<'a> {
    outages: &'a Outages,
    /// In a row.
    failures: u32,
    was_open: bool,
    lost: bool,
    forbidden: bool,
}

impl WatchHealth<'_> {
    /// The watch failed with `err`. `resource` is what it needs the right to list and watch.
    pub(super) fn failed(&mut self, kind: WatchErrorKind, err: &str, resource: &str) {
        let server = &self.outages.server;
        self.failures = self.failures.saturating_add(1);
        // A missing right is of one watch, not of the API server: it is reported apart, once.
        if kind == WatchErrorKind::Forbidden {
            if !self.forbidden {
                self.forbidden = true;
                tracing::error!(
                    "the Kubernetes API server {server} does not let this account list and watch {resource}: {err}; \
                     grant it as deploy/kustomize/rbac.yaml does; retrying"
                );
            }
            return;
        }
        if self.lost || (self.was_open && self.failures < FAILURES_BEFORE_OUTAGE) {
            return;
        }
        self.lost = true;
        let mut lost = self.outages.lock();
        *lost += 1;
        if *lost == 1 {
            tracing::warn!(
                "the Kubernetes API server {server}: cannot watch {resource}: {err}; names are answered as \
                 before, registrations are mirrored as soon as it answers; retrying"
            );
        }
    }

    /// The watch is open.
    pub(super) fn opened(&mut self) {
        (self.was_open, self.failures) = (true, 0);
        if std::mem::take(&mut self.forbidden) {
            tracing::info!("the Kubernetes API server {} lets this account watch again", self.outages.server);
        }
        if self.recovered() {
            tracing::info!("the Kubernetes API server {} answers again", self.outages.server);
        }
    }

    /// The watch is not lost any more. Returns whether it was the last lost one.
    fn recovered(&mut self) -> bool {
        if !std::mem::take(&mut self.lost) {
            return false;
        }
        let mut lost = self.outages.lock();
        *lost -= 1;
        *lost == 0
    }
}

impl Drop for WatchHealth<'_> {
    fn drop(&mut self) {
        // A watch that is dropped while lost must not leave the API server lost for ever.
        self.recovered();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watch_is_lost_after_two_failures_until_it_is_open() {
        let outages = Outages::new("https://10.0.0.1:6443".into());
        let lost = || *outages.lock();
        let (mut one, mut other) = (outages.watch(), outages.watch());
        one.failed(WatchErrorKind::Unreachable, "refused", "services");
        assert_eq!(lost(), 1, "it was never open");
        one.failed(WatchErrorKind::Unreachable, "refused", "services");
        assert_eq!(lost(), 1);
        other.opened();
        other.failed(WatchErrorKind::Unreachable, "reset", "namespaces");
        assert_eq!(lost(), 1, "once is tolerated");
        other.failed(WatchErrorKind::Silent, "no answer", "namespaces");
        assert_eq!(lost(), 2);
        one.opened();
        one.opened();
        assert_eq!(lost(), 1);
        other.failed(WatchErrorKind::Forbidden, "no right", "namespaces");
        drop(other);
        assert_eq!(lost(), 0, "a dropped watch");
    }
}
