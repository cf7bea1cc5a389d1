//! The records of one service: what each is, and how it is ordered.
//!
//! A record counts its instances, so that it is removed with the last of them. Owner
//! names are not kept: they follow from the question.

use std::{
    cmp::Ordering,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::ControlFlow,
};

use super::rrset::SmallTree;
use crate::model::{CowTree, DashedLabel, DnsName, Instance, Label, Protocol, Weight, cow_tree::Row};

/// Whether an instance is counted in or out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CountOp {
    Add,
    Remove,
}

impl CountOp {
    pub(super) fn count(self, count: &mut u32) {
        // Saturating: a count that is wrong by one must not wrap and keep a record for ever.
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

/// One A or AAAA record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AddressRecord<I> {
    /// The address.
    pub(crate) ip: I,
    /// Instances at the address without a registered host label: they are found under its dashes.
    pub(super) dashed: u32,
    /// Instances at the address; a name that leads to it is one.
    pub(super) instances: u32,
    /// The sum of their weights, in [`Weight::units`].
    units: u64,
}

impl<I: Copy> AddressRecord<I> {
    /// A record for an address without an instance (that of a name server), as likely to be drawn
    /// as any other.
    pub(super) fn unweighted(ip: I) -> Self {
        Self { ip, dashed: 0, instances: 1, units: 1 }
    }

    fn empty(ip: I) -> Self {
        Self { ip, dashed: 0, instances: 0, units: 0 }
    }
}

/// Counts an instance among the addresses of one name.
pub(super) fn count_address<I: Copy + Ord>(
    addresses: &mut SmallTree<AddressRecord<I>>,
    ip: I,
    op: CountOp,
    units: u64,
    dashed: bool,
) {
    addresses.update(
        &ip,
        || AddressRecord::empty(ip),
        |record| {
            op.count(&mut record.instances);
            op.sum(&mut record.units, units);
            if dashed {
                op.count(&mut record.dashed);
            }
            record.instances > 0
        },
    );
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
pub(crate) enum HostLabel {
    /// The address with dashes, written out when it is rendered.
    Dashed(IpAddr),
    /// The registered host label.
    Registered(Label),
    /// No label: the whole name of the host, outside of the service.
    External(DnsName),
}

/// [`HostLabel`] borrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum HostLabelRef<'a> {
    /// The address with dashes.
    Dashed(IpAddr),
    /// The registered host label.
    Registered(&'a str),
    /// The whole name of the host.
    External(&'a str),
}

impl HostLabel {
    /// The label of `instance`, whose address is `ip`.
    pub(super) fn of(instance: &Instance, ip: IpAddr) -> Self {
        match instance.host_name() {
            // A label that spells the instance's own address is the one it has anyway.
            Some(label) if label.as_str() != DashedLabel::new(ip).as_str() => Self::Registered(label.clone()),
            _ => Self::Dashed(ip),
        }
    }

    /// Octets of the label without its length octet, 1..=63; of a whole name up to 253.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Dashed(ip) => DashedLabel::new(*ip).as_bytes().len(),
            Self::Registered(label) => label.as_str().len(),
            Self::External(name) => name.as_str().len(),
        }
    }

    /// The same label, borrowed.
    #[must_use]
    pub(crate) fn as_ref(&self) -> HostLabelRef<'_> {
        match self {
            Self::Dashed(ip) => HostLabelRef::Dashed(*ip),
            Self::Registered(label) => HostLabelRef::Registered(label.as_str()),
            Self::External(name) => HostLabelRef::External(name.as_str()),
        }
    }
}

/// One SRV record of a port name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SrvRecord {
    /// The host that the record leads to.
    pub(crate) target: HostLabel,
    /// The port number.
    pub(crate) port: u16,
    /// The lowest of its instances' priorities, which is the preferred one (RFC 2782).
    pub(crate) priority: u16,
    /// Instances with that priority.
    at_priority: u32,
    /// Instances with a higher priority. Boxed, because instances of one record seldom differ.
    higher: Option<Box<CowTree<NumberCount<u16>>>>,
    /// The sum of their weights, in [`Weight::units`].
    units: u64,
}

/// How many instances have one number: a priority, or a TTL.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct NumberCount<N> {
    pub(super) number: N,
    pub(super) instances: u32,
}

impl<N: Copy + Ord> Row for NumberCount<N> {
    type Key<'a>
        = N
    where
        N: 'a;

    fn key(&self) -> N {
        self.number
    }

    fn order(&self, key: &N) -> Ordering {
        self.number.cmp(key)
    }
}

impl SrvRecord {
    /// A record without an instance.
    pub(super) fn empty(target: HostLabel, port: u16) -> Self {
        Self { target, port, priority: u16::MAX, at_priority: 0, higher: None, units: 0 }
    }

    /// The weight of the record: the weights of its instances in hundredths, 0 only when every
    /// one of them is 0 (RFC 2782: 0 means hardly ever).
    #[must_use]
    pub(crate) fn srv_weight(&self) -> u16 {
        if self.units == 0 {
            return 0;
        }
        // Rounded to the nearest, but never down to 0, which would say "hardly ever" of a small weight (RFC 2782). Many instances
        // together may exceed what 16 bits hold; the sum stays exact here, only what is shown is capped.
        let hundredths = (self.units * 100 + Weight::UNITS_PER_ONE / 2) / Weight::UNITS_PER_ONE;
        u16::try_from(hundredths.max(1)).unwrap_or(u16::MAX)
    }

    /// Counts an instance; returns whether any is left.
    pub(super) fn count(&mut self, op: CountOp, priority: u16, units: u64) -> bool {
        op.sum(&mut self.units, units);
        match op {
            CountOp::Add => self.add_priority(priority),
            CountOp::Remove => self.remove_priority(priority),
        }
        self.at_priority > 0
    }

    fn add_priority(&mut self, priority: u16) {
        if self.at_priority == 0 || priority < self.priority {
            // The priority that was the lowest is one of the higher ones from now on.
            let former = NumberCount { number: self.priority, instances: self.at_priority };
            if former.instances > 0 {
                self.higher.get_or_insert_default().put(former);
            }
            (self.priority, self.at_priority) = (priority, 1);
        } else if priority == self.priority {
            self.at_priority += 1;
        } else {
            self.count_higher(CountOp::Add, priority);
        }
    }

    fn remove_priority(&mut self, priority: u16) {
        if priority != self.priority {
            self.count_higher(CountOp::Remove, priority);
            return;
        }
        self.at_priority = self.at_priority.saturating_sub(1);
        // Clients use the lowest priority only (RFC 2782), so the next one takes over when its last instance is gone.
        if self.at_priority == 0
            && let Some(next) = self.next_priority()
        {
            (self.priority, self.at_priority) = (next.number, next.instances);
        }
    }

    fn count_higher(&mut self, op: CountOp, priority: u16) {
        let higher = self.higher.get_or_insert_default();
        let mut count = higher.get(&priority).copied().unwrap_or(NumberCount { number: priority, instances: 0 });
        op.count(&mut count.instances);
        if count.instances > 0 {
            higher.put(count);
        } else {
            higher.remove(&priority);
        }
        self.drop_empty_tree();
    }

    /// Takes the lowest of the higher priorities out.
    fn next_priority(&mut self) -> Option<NumberCount<u16>> {
        let higher = self.higher.as_mut()?;
        let ControlFlow::Break(next) = higher.visit_from(&0, &mut |count| ControlFlow::Break(*count)) else {
            return None;
        };
        higher.remove(&next.number);
        self.drop_empty_tree();
        Some(next)
    }

    fn drop_empty_tree(&mut self) {
        // None and an empty tree mean the same, and equality compares fields.
        if self.higher.as_ref().is_some_and(|higher| higher.is_empty()) {
            self.higher = None;
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
pub(super) struct PortRecords {
    pub(super) name: Label,
    pub(super) protocol: Protocol,
    pub(super) records: SmallTree<SrvRecord>,
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
pub(super) struct HostRecords {
    pub(super) label: Label,
    pub(super) v4: SmallTree<AddressRecord<Ipv4Addr>>,
    pub(super) v6: SmallTree<AddressRecord<Ipv6Addr>>,
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
