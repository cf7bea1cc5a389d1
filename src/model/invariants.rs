//! What can never be: the checks that make an instance out of text, wherever the text comes from.
//!
//! They hold for a registration, and for what is read back from the journal and from EndpointSlices.
//! What this server admits beyond them is policy, and is the [`Validator`]'s. A rule goes here only if
//! a value that breaks it has no meaning: whatever was stored once must stay readable.
//!
//! [`Validator`]: super::Validator

use std::fmt;

use super::{
    address::{Address, AddressError},
    instance::{Instance, UnixMillis, Weight},
    name::{DnsName, Label, NameError, Namespace, ServiceKey, ServiceName},
    port::{PortError, PortSpec, Ports},
    stamp::Stamp,
};

/// The invalid field of a registration, named as the wire contract names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// `namespace`
    Namespace,
    /// `service_name`
    ServiceName,
    /// `host_name`
    HostName,
    /// `ipaddress`
    Address,
    /// `node_name`
    NodeName,
    /// `ports[i]`
    Port(usize),
    /// `weight`
    Weight,
    /// The message as a whole.
    Instance,
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Namespace => f.write_str("namespace"),
            Self::ServiceName => f.write_str("service_name"),
            Self::HostName => f.write_str("host_name"),
            Self::Address => f.write_str("ipaddress"),
            Self::NodeName => f.write_str("node_name"),
            Self::Port(index) => write!(f, "ports[{index}]"),
            Self::Weight => f.write_str("weight"),
            Self::Instance => f.write_str("instance"),
        }
    }
}

/// Which field of a registration is invalid, and why.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct InvalidInstance {
    /// Which one; a message begins with its name in the wire contract.
    pub field: Field,
    /// Why, and where it helps the value.
    pub reason: String,
}

impl InvalidInstance {
    /// Longest part of an invalid value that a message repeats, in characters.
    const MAX_SHOWN: usize = 80;

    pub(super) fn new(field: Field, reason: &dyn fmt::Display) -> Self {
        Self { field, reason: reason.to_string() }
    }

    /// An invalid name, with the value as far as a message repeats it.
    pub(super) fn name(field: Field, err: &dyn fmt::Display, value: &str) -> Self {
        let shown: String = value.chars().take(Self::MAX_SHOWN).collect();
        let rest = if shown.len() < value.len() { "…" } else { "" };
        Self { field, reason: format!("{err}, got {shown:?}{rest}") }
    }

    /// The invalid name of the port at `index`.
    pub(super) fn port_name(index: usize, err: &dyn fmt::Display, value: &str) -> Self {
        let Self { field, reason } = Self::name(Field::Port(index), err, value);
        Self { field, reason: format!("name: {reason}") }
    }
}

/// An instance as a client sent it, before it is checked. Missing texts are empty.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct InstanceSpec {
    /// An IP address or a DNS name.
    pub address: String,
    /// The ports.
    pub ports: Vec<PortSpec>,
    /// One label, or empty.
    pub host_name: String,
    /// A DNS name, or empty.
    pub node_name: String,
    /// Absent means 1.
    pub weight: Option<f32>,
    /// SRV priority.
    pub priority: u16,
}

impl InstanceSpec {
    /// The instance that the spec describes, ready, first registered at `registered`.
    ///
    /// # Errors
    /// The first field that breaks an invariant; nothing is corrected silently.
    pub fn to_instance(&self, registered: UnixMillis) -> Result<Instance, InvalidInstance> {
        let address = parse_address(&self.address)?;
        let ports = parse_ports(&self.ports)?;
        let host_name = match self.host_name.as_str() {
            "" => None,
            text => {
                Some(Label::parse(text).map_err(|err: NameError| InvalidInstance::name(Field::HostName, &err, text))?)
            }
        };
        let node_name = match self.node_name.as_str() {
            "" => None,
            text => Some(DnsName::parse(text).map_err(|err| InvalidInstance::name(Field::NodeName, &err, text))?),
        };
        let weight = self.weight.map_or_else(|| Ok(Weight::default()), Weight::new);
        let weight = weight.map_err(|err| InvalidInstance::new(Field::Weight, &err))?;
        Ok(Instance {
            address,
            ports,
            host_name,
            node_name,
            weight,
            priority: self.priority,
            ready: true,
            registered,
            stamp: Stamp::default(),
            registrant: None,
        })
    }
}

/// The service `name` in `namespace`.
///
/// # Errors
/// The one of the two that is not a lower-case DNS label.
pub fn parse_service(namespace: &str, name: &str) -> Result<ServiceKey, InvalidInstance> {
    let namespace =
        Namespace::parse(namespace).map_err(|err| InvalidInstance::name(Field::Namespace, &err, namespace))?;
    let name = ServiceName::parse(name).map_err(|err| InvalidInstance::name(Field::ServiceName, &err, name))?;
    Ok(ServiceKey::new(namespace, name))
}

/// The address of an instance.
///
/// # Errors
/// When it is neither an IP address nor a DNS name.
pub fn parse_address(text: &str) -> Result<Address, InvalidInstance> {
    Address::parse(text).map_err(|err| match err {
        AddressError::NotAName(_) => {
            let shown: String = text.chars().take(InvalidInstance::MAX_SHOWN).collect();
            // In quotes, with escapes: the text can be anything, and messages go to logs and terminals.
            InvalidInstance { field: Field::Address, reason: format!("{err}, got {shown:?}") }
        }
        AddressError::Empty => InvalidInstance::new(Field::Address, &err),
        _ => InvalidInstance { field: Field::Address, reason: format!("{text}: {err}") },
    })
}

/// The ports of an instance.
///
/// # Errors
/// The first port that is invalid.
pub fn parse_ports(specs: &[PortSpec]) -> Result<Ports, InvalidInstance> {
    Ports::parse(specs).map_err(|(index, err)| match err {
        PortError::Name(err) => InvalidInstance::port_name(index, &err, &specs[index].name),
        err => InvalidInstance::new(Field::Port(index), &err),
    })
}
