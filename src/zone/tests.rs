use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use proptest::prelude::*;

use super::{
    Hit, Lookup, QName, ZoneConfig,
    testing::{TestZone, ZoneContents, config, instance, key, spec},
};
use crate::model::{Instance, InstanceSpec, RecordType, Resolution, ResolvedAddresses, cow_tree::COMPARISONS};

/// The DNS names among [`any_instance`].
const NAMES: [&str; 2] = ["db.example.com", "gw.example.net"];

/// What one of [`NAMES`] leads to from now on, addresses of instances among it.
fn any_resolution() -> impl Strategy<Value = (&'static str, Resolution)> {
    let ips = prop::sample::subsequence(vec!["10.0.0.1", "192.0.2.7", "192.0.2.9", "2001:db8::1"], 0..5);
    let found = (ips, 0u32..9).prop_map(|(ips, ttl)| {
        let ips = ips.into_iter().map(|ip| ip.parse().expect("an address"));
        Resolution::Addresses(ResolvedAddresses::new(ips, ttl))
    });
    let resolution = prop_oneof![1 => Just(Resolution::Unavailable), 1 => Just(Resolution::NxDomain), 4 => found];
    (prop::sample::select(NAMES.to_vec()), resolution)
}

/// One registration among few addresses, names and ports, so that they meet often.
fn any_instance() -> impl Strategy<Value = (InstanceSpec, bool)> {
    let address = prop_oneof![
        (1u8..6).prop_map(|n| format!("10.0.0.{n}")),
        (1u8..4).prop_map(|n| format!("2001:db8::{n}")),
        prop::sample::select(NAMES.to_vec()).prop_map(ToOwned::to_owned),
    ];
    let host = prop_oneof![3 => Just(""), 2 => Just("a"), 1 => Just("b"), 1 => Just("own")];
    let ports = prop::sample::subsequence(vec!["http:80", "web:80/udp", "http:81", "9", "dns:53/udp"], 0..4);
    let weight = prop_oneof![Just(None), Just(Some(0.0)), Just(Some(2.5)), Just(Some(655.0))];
    (address, host, ports, weight, 0u16..3, prop::bool::weighted(0.8)).prop_filter_map(
        "two ports of one name",
        |(address, host, mut ports, weight, priority, ready)| {
            if ports.contains(&"http:80") {
                ports.retain(|port| *port != "http:81");
            }
            let own = address.replace('.', "-");
            let host = if host == "own" && address.starts_with("10.") { own.as_str() } else { host };
            let host_name = if host == "own" { String::new() } else { host.to_owned() };
            Some((InstanceSpec { host_name, weight, priority, ..spec(&address, &ports) }, ready))
        },
    )
}

proptest! {
    #[test]
    fn incremental_changes_equal_a_rebuild(
        (publish_not_ready, flatten_names) in any::<(bool, bool)>(),
        batches in prop::collection::vec(
            (
                0usize..3,
                prop::collection::vec((any_instance(), prop::bool::weighted(0.6)), 1..6),
                prop::option::of(any_resolution()),
            ),
            1..40,
        ),
    ) {
        let services = ["web.prod", "db.prod", "web.test"].map(key);
        let config = ZoneConfig { publish_not_ready, flatten_names, ..config() };
        let mut world = TestZone::new(config.clone());
        let mut seen = Vec::new();
        for (index, steps, resolution) in batches {
            let service = &services[index];
            let steps: Vec<(Arc<Instance>, bool)> = steps
                .into_iter()
                .map(|((spec, ready), stays)| {
                    let instance = Arc::unwrap_or_clone(instance(&spec)).with_ready(ready);
                    (Arc::new(instance), stays)
                })
                .collect();
            world.change(service, &steps);
            seen.extend(steps.into_iter().map(|(instance, _)| (index, instance)));
            if let Some((name, resolution)) = resolution {
                world.resolve(name, resolution);
            }
            prop_assert_eq!(ZoneContents::of(&world.zone), ZoneContents::of(&world.rebuilt(config.clone()).zone));
        }
        for (index, instance) in seen {
            world.change(&services[index], &[(instance, false)]);
        }
        prop_assert!(ZoneContents::of(&world.zone).is_empty());
    }
}

/// A reader asks for SRV again and again, and for the address of every target, while instances
/// come and go. Both are of one value, so that every target must exist.
#[test]
fn srv_target_always_has_its_addresses() {
    let mut world = TestZone::new(config());
    let zone = Arc::clone(&world.zone);
    let stop = AtomicBool::new(false);
    let looked = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let srv = QName::from_text("_http._tcp.web.prod.svc.cluster.local").expect("valid");
            let mut looked = 0;
            while !stop.load(Ordering::Relaxed) || looked == 0 {
                let view = zone.pin();
                let Lookup::Hit(Hit::Srv(rrset, records)) = view.lookup(&srv, Some(RecordType::Srv)) else {
                    continue;
                };
                for record in rrset.iter() {
                    let found = records.target(&record.target).expect("the target exists in the same value");
                    assert!(found.v4.is_some());
                    looked += 1;
                }
            }
            looked
        });
        let service = key("web.prod");
        for round in 0..4000u32 {
            let port = ["http:80"];
            let host_name = if round % 3 == 0 { "h".to_owned() } else { String::new() };
            let one = |n: u32| InstanceSpec {
                host_name: host_name.clone(),
                ..spec(&format!("10.0.0.{}", 1 + n % 40), &port)
            };
            let steps = [(instance(&one(round)), true), (instance(&one(round + 20)), false)];
            world.change(&service, &steps);
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().expect("the reader saw no dangling target")
    });
    assert!(looked > 0);
}

/// P6b: what one change costs must not grow with the service. Chunks that are shared with the
/// older value are recognised by their address.
#[test]
fn change_in_a_large_service_copies_one_chunk() {
    let mut world = TestZone::new(config());
    let service = key("web.prod");
    let at = |n: u32| spec(&std::net::Ipv4Addr::from_bits(0x0a00_0001 + n).to_string(), &["http:80"]);
    let all: Vec<_> = (0..10_000).map(|n| (instance(&at(n)), true)).collect();
    world.change(&service, &all);
    let rows = |world: &TestZone| -> Vec<usize> {
        let view = world.zone.pin();
        let records = view.service(b"web", b"prod").expect("registered");
        let v4 = records.addresses().v4.expect("addresses");
        v4.iter().map(|row| std::ptr::from_ref(row) as usize).collect()
    };
    let before = rows(&world);
    // The older value stays alive until the comparison, so that no address is reused.
    let view = world.zone.pin();
    let old = view.service(b"web", b"prod").expect("registered").clone();
    drop(view);
    world.change(&service, &[(instance(&InstanceSpec { weight: Some(2.0), ..at(5000) }), true)]);
    let moved = before.iter().zip(rows(&world)).filter(|(before, after)| **before != *after).count();
    assert!((1..=32).contains(&moved), "{moved} rows were copied");
    drop(old);
}

#[test]
fn address_of_many_services_has_all_their_names() {
    let mut world = TestZone::new(config());
    let one = spec("10.0.0.1", &[]);
    for n in 0..2000 {
        world.add(&format!("s{n}.prod"), &one);
    }
    let name = QName::from_text("1.0.0.10.in-addr.arpa").expect("valid");
    let names = |world: &TestZone| {
        let view = world.zone.pin();
        match view.lookup(&name, Some(RecordType::Ptr)) {
            Lookup::Hit(Hit::Ptr(names, _)) => names.len(),
            _ => 0,
        }
    };
    assert_eq!(names(&world), 2000);
    for n in 0..1999 {
        world.remove(&format!("s{n}.prod"), &one);
    }
    assert_eq!(names(&world), 1);
    world.remove("s1999.prod", &one);
    assert!(ZoneContents::of(&world.zone).is_empty());
}

/// Whether `name` exists.
fn exists(zone: &super::Zone, name: &QName) -> bool {
    let reader = zone.pin();
    !matches!(reader.lookup(name, Some(RecordType::A)), Lookup::NxDomain(_))
}

/// RFC 8020: who finds a service must find the names above it. A resolver that sees NXDOMAIN for
/// the namespace may answer NXDOMAIN for everything below from its cache.
#[test]
fn namespace_of_a_visible_service_exists() {
    const ROUNDS: usize = 3000;
    let mut world = TestZone::new(config());
    let zone = Arc::clone(&world.zone);
    let names = |n: usize| {
        let name = |text: String| QName::from_text(&text).expect("valid");
        (name(format!("web.ns{n}.svc.cluster.local")), name(format!("ns{n}.svc.cluster.local")))
    };
    // Steps that the reader has seen: one for each addition, one for each removal.
    let seen = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            for round in 0..ROUNDS {
                let (service, namespace) = names(round);
                while !exists(&zone, &service) {
                    std::hint::spin_loop();
                }
                let parent = exists(&zone, &namespace);
                seen.store(2 * round + 1, Ordering::Release);
                while exists(&zone, &namespace) && parent {
                    std::hint::spin_loop();
                }
                let child = exists(&zone, &service) && parent;
                seen.store(if parent && !child { 2 * round + 2 } else { usize::MAX }, Ordering::Release);
                assert!(parent, "round {round}: the service was visible before its namespace");
                assert!(!child, "round {round}: the namespace was gone before its service");
            }
        });
        let one = spec("10.0.0.1", &["http:80"]);
        for round in 0..ROUNDS {
            for step in [2 * round + 1, 2 * round + 2] {
                if step % 2 == 1 {
                    world.add(&format!("web.ns{round}"), &one);
                } else {
                    world.remove(&format!("web.ns{round}"), &one);
                }
                while seen.load(Ordering::Acquire) < step {
                    std::thread::yield_now();
                }
            }
            if seen.load(Ordering::Acquire) == usize::MAX {
                break;
            }
        }
        reader.join().expect("a service never outlives its namespace, nor comes before it");
    });
}

/// The work is counted in comparisons of keys, because time is noise.
#[test]
fn removing_the_lowest_priority_of_a_shared_host_name_takes_logarithmic_work() {
    const INSTANCES: u32 = 3000;
    let mut world = TestZone::new(config());
    let service = key("web.prod");
    let at = |n: u32| {
        let ip = std::net::Ipv4Addr::from_bits(0x0a00_0001 + n).to_string();
        let spec = InstanceSpec { host_name: "h".into(), priority: n as u16, ..spec(&ip, &["http:80"]) };
        instance(&spec)
    };
    let all: Vec<_> = (0..INSTANCES).map(|n| (at(n), true)).collect();
    world.change(&service, &all);
    let before = COMPARISONS.get();
    for n in 0..INSTANCES - 1 {
        world.change(&service, &[(at(n), false)]);
    }
    let each = (COMPARISONS.get() - before) / u64::from(INSTANCES);
    assert!(each < 500, "{each} comparisons for each removal");
    let name = QName::from_text("_http._tcp.web.prod.svc.cluster.local").expect("valid");
    let reader = world.zone.pin();
    let Lookup::Hit(Hit::Srv(rrset, _)) = reader.lookup(&name, Some(RecordType::Srv)) else {
        panic!("one instance is left")
    };
    assert_eq!(rrset.iter().map(|srv| u32::from(srv.priority)).collect::<Vec<_>>(), [INSTANCES - 1]);
}

/// RFC 1035 §2.3.4: a label has 63 octets, and `_` is one of them.
#[test]
fn port_name_of_63_characters_has_no_srv_record() {
    let mut world = TestZone::new(config());
    world.add("web.prod", &spec("10.0.0.1", &[&format!("{}:80", "p".repeat(63))]));
    assert!(exists(&world.zone, &QName::from_text("web.prod.svc.cluster.local").expect("valid")));
    assert!(!exists(&world.zone, &QName::from_text("_tcp.web.prod.svc.cluster.local").expect("valid")));
}

/// The zone has become longer since these were registered: what does not fit 255 octets any more
/// is not served, and the rest is.
#[test]
fn names_that_do_not_fit_a_longer_zone_are_not_served() {
    let origin = format!("{0}.{0}.{1}.local", "z".repeat(63), "z".repeat(50));
    let mut world =
        TestZone::new(ZoneConfig { origin: crate::model::DnsName::parse(&origin).expect("valid"), ..config() });
    let long = InstanceSpec { host_name: "h".repeat(60), ..spec("10.0.0.1", &["http:80"]) };
    world.add("web.prod", &long);
    world.add("web.prod", &spec("10.0.0.2", &["http:80"]));
    world.add(&format!("{}.prod", "s".repeat(63)), &spec("10.0.0.1", &["http:80"]));
    let reader = world.zone.pin();
    let lookup = |text: &str, rtype| {
        let name = QName::from_text(text).expect("valid");
        match reader.lookup(&name, Some(rtype)) {
            Lookup::Hit(Hit::A(rrset, _)) => rrset.len(),
            Lookup::Hit(Hit::Srv(rrset, _)) => rrset.len(),
            Lookup::Hit(Hit::Ptr(rrset, _)) => rrset.len(),
            _ => 0,
        }
    };
    assert_eq!(lookup(&format!("web.prod.svc.{origin}"), RecordType::A), 2);
    assert_eq!(lookup(&format!("_http._tcp.web.prod.svc.{origin}"), RecordType::Srv), 1);
    assert_eq!(lookup("2.0.0.10.in-addr.arpa", RecordType::Ptr), 1);
    assert_eq!(lookup("1.0.0.10.in-addr.arpa", RecordType::Ptr), 0);
    drop(reader);
    assert_eq!(world.zone.unservable(), 2);
    world.remove("web.prod", &long);
    world.remove(&format!("{}.prod", "s".repeat(63)), &spec("10.0.0.1", &["http:80"]));
    assert_eq!(world.zone.unservable(), 0);
}
