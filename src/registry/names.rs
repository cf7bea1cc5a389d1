//! Which DNS names are instances, and how their lookups stand.
//!
//! The writer sets which names are in use, as it makes changes visible, and what each leads to. Whoever looks names up
//! takes the changes; the readers of gRPC see the statuses.

use std::{
    collections::HashMap as StdHashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use foldhash::fast::RandomState;
use ipnet::IpNet;
use papaya::HashMap;
use tokio::sync::Notify;

use super::{Writer, address_rules::AddressRules};
use crate::{
    model::{DnsName, NameStatus, Resolution, ResolvedAddresses, Service},
    zone::NameChange,
};

/// Most addresses that a status names as refused.
const MAX_NAMED: usize = 3;

impl Writer {
    /// Makes visible how the lookups of names stand, without the addresses that are denied, or the cluster's own Services'.
    pub(super) fn resolved(&mut self, statuses: Vec<(DnsName, NameStatus)>) {
        for (name, looked_up) in statuses {
            let served = self.decider.facts().addresses.served(&looked_up);
            self.applier.resolve(&name, served, looked_up);
        }
    }

    /// Sets the ranges of the cluster's Services, which names may not lead to either.
    pub(super) fn set_service_ranges(&mut self, ranges: Vec<IpNet>) {
        self.decider.facts().addresses.set_service_ranges(ranges);
        let looked_up = self.applier.names().looked_up();
        self.resolved(looked_up);
    }
}

impl AddressRules {
    /// What is served of a name.
    fn served(&self, looked_up: &NameStatus) -> NameStatus {
        let mut served = looked_up.clone();
        let Some(found) = looked_up.resolution.addresses() else { return served };
        let (allowed, refused): (Vec<_>, Vec<_>) = found.iter().partition(|ip| !self.denies_resolved(*ip));
        if refused.is_empty() {
            return served;
        }
        let named: Vec<_> = refused.iter().take(MAX_NAMED).map(IpAddr::to_string).collect();
        let more = if refused.len() > MAX_NAMED { ", …" } else { "" };
        let refused = format!("left out, because they may not be served: {}{more}", named.join(", "));
        let errors: Vec<&str> = looked_up.error.as_deref().into_iter().chain([refused.as_str()]).collect();
        served.error = Some(errors.join("; ").into());
        // An alias of a name that leads nowhere else would send clients there that look the name up themselves.
        served.resolution = Arc::new(if allowed.is_empty() {
            Resolution::Unavailable
        } else {
            Resolution::Addresses(ResolvedAddresses::new(allowed, found.ttl))
        });
        served
    }
}

/// The names that are instances of some service, with their statuses. Reading takes no lock.
#[derive(Debug, Default)]
pub struct RegisteredNames {
    names: HashMap<DnsName, NameEntry, RandomState>,
    /// Whether each name has to be looked up that changed since the last call of [`changes`](Self::changes).
    changes: Mutex<StdHashMap<DnsName, bool>>,
    /// Somebody takes the changes.
    followed: AtomicBool,
    changed: Notify,
}

#[derive(Debug, Clone, Default)]
struct NameEntry {
    served: Arc<NameStatus>,
    /// Before the addresses were left out that may not be served.
    looked_up: Arc<NameStatus>,
}

impl RegisteredNames {
    /// How the lookups of `name` stand; the default before the first has ended, `None` if no instance has the name.
    #[must_use]
    pub fn status(&self, name: &DnsName) -> Option<Arc<NameStatus>> {
        self.names.pin().get(name).map(|entry| Arc::clone(&entry.served))
    }

    /// What `name` leads to; `None` if no instance has the name, or its first lookup has not ended.
    #[must_use]
    pub fn resolution(&self, name: &DnsName) -> Option<Arc<Resolution>> {
        let status = self.status(name)?;
        (*status != NameStatus::default()).then(|| Arc::clone(&status.resolution))
    }

    /// The statuses of the names that are instances of `service`, each once, in order.
    #[must_use]
    pub fn statuses_of(&self, service: &Service) -> Vec<(DnsName, Arc<NameStatus>)> {
        // Names come after all IP addresses, and instances of one name are neighbours.
        let mut names: Vec<&DnsName> = service.instances.iter().filter_map(|one| one.address().name()).collect();
        names.dedup();
        names.into_iter().filter_map(|name| Some((name.clone(), self.status(name)?))).collect()
    }

    /// Waits for names that came into use, or are not used any more, and takes them. A name that was forgotten and is used
    /// again is in the list twice, in this order. For one caller. Cancelling loses nothing.
    pub async fn changes(&self) -> Vec<NameChange> {
        self.followed.store(true, Ordering::Relaxed);
        loop {
            let changed = self.changed.notified();
            let changes = std::mem::take(&mut *self.changes.lock().unwrap_or_else(PoisonError::into_inner));
            if !changes.is_empty() {
                let forget = |name: &DnsName| NameChange { name: name.clone(), used: false };
                let both =
                    |(name, used): (DnsName, bool)| [Some(forget(&name)), used.then_some(NameChange { name, used })];
                return changes.into_iter().flat_map(both).flatten().collect();
            }
            changed.await;
        }
    }

    /// What was looked up of every name.
    pub(super) fn looked_up(&self) -> Vec<(DnsName, NameStatus)> {
        let names = self.names.pin();
        names.iter().map(|(name, entry)| (name.clone(), NameStatus::clone(&entry.looked_up))).collect()
    }

    /// Notes names that came into use, or are not used any more.
    pub(super) fn apply(&self, changed: Vec<NameChange>) {
        if changed.is_empty() {
            return;
        }
        let names = self.names.pin();
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        for NameChange { name, used } in changed {
            if used {
                names.insert(name.clone(), NameEntry::default());
            } else {
                names.remove(&name);
            }
            // Relaxed: whoever follows from later on gets what is used then. Without anybody the list must not grow.
            if used || self.followed.load(Ordering::Relaxed) {
                changes.insert(name, used);
            } else {
                changes.remove(&name);
            }
        }
        self.changed.notify_one();
    }

    /// Sets the status of a name that is in use.
    pub(super) fn set_status(&self, name: &DnsName, served: NameStatus, looked_up: NameStatus) {
        let names = self.names.pin();
        // The writer alone inserts and removes.
        if names.contains_key(name) {
            names.insert(name.clone(), NameEntry { served: Arc::new(served), looked_up: Arc::new(looked_up) });
        }
    }
}
