//! Our own slices: what another process writes is followed, and what they hold at a take-over is restored.
//!
//! While another process writes, the registry shows what its slices say ([`RegistryHandle::follow`]). A take-over lists them
//! again, with a quorum read, and hands everything to the registry at once ([`RegistryHandle::restore`]). From then on
//! this process writes the slices, and only the cache is interested in them, and what a former writer writes late
//! ([`LateWrites`]).

use std::collections::HashMap;

use k8s_openapi::{api::discovery::v1::EndpointSlice, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::reflector::EventHandler;
use crate::{
    kubernetes::{
        api::Fence,
        cache::{CachedSlice, ClusterCache, LateWrites, ObjectEvent},
        objects::slices::{SkippedEndpoint, SliceRank, SliceView, read_slice, read_tombstones},
    },
    metrics::KubernetesMetrics,
    model::{HybridClock, ServiceKey, UnixMillis, Validator},
    registry::{FollowedServices, KubernetesState, RegistryHandle, TakeOverTurn, Unavailable},
    replicas::{
        election::Tenure,
        time::{BootTime, Now},
        tombstones::Tombstones,
    },
};

/// Most log lines about skipped endpoints.
const MAX_LOG_LINES: u64 = 100;

/// How a take-over ends.
#[derive(Debug)]
pub(in crate::kubernetes) enum Restored {
    /// The registry has what the slices hold; they are written under this term.
    Term(u64),
    /// A slice has this term, which is no lower than that of the Lease: a higher one is needed first.
    Outranked(u64),
}

/// What the slices are to be read for from now on. Each begins with a list.
#[derive(Debug)]
pub(in crate::kubernetes) enum SlicesRequest {
    /// Another process writes them, or may.
    Follow,
    /// This process takes over.
    TakeOver(TakeOver),
}

/// Asks for a list of all slices and the restore of the registry from it.
#[derive(Debug)]
pub(in crate::kubernetes) struct TakeOver {
    /// Under which this process writes.
    pub(in crate::kubernetes) tenure: Tenure,
    /// Somebody has typed a higher one into a slice: its instances count, its term does not.
    pub(in crate::kubernetes) highest_term: u64,
    pub(in crate::kubernetes) turn: TakeOverTurn,
    pub(in crate::kubernetes) restored: oneshot::Sender<Restored>,
}

/// What the slices are read for.
enum Purpose {
    /// Another process writes them.
    Following,
    /// This process takes over with the next complete list.
    TakingOver(TakeOver),
    /// This process writes them.
    Writing(LateWrites),
}

/// Handles our own slices.
pub(super) struct OwnSlicesHandler<'a> {
    cache: &'a ClusterCache,
    registry: &'a RegistryHandle,
    metrics: &'a KubernetesMetrics,
    fence: &'a Fence,
    purpose: Purpose,
    instances: SliceInstances,
    /// What the registry must have learnt before it is readable: every namespace, and the instances of joined
    /// Services, which come after every Service.
    before: Vec<oneshot::Receiver<()>>,
}

/// The instances that our slices hold.
struct SliceInstances {
    validator: Validator,
    highest_term: u64,
    view: SliceView,
    /// The removals that slices remember, by namespace and name of the slice.
    tombstones: HashMap<(String, String), (ServiceKey, Tombstones)>,
    /// The highest rank of a slice.
    rank: SliceRank,
    skipped: u64,
}

impl<'a> OwnSlicesHandler<'a> {
    pub(super) fn new(
        cache: &'a ClusterCache,
        registry: &'a RegistryHandle,
        metrics: &'a KubernetesMetrics,
        fence: &'a Fence,
        validator: Validator,
        before: Vec<oneshot::Receiver<()>>,
    ) -> Self {
        let instances = SliceInstances::new(validator);
        Self { cache, registry, metrics, fence, purpose: Purpose::Following, instances, before }
    }

    /// Applies to the next complete list, which must begin after this call.
    pub(super) fn begin(&mut self, request: SlicesRequest) {
        self.purpose = match request {
            SlicesRequest::Follow => Purpose::Following,
            SlicesRequest::TakeOver(request) => {
                self.instances.highest_term = request.highest_term;
                Purpose::TakingOver(request)
            }
        };
    }

    /// All slices are listed.
    async fn listed(&mut self) -> Result<(), Unavailable> {
        // Another request may drop this future at any await, and the next list waits for the rest.
        while let Some(learnt) = self.before.last_mut() {
            // The senders are dropped early only when everything ends.
            let _ = learnt.await;
            self.before.pop();
        }
        match std::mem::replace(&mut self.purpose, Purpose::Following) {
            Purpose::Following => self.follow(true).await,
            Purpose::TakingOver(request) => self.restore(request).await,
            Purpose::Writing(late) => {
                self.purpose = Purpose::Writing(late);
                Ok(())
            }
        }
    }

    async fn follow(&mut self, complete: bool) -> Result<(), Unavailable> {
        let SliceInstances { view, rank, .. } = &mut self.instances;
        let SliceRank { term, generation } = *rank;
        let changed = view.take_changed();
        // Anybody may label a slice. Under the Service of somebody else it would bend that Service's names, so it is
        // not served.
        let instances = |service: &ServiceKey| {
            let foreign = self.cache.is_foreign(service);
            (service.clone(), if foreign { Vec::new() } else { view.instances(service) })
        };
        let services: Vec<_> =
            if complete { view.services().map(instances).collect() } else { changed.iter().map(instances).collect() };
        let replica = self.registry.status().replica();
        if services.is_empty() && !complete {
            replica.followed(term, generation);
            return Ok(());
        }
        self.registry.follow(FollowedServices { term, generation, complete, services }).await?;
        replica.followed(term, generation);
        self.metrics.synced.set(1);
        Ok(())
    }

    async fn restore(&mut self, TakeOver { tenure, turn, restored: reply, .. }: TakeOver) -> Result<(), Unavailable> {
        let found = self.instances.rank.term;
        // Written by a process that this one does not know of, after a Lease was deleted or set back: with the same
        // term nobody could say which of the two wrote last.
        if found >= tenure.term {
            // The receiver may be gone.
            let _ = reply.send(Restored::Outranked(found));
            return Ok(());
        }
        // Taken, so that they are freed: while this process writes, nobody reads them here.
        let validator = self.instances.validator;
        let instances = std::mem::replace(&mut self.instances, SliceInstances::new(validator));
        if instances.skipped > MAX_LOG_LINES {
            warn!("{} more endpoints of slices were skipped or changed", instances.skipped - MAX_LOG_LINES);
        }
        // Before the restore: what is written late from now on is merged, and the next list is for the cache.
        self.fence.set_term(tenure.term);
        self.purpose = Purpose::Writing(LateWrites::new(self.registry.clone(), validator, self.fence.clone()));
        let mut restored = instances.into_state(&tenure);
        let found = restored.services.len();
        restored.services.retain(|(service, _)| !self.cache.is_foreign(service));
        if restored.services.len() < found {
            let foreign = found - restored.services.len();
            warn!(foreign, "slices under Services that are not gangplank's are not restored");
        }
        let (services, found) = (restored.services.len(), restored.term);
        // Without a term this process does not take over any more, or cannot: then the next request is on its way, or the
        // elector gives the Lease up after a while. If the writer has ended, the process ends.
        let Ok(term) = self.registry.restore(turn, restored).await else { return Ok(()) };
        info!(services, found, term, "restored from Kubernetes");
        self.metrics.synced.set(1);
        // The receiver may be gone.
        let _ = reply.send(Restored::Term(term));
        Ok(())
    }
}

impl EventHandler<EndpointSlice> for OwnSlicesHandler<'_> {
    async fn handle(&mut self, events: Vec<ObjectEvent<EndpointSlice>>) -> Result<(), Unavailable> {
        let mut cached_events = Vec::with_capacity(events.len());
        let mut listed = false;
        for event in events {
            let Some(cached) = event.filter_map(CachedSlice::read) else { continue };
            if let (Some(slice), Some(CachedSlice { observed: None, .. })) = (event.object(), cached.object())
                && !matches!(event, ObjectEvent::Delete(_))
            {
                let (namespace, name) = (slice.metadata.namespace.as_deref(), slice.metadata.name.as_deref());
                let (namespace, name) = (namespace.unwrap_or_default(), name.unwrap_or_default());
                warn!("slice {namespace}/{name} names no Service: skipped");
            }
            match &self.purpose {
                Purpose::Writing(late) => {
                    if let ObjectEvent::InitApply(slice) | ObjectEvent::Apply(slice) = &event
                        && let Some(observed) = self.cache.new_slice(&cached)
                        && !self.cache.is_foreign(&observed.service)
                        && late.merge(slice, observed).await.is_err()
                    {
                        // This process ends, or follows from the next list on. What the cache does not know is not replaced.
                        continue;
                    }
                }
                Purpose::Following | Purpose::TakingOver(_) => self.instances.apply(&event, &cached, self.metrics),
            }
            listed |= matches!(event, ObjectEvent::InitDone(_));
            cached_events.push(cached);
        }
        self.cache.apply_slices(cached_events);
        if listed {
            return self.listed().await;
        }
        match self.purpose {
            Purpose::Following => self.follow(false).await,
            Purpose::TakingOver(_) | Purpose::Writing(_) => Ok(()),
        }
    }
}

impl SliceInstances {
    fn new(validator: Validator) -> Self {
        let highest_term = highest_term_now();
        let (view, tombstones) = (SliceView::default(), HashMap::new());
        Self { validator, highest_term, view, tombstones, rank: SliceRank::default(), skipped: 0 }
    }

    fn apply(
        &mut self,
        event: &ObjectEvent<EndpointSlice>,
        cached: &ObjectEvent<CachedSlice>,
        metrics: &KubernetesMetrics,
    ) {
        let slice = match event {
            ObjectEvent::Init => {
                (self.rank, self.skipped) = (SliceRank::default(), 0);
                self.highest_term = self.highest_term.max(highest_term_now());
                self.tombstones.clear();
                return self.view.init();
            }
            ObjectEvent::InitDone(_) => return self.view.init_done(),
            ObjectEvent::Delete(slice) => return self.delete(&slice.metadata),
            ObjectEvent::InitApply(slice) | ObjectEvent::Apply(slice) => slice,
        };
        // A slice that is not ours any more, or is being deleted, holds nothing.
        let Some(observed) = cached.object().and_then(|cached| cached.observed.as_ref()) else {
            return self.delete(&slice.metadata);
        };
        // A higher one was typed by somebody: the next writer would have to go beyond it, until terms are used up.
        let term = if observed.term <= self.highest_term { observed.term } else { 0 };
        let rank = SliceRank { term, generation: observed.generation };
        // Also of a slice that is being deleted: its term was in use.
        self.rank = self.rank.max(rank);
        if observed.deleting {
            return self.delete(&slice.metadata);
        }
        if let Some(mut tombstones) = read_tombstones(slice) {
            // A clock of next year, typed by somebody, would refuse until then whatever an outbox holds.
            // The stamps are for the registry to judge.
            tombstones.lower_refuse_before(HybridClock::highest(UnixMillis::now().0.saturating_mul(1_000)));
            self.delete(&slice.metadata);
            self.tombstones.insert(slice_key(&slice.metadata), (observed.service.clone(), tombstones));
            return;
        }
        let (instances, skipped) = read_slice(slice, &self.validator);
        for skipped in skipped {
            self.skip(&observed.service, &skipped, metrics);
        }
        self.view.apply(&observed.service, &slice.metadata, rank, instances);
    }

    fn delete(&mut self, meta: &ObjectMeta) {
        self.tombstones.remove(&slice_key(meta));
        self.view.delete(meta);
    }

    fn skip(&mut self, service: &ServiceKey, skipped: &SkippedEndpoint, metrics: &KubernetesMetrics) {
        metrics.skipped_endpoints.inc();
        self.skipped += 1;
        if self.skipped <= MAX_LOG_LINES {
            warn!("{service}: {skipped}");
        }
    }

    /// The Lease as it was before counts too: it outlives slices that are deleted with their last instance.
    fn into_state(self, tenure: &Tenure) -> KubernetesState {
        let Self { view, rank, tombstones, .. } = self;
        let lease = tenure.previous.as_ref();
        let lease = lease.map(|lease| SliceRank { term: lease.term, generation: lease.generation });
        let SliceRank { term, generation } = rank.max(lease.unwrap_or_default());
        let services = view.services().map(|service| (service.clone(), view.instances(service)));
        let (services, new_term, had_lease) = (services.collect(), tenure.term, lease.is_some());
        KubernetesState { term, generation, new_term, had_lease, services, tombstones: by_service(tombstones) }
    }
}

/// A term can be as high as the time.
fn highest_term_now() -> u64 {
    let unix_seconds = UnixMillis::now().0 / 1_000;
    Now { boot: BootTime::default(), unix_seconds, eligible: true }.highest_term(0)
}

/// Namespace and name of a slice.
fn slice_key(meta: &ObjectMeta) -> (String, String) {
    (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
}

/// The tombstones of each service. There is one slice of them, or several for a moment.
fn by_service(slices: HashMap<(String, String), (ServiceKey, Tombstones)>) -> Vec<(ServiceKey, Tombstones)> {
    let mut services: HashMap<ServiceKey, Tombstones> = HashMap::new();
    for (service, tombstones) in slices.into_values() {
        let all = services.entry(service).or_default();
        all.raise_refuse_before(tombstones.refuse_before());
        for one in tombstones.iter() {
            all.insert(one.id.clone(), one.stamp);
        }
    }
    services.into_iter().collect()
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

    /// The next list goes on waiting where it was interrupted.
    #[test]
    fn list_that_is_interrupted_while_it_waits_is_followed_by_another() {
        use futures::FutureExt as _;

        let metrics = std::sync::Arc::new(Metrics::new());
        let options = crate::registry::RegistryOptions {
            max_instances: 10,
            quotas: Default::default(),
            deny_addresses: Vec::new(),
            kubernetes: None,
        };
        let (registry, _unrecovered) = crate::registry::new(options, std::sync::Arc::clone(&metrics));
        let (cache, fence) = (ClusterCache::new(), Fence::new());
        let (first, one) = oneshot::channel();
        let (second, other) = oneshot::channel();
        let mut handler =
            OwnSlicesHandler::new(&cache, &registry, &metrics.kubernetes, &fence, VALIDATOR, vec![one, other]);
        let list = || vec![ObjectEvent::Init, ObjectEvent::InitDone("9".into())];
        first.send(()).expect("it waits");
        assert!(handler.handle(list()).now_or_never().is_none(), "one is missing");
        assert!(handler.handle(list()).now_or_never().is_none());
        second.send(()).expect("it waits");
        assert!(handler.handle(list()).now_or_never().is_none(), "the registry has not followed");
        assert!(handler.before.is_empty());
    }

    /// The watches are one task: an error would end all of them, and this process follows from now on.
    #[test]
    fn journal_that_fails_during_a_take_over_does_not_end_the_watches() {
        use futures::FutureExt as _;

        let metrics = std::sync::Arc::new(Metrics::new());
        let options = crate::registry::RegistryOptions {
            max_instances: 10,
            quotas: Default::default(),
            deny_addresses: Vec::new(),
            kubernetes: None,
        };
        let (registry, unrecovered) = crate::registry::new(options, std::sync::Arc::clone(&metrics));
        // Nobody answers the request for a restore.
        drop(unrecovered);
        registry.status().fail_storage();
        let (cache, fence) = (ClusterCache::new(), Fence::new());
        let mut handler = OwnSlicesHandler::new(&cache, &registry, &metrics.kubernetes, &fence, VALIDATOR, Vec::new());
        let (reply, restored) = oneshot::channel();
        handler.begin(SlicesRequest::TakeOver(TakeOver {
            tenure: Tenure::new(4, None),
            highest_term: 9,
            turn: crate::registry::TakeOverTurn::any(),
            restored: reply,
        }));
        let list = vec![ObjectEvent::Init, ObjectEvent::InitDone("9".into())];
        assert_eq!(handler.handle(list).now_or_never(), Some(Ok(())));
        assert!(restored.now_or_never().is_some_and(|restored| restored.is_err()), "it did not take over");
    }

    #[test]
    fn restore_takes_the_newest_slice_and_starts_over_with_the_list() {
        let metrics = Metrics::new().kubernetes;
        let mut restored = SliceInstances::new(VALIDATOR);
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
        apply(ObjectEvent::InitApply(slice("web-by-hand", (u64::MAX, 1), &[("10.0.0.2", true)])));
        let mut gone = slice("web-4", (3, 1), &[("10.0.0.4", true)]);
        gone.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).expect("a time");
        apply(ObjectEvent::InitApply(gone));
        apply(ObjectEvent::InitDone("9".into()));
        assert_eq!((restored.skipped, metrics.skipped_endpoints.get()), (1, 1));
        let KubernetesState { term, generation, services, .. } = restored.into_state(&Tenure::new(4, None));
        assert_eq!((term, generation), (3, 1));
        let [(service, instances)] = &services[..] else { panic!("{services:?}") };
        assert_eq!(service.to_string(), "prod/web");
        let said = instances.iter().map(|one| (one.id().to_string(), one.priority())).collect::<Vec<_>>();
        assert_eq!(said, [("10.0.0.1:80".into(), 3), ("10.0.0.2:80".into(), 0)]);
    }
}
