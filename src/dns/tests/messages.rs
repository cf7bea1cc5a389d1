//! Headers, EDNS, and malformed packets.

use super::*;

const WEB: &str = "web.prod.svc.cluster.local.";

#[test]
fn header_of_an_answer() {
    let zone = sample_zone();
    for (flags, expected) in [
        ([0x00, 0x00], [0x84, 0x00]),
        // RD is copied, RA stays clear.
        ([0x01, 0x80], [0x85, 0x00]),
        // RFC 6840 §5.7, §5.9: CD is copied, AD and Z are not.
        ([0x01, 0x70], [0x85, 0x10]),
        // AA and TC of a query mean nothing.
        ([0x06, 0x0f], [0x84, 0x00]),
    ] {
        let query = TestQuery { flags, ..query_for(WEB, A) };
        let response = exchange(&zone, &query);
        assert_eq!(response.octets[..2], [0x12, 0x34]);
        assert_eq!(response.octets[2..4], expected, "{flags:?}");
        assert_eq!(response.octets[4..12], [0, 1, 0, 2, 0, 0, 0, 0]);
        assert_eq!(response.octets[12..query.packet().len()], query.packet()[12..]);
    }
}

#[test]
fn question_and_owners_keep_the_case_of_the_query() {
    let zone = sample_zone();
    let odd = "WeB.pRoD.SVC.cluster.LOCAL.";
    let response = exchange(&zone, &query_for(odd, A));
    assert_eq!(response.octets[12..12 + wire(odd).len()], wire(odd));
    assert!(response.answers().iter().all(|record| record.starts_with(odd)), "{:?}", response.answers());
    let response = exchange(&zone, &query_for("_HTTP._TCP.Web.Prod.svc.Cluster.local.", SRV));
    assert_eq!(response.answers().len(), 3);
    assert!(response.answers()[0].ends_with(" 10-0-0-1.web.prod.svc.cluster.local."), "{:?}", response.answers());
    assert_eq!(exchange(&zone, &query_for("1.0.0.10.IN-ADDR.arpa.", PTR)).answers().len(), 2);
    assert_eq!(exchange(&zone, &query_for("MAIN.db.prod.svc.cluster.local.", A)).answers().len(), 1);
    assert_eq!(exchange(&zone, &query_for("2001-DB8--0.web.prod.svc.cluster.local.", AAAA)).answers().len(), 1);
}

#[test]
fn responses_and_short_packets_are_not_answered() {
    let zone = sample_zone();
    let mut packet = query_for(WEB, A).packet();
    for len in 0..12 {
        assert!(respond(&zone, Transport::Udp, &packet[..len]).is_none());
    }
    for opcode in 0..16 {
        packet[2] = 0x80 | opcode << 3;
        assert!(respond(&zone, Transport::Udp, &packet).is_none());
        assert!(respond(&zone, Transport::Tcp, &packet).is_none());
    }
}

#[test]
fn other_opcodes_are_notimp() {
    let zone = sample_zone();
    for opcode in 1..16 {
        let mut packet = query_for(WEB, A).edns(1232).packet();
        packet[2] = opcode << 3 | 1;
        let octets = respond(&zone, Transport::Udp, &packet).expect("an answer");
        assert_eq!(octets, [0x12, 0x34, 0x80 | opcode << 3 | 1, 4, 0, 0, 0, 0, 0, 0, 0, 0]);
        // Also where nothing but the header came.
        assert_eq!(respond(&zone, Transport::Udp, &packet[..12]), Some(octets));
    }
}

fn assert_form_err(packet: &[u8]) {
    let zone = sample_zone();
    let octets = respond(&zone, Transport::Udp, packet).expect("an answer");
    assert_eq!(octets, [packet[0], packet[1], 0x81, 1, 0, 0, 0, 0, 0, 0, 0, 0], "{packet:?}");
}

#[test]
fn rfc9619_qdcount_other_than_one_is_formerr() {
    let packet = query_for(WEB, A).packet();
    let twice = [&packet[..], &packet[12..]].concat();
    for (count, packet) in [(0, &packet[..12]), (0, &packet), (2, &twice), (2, &packet), (0xffff, &twice)] {
        let mut packet = packet.to_vec();
        packet[4..6].copy_from_slice(&u16::to_be_bytes(count));
        assert_form_err(&packet);
    }
}

#[test]
fn malformed_questions_are_formerr() {
    let packet = query_for(WEB, A).edns(1232).packet();
    for len in 12..packet.len() {
        assert_form_err(&packet[..len]);
    }
    let named = |name: &[u8]| TestQuery { name: name.to_vec(), ..query_for(".", A) }.packet();
    // RFC 1035 §4.1.4: a pointer names what came before, and nothing did. Labels end at 63 octets.
    for name in [&b"\xc0\x0c"[..], b"\xc0\x00", b"\x03web\xc0\x0c", b"\x40a\0", b"\x80a\0"] {
        assert_form_err(&named(name));
    }
    let mut long = b"\x01a".repeat(128);
    long.push(0);
    assert_form_err(&named(&long));
}

#[test]
fn rfc6891_opt_is_in_the_answer_only_if_in_the_query() {
    let zone = sample_zone();
    assert!(exchange(&zone, &query_for(WEB, A)).message.edns.is_none());
    for name in [WEB, "no.prod.svc.cluster.local.", "example.com."] {
        let response = exchange(&zone, &query_for(name, A).edns(4096));
        let edns = response.message.edns.as_ref().expect("OPT");
        assert_eq!((edns.version(), edns.max_payload(), edns.flags().dnssec_ok), (0, 1232, false));
        assert_eq!(response.octets[response.octets.len() - 11..], [0, 0, 41, 0x04, 0xd0, 0, 0, 0, 0, 0, 0]);
    }
}

#[test]
fn rfc3225_do_is_the_only_flag_copied() {
    let response = exchange(&sample_zone(), &query_for(WEB, A).opt(1232, [0, 0, 0xff, 0xff], &[]));
    assert_eq!(response.octets[response.octets.len() - 6..], [0, 0, 0x80, 0, 0, 0]);
    assert_eq!(response.answers().len(), 2);
}

#[test]
fn rfc6891_6_1_3_another_version_is_badvers() {
    let zone = sample_zone();
    for name in [WEB, "example.com."] {
        let response = exchange(&zone, &query_for(name, A).opt(1232, [0, 1, 0x80, 0], &[]));
        assert_eq!(response.rcode(), 16);
        let edns = response.message.edns.as_ref().expect("OPT");
        assert_eq!((edns.version(), edns.flags().dnssec_ok), (0, true));
        assert_eq!((response.answers().len(), response.authority().len()), (0, 0));
        assert_eq!(response.message.queries.len(), 1);
    }
}

#[test]
fn unknown_options_and_cookies_are_ignored() {
    let response = exchange(
        &sample_zone(),
        &query_for(WEB, A).opt(1232, [0; 4], b"\0\x0a\0\x08abcdefgh\xff\xff\0\x01x\0\x08\0\0"),
    );
    assert_eq!(response.answers().len(), 2);
    assert!(response.octets.ends_with(&[0, 0]), "no option comes back");
}

#[test]
fn rfc5001_nsid_is_answered() {
    let zone = sample_zone();
    let asked = query_for(WEB, A).opt(512, [0; 4], b"\0\x03\0\0");
    for query in [asked.clone(), asked.clone().tcp(), TestQuery { name: wire("example.com."), ..asked }] {
        assert!(exchange(&zone, &query).octets.ends_with(b"\0\x08\0\x03\0\x04gp-1"));
    }
}

#[test]
fn long_nsid_leaves_room_for_the_answer() {
    let zone = sample_zone();
    let packet = query_for(WEB, A).opt(512, [0; 4], b"\0\x03\0\0").packet();
    let mut out = [0; MAX_UDP as usize];
    let context = Context { transport: Transport::Udp, nsid: &[b'n'; 255] };
    let reply = answer(&zone.zone.pin(), &context, &mut fastrand::Rng::new(), &packet, &mut out).expect("an answer");
    let message = Message::from_vec(&out[..reply.len]).expect("parses");
    assert_eq!((message.answers.len(), out[2] & 2), (2, 0));
}

#[test]
fn rfc6891_6_1_1_malformed_opt_is_formerr() {
    assert_form_err(&query_for(WEB, A).edns(1232).edns(1232).packet());
    let mut named = query_for(WEB, A);
    named.records = b"\x01a\0\0\x29\x04\xd0\0\0\0\0\0\0".to_vec();
    named.counts[2] = 1;
    assert_form_err(&named.packet());
    // An option that is longer than the record.
    assert_form_err(&query_for(WEB, A).opt(1232, [0; 4], b"\0\x03\0\x01").packet());
    assert_form_err(&query_for(WEB, A).opt(1232, [0; 4], b"\0\x03\0").packet());
}

#[test]
fn other_records_in_a_query_are_skipped() {
    let zone = sample_zone();
    // An A record whose owner is a pointer, one in each section, then OPT, then a TSIG.
    let record = b"\xc0\x0c\0\x01\0\x01\0\0\0\x05\0\x04\x0a\0\0\x01";
    let tsig = b"\x03key\0\0\xfa\0\xff\0\0\0\0\0\x01x";
    let mut query = query_for(WEB, A);
    query.records = [&record[..], record, record].concat();
    query.counts = [1, 1, 1];
    let mut query = query.edns(1232);
    query.records.extend(tsig);
    query.counts[2] += 1;
    let response = exchange(&zone, &query);
    assert_eq!((response.rcode(), response.answers().len()), (0, 2));
    assert!(response.message.edns.is_some());
    // An OPT that is not in the additional section is not EDNS.
    let mut query = query_for(WEB, A).edns(1232);
    query.counts = [1, 0, 0];
    assert!(exchange(&zone, &query).message.edns.is_none());
}

#[test]
fn octets_after_the_message_are_ignored() {
    let packet = [&query_for(WEB, A).packet()[..], b"rest"].concat();
    let octets = respond(&sample_zone(), Transport::Udp, &packet).expect("an answer");
    assert_eq!(octets[3] & 0x0f, 0);
}

#[test]
fn class_other_than_in_or_any_is_refused() {
    let zone = sample_zone();
    for qclass in [0, 2, 3, 4, 254, 65_535] {
        let response = exchange(&zone, &TestQuery { qclass, ..query_for(WEB, A) });
        assert_eq!((response.rcode(), response.answers().len()), (5, 0), "{qclass}");
    }
    let response = exchange(&zone, &TestQuery { qclass: 3, ..query_for("version.bind.", TXT) });
    assert_eq!(response.rcode(), 5);
    let response = exchange(&zone, &TestQuery { qclass: 255, ..query_for(WEB, A) });
    assert_eq!(response.answers()[0], format!("{WEB} 5 IN A 10.0.0.1"));
}

#[test]
fn transfers_are_refused() {
    let zone = sample_zone();
    for qtype in [AXFR, 251] {
        assert_refused(&zone, "cluster.local.", qtype);
        assert_eq!(exchange(&zone, &query_for("cluster.local.", qtype).tcp()).rcode(), 5);
    }
}
