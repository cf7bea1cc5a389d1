//! The door: what a client wrote, and whether it can stand.

use std::fmt;

use super::{
    address::{Address, AddressError, parse_dashed_label},
    instance::{Instance, UnixMillis, Weight},
    name::{DnsName, Label, MAX_WIRE_NAME, NameError, Namespace, ServiceKey, ServiceName},
    port::{PortError, PortSpec, Ports},
};

/// Most octets that what one instance carries may take, counted as protobuf would encode it.
/// It keeps a million instances within memory, and a slice within what Kubernetes stores.
pub const MAX_INSTANCE_BYTES: usize = 2048;

/// The field of a registration that cannot stand, named as the wire contract names it.
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

/// Which field of a registration cannot stand, and why.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct InvalidInstance {
    /// The field.
    pub field: Field,
    /// Why, and where it helps what was given.
    pub reason: String,
}

impl InvalidInstance {
    /// Longest part of a bad value that a message repeats, in characters.
    const SHOWN: usize = 80;

    fn new(field: Field, reason: &dyn fmt::Display) -> Self {
        Self { field, reason: reason.to_string() }
    }

    fn text(field: Field, err: NameError, given: &str) -> Self {
        let shown: String = given.chars().take(Self::SHOWN).collect();
        let rest = if shown.len() < given.len() { "…" } else { "" };
        Self { field, reason: format!("{err}, got {shown:?}{rest}") }
    }
}

/// An instance as a client wrote it, before it is checked. Texts are empty where nothing was said.
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

/// What the door measures a registration against, beyond the types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validator {
    /// Octets of the zone's name in a message: what is left of 255 is for the service.
    pub zone_wire_len: usize,
    /// Whether an instance may be a DNS name, which needs somebody to look it up.
    pub names_allowed: bool,
}

impl Validator {
    /// Takes the two names of a service.
    ///
    /// # Errors
    /// The field that cannot stand.
    pub fn service(&self, namespace: &str, name: &str) -> Result<ServiceKey, InvalidInstance> {
        let ns = Namespace::parse(namespace).map_err(|err| InvalidInstance::text(Field::Namespace, err, namespace))?;
        let name = ServiceName::parse(name).map_err(|err| InvalidInstance::text(Field::ServiceName, err, name))?;
        Ok(ServiceKey::new(ns, name))
    }

    /// Takes the address of an instance.
    ///
    /// # Errors
    /// When it is none, or a DNS name and names are not allowed here.
    pub fn address(&self, text: &str) -> Result<Address, InvalidInstance> {
        let address = Address::parse(text).map_err(|err| match err {
            AddressError::NotAName(_) => {
                let shown: String = text.chars().take(InvalidInstance::SHOWN).collect();
                InvalidInstance { field: Field::Address, reason: format!("{err}, got {shown:?}") }
            }
            AddressError::Empty => InvalidInstance::new(Field::Address, &err),
            _ => InvalidInstance { field: Field::Address, reason: format!("{text}: {err}") },
        })?;
        if matches!(address, Address::Name(_)) && !self.names_allowed {
            return Err(InvalidInstance::new(
                Field::Address,
                &format_args!(
                    "{address} is a DNS name, and this server looks none up: that needs --upstream, which is not there yet"
                ),
            ));
        }
        Ok(address)
    }

    /// Takes the ports of an instance.
    ///
    /// # Errors
    /// The first port that cannot stand.
    pub fn ports(&self, specs: &[PortSpec]) -> Result<Ports, InvalidInstance> {
        Ports::parse(specs).map_err(|(index, err)| match err {
            PortError::Name(name) => {
                let InvalidInstance { field, reason } =
                    InvalidInstance::text(Field::Port(index), name, &specs[index].name);
                InvalidInstance { field, reason: format!("name: {reason}") }
            }
            err => InvalidInstance::new(Field::Port(index), &err),
        })
    }

    /// Takes a whole instance of `service`.
    ///
    /// # Errors
    /// The first field that cannot stand; nothing is corrected silently.
    pub fn instance(
        &self,
        service: &ServiceKey,
        spec: &InstanceSpec,
        registered: UnixMillis,
    ) -> Result<Instance, InvalidInstance> {
        let address = self.address(&spec.address)?;
        let ports = self.ports(&spec.ports)?;
        let label = |field, text: &str| match text {
            "" => Ok(None),
            text => Label::parse(text).map(Some).map_err(|err| InvalidInstance::text(field, err, text)),
        };
        let host_name = label(Field::HostName, &spec.host_name)?;
        if let Some(spelled) = host_name.as_ref().and_then(|label| parse_dashed_label(label.as_str().as_bytes()))
            && address.ip() != Some(spelled)
        {
            return Err(InvalidInstance::new(
                Field::HostName,
                &format_args!("{:?} spells the address {spelled}, which is not this instance's", spec.host_name),
            ));
        }
        let node_name = match spec.node_name.as_str() {
            "" => None,
            text => Some(DnsName::parse(text).map_err(|err| InvalidInstance::text(Field::NodeName, err, text))?),
        };
        let weight = spec.weight.map_or_else(|| Ok(Weight::default()), Weight::new);
        let weight = weight.map_err(|err| InvalidInstance::new(Field::Weight, &err))?;
        let instance =
            Instance { address, ports, host_name, node_name, weight, priority: spec.priority, ready: true, registered };
        self.check_sizes(service, &instance)?;
        Ok(instance)
    }

    /// Every name that the instance would give must fit a message, and the whole must be small.
    fn check_sizes(&self, service: &ServiceKey, instance: &Instance) -> Result<(), InvalidInstance> {
        // `_name._proto.` is the longest prefix of a port, `label.` that of a host.
        let port = instance
            .ports
            .as_slice()
            .iter()
            .filter_map(|port| Some(port.name.as_ref()?.as_str().len() + 2 + port.protocol.srv_label().len() + 1));
        // A dashed IPv6 label takes at most 39 octets.
        let host = instance.host_name.as_ref().map_or(39, |label| label.as_str().len()) + 1;
        let longest = port.max().unwrap_or(0).max(host);
        // `svc` and its length octet stand between namespace and zone.
        let octets = longest + service.as_str().len() + 1 + "svc".len() + 1 + self.zone_wire_len;
        if octets > MAX_WIRE_NAME {
            return Err(InvalidInstance::new(
                Field::Instance,
                &format_args!(
                    "its longest name would take {octets} octets with the zone, 255 are allowed (RFC 1035 §2.3.4)"
                ),
            ));
        }
        let carried = instance.encoded_size();
        if carried > MAX_INSTANCE_BYTES {
            return Err(InvalidInstance::new(
                Field::Instance,
                &format_args!("carries {carried} octets, {MAX_INSTANCE_BYTES} are allowed"),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALIDATOR: Validator = Validator { zone_wire_len: 15, names_allowed: false };

    fn service() -> ServiceKey {
        VALIDATOR.service("prod", "web").expect("valid")
    }

    fn spec() -> InstanceSpec {
        InstanceSpec {
            address: "10.0.0.1".into(),
            ports: vec![PortSpec { number: 8080, name: "http".into(), ..PortSpec::default() }],
            ..InstanceSpec::default()
        }
    }

    fn refused(spec: &InstanceSpec) -> String {
        VALIDATOR.instance(&service(), spec, UnixMillis(0)).expect_err("must be refused").to_string()
    }

    #[test]
    fn a_good_one_passes_and_shows_itself() {
        let instance = VALIDATOR.instance(&service(), &spec(), UnixMillis(7)).expect("valid");
        assert_eq!(instance.id().to_string(), "10.0.0.1:8080");
        assert!(instance.ready());
        assert_eq!(instance.weight().units(), 65_536);
    }

    #[test]
    fn each_refusal_names_its_field() {
        for (bad, says) in [
            (InstanceSpec { address: "10.0.0".into(), ..spec() }, "ipaddress: neither"),
            (InstanceSpec { address: "127.0.0.1".into(), ..spec() }, "ipaddress: 127.0.0.1: loopback"),
            (
                InstanceSpec { address: "db.example.com".into(), ..spec() },
                "ipaddress: db.example.com is a DNS name, and",
            ),
            (InstanceSpec { host_name: "a.b".into(), ..spec() }, "host_name: must be one label"),
            (
                InstanceSpec { host_name: "10-0-0-9".into(), ..spec() },
                "host_name: \"10-0-0-9\" spells the address 10.0.0.9",
            ),
            (InstanceSpec { node_name: "Node".into(), ..spec() }, "node_name: must consist of"),
            (InstanceSpec { weight: Some(f32::NAN), ..spec() }, "weight: must be a finite number in 0..=655, got NaN"),
            (InstanceSpec { weight: Some(655.5), ..spec() }, "weight: must be"),
            (InstanceSpec { weight: Some(-1.0), ..spec() }, "weight: must be"),
            (
                InstanceSpec { ports: vec![PortSpec { number: 0, ..PortSpec::default() }], ..spec() },
                "ports[0]: must be 1..=65535, got 0",
            ),
            (
                InstanceSpec { ports: vec![PortSpec { number: 1, name: "A".into(), ..PortSpec::default() }], ..spec() },
                "ports[0]: name: must consist of",
            ),
        ] {
            let said = refused(&bad);
            assert!(said.starts_with(says), "{said:?} should begin with {says:?}");
        }
        assert!(
            VALIDATOR
                .instance(&service(), &InstanceSpec { host_name: "10-0-0-1".into(), ..spec() }, UnixMillis(0))
                .is_ok()
        );
    }

    #[test]
    fn what_does_not_fit_a_message_is_refused() {
        let ports = (1..200).map(|n| PortSpec { number: n, name: format!("p{n}"), ..PortSpec::default() });
        let said = refused(&InstanceSpec { ports: ports.collect(), ..spec() });
        assert!(said.starts_with("instance: carries"), "{said}");

        let narrow = Validator { zone_wire_len: 200, ..VALIDATOR };
        let long = InstanceSpec { host_name: "h".repeat(60), ..spec() };
        let said = narrow.instance(&service(), &long, UnixMillis(0)).expect_err("too long").to_string();
        assert!(said.contains("255 are allowed"), "{said}");
    }
}
