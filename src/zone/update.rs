//! How a service's records change: instances are counted in and out of a copy.
//!
//! What an instance is registered with may not fit into DNS: it was stored under an earlier policy,
//! or under a shorter zone. Such names are left out here, so that no answer ever carries one; what
//! does fit is served.

use std::{net::IpAddr, sync::Arc};

use super::{
    names::{NameRow, NameSet, count_resolved},
    records::{CountOp, HostLabel, HostRecords, PortRecords, SrvRecord, count_address},
    rrset::SmallTree,
    service::{ExtraRecords, ServiceRecords},
};
use crate::model::{Address, DnsName, Instance, InstanceKey, MAX_LABEL, MAX_WIRE_NAME, Port, Resolution, ServiceKey};

/// Octets that no label, and no `_port._proto` of a name that fits a label, exceeds: 64 and a
/// `_sctp` with its length octet.
const MAX_PREFIX: usize = MAX_LABEL + 1 + 6;

/// Which names of one service fit a message (RFC 1035 §2.3.4).
#[derive(Debug, Clone, Copy)]
pub(super) struct NameLimit {
    /// Octets of the service's own name in wire form.
    service: usize,
}

impl NameLimit {
    /// That of `service` under an origin of so many octets in wire form.
    pub(super) fn new(service: &ServiceKey, origin: usize) -> Self {
        // The dot in the key counts for one of the two length octets.
        Self { service: service.as_str().len() + 1 + "svc".len() + 1 + origin }
    }

    /// Whether `instance` is served: it is ready, and the service's own name fits.
    pub(super) fn serves(self, instance: &Instance, publish_not_ready: bool) -> bool {
        (instance.ready() || publish_not_ready) && self.fits(0)
    }

    /// Whether so many octets before the service's name fit.
    fn fits(self, prefix: usize) -> bool {
        self.service + prefix <= MAX_WIRE_NAME
    }

    fn fits_host(self, label: &HostLabel) -> bool {
        // Nearly always there is room for any label, and a dashed one need not be written to be measured.
        self.fits(MAX_PREFIX) || self.fits(1 + label.len())
    }

    fn fits_port(self, port: &Port) -> bool {
        // `_` takes one of the 63 octets.
        port.name.as_ref().is_none_or(|name| {
            let label = "_".len() + name.as_str().len();
            label <= MAX_LABEL && self.fits(1 + label + 1 + port.protocol.srv_label().len())
        })
    }

    /// Whether a name of `instance` is not served because it does not fit.
    pub(super) fn leaves_out(self, instance: &Instance) -> bool {
        // Asked for every change: the label is made only where there may not be room for it.
        let fits_host = self.fits(MAX_PREFIX)
            || match instance.address() {
                Address::Ip(ip) => self.fits_host(&HostLabel::of(instance, *ip)),
                Address::Name(_) => instance.host_name().is_none_or(|label| self.fits(1 + label.as_str().len())),
            };
        !fits_host || !instance.ports().as_slice().iter().all(|port| self.fits_port(port))
    }
}

/// An instance that is served, and the names under which it is.
pub(super) struct ServedInstance<'i> {
    instance: &'i Instance,
    limit: NameLimit,
    pub(super) ip: IpAddr,
    /// `None` when the host's name would be too long: then the instance is found by its service's
    /// name only.
    pub(super) host: Option<HostLabel>,
}

impl<'i> ServedInstance<'i> {
    /// `None` when the instance is not served by its own address: it is a DNS name, or it is not
    /// [served](NameLimit::serves) at all.
    pub(super) fn new(instance: &'i Instance, limit: NameLimit, publish_not_ready: bool) -> Option<Self> {
        let Address::Ip(ip) = *instance.address() else { return None };
        if !limit.serves(instance, publish_not_ready) {
            return None;
        }
        let host = Some(HostLabel::of(instance, ip)).filter(|label| limit.fits_host(label));
        Some(Self { instance, limit, ip, host })
    }
}

/// A change of a service's records, on a copy of them.
pub(super) struct RecordsUpdate {
    records: ServiceRecords,
    limit: NameLimit,
    /// A name that is alone in its service is not an alias, but its addresses.
    flatten: bool,
}

impl RecordsUpdate {
    pub(super) fn new(records: ServiceRecords, limit: NameLimit, flatten: bool) -> Self {
        Self { records, limit, flatten }
    }

    /// Counts an instance in.
    pub(super) fn add(&mut self, served: &ServedInstance<'_>) {
        self.count(CountOp::Add, served);
    }

    /// Counts an instance out that was counted in before.
    pub(super) fn remove(&mut self, served: &ServedInstance<'_>) {
        self.count(CountOp::Remove, served);
    }

    /// Counts an instance in that is a name, in place of the one with the same identity.
    pub(super) fn put_name(&mut self, row: NameRow) {
        let plain = self.plain();
        let names = self.extra().names.get_or_insert_with(|| Box::new(NameSet::beside(plain)));
        let before = names.put(row.clone());
        self.count_name(CountOp::Add, &row);
        before.iter().for_each(|before| self.count_name(CountOp::Remove, before));
    }

    /// Counts an instance out that is a name.
    pub(super) fn remove_name(&mut self, key: &InstanceKey<'_>) {
        if let Some(before) = self.names().and_then(|names| names.remove(key)) {
            self.count_name(CountOp::Remove, &before);
        }
    }

    /// Sets what `name` leads to, for all of its instances that are counted in.
    pub(super) fn resolve(&mut self, name: &DnsName, resolution: &Arc<Resolution>) {
        let address = Address::Name(name.clone());
        let rows = self.names().map(|names| names.of(&address)).unwrap_or_default();
        for row in rows {
            self.put_name(NameRow { resolution: Arc::clone(resolution), ..row });
        }
    }

    /// The new records.
    pub(super) fn finish(mut self) -> ServiceRecords {
        let flatten = self.flatten;
        if let Some(names) = self.names().filter(|names| names.alias != names.wants_alias(flatten)) {
            let rows: Vec<NameRow> = names.rows.iter().cloned().collect();
            rows.iter().for_each(|row| self.count_name(CountOp::Remove, row));
            if let Some(names) = self.names() {
                names.alias = !names.alias;
            }
            rows.iter().for_each(|row| self.count_name(CountOp::Add, row));
        }
        // Removed with the last of its rows: the value must equal one that is built anew, and few services should pay for it.
        if let Some(extra) = &mut self.records.extra {
            if extra.names.as_ref().is_some_and(|names| names.rows.is_empty()) {
                extra.names = None;
            }
            if extra.v6.is_empty() && extra.hosts.is_empty() && extra.names.is_none() {
                self.records.extra = None;
            }
        }
        self.records
    }

    fn count(&mut self, op: CountOp, served: &ServedInstance<'_>) {
        let ServedInstance { instance, limit, ip, host } = served;
        let units = u64::from(instance.weight().units());
        let dashed = matches!(host, Some(HostLabel::Dashed(_)));
        match *ip {
            IpAddr::V4(ip) => count_address(&mut self.records.v4, ip, op, units, dashed),
            IpAddr::V6(ip) => count_address(&mut self.extra().v6, ip, op, units, dashed),
        }
        if let Some(names) = self.names() {
            op.count(&mut names.plain);
        }
        // The target of an SRV record is a host, so an instance without a host name has no ports here.
        if let Some(host) = host {
            self.count_host(op, host, *ip, units);
            for port in instance.ports().as_slice().iter().filter(|port| limit.fits_port(port)) {
                self.count_port(op, instance, host, port, units);
            }
        }
    }

    /// Counts the records of an instance that is a name.
    fn count_name(&mut self, op: CountOp, row: &NameRow) {
        let (limit, instance) = (self.limit, &*row.instance);
        let Some(names) = self.names() else { return };
        let (alias, addresses) = (names.alias, row.resolution.addresses());
        // Among others, one that leads nowhere is left out.
        if !alias && addresses.is_none() {
            return;
        }
        let units = u64::from(instance.weight().units());
        if let Some(addresses) = addresses {
            if let Some(label) = instance.host_name().filter(|label| limit.fits(1 + label.as_str().len())) {
                names.count_host(op, label, addresses, units);
            }
            if !alias {
                let (records, mut extra) = (&mut self.records.v4, self.records.extra.take());
                count_resolved(op, records, &mut extra.get_or_insert_default().v6, addresses, units);
                self.records.extra = extra;
            }
        }
        let target = HostLabel::External(row.name().clone());
        for port in instance.ports().as_slice().iter().filter(|port| limit.fits_port(port)) {
            self.count_port(op, instance, &target, port, units);
        }
    }

    fn count_host(&mut self, op: CountOp, host: &HostLabel, ip: IpAddr, units: u64) {
        // A host with dashes has no row of its own: its address has a count of them.
        let HostLabel::Registered(label) = host else { return };
        let new = || HostRecords { label: label.clone(), v4: SmallTree::None, v6: SmallTree::None };
        self.extra().hosts.update(&label.as_str().as_bytes(), new, |host| {
            match ip {
                IpAddr::V4(ip) => count_address(&mut host.v4, ip, op, units, false),
                IpAddr::V6(ip) => count_address(&mut host.v6, ip, op, units, false),
            }
            !(host.v4.is_empty() && host.v6.is_empty())
        });
    }

    fn count_port(&mut self, op: CountOp, instance: &Instance, host: &HostLabel, port: &Port, units: u64) {
        // Kubernetes' DNS specification §2.4.2: a port without a name has no SRV record.
        let Port { number, protocol, name: Some(name) } = port else { return };
        let new = || PortRecords { name: name.clone(), protocol: *protocol, records: SmallTree::None };
        self.records.ports.update(&(*protocol, name.as_str().as_bytes()), new, |port| {
            let new = || SrvRecord::empty(host.clone(), *number);
            let key = (host.as_ref(), *number);
            port.records.update(&key, new, |record| record.count(op, instance.priority(), units));
            !port.records.is_empty()
        });
    }

    /// Instances with an IP address, of a service that has no others yet.
    fn plain(&self) -> u32 {
        if self.records.extra.as_ref().is_some_and(|extra| extra.names.is_some()) {
            return 0;
        }
        let v4 = self.records.v4.iter().map(|record| record.instances);
        let v6 = self.records.extra.iter().flat_map(|extra| extra.v6.iter()).map(|record| record.instances);
        v4.chain(v6).sum()
    }

    fn extra(&mut self) -> &mut ExtraRecords {
        self.records.extra.get_or_insert_default()
    }

    fn names(&mut self) -> Option<&mut NameSet> {
        self.records.extra.as_mut()?.names.as_deref_mut()
    }
}
