//! Arguments that several subcommands share, and what their texts mean.

use super::failure::{Exit, Failure};
use crate::model::{PortSpec, Protocol, ServiceKey, Validator};

/// The namespace where none is given.
const DEFAULT_NAMESPACE: &str = "default";

/// Which server.
#[derive(Debug, clap::Args)]
pub(super) struct ServerArgs {
    /// The server's gRPC address
    #[arg(long, env = "GANGPLANK_SERVER", value_name = "URL", default_value = "http://127.0.0.1:9080")]
    pub(super) server: String,
}

/// Which namespace, where there is one.
#[derive(Debug, clap::Args)]
pub(super) struct NamespaceArgs {
    /// The namespace [default: default]
    #[arg(short, long, env = "GANGPLANK_NAMESPACE")]
    pub(super) namespace: Option<String>,
}

impl NamespaceArgs {
    /// The namespace of `service`: the one that it names itself, or that of `-n`.
    pub(super) fn of<'a>(&'a self, service: &'a ServiceName) -> &'a str {
        service.namespace.as_deref().unwrap_or_else(|| self.get())
    }

    pub(super) fn get(&self) -> &str {
        self.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE)
    }
}

/// Which namespaces, where all of them are one answer.
#[derive(Debug, clap::Args)]
pub(super) struct ScopeArgs {
    #[command(flatten)]
    pub(super) namespace: NamespaceArgs,
    /// All namespaces
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub(super) all_namespaces: bool,
}

impl ScopeArgs {
    /// The namespace to ask for; `None` for all.
    pub(super) fn of<'a>(&'a self, service: Option<&'a ServiceName>) -> Option<&'a str> {
        let named = service.and_then(|service| service.namespace.as_deref());
        if self.all_namespaces { named } else { named.or_else(|| Some(self.namespace.get())) }
    }
}

/// A service as it is typed: `web`, or `prod/web`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ServiceName {
    pub(super) namespace: Option<String>,
    pub(super) name: String,
}

impl std::str::FromStr for ServiceName {
    type Err = String;

    /// Splits; whether the parts can be names is the server's word.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (namespace, name) = match text.split_once('/') {
            Some((namespace, name)) => (Some(namespace.to_owned()), name.to_owned()),
            None => (None, text.to_owned()),
        };
        if name.is_empty() || name.contains('/') || namespace.as_ref().is_some_and(String::is_empty) {
            return Err("a service is written NAME or NAMESPACE/NAME".into());
        }
        Ok(Self { namespace, name })
    }
}

/// The key of a service to be read; a name that can never be registered is wrong usage.
pub(super) fn key(namespace: &str, name: &str) -> Result<ServiceKey, Failure> {
    ANY_DOOR.service(namespace, name).map_err(|err| Failure::new(Exit::Usage, err.to_string()))
}

/// A namespace to be read as a whole; one that can never hold anything is wrong usage.
pub(super) fn check_namespace(namespace: &str) -> Result<(), Failure> {
    key(namespace, "any").map(drop)
}

/// A door that lets through whatever some server might.
pub(super) const ANY_DOOR: Validator = Validator { zone_wire_len: 1, names_allowed: true };

/// One `--port`: `8080`, `http=8080`, `dns=53/udp`.
pub(super) fn port(text: &str) -> Result<PortSpec, String> {
    let (name, number) = match text.split_once('=') {
        Some((name, number)) => (name, number),
        None => ("", text),
    };
    let (number, protocol) = match number.split_once('/') {
        Some((number, protocol)) => (number, Some(protocol)),
        None => (number, None),
    };
    let usage = || "a port is written [NAME=]NUMBER[/tcp|/udp|/sctp], for example http=8080 or dns=53/udp".to_owned();
    let protocol = match protocol {
        None => Protocol::default(),
        Some(text) => {
            Protocol::ALL.into_iter().find(|protocol| protocol.as_str().eq_ignore_ascii_case(text)).ok_or_else(usage)?
        }
    };
    // Whether the number is in range is the server's word; on the wire it is an int32.
    let number = i64::from(number.parse::<i32>().map_err(|_| usage())?);
    Ok(PortSpec { number, protocol, name: name.to_owned() })
}

/// An address as it is typed, with ports or without: `10.0.0.1`, `10.0.0.1:8080,53/udp`,
/// `[2001:db8::1]:80`. It is how instances are printed, so that what was printed can be typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) address: String,
    pub(super) ports: Vec<PortSpec>,
}

impl std::str::FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (address, ports) = if let Some(rest) = text.strip_prefix('[') {
            let (address, rest) = rest.split_once(']').ok_or("there is no ']' to the '['")?;
            (address, rest.strip_prefix(':').or_else(|| rest.is_empty().then_some("")).ok_or("a ':' follows the ']'")?)
        } else {
            match text.split_once(':') {
                // More than one colon without brackets: an IPv6 address.
                Some((_, rest)) if rest.contains(':') => (text, ""),
                Some((address, ports)) => (address, ports),
                None => (text, ""),
            }
        };
        let ports = ports.split(',').filter(|one| !one.is_empty()).map(port).collect::<Result<_, _>>()?;
        Ok(Self { address: address.to_owned(), ports })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{InstanceId, PortSet};

    fn spec(name: &str, number: i64, protocol: Protocol) -> PortSpec {
        PortSpec { number, protocol, name: name.into() }
    }

    #[test]
    fn ports_are_read() {
        assert_eq!(port("8080"), Ok(spec("", 8080, Protocol::Tcp)));
        assert_eq!(port("http=8080"), Ok(spec("http", 8080, Protocol::Tcp)));
        assert_eq!(port("dns=53/udp"), Ok(spec("dns", 53, Protocol::Udp)));
        assert_eq!(port("5060/SCTP"), Ok(spec("", 5060, Protocol::Sctp)));
        assert_eq!(port("70000"), Ok(spec("", 70_000, Protocol::Tcp)), "the server refuses it, with its reason");
        for bad in ["", "http", "http=", "=", "80/", "80/icmp", "8080=http", "3000000000", "80 "] {
            assert!(port(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_printed_of_an_instance_can_be_typed() {
        for text in [
            "10.0.0.1",
            "10.0.0.1:8080",
            "10.0.0.1:8080,53/UDP",
            "[2001:db8::1]:80",
            "2001:db8::1",
            "db.example.com:5432",
        ] {
            let place: Place = text.parse().expect(text);
            let address = ANY_DOOR.address(&place.address).expect(text);
            let ports = place.ports.iter().map(|port| (port.protocol, u16::try_from(port.number).expect(text)));
            let ports = PortSet::new(ports.collect());
            assert_eq!(InstanceId { address, ports }.to_string(), text);
        }
        for bad in ["[::1", "[::1]80", "10.0.0.1:http"] {
            assert!(bad.parse::<Place>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_service_may_name_its_namespace() {
        let args = NamespaceArgs { namespace: Some("test".into()) };
        assert_eq!(args.of(&"prod/web".parse().expect("valid")), "prod");
        assert_eq!(args.of(&"web".parse().expect("valid")), "test");
        assert_eq!(NamespaceArgs { namespace: None }.of(&"web".parse().expect("valid")), "default");
        for bad in ["", "/", "prod/", "/web", "a/b/c"] {
            assert!(bad.parse::<ServiceName>().is_err(), "{bad:?}");
        }
    }
}
