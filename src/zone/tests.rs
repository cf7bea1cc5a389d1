use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use proptest::prelude::*;

use super::{
    Hit, Lookup, QName, RecordType, ZoneConfig,
    testing::{TestZone, ZoneContents, config, instance, key, spec},
};
use crate::model::{Instance, InstanceSpec};

/// One registration among few addresses, names and ports, so that they meet often.
fn any_instance() -> impl Strategy<Value = (InstanceSpec, bool)> {
    let address = prop_oneof![
        (1u8..6).prop_map(|n| format!("10.0.0.{n}")),
        (1u8..4).prop_map(|n| format!("2001:db8::{n}")),
        Just("db.example.com".to_owned()),
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
    fn changing_a_zone_step_by_step_is_building_it_at_once(
        publish_not_ready in any::<bool>(),
        batches in prop::collection::vec(
            (0usize..3, prop::collection::vec((any_instance(), prop::bool::weighted(0.6)), 1..6)),
            1..40,
        ),
    ) {
        let services = ["web.prod", "db.prod", "web.test"].map(key);
        let config = ZoneConfig { publish_not_ready, ..config() };
        let mut world = TestZone::new(config.clone());
        let mut seen = Vec::new();
        for (index, steps) in batches {
            let service = &services[index];
            let steps: Vec<(Arc<Instance>, bool)> = steps
                .into_iter()
                .map(|((spec, ready), stays)| {
                    let instance = Arc::unwrap_or_clone(instance(service, &spec)).with_ready(ready);
                    (Arc::new(instance), stays)
                })
                .collect();
            world.change(service, &steps);
            seen.extend(steps.into_iter().map(|(instance, _)| (index, instance)));
            prop_assert_eq!(ZoneContents::of(&world.zone), ZoneContents::of(&world.rebuilt(config.clone()).zone));
        }
        for (index, instance) in seen {
            world.change(&services[index], &[(instance, false)]);
        }
        prop_assert!(ZoneContents::of(&world.zone).is_empty());
    }
}

/// A reader asks for SRV again and again, and for the address of every target, while instances
/// come and go. Both are of one value, so that a target that is named must be there.
#[test]
fn an_srv_target_never_dangles() {
    let mut world = TestZone::new(config());
    let zone = Arc::clone(&world.zone);
    let stop = AtomicBool::new(false);
    let looked = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let srv = QName::from_text("_http._tcp.web.prod.svc.cluster.local").expect("valid");
            let mut looked = 0;
            while !stop.load(Ordering::Relaxed) || looked == 0 {
                let view = zone.pin();
                let Lookup::Hit(Hit::Srv(rrset, records)) = view.lookup(view.locate(&srv), &srv, RecordType::Srv)
                else {
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
            let steps = [(instance(&service, &one(round)), true), (instance(&service, &one(round + 20)), false)];
            world.change(&service, &steps);
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().expect("the reader saw no dangling target")
    });
    assert!(looked > 0);
}

/// P6b: what one change costs must not grow with the service. Chunks that are shared with the
/// older value are told by their address.
#[test]
fn a_change_in_a_large_service_leaves_nearly_all_of_it_alone() {
    let mut world = TestZone::new(config());
    let service = key("web.prod");
    let at = |n: u32| spec(&std::net::Ipv4Addr::from_bits(0x0a00_0001 + n).to_string(), &["http:80"]);
    let all: Vec<_> = (0..10_000).map(|n| (instance(&service, &at(n)), true)).collect();
    world.change(&service, &all);
    let rows = |world: &TestZone| -> Vec<usize> {
        let view = world.zone.pin();
        let records = view.service(b"web", b"prod").expect("registered");
        let v4 = records.addresses().v4.expect("addresses");
        v4.iter().map(|row| std::ptr::from_ref(row) as usize).collect()
    };
    let before = rows(&world);
    // The older value stays alive meanwhile, so that no address is used again.
    let view = world.zone.pin();
    let old = view.service(b"web", b"prod").expect("registered").clone();
    drop(view);
    world.change(&service, &[(instance(&service, &InstanceSpec { weight: Some(2.0), ..at(5000) }), true)]);
    let moved = before.iter().zip(rows(&world)).filter(|(before, after)| **before != *after).count();
    assert!((1..=32).contains(&moved), "{moved} rows were copied");
    drop(old);
}

#[test]
fn an_address_of_many_services_is_cheap_to_add_and_remove() {
    let mut world = TestZone::new(config());
    let one = spec("10.0.0.1", &[]);
    for n in 0..2000 {
        world.add(&format!("s{n}.prod"), &one);
    }
    let name = QName::from_text("1.0.0.10.in-addr.arpa").expect("valid");
    let names = |world: &TestZone| {
        let view = world.zone.pin();
        match view.lookup(view.locate(&name), &name, RecordType::Ptr) {
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
