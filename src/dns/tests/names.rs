//! Instances that are DNS names: a name alone is an alias, among others it is its addresses.

use super::*;

const CNAME: u16 = 5;
const DB: &str = "db.prod.svc.cluster.local.";
const TARGET: &str = "pg.example.com";

fn addresses(ips: &[&str], ttl: u32) -> Resolution {
    Resolution::Addresses(ResolvedAddresses::new(ips.iter().map(|ip| ip.parse().expect("an address")), ttl))
}

/// `db.prod` is `pg.example.com` alone.
fn alone(resolution: Resolution) -> TestZone {
    let mut zone = TestZone::new(config());
    zone.add("db.prod", &spec(TARGET, &["pg:5432"]));
    zone.resolve(TARGET, resolution);
    zone
}

#[test]
fn name_alone_is_an_alias_with_the_addresses_of_its_target() {
    let zone = alone(addresses(&["192.0.2.7", "192.0.2.9", "2001:db8::7"], 60));
    let alias = "db.prod.svc.cluster.local. 5 IN CNAME pg.example.com.";
    let expected = [alias, "pg.example.com. 5 IN A 192.0.2.7", "pg.example.com. 5 IN A 192.0.2.9"];
    assert_eq!(answers(&zone, DB, A), expected);
    assert_eq!(answers(&zone, DB, AAAA), [alias, "pg.example.com. 5 IN AAAA 2001:db8::7"]);
    // RFC 2181 §10.1: whatever is asked for, there is only the alias.
    for qtype in [CNAME, TXT, SRV, ANY] {
        assert_eq!(answers(&zone, DB, qtype), [alias], "{qtype}");
    }
    let srv = "_pg._tcp.db.prod.svc.cluster.local.";
    assert_eq!(answers(&zone, srv, SRV), [format!("{srv} 5 IN SRV 0 100 5432 pg.example.com.")]);
    assert!(exchange(&zone, &query_for(srv, SRV)).additional().is_empty(), "another zone's addresses");
    assert_refused(&zone, "7.2.0.192.in-addr.arpa.", PTR);
    // The alias comes first: glibc reads the answer in order.
    let first = &exchange(&zone, &query_for(DB, A)).message.answers[0];
    assert_eq!(first.to_string(), alias);
}

#[test]
fn smaller_ttl_of_the_target_counts() {
    let zone = alone(addresses(&["192.0.2.7"], 2));
    assert!(answers(&zone, DB, A).contains(&"pg.example.com. 2 IN A 192.0.2.7".to_owned()));
}

#[test]
fn alias_without_addresses_has_the_code_of_its_target() {
    let ask = |zone: &TestZone, qtype| {
        let response = exchange(zone, &query_for(DB, qtype).edns(1232));
        (response.rcode(), response.answers().len(), response)
    };
    // RFC 6604 §2.
    let zone = alone(Resolution::NxDomain);
    assert!(matches!(ask(&zone, A), (3, 1, _)));
    assert!(matches!(ask(&zone, CNAME), (0, 1, _)), "the alias itself exists");
    assert!(matches!(ask(&zone, ANY), (0, 1, _)), "RFC 1034 §4.3.2: any type matches the alias");
    let zone = alone(addresses(&[], 60));
    assert!(matches!(ask(&zone, A), (0, 1, _)));
    let zone = alone(Resolution::Unavailable);
    let (rcode, count, response) = ask(&zone, A);
    assert_eq!((rcode, count), (2, 0));
    // RFC 8914 §4.24: extended error 23, network error.
    assert!(response.octets.ends_with(&[0, 15, 0, 2, 0, 23]), "{:?}", response.octets);
    assert!(matches!(ask(&zone, CNAME), (0, 1, _)));
}

#[test]
fn name_among_others_is_its_addresses_and_shares_its_weight() {
    let mut zone = alone(addresses(&["192.0.2.7", "192.0.2.9", "2001:db8::7"], 3));
    zone.add("db.prod", &InstanceSpec { weight: Some(2.0), ..spec("10.0.0.1", &["pg:5432"]) });
    let a = |ip: &str| format!("{DB} 3 IN A {ip}");
    assert_eq!(answers(&zone, DB, A), [a("10.0.0.1"), a("192.0.2.7"), a("192.0.2.9")]);
    assert_eq!(answers(&zone, DB, AAAA), [format!("{DB} 3 IN AAAA 2001:db8::7")]);
    let srv = "_pg._tcp.db.prod.svc.cluster.local.";
    let targets = [
        format!("{srv} 5 IN SRV 0 100 5432 pg.example.com."),
        format!("{srv} 5 IN SRV 0 200 5432 10-0-0-1.db.prod.svc.cluster.local."),
    ];
    assert_eq!(answers(&zone, srv, SRV), targets);
    // 2 : ½ : ½.
    let mut rng = fastrand::Rng::with_seed(1);
    let mut first = std::collections::BTreeMap::<String, u32>::new();
    for _ in 0..3000 {
        let octets = respond_with(&zone, Transport::Udp, &query_for(DB, A).packet(), &mut rng).expect("an answer");
        let message = Message::from_vec(&octets).expect("an answer that parses");
        *first.entry(message.answers[0].data.to_string()).or_default() += 1;
    }
    let drawn = |ip: &str| first[ip];
    assert!((1800..2200).contains(&drawn("10.0.0.1")), "{first:?}");
    assert!((400..600).contains(&drawn("192.0.2.7")) && (400..600).contains(&drawn("192.0.2.9")), "{first:?}");
    // Alone again: an alias again.
    zone.remove("db.prod", &spec("10.0.0.1", &["pg:5432"]));
    assert_eq!(answers(&zone, DB, CNAME).len(), 1);
}

#[test]
fn unresolved_name_among_others_is_left_out() {
    for resolution in [Resolution::Unavailable, Resolution::NxDomain, addresses(&[], 60)] {
        let mut zone = alone(resolution);
        zone.add("db.prod", &spec("10.0.0.1", &["pg:5432"]));
        assert_eq!(answers(&zone, DB, A), [format!("{DB} 5 IN A 10.0.0.1")]);
        assert_no_data(&zone, DB, AAAA, "cluster.local.");
        assert_eq!(answers(&zone, "_pg._tcp.db.prod.svc.cluster.local.", SRV).len(), 1);
    }
    // Unknown is not absent: NXDOMAIN would be cached.
    let mut zone = alone(Resolution::Unavailable);
    zone.add("db.prod", &InstanceSpec { host_name: "main".into(), ..spec("other.example.com", &["pg:5432"]) });
    for (name, qtype) in
        [(DB.to_owned(), A), (format!("main.{DB}"), A), (format!("_tcp.{DB}"), A), (format!("_pg._tcp.{DB}"), SRV)]
    {
        assert_eq!(exchange(&zone, &query_for(&name, qtype)).rcode(), 2, "{name}");
    }
    assert_no_name(&zone, &format!("none.{DB}"), A, "cluster.local.");
    // Two names of which nothing is known: whether there is an address is not known either.
    let mut zone = alone(Resolution::Unavailable);
    zone.add("db.prod", &spec("other.example.com", &[]));
    assert_eq!(exchange(&zone, &query_for(DB, A)).rcode(), 2);
    zone.resolve(TARGET, Resolution::NxDomain);
    zone.resolve("other.example.com", Resolution::NxDomain);
    assert_no_data(&zone, DB, A, "cluster.local.");
}

#[test]
fn flattened_name_is_its_addresses() {
    let mut zone = TestZone::new(ZoneConfig { flatten_names: true, ..config() });
    zone.add("db.prod", &InstanceSpec { host_name: "main".into(), ..spec(TARGET, &[]) });
    zone.resolve(TARGET, addresses(&["192.0.2.7"], 60));
    assert_eq!(answers(&zone, DB, A), [format!("{DB} 5 IN A 192.0.2.7")]);
    assert_eq!(answers(&zone, "main.db.prod.svc.cluster.local.", A).len(), 1);
    assert_no_data(&zone, DB, CNAME, "cluster.local.");
}

#[test]
fn too_many_addresses_for_udp_are_truncated() {
    let ips: Vec<String> = (0..64).map(|n| format!("192.0.2.{n}")).collect();
    let zone = alone(addresses(&ips.iter().map(String::as_str).collect::<Vec<_>>(), 60));
    let response = exchange(&zone, &query_for(DB, A));
    assert!(response.truncated() && response.octets.len() <= 512);
    assert_eq!(exchange(&zone, &query_for(DB, A).tcp()).answers().len(), 65);
}

#[test]
fn names_in_use_are_said_once() {
    let mut zone = alone(Resolution::Unavailable);
    let change = |used| crate::zone::NameChange { name: crate::model::DnsName::parse(TARGET).expect("a name"), used };
    assert_eq!(zone.take_name_changes(), [change(true)]);
    zone.add("web.prod", &spec(TARGET, &[]));
    zone.remove("db.prod", &spec(TARGET, &["pg:5432"]));
    assert_eq!(zone.take_name_changes(), []);
    zone.remove("web.prod", &spec(TARGET, &[]));
    assert_eq!(zone.take_name_changes(), [change(false)]);
}

proptest! {
    /// Beside others a name gives what the plain list of its addresses gives.
    #[test]
    fn name_equals_the_list_of_its_addresses(
        ips in prop::collection::btree_set(1u8..200, 0..64),
        beside in prop::collection::btree_set(1u8..200, 1..8),
    ) {
        let (mut named, mut plain) = (TestZone::new(config()), TestZone::new(config()));
        for n in &beside {
            named.add("db.prod", &spec(&format!("192.0.2.{n}"), &[]));
            plain.add("db.prod", &spec(&format!("192.0.2.{n}"), &[]));
        }
        named.add("db.prod", &spec(TARGET, &[]));
        let ips: Vec<String> = ips.iter().map(|n| format!("192.0.2.{n}")).collect();
        named.resolve(TARGET, addresses(&ips.iter().map(String::as_str).collect::<Vec<_>>(), 60));
        ips.iter().for_each(|ip| plain.add("db.prod", &spec(ip, &["9"])));
        let ask = |zone: &TestZone, qtype| exchange(zone, &query_for(DB, qtype).tcp()).answers();
        prop_assert_eq!(ask(&named, A), ask(&plain, A));
        prop_assert_eq!(ask(&named, AAAA), ask(&plain, AAAA));
    }
}
