//! Which DNS names are instances, and how their lookups stand.
//!
//! The writer sets which names are in use, as it makes changes visible, and what each leads to. Whoever looks names up
//! takes the changes; the mirror, the pages and the readers of gRPC see the statuses.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use foldhash::fast::RandomState;
use papaya::HashMap;
use tokio::sync::Notify;

use super::Writer;
use crate::{
    model::{DnsName, NameStatus, Resolution, ResolvedAddresses, Service},
    zone::NameChange,
};

impl Writer {
    /// Makes visible how the lookups of names stand, without the addresses that nobody may register.
    pub(super) fn resolved(&mut self, statuses: Vec<(DnsName, NameStatus)>) {
        for (name, mut status) in statuses {
            if let Some(addresses) = status.resolution.addresses() {
                let rules = &self.decider.facts().addresses;
                let (allowed, refused): (Vec<_>, Vec<_>) = addresses.iter().partition(|ip| !rules.denies_resolved(*ip));
                if !refused.is_empty() {
                    let ttl = addresses.ttl;
                    let refused: Vec<_> = refused.iter().map(IpAddr::to_string).collect();
                    status.error = Some(format!("leads to addresses that are denied: {}", refused.join(", ")).into());
                    status.resolution = Arc::new(Resolution::Addresses(ResolvedAddresses::new(allowed, ttl)));
                }
            }
            self.applier.resolve(&name, status);
        }
    }
}

/// The names that are instances of some service, with their statuses. Reading takes no lock.
#[derive(Debug, Default)]
pub struct RegisteredNames {
    statuses: HashMap<DnsName, Arc<NameStatus>, RandomState>,
    changes: Mutex<Vec<NameChange>>,
    changed: Notify,
}

impl RegisteredNames {
    /// How the lookups of `name` stand; the default before the first has ended, `None` if no instance has the name.
    #[must_use]
    pub fn status(&self, name: &DnsName) -> Option<Arc<NameStatus>> {
        self.statuses.pin().get(name).cloned()
    }

    /// The statuses of the names that are instances of `service`, each once, in order.
    #[must_use]
    pub fn statuses_of(&self, service: &Service) -> Vec<(DnsName, Arc<NameStatus>)> {
        // Names come after all IP addresses, and instances of one name are neighbours.
        let mut names: Vec<&DnsName> = service.instances.iter().filter_map(|one| one.address().name()).collect();
        names.dedup();
        names.into_iter().filter_map(|name| Some((name.clone(), self.status(name)?))).collect()
    }

    /// How many names there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.statuses.len()
    }

    /// Whether no instance is a name.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.statuses.is_empty()
    }

    /// Waits for names that came into use, or are not used any more, and takes them, in order. For one caller. Cancelling
    /// loses nothing.
    pub async fn changes(&self) -> Vec<NameChange> {
        loop {
            let changed = self.changed.notified();
            let changes = std::mem::take(&mut *self.changes.lock().unwrap_or_else(PoisonError::into_inner));
            if !changes.is_empty() {
                return changes;
            }
            changed.await;
        }
    }

    /// Notes names that came into use, or are not used any more.
    pub(super) fn apply(&self, changes: Vec<NameChange>) {
        if changes.is_empty() {
            return;
        }
        let statuses = self.statuses.pin();
        for NameChange { name, used } in &changes {
            if *used {
                statuses.insert(name.clone(), Arc::default());
            } else {
                statuses.remove(name);
            }
        }
        self.changes.lock().unwrap_or_else(PoisonError::into_inner).extend(changes);
        self.changed.notify_one();
    }

    /// Sets the status of a name that is in use.
    pub(super) fn set_status(&self, name: &DnsName, status: NameStatus) {
        let statuses = self.statuses.pin();
        // The writer alone inserts and removes.
        if statuses.contains_key(name) {
            statuses.insert(name.clone(), Arc::new(status));
        }
    }
}
