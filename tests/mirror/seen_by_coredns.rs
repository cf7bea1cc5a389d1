//! CoreDNS' kubernetes plugin answers from our slices what gangplank answers itself, query by query,
//! except for a list of differences, each of which is shown to exist.
//!
//! Not compared: TTLs, the order of records, the weight and priority of SRV (CoreDNS knows neither,
//! which has a test of its own), the serial of the SOA, and the addresses of the name servers.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use futures::future;
use gangplank::{
    grpc::client::{Client, ClientTls},
    model::{InstanceSpec, PortSpec, Protocol},
};
use hickory_proto::{
    op::ResponseCode,
    rr::{RData, RecordType},
};

use super::MirrorHarness;
use crate::support::{
    cluster::{CONTEXT, Cluster},
    coredns::CoreDns,
    dns::{Over, answers, ask},
    tools, wait_until,
};

const NAMESPACE: &str = "seen";

const TYPES: [RecordType; 8] = [
    RecordType::A,
    RecordType::AAAA,
    RecordType::SRV,
    RecordType::PTR,
    RecordType::TXT,
    RecordType::SOA,
    RecordType::ANY,
    RecordType::MX,
];

/// The kinds of names that are queried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum NameKind {
    /// A service, or a host in it, with ports or without.
    Host { ports: bool },
    /// `_http._tcp.<service>`
    Port,
    /// `_tcp.<service>` above such a name, and `dns.Z`.
    Above,
    /// The reverse name of an instance's address.
    Reverse,
    /// `Z`
    Zone,
    /// `svc.Z`, and a namespace.
    Branch,
    /// `dns-version.Z`
    Version,
    /// None of all names.
    Absent,
}

/// The outcome of a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    NxDomain,
    NoData,
    Records,
}

/// Where the answers differ: the queries, the outcome of CoreDNS, and that of gangplank.
const DIFFERENCES: &[(NameKind, &[RecordType], Outcome, Outcome)] = {
    use NameKind::{Above, Absent, Branch, Host, Port, Reverse, Version, Zone};
    use Outcome::{NoData, NxDomain, Records};
    use RecordType::{A, AAAA, ANY, MX, PTR, SOA, SRV, TXT};
    &[
        // A name above a name that exists, or with another type, exists (RFC 8020).
        (Above, &[A, AAAA, SRV, PTR, TXT, ANY, MX], NxDomain, NoData),
        (Version, &[A, AAAA, SRV, PTR, MX], NxDomain, NoData),
        (Reverse, &[A, AAAA, SRV, TXT, MX], NxDomain, NoData),
        // CoreDNS has TXT at one name, and answers NXDOMAIN at all others that are not services.
        (Zone, &[TXT], NxDomain, NoData),
        (Branch, &[TXT], NxDomain, NoData),
        // No address belongs to the name of a port.
        (Port, &[A, AAAA], Records, NoData),
        // No SRV belongs to a name that is not a port's.
        (Host { ports: true }, &[SRV], Records, NoData),
        // SOA at a name that does not exist.
        (Absent, &[SOA], NoData, NxDomain),
        // ANY is answered with one RRset (RFC 8482).
        (Host { ports: true }, &[ANY], NoData, Records),
        (Host { ports: false }, &[ANY], NoData, Records),
        (Port, &[ANY], NoData, Records),
        (Zone, &[ANY], NoData, Records),
        (Reverse, &[ANY], NxDomain, Records),
        (Version, &[ANY], NxDomain, Records),
    ]
};

/// The comparable part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ComparedAnswer {
    outcome: Outcome,
    records: BTreeSet<String>,
}

fn asked(server: SocketAddr, name: &str, rtype: RecordType) -> ComparedAnswer {
    let answer = ask(server, Over::Tcp, name, rtype);
    let text = |data: &RData| match data {
        RData::SRV(srv) => format!("SRV {} {}", srv.port, srv.target.to_ascii().to_lowercase()),
        RData::SOA(soa) => format!("SOA {} {}", soa.mname, soa.rname),
        other => format!("{} {other}", other.record_type()),
    };
    let records: BTreeSet<String> =
        answer.answers.iter().map(|record| format!("{} {}", record.name, text(&record.data))).collect();
    let outcome = match answer.response_code {
        ResponseCode::NXDomain => Outcome::NxDomain,
        ResponseCode::NoError if records.is_empty() => Outcome::NoData,
        ResponseCode::NoError => Outcome::Records,
        other => panic!("{name} {rtype}: {other}"),
    };
    ComparedAnswer { outcome, records }
}

/// One instance of a service: address, ports, host name, weight.
fn instance(address: &str, ports: &[(&str, i64, Protocol)], host_name: &str, weight: f32) -> InstanceSpec {
    let ports = ports.iter().map(|&(name, number, protocol)| PortSpec { number, protocol, name: name.into() });
    InstanceSpec {
        address: address.into(),
        ports: ports.collect(),
        host_name: host_name.into(),
        weight: Some(weight),
        // Something that is not the default.
        priority: u16::from(weight < 1.0),
        ..InstanceSpec::default()
    }
}

fn services() -> Vec<(&'static str, Vec<InstanceSpec>)> {
    use Protocol::{Sctp, Tcp, Udp};
    let http: &[(&str, i64, Protocol)] = &[("http", 8080, Tcp)];
    let plain = |address: &str| instance(address, http, "", 1.0);
    let dns = &[("dns", 53, Udp), ("dns", 53, Tcp), ("metrics", 9153, Tcp)];
    vec![
        ("one", vec![plain("10.60.0.1")]),
        ("also", vec![plain("10.60.0.1"), instance("10.60.0.1", &[("admin", 9000, Tcp)], "", 1.0)]),
        ("many", (1..=3_u8).map(|n| instance(&format!("10.60.1.{n}"), http, "", f32::from(n) * 0.5)).collect()),
        ("six", vec![plain("2001:db8::61"), plain("2001:db8:0:1:2:3:4:5")]),
        ("dual", vec![instance("10.60.2.1", http, "node", 1.0), instance("2001:db8::62", http, "node", 1.0)]),
        (
            "hosts",
            vec![
                instance("10.60.3.1", http, "db-1", 1.0),
                instance("10.60.3.2", http, "db", 1.0),
                instance("10.60.3.3", http, "db", 1.0),
            ],
        ),
        ("ports", vec![instance("10.60.4.1", dns, "", 1.0), instance("10.60.4.2", &[("sig", 5060, Sctp)], "", 1.0)]),
        ("unnamed", vec![instance("10.60.5.1", &[("", 80, Tcp)], "", 1.0)]),
        (
            "mixed",
            vec![
                instance("10.60.6.1", &[("http", 80, Tcp), ("", 90, Tcp)], "", 1.0),
                instance("10.60.6.2", &[("http", 81, Tcp)], "", 1.0),
            ],
        ),
        ("portless", vec![instance("10.60.7.1", &[], "", 1.0), instance("10.60.7.2", &[], "named", 1.0)]),
        ("ends", vec![plain("2001:db8::"), plain("::1:2:3"), plain("2001:db8:1::")]),
        ("large", (1..=120).map(|n| plain(&format!("10.61.0.{n}"))).collect()),
        ("zz-last", vec![plain("10.60.8.1")]),
    ]
}

/// Registers everything, the last service after all others.
fn register(harness: &MirrorHarness) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let client = Client::connect(&format!("http://{}", harness.server.grpc), &ClientTls::default())
            .await
            .expect("it listens");
        for (service, specs) in services() {
            let registered = specs.iter().map(|spec| {
                let mut client = client.clone();
                async move { client.register(NAMESPACE, service, spec).await.expect("it answers") }
            });
            for answer in future::join_all(registered).await {
                assert!(matches!(answer.status, 201 | 202), "{service}: {answer:?}");
            }
        }
    });
}

/// The label of an instance, computed independently of gangplank.
fn label(spec: &InstanceSpec) -> String {
    if !spec.host_name.is_empty() {
        return spec.host_name.clone();
    }
    let dashed = spec.address.replace(['.', ':'], "-");
    let begin = if dashed.starts_with('-') { "0" } else { "" };
    let end = if dashed.ends_with('-') { "0" } else { "" };
    format!("{begin}{dashed}{end}")
}

fn reverse(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(v4) => {
            let [a, b, c, d] = v4.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa.")
        }
        IpAddr::V6(v6) => {
            let mut name = String::new();
            for octet in v6.octets().iter().rev() {
                write!(name, "{:x}.{:x}.", octet & 15, octet >> 4).expect("a String takes everything");
            }
            name + "ip6.arpa."
        }
    }
}

/// Every name that exists, and similar ones that do not.
fn names() -> BTreeMap<String, NameKind> {
    const Z: &str = "cluster.local.";
    let mut names = BTreeMap::new();
    for (service, specs) in services() {
        let zone = format!("{service}.{NAMESPACE}.svc.{Z}");
        let ports = specs.iter().any(|spec| !spec.ports.is_empty());
        names.insert(zone.clone(), NameKind::Host { ports });
        // A few of a hundred similar instances are enough.
        for spec in specs.iter().take(5) {
            let host = format!("{}.{zone}", label(spec));
            names.insert(format!("x.{host}"), NameKind::Absent);
            names.insert(host, NameKind::Host { ports });
            names.insert(reverse(spec.address.parse().expect("an address")), NameKind::Reverse);
            for port in spec.ports.iter().filter(|port| !port.name.is_empty()) {
                let above = format!("{}.{zone}", port.protocol.srv_label());
                names.insert(format!("_{}.{above}", port.name), NameKind::Port);
                names.insert(format!("_nosuch.{above}"), NameKind::Absent);
                names.insert(above, NameKind::Above);
            }
        }
        for neighbour in ["nosuch", "*", "10-60-99-99", "_http", "_http._icmp"] {
            names.insert(format!("{neighbour}.{zone}"), NameKind::Absent);
        }
    }
    for absent in [
        "nosuch.seen.svc",
        "*.seen.svc",
        "one.nosuch.svc",
        "nosuch.svc",
        "*.svc",
        "one.seen",
        "seen",
        "foo",
        "one.*.svc",
        "_udp.one.seen.svc",
        "_http._udp.one.seen.svc",
        "_tcp.portless.seen.svc",
        "_http._tcp.portless.seen.svc",
        "_tcp.unnamed.seen.svc",
        "10-60-3-1.hosts.seen.svc",
        "2001-db8--.ends.seen.svc",
        "one.seen.svc.cluster.local.seen.svc",
        "10-60-0-1.seen.pod",
        "x.dns-version",
    ] {
        names.insert(format!("{absent}.{Z}"), NameKind::Absent);
    }
    for absent in ["9.9.60.10.in-addr.arpa.".to_owned(), reverse("2001:db8::9999".parse().expect("an address"))] {
        names.insert(absent, NameKind::Absent);
    }
    for (name, kind) in [
        (Z.to_owned(), NameKind::Zone),
        (format!("svc.{Z}"), NameKind::Branch),
        (format!("{NAMESPACE}.svc.{Z}"), NameKind::Branch),
        (format!("default.svc.{Z}"), NameKind::Branch),
        (format!("dns.{Z}"), NameKind::Above),
        (format!("dns-version.{Z}"), NameKind::Version),
    ] {
        names.insert(name, kind);
    }
    names
}

/// A CoreDNS on that cluster, once it has seen what was registered last.
fn coredns(cluster: &Cluster) -> Option<CoreDns> {
    let program = tools::require("coredns")?;
    let coredns = CoreDns::with_kubernetes(&program, &cluster.kubeconfig_admin(), CONTEXT);
    wait_until("CoreDNS has seen the last write", || {
        let last = answers(coredns.address, Over::Udp, "zz-last.seen.svc.cluster.local.", RecordType::A);
        (last == ["10.60.8.1"]).then_some(())
    });
    Some(coredns)
}

#[test]
fn coredns_answers_from_slices_equal_ours() {
    let reverse_zones = ["--reverse-zone", "10.60.0.0/15", "--reverse-zone", "2001:db8::/32"];
    let Some(harness) = MirrorHarness::start(&reverse_zones) else { return };
    harness.create_namespace(NAMESPACE);
    register(&harness);
    let Some(coredns) = coredns(harness.cluster) else { return };

    let mut wrong = BTreeMap::<_, Vec<String>>::new();
    let mut shown = BTreeSet::new();
    let names = names();
    for (name, &kind) in &names {
        for rtype in TYPES {
            let (theirs, ours) = (asked(coredns.address, name, rtype), asked(harness.server.dns, name, rtype));
            let known = DIFFERENCES.iter().position(|(which, types, ..)| *which == kind && types.contains(&rtype));
            let right = match known.map(|at| (at, DIFFERENCES[at])) {
                // A port of the other family has no addresses of this one on either side.
                Some((_, (NameKind::Port, [RecordType::A, RecordType::AAAA], ..)))
                    if theirs.outcome == Outcome::NoData =>
                {
                    theirs == ours
                }
                Some((at, (_, _, coredns, gangplank))) => {
                    shown.insert(at);
                    (theirs.outcome, ours.outcome) == (coredns, gangplank)
                }
                None => theirs == ours,
            };
            if !right {
                let seen = format!(
                    "{name}\n   CoreDNS {:?} {:?}\n   gangplank {:?} {:?}",
                    theirs.outcome, theirs.records, ours.outcome, ours.records
                );
                wrong.entry((kind, rtype.to_string())).or_default().push(seen);
            }
        }
    }
    let mut text = String::new();
    for (question, cases) in &wrong {
        writeln!(text, "{question:?}: {} names, such as {}", cases.len(), cases[0]).expect("a String takes everything");
    }
    assert!(wrong.is_empty(), "\n{text}");
    assert_eq!(shown.len(), DIFFERENCES.len(), "each difference is one: {shown:?}");

    // More than one slice, and what else is left aside above.
    assert!(super::slices(harness.cluster, NAMESPACE, "large").len() >= 2);
    let srv = |server, name: &str| {
        let answer = ask(server, Over::Tcp, name, RecordType::SRV);
        let records = answer.answers.into_iter().filter_map(|record| match record.data {
            RData::SRV(srv) => Some((srv.priority, srv.weight, srv.target.to_ascii())),
            _ => None,
        });
        let mut all: Vec<_> = records.collect();
        all.sort();
        all
    };
    let name = "_http._tcp.many.Seen.svc.cluster.LOCAL.";
    let target = |n, zone| format!("10-60-1-{n}.many.seen.svc.{zone}.");
    let theirs = srv(coredns.address, name);
    assert!(
        theirs.iter().all(|(priority, weight, _)| (*priority, *weight) == (0, 33)),
        "CoreDNS weighs all alike: {theirs:?}"
    );
    assert!(
        theirs.iter().all(|(.., target)| target.ends_with(".cluster.LOCAL.")),
        "in the question's case: {theirs:?}"
    );
    let ours = [
        (0, 100, target(2, "cluster.local")),
        (0, 150, target(3, "cluster.local")),
        (1, 50, target(1, "cluster.local")),
    ];
    assert_eq!(srv(harness.server.dns, name), ours);
}
