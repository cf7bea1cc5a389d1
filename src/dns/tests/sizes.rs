//! Limits of size: RFC 1035 §2.3.4 and §4.2.2, RFC 2181 §9, RFC 6891 §6.2.3.

use std::net::Ipv4Addr;

use super::*;
use crate::zone::testing::{instance, key};

const WEB: &str = "web.prod.svc.cluster.local.";
const HTTP: &str = "_http._tcp.web.prod.svc.cluster.local.";

fn service_of(count: u32) -> TestZone {
    let mut zone = TestZone::new(config());
    let service = key("web.prod");
    let at = |n: u32| spec(&Ipv4Addr::from_bits(0x0a00_0000 + n).to_string(), &["http:80"]);
    let all: Vec<_> = (0..count).map(|n| (instance(&at(n)), true)).collect();
    zone.change(&service, &all);
    zone
}

/// The limit that a query sets itself.
fn limit(edns: Option<u16>, transport: Transport) -> usize {
    match (transport, edns) {
        (Transport::Tcp, _) => 65_535,
        (Transport::Udp, None) => 512,
        (Transport::Udp, Some(size)) => usize::from(size.clamp(512, 1232)),
    }
}

#[test]
fn answers_fill_the_limit_and_never_exceed_it() {
    for count in [1, 2, 27, 28, 29, 30, 31, 32, 33, 70, 74, 75, 76, 100, 1000, 1190, 1191, 4089, 4091, 4093, 5000] {
        let zone = service_of(count);
        let count = count as usize;
        for (name, qtype, record) in [(WEB, A, 16), (HTTP, SRV, 0)] {
            for edns in [None, Some(0), Some(512), Some(700), Some(1232), Some(4096)] {
                for transport in [Transport::Udp, Transport::Tcp] {
                    let query = TestQuery { transport, ..query_for(name, qtype) };
                    let query = edns.map_or_else(|| query.clone(), |size| query.clone().edns(size));
                    let response = exchange(&zone, &query);
                    let limit = limit(edns, transport);
                    let what = format!("{count} instances, {name}, EDNS {edns:?}, {transport:?}");
                    assert!(response.octets.len() <= limit, "{what}: {} octets", response.octets.len());
                    let answers = response.message.answers.len();
                    assert_eq!(response.truncated(), answers < count, "{what}: {answers} records");
                    assert_eq!(response.message.edns.is_some(), edns.is_some(), "{what}");
                    if response.truncated() {
                        // Whole records, as many as fit, and nothing that merely helps.
                        let longest = if record > 0 { record } else { 62 };
                        assert!(response.octets.len() + longest > limit, "{what}: {} octets", response.octets.len());
                        assert!(response.message.additionals.is_empty(), "{what}");
                    }
                    let mut distinct = response.answers();
                    distinct.dedup();
                    assert_eq!(distinct.len(), answers, "{what}");
                }
            }
        }
    }
}

#[test]
fn tcp_answer_has_4090_addresses_or_1190_ports() {
    let zone = service_of(5000);
    let response = exchange(&zone, &query_for(WEB, A).tcp());
    assert!((4085..=4095).contains(&response.message.answers.len()), "{}", response.message.answers.len());
    let response = exchange(&zone, &query_for(HTTP, SRV).tcp());
    assert!((1100..=1200).contains(&response.message.answers.len()), "{}", response.message.answers.len());
}

#[test]
fn truncated_answer_starts_at_the_drawn_record_and_wraps() {
    let zone = service_of(100);
    let packet = query_for(WEB, A).packet();
    let mut rng = fastrand::Rng::with_seed(3);
    let mut seen = [false; 100];
    for _ in 0..300 {
        let octets = respond_with(&zone, Transport::Udp, &packet, &mut rng).expect("an answer");
        let window: Vec<u8> = octets[packet.len()..].chunks(16).map(|record| record[15]).collect();
        assert_eq!(window.len(), (512 - packet.len()) / 16);
        assert!(window.windows(2).all(|pair| pair[1] == (pair[0] + 1) % 100), "{window:?}");
        window.iter().for_each(|n| seen[usize::from(*n)] = true);
    }
    assert!(seen.iter().all(|seen| *seen));
}

#[test]
fn rfc2181_9_additional_data_is_dropped_by_whole_rrsets_without_tc() {
    // Seven SRV records fit 512 octets, their addresses do not all.
    let zone = service_of(7);
    let response = exchange(&zone, &query_for(HTTP, SRV));
    assert_eq!((response.message.answers.len(), response.truncated()), (7, false));
    assert!(response.message.additionals.len() < 7);

    // One target with a hundred addresses: all of them, or none.
    let mut zone = TestZone::new(config());
    for n in 0..100 {
        let one = InstanceSpec { host_name: "h".into(), ..spec(&format!("10.0.0.{n}"), &["http:80"]) };
        zone.add("web.prod", &one);
    }
    let response = exchange(&zone, &query_for(HTTP, SRV).edns(1232));
    assert_eq!(
        (response.message.answers.len(), response.message.additionals.len(), response.truncated()),
        (1, 0, false)
    );
    let response = exchange(&zone, &query_for(HTTP, SRV).tcp());
    assert_eq!((response.message.answers.len(), response.message.additionals.len()), (1, 100));
}

#[test]
fn target_with_two_ports_is_once_in_additional() {
    let mut zone = TestZone::new(config());
    for n in 0..3 {
        zone.add("web.prod", &spec(&format!("10.0.0.{n}"), &["http:80"]));
        zone.add("web.prod", &spec(&format!("10.0.0.{n}"), &["http:81"]));
    }
    let packet = query_for(HTTP, SRV).edns(1232).packet();
    let mut rng = fastrand::Rng::with_seed(3);
    for _ in 0..50 {
        let octets = respond_with(&zone, Transport::Udp, &packet, &mut rng).expect("an answer");
        let message = Message::from_vec(&octets).expect("parses");
        assert_eq!((message.answers.len(), message.additionals.len()), (6, 3));
    }
}

#[test]
fn owners_beyond_the_reach_of_a_pointer_are_written_out() {
    // RFC 1035 §4.1.4: pointers have 14 bits. 700 records of 55 octets go beyond, and leave room.
    let zone = service_of(700);
    let response = exchange(&zone, &query_for(HTTP, SRV).tcp());
    assert_eq!((response.message.answers.len(), response.truncated()), (700, false));
    let additional = response.additional();
    assert!(additional.len() > 450, "{}", additional.len());
    for record in additional {
        let (label, ip) = (record.split('.').next(), record.rsplit(' ').next());
        assert_eq!(label.map(|label| label.replace('-', ".")).as_deref(), ip, "{record}");
    }
}

#[test]
fn longest_question_gets_its_soa_in_512_octets() {
    let zone = sample_zone();
    let labels = format!("{0}.{0}.{0}.{1}", "a".repeat(63), "b".repeat(47));
    let name = format!("{labels}.cluster.local.");
    assert_eq!(wire(&name).len(), 255);
    let response = exchange(&zone, &query_for(&name, A).edns(512));
    assert_eq!((response.rcode(), response.authority().len(), response.truncated()), (3, 1, false));
}

#[test]
fn buffer_of_any_size_is_not_overrun() {
    let zone = sample_zone();
    let packet = query_for(HTTP, SRV).edns(1232).packet();
    let view = zone.zone.pin();
    let context = Context { transport: Transport::Udp, nsid: NSID };
    for size in 0..=1232 {
        let mut out = vec![0; size];
        let reply = answer(&view, &context, &mut fastrand::Rng::with_seed(1), &packet, &mut out);
        assert_eq!(reply.is_some(), size >= packet.len(), "{size}");
        assert!(reply.is_none_or(|reply| reply.len <= size));
    }
}
