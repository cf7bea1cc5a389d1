//! Single cases, each with its reason.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use k8s_openapi::{
    api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};

use super::*;
use crate::{kubernetes::objects::names, model::InstanceKey};

fn many(count: u32, ports: &[PortTuple]) -> CowTree<Arc<Instance>> {
    let base = u32::from(std::net::Ipv4Addr::new(10, 0, 0, 1));
    let one = |at: u32| instance(&spec(&std::net::Ipv4Addr::from(base + at).to_string(), ports));
    (0..count).map(one).collect()
}

#[test]
fn large_service_fills_its_slices_and_one_change_rewrites_one() {
    let mut instances = many(10_000, HTTP);
    let mut cluster = Cluster::default();
    with_request(100, &[], |request| {
        assert_eq!(cluster.sync(request, &instances), 100);
        assert!(cluster.slices.values().all(|slice| slice.endpoints.len() == 100));
        let gone = instances.iter_from(5_000).next().cloned().expect("there are 10 000");
        instances.remove(&Instance::key(&gone));
        assert_eq!(cluster.sync(request, &instances), 1);
        // Its place is taken by the next one.
        instances.put(instance(&spec("10.200.0.1", HTTP)));
        assert_eq!(cluster.sync(request, &instances), 1);
        assert_eq!(cluster.slices.len(), 100);
        instances.put(instance(&spec("10.200.0.2", HTTP)));
        assert_eq!(cluster.sync(request, &instances), 1);
        assert_eq!(cluster.slices.len(), 101);
        assert_eq!(cluster.sync(request, &CowTree::default()), 101);
        assert!(cluster.slices.is_empty());
    });
}

#[test]
fn largest_slice_is_within_the_limits_of_kubernetes() {
    // Two names under both protocols, and as many others as fit 2 KiB.
    let names: Vec<String> = (0..90).map(|index| format!("p{index}")).collect();
    let ports = |protocol| {
        let port = move |(index, name): (usize, &String)| PortSpec {
            number: 10_000 + index as i64,
            protocol,
            name: if index == 0 { "both".into() } else { name.clone() },
        };
        names.iter().enumerate().map(port)
    };
    let ports: Vec<PortSpec> = ports(TCP).chain(ports(UDP).take(10)).collect();
    let one = |at: u32| {
        let spec = InstanceSpec {
            address: format!("2001:1db8:1234:5678:9abc:def0:1234:{:x}", 0x1000 + at),
            host_name: "h".repeat(63),
            node_name: format!("{}.{}.{}", "n".repeat(63), "n".repeat(63), "n".repeat(60)),
            weight: Some(1.234_567_9e-38),
            priority: u16::MAX,
            ports: ports.clone(),
        };
        Arc::new(VALIDATOR.instance(&web(), &spec, UnixMillis(u64::MAX)).expect("valid"))
    };
    let instances: CowTree<Arc<Instance>> = (0..1000).map(one).collect();
    let mut cluster = Cluster::default();
    with_request(1000, &[], |request| {
        assert_eq!(cluster.sync(request, &instances), 2, "a slice for TCP, one for UDP");
        cluster.assert_shows(request, &instances);
        assert_eq!(read_back(&cluster), as_recorded(&instances));

        // Somebody else fills the annotations: what no longer fits moves, and it still converges.
        for slice in cluster.slices.values_mut() {
            let annotations = slice.metadata.annotations.as_mut().expect("ours");
            annotations.insert("example.com/notes".into(), "x".repeat(150 * 1024));
        }
        assert!(cluster.sync(request, &instances) >= 4);
        cluster.assert_shows(request, &instances);
        assert!(
            cluster.slices.values().any(|slice| slice
                .metadata
                .annotations
                .as_ref()
                .is_some_and(|a| a.contains_key("example.com/notes")))
        );
        assert_eq!(cluster.sync(request, &instances), 0);
    });
}

/// External edits of a slice.
type SliceEdit = (&'static str, fn(&mut EndpointSlice));

const EDITS: &[SliceEdit] = &[
    ("an endpoint removed", |slice| _ = slice.endpoints.pop()),
    ("an endpoint doubled", |slice| slice.endpoints.push(slice.endpoints[0].clone())),
    ("an endpoint added", |slice| {
        let added = Endpoint { addresses: vec!["10.9.9.9".into()], ..slice.endpoints[0].clone() };
        slice.endpoints.push(added);
    }),
    ("the order", |slice| slice.endpoints.reverse()),
    ("an address", |slice| slice.endpoints[0].addresses[0] = "10.9.9.9".into()),
    ("a second address", |slice| slice.endpoints[0].addresses.push("10.9.9.9".into())),
    ("no address", |slice| slice.endpoints[0].addresses.clear()),
    ("ready", |slice| slice.endpoints[0].conditions.as_mut().expect("set").ready = Some(false)),
    ("ready left out", |slice| slice.endpoints[0].conditions.as_mut().expect("set").ready = None),
    ("terminating", |slice| slice.endpoints[0].conditions.as_mut().expect("set").terminating = Some(true)),
    ("no conditions", |slice| slice.endpoints[0].conditions = None),
    ("a hostname", |slice| slice.endpoints[0].hostname = Some("other".into())),
    ("no hostname", |slice| slice.endpoints[0].hostname = None),
    ("a node", |slice| slice.endpoints[0].node_name = Some("other".into())),
    ("a zone", |slice| slice.endpoints[0].zone = Some("a".into())),
    ("a target", |slice| slice.endpoints[0].target_ref = Some(Default::default())),
    ("hints", |slice| slice.endpoints[0].hints = Some(Default::default())),
    ("a port's number", |slice| slice.ports.as_mut().expect("set")[0].port = Some(1)),
    ("a port without number", |slice| slice.ports.as_mut().expect("set")[0].port = None),
    ("a port's name", |slice| slice.ports.as_mut().expect("set")[0].name = Some("other".into())),
    ("a port's protocol", |slice| slice.ports.as_mut().expect("set")[0].protocol = Some("SCTP".into())),
    ("an application protocol", |slice| slice.ports.as_mut().expect("set")[0].app_protocol = Some("h2c".into())),
    ("no ports", |slice| slice.ports = None),
    ("the headless label", |slice| _ = slice.metadata.labels.as_mut().expect("set").remove(names::HEADLESS)),
    ("the service label", |slice| _ = slice.metadata.labels.as_mut().expect("set").remove(names::SERVICE_NAME)),
    ("the annotation gone", |slice| _ = slice.metadata.annotations.as_mut().expect("set").remove(names::INSTANCES)),
    ("the annotation emptied", |slice| {
        _ = slice.metadata.annotations.as_mut().expect("set").insert(names::INSTANCES.into(), "{}".into());
    }),
    ("a space in the annotation", |slice| {
        slice.metadata.annotations.as_mut().expect("set").get_mut(names::INSTANCES).expect("set").push(' ');
    }),
    ("a list of all ports", |slice| {
        let whole = r#"[{"port":1,"protocol":"TCP"}]"#;
        _ = slice.metadata.annotations.as_mut().expect("set").insert(names::PORTS.into(), whole.into());
    }),
    ("no list of all ports", |slice| _ = slice.metadata.annotations.as_mut().expect("set").remove(names::PORTS)),
    ("no term", |slice| _ = slice.metadata.annotations.as_mut().expect("set").remove(names::TERM)),
    ("no owner", |slice| slice.metadata.owner_references = None),
    ("a stale owner", |slice| slice.metadata.owner_references.as_mut().expect("set")[0].uid = "stale".into()),
    ("a controlling owner", |slice| slice.metadata.owner_references.as_mut().expect("set")[0].controller = Some(true)),
];

#[test]
fn every_external_edit_is_detected_and_reverted() {
    let host =
        InstanceSpec { host_name: "a".into(), node_name: "vm-1".into(), weight: Some(2.0), ..spec("10.0.0.1", HTTP) };
    let half =
        InstanceSpec { host_name: "a".into(), node_name: "vm-1".into(), weight: Some(2.0), ..spec("10.0.0.1", DNS) };
    let name = InstanceSpec { node_name: "vm-1".into(), weight: Some(2.0), ..spec("db.example.com", HTTP) };
    for (one, others) in
        [(host, spec("10.0.0.2", HTTP)), (half, spec("10.0.0.2", DNS)), (name, spec("db.example.com", DNS))]
    {
        let instances = table(&[one, others]);
        with_request(100, &[], |request| {
            let mut fresh = Cluster::default();
            fresh.sync(request, &instances);
            let names: Vec<String> = fresh.slices.keys().cloned().collect();
            for name in &names {
                for (what, edit) in EDITS {
                    let mut cluster = Cluster { slices: fresh.slices.clone(), versions: 100 };
                    let slice = cluster.slices.get_mut(name).expect("it stands");
                    let before = slice.clone();
                    edit(slice);
                    if *slice == before {
                        continue; // a slice without such a thing
                    }
                    assert_ne!(cluster.sync(request, &instances), 0, "{what}");
                    cluster.assert_shows(request, &instances);
                    assert_eq!(read_back(&cluster), as_recorded(&instances), "{what}");
                    assert_eq!(cluster.sync(request, &instances), 0, "{what}");
                }
            }
        });
    }
}

#[test]
fn stamps_and_foreign_metadata_cause_no_write_and_are_kept() {
    let mut instances = table(&[spec("10.0.0.1", HTTP)]);
    with_request(100, &[], |request| {
        let mut cluster = Cluster::default();
        cluster.sync(request, &instances);
        let (name, slice) = cluster.slices.iter_mut().next().expect("one slice");
        let name = name.clone();
        let meta = &mut slice.metadata;
        meta.labels.as_mut().expect("ours").insert("team".into(), "a".into());
        meta.annotations.as_mut().expect("ours").insert("note".into(), "b".into());
        meta.annotations.as_mut().expect("ours").insert(names::GENERATION.into(), "99".into());
        meta.finalizers = Some(vec!["example.com/hold".into()]);
        meta.owner_references
            .as_mut()
            .expect("ours")
            .push(OwnerReference { name: "other".into(), ..owner(&web(), "x") });
        assert_eq!(cluster.sync(request, &instances), 0);

        instances.put(instance(&spec("10.0.0.2", HTTP)));
        assert_eq!(cluster.sync(&PlanOptions { stamps: stamps(5), ..*request }, &instances), 1);
        let meta = &cluster.slices[&name].metadata;
        assert_eq!(meta.labels.as_ref().expect("set")["team"], "a");
        let annotations = meta.annotations.as_ref().expect("set");
        assert_eq!((&*annotations["note"], &*annotations[names::GENERATION]), ("b", "5"));
        assert_eq!(annotations[names::UPDATED], "2023-11-14T22:13:20.123Z");
        assert_eq!((&*annotations[names::TERM], &*annotations[names::WRITER]), ("7", "gangplank-0"));
        assert_eq!(meta.finalizers.as_deref(), Some(&["example.com/hold".to_owned()][..]));
        assert_eq!(meta.owner_references.as_ref().expect("set").len(), 2);
        let observed = cluster.observed();
        assert_eq!((observed[0].term, observed[0].generation, observed[0].service.clone()), (7, 5, web()));
    });
}

#[test]
fn occupied_slice_name_is_skipped() {
    let instances = table(&[spec("10.0.0.1", HTTP)]);
    let group = SliceGroup {
        family: Family::V4,
        ports: instance(&spec("10.0.0.1", HTTP)).ports().clone(),
        part: None,
        resolved: false,
    };
    let first = group.slice_name(&web(), 0);
    with_request(100, &[&first], |request| {
        let mut cluster = Cluster::default();
        cluster.sync(request, &instances);
        assert_eq!(cluster.slices.keys().collect::<Vec<_>>(), [&group.slice_name(&web(), 1)]);
    });
    // One that waits for its finalizer holds its name, and nothing in it counts.
    with_request(100, &[], |request| {
        let mut cluster = Cluster::default();
        cluster.sync(request, &instances);
        let going = &mut cluster.slices.get_mut(&first).expect("it stands").metadata;
        going.deletion_timestamp = serde_json::from_str(r#""2026-11-21T10:00:00Z""#).expect("a time");
        assert_eq!(cluster.sync(request, &instances), 1);
        assert_eq!(cluster.slices.len(), 2);
        assert_eq!(cluster.sync(request, &instances), 0);
        assert_eq!(cluster.sync(request, &CowTree::default()), 1, "it is not deleted twice");
    });
}

#[test]
fn copy_of_a_slice_is_deleted_and_the_original_kept() {
    let instances = many(5, HTTP);
    with_request(100, &[], |request| {
        let mut cluster = Cluster::default();
        cluster.sync(request, &instances);
        let original = cluster.slices.values().next().expect("one slice").clone();
        for copy in ["web-copy", "web-ffffffffff"] {
            let mut slice = original.clone();
            slice.metadata.name = Some(copy.into());
            slice.metadata.uid = Some(copy.into());
            cluster.slices.insert(copy.into(), slice);
        }
        assert_eq!(cluster.sync(request, &instances), 2);
        assert_eq!(cluster.slices.len(), 1);
        cluster.assert_shows(request, &instances);
    });
}

#[test]
fn skipped_endpoints_are_reported_with_their_reason() {
    let mut cluster = Cluster::default();
    let all = [spec("10.0.0.1", HTTP), spec("10.0.0.2", HTTP), spec("10.0.0.3", HTTP)];
    with_request(100, &[], |request| cluster.sync(request, &table(&all)));
    let slice = cluster.slices.values_mut().next().expect("one slice");
    slice.metadata.name = Some("web-1".into());
    slice.endpoints[0].addresses[0] = "240.0.0.1".into();
    slice.endpoints[1].hostname = Some("-a".into());
    let annotations = slice.metadata.annotations.as_mut().expect("ours");
    annotations.insert(names::INSTANCES.into(), r#"{"10.0.0.3":{"weight":700}}"#.into());
    let (read, skipped) = read([&*slice], &VALIDATOR);
    assert_eq!(read.iter().map(|one| one.id().to_string()).collect::<Vec<_>>(), ["10.0.0.3:8080"]);
    let said: Vec<String> = skipped.iter().map(ToString::to_string).collect();
    assert_eq!(
        said,
        [
            "slice web-1: 240.0.0.1: ipaddress: 240.0.0.1: reserved (240.0.0.0/4) addresses cannot be reached by pods",
            "slice web-1: 10.0.0.2: host_name: must begin and end with a letter or digit (RFC 1123 §2.1), got \"-a\"",
            "slice web-1: 10.0.0.3: annotation gangplank.dev/instances: weight: must be a finite number in 0..=655, got 700: the defaults are used",
        ]
    );

    slice.ports.as_mut().expect("set")[0].port = Some(70_000);
    let (read, skipped) = super::read([&*slice], &VALIDATOR);
    assert!(read.is_empty());
    assert_eq!(skipped.len(), 3);
    assert_eq!(skipped[2].to_string(), "slice web-1: 10.0.0.3: ports[0]: must be 1..=65535, got 70000");
}

#[test]
fn newer_slice_wins_and_a_missing_annotation_is_reported() {
    let mut cluster = Cluster::default();
    let heavy = InstanceSpec { weight: Some(5.0), ..spec("10.0.0.1", HTTP) };
    with_request(100, &[], |request| cluster.sync(request, &table(&[heavy])));
    let mut slices: Vec<EndpointSlice> = cluster.slices.into_values().collect();
    let mut older = slices[0].clone();
    older.metadata.name = Some("web-0000000000".into());
    let annotations = older.metadata.annotations.as_mut().expect("ours");
    annotations.remove(names::INSTANCES);
    annotations.insert(names::GENERATION.into(), "0".into());
    slices.insert(0, older.clone());
    let (both, _) = read(&slices, &VALIDATOR);
    assert_eq!(both.iter().map(|one| one.weight().get()).collect::<Vec<_>>(), [5.0]);

    let (alone, skipped) = read([&older], &VALIDATOR);
    assert_eq!(alone[0].weight().get(), 1.0);
    assert_eq!(
        skipped.iter().map(ToString::to_string).collect::<Vec<_>>(),
        [
            "slice web-0000000000: annotation gangplank.dev/instances is missing: weights, priorities and registrants are lost"
        ]
    );
}

#[test]
fn foreign_slices_are_read_as_far_as_dns_can_answer() {
    let port =
        |name: &str, port: Option<i32>| EndpointPort { name: Some(name.into()), port, ..EndpointPort::default() };
    let endpoint = |addresses: &[&str]| Endpoint {
        addresses: addresses.iter().map(ToString::to_string).collect(),
        ..Endpoint::default()
    };
    let conditions = |ready| Some(EndpointConditions { ready, ..EndpointConditions::default() });
    let slice = EndpointSlice {
        address_type: "IPv4".into(),
        ports: Some(vec![
            port("http", Some(80)),
            port("all", None),
            port("zero", Some(0)),
            port("large", Some(70_000)),
            port("minus", Some(-1)),
            port("Upper", Some(81)),
            port("http-too", Some(80)),
            port("dns", Some(53)),
        ]),
        endpoints: vec![
            Endpoint { hostname: Some("pod-0".into()), node_name: Some("node-1".into()), ..endpoint(&["10.0.0.1"]) },
            Endpoint { conditions: conditions(Some(false)), ..endpoint(&["10.0.0.2"]) },
            Endpoint { conditions: conditions(None), ..endpoint(&["10.0.0.3", "10.0.0.4"]) },
            Endpoint { hostname: Some("10-0-0-9".into()), node_name: Some("N".into()), ..endpoint(&["10.0.0.5"]) },
            endpoint(&["240.0.0.1", "127.0.0.1", "10.0.0.1", "junk"]),
        ],
        metadata: ObjectMeta::default(),
    };
    let found = read_foreign_slice(&slice, &Validator { names_allowed: false, ..VALIDATOR });
    let shown: Vec<_> = found
        .iter()
        .map(|one| {
            let host = one.host_name().map(ToString::to_string);
            let node = one.node_name().map(ToString::to_string);
            (one.id().to_string(), one.ready(), host, node)
        })
        .collect();
    let expected = |address: &str, ready, host: Option<&str>, node: Option<&str>| {
        (format!("{address}:53,80"), ready, host.map(Into::into), node.map(Into::into))
    };
    assert_eq!(
        shown,
        [
            expected("10.0.0.1", true, Some("pod-0"), Some("node-1")),
            expected("10.0.0.2", false, None, None),
            expected("10.0.0.3", true, None, None),
            expected("10.0.0.4", true, None, None),
            expected("10.0.0.5", true, None, None),
        ]
    );
    let crowded = EndpointSlice {
        ports: Some((1..=20_000).map(|number| port(&format!("p{number}"), Some(number))).collect()),
        ..slice
    };
    assert_eq!(read_foreign_slice(&crowded, &VALIDATOR).len(), 5, "its ports are cut to what an instance carries");
}

#[test]
fn name_is_ready_only_where_it_is_all_that_the_service_has() {
    let db = || spec("db.example.com", HTTP);
    let unready = |spec| Arc::new((*instance(&spec)).clone().with_ready(false));
    let with = |instances: &[Arc<Instance>], flatten_names, publish_not_ready| {
        let table: CowTree<Arc<Instance>> = instances.iter().cloned().collect();
        let mut cluster = Cluster::default();
        with_request(100, &[], |request| {
            let request = PlanOptions { flatten_names, publish_not_ready, ..*request };
            cluster.sync(&request, &table);
            cluster.assert_shows(&request, &table);
            assert_eq!(read_back(&cluster), as_recorded(&table));
        });
        let ready = cluster.slices.values().flat_map(|slice| &slice.endpoints);
        let ready = ready.filter(|row| row.conditions.as_ref().and_then(|conditions| conditions.ready) == Some(true));
        ready.flat_map(|row| row.addresses.clone()).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>()
    };
    let one = [instance(&db())];
    assert_eq!(with(&one, false, false), ["db.example.com"]);
    let found = ["10.0.0.1", "10.0.0.77", "2001:db8::77"];
    assert_eq!(with(&one, true, false), found, "others have addresses there");
    let ports = [instance(&db()), instance(&spec("db.example.com", &[(80, TCP, "")]))];
    assert_eq!(with(&ports, false, false), ["db.example.com"], "one name with two lists of ports");
    let names = [instance(&db()), instance(&spec("mail.example.com", HTTP))];
    let of_both = ["10.0.0.1", "10.0.0.77", "10.0.0.78", "2001:db8::77"];
    assert_eq!(with(&names, false, false), of_both, "two CNAMEs are no answer");
    let mixed = [instance(&db()), instance(&spec("10.0.0.1", HTTP))];
    assert_eq!(with(&mixed, false, false), found);
    let last = [instance(&db()), unready(spec("10.0.0.1", HTTP)), unready(spec("mail.example.com", HTTP))];
    assert_eq!(with(&last, false, false), ["db.example.com"], "the others are not served");
    assert_eq!(with(&last, false, true), of_both);
    assert_eq!(with(&[unready(db())], false, false), [""; 0]);
    assert_eq!(with(&[unready(db())], false, true), ["db.example.com"]);
}

/// A process that has just begun to write would empty slices that consumers use.
#[test]
fn what_names_lead_to_stays_while_nothing_is_known_of_one() {
    let mut cluster = Cluster::default();
    let mixed = table(&[spec("10.0.0.9", HTTP), spec("db.example.com", HTTP)]);
    let more = table(&[spec("10.0.0.9", HTTP), spec("db.example.com", HTTP), spec("mail.example.com", HTTP)]);
    with_request(100, &[], |request| {
        cluster.sync(request, &mixed);
        let before = cluster.resolved();
        assert_eq!(before.len(), 2, "a slice for each family");
        let unknown = PlanOptions { resolutions: &HashMap::new(), ..*request };
        assert_eq!(cluster.sync(&unknown, &mixed), 0);
        cluster.sync(&unknown, &more);
        assert_eq!(cluster.resolved(), before);
        assert_eq!(read_back(&cluster), as_recorded(&more), "the instances are written");

        let none =
            ["db.example.com", "mail.example.com"].map(|name| (DnsName::parse(name).expect("a name"), Arc::default()));
        let nowhere = PlanOptions { resolutions: &none.into(), ..*request };
        cluster.sync(&nowhere, &more);
        assert_eq!(cluster.resolved().len(), 0, "it is known that they lead nowhere");
    });
}

#[test]
fn largest_names_are_within_the_limits_of_kubernetes() {
    let name = |at: u32| format!("{0}.{0}.{0}.n{at:04}{1}", "n".repeat(63), "n".repeat(56));
    let one = |at: u32| {
        let spec = InstanceSpec { weight: Some(1.234_567_9e-38), priority: u16::MAX, ..spec(&name(at), DNS) };
        Arc::new(VALIDATOR.instance(&web(), &spec, UnixMillis(u64::MAX)).expect("valid"))
    };
    let instances: CowTree<Arc<Instance>> = (0..1000).map(one).collect();
    let mut cluster = Cluster::default();
    with_request(1000, &[], |request| {
        cluster.sync(request, &instances);
        cluster.assert_shows(request, &instances);
        assert_eq!(read_back(&cluster), as_recorded(&instances));
        assert_eq!(cluster.sync(request, &instances), 0);
    });
}

/// A process that looks no names up keeps those that are registered, and those of other writers are never answered with.
#[test]
fn names_are_read_from_our_slices_only() {
    let nobody = Validator { names_allowed: false, ..VALIDATOR };
    let mut cluster = Cluster::default();
    let host = InstanceSpec { host_name: "db".into(), ..spec("db.example.com", DNS) };
    let instances = table(&[host, spec("mail.example.com", HTTP)]);
    with_request(100, &[], |request| {
        cluster.sync(&PlanOptions { resolutions: &HashMap::new(), ..*request }, &instances)
    });
    assert_eq!(cluster.slices.len(), 3, "a slice for each protocol, and one of the other ports");
    assert!(cluster.slices.values().all(|slice| slice.address_type == "FQDN"));
    let (read_by_nobody, skipped) = read(cluster.slices.values(), &nobody);
    assert_eq!((read_by_nobody.len(), skipped), (2, Vec::new()));
    for slice in cluster.slices.values_mut() {
        assert_eq!(read_foreign_slice(slice, &VALIDATOR), []);
        // The API server takes both.
        for wrong in ["10.0.0.1", "db"] {
            slice.endpoints[0].addresses[0] = wrong.into();
            let (none, skipped) = read_slice(slice, &VALIDATOR);
            assert_eq!((none, skipped.len()), (Vec::new(), 1), "{skipped:?}");
        }
        // What somebody wrote by hand is not what gangplank would write: it is repaired.
        slice.endpoints[0].addresses[0] = "mail.example.com.".into();
        assert!(ObservedSlice::read(slice).expect("ours").digest.is_none());
    }
    with_request(100, &[], |request| {
        cluster.sync(request, &instances);
        cluster.assert_shows(request, &instances);
        assert_eq!(read_back(&cluster), as_recorded(&instances));
    });
}

#[test]
fn members_are_ordered_by_key() {
    // place() looks members up by address: the table's order has to be that of addresses.
    let all = table(&[spec("2001:db8::1", HTTP), spec("10.0.0.10", HTTP), spec("9.0.0.1", HTTP)]);
    let ips: Vec<Option<IpAddr>> = all.iter().map(|one| one.address().ip()).collect();
    assert!(ips.is_sorted());
    let first = all.iter().next().expect("three");
    assert!(InstanceKey::first_of(first.address()) < Instance::key(first));
}

#[test]
fn slice_being_deleted_holds_no_instances() {
    let mut cluster = Cluster::default();
    with_request(100, &[], |request| cluster.sync(request, &table(&[spec("10.0.0.1", HTTP)])));
    let slice = cluster.slices.values_mut().next().expect("one slice");
    slice.metadata.deletion_timestamp = serde_json::from_str(r#""2026-11-21T10:00:00Z""#).expect("a time");
    assert_eq!(read([&*slice], &VALIDATOR), (Vec::new(), Vec::new()));
}
