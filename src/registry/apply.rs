//! Makes durable changes visible: in DNS, in the catalog, in the change feed, in this order.
//!
//! The applier depends neither on the journal nor on the source of a change: the writer calls it with
//! journaled batches, and, while another process writes, with what that process wrote to Kubernetes.
//!
//! Readers of the catalog and of the zone never see a generation of which a part is missing: the
//! zone has a service before the catalog has it, and the catalog has all services of a generation
//! before its generation changes. The feed and the mirror's dirty set come last, because their
//! readers read the catalog at once.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use indexmap::IndexMap;

use super::{Batch, Catalog, Event, Feed, MirrorProgress, RegisteredNames, staged::StagedChanges};
use crate::{
    metrics::Metrics,
    model::{CowTree, DnsName, Instance, InstanceChange, NameStatus, Service, ServiceKey, UnixMillis},
    replicas::tombstones::Tombstones,
    zone::{Publisher, ServiceChange},
};

/// The only writer of the zone, the catalog and the feed.
#[derive(Debug)]
pub(super) struct Applier {
    publisher: Publisher,
    catalog: Arc<Catalog>,
    feed: Arc<Feed>,
    mirror_progress: Arc<MirrorProgress>,
    names: Arc<RegisteredNames>,
    metrics: Arc<Metrics>,
    /// The SOA serial: the catalog's generation, or that of the process that is followed.
    serial: u64,
    /// Changes come from words of another process.
    merging: bool,
    /// Endpoints of joined services that are not registered here. Served in DNS only.
    foreign: HashMap<ServiceKey, CowTree<Arc<Instance>>>,
}

/// A generation that is visible, but not yet in the feed.
#[derive(Debug)]
#[must_use = "the batch has to be announced to the feed"]
pub(super) struct AppliedBatch {
    generation: u64,
    events: Vec<Event>,
    durable: UnixMillis,
    visible: UnixMillis,
}

impl AppliedBatch {
    /// Instances that were added, changed or removed.
    pub(super) fn changes(&self) -> usize {
        self.events.len()
    }
}

impl Applier {
    pub(super) fn new(
        publisher: Publisher,
        catalog: Arc<Catalog>,
        feed: Arc<Feed>,
        mirror_progress: Arc<MirrorProgress>,
        names: Arc<RegisteredNames>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            publisher,
            catalog,
            feed,
            mirror_progress,
            names,
            metrics,
            serial: 0,
            foreign: HashMap::new(),
            merging: false,
        }
    }

    /// Fills an empty registry with the stored services and tombstones, as `generation`. The feed begins after that
    /// generation: recovered services are not changes.
    pub(super) fn load<S>(
        &mut self,
        generation: u64,
        services: IndexMap<ServiceKey, Service, S>,
        tombstones: impl IntoIterator<Item = (ServiceKey, Tombstones)>,
    ) {
        self.catalog.begin_generation(generation);
        tombstones.into_iter().for_each(|(service, tombstones)| self.catalog.set_tombstones(service, tombstones));
        self.catalog.reserve(services.len());
        self.publisher.reserve(services.len(), services.values().flat_map(|service| &service.instances));
        for (service, mut after) in services {
            after.generation = generation;
            let added = |instance: &Arc<_>| InstanceChange { before: None, after: Some(Arc::clone(instance)) };
            let changes: Vec<InstanceChange> = after.instances.iter().map(added).collect();
            let mut counts = self.catalog.counts();
            after.instances.iter().for_each(|instance| counts.replace(service.namespace(), None, Some(instance)));
            drop(counts);
            let change = ServiceChange { service: &service, changes: &changes };
            self.publisher.publish(generation, &[change]);
            self.catalog.set(service, after);
        }
        self.names.apply(self.publisher.take_name_changes());
        self.set_serial(generation);
        self.catalog.set_generation(generation);
        self.feed.start_after(generation);
        self.metrics.registry.set_registered(self.catalog.len(), self.catalog.instances(), generation);
        self.metrics.registry.set_unservable(self.publisher.unservable());
        self.metrics.registry.set_tombstones(self.catalog.tombstone_count());
    }

    /// Makes the changes visible as `generation`. Must not be called before the journal has synced
    /// them, at the time `durable`. The caller passes the result to [`Applier::announce`].
    pub(super) fn apply(&mut self, generation: u64, changes: StagedChanges, durable: UnixMillis) -> AppliedBatch {
        let buried = changes.tombstones.iter().map(|(service, (_, received))| (service.clone(), generation, *received));
        let buried: Vec<_> = buried.collect();
        // Stamped anew without a change. The mirror writes the stamp, after what has changed.
        let repeated = changes.services.iter().filter(|(_, staged)| staged.changes.is_empty());
        let repeated: Vec<_> =
            repeated.map(|(service, staged)| (service.clone(), generation, staged.received)).collect();
        let applied = self.publish(generation, generation, changes, durable);
        // After the catalog: a marked service wakes the mirror, which reads the catalog at once.
        let dirty = applied.events.iter().map(|event| (event.service.clone(), generation, event.received));
        if self.merging {
            self.mirror_progress.mark_merged(dirty.chain(buried).chain(repeated));
        } else {
            self.mirror_progress.mark_dirty(dirty.chain(buried), repeated);
        }
        applied
    }

    /// Makes changes visible that another process made and wrote to Kubernetes up to its generation `serial`.
    /// `generation` is this process's own, by which its feed orders them.
    pub(super) fn follow(
        &mut self,
        generation: u64,
        serial: u64,
        changes: StagedChanges,
        seen: UnixMillis,
    ) -> AppliedBatch {
        self.publish(generation, serial, changes, seen)
    }

    /// Whether the next changes come from words of another process: the mirror writes those after its own.
    pub(super) fn set_merging(&mut self, merging: bool) {
        self.merging = merging;
    }

    /// Publishes another SOA serial without a change.
    pub(super) fn set_serial(&mut self, serial: u64) {
        self.serial = serial;
        self.publisher.publish(serial, &[]);
    }

    /// The SOA serial that was published last.
    pub(super) fn serial(&self) -> u64 {
        self.serial
    }

    /// From now on a name that is not in the zone does not exist.
    pub(super) fn set_ready(&self) {
        self.publisher.set_ready();
    }

    fn publish(&mut self, generation: u64, serial: u64, changes: StagedChanges, durable: UnixMillis) -> AppliedBatch {
        let begun = Instant::now();
        self.catalog.begin_generation(generation);
        let StagedChanges { mut services, events, tombstones, counts, .. } = changes;
        self.catalog.counts().merge(&counts);
        for staged in services.values_mut() {
            staged.after.generation = generation;
        }
        let visible = services.iter().filter(|(_, staged)| !staged.changes.is_empty());
        let published: Vec<ServiceChange<'_>> =
            visible.map(|(service, staged)| ServiceChange { service, changes: &staged.changes }).collect();
        self.publisher.publish(serial, &published);
        self.names.apply(self.publisher.take_name_changes());
        self.serial = serial;
        self.metrics.registry.set_unservable(self.publisher.unservable());
        // Before the services: the mirror must not see an instance gone without its tombstone.
        for (service, (after, _)) in tombstones {
            self.catalog.set_tombstones(service, after);
        }
        self.metrics.registry.set_tombstones(self.catalog.tombstone_count());
        for (service, staged) in services {
            self.catalog.set(service, staged.after);
        }
        self.catalog.set_generation(generation);
        let visible = UnixMillis::now();
        self.metrics.registry.observe_publish(begun.elapsed());
        for event in &events {
            let took = Duration::from_millis(visible.0.saturating_sub(event.received.0));
            self.metrics.registry.observe_programming(took);
        }
        AppliedBatch { generation, events, durable, visible }
    }

    /// Appends an applied batch to the feed; its registrants were answered at `acknowledged`.
    pub(super) fn announce(&self, applied: AppliedBatch, acknowledged: UnixMillis) {
        let AppliedBatch { generation, events, durable, visible } = applied;
        // Stamped anew, or only tombstones: no watch is woken, but the feed must not wait for this generation.
        if events.is_empty() {
            self.feed.skip(generation);
        } else {
            self.feed.push(Batch { generation, events, durable, visible, acknowledged });
        }
    }

    /// Serves the foreign endpoints `instances` beside the registered instances of `service`, in place
    /// of its earlier foreign endpoints. Foreign endpoints are not registered: they have no generation,
    /// are not journaled or mirrored, and continue to change when the journal cannot be written.
    pub(super) fn set_foreign_endpoints(&mut self, service: ServiceKey, instances: Vec<Arc<Instance>>) {
        let mut tree = CowTree::default();
        instances.into_iter().for_each(|instance| drop(tree.put(instance)));
        let before = self.foreign.remove(&service).unwrap_or_default();
        let changes = difference(&before, &tree);
        if !changes.is_empty() {
            let change = ServiceChange { service: &service, changes: &changes };
            self.publisher.publish(self.serial, &[change]);
            self.metrics.registry.set_unservable(self.publisher.unservable());
        }
        if !tree.is_empty() {
            self.foreign.insert(service, tree);
        }
    }

    /// Makes visible how the lookups of `name` stand. Nothing was registered: there is no generation, as with foreign
    /// endpoints.
    pub(super) fn resolve(&mut self, name: &DnsName, served: NameStatus, looked_up: NameStatus) {
        let services = self.publisher.resolve(name, &served.resolution);
        self.names.set_status(name, served, looked_up);
        // After the status, which the mirror reads.
        self.mirror_progress.mark_resolved(services);
    }

    /// The names that are instances.
    pub(super) fn names(&self) -> &RegisteredNames {
        &self.names
    }

    /// Sets in the zone whether a namespace exists. Each call must be a change, because the zone counts
    /// namespaces.
    pub(super) fn set_namespace(&mut self, name: &str, exists: bool) {
        self.publisher.set_namespace(name, exists);
    }
}

/// The changes that lead from `before` to `after`.
fn difference(before: &CowTree<Arc<Instance>>, after: &CowTree<Arc<Instance>>) -> Vec<InstanceChange> {
    // Linear in both: endpoints of a Service change by a few at a time, but arrive as the whole list.
    let removed = before.iter().filter(|old| after.get(&old.key()).is_none());
    let removed = removed.map(|old| InstanceChange { before: Some(Arc::clone(old)), after: None });
    let put = after.iter().filter_map(|new| {
        let old = before.get(&new.key()).cloned();
        (old.as_ref() != Some(new)).then(|| InstanceChange { before: old, after: Some(Arc::clone(new)) })
    });
    removed.chain(put).collect()
}
