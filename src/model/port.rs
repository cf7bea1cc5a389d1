//! Ports: number, transport protocol, name.

use std::fmt;

use super::name::{Label, NameError};

/// Transport protocol of a port; TCP by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Protocol {
    /// `_tcp`
    #[default]
    Tcp,
    /// `_udp`
    Udp,
    /// `_sctp`
    Sctp,
}

impl Protocol {
    /// Every protocol.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// As Kubernetes writes it: `TCP`, `UDP`, `SCTP`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }

    /// The label of SRV names (RFC 2782): `_tcp`, `_udp`, `_sctp`.
    #[must_use]
    pub fn srv_label(self) -> &'static str {
        match self {
            Self::Tcp => "_tcp",
            Self::Udp => "_udp",
            Self::Sctp => "_sctp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a list of ports is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// Not 1..=65535.
    #[error("must be 1..=65535, got {0}")]
    Number(i64),
    /// The name is not a label.
    #[error("{0}")]
    Name(NameError),
    /// The same number and protocol twice.
    #[error("{number}/{protocol} is given twice")]
    Twice {
        /// The number.
        number: u16,
        /// The protocol.
        protocol: Protocol,
    },
    /// The same name twice with one protocol: an SRV name would mean two ports.
    #[error("the name {name:?} is given twice for {protocol}")]
    NameTwice {
        /// The name.
        name: Label,
        /// The protocol.
        protocol: Protocol,
    },
    /// More than one port without a name, which Kubernetes refuses.
    #[error("only one port may have no name")]
    TwoUnnamed,
}

/// One port of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// 1..=65535.
    pub number: u16,
    /// Its transport protocol.
    pub protocol: Protocol,
    /// With a name it has an SRV record.
    pub name: Option<Label>,
}

impl Port {
    /// What identifies the port within its instance.
    fn id(&self) -> (Protocol, u16) {
        (self.protocol, self.number)
    }
}

/// `8080/TCP`, or `8080/TCP(http)`.
impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number, self.protocol)?;
        self.name.as_ref().map_or(Ok(()), |name| write!(f, "({name})"))
    }
}

/// A port as a client wrote it, before it is checked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PortSpec {
    /// Should be 1..=65535.
    pub number: i64,
    /// Its transport protocol.
    pub protocol: Protocol,
    /// A label, or empty.
    pub name: String,
}

/// The ports of one instance, in order of protocol and number; each pair once, names unique
/// within a protocol, at most one port without a name. May be empty.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ports(Box<[Port]>);

impl Ports {
    /// Checks and orders `specs`.
    ///
    /// # Errors
    /// The index of the first invalid port, and why.
    pub fn parse(specs: &[PortSpec]) -> Result<Self, (usize, PortError)> {
        let mut ports: Vec<Port> = Vec::with_capacity(specs.len());
        for (index, spec) in specs.iter().enumerate() {
            let port = Port {
                number: port_number(spec.number).map_err(|err| (index, err))?,
                protocol: spec.protocol,
                name: match spec.name.as_str() {
                    "" => None,
                    name => Some(Label::parse(name).map_err(|err| (index, PortError::Name(err)))?),
                },
            };
            // Quadratic, which the limit on ports in one message bounds.
            if let Some(err) = ports.iter().find_map(|earlier| clash(earlier, &port)) {
                return Err((index, err));
            }
            ports.push(port);
        }
        // In one order, so that a client that lists the same ports in another registers the same instance.
        ports.sort_unstable_by_key(Port::id);
        Ok(Self(ports.into()))
    }

    /// The ports, in order of protocol and number.
    #[must_use]
    pub fn as_slice(&self) -> &[Port] {
        &self.0
    }

    /// Their identity: protocols and numbers without names.
    #[must_use]
    pub fn set(&self) -> PortSet {
        PortSet(self.0.iter().map(Port::id).collect())
    }

    /// The same identity without an allocation, for comparing.
    pub fn ids(&self) -> impl Iterator<Item = (Protocol, u16)> {
        self.0.iter().map(Port::id)
    }
}

/// A number that a client wrote, as a port number.
///
/// # Errors
/// When it is not 1..=65535.
fn port_number(number: i64) -> Result<u16, PortError> {
    match u16::try_from(number) {
        Ok(0) | Err(_) => Err(PortError::Number(number)),
        Ok(number) => Ok(number),
    }
}

/// Why two ports cannot belong to one instance.
fn clash(a: &Port, b: &Port) -> Option<PortError> {
    if a.id() == b.id() {
        return Some(PortError::Twice { number: b.number, protocol: b.protocol });
    }
    match (&a.name, &b.name) {
        (None, None) => Some(PortError::TwoUnnamed),
        (Some(x), Some(y)) if x == y && a.protocol == b.protocol => {
            Some(PortError::NameTwice { name: y.clone(), protocol: b.protocol })
        }
        _ => None,
    }
}

/// No port has the number 0.
pub(super) const EVERY_PORT: [(Protocol, u16); 1] = [(Protocol::Tcp, 0)];

/// The part of an instance's ports that identifies it: protocols and numbers, in order.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct PortSet(Box<[(Protocol, u16)]>);

impl PortSet {
    /// The pairs, in any order and with repetitions, as a set.
    #[must_use]
    pub fn new(mut pairs: Vec<(Protocol, u16)>) -> Self {
        pairs.sort_unstable();
        pairs.dedup();
        Self(pairs.into())
    }

    /// In an id of a removal: every set of ports, also the empty one. No instance has it.
    #[must_use]
    pub fn every() -> Self {
        Self(Box::new(EVERY_PORT))
    }

    /// Whether it is [`PortSet::every`].
    #[must_use]
    pub fn is_every(&self) -> bool {
        *self.0 == EVERY_PORT
    }

    /// The pairs in order.
    #[must_use]
    pub fn as_slice(&self) -> &[(Protocol, u16)] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(number: i64, name: &str) -> PortSpec {
        PortSpec { number, name: name.into(), ..PortSpec::default() }
    }

    #[test]
    fn ports_are_sorted_by_protocol_and_number() {
        let udp = PortSpec { protocol: Protocol::Udp, ..spec(53, "dns") };
        let ports = Ports::parse(&[udp, spec(8080, "http"), spec(53, "dns")]).expect("valid");
        let shown: Vec<String> = ports.as_slice().iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["53/TCP(dns)", "8080/TCP(http)", "53/UDP(dns)"]);
    }

    #[test]
    fn invalid_ports_are_named_with_their_index() {
        let tcp = Protocol::Tcp;
        for (specs, at, err) in [
            (vec![spec(0, "")], 0, PortError::Number(0)),
            (vec![spec(65_536, "")], 0, PortError::Number(65_536)),
            (vec![spec(-1, "")], 0, PortError::Number(-1)),
            (vec![spec(1, "a"), spec(1, "b")], 1, PortError::Twice { number: 1, protocol: tcp }),
            (vec![spec(1, ""), spec(2, "")], 1, PortError::TwoUnnamed),
            (
                vec![spec(1, "a"), spec(2, "a")],
                1,
                PortError::NameTwice { name: Label::parse("a").expect("a label"), protocol: tcp },
            ),
            (vec![spec(1, "A")], 0, PortError::Name(NameError::Character('A'))),
        ] {
            assert_eq!(Ports::parse(&specs), Err((at, err)));
        }
    }
}
