//! The one writer of the zone, and the order in which names appear and disappear.

use std::{
    net::IpAddr,
    sync::{Arc, PoisonError, atomic::Ordering},
};

use super::{
    NameChange, Zone,
    name_index::NameIndex,
    names::NameRow,
    records::HostLabel,
    reverse::PtrRecord,
    update::{NameLimit, RecordsUpdate, ServedInstance},
};
use crate::model::{Address, DnsName, Instance, InstanceChange, Resolution, ServiceKey};

/// Everything that changed under one service.
#[derive(Debug, Clone, Copy)]
pub struct ServiceChange<'a> {
    /// Which service.
    pub service: &'a ServiceKey,
    /// Its instances that changed: those registered here, and those that others have under the same
    /// name.
    pub changes: &'a [InstanceChange],
}

/// The only one that may change a [`Zone`].
#[derive(Debug)]
pub struct Publisher {
    zone: Arc<Zone>,
    names: NameIndex,
}

impl Publisher {
    pub(super) fn new(zone: Arc<Zone>) -> Self {
        Self { zone, names: NameIndex::default() }
    }

    /// Reserves space for so many services, and for `instances` at an address each, so that no map
    /// is resized while they are published.
    pub fn reserve<'a>(&mut self, services: usize, instances: impl IntoIterator<Item = &'a Arc<Instance>>) {
        self.zone.services.pin().reserve(services);
        self.zone.reverse.reserve(instances.into_iter().filter_map(|instance| instance.address().ip()));
    }

    /// Makes the changes of one generation visible, service by service, and then the generation
    /// itself as the SOA serial.
    pub fn publish(&mut self, generation: u64, changes: &[ServiceChange<'_>]) {
        for change in changes {
            self.publish_service(change);
        }
        // RFC 1982: serials wrap, so that the low half of the generation is one.
        self.zone.serial.store(generation as u32, Ordering::Release);
    }

    /// Makes visible what `name` leads to, in every service that has it as an instance. Returns those services; none when it
    /// led there before.
    pub fn resolve(&mut self, name: &DnsName, resolution: &Arc<Resolution>) -> Vec<ServiceKey> {
        let zone = &*self.zone;
        let pinned = zone.services.pin();
        let services = self.names.resolve(name, resolution);
        for service in &services {
            // Not served: it is not ready, or its name does not fit.
            let Some(old) = pinned.get(service) else { continue };
            let mut update = RecordsUpdate::new(old.clone(), zone.limit(service), zone.settings.flatten_names);
            update.resolve(name, resolution);
            // Neither the service nor a host with a PTR record comes or goes with this.
            pinned.insert(service.clone(), update.finish());
        }
        services
    }

    /// The names that are instances now, and those that are none any more, since the last call.
    pub fn take_name_changes(&mut self) -> Vec<NameChange> {
        self.names.take_changes()
    }

    /// Sets whether a namespace exists in Kubernetes, also without a registered service. Must be called once
    /// for each change, because calls are counted.
    pub fn set_namespace(&mut self, name: &str, exists: bool) {
        if exists {
            self.zone.count_namespace_in(name);
        } else {
            self.zone.count_namespace_out(name);
        }
    }

    /// [`Zone::set_ready`].
    pub fn set_ready(&self) {
        self.zone.set_ready();
    }

    /// [`Zone::unservable`].
    #[must_use]
    pub fn unservable(&self) -> u64 {
        self.zone.unservable()
    }

    fn publish_service(&mut self, change: &ServiceChange<'_>) {
        let ServiceChange { service, changes } = *change;
        let Self { zone, names } = self;
        let zone = Arc::clone(zone);
        let limit = zone.limit(service);
        let services = zone.services.pin();
        // Stays valid when it is replaced below: `services` is pinned until the end.
        let old = services.get(service);

        let mut update = RecordsUpdate::new(old.cloned().unwrap_or_default(), limit, zone.settings.flatten_names);
        let publish_not_ready = zone.settings.publish_not_ready;
        let mut touched: Vec<(IpAddr, HostLabel)> = Vec::with_capacity(changes.len());
        for change in changes {
            zone.count_unservable(service, change, limit);
            publish_name(names, service, change, &mut update, |instance| limit.serves(instance, publish_not_ready));
            let served = |instance| ServedInstance::new(instance, limit, publish_not_ready);
            let (before, after) = (change.before.as_deref().and_then(served), change.after.as_deref().and_then(served));
            // Counted in before counted out, so that records that stay are changed in place.
            after.iter().for_each(|served| update.add(served));
            before.iter().for_each(|served| update.remove(served));
            let served = [before, after].into_iter().flatten();
            touched.extend(served.filter_map(|served| Some((served.ip, served.host?))));
        }
        // Several instances of a batch may share a host, which appears or disappears once.
        touched.sort_unstable();
        touched.dedup();
        let new = update.finish();

        let had = |(ip, host): &(IpAddr, HostLabel)| old.is_some_and(|old| old.has_host(*ip, host));
        // What only changed its weight or ports is in neither: PTR records do not depend on those.
        let (added, removed): (Vec<_>, Vec<_>) =
            touched.into_iter().filter(|host| had(host) != new.has_host(host.0, &host.1)).partition(|host| !had(host));

        // 1. Addresses lead to host names before the service has the hosts.
        for (ip, host) in added {
            zone.reverse.add(ip, PtrRecord::new(service, &host));
        }
        // 2. The service, as one value.
        match (old.is_some(), new.is_empty()) {
            (false, true) => {}
            (true, false) => {
                services.insert(service.clone(), new);
            }
            // RFC 8020: a resolver that has cached NXDOMAIN for the namespace denies all its services. So
            // the namespace is added before its first service, and removed after its last.
            (false, false) => {
                zone.count_namespace_in(service.namespace());
                services.insert(service.clone(), new);
            }
            (true, true) => {
                services.remove(service);
                zone.count_namespace_out(service.namespace());
            }
        }
        // 3. Host names that the service no longer has.
        for (ip, host) in removed {
            zone.reverse.remove(ip, &PtrRecord::new(service, &host));
        }
    }
}

/// Counts the instance of a change in and out, if it is a name.
fn publish_name(
    names: &mut NameIndex,
    service: &ServiceKey,
    change: &InstanceChange,
    update: &mut RecordsUpdate,
    is_served: impl Fn(&Instance) -> bool,
) {
    let InstanceChange { before, after } = change;
    // In before out: a name that stays is not forgotten in between. It is looked up before it is ready, too.
    if let Some(instance) = after
        && let Address::Name(name) = instance.address()
    {
        let resolution = names.add(name, service);
        if is_served(instance) {
            update.put_name(NameRow { instance: Arc::clone(instance), resolution });
        } else {
            update.remove_name(&instance.key());
        }
    }
    if let Some(instance) = before
        && let Address::Name(name) = instance.address()
    {
        if after.is_none() {
            update.remove_name(&instance.key());
        }
        names.remove(name, service);
    }
}

impl Zone {
    fn limit(&self, service: &ServiceKey) -> NameLimit {
        NameLimit::new(service, self.settings.origin.len())
    }

    fn count_namespace_in(&self, namespace: &str) {
        let namespaces = self.namespaces.pin();
        // Not atomic, and need not be: there is one publisher.
        let count = namespaces.get(namespace).copied().unwrap_or(0);
        namespaces.insert(namespace.into(), count + 1);
    }

    fn count_namespace_out(&self, namespace: &str) {
        let namespaces = self.namespaces.pin();
        match namespaces.get(namespace).copied().unwrap_or(0) {
            0 | 1 => {
                namespaces.remove(namespace);
            }
            count => {
                namespaces.insert(namespace.into(), count - 1);
            }
        }
    }

    /// Counts instances of which a name does not fit a message.
    fn count_unservable(&self, service: &ServiceKey, change: &InstanceChange, limit: NameLimit) {
        let unservable = |instance: &&Instance| limit.leaves_out(instance);
        let (before, after) = (
            change.before.as_deref().filter(unservable).is_some(),
            change.after.as_deref().filter(unservable).is_some(),
        );
        // Relaxed: a number for metrics and the log, written by one thread.
        let counter = &self.unservable.instances;
        if before && !after {
            counter.fetch_sub(1, Ordering::Relaxed);
        }
        if after && !before {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        if after && let Some(instance) = &change.after {
            let mut example = self.unservable.example.lock().unwrap_or_else(PoisonError::into_inner);
            example.get_or_insert_with(|| format!("{service} {}", instance.id()));
        }
    }
}
