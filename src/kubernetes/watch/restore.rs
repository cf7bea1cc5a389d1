//! The restore of the registry from the first complete list of our slices.

use k8s_openapi::api::discovery::v1::EndpointSlice;
use tokio::sync::oneshot;

use crate::{
    kubernetes::{
        cache::{CachedSlice, ObjectEvent},
        objects::slices::{InstanceView, SkippedEndpoint, SliceRank, read_slice},
    },
    metrics::KubernetesMetrics,
    model::{ServiceKey, Validator},
    registry::{KubernetesState, RegistryHandle, Unavailable},
    replicas::election::Tenure,
};

/// Most log lines about skipped endpoints.
const MAX_LOG_LINES: u64 = 100;

/// How a restore ends.
#[derive(Debug)]
pub(in crate::kubernetes) enum Restored {
    /// The registry has what the slices hold; they are written under this term.
    Term(u64),
    /// A slice has this term, which is no lower than that of the Lease: a higher one is needed first.
    Outranked(u64),
}

/// The restore. It holds instances, not objects: those are dropped page by page.
pub(super) struct InitialRestore<'a> {
    registry: &'a RegistryHandle,
    metrics: &'a KubernetesMetrics,
    /// Under which this process writes.
    tenure: Tenure,
    /// Receives the end of the restore.
    started: oneshot::Sender<Restored>,
    /// What the registry must have learnt before.
    before: Vec<oneshot::Receiver<()>>,
    instances: RestoredInstances,
}

/// The instances that our slices hold.
pub(super) struct RestoredInstances {
    validator: Validator,
    /// A slice with a higher term has it from a hand: its instances count, its term does not.
    highest_term: u64,
    view: InstanceView,
    /// The highest rank of a slice.
    rank: SliceRank,
    skipped: u64,
}

impl<'a> InitialRestore<'a> {
    pub(super) fn new(
        registry: &'a RegistryHandle,
        metrics: &'a KubernetesMetrics,
        tenure: Tenure,
        instances: RestoredInstances,
        started: oneshot::Sender<Restored>,
    ) -> Self {
        Self { registry, metrics, tenure, started, before: Vec::new(), instances }
    }

    /// Waits for these before it finishes: every namespace, and the instances of joined Services,
    /// which come after every Service.
    pub(super) fn after(mut self, namespaces: oneshot::Receiver<()>, joined: oneshot::Receiver<()>) -> Self {
        self.before.extend([namespaces, joined]);
        self
    }

    pub(super) fn apply(&mut self, event: &ObjectEvent<EndpointSlice>, cached: &ObjectEvent<CachedSlice>) {
        self.instances.apply(event, cached, self.metrics);
    }

    /// The list is complete.
    pub(super) async fn finish(self) -> Result<(), Unavailable> {
        let Self { registry, metrics, tenure, started, before, instances } = self;
        if instances.rank.term >= tenure.term {
            // The receiver may be gone.
            let _ = started.send(Restored::Outranked(instances.rank.term));
            return Ok(());
        }
        for learnt in before {
            // The senders are dropped early only when everything ends.
            let _ = learnt.await;
        }
        if instances.skipped > MAX_LOG_LINES {
            tracing::warn!("{} more endpoints of slices were skipped or changed", instances.skipped - MAX_LOG_LINES);
        }
        let restored = instances.into_state(&tenure);
        let (services, found) = (restored.services.len(), restored.term);
        let term = registry.restore(restored).await?;
        tracing::info!(services, found, term, "restored from Kubernetes");
        metrics.synced.set(1);
        // The receiver may be gone.
        let _ = started.send(Restored::Term(term));
        Ok(())
    }
}

impl RestoredInstances {
    pub(super) fn new(validator: Validator, highest_term: u64) -> Self {
        Self { validator, highest_term, view: InstanceView::default(), rank: SliceRank::default(), skipped: 0 }
    }

    fn apply(
        &mut self,
        event: &ObjectEvent<EndpointSlice>,
        cached: &ObjectEvent<CachedSlice>,
        metrics: &KubernetesMetrics,
    ) {
        let (slice, observed) = match (event, cached) {
            (ObjectEvent::Init, _) => {
                *self = Self::new(self.validator, self.highest_term);
                return;
            }
            (ObjectEvent::InitApply(slice), ObjectEvent::InitApply(CachedSlice { observed: Some(observed), .. })) => {
                (slice, observed)
            }
            _ => return,
        };
        let term = if observed.term <= self.highest_term { observed.term } else { 0 };
        let rank = SliceRank { term, generation: observed.generation };
        self.rank = self.rank.max(rank);
        if observed.deleting {
            return;
        }
        let (instances, skipped) = read_slice(slice, &self.validator);
        for skipped in skipped {
            self.skip(&observed.service, &skipped, metrics);
        }
        self.view.apply(&observed.service, &slice.metadata, rank, instances);
    }

    fn skip(&mut self, service: &ServiceKey, skipped: &SkippedEndpoint, metrics: &KubernetesMetrics) {
        metrics.skipped_endpoints.inc();
        self.skipped += 1;
        if self.skipped <= MAX_LOG_LINES {
            tracing::warn!("{service}: {skipped}");
        }
    }

    /// The Lease as it was before counts too: it outlives slices that are deleted with their last instance.
    fn into_state(self, tenure: &Tenure) -> KubernetesState {
        let Self { view, rank, .. } = self;
        let lease = tenure.previous.as_ref();
        let lease = lease.map(|lease| SliceRank { term: lease.term, generation: lease.generation });
        let SliceRank { term, generation } = rank.max(lease.unwrap_or_default());
        let services = view.services().map(|service| (service.clone(), view.instances(service)));
        KubernetesState { term, generation, new_term: tenure.term, services: services.collect() }
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
        let mut restored = RestoredInstances::new(VALIDATOR, 9);
        let mut apply = |event: ObjectEvent<EndpointSlice>| {
            let ours = event.filter_map(CachedSlice::read).expect("it has a name");
            restored.apply(&event, &ours, &metrics);
        };
        apply(ObjectEvent::Init);
        apply(ObjectEvent::InitApply(slice("web-0", (9, 9), &[("10.0.0.9", true)])));
        apply(ObjectEvent::Init);
        apply(ObjectEvent::InitApply(slice("web-1", (1, 5), &[("10.0.0.1", true), ("127.0.0.1", true)])));
        apply(ObjectEvent::InitApply(slice("web-2", (2, 3), &[("10.0.0.1", true), ("10.0.0.2", true)])));
        apply(ObjectEvent::InitApply(slice("web-3", (1, 9), &[("10.0.0.1", true)])));
        apply(ObjectEvent::InitApply(slice("web-by-hand", (10, 1), &[("10.0.0.2", true)])));
        let mut gone = slice("web-4", (3, 1), &[("10.0.0.4", true)]);
        gone.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).expect("a time");
        apply(ObjectEvent::InitApply(gone));
        apply(ObjectEvent::InitDone("9".into()));
        assert_eq!((restored.skipped, metrics.skipped_endpoints.get()), (1, 1));
        let KubernetesState { term, generation, new_term: _, services } = restored.into_state(&Tenure::new(4, None));
        assert_eq!((term, generation), (3, 1));
        let [(service, instances)] = &services[..] else { panic!("{services:?}") };
        assert_eq!(service.to_string(), "prod/web");
        let said = instances.iter().map(|one| (one.id().to_string(), one.priority())).collect::<Vec<_>>();
        assert_eq!(said, [("10.0.0.1:80".into(), 3), ("10.0.0.2:80".into(), 0)]);
    }
}
