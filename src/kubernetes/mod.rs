//! Kubernetes: what is registered, as headless Services and EndpointSlices, and back.
//!
//! Five rooms; imports between them point down:
//!
//! * [`objects`]: Services, EndpointSlices and Endpoints as pure functions.
//! * `api`: the client, its rate limit and its errors.
//! * `cache`: what the cluster holds, fed by the watches and by our own writes.
//! * `watch`: lists and watches; feeds the cache and tells the registry what follows for
//!   registrations.
//! * `mirror`: the controller that makes the objects in Kubernetes match the registry.
//!
//! DNS never waits for any of it.

mod api;
mod cache;
mod mirror;
pub mod objects;
mod watch;

use std::{fmt, num::NonZeroU32, path::PathBuf, sync::Arc, time::Duration};

use kube::{
    Client,
    runtime::events::{Recorder, Reporter},
};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing::info;

pub use api::ConnectError;
pub use objects::slices::{DEFAULT_MAX_ENDPOINTS, MAX_ENDPOINTS};

use self::{
    api::ApiClient,
    cache::ClusterCache,
    mirror::{Mirror, Reconciler},
    objects::names,
    watch::Watch,
};
use crate::{metrics::Metrics, model::Validator, registry::RegistryHandle};

/// How to reach Kubernetes, and what to write there.
#[derive(Debug, Clone)]
pub struct Options {
    /// `None`: the ServiceAccount of the pod.
    pub kubeconfig: Option<PathBuf>,
    /// Create namespaces that do not exist.
    pub create_namespaces: bool,
    /// Most endpoints in a slice, 1..=1000. Default 100.
    pub max_endpoints: usize,
    /// Write the older Endpoints object too.
    pub endpoints_object: bool,
    /// ApiClient to the API server, a second, at most.
    pub requests_per_second: NonZeroU32,
    /// How long a Service of ours stays without instances.
    pub linger: Duration,
    /// Show instances that are not ready as ready.
    pub publish_not_ready: bool,
    /// Checks what is read from slices.
    pub validator: Validator,
}

/// A client of the API server that has made no request yet.
pub struct Kubernetes {
    client: Client,
    /// URL of the API server, for messages.
    server: String,
    options: Options,
}

impl fmt::Debug for Kubernetes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kubernetes").field("server", &self.server).finish_non_exhaustive()
    }
}

impl Kubernetes {
    /// Makes a client from a kubeconfig or a ServiceAccount. Makes no request.
    ///
    /// # Errors
    /// When there is no usable kubeconfig, or no ServiceAccount where none was given.
    pub async fn connect(options: Options) -> Result<Self, ConnectError> {
        let (client, server) = api::connect(options.kubeconfig.as_deref()).await?;
        Ok(Self { client, server, options })
    }

    /// Watches the cluster, restores the registry from it, and mirrors the registry into it until
    /// `stop`. Waits for an API server that does not answer, without a limit.
    pub async fn run(self, registry: RegistryHandle, metrics: Arc<Metrics>, stop: CancellationToken) {
        let Self { client, server, options } = self;
        let Options {
            kubeconfig: _,
            create_namespaces,
            max_endpoints,
            endpoints_object,
            requests_per_second,
            linger,
            publish_not_ready,
            validator,
        } = options;
        let options = mirror::Options { create_namespaces, max_endpoints, endpoints_object, linger, publish_not_ready };
        info!(%server, "mirroring into Kubernetes");
        let cache = Arc::new(ClusterCache::new());
        let writer = gethostname::gethostname().to_string_lossy().into_owned();
        let (started, term) = oneshot::channel();
        let watch = Watch {
            client: client.clone(),
            server,
            cache: Arc::clone(&cache),
            registry: registry.clone(),
            validator,
            endpoints: endpoints_object,
            metrics: Arc::clone(&metrics),
        };
        let watching = async {
            // The registry reports itself why it has ended.
            let _ = watch.run(started, &stop).await;
        };
        let mirroring = async {
            // Nothing is written before the cluster is listed and the registry has compared.
            let Ok(term) = term.await else { return stop.cancelled().await };
            let reporter = Reporter { controller: names::MANAGER.into(), instance: Some(writer.clone()) };
            let events = Recorder::new(client.clone(), reporter);
            let api = ApiClient::new(client, requests_per_second.get(), Arc::clone(&metrics));
            let reconciler = Reconciler::new(api, cache, registry, metrics, options, writer, term);
            Mirror::new(reconciler, events).run(stop.clone()).await;
        };
        futures::join!(watching, mirroring);
    }
}
