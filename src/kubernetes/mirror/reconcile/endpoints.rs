//! Writes of the older Endpoints object. Its content is not cached: it is read whenever its service
//! is reconciled, which the watch causes when another writer changes it.

use k8s_openapi::api::core::v1::Endpoints;

use super::{DesiredState, Reconciler, object_backoff, refused_writes::is_refusal};
use crate::{
    kubernetes::{
        api::{ApiError, Preconditions},
        cache::ObservedState,
        objects::endpoints,
    },
    model::ServiceKey,
};

impl Reconciler {
    pub(super) async fn write_endpoints(&self, desired: &DesiredState<'_>, uid: &str) -> Result<(), ApiError> {
        let (namespace, name) = (desired.service.namespace(), desired.service.name());
        let ours = endpoints::desired(desired.service, uid, desired.instances, self.options.publish_not_ready);
        match self.api.get::<Endpoints>(namespace, name).await {
            Ok(existing) if !endpoints::is_ours(&existing.metadata) => Ok(()),
            Ok(existing) => match endpoints::amend(&existing, &ours) {
                Some(amended) => {
                    let written = self.api.replace(namespace, name, &amended).await?;
                    self.cache.endpoints_written(&written);
                    Ok(())
                }
                None => Ok(()),
            },
            Err(ApiError::NotFound) if desired.instances.is_empty() => Ok(()),
            Err(ApiError::NotFound) => {
                let created = self.api.create(namespace, &ours).await?;
                self.cache.endpoints_written(&created);
                Ok(())
            }
            Err(err) => Err(err),
        }
    }

    /// Deletes our Endpoints object under a Service that is not ours any more. The inner result is
    /// a refusal, to be returned when everything else is done. Most Services of a cluster never
    /// were ours: nothing is requested for those.
    pub(super) async fn withdraw_endpoints(
        &self,
        desired: &DesiredState<'_>,
        observed: &ObservedState,
    ) -> Result<Result<(), ApiError>, ApiError> {
        let lingers = self.empty_since().contains_key(desired.service);
        let may_exist = lingers || !observed.slices.is_empty() || !desired.instances.is_empty();
        if !self.options.endpoints_object || !may_exist {
            return Ok(Ok(()));
        }
        match self.unless_refused(desired, object_backoff::ENDPOINTS, self.delete_endpoints(desired.service)).await {
            Err(err) if !is_refusal(&err) => Err(err),
            done => Ok(done),
        }
    }

    async fn delete_endpoints(&self, service: &ServiceKey) -> Result<(), ApiError> {
        let existing = match self.api.get::<Endpoints>(service.namespace(), service.name()).await {
            Ok(existing) if endpoints::is_ours(&existing.metadata) => existing,
            Ok(_) | Err(ApiError::NotFound) => return Ok(()),
            Err(err) => return Err(err),
        };
        match self.api.delete::<Endpoints>(service.namespace(), Preconditions::of(&existing.metadata)).await {
            Ok(()) | Err(ApiError::NotFound) => {
                self.cache.endpoints_deleted(service, existing.metadata.uid.as_deref().unwrap_or_default());
                Ok(())
            }
            Err(err) => Err(err),
        }
    }
}
