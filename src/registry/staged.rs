//! The changes of one batch, laid over the catalog until the batch is durable.
//!
//! The decider reads through them, so that a batch sees its own changes; the
//! [`Applier`](super::apply::Applier) then makes them visible as a whole. Nothing here knows where
//! a change comes from: commands of registrants and a comparison with Kubernetes stage theirs alike.

use std::{collections::HashMap, sync::Arc};

use super::{Catalog, Event};
use crate::model::{InstanceChange, Service, ServiceKey, UnixMillis};

/// What a batch changes, service by service and change by change.
#[derive(Debug, Default)]
pub(super) struct StagedChanges {
    /// Every service that changed.
    pub(super) services: HashMap<ServiceKey, StagedService, foldhash::fast::RandomState>,
    /// For the feed, in order.
    pub(super) events: Vec<Event>,
    /// Instances more, or fewer, than in the catalog.
    growth: isize,
}

/// One service that changed.
#[derive(Debug, Default)]
pub(super) struct StagedService {
    /// The service with all changes made; its generation is set when it is applied.
    pub(super) after: Service,
    /// The changes that lead there, in order.
    pub(super) changes: Vec<InstanceChange>,
}

impl StagedChanges {
    pub(super) fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    /// Nothing staged, with room for as much as `self` holds: batches resemble each other.
    pub(super) fn empty_alike(&self) -> Self {
        Self {
            services: HashMap::with_capacity_and_hasher(self.services.len(), self.services.hasher().clone()),
            events: Vec::with_capacity(self.events.len()),
            growth: 0,
        }
    }

    /// The service with what is staged so far.
    pub(super) fn service(&self, catalog: &Catalog, key: &ServiceKey) -> Option<Service> {
        match self.services.get(key) {
            Some(staged) => Some(staged.after.clone()),
            None => catalog.get(key),
        }
    }

    /// How many instances there are with what is staged so far.
    pub(super) fn instances(&self, catalog: &Catalog) -> usize {
        catalog.instances().saturating_add_signed(self.growth)
    }

    /// Stages one change; `service` is what [`StagedChanges::service`] returned for `key`.
    pub(super) fn stage(
        &mut self,
        key: ServiceKey,
        service: Option<Service>,
        change: InstanceChange,
        received: UnixMillis,
    ) {
        if change.before.is_none() && change.after.is_none() {
            return;
        }
        let staged = self
            .services
            .entry(key.clone())
            .or_insert_with(|| StagedService { after: service.unwrap_or_default(), changes: Vec::new() });
        let instances = &mut staged.after.instances;
        match (&change.before, &change.after) {
            (_, Some(after)) => {
                if instances.put(Arc::clone(after)).is_none() {
                    self.growth += 1;
                }
            }
            (Some(before), None) => {
                if instances.remove(&before.key()).is_some() {
                    self.growth -= 1;
                }
            }
            (None, None) => {}
        }
        staged.changes.push(change.clone());
        self.events.push(Event { service: key, change, received });
    }
}
