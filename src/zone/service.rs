//! The value of one service: what its served instances add up to, as records.
//!
//! Everything is counted in integers, so that instances can be counted in and out in any order and
//! the result equals a value that is built anew. A value is changed on a copy ([`RecordsUpdate`]),
//! which shares every untouched chunk with the old one.
//!
//! [`RecordsUpdate`]: super::update::RecordsUpdate

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    names::{Alias, NameSet},
    records::{AddressRecord, HostLabel, HostRecords, PortRecords, SrvRecord},
    rrset::{Rrset, SmallTree},
};
use crate::model::{Protocol, parse_dashed_label};

/// What one service's served instances add up to.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct ServiceRecords {
    pub(super) v4: SmallTree<AddressRecord<Ipv4Addr>>,
    pub(super) ports: SmallTree<PortRecords>,
    pub(super) extra: Option<Box<ExtraRecords>>,
}

/// What few services have. Behind a pointer, so that the others do not pay for it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct ExtraRecords {
    pub(super) v6: SmallTree<AddressRecord<Ipv6Addr>>,
    pub(super) hosts: SmallTree<HostRecords>,
    /// Instances that are DNS names.
    pub(super) names: Option<Box<NameSet>>,
}

/// The addresses of one name, at least one of either family.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Addresses<'v> {
    /// IPv4.
    pub(crate) v4: Option<Rrset<'v, AddressRecord<Ipv4Addr>>>,
    /// IPv6.
    pub(crate) v6: Option<Rrset<'v, AddressRecord<Ipv6Addr>>>,
    /// Most seconds that they may be cached, beside the zone's TTL.
    pub(crate) ttl: u32,
}

impl ServiceRecords {
    /// Addresses without instances: those of the name server.
    pub(super) fn of_addresses(ips: &[IpAddr]) -> Self {
        let mut records = Self::default();
        for ip in ips {
            match *ip {
                IpAddr::V4(ip) => records.v4.put(AddressRecord::unweighted(ip)),
                IpAddr::V6(ip) => records.extra.get_or_insert_default().v6.put(AddressRecord::unweighted(ip)),
            }
        }
        records
    }

    /// Whether no served instance is left.
    pub(super) fn is_empty(&self) -> bool {
        // Ports need no look: whatever has a port has an address or is a name.
        self.v4.is_empty() && self.extra.is_none()
    }

    /// The addresses of the service's own name, if it is not an alias.
    #[must_use]
    pub(crate) fn addresses(&self) -> Addresses<'_> {
        let ttl = self.names().map_or(u32::MAX, NameSet::ttl);
        Addresses { v4: self.v4.rrset(), v6: self.extra.as_ref().and_then(|extra| extra.v6.rrset()), ttl }
    }

    /// What the service's own name is an alias of.
    pub(super) fn alias(&self) -> Option<Alias<'_>> {
        self.names()?.alias()
    }

    /// Whether no address is known because some name could not be looked up.
    pub(super) fn is_unavailable(&self) -> bool {
        // An alias has its ports, whatever its target leads to.
        self.v4.is_empty()
            && self.alias().is_none()
            && self.extra.as_ref().is_some_and(|extra| {
                extra.v6.is_empty() && extra.names.as_ref().is_some_and(|names| names.is_unavailable())
            })
    }

    /// Whether a name with this host label could not be looked up.
    pub(super) fn is_unknown_host(&self, label: &[u8]) -> bool {
        self.names().is_some_and(|names| names.is_unknown_host(label))
    }

    fn names(&self) -> Option<&NameSet> {
        self.extra.as_ref()?.names.as_deref()
    }

    /// The addresses of the host with this label.
    pub(super) fn host(&self, label: &[u8]) -> Option<Addresses<'_>> {
        // A registered label may spell the address of another machine: it is found when no instance has that address.
        parse_dashed_label(label)
            .and_then(|ip| self.dashed(ip))
            .or_else(|| self.registered_host(label))
            .or_else(|| self.names()?.host(label))
    }

    /// The addresses of an SRV target of this service.
    #[must_use]
    pub(crate) fn target(&self, target: &HostLabel) -> Option<Addresses<'_>> {
        match target {
            HostLabel::Dashed(ip) => self.dashed(*ip),
            HostLabel::Registered(label) => self.registered_host(label.as_str().as_bytes()),
            // RFC 2181 §5.4.1: a server does not speak for names outside of its zone.
            HostLabel::External(_) => None,
        }
    }

    fn dashed(&self, ip: IpAddr) -> Option<Addresses<'_>> {
        match ip {
            IpAddr::V4(ip) => {
                // Where all instances of the address registered labels, the name with dashes does not exist.
                let record = self.v4.get(&ip).filter(|record| record.dashed > 0)?;
                Some(Addresses { v4: Some(Rrset::one(record)), v6: None, ttl: u32::MAX })
            }
            IpAddr::V6(ip) => {
                let record = self.extra.as_ref()?.v6.get(&ip).filter(|record| record.dashed > 0)?;
                Some(Addresses { v4: None, v6: Some(Rrset::one(record)), ttl: u32::MAX })
            }
        }
    }

    fn registered_host(&self, label: &[u8]) -> Option<Addresses<'_>> {
        let host = self.extra.as_ref()?.hosts.get(&label)?;
        Some(Addresses { v4: host.v4.rrset(), v6: host.v6.rrset(), ttl: u32::MAX })
    }

    /// The SRV records of a port name.
    pub(super) fn srv(&self, protocol: Protocol, port_name: &[u8]) -> Option<Rrset<'_, SrvRecord>> {
        self.ports.get(&(protocol, port_name))?.records.rrset()
    }

    /// Whether any port name of this protocol has SRV records.
    pub(super) fn has_srv(&self, protocol: Protocol) -> bool {
        // Rows are sorted by protocol first, and the empty name sorts before every other: one step finds the first of the protocol.
        self.ports.any_from(&(protocol, b""), |port| port.protocol == protocol)
    }

    /// Whether `label` is the name of a host with the address `ip`.
    pub(super) fn has_host(&self, ip: IpAddr, label: &HostLabel) -> bool {
        match label {
            HostLabel::Dashed(_) => self.dashed(ip).is_some(),
            HostLabel::External(_) => false,
            HostLabel::Registered(label) => {
                let host = self.extra.as_ref().and_then(|extra| extra.hosts.get(&label.as_str().as_bytes()));
                host.is_some_and(|host| match ip {
                    IpAddr::V4(ip) => host.v4.get(&ip).is_some(),
                    IpAddr::V6(ip) => host.v6.get(&ip).is_some(),
                })
            }
        }
    }
}
