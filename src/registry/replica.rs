//! What this process knows of the replicas, for readiness, metrics and people.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// What the tasks that speak with Kubernetes have learnt.
#[derive(Debug, Default)]
pub struct ReplicaStatus(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The highest term and generation of a slice that was seen.
    followed: (u64, u64),
    /// When the slices that this process knows were last known to be all there are.
    current: Option<Instant>,
    /// When the holder last renewed the Lease, as far as this process knows.
    lease_renewed: Option<Instant>,
}

impl ReplicaStatus {
    /// The watch of the slices was opened, or has sent something: what was written before it is here.
    pub(crate) fn watch_answered(&self) {
        self.lock().current = Some(Instant::now());
    }

    /// A slice of this term and generation is visible here.
    pub(crate) fn followed(&self, term: u64, generation: u64) {
        let mut state = self.lock();
        state.followed = state.followed.max((term, generation));
    }

    /// By a request that took `since`, the Lease was read: its holder has published this generation in this term. If the
    /// slices show it already, the watch has missed nothing until the request began.
    pub(crate) fn lease_read(&self, since: Duration, term: u64, generation: u64) {
        let mut state = self.lock();
        let began = Instant::now().checked_sub(since);
        if state.followed >= (term, generation) {
            state.current = state.current.max(began);
        }
    }

    /// The Lease was renewed, by this process or another one, so long ago.
    pub(crate) fn lease_renewed(&self, since: Duration) {
        let mut state = self.lock();
        state.lease_renewed = state.lease_renewed.max(Instant::now().checked_sub(since));
    }

    /// How long ago the slices that this process knows were last known to be all there are; `None` before the first list.
    #[must_use]
    pub fn watch_age(&self) -> Option<Duration> {
        self.lock().current.map(|current| current.elapsed())
    }

    /// How long ago the Lease was renewed; `None` if it was not seen.
    #[must_use]
    pub fn lease_age(&self) -> Option<Duration> {
        self.lock().lease_renewed.map(|renewed| renewed.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_proves_that_the_watch_is_current_only_if_its_generation_is_followed() {
        let replica = ReplicaStatus::default();
        assert_eq!((replica.watch_age(), replica.lease_age()), (None, None));
        replica.lock().current = Instant::now().checked_sub(Duration::from_secs(60));
        replica.followed(3, 7);
        replica.followed(3, 5);
        replica.lease_read(Duration::ZERO, 3, 8);
        replica.lease_read(Duration::ZERO, 4, 1);
        assert!(replica.watch_age() >= Some(Duration::from_secs(60)), "something is missing");
        replica.lease_read(Duration::from_secs(5), 3, 7);
        let age = replica.watch_age().expect("known");
        assert!(age >= Duration::from_secs(5) && age < Duration::from_secs(60), "{age:?}");
        replica.lease_read(Duration::from_secs(30), 3, 7);
        assert!(replica.watch_age() < Some(Duration::from_secs(30)), "a slow answer takes nothing back");
    }
}
