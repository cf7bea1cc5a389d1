//! Knot DNS, loaded with the records that the registrations must produce, answers like gangplank: an
//! oracle that shares no code with it. Records, response codes, AA, and the SOA of negative answers are
//! compared; sizes are not, so every query goes over TCP.
//!
//! Known differences, which are not queried: ANY (RFC 8482 lets a server choose), and names in a
//! reverse zone that are shorter than an address and have no instance below them.

use std::{fmt::Write as _, net::SocketAddr};

use gangplank::grpc::proto::registry::{
    NamedPort, Protocol, ServiceInfo, service_registry_client::ServiceRegistryClient,
};
use hickory_proto::rr::{Record, RecordType};

use crate::support::{
    dns::{Over, ask},
    knot::Knot,
    server::Server,
    tools,
};

const ZONE: &str = "cluster.local.";
const REVERSE: &str = "20.10.in-addr.arpa.";

/// Registrations in each of the services.
const INSTANCES: u8 = 60;

const TYPES: [RecordType; 8] = [
    RecordType::A,
    RecordType::AAAA,
    RecordType::SRV,
    RecordType::PTR,
    RecordType::TXT,
    RecordType::SOA,
    RecordType::NS,
    RecordType::MX,
];

/// One registration of `service.prod`, and the records that it gives, in the zone and in reverse.
fn registration(service: &str, n: u8, rng: &mut fastrand::Rng) -> (ServiceInfo, String, String) {
    let v6 = n.is_multiple_of(4);
    let address = if v6 { format!("2001:db8::{n:x}:1") } else { format!("10.20.{}.{n}", service.len()) };
    let dashed = address.replace(['.', ':'], "-");
    let host_name = if n.is_multiple_of(3) { format!("h{n}") } else { String::new() };
    let host = if host_name.is_empty() { &dashed } else { &host_name };
    let hundredths = [0u16, 1, 25, 100, 65_500][rng.usize(..5)];
    let priority = rng.u16(..4);
    let mut ports = vec![(8000 + i32::from(n), "http", Protocol::Tcp, "_tcp")];
    if rng.bool() {
        ports.push((53, "dns", Protocol::Udp, "_udp"));
    }
    let name = format!("{service}.prod.svc.{ZONE}");
    let rtype = if v6 { "AAAA" } else { "A" };
    let mut zone = format!("{name} 5 IN {rtype} {address}\n{host}.{name} 5 IN {rtype} {address}\n");
    for (port, port_name, _, proto) in &ports {
        writeln!(zone, "_{port_name}.{proto}.{name} 5 IN SRV {priority} {hundredths} {port} {host}.{name}")
            .expect("a String");
    }
    let octets: Vec<&str> = address.rsplit('.').collect();
    let reverse =
        if v6 { String::new() } else { format!("{}.in-addr.arpa. 5 IN PTR {host}.{name}\n", octets.join(".")) };
    let named = |(port, name, protocol, _): &(i32, &str, Protocol, &str)| NamedPort {
        port: *port,
        name: (*name).to_owned(),
        protocol: (*protocol).into(),
        ..NamedPort::default()
    };
    let info = ServiceInfo {
        namespace: "prod".into(),
        service_name: service.into(),
        host_name,
        ports: ports.iter().map(named).collect(),
        ipaddress: address,
        weight: Some(f32::from(hundredths) / 100.0),
        priority: priority.into(),
        ..ServiceInfo::default()
    };
    (info, zone, reverse)
}

/// What is compared of an answer.
fn said(server: SocketAddr, name: &str, rtype: RecordType) -> (String, bool, Vec<String>, Vec<String>) {
    let answer = ask(server, Over::Tcp, name, rtype);
    let texts = |records: &[Record]| {
        let mut texts: Vec<String> = records.iter().map(ToString::to_string).collect();
        texts.sort();
        texts
    };
    let found = texts(&answer.answers);
    // With an answer, what stands in authority is each server's own business.
    let authority = if found.is_empty() { texts(&answer.authorities) } else { Vec::new() };
    (answer.metadata.response_code.to_string(), answer.metadata.authoritative, found, authority)
}

#[test]
fn knot_answers_equal_ours() {
    let Some(knotd) = tools::require("knotd") else { return };
    let server = Server::start_with(&["--ns-address", "192.0.2.53", "--reverse-zone", "10.20.0.0/16"]);
    let mut rng = fastrand::Rng::with_seed(1);
    let (mut infos, mut names) = (Vec::new(), Vec::new());
    let (mut zone, mut reverse) = (String::new(), String::new());
    for service in ["web", "db"] {
        for n in 1..=INSTANCES {
            let (info, in_zone, in_reverse) = registration(service, n, &mut rng);
            infos.push(info);
            zone += &in_zone;
            reverse += &in_reverse;
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let url = format!("http://{}", server.grpc);
        let mut client = ServiceRegistryClient::connect(url).await.expect("it listens");
        for info in infos {
            let result = client.register(info).await.expect("served").into_inner();
            assert_eq!(result.status, 201, "{result:?}");
        }
    });

    let soa = ask(server.dns, Over::Tcp, ZONE, RecordType::SOA).answers[0].data.to_string();
    let serial = soa.split(' ').nth(2).expect("the third field");
    let apex = |zone: &str| {
        format!(
            "{zone} 5 IN SOA ns.dns.{ZONE} hostmaster.{ZONE} {serial} 7200 1800 86400 5\n{zone} 5 IN NS ns.dns.{ZONE}\n"
        )
    };
    let fixed = format!("ns.dns.{ZONE} 5 IN A 192.0.2.53\ndns-version.{ZONE} 28800 IN TXT \"1.1.0\"\n");
    let knot = Knot::start(&knotd, &[(ZONE, apex(ZONE) + &fixed + &zone), (REVERSE, apex(REVERSE) + &reverse)]);

    // Every owner, what lies above and below of each, and names that nobody has.
    for owner in zone.lines().chain(reverse.lines()).chain(fixed.lines()).filter_map(|line| line.split(' ').next()) {
        let above = owner.split_once('.').expect("more than one label").1;
        names.extend([owner.to_owned(), above.to_owned(), format!("x.{owner}")]);
    }
    let more =
        ["", "svc.", "no.svc.", "prod.svc.", "no.prod.svc.", "_no._tcp.web.prod.svc.", "_http._udp.web.prod.svc."];
    names.extend(more.map(|labels| format!("{labels}{ZONE}")));
    let more = ["", "3.", "250.3.", "256.3.", "010.3.", "1.3.3."];
    names.extend(more.map(|labels| format!("{labels}{REVERSE}")));
    names.push("example.com.".into());
    names.sort();
    names.dedup();
    assert!(names.len() > 400, "{}", names.len());
    for name in names {
        for rtype in TYPES {
            let (ours, theirs) = (said(server.dns, &name, rtype), said(knot.address, &name, rtype));
            assert_eq!(ours, theirs, "{name} {rtype}: gangplank, then Knot");
        }
    }
}
