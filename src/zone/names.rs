//! Instances that are registered by a DNS name: what their lookups add to their service's records.
//!
//! 1. A name that is alone in its service makes the service's own name an alias (CNAME) of it.
//! 2. Beside others, or where names are flattened, its addresses are counted among those of the service, and
//!    share the weight of the instance. A name that has none is left out.
//! 3. The target of its SRV records is the name itself.
//!
//! Only services with such an instance have a [`NameSet`]; the others pay for a pointer.

use std::{
    cmp::Ordering,
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use super::{
    records::{AddressRecord, CountOp, HostRecords, NumberCount, count_address},
    rrset::SmallTree,
    service::Addresses,
};
use crate::model::{Address, DnsName, Instance, InstanceKey, Label, Resolution, ResolvedAddresses, cow_tree::Row};

/// The served instances of one service that are names.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct NameSet {
    /// In order of the names: instances of one name are neighbours.
    pub(super) rows: SmallTree<NameRow>,
    /// Served instances of the service that have an IP address.
    pub(super) plain: u32,
    /// Whether the service's own name is an alias. The records were counted by this.
    pub(super) alias: bool,
    /// What the names with a host label lead to. An instance with an IP address and the same label hides them.
    hosts: SmallTree<HostRecords>,
    /// The TTLs of the names that have addresses, and how many instances have each.
    ttls: SmallTree<NumberCount<u32>>,
    /// Instances whose names could not be looked up.
    unavailable: u32,
    /// Their host labels.
    unknown_hosts: SmallTree<LabelCount>,
}

#[derive(Debug, Clone, PartialEq)]
struct LabelCount {
    label: Label,
    instances: u32,
}

/// One served instance, and what its name leads to.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct NameRow {
    pub(super) instance: Arc<Instance>,
    pub(super) resolution: Arc<Resolution>,
}

/// The name that a service's own name is an alias of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Alias<'v> {
    /// The target of the CNAME.
    pub(crate) target: &'v DnsName,
    /// What the target leads to.
    pub(crate) resolution: &'v Resolution,
}

impl NameRow {
    /// Its name.
    pub(super) fn name(&self) -> &DnsName {
        let Address::Name(name) = self.instance.address() else { unreachable!("made for names only") };
        name
    }
}

impl NameSet {
    /// No names yet, beside so many instances with an IP address.
    pub(super) fn beside(plain: u32) -> Self {
        Self { plain, ..Self::default() }
    }

    /// The service's own name, if it is an alias.
    pub(super) fn alias(&self) -> Option<Alias<'_>> {
        // All rows have the one name, and with it one resolution.
        let row = if self.alias { self.rows.iter().next()? } else { return None };
        Some(Alias { target: row.name(), resolution: &row.resolution })
    }

    /// Whether the service's own name has to be an alias.
    pub(super) fn wants_alias(&self, flatten: bool) -> bool {
        if flatten || self.plain > 0 {
            return false;
        }
        // Sorted by name: when the first and the last are the same, there is no other.
        self.rows.rrset().is_some_and(|rows| {
            let (first, last) = (rows.iter().next(), rows.wrap_from(rows.len() - 1).next());
            first.map(NameRow::name) == last.map(NameRow::name)
        })
    }

    /// The rows of one name.
    pub(super) fn of(&self, address: &Address) -> Vec<NameRow> {
        let mut found = Vec::new();
        self.rows.visit_from(&InstanceKey::first_of(address), |row| {
            let same = row.instance.address() == address;
            if same {
                found.push(row.clone());
            }
            same
        });
        found
    }

    /// Whether nothing is known of the addresses of some name.
    pub(super) fn is_unavailable(&self) -> bool {
        self.unavailable > 0
    }

    /// Whether nothing is known of the addresses of some name with this host label.
    pub(super) fn is_unknown_host(&self, label: &[u8]) -> bool {
        self.unknown_hosts.get(&label).is_some()
    }

    /// Most seconds that the addresses of the service may be cached.
    pub(super) fn ttl(&self) -> u32 {
        self.ttls.iter().next().map_or(u32::MAX, |lowest| lowest.number)
    }

    /// The addresses under a registered host label.
    pub(super) fn host(&self, label: &[u8]) -> Option<Addresses<'_>> {
        let host = self.hosts.get(&label)?;
        Some(Addresses { v4: host.v4.rrset(), v6: host.v6.rrset(), ttl: self.ttl() })
    }

    /// Puts a row in; returns the one with the same identity.
    pub(super) fn put(&mut self, row: NameRow) -> Option<NameRow> {
        let before = self.rows.get(&row.key()).cloned();
        self.count_resolution(CountOp::Add, &row);
        before.iter().for_each(|before| self.count_resolution(CountOp::Remove, before));
        self.rows.put(row);
        before
    }

    /// Takes the row of an instance out.
    pub(super) fn remove(&mut self, key: &InstanceKey<'_>) -> Option<NameRow> {
        let before = self.rows.get(key).cloned()?;
        self.count_resolution(CountOp::Remove, &before);
        self.rows.remove(key);
        Some(before)
    }

    fn count_resolution(&mut self, op: CountOp, NameRow { instance, resolution }: &NameRow) {
        if **resolution == Resolution::Unavailable {
            op.count(&mut self.unavailable);
            if let Some(label) = instance.host_name() {
                let new = || LabelCount { label: label.clone(), instances: 0 };
                self.unknown_hosts.update(&label.as_str().as_bytes(), new, |row| {
                    op.count(&mut row.instances);
                    row.instances > 0
                });
            }
        }
        if let Some(ResolvedAddresses { ttl, .. }) = resolution.addresses() {
            self.ttls.update(
                ttl,
                || NumberCount { number: *ttl, instances: 0 },
                |row| {
                    op.count(&mut row.instances);
                    row.instances > 0
                },
            );
        }
    }

    pub(super) fn count_host(&mut self, op: CountOp, label: &Label, addresses: &ResolvedAddresses, units: u64) {
        let new = || HostRecords { label: label.clone(), v4: SmallTree::None, v6: SmallTree::None };
        self.hosts.update(&label.as_str().as_bytes(), new, |host| {
            count_resolved(op, &mut host.v4, &mut host.v6, addresses, units);
            !(host.v4.is_empty() && host.v6.is_empty())
        });
    }
}

/// Counts the addresses of a name, which share `units` of weight: those of each family all of it, because a
/// question asks for one family.
pub(super) fn count_resolved(
    op: CountOp,
    v4: &mut SmallTree<AddressRecord<Ipv4Addr>>,
    v6: &mut SmallTree<AddressRecord<Ipv6Addr>>,
    addresses: &ResolvedAddresses,
    units: u64,
) {
    for (ip, units) in addresses.v4.iter().zip(shares(units, addresses.v4.len())) {
        count_address(v4, *ip, op, units, false);
    }
    for (ip, units) in addresses.v6.iter().zip(shares(units, addresses.v6.len())) {
        count_address(v6, *ip, op, units, false);
    }
}

/// `units` in so many parts that differ by one at most.
fn shares(units: u64, parts: usize) -> impl Iterator<Item = u64> {
    let parts = parts as u64;
    (0..parts).map(move |index| units / parts + u64::from(index < units % parts))
}

impl Row for NameRow {
    type Key<'a> = InstanceKey<'a>;

    fn key(&self) -> InstanceKey<'_> {
        self.instance.key()
    }

    fn order(&self, key: &InstanceKey<'_>) -> Ordering {
        self.instance.key().cmp(key)
    }
}

impl Row for LabelCount {
    type Key<'a> = &'a [u8];

    fn key(&self) -> &[u8] {
        self.label.as_str().as_bytes()
    }

    fn order(&self, key: &&[u8]) -> Ordering {
        self.key().cmp(*key)
    }
}
