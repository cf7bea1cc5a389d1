//! From an address to the names of the hosts that have it, for PTR.
//!
//! Entries are written before a service's value and removed after it, so that a host that is found
//! by its service is found by its address too.

use std::{
    cmp::Ordering,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use foldhash::fast::RandomState;
use papaya::{HashMap, HashMapRef, LocalGuard};

use super::{
    records::HostLabel,
    rrset::{Rrset, SmallTree},
};
use crate::model::{Label, ServiceKey, cow_tree::Row};

/// One host name of an address: `<host>.<service>.svc.<zone>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PtrRecord {
    /// Under this service.
    pub(crate) service: ServiceKey,
    /// The host label as registered; `None` for the address with dashes. Boxed because few have one,
    /// and there is a record for nearly every instance.
    pub(crate) host: Option<Box<Label>>,
}

impl PtrRecord {
    /// The host with the label `host` under `service`.
    pub(super) fn new(service: &ServiceKey, host: &HostLabel) -> Self {
        let host = match host {
            HostLabel::Registered(label) => Some(Box::new(label.clone())),
            // Only hosts with an address of their own are here, which no name outside of the zone is.
            HostLabel::Dashed(_) | HostLabel::External(_) => None,
        };
        Self { service: service.clone(), host }
    }
}

impl Row for PtrRecord {
    type Key<'a> = (&'a str, Option<&'a str>);

    fn key(&self) -> Self::Key<'_> {
        (self.service.as_str(), self.host.as_ref().map(|label| label.as_str()))
    }

    fn order(&self, key: &Self::Key<'_>) -> Ordering {
        self.key().cmp(key)
    }
}

type Map<I> = HashMap<I, SmallTree<PtrRecord>, RandomState>;
type PinnedMap<'z, I> = HashMapRef<'z, I, SmallTree<PtrRecord>, RandomState, LocalGuard<'z>>;

/// The index itself.
#[derive(Debug, Default)]
pub(super) struct Reverse {
    v4: Map<Ipv4Addr>,
    v6: Map<Ipv6Addr>,
}

/// The index of one family, pinned for reading.
#[derive(Debug)]
pub(super) enum ReverseReader<'z> {
    V4(PinnedMap<'z, Ipv4Addr>),
    V6(PinnedMap<'z, Ipv6Addr>),
}

impl Reverse {
    /// Pins the index of the family of `ip` for reading.
    pub(super) fn pin(&self, ip: IpAddr) -> ReverseReader<'_> {
        match ip {
            IpAddr::V4(_) => ReverseReader::V4(self.v4.pin()),
            IpAddr::V6(_) => ReverseReader::V6(self.v6.pin()),
        }
    }

    /// Makes room for so many addresses.
    pub(super) fn reserve(&self, addresses: impl Iterator<Item = IpAddr>) {
        let (v4, v6) = addresses.fold((0, 0), |(v4, v6), ip| if ip.is_ipv4() { (v4 + 1, v6) } else { (v4, v6 + 1) });
        self.v4.pin().reserve(v4);
        self.v6.pin().reserve(v6);
    }

    /// Adds a name. Only the publisher may.
    pub(super) fn add(&self, ip: IpAddr, name: PtrRecord) {
        self.edit(ip, |names| names.put(name));
    }

    /// Removes a name. Only the publisher may.
    pub(super) fn remove(&self, ip: IpAddr, name: &PtrRecord) {
        self.edit(ip, |names| names.remove(&name.key()));
    }

    fn edit(&self, ip: IpAddr, change: impl FnOnce(&mut SmallTree<PtrRecord>)) {
        match ip {
            IpAddr::V4(ip) => edit(&self.v4, ip, change),
            IpAddr::V6(ip) => edit(&self.v6, ip, change),
        }
    }
}

fn edit<I: std::hash::Hash + Eq + Copy>(map: &Map<I>, ip: I, change: impl FnOnce(&mut SmallTree<PtrRecord>)) {
    let map = map.pin();
    // A copy shares its chunks with the original, which readers go on using. Only the publisher edits, so nothing is lost
    // between the read and the write.
    let mut names = map.get(&ip).cloned().unwrap_or_default();
    change(&mut names);
    if names.is_empty() {
        map.remove(&ip);
    } else {
        map.insert(ip, names);
    }
}

impl ReverseReader<'_> {
    /// The host names of `ip`.
    pub(super) fn get(&self, ip: IpAddr) -> Option<Rrset<'_, PtrRecord>> {
        let names = match (self, ip) {
            (Self::V4(map), IpAddr::V4(ip)) => map.get(&ip),
            (Self::V6(map), IpAddr::V6(ip)) => map.get(&ip),
            _ => None,
        };
        names?.rrset()
    }
}

#[cfg(test)]
impl Reverse {
    /// Every address that has names.
    pub(super) fn visit(&self, mut each: impl FnMut(IpAddr, &SmallTree<PtrRecord>)) {
        self.v4.pin().iter().for_each(|(ip, names)| each((*ip).into(), names));
        self.v6.pin().iter().for_each(|(ip, names)| each((*ip).into(), names));
    }
}
