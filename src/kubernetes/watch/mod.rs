//! Lists and watches what the cluster holds, for the [`ClusterCache`] and the registry.
//!
//! Four watches, whatever the size of the cluster: namespaces, Services, our own slices, and the
//! slices of other writers under Services that external instances joined ([`joined`]); a fifth with
//! `--endpoints-object`. Services are watched whole and not only by their metadata, because one
//! watch then reports both the owner and the content, and what is kept of them is the same.
//!
//! At the start the registry learns, in this order: every namespace, every Service and the instances
//! under joined ones; then everything that our slices hold, at once. Then it returns the term, with
//! which the mirror may write.
//!
//! Nothing here writes. A watch never gives up: without an API server, or without the right to
//! watch, it retries for as long as the registry runs.

mod error;
mod handlers;
mod joined;
mod outage;
mod reflector;
mod restore;

use std::sync::Arc;

use k8s_openapi::api::core::v1::Endpoints;
use kube::{Api, Client, core::DeserializeGuard};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

pub(super) use self::restore::Restored;
use self::{
    handlers::{ClusterFactHandler, EndpointsHandler, OwnSlicesHandler},
    outage::Outages,
    reflector::Reflector,
    restore::{InitialRestore, RestoredInstances},
};
use super::{cache::ClusterCache, objects::names};
use crate::{
    metrics::{Metrics, Watched},
    model::Validator,
    registry::{RegistryHandle, Unavailable},
    replicas::election::Tenure,
};

/// The watches.
pub(super) struct Watch {
    /// Its requests have no timeout: each watch sets its own.
    pub(super) client: Client,
    /// URL of the API server, for messages.
    pub(super) server: String,
    pub(super) cache: Arc<ClusterCache>,
    pub(super) registry: RegistryHandle,
    /// Checks what is read from slices.
    pub(super) validator: Validator,
    /// Whether to watch our Endpoints objects: `--endpoints-object`.
    pub(super) endpoints: bool,
    pub(super) metrics: Arc<Metrics>,
}

impl Watch {
    /// Watches until `stop`, and restores the registry under `tenure`. Sends the term under which slices
    /// are written from then on, when the registry holds what Kubernetes held.
    ///
    /// # Errors
    /// When the registry ends before `stop`, or cannot write its journal.
    pub(super) async fn run(
        self,
        tenure: Tenure,
        highest_term: u64,
        started: oneshot::Sender<Restored>,
        stop: &CancellationToken,
    ) -> Result<(), Unavailable> {
        let outages = Outages::new(self.server.clone());
        let (namespaces_listed, namespaces) = oneshot::channel();
        let (services_listed, services) = oneshot::channel();
        let (joined_listed, joined) = oneshot::channel();
        let instances = RestoredInstances::new(self.validator, highest_term);
        let restore = InitialRestore::new(&self.registry, &self.metrics.kubernetes, tenure, instances, started);
        let restore = restore.after(namespaces, joined);
        let all = async {
            tokio::select! {
                gone = self.namespaces(&outages, namespaces_listed) => gone,
                gone = self.services(&outages, services_listed) => gone,
                gone = self.slices(&outages, restore) => gone,
                gone = self.joined(&outages, services, joined_listed) => gone,
                gone = self.endpoints(&outages), if self.endpoints => gone,
            }
        };
        stop.run_until_cancelled(all).await.map_or(Ok(()), Err)
    }

    async fn namespaces(&self, outages: &Outages, listed: oneshot::Sender<()>) -> Unavailable {
        let apply = Box::new(|events| self.cache.apply_namespaces(events));
        let mut handler = ClusterFactHandler { registry: &self.registry, apply, listed: Some(listed) };
        let api = Api::all(self.client.clone());
        self.reflector(api, Watched::Namespaces, String::new(), outages).run(&mut handler).await
    }

    async fn services(&self, outages: &Outages, listed: oneshot::Sender<()>) -> Unavailable {
        let apply = Box::new(|events| self.cache.apply_services(events));
        let mut handler = ClusterFactHandler { registry: &self.registry, apply, listed: Some(listed) };
        let api = Api::all(self.client.clone());
        self.reflector(api, Watched::Services, String::new(), outages).run(&mut handler).await
    }

    async fn slices(&self, outages: &Outages, restore: InitialRestore<'_>) -> Unavailable {
        let mut handler = OwnSlicesHandler { cache: &self.cache, restore: Some(restore) };
        let labels = format!("{}={}", names::MANAGED_BY, names::MANAGER);
        let api = Api::all(self.client.clone());
        self.reflector(api, Watched::Slices, labels, outages).run(&mut handler).await
    }

    /// Our Endpoints objects. Only what changed is of interest: the mirror reads them itself.
    async fn endpoints(&self, outages: &Outages) -> Unavailable {
        let mut handler = EndpointsHandler { cache: &self.cache };
        let labels = format!("{}={}", names::SERVICE, names::OWNED);
        let api: Api<DeserializeGuard<Endpoints>> = Api::all(self.client.clone());
        self.reflector(api, Watched::Endpoints, labels, outages).run(&mut handler).await
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
