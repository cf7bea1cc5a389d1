//! `gangplank resolve`: shows what clients get from a DNS server, and, beside it, from one that asks it in turn.

pub(super) mod compare;
mod name;
pub(super) mod query;
pub(super) mod report;

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use hickory_proto::rr::{Name, RecordType};
use tokio::time::timeout;

use super::{
    args::{NamespaceArgs, ServerArgs, port},
    error::{CommandError, ErrorKind},
    names::names_of,
    output::OutputArgs,
};
use crate::{
    grpc::client::Servers,
    model::{DnsName, NameStatus, PortSpec, Protocol, Service, ServiceKey},
};
use name::QueryTarget;
use query::QueryError;
use report::{AnsweredQuestion, ResolveReport};

pub(super) const EXAMPLES: &str = "\
Short names are completed: web, prod/web and web.prod mean
web.NAMESPACE.svc.ZONE; an IP address asks for its PTR. A service is asked for
A, AAAA and the SRV of its named ports: those of --port-name, or those that
the server at --server knows, if it runs. It says too what DNS names lead to
that are instances: addresses, TTL, age, and the error of the last lookup.

With --via, a second server is asked the same at the same time, such as the
CoreDNS of the cluster that forwards to the first. What differs is marked:
records that only one has, TTLs, response codes, and who answered, as the NSID
says; a cache in between takes it away.

Examples:
  gangplank resolve web
  gangplank resolve prod/web --port-name http --port-name dns/udp
  gangplank resolve _http._tcp.web -n prod -o wide
  gangplank resolve 10.0.0.1
  gangplank resolve web.prod.svc.cluster.local --dns 10.96.0.10:53 --type A
  gangplank resolve web --via 10.96.0.10

Exit codes: 0 there are records; 1 no answer, SERVFAIL or REFUSED, or with
--via other records or another response code; 2 wrong usage; 3 no such name,
or no such record";

/// How long to wait for what the registry knows; without it SRV records are not asked for.
const REGISTRY_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A service, a host, a whole DNS name, or an IP address
    name: String,
    /// The DNS server, ADDRESS:PORT, or ADDRESS for port 53
    #[arg(long, env = "GANGPLANK_DNS", value_name = "ADDR", default_value = "127.0.0.1:1053", value_parser = dns_server)]
    dns: SocketAddr,
    /// Ask this server as well and mark what differs: CoreDNS, which forwards to --dns
    #[arg(long, value_name = "ADDR", value_parser = dns_server)]
    via: Option<SocketAddr>,
    /// Ask for this type only; repeatable
    #[arg(long = "type", short = 't', value_name = "TYPE", value_parser = record_type)]
    types: Vec<RecordType>,
    /// Ask for the SRV of this port; repeatable
    #[arg(long = "port-name", value_name = "NAME[/PROTO]", value_parser = port_name)]
    ports: Vec<PortName>,
    /// Ask over TCP from the start
    #[arg(long)]
    tcp: bool,
    /// The cluster's zone, for short names
    #[arg(long, env = "GANGPLANK_ZONE", default_value = "cluster.local")]
    zone: String,
    #[command(flatten)]
    namespace: NamespaceArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    server: ServerArgs,
}

/// A port as an SRV owner name contains it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct PortName {
    name: String,
    protocol: Protocol,
}

pub(super) fn dns_server(text: &str) -> Result<SocketAddr, String> {
    let port_53 = || text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53));
    text.parse().or_else(|_| port_53()).map_err(|_| "a DNS server is written ADDRESS or ADDRESS:PORT".into())
}

fn record_type(text: &str) -> Result<RecordType, String> {
    text.to_ascii_uppercase().parse().map_err(|_| "not a record type such as A, AAAA, SRV, PTR, TXT, SOA".into())
}

fn port_name(text: &str) -> Result<PortName, String> {
    let (name, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let PortSpec { protocol, .. } = port(&format!("1/{protocol}")).map_err(|_| "the protocol is tcp, udp or sctp")?;
    if name.is_empty() {
        return Err("a port name is written NAME or NAME/PROTO, for example http or dns/udp".into());
    }
    Ok(PortName { name: name.to_owned(), protocol })
}

pub(super) async fn run(args: Args) -> Result<(), CommandError> {
    let Args { name, dns, via, types, ports, tcp, zone, namespace, output, server } = args;
    // DNS answers, joined or not.
    let connection = server.readers().await.ok();
    let joined = connection.as_ref().and_then(|connection| connection.namespace());
    let target = QueryTarget::complete(&name, namespace.get(joined), &zone)?;
    let Registered { ports: registered, names } = match (&target, &connection) {
        (QueryTarget::Service(_, key), Some(connection)) => registered(&connection.servers, key).await,
        _ => Registered::default(),
    };
    let ports = if types.is_empty() && ports.is_empty() { registered } else { ports };
    let mut asked = Vec::new();
    for (name, kind) in questions(&target, &types, &ports)? {
        let through = async {
            match via {
                Some(via) => Some(query::query(via, &name, kind, tcp).await),
                None => None,
            }
        };
        let (direct, via) = tokio::join!(query::query(dns, &name, kind, tcp), through);
        let reply = direct.map_err(|err| query_failed(dns, &name, kind, &err))?;
        asked.push(AnsweredQuestion { name, kind, reply, via });
    }
    let report = ResolveReport { server: dns, via, asked, names };
    report.print(output.output)?;
    report.result()
}

/// The queries: the types that were given, or those that suit the name.
fn questions(
    target: &QueryTarget,
    types: &[RecordType],
    ports: &[PortName],
) -> Result<Vec<(Name, RecordType)>, CommandError> {
    let name = target.name();
    let kinds: &[RecordType] = match target {
        _ if !types.is_empty() => types,
        QueryTarget::Address(_) => &[RecordType::PTR],
        QueryTarget::Port(_) => &[RecordType::SRV],
        QueryTarget::Service(..) | QueryTarget::Other(_) => &[RecordType::A, RecordType::AAAA],
    };
    let mut questions: Vec<_> = kinds.iter().map(|kind| (name.clone(), *kind)).collect();
    for PortName { name: port, protocol } in ports {
        let full = format!("_{port}.{}.{name}", protocol.srv_label());
        let full = Name::from_ascii(&full)
            .map_err(|err| CommandError::new(ErrorKind::Usage, format!("{full:?} is not a DNS name: {err}")))?;
        questions.push((full, RecordType::SRV));
    }
    Ok(questions)
}

/// What the registry knows of a service.
#[derive(Debug, Default)]
struct Registered {
    ports: Vec<PortName>,
    names: Vec<(DnsName, NameStatus)>,
}

/// The named ports of a service, and what the names lead to that are its instances. None if the registry does not answer: this
/// command is about DNS and works without it.
async fn registered(servers: &Servers, key: &ServiceKey) -> Registered {
    let read = async {
        let service = servers.read(async |client| client.service(key).await).await.ok()??;
        let names = names_of(servers, key, &service).await.unwrap_or_default();
        Some(Registered { ports: named_ports(&service), names })
    };
    timeout(REGISTRY_TIMEOUT, read).await.ok().flatten().unwrap_or_default()
}

fn named_ports(service: &Service) -> Vec<PortName> {
    let ports = service.instances.iter().flat_map(|instance| instance.ports().as_slice());
    let mut names: Vec<_> = ports.filter_map(|port| Some((port.name.as_ref()?.as_str(), port.protocol))).collect();
    names.sort_unstable();
    names.dedup();
    names.into_iter().map(|(name, protocol)| PortName { name: name.to_owned(), protocol }).collect()
}

fn query_failed(dns: SocketAddr, name: &Name, kind: RecordType, err: &QueryError) -> CommandError {
    CommandError::new(ErrorKind::Failed, format!("no answer from {dns} to {name} {kind}: {err}"))
        .hint("start the server:  gangplank serve")
        .hint("or name another:   --dns ADDRESS:PORT, or GANGPLANK_DNS")
}

#[cfg(test)]
mod tests;
