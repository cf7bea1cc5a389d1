//! The per-service value: what one service's instances add up to, as records need it.
//!
//! Everything is counted in integers, so that contributions can be added and taken away in any
//! order and the result is the same as building it anew. A row is there as long as an instance
//! contributes to it. The value is changed on a copy, which shares every untouched chunk with the
//! old one; it holds no names but host labels, because owners follow from the question.

use std::{
    cmp::Ordering,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::ControlFlow,
    sync::Arc,
};

use super::rrset::{Rrset, SmallTree};
use crate::model::{
    Address, CowTree, DashedLabel, Instance, InstanceKey, Label, Port, Protocol, Weight, cow_tree::Row,
    parse_dashed_label,
};

/// One address record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressRecord<I> {
    /// The address.
    pub ip: I,
    /// Instances that have it and no host label of their own: they are found under its dashes.
    unnamed: u32,
    /// Instances that have it.
    instances: u32,
    /// Their weights.
    units: u64,
}

impl<I: Copy> AddressRecord<I> {
    /// A record for an address that no instance stands for, as likely to come first as any other.
    pub(super) fn plain(ip: I) -> Self {
        Self { ip, unnamed: 0, instances: 1, units: 1 }
    }

    fn empty(ip: I) -> Self {
        Self { ip, unnamed: 0, instances: 0, units: 0 }
    }

    /// Counts an instance in or out; says whether any is left.
    fn count(&mut self, op: CountOp, units: u64, unnamed: bool) -> bool {
        op.count(&mut self.instances);
        op.sum(&mut self.units, units);
        if unnamed {
            op.count(&mut self.unnamed);
        }
        self.instances > 0
    }
}

impl<I: Copy + Ord> Row for AddressRecord<I> {
    type Key<'a>
        = I
    where
        I: 'a;

    fn key(&self) -> I {
        self.ip
    }

    fn order(&self, key: &I) -> Ordering {
        self.ip.cmp(key)
    }

    fn weight(&self) -> u64 {
        self.units
    }
}

/// The first label of a host's name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum HostLabel {
    /// The address with dashes, spelled out when it is rendered.
    Dashed(IpAddr),
    /// The registered host label.
    Host(Label),
}

/// [`HostLabel`] borrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum HostLabelRef<'a> {
    /// The address with dashes.
    Dashed(IpAddr),
    /// The registered host label.
    Host(&'a str),
}

impl HostLabel {
    fn of(instance: &Instance, ip: IpAddr) -> Self {
        match instance.host_name() {
            // A label that spells the instance's own address is the one it has anyway.
            Some(label) if label.as_str() != DashedLabel::new(ip).as_str() => Self::Host(label.clone()),
            _ => Self::Dashed(ip),
        }
    }

    /// The same, borrowed.
    #[must_use]
    pub fn as_ref(&self) -> HostLabelRef<'_> {
        match self {
            Self::Dashed(ip) => HostLabelRef::Dashed(*ip),
            Self::Host(label) => HostLabelRef::Host(label.as_str()),
        }
    }
}

/// One SRV record of a port name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SrvRecord {
    /// The host.
    pub target: HostLabel,
    /// The port number.
    pub port: u16,
    /// The lowest of its instances' priorities.
    pub priority: u16,
    /// Instances with that priority.
    lowest: u32,
    /// Instances that give this record.
    instances: u32,
    /// Their weights.
    units: u64,
}

impl SrvRecord {
    /// The weight of the record: the weights of its instances at two decimals, 0 only when every
    /// one of them is 0 (RFC 2782: 0 means hardly ever).
    #[must_use]
    pub fn srv_weight(&self) -> u16 {
        if self.units == 0 {
            return 0;
        }
        let hundredths = (self.units * 100 + Weight::UNITS_PER_ONE / 2) / Weight::UNITS_PER_ONE;
        u16::try_from(hundredths.max(1)).unwrap_or(u16::MAX)
    }

    /// Counts one instance's priority among those of the record.
    fn add_priority(&mut self, priority: u16) {
        match priority.cmp(&self.priority) {
            Ordering::Less => (self.priority, self.lowest) = (priority, 1),
            Ordering::Equal => self.lowest += 1,
            Ordering::Greater => {}
        }
    }
}

impl Row for SrvRecord {
    type Key<'a> = (HostLabelRef<'a>, u16);

    fn key(&self) -> Self::Key<'_> {
        (self.target.as_ref(), self.port)
    }

    fn order(&self, key: &Self::Key<'_>) -> Ordering {
        self.key().cmp(key)
    }

    fn weight(&self) -> u64 {
        self.units
    }
}

/// The SRV records of one port name.
#[derive(Debug, Clone, PartialEq)]
struct PortRecords {
    name: Label,
    protocol: Protocol,
    records: SmallTree<SrvRecord>,
}

impl Row for PortRecords {
    type Key<'a> = (Protocol, &'a [u8]);

    fn key(&self) -> Self::Key<'_> {
        (self.protocol, self.name.as_str().as_bytes())
    }

    fn order(&self, key: &Self::Key<'_>) -> Ordering {
        self.key().cmp(key)
    }
}

/// The addresses under one registered host label.
#[derive(Debug, Clone, PartialEq)]
struct HostRecords {
    label: Label,
    v4: SmallTree<AddressRecord<Ipv4Addr>>,
    v6: SmallTree<AddressRecord<Ipv6Addr>>,
}

impl Row for HostRecords {
    type Key<'a> = &'a [u8];

    fn key(&self) -> &[u8] {
        self.label.as_str().as_bytes()
    }

    fn order(&self, key: &&[u8]) -> Ordering {
        self.key().cmp(*key)
    }
}

/// What one service's ready instances add up to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ServiceRecords {
    v4: SmallTree<AddressRecord<Ipv4Addr>>,
    ports: SmallTree<PortRecords>,
    extra: Option<Box<ExtraRecords>>,
}

/// What few services have, kept out of the op of the others.
#[derive(Debug, Clone, Default, PartialEq)]
struct ExtraRecords {
    v6: SmallTree<AddressRecord<Ipv6Addr>>,
    hosts: SmallTree<HostRecords>,
}

/// The addresses of one name, at least one of either family.
#[derive(Debug, Clone, Copy)]
pub struct Addresses<'v> {
    /// IPv4.
    pub v4: Option<Rrset<'v, AddressRecord<Ipv4Addr>>>,
    /// IPv6.
    pub v6: Option<Rrset<'v, AddressRecord<Ipv6Addr>>>,
}

impl ServiceRecords {
    /// Addresses alone, that no instance stands for: those of the name server.
    pub(super) fn of_addresses(ips: &[IpAddr]) -> Self {
        let mut records = Self::default();
        for ip in ips {
            match *ip {
                IpAddr::V4(ip) => records.v4.put(AddressRecord::plain(ip)),
                IpAddr::V6(ip) => records.extra.get_or_insert_default().v6.put(AddressRecord::plain(ip)),
            }
        }
        records
    }

    /// Whether no ready instance is left.
    pub(super) fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.extra.is_none()
    }

    /// The addresses of the service's own name.
    #[must_use]
    pub fn addresses(&self) -> Addresses<'_> {
        Addresses { v4: self.v4.rrset(), v6: self.extra.as_ref().and_then(|extra| extra.v6.rrset()) }
    }

    /// The addresses of the host with this label.
    #[must_use]
    pub fn host(&self, label: &[u8]) -> Option<Addresses<'_>> {
        parse_dashed_label(label).and_then(|ip| self.dashed(ip)).or_else(|| self.registered_host(label))
    }

    /// The addresses of an SRV target of this service.
    #[must_use]
    pub fn target(&self, target: &HostLabel) -> Option<Addresses<'_>> {
        match target {
            HostLabel::Dashed(ip) => self.dashed(*ip),
            HostLabel::Host(label) => self.registered_host(label.as_str().as_bytes()),
        }
    }

    fn dashed(&self, ip: IpAddr) -> Option<Addresses<'_>> {
        match ip {
            IpAddr::V4(ip) => {
                let row = self.v4.get(&ip).filter(|row| row.unnamed > 0)?;
                Some(Addresses { v4: Some(Rrset::one(row)), v6: None })
            }
            IpAddr::V6(ip) => {
                let row = self.extra.as_ref()?.v6.get(&ip).filter(|row| row.unnamed > 0)?;
                Some(Addresses { v4: None, v6: Some(Rrset::one(row)) })
            }
        }
    }

    fn registered_host(&self, label: &[u8]) -> Option<Addresses<'_>> {
        let host = self.extra.as_ref()?.hosts.get(&label)?;
        Some(Addresses { v4: host.v4.rrset(), v6: host.v6.rrset() })
    }

    /// The SRV records of a port name.
    #[must_use]
    pub fn srv(&self, protocol: Protocol, port_name: &[u8]) -> Option<Rrset<'_, SrvRecord>> {
        self.ports.get(&(protocol, port_name))?.records.rrset()
    }

    /// Whether any port name of this protocol has SRV records.
    #[must_use]
    pub fn has_srv(&self, protocol: Protocol) -> bool {
        self.ports.any_from(&(protocol, b""), |row| row.protocol == protocol)
    }

    /// Whether `target` is the name of a host with the address `ip`.
    pub(super) fn names(&self, ip: IpAddr, target: &HostLabel) -> bool {
        match (target, ip) {
            (HostLabel::Dashed(_), ip) => self.dashed(ip).is_some(),
            (HostLabel::Host(label), ip) => {
                let host = self.extra.as_ref().and_then(|extra| extra.hosts.get(&label.as_str().as_bytes()));
                host.is_some_and(|host| match ip {
                    IpAddr::V4(ip) => host.v4.get(&ip).is_some(),
                    IpAddr::V6(ip) => host.v6.get(&ip).is_some(),
                })
            }
        }
    }
}

/// Whether a served comes or goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CountOp {
    Add,
    Remove,
}

impl CountOp {
    fn count(self, count: &mut u32) {
        *count = match self {
            Self::Add => count.saturating_add(1),
            Self::Remove => count.saturating_sub(1),
        };
    }

    fn sum(self, sum: &mut u64, units: u64) {
        *sum = match self {
            Self::Add => sum.saturating_add(units),
            Self::Remove => sum.saturating_sub(units),
        };
    }
}

/// What one instance contributes. Instances that are DNS names contribute nothing: nobody looks
/// them up here.
pub(super) struct ServedInstance<'i> {
    instance: &'i Instance,
    pub(super) ip: IpAddr,
    pub(super) target: HostLabel,
}

impl<'i> ServedInstance<'i> {
    /// `None` when the instance is not served.
    pub(super) fn of(instance: &'i Instance, publish_not_ready: bool) -> Option<Self> {
        let Address::Ip(ip) = *instance.address() else { return None };
        (instance.ready() || publish_not_ready).then(|| Self { instance, ip, target: HostLabel::of(instance, ip) })
    }
}

/// The SRV record whose lowest priority left with its last instance, to be found again.
struct Orphan {
    protocol: Protocol,
    port_name: Label,
    target: HostLabel,
    port: u16,
}

/// A change of a service's records, on a copy of them.
pub(super) struct RecordsUpdate {
    records: ServiceRecords,
    orphans: Vec<Orphan>,
    publish_not_ready: bool,
}

impl RecordsUpdate {
    pub(super) fn new(records: ServiceRecords, publish_not_ready: bool) -> Self {
        Self { records, orphans: Vec::new(), publish_not_ready }
    }

    /// Counts a served in.
    pub(super) fn add(&mut self, served: &ServedInstance<'_>) {
        self.count(CountOp::Add, served);
    }

    /// Counts a served out that was counted in before.
    pub(super) fn subtract(&mut self, served: &ServedInstance<'_>) {
        self.count(CountOp::Remove, served);
    }

    /// The new records; `after` is everything that the service has now.
    pub(super) fn finish(mut self, after: &[&CowTree<Arc<Instance>>]) -> ServiceRecords {
        for orphan in std::mem::take(&mut self.orphans) {
            self.find_priority(&orphan, after);
        }
        self.records
    }

    fn count(&mut self, op: CountOp, served: &ServedInstance<'_>) {
        let ServedInstance { instance, ip, target } = served;
        let units = u64::from(instance.weight().units());
        let unnamed = matches!(target, HostLabel::Dashed(_));
        match *ip {
            IpAddr::V4(ip) => count_address(&mut self.records.v4, ip, op, units, unnamed),
            IpAddr::V6(ip) => count_address(&mut self.extra().v6, ip, op, units, unnamed),
        }
        if let HostLabel::Host(label) = target {
            let new = || HostRecords { label: label.clone(), v4: SmallTree::None, v6: SmallTree::None };
            self.extra().hosts.update(&label.as_str().as_bytes(), new, |host| {
                match *ip {
                    IpAddr::V4(ip) => count_address(&mut host.v4, ip, op, units, false),
                    IpAddr::V6(ip) => count_address(&mut host.v6, ip, op, units, false),
                }
                !(host.v4.is_empty() && host.v6.is_empty())
            });
        }
        for port in instance.ports().as_slice() {
            let Some(name) = &port.name else { continue };
            self.count_port(op, served, (port.protocol, name, port.number), units);
        }
        if self.records.extra.as_ref().is_some_and(|extra| extra.v6.is_empty() && extra.hosts.is_empty()) {
            self.records.extra = None;
        }
    }

    fn count_port(
        &mut self,
        op: CountOp,
        served: &ServedInstance<'_>,
        (protocol, name, number): (Protocol, &Label, u16),
        units: u64,
    ) {
        let ServedInstance { instance, target, .. } = served;
        let priority = instance.priority();
        let mut orphaned = false;
        let new = || PortRecords { name: name.clone(), protocol, records: SmallTree::None };
        self.records.ports.update(&(protocol, name.as_str().as_bytes()), new, |port| {
            let new = || SrvRecord {
                target: target.clone(),
                port: number,
                priority: u16::MAX,
                lowest: 0,
                instances: 0,
                units: 0,
            };
            port.records.update(&(target.as_ref(), number), new, |record| {
                op.count(&mut record.instances);
                op.sum(&mut record.units, units);
                match op {
                    CountOp::Add => record.add_priority(priority),
                    CountOp::Remove if record.priority == priority => record.lowest = record.lowest.saturating_sub(1),
                    CountOp::Remove => {}
                }
                orphaned = record.lowest == 0 && record.instances > 0;
                record.instances > 0
            });
            !port.records.is_empty()
        });
        if orphaned {
            let target = target.clone();
            self.orphans.push(Orphan { protocol, port_name: name.clone(), target, port: number });
        }
    }

    /// The lowest priority of a record, looked for among the instances that give it.
    fn find_priority(&mut self, orphan: &Orphan, after: &[&CowTree<Arc<Instance>>]) {
        let Orphan { protocol, port_name, target, port } = orphan;
        let key = (*protocol, port_name.as_str().as_bytes());
        let Some(mut row) = self.records.ports.get(&key).cloned() else { return };
        let Some(mut record) = row.records.get(&(target.as_ref(), *port)).cloned() else { return };
        (record.priority, record.lowest) = (u16::MAX, 0);
        let publish_not_ready = self.publish_not_ready;
        let mut look = |ip: IpAddr| {
            let address = Address::Ip(ip);
            let mut add = |instance: &Arc<Instance>| {
                if *instance.address() != address {
                    return ControlFlow::Break(());
                }
                let is_it = |p: &Port| (p.protocol, p.number, p.name.as_ref()) == (*protocol, *port, Some(port_name));
                let gives = |instance: &Instance| instance.ports().as_slice().iter().any(is_it);
                if let Some(served) = ServedInstance::of(instance, publish_not_ready)
                    && served.target == *target
                    && gives(instance)
                {
                    record.add_priority(instance.priority());
                }
                ControlFlow::<()>::Continue(())
            };
            for table in after {
                let _ = table.visit_from(&InstanceKey::first_of(&address), &mut add);
            }
        };
        if let Some(Addresses { v4, v6 }) = self.records.target(target) {
            v4.into_iter().flat_map(|set| set.iter()).for_each(|row| look(row.ip.into()));
            v6.into_iter().flat_map(|set| set.iter()).for_each(|row| look(row.ip.into()));
        }
        row.records.put(record);
        self.records.ports.put(row);
    }

    fn extra(&mut self) -> &mut ExtraRecords {
        self.records.extra.get_or_insert_default()
    }
}

fn count_address<I: Copy + Ord>(rows: &mut SmallTree<AddressRecord<I>>, ip: I, op: CountOp, units: u64, unnamed: bool) {
    rows.update(&ip, || AddressRecord::empty(ip), |row| row.count(op, units, unnamed));
}
