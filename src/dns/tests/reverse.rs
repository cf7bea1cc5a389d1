//! `in-addr.arpa` (RFC 1035 §3.5) and `ip6.arpa` (RFC 3596 §2.5).

use super::*;

const V6: &str = "1.0.0.0.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.";

fn zones(networks: &[(&str, u8)]) -> TestZone {
    let reverse_zones = networks.iter().map(|(ip, prefix)| (ip.parse().expect("an address"), *prefix)).collect();
    let mut zone = TestZone::new(ZoneConfig { reverse_zones, ..config() });
    zone.add("web.prod", &spec("10.20.0.1", &["http:80"]));
    zone.add("web.prod", &spec("2001:db8::1:1", &["http:80"]));
    zone
}

#[test]
fn address_has_a_ptr_record_per_host() {
    let zone = sample_zone();
    let owner = "1.0.0.10.in-addr.arpa.";
    assert_eq!(
        answers(&zone, owner, PTR),
        [
            format!("{owner} 5 IN PTR 10-0-0-1.bare.test.svc.cluster.local."),
            format!("{owner} 5 IN PTR 10-0-0-1.web.prod.svc.cluster.local."),
        ]
    );
    assert_eq!(answers(&zone, V6, PTR), [format!("{V6} 5 IN PTR main.db.prod.svc.cluster.local.")]);
    assert_refused(&zone, "1.0.9.10.in-addr.arpa.", PTR); // that of an instance that is not ready
}

#[test]
fn other_types_at_a_reverse_name_have_an_soa_of_the_name_itself() {
    let zone = sample_zone();
    for (name, qtype) in [("1.0.0.10.in-addr.arpa.", A), (V6, TXT), (V6, SOA)] {
        assert_no_data(&zone, name, qtype, name);
    }
}

#[test]
fn other_reverse_names_are_refused() {
    let zone = sample_zone();
    for name in [
        "9.0.0.10.in-addr.arpa.",
        "0.0.10.in-addr.arpa.",
        "10.in-addr.arpa.",
        "in-addr.arpa.",
        "ip6.arpa.",
        "arpa.",
        "01.0.0.10.in-addr.arpa.",
        "1.1.0.0.10.in-addr.arpa.",
        "f.f.ip6.arpa.",
        &V6.replacen("1.", "2.", 1),
    ] {
        for qtype in [PTR, SOA, NS, A] {
            assert_refused(&zone, name, qtype);
        }
    }
}

#[test]
fn unknown_names_in_a_reverse_zone_are_nxdomain() {
    let zone = zones(&[("10.0.0.0", 8), ("2001:db8::", 32)]);
    let apex = "10.in-addr.arpa.";
    assert_eq!(answers(&zone, "1.0.20.10.in-addr.arpa.", PTR).len(), 1);
    assert_no_data(&zone, "1.0.20.10.in-addr.arpa.", A, apex);
    for name in
        ["9.0.20.10", "010.0.20.10", "256.0.20.10", "x.20.10", "1.256.10", "5.1.0.20.10", "1.+1.0.10", "1.0.1e.10"]
    {
        assert_no_name(&zone, &format!("{name}.in-addr.arpa."), PTR, apex);
    }
    for name in ["0.20.10", "20.10", "77.10", "10"] {
        assert_no_data(&zone, &format!("{name}.in-addr.arpa."), PTR, apex);
    }
    assert_refused(&zone, "in-addr.arpa.", PTR);
    assert_refused(&zone, "1.0.20.11.in-addr.arpa.", PTR);

    let apex = "8.b.d.0.1.0.0.2.ip6.arpa.";
    assert_eq!(answers(&zone, V6, PTR).len(), 1);
    assert_no_data(&zone, V6, AAAA, apex);
    assert_no_name(&zone, &V6.replacen("1.", "2.", 1), PTR, apex);
    assert_no_name(&zone, &format!("0.{V6}"), PTR, apex);
    assert_no_name(&zone, &V6.replacen("1.", "g.", 1), PTR, apex);
    assert_no_name(&zone, &V6.replacen("1.", "01.", 1), PTR, apex);
    assert_no_data(&zone, &V6[2..], PTR, apex);
    assert_refused(&zone, "9.b.d.0.1.0.0.2.ip6.arpa.", PTR);
}

#[test]
fn reverse_zone_has_an_soa_and_a_name_server() {
    let zone = zones(&[("10.0.0.0", 8)]);
    let soa = "10.in-addr.arpa. 5 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. 2 7200 1800 86400 5";
    assert_eq!(answers(&zone, "10.in-addr.arpa.", SOA), [soa]);
    assert_eq!(answers(&zone, "10.in-addr.arpa.", ANY), [soa]);
    assert_eq!(answers(&zone, "10.in-addr.arpa.", NS), ["10.in-addr.arpa. 5 IN NS ns.dns.cluster.local."]);
}

#[test]
fn reverse_zone_of_any_prefix_length() {
    // Zones at labels' borders within the network: 16.10 to 31.10.
    let zone = zones(&[("10.16.0.0", 12), ("2001:db8::", 33)]);
    assert_eq!(answers(&zone, "1.0.20.10.in-addr.arpa.", PTR).len(), 1);
    assert_no_data(&zone, "20.10.in-addr.arpa.", PTR, "20.10.in-addr.arpa.");
    assert_no_name(&zone, "9.0.31.10.in-addr.arpa.", PTR, "31.10.in-addr.arpa.");
    assert_refused(&zone, "9.0.32.10.in-addr.arpa.", PTR);
    assert_refused(&zone, "15.10.in-addr.arpa.", PTR);
    assert_refused(&zone, "10.in-addr.arpa.", PTR);
    assert_no_data(&zone, "7.8.b.d.0.1.0.0.2.ip6.arpa.", PTR, "7.8.b.d.0.1.0.0.2.ip6.arpa.");
    assert_refused(&zone, "8.8.b.d.0.1.0.0.2.ip6.arpa.", PTR);
}

#[test]
fn reverse_zone_of_one_address_or_all() {
    let zone = zones(&[("10.20.0.1", 32), ("10.20.0.2", 32), ("::", 0)]);
    assert_eq!(answers(&zone, "1.0.20.10.in-addr.arpa.", PTR).len(), 1);
    assert_eq!(answers(&zone, "1.0.20.10.in-addr.arpa.", SOA).len(), 1);
    assert_no_data(&zone, "2.0.20.10.in-addr.arpa.", PTR, "2.0.20.10.in-addr.arpa.");
    assert_refused(&zone, "3.0.20.10.in-addr.arpa.", PTR);
    assert_no_data(&zone, "ip6.arpa.", PTR, "ip6.arpa.");
    assert_no_data(&zone, "f.ip6.arpa.", PTR, "ip6.arpa.");
    assert_no_name(&zone, "g.ip6.arpa.", PTR, "ip6.arpa.");
}

#[test]
fn longest_network_that_contains_the_name_is_its_zone() {
    let zone = zones(&[("10.0.0.0", 8), ("10.20.0.0", 16)]);
    assert_no_name(&zone, "9.0.20.10.in-addr.arpa.", PTR, "20.10.in-addr.arpa.");
    assert_no_name(&zone, "9.0.21.10.in-addr.arpa.", PTR, "10.in-addr.arpa.");
}

#[test]
fn address_of_many_services_is_answered_with_64_names() {
    let mut zone = TestZone::new(config());
    for n in 0..200 {
        zone.add(&format!("s{n}.prod"), &spec("10.0.0.1", &[]));
    }
    let response = exchange(&zone, &query_for("1.0.0.10.in-addr.arpa.", PTR).tcp());
    let mut names = response.answers();
    names.dedup();
    assert_eq!((names.len(), response.truncated()), (64, false));
}
