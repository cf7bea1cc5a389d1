//! Which services have an instance with which DNS name, and what each name leads to. The publisher's own: readers find what they
//! need in the services' records.

use std::{
    collections::{BTreeMap, HashMap},
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
    /// Came into use since the last [`take_changes`](Self::take_changes).
    added: Vec<DnsName>,
    /// Lost their last instance since then, and may have another by now.
    emptied: Vec<DnsName>,
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
            self.added.push(name.clone());
        }
        let uses = self.names.entry(name.clone()).or_default();
        *uses.services.entry(service.clone()).or_default() += 1;
        Arc::clone(&uses.resolution)
    }

    /// Counts an instance of `service` out.
    pub(super) fn remove(&mut self, name: &DnsName, service: &ServiceKey) {
        let Some(NameUse { services, .. }) = self.names.get_mut(name) else { return };
        if let Some(count) = services.get_mut(service) {
            *count -= 1;
            if *count == 0 {
                services.remove(service);
            }
        }
        if services.is_empty() {
            self.emptied.push(name.clone());
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

    /// The changes since the last call. A name that moved from one service to another has none, and keeps what is known of it.
    pub(super) fn take_changes(&mut self) -> Vec<NameChange> {
        let mut changes: Vec<NameChange> = self.added.drain(..).map(|name| NameChange { name, used: true }).collect();
        for name in std::mem::take(&mut self.emptied) {
            if self.names.get(&name).is_some_and(|uses| uses.services.is_empty()) {
                self.names.remove(&name);
                changes.push(NameChange { name, used: false });
            }
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::key;

    /// Otherwise a restart of its registrant would lose the last good answer while no upstream server answers.
    #[test]
    fn name_that_moves_in_one_batch_keeps_what_is_known_of_it() {
        let name = DnsName::parse("pg.example.com").expect("a name");
        let mut index = NameIndex::default();
        index.add(&name, &key("db.prod"));
        assert_eq!(index.take_changes(), [NameChange { name: name.clone(), used: true }]);
        let known = Arc::new(Resolution::NxDomain);
        assert_eq!(index.resolve(&name, &known), [key("db.prod")]);
        index.remove(&name, &key("db.prod"));
        assert_eq!(index.add(&name, &key("web.prod")), known);
        assert_eq!(index.take_changes(), []);
        index.remove(&name, &key("web.prod"));
        assert_eq!(index.take_changes(), [NameChange { name: name.clone(), used: false }]);
        assert_eq!(index.resolve(&name, &known), []);
    }
}
