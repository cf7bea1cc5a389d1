//! Lists and watches what the cluster holds, for the [`ClusterCache`] and the registry.
//!
//! Five watches, whatever the size of the cluster: namespaces, Services, the ranges of their addresses, our own slices, and the
//! slices of other writers under Services that external instances joined ([`joined`]); a sixth with
//! `--endpoints-object`, and one with a CA of gangplank's own, of the Secrets that processes share. Services are watched whole and not only by their metadata, because one
//! watch then reports both the owner and the content, and what is kept of them is the same.
//!
//! The registry learns, in this order: every namespace, every Service and the instances under joined ones; then
//! everything that our slices hold, at once ([`own_slices`]). While another process writes, it follows the slices; at a
//! take-over they are listed again, and the mirror gets the term under which it may write.
//!
//! Nothing here writes. A watch never gives up: without an API server, or without the right to
//! watch, it retries for as long as the registry runs.

mod error;
mod handlers;
mod joined;
mod outage;
mod own_slices;
mod reflector;
mod service_ranges;

use std::{future, sync::Arc};

use k8s_openapi::api::core::v1::{Endpoints, Secret};
use kube::{Api, Client, core::DeserializeGuard};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

pub(super) use self::own_slices::{Restored, SlicesRequest, TakeOver};
use self::{
    handlers::{ClusterFactHandler, EndpointsHandler, SecretsHandler},
    outage::Outages,
    own_slices::OwnSlicesHandler,
    reflector::{Reflector, SHORT_WATCH_SECONDS, WATCH_SECONDS},
    service_ranges::ServiceRangesHandler,
};
use super::{api::Fence, cache::ClusterCache, objects::names, secrets::Secrets};
use crate::{
    metrics::{Metrics, Watched},
    model::Validator,
    registry::{Phase, RegistryHandle, Unavailable},
};

/// The watches.
pub(super) struct Watch {
    /// Its requests have no timeout: each watch sets its own.
    pub(super) client: Client,
    /// URL of the API server, for messages.
    pub(super) server: String,
    pub(super) cache: Arc<ClusterCache>,
    pub(super) registry: RegistryHandle,
    pub(super) fence: Fence,
    /// Checks what is read from slices.
    pub(super) validator: Validator,
    /// Whether to watch our Endpoints objects: `--endpoints-object`.
    pub(super) endpoints: bool,
    /// With a CA of gangplank's own.
    pub(super) secrets: Option<Arc<Secrets>>,
    pub(super) metrics: Arc<Metrics>,
}

impl Watch {
    /// Watches until `stop`. Our own slices are watched from the first request on, or from when another process is known
    /// to write.
    ///
    /// # Errors
    /// When the registry ends before `stop`, or cannot write its journal.
    pub(super) async fn run(
        self,
        requests: mpsc::Receiver<SlicesRequest>,
        stop: &CancellationToken,
    ) -> Result<(), Unavailable> {
        let outages = Outages::new(self.server.clone());
        let (namespaces_listed, namespaces) = oneshot::channel();
        let (services_listed, services) = oneshot::channel();
        let (joined_listed, joined) = oneshot::channel();
        let all = async {
            tokio::select! {
                // None of them ends while the registry runs: the first that does ends all.
                gone = self.namespaces(&outages, namespaces_listed) => gone,
                gone = self.services(&outages, services_listed) => gone,
                gone = self.slices(&outages, requests, vec![namespaces, joined]) => gone,
                gone = self.joined(&outages, services, joined_listed) => gone,
                gone = self.service_ranges(&outages) => gone,
                gone = self.endpoints(&outages), if self.endpoints => gone,
                gone = self.secrets(&outages) => gone,
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

    /// The ranges of the cluster's Services. Nothing waits for them: without them no identity registers anything.
    async fn service_ranges(&self, outages: &Outages) -> Unavailable {
        let mut handler = ServiceRangesHandler::new(&self.registry);
        let api = Api::all(self.client.clone());
        self.reflector(api, Watched::ServiceCidrs, String::new(), outages).run(&mut handler).await
    }

    /// Our own slices, once it is known who writes.
    async fn slices(
        &self,
        outages: &Outages,
        mut requests: mpsc::Receiver<SlicesRequest>,
        before: Vec<oneshot::Receiver<()>>,
    ) -> Unavailable {
        let (registry, metrics) = (&self.registry, &self.metrics.kubernetes);
        let mut handler = OwnSlicesHandler::new(&self.cache, registry, metrics, &self.fence, self.validator, before);
        let (mut phases, mut owners) = (registry.status().watch(), self.cache.owner_changes());
        let mut next = tokio::select! {
            Some(request) = requests.recv() => Some(request),
            // Before it is known who writes, a list would be read for nothing.
            Ok(_) = phases.wait_for(|phase| matches!(phase, Phase::Standby(_))) => None,
        };
        let labels = format!("{}={}", names::MANAGED_BY, names::MANAGER);
        let reflector = self.reflector(Api::all(self.client.clone()), Watched::Slices, labels, outages);
        let reflector = Reflector { follows: Some(registry.status()), ..reflector };
        loop {
            if let Some(request) = next.take() {
                handler.begin(request);
            }
            tokio::select! {
                gone = reflector.run(&mut handler) => return gone,
                // The handler may be dropped in the middle of a batch: the list that follows compares everything.
                Some(request) = requests.recv() => next = Some(request),
                // A list for the same purpose: slices under that Service count from now on, or count no more.
                Ok(()) = owners.changed() => {}
            }
        }
    }

    /// Our Endpoints objects. Only what changed is of interest: the mirror reads them itself.
    async fn endpoints(&self, outages: &Outages) -> Unavailable {
        let mut handler = EndpointsHandler { cache: &self.cache };
        let labels = format!("{}={}", names::SERVICE, names::OWNED);
        let api: Api<DeserializeGuard<Endpoints>> = Api::all(self.client.clone());
        self.reflector(api, Watched::Endpoints, labels, outages).run(&mut handler).await
    }

    /// The Secrets that processes share.
    async fn secrets(&self, outages: &Outages) -> Unavailable {
        let Some(secrets) = &self.secrets else { return future::pending().await };
        let mut handler = SecretsHandler { secrets };
        let api: Api<DeserializeGuard<Secret>> = Api::namespaced(self.client.clone(), secrets.namespace());
        let reflector = self.reflector(api, Watched::Secrets, names::JOINING.to_owned(), outages);
        // A revocation is noticed in time although the connection has died silently.
        Reflector { renewal: SHORT_WATCH_SECONDS, ..reflector }.run(&mut handler).await
    }

    fn reflector<'a, K>(
        &'a self,
        api: Api<DeserializeGuard<K>>,
        watched: Watched,
        labels: String,
        outages: &'a Outages,
    ) -> Reflector<'a, K> {
        let (renewal, metrics) = (WATCH_SECONDS, &self.metrics.kubernetes);
        Reflector { api, watched, labels, renewal, metrics, outages, follows: None }
    }
}
