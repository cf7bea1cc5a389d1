//! What is registered, for readers: a lock-free map of immutable services.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use super::quota::InstanceCounts;
use crate::{
    model::{Service, ServiceKey},
    replicas::tombstones::Tombstones,
};

/// Every service that has an instance. The writer alone changes it, after the journal is synced;
/// readers see each service as one value and never wait.
#[derive(Debug, Default)]
pub struct Catalog {
    services: papaya::HashMap<ServiceKey, Service, foldhash::fast::RandomState>,
    /// Beside the services, so that one without instances is invisible to every reader.
    tombstones: papaya::HashMap<ServiceKey, Tombstones, foldhash::fast::RandomState>,
    instances: AtomicUsize,
    /// Only the writer's thread takes it.
    counts: Mutex<InstanceCounts>,
    tombstone_count: AtomicUsize,
    /// The generation that is being applied, or was applied last.
    begun: AtomicU64,
    generation: AtomicU64,
}

impl Catalog {
    /// The service as it is now, as an immutable value. O(1).
    #[must_use]
    pub fn get(&self, key: &ServiceKey) -> Option<Service> {
        self.services.pin().get(key).cloned()
    }

    /// Every service, unordered. Not a snapshot: a change during the call may or may not be included.
    /// Each service carries the generation of its last change.
    #[must_use]
    pub fn services(&self) -> Vec<(ServiceKey, Service)> {
        self.services.pin().iter().map(|(key, service)| (key.clone(), service.clone())).collect()
    }

    /// Every service, as [`Catalog::services`] returns them, in order. Blocks, for a second with a
    /// million services. Returns early, with a part of them, when `cancelled` returns true.
    pub(super) fn sorted(&self, cancelled: &dyn Fn() -> bool) -> Vec<(ServiceKey, Service)> {
        /// Services between two calls of `cancelled`.
        const CANCEL_INTERVAL: usize = 1_024;
        let map = self.services.pin();
        let mut services = Vec::with_capacity(map.len());
        for (key, service) in &map {
            if services.len() % CANCEL_INTERVAL == 0 && cancelled() {
                return services;
            }
            services.push((key.clone(), service.clone()));
        }
        services.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        services
    }

    /// The removals in `service` that are remembered; it may have no instance. They are set before the service, so that
    /// a reader who gets the service first finds the tombstone of every instance that is missing in it.
    #[must_use]
    pub fn tombstones(&self, service: &ServiceKey) -> Tombstones {
        self.tombstones.pin().get(service).cloned().unwrap_or_default()
    }

    /// Every service with tombstones, unordered.
    #[must_use]
    pub fn all_tombstones(&self) -> Vec<(ServiceKey, Tombstones)> {
        self.tombstones.pin().iter().map(|(key, tombstones)| (key.clone(), tombstones.clone())).collect()
    }

    /// Every service with an instance or a tombstone, unordered; some twice.
    #[must_use]
    pub fn known_services(&self) -> Vec<ServiceKey> {
        let (services, tombstones) = (self.services.pin(), self.tombstones.pin());
        services.keys().chain(tombstones.keys()).cloned().collect()
    }

    /// Tombstones of all services.
    #[must_use]
    pub fn tombstone_count(&self) -> usize {
        self.tombstone_count.load(Ordering::Relaxed)
    }

    /// Services that have an instance.
    #[must_use]
    pub fn len(&self) -> usize {
        self.services.len()
    }

    /// Whether nothing is registered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Instances of all services.
    #[must_use]
    pub fn instances(&self) -> usize {
        // A number for limits and metrics; nothing is read on its word.
        self.instances.load(Ordering::Relaxed)
    }

    /// Instances by registrant and by namespace.
    pub(super) fn counts(&self) -> MutexGuard<'_, InstanceCounts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The generation that was applied last. All its changes can be read.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The newest generation of which a reader can have seen a change: each is begun before its first change.
    pub(super) fn newest_visible(&self) -> u64 {
        self.begun.load(Ordering::Acquire)
    }

    /// Makes room for so many services more.
    pub(super) fn reserve(&self, services: usize) {
        self.services.pin().reserve(services);
    }

    /// Must come before the first change of `generation`: a service that is removed shows no generation itself.
    pub(super) fn begin_generation(&self, generation: u64) {
        // A reader gets a change from the map after the map has published it, which is after this store.
        self.begun.store(generation, Ordering::Release);
    }

    /// Replaces one service; one without instances is removed.
    pub(super) fn set(&self, key: ServiceKey, service: Service) {
        let map = self.services.pin();
        let after = service.instances.len();
        let before = if after == 0 {
            map.remove(&key).map_or(0, |old| old.instances.len())
        } else {
            map.insert(key, service).map_or(0, |old| old.instances.len())
        };
        // Only the writer's thread stores, so nothing is lost between the load and the store.
        self.instances.store(self.instances() + after - before, Ordering::Relaxed);
    }

    /// Replaces the tombstones of one service. Must come before [`Catalog::set`] of the same batch.
    pub(super) fn set_tombstones(&self, key: ServiceKey, tombstones: Tombstones) {
        let map = self.tombstones.pin();
        let after = tombstones.len();
        let replaced = if tombstones.is_empty() { map.remove(&key) } else { map.insert(key, tombstones) };
        let before = replaced.map_or(0, Tombstones::len);
        self.tombstone_count.store(self.tombstone_count() + after - before, Ordering::Relaxed);
    }

    /// Publishes `generation`; all its services must have been set.
    pub(super) fn set_generation(&self, generation: u64) {
        // Pairs with `generation()`: whoever reads the number finds its services in the map.
        self.generation.store(generation, Ordering::Release);
    }
}

#[cfg(test)]
impl Catalog {
    /// A catalog that holds `services`, for tests of its readers.
    pub(crate) fn of(services: impl IntoIterator<Item = (ServiceKey, Service)>) -> Self {
        let catalog = Self::default();
        services.into_iter().for_each(|(key, service)| catalog.set(key, service));
        catalog
    }
}
