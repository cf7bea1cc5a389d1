//! Reconciles one service: makes its objects in Kubernetes match what is registered.
//!
//! 1. Only our own objects are written. A Service of another owner and other writers' slices are
//!    never touched; when a Service becomes foreign, our slices under it are deleted.
//! 2. Every PUT and DELETE carries uid and resourceVersion. On a conflict the object is read and
//!    the rest is planned again. After a write whose outcome is unknown, everything is read first.
//! 3. An endpoint that moves is never missing: what is new is written before what is old is deleted.
//!
//! The result of a write is applied to the [`ClusterCache`] at once; the watch confirms it later.

mod endpoints;
mod object_backoff;
mod refused_writes;
mod service;
mod slices;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::api::discovery::v1::EndpointSlice;
use tokio::time::Instant;

use self::{object_backoff::ObjectBackoff, refused_writes::is_refusal};
use super::{BlockReason, MirrorOptions};
use crate::{
    kubernetes::{
        api::{ApiClient, ApiError},
        cache::{ClusterCache, LateWrites, NamespaceState, ServiceState},
        objects::{names, services, slices::ObservedSlice},
    },
    metrics::Metrics,
    model::{CowTree, Instance, ServiceKey},
    registry::RegistryHandle,
    replicas::tombstones::Tombstones,
};

/// Attempts in one call of [`Reconciler::reconcile`] while other writers get in between.
const MAX_CONFLICT_RETRIES: usize = 4;

/// How often a Service of ours that is being deleted is looked at, unless it changes.
const DELETING_RECHECK_INTERVAL: Duration = Duration::from_secs(30);

/// What came of reconciling a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ReconcileOutcome {
    /// Kubernetes shows the service as of this generation.
    Done(u64),
    /// Kubernetes shows the service as of this generation; reconcile again after the duration.
    RequeueAfter(u64, Duration),
    /// Kubernetes cannot show the service until something changes in the cluster.
    Blocked(BlockReason, String),
    /// A request failed; reconcile again with backoff.
    Failed(ApiError),
}

/// Makes services in Kubernetes match the registry.
#[derive(Debug)]
pub(in crate::kubernetes) struct Reconciler {
    pub(super) api: ApiClient,
    pub(super) cache: Arc<ClusterCache>,
    pub(super) registry: RegistryHandle,
    pub(super) metrics: Arc<Metrics>,
    late: LateWrites,
    options: MirrorOptions,
    /// Value of the annotation `gangplank.dev/writer`.
    writer: String,
    term: u64,
    /// Services of ours without instances, and since when.
    empty_since: Mutex<HashMap<ServiceKey, Instant>>,
    refused_objects: Mutex<ObjectBackoff>,
}

/// What Kubernetes should show of one service.
struct DesiredState<'a> {
    service: &'a ServiceKey,
    generation: u64,
    /// The last change of this service.
    changed: u64,
    instances: &'a CowTree<Arc<Instance>>,
    /// The removals that are remembered.
    tombstones: &'a Tombstones,
}

impl Reconciler {
    pub(in crate::kubernetes) fn new(
        api: ApiClient,
        cache: Arc<ClusterCache>,
        registry: RegistryHandle,
        metrics: Arc<Metrics>,
        options: MirrorOptions,
        writer: String,
        term: u64,
    ) -> Self {
        let late = LateWrites::new(registry.clone(), options.validator, api.fence().clone());
        Self {
            api,
            cache,
            registry,
            metrics,
            late,
            options,
            writer,
            term,
            empty_since: Mutex::default(),
            refused_objects: Mutex::default(),
        }
    }

    /// Reconciles `service`. With `outcome_unknown`, an earlier write may or may not have been
    /// carried out, so the objects are read from the API server first.
    pub(super) async fn reconcile(&self, service: &ServiceKey, outcome_unknown: bool) -> ReconcileOutcome {
        if outcome_unknown && let Err(err) = self.refresh(service).await {
            return ReconcileOutcome::Failed(match err {
                ApiError::TimedOut => err,
                // Not `err` itself: the outcome of the earlier write is still unknown.
                _ => ApiError::Unknown(err.to_string()),
            });
        }
        for _ in 0..MAX_CONFLICT_RETRIES {
            // The generation first: instances that are read after it contain it.
            let published = self.registry.catalog().generation();
            let registered = self.registry.catalog().get(service).unwrap_or_default();
            let generation = published.max(registered.generation);
            // After the instances: the tombstone of each that is missing there is found here.
            let tombstones = self.registry.catalog().tombstones(service);
            let desired = DesiredState {
                service,
                generation,
                changed: registered.generation,
                instances: &registered.instances,
                tombstones: &tombstones,
            };
            match self.attempt(&desired).await {
                Ok(outcome) => {
                    self.api.confirmed().await;
                    self.refused_objects().forget(service);
                    return outcome;
                }
                Err(ApiError::Conflict | ApiError::AlreadyExists | ApiError::NotFound) => {}
                Err(err @ ApiError::NamespaceTerminating) => {
                    return ReconcileOutcome::Blocked(BlockReason::Namespace, err.to_string());
                }
                Err(err @ ApiError::Forbidden(_)) => {
                    return ReconcileOutcome::Blocked(BlockReason::Forbidden, err.to_string());
                }
                Err(err @ ApiError::Invalid(_)) => {
                    return ReconcileOutcome::Blocked(BlockReason::Invalid, err.to_string());
                }
                Err(err @ ApiError::WebhookFailed(_)) => {
                    return ReconcileOutcome::Blocked(BlockReason::Webhook, err.to_string());
                }
                Err(err) => return ReconcileOutcome::Failed(err),
            }
        }
        ReconcileOutcome::Failed(ApiError::Conflict)
    }

    async fn attempt(&self, desired: &DesiredState<'_>) -> Result<ReconcileOutcome, ApiError> {
        let observed = self.cache.observe(desired.service);
        let empty = desired.instances.is_empty();
        match observed.namespace {
            NamespaceState::Active => {}
            NamespaceState::Absent | NamespaceState::Terminating if empty => {
                self.forget_empty(desired.service);
                return Ok(ReconcileOutcome::Done(desired.generation));
            }
            NamespaceState::Absent if self.options.create_namespaces => self.create_namespace(desired).await?,
            NamespaceState::Absent => {
                let err = format!("the namespace {} does not exist", desired.service.namespace());
                return Ok(ReconcileOutcome::Blocked(BlockReason::Namespace, err));
            }
            NamespaceState::Terminating => {
                let err = format!("the namespace {} is being deleted", desired.service.namespace());
                return Ok(ReconcileOutcome::Blocked(BlockReason::Namespace, err));
            }
            NamespaceState::Unknown => return Err(ApiError::Unknown("the namespaces are not listed yet".into())),
        }
        let uid = match &observed.service {
            ServiceState::Unknown => return Err(ApiError::Unknown("the Services are not listed yet".into())),
            ServiceState::Foreign => {
                self.withdraw(desired, &observed, &Tombstones::default()).await?;
                self.forget_empty(desired.service);
                return Ok(if empty {
                    ReconcileOutcome::Done(desired.generation)
                } else {
                    let err = "a Service of this name belongs to somebody else".into();
                    ReconcileOutcome::Blocked(BlockReason::ForeignService, err)
                });
            }
            ServiceState::Absent if empty => {
                self.withdraw(desired, &observed, desired.tombstones).await?;
                self.forget_empty(desired.service);
                return Ok(ReconcileOutcome::Done(desired.generation));
            }
            ServiceState::Absent => self.create_service(desired).await?,
            ServiceState::Ours(existing) if existing.metadata.deletion_timestamp.is_some() => {
                // A finalizer holds the Service. Its slices stay right until it is gone; then the
                // watch reports the deletion, and the Service is created again.
                let uid = existing.metadata.uid.as_deref().unwrap_or_default();
                self.write_slices(desired, &observed, uid).await?;
                return Ok(ReconcileOutcome::RequeueAfter(desired.generation, DELETING_RECHECK_INTERVAL));
            }
            ServiceState::Ours(existing) => existing.metadata.uid.clone().unwrap_or_default(),
            ServiceState::Joined { uid } => uid.to_string(),
        };
        let endpoints_deleted = match &observed.service {
            // The Service may have been ours; now its Endpoints object is its owner's business.
            ServiceState::Joined { .. } => self.withdraw_endpoints(desired, &observed).await?,
            _ => Ok(()),
        };
        // The slices first: the Service's own fields are for people and tools, and a server that
        // refuses them must not hold up the endpoints.
        self.write_slices(desired, &observed, &uid).await?;
        endpoints_deleted?;
        if let ServiceState::Ours(existing) = &observed.service
            && !empty
            && let Some(amended) = services::amend(existing, desired.instances)
        {
            self.replace_service(desired, &amended).await?;
        }
        if self.options.endpoints_object && matches!(observed.service, ServiceState::Ours(_) | ServiceState::Absent) {
            self.unless_refused(desired, object_backoff::ENDPOINTS, self.write_endpoints(desired, &uid)).await?;
        }
        match &observed.service {
            ServiceState::Ours(existing) if empty => self.delete_lingering(desired, existing).await,
            _ => {
                self.forget_empty(desired.service);
                Ok(ReconcileOutcome::Done(desired.generation))
            }
        }
    }

    /// Reads the Service and the slices of `service` from the API server into the cache.
    async fn refresh(&self, service: &ServiceKey) -> Result<(), ApiError> {
        self.read_service(service).await?;
        let labels = format!("{}={},{}={}", names::SERVICE_NAME, service.name(), names::MANAGED_BY, names::MANAGER);
        let listed: Vec<EndpointSlice> = self.api.list(service.namespace(), &labels).await?;
        let observed = self.cache.observe(service);
        for slice in &listed {
            if let Some(read) = ObservedSlice::read(slice) {
                self.slice_read(slice, &read).await?;
            }
        }
        // A slice that is not in the list is deleted, or somebody changed its labels.
        for cached in &observed.slices {
            if !listed.iter().any(|slice| slice.metadata.uid.as_deref() == Some(&cached.uid)) {
                self.read_slice(service, &cached.name, Some(cached)).await?;
            }
        }
        Ok(())
    }

    /// Awaits `write` of the named object, unless the object backs off: then the earlier refusal is
    /// the result, and no request is made.
    async fn unless_refused<T>(
        &self,
        desired: &DesiredState<'_>,
        object: &str,
        write: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        if let Some(err) = self.refused_objects().refusal(desired.service, object, desired.changed, Instant::now()) {
            return Err(err);
        }
        let result = write.await;
        match &result {
            Ok(_) => self.refused_objects().accepted(desired.service, object),
            Err(err) if is_refusal(err) => {
                self.refused_objects().refused(desired.service, object, desired.changed, err, Instant::now());
            }
            Err(_) => {}
        }
        result
    }

    /// When the first refused object of `service` may be written again; `None` without one.
    pub(super) fn retry_refused_after(&self, service: &ServiceKey) -> Option<Duration> {
        self.refused_objects().retry_after(service, Instant::now())
    }

    fn refused_objects(&self) -> std::sync::MutexGuard<'_, ObjectBackoff> {
        // Nothing panics while it holds the lock.
        self.refused_objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget_empty(&self, service: &ServiceKey) {
        self.empty_since().remove(service);
    }

    fn empty_since(&self) -> std::sync::MutexGuard<'_, HashMap<ServiceKey, Instant>> {
        // Nothing panics while it holds the lock.
        self.empty_since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
