//! `gangplank check`: walks the chain from the process to the cluster's DNS, and says what is wrong.
//!
//! `collect` asks, `judge` decides, `render` prints.

mod certificates;
mod collect;
mod e2e;
mod facts;
mod finding;
mod judge;
mod render;
mod rights;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    fs,
    io::{self, IsTerminal as _, Write as _},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use serde::Serialize;
use tokio::{net::lookup_host, time::sleep};

use super::{
    args::{NamespaceArgs, ServerArgs, ServerConnection, check_namespace},
    coredns::config_map_key,
    error::{CommandError, ErrorKind},
    output::{colour_allowed, print, print_json},
};
use crate::{
    admin::client::AdminClient,
    grpc::client::Servers,
    kubernetes::api::{ConfigMapKey, Inspector},
    model::DnsName,
};
use collect::Sources;
use facts::Fact;
use finding::{CheckResult, Finding};

pub(super) const EXAMPLES: &str = "\
Each check is passed (√), a warning (‼), failed (×), or skipped (-) with the
reason. Under a fault are its cause, a command that helps, and its heading in
docs/troubleshooting.md.

What is not told is taken from where the server is: on this machine, --admin
and --dns are the defaults of `gangplank serve`; elsewhere their checks are
skipped unless they are given. In a pod, --via is its resolver, and the
cluster that of its ServiceAccount. Rights are those of --as.

--e2e registers a canary (192.0.2.1) in the namespace of -n, asks for it,
looks for it in the EndpointSlices, and removes it, also after Ctrl-C.

Examples:
  gangplank check
  gangplank check --via 10.96.0.10
  gangplank check --wait -o short
  gangplank check --e2e -n prod --via 10.96.0.10
  gangplank check --kubeconfig admin.conf --context prod -o json

Exit codes: 0 nothing failed, warnings or not; 1 a check failed, 2 wrong usage,
4 checks still fail after 5 minutes of --wait";

/// How long `--wait` waits.
const WAIT_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// Pause between two rounds of `--wait`.
const WAIT_INTERVAL: Duration = Duration::from_secs(5);

/// The default ports of `gangplank serve`.
const ADMIN_PORT: u16 = 9153;
const DNS_PORT: u16 = 1053;

/// The user of the manifests.
const DEFAULT_USER: &str = "system:serviceaccount:gangplank:gangplank";

/// Whom a pod asks for names.
const RESOLV_CONF: &str = "/etc/resolv.conf";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    server: ServerArgs,
    /// The admin listener of one server: URL, or HOST:PORT, which is asked by http on this machine and by https elsewhere
    /// [default: port 9153 of this machine, if the server is there]
    #[arg(long, env = "GANGPLANK_ADMIN", value_name = "URL", value_parser = admin_url)]
    admin: Option<http::Uri>,
    /// gangplank's DNS, HOST:PORT, or HOST for port 53 [default: port 1053 of this machine, if the server is there]
    #[arg(long, env = "GANGPLANK_DNS", value_name = "ADDR")]
    dns: Option<String>,
    /// The cluster's CoreDNS, HOST:PORT, or HOST for port 53 [default: in a pod, its resolver]
    #[arg(long, value_name = "ADDR")]
    via: Option<String>,
    /// The cluster's zone [default: the one that the server has]
    #[arg(long, env = "GANGPLANK_ZONE", value_name = "NAME", value_parser = zone)]
    zone: Option<DnsName>,
    /// The kubeconfig to use [default: that of kubectl; in a pod its ServiceAccount]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig [default: its current one]
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// Whose rights are checked [default: in a pod its own account, else system:serviceaccount:gangplank:gangplank]
    #[arg(long = "as", value_name = "USER")]
    user: Option<String>,
    /// The ConfigMap with the Corefile
    #[arg(long, value_name = "NAMESPACE/NAME", default_value = "kube-system/coredns", value_parser = config_map_key)]
    configmap: ConfigMapKey,
    /// Check again every 5 s until nothing fails, up to 5 minutes
    #[arg(long)]
    wait: bool,
    /// Register a canary and follow it
    #[arg(long)]
    e2e: bool,
    #[command(flatten)]
    namespace: NamespaceArgs,
    /// How the result looks
    #[arg(short = 'o', long = "output", value_enum, value_name = "FORMAT")]
    output: Option<CheckFormat>,
}

/// Values of `-o`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum CheckFormat {
    /// Faults only
    Short,
    /// JSON; the shape is stable
    Json,
}

/// All findings as JSON. Fields are added, never renamed.
#[derive(Debug, Serialize)]
struct CheckView<'a> {
    result: CheckResult,
    checks: &'a [Finding],
}

fn admin_url(text: &str) -> Result<http::Uri, String> {
    let shape = || "an admin listener is written HOST:PORT, http://HOST:PORT or https://HOST:PORT".to_owned();
    let url = if text.contains("://") {
        text.to_owned()
    } else {
        let host = text.rsplit_once(':').map_or(text, |(host, _)| host);
        format!("{}://{text}", if is_here(host) { "http" } else { "https" })
    };
    let url: http::Uri = url.parse().map_err(|_| shape())?;
    let complete = matches!(url.scheme_str(), Some("http" | "https")) && url.port_u16().is_some();
    if complete && url.host().is_some_and(|host| !host.is_empty()) { Ok(url) } else { Err(shape()) }
}

/// Whether a host is this machine.
fn is_here(host: &str) -> bool {
    let host = host.trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

fn zone(text: &str) -> Result<DnsName, String> {
    DnsName::parse(&text.to_ascii_lowercase()).map_err(|err| err.to_string())
}

pub(super) async fn run(args: Args) -> Result<(), CommandError> {
    let Args { server, admin, dns, via, zone, kubeconfig, context, user, configmap, wait, e2e, namespace, output } =
        args;
    let machine_expires = server.machine_expires();
    let connection = match server.readers().await {
        Ok(connection) => Fact::Known(connection),
        // A wrong command line is no finding.
        Err(err) if err.kind == ErrorKind::Usage => return Err(err),
        Err(err) => Fact::Failed(err.to_string().replace('\n', ";")),
    };
    let namespace = namespace.get(connection.known().and_then(ServerConnection::namespace)).to_owned();
    check_namespace(&namespace)?;
    let servers = match connection {
        Fact::Known(connection) => Fact::Known(connection.servers),
        Fact::Failed(why) => Fact::Failed(why),
        Fact::Skipped(why) => Fact::Skipped(why),
    };
    let cluster = Inspector::connect(kubeconfig.as_deref(), context.as_deref()).await;
    let cluster = match cluster {
        Ok(cluster) => Fact::Known(cluster),
        Err(err) if kubeconfig.is_some() || context.is_some() => {
            return Err(CommandError::new(ErrorKind::Usage, err.to_string()));
        }
        Err(_) => Fact::Skipped("no kubeconfig: --kubeconfig FILE".into()),
    };
    let in_pod = cluster.known().is_some_and(Inspector::is_in_pod);
    let sources = Sources {
        admin: admin_client(admin, &servers),
        dns: match dns {
            Some(dns) => address(&dns).await?,
            None if is_local(&servers) => Fact::Known(SocketAddr::from(([127, 0, 0, 1], DNS_PORT))),
            None => Fact::Skipped("no --dns is given".into()),
        },
        via: match via {
            Some(via) => address(&via).await?,
            None if in_pod => resolver().map_or_else(|| Fact::Skipped("no --via is given".into()), Fact::Known),
            None => Fact::Skipped("no --via is given".into()),
        },
        user: user.or_else(|| (!in_pod).then(|| DEFAULT_USER.to_owned())),
        servers,
        cluster,
        configmap,
        zone: zone.map(|zone| zone.to_string().trim_end_matches('.').to_owned()),
        machine_expires,
    };
    let canary = e2e.then_some(namespace.as_str());
    let (findings, expired) =
        if wait { until_well(&sources, canary).await } else { (once(&sources, canary).await, false) };
    match output {
        Some(CheckFormat::Json) => {
            print_json(&CheckView { result: judge::overall(&findings), checks: &findings })?;
        }
        format => {
            let colour = colour_allowed(io::stdout().is_terminal());
            print(&render::text(&findings, format == Some(CheckFormat::Short), colour))?;
        }
    }
    match judge::overall(&findings) {
        CheckResult::Failed if expired => Err(CommandError::said(ErrorKind::WaitExpired)),
        CheckResult::Failed => Err(CommandError::said(ErrorKind::Failed)),
        CheckResult::Passed | CheckResult::Warning | CheckResult::Skipped => Ok(()),
    }
}

/// All checks, and the canary if there is a namespace for it.
async fn once(sources: &Sources, canary: Option<&str>) -> Vec<Finding> {
    let facts = sources.collect().await;
    let mut findings = judge::judge(&facts);
    if let Some(namespace) = canary {
        findings.extend(e2e::run(sources, &facts, namespace).await);
    }
    findings
}

/// Checks until nothing fails; whether the time is over. The canary goes once nothing else fails.
async fn until_well(sources: &Sources, canary: Option<&str>) -> (Vec<Finding>, bool) {
    let begun = Instant::now();
    let mut failing = BTreeSet::new();
    loop {
        let facts = sources.collect().await;
        let mut findings = judge::judge(&facts);
        if judge::overall(&findings) != CheckResult::Failed
            && let Some(namespace) = canary
        {
            findings.extend(e2e::run(sources, &facts, namespace).await);
        }
        for line in news(&mut failing, &findings, SystemTime::now()) {
            // Not `eprintln!`, which panics where stderr cannot be written.
            let _ = writeln!(io::stderr(), "{line}");
        }
        if judge::overall(&findings) != CheckResult::Failed {
            return (findings, false);
        }
        if begun.elapsed() + WAIT_INTERVAL > WAIT_TIMEOUT {
            return (findings, true);
        }
        sleep(WAIT_INTERVAL).await;
    }
}

/// What to say of faults, each once until it has passed.
fn news(failing: &mut BTreeSet<&'static str>, findings: &[Finding], now: SystemTime) -> Vec<String> {
    let mut lines = Vec::new();
    for finding in findings {
        let (id, observed) = (finding.id.as_str(), finding.observed.clone().unwrap_or_default());
        if finding.result != CheckResult::Failed {
            if failing.remove(id) {
                lines.push(format!("√ {id}"));
            }
            continue;
        }
        if failing.insert(id) {
            let since = humantime::format_rfc3339_seconds(now);
            let cause = finding.cause.as_deref().unwrap_or_default();
            lines.push(format!("× {id} failing since {since}: {observed}: {cause}"));
        }
    }
    lines
}

/// Where the pages are, and as whom they are asked for.
fn admin_client(given: Option<http::Uri>, servers: &Fact<Servers>) -> Fact<AdminClient> {
    let url = match given {
        Some(url) => url,
        None if is_local(servers) => {
            http::Uri::try_from(format!("http://127.0.0.1:{ADMIN_PORT}")).expect("it is a URL")
        }
        None => return Fact::Skipped("no --admin is given".into()),
    };
    let tls = servers.known().map(Servers::tls);
    let open = url.scheme_str() != Some("https") && !url.host().is_some_and(is_here);
    let authorization = match tls.map(|tls| tls.authorization()) {
        // Whoever is on the way could read it.
        Some(_) if open => None,
        Some(Ok(shown)) => shown,
        Some(Err(err)) => return Fact::Failed(err.to_string()),
        None => None,
    };
    Fact::Known(AdminClient { url, pem: tls.and_then(|tls| tls.pem().cloned()), authorization })
}

/// Whether the first server is on this machine.
fn is_local(servers: &Fact<Servers>) -> bool {
    let Fact::Known(servers) = servers else { return false };
    let url = servers.urls().first().and_then(|url| url.parse::<http::Uri>().ok());
    url.as_ref().and_then(http::Uri::host).is_some_and(is_here)
}

/// The first address of a DNS server that is given by address or name.
async fn address(text: &str) -> Result<Fact<SocketAddr>, CommandError> {
    if let Ok(address) = super::resolve::dns_server(text) {
        return Ok(Fact::Known(address));
    }
    let target = if text.contains(':') { text.to_owned() } else { format!("{text}:53") };
    match lookup_host(&target).await {
        Ok(mut found) => Ok(found.next().map_or_else(|| Fact::Failed(format!("{text} has no address")), Fact::Known)),
        Err(err) if err.kind() == io::ErrorKind::InvalidInput => {
            Err(CommandError::new(ErrorKind::Usage, format!("{text:?}: a DNS server is written HOST or HOST:PORT")))
        }
        Err(err) => Ok(Fact::Failed(format!("{text}: {err}"))),
    }
}

/// The first name server of this machine.
fn resolver() -> Option<SocketAddr> {
    let text = fs::read_to_string(RESOLV_CONF).ok()?;
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    servers.filter_map(|server| server.trim().parse::<IpAddr>().ok()).next().map(|ip| SocketAddr::new(ip, 53))
}
