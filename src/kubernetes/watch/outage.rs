//! What a person is told of an API server that is away: one line when it is lost and one when it is
//! back, however many watches notice.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::metrics::RestartReason;

/// Failures in a row after which a watch that stood counts as lost. Connections break now and
/// then, and the next attempt succeeds.
const FAILURES_BEFORE_OUTAGE: u32 = 2;

/// The watches of one API server.
#[derive(Debug)]
pub(super) struct Outages {
    /// Its URL.
    server: String,
    /// How many watches are lost.
    lost: Mutex<usize>,
}

impl Outages {
    pub(super) fn new(server: String) -> Self {
        Self { server, lost: Mutex::new(0) }
    }

    /// A watch more, which does not stand yet.
    pub(super) fn watch(&self) -> WatchHealth<'_> {
        WatchHealth { outages: self, failures: 0, stood: false, lost: false, forbidden: false }
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How one watch does.
#[derive(Debug)]
pub(super) struct WatchHealth<'a> {
    outages: &'a Outages,
    /// In a row.
    failures: u32,
    stood: bool,
    lost: bool,
    forbidden: bool,
}

impl WatchHealth<'_> {
    /// It failed, because of `err`. `right` is what has to be listed and watched for it.
    pub(super) fn failed(&mut self, reason: RestartReason, err: &str, right: &str) {
        let server = &self.outages.server;
        self.failures = self.failures.saturating_add(1);
        if reason == RestartReason::Forbidden {
            if !self.forbidden {
                self.forbidden = true;
                tracing::error!(
                    "the Kubernetes API server {server} does not let this account list and watch {right}: {err}; \
                     grant it as deploy/rbac.yaml does; it is tried again"
                );
            }
            return;
        }
        if self.lost || (self.stood && self.failures < FAILURES_BEFORE_OUTAGE) {
            return;
        }
        self.lost = true;
        let mut lost = self.outages.lock();
        *lost += 1;
        if *lost == 1 {
            tracing::warn!(
                "the Kubernetes API server {server} does not let {right} be watched: {err}; names are answered as \
                 before, what is registered follows as soon as it answers, and it is tried again until then"
            );
        }
    }

    /// It stands.
    pub(super) fn found(&mut self) {
        (self.stood, self.failures) = (true, 0);
        if std::mem::take(&mut self.forbidden) {
            tracing::info!("the Kubernetes API server {} lets this account watch again", self.outages.server);
        }
        if self.no_more_lost() {
            tracing::info!("the Kubernetes API server {} answers again", self.outages.server);
        }
    }

    /// Whether it was the last one that was lost.
    fn no_more_lost(&mut self) -> bool {
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
        self.no_more_lost();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_is_lost_after_two_failures_and_found_when_it_stands() {
        let outages = Outages::new("https://10.0.0.1:6443".into());
        let lost = || *outages.lock();
        let (mut one, mut other) = (outages.watch(), outages.watch());
        one.failed(RestartReason::Unreachable, "refused", "services");
        assert_eq!(lost(), 1, "it never stood");
        one.failed(RestartReason::Unreachable, "refused", "services");
        assert_eq!(lost(), 1);
        other.found();
        other.failed(RestartReason::Unreachable, "reset", "namespaces");
        assert_eq!(lost(), 1, "once is tolerated");
        other.failed(RestartReason::Silent, "no answer", "namespaces");
        assert_eq!(lost(), 2);
        one.found();
        one.found();
        assert_eq!(lost(), 1);
        other.failed(RestartReason::Forbidden, "no right", "namespaces");
        drop(other);
        assert_eq!(lost(), 0, "a watch that is not needed any more");
    }
}
