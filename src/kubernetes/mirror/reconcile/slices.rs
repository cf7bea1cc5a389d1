//! Writes of the EndpointSlices.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use futures::{StreamExt as _, stream};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use tracing::warn;

use super::{
    DesiredState, Reconciler,
    refused_writes::{PlannedWrite, RefusedWrites},
};
use crate::{
    kubernetes::{
        api::{ApiError, Preconditions},
        cache::{ObservedState, ServiceState},
        objects::slices::{ObservedSlice, PlanOptions, SliceStamps, SliceWrite, plan},
    },
    model::{CowTree, DnsName, Instance, Resolution, ServiceKey, UnixMillis},
    replicas::tombstones::Tombstones,
};

/// Slices of one service that are created at once.
const MAX_CONCURRENT_CREATES: usize = 8;

impl Reconciler {
    /// Deletes everything of ours under a service but the slice of these tombstones.
    pub(super) async fn withdraw(
        &self,
        desired: &DesiredState<'_>,
        observed: &ObservedState,
        tombstones: &Tombstones,
    ) -> Result<(), ApiError> {
        let endpoints_deleted = self.withdraw_endpoints(desired, observed).await?;
        let nothing = DesiredState { instances: &CowTree::default(), tombstones, ..*desired };
        let refused = self.apply(desired, observed, self.plan(&nothing, observed, "")).await?;
        refused.err.map_or(Ok(()), Err)?;
        endpoints_deleted
    }

    /// Makes the slices match. Registrations in slices that do are confirmed at once, whatever becomes
    /// of the other slices and of the Service.
    pub(super) async fn write_slices(
        &self,
        desired: &DesiredState<'_>,
        observed: &ObservedState,
        uid: &str,
    ) -> Result<(), ApiError> {
        let mut refused = self.apply(desired, observed, self.plan(desired, observed, uid)).await?;
        self.api.confirmed().await;
        if refused.tombstones {
            // A removal is in Kubernetes with its tombstone only. So no word on these addresses is confirmed.
            refused.outdated.extend(desired.tombstones.iter().map(|one| one.id.address.clone()));
        }
        self.registry.mirror_progress().confirm_slices(desired.service, desired.generation, refused.outdated);
        refused.err.map_or(Ok(()), Err)
    }

    /// What the names among `instances` lead to; without those whose first lookup has not ended.
    fn resolutions(&self, instances: &CowTree<Arc<Instance>>) -> HashMap<DnsName, Arc<Resolution>> {
        let resolution = |name: &DnsName| match self.registry.names().resolution(name) {
            // Without --upstream no lookup will ever end.
            None if !self.options.validator.names_allowed => Some(Arc::default()),
            found => found,
        };
        let names = instances.iter().filter_map(|instance| instance.address().name());
        names.filter_map(|name| Some((name.clone(), resolution(name)?))).collect()
    }

    /// The writes that make the slices match.
    fn plan(&self, desired: &DesiredState<'_>, observed: &ObservedState, uid: &str) -> Vec<SliceWrite> {
        let resolutions = self.resolutions(desired.instances);
        let options = PlanOptions {
            service: desired.service,
            service_uid: uid,
            max_endpoints: self.options.max_endpoints,
            publish_not_ready: self.options.publish_not_ready,
            flatten_names: self.options.flatten_names || matches!(observed.service, ServiceState::Joined { .. }),
            resolutions: &resolutions,
            tombstones: desired.tombstones,
            stamps: SliceStamps {
                term: self.term,
                generation: desired.generation,
                updated: UnixMillis::now(),
                writer: &self.writer,
            },
            occupied: &observed.occupied,
        };
        plan(&options, desired.instances, &observed.slices)
    }

    /// Executes `writes`: new slices several at once, then the others one by one, because their
    /// order keeps an endpoint that moves from being missing. Each result goes into the cache,
    /// also when another write fails; a refusal holds back only the writes that depend on it.
    async fn apply(
        &self,
        desired: &DesiredState<'_>,
        observed: &ObservedState,
        writes: Vec<SliceWrite>,
    ) -> Result<RefusedWrites, ApiError> {
        let cached: HashMap<&str, &ObservedSlice> = observed.slices.iter().map(|slice| (&*slice.name, slice)).collect();
        let (creates, others): (Vec<_>, Vec<_>) =
            writes.into_iter().partition(|write| matches!(write, SliceWrite::Create(_)));
        let created = stream::iter(creates)
            .map(|write| async move {
                let write_once = self.write(desired.service, &write, None);
                let result = self.unless_refused(desired, write.name(), write_once).await;
                (PlannedWrite { before: None, write }, result)
            })
            .buffer_unordered(MAX_CONCURRENT_CREATES)
            .collect::<Vec<_>>();
        let mut refused = RefusedWrites::default();
        for (planned, result) in created.await {
            refused.record(&planned, result)?;
        }
        let mut pending: VecDeque<PlannedWrite<'_>> =
            others.into_iter().map(|write| PlannedWrite { before: cached.get(write.name()).copied(), write }).collect();
        refused.hold_back(&mut pending);
        while let Some(planned) = pending.pop_front() {
            let write_once = self.write(desired.service, &planned.write, planned.before);
            let result = self.unless_refused(desired, planned.write.name(), write_once).await;
            if refused.record(&planned, result)? {
                refused.hold_back(&mut pending);
            }
        }
        Ok(refused)
    }

    /// Executes one write; `before` is the cached slice of its name.
    async fn write(
        &self,
        service: &ServiceKey,
        write: &SliceWrite,
        before: Option<&ObservedSlice>,
    ) -> Result<(), ApiError> {
        let (namespace, name) = (service.namespace(), write.name());
        match write {
            SliceWrite::Create(slice) => match self.api.create(namespace, slice).await {
                Ok(created) => self.cache.slice_written(&created),
                Err(ApiError::AlreadyExists) => {
                    self.read_slice(service, name, None).await?;
                    return Err(ApiError::AlreadyExists);
                }
                Err(err) => return Err(err),
            },
            SliceWrite::Replace(slice) => match self.api.replace(namespace, name, slice).await {
                Ok(written) => {
                    self.cache.slice_written(&written);
                    if before.is_some_and(|before| before.digest.is_none()) {
                        self.metrics.mirror.repaired.inc();
                        warn!(%service, slice = name, "another writer had changed an EndpointSlice of ours: repaired");
                    }
                }
                Err(err @ (ApiError::Conflict | ApiError::NotFound)) => {
                    self.read_slice(service, name, before).await?;
                    return Err(err);
                }
                Err(err) => return Err(err),
            },
            SliceWrite::Delete { uid, resource_version, .. } => {
                let preconditions = Preconditions { name, uid, resource_version };
                match self.api.delete::<EndpointSlice>(namespace, preconditions).await {
                    Ok(()) | Err(ApiError::NotFound) => self.cache.slice_deleted(namespace, name, uid),
                    Err(ApiError::Conflict) => {
                        self.read_slice(service, name, before).await?;
                        return Err(ApiError::Conflict);
                    }
                    Err(err) => return Err(err),
                }
            }
        }
        Ok(())
    }

    /// Adds a slice that was read to the cache. What a former writer said in it is merged before, and is in the registry when
    /// the slice is planned again.
    pub(super) async fn slice_read(&self, slice: &EndpointSlice, observed: &ObservedSlice) -> Result<(), ApiError> {
        // Not written any more, or not durable: nothing is replaced that may be lost then.
        self.late.merge(slice, observed).await.map_err(|err| ApiError::Unknown(err.to_string()))?;
        self.cache.slice_written(slice);
        Ok(())
    }

    /// Reads the slice `name` from the API server into the cache; `before` is what the cache had.
    pub(super) async fn read_slice(
        &self,
        service: &ServiceKey,
        name: &str,
        before: Option<&ObservedSlice>,
    ) -> Result<(), ApiError> {
        let forget = || {
            if let Some(before) = before {
                self.cache.slice_deleted(service.namespace(), name, &before.uid);
            }
        };
        match self.api.get::<EndpointSlice>(service.namespace(), name).await {
            Ok(slice) => match ObservedSlice::read(&slice) {
                Some(observed) if observed.service == *service => self.slice_read(&slice, &observed).await?,
                _ => {
                    forget();
                    self.cache.mark_occupied(service, name);
                }
            },
            Err(ApiError::NotFound) => forget(),
            Err(err) => return Err(err),
        }
        Ok(())
    }
}
