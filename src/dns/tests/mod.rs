//! Tests of [`answer()`](super::answer()) with a raw client: questions are octets, answers are read by
//! hickory-proto's decoder, which shares nothing with our encoder.

mod behaviour;
mod fuzz;
mod messages;
mod names;
mod oracle;
mod records;
mod reverse;
mod sizes;
mod sockets;

use hickory_proto::op::Message;
use proptest::prelude::*;

use super::{Context, MAX_TCP, MAX_UDP, Transport, answer};
use crate::{
    model::{InstanceSpec, Resolution, ResolvedAddresses},
    zone::{
        ZoneConfig,
        testing::{TestZone, config, spec},
    },
};

const A: u16 = 1;
const NS: u16 = 2;
const SOA: u16 = 6;
const PTR: u16 = 12;
const MX: u16 = 15;
const TXT: u16 = 16;
const AAAA: u16 = 28;
const SRV: u16 = 33;
const AXFR: u16 = 252;
const ANY: u16 = 255;

/// The name server identifier in these tests.
const NSID: &[u8] = b"gp-1";

/// A query, octet by octet.
#[derive(Debug, Clone)]
struct TestQuery {
    id: u16,
    flags: [u8; 2],
    name: Vec<u8>,
    qtype: u16,
    qclass: u16,
    /// Records after the question, in wire form, and their counts.
    records: Vec<u8>,
    counts: [u16; 3],
    transport: Transport,
}

/// A name in wire form, in the case as written.
fn wire(name: &str) -> Vec<u8> {
    let labels = name.trim_end_matches('.').split('.').filter(|label| !label.is_empty());
    let mut wire: Vec<u8> = labels.flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat()).collect();
    wire.push(0);
    wire
}

fn query_for(name: &str, qtype: u16) -> TestQuery {
    TestQuery {
        id: 0x1234,
        flags: [1, 0],
        name: wire(name),
        qtype,
        qclass: 1,
        records: Vec::new(),
        counts: [0; 3],
        transport: Transport::Udp,
    }
}

impl TestQuery {
    /// With an OPT record.
    fn edns(self, size: u16) -> Self {
        self.opt(size, [0, 0, 0, 0], &[])
    }

    fn opt(mut self, size: u16, ttl: [u8; 4], options: &[u8]) -> Self {
        let [s0, s1] = size.to_be_bytes();
        let [l0, l1] = (options.len() as u16).to_be_bytes();
        self.records.extend([0, 0, 41, s0, s1]);
        self.records.extend(ttl);
        self.records.extend([l0, l1]);
        self.records.extend(options);
        self.counts[2] += 1;
        self
    }

    fn tcp(self) -> Self {
        Self { transport: Transport::Tcp, ..self }
    }

    fn packet(&self) -> Vec<u8> {
        let [id0, id1] = self.id.to_be_bytes();
        let mut packet = vec![id0, id1, self.flags[0], self.flags[1], 0, 1];
        self.counts.iter().for_each(|count| packet.extend(count.to_be_bytes()));
        packet.extend(&self.name);
        packet.extend(self.qtype.to_be_bytes());
        packet.extend(self.qclass.to_be_bytes());
        packet.extend(&self.records);
        packet
    }
}

/// An answer, as octets and parsed.
struct TestResponse {
    octets: Vec<u8>,
    message: Message,
}

impl TestResponse {
    fn records(section: &[hickory_proto::rr::Record]) -> Vec<String> {
        section.iter().map(ToString::to_string).collect()
    }

    /// Answers, each as `owner ttl class type rdata`, in order of their text.
    fn answers(&self) -> Vec<String> {
        let mut answers = Self::records(&self.message.answers);
        answers.sort();
        answers
    }

    fn additional(&self) -> Vec<String> {
        let mut additional = Self::records(&self.message.additionals);
        additional.sort();
        additional
    }

    fn authority(&self) -> Vec<String> {
        Self::records(&self.message.authorities)
    }

    fn rcode(&self) -> u16 {
        let high = self.message.edns.as_ref().map_or(0, |edns| edns.rcode_high());
        u16::from(high) << 4 | u16::from(self.octets[3] & 0x0f)
    }

    fn truncated(&self) -> bool {
        self.octets[2] & 0x02 != 0
    }
}

fn respond(zone: &TestZone, transport: Transport, packet: &[u8]) -> Option<Vec<u8>> {
    respond_with(zone, transport, packet, &mut fastrand::Rng::with_seed(7))
}

fn respond_with(zone: &TestZone, transport: Transport, packet: &[u8], rng: &mut fastrand::Rng) -> Option<Vec<u8>> {
    let size = match transport {
        Transport::Udp => usize::from(MAX_UDP),
        Transport::Tcp => MAX_TCP,
    };
    // Not zeroed: what is left of an earlier answer must not show.
    let mut out = vec![0xa5; size];
    let context = Context { transport, nsid: NSID };
    let reply = answer(&zone.zone.pin(), &context, rng, packet, &mut out)?;
    out.truncate(reply.len);
    Some(out)
}

fn exchange(zone: &TestZone, ask: &TestQuery) -> TestResponse {
    let octets = respond(zone, ask.transport, &ask.packet()).expect("an answer");
    let message = Message::from_vec(&octets).expect("an answer that parses");
    TestResponse { octets, message }
}

/// Answers of `name` in the order of their text.
fn answers(zone: &TestZone, name: &str, qtype: u16) -> Vec<String> {
    let response = exchange(zone, &query_for(name, qtype));
    assert_eq!(response.rcode(), 0, "{name}");
    response.answers()
}

/// `NOERROR` without an answer but with the SOA of `owner`.
fn assert_no_data(zone: &TestZone, name: &str, qtype: u16, owner: &str) {
    assert_negative(zone, name, qtype, owner, 0);
}

/// `NXDOMAIN` with the SOA of `owner`.
fn assert_no_name(zone: &TestZone, name: &str, qtype: u16, owner: &str) {
    assert_negative(zone, name, qtype, owner, 3);
}

fn assert_negative(zone: &TestZone, name: &str, qtype: u16, owner: &str, rcode: u16) {
    let response = exchange(zone, &query_for(name, qtype));
    assert_eq!((response.rcode(), response.answers().len()), (rcode, 0), "{name} {qtype}");
    assert_eq!(response.octets[2] & 0x04, 0x04, "AA");
    let [soa] = &*response.authority() else { panic!("{name} {qtype}: no SOA in {:?}", response.authority()) };
    assert!(soa.starts_with(&format!("{owner} 5 IN SOA ")), "{name} {qtype}: {soa}");
}

fn assert_refused(zone: &TestZone, name: &str, qtype: u16) {
    let response = exchange(zone, &query_for(name, qtype));
    assert_eq!((response.rcode(), response.octets[2] & 0x04), (5, 0), "{name} {qtype}");
    assert!(response.answers().is_empty() && response.authority().is_empty(), "{name} {qtype}");
}

/// Two services in two namespaces, of both families, with host names, shared addresses and ports.
fn sample_zone() -> TestZone {
    let mut zone = TestZone::new(ZoneConfig {
        ns_addresses: vec!["192.0.2.53".parse().expect("valid"), "2001:db8::53".parse().expect("valid")],
        ..config()
    });
    zone.add("web.prod", &spec("10.0.0.1", &["http:80", "9"]));
    zone.add("web.prod", &spec("10.0.0.2", &["http:80", "dns:53/udp"]));
    zone.add("web.prod", &spec("2001:db8::", &["http:8080"]));
    let db = InstanceSpec { host_name: "main".into(), priority: 3, ..spec("10.1.0.1", &["pg:5432"]) };
    zone.add("db.prod", &db);
    zone.add("db.prod", &InstanceSpec { address: "2001:db8::1:1".into(), weight: Some(0.5), ..db });
    zone.add("bare.test", &spec("10.0.0.1", &[]));
    zone.add_unready("sick.ill", &spec("10.9.0.1", &["http:80"]));
    zone.generation(1712);
    zone
}

/// One registration: under which service, what, and whether it is ready.
type Registration = (&'static str, InstanceSpec, bool);

/// Registrations among few addresses, names and ports, so that they meet often.
fn any_registrations() -> impl Strategy<Value = Vec<Registration>> {
    let address = prop_oneof![
        3 => (1u8..8).prop_map(|n| format!("10.20.0.{n}")),
        1 => (1u8..4).prop_map(|n| format!("2001:db8:0:{n}::")),
        1 => prop::sample::select(NAMES.to_vec()).prop_map(ToOwned::to_owned),
    ];
    let service = prop::sample::select(vec!["web.prod", "db.prod", "web.test"]);
    let host = prop::sample::select(vec!["", "", "a", "b"]);
    let ports = prop::sample::subsequence(vec!["http:80", "web:80/udp", "9", "dns:53/udp", "alt:81"], 0..5);
    let weight = prop::sample::select(vec![None, Some(0.0), Some(0.25), Some(0.001), Some(655.0)]);
    let one = (service, address, host, ports, weight, 0u16..3, prop::bool::weighted(0.8));
    let one = one.prop_map(|(service, address, host, ports, weight, priority, ready)| {
        (service, InstanceSpec { host_name: host.into(), weight, priority, ..spec(&address, &ports) }, ready)
    });
    prop::collection::vec(one, 0..20)
}

/// The names among [`any_registrations`].
const NAMES: [&str; 2] = ["gw.example.com", "pg.example.net"];

/// What each of [`NAMES`] may lead to, addresses of instances too.
fn any_resolutions() -> impl Strategy<Value = [Resolution; 2]> {
    let ips =
        prop::sample::subsequence(vec!["10.20.0.1", "192.0.2.9", "192.0.2.1", "2001:db8:0:1::", "2001:db8::9"], 0..5);
    let found = (ips, 0u32..9).prop_map(|(ips, ttl)| {
        let ips = ips.into_iter().map(|ip| ip.parse().expect("an address"));
        Resolution::Addresses(ResolvedAddresses::new(ips, ttl))
    });
    prop::array::uniform2(prop_oneof![1 => Just(Resolution::Unavailable), 1 => Just(Resolution::NxDomain), 4 => found])
}

/// Registers all of them.
fn register(zone: &mut TestZone, registrations: &[Registration]) {
    for (service, spec, ready) in registrations {
        if *ready {
            zone.add(service, spec);
        } else {
            zone.add_unready(service, spec);
        }
    }
}
