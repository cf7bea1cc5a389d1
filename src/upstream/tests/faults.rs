//! Servers that fail in every way, and answers that must not be followed.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Name, RData, Record, rdata::NS},
};
use tokio::time::timeout;

use super::{
    super::{Lookups, MAX_LOOKUPS, Timing, UpstreamOptions},
    FASTER, SharedZone, WAIT_TIMEOUT, addresses, lookups, name, once, options,
    server::{Over, Reaction, Server, Zone, failing, for_another_name, record, reply},
    until,
};
use crate::{
    metrics::NameState,
    model::{MAX_RESOLVED, Resolution},
};

type Fault = fn(&Zone, &Message, Over) -> Reaction;

fn encoded(message: &Message) -> Vec<u8> {
    message.to_vec().expect("it can be encoded")
}

/// Every way to fail, with a part of the error.
const FAULTS: &[(&str, Fault)] = &[
    ("SERVFAIL", |_, question, _| failing(question, ResponseCode::ServFail)),
    ("REFUSED", |_, question, _| failing(question, ResponseCode::Refused)),
    ("NOTIMP", |_, question, _| failing(question, ResponseCode::NotImp)),
    ("FORMERR", |_, question, _| failing(question, ResponseCode::FormErr)),
    ("BADVERS", |_, question, _| {
        // Its low four bits are those of NOERROR.
        let mut answer = reply(question);
        answer.set_edns(hickory_proto::op::Edns::new());
        answer.metadata.response_code = ResponseCode::BADVERS;
        vec![encoded(&answer)]
    }),
    ("no answer within", |_, _, _| Vec::new()),
    ("no answer within", |zone, question, _| {
        let mut answer = zone.answer(question);
        answer.metadata.id ^= 1;
        vec![encoded(&answer)]
    }),
    ("no answer within", |zone, question, _| vec![for_another_name(zone, question)]),
    ("no answer within", |_, _, _| vec![vec![0; 1]]),
    ("invalid answer", |_, question, _| {
        let mut octets = question.metadata.id.to_be_bytes().to_vec();
        octets.extend([0xff; 40]);
        vec![octets]
    }),
    // The question itself comes back.
    ("invalid answer", |_, question, _| vec![encoded(question)]),
    ("over TCP", |_, question, over| {
        let mut answer = reply(question);
        answer.metadata.truncation = true;
        if over == Over::Udp { vec![encoded(&answer)] } else { Vec::new() }
    }),
    ("over TCP too", |_, question, _| {
        let mut answer = reply(question);
        answer.metadata.truncation = true;
        vec![encoded(&answer)]
    }),
    ("another question", |zone, question, over| {
        let mut answer = reply(question);
        answer.metadata.truncation = true;
        if over == Over::Udp { vec![encoded(&answer)] } else { vec![for_another_name(zone, question)] }
    }),
    ("over TCP", |_, question, over| {
        let mut answer = reply(question);
        answer.metadata.truncation = true;
        if over == Over::Udp { vec![encoded(&answer)] } else { vec![vec![0xff; 60_000]] }
    }),
    ("not a resolver", |_, question, _| {
        let mut answer = reply(question);
        let server = NS(Name::from_ascii("ns.test.").expect("a name"));
        answer.add_authority(Record::from_rdata(Name::from_ascii("test.").expect("a name"), 60, RData::NS(server)));
        vec![encoded(&answer)]
    }),
    ("in a circle", |_, question, _| {
        let mut answer = reply(question);
        answer.add_answer(record("a.test.", 60, "b.test."));
        answer.add_answer(record("b.test.", 60, "A.test."));
        vec![encoded(&answer)]
    }),
    ("more than 16 aliases", |_, question, _| {
        let mut answer = reply(question);
        answer.add_answer(record("a.test.", 60, "c0.test."));
        for n in 0..40 {
            answer.add_answer(record(&format!("c{n}.test."), 60, &format!("c{}.test.", n + 1)));
        }
        vec![encoded(&answer)]
    }),
    // Each answer is one more alias.
    ("more than 16 aliases", |_, question, _| {
        let mut answer = reply(question);
        let asked = question.queries[0].name().to_string();
        let next = format!("{}.test.", asked.len());
        answer.add_answer(record(&asked, 60, &format!("x{}{next}", "x".repeat(asked.len() % 50))));
        vec![encoded(&answer)]
    }),
];

#[tokio::test]
async fn last_good_answer_is_kept_while_the_server_fails_and_not_for_ever() {
    let zone = Zone::new(&[("a.test.", 1, "192.0.2.1"), ("a.test.", 1, "2001:db8::1")]);
    let tests = FAULTS.iter().map(|&(text, fault)| survives(&zone, text, fault));
    futures::future::join_all(tests).await;
}

async fn survives(zone: &Zone, text: &str, fault: Fault) {
    let good = addresses(&["192.0.2.1", "2001:db8::1"], 1);
    let (now, then) = (zone.clone(), zone.clone());
    let server = Server::start(move |question, over| now.react(question, over)).await;
    let options = UpstreamOptions { stale: Duration::from_secs(3), ..options(&[&server]) };
    let mut lookups = lookups(options, Timing::faster(FASTER));
    lookups.want(name("a.test"));
    until(&mut lookups, &name("a.test"), |status| *status.resolution == good).await;

    server.set(move |question, over| fault(&then, question, over));
    let failing =
        until(&mut lookups, &name("a.test"), |status| status.error.as_ref().is_some_and(|err| err.contains(text)))
            .await;
    assert_eq!(*failing.resolution, good, "{text}: the last good answer");
    let err = failing.error.expect("it fails");
    let at_server = !(text.contains("circle") || text.contains("aliases"));
    assert_eq!(err.contains(&server.address.to_string()), at_server, "{err}");
    assert_eq!(lookups.metrics.upstream.names.at(NameState::Stale).get(), 1);

    let expired = until(&mut lookups, &name("a.test"), |status| *status.resolution == Resolution::Unavailable).await;
    assert_eq!(expired.answered, failing.answered, "the last answer");
    assert!(expired.error.is_some());

    let back = zone.clone();
    server.set(move |question, over| back.react(question, over));
    until(&mut lookups, &name("a.test"), |status| *status.resolution == good && status.error.is_none()).await;
}

#[tokio::test]
async fn server_that_nobody_listens_at_is_noticed_at_once() {
    let address = {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("loopback");
        socket.local_addr().expect("bound")
    };
    let options = UpstreamOptions { servers: vec![address], ..options(&[]) };
    let mut lookups = lookups(options, Timing::new());
    lookups.want(name("a.test"));
    let status = until(&mut lookups, &name("a.test"), |_| true).await;
    let err = status.error.expect("it fails");
    assert!(err.contains(&address.to_string()) && err.contains("refused"), "by its ICMP error: {err}");
    assert_eq!(*status.resolution, Resolution::Unavailable);
    assert_eq!(status.answered, None);
}

#[tokio::test]
async fn forged_answers_before_the_right_one_are_ignored() {
    let zone = Zone::new(&[("a.test.", 60, "192.0.2.1")]);
    let forged = Zone::new(&[("a.test.", 60, "198.51.100.66"), ("other.test.", 60, "198.51.100.66")]);
    let server = Server::start(move |question, over| {
        let mut wrong_id = forged.answer(question);
        wrong_id.metadata.id ^= 0x8000;
        let right = zone.react(question, over).remove(0);
        // Unsolicited records beside the right ones are not taken either.
        let mut beside = Message::from_vec(&right).expect("it can be decoded");
        beside.add_answer(record("elsewhere.test.", 60, "198.51.100.66"));
        beside.add_additional(record("a.test.", 60, "198.51.100.66"));
        vec![vec![7], encoded(&wrong_id), for_another_name(&forged, question), encoded(&beside)]
    })
    .await;
    let status = once(&server, 60, "a.test").await;
    assert_eq!(*status.resolution, addresses(&["192.0.2.1"], 60));
    assert_eq!(status.error, None);
}

#[tokio::test]
async fn ids_and_ports_are_drawn_for_every_question() {
    let records: Vec<String> = (0..200).map(|n| format!("n{n}.test.")).collect();
    let records: Vec<_> = records.iter().map(|name| (name.as_str(), 300, "192.0.2.1")).collect();
    let server = Server::of(&Zone::shared(&records)).await;
    let mut lookups = lookups(options(&[&server]), Timing::new());
    (0..200).for_each(|n| lookups.want(name(&format!("n{n}.test"))));
    let mut left = 200;
    while left > 0 {
        left -= timeout(WAIT_TIMEOUT, lookups.next()).await.expect("all are looked up").len();
    }
    let asked = server.asked();
    let distinct = |of: &dyn Fn(&super::server::Asked) -> u16| {
        let values: std::collections::BTreeSet<u16> = asked.iter().map(of).collect();
        let halves = values.iter().filter(|value| **value > 32_768).count();
        assert!(halves > values.len() / 4 && halves < values.len() * 3 / 4, "from the whole range: {values:?}");
        values.len()
    };
    assert!(distinct(&|asked| asked.id) > 380, "400 of 65 536");
    assert!(distinct(&|asked| asked.from.port()) > 380, "400 of 64 512");
}

#[tokio::test]
async fn family_that_fails_keeps_its_addresses_beside_the_new_ones_of_the_other() {
    let zone = Zone::shared(&[("a.test.", 1, "192.0.2.1"), ("a.test.", 1, "2001:db8::1")]);
    let server = Server::of(&zone).await;
    let mut lookups = lookups(options(&[&server]), Timing::faster(FASTER));
    lookups.want(name("a.test"));
    until(&mut lookups, &name("a.test"), |status| status.error.is_none()).await;
    zone.lock().expect("no panic").records[0] = record("a.test.", 1, "192.0.2.7");
    only_v4(&server, &zone);
    let mixed = addresses(&["192.0.2.7", "2001:db8::1"], 1);
    let status = until(&mut lookups, &name("a.test"), |status| *status.resolution == mixed).await;
    let err = status.error.expect("AAAA fails");
    assert!(err.starts_with("AAAA: ") && err.ends_with("SERVFAIL"), "{err}");

    // Without an earlier answer for the family, the other's addresses are served. That there are none is not.
    let status = once(&server, 60, "a.test").await;
    assert_eq!(*status.resolution, addresses(&["192.0.2.7"], 1));
    assert!(status.error.is_some() && status.answered.is_some());
    zone.lock().expect("no panic").records.remove(0);
    let status = once(&server, 60, "a.test").await;
    assert_eq!(*status.resolution, Resolution::Unavailable, "unknown is not absent");
}

/// The server fails for AAAA.
fn only_v4(server: &Server, zone: &SharedZone) {
    let zone = Arc::clone(zone);
    server.set(move |question, over| {
        if question.queries[0].query_type() == hickory_proto::rr::RecordType::AAAA {
            failing(question, ResponseCode::ServFail)
        } else {
            zone.lock().expect("no panic").react(question, over)
        }
    });
}

#[tokio::test]
async fn server_without_edns_is_asked_without() {
    let zone = Zone::new(&[("a.test.", 60, "192.0.2.1")]);
    let server = Server::start(move |question, over| {
        if question.edns.is_some() { failing(question, ResponseCode::FormErr) } else { zone.react(question, over) }
    })
    .await;
    assert_eq!(*once(&server, 60, "a.test").await.resolution, addresses(&["192.0.2.1"], 60));
}

#[tokio::test]
async fn answers_over_tcp_are_taken_up_to_the_limit() {
    for many in [100, 1000, 2900_u32] {
        let mut zone = Zone::new(&[]);
        let ip = |n: u32| std::net::Ipv4Addr::from_bits(0x0a00_0000 | n).to_string();
        zone.records = (0..many).rev().map(|n| record("a.test.", 60, &ip(n))).collect();
        let server = Server::start(move |question, over| zone.react(question, over)).await;
        let status = once(&server, 60, "a.test").await;
        let Resolution::Addresses(found) = &*status.resolution else { panic!("{status:?}") };
        let lowest: Vec<String> = (0..64).map(ip).collect();
        assert_eq!(found.iter().map(|ip| ip.to_string()).collect::<Vec<_>>(), lowest, "as all replicas take them");
        assert_eq!(found.v4.len(), MAX_RESOLVED);
        let err = status.error.expect("some are left out");
        assert_eq!(&*err, format!("only the lowest 64 of {many} A records are used"));
    }
}

#[tokio::test]
async fn names_in_the_own_zone_are_never_asked_for() {
    let zone = Zone::shared(&[
        ("a.test.", 60, "b.test."),
        ("b.test.", 60, "web.prod.svc.CLUSTER.local."),
        ("web.prod.svc.cluster.local.", 60, "192.0.2.1"),
        ("apex.test.", 60, "cluster.local."),
        ("cluster.local.", 60, "192.0.2.1"),
        ("good.test.", 60, "x.notcluster.local."),
        ("x.notcluster.local.", 60, "192.0.2.1"),
    ]);
    for recursive in [true, false] {
        zone.lock().expect("no panic").recursive = recursive;
        let server = Server::of(&zone).await;
        for (one, within) in [
            ("web.prod.svc.cluster.local", "in the zone of this server"),
            ("cluster.local", "in the zone of this server"),
            ("a.test", "web.prod.svc.cluster.local"),
            ("apex.test", "cluster.local"),
        ] {
            let status = once(&server, 60, one).await;
            assert_eq!(*status.resolution, Resolution::Unavailable, "{one}");
            let err = status.error.expect(one);
            assert!(err.contains(within) && err.contains("ask itself"), "{err}");
        }
        assert_eq!(*once(&server, 60, "good.test").await.resolution, addresses(&["192.0.2.1"], 60));
        let own: Vec<_> = server
            .asked()
            .into_iter()
            .filter(|asked| {
                let name = asked.name.to_lowercase();
                name == "cluster.local." || name.ends_with(".cluster.local.")
            })
            .collect();
        assert!(own.is_empty(), "{own:?}");
    }
}

#[tokio::test]
async fn alias_into_the_own_zone_ends_what_was_served() {
    let zone = Zone::shared(&[("a.test.", 1, "192.0.2.1")]);
    let server = Server::of(&zone).await;
    let mut lookups = lookups(options(&[&server]), Timing::faster(FASTER));
    lookups.want(name("a.test"));
    until(&mut lookups, &name("a.test"), |status| status.error.is_none()).await;
    zone.lock().expect("no panic").records[0] = record("a.test.", 1, "b.svc.cluster.local.");
    until(&mut lookups, &name("a.test"), |status| *status.resolution == Resolution::Unavailable).await;
    zone.lock().expect("no panic").records[0] = record("a.test.", 1, "192.0.2.2");
    let good = addresses(&["192.0.2.2"], 1);
    until(&mut lookups, &name("a.test"), |status| *status.resolution == good).await;
}

#[tokio::test]
async fn addresses_that_pods_cannot_use_are_left_out() {
    let zone = Zone::shared(&[
        ("a.test.", 60, "192.0.2.1"),
        ("a.test.", 60, "127.0.0.1"),
        ("a.test.", 60, "169.254.169.254"),
        ("a.test.", 60, "0.0.0.0"),
        ("a.test.", 60, "224.0.0.1"),
        ("a.test.", 60, "255.255.255.255"),
        ("a.test.", 60, "::1"),
        ("a.test.", 60, "::ffff:127.0.0.1"),
        ("a.test.", 60, "2001:db8::1"),
        ("b.test.", 60, "127.0.0.1"),
    ]);
    let server = Server::of(&zone).await;
    let status = once(&server, 60, "a.test").await;
    assert_eq!(*status.resolution, addresses(&["192.0.2.1", "2001:db8::1"], 60));
    assert_eq!(
        status.error.as_deref(),
        Some(
            "left out, because pods cannot use them: 127.0.0.1 (loopback), 169.254.169.254 (link-local), 0.0.0.0 \
             (unspecified) and 2 more; left out, because pods cannot use them: ::1 (loopback), ::ffff:127.0.0.1 (IPv4-mapped)"
        )
    );
    let status = once(&server, 60, "b.test").await;
    assert!(status.resolution.addresses().is_none() && status.error.is_some(), "{status:?}");
}

#[tokio::test]
async fn next_server_is_asked_when_one_fails() {
    let zone = Zone::shared(&[("a.test.", 60, "192.0.2.1")]);
    let good = Server::of(&zone).await;
    for &(text, fault) in FAULTS {
        if text.contains("circle") || text.contains("aliases") {
            continue; // not the server's fault
        }
        let zone = zone.lock().expect("no panic").clone();
        let first = Server::start(move |question, over| fault(&zone, question, over)).await;
        let mut lookups = lookups(options(&[&first, &good]), Timing::faster(FASTER));
        lookups.want(name("a.test"));
        let status = until(&mut lookups, &name("a.test"), |status| status.error.is_none()).await;
        assert_eq!(*status.resolution, addresses(&["192.0.2.1"], 60), "{text}");
        assert!(!first.asked().is_empty());
    }
    // NXDOMAIN is an answer.
    let before = good.asked().len();
    let first = Server::start(|question, _| failing(question, ResponseCode::NXDomain)).await;
    let mut lookups = lookups(options(&[&first, &good]), Timing::new());
    lookups.want(name("a.test"));
    let status = until(&mut lookups, &name("a.test"), |_| true).await;
    assert_eq!((&*status.resolution, good.asked().len()), (&Resolution::NxDomain, before));
}

#[tokio::test]
async fn error_names_every_server_and_what_it_did() {
    let first = Server::start(|question, _| failing(question, ResponseCode::ServFail)).await;
    let second = Server::start(|question, _| failing(question, ResponseCode::Refused)).await;
    let mut lookups = lookups(options(&[&first, &second]), Timing::new());
    lookups.want(name("a.test"));
    let status = until(&mut lookups, &name("a.test"), |_| true).await;
    let expected = format!("{}: SERVFAIL; {}: REFUSED", first.address, second.address);
    assert_eq!(status.error.as_deref(), Some(&*expected));
}

#[tokio::test]
async fn silent_first_server_does_not_delay_every_lookup() {
    let records: Vec<String> = (0..200).map(|n| format!("n{n}.test.")).collect();
    let records: Vec<_> = records.iter().map(|name| (name.as_str(), 300, "192.0.2.1")).collect();
    let silent = Server::start(|_, _| Vec::new()).await;
    let good = Server::of(&Zone::shared(&records)).await;
    let mut lookups = lookups(options(&[&silent, &good]), Timing::faster(FASTER));
    for n in 0..200 {
        // One after the other, so that each could wait for the first server.
        let one = name(&format!("n{n}.test"));
        lookups.want(one.clone());
        until(&mut lookups, &one, |status| status.error.is_none()).await;
    }
    let tried: std::collections::BTreeSet<String> = silent.asked().into_iter().map(|asked| asked.name).collect();
    assert!((1..40).contains(&tried.len()), "{} of 200 lookups waited for the silent server", tried.len());
}

/// One registrant may have thousands of names that no server answers for.
#[tokio::test]
async fn names_that_nobody_answers_for_do_not_delay_the_others() {
    const SILENT: usize = 1000;
    let zone = Zone::shared(&[("good.test.", 1, "192.0.2.1")]);
    let answers = Arc::clone(&zone);
    let server = Server::start(move |question, over| {
        let is_good = question.queries[0].name().to_string() == "good.test.";
        if is_good { answers.lock().expect("no panic").react(question, over) } else { Vec::new() }
    })
    .await;
    let mut lookups = lookups(options(&[&server]), Timing::faster(FASTER));
    let good = name("good.test");
    lookups.want(good.clone());
    until(&mut lookups, &good, |status| status.error.is_none()).await;
    (0..SILENT).for_each(|n| lookups.want(name(&format!("n{n}.test"))));
    zone.lock().expect("no panic").records = vec![record("good.test.", 1, "192.0.2.2")];
    let changed = addresses(&["192.0.2.2"], 1);
    until(&mut lookups, &good, |status| *status.resolution == changed).await;
    let asked = in_order(&server.asked()).len();
    assert!(asked < SILENT / 2, "{asked} silent names were asked for before the good one was looked up again");
}

#[tokio::test]
async fn lookups_at_one_time_are_bounded() {
    let silent = Server::start(|_, _| Vec::new()).await;
    let mut lookups = lookups(options(&[&silent]), Timing::faster(FASTER));
    let names = 3 * MAX_LOOKUPS;
    (0..names).for_each(|n| lookups.want(name(&format!("n{n}.test"))));
    let mut failed = std::collections::BTreeSet::new();
    while failed.len() < names {
        let batch = timeout(WAIT_TIMEOUT, lookups.next()).await.expect("each fails");
        failed.extend(batch.into_iter().map(|(name, _)| name));
        assert!(lookups.running.len() <= MAX_LOOKUPS);
    }
    assert_eq!(in_order(&silent.asked()).len(), names);
}

/// The names in the order in which they were asked for first.
fn in_order(asked: &[super::server::Asked]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for one in asked {
        if !names.contains(&one.name) {
            names.push(one.name.clone());
        }
    }
    names
}

/// The future of `next` goes into a task.
#[test]
fn lookups_can_move_between_threads() {
    fn is_send<T: Send>(_: &T) {}
    let options = UpstreamOptions { servers: vec![SocketAddr::from(([127, 0, 0, 1], 53))], ..options(&[]) };
    let mut lookups: Lookups = lookups(options, Timing::new());
    is_send(&lookups);
    is_send(&lookups.next());
}
