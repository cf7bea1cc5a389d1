//! What each watch makes of what it sees: state for the [`Cluster`], facts for the registry.

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

use super::source::Reader;
use crate::{
    kubernetes::{
        cluster::{Cluster, OurSlice, Seen},
        slices::{self, Skipped},
    },
    metrics::KubernetesMetrics,
    model::{Instance, ServiceKey, Validator},
    registry::{ClusterFact, KubernetesState, RegistryHandle, Unavailable},
};

/// Most lines in the log about endpoints that were skipped.
const MAX_LINES: u64 = 100;

/// Namespaces or Services, as a function of the cluster takes them.
pub(super) struct FactReader<'a, K> {
    pub(super) registry: &'a RegistryHandle,
    pub(super) see: Box<dyn FnMut(Vec<Seen<K>>) -> Vec<ClusterFact> + Send + 'a>,
    /// Is told when the registry has the facts of the first complete list.
    pub(super) complete: Option<oneshot::Sender<()>>,
}

impl Reader<Namespace> for FactReader<'_, Namespace> {
    async fn take(&mut self, seen: Vec<Seen<Namespace>>) -> Result<(), Unavailable> {
        self.learn(seen).await
    }
}

impl Reader<Service> for FactReader<'_, Service> {
    async fn take(&mut self, seen: Vec<Seen<Service>>) -> Result<(), Unavailable> {
        self.learn(seen).await
    }
}

impl<K: Send> FactReader<'_, K> {
    async fn learn(&mut self, seen: Vec<Seen<K>>) -> Result<(), Unavailable> {
        let ends = seen.iter().any(|one| matches!(one, Seen::ListEnds(_)));
        let facts = (self.see)(seen);
        if !facts.is_empty() {
            self.registry.learn(facts).await?;
        }
        if ends && let Some(complete) = self.complete.take() {
            // Whoever waits may have gone.
            let _ = complete.send(());
        }
        Ok(())
    }
}

/// Slices of ours; the first complete list is what the registry is restored from.
pub(super) struct OurSlices<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) restoring: Option<Restoring<'a>>,
}

/// The first complete list, while it is read. Whole objects are dropped page by page.
pub(super) struct Restoring<'a> {
    pub(super) registry: &'a RegistryHandle,
    pub(super) validator: Validator,
    pub(super) metrics: &'a KubernetesMetrics,
    /// Comes when the registry knows every namespace,
    pub(super) namespaces: oneshot::Receiver<()>,
    /// and ends when it knows every Service and what others have under joined ones.
    pub(super) joined: mpsc::Receiver<Infallible>,
    /// Gets the term.
    pub(super) started: oneshot::Sender<u64>,
    pub(super) found: Found,
}

/// An instance, with the term and generation of its slice.
type Stamped = ((u64, u64), Arc<Instance>);

/// What the slices hold.
#[derive(Debug, Default)]
pub(super) struct Found {
    term: u64,
    services: HashMap<ServiceKey, Vec<Stamped>>,
    skipped: u64,
}

impl Reader<EndpointSlice> for OurSlices<'_> {
    async fn take(&mut self, seen: Vec<Seen<EndpointSlice>>) -> Result<(), Unavailable> {
        let mut read = Vec::with_capacity(seen.len());
        for one in seen {
            let Some(ours) = one.read(OurSlice::read) else { continue };
            if let (Some(slice), Some(OurSlice { standing: None, .. })) = (one.object(), ours.object())
                && !matches!(one, Seen::Gone(_))
            {
                let meta = &slice.metadata;
                let (namespace, name) = (meta.namespace.as_deref(), meta.name.as_deref());
                let (namespace, name) = (namespace.unwrap_or_default(), name.unwrap_or_default());
                tracing::warn!("slice {namespace}/{name} does not say of which service it is: it is passed over");
            }
            if let Some(restoring) = &mut self.restoring {
                restoring.found.add(&one, &ours, &restoring.validator, restoring.metrics);
            }
            read.push(ours);
        }
        let ends = read.iter().any(|one| matches!(one, Seen::ListEnds(_)));
        self.cluster.see_slices(read);
        if ends && let Some(restoring) = self.restoring.take() {
            restoring.finish().await?;
        }
        Ok(())
    }
}

impl Restoring<'_> {
    async fn finish(self) -> Result<(), Unavailable> {
        let Self { registry, validator: _, metrics, namespaces, mut joined, started, found } = self;
        // Dropped only with everything else.
        let _ = namespaces.await;
        let _ = joined.recv().await;
        if found.skipped > MAX_LINES {
            tracing::warn!("{} more parts of slices could not be taken as they stand", found.skipped - MAX_LINES);
        }
        let restored = found.restored();
        let (services, term) = (restored.services.len(), restored.term);
        let term = registry.restore(restored).await.map(|now| (term, now))?;
        tracing::info!(services, found = term.0, term = term.1, "read what Kubernetes holds");
        metrics.synced.set(1);
        // Whoever waits may have gone.
        let _ = started.send(term.1);
        Ok(())
    }
}

impl Found {
    fn add(
        &mut self,
        seen: &Seen<EndpointSlice>,
        ours: &Seen<OurSlice>,
        validator: &Validator,
        metrics: &KubernetesMetrics,
    ) {
        let (slice, standing) = match (seen, ours) {
            (Seen::ListBegins, _) => {
                *self = Self::default();
                return;
            }
            (Seen::Listed(slice), Seen::Listed(OurSlice { standing: Some(standing), .. })) => (slice, standing),
            _ => return,
        };
        self.term = self.term.max(standing.term);
        if standing.deleting {
            return;
        }
        let (instances, skipped) = slices::read(&standing.service, [slice], validator);
        for one in skipped {
            self.skip(&standing.service, &one, metrics);
        }
        let stamp = (standing.term, standing.generation);
        let held = self.services.entry(standing.service.clone()).or_default();
        held.extend(instances.into_iter().map(|instance| (stamp, instance)));
    }

    fn skip(&mut self, service: &ServiceKey, skipped: &Skipped, metrics: &KubernetesMetrics) {
        metrics.skipped_endpoints.inc();
        self.skipped += 1;
        if self.skipped <= MAX_LINES {
            tracing::warn!("{service}: {skipped}");
        }
    }

    /// Each instance once, as the newest slice tells it.
    fn restored(self) -> KubernetesState {
        let once = |(service, mut held): (ServiceKey, Vec<Stamped>)| {
            held.sort_by(|(one, a), (other, b)| a.key().cmp(&b.key()).then(other.cmp(one)));
            held.dedup_by(|(_, later), (_, first)| later.key() == first.key());
            (service, held.into_iter().map(|(_, instance)| instance).collect())
        };
        KubernetesState { term: self.term, services: self.services.into_iter().map(once).collect() }
    }
}

/// Held by whoever has something to load at the start.
pub(super) type Loading = mpsc::Sender<Infallible>;

/// The slices of others under one joined Service.
pub(super) struct OthersSlices<'a> {
    registry: &'a RegistryHandle,
    validator: Validator,
    service: ServiceKey,
    /// Until the first list is complete.
    loading: Option<Loading>,
    union: Union,
}

/// Instances by the name of their slice.
type BySlice = BTreeMap<Box<str>, Vec<Arc<Instance>>>;

/// The instances in the slices of one Service.
#[derive(Debug, Default)]
struct Union {
    slices: BySlice,
    /// A list that is being read: it replaces [`slices`](Self::slices).
    listing: Option<BySlice>,
    /// What was told last.
    told: Vec<Arc<Instance>>,
}

impl<'a> OthersSlices<'a> {
    pub(super) fn new(
        registry: &'a RegistryHandle,
        validator: Validator,
        service: ServiceKey,
        loading: Option<Loading>,
    ) -> Self {
        Self { registry, validator, service, loading, union: Union::default() }
    }
}

impl Reader<EndpointSlice> for OthersSlices<'_> {
    async fn take(&mut self, seen: Vec<Seen<EndpointSlice>>) -> Result<(), Unavailable> {
        for one in seen {
            self.union.see(one, |slice| slices::foreign(&self.service, slice, &self.validator));
        }
        if let Some(instances) = self.union.news() {
            self.registry.learn(vec![ClusterFact::Endpoints { service: self.service.clone(), instances }]).await?;
        }
        if self.union.listing.is_none() {
            self.loading = None;
        }
        Ok(())
    }
}

impl Union {
    fn see(&mut self, seen: Seen<EndpointSlice>, read: impl Fn(&EndpointSlice) -> Vec<Arc<Instance>>) {
        match seen {
            Seen::ListBegins => self.listing = Some(BTreeMap::new()),
            Seen::ListEnds(_) => self.slices = self.listing.take().unwrap_or_default(),
            Seen::Listed(ref slice) | Seen::Stands(ref slice) => {
                let name = slice.metadata.name.as_deref().unwrap_or_default().into();
                self.listing.as_mut().unwrap_or(&mut self.slices).insert(name, read(slice));
            }
            Seen::Gone(slice) => _ = self.slices.remove(slice.metadata.name.as_deref().unwrap_or_default()),
        }
    }

    /// All instances, each identity once, when they are not what was told last. While a list is
    /// being read that goes on to be true.
    fn news(&mut self) -> Option<Vec<Arc<Instance>>> {
        if self.listing.is_some() {
            return None;
        }
        let mut now: Vec<Arc<Instance>> = self.slices.values().flatten().cloned().collect();
        // A pod that moves between slices stands in two of them for a moment.
        now.sort_by(|a, b| a.key().cmp(&b.key()).then(b.ready().cmp(&a.ready())));
        now.dedup_by(|later, first| later.key() == first.key());
        (now != self.told).then(|| mem::replace(&mut self.told, now)).map(|_| self.told.clone())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{kubernetes::names, metrics::Metrics};

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
    fn a_restore_takes_the_newest_word_from_every_page_and_starts_over_with_the_list() {
        let metrics = Metrics::new().kubernetes;
        let mut found = Found::default();
        let mut add = |seen: Seen<EndpointSlice>| {
            let ours = seen.read(OurSlice::read).expect("it has a name");
            found.add(&seen, &ours, &VALIDATOR, &metrics);
        };
        add(Seen::ListBegins);
        add(Seen::Listed(slice("web-0", (9, 9), &[("10.0.0.9", true)])));
        add(Seen::ListBegins);
        add(Seen::Listed(slice("web-1", (1, 5), &[("10.0.0.1", true), ("127.0.0.1", true)])));
        add(Seen::Listed(slice("web-2", (2, 3), &[("10.0.0.1", true), ("10.0.0.2", true)])));
        add(Seen::Listed(slice("web-3", (1, 9), &[("10.0.0.1", true)])));
        let mut gone = slice("web-4", (3, 1), &[("10.0.0.4", true)]);
        gone.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).expect("a time");
        add(Seen::Listed(gone));
        add(Seen::ListEnds("9".into()));
        assert_eq!((found.skipped, metrics.skipped_endpoints.get()), (1, 1));
        let KubernetesState { term, services } = found.restored();
        assert_eq!(term, 3);
        let [(service, instances)] = &services[..] else { panic!("{services:?}") };
        assert_eq!(service.to_string(), "prod/web");
        let said = instances.iter().map(|one| (one.id().to_string(), one.priority())).collect::<Vec<_>>();
        assert_eq!(said, [("10.0.0.1:80".into(), 3), ("10.0.0.2:80".into(), 0)]);
    }

    #[test]
    fn pods_are_told_once_as_one_set() {
        let service = VALIDATOR.service("prod", "web").expect("valid");
        let mut union = Union::default();
        let mut see = |seen| {
            union.see(seen, |slice| slices::foreign(&service, slice, &VALIDATOR));
            let said = |one: Arc<Instance>| format!("{} {}", one.address(), one.ready());
            union.news().map(|news| news.into_iter().map(said).collect::<Vec<_>>().join(", "))
        };
        assert_eq!(see(Seen::ListBegins), None);
        assert_eq!(see(Seen::Listed(slice("a", (0, 0), &[("10.0.0.1", false)]))), None, "a list is told as a whole");
        assert_eq!(see(Seen::Listed(slice("b", (0, 0), &[("10.0.0.1", true), ("10.0.0.2", true)]))), None);
        assert_eq!(see(Seen::ListEnds("1".into())).as_deref(), Some("10.0.0.1 true, 10.0.0.2 true"));
        assert_eq!(see(Seen::Stands(slice("a", (0, 0), &[]))), None, "the same as before");
        let gone = Seen::Gone(slice("b", (0, 0), &[]));
        assert_eq!(see(gone).as_deref(), Some(""));
        assert_eq!(see(Seen::Stands(slice("c", (0, 0), &[("10.0.0.3", true)]))).as_deref(), Some("10.0.0.3 true"));
        assert_eq!(see(Seen::ListBegins), None);
        assert_eq!(see(Seen::ListEnds("2".into())).as_deref(), Some(""), "gone while nobody looked");
    }
}
