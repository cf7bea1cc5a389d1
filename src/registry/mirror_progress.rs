//! The services whose latest change is not in Kubernetes yet, and the responses that wait for them.
//!
//! The writer marks a service as dirty before it answers a change of the service. The mirror takes the
//! dirty services, writes them and confirms the generation that it wrote; then the service is removed
//! here. Without a mirror no service is ever behind.

use std::{
    collections::{HashMap, HashSet},
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Notify, oneshot};

use crate::model::{Address, ServiceKey, UnixMillis};

/// Which services are behind: their latest change is not in Kubernetes.
#[derive(Debug)]
pub struct MirrorProgress {
    /// Whether there is a mirror.
    mirrored: bool,
    unmirrored: Mutex<Unmirrored>,
    changed: Notify,
    /// Callers of [`MirrorProgress::still_writes`].
    askers: Mutex<Vec<oneshot::Sender<()>>>,
    asked: Notify,
}

#[derive(Debug, Default)]
struct Unmirrored {
    services: HashMap<ServiceKey, ServiceProgress, foldhash::fast::RandomState>,
    dirty: DirtyServices,
}

/// Services that were marked since the last [`MirrorProgress::take_dirty`], each once in a list.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct DirtyServices {
    /// They changed.
    pub changed: Vec<ServiceKey>,
    /// Their instances were registered again as they were.
    pub repeated: Vec<ServiceKey>,
    /// They changed by words of other processes.
    pub merged: Vec<ServiceKey>,
    /// DNS names that are instances of them lead elsewhere. Nothing was registered: they are not behind.
    pub resolved: HashSet<ServiceKey>,
}

impl DirtyServices {
    /// All that are behind.
    fn behind(&self) -> impl Iterator<Item = &ServiceKey> {
        let Self { changed, repeated, merged, resolved: _ } = self;
        changed.iter().chain(repeated).chain(merged)
    }
}

/// Whether a service is in a list of [`DirtyServices`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Queued {
    No,
    Merged,
    Repeated,
    Changed,
}

/// One service that is behind.
#[derive(Debug)]
struct ServiceProgress {
    /// The generation of its last change.
    generation: u64,
    /// When the oldest change that is not mirrored was received.
    since: UnixMillis,
    queued: Queued,
    waiters: Vec<Waiter>,
    /// The part that Kubernetes has, while the API server refuses some of the slices.
    partial: PartialConfirmation,
}

/// A caller that waits for a generation of a service.
#[derive(Debug)]
struct Waiter {
    generation: u64,
    /// The address that was registered or removed.
    address: Address,
    sender: oneshot::Sender<()>,
}

/// The slices up to a generation, except the addresses in refused slices.
#[derive(Debug, Default)]
struct PartialConfirmation {
    generation: u64,
    outdated: HashSet<Address>,
}

impl PartialConfirmation {
    fn covers(&self, generation: u64, address: &Address) -> bool {
        generation <= self.generation && !self.outdated.contains(address)
    }
}

/// Callers who ask whether this process still writes.
#[derive(Debug)]
pub struct Askers(Vec<oneshot::Sender<()>>);

impl Askers {
    /// No other process had taken over by the time at which they were [taken](MirrorProgress::take_askers).
    pub fn answer(self) {
        // A caller that timed out has dropped its receiver.
        for asker in self.0 {
            let _ = asker.send(());
        }
    }
}

/// How far behind the mirror is as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MirrorLag {
    /// Services whose latest change is not in Kubernetes.
    pub services: usize,
    /// When the oldest change that is not in Kubernetes was received.
    pub since: Option<UnixMillis>,
}

impl MirrorProgress {
    pub(super) fn new(mirrored: bool) -> Self {
        let (unmirrored, askers) = (Mutex::default(), Mutex::default());
        Self { mirrored, unmirrored, changed: Notify::new(), askers, asked: Notify::new() }
    }

    /// Whether there is a mirror; without one no service is ever behind.
    #[must_use]
    pub fn is_mirrored(&self) -> bool {
        self.mirrored
    }

    /// Every service whose latest change is not in Kubernetes, for a mirror that begins.
    pub(super) fn unmirrored(&self) -> Vec<ServiceKey> {
        self.lock().services.keys().cloned().collect()
    }

    /// Marks services as changed, or as repeated, with the generation and the time of receipt.
    pub(super) fn mark_dirty(
        &self,
        changed: impl IntoIterator<Item = (ServiceKey, u64, UnixMillis)>,
        repeated: impl IntoIterator<Item = (ServiceKey, u64, UnixMillis)>,
    ) {
        if !self.mirrored {
            return;
        }
        let changed = changed.into_iter().map(|one| (one, Queued::Changed));
        self.mark(changed.chain(repeated.into_iter().map(|one| (one, Queued::Repeated))));
    }

    /// Marks services as changed by words of other processes. Nothing that was said here waits for those.
    pub(super) fn mark_merged(&self, merged: impl IntoIterator<Item = (ServiceKey, u64, UnixMillis)>) {
        if self.mirrored {
            self.mark(merged.into_iter().map(|one| (one, Queued::Merged)));
        }
    }

    /// Marks services with a DNS name that leads elsewhere.
    pub(super) fn mark_resolved(&self, services: Vec<ServiceKey>) {
        if self.mirrored && !services.is_empty() {
            // A set, because nobody takes them while another process writes.
            self.lock().dirty.resolved.extend(services);
            self.changed.notify_one();
        }
    }

    fn mark(&self, marked: impl Iterator<Item = ((ServiceKey, u64, UnixMillis), Queued)>) {
        let mut unmirrored = self.lock();
        let Unmirrored { services, dirty } = &mut *unmirrored;
        for ((service, generation, received), how) in marked {
            let progress = services.entry(service.clone()).or_insert_with(|| ServiceProgress {
                generation,
                since: received,
                queued: Queued::No,
                waiters: Vec::new(),
                partial: PartialConfirmation::default(),
            });
            progress.generation = progress.generation.max(generation);
            // In the most urgent list only: a change of this process must not wait among repetitions or merged words.
            if progress.queued < how {
                progress.queued = how;
                match how {
                    Queued::Changed => dirty.changed.push(service),
                    Queued::Repeated => dirty.repeated.push(service),
                    Queued::Merged | Queued::No => dirty.merged.push(service),
                }
            }
        }
        drop(unmirrored);
        // Outside of the lock, which the woken task takes at once. A permit is kept if nobody waits, so no mark is missed.
        self.changed.notify_one();
    }

    /// Services that were marked since the last call; waits until there is one. Each service is returned to
    /// one caller only. Cancelling loses nothing.
    pub async fn take_dirty(&self) -> DirtyServices {
        loop {
            let dirty = {
                let mut unmirrored = self.lock();
                let Unmirrored { services, dirty } = &mut *unmirrored;
                let dirty = mem::take(dirty);
                for service in dirty.behind() {
                    services.entry(service.clone()).and_modify(|progress| progress.queued = Queued::No);
                }
                dirty
            };
            // A permit may be left from marks that an earlier call has taken: then there is nothing, and it waits.
            if dirty != DirtyServices::default() {
                return dirty;
            }
            self.changed.notified().await;
        }
    }

    /// Records that Kubernetes has `service` up to `generation`. Returns whether the service was behind.
    pub(super) fn confirm(&self, service: &ServiceKey, generation: u64) -> bool {
        let mut unmirrored = self.lock();
        let Some(progress) = unmirrored.services.get_mut(service) else { return false };
        let (reached, waiters): (Vec<_>, Vec<_>) =
            mem::take(&mut progress.waiters).into_iter().partition(|waiter| waiter.generation <= generation);
        // Only the latest change makes it up to date. A change during the write keeps it here, with its waiters.
        if progress.generation <= generation {
            unmirrored.services.remove(service);
        } else {
            progress.waiters = waiters;
            // Later times of receipt are not kept: the lag is underestimated by the time of one write.
            progress.since = UnixMillis::now();
        }
        drop(unmirrored);
        // A waiter that timed out has dropped its receiver.
        for waiter in reached {
            let _ = waiter.sender.send(());
        }
        true
    }

    /// Records that Kubernetes has the slices of `service` up to `generation`, except those with
    /// `outdated` addresses. The service stays behind until the mirror confirms all of it.
    pub fn confirm_slices(&self, service: &ServiceKey, generation: u64, outdated: HashSet<Address>) {
        let mut unmirrored = self.lock();
        let Some(progress) = unmirrored.services.get_mut(service) else { return };
        progress.partial = PartialConfirmation { generation, outdated };
        let (reached, waiters): (Vec<_>, Vec<_>) = mem::take(&mut progress.waiters)
            .into_iter()
            .partition(|waiter| progress.partial.covers(waiter.generation, &waiter.address));
        progress.waiters = waiters;
        drop(unmirrored);
        for waiter in reached {
            let _ = waiter.sender.send(());
        }
    }

    /// Completes when Kubernetes has the slice of `address` as of `generation` of `service`: at once if
    /// the service is not behind. There is no timeout; dropping the future ends the wait.
    pub fn confirmed(
        &self,
        service: &ServiceKey,
        generation: u64,
        address: Address,
    ) -> impl Future<Output = ()> + Send + use<> {
        let receiver = {
            let mut unmirrored = self.lock();
            unmirrored.services.get_mut(service).and_then(|progress| {
                // A generation after the last change of the service has the same slices.
                let generation = generation.min(progress.generation);
                if progress.partial.covers(generation, &address) {
                    return None;
                }
                if progress.waiters.len() == progress.waiters.capacity() {
                    // Drop cancelled waiters only when the list is full, then let it double before the
                    // next sweep: amortised O(1), though thousands may wait for one service.
                    progress.waiters.retain(|waiter| !waiter.sender.is_closed());
                    progress.waiters.reserve(progress.waiters.len());
                }
                let (sender, receiver) = oneshot::channel();
                progress.waiters.push(Waiter { generation, address, sender });
                Some(receiver)
            })
        };
        async move {
            if let Some(receiver) = receiver {
                // An error means that the registry has ended, so that no confirmation can follow.
                let _ = receiver.await;
            }
        }
    }

    /// Completes when it is certain that no other process had taken over by the time of this call. For an answer that no slice
    /// confirms. There is no timeout; dropping the future ends the wait.
    pub fn still_writes(&self) -> impl Future<Output = ()> + Send + use<> {
        let (sender, certain) = oneshot::channel();
        let mut askers = lock(&self.askers);
        if askers.len() == askers.capacity() {
            // As for the waiters of a service.
            askers.retain(|asker| !asker.is_closed());
            let held = askers.len();
            askers.reserve(held);
        }
        askers.push(sender);
        drop(askers);
        self.asked.notify_one();
        async move {
            if certain.await.is_err() {
                // Kubernetes is not written to any more.
                std::future::pending::<()>().await;
            }
        }
    }

    /// The callers of [`MirrorProgress::still_writes`] since the last call; waits until there is one. Cancelling loses nothing.
    pub async fn take_askers(&self) -> Askers {
        loop {
            let askers = mem::take(&mut *lock(&self.askers));
            if !askers.is_empty() {
                return Askers(askers);
            }
            self.asked.notified().await;
        }
    }

    /// Whether the latest change of `service` is not in Kubernetes.
    pub(super) fn is_behind(&self, service: &ServiceKey) -> bool {
        self.lock().services.contains_key(service)
    }

    /// How far behind the mirror is. O(services that are behind), under the lock.
    #[must_use]
    pub fn lag(&self) -> MirrorLag {
        let unmirrored = self.lock();
        MirrorLag {
            services: unmirrored.services.len(),
            since: unmirrored.services.values().map(|progress| progress.since).min(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Unmirrored> {
        lock(&self.unmirrored)
    }
}

fn lock<T>(guarded: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds a lock, so a poisoned one guards a consistent state.
    guarded.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::model::Validator;

    fn key(name: &str) -> ServiceKey {
        Validator { zone_wire_len: 15, names_allowed: false }.service("prod", name).expect("valid")
    }

    fn name() -> Address {
        Address::parse("db.example.com").expect("a name")
    }

    fn changed(services: &[&str]) -> DirtyServices {
        DirtyServices { changed: services.iter().map(|service| key(service)).collect(), ..DirtyServices::default() }
    }

    #[test]
    fn repeated_service_that_changes_is_changed() {
        let mirror_progress = MirrorProgress::new(true);
        let [web, db] = ["web", "db"].map(|service| (key(service), 7, UnixMillis(1)));
        mirror_progress.mark_dirty([], [web.clone(), db.clone(), web.clone()]);
        mirror_progress.mark_dirty([db.clone()], [web.clone(), db]);
        let dirty = mirror_progress.take_dirty().now_or_never().expect("there are some");
        assert_eq!((dirty.changed, dirty.repeated), (vec![key("db")], vec![key("web"), key("db")]));
        mirror_progress.mark_dirty([], [web]);
        let dirty = mirror_progress.take_dirty().now_or_never().expect("marked again");
        assert_eq!((dirty.changed.len(), dirty.repeated), (0, vec![key("web")]));
    }

    #[test]
    fn merged_service_that_changes_is_changed() {
        let mirror_progress = MirrorProgress::new(true);
        let [web, db] = ["web", "db"].map(|service| (key(service), 7, UnixMillis(1)));
        mirror_progress.mark_merged([web, db.clone()]);
        mirror_progress.mark_dirty([db.clone()], []);
        mirror_progress.mark_merged([db]);
        let dirty = mirror_progress.take_dirty().now_or_never().expect("there are some");
        assert_eq!((dirty.changed, dirty.merged), (vec![key("db")], vec![key("web"), key("db")]));
        assert_eq!(mirror_progress.lag().services, 2);
    }

    #[test]
    fn waiters_complete_when_their_generation_is_confirmed() {
        let mirror_progress = MirrorProgress::new(true);
        mirror_progress.mark_dirty([(key("web"), 7, UnixMillis(1)), (key("db"), 7, UnixMillis(2))], []);
        mirror_progress.mark_dirty([(key("web"), 8, UnixMillis(3))], []);
        assert_eq!(mirror_progress.take_dirty().now_or_never(), Some(changed(&["web", "db"])));
        assert_eq!(mirror_progress.take_dirty().now_or_never(), None);
        assert_eq!(mirror_progress.lag(), MirrorLag { services: 2, since: Some(UnixMillis(1)) });

        let mut seven = Box::pin(mirror_progress.confirmed(&key("web"), 7, name()));
        let mut eight = Box::pin(mirror_progress.confirmed(&key("web"), 8, name()));
        assert!(mirror_progress.confirm(&key("web"), 7));
        assert_eq!((seven.as_mut().now_or_never(), eight.as_mut().now_or_never()), (Some(()), None));
        mirror_progress.mark_dirty([(key("web"), 9, UnixMillis(4))], []);
        assert_eq!(mirror_progress.take_dirty().now_or_never(), Some(changed(&["web"])));
        assert!(mirror_progress.confirm(&key("web"), 9));
        assert_eq!(eight.now_or_never(), Some(()));
        assert!(!mirror_progress.confirm(&key("web"), 9), "it was not behind any more");
        assert_eq!(mirror_progress.confirmed(&key("web"), 9, name()).now_or_never(), Some(()));
        assert_eq!(mirror_progress.lag().services, 1);
    }

    #[test]
    fn cancelled_waiters_are_dropped() {
        let mirror_progress = MirrorProgress::new(true);
        mirror_progress.mark_dirty([(key("web"), 7, UnixMillis(1))], []);
        let mut patient = Vec::new();
        for n in 0..10_000 {
            let waits = Box::pin(mirror_progress.confirmed(&key("web"), 7, name()));
            if n % 100 == 0 {
                patient.push(waits);
            }
        }
        let held = mirror_progress.lock().services[&key("web")].waiters.len();
        assert!((100..1_000).contains(&held), "{held} are held for {} that wait", patient.len());
        assert!(mirror_progress.confirm(&key("web"), 7));
        assert!(patient.into_iter().all(|waits| waits.now_or_never() == Some(())));
    }

    #[test]
    fn nothing_is_behind_without_a_mirror() {
        let mirror_progress = MirrorProgress::new(false);
        mirror_progress.mark_dirty([(key("web"), 7, UnixMillis(1))], []);
        assert_eq!(mirror_progress.confirmed(&key("web"), 7, name()).now_or_never(), Some(()));
        assert_eq!(mirror_progress.lag(), MirrorLag::default());
    }

    #[test]
    fn registration_waits_for_its_own_slice_only() {
        let mirror_progress = MirrorProgress::new(true);
        let [refused, accepted] = ["10.0.0.1", "10.0.0.2"].map(|text| Address::parse(text).expect("an address"));
        mirror_progress.mark_dirty([(key("web"), 7, UnixMillis(1))], []);
        let waiters = || {
            [&refused, &accepted, &name()]
                .map(Address::clone)
                .map(|address| mirror_progress.confirmed(&key("web"), 7, address).now_or_never())
        };
        assert_eq!(waiters(), [None; 3]);
        let mut early = [refused.clone(), accepted.clone()]
            .map(|address| Box::pin(mirror_progress.confirmed(&key("web"), 7, address)));
        mirror_progress.confirm_slices(&key("web"), 7, [refused.clone()].into());
        assert_eq!(early.each_mut().map(|waiter| waiter.as_mut().now_or_never()), [None, Some(())]);
        // The same holds for later waiters, and for a later generation that did not change the service.
        assert_eq!(waiters(), [None, Some(()), Some(())]);
        assert_eq!(mirror_progress.confirmed(&key("web"), 9, accepted.clone()).now_or_never(), Some(()));
        assert_eq!(mirror_progress.lag().services, 1, "the service is behind nevertheless");
        mirror_progress.mark_dirty([(key("web"), 8, UnixMillis(1))], []);
        assert_eq!(mirror_progress.confirmed(&key("web"), 8, accepted.clone()).now_or_never(), None);
        assert!(mirror_progress.confirm(&key("web"), 8));
        assert_eq!(waiters(), [Some(()); 3]);
    }
}
