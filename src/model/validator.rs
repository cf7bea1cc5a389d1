//! What this server admits: policy, on top of the invariants. For registrations only.
//!
//! A rule here may become stricter from one version to the next: what is stored already is read
//! back by the invariants alone, stays registered, and is served as far as DNS can carry it.

use super::{
    address::{Address, parse_dashed_label},
    instance::{Instance, UnixMillis},
    invariants::{Field, InstanceSpec, InvalidInstance, parse_address, parse_service},
    name::{MAX_LABEL, MAX_WIRE_NAME, ServiceKey},
    port::PortSpec,
};

/// Most bytes of one instance, counted as protobuf would encode it. Bounds the memory of a million
/// instances, and keeps a slice below the size limit of an object in Kubernetes.
pub const MAX_INSTANCE_BYTES: usize = 2048;

/// Most characters of a port name: its SRV name is `_name`, one label (RFC 2782).
const MAX_PORT_NAME: usize = MAX_LABEL - 1;

/// What a registration must satisfy beyond the invariants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validator {
    /// Octets of the zone's name in a message: what is left of 255 is for the service.
    pub zone_wire_len: usize,
    /// Whether the address of an instance may be a DNS name: the server looks names up.
    pub names_allowed: bool,
}

impl Validator {
    /// Takes the two names of a service.
    ///
    /// # Errors
    /// The invalid field.
    pub fn service(&self, namespace: &str, name: &str) -> Result<ServiceKey, InvalidInstance> {
        let key = parse_service(namespace, name)?;
        // The mirror could not create its Service: the API server refuses such a name before Kubernetes 1.36.
        if key.name().starts_with(|c: char| c.is_ascii_digit()) {
            let reason = "must begin with a letter (RFC 1035 §2.3.1), as Kubernetes wants of a Service";
            return Err(InvalidInstance::name(Field::ServiceName, &reason, name));
        }
        Ok(key)
    }

    /// Takes the address of an instance.
    ///
    /// # Errors
    /// When it is none, pods cannot reach it, or it is a DNS name and names are not allowed here.
    pub fn address(&self, text: &str) -> Result<Address, InvalidInstance> {
        let address = parse_address(text)?;
        self.check_address(&address)?;
        Ok(address)
    }

    fn check_address(&self, address: &Address) -> Result<(), InvalidInstance> {
        match address {
            Address::Name(_) if !self.names_allowed => Err(InvalidInstance::new(
                Field::Address,
                &format_args!(
                    "{address} is a DNS name, and this server looks none up: it has to be started with --upstream"
                ),
            )),
            Address::Name(_) => Ok(()),
            Address::Ip(ip) => Address::unreachable(*ip).map_or(Ok(()), |what| {
                Err(InvalidInstance::new(
                    Field::Address,
                    &format_args!("{address}: {what} addresses cannot be reached by pods"),
                ))
            }),
        }
    }

    fn check_ports(specs: &[PortSpec]) -> Result<(), InvalidInstance> {
        let Some(index) = specs.iter().position(|spec| spec.name.len() > MAX_PORT_NAME) else { return Ok(()) };
        let reason = format_args!(
            "must have at most {MAX_PORT_NAME} characters: DNS asks for it with a '_' before it (RFC 2782)"
        );
        Err(InvalidInstance::port_name(index, &reason, &specs[index].name))
    }

    /// Takes a whole instance of `service`.
    ///
    /// # Errors
    /// The first invalid field; nothing is corrected silently.
    pub fn instance(
        &self,
        service: &ServiceKey,
        spec: &InstanceSpec,
        registered: UnixMillis,
    ) -> Result<Instance, InvalidInstance> {
        let instance = spec.to_instance(registered)?;
        self.check_address(&instance.address)?;
        Self::check_ports(&spec.ports)?;
        // Otherwise a question for the dashed name of one address would be answered with another.
        if let Some(spelled) =
            instance.host_name.as_ref().and_then(|label| parse_dashed_label(label.as_str().as_bytes()))
            && instance.address.ip() != Some(spelled)
        {
            return Err(InvalidInstance::new(
                Field::HostName,
                &format_args!("{:?} spells the address {spelled}, which is not this instance's", spec.host_name),
            ));
        }
        self.check_sizes(service, &instance)?;
        Ok(instance)
    }

    /// Every name of the instance must fit a message, and its encoding [`MAX_INSTANCE_BYTES`].
    fn check_sizes(&self, service: &ServiceKey, instance: &Instance) -> Result<(), InvalidInstance> {
        // `_name._proto.` is the longest prefix of a port, `label.` that of a host.
        let port = instance
            .ports
            .as_slice()
            .iter()
            // 2: the underscore and the length octet of the name. 1: the length octet of the protocol, which has its
            // underscore.
            .filter_map(|port| Some(port.name.as_ref()?.as_str().len() + 2 + port.protocol.srv_label().len() + 1));
        // A dashed IPv6 label takes at most 39 octets.
        let host = instance.host_name.as_ref().map_or(39, |label| label.as_str().len()) + 1;
        let longest = port.max().unwrap_or(0).max(host);
        // `svc` and its length octet are between namespace and zone.
        // The dot in the service's text counts as one of its two length octets, the 1 is the other.
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
                &format_args!("carries {carried} bytes, {MAX_INSTANCE_BYTES} are allowed"),
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
    fn valid_instance_is_admitted() {
        let instance = VALIDATOR.instance(&service(), &spec(), UnixMillis(7)).expect("valid");
        assert_eq!(instance.id().to_string(), "10.0.0.1:8080");
        assert!(instance.ready());
        assert_eq!(instance.weight().units(), 65_536);
    }

    #[test]
    fn refusals_name_the_field() {
        for (bad, expected) in [
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
            (
                InstanceSpec {
                    ports: vec![PortSpec { number: 1, name: "p".repeat(63), ..PortSpec::default() }],
                    ..spec()
                },
                "ports[0]: name: must have at most 62 characters",
            ),
        ] {
            let err = refused(&bad);
            assert!(err.starts_with(expected), "{err:?} should begin with {expected:?}");
        }
        assert!(
            VALIDATOR
                .instance(&service(), &InstanceSpec { host_name: "10-0-0-1".into(), ..spec() }, UnixMillis(0))
                .is_ok()
        );
    }

    #[test]
    fn names_and_sizes_beyond_the_limits_are_refused() {
        let ports = (1..200).map(|n| PortSpec { number: n, name: format!("p{n}"), ..PortSpec::default() });
        let err = refused(&InstanceSpec { ports: ports.collect(), ..spec() });
        assert!(err.starts_with("instance: carries"), "{err}");

        let narrow = Validator { zone_wire_len: 200, ..VALIDATOR };
        let long = InstanceSpec { host_name: "h".repeat(60), ..spec() };
        let err = narrow.instance(&service(), &long, UnixMillis(0)).expect_err("too long").to_string();
        assert!(err.contains("255 are allowed"), "{err}");
    }
}
