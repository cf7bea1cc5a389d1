//! Watches what stands in Kubernetes, and tells the [`ClusterCache`] and the registry.
//!
//! Namespaces, Services and the slices of gangplank are watched in the whole cluster, the slices of
//! others only under Services that external instances joined: one watch, and one connection, for
//! each of those. Services are watched whole and not only by their metadata: one watch then says
//! both whose a Service is and how it looks, and what is kept is the same.
//!
//! At the start the registry learns, in this order: every namespace, every Service and what stands
//! under joined ones; then everything that our slices hold, at once. Then the mirror may write: it
//! gets the term.
//!
//! Nothing here writes. A watch never gives up: without an API server, or without the right to
//! watch, it is tried again for as long as the registry is there.

mod handlers;
mod outage;
mod reflector;

use std::{collections::HashMap, sync::Arc};

use futures::{StreamExt, stream::FuturesUnordered};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{Api, Client, core::DeserializeGuard};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use self::{
    handlers::{
        ClusterFactHandler, InitialLoadGuard, InitialRestore, JoinedSlicesHandler, OwnSlicesHandler, RestoredSlices,
    },
    outage::Outages,
    reflector::Reflector,
};
use super::{cache::ClusterCache, objects::names};
use crate::{
    metrics::{Metrics, Watched},
    model::{ServiceKey, Validator},
    registry::{ClusterFact, RegistryHandle, Unavailable},
};

/// What is needed to watch.
pub(super) struct Watch {
    /// ApiClient of its own have no deadline: it is set here.
    pub(super) client: Client,
    /// URL of the API server, for messages.
    pub(super) server: String,
    pub(super) cache: Arc<ClusterCache>,
    pub(super) registry: RegistryHandle,
    /// What slices have to pass.
    pub(super) validator: Validator,
    pub(super) metrics: Arc<Metrics>,
}

impl Watch {
    /// Watches until `stop`. Sends the term, under which slices are written from then on, when the
    /// registry holds what Kubernetes held.
    ///
    /// # Errors
    /// When the registry is gone before `stop`, or cannot write its journal.
    pub(super) async fn run(self, started: oneshot::Sender<u64>, stop: &CancellationToken) -> Result<(), Unavailable> {
        let outages = Outages::new(self.server.clone());
        let (namespaces_known, namespaces) = oneshot::channel();
        let (services_known, services) = oneshot::channel();
        let (loading, joined) = mpsc::channel(1);
        let restore = InitialRestore {
            registry: &self.registry,
            validator: self.validator,
            metrics: &self.metrics.kubernetes,
            namespaces,
            joined,
            started,
            found: RestoredSlices::default(),
        };
        let all = async {
            tokio::select! {
                gone = self.namespaces(&outages, namespaces_known) => gone,
                gone = self.services(&outages, services_known) => gone,
                gone = self.slices(&outages, restore) => gone,
                gone = self.joined(&outages, services, loading) => gone,
            }
        };
        stop.run_until_cancelled(all).await.map_or(Ok(()), Err)
    }

    async fn namespaces(&self, outages: &Outages, complete: oneshot::Sender<()>) -> Unavailable {
        let apply = Box::new(|events| self.cache.apply_namespaces(events));
        let mut handler = ClusterFactHandler { registry: &self.registry, apply, complete: Some(complete) };
        let api = Api::all(self.client.clone());
        self.reflector(api, Watched::Namespaces, String::new(), outages).run(&mut handler).await
    }

    async fn services(&self, outages: &Outages, complete: oneshot::Sender<()>) -> Unavailable {
        let apply = Box::new(|events| self.cache.apply_services(events));
        let mut handler = ClusterFactHandler { registry: &self.registry, apply, complete: Some(complete) };
        let api = Api::all(self.client.clone());
        self.reflector(api, Watched::Services, String::new(), outages).run(&mut handler).await
    }

    async fn slices(&self, outages: &Outages, restore: InitialRestore<'_>) -> Unavailable {
        let mut handler = OwnSlicesHandler { cache: &self.cache, restore: Some(restore) };
        let labels = format!("{}={}", names::MANAGED_BY, names::MANAGER);
        let api = Api::all(self.client.clone());
        self.reflector(api, Watched::Slices, labels, outages).run(&mut handler).await
    }

    /// One watch per joined Service, begun and ended as they come and go. `loading` is held until
    /// every Service that is joined when the Services are `known` was read once.
    async fn joined(
        &self,
        outages: &Outages,
        mut known: oneshot::Receiver<()>,
        loading: InitialLoadGuard,
    ) -> Unavailable {
        let mut loading = Some(loading);
        let mut wanted = self.cache.joined();
        let mut watches = FuturesUnordered::new();
        // An entry goes when its watch has ended, so that no two of one Service overlap.
        let mut running: HashMap<ServiceKey, CancellationToken> = HashMap::new();
        let mut complete = false;
        loop {
            let services = wanted.borrow_and_update().clone();
            running.iter().filter(|(service, _)| !services.contains(*service)).for_each(|(_, stop)| stop.cancel());
            for service in services {
                if !running.contains_key(&service) {
                    let stop = CancellationToken::new();
                    running.insert(service.clone(), stop.clone());
                    watches.push(self.joined_service(outages, service, stop, loading.clone()));
                }
            }
            if complete {
                loading = None;
            }
            tokio::select! {
                changed = wanted.changed() => changed.expect("the cluster is held here"),
                _ = &mut known, if !complete => complete = true,
                Some((service, ended)) = watches.next() => match ended {
                    Ok(()) => drop(running.remove(&service)),
                    Err(gone) => return gone,
                },
            }
        }
    }

    /// What others have under a joined Service, until it is not joined any more.
    async fn joined_service(
        &self,
        outages: &Outages,
        service: ServiceKey,
        stop: CancellationToken,
        loading: Option<InitialLoadGuard>,
    ) -> (ServiceKey, Result<(), Unavailable>) {
        let labels = format!("{}={},{}!={}", names::SERVICE_NAME, service.name(), names::MANAGED_BY, names::MANAGER);
        let api: Api<DeserializeGuard<EndpointSlice>> = Api::namespaced(self.client.clone(), service.namespace());
        let reflector = self.reflector(api, Watched::Joined, labels, outages);
        let mut handler = JoinedSlicesHandler::new(&self.registry, self.validator, service.clone(), loading);
        let ended = match stop.run_until_cancelled(reflector.run(&mut handler)).await {
            Some(gone) => Err(gone),
            // The watch is dropped: nothing of it comes after this.
            None => {
                self.registry
                    .learn(vec![ClusterFact::Endpoints { service: service.clone(), instances: Vec::new() }])
                    .await
            }
        };
        (service, ended)
    }

    fn reflector<'a, K>(
        &'a self,
        api: Api<DeserializeGuard<K>>,
        watched: Watched,
        labels: String,
        outages: &'a Outages,
    ) -> Reflector<'a, K> {
        Reflector { api, watched, labels, metrics: &self.metrics.kubernetes, outages }
    }
}
