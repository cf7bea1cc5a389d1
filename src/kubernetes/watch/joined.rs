//! The slices of other writers under Services that external instances joined.
//!
//! One watch serves all joined Services, so that the connections and watches at the API server do
//! not grow with their number. Its selector names them; when a Service joins or leaves, the watch
//! begins again with a list. Instances stay as they are until that list is complete.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use tokio::{
    sync::{oneshot, watch},
    time::sleep,
};

use super::{Watch, outage::Outages, reflector::EventHandler};
use crate::{
    kubernetes::{
        cache::ObjectEvent,
        objects::{
            names,
            slices::{SliceRank, SliceView, read_foreign_slice, service_of},
        },
    },
    metrics::Watched,
    model::{Instance, ServiceKey, Validator},
    registry::{ClusterFact, RegistryHandle, Unavailable},
};

/// The watch begins again this long after the set of joined Services changed, and up to twice as
/// long, so that many that join at once cost one list.
const JOIN_DEBOUNCE: Duration = Duration::from_millis(250);

/// Most names in the selector of the watch. They are part of the URL, which proxies limit, often to
/// 8 KiB. With more names the watch is of all slices of other writers, and those of Services that
/// are not joined are dropped here.
const MAX_SELECTOR_NAMES: usize = 100;

/// Publishes the instances of every joined Service to the registry.
struct JoinedSlicesHandler<'a> {
    registry: &'a RegistryHandle,
    joined: JoinedInstances,
    /// Notified after the first complete list.
    listed: Option<oneshot::Sender<()>>,
}

/// The instances of other writers under joined Services.
struct JoinedInstances {
    validator: Validator,
    /// The joined Services that the watch is about.
    services: BTreeSet<ServiceKey>,
    view: SliceView,
    /// What the registry knows.
    published: BTreeMap<ServiceKey, Vec<Arc<Instance>>>,
}

impl Watch {
    /// Watches the slices of other writers under joined Services. `services` resolves when every
    /// Service is known; `listed` is notified when the registry has the instances of those that are
    /// joined then.
    pub(super) async fn joined(
        &self,
        outages: &Outages,
        services: oneshot::Receiver<()>,
        listed: oneshot::Sender<()>,
    ) -> Unavailable {
        // The sender is dropped early only when everything ends.
        let _ = services.await;
        let mut joined = self.cache.joined();
        let mut handler = JoinedSlicesHandler::new(&self.registry, self.validator, listed);
        loop {
            let services = joined.borrow_and_update().clone();
            if let Err(gone) = handler.watch_only(services).await {
                return gone;
            }
            if handler.joined.services.is_empty() {
                handler.notify_listed();
                changed(&mut joined).await;
                continue;
            }
            let labels = selector(&handler.joined.services);
            let reflector = self.reflector(Api::all(self.client.clone()), Watched::Joined, labels, outages);
            tokio::select! {
                gone = reflector.run(&mut handler) => return gone,
                // The handler may be dropped in the middle of a batch: the list that follows
                // compares everything.
                () = changed(&mut joined) => {}
            }
        }
    }
}

/// Waits until the set of joined Services changed, and for the debounce.
async fn changed(joined: &mut watch::Receiver<BTreeSet<ServiceKey>>) {
    joined.changed().await.expect("the cache outlives its watches");
    sleep(JOIN_DEBOUNCE.mul_f64(1.0 + fastrand::f64())).await;
}

/// The label selector for the slices of other writers under `services`. It cannot name namespaces.
fn selector(services: &BTreeSet<ServiceKey>) -> String {
    let of_others = format!("{}!={}", names::MANAGED_BY, names::MANAGER);
    let service_names: BTreeSet<&str> = services.iter().map(ServiceKey::name).collect();
    if service_names.len() > MAX_SELECTOR_NAMES {
        return format!("{},{of_others}", names::SERVICE_NAME);
    }
    let service_names: Vec<&str> = service_names.into_iter().collect();
    format!("{} in ({}),{of_others}", names::SERVICE_NAME, service_names.join(","))
}

impl<'a> JoinedSlicesHandler<'a> {
    fn new(registry: &'a RegistryHandle, validator: Validator, listed: oneshot::Sender<()>) -> Self {
        Self { registry, joined: JoinedInstances::new(validator), listed: Some(listed) }
    }

    /// Watches these Services from now on, and withdraws the instances of all others.
    async fn watch_only(&mut self, services: BTreeSet<ServiceKey>) -> Result<(), Unavailable> {
        // Withdrawn at once: nobody watches them any more, so what is published would only grow old.
        let left = self.joined.watch_only(services);
        self.publish(&left).await
    }

    async fn publish(&mut self, services: &BTreeSet<ServiceKey>) -> Result<(), Unavailable> {
        let unpublished = self.joined.unpublished(services);
        if unpublished.is_empty() {
            return Ok(());
        }
        let facts = unpublished.iter().map(|(service, instances)| ClusterFact::Endpoints {
            service: service.clone(),
            instances: instances.clone(),
        });
        self.registry.learn(facts.collect()).await?;
        // Only now: facts that are dropped at the await are unpublished still, and the next list
        // finds them.
        self.joined.published(unpublished);
        Ok(())
    }

    fn notify_listed(&mut self) {
        if let Some(listed) = self.listed.take() {
            // The receiver may be gone.
            let _ = listed.send(());
        }
    }
}

impl EventHandler<EndpointSlice> for JoinedSlicesHandler<'_> {
    async fn handle(&mut self, events: Vec<ObjectEvent<EndpointSlice>>) -> Result<(), Unavailable> {
        let init_done = events.iter().any(|event| matches!(event, ObjectEvent::InitDone(_)));
        let changed = self.joined.apply(events);
        self.publish(&changed).await?;
        if init_done {
            self.notify_listed();
        }
        Ok(())
    }
}

impl JoinedInstances {
    fn new(validator: Validator) -> Self {
        Self { validator, services: BTreeSet::new(), view: SliceView::default(), published: BTreeMap::new() }
    }

    /// Is about these Services from now on. Returns the others that have published instances.
    fn watch_only(&mut self, services: BTreeSet<ServiceKey>) -> BTreeSet<ServiceKey> {
        self.services = services;
        self.view.retain(&self.services);
        self.published.keys().filter(|service| !self.services.contains(*service)).cloned().collect()
    }

    /// Applies events and returns the services to compare with what is published: those that
    /// changed, after a list all of them, and none while a list is being read.
    fn apply(&mut self, events: Vec<ObjectEvent<EndpointSlice>>) -> BTreeSet<ServiceKey> {
        let mut compare = BTreeSet::new();
        for event in events {
            match event {
                ObjectEvent::Init => self.view.init(),
                ObjectEvent::InitDone(_) => {
                    self.view.init_done();
                    compare.extend(self.services.iter().cloned());
                }
                ObjectEvent::InitApply(slice) | ObjectEvent::Apply(slice) => self.apply_slice(&slice),
                ObjectEvent::Delete(slice) => self.view.delete(&slice.metadata),
            }
        }
        compare.extend(self.view.take_changed());
        compare
    }

    fn apply_slice(&mut self, slice: &EndpointSlice) {
        match service_of(&slice.metadata).filter(|service| self.services.contains(service)) {
            Some(service) => {
                let instances = read_foreign_slice(slice, &self.validator);
                self.view.apply(&service, &slice.metadata, SliceRank::default(), instances);
            }
            // Of a Service of the same name in another namespace, or moved to another Service.
            None => self.view.delete(&slice.metadata),
        }
    }

    /// The instances of those of `services` whose instances are not published.
    fn unpublished(&self, services: &BTreeSet<ServiceKey>) -> Vec<(ServiceKey, Vec<Arc<Instance>>)> {
        let now = services.iter().map(|service| (service, self.view.instances(service)));
        // Compared with what the registry has, not with the event: many events change nothing that is served.
        let differs = now.filter(|(service, now)| *now != *self.published.get(*service).map_or(&[][..], Vec::as_slice));
        differs.map(|(service, now)| (service.clone(), now)).collect()
    }

    /// The registry knows these now.
    fn published(&mut self, instances: Vec<(ServiceKey, Vec<Arc<Instance>>)>) {
        for (service, instances) in instances {
            if instances.is_empty() {
                self.published.remove(&service);
            } else {
                self.published.insert(service, instances);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const VALIDATOR: Validator = Validator { zone_wire_len: 15, names_allowed: false };

    fn services(names: impl IntoIterator<Item = (&'static str, String)>) -> BTreeSet<ServiceKey> {
        names.into_iter().map(|(namespace, name)| VALIDATOR.service(namespace, &name).expect("valid")).collect()
    }

    #[test]
    fn selector_names_each_service_once_and_has_a_limit() {
        let two = services([("prod", "web".into()), ("stage", "web".into()), ("prod", "db".into())]);
        assert_eq!(
            selector(&two),
            "kubernetes.io/service-name in (db,web),endpointslice.kubernetes.io/managed-by!=gangplank.dev"
        );
        let most = services((0..MAX_SELECTOR_NAMES).map(|at| ("prod", format!("{}{at:03}", "a".repeat(60)))));
        assert!(selector(&most).len() < 8 * 1024, "{}", selector(&most).len());
        let more = services((0..=MAX_SELECTOR_NAMES).map(|at| ("prod", format!("s{at}"))));
        assert_eq!(selector(&more), "kubernetes.io/service-name,endpointslice.kubernetes.io/managed-by!=gangplank.dev");
    }

    fn slice(namespace: &str, service: &str, name: &str, endpoints: &[(&str, bool)]) -> EndpointSlice {
        let endpoint =
            |(address, ready): &(&str, bool)| json!({ "addresses": [address], "conditions": { "ready": ready } });
        let slice = json!({
            "metadata": { "namespace": namespace, "name": name, "labels": { names::SERVICE_NAME: service } },
            "addressType": "IPv4",
            "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
        });
        serde_json::from_value(slice).expect("an EndpointSlice")
    }

    #[test]
    fn endpoints_of_others_are_published_once_as_one_set() {
        let mut joined = JoinedInstances::new(VALIDATOR);
        joined.watch_only(services([("prod", "web".into())]));
        let mut apply = |event| {
            let changed = joined.apply(vec![event]);
            let unpublished = joined.unpublished(&changed);
            joined.published(unpublished.clone());
            let text = |one: &Arc<Instance>| format!("{} {}", one.address(), one.ready());
            let one = |(service, all): (ServiceKey, Vec<Arc<Instance>>)| {
                format!("{service}: {}", all.iter().map(text).collect::<Vec<_>>().join(", "))
            };
            unpublished.into_iter().map(one).collect::<Vec<_>>()
        };
        let web = |name, endpoints: &[(&str, bool)]| slice("prod", "web", name, endpoints);
        assert_eq!(apply(ObjectEvent::Init), [""; 0]);
        assert_eq!(apply(ObjectEvent::InitApply(web("a", &[("10.0.0.1", false)]))), [""; 0], "half a list");
        assert_eq!(apply(ObjectEvent::InitApply(web("b", &[("10.0.0.1", true), ("10.0.0.2", true)]))), [""; 0]);
        let other = slice("stage", "web", "c", &[("10.0.0.9", true)]);
        assert_eq!(apply(ObjectEvent::InitApply(other)), [""; 0]);
        assert_eq!(apply(ObjectEvent::InitDone("1".into())), ["prod/web: 10.0.0.1 true, 10.0.0.2 true"]);
        assert_eq!(apply(ObjectEvent::Apply(web("a", &[]))), [""; 0], "the same as before");
        assert_eq!(apply(ObjectEvent::Delete(web("b", &[]))), ["prod/web: "]);
        assert_eq!(apply(ObjectEvent::Apply(web("c", &[("10.0.0.3", true)]))), ["prod/web: 10.0.0.3 true"]);
        assert_eq!(apply(ObjectEvent::Init), [""; 0]);
        assert_eq!(apply(ObjectEvent::InitDone("2".into())), ["prod/web: "], "deleted between two lists");
    }

    #[test]
    fn service_that_leaves_is_withdrawn_and_dropped_facts_are_found_by_the_next_list() {
        let (web, shop) = (services([("prod", "web".into())]), services([("prod", "shop".into())]));
        let mut joined = JoinedInstances::new(VALIDATOR);
        joined.watch_only(web.union(&shop).cloned().collect());
        let list = |joined: &mut JoinedInstances| {
            joined.apply(vec![
                ObjectEvent::Init,
                ObjectEvent::InitApply(slice("prod", "web", "a", &[("10.0.0.1", true)])),
                ObjectEvent::InitApply(slice("prod", "shop", "b", &[("10.0.0.2", true)])),
                ObjectEvent::InitDone("1".into()),
            ])
        };
        let changed = list(&mut joined);
        assert_eq!(joined.unpublished(&changed).len(), 2);
        // Dropped before the registry had them.
        let changed = list(&mut joined);
        let unpublished = joined.unpublished(&changed);
        assert_eq!(unpublished.len(), 2);
        joined.published(unpublished);
        let left = joined.watch_only(shop);
        assert_eq!(left, web);
        let unpublished = joined.unpublished(&left);
        assert!(matches!(&unpublished[..], [(_, none)] if none.is_empty()), "{unpublished:?}");
    }
}
