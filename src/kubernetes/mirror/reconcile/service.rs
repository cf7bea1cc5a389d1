//! Writes of the namespace and the headless Service.

use k8s_openapi::{
    api::core::v1::{Namespace, Service},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use tokio::time::Instant;
use tracing::info;

use super::{DesiredState, ReconcileOutcome, Reconciler, object_backoff};
use crate::{
    kubernetes::{
        api::{ApiError, Preconditions},
        cache::ServiceState,
        objects::{names, services},
    },
    model::ServiceKey,
};

impl Reconciler {
    pub(super) async fn create_namespace(&self, desired: &DesiredState<'_>) -> Result<(), ApiError> {
        let name = desired.service.namespace();
        let labels = Some([(names::SERVICE.to_owned(), names::OWNED.to_owned())].into());
        let metadata = ObjectMeta { name: Some(name.into()), labels, ..ObjectMeta::default() };
        let namespace = Namespace { metadata, ..Namespace::default() };
        match self.unless_refused(desired, object_backoff::NAMESPACE, self.api.create_namespace(&namespace)).await {
            Ok(_) => info!(namespace = name, "created the namespace"),
            Err(ApiError::AlreadyExists) => {}
            Err(err) => return Err(err),
        }
        Ok(())
    }

    /// Creates the Service and returns its uid.
    pub(super) async fn create_service(&self, desired: &DesiredState<'_>) -> Result<String, ApiError> {
        let service = services::desired(desired.service, desired.instances);
        let create = self.api.create(desired.service.namespace(), &service);
        match self.unless_refused(desired, object_backoff::SERVICE, create).await {
            Ok(created) => {
                self.cache.service_written(&created);
                Ok(created.metadata.uid.unwrap_or_default())
            }
            Err(ApiError::AlreadyExists) => {
                self.read_service(desired.service).await?;
                Err(ApiError::AlreadyExists)
            }
            Err(err) => Err(err),
        }
    }

    pub(super) async fn replace_service(&self, desired: &DesiredState<'_>, amended: &Service) -> Result<(), ApiError> {
        let service = desired.service;
        let replace = self.api.replace(service.namespace(), service.name(), amended);
        match self.unless_refused(desired, object_backoff::SERVICE, replace).await {
            Ok(written) => {
                self.cache.service_written(&written);
                Ok(())
            }
            Err(err @ (ApiError::Conflict | ApiError::NotFound)) => {
                self.read_service(service).await?;
                Err(err)
            }
            Err(err) => Err(err),
        }
    }

    /// Deletes a Service of ours that has been without instances for `--linger`.
    pub(super) async fn delete_lingering(
        &self,
        desired: &DesiredState<'_>,
        existing: &Service,
    ) -> Result<ReconcileOutcome, ApiError> {
        let since = *self.empty_since().entry(desired.service.clone()).or_insert_with(Instant::now);
        let left = self.options.linger.saturating_sub(since.elapsed());
        if !left.is_zero() {
            return Ok(ReconcileOutcome::RequeueAfter(desired.generation, left));
        }
        let preconditions = Preconditions::of(&existing.metadata);
        let uid = preconditions.uid;
        let delete = self.api.delete::<Service>(desired.service.namespace(), preconditions);
        match self.unless_refused(desired, object_backoff::SERVICE, delete).await {
            Ok(()) | Err(ApiError::NotFound) => self.cache.service_deleted(desired.service, uid),
            Err(ApiError::Conflict) => {
                self.read_service(desired.service).await?;
                return Err(ApiError::Conflict);
            }
            Err(err) => return Err(err),
        }
        self.forget_empty(desired.service);
        Ok(ReconcileOutcome::Done(desired.generation))
    }

    /// Reads the Service from the API server into the cache.
    pub(super) async fn read_service(&self, service: &ServiceKey) -> Result<(), ApiError> {
        match self.api.get::<Service>(service.namespace(), service.name()).await {
            Ok(existing) => self.cache.service_written(&existing),
            Err(ApiError::NotFound) => {
                if let ServiceState::Ours(cached) = self.cache.observe(service).service {
                    self.cache.service_deleted(service, cached.metadata.uid.as_deref().unwrap_or_default());
                }
            }
            Err(err) => return Err(err),
        }
        Ok(())
    }
}
