//! Registrations that the validator accepts are valid in Kubernetes: generated instances, as Services
//! and slices, in a dry run of a real API server, as the administrator and as gangplank's account.
//!
//! Every run generates anew; a case that fails is printed whole. `GANGPLANK_ACCEPTED_CASES` says how
//! many instances are tried, and `GANGPLANK_TEST_KUBERNETES=1.35` before which Kubernetes.

use std::{
    collections::{HashMap, HashSet},
    env,
    sync::Arc,
};

use gangplank::{
    kubernetes::objects::{
        endpoints, services,
        slices::{PlanOptions, SliceStamps, SliceWrite, plan},
    },
    model::{CowTree, Instance, InstanceSpec, PortSpec, Protocol, ServiceKey, Stamp, UnixMillis, Validator},
    replicas::tombstones::Tombstones,
};
use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, TestRunner},
};
use serde_json::{Value, json};

use crate::support::cluster::Cluster;

/// Instances that are tried by default: enough for CI.
const CASES: usize = 300;

/// Most instances of one service.
const OF_A_SERVICE: usize = 6;

/// As long as a namespace can be.
const MAX_LABEL: &str = "n23456789-123456789-123456789-123456789-123456789-123456789-123";

/// Addresses at the edges of what is an address, also those that the validator refuses.
const ADDRESSES: &[&str] = &[
    "100.64.0.1",
    "192.0.2.255",
    "10.255.255.255",
    "198.18.0.0",
    "169.253.255.255",
    "1.0.0.0",
    "223.255.255.255",
    "2001:db8::",
    "::1:2",
    "::1.2.3.4",
    "64:ff9b::10.0.0.1",
    "fc00::1",
    "fec0::1",
    "2002::",
    "100::1",
    "::2",
    "0.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "169.254.1.1",
    "127.0.0.1",
    "224.0.0.1",
    "::",
    "::1",
    "fe80::1",
    "ff02::1",
    "ff0e::1",
    "::ffff:10.0.0.1",
    "010.0.0.1",
];

const VALIDATOR: Validator = Validator { zone_wire_len: 15, names_allowed: true };

/// A label of one letter, of any, or of 63; digits and dashes wherever they may stand.
fn label() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => "[a-z0-9]([-a-z0-9]{0,8}[a-z0-9])?",
        1 => "[a-z0-9][-a-z0-9]{61}[a-z0-9]",
        1 => "[0-9]{1,63}",
        1 => "[a-z]--[a-z0-9]{0,5}[0-9]",
        1 => prop::sample::select(vec!["xn--bcher-kva", "10-0-0-1", "kubernetes", "localhost", "0"]).prop_map(String::from),
    ]
}

/// A service's name begins with a letter.
fn service_name() -> impl Strategy<Value = String> {
    prop_oneof![4 => label(), 1 => "[a-z][-a-z0-9]{61}[a-z0-9]", 2 => "[a-z][a-z0-9]{0,5}"]
}

/// Addresses of all kinds, also those that the validator refuses.
fn address() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => any::<[u8; 4]>().prop_map(|octets| std::net::Ipv4Addr::from(octets).to_string()),
        3 => any::<[u16; 8]>().prop_map(|parts| std::net::Ipv6Addr::from(parts).to_string()),
        3 => prop::array::uniform8(prop_oneof![2 => Just(0_u16), 1 => any::<u16>()])
            .prop_map(|parts| std::net::Ipv6Addr::from(parts).to_string()),
        2 => prop::sample::select(ADDRESSES).prop_map(String::from),
        1 => "[a-z]{1,5}\\.example\\.(com|org)",
    ]
}

fn port() -> impl Strategy<Value = PortSpec> {
    let number = prop_oneof![1 => Just(1_i64), 1 => Just(65_535), 4 => 0_i64..70_000];
    let protocol = prop::sample::select(Protocol::ALL.to_vec());
    let name = prop_oneof![1 => Just(String::new()), 2 => label(), 4 => "[a-c]"];
    (number, protocol, name).prop_map(|(number, protocol, name)| PortSpec { number, protocol, name })
}

fn spec() -> impl Strategy<Value = InstanceSpec> {
    let node = prop_oneof![
        4 => Just(String::new()),
        2 => "[a-z0-9]{1,9}\\.[a-z]{2,5}",
        1 => "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?){0,3}",
        1 => "[0-9]{1,3}(\\.[0-9]{1,3}){3}",
    ];
    let ports = prop_oneof![6 => prop::collection::vec(port(), 0..5), 1 => prop::collection::vec(port(), 30..40)];
    let weight = prop_oneof![Just(None), Just(Some(0.0)), Just(Some(655.0)), (0.0_f32..655.0).prop_map(Some)];
    (address(), ports, prop_oneof![2 => Just(String::new()), 1 => label()], node, weight, any::<u16>()).prop_map(
        |(address, ports, host_name, node_name, weight, priority)| InstanceSpec {
            address,
            ports,
            host_name,
            node_name,
            weight,
            priority,
        },
    )
}

/// Everything as long as it can be, at every address that is admitted.
fn edges() -> (ServiceKey, CowTree<Arc<Instance>>) {
    let long = |letter: &str| letter.repeat(63);
    let key = VALIDATOR.service(MAX_LABEL, &long("s")).expect("63 characters are a label");
    let port = |number: i64| PortSpec {
        number,
        protocol: Protocol::ALL[usize::try_from(number % 3).expect("small")],
        // At most 62: `_name` must be a label.
        name: format!("{}{number:02}", "p".repeat(60)),
    };
    let node = format!("{0}.{0}.{0}.{1}", long("n"), "n".repeat(61));
    let instances = ADDRESSES.iter().flat_map(|&address| {
        let spec = InstanceSpec {
            address: address.into(),
            ports: (10..30).map(port).collect(),
            host_name: long("h"),
            node_name: node.clone(),
            weight: Some(0.1),
            priority: u16::MAX,
        };
        let bare = InstanceSpec { address: address.into(), ..InstanceSpec::default() };
        [spec, bare].map(|spec| VALIDATOR.instance(&key, &spec, UnixMillis(u64::MAX)).ok().map(Arc::new))
    });
    let table: CowTree<Arc<Instance>> = instances.flatten().collect();
    assert!(table.len() >= 30, "admitted: {} of {}", table.len(), 2 * ADDRESSES.len());
    (key, table)
}

/// Services with instances that the validator admits, until there are `cases` instances.
fn generated(cases: usize) -> Vec<(ServiceKey, CowTree<Arc<Instance>>)> {
    let mut runner = TestRunner::new(Config::default());
    let service = (
        prop::sample::select(vec!["accepts", MAX_LABEL]),
        service_name(),
        prop::collection::vec(spec(), 1..=4 * OF_A_SERVICE),
    );
    let (mut all, mut names, mut count) = (vec![edges()], HashSet::new(), 0);
    while count < cases {
        let (namespace, name, specs) = service.new_tree(&mut runner).expect("it generates").current();
        let Ok(key) = VALIDATOR.service(namespace, &name) else { continue };
        let accepted =
            specs.iter().filter_map(|spec| VALIDATOR.instance(&key, spec, UnixMillis(1_700_000_000_123)).ok());
        let table: CowTree<Arc<Instance>> = accepted.take(OF_A_SERVICE).map(Arc::new).collect();
        if !table.is_empty() && names.insert(key.clone()) {
            count += table.len();
            all.push((key, table));
        }
    }
    all
}

/// What the mirror would write for them.
fn objects(services: &[(ServiceKey, CowTree<Arc<Instance>>)]) -> Vec<Value> {
    let occupied = HashSet::new();
    let mut objects = Vec::new();
    for (key, instances) in services {
        objects.push(serde_json::to_value(services::desired(key, instances)));
        let uid = "7d5ab9a5-0c3b-4d44-a9a6-7f3f3a2c9d10";
        let stamps = SliceStamps { term: u64::MAX, generation: u64::MAX, updated: UnixMillis(1), writer: "host" };
        let mut tombstones = Tombstones::default();
        for (instance, clock) in instances.iter().zip(1..) {
            tombstones.insert(instance.id(), Stamp { clock, term: 1 << 53, generation: u64::MAX });
        }
        tombstones.raise_refuse_before(1);
        let request = PlanOptions {
            service: key,
            service_uid: uid,
            max_endpoints: 100,
            publish_not_ready: false,
            flatten_names: false,
            resolutions: &HashMap::new(),
            tombstones: &tombstones,
            stamps,
            occupied: &occupied,
        };
        for write in plan(&request, instances, []) {
            let SliceWrite::Create(slice) = write else { panic!("nothing stands: {write:?}") };
            objects.push(serde_json::to_value(slice));
        }
        objects.push(serde_json::to_value(endpoints::desired(key, uid, instances, false)));
    }
    objects.into_iter().map(|object| object.expect("objects are JSON")).collect()
}

#[test]
fn accepted_registrations_are_valid_kubernetes_objects() {
    let Some(cluster) = Cluster::shared() else { return };
    for namespace in ["accepts", MAX_LABEL] {
        cluster.create_namespace(namespace);
    }
    let cases = env::var("GANGPLANK_ACCEPTED_CASES").map_or(CASES, |text| text.parse().expect("a number of cases"));
    let services = generated(cases);
    let objects = objects(&services);
    let kind = |kind: &str| objects.iter().filter(|object| object["kind"] == kind).count();
    assert_eq!((kind("Service"), kind("Endpoints")), (services.len(), services.len()));
    assert!(kind("EndpointSlice") >= services.len(), "each has at least one");

    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string();
    let create = ["create", "--dry-run=server", "--validate=false", "-o", "name", "-f", "-"];
    for (who, kubeconfig) in
        [("administrator", cluster.kubeconfig_admin()), ("gangplank", cluster.kubeconfig_for_gangplank())]
    {
        let taken = cluster.kubectl_as(&kubeconfig, &create, &list).unwrap_or_else(|said| {
            let refused = |object: &&Value| {
                said.contains(&format!("\"{}\"", object["metadata"]["name"].as_str().expect("a name")))
            };
            let example = objects.iter().find(refused);
            panic!("as {who}, Kubernetes {}:\n{said}\nfor instance {example:#?}", cluster.release())
        });
        assert_eq!(taken.lines().count(), objects.len(), "as {who}");
    }
    // What is refused here is refused: a dry run does look.
    let mut wrong = objects[0].clone();
    wrong["metadata"]["name"] = "9-".into();
    assert!(cluster.kubectl_as(&cluster.kubeconfig_admin(), &create, &wrong.to_string()).is_err());
}
