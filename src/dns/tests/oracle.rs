//! A second encoder as oracle: hickory-proto's, with the same lookup and the same draw, makes the same
//! message.

use std::net::IpAddr;

use super::*;
use crate::{
    dns::render::MAX_PTR,
    model::{DashedLabel, RecordType, Resolution},
    zone::{Addresses, Alias, Apex, Hit, HostLabel, Lookup, QName, ZoneReader},
};
use hickory_proto::{
    op::{Edns, MessageType, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record,
        rdata::{
            A as RdataA, AAAA as RdataAaaa, CNAME as RdataCname, NS as RdataNs, PTR as RdataPtr, SOA as RdataSoa,
            SRV as RdataSrv, TXT as RdataTxt, opt::EdnsOption,
        },
    },
};

const ORIGIN: &str = "cluster.local.";

fn name(text: &str) -> Name {
    Name::from_ascii(text).expect("a name")
}

/// The message that hickory-proto is to encode.
struct Oracle<'v, 'z> {
    view: &'v ZoneReader<'z>,
    asked: Name,
    rng: fastrand::Rng,
    message: Message,
}

impl Oracle<'_, '_> {
    fn record(&self, owner: &Name, ttl: u32, data: RData) -> Record {
        Record::from_rdata(owner.clone(), ttl, data)
    }

    fn addresses(&mut self, owner: &Name, found: Addresses<'_>) -> Vec<Record> {
        let ttl = self.view.ttl();
        let mut records = Vec::new();
        if let Some(set) = found.v4 {
            let rows = set.wrap_from(set.draw(&mut self.rng));
            records.extend(rows.map(|row| self.record(owner, ttl, RData::A(RdataA(row.ip)))));
        }
        if let Some(set) = found.v6 {
            let rows = set.wrap_from(set.draw(&mut self.rng));
            records.extend(rows.map(|row| self.record(owner, ttl, RData::AAAA(RdataAaaa(row.ip)))));
        }
        records
    }

    fn soa(&self, apex: Apex) -> Record {
        let labels = self.asked.num_labels() as usize - apex.0;
        let minimum = self.view.ttl();
        let soa = RdataSoa::new(
            name("ns.dns.cluster.local."),
            name("hostmaster.cluster.local."),
            self.view.serial(),
            7200,
            1800,
            86_400,
            minimum,
        );
        self.record(&self.asked.trim_to(labels), minimum.min(300), RData::SOA(soa))
    }

    fn hit(&mut self, hit: &Hit<'_>) {
        let (asked, ttl) = (self.asked.clone(), self.view.ttl());
        match hit {
            Hit::A(set, ttl) => {
                self.message.answers = self.addresses(&asked, Addresses { v4: Some(*set), v6: None, ttl: *ttl });
            }
            Hit::Aaaa(set, ttl) => {
                self.message.answers = self.addresses(&asked, Addresses { v4: None, v6: Some(*set), ttl: *ttl });
            }
            Hit::Cname(Alias { target, resolution }, qtype) => {
                let target = name(&format!("{target}."));
                self.message.answers = vec![self.record(&asked, ttl, RData::CNAME(RdataCname(target.clone())))];
                let Resolution::Addresses(found) = resolution else { return };
                let ips: Vec<IpAddr> = found.iter().collect();
                let family = |v4: bool| ips.iter().copied().filter(move |ip| ip.is_ipv4() == v4).collect::<Vec<_>>();
                let mut ips = match qtype {
                    Some(RecordType::A) => family(true),
                    Some(RecordType::Aaaa) => family(false),
                    _ => return,
                };
                let first = self.rng.usize(0..ips.len().max(1));
                ips.rotate_left(first);
                let ttl = ttl.min(found.ttl);
                let data = |ip| match ip {
                    IpAddr::V4(ip) => RData::A(RdataA(ip)),
                    IpAddr::V6(ip) => RData::AAAA(RdataAaaa(ip)),
                };
                let records = ips.into_iter().map(|ip| self.record(&target, ttl, data(ip)));
                let records: Vec<_> = records.collect();
                self.message.answers.extend(records);
            }
            Hit::Srv(set, records) => {
                let service = asked.trim_to(asked.num_labels() as usize - 2).to_lowercase();
                let rows: Vec<_> = set.wrap_from(set.draw(&mut self.rng)).collect();
                let mut seen: Vec<&HostLabel> = Vec::new();
                for row in &rows {
                    let target = match &row.target {
                        HostLabel::External(target) => name(&format!("{target}.")),
                        label => name(&format!("{}.{service}", host_label(label))),
                    };
                    let data = RdataSrv::new(row.priority, row.srv_weight(), row.port, target.clone());
                    self.message.answers.push(self.record(&asked, ttl, RData::SRV(data)));
                    if !seen.contains(&&row.target) {
                        seen.push(&row.target);
                        let found = records.target(&row.target);
                        assert!(found.is_some() || matches!(row.target, HostLabel::External(_)), "the target exists");
                        let records = found.into_iter().flat_map(|found| self.addresses(&target, found));
                        let records: Vec<_> = records.collect();
                        self.message.additionals.extend(records);
                    }
                }
            }
            Hit::Ptr(set, ip) => {
                let rows = set.wrap_from(set.draw(&mut self.rng)).take(MAX_PTR);
                for row in rows {
                    let host = row.host.as_ref().map_or_else(|| DashedLabel::new(*ip).to_string(), ToString::to_string);
                    let target = name(&format!("{host}.{}.svc.{ORIGIN}", row.service.as_str()));
                    self.message.answers.push(self.record(&asked, ttl, RData::PTR(RdataPtr(target))));
                }
            }
            Hit::Version => {
                let data = RData::TXT(RdataTxt::new(vec!["1.1.0".into()]));
                self.message.answers = vec![self.record(&asked, 28_800, data)];
            }
            Hit::Soa(apex) => self.message.answers = vec![self.soa(*apex)],
            Hit::Ns(found) => {
                let server = name("ns.dns.cluster.local.");
                self.message.answers = vec![self.record(&asked, ttl, RData::NS(RdataNs(server.clone())))];
                self.message.additionals = self.addresses(&server, *found);
            }
        }
    }
}

fn host_label(target: &HostLabel) -> String {
    match target {
        HostLabel::Dashed(ip) => DashedLabel::new(*ip).to_string(),
        HostLabel::Registered(label) => label.to_string(),
        HostLabel::External(name) => name.to_string(),
    }
}

/// The message that hickory-proto encodes.
fn expected(zone: &TestZone, text: &str, qtype: u16, seed: u64, edns: bool) -> Vec<u8> {
    let view = zone.zone.pin();
    let asked = name(text);
    let mut message = Message::response(0x1234, OpCode::Query);
    message.metadata.message_type = MessageType::Response;
    message.metadata.recursion_desired = true;
    let mut query = Query::query(asked.clone(), qtype.into());
    query.set_query_class(DNSClass::IN);
    message.add_query(query);
    let rng = fastrand::Rng::with_seed(seed);
    let mut oracle = Oracle { view: &view, asked, rng, message };
    let qname = QName::from_text(text).expect("a name");
    let (rcode, authoritative) = match view.lookup(&qname, RecordType::from_number(qtype)) {
        Lookup::Hit(hit) => {
            oracle.hit(&hit);
            let denied = |alias: &Alias<'_>| *alias.resolution == Resolution::NxDomain && ![5, ANY].contains(&qtype);
            match hit {
                Hit::Cname(alias, _) if denied(&alias) => (ResponseCode::NXDomain, true),
                _ => (ResponseCode::NoError, true),
            }
        }
        Lookup::NoData(apex) => {
            oracle.message.authorities = vec![oracle.soa(apex)];
            (ResponseCode::NoError, true)
        }
        Lookup::NxDomain(apex) => {
            oracle.message.authorities = vec![oracle.soa(apex)];
            (ResponseCode::NXDomain, true)
        }
        Lookup::OutOfZone => (ResponseCode::Refused, false),
        Lookup::NotReady | Lookup::Unavailable => (ResponseCode::ServFail, false),
    };
    let mut message = oracle.message;
    message.metadata.response_code = rcode;
    message.metadata.authoritative = authoritative;
    if edns {
        let unavailable = matches!(view.lookup(&qname, RecordType::from_number(qtype)), Lookup::Unavailable);
        let mut edns = Edns::new();
        if unavailable {
            edns.options_mut().insert(EdnsOption::Unknown(15, 23u16.to_be_bytes().into()));
        }
        edns.set_max_payload(1232);
        edns.set_version(0);
        message.set_edns(edns);
    }
    message.to_vec().expect("hickory-proto encodes it")
}

fn any_zone() -> impl Strategy<Value = TestZone> {
    let flags = (any::<bool>(), prop::bool::weighted(0.3));
    (any_registrations(), any_resolutions(), prop::sample::select(vec![0, 5, 3600]), flags).prop_map(
        |(registrations, resolutions, ttl, (reverse, flatten_names))| {
            let network = ("10.20.0.0".parse().expect("valid"), 21);
            let mut zone = TestZone::new(ZoneConfig {
                ttl,
                reverse_zones: if reverse { vec![network] } else { Vec::new() },
                ns_addresses: vec!["192.0.2.53".parse::<IpAddr>().expect("valid")],
                flatten_names,
                ..config()
            });
            register(&mut zone, &registrations);
            NAMES.into_iter().zip(resolutions).for_each(|(name, resolution)| zone.resolve(name, resolution));
            zone
        },
    )
}

pub(super) fn any_name() -> impl Strategy<Value = String> {
    let label = |labels: &'static [&'static str]| prop::sample::select(labels);
    let service = (label(&["web", "db", "no"]), label(&["prod", "test", "no"]));
    let host = label(&["", "a.", "b.", "10-20-0-1.", "10-20-0-2.", "2001-db8-0-1--0.", "_tcp.", "_udp.", "x.a."]);
    let port = (label(&["_http", "_web", "_dns", "_no"]), label(&["_tcp", "_udp", "_sctp"]));
    prop_oneof![
        4 => (host, service.clone()).prop_map(|(host, (s, n))| format!("{host}{s}.{n}.svc.{ORIGIN}")),
        4 => (port, service).prop_map(|((p, t), (s, n))| format!("{p}.{t}.{s}.{n}.svc.{ORIGIN}")),
        2 => (0u8..9, label(&["0.20.10", "8.20.10", "256.20.10"])).prop_map(|(n, net)| format!("{n}.{net}.in-addr.arpa.")),
        1 => (1u8..4).prop_map(|n| format!("{}{n}.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.", "0.".repeat(16))),
        2 => label(&[
            ".", ORIGIN, "svc.cluster.local.", "dns.cluster.local.", "ns.dns.cluster.local.", "prod.svc.cluster.local.",
            "dns-version.cluster.local.", "no.cluster.local.", "20.10.in-addr.arpa.", "0.20.10.in-addr.arpa.", "example.com.",
        ]).prop_map(ToOwned::to_owned),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn hickory_encodes_the_same_message(
        zone in any_zone(),
        names in prop::collection::vec((any_name(), any::<u64>()), 1..12),
        qtype in prop::sample::select(vec![A, AAAA, SRV, PTR, TXT, SOA, NS, ANY, MX, 5]),
        edns in any::<bool>(),
    ) {
        for (text, seed) in names {
            // Bits of the seed say which letters are upper case.
            let odd: String = text
                .chars()
                .enumerate()
                .map(|(index, c)| if seed >> (index % 64) & 1 == 1 { c.to_ascii_uppercase() } else { c })
                .collect();
            let query = query_for(&odd, qtype).tcp();
            let query = if edns { query.edns(1232) } else { query };
            let mut rng = fastrand::Rng::with_seed(seed);
            let ours = respond_with(&zone, Transport::Tcp, &query.packet(), &mut rng).expect("an answer");
            let theirs = expected(&zone, &odd, qtype, seed, edns);
            let (ours, theirs) = (Message::from_vec(&ours), Message::from_vec(&theirs));
            prop_assert_eq!(ours.expect("ours parses"), theirs.expect("theirs parses"), "{} {}", odd, qtype);
        }
    }
}
