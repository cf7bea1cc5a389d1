//! Limits of size: RFC 1035 §2.3.4 and §4.2.2, RFC 2181 §9, RFC 6891 §6.2.3.

use std::net::Ipv4Addr;

use super::*;
use crate::zone::testing::{instance, key};

const WEB: &str = "web.prod.svc.cluster.local.";
const HTTP: &str = "_http._tcp.web.prod.svc.cluster.local.";

fn service_of(count: u32) -> World {
    let mut world = World::new(config());
    let service = key("web.prod");
    let at = |n: u32| spec(&Ipv4Addr::from_bits(0x0a00_0000 + n).to_string(), &["http:80"]);
    let all: Vec<_> = (0..count).map(|n| (instance(&service, &at(n)), true)).collect();
    world.change(&service, &all);
    world
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
fn no_answer_is_larger_than_asked_for_and_none_smaller_than_it_could_be() {
    for count in [1, 2, 27, 28, 29, 30, 31, 32, 33, 70, 74, 75, 76, 100, 1000, 1190, 1191, 4089, 4091, 4093, 5000] {
        let world = service_of(count);
        let count = count as usize;
        for (name, qtype, record) in [(WEB, A, 16), (HTTP, SRV, 0)] {
            for edns in [None, Some(0), Some(512), Some(700), Some(1232), Some(4096)] {
                for transport in [Transport::Udp, Transport::Tcp] {
                    let query = Ask { transport, ..ask(name, qtype) };
                    let query = edns.map_or_else(|| query.clone(), |size| query.clone().edns(size));
                    let told = tell(&world, &query);
                    let limit = limit(edns, transport);
                    let says = format!("{count} instances, {name}, EDNS {edns:?}, {transport:?}");
                    assert!(told.octets.len() <= limit, "{says}: {} octets", told.octets.len());
                    let answers = told.message.answers.len();
                    assert_eq!(told.truncated(), answers < count, "{says}: {answers} records");
                    assert_eq!(told.message.edns.is_some(), edns.is_some(), "{says}");
                    if told.truncated() {
                        // Whole records, as many as fit, and nothing that merely helps.
                        let longest = if record > 0 { record } else { 62 };
                        assert!(told.octets.len() + longest > limit, "{says}: {} octets", told.octets.len());
                        assert!(told.message.additionals.is_empty(), "{says}");
                    }
                    let mut distinct = told.answers();
                    distinct.dedup();
                    assert_eq!(distinct.len(), answers, "{says}");
                }
            }
        }
    }
}

#[test]
fn tcp_carries_4090_addresses_or_1190_ports() {
    let world = service_of(5000);
    let told = tell(&world, &ask(WEB, A).tcp());
    assert!((4085..=4095).contains(&told.message.answers.len()), "{}", told.message.answers.len());
    let told = tell(&world, &ask(HTTP, SRV).tcp());
    assert!((1100..=1200).contains(&told.message.answers.len()), "{}", told.message.answers.len());
}

#[test]
fn a_window_begins_anywhere_and_wraps() {
    let world = service_of(100);
    let packet = ask(WEB, A).packet();
    let mut rng = fastrand::Rng::with_seed(3);
    let mut seen = [false; 100];
    for _ in 0..300 {
        let octets = respond_with(&world, Transport::Udp, &packet, &mut rng).expect("an answer");
        let window: Vec<u8> = octets[packet.len()..].chunks(16).map(|record| record[15]).collect();
        assert_eq!(window.len(), (512 - packet.len()) / 16);
        assert!(window.windows(2).all(|pair| pair[1] == (pair[0] + 1) % 100), "{window:?}");
        window.iter().for_each(|n| seen[usize::from(*n)] = true);
    }
    assert!(seen.iter().all(|seen| *seen));
}

#[test]
fn rfc2181_9_additional_data_goes_by_whole_rrsets_without_tc() {
    // Seven SRV records fit 512 octets, their addresses do not all.
    let world = service_of(7);
    let told = tell(&world, &ask(HTTP, SRV));
    assert_eq!((told.message.answers.len(), told.truncated()), (7, false));
    assert!(told.message.additionals.len() < 7);

    // One target with a hundred addresses: all of them, or none.
    let mut world = World::new(config());
    for n in 0..100 {
        let one = crate::model::InstanceSpec { host_name: "h".into(), ..spec(&format!("10.0.0.{n}"), &["http:80"]) };
        world.add("web.prod", &one);
    }
    let told = tell(&world, &ask(HTTP, SRV).edns(1232));
    assert_eq!((told.message.answers.len(), told.message.additionals.len(), told.truncated()), (1, 0, false));
    let told = tell(&world, &ask(HTTP, SRV).tcp());
    assert_eq!((told.message.answers.len(), told.message.additionals.len()), (1, 100));
}

#[test]
fn a_target_with_two_ports_is_once_in_additional_wherever_the_window_begins() {
    let mut world = World::new(config());
    for n in 0..3 {
        world.add("web.prod", &spec(&format!("10.0.0.{n}"), &["http:80"]));
        world.add("web.prod", &spec(&format!("10.0.0.{n}"), &["http:81"]));
    }
    let packet = ask(HTTP, SRV).edns(1232).packet();
    let mut rng = fastrand::Rng::with_seed(3);
    for _ in 0..50 {
        let octets = respond_with(&world, Transport::Udp, &packet, &mut rng).expect("an answer");
        let message = Message::from_vec(&octets).expect("parses");
        assert_eq!((message.answers.len(), message.additionals.len()), (6, 3));
    }
}

#[test]
fn targets_beyond_the_reach_of_a_pointer_are_spelled_out() {
    // RFC 1035 §4.1.4: pointers have 14 bits. 700 records of 55 octets go beyond, and leave room.
    let world = service_of(700);
    let told = tell(&world, &ask(HTTP, SRV).tcp());
    assert_eq!((told.message.answers.len(), told.truncated()), (700, false));
    let additional = told.additional();
    assert!(additional.len() > 450, "{}", additional.len());
    for record in additional {
        let (label, ip) = (record.split('.').next(), record.rsplit(' ').next());
        assert_eq!(label.map(|label| label.replace('-', ".")).as_deref(), ip, "{record}");
    }
}

#[test]
fn the_largest_question_still_gets_its_soa_in_512_octets() {
    let world = world();
    let labels = format!("{0}.{0}.{0}.{1}", "a".repeat(63), "b".repeat(47));
    let name = format!("{labels}.cluster.local.");
    assert_eq!(wire(&name).len(), 255);
    let told = tell(&world, &ask(&name, A).edns(512));
    assert_eq!((told.rcode(), told.authority().len(), told.truncated()), (3, 1, false));
}

#[test]
fn a_buffer_of_any_size_is_never_run_over() {
    let world = world();
    let packet = ask(HTTP, SRV).edns(1232).packet();
    let view = world.zone.pin();
    let context = Context { transport: Transport::Udp, nsid: NSID };
    for size in 0..=1232 {
        let mut out = vec![0; size];
        let reply = answer(&view, &context, &mut fastrand::Rng::with_seed(1), &packet, &mut out);
        assert_eq!(reply.is_some(), size >= packet.len(), "{size}");
        assert!(reply.is_none_or(|reply| reply.len <= size));
    }
}
