//! Kubernetes: what is registered, as headless Services and EndpointSlices, and back.
//!
//! The record of a service in the cluster is its EndpointSlices ([`slices`]); its headless
//! Service ([`services`]) gives them a name, and the older Endpoints object ([`endpoints`]) is
//! there for those who still read it. These parts are pure: objects in, objects out, without I/O,
//! clock or tasks, so that every rule of placement can be tested by itself.
//!
//! Around them: `watch` sees what stands in the cluster and tells the registry what follows for
//! registrations; `cluster` holds it; `mirror` takes what changed, here or there, and `reconcile`
//! makes one service after the other what it should be, through `client`, at the pace that `pace`
//! allows. DNS never waits for any of it.

mod client;
mod cluster;
pub mod endpoints;
mod mirror;
pub mod names;
mod pace;
mod queue;
mod reconcile;
pub mod services;
pub mod slices;
mod watch;

use std::{fmt, num::NonZeroU32, path::PathBuf, sync::Arc, time::Duration};

use kube::{
    Client,
    runtime::events::{Recorder, Reporter},
};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing::info;

pub use client::ConnectError;
pub use slices::{DEFAULT_MAX_ENDPOINTS, MAX_ENDPOINTS};

use self::{client::Requests, cluster::Cluster, mirror::Mirror, reconcile::Reconciler, watch::Watch};
use crate::{metrics::Metrics, model::Validator, registry::RegistryHandle};

/// How the mirror works.
#[derive(Debug, Clone)]
pub struct Options {
    /// How to reach the API server; `None` means as a pod does, by its ServiceAccount.
    pub kubeconfig: Option<PathBuf>,
    /// Create namespaces that do not exist.
    pub create_namespaces: bool,
    /// Most endpoints in a slice, 1..=1000.
    pub max_endpoints: usize,
    /// Write the older Endpoints object too.
    pub endpoints_object: bool,
    /// Requests to the API server, a second, at most.
    pub requests_per_second: NonZeroU32,
    /// How long a Service of ours stays without instances.
    pub linger: Duration,
    /// Show instances that are not ready as ready.
    pub publish_not_ready: bool,
    /// What is read from a slice is measured against it.
    pub validator: Validator,
}

/// A way to the API server that is not used yet.
pub struct Kubernetes {
    client: Client,
    /// Where it is, for messages.
    server: String,
    options: Options,
}

impl fmt::Debug for Kubernetes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kubernetes").field("server", &self.server).finish_non_exhaustive()
    }
}

impl Kubernetes {
    /// Finds the way to the API server. Whether it answers is another question.
    ///
    /// # Errors
    /// When there is no usable kubeconfig, or no ServiceAccount where none was given.
    pub async fn connect(options: Options) -> Result<Self, ConnectError> {
        let (client, server) = client::connect(options.kubeconfig.as_deref()).await?;
        Ok(Self { client, server, options })
    }

    /// Watches the cluster, restores the registry from it, and keeps it in step until `stop`.
    /// An API server that does not answer is waited for, however long.
    pub async fn run(self, registry: RegistryHandle, metrics: Arc<Metrics>, stop: CancellationToken) {
        let Self { client, server, options } = self;
        info!(%server, "mirroring into Kubernetes");
        let cluster = Arc::new(Cluster::new());
        let writer = gethostname::gethostname().to_string_lossy().into_owned();
        let (started, term) = oneshot::channel();
        let watch = Watch {
            client: client.clone(),
            server,
            cluster: Arc::clone(&cluster),
            registry: registry.clone(),
            validator: options.validator,
            metrics: Arc::clone(&metrics),
        };
        let watching = async {
            // The registry says itself why it is gone.
            let _ = watch.run(started, &stop).await;
        };
        let mirroring = async {
            // Nothing is written before what stands is known and the registry has compared.
            let Ok(term) = term.await else { return stop.cancelled().await };
            let reporter = Reporter { controller: names::MANAGER.into(), instance: Some(writer.clone()) };
            let events = Recorder::new(client.clone(), reporter);
            let requests = Requests::new(client, options.requests_per_second.get(), Arc::clone(&metrics));
            let reconciler = Reconciler::new(requests, cluster, registry, metrics, options, writer, term);
            Mirror::new(reconciler, events).run(stop.clone()).await;
        };
        futures::join!(watching, mirroring);
    }
}
