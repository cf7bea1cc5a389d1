//! What the watches do with their events: they apply them to the [`ClusterCache`] and tell the
//! registry the facts that follow.

use k8s_openapi::api::{
    core::v1::{Endpoints, Namespace, Service},
    discovery::v1::EndpointSlice,
};
use tokio::sync::oneshot;

use super::{reflector::EventHandler, restore::InitialRestore};
use crate::{
    kubernetes::cache::{CachedSlice, ClusterCache, ObjectEvent},
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
        if init_done && let Some(listed) = self.listed.take() {
            // The receiver may be gone.
            let _ = listed.send(());
        }
        Ok(())
    }
}

/// Handles our own slices. The registry is restored from the first complete list.
pub(super) struct OwnSlicesHandler<'a> {
    pub(super) cache: &'a ClusterCache,
    /// `Some` until the first list is complete.
    pub(super) restore: Option<InitialRestore<'a>>,
}

impl EventHandler<EndpointSlice> for OwnSlicesHandler<'_> {
    async fn handle(&mut self, events: Vec<ObjectEvent<EndpointSlice>>) -> Result<(), Unavailable> {
        let mut cached_events = Vec::with_capacity(events.len());
        for event in events {
            let Some(cached) = event.filter_map(CachedSlice::read) else { continue };
            if let (Some(slice), Some(CachedSlice { observed: None, .. })) = (event.object(), cached.object())
                && !matches!(event, ObjectEvent::Delete(_))
            {
                let (namespace, name) = (slice.metadata.namespace.as_deref(), slice.metadata.name.as_deref());
                let (namespace, name) = (namespace.unwrap_or_default(), name.unwrap_or_default());
                tracing::warn!("slice {namespace}/{name} names no Service: skipped");
            }
            if let Some(restore) = &mut self.restore {
                restore.apply(&event, &cached);
            }
            cached_events.push(cached);
        }
        let init_done = cached_events.iter().any(|event| matches!(event, ObjectEvent::InitDone(_)));
        self.cache.apply_slices(cached_events);
        if init_done && let Some(restore) = self.restore.take() {
            restore.finish().await?;
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
