//! What the cluster holds: the state that the watches report and our own writes leave.
//!
//! The watches apply [`ObjectEvent`]s; the mirror applies what it wrote, so that its next reconcile
//! does not wait for the watch; the newer version wins ([`object_store`]). The mirror reads one
//! service at a time ([`ClusterCache::observe`]) and waits for keys to reconcile
//! ([`ClusterCache::changed`]). The `apply_` functions return the facts for the registry.
//!
//! Memory is in proportion to what is ours: an [`ObservedSlice`] for each of our slices, the object
//! for each of our Services; of other Services key, uid and version, and nothing of objects whose
//! name no service of ours can have. Nothing here makes requests.

mod entries;
mod event;
mod late_writes;
mod object_store;
mod state;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashSet},
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use k8s_openapi::api::{
    core::v1::{Endpoints, Namespace, Service},
    discovery::v1::EndpointSlice,
};
use tokio::sync::{Notify, watch};

pub(super) use self::{
    entries::CachedSlice,
    event::ObjectEvent,
    late_writes::LateWrites,
    object_store::{Applied, CachedObject, ObjectStore},
};
use self::{
    entries::{CachedEndpoints, CachedNamespace, CachedService, service_key},
    state::CacheState,
};
use super::objects::{services::Ownership, slices::ObservedSlice};
use crate::{model::ServiceKey, registry::ClusterFact};

/// Whether objects can be created in a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NamespaceState {
    /// The namespaces are not listed yet.
    Unknown,
    /// It does not exist.
    Absent,
    /// It exists.
    Active,
    /// It is being deleted: nothing can be created in it.
    Terminating,
}

/// Whether the Service of a service exists, and whose it is.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ServiceState {
    /// The Services are not listed yet.
    Unknown,
    /// It does not exist.
    Absent,
    /// Gangplank created it. Without its managed fields.
    Ours(Arc<Service>),
    /// Another owner's, who lets external instances join its endpoints.
    Joined {
        /// Of the Service.
        uid: Box<str>,
    },
    /// Another owner's.
    Foreign,
}

/// What the cluster holds of one service.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ObservedState {
    pub(super) namespace: NamespaceState,
    pub(super) service: ServiceState,
    /// Our slices, in order of their names.
    pub(super) slices: Vec<ObservedSlice>,
    /// Whether our slices were listed: before, there may be more than [`slices`](Self::slices).
    pub(super) listed: bool,
    /// Names of slices that another writer has taken, as far as a write met them.
    pub(super) occupied: HashSet<String>,
}

/// A key to reconcile.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum ChangedKey {
    /// A namespace was created, is being deleted or is gone. Its services with objects in
    /// Kubernetes have keys of their own beside it.
    Namespace(Box<str>),
    /// The Service or the slices of a service changed.
    Service(ServiceKey),
    /// An annotation of the namespace became invalid. There is nothing to reconcile.
    Annotation {
        /// The namespace.
        namespace: Box<str>,
        /// The annotation's name.
        annotation: &'static str,
    },
}

/// What the cluster holds.
#[derive(Debug)]
pub(super) struct ClusterCache {
    state: Mutex<CacheState>,
    notify: Notify,
    joined: watch::Sender<BTreeSet<ServiceKey>>,
    owner_changes: watch::Sender<u64>,
}

impl ClusterCache {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::new(CacheState::new()),
            notify: Notify::new(),
            joined: watch::Sender::default(),
            owner_changes: watch::Sender::default(),
        }
    }

    /// What the cluster holds of `service`.
    pub(super) fn observe(&self, service: &ServiceKey) -> ObservedState {
        let state = self.lock();
        let namespace = match state.namespaces.get(service.namespace()) {
            Some(CachedNamespace { terminating: true, .. }) => NamespaceState::Terminating,
            Some(_) => NamespaceState::Active,
            // Absence is known only after a complete list. Before it nothing may be created or deleted for it.
            None if state.namespaces.is_complete() => NamespaceState::Absent,
            None => NamespaceState::Unknown,
        };
        let service_state = match state.services.get(service) {
            // Only a Service of ours has its object kept.
            Some(CachedService { object: Some(object), .. }) => ServiceState::Ours(Arc::clone(object)),
            Some(CachedService { ownership: Ownership::Joined, uid, .. }) => ServiceState::Joined { uid: uid.clone() },
            Some(_) => ServiceState::Foreign,
            None if state.services.is_complete() => ServiceState::Absent,
            None => ServiceState::Unknown,
        };
        ObservedState {
            namespace,
            service: service_state,
            slices: state.slices_of(service).cloned().collect(),
            listed: state.slices.is_complete(),
            occupied: state.occupied.get(service).cloned().unwrap_or_default(),
        }
    }

    /// Every service with a Service of ours or with slices of ours.
    pub(super) fn managed_services(&self) -> Vec<ServiceKey> {
        let state = self.lock();
        let mut all: BTreeSet<&ServiceKey> = state.slice_names.keys().collect();
        all.extend(state.services.keys().filter(|key| state.services.get(key).is_some_and(|one| one.object.is_some())));
        all.into_iter().cloned().collect()
    }

    /// Waits for changes by others than the mirror, and returns their keys, each once. Cancel-safe;
    /// for one caller at a time.
    pub(super) async fn changed(&self) -> Vec<ChangedKey> {
        loop {
            let changed = mem::take(&mut self.lock().changed);
            if !changed.is_empty() {
                return changed.into_iter().collect();
            }
            // A change since the lock was released has left a permit.
            self.notify.notified().await;
        }
    }

    /// The Services that external instances joined; the channel reports changes.
    pub(super) fn joined(&self) -> watch::Receiver<BTreeSet<ServiceKey>> {
        self.joined.subscribe()
    }

    /// Changes whenever a Service with slices of ours becomes foreign, or stops being so.
    pub(super) fn owner_changes(&self) -> watch::Receiver<u64> {
        self.owner_changes.subscribe()
    }

    /// Whether a Service of this name belongs to somebody else. Slices of ours under it are a forgery, or left behind.
    pub(super) fn is_foreign(&self, key: &ServiceKey) -> bool {
        self.lock().services.get(key).is_some_and(|known| known.ownership == Ownership::Foreign)
    }

    /// Applies events of the watch of namespaces.
    pub(super) fn apply_namespaces(&self, events: Vec<ObjectEvent<Namespace>>) -> Vec<ClusterFact> {
        self.update(|state| state.apply_namespaces(events))
    }

    /// Applies events of the watch of Services.
    pub(super) fn apply_services(&self, events: Vec<ObjectEvent<Service>>) -> Vec<ClusterFact> {
        let mut joined = Vec::new();
        let (facts, owner_changes) = self.update(|state| {
            let facts = state.apply_services(events, &mut joined);
            (facts, state.owner_changes)
        });
        // Outside of the lock: a receiver that wakes reads the cache at once.
        self.owner_changes.send_if_modified(|seen| std::mem::replace(seen, owner_changes) != owner_changes);
        self.joined.send_if_modified(|all| {
            let changed = |(key, is): (ServiceKey, bool)| if is { all.insert(key) } else { all.remove(&key) };
            // No `any()`, which would stop at the first change and leave the rest unapplied.
            joined.into_iter().map(changed).fold(false, |any, one| any | one)
        });
        facts
    }

    /// Applies events of the watch of our slices.
    pub(super) fn apply_slices(&self, events: Vec<ObjectEvent<CachedSlice>>) {
        self.update(|state| state.apply_slices(events));
    }

    /// The slice of an event, unless its content is what the cache has.
    pub(super) fn new_slice<'a>(&self, event: &'a ObjectEvent<CachedSlice>) -> Option<&'a ObservedSlice> {
        let CachedSlice { key, observed: Some(observed), .. } = event.object()? else { return None };
        let is_known = self.lock().slices.get(key).is_some_and(|known| known.same_content(observed));
        (!is_known).then_some(observed)
    }

    /// Applies events of the watch of our Endpoints objects.
    pub(super) fn apply_endpoints(&self, events: Vec<ObjectEvent<Endpoints>>) {
        self.update(|state| state.apply_endpoints(events));
    }

    /// We wrote an Endpoints object: the watch reports no change of it.
    pub(super) fn endpoints_written(&self, endpoints: &Endpoints) {
        if let Some((key, cached)) = CachedEndpoints::read(&endpoints.metadata) {
            // What it replaces is of no interest: the mirror has just written it.
            let _ = self.lock().endpoints.apply(key, cached);
        }
    }

    /// We deleted the Endpoints object with this uid.
    pub(super) fn endpoints_deleted(&self, service: &ServiceKey, uid: &str) {
        let _ = self.lock().endpoints.remove(service, uid);
    }

    /// Applies a slice that we wrote or read. It is no change for the mirror, which knows it.
    pub(super) fn slice_written(&self, slice: &EndpointSlice) {
        if let Some(CachedSlice { key, observed: Some(observed), .. }) = CachedSlice::read(slice) {
            let _ = self.lock().apply_slice(key, observed, false);
        }
    }

    /// We deleted the slice with this uid, or found that it is gone.
    pub(super) fn slice_deleted(&self, namespace: &str, name: &str, uid: &str) {
        let mut state = self.lock();
        if let Some(deleted) = state.slices.remove(&(namespace.into(), name.into()), uid) {
            state.forget_slice(&deleted.service, name);
        }
    }

    /// Applies a Service that we wrote or read.
    ///
    /// Only the watch decides whose a Service is, because the registry has to learn it too: an
    /// answer with another owner is ignored, and the watch reports the same later.
    pub(super) fn service_written(&self, service: &Service) {
        let Some(key) = service_key(&service.metadata) else { return };
        let mut state = self.lock();
        let known = state.services.get(&key);
        let Some(cached) = CachedService::read(service.clone(), known) else { return };
        let was_others = known.is_some_and(|known| known.ownership != Ownership::Ours);
        // An answer to our own write may be older than what the watch has shown: it never takes a Service over.
        if cached.ownership == Ownership::Ours && !was_others {
            let _ = state.services.apply(key, cached);
        }
    }

    /// The uid of the Service of this name, whoever owns it.
    pub(super) fn service_uid(&self, key: &ServiceKey) -> Option<String> {
        self.lock().services.get(key).map(|cached| cached.uid.clone().into())
    }

    /// Tells a namespace from an earlier one of the same name.
    pub(super) fn namespace_uid(&self, name: &str) -> Option<String> {
        self.lock().namespaces.get(name).map(|cached| cached.uid.clone().into())
    }

    /// We deleted the Service with this uid, or found that it is gone.
    pub(super) fn service_deleted(&self, key: &ServiceKey, uid: &str) {
        let mut state = self.lock();
        // A Service that somebody made under the same name since is not ours to forget.
        if state.services.get(key).is_some_and(|known| known.ownership == Ownership::Ours) {
            let _ = state.services.remove(key, uid);
        }
    }

    /// Another writer has a slice of the name that we wanted for `service`.
    pub(super) fn mark_occupied(&self, service: &ServiceKey, slice: &str) {
        self.lock().occupied.entry(service.clone()).or_default().insert(slice.into());
    }

    fn update<T>(&self, change: impl FnOnce(&mut CacheState) -> T) -> T {
        let mut state = self.lock();
        let result = change(&mut state);
        // Also for keys that were there before: a permit too many costs one look, one too few a change.
        if !state.changed.is_empty() {
            self.notify.notify_one();
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, CacheState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
