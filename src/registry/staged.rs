//! The changes of one batch, laid over the catalog until the batch is durable.
//!
//! The decider reads the catalog through the staged changes, so that a command is decided with the
//! earlier changes of its batch. The [`Applier`](super::apply::Applier) then makes all of them visible.
//! Changes are staged in the same way for commands of registrants and for the comparison with
//! Kubernetes.

use std::{collections::HashMap, sync::Arc};

use super::{Catalog, Event, quota::InstanceCounts};
use crate::{
    model::{InstanceChange, Service, ServiceKey, UnixMillis},
    replicas::tombstones::Tombstones,
};

/// The changes of a batch, by service and in order.
#[derive(Debug, Default)]
pub(super) struct StagedChanges {
    /// The services that changed.
    pub(super) services: HashMap<ServiceKey, StagedService, foldhash::fast::RandomState>,
    /// The events for the feed, in order.
    pub(super) events: Vec<Event>,
    /// The tombstones of services in which they changed, and when the first change was received.
    pub(super) tombstones: HashMap<ServiceKey, (Tombstones, UnixMillis), foldhash::fast::RandomState>,
    /// Added minus removed instances.
    growth: isize,
    /// The same by registrant and by namespace.
    pub(super) counts: InstanceCounts,
}

/// One service that changed.
#[derive(Debug)]
pub(super) struct StagedService {
    /// The service after all changes; the applier sets its generation.
    pub(super) after: Service,
    /// The changes that DNS and readers see, in order. Empty if instances were only stamped anew.
    pub(super) changes: Vec<InstanceChange>,
    /// When the first change was received.
    pub(super) received: UnixMillis,
}

impl StagedChanges {
    pub(super) fn is_empty(&self) -> bool {
        self.services.is_empty() && self.tombstones.is_empty()
    }

    /// No changes, with the capacity of `self`: consecutive batches have similar sizes.
    pub(super) fn empty_alike(&self) -> Self {
        Self {
            services: HashMap::with_capacity_and_hasher(self.services.len(), self.services.hasher().clone()),
            events: Vec::with_capacity(self.events.len()),
            tombstones: HashMap::default(),
            growth: 0,
            counts: InstanceCounts::default(),
        }
    }

    /// The service with its staged changes.
    pub(super) fn service(&self, catalog: &Catalog, key: &ServiceKey) -> Option<Service> {
        match self.services.get(key) {
            Some(staged) => Some(staged.after.clone()),
            None => catalog.get(key),
        }
    }

    /// The number of instances, with the staged changes.
    pub(super) fn instances(&self, catalog: &Catalog) -> usize {
        catalog.instances().saturating_add_signed(self.growth)
    }

    /// The tombstones of a service with the staged changes.
    pub(super) fn tombstones(&self, catalog: &Catalog, key: &ServiceKey) -> Tombstones {
        match self.tombstones.get(key) {
            Some((staged, _)) => staged.clone(),
            None => catalog.tombstones(key),
        }
    }

    /// Stages the tombstones of a service.
    pub(super) fn stage_tombstones(&mut self, key: &ServiceKey, after: Tombstones, received: UnixMillis) {
        // Later changes of the batch keep the time of the first one: the oldest is what the mirror's lag is measured
        // from.
        self.tombstones.entry(key.clone()).or_insert_with(|| (Tombstones::default(), received)).0 = after;
    }

    /// The tombstones of a service, to be changed in place: a copy would share its chunks with the staged one, and every change
    /// would copy some.
    pub(super) fn tombstones_mut(
        &mut self,
        catalog: &Catalog,
        key: &ServiceKey,
        received: UnixMillis,
    ) -> &mut Tombstones {
        &mut self.tombstones.entry(key.clone()).or_insert_with(|| (catalog.tombstones(key), received)).0
    }

    /// Stages one change; `service` must be the result of [`StagedChanges::service`] for `key`. One of nothing but the stamp
    /// is no event: a watch would repeat to its reader what the reader knows.
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
        let staged = self.services.entry(key.clone()).or_insert_with(|| StagedService {
            after: service.unwrap_or_default(),
            changes: Vec::new(),
            received,
        });
        let instances = &mut staged.after.instances;
        let (replaced, after) = match (&change.before, &change.after) {
            (_, Some(after)) => (instances.put(Arc::clone(after)), Some(&**after)),
            (Some(before), None) => (instances.remove(&before.key()), None),
            (None, None) => (None, None),
        };
        // By what the tree replaced and not by `change.before`: an earlier change of the batch may have been on the same instance.
        self.growth += isize::from(after.is_some()) - isize::from(replaced.is_some());
        self.counts.replace(key.namespace(), replaced.as_deref(), after);
        if let (Some(before), Some(after)) = (&change.before, &change.after)
            && before.same_but_for_stamp(after)
        {
            return;
        }
        staged.changes.push(change.clone());
        self.events.push(Event { service: key, change, received });
    }
}
