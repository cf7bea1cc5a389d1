//! The names that exist, and those that do not.

use super::*;

const ZONE: &str = "cluster.local.";

#[test]
fn service_has_an_address_record_per_ready_instance() {
    let zone = sample_zone();
    let web = "web.prod.svc.cluster.local.";
    assert_eq!(answers(&zone, web, A), [format!("{web} 5 IN A 10.0.0.1"), format!("{web} 5 IN A 10.0.0.2")]);
    assert_eq!(answers(&zone, web, AAAA), [format!("{web} 5 IN AAAA 2001:db8::")]);
    assert_no_data(&zone, "bare.test.svc.cluster.local.", AAAA, ZONE);
}

#[test]
fn rfc2181_5_addresses_are_distinct() {
    let mut zone = TestZone::new(config());
    zone.add("web.prod", &spec("10.0.0.1", &["http:80"]));
    zone.add("web.prod", &spec("10.0.0.1", &["http:81"]));
    assert_eq!(answers(&zone, "web.prod.svc.cluster.local.", A).len(), 1);
    zone.remove("web.prod", &spec("10.0.0.1", &["http:81"]));
    assert_eq!(answers(&zone, "web.prod.svc.cluster.local.", A).len(), 1);
}

#[test]
fn host_without_a_registered_label_is_its_dashed_address() {
    let zone = sample_zone();
    for (name, qtype, answer) in [
        ("10-0-0-1.web.prod.svc.cluster.local.", A, "A 10.0.0.1"),
        ("2001-db8--0.web.prod.svc.cluster.local.", AAAA, "AAAA 2001:db8::"),
        ("main.db.prod.svc.cluster.local.", A, "A 10.1.0.1"),
        ("main.db.prod.svc.cluster.local.", AAAA, "AAAA 2001:db8::1:1"),
    ] {
        assert_eq!(answers(&zone, name, qtype), [format!("{name} 5 IN {answer}")]);
    }
    assert_no_data(&zone, "10-0-0-1.web.prod.svc.cluster.local.", AAAA, ZONE);
    for name in ["10-1-0-1.db.prod", "main.web.prod", "10-0-0-9.web.prod", "010-0-0-1.web.prod"] {
        assert_no_name(&zone, &format!("{name}.svc.cluster.local."), A, ZONE);
    }
}

#[test]
fn registered_label_equal_to_the_dashed_address_is_no_second_target() {
    let mut zone = TestZone::new(config());
    zone.add("web.prod", &InstanceSpec { host_name: "10-0-0-1".into(), ..spec("10.0.0.1", &["http:80"]) });
    zone.add("web.prod", &spec("10.0.0.1", &["http:80", "2"]));
    let response = exchange(&zone, &query_for("_http._tcp.web.prod.svc.cluster.local.", SRV));
    assert_eq!(response.answers().len(), 1, "{:?}", response.answers());
    assert_eq!(answers(&zone, "10-0-0-1.web.prod.svc.cluster.local.", A).len(), 1);
}

#[test]
fn rfc2782_srv_has_its_targets_addresses_in_additional() {
    let response = exchange(&sample_zone(), &query_for("_http._tcp.web.prod.svc.cluster.local.", SRV).edns(1232));
    let owner = "_http._tcp.web.prod.svc.cluster.local.";
    assert_eq!(
        response.answers(),
        [
            format!("{owner} 5 IN SRV 0 100 80 10-0-0-1.web.prod.svc.cluster.local."),
            format!("{owner} 5 IN SRV 0 100 80 10-0-0-2.web.prod.svc.cluster.local."),
            format!("{owner} 5 IN SRV 0 100 8080 2001-db8--0.web.prod.svc.cluster.local."),
        ]
    );
    assert_eq!(
        response.additional(),
        [
            "10-0-0-1.web.prod.svc.cluster.local. 5 IN A 10.0.0.1",
            "10-0-0-2.web.prod.svc.cluster.local. 5 IN A 10.0.0.2",
            "2001-db8--0.web.prod.svc.cluster.local. 5 IN AAAA 2001:db8::",
        ]
    );
    // RFC 2782: the target is spelled out.
    let spelled = wire("10-0-0-1.web.prod.svc.cluster.local.");
    assert!(response.octets.windows(spelled.len()).any(|window| window == spelled));
}

#[test]
fn hosts_that_share_a_label_are_one_srv_record_with_the_sum_of_weights() {
    let mut zone = sample_zone();
    let owner = "_pg._tcp.db.prod.svc.cluster.local.";
    let target = "main.db.prod.svc.cluster.local.";
    let response = exchange(&zone, &query_for(owner, SRV));
    assert_eq!(response.answers(), [format!("{owner} 5 IN SRV 3 150 5432 {target}")]);
    assert_eq!(
        response.additional(),
        [format!("{target} 5 IN A 10.1.0.1"), format!("{target} 5 IN AAAA 2001:db8::1:1")]
    );

    let third = InstanceSpec { host_name: "main".into(), priority: 1, ..spec("10.1.0.2", &["pg:5432"]) };
    zone.add("db.prod", &third);
    assert_eq!(answers(&zone, owner, SRV), [format!("{owner} 5 IN SRV 1 250 5432 {target}")]);
    zone.remove("db.prod", &third);
    assert_eq!(answers(&zone, owner, SRV), [format!("{owner} 5 IN SRV 3 150 5432 {target}")]);
}

#[test]
fn srv_weight_is_in_hundredths_and_0_only_for_0() {
    let mut zone = TestZone::new(config());
    for (n, weight) in [0.0, 0.000_01, 0.004, 0.006, 1.0, 2.345, 655.0].into_iter().enumerate() {
        zone.add("web.prod", &InstanceSpec { weight: Some(weight), ..spec(&format!("10.0.0.{n}"), &["http:80"]) });
    }
    let response = answers(&zone, "_http._tcp.web.prod.svc.cluster.local.", SRV);
    let weights: Vec<&str> = response.iter().filter_map(|record| record.split(' ').nth(5)).collect();
    assert_eq!(weights, ["0", "1", "1", "1", "100", "235", "65500"]);
    let mut zone = TestZone::new(config());
    for port in ["1", "2"] {
        zone.add("web.prod", &InstanceSpec { weight: Some(655.0), ..spec("10.0.0.1", &["http:80", port]) });
    }
    let response = answers(&zone, "_http._tcp.web.prod.svc.cluster.local.", SRV);
    assert!(response[0].contains(" SRV 0 65535 80 "), "{response:?}");
}

#[test]
fn srv_is_per_protocol_and_unnamed_ports_have_none() {
    let zone = sample_zone();
    let owner = "_dns._udp.web.prod.svc.cluster.local.";
    let target = "10-0-0-2.web.prod.svc.cluster.local.";
    assert_eq!(answers(&zone, owner, SRV), [format!("{owner} 5 IN SRV 0 100 53 {target}")]);
    for name in ["_dns._tcp.web.prod", "_http._udp.web.prod", "_http._sctp.web.prod", "_._tcp.web.prod"] {
        assert_no_name(&zone, &format!("{name}.svc.cluster.local."), SRV, ZONE);
    }
}

#[test]
fn apex_has_an_soa_and_a_name_server() {
    let zone = sample_zone();
    let soa = "cluster.local. 5 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. 1712 7200 1800 86400 5";
    assert_eq!(answers(&zone, ZONE, SOA), [soa]);
    let response = exchange(&zone, &query_for(ZONE, NS));
    assert_eq!(response.answers(), ["cluster.local. 5 IN NS ns.dns.cluster.local."]);
    let addresses = ["ns.dns.cluster.local. 5 IN A 192.0.2.53", "ns.dns.cluster.local. 5 IN AAAA 2001:db8::53"];
    assert_eq!(response.additional(), addresses);
    assert_eq!(answers(&zone, "ns.dns.cluster.local.", A), addresses[..1]);
    assert_eq!(answers(&zone, "ns.dns.cluster.local.", AAAA), addresses[1..]);
    assert_no_data(&zone, "ns.dns.cluster.local.", TXT, ZONE);
    assert_no_data(&TestZone::new(config()), "ns.dns.cluster.local.", A, ZONE);
}

#[test]
fn rfc1982_serial_is_the_low_half_of_the_generation() {
    let mut zone = TestZone::new(config());
    zone.generation((7 << 32) + 3);
    assert!(answers(&zone, ZONE, SOA)[0].contains(" 3 7200 "));
}

#[test]
fn dns_version_is_1_1_0() {
    let zone = sample_zone();
    let version = "dns-version.cluster.local.";
    assert_eq!(answers(&zone, version, TXT), [format!("{version} 28800 IN TXT 1.1.0")]);
    assert_no_data(&zone, version, A, ZONE);
    assert_no_name(&zone, "x.dns-version.cluster.local.", TXT, ZONE);
}

#[test]
fn rfc8020_empty_non_terminals_exist() {
    let zone = sample_zone();
    for name in [
        "cluster.local.",
        "svc.cluster.local.",
        "prod.svc.cluster.local.",
        "_tcp.web.prod.svc.cluster.local.",
        "_udp.web.prod.svc.cluster.local.",
        "dns.cluster.local.",
    ] {
        assert_no_data(&zone, name, A, ZONE);
    }
    // Only as long as there is something below.
    for name in ["_sctp.web.prod", "_udp.db.prod", "_tcp.bare.test", "ill", "_tcp.sick.ill"] {
        assert_no_name(&zone, &format!("{name}.svc.cluster.local."), A, ZONE);
    }
}

#[test]
fn namespace_is_removed_with_its_last_service() {
    let mut zone = TestZone::new(config());
    let one = spec("10.0.0.1", &["http:80"]);
    zone.add("web.prod", &one);
    zone.add("db.prod", &one);
    zone.remove("web.prod", &one);
    assert_no_data(&zone, "prod.svc.cluster.local.", A, ZONE);
    zone.remove("db.prod", &one);
    assert_no_name(&zone, "prod.svc.cluster.local.", A, ZONE);
}

#[test]
fn rfc3597_other_types_at_names_that_exist_are_nodata() {
    let zone = sample_zone();
    for (name, qtype) in [
        ("web.prod", SRV),
        ("10-0-0-1.web.prod", SRV),
        ("web.prod", MX),
        ("web.prod", 65_280),
        ("web.prod", NS),
        ("web.prod", SOA),
        ("_http._tcp.web.prod", A),
        ("_http._tcp.web.prod", TXT),
    ] {
        assert_no_data(&zone, &format!("{name}.svc.cluster.local."), qtype, ZONE);
    }
}

#[test]
fn service_without_a_ready_instance_is_nxdomain_unless_unready_are_published() {
    let mut zone = sample_zone();
    let sick = "sick.ill.svc.cluster.local.";
    assert_no_name(&zone, sick, A, ZONE);
    // An instance that becomes ready is served, until it is not ready again.
    zone.add("sick.ill", &spec("10.9.0.1", &["http:80"]));
    assert_eq!(answers(&zone, sick, A).len(), 1);
    zone.add_unready("sick.ill", &spec("10.9.0.1", &["http:80"]));
    assert_no_name(&zone, sick, A, ZONE);

    let mut zone = TestZone::new(ZoneConfig { publish_not_ready: true, ..config() });
    zone.add_unready("sick.ill", &spec("10.9.0.1", &["http:80"]));
    assert_eq!(answers(&zone, sick, A), [format!("{sick} 5 IN A 10.9.0.1")]);
    assert_eq!(answers(&zone, &format!("_http._tcp.{sick}"), SRV).len(), 1);
    assert_no_data(&zone, sick, AAAA, ZONE);
}

#[test]
fn unknown_names_are_nxdomain() {
    let zone = sample_zone();
    for name in [
        "other.prod.svc.cluster.local.",
        "web.other.svc.cluster.local.",
        "other.svc.cluster.local.",
        "other.cluster.local.",
        "*.prod.svc.cluster.local.",
        "*.web.prod.svc.cluster.local.",
        "a.10-0-0-1.web.prod.svc.cluster.local.",
        "a._http._tcp.web.prod.svc.cluster.local.",
        "_other._tcp.web.prod.svc.cluster.local.",
        "http._tcp.web.prod.svc.cluster.local.",
        "_http.tcp.web.prod.svc.cluster.local.",
        "a.ns.dns.cluster.local.",
        "other.dns.cluster.local.",
        "web.prod.pod.cluster.local.",
        // What a resolver makes of it with ndots:5 and a search list.
        "web.prod.svc.cluster.local.prod.svc.cluster.local.",
    ] {
        for qtype in [A, AAAA, SRV, SOA, MX, ANY] {
            assert_no_name(&zone, name, qtype, ZONE);
        }
    }
}

#[test]
fn labels_with_dots_or_arbitrary_octets_are_nxdomain() {
    let zone = sample_zone();
    for first in [&b"\x08web.prod"[..], b"\x03we\0", b"\x02\xff\xfe"] {
        for rest in ["svc.cluster.local.", "prod.svc.cluster.local."] {
            let name = [first, &wire(rest)].concat();
            let response = exchange(&zone, &TestQuery { name, ..query_for(".", A) });
            assert_eq!(response.rcode(), 3, "{first:?} {rest}");
        }
    }
}

#[test]
fn names_outside_the_zone_are_refused() {
    let zone = sample_zone();
    for name in [".", "local.", "example.com.", "xcluster.local.", "cluster.local.example.", "1.0.0.127.example."] {
        assert_refused(&zone, name, A);
    }
    assert_refused(&zone, ".", NS);
    assert_refused(&TestZone::loading(config()), ".", NS);
}

#[test]
fn rfc8914_unready_zone_is_servfail_with_extended_error_14() {
    let mut zone =
        TestZone::loading(ZoneConfig { reverse_zones: vec![("10.0.0.0".parse().expect("valid"), 8)], ..config() });
    zone.add("web.prod", &spec("10.0.0.1", &["http:80"]));
    let names = ["web.prod.svc.cluster.local.", "no.prod.svc.cluster.local.", ZONE, "1.0.0.10.in-addr.arpa."];
    for name in names {
        let response = exchange(&zone, &query_for(name, A));
        assert_eq!((response.rcode(), response.octets[2] & 4, response.authority().len()), (2, 0, 0), "{name}");
        assert!(response.message.edns.is_none());
        let response = exchange(&zone, &query_for(name, A).edns(1232));
        assert_eq!(response.rcode(), 2);
        // OPTION-CODE 15, length 2, INFO-CODE 14 "Not Ready".
        assert!(response.octets.ends_with(&[0, 15, 0, 2, 0, 14]), "{:?}", response.octets);
    }
    assert_refused(&zone, "example.com.", A);
    // Any address may turn out to be an instance's, so that every address is SERVFAIL until then.
    assert_eq!(exchange(&zone, &query_for("1.2.0.192.in-addr.arpa.", PTR)).rcode(), 2);
    assert_refused(&zone, "2.0.192.in-addr.arpa.", PTR);
    zone.zone.set_ready();
    assert_refused(&zone, "1.2.0.192.in-addr.arpa.", PTR);
    assert_eq!(answers(&zone, names[0], A).len(), 1);
}

#[test]
fn rfc8482_any_is_answered_with_one_rrset() {
    let zone = sample_zone();
    for (name, first) in [
        ("web.prod.svc.cluster.local.", " A 10.0.0."),
        ("2001-db8--0.web.prod.svc.cluster.local.", " AAAA 2001:db8::"),
        ("_http._tcp.web.prod.svc.cluster.local.", " SRV "),
        ("1.0.0.10.in-addr.arpa.", " PTR "),
        ("dns-version.cluster.local.", " TXT "),
        ("cluster.local.", " SOA "),
        ("ns.dns.cluster.local.", " A 192.0.2.53"),
    ] {
        let response = answers(&zone, name, ANY);
        assert!(!response.is_empty() && response.iter().all(|record| record.contains(first)), "{name}: {response:?}");
    }
    assert_no_data(&zone, "svc.cluster.local.", ANY, ZONE);
}

#[test]
fn ttl_is_as_configured_and_may_be_0() {
    for (ttl, soa) in [(0, 0), (5, 5), (300, 300), (3600, 300)] {
        let mut zone = TestZone::new(ZoneConfig { ttl, ..config() });
        zone.add("web.prod", &spec("10.0.0.1", &["http:80"]));
        let name = "web.prod.svc.cluster.local.";
        assert_eq!(answers(&zone, name, A), [format!("{name} {ttl} IN A 10.0.0.1")]);
        // RFC 2308 §5: TTL = min(SOA TTL, MINIMUM).
        let response = exchange(&zone, &query_for(name, AAAA)).authority();
        assert!(response[0].starts_with(&format!("cluster.local. {soa} IN SOA ")), "{response:?}");
        assert!(response[0].ends_with(&format!(" 86400 {ttl}")), "{response:?}");
    }
}

#[test]
fn first_address_is_drawn_by_weight() {
    let mut zone = TestZone::new(config());
    for (n, weight) in [1.0, 3.0, 0.0, 4.0].into_iter().enumerate() {
        zone.add("web.prod", &InstanceSpec { weight: Some(weight), ..spec(&format!("10.0.0.{n}"), &["http:80"]) });
    }
    let packet = query_for("web.prod.svc.cluster.local.", A).packet();
    let mut rng = fastrand::Rng::with_seed(1);
    let mut first = [0u32; 4];
    for _ in 0..8000 {
        let octets = respond_with(&zone, Transport::Udp, &packet, &mut rng).expect("an answer");
        let records = &octets[packet.len()..];
        let order: Vec<u8> = records.chunks(16).map(|record| record[15]).collect();
        let begin = order[0];
        assert_eq!(order, [begin, (begin + 1) % 4, (begin + 2) % 4, (begin + 3) % 4]);
        first[usize::from(begin)] += 1;
    }
    assert!((800..1200).contains(&first[0]), "{first:?}");
    assert!((2700..3300).contains(&first[1]), "{first:?}");
    assert_eq!(first[2], 0);
}

#[test]
fn addresses_without_weight_are_drawn_evenly() {
    let mut zone = TestZone::new(config());
    for n in 0..3 {
        zone.add("web.prod", &InstanceSpec { weight: Some(0.0), ..spec(&format!("10.0.0.{n}"), &[]) });
    }
    let packet = query_for("web.prod.svc.cluster.local.", A).packet();
    let mut rng = fastrand::Rng::with_seed(1);
    let mut first = [0u32; 3];
    for _ in 0..3000 {
        let octets = respond_with(&zone, Transport::Udp, &packet, &mut rng).expect("an answer");
        first[usize::from(octets[packet.len() + 15])] += 1;
    }
    assert!(first.iter().all(|count| (850..1150).contains(count)), "{first:?}");
}
