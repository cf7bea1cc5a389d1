//! The state machine: what a command does. Pure: no clock, no I/O, and nothing that a reader sees.
//!
//! Commands are checked against the catalog with the changes of the batch laid over it. The batch
//! is then made durable and published as a whole, or dropped as a whole; the catalog itself is
//! never ahead of the journal.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::{Catalog, Command, Event, NamespacePolicy, Outcome, cluster_facts::ClusterFacts};
use crate::{
    model::{Address, Instance, InstanceChange, InstanceId, InstanceKey, PortSet, Service, ServiceKey, UnixMillis},
    store::Record,
};

/// What a batch changes, in the words of everyone who has to know.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Every service that changed, as it will be.
    pub(super) services: HashMap<ServiceKey, PendingService, foldhash::fast::RandomState>,
    /// What the journal has to keep, in order.
    pub(super) records: Vec<Record>,
    /// What the feed will say, in order.
    pub(super) events: Vec<Event>,
    /// Instances more, or fewer, than before the batch.
    growth: isize,
}

/// One service that changed.
#[derive(Debug, Default)]
pub(super) struct PendingService {
    /// As it will be.
    pub(super) after: Service,
    /// What leads there, in order.
    pub(super) changes: Vec<InstanceChange>,
}

impl Pending {
    /// Whether nothing changes.
    pub(super) fn is_empty(&self) -> bool {
        self.services.is_empty() && self.records.is_empty()
    }
}

/// Decides commands of one batch after the other.
#[derive(Debug)]
pub(super) struct State {
    catalog: Arc<Catalog>,
    max_instances: usize,
    facts: ClusterFacts,
    /// While what stands may still give way to what Kubernetes holds: what was registered again
    /// since, and is on record for it.
    affirmed: Option<HashSet<(ServiceKey, InstanceId), foldhash::fast::RandomState>>,
    pending: Pending,
}

impl State {
    pub(super) fn new(catalog: Arc<Catalog>, max_instances: usize, rules: Option<NamespacePolicy>) -> Self {
        let affirmed = rules.is_some().then(HashSet::default);
        Self { catalog, max_instances, facts: ClusterFacts::new(rules), affirmed, pending: Pending::default() }
    }

    /// From now on what stands, stands.
    pub(super) fn settle(&mut self) {
        self.affirmed = None;
    }

    /// What Kubernetes says.
    pub(super) fn facts(&mut self) -> &mut ClusterFacts {
        &mut self.facts
    }

    /// Makes what a start has decided come true, whatever the limit says: it was accepted once.
    pub(super) fn replay(&mut self, records: Vec<Record>, now: UnixMillis) {
        for record in records {
            match &record {
                Record::Put { service, instance } => {
                    let held = self.service(service);
                    let before = held.as_ref().and_then(|held| held.instances.get(&instance.key()).cloned());
                    let change = InstanceChange { before, after: Some(Arc::clone(instance)) };
                    self.note(service.clone(), held, change, now);
                }
                Record::Remove { service, id } => {
                    let held = self.service(service);
                    let before = held.as_ref().and_then(|held| held.instances.get(&InstanceKey::from(id)).cloned());
                    self.note(service.clone(), held, InstanceChange { before, after: None }, now);
                }
                Record::Mirrored { .. } | Record::Term { .. } => {}
            }
            self.pending.records.push(record);
        }
    }

    /// What the commands since the last call change; the next batch begins, and is expected to be
    /// as large.
    pub(super) fn take(&mut self) -> Pending {
        let Pending { services, records, events, growth: _ } = &self.pending;
        let next = Pending {
            services: HashMap::with_capacity_and_hasher(services.len(), services.hasher().clone()),
            records: Vec::with_capacity(records.len()),
            events: Vec::with_capacity(events.len()),
            growth: 0,
        };
        std::mem::replace(&mut self.pending, next)
    }

    /// Decides one command and notes what it changes.
    pub(super) fn decide(&mut self, command: Command, received: UnixMillis) -> Outcome {
        match command {
            Command::Register { service, instance } => self.register(service, instance, received),
            Command::Unregister { service, address, ports } => self.unregister(&service, address, ports, received),
            Command::SetReady { service, id, ready } => self.set_ready(service, &id, ready, received),
        }
    }

    fn register(&mut self, key: ServiceKey, instance: Arc<Instance>, received: UnixMillis) -> Outcome {
        if let Some(err) = self.facts.refuse(&key) {
            return Outcome::Refused(err);
        }
        let service = self.service(&key);
        let before = service.as_ref().and_then(|service| service.instances.get(&instance.key()).cloned());
        let (outcome, instance) = match &before {
            None => {
                let count = self.catalog.instances().saturating_add_signed(self.pending.growth);
                if count >= self.max_instances {
                    return Outcome::Full { limit: self.max_instances };
                }
                (Outcome::Created, instance)
            }
            Some(before) if before.same_attributes(&instance) => {
                // The acknowledgement has to hold, whatever becomes of what it rests on. Once is
                // enough: whatever changes it later is on record anyway.
                if self.affirmed.as_mut().is_some_and(|affirmed| affirmed.insert((key.clone(), before.id()))) {
                    self.pending.records.push(Record::Put { service: key, instance: Arc::clone(before) });
                }
                return Outcome::Unchanged;
            }
            Some(before) => {
                // Readiness and the time of the first registration are the server's, not the registrant's.
                let instance = Arc::unwrap_or_clone(instance);
                let instance = instance.with_ready(before.ready()).with_registered(before.registered());
                (Outcome::Updated, Arc::new(instance))
            }
        };
        self.pending.records.push(Record::Put { service: key.clone(), instance: Arc::clone(&instance) });
        self.note(key, service, InstanceChange { before, after: Some(instance) }, received);
        outcome
    }

    fn unregister(&mut self, key: &ServiceKey, address: Address, ports: PortSet, received: UnixMillis) -> Outcome {
        let Some(service) = self.service(key) else { return Outcome::NotFound };
        let found = if ports.as_slice().is_empty() {
            service.at(&address)
        } else {
            let id = InstanceId { address, ports };
            service.instances.get(&InstanceKey::from(&id)).cloned().into_iter().collect()
        };
        if found.is_empty() {
            return Outcome::NotFound;
        }
        let removed = found.len();
        for instance in found {
            self.pending.records.push(Record::Remove { service: key.clone(), id: instance.id() });
            self.note(
                key.clone(),
                Some(service.clone()),
                InstanceChange { before: Some(instance), after: None },
                received,
            );
        }
        Outcome::Removed(removed)
    }

    fn set_ready(&mut self, key: ServiceKey, id: &InstanceId, ready: bool, received: UnixMillis) -> Outcome {
        let service = self.service(&key);
        let found = service.as_ref().and_then(|service| service.instances.get(&InstanceKey::from(id)).cloned());
        match found {
            None => Outcome::NotFound,
            Some(before) if before.ready() == ready => Outcome::Unchanged,
            Some(before) => {
                let after = Arc::new(Instance::clone(&before).with_ready(ready));
                self.note(key, service, InstanceChange { before: Some(before), after: Some(after) }, received);
                Outcome::Updated
            }
        }
    }

    /// The service as the batch leaves it so far.
    fn service(&self, key: &ServiceKey) -> Option<Service> {
        match self.pending.services.get(key) {
            Some(pending) => Some(pending.after.clone()),
            None => self.catalog.get(key),
        }
    }

    /// Lays one change over what the batch has so far; `service` is as [`State::service`] gave it.
    fn note(&mut self, key: ServiceKey, service: Option<Service>, change: InstanceChange, received: UnixMillis) {
        let pending = self
            .pending
            .services
            .entry(key.clone())
            .or_insert_with(|| PendingService { after: service.unwrap_or_default(), changes: Vec::new() });
        let instances = &mut pending.after.instances;
        match (&change.before, &change.after) {
            (_, Some(after)) => {
                if instances.put(Arc::clone(after)).is_none() {
                    self.pending.growth += 1;
                }
            }
            (Some(before), None) => {
                if instances.remove(&before.key()).is_some() {
                    self.pending.growth -= 1;
                }
            }
            (None, None) => return,
        }
        pending.changes.push(change.clone());
        self.pending.events.push(Event { service: key, change, received });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{InstanceSpec, PortSpec, Validator};

    const VALIDATOR: Validator = Validator { zone_wire_len: 15, names_allowed: true };

    fn key(name: &str) -> ServiceKey {
        VALIDATOR.service("prod", name).expect("valid")
    }

    fn instance(address: &str, port: i64, weight: f32) -> Arc<Instance> {
        let spec = InstanceSpec {
            address: address.into(),
            ports: vec![PortSpec { number: port, ..PortSpec::default() }],
            weight: Some(weight),
            ..InstanceSpec::default()
        };
        Arc::new(VALIDATOR.instance(&key("web"), &spec, UnixMillis(1)).expect("valid"))
    }

    fn register(state: &mut State, instance: &Arc<Instance>) -> Outcome {
        let command = Command::Register { service: key("web"), instance: Arc::clone(instance) };
        state.decide(command, UnixMillis(2))
    }

    fn unregister(state: &mut State, address: &str, ports: PortSet) -> Outcome {
        let address = VALIDATOR.address(address).expect("valid");
        state.decide(Command::Unregister { service: key("web"), address, ports }, UnixMillis(2))
    }

    fn empty(max_instances: usize) -> State {
        State::new(Arc::new(Catalog::default()), max_instances, None)
    }

    #[test]
    fn a_batch_sees_its_own_changes() {
        let mut state = empty(10);
        let web = instance("10.0.0.1", 80, 1.0);
        assert_eq!(register(&mut state, &web), Outcome::Created);
        assert_eq!(register(&mut state, &web), Outcome::Unchanged);
        assert_eq!(register(&mut state, &instance("10.0.0.1", 80, 2.0)), Outcome::Updated);
        assert_eq!(unregister(&mut state, "10.0.0.1", web.ports().set()), Outcome::Removed(1));
        assert_eq!(unregister(&mut state, "10.0.0.1", web.ports().set()), Outcome::NotFound);
        let pending = state.take();
        assert_eq!((pending.records.len(), pending.events.len()), (3, 3));
        assert!(pending.services[&key("web")].after.instances.is_empty());
        assert!(state.take().is_empty());
    }

    #[test]
    fn without_ports_every_instance_of_the_address_goes() {
        let mut state = empty(10);
        for (address, port) in [("10.0.0.1", 80), ("10.0.0.1", 81), ("10.0.0.2", 80)] {
            assert_eq!(register(&mut state, &instance(address, port, 1.0)), Outcome::Created);
        }
        assert_eq!(unregister(&mut state, "10.0.0.1", PortSet::default()), Outcome::Removed(2));
        assert_eq!(unregister(&mut state, "10.0.0.1", PortSet::default()), Outcome::NotFound);
        assert_eq!(state.take().services[&key("web")].after.instances.len(), 1);
    }

    #[test]
    fn the_limit_counts_what_the_batch_adds_and_removes() {
        let mut state = empty(1);
        assert_eq!(register(&mut state, &instance("10.0.0.1", 80, 1.0)), Outcome::Created);
        assert_eq!(register(&mut state, &instance("10.0.0.2", 80, 1.0)), Outcome::Full { limit: 1 });
        assert_eq!(register(&mut state, &instance("10.0.0.1", 80, 3.0)), Outcome::Updated);
        assert_eq!(unregister(&mut state, "10.0.0.1", PortSet::default()), Outcome::Removed(1));
        assert_eq!(register(&mut state, &instance("10.0.0.2", 80, 1.0)), Outcome::Created);
    }

    #[test]
    fn readiness_is_not_journaled_and_outlives_an_update() {
        let mut state = empty(10);
        let web = instance("10.0.0.1", 80, 1.0);
        assert_eq!(register(&mut state, &web), Outcome::Created);
        let set = |ready| Command::SetReady { service: key("web"), id: web.id(), ready };
        assert_eq!(state.decide(set(false), UnixMillis(3)), Outcome::Updated);
        assert_eq!(state.decide(set(false), UnixMillis(3)), Outcome::Unchanged);
        assert_eq!(register(&mut state, &instance("10.0.0.1", 80, 2.0)), Outcome::Updated);
        let pending = state.take();
        assert_eq!(pending.records.len(), 2);
        let after = &pending.services[&key("web")].after.instances;
        let held = after.iter().next().expect("one instance");
        assert!(!held.ready());
        assert_eq!((held.weight().get(), held.registered()), (2.0, UnixMillis(1)));
    }
}
