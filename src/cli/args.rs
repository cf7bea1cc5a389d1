//! Arguments that several subcommands share, and how their texts are parsed.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use super::{
    error::{CommandError, ErrorKind},
    joined::ConfigDirArgs,
};
use crate::{
    grpc::client::{ClientTls, ClientTlsFiles, Servers},
    model::{PortSpec, Protocol, ServiceKey, Validator},
};

/// The server without `--server`, on a machine that did not join.
const DEFAULT_SERVER: &str = "http://127.0.0.1:9080";

/// The namespace without `-n` and `GANGPLANK_NAMESPACE`.
const DEFAULT_NAMESPACE: &str = "default";

/// Longest `--timeout`, so that a deadline never overflows the clock.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

/// `--server`.
#[derive(Debug, clap::Args)]
pub(super) struct ServerArgs {
    /// The server's gRPC address; repeatable, or with commas, for several replicas, which are asked
    /// in this order until one takes the call [default: the one that `gangplank join` joined, else
    /// http://127.0.0.1:9080]
    #[arg(long, env = "GANGPLANK_SERVER", value_name = "URL", value_delimiter = ',')]
    server: Vec<String>,

    /// The CAs of a server with an https URL, in PEM
    #[arg(long, env = "GANGPLANK_CACERT", value_name = "FILE")]
    cacert: Option<PathBuf>,

    /// The client certificate to show, in PEM
    #[arg(long, env = "GANGPLANK_CERT", value_name = "FILE")]
    cert: Option<PathBuf>,

    /// The key of --cert, in PEM
    #[arg(long, env = "GANGPLANK_KEY", value_name = "FILE")]
    key: Option<PathBuf>,

    /// A token to show with each call, over https or to this machine, such as one of a Kubernetes ServiceAccount for the
    /// audience gangplank. Read again for each call
    #[arg(long, env = "GANGPLANK_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,

    #[command(flatten)]
    config_dir: ConfigDirArgs,
}

/// The servers to ask, and the defaults of a machine that joined.
#[derive(Debug)]
pub(super) struct ServerConnection {
    pub(super) servers: Servers,
    namespace: Option<String>,
}

impl ServerConnection {
    /// The namespace that this machine joined for, if it asks the server that it joined.
    pub(super) fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }
}

impl ServerArgs {
    /// When the certificate of this machine ends, if it joined; also of one that can no longer be renewed.
    pub(super) fn machine_expires(&self) -> Option<SystemTime> {
        self.config_dir.load().ok().flatten().map(|machine| machine.expires())
    }

    /// The servers, for commands that read.
    pub(super) async fn readers(self) -> Result<ServerConnection, CommandError> {
        self.connection(Duration::ZERO).await
    }

    async fn connection(self, patience: Duration) -> Result<ServerConnection, CommandError> {
        let Self { server, cacert, cert, key, token_file, config_dir } = self;
        // Half of each would be a certificate of one CA shown to a server of another.
        let explicit = cacert.is_some() || cert.is_some() || key.is_some() || token_file.is_some();
        // What joined is a whole: where the server is, whom to trust, what to show.
        // A plaintext server is none that was joined: the certificate is not shown to it, nor renewed for it.
        let secure = server.is_empty() || server.iter().any(|url| url.starts_with("https:"));
        let joined = if secure && !explicit { config_dir.load_renewed().await? } else { None };
        let Some(machine) = joined else {
            let server = if server.is_empty() { vec![DEFAULT_SERVER.to_owned()] } else { server };
            let tls = ClientTls::load(&ClientTlsFiles { ca: cacert, cert, key, token: token_file })?;
            return Ok(ServerConnection { servers: Servers::new(server, tls, patience), namespace: None });
        };
        let namespace = machine.namespace().map(str::to_owned);
        let server = if server.is_empty() { machine.servers().to_vec() } else { server };
        Ok(ServerConnection { servers: Servers::new(server, machine.tls(), patience), namespace })
    }
}

/// `--server`, for commands that only the replica which writes takes.
#[derive(Debug, clap::Args)]
pub(super) struct WriterArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// How long to look for the replica that writes, while others are on standby
    #[arg(long, env = "GANGPLANK_TIMEOUT", value_name = "TIME", default_value = "30s", value_parser = patience)]
    timeout: Duration,
}

impl WriterArgs {
    pub(super) async fn connection(self) -> Result<ServerConnection, CommandError> {
        self.server.connection(self.timeout).await
    }
}

fn patience(text: &str) -> Result<Duration, String> {
    let parsed = humantime::parse_duration(text).map_err(|err| err.to_string())?;
    if parsed > MAX_TIMEOUT { Err("must be at most 1 day".into()) } else { Ok(parsed) }
}

/// `-n`, for commands about one namespace.
#[derive(Debug, clap::Args)]
pub(super) struct NamespaceArgs {
    /// The namespace [default: the one that this machine joined for, else default]
    #[arg(short, long, env = "GANGPLANK_NAMESPACE")]
    pub(super) namespace: Option<String>,
}

impl NamespaceArgs {
    /// The namespace of `service`: that of `NAMESPACE/NAME`, or that of `-n`, or the one that was joined for.
    pub(super) fn of<'a>(&'a self, service: &'a ServiceArg, joined: Option<&'a str>) -> &'a str {
        service.namespace.as_deref().unwrap_or_else(|| self.get(joined))
    }

    pub(super) fn get<'a>(&'a self, joined: Option<&'a str>) -> &'a str {
        self.namespace.as_deref().or(joined).unwrap_or(DEFAULT_NAMESPACE)
    }
}

/// `-n` or `-A`, for commands about one namespace or all.
#[derive(Debug, clap::Args)]
pub(super) struct ScopeArgs {
    #[command(flatten)]
    pub(super) namespace: NamespaceArgs,
    /// All namespaces
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub(super) all_namespaces: bool,
}

impl ScopeArgs {
    /// The namespace to ask the server for; `None` for all.
    pub(super) fn of<'a>(&'a self, service: Option<&'a ServiceArg>, joined: Option<&'a str>) -> Option<&'a str> {
        let named = service.and_then(|service| service.namespace.as_deref());
        if self.all_namespaces { named } else { named.or_else(|| Some(self.namespace.get(joined))) }
    }
}

/// A service as a person types it: `web`, or `prod/web`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ServiceArg {
    pub(super) namespace: Option<String>,
    pub(super) name: String,
}

impl std::str::FromStr for ServiceArg {
    type Err = String;

    /// Splits the text. The server checks whether the parts are valid names.
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

/// The key of a service to read. A name that no server accepts is a usage error.
pub(super) fn key(namespace: &str, name: &str) -> Result<ServiceKey, CommandError> {
    PERMISSIVE_VALIDATOR.service(namespace, name).map_err(|err| CommandError::new(ErrorKind::Usage, err.to_string()))
}

/// Checks a namespace to read. A name that no server accepts is a usage error.
pub(super) fn check_namespace(namespace: &str) -> Result<(), CommandError> {
    key(namespace, "any").map(drop)
}

/// Accepts whatever some server might accept: the client does not know the server's `--zone`.
pub(super) const PERMISSIVE_VALIDATOR: Validator = Validator { zone_wire_len: 1, names_allowed: true };

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
    // The server checks the range; on the wire the number is an int32.
    let number = i64::from(number.parse::<i32>().map_err(|_| usage())?);
    Ok(PortSpec { number, protocol, name: name.to_owned() })
}

/// An address with ports or without: `10.0.0.1`, `10.0.0.1:8080,53/udp`, `[2001:db8::1]:80`.
/// Instances are printed in the same form, so that a printed instance can be pasted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AddressArg {
    pub(super) address: String,
    pub(super) ports: Vec<PortSpec>,
}

impl std::str::FromStr for AddressArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (address, ports) = if let Some(rest) = text.strip_prefix('[') {
            let (address, rest) = rest.split_once(']').ok_or("the '[' has no ']'")?;
            (
                address,
                rest.strip_prefix(':').or_else(|| rest.is_empty().then_some("")).ok_or("expected ':' after the ']'")?,
            )
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
    fn ports_are_parsed() {
        assert_eq!(port("8080"), Ok(spec("", 8080, Protocol::Tcp)));
        assert_eq!(port("http=8080"), Ok(spec("http", 8080, Protocol::Tcp)));
        assert_eq!(port("dns=53/udp"), Ok(spec("dns", 53, Protocol::Udp)));
        assert_eq!(port("5060/SCTP"), Ok(spec("", 5060, Protocol::Sctp)));
        assert_eq!(port("70000"), Ok(spec("", 70_000, Protocol::Tcp)), "the server refuses it and says why");
        for bad in ["", "http", "http=", "=", "80/", "80/icmp", "8080=http", "3000000000", "80 "] {
            assert!(port(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn printed_instances_parse() {
        for text in [
            "10.0.0.1",
            "10.0.0.1:8080",
            "10.0.0.1:8080,53/UDP",
            "[2001:db8::1]:80",
            "2001:db8::1",
            "db.example.com:5432",
        ] {
            let arg: AddressArg = text.parse().expect(text);
            let address = PERMISSIVE_VALIDATOR.address(&arg.address).expect(text);
            let ports = arg.ports.iter().map(|port| (port.protocol, u16::try_from(port.number).expect(text)));
            let ports = PortSet::new(ports.collect());
            assert_eq!(InstanceId { address, ports }.to_string(), text);
        }
        for bad in ["[::1", "[::1]80", "10.0.0.1:http"] {
            assert!(bad.parse::<AddressArg>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn namespace_of_the_service_name_wins() {
        let args = NamespaceArgs { namespace: Some("test".into()) };
        let (joined, none) = (Some("joined"), NamespaceArgs { namespace: None });
        assert_eq!(args.of(&"prod/web".parse().expect("valid"), joined), "prod");
        assert_eq!(args.of(&"web".parse().expect("valid"), joined), "test");
        assert_eq!(none.of(&"web".parse().expect("valid"), joined), "joined");
        assert_eq!(none.of(&"web".parse().expect("valid"), None), "default");
        for bad in ["", "/", "prod/", "/web", "a/b/c"] {
            assert!(bad.parse::<ServiceArg>().is_err(), "{bad:?}");
        }
    }
}
