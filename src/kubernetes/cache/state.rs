//! The stores of the cache, and what follows from each event.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use k8s_openapi::api::core::v1::{Endpoints, Namespace, Service};
use tracing::warn;

use super::{
    ChangedKey,
    entries::{CachedEndpoints, CachedNamespace, CachedService, CachedSlice, NamespaceFields, ObjectKey, service_key},
    event::ObjectEvent,
    object_store::{Applied, ObjectStore},
};
use crate::{
    kubernetes::objects::{names, services::Ownership, slices::ObservedSlice},
    model::ServiceKey,
    registry::{AnnotatedAddresses, AnnotatedQuota, ClusterFact},
};

#[derive(Debug)]
pub(super) struct CacheState {
    pub(super) namespaces: ObjectStore<Box<str>, CachedNamespace>,
    pub(super) services: ObjectStore<ServiceKey, CachedService>,
    pub(super) slices: ObjectStore<ObjectKey, ObservedSlice>,
    /// Only with `--endpoints-object`.
    pub(super) endpoints: ObjectStore<ServiceKey, CachedEndpoints>,
    /// Names of the slices of each service.
    pub(super) slice_names: BTreeMap<ServiceKey, BTreeSet<Box<str>>>,
    pub(super) occupied: HashMap<ServiceKey, HashSet<String>>,
    /// Keys that the mirror has not taken yet.
    pub(super) changed: BTreeSet<ChangedKey>,
    /// Times that a Service with slices of ours became foreign, or stopped being so.
    pub(super) owner_changes: u64,
}

impl CacheState {
    pub(super) fn new() -> Self {
        Self {
            namespaces: ObjectStore::new(),
            services: ObjectStore::new(),
            slices: ObjectStore::new(),
            endpoints: ObjectStore::new(),
            slice_names: BTreeMap::new(),
            occupied: HashMap::new(),
            changed: BTreeSet::new(),
            owner_changes: 0,
        }
    }

    /// The slices of `service`, in order of their names.
    pub(super) fn slices_of(&self, service: &ServiceKey) -> impl Iterator<Item = &ObservedSlice> {
        let names = self.slice_names.get(service).into_iter().flatten();
        names.filter_map(|name| self.slices.get(&(service.namespace().into(), name.clone())))
    }

    pub(super) fn apply_namespaces(&mut self, events: Vec<ObjectEvent<Namespace>>) -> Vec<ClusterFact> {
        let mut facts = Vec::new();
        let mut changed: HashSet<Box<str>> = HashSet::new();
        let all_changed = &mut self.changed;
        // `None`: absent.
        let mut note = |name: Box<str>, before: Option<NamespaceFields>, now: Option<NamespaceFields>| {
            for annotation in limits(&name, before.as_ref(), now.as_ref(), &mut facts) {
                all_changed.insert(ChangedKey::Annotation { namespace: name.clone(), annotation });
            }
            let [before, now] = [before, now].map(|state| state.map(|state| state.terminating));
            // One that is being deleted does not exist for registrations: nothing can be created in it any more.
            let (existed, exists) = (before == Some(false), now == Some(false));
            if existed != exists {
                facts.push(ClusterFact::Namespace { name: name.clone(), exists });
            }
            if before != now {
                changed.insert(name);
            }
        };
        let mut complete = false;
        for event in events {
            match event {
                ObjectEvent::Init => self.namespaces.init(),
                ObjectEvent::InitDone(version) => {
                    // Only the first list is news. A later one changes nothing about what is known to be complete.
                    complete |= !self.namespaces.is_complete();
                    for (name, gone) in self.namespaces.init_done(&version) {
                        note(name, Some(gone.state()), None);
                    }
                }
                ObjectEvent::InitApply(ref namespace) | ObjectEvent::Apply(ref namespace) => {
                    let Some((name, cached)) = CachedNamespace::read(&namespace.metadata) else { continue };
                    let now = Some(cached.state());
                    let applied = if matches!(event, ObjectEvent::InitApply(_)) {
                        self.namespaces.init_apply(name.clone(), cached)
                    } else {
                        self.namespaces.apply(name.clone(), cached)
                    };
                    if let Applied::Changed(before) = applied {
                        note(name, before.map(|one| one.state()), now);
                    }
                }
                ObjectEvent::Delete(namespace) => {
                    let Some((name, gone)) = CachedNamespace::read(&namespace.metadata) else { continue };
                    if let Some(before) = self.namespaces.delete(&name, &gone.uid, &gone.resource_version) {
                        note(name, Some(before.state()), None);
                    }
                }
            }
        }
        facts.extend(complete.then_some(ClusterFact::NamespacesComplete));
        if changed.is_empty() {
            return facts;
        }
        let within = |key: &&ServiceKey| changed.contains(key.namespace());
        // Services with objects in the namespace have to be looked at, even if nothing is registered under them any
        // more.
        self.changed.extend(self.slice_names.keys().filter(within).cloned().map(ChangedKey::Service));
        self.changed.extend(self.services.keys().filter(within).cloned().map(ChangedKey::Service));
        self.changed.extend(changed.into_iter().map(ChangedKey::Namespace));
        facts
    }

    pub(super) fn apply_services(
        &mut self,
        events: Vec<ObjectEvent<Service>>,
        joined: &mut Vec<(ServiceKey, bool)>,
    ) -> Vec<ClusterFact> {
        let mut facts = Vec::new();
        let changed = &mut self.changed;
        let mut note = |key: ServiceKey, before: Option<Ownership>, now: Option<Ownership>| {
            let is = |which: Ownership| (before == Some(which), now == Some(which));
            let ((was_foreign, foreign), (was_joined, is_joined)) = (is(Ownership::Foreign), is(Ownership::Joined));
            if was_foreign != foreign {
                // Without slices of ours nothing that is read depends on whose the Service is.
                self.owner_changes += u64::from(self.slice_names.contains_key(&key));
                facts.push(ClusterFact::Service { service: key.clone(), foreign });
            }
            if was_joined != is_joined {
                joined.push((key.clone(), is_joined));
            }
            changed.insert(ChangedKey::Service(key));
        };
        for event in events {
            match event {
                ObjectEvent::Init => self.services.init(),
                ObjectEvent::InitDone(version) => {
                    for (key, gone) in self.services.init_done(&version) {
                        note(key, Some(gone.ownership), None);
                    }
                }
                ObjectEvent::InitApply(service) => {
                    let Some((key, cached)) = read_service(&self.services, service) else { continue };
                    let now = cached.ownership;
                    if let Applied::Changed(before) = self.services.init_apply(key.clone(), cached) {
                        note(key, before.map(|one| one.ownership), Some(now));
                    }
                }
                ObjectEvent::Apply(service) => {
                    let Some((key, cached)) = read_service(&self.services, service) else { continue };
                    let now = cached.ownership;
                    if let Applied::Changed(before) = self.services.apply(key.clone(), cached) {
                        note(key, before.map(|one| one.ownership), Some(now));
                    }
                }
                ObjectEvent::Delete(service) => {
                    let Some((key, gone)) = read_service(&self.services, service) else { continue };
                    if let Some(before) = self.services.delete(&key, &gone.uid, &gone.resource_version) {
                        note(key, Some(before.ownership), None);
                    }
                }
            }
        }
        facts
    }

    pub(super) fn apply_slices(&mut self, events: Vec<ObjectEvent<CachedSlice>>) {
        for event in events {
            let listed = matches!(event, ObjectEvent::InitApply(_));
            match event {
                ObjectEvent::Init => self.slices.init(),
                ObjectEvent::InitDone(version) => {
                    for ((_, name), gone) in self.slices.init_done(&version) {
                        self.slice_gone(&gone.service, &name);
                    }
                    // The other writers may have deleted theirs; the next write shows it.
                    self.occupied.clear();
                }
                ObjectEvent::InitApply(CachedSlice { key, observed: Some(observed), .. })
                | ObjectEvent::Apply(CachedSlice { key, observed: Some(observed), .. }) => {
                    let service = observed.service.clone();
                    if let Applied::Changed(before) = self.apply_slice(key, observed, listed) {
                        self.changed.extend(before.into_iter().map(|before| ChangedKey::Service(before.service)));
                        self.changed.insert(ChangedKey::Service(service));
                    }
                }
                // A slice that is not ours any more is gone for us.
                ObjectEvent::InitApply(slice) | ObjectEvent::Apply(slice) | ObjectEvent::Delete(slice) => {
                    if let Some(gone) = self.slices.delete(&slice.key, &slice.uid, &slice.resource_version) {
                        self.slice_gone(&gone.service, &slice.key.1);
                    }
                }
            }
        }
    }

    pub(super) fn apply_endpoints(&mut self, events: Vec<ObjectEvent<Endpoints>>) {
        for event in events {
            let changed = match event {
                ObjectEvent::Init => {
                    self.endpoints.init();
                    Vec::new()
                }
                ObjectEvent::InitDone(version) => {
                    self.endpoints.init_done(&version).into_iter().map(|(key, _)| key).collect()
                }
                ObjectEvent::InitApply(ref endpoints) | ObjectEvent::Apply(ref endpoints) => {
                    let Some((key, cached)) = CachedEndpoints::read(&endpoints.metadata) else { continue };
                    let applied = if matches!(event, ObjectEvent::InitApply(_)) {
                        self.endpoints.init_apply(key.clone(), cached)
                    } else {
                        self.endpoints.apply(key.clone(), cached)
                    };
                    if matches!(applied, Applied::Changed(_)) { vec![key] } else { Vec::new() }
                }
                ObjectEvent::Delete(endpoints) => {
                    let Some((key, gone)) = CachedEndpoints::read(&endpoints.metadata) else { continue };
                    let known = self.endpoints.delete(&key, &gone.uid, &gone.resource_version);
                    known.map(|_| key).into_iter().collect()
                }
            };
            self.changed.extend(changed.into_iter().map(ChangedKey::Service));
        }
    }

    fn slice_gone(&mut self, service: &ServiceKey, name: &str) {
        self.forget_slice(service, name);
        self.changed.insert(ChangedKey::Service(service.clone()));
    }

    /// Stores a slice, unless a newer version is known.
    pub(super) fn apply_slice(
        &mut self,
        key: ObjectKey,
        observed: ObservedSlice,
        listed: bool,
    ) -> Applied<ObservedSlice> {
        let (service, name) = (observed.service.clone(), key.1.clone());
        let applied = if listed { self.slices.init_apply(key, observed) } else { self.slices.apply(key, observed) };
        if let Applied::Changed(before) = &applied {
            // Somebody changed its label: the slice left one service for another, and both have to be looked at.
            if let Some(before) = before.as_ref().filter(|before| before.service != service) {
                self.forget_slice(&before.service, &name);
            }
            // It is ours now, so the name is not taken by others.
            if let Some(occupied) = self.occupied.get_mut(&service) {
                occupied.remove(&*name);
            }
            self.slice_names.entry(service).or_default().insert(name);
        }
        applied
    }

    /// The slice `name` does not belong to `service` any more.
    pub(super) fn forget_slice(&mut self, service: &ServiceKey, name: &str) {
        if let Some(names) = self.slice_names.get_mut(service) {
            names.remove(name);
            if names.is_empty() {
                self.slice_names.remove(service);
                // Names are only avoided for services with slices; the next write meets the name again.
                self.occupied.remove(service);
            }
        }
    }
}

fn read_service(
    known: &ObjectStore<ServiceKey, CachedService>,
    service: Service,
) -> Option<(ServiceKey, CachedService)> {
    let key = service_key(&service.metadata)?;
    let cached = CachedService::read(service, known.get(&key))?;
    Some((key, cached))
}

/// What changed of the limits that a namespace's annotations set. Returns the annotations that became invalid.
fn limits(
    name: &str,
    before: Option<&NamespaceFields>,
    now: Option<&NamespaceFields>,
    facts: &mut Vec<ClusterFact>,
) -> Vec<&'static str> {
    let mut invalid = Vec::new();
    let quota = |state: Option<&NamespaceFields>| state.and_then(|state| state.quota);
    if quota(before) != quota(now) {
        if quota(now) == Some(AnnotatedQuota::Invalid) {
            let annotation = names::MAX_INSTANCES;
            warn!(
                namespace = name,
                annotation, "the annotation is not a number: nothing new is registered in the namespace"
            );
            invalid.push(annotation);
        }
        facts.push(ClusterFact::Quota { namespace: name.into(), quota: quota(now) });
    }
    let addresses = |state: Option<&NamespaceFields>| state.and_then(|state| state.addresses.clone());
    if addresses(before) != addresses(now) {
        if let Some(AnnotatedAddresses { text, allowed: None }) = addresses(now) {
            let (annotation, text) = (names::ADDRESSES, &*text);
            warn!(
                namespace = name,
                annotation, text, "the annotation is invalid: nothing is registered in the namespace"
            );
            invalid.push(annotation);
        }
        facts.push(ClusterFact::Addresses { namespace: name.into(), addresses: addresses(now) });
    }
    invalid
}
