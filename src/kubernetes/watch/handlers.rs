//! What each watch does with its events: it applies them to the [`ClusterCache`] and tells the
//! registry the facts that follow.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    mem,
    sync::Arc,
};

use k8s_openapi::api::{
    core::v1::{Namespace, Service},
    discovery::v1::EndpointSlice,
};
use tokio::sync::{mpsc, oneshot};

use super::reflector::EventHandler;
use crate::{
    kubernetes::{
        cache::{CachedSlice, ClusterCache, ObjectEvent},
        objects::slices::{self, SkippedEndpoint},
    },
    metrics::KubernetesMetrics,
    model::{Instance, ServiceKey, Validator},
    registry::{ClusterFact, KubernetesState, RegistryHandle, Unavailable},
};

/// Most log lines about skipped endpoints of one restore.
const MAX_LOG_LINES: u64 = 100;

/// Handles Namespaces or Services.
pub(super) struct ClusterFactHandler<'a, K> {
    pub(super) registry: &'a RegistryHandle,
    /// Applies events to the cache and returns the facts that follow.
    pub(super) apply: Box<dyn FnMut(Vec<ObjectEvent<K>>) -> Vec<ClusterFact> + Send + 'a>,
    /// Notified when the registry has the facts of the first complete list.
    pub(super) complete: Option<oneshot::Sender<()>>,
}

impl EventHandler<Namespace> for ClusterFactHandler<'_, Namespace> {
    async fn handle(&mut self, events: Vec<ObjectEvent<Namespace>>) -> Result<(), Unavailable> {
        self.learn(events).await
    }
}

impl EventHandler<Service> for ClusterFactHandler<'_, Service> {
    async fn handle(&mut self, events: Vec<ObjectEvent<Service>>) -> Result<(), Unavailable> {
        self.learn(events).await
    }
}

impl<K: Send> ClusterFactHandler<'_, K> {
    async fn learn(&mut self, events: Vec<ObjectEvent<K>>) -> Result<(), Unavailable> {
        let ends = events.iter().any(|one| matches!(one, ObjectEvent::InitDone(_)));
        let facts = (self.apply)(events);
        if !facts.is_empty() {
            self.registry.learn(facts).await?;
        }
        if ends && let Some(complete) = self.complete.take() {
            // The receiver may be gone.
            let _ = complete.send(());
        }
        Ok(())
    }
}

/// Handles our own slices. The registry is restored from the first complete list.
pub(super) struct OwnSlicesHandler<'a> {
    pub(super) cache: &'a ClusterCache,
    pub(super) restore: Option<InitialRestore<'a>>,
}

/// The restore of the registry from the first complete list of our slices. Objects are dropped
/// page by page.
pub(super) struct InitialRestore<'a> {
    pub(super) registry: &'a RegistryHandle,
    pub(super) validator: Validator,
    pub(super) metrics: &'a KubernetesMetrics,
    /// Resolves when the registry knows every namespace.
    pub(super) namespaces: oneshot::Receiver<()>,
    /// Ends when the registry knows every Service and the slices of others under joined ones.
    pub(super) joined: mpsc::Receiver<Infallible>,
    /// Receives the term under which slices are written.
    pub(super) started: oneshot::Sender<u64>,
    pub(super) found: RestoredSlices,
}

/// An instance, with the term and generation of its slice.
type StampedInstance = ((u64, u64), Arc<Instance>);

/// The instances that our slices hold.
#[derive(Debug, Default)]
pub(super) struct RestoredSlices {
    term: u64,
    services: HashMap<ServiceKey, Vec<StampedInstance>>,
    skipped: u64,
}

impl EventHandler<EndpointSlice> for OwnSlicesHandler<'_> {
    async fn handle(&mut self, events: Vec<ObjectEvent<EndpointSlice>>) -> Result<(), Unavailable> {
        let mut read = Vec::with_capacity(events.len());
        for event in events {
            let Some(ours) = event.filter_map(CachedSlice::read) else { continue };
            if let (Some(slice), Some(CachedSlice { observed: None, .. })) = (event.object(), ours.object())
                && !matches!(event, ObjectEvent::Delete(_))
            {
                let meta = &slice.metadata;
                let (namespace, name) = (meta.namespace.as_deref(), meta.name.as_deref());
                let (namespace, name) = (namespace.unwrap_or_default(), name.unwrap_or_default());
                tracing::warn!("slice {namespace}/{name} names no Service: skipped");
            }
            if let Some(restore) = &mut self.restore {
                restore.found.add(&event, &ours, &restore.validator, restore.metrics);
            }
            read.push(ours);
        }
        let init_done = read.iter().any(|event| matches!(event, ObjectEvent::InitDone(_)));
        self.cache.apply_slices(read);
        if init_done && let Some(restore) = self.restore.take() {
            restore.finish().await?;
        }
        Ok(())
    }
}

impl InitialRestore<'_> {
    async fn finish(self) -> Result<(), Unavailable> {
        let Self { registry, validator: _, metrics, namespaces, mut joined, started, found } = self;
        // The senders are dropped early only when everything ends.
        let _ = namespaces.await;
        let _ = joined.recv().await;
        if found.skipped > MAX_LOG_LINES {
            tracing::warn!("{} more endpoints of slices were skipped or changed", found.skipped - MAX_LOG_LINES);
        }
        let restored = found.restored();
        let (services, term) = (restored.services.len(), restored.term);
        let term = registry.restore(restored).await.map(|now| (term, now))?;
        tracing::info!(services, found = term.0, term = term.1, "restored from Kubernetes");
        metrics.synced.set(1);
        // The receiver may be gone.
        let _ = started.send(term.1);
        Ok(())
    }
}

impl RestoredSlices {
    fn add(
        &mut self,
        event: &ObjectEvent<EndpointSlice>,
        ours: &ObjectEvent<CachedSlice>,
        validator: &Validator,
        metrics: &KubernetesMetrics,
    ) {
        let (slice, observed) = match (event, ours) {
            (ObjectEvent::Init, _) => {
                *self = Self::default();
                return;
            }
            (ObjectEvent::InitApply(slice), ObjectEvent::InitApply(CachedSlice { observed: Some(observed), .. })) => {
                (slice, observed)
            }
            _ => return,
        };
        self.term = self.term.max(observed.term);
        if observed.deleting {
            return;
        }
        let (instances, skipped) = slices::read([slice], validator);
        for skipped in skipped {
            self.skip(&observed.service, &skipped, metrics);
        }
        let stamp = (observed.term, observed.generation);
        let instances_of = self.services.entry(observed.service.clone()).or_default();
        instances_of.extend(instances.into_iter().map(|instance| (stamp, instance)));
    }

    fn skip(&mut self, service: &ServiceKey, skipped: &SkippedEndpoint, metrics: &KubernetesMetrics) {
        metrics.skipped_endpoints.inc();
        self.skipped += 1;
        if self.skipped <= MAX_LOG_LINES {
            tracing::warn!("{service}: {skipped}");
        }
    }

    /// Each instance once, from the slice with the highest term and generation.
    fn restored(self) -> KubernetesState {
        let once = |(service, mut instances): (ServiceKey, Vec<StampedInstance>)| {
            instances.sort_by(|(one, a), (other, b)| a.key().cmp(&b.key()).then(other.cmp(one)));
            instances.dedup_by(|(_, later), (_, first)| later.key() == first.key());
            (service, instances.into_iter().map(|(_, instance)| instance).collect())
        };
        KubernetesState { term: self.term, services: self.services.into_iter().map(once).collect() }
    }
}

/// Held while something of the initial load is missing.
pub(super) type InitialLoadGuard = mpsc::Sender<Infallible>;

/// Handles the slices of other writers under one joined Service.
pub(super) struct JoinedSlicesHandler<'a> {
    registry: &'a RegistryHandle,
    validator: Validator,
    service: ServiceKey,
    /// Until the first list is complete.
    loading: Option<InitialLoadGuard>,
    union: JoinedInstances,
}

/// Instances by the name of their slice.
type BySlice = BTreeMap<Box<str>, Vec<Arc<Instance>>>;

/// The instances in the slices of one Service.
#[derive(Debug, Default)]
struct JoinedInstances {
    slices: BySlice,
    /// A list that is being read: it replaces [`slices`](Self::slices).
    listing: Option<BySlice>,
    /// What the registry was told last.
    published: Vec<Arc<Instance>>,
}

impl<'a> JoinedSlicesHandler<'a> {
    pub(super) fn new(
        registry: &'a RegistryHandle,
        validator: Validator,
        service: ServiceKey,
        loading: Option<InitialLoadGuard>,
    ) -> Self {
        Self { registry, validator, service, loading, union: JoinedInstances::default() }
    }
}

impl EventHandler<EndpointSlice> for JoinedSlicesHandler<'_> {
    async fn handle(&mut self, events: Vec<ObjectEvent<EndpointSlice>>) -> Result<(), Unavailable> {
        for event in events {
            self.union.apply(event, |slice| slices::foreign(slice, &self.validator));
        }
        if let Some(instances) = self.union.take_changed() {
            self.registry.learn(vec![ClusterFact::Endpoints { service: self.service.clone(), instances }]).await?;
        }
        if self.union.listing.is_none() {
            self.loading = None;
        }
        Ok(())
    }
}

impl JoinedInstances {
    fn apply(&mut self, event: ObjectEvent<EndpointSlice>, read: impl Fn(&EndpointSlice) -> Vec<Arc<Instance>>) {
        match event {
            ObjectEvent::Init => self.listing = Some(BTreeMap::new()),
            ObjectEvent::InitDone(_) => self.slices = self.listing.take().unwrap_or_default(),
            ObjectEvent::InitApply(ref slice) | ObjectEvent::Apply(ref slice) => {
                let name = slice.metadata.name.as_deref().unwrap_or_default().into();
                self.listing.as_mut().unwrap_or(&mut self.slices).insert(name, read(slice));
            }
            ObjectEvent::Delete(slice) => _ = self.slices.remove(slice.metadata.name.as_deref().unwrap_or_default()),
        }
    }

    /// All instances, each once, when they differ from what was returned last. `None` while a list
    /// is being read.
    fn take_changed(&mut self) -> Option<Vec<Arc<Instance>>> {
        if self.listing.is_some() {
            return None;
        }
        let mut now: Vec<Arc<Instance>> = self.slices.values().flatten().cloned().collect();
        // A pod that moves between slices is in two of them for a moment.
        now.sort_by(|a, b| a.key().cmp(&b.key()).then(b.ready().cmp(&a.ready())));
        now.dedup_by(|later, first| later.key() == first.key());
        (now != self.published).then(|| mem::replace(&mut self.published, now)).map(|_| self.published.clone())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{kubernetes::objects::names, metrics::Metrics};

    const VALIDATOR: Validator = Validator { zone_wire_len: 15, names_allowed: false };

    fn slice(name: &str, stamps: (u64, u64), endpoints: &[(&str, bool)]) -> EndpointSlice {
        let endpoint =
            |(address, ready): &(&str, bool)| json!({ "addresses": [address], "conditions": { "ready": ready } });
        let slice = json!({
            "metadata": {
                "namespace": "prod", "name": name, "uid": name, "resourceVersion": "1",
                "labels": { names::MANAGED_BY: names::MANAGER, names::SERVICE_NAME: "web" },
                "annotations": {
                    names::TERM: stamps.0.to_string(), names::GENERATION: stamps.1.to_string(),
                    names::INSTANCES: json!({ "10.0.0.1": { "priority": stamps.1 } }).to_string(),
                },
            },
            "addressType": "IPv4",
            "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
            "ports": [{ "name": "http", "port": 80, "protocol": "TCP" }],
        });
        serde_json::from_value(slice).expect("an EndpointSlice")
    }

    #[test]
    fn restore_takes_the_newest_slice_and_starts_over_with_the_list() {
        let metrics = Metrics::new().kubernetes;
        let mut found = RestoredSlices::default();
        let mut add = |event: ObjectEvent<EndpointSlice>| {
            let ours = event.filter_map(CachedSlice::read).expect("it has a name");
            found.add(&event, &ours, &VALIDATOR, &metrics);
        };
        add(ObjectEvent::Init);
        add(ObjectEvent::InitApply(slice("web-0", (9, 9), &[("10.0.0.9", true)])));
        add(ObjectEvent::Init);
        add(ObjectEvent::InitApply(slice("web-1", (1, 5), &[("10.0.0.1", true), ("127.0.0.1", true)])));
        add(ObjectEvent::InitApply(slice("web-2", (2, 3), &[("10.0.0.1", true), ("10.0.0.2", true)])));
        add(ObjectEvent::InitApply(slice("web-3", (1, 9), &[("10.0.0.1", true)])));
        let mut gone = slice("web-4", (3, 1), &[("10.0.0.4", true)]);
        gone.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).expect("a time");
        add(ObjectEvent::InitApply(gone));
        add(ObjectEvent::InitDone("9".into()));
        assert_eq!((found.skipped, metrics.skipped_endpoints.get()), (1, 1));
        let KubernetesState { term, services } = found.restored();
        assert_eq!(term, 3);
        let [(service, instances)] = &services[..] else { panic!("{services:?}") };
        assert_eq!(service.to_string(), "prod/web");
        let said = instances.iter().map(|one| (one.id().to_string(), one.priority())).collect::<Vec<_>>();
        assert_eq!(said, [("10.0.0.1:80".into(), 3), ("10.0.0.2:80".into(), 0)]);
    }

    #[test]
    fn endpoints_of_others_are_published_once_as_one_set() {
        let mut union = JoinedInstances::default();
        let mut see = |events| {
            union.apply(events, |slice| slices::foreign(slice, &VALIDATOR));
            let said = |one: Arc<Instance>| format!("{} {}", one.address(), one.ready());
            union.take_changed().map(|changed| changed.into_iter().map(said).collect::<Vec<_>>().join(", "))
        };
        assert_eq!(see(ObjectEvent::Init), None);
        assert_eq!(
            see(ObjectEvent::InitApply(slice("a", (0, 0), &[("10.0.0.1", false)]))),
            None,
            "a list is published as a whole"
        );
        assert_eq!(see(ObjectEvent::InitApply(slice("b", (0, 0), &[("10.0.0.1", true), ("10.0.0.2", true)]))), None);
        assert_eq!(see(ObjectEvent::InitDone("1".into())).as_deref(), Some("10.0.0.1 true, 10.0.0.2 true"));
        assert_eq!(see(ObjectEvent::Apply(slice("a", (0, 0), &[]))), None, "the same as before");
        let gone = ObjectEvent::Delete(slice("b", (0, 0), &[]));
        assert_eq!(see(gone).as_deref(), Some(""));
        assert_eq!(
            see(ObjectEvent::Apply(slice("c", (0, 0), &[("10.0.0.3", true)]))).as_deref(),
            Some("10.0.0.3 true")
        );
        assert_eq!(see(ObjectEvent::Init), None);
        assert_eq!(see(ObjectEvent::InitDone("2".into())).as_deref(), Some(""), "deleted between two lists");
    }
}
