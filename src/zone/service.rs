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

use super::rows::{Rows, Rrset};
use crate::model::{
    Address, CowTree, DashedLabel, Instance, InstanceKey, Label, Port, Protocol, Weight, cow_tree::Row,
    parse_dashed_label,
};

/// One address record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressRow<I> {
    /// The address.
    pub ip: I,
    /// Instances that have it and no host label of their own: they are found under its dashes.
    unnamed: u32,
    /// Instances that have it.
    instances: u32,
    /// Their weights.
    units: u64,
}

impl<I: Copy> AddressRow<I> {
    /// A record for an address that no instance stands for, as likely to come first as any other.
    pub(super) fn plain(ip: I) -> Self {
        Self { ip, unnamed: 0, instances: 1, units: 1 }
    }

    fn empty(ip: I) -> Self {
        Self { ip, unnamed: 0, instances: 0, units: 0 }
    }

    /// Counts an instance in or out; says whether any is left.
    fn count(&mut self, way: Way, units: u64, unnamed: bool) -> bool {
        way.count(&mut self.instances);
        way.sum(&mut self.units, units);
        if unnamed {
            way.count(&mut self.unnamed);
        }
        self.instances > 0
    }
}

impl<I: Copy + Ord> Row for AddressRow<I> {
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
pub enum Target {
    /// The address with dashes, spelled out when it is rendered.
    Dashed(IpAddr),
    /// The registered host label.
    Host(Label),
}

/// [`Target`] borrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TargetRef<'a> {
    /// The address with dashes.
    Dashed(IpAddr),
    /// The registered host label.
    Host(&'a str),
}

impl Target {
    fn of(instance: &Instance, ip: IpAddr) -> Self {
        match instance.host_name() {
            // A label that spells the instance's own address is the one it has anyway.
            Some(label) if label.as_str() != DashedLabel::new(ip).as_str() => Self::Host(label.clone()),
            _ => Self::Dashed(ip),
        }
    }

    /// The same, borrowed.
    #[must_use]
    pub fn as_ref(&self) -> TargetRef<'_> {
        match self {
            Self::Dashed(ip) => TargetRef::Dashed(*ip),
            Self::Host(label) => TargetRef::Host(label.as_str()),
        }
    }
}

/// One SRV record of a port name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SrvRow {
    /// The host.
    pub target: Target,
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

impl SrvRow {
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

impl Row for SrvRow {
    type Key<'a> = (TargetRef<'a>, u16);

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
struct PortRow {
    name: Label,
    protocol: Protocol,
    records: Rows<SrvRow>,
}

impl Row for PortRow {
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
struct HostRow {
    label: Label,
    v4: Rows<AddressRow<Ipv4Addr>>,
    v6: Rows<AddressRow<Ipv6Addr>>,
}

impl Row for HostRow {
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
    v4: Rows<AddressRow<Ipv4Addr>>,
    ports: Rows<PortRow>,
    rare: Option<Box<Rare>>,
}

/// What few services have, kept out of the way of the others.
#[derive(Debug, Clone, Default, PartialEq)]
struct Rare {
    v6: Rows<AddressRow<Ipv6Addr>>,
    hosts: Rows<HostRow>,
}

/// The addresses of one name, at least one of either family.
#[derive(Debug, Clone, Copy)]
pub struct Addresses<'v> {
    /// IPv4.
    pub v4: Option<Rrset<'v, AddressRow<Ipv4Addr>>>,
    /// IPv6.
    pub v6: Option<Rrset<'v, AddressRow<Ipv6Addr>>>,
}

impl ServiceRecords {
    /// Addresses alone, that no instance stands for: those of the name server.
    pub(super) fn of_addresses(ips: &[IpAddr]) -> Self {
        let mut facts = Self::default();
        for ip in ips {
            match *ip {
                IpAddr::V4(ip) => facts.v4.put(AddressRow::plain(ip)),
                IpAddr::V6(ip) => facts.rare.get_or_insert_default().v6.put(AddressRow::plain(ip)),
            }
        }
        facts
    }

    /// Whether no ready instance is left.
    pub(super) fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.rare.is_none()
    }

    /// The addresses of the service's own name.
    #[must_use]
    pub fn addresses(&self) -> Addresses<'_> {
        Addresses { v4: self.v4.rrset(), v6: self.rare.as_ref().and_then(|rare| rare.v6.rrset()) }
    }

    /// The addresses of the host with this label.
    #[must_use]
    pub fn host(&self, label: &[u8]) -> Option<Addresses<'_>> {
        parse_dashed_label(label).and_then(|ip| self.dashed(ip)).or_else(|| self.registered_host(label))
    }

    /// The addresses of an SRV target of this service.
    #[must_use]
    pub fn target(&self, target: &Target) -> Option<Addresses<'_>> {
        match target {
            Target::Dashed(ip) => self.dashed(*ip),
            Target::Host(label) => self.registered_host(label.as_str().as_bytes()),
        }
    }

    fn dashed(&self, ip: IpAddr) -> Option<Addresses<'_>> {
        match ip {
            IpAddr::V4(ip) => {
                let row = self.v4.get(&ip).filter(|row| row.unnamed > 0)?;
                Some(Addresses { v4: Some(Rrset::one(row)), v6: None })
            }
            IpAddr::V6(ip) => {
                let row = self.rare.as_ref()?.v6.get(&ip).filter(|row| row.unnamed > 0)?;
                Some(Addresses { v4: None, v6: Some(Rrset::one(row)) })
            }
        }
    }

    fn registered_host(&self, label: &[u8]) -> Option<Addresses<'_>> {
        let host = self.rare.as_ref()?.hosts.get(&label)?;
        Some(Addresses { v4: host.v4.rrset(), v6: host.v6.rrset() })
    }

    /// The SRV records of a port name.
    #[must_use]
    pub fn srv(&self, protocol: Protocol, port_name: &[u8]) -> Option<Rrset<'_, SrvRow>> {
        self.ports.get(&(protocol, port_name))?.records.rrset()
    }

    /// Whether any port name of this protocol has SRV records.
    #[must_use]
    pub fn has_srv(&self, protocol: Protocol) -> bool {
        self.ports.any_from(&(protocol, b""), |row| row.protocol == protocol)
    }

    /// Whether `target` is the name of a host with the address `ip`.
    pub(super) fn names(&self, ip: IpAddr, target: &Target) -> bool {
        match (target, ip) {
            (Target::Dashed(_), ip) => self.dashed(ip).is_some(),
            (Target::Host(label), ip) => {
                let host = self.rare.as_ref().and_then(|rare| rare.hosts.get(&label.as_str().as_bytes()));
                host.is_some_and(|host| match ip {
                    IpAddr::V4(ip) => host.v4.get(&ip).is_some(),
                    IpAddr::V6(ip) => host.v6.get(&ip).is_some(),
                })
            }
        }
    }
}

/// Whether a contribution comes or goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    In,
    Out,
}

impl Way {
    fn count(self, count: &mut u32) {
        *count = match self {
            Self::In => count.saturating_add(1),
            Self::Out => count.saturating_sub(1),
        };
    }

    fn sum(self, sum: &mut u64, units: u64) {
        *sum = match self {
            Self::In => sum.saturating_add(units),
            Self::Out => sum.saturating_sub(units),
        };
    }
}

/// What one instance contributes. Instances that are DNS names contribute nothing: nobody looks
/// them up here.
pub(super) struct Contribution<'i> {
    instance: &'i Instance,
    pub(super) ip: IpAddr,
    pub(super) target: Target,
}

impl<'i> Contribution<'i> {
    /// `None` when the instance is not served.
    pub(super) fn of(instance: &'i Instance, not_ready_too: bool) -> Option<Self> {
        let Address::Ip(ip) = *instance.address() else { return None };
        (instance.ready() || not_ready_too).then(|| Self { instance, ip, target: Target::of(instance, ip) })
    }
}

/// The SRV record whose lowest priority left with its last instance, to be found again.
struct Orphan {
    protocol: Protocol,
    port_name: Label,
    target: Target,
    port: u16,
}

/// A change of a service's facts, on a copy of them.
pub(super) struct Edit {
    facts: ServiceRecords,
    orphans: Vec<Orphan>,
    not_ready_too: bool,
}

impl Edit {
    pub(super) fn new(facts: ServiceRecords, not_ready_too: bool) -> Self {
        Self { facts, orphans: Vec::new(), not_ready_too }
    }

    /// Counts a contribution in.
    pub(super) fn add(&mut self, contribution: &Contribution<'_>) {
        self.count(Way::In, contribution);
    }

    /// Counts a contribution out that was counted in before.
    pub(super) fn subtract(&mut self, contribution: &Contribution<'_>) {
        self.count(Way::Out, contribution);
    }

    /// The new facts; `after` is everything that the service has now.
    pub(super) fn finish(mut self, after: &[&CowTree<Arc<Instance>>]) -> ServiceRecords {
        for orphan in std::mem::take(&mut self.orphans) {
            self.find_priority(&orphan, after);
        }
        self.facts
    }

    fn count(&mut self, way: Way, contribution: &Contribution<'_>) {
        let Contribution { instance, ip, target } = contribution;
        let units = u64::from(instance.weight().units());
        let unnamed = matches!(target, Target::Dashed(_));
        match *ip {
            IpAddr::V4(ip) => count_address(&mut self.facts.v4, ip, way, units, unnamed),
            IpAddr::V6(ip) => count_address(&mut self.rare().v6, ip, way, units, unnamed),
        }
        if let Target::Host(label) = target {
            let new = || HostRow { label: label.clone(), v4: Rows::None, v6: Rows::None };
            self.rare().hosts.update(&label.as_str().as_bytes(), new, |host| {
                match *ip {
                    IpAddr::V4(ip) => count_address(&mut host.v4, ip, way, units, false),
                    IpAddr::V6(ip) => count_address(&mut host.v6, ip, way, units, false),
                }
                !(host.v4.is_empty() && host.v6.is_empty())
            });
        }
        for port in instance.ports().as_slice() {
            let Some(name) = &port.name else { continue };
            self.count_port(way, contribution, (port.protocol, name, port.number), units);
        }
        if self.facts.rare.as_ref().is_some_and(|rare| rare.v6.is_empty() && rare.hosts.is_empty()) {
            self.facts.rare = None;
        }
    }

    fn count_port(
        &mut self,
        way: Way,
        contribution: &Contribution<'_>,
        (protocol, name, number): (Protocol, &Label, u16),
        units: u64,
    ) {
        let Contribution { instance, target, .. } = contribution;
        let priority = instance.priority();
        let mut orphaned = false;
        let new = || PortRow { name: name.clone(), protocol, records: Rows::None };
        self.facts.ports.update(&(protocol, name.as_str().as_bytes()), new, |port| {
            let new = || SrvRow {
                target: target.clone(),
                port: number,
                priority: u16::MAX,
                lowest: 0,
                instances: 0,
                units: 0,
            };
            port.records.update(&(target.as_ref(), number), new, |record| {
                way.count(&mut record.instances);
                way.sum(&mut record.units, units);
                match way {
                    Way::In => record.add_priority(priority),
                    Way::Out if record.priority == priority => record.lowest = record.lowest.saturating_sub(1),
                    Way::Out => {}
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
        let Some(mut row) = self.facts.ports.get(&key).cloned() else { return };
        let Some(mut record) = row.records.get(&(target.as_ref(), *port)).cloned() else { return };
        (record.priority, record.lowest) = (u16::MAX, 0);
        let not_ready_too = self.not_ready_too;
        let mut look = |ip: IpAddr| {
            let address = Address::Ip(ip);
            let mut add = |instance: &Arc<Instance>| {
                if *instance.address() != address {
                    return ControlFlow::Break(());
                }
                let is_it = |p: &Port| (p.protocol, p.number, p.name.as_ref()) == (*protocol, *port, Some(port_name));
                let gives = |instance: &Instance| instance.ports().as_slice().iter().any(is_it);
                if let Some(contribution) = Contribution::of(instance, not_ready_too)
                    && contribution.target == *target
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
        if let Some(Addresses { v4, v6 }) = self.facts.target(target) {
            v4.into_iter().flat_map(|set| set.iter()).for_each(|row| look(row.ip.into()));
            v6.into_iter().flat_map(|set| set.iter()).for_each(|row| look(row.ip.into()));
        }
        row.records.put(record);
        self.facts.ports.put(row);
    }

    fn rare(&mut self) -> &mut Rare {
        self.facts.rare.get_or_insert_default()
    }
}

fn count_address<I: Copy + Ord>(rows: &mut Rows<AddressRow<I>>, ip: I, way: Way, units: u64, unnamed: bool) {
    rows.update(&ip, || AddressRow::empty(ip), |row| row.count(way, units, unnamed));
}
