//! Groups: which instances can share a slice, and the name of the slice.

use std::{
    fmt::Write as _,
    hash::{Hash, Hasher},
};

use k8s_openapi::api::discovery::v1::EndpointPort;
use sha2::{Digest as _, Sha256};

use crate::model::{Address, Port, PortSpec, Ports, Protocol, ServiceKey};

/// Most ports of a slice that are read. An instance within its 2 KiB has fewer than 160, so gangplank
/// never wrote a longer list; Kubernetes allows 20 000.
pub(super) const MAX_PORTS: usize = 512;

/// Hexadecimal digits of the hash in a slice's name.
const HASH_DIGITS: usize = 10;

/// The family of a slice's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4
    V4,
    /// IPv6
    V6,
    /// DNS names
    Fqdn,
}

impl Family {
    /// The family of `address`.
    #[must_use]
    pub fn of(address: &Address) -> Self {
        match address {
            Address::Ip(ip) if ip.is_ipv4() => Self::V4,
            Address::Ip(_) => Self::V6,
            Address::Name(_) => Self::Fqdn,
        }
    }

    /// As a slice's `addressType`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
            Self::Fqdn => "FQDN",
        }
    }

    /// The family of a slice's `addressType`; `None` for one that Kubernetes did not have yet.
    pub(super) fn parse(text: &str) -> Option<Self> {
        [Self::V4, Self::V6, Self::Fqdn].into_iter().find(|family| family.as_str() == text)
    }
}

/// What all instances of one slice have in common: the family and the exact list of ports.
///
/// A slice cannot have one port name twice, not even under two protocols. Instances with such
/// ports are in several groups, one for each of their protocols, each with `part` set. The
/// whole list is part of each, so that they do not mix with instances that have only those ports:
/// within a group an address is one instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceGroup {
    /// The family of the addresses.
    pub family: Family,
    /// All ports of the instances.
    pub ports: Ports,
    /// The slice has the ports of this protocol only; `None`: it has them all.
    pub part: Option<Protocol>,
    /// Its slices have the addresses that DNS names lead to, which are not instances. They never share a slice with those.
    pub resolved: bool,
}

impl SliceGroup {
    /// The groups of instances with `ports`: one, or one for each protocol.
    pub(in crate::kubernetes) fn all(family: Family, ports: &Ports) -> Vec<Self> {
        let group = |part| Self { family, ports: ports.clone(), part, resolved: false };
        if !must_be_split(ports) {
            return vec![group(None)];
        }
        let used = |protocol: &Protocol| ports.as_slice().iter().any(|port| port.protocol == *protocol);
        Protocol::ALL.into_iter().filter(used).map(|protocol| group(Some(protocol))).collect()
    }

    /// The group of a slice with these ports, `whole` being all ports of its instances as its annotation
    /// has them. `None` if gangplank writes no such slice.
    pub(super) fn of_slice(family: Family, ports: Ports, whole: Option<Ports>) -> Option<Self> {
        let Some(whole) = whole else {
            return (!must_be_split(&ports)).then_some(Self { family, ports, part: None, resolved: false });
        };
        let part = ports.as_slice().first()?.protocol;
        let group = Self { family, ports: whole, part: Some(part), resolved: false };
        // A slice with an annotation that its ports contradict was edited by somebody.
        (must_be_split(&group.ports) && group.slice_ports().eq(ports.as_slice())).then_some(group)
    }

    /// The ports that its slices show: all, or of a part those of its protocol.
    pub fn slice_ports(&self) -> impl Iterator<Item = &Port> {
        self.ports.as_slice().iter().filter(|port| self.part.is_none_or(|part| part == port.protocol))
    }

    /// The name of its slice number `index` in `service`: `<service>-<hash>`.
    ///
    /// The hash is the first ten hexadecimal digits of SHA-256 over lines of text, each with its
    /// line feed: `gangplank.dev/slice/1`, the family (`IPv4`), for each port in order of
    /// protocol and number `<protocol> <number> <name>` (`TCP 8080 http`; the name may be empty),
    /// for a part `part <protocol>`, for addresses of names `resolved`, and `index <index>`. It never changes: another name would
    /// rewrite every slice in every cluster.
    #[must_use]
    pub fn slice_name(&self, service: &ServiceKey, index: u32) -> String {
        let mut text = format!("gangplank.dev/slice/1\n{}\n", self.family.as_str());
        let mut line = |arguments: std::fmt::Arguments<'_>| {
            text.write_fmt(arguments).expect("a String takes everything");
        };
        for port in self.ports.as_slice() {
            let name = port.name.as_ref().map_or("", |name| name.as_str());
            line(format_args!("{} {} {name}\n", port.protocol, port.number));
        }
        if let Some(part) = self.part {
            line(format_args!("part {part}\n"));
        }
        if self.resolved {
            line(format_args!("resolved\n"));
        }
        line(format_args!("index {index}\n"));
        slice_name(service, &text)
    }
}

/// `<service>-<hash>`, with the first digits of the hash of `text`.
pub(super) fn slice_name(service: &ServiceKey, text: &str) -> String {
    let hash = Sha256::digest(text.as_bytes());
    let mut name = format!("{}-", service.name());
    for octet in &hash[..HASH_DIGITS / 2] {
        write!(name, "{octet:02x}").expect("a String takes everything");
    }
    name
}

/// Whether `name` could be a [`SliceGroup::slice_name`] of `service`.
pub(super) fn is_slice_name(service: &ServiceKey, name: &str) -> bool {
    let hash = name.strip_prefix(service.name()).and_then(|rest| rest.strip_prefix('-'));
    hash.is_some_and(|hash| {
        hash.len() == HASH_DIGITS && hash.bytes().all(|octet| matches!(octet, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// Whether one name is used under two protocols. Within one protocol names are unique already.
fn must_be_split(ports: &Ports) -> bool {
    let mut names: Vec<_> = ports.as_slice().iter().filter_map(|port| port.name.as_ref()).collect();
    names.sort_unstable();
    // The API server refuses a slice with one name twice, whatever the protocols (validation of EndpointSlice ports).
    names.windows(2).any(|pair| pair[0] == pair[1])
}

/// Ports as a slice has them, for [`Ports::parse`].
///
/// # Errors
/// The port that cannot be represented.
pub(super) fn port_specs(ports: &[EndpointPort]) -> Result<Vec<PortSpec>, String> {
    if ports.len() > MAX_PORTS {
        return Err(format!("ports: {} of them, at most {MAX_PORTS} are looked at", ports.len()));
    }
    let spec =
        |(index, port): (usize, &EndpointPort)| port_spec(port).map_err(|what| format!("ports[{index}]: {what}"));
    ports.iter().enumerate().map(spec).collect()
}

/// One port as a slice has it.
///
/// # Errors
/// If the port is "all ports", or has an unknown protocol.
pub(super) fn port_spec(port: &EndpointPort) -> Result<PortSpec, String> {
    let number = port.port.ok_or("has no number")?;
    // The default of the field in the API.
    let protocol = port.protocol.as_deref().unwrap_or(Protocol::Tcp.as_str());
    let known = Protocol::ALL.into_iter().find(|known| known.as_str() == protocol);
    let protocol = known.ok_or_else(|| format!("protocol: must be TCP, UDP or SCTP, got {protocol:?}"))?;
    Ok(PortSpec { number: number.into(), protocol, name: port.name.clone().unwrap_or_default() })
}

impl Hash for SliceGroup {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.family, self.part, self.resolved).hash(state);
        PortList(&self.ports).hash(state);
    }
}

/// A list of ports as a key of maps, names included.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::kubernetes) struct PortList<'a>(pub(in crate::kubernetes) &'a Ports);

impl Hash for PortList<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for port in self.0.as_slice() {
            (port.protocol, port.number, &port.name).hash(state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Namespace, ServiceName};

    fn ports(list: &[(i64, Protocol, &str)]) -> Ports {
        let specs = list.iter().map(|&(number, protocol, name)| PortSpec { number, protocol, name: name.into() });
        Ports::parse(&specs.collect::<Vec<_>>()).expect("valid")
    }

    /// These names exist in clusters. If this test fails, the code is wrong, not the test.
    #[test]
    fn slice_names_never_change() {
        let web =
            ServiceKey::new(Namespace::parse("prod").expect("a label"), ServiceName::parse("web").expect("a label"));
        let http = SliceGroup {
            family: Family::V4,
            ports: ports(&[(8080, Protocol::Tcp, "http")]),
            part: None,
            resolved: false,
        };
        let none = SliceGroup { family: Family::V6, ports: Ports::default(), part: None, resolved: false };
        let dns = ports(&[(53, Protocol::Udp, "dns"), (53, Protocol::Tcp, "dns"), (80, Protocol::Tcp, "")]);
        let udp = SliceGroup { family: Family::V4, ports: dns, part: Some(Protocol::Udp), resolved: false };
        let name = SliceGroup {
            family: Family::Fqdn,
            ports: ports(&[(5432, Protocol::Tcp, "sql")]),
            part: None,
            resolved: false,
        };
        let resolved = SliceGroup { family: Family::V4, resolved: true, ..name.clone() };
        let named = [(&http, 0), (&http, 1), (&none, 0), (&udp, 0), (&name, 0), (&resolved, 0)];
        let named: Vec<String> = named.iter().map(|(group, index)| group.slice_name(&web, *index)).collect();
        assert_eq!(
            named,
            [
                "web-b1a4f60fc2",
                "web-3683dd6482",
                "web-2efd22a1d4",
                "web-f21eab269b",
                "web-d3c13ac267",
                "web-da8bb399b5"
            ]
        );
        assert!(named.iter().all(|name| is_slice_name(&web, name)));
        for other in
            ["web", "web-", "web-0123456789a", "web-012345678", "web-012345678G", "we-0123456789", "web0123456789"]
        {
            assert!(!is_slice_name(&web, other), "{other}");
        }
    }

    #[test]
    fn port_name_under_two_protocols_splits_the_group_by_protocol() {
        let plain = ports(&[(53, Protocol::Udp, "dns"), (53, Protocol::Tcp, "dns-tcp"), (80, Protocol::Tcp, "")]);
        assert_eq!(
            SliceGroup::all(Family::V4, &plain),
            [SliceGroup { family: Family::V4, ports: plain.clone(), part: None, resolved: false }]
        );
        let twice = ports(&[(53, Protocol::Udp, "dns"), (53, Protocol::Tcp, "dns"), (80, Protocol::Tcp, "")]);
        let parts = SliceGroup::all(Family::V6, &twice);
        let numbers = |group: &SliceGroup| group.slice_ports().map(|port| port.number).collect::<Vec<_>>();
        assert_eq!(parts.iter().map(numbers).collect::<Vec<_>>(), [vec![53, 80], vec![53]]);
        for group in parts {
            let slice: Vec<Port> = group.slice_ports().cloned().collect();
            let slice = ports(
                &slice
                    .iter()
                    .map(|p| (p.number.into(), p.protocol, p.name.as_ref().map_or("", |name| name.as_str())))
                    .collect::<Vec<_>>(),
            );
            assert_eq!(SliceGroup::of_slice(Family::V6, slice.clone(), Some(twice.clone())), Some(group));
            assert_eq!(SliceGroup::of_slice(Family::V6, slice, Some(plain.clone())), None, "a list that is not split");
        }
        assert_eq!(SliceGroup::of_slice(Family::V6, twice, None), None, "no slice can have these ports");
    }
}
