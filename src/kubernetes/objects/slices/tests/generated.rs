//! Random services and changes, and slices of any content.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use k8s_openapi::{
    api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use proptest::prelude::*;

use super::*;
use crate::kubernetes::objects::names;

const ADDRESSES: &[&str] = &[
    "10.0.0.1",
    "10.0.0.2",
    "10.0.0.3",
    "10.0.0.4",
    "10.0.0.5",
    "10.0.0.6",
    "10.0.0.7",
    "10.0.0.8",
    "2001:db8::1",
    "2001:db8::",
    "::abcd",
    "2001:db8::2",
    "1:2:3:4:5:6:7:0",
    "db.example.com",
    "mail.example.com",
];

const PORTS: &[&[PortTuple]] = &[
    &[],
    HTTP,
    &[(8080, TCP, "web")],
    &[(8080, TCP, "")],
    &[(8080, TCP, "http"), (8443, TCP, "https")],
    DNS,
    &[(53, TCP, "dns")],
    &[(53, TCP, "dns"), (9153, TCP, "")],
    &[(53, TCP, "dns"), (53, UDP, "dns"), (53, Protocol::Sctp, "dns")],
    &[(53, UDP, "dns"), (54, TCP, "dns")],
];

fn any_instance() -> impl Strategy<Value = Arc<Instance>> {
    let host = prop::option::of(prop::sample::select(vec!["a", "web-1"]));
    let node = prop::option::of(prop::sample::select(vec!["vm-7", "vm-7.example.com"]));
    let weight = prop::option::of(prop_oneof![Just(0.0f32), Just(0.1), 0.0f32..=655.0]);
    let what = (0..ADDRESSES.len(), 0..PORTS.len(), host, node, weight, prop_oneof![Just(0u16), any::<u16>()]);
    (what, 1u64..2_000_000_000_000, any::<bool>()).prop_map(
        |((address, ports, host, node, weight, priority), registered, ready)| {
            let spec = InstanceSpec {
                host_name: host.unwrap_or_default().into(),
                node_name: node.unwrap_or_default().into(),
                weight,
                priority,
                ..spec(ADDRESSES[address], PORTS[ports])
            };
            let instance = VALIDATOR.instance(&web(), &spec, UnixMillis(registered)).expect("valid");
            Arc::new(instance.with_ready(ready))
        },
    )
}

/// How many slices an instance is in.
fn parts(instance: &Instance) -> usize {
    SliceGroup::all(Family::of(instance.address()), instance.ports()).len()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn one_change_at_a_time(
        steps in prop::collection::vec((any_instance(), 0u8..4), 1..60), max in 1usize..6, publish in any::<bool>(),
    ) {
        with_request(max, &[], |request| {
            let request = PlanOptions { publish_not_ready: publish, ..*request };
            let mut cluster = Cluster::default();
            let mut instances: CowTree<Arc<Instance>> = CowTree::default();
            for (index, (instance, action)) in steps.iter().enumerate() {
                let before = if *action == 0 {
                    let nearest = instances.iter_from(index % instances.len().max(1)).next().cloned();
                    nearest.and_then(|one| instances.remove(&Instance::key(&one)))
                } else {
                    instances.put(Arc::clone(instance))
                };
                let request = PlanOptions { stamps: stamps(index as u64), ..request };
                let there = cluster.addresses();
                let (names_before, resolved_before) = (cluster.names(), cluster.resolved());
                let moments = cluster.moments(&request, &instances);
                let writes = moments.len();
                if let Some(last) = moments.last() {
                    let kept: HashSet<String> = there.intersection(last).cloned().collect();
                    prop_assert!(moments.iter().all(|moment| kept.is_subset(moment)), "an address was missing in between");
                }
                let moved = before.as_ref().is_some_and(|before| *action == 0 || before.ports() != instance.ports());
                let gone = before.as_ref().filter(|_| moved).map_or(0, |before| parts(before));
                // One write for each slice that the instance leaves or comes into, and none for any other.
                let most = gone + if *action == 0 { 0 } else { parts(instance) };
                // Whether a name is alone is shown in its slices.
                let names_now = cluster.names();
                let alone = |slices: &BTreeMap<String, bool>| slices.values().any(|ready| *ready);
                let most = most + if alone(&names_before) == alone(&names_now) { 0 } else { names_now.len() };
                // And what names lead to is shown elsewhere, or not at all.
                let resolved_now = cluster.resolved();
                let slices: BTreeSet<&String> = resolved_before.keys().chain(resolved_now.keys()).collect();
                let changed = slices.into_iter().filter(|name| resolved_before.get(*name) != resolved_now.get(*name));
                let most = most + changed.count();
                prop_assert!(writes <= most, "{writes} writes for one change of {most} endpoints");
                cluster.assert_shows(&request, &instances);
                prop_assert_eq!(read_back(&cluster), as_recorded(&instances));
                let observed = cluster.observed();
                prop_assert!(observed.iter().all(|slice| slice.digest.is_some() && slice.foreign.is_none()));
                // Other stamps alone are no reason to write.
                prop_assert_eq!(cluster.sync(&PlanOptions { stamps: stamps(u64::MAX), ..request }, &instances), 0);
            }
            Ok(())
        })?;
    }

    #[test]
    fn from_anything_to_anything(
        rounds in prop::collection::vec((prop::collection::vec(any_instance(), 0..40), 1usize..8), 1..5),
    ) {
        let mut cluster = Cluster::default();
        for (all, max) in rounds {
            let mut instances = CowTree::default();
            all.into_iter().for_each(|one| _ = instances.put(one));
            with_request(max, &[], |request| {
                cluster.sync(request, &instances);
                cluster.assert_shows(request, &instances);
                assert_eq!(read_back(&cluster), as_recorded(&instances));
                assert_eq!(cluster.sync(request, &instances), 0);
            });
        }
    }

    #[test]
    fn any_existing_slices_are_corrected(
        slices in prop::collection::vec(any_slice(), 0..8), all in prop::collection::vec(any_instance(), 0..10),
    ) {
        let mut cluster = Cluster::default();
        for (index, mut slice) in slices.into_iter().enumerate() {
            let name = slice.metadata.name.clone().unwrap_or_default();
            let _ = (read([&slice], &VALIDATOR), read_foreign_slice(&slice, &VALIDATOR), ObservedSlice::read(&slice));
            slice.metadata.uid = Some(format!("junk-{index}"));
            slice.metadata.resource_version = Some("1".into());
            cluster.slices.insert(name, slice);
        }
        cluster.slices.retain(|_, slice| ObservedSlice::read(slice).is_some_and(|one| one.service == web()));
        let mut instances = CowTree::default();
        all.into_iter().for_each(|one| _ = instances.put(one));
        with_request(3, &[], |request| {
            cluster.sync(request, &instances);
            cluster.assert_shows(request, &instances);
            assert_eq!(cluster.sync(request, &instances), 0);
        });
    }
}

/// A slice that no API server would take, and that nevertheless must not hurt.
fn any_slice() -> impl Strategy<Value = EndpointSlice> {
    let text = || prop_oneof![Just(String::new()), "[a-z0-9.:-]{0,12}", Just("10.0.0.1".to_owned()), "\\PC{0,4}"];
    let port = (prop::option::of(text()), prop::option::of(any::<i32>()), prop::option::of("TCP|UDP|SCTP|tcp|"))
        .prop_map(|(name, port, protocol)| EndpointPort { name, port, protocol, ..EndpointPort::default() });
    let ports = prop_oneof![
        prop::option::of(prop::collection::vec(port, 0..4)),
        Just(Some(vec![EndpointPort {
            name: Some("http".into()),
            port: Some(8080),
            protocol: Some("TCP".into()),
            app_protocol: None
        }])),
    ];
    let address = || prop_oneof![text(), prop::sample::select(ADDRESSES).prop_map(Into::into)];
    let endpoint = (
        prop::collection::vec(address(), 0..3),
        prop::option::of(text()),
        prop::option::of(text()),
        prop::option::of(prop::option::of(any::<bool>())),
    )
        .prop_map(|(addresses, hostname, node_name, ready)| Endpoint {
            addresses,
            hostname,
            node_name,
            conditions: ready.map(|ready| EndpointConditions { ready, ..EndpointConditions::default() }),
            ..Endpoint::default()
        });
    let json = prop_oneof![
        text(),
        Just(r#"{"10.0.0.1":{"weight":-1}}"#.to_owned()),
        Just(r#"[{"port":53,"protocol":"TCP","name":"dns"},{"port":53,"protocol":"UDP","name":"dns"}]"#.to_owned()),
    ];
    let keys = prop::sample::select(vec![names::INSTANCES, names::PORTS, names::TERM, "x"]);
    let annotations = prop::collection::btree_map(keys.prop_map(Into::into), json, 0..4);
    let name = prop_oneof![Just("web-0123456789".to_owned()), "web-[0-9a-f]{10}", "[a-z]{1,5}"];
    let kind = prop::sample::select(vec!["IPv4", "IPv6", "FQDN"]);
    (name, kind, ports, prop::collection::vec(endpoint, 0..6), annotations, any::<bool>()).prop_map(
        |(name, kind, ports, endpoints, annotations, labelled)| {
            let mut labels = BTreeMap::from([(names::MANAGED_BY.into(), names::MANAGER.into())]);
            if labelled {
                labels.insert(names::SERVICE_NAME.into(), "web".into());
            }
            let owner = OwnerReference { uid: "stale".into(), ..owner(&web(), "") };
            EndpointSlice {
                address_type: kind.into(),
                endpoints,
                ports,
                metadata: ObjectMeta {
                    name: Some(name),
                    namespace: Some("prod".into()),
                    labels: Some(labels),
                    annotations: Some(annotations),
                    owner_references: Some(vec![owner]),
                    ..ObjectMeta::default()
                },
            }
        },
    )
}
