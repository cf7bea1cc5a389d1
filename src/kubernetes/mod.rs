//! Kubernetes: what is registered, as headless Services and EndpointSlices, and back.
//!
//! Seven rooms; imports between them point down:
//!
//! * [`objects`]: Services, EndpointSlices and Endpoints as pure functions.
//! * `api`: the client, its rate limit and its errors.
//! * `cache`: what the cluster holds, fed by the watches and by our own writes.
//! * [`secrets`]: Secrets of gangplank's own, which all processes share.
//! * `replicas`: the Lease, by which one process at a time writes.
//! * `watch`: lists and watches; feeds the cache and tells the registry what follows for
//!   registrations.
//! * `mirror`: the controller that makes the objects in Kubernetes match the registry.
//!
//! DNS never waits for any of it.

pub mod api;
mod cache;
mod mirror;
pub mod objects;
mod replicas;
pub mod secrets;
mod watch;

use std::{convert::Infallible, fmt, future, num::NonZeroU32, path::PathBuf, sync::Arc, time::Duration};

use kube::{
    Client,
    runtime::events::{Recorder, Reporter},
};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

pub use api::ConnectError;
pub use objects::slices::{DEFAULT_MAX_ENDPOINTS, MAX_ENDPOINTS};

use self::{
    api::{ApiClient, Fence},
    cache::ClusterCache,
    mirror::{Mirror, Reconciler},
    objects::names,
    replicas::{Elector, ElectorHandle, LeaseClient, ReplicaHandle, ServiceSlices, Turn, WriterEvents},
    secrets::Secrets,
    watch::{Restored, SlicesRequest, TakeOver, Watch},
};
use crate::{
    metrics::Metrics,
    model::{ReplicaRole, ServerAddress, Validator},
    registry::{LeaseHolder, RegistryHandle, Unavailable},
    replicas::{election::Tenure, lease::DirectoryId},
};

/// How to reach Kubernetes, and what to write there.
#[derive(Debug, Clone)]
pub struct KubernetesOptions {
    /// `None`: the ServiceAccount of the pod.
    pub kubeconfig: Option<PathBuf>,
    /// Where the Lease is. `None`: the namespace of the ServiceAccount, or of the kubeconfig's context.
    pub lease_namespace: Option<String>,
    /// The Service that leads registrants to the writer, in the namespace of the Lease.
    pub grpc_service: Option<String>,
    /// Create namespaces that do not exist.
    pub create_namespaces: bool,
    /// Most endpoints in a slice, 1..=1000. Default 100.
    pub max_endpoints: usize,
    /// Write the older Endpoints object too.
    pub endpoints_object: bool,
    /// Most requests to the API server a second; twice as many at once.
    pub requests_per_second: NonZeroU32,
    /// How long a Service of ours stays without instances.
    pub linger: Duration,
    /// Show instances that are not ready as ready.
    pub publish_not_ready: bool,
    /// A DNS name that is alone in its service is no alias: its addresses are shown.
    pub flatten_names: bool,
    /// Checks what is read from slices.
    pub validator: Validator,
}

/// A client of the API server that has made no request yet.
pub struct Kubernetes {
    client: Client,
    /// URL of the API server, for messages.
    server: String,
    /// Where the Lease is.
    namespace: String,
    /// Where registrants reach this process.
    addresses: Vec<ServerAddress>,
    /// Followed, with a CA of gangplank's own.
    secrets: Option<Arc<Secrets>>,
    options: KubernetesOptions,
}

impl fmt::Debug for Kubernetes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kubernetes").field("server", &self.server).finish_non_exhaustive()
    }
}

impl Kubernetes {
    /// Makes a client from a kubeconfig or a ServiceAccount. Makes no request. `addresses` are where registrants reach
    /// this process; `secrets` are followed.
    ///
    /// # Errors
    /// When there is no usable kubeconfig, or no ServiceAccount where none was given.
    pub async fn connect(
        options: KubernetesOptions,
        addresses: Vec<ServerAddress>,
        secrets: Option<Arc<Secrets>>,
    ) -> Result<Self, ConnectError> {
        let api::Connection { client, server, namespace } = api::connect(options.kubeconfig.as_deref()).await?;
        let namespace = options.lease_namespace.clone().unwrap_or(namespace);
        Ok(Self { client, server, namespace, addresses, secrets, options })
    }

    /// Follows what another process writes, or takes the Lease, restores the registry from the cluster, and mirrors the
    /// registry into it, until `stop`. Waits for the Lease, and for an API server that does not answer, without a limit.
    /// `directory` identifies the data directory on this machine since its boot.
    pub async fn run(
        self,
        directory: u128,
        registry: RegistryHandle,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) -> Result<(), Infallible> {
        info!(server = %self.server, "mirroring into Kubernetes");
        let host = gethostname::gethostname().to_string_lossy().into_owned();
        let (client, addresses) = (self.client.clone(), self.addresses.clone());
        let lease = LeaseClient::new(client, self.namespace.clone(), DirectoryId(directory), host.clone(), addresses);
        let replica = registry.status().replica();
        replica.set_name(lease.identity(), self.addresses.clone());
        replica.set_role(ReplicaRole::Standby, 0);
        let events = Recorder::new(self.client.clone(), reporter(&host));
        let changes = WriterEvents::new(self.client.clone(), events, self.namespace.clone(), lease.identity());
        let changes = changes.run(registry.status());
        let (elector, handle) = Elector::new(lease, registry.clone(), Arc::clone(&metrics));
        let ReplicaHandle { mut turns, elector: reports, fence } = handle;
        let cache = Arc::new(ClusterCache::new());
        let watch = Watch {
            client: self.client.clone(),
            server: self.server.clone(),
            cache: Arc::clone(&cache),
            registry: registry.clone(),
            fence: fence.clone(),
            validator: self.options.validator,
            endpoints: self.options.endpoints_object,
            secrets: self.secrets.clone(),
            metrics: Arc::clone(&metrics),
        };
        let (slices, requests) = mpsc::channel(1);
        let watching = async {
            // The process ends with the registry, which reports itself why. The elector waits for the stop.
            if let Err(err) = watch.run(requests, &stop).await
                && !stop.is_cancelled()
            {
                error!(%err, "the watches of Kubernetes have ended with the registry");
            }
            future::pending().await
        };
        let service_slices = self.service_slices(fence.clone(), Arc::clone(&metrics));
        let mirror = |term| {
            let (cache, registry, metrics) = (Arc::clone(&cache), registry.clone(), Arc::clone(&metrics));
            self.mirror(term, fence.clone(), cache, host.clone(), registry, metrics)
        };
        // Apart from the mirror: an answer that no slice confirms waits for the Lease only, whatever the mirror is busy
        // with.
        let answers = async {
            loop {
                let askers = registry.mirror_progress().take_askers().await;
                fence.confirmed().await;
                askers.answer();
            }
        };
        let deposed = async {
            let mut terms = fence.higher_terms();
            // The sender lives as long as the fence.
            while terms.changed().await.is_ok() {
                let term = *terms.borrow_and_update();
                reports.outranked(term).await;
            }
            future::pending().await
        };
        let writing = async {
            let mut turn = turns.recv().await;
            loop {
                turn = match turn {
                    // The next turn drops what this one does: no write of an earlier term begins after that.
                    Some(Turn::TakeOver(tenure, highest_term)) => tokio::select! {
                        next = turns.recv() => next,
                        never = async {
                            // Nothing is written before the slices are listed and the registry has compared.
                            if let Some(term) = take_over(&reports, &registry, tenure, highest_term, &slices).await {
                                mirror(term).run(stop.clone()).await;
                            }
                            future::pending().await
                        } => never,
                    },
                    Some(Turn::Rewrite(term)) => tokio::select! {
                        next = turns.recv() => next,
                        never = async {
                            // Its own slices show it soon.
                            fence.set_term(term);
                            if registry.raise_term(term).await.is_ok() {
                                mirror(term).run(stop.clone()).await;
                            }
                            future::pending().await
                        } => never,
                    },
                    Some(Turn::StandDown { holder, outranked }) => {
                        // An error means that the process ends. Its elector may have another turn, and waits until it is taken.
                        if stand_down(&registry, holder, outranked).await.is_ok() {
                            let _ = slices.send(SlicesRequest::Follow).await;
                        }
                        turns.recv().await
                    }
                    None => future::pending().await,
                }
            }
        };
        tokio::select! {
            // The elector alone ends: it gives the Lease up after the stop, which the others must not cut short.
            () = elector.run(stop.clone()) => Ok(()),
            never = watching => never,
            never = writing => never,
            never = service_slices => match never {},
            never = changes => match never {},
            never = answers => never,
            never = deposed => never,
        }
    }

    /// Keeps the slices of `--grpc-service`.
    async fn service_slices(&self, fence: Fence, metrics: Arc<Metrics>) -> Infallible {
        let Some(service) = self.options.grpc_service.clone() else { return future::pending().await };
        let per_second = self.options.requests_per_second.get();
        let api = ApiClient::new(self.client.clone(), per_second, fence.clone(), metrics);
        ServiceSlices::new(api, fence, self.namespace.clone(), service, self.addresses.clone()).run().await
    }

    /// The controller that writes under `term`.
    fn mirror(
        &self,
        term: u64,
        fence: Fence,
        cache: Arc<ClusterCache>,
        host: String,
        registry: RegistryHandle,
        metrics: Arc<Metrics>,
    ) -> Mirror {
        let KubernetesOptions {
            kubeconfig: _,
            lease_namespace: _,
            grpc_service: _,
            create_namespaces,
            max_endpoints,
            endpoints_object,
            requests_per_second,
            linger,
            publish_not_ready,
            flatten_names,
            validator,
        } = self.options;
        let options = mirror::MirrorOptions {
            create_namespaces,
            max_endpoints,
            endpoints_object,
            linger,
            publish_not_ready,
            flatten_names,
            validator,
        };
        let events = Recorder::new(self.client.clone(), reporter(&host));
        let api = ApiClient::new(self.client.clone(), requests_per_second.get(), fence, Arc::clone(&metrics));
        let reconciler = Reconciler::new(api, cache, registry, metrics, options, host, term);
        Mirror::new(reconciler, events, LeaseClient::reference(&self.namespace))
    }
}

/// Who publishes Events.
fn reporter(host: &str) -> Reporter {
    Reporter { controller: names::MANAGER.into(), instance: Some(host.into()) }
}

/// This process does not write any more, but `holder`, if anybody does.
async fn stand_down(registry: &RegistryHandle, holder: LeaseHolder, outranked: bool) -> Result<(), Unavailable> {
    if outranked {
        // One that accepts registrations and has not written yet stops only then, if the holder is not known.
        registry.outranked(None).await?;
    }
    registry.stand_down(holder).await?;
    if outranked { registry.outranked(None).await } else { Ok(()) }
}

/// Takes over under `tenure`. Returns the term; `None` when something else comes next: a higher term is needed, the Lease is
/// lost, or the process ends.
async fn take_over(
    elector: &ElectorHandle,
    registry: &RegistryHandle,
    tenure: Tenure,
    highest_term: u64,
    slices: &mpsc::Sender<SlicesRequest>,
) -> Option<u64> {
    // First, so that a restore of an earlier take-over, which may be queued, counts no more.
    let turn = registry.begin_take_over().await.ok()?;
    // The Lease names this process now: after a crash in the middle of what follows nothing else says who wrote before.
    registry.outranked(Some(tenure.previous.as_ref().map_or(0, |lease| lease.term))).await.ok()?;
    let (restored, result) = oneshot::channel();
    let request = TakeOver { tenure, highest_term, turn, restored };
    slices.send(SlicesRequest::TakeOver(request)).await.ok()?;
    match result.await.ok()? {
        Restored::Term(term) => elector.taken_over().await.then_some(term),
        Restored::Outranked(term) => {
            registry.outranked(Some(term)).await.ok()?;
            elector.outranked(term).await;
            None
        }
    }
}
