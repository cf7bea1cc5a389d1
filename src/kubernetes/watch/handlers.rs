//! What the watches do with their events: they apply them to the [`ClusterCache`] and tell the
//! registry the facts that follow.

use k8s_openapi::api::core::v1::{Endpoints, Namespace, Secret, Service};
use tokio::sync::oneshot;

use super::reflector::EventHandler;
use crate::{
    kubernetes::{
        cache::{ClusterCache, ObjectEvent},
        secrets::Secrets,
    },
    registry::{ClusterFact, RegistryHandle, Unavailable},
};

/// Handles Namespaces or Services.
pub(super) struct ClusterFactHandler<'a, K> {
    pub(super) registry: &'a RegistryHandle,
    /// Applies events to the cache and returns the facts that follow.
    pub(super) apply: Box<dyn FnMut(Vec<ObjectEvent<K>>) -> Vec<ClusterFact> + Send + 'a>,
    /// Notified when the registry has the facts of the first complete list.
    pub(super) listed: Option<oneshot::Sender<()>>,
}

impl EventHandler<Namespace> for ClusterFactHandler<'_, Namespace> {
    async fn handle(&mut self, events: Vec<ObjectEvent<Namespace>>) -> Result<(), Unavailable> {
        self.learn(events).await
    }
}

impl EventHandler<Service> for ClusterFactHandler<'_, Service> {
    async fn handle(&mut self, events: Vec<ObjectEvent<Service>>) -> Result<(), Unavailable> {
        self.learn(events).await
    }
}

impl<K: Send> ClusterFactHandler<'_, K> {
    async fn learn(&mut self, events: Vec<ObjectEvent<K>>) -> Result<(), Unavailable> {
        let init_done = events.iter().any(|event| matches!(event, ObjectEvent::InitDone(_)));
        let facts = (self.apply)(events);
        if !facts.is_empty() {
            self.registry.learn(facts).await?;
        }
        // After the registry has the facts: who waits for the list goes on with a registry that knows it.
        if init_done && let Some(listed) = self.listed.take() {
            // The receiver may be gone.
            let _ = listed.send(());
        }
        Ok(())
    }
}

/// Handles our Endpoints objects.
pub(super) struct EndpointsHandler<'a> {
    pub(super) cache: &'a ClusterCache,
}

impl EventHandler<Endpoints> for EndpointsHandler<'_> {
    async fn handle(&mut self, events: Vec<ObjectEvent<Endpoints>>) -> Result<(), Unavailable> {
        self.cache.apply_endpoints(events);
        Ok(())
    }
}

/// Handles the Secrets that processes share.
pub(super) struct SecretsHandler<'a> {
    pub(super) secrets: &'a Secrets,
}

impl EventHandler<Secret> for SecretsHandler<'_> {
    async fn handle(&mut self, events: Vec<ObjectEvent<Secret>>) -> Result<(), Unavailable> {
        self.secrets.apply(events);
        Ok(())
    }
}
