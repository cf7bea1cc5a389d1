//! What this process knows of the replicas, for readiness, metrics and people.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::{Phase, Status};
use crate::{
    metrics::Metrics,
    model::{Replica, ReplicaRole, ServerAddress, UnixMillis},
    replicas::election::LEASE_DURATION,
};

/// What the tasks that speak with Kubernetes have learnt.
#[derive(Debug)]
pub struct ReplicaStatus {
    state: Mutex<ReplicaState>,
    role: watch::Sender<CurrentRole>,
}

/// What this process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CurrentRole {
    pub(crate) role: ReplicaRole,
    /// The highest term that was seen: of the writer, its own.
    pub(crate) term: u64,
    /// Since when the role is this.
    pub(crate) since: UnixMillis,
}

#[derive(Debug, Default)]
struct ReplicaState {
    /// As the Lease names its holder.
    name: String,
    /// Where this process takes registrations when it writes.
    addresses: Vec<ServerAddress>,
    /// The highest term and generation of a slice that was seen.
    followed: (u64, u64),
    /// The term and generation of the Lease as it was last read.
    lease: (u64, u64),
    /// The Lease when the watch was last opened.
    opened: (u64, u64),
    /// No slice shows this term and generation of the Lease, and none is missing: see [`ReplicaStatus::watch_opened`].
    unwritten: (u64, u64),
    /// When the slices that this process knows were last known to be all there are.
    current: Option<Instant>,
    /// When the holder last renewed the Lease, as far as this process knows.
    lease_renewed: Option<Instant>,
}

impl Default for ReplicaStatus {
    fn default() -> Self {
        let role = CurrentRole { role: ReplicaRole::Alone, term: 0, since: UnixMillis::now() };
        Self { state: Mutex::default(), role: watch::Sender::new(role) }
    }
}

impl ReplicaStatus {
    /// This process is one of several, which know it by this name.
    pub(crate) fn set_name(&self, name: String, addresses: Vec<ServerAddress>) {
        let mut state = self.lock();
        (state.name, state.addresses) = (name, addresses);
    }

    /// What this process is now, and the highest term that it has seen.
    pub(crate) fn set_role(&self, role: ReplicaRole, term: u64) {
        self.role.send_if_modified(|current| {
            let CurrentRole { role: before, term: known, since } = *current;
            let since = if before == role { since } else { UnixMillis::now() };
            *current = CurrentRole { role, term, since };
            (before, known) != (role, term)
        });
    }

    /// A receiver of what this process is, now and later.
    pub(crate) fn watch_role(&self) -> watch::Receiver<CurrentRole> {
        self.role.subscribe()
    }

    /// Whether this process holds the Lease and writes.
    #[must_use]
    pub fn is_writer(&self) -> bool {
        self.role() == ReplicaRole::Writer
    }

    /// What this process is.
    #[must_use]
    pub fn role(&self) -> ReplicaRole {
        self.role.borrow().role
    }

    /// The watch of the slices was opened: what was written before is here, or on its way.
    ///
    /// Not every generation of the Lease is in a slice: that with which a term began is in none, if the new writer had nothing to
    /// write; that of a slice that was deleted, or of a service that cannot be mirrored, is in none either. So what no slice showed
    /// from one opening to the next is not waited for any more, or the watch would be opened again and again.
    pub(crate) fn watch_opened(&self) {
        let mut state = self.lock();
        state.current = Some(Instant::now());
        if state.opened == state.lease {
            state.unwritten = state.lease;
        }
        state.opened = state.lease;
    }

    /// The watch of the slices has sent something: what was written before it is here.
    pub(crate) fn watch_answered(&self) {
        self.lock().current = Some(Instant::now());
    }

    /// A slice of this term and generation is visible here.
    pub(crate) fn followed(&self, term: u64, generation: u64) {
        let mut state = self.lock();
        if state.followed < (term, generation) {
            state.followed = (term, generation);
            // The writer is behind with its slices: they come after their generation.
            (state.opened, state.unwritten) = Default::default();
        }
    }

    /// By a request that took `since`, the Lease was read: its holder has published this generation in this term. If the
    /// slices show it already, or none does, the watch has missed nothing until the request began.
    pub(crate) fn lease_read(&self, since: Duration, term: u64, generation: u64) {
        let mut state = self.lock();
        // The begin of the request, not its end: the Lease is as old as the request may have been on its way.
        let began = Instant::now().checked_sub(since);
        state.lease = (term, generation);
        if state.followed.max(state.unwritten) >= (term, generation) {
            // Never back: another proof may be newer.
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

    fn lock(&self) -> MutexGuard<'_, ReplicaState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Status {
    /// What this process says of itself.
    #[must_use]
    pub fn describe(&self, metrics: &Metrics) -> Replica {
        let replica = self.replica();
        let CurrentRole { role, term, since } = *replica.role.borrow();
        let (age, lease_age) = (self.staleness(), replica.lease_age());
        let state = replica.lock();
        let (writer, writer_addresses) = match self.phase() {
            // Nobody counts on a Lease that was not renewed for so long.
            Phase::Standby(holder) if lease_age.is_none_or(|age| age < LEASE_DURATION) => {
                (holder.name.clone(), holder.addresses.clone())
            }
            _ if role == ReplicaRole::Writer => (state.name.clone(), state.addresses.clone()),
            _ => (String::new(), Vec::new()),
        };
        Replica {
            name: state.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            role,
            since,
            term,
            generation: if role == ReplicaRole::Standby { state.followed.1 } else { metrics.registry.generation() },
            age_seconds: age.map(|age| age.as_secs_f64()),
            lease_age_seconds: lease_age.map(|age| age.as_secs_f64()),
            // The gauge keeps its value when this process writes no more.
            services_behind: if role == ReplicaRole::Writer { metrics.mirror.behind.get() } else { 0 },
            outbox_words: metrics.registry.outbox(),
            addresses: state.addresses.clone(),
            writer,
            writer_addresses,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::registry::LeaseHolder;

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

    #[test]
    fn generation_that_no_slice_shows_is_waited_for_until_the_watch_was_opened_twice() {
        let replica = ReplicaStatus::default();
        let is_current = |term, generation| {
            replica.lock().current = Instant::now().checked_sub(Duration::from_secs(60));
            replica.lease_read(Duration::ZERO, term, generation);
            replica.watch_age() < Some(Duration::from_secs(30))
        };
        replica.followed(3, 7);
        replica.watch_opened();
        assert!(is_current(3, 7));
        // A take-over after which nothing is written.
        for _ in 0..2 {
            assert!(!is_current(4, 9));
            replica.watch_opened();
        }
        assert!(is_current(4, 9));
        assert!(!is_current(4, 10), "a registration");
        replica.followed(4, 10);
        assert!(is_current(4, 10));
        // The writer publishes more than it can write.
        assert!(!is_current(4, 30));
        replica.watch_opened();
        replica.followed(4, 20);
        replica.watch_opened();
        assert!(!is_current(4, 30));
    }

    #[test]
    fn writer_is_named_as_long_as_its_lease_lasts() {
        let holder = LeaseHolder { name: "other".into(), addresses: Vec::new() };
        let status = Status::at(Phase::Standby(Arc::new(holder)));
        status.replica().set_role(ReplicaRole::Standby, 1);
        let writer = || status.describe(&Metrics::new()).writer;
        assert_eq!(writer(), "other", "it was never seen to renew");
        status.replica().lease_renewed(LEASE_DURATION + Duration::from_secs(1));
        assert_eq!(writer(), "");
        status.replica().lease_renewed(Duration::from_secs(1));
        assert_eq!(writer(), "other");
    }

    #[test]
    fn answers_of_a_process_that_gave_the_lease_up_grow_old_in_every_phase() {
        let failed = || Phase::StorageFailed("No space left on device".into());
        for (phase, role, follows) in [
            (Phase::Standby(Default::default()), ReplicaRole::Standby, true),
            (failed(), ReplicaRole::Writer, false),
            (failed(), ReplicaRole::Standby, true),
            (failed(), ReplicaRole::Alone, false),
            (Phase::Draining, ReplicaRole::Writer, false),
            (Phase::Draining, ReplicaRole::Standby, true),
            (Phase::Ready, ReplicaRole::Writer, false),
        ] {
            let status = Status::at(phase);
            status.replica().set_role(role, 1);
            status.replica().watch_answered();
            assert_eq!(status.staleness(), None, "nothing was listed");
            status.set_readable();
            assert_eq!(status.staleness().is_some(), follows, "{:?} {role:?}", status.phase());
        }
    }
}
