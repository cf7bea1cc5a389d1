//! `gangplank coredns`: puts gangplank behind CoreDNS.

mod config_map;
mod observer;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use super::{
    args,
    error::{CommandError, ErrorKind},
    output::print,
    resolve::dns_server,
};
use crate::{
    coredns::{self, CorefileError, MAX_SERVERS, Plan, Wiring},
    kubernetes::api::{ConfigMapClient, ConfigMapKey},
    model::DnsName,
};
use config_map::CorefileChange;
use observer::{Observation, Observer};

pub(super) const EXAMPLES: &str = "\
CoreDNS forwards to gangplank in one of two ways:
  fall-through  what the cluster does not know; nothing is hidden
  stub-domain   whole namespaces, whose native Services are hidden
Without --apply and --remove the configuration is printed, with comments that
explain it. --apply puts it into the cluster's Corefile between markers, in
place of what an earlier --apply put there; --remove takes it out. Both show
the difference and ask first, and can be repeated. All else in the Corefile
stays as it is; one that is not understood is refused.

With --dns they wait until CoreDNS has taken the change, and take it back if
names are not answered any more, or if --apply is not seen within --timeout.

Examples:
  gangplank coredns --server 10.96.0.53:1053
  gangplank coredns --wiring stub-domain -n prod --server 10.96.0.53:1053
  gangplank coredns --server 10.96.0.53:1053 --apply --dry-run
  gangplank coredns --server 10.96.0.53:1053 --apply --dns 10.96.0.10
  gangplank coredns --remove --yes --dns 127.0.0.1:5353 --tcp

Exit codes: 0 done, also if it already was; 1 failed or refused, 2 wrong
usage, 3 no such ConfigMap, 4 CoreDNS has not taken it within --timeout";

/// Longest time to wait.
const MAX_TIMEOUT: Duration = Duration::from_secs(60 * 60);

/// Namespaces without which a cluster does not work: a stub domain would hide `kubernetes.default.svc` or `kube-dns`.
const NEEDED_NAMESPACES: [&str; 2] = ["default", "kube-system"];

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("change").args(["apply", "remove"])))]
pub struct Args {
    /// How CoreDNS asks gangplank
    #[arg(long, value_enum, default_value_t = WiringArg::FallThrough)]
    wiring: WiringArg,
    /// A namespace of the stub domain; repeatable, or with commas
    #[arg(short, long = "namespace", value_name = "NAME", value_delimiter = ',')]
    namespaces: Vec<String>,
    /// Where gangplank's DNS listens, as CoreDNS reaches it; repeatable, or with commas
    #[arg(
        long = "server",
        value_name = "ADDR:PORT",
        value_delimiter = ',',
        value_parser = server,
        required_unless_present = "remove",
        conflicts_with = "remove"
    )]
    servers: Vec<SocketAddr>,
    /// The cluster's zone
    #[arg(long, env = "GANGPLANK_ZONE", default_value = "cluster.local", value_parser = zone)]
    zone: DnsName,
    /// Leave reverse names out of fall-through, for CoreDNS before 1.12
    #[arg(long)]
    no_reverse: bool,
    /// Put it into the cluster's Corefile
    #[arg(long)]
    apply: bool,
    /// Take out of the cluster's Corefile what --apply put there
    #[arg(long)]
    remove: bool,
    /// Show the difference and change nothing
    #[arg(long, requires = "change")]
    dry_run: bool,
    /// Do not ask
    #[arg(long, short, requires = "change")]
    yes: bool,
    /// The ConfigMap with the Corefile
    #[arg(long, value_name = "NAMESPACE/NAME", default_value = "kube-system/coredns", value_parser = config_map_key)]
    configmap: ConfigMapKey,
    /// The kubeconfig to use [default: that of kubectl]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig [default: its current one]
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// Wait until CoreDNS, asked at this address, has taken it; repeatable, for several CoreDNS.
    /// ADDRESS:PORT, or ADDRESS for port 53
    #[arg(long, value_name = "ADDR", requires = "change", value_delimiter = ',', value_parser = dns_server)]
    dns: Vec<SocketAddr>,
    /// Ask --dns over TCP only, for instance through kubectl port-forward
    #[arg(long, requires = "dns")]
    tcp: bool,
    /// A name with an address that must be answered before and after; repeatable
    /// [default: kubernetes.default.svc.ZONE]
    #[arg(long = "control", value_name = "NAME", requires = "dns")]
    controls: Vec<String>,
    /// How long to wait
    #[arg(long, value_name = "TIME", default_value = "3m", value_parser = wait)]
    timeout: Duration,
}

/// Values of `--wiring`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum WiringArg {
    /// Names that the cluster does not know
    FallThrough,
    /// Whole namespaces
    StubDomain,
}

fn server(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text.parse().map_err(|_| {
        "an IP address and a port, for example 10.96.0.53:1053: where DNS listens, not a URL".to_owned()
    })?;
    if address.ip().is_unspecified() || address.ip().is_multicast() || address.port() == 0 {
        return Err("must be the address and port of one server".into());
    }
    Ok(address)
}

fn zone(text: &str) -> Result<DnsName, String> {
    DnsName::parse(&text.to_ascii_lowercase()).map_err(|err| err.to_string())
}

fn wait(text: &str) -> Result<Duration, String> {
    let parsed = humantime::parse_duration(text).map_err(|err| err.to_string())?;
    if parsed > MAX_TIMEOUT { Err("must be at most 1 hour".into()) } else { Ok(parsed) }
}

pub(super) fn config_map_key(text: &str) -> Result<ConfigMapKey, String> {
    let (namespace, name) = text.split_once('/').ok_or("a ConfigMap is written NAMESPACE/NAME")?;
    let valid = |text: &str| DnsName::parse(text).map_err(|err| format!("{text:?}: {err}"));
    valid(namespace)?;
    valid(name)?;
    Ok(ConfigMapKey { namespace: namespace.into(), name: name.into(), key: "Corefile".into() })
}

/// What to do with the Corefile.
#[derive(Debug)]
enum CorefileEdit {
    Apply(Plan),
    Remove,
}

impl CorefileEdit {
    fn of(&self, text: &str) -> Result<String, CorefileError> {
        match self {
            Self::Apply(plan) => coredns::apply(text, plan),
            Self::Remove => coredns::remove(text),
        }
    }
}

pub(super) async fn run(args: Args) -> Result<(), CommandError> {
    let Args {
        wiring,
        namespaces,
        servers,
        zone,
        no_reverse,
        apply,
        remove,
        dry_run,
        yes,
        configmap,
        kubeconfig,
        context,
        dns,
        tcp,
        controls,
        timeout,
    } = args;
    let edit = if remove {
        if !namespaces.is_empty() {
            return Err(usage("--namespace: --remove takes out all that --apply put in"));
        }
        CorefileEdit::Remove
    } else {
        let wiring = wiring_of(wiring, namespaces, no_reverse)?;
        if servers.len() > MAX_SERVERS {
            return Err(usage(format!("--server: CoreDNS forwards to at most {MAX_SERVERS} servers")));
        }
        let plan = Plan { zone: zone.clone(), servers, wiring };
        if !apply {
            // Before the client is made: it can be printed where there is no kubeconfig.
            return print(&coredns::corefile(&plan));
        }
        CorefileEdit::Apply(plan)
    };
    let client = ConfigMapClient::connect(kubeconfig.as_deref(), context.as_deref()).await;
    let client =
        client.map_err(|err| usage(with_causes(&err)).hint("name one:  --kubeconfig FILE, and --context NAME"))?;
    let observation = (!dns.is_empty()).then_some(Observation { servers: dns, tcp, controls, zone, timeout });
    CorefileChange { client, key: configmap, edit, dry_run, yes }.run(observation).await
}

/// The wiring that the flags say.
fn wiring_of(wiring: WiringArg, mut namespaces: Vec<String>, no_reverse: bool) -> Result<Wiring, CommandError> {
    match wiring {
        WiringArg::FallThrough if !namespaces.is_empty() => {
            Err(usage("--namespace: fall-through is for all namespaces; add --wiring stub-domain for one"))
        }
        WiringArg::FallThrough => Ok(Wiring::FallThrough { reverse: !no_reverse }),
        WiringArg::StubDomain if no_reverse => Err(usage("--no-reverse: a stub domain has no reverse names")),
        WiringArg::StubDomain if namespaces.is_empty() => {
            Err(usage("--wiring stub-domain needs a namespace:  -n NAME"))
        }
        WiringArg::StubDomain => {
            for namespace in &namespaces {
                args::check_namespace(namespace)?;
                if NEEDED_NAMESPACES.contains(&namespace.as_str()) {
                    let what = format!(
                        "--namespace {namespace}: a stub domain would hide its Services, which every pod needs"
                    );
                    return Err(usage(what).hint("this hides nothing:  --wiring fall-through"));
                }
            }
            let mut seen = std::collections::BTreeSet::new();
            // CoreDNS does not take a Corefile in which one zone is served twice.
            namespaces.retain(|namespace| seen.insert(namespace.clone()));
            Ok(Wiring::StubDomain { namespaces })
        }
    }
}

fn usage(message: impl Into<String>) -> CommandError {
    CommandError::new(ErrorKind::Usage, message)
}

fn with_causes(err: &dyn std::error::Error) -> String {
    err.source().map_or_else(|| err.to_string(), |source| format!("{err}: {source}"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::coredns::Wired;

    #[derive(Debug, Parser)]
    struct TestCli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> Result<Args, clap::Error> {
        TestCli::try_parse_from(std::iter::once("coredns").chain(line.split_whitespace())).map(|cli| cli.args)
    }

    #[test]
    fn wrong_usage_is_refused() {
        for line in [
            "",
            "--server http://10.0.0.1:9080",
            "--server 10.0.0.1",
            "--server 0.0.0.0:53",
            "--server 10.0.0.1:53 --zone a..b",
            "--server 10.0.0.1:53 --dry-run",
            "--server 10.0.0.1:53 --yes",
            "--server 10.0.0.1:53 --dns 10.96.0.10",
            "--server 10.0.0.1:53 --apply --remove",
            "--server 10.0.0.1:53 --remove",
            "--server 10.0.0.1:53 --apply --tcp",
            "--server 10.0.0.1:53 --apply --configmap coredns",
            "--remove --configmap a/b/c",
            "--remove --timeout 2h",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        for (wiring, namespaces, no_reverse) in [
            (WiringArg::StubDomain, &[][..], false),
            (WiringArg::StubDomain, &["default"], false),
            (WiringArg::StubDomain, &["prod", "kube-system"], false),
            (WiringArg::StubDomain, &["Prod"], false),
            (WiringArg::StubDomain, &["a b"], false),
            (WiringArg::StubDomain, &["prod"], true),
            (WiringArg::FallThrough, &["prod"], false),
        ] {
            let names = namespaces.iter().map(|&name| name.to_owned()).collect();
            let err = wiring_of(wiring, names, no_reverse).expect_err("wrong usage");
            assert_eq!(err.kind, ErrorKind::Usage, "{namespaces:?}");
        }
    }

    #[test]
    fn namespaces_are_written_once() {
        let args =
            parse("--wiring stub-domain -n prod,test -n prod --server 10.0.0.1:53,[::1]:53").expect("it is valid");
        let wiring = wiring_of(args.wiring, args.namespaces, false).expect("it is valid");
        let Wiring::StubDomain { namespaces } = &wiring else { panic!("{wiring:?}") };
        assert_eq!(namespaces, &["prod", "test"]);
        let text = coredns::corefile(&Plan { zone: args.zone, servers: args.servers, wiring });
        assert!(text.contains("forward . 10.0.0.1:53 [::1]:53\n"), "{text}");
        assert!(coredns::wired(&text).is_ok_and(|wired: Vec<Wired>| wired.is_empty()), "no markers: {text}");
    }
}
