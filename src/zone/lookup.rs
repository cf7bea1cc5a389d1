//! The lookup: what a name and a type mean in this zone, as a pure function. No packets here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    ZoneReader,
    names::Alias,
    qname::QName,
    records::{AddressRecord, SrvRecord},
    reverse::PtrRecord,
    rrset::Rrset,
    service::{Addresses, ServiceRecords},
};
use crate::model::{Protocol, RecordType, Resolution};

/// The type of a question; `None` is one of which there is nothing here (RFC 3597).
type QuestionType = Option<RecordType>;

/// Whether a question of type `rtype` takes records of type `of`.
fn takes(rtype: QuestionType, of: RecordType) -> bool {
    rtype == Some(of) || rtype == Some(RecordType::Any)
}

/// What a question finds.
#[derive(Debug)]
pub(crate) enum Lookup<'v> {
    /// Records.
    Hit(Hit<'v>),
    /// The name exists, with other types or as one above a name that exists (RFC 8020).
    NoData(Apex),
    /// The name does not exist.
    NxDomain(Apex),
    /// A name outside the zone and its reverse zones.
    OutOfZone,
    /// A name in the zone, before the zone is ready.
    NotReady,
    /// A service of which nothing is known but names that could not be looked up.
    Unavailable,
}

/// The RRset that a question finds.
#[derive(Debug)]
pub(crate) enum Hit<'v> {
    /// IPv4 addresses, and most seconds that they may be cached.
    A(Rrset<'v, AddressRecord<Ipv4Addr>>, u32),
    /// IPv6 addresses, likewise.
    Aaaa(Rrset<'v, AddressRecord<Ipv6Addr>>, u32),
    /// A service that is one name, and the type that was asked for: of the target's addresses only those are needed.
    Cname(Alias<'v>, QuestionType),
    /// Ports, and the service where their targets' addresses are.
    Srv(Rrset<'v, SrvRecord>, &'v ServiceRecords),
    /// Host names of the address.
    Ptr(Rrset<'v, PtrRecord>, IpAddr),
    /// The version of the Kubernetes DNS specification.
    Version,
    /// The zone's own record.
    Soa(Apex),
    /// The zone's name server, and its addresses.
    Ns(Addresses<'v>),
}

/// The owner of the SOA in an answer: the question's name from this label on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Apex(pub usize);

/// A name under `in-addr.arpa` (RFC 1035 §3.5) or `ip6.arpa` (RFC 3596 §2.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ReverseName {
    family: ReverseFamily,
    /// The address as far as it is spelled, from the highest bit on.
    bits: u128,
    /// Well-formed labels below the suffix, from right to left.
    good: usize,
    /// All labels below the suffix.
    below: usize,
}

/// How a family spells an address in the reverse tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReverseFamily {
    V4,
    V6,
}

impl ReverseFamily {
    /// Address bits of one label.
    fn label_bits(self) -> usize {
        match self {
            Self::V4 => 8,
            Self::V6 => 4,
        }
    }

    /// Labels of a whole address.
    fn labels(self) -> usize {
        match self {
            Self::V4 => 4,
            Self::V6 => 32,
        }
    }

    /// The value of one label, if it is spelled as it must be: `010` and `256` are not.
    fn digit(self, label: &[u8]) -> Option<u128> {
        match (self, label) {
            (Self::V4, [b'0']) => Some(0),
            // RFC 1035 §3.5: an octet has one spelling. With `010` one address would have several names.
            (Self::V4, [b'1'..=b'9', ..]) if label.len() <= 3 => {
                let digits = label.iter().map(|c| c.is_ascii_digit().then(|| u16::from(c - b'0')));
                let number = digits.into_iter().try_fold(0u16, |sum, digit| Some(sum * 10 + digit?))?;
                u8::try_from(number).ok().map(u128::from)
            }
            (Self::V6, [digit]) => char::from(*digit).to_digit(16).map(u128::from),
            _ => None,
        }
    }
}

impl ReverseName {
    fn parse(name: &QName) -> Option<Self> {
        let below = name.labels().checked_sub(2)?;
        let family = match name.suffix(below) {
            b"\x07in-addr\x04arpa\0" => ReverseFamily::V4,
            b"\x03ip6\x04arpa\0" => ReverseFamily::V6,
            _ => return None,
        };
        let (mut bits, mut good) = (0, 0);
        while good < below.min(family.labels()) {
            // The rightmost label has the highest bits.
            let Some(digit) = family.digit(name.label(below - 1 - good)) else { break };
            good += 1;
            // IPv4 begins at the top, too, so that one comparison of prefixes serves both families.
            bits |= digit << (128 - good * family.label_bits());
        }
        Some(Self { family, bits, good, below })
    }

    /// The address, if the name spells one out and nothing more.
    fn address(&self) -> Option<IpAddr> {
        let whole = self.good == self.family.labels() && self.below == self.good;
        whole.then(|| match self.family {
            // 32 bits are left.
            ReverseFamily::V4 => Ipv4Addr::from_bits((self.bits >> 96) as u32).into(),
            ReverseFamily::V6 => Ipv6Addr::from_bits(self.bits).into(),
        })
    }

    /// The longest of `networks` whose reverse zone contains the name: the number of labels that its apex
    /// has below the suffix. A network whose prefix does not end at a label is several zones.
    fn apex(&self, networks: &[(IpAddr, u8)]) -> Option<usize> {
        let inside = |(network, prefix): &(IpAddr, u8)| {
            let (family, network) = match network {
                IpAddr::V4(ip) => (ReverseFamily::V4, u128::from(ip.to_bits()) << 96),
                IpAddr::V6(ip) => (ReverseFamily::V6, ip.to_bits()),
            };
            let prefix = usize::from(*prefix);
            // A prefix that ends within a label (10.0.0.0/9) makes each label that it covers an apex: labels cannot be cut.
            let labels = prefix.div_ceil(family.label_bits());
            let differ = (self.bits ^ network).leading_zeros() as usize;
            (self.family == family && self.good >= labels && differ >= prefix).then_some(labels)
        };
        networks.iter().filter_map(inside).max()
    }
}

/// Looks up the records of `rtype` at `name`.
pub(super) fn lookup<'v>(zone: &'v ZoneReader<'_>, name: &QName, rtype: QuestionType) -> Lookup<'v> {
    match zone.labels_below_origin(name) {
        Some(_) if !zone.is_ready() => Lookup::NotReady,
        Some(below) => in_zone(zone, name, below, rtype),
        None => match ReverseName::parse(name) {
            Some(reverse) => in_reverse(zone, name, reverse, rtype),
            None => Lookup::OutOfZone,
        },
    }
}

fn in_zone<'v>(zone: &'v ZoneReader<'_>, name: &QName, below: usize, rtype: QuestionType) -> Lookup<'v> {
    let apex = Apex(below);
    let Some(first) = below.checked_sub(1) else { return at_apex(zone, apex, rtype) };
    match (name.label(first), below) {
        // RFC 8020: a name above one that exists does exist.
        (b"svc" | b"dns", 1) => Lookup::NoData(apex),
        (b"svc", 2) if zone.has_namespace(name.label(0)) => Lookup::NoData(apex),
        // Three labels are a service, four a host or a protocol of it, five a port. Nothing is deeper.
        (b"svc", 3..=5) => match zone.service(name.label(below - 3), name.label(below - 2)) {
            Some(records) => in_service(records, apex, name, below - 3, rtype),
            None => Lookup::NxDomain(apex),
        },
        (b"dns", 2) if name.label(0) == b"ns" => addresses(zone.name_server(), apex, rtype),
        (b"dns-version", 1) if takes(rtype, RecordType::Txt) => Lookup::Hit(Hit::Version),
        (b"dns-version", 1) => Lookup::NoData(apex),
        _ => Lookup::NxDomain(apex),
    }
}

/// A name of `records`' service, or one with `below` labels before it.
fn in_service<'v>(
    records: &'v ServiceRecords,
    apex: Apex,
    name: &QName,
    below: usize,
    rtype: QuestionType,
) -> Lookup<'v> {
    // Compared as octets: names in questions are in lower case already.
    let protocol = |index| Protocol::ALL.into_iter().find(|p| p.srv_label().as_bytes() == name.label(index));
    match below {
        0 => match records.alias() {
            // RFC 2181 §10.1: nothing else is at the name of an alias, so a question of any type gets it.
            Some(alias) => match *alias.resolution {
                Resolution::Unavailable if !takes(rtype, RecordType::Cname) => Lookup::Unavailable,
                _ => Lookup::Hit(Hit::Cname(alias, rtype)),
            },
            // What could not be looked up may have addresses: NODATA would be cached. Beside others it is left out.
            None if records.is_unavailable() && (takes(rtype, RecordType::A) || takes(rtype, RecordType::Aaaa)) => {
                Lookup::Unavailable
            }
            None => addresses(records.addresses(), apex, rtype),
        },
        // Labels of hosts have no underscore, so a name is never both.
        1 => match (records.host(name.label(0)), protocol(0)) {
            (Some(found), _) => addresses(found, apex, rtype),
            // RFC 8020: `_tcp` is above the SRV names.
            (None, Some(protocol)) if records.has_srv(protocol) => Lookup::NoData(apex),
            (None, Some(_)) if records.is_unavailable() => Lookup::Unavailable,
            (None, None) if records.is_unknown_host(name.label(0)) => Lookup::Unavailable,
            _ => Lookup::NxDomain(apex),
        },
        _ => {
            let port_name = name.label(0).strip_prefix(b"_");
            match port_name.zip(protocol(1)).and_then(|(port_name, protocol)| records.srv(protocol, port_name)) {
                // The protocol is part of the key: `_http._udp` is not `_http._tcp`.
                Some(rrset) if takes(rtype, RecordType::Srv) => Lookup::Hit(Hit::Srv(rrset, records)),
                Some(_) => Lookup::NoData(apex),
                // The ports of what could not be looked up are left out until it is.
                None if records.is_unavailable() => Lookup::Unavailable,
                None => Lookup::NxDomain(apex),
            }
        }
    }
}

fn addresses(found: Addresses<'_>, apex: Apex, rtype: QuestionType) -> Lookup<'_> {
    match found {
        // RFC 8482 §4.1: any one RRset is a good answer to ANY, which keeps it small.
        Addresses { v4: Some(v4), ttl, .. } if takes(rtype, RecordType::A) => Lookup::Hit(Hit::A(v4, ttl)),
        Addresses { v6: Some(v6), ttl, .. } if takes(rtype, RecordType::Aaaa) => Lookup::Hit(Hit::Aaaa(v6, ttl)),
        _ => Lookup::NoData(apex),
    }
}

/// The apex of the zone, or of a reverse zone, has an SOA and an NS.
fn at_apex<'v>(zone: &'v ZoneReader<'_>, apex: Apex, rtype: QuestionType) -> Lookup<'v> {
    match rtype {
        // As with addresses, ANY gets one RRset.
        Some(RecordType::Soa | RecordType::Any) => Lookup::Hit(Hit::Soa(apex)),
        Some(RecordType::Ns) => Lookup::Hit(Hit::Ns(zone.name_server())),
        _ => Lookup::NoData(apex),
    }
}

fn in_reverse<'v>(zone: &'v ZoneReader<'_>, name: &QName, reverse: ReverseName, rtype: QuestionType) -> Lookup<'v> {
    let apex_labels = reverse.apex(zone.reverse_zones());
    let address = reverse.address();
    if !zone.is_ready() {
        // After the recovery any address may be that of an instance.
        return if apex_labels.is_some() || address.is_some() { Lookup::NotReady } else { Lookup::OutOfZone };
    }
    let found = address.and_then(|ip| Some((zone.ptr_records(ip)?, ip)));
    // Outside of the reverse zones only the addresses of instances are served. Each is a zone of its
    // own, so the owner of the SOA in a negative answer is the name itself.
    let Some(labels) = apex_labels else {
        return match found {
            Some((names, ip)) if takes(rtype, RecordType::Ptr) => Lookup::Hit(Hit::Ptr(names, ip)),
            Some(_) => Lookup::NoData(Apex(0)),
            None => Lookup::OutOfZone,
        };
    };
    debug_assert!(labels <= name.labels(), "the apex is part of the name");
    let apex = Apex(reverse.below - labels);
    match found {
        Some((names, ip)) if takes(rtype, RecordType::Ptr) => Lookup::Hit(Hit::Ptr(names, ip)),
        _ if reverse.below == labels => at_apex(zone, apex, rtype),
        Some(_) => Lookup::NoData(apex),
        // A part of an address is above the addresses that it begins. Whether any of them is in use is not looked up: NXDOMAIN would
        // deny all of them (RFC 8020), and resolvers that minimise names ask for such parts (RFC 9156).
        None if address.is_none() && reverse.good == reverse.below => Lookup::NoData(apex),
        None => Lookup::NxDomain(apex),
    }
}
