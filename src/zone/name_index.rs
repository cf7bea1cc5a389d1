//! Which services have an instance with which DNS name, and what each name leads to. The publisher's own: readers find what they
//! need in the services' records.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    sync::Arc,
};

use crate::model::{DnsName, Resolution, ServiceKey};

/// A name that is an instance of some service now, or of none any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameChange {
    /// The name.
    pub name: DnsName,
    /// Whether it has to be looked up.
    pub used: bool,
}

#[derive(Debug, Default)]
pub(super) struct NameIndex {
    names: HashMap<DnsName, NameUse>,
    changes: Vec<NameChange>,
}

#[derive(Debug, Default)]
struct NameUse {
    resolution: Arc<Resolution>,
    /// The services, and how many instances of each.
    services: BTreeMap<ServiceKey, u32>,
}

impl NameIndex {
    /// Counts an instance of `service` in; returns what its name leads to.
    pub(super) fn add(&mut self, name: &DnsName, service: &ServiceKey) -> Arc<Resolution> {
        if !self.names.contains_key(name) {
            self.changes.push(NameChange { name: name.clone(), used: true });
        }
        let uses = self.names.entry(name.clone()).or_default();
        *uses.services.entry(service.clone()).or_default() += 1;
        Arc::clone(&uses.resolution)
    }

    /// Counts an instance of `service` out.
    pub(super) fn remove(&mut self, name: &DnsName, service: &ServiceKey) {
        let Entry::Occupied(mut uses) = self.names.entry(name.clone()) else { return };
        let services = &mut uses.get_mut().services;
        if let Some(count) = services.get_mut(service) {
            *count -= 1;
            if *count == 0 {
                services.remove(service);
            }
        }
        if services.is_empty() {
            uses.remove();
            self.changes.push(NameChange { name: name.clone(), used: false });
        }
    }

    /// Sets what `name` leads to; returns the services that have to follow, none when nothing has changed.
    pub(super) fn resolve(&mut self, name: &DnsName, resolution: &Arc<Resolution>) -> Vec<ServiceKey> {
        let Some(uses) = self.names.get_mut(name) else { return Vec::new() };
        if uses.resolution == *resolution {
            return Vec::new();
        }
        uses.resolution = Arc::clone(resolution);
        uses.services.keys().cloned().collect()
    }

    /// The changes since the last call, in their order.
    pub(super) fn take_changes(&mut self) -> Vec<NameChange> {
        std::mem::take(&mut self.changes)
    }
}
