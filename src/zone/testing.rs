//! A zone with a registry's worth of services behind it, for tests.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{NameChange, Publisher, ServiceChange, ServiceRecords, Zone, ZoneConfig, rrset::SmallTree};
pub(crate) use crate::model::testing::{instance, key, spec};
use crate::model::{DnsName, Instance, InstanceChange, InstanceKey, InstanceSpec, Resolution, Service, ServiceKey};

/// The zone's configuration in most tests.
pub(crate) fn config() -> ZoneConfig {
    ZoneConfig {
        origin: DnsName::parse("cluster.local").expect("valid"),
        ttl: 5,
        reverse_zones: Vec::new(),
        ns_addresses: Vec::new(),
        publish_not_ready: false,
        flatten_names: false,
    }
}

/// A zone and what is registered in it.
#[derive(Debug)]
pub(crate) struct TestZone {
    pub(crate) zone: Arc<Zone>,
    publisher: Publisher,
    services: BTreeMap<ServiceKey, Service>,
    resolutions: BTreeMap<DnsName, Arc<Resolution>>,
    name_changes: Vec<NameChange>,
    generation: u64,
}

impl TestZone {
    /// Nothing registered, and not ready.
    pub(crate) fn loading(config: ZoneConfig) -> Self {
        let (zone, publisher) = Zone::new(config);
        Self {
            zone,
            publisher,
            services: BTreeMap::new(),
            resolutions: BTreeMap::new(),
            name_changes: Vec::new(),
            generation: 0,
        }
    }

    /// Nothing registered, and ready.
    pub(crate) fn new(config: ZoneConfig) -> Self {
        let world = Self::loading(config);
        world.zone.set_ready();
        world
    }

    /// Registers an instance under `service.namespace`.
    pub(crate) fn add(&mut self, service: &str, spec: &InstanceSpec) {
        let service = key(service);
        let instance = instance(spec);
        self.put(&service, instance);
    }

    /// Registers an instance that is not ready.
    pub(crate) fn add_unready(&mut self, service: &str, spec: &InstanceSpec) {
        let service = key(service);
        let instance = Arc::unwrap_or_clone(instance(spec)).with_ready(false);
        self.put(&service, instance.into());
    }

    /// Removes an instance.
    pub(crate) fn remove(&mut self, service: &str, spec: &InstanceSpec) {
        let service = key(service);
        let instance = instance(spec);
        self.change(&service, &[(instance, false)]);
    }

    pub(crate) fn put(&mut self, service: &ServiceKey, instance: Arc<Instance>) {
        self.change(service, &[(instance, true)]);
    }

    /// One generation: puts each instance, or takes it out.
    pub(crate) fn change(&mut self, service: &ServiceKey, steps: &[(Arc<Instance>, bool)]) {
        let known = self.services.entry(service.clone()).or_default();
        let mut changes = Vec::new();
        for (instance, stays) in steps {
            let before = if *stays {
                known.instances.put(Arc::clone(instance))
            } else {
                known.instances.remove(&InstanceKey::from(&instance.id()))
            };
            let after = stays.then(|| Arc::clone(instance));
            if before.is_some() || after.is_some() {
                changes.push(InstanceChange { before, after });
            }
        }
        self.generation += 1;
        let change = ServiceChange { service, changes: &changes };
        self.publisher.publish(self.generation, &[change]);
        let changes = self.publisher.take_name_changes();
        for NameChange { name, used } in &changes {
            // As whoever looks names up: one that is used again is looked up again.
            if *used {
                self.resolutions.insert(name.clone(), Arc::default());
            } else {
                self.resolutions.remove(name);
            }
        }
        self.name_changes.extend(changes);
    }

    /// Sets what a name leads to, if an instance has it.
    pub(crate) fn resolve(&mut self, name: &str, resolution: Resolution) {
        let (name, resolution) = (DnsName::parse(name).expect("a name"), Arc::new(resolution));
        self.publisher.resolve(&name, &resolution);
        if let Some(known) = self.resolutions.get_mut(&name) {
            *known = resolution;
        }
    }

    /// The names that came into use, or are not used any more, since the last call.
    pub(crate) fn take_name_changes(&mut self) -> Vec<NameChange> {
        std::mem::take(&mut self.name_changes)
    }

    /// Publishes nothing but a generation.
    pub(crate) fn generation(&mut self, generation: u64) {
        self.generation = generation;
        self.publisher.publish(generation, &[]);
    }

    /// The same, registered at once in a zone of its own.
    pub(crate) fn rebuilt(&self, config: ZoneConfig) -> Self {
        let mut fresh = Self::new(config);
        for (service, known) in &self.services {
            let all: Vec<_> = known.instances.iter().map(|instance| (Arc::clone(instance), true)).collect();
            fresh.change(service, &all);
        }
        for (name, resolution) in &self.resolutions {
            fresh.publisher.resolve(name, resolution);
        }
        fresh
    }
}

/// All that a zone holds, to compare.
#[derive(Debug, PartialEq)]
pub(crate) struct ZoneContents {
    services: BTreeMap<ServiceKey, ServiceRecords>,
    namespaces: BTreeMap<String, usize>,
    names: BTreeSet<String>,
}

impl ZoneContents {
    pub(crate) fn of(zone: &Zone) -> Self {
        let mut names = BTreeSet::new();
        zone.reverse.visit(|ip, rows: &SmallTree<_>| {
            assert!(!rows.is_empty(), "{ip} is left without a name");
            names.extend(rows.iter().map(|name| format!("{ip} {name:?}")));
        });
        Self {
            services: zone.services.pin().iter().map(|(key, records)| (key.clone(), records.clone())).collect(),
            namespaces: zone.namespaces.pin().iter().map(|(name, count)| (name.to_string(), *count)).collect(),
            names,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.services.is_empty() && self.namespaces.is_empty() && self.names.is_empty()
    }
}
