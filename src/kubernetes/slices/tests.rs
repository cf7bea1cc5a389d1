//! Random services and changes, planned and carried out on a list of slices that refuses what an
//! API server refuses.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::{
    api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use proptest::prelude::*;

use super::*;
use crate::{
    kubernetes::names,
    model::{Door, Draft, DraftPort, Instance, InstanceKey, Protocol, ServiceKey, Table, UnixMillis},
};

pub(in crate::kubernetes) const DOOR: Door = Door { zone_wire_len: 15, names_allowed: true };

const UID: &str = "0d3cf0a4-0000-4000-8000-000000000001";

pub(in crate::kubernetes) fn web() -> ServiceKey {
    DOOR.service("prod", "web").expect("valid")
}

/// `(number, protocol, name)`.
pub(in crate::kubernetes) type PortTuple = (i64, Protocol, &'static str);

pub(in crate::kubernetes) fn draft(address: &str, ports: &[PortTuple]) -> Draft {
    let ports =
        ports.iter().map(|&(number, protocol, name)| DraftPort { number, protocol, name: name.into() }).collect();
    Draft { address: address.into(), ports, ..Draft::default() }
}

pub(in crate::kubernetes) fn instance(draft: &Draft) -> Arc<Instance> {
    Arc::new(DOOR.instance(&web(), draft, UnixMillis(1_700_000_000_000)).expect("valid"))
}

pub(in crate::kubernetes) fn table(drafts: &[Draft]) -> Table<Arc<Instance>> {
    let mut table = Table::default();
    for draft in drafts {
        table.put(instance(draft));
    }
    table
}

pub(in crate::kubernetes) const TCP: Protocol = Protocol::Tcp;
pub(in crate::kubernetes) const UDP: Protocol = Protocol::Udp;

const HTTP: &[PortTuple] = &[(8080, TCP, "http")];
const DNS: &[PortTuple] = &[(53, TCP, "dns"), (53, UDP, "dns"), (9153, TCP, "")];

/// The slices of a namespace, which keeps the rules of an API server.
#[derive(Default)]
struct Cluster {
    slices: BTreeMap<String, EndpointSlice>,
    versions: u64,
}

impl Cluster {
    fn apply(&mut self, write: Write) {
        match write {
            Write::Create(slice) => {
                let name = slice.metadata.name.clone().expect("a name");
                assert!(slice.metadata.uid.is_none() && slice.metadata.resource_version.is_none());
                assert!(!self.slices.contains_key(&name), "409: {name} exists");
                let uid = format!("uid-{}", self.versions);
                self.store(slice, uid);
            }
            Write::Replace(slice) => {
                let standing = &self.slices[slice.metadata.name.as_ref().expect("a name")];
                let meta = &standing.metadata;
                assert_eq!(
                    (&slice.metadata.uid, &slice.metadata.resource_version),
                    (&meta.uid, &meta.resource_version)
                );
                assert_eq!(slice.address_type, standing.address_type, "422: immutable");
                let uid = meta.uid.clone().expect("set when it was created");
                self.store(slice, uid);
            }
            Write::Delete { name, uid, resource_version } => {
                let meta = self.slices.remove(&name).expect("404").metadata;
                assert_eq!((Some(uid), Some(resource_version)), (meta.uid, meta.resource_version));
            }
        }
    }

    fn store(&mut self, mut slice: EndpointSlice, uid: String) {
        assert_accepted(&slice);
        self.versions += 1;
        slice.metadata.uid = Some(uid);
        slice.metadata.resource_version = Some(self.versions.to_string());
        self.slices.insert(slice.metadata.name.clone().expect("a name"), slice);
    }

    fn standing(&self) -> Vec<Standing> {
        self.slices.values().filter_map(Standing::read).collect()
    }

    /// Plans and carries out. Returns how many writes it took.
    fn sync(&mut self, request: &Request<'_>, instances: &Table<Arc<Instance>>) -> usize {
        self.moments(request, instances).len()
    }

    /// Plans and carries out. Returns the addresses that are there after each write.
    fn moments(&mut self, request: &Request<'_>, instances: &Table<Arc<Instance>>) -> Vec<HashSet<String>> {
        let mut moments = Vec::new();
        for write in plan(request, instances, &self.standing()) {
            self.apply(write);
            moments.push(self.addresses());
        }
        moments
    }

    fn addresses(&self) -> HashSet<String> {
        let endpoints = self.slices.values().flat_map(|slice| &slice.endpoints);
        endpoints.flat_map(|endpoint| endpoint.addresses.clone()).collect()
    }

    /// That the slices show exactly `instances`: looked at without the code that wrote them.
    fn assert_shows(&self, request: &Request<'_>, instances: &Table<Arc<Instance>>) {
        let mut expected = 0;
        for instance in instances.iter() {
            let Some(ip) = instance.address().ip() else { continue };
            let ports: Vec<(Protocol, u16, String)> = instance
                .ports()
                .as_slice()
                .iter()
                .map(|port| {
                    (port.protocol, port.number, port.name.as_ref().map(ToString::to_string).unwrap_or_default())
                })
                .collect();
            let names: HashSet<&String> = ports.iter().map(|port| &port.2).collect();
            let split = names.len() < ports.len();
            let lists: Vec<Vec<_>> = if split {
                let of = |protocol| ports.iter().filter(|port| port.0 == protocol).cloned().collect::<Vec<_>>();
                Protocol::ALL.map(of).into_iter().filter(|list| !list.is_empty()).collect()
            } else {
                vec![ports]
            };
            expected += lists.len();
            for list in lists {
                let there = self.slices.values().filter(|slice| {
                    let ports: Vec<_> = slice.ports.iter().flatten().map(plain_port).collect();
                    let whole = slice.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(names::PORTS));
                    ports == list && whole == split
                });
                let rows = there.flat_map(|slice| &slice.endpoints).filter(|row| row.addresses == [ip.to_string()]);
                let rows: Vec<_> = rows.collect();
                // An instance with other split ports may have the same half.
                assert!(rows.len() == 1 || split && !rows.is_empty(), "{ip}: {} rows", rows.len());
                assert!(rows.iter().any(|row| {
                    let ready = row.conditions.as_ref().and_then(|conditions| conditions.ready);
                    let host = instance.host_name().map(ToString::to_string);
                    ready == Some(instance.ready() || request.publish_not_ready)
                        && row.node_name == instance.node_name().map(ToString::to_string)
                        && (row.hostname == host || host.is_none() && row.hostname.as_deref() == dashed(ip).as_deref())
                }));
            }
        }
        assert_eq!(self.slices.values().map(|slice| slice.endpoints.len()).sum::<usize>(), expected);
        for slice in self.slices.values() {
            assert!((1..=request.max_endpoints).contains(&slice.endpoints.len()));
        }
    }
}

/// The label that has to be stated for an address, by the rule itself.
fn dashed(ip: IpAddr) -> Option<String> {
    let text = ip.to_string();
    let first = if text.starts_with(':') { "0" } else { "" };
    let last = if text.ends_with(':') { "0" } else { "" };
    (text.starts_with(':') || text.ends_with(':')).then(|| format!("{first}{}{last}", text.replace(':', "-")))
}

fn plain_port(port: &EndpointPort) -> (Protocol, u16, String) {
    let protocol = Protocol::ALL.into_iter().find(|known| Some(known.as_str()) == port.protocol.as_deref());
    let number = port.port.and_then(|number| u16::try_from(number).ok()).expect("a number");
    (protocol.expect("a protocol"), number, port.name.clone().unwrap_or_default())
}

/// What an API server refuses with 422 in a slice.
fn assert_accepted(slice: &EndpointSlice) {
    let EndpointSlice { address_type, endpoints, metadata, ports } = slice;
    assert!(is_subdomain(metadata.name.as_ref().expect("a name")));
    for value in metadata.labels.iter().flatten().map(|(_, value)| value) {
        assert!(value.len() <= 63 && value.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)), "{value}");
    }
    let octets: usize = metadata.annotations.iter().flatten().map(|(key, value)| key.len() + value.len()).sum();
    assert!(octets <= 256 * 1024, "{octets} octets of annotations");
    for OwnerReference { api_version, kind, name, uid, .. } in metadata.owner_references.iter().flatten() {
        assert!([api_version, kind, name, uid].iter().all(|text| !text.is_empty()));
    }
    assert!(["IPv4", "IPv6"].contains(&&**address_type));
    assert!(endpoints.len() <= 1000);
    for Endpoint { addresses, hostname, node_name, .. } in endpoints {
        assert!((1..=100).contains(&addresses.len()));
        for text in addresses {
            let ip: IpAddr = text.parse().expect("an address");
            assert_eq!(ip.to_string(), *text, "not canonical");
            assert_eq!(ip.is_ipv4(), address_type == "IPv4");
            assert!(!ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast());
        }
        assert!(hostname.as_deref().is_none_or(is_label), "{hostname:?}");
        assert!(node_name.as_deref().is_none_or(is_subdomain), "{node_name:?}");
    }
    let ports = ports.as_deref().unwrap_or_default();
    let mut seen = HashSet::new();
    for EndpointPort { name, port, protocol, .. } in ports {
        let name = name.as_deref().unwrap_or_default();
        assert!(name.is_empty() || is_label(name), "{name}");
        assert!(seen.insert(name), "the name {name:?} twice");
        assert!(port.is_some_and(|port| (1..=65535).contains(&port)));
        assert!(["TCP", "UDP", "SCTP"].contains(&protocol.as_deref().expect("a protocol")));
    }
}

fn is_label(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=63).contains(&text.len()) && text.chars().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

fn is_subdomain(text: &str) -> bool {
    text.len() <= 253
        && text.split('.').all(|label| !label.is_empty() && !label.starts_with('-') && !label.ends_with('-'))
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c))
}

fn stamps(generation: u64) -> Stamps<'static> {
    Stamps { term: 7, generation, updated: UnixMillis(1_700_000_000_123), writer: "gangplank-0" }
}

/// Calls `test` with a request for [`web`].
fn with_request<T>(max_endpoints: usize, occupied: &[&str], test: impl FnOnce(&Request<'_>) -> T) -> T {
    let service = web();
    let occupied = occupied.iter().map(ToString::to_string).collect();
    test(&Request {
        service: &service,
        service_uid: UID,
        max_endpoints,
        publish_not_ready: false,
        stamps: stamps(1),
        occupied: &occupied,
    })
}

/// What comes back from slices: ready, and without a host name that only spells the address.
fn as_recorded(instances: &Table<Arc<Instance>>) -> Vec<Instance> {
    let all = instances.iter().filter(|one| one.address().ip().is_some());
    let mut all: Vec<Instance> = all.map(|one| (**one).clone().with_ready(true)).collect();
    all.sort_by(|a, b| a.key().cmp(&b.key()));
    all
}

fn read_back(cluster: &Cluster) -> Vec<Instance> {
    let (read, skipped) = read(&web(), cluster.slices.values(), &DOOR);
    assert_eq!(skipped, []);
    let mut read: Vec<Instance> = read.iter().map(|one| (**one).clone()).collect();
    read.sort_by(|a, b| a.key().cmp(&b.key()));
    read
}

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
            let draft = Draft {
                host_name: host.unwrap_or_default().into(),
                node_name: node.unwrap_or_default().into(),
                weight,
                priority,
                ..draft(ADDRESSES[address], PORTS[ports])
            };
            let instance = DOOR.instance(&web(), &draft, UnixMillis(registered)).expect("valid");
            Arc::new(instance.with_ready(ready))
        },
    )
}

/// How many slices an instance stands in.
fn parts(instance: &Instance) -> usize {
    instance.address().ip().map_or(0, |ip| Group::all(Family::of(ip), instance.ports()).len())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn one_change_at_a_time(
        steps in prop::collection::vec((any_instance(), 0u8..4), 1..60), max in 1usize..6, publish in any::<bool>(),
    ) {
        with_request(max, &[], |request| {
            let request = Request { publish_not_ready: publish, ..*request };
            let mut cluster = Cluster::default();
            let mut instances: Table<Arc<Instance>> = Table::default();
            for (index, (instance, action)) in steps.iter().enumerate() {
                let before = if *action == 0 {
                    let nearest = instances.iter_from(index % instances.len().max(1)).next().cloned();
                    nearest.and_then(|one| instances.remove(&Instance::key(&one)))
                } else {
                    instances.put(Arc::clone(instance))
                };
                let request = Request { stamps: stamps(index as u64), ..request };
                let there = cluster.addresses();
                let moments = cluster.moments(&request, &instances);
                let writes = moments.len();
                if let Some(last) = moments.last() {
                    let kept: HashSet<String> = there.intersection(last).cloned().collect();
                    prop_assert!(moments.iter().all(|moment| kept.is_subset(moment)), "an address was missing in between");
                }
                let moved = before.as_ref().is_some_and(|before| *action == 0 || before.ports() != instance.ports());
                let gone = before.as_ref().filter(|_| moved).map_or(0, |before| parts(before));
                let most = gone + if *action == 0 { 0 } else { parts(instance) };
                prop_assert!(writes <= most, "{writes} writes for one change of {most} endpoints");
                cluster.assert_shows(&request, &instances);
                prop_assert_eq!(read_back(&cluster), as_recorded(&instances));
                let standing = cluster.standing();
                prop_assert!(standing.iter().all(|slice| slice.digest.is_some() && slice.foreign.is_none()));
                prop_assert_eq!(cluster.sync(&Request { stamps: stamps(u64::MAX), ..request }, &instances), 0);
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
            let mut instances = Table::default();
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
    fn whatever_stands_there_it_is_put_right(
        slices in prop::collection::vec(any_slice(), 0..8), all in prop::collection::vec(any_instance(), 0..10),
    ) {
        let mut cluster = Cluster::default();
        for (index, mut slice) in slices.into_iter().enumerate() {
            let name = slice.metadata.name.clone().unwrap_or_default();
            let _ = (read(&web(), [&slice], &DOOR), foreign(&web(), &slice, &DOOR), Standing::read(&slice));
            slice.metadata.uid = Some(format!("junk-{index}"));
            slice.metadata.resource_version = Some("1".into());
            cluster.slices.insert(name, slice);
        }
        cluster.slices.retain(|_, slice| Standing::read(slice).is_some_and(|one| one.service == web()));
        // The type of addresses cannot be changed, so it is never wrong in a slice that stands.
        cluster.slices.retain(|_, slice| slice.address_type != "FQDN" || !slice.endpoints.is_empty());
        let mut instances = Table::default();
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

fn many(count: u32, ports: &[PortTuple]) -> Table<Arc<Instance>> {
    let base = u32::from(std::net::Ipv4Addr::new(10, 0, 0, 1));
    let one = |at: u32| instance(&draft(&std::net::Ipv4Addr::from(base + at).to_string(), ports));
    (0..count).map(one).collect()
}

#[test]
fn a_large_service_fills_its_slices_and_one_change_rewrites_one() {
    let mut instances = many(10_000, HTTP);
    let mut cluster = Cluster::default();
    with_request(100, &[], |request| {
        assert_eq!(cluster.sync(request, &instances), 100);
        assert!(cluster.slices.values().all(|slice| slice.endpoints.len() == 100));
        let gone = instances.iter_from(5_000).next().cloned().expect("there are 10 000");
        instances.remove(&Instance::key(&gone));
        assert_eq!(cluster.sync(request, &instances), 1);
        // Its place is taken by the next one.
        instances.put(instance(&draft("10.200.0.1", HTTP)));
        assert_eq!(cluster.sync(request, &instances), 1);
        assert_eq!(cluster.slices.len(), 100);
        instances.put(instance(&draft("10.200.0.2", HTTP)));
        assert_eq!(cluster.sync(request, &instances), 1);
        assert_eq!(cluster.slices.len(), 101);
        assert_eq!(cluster.sync(request, &Table::default()), 101);
        assert!(cluster.slices.is_empty());
    });
}

#[test]
fn the_largest_slice_is_one_that_kubernetes_takes() {
    // Two names under both protocols, and as many others as fit 2 KiB.
    let names: Vec<String> = (0..90).map(|index| format!("p{index}")).collect();
    let ports = |protocol| {
        let port = move |(index, name): (usize, &String)| DraftPort {
            number: 10_000 + index as i64,
            protocol,
            name: if index == 0 { "both".into() } else { name.clone() },
        };
        names.iter().enumerate().map(port)
    };
    let ports: Vec<DraftPort> = ports(TCP).chain(ports(UDP).take(10)).collect();
    let one = |at: u32| {
        let draft = Draft {
            address: format!("2001:1db8:1234:5678:9abc:def0:1234:{:x}", 0x1000 + at),
            host_name: "h".repeat(63),
            node_name: format!("{}.{}.{}", "n".repeat(63), "n".repeat(63), "n".repeat(60)),
            weight: Some(1.234_567_9e-38),
            priority: u16::MAX,
            ports: ports.clone(),
        };
        Arc::new(DOOR.instance(&web(), &draft, UnixMillis(u64::MAX)).expect("valid"))
    };
    let instances: Table<Arc<Instance>> = (0..1000).map(one).collect();
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

/// What another hand may do to a slice of ours.
const EDITS: &[(&str, fn(&mut EndpointSlice))] = &[
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
fn every_edit_is_noticed_and_put_right() {
    let host = Draft { host_name: "a".into(), node_name: "vm-1".into(), weight: Some(2.0), ..draft("10.0.0.1", HTTP) };
    let half = Draft { host_name: "a".into(), node_name: "vm-1".into(), weight: Some(2.0), ..draft("10.0.0.1", DNS) };
    for (one, ports) in [(host, HTTP), (half, DNS)] {
        let instances = table(&[one, draft("10.0.0.2", ports)]);
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
fn stamps_and_what_others_add_are_no_reason_to_write_and_are_kept() {
    let mut instances = table(&[draft("10.0.0.1", HTTP)]);
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

        instances.put(instance(&draft("10.0.0.2", HTTP)));
        assert_eq!(cluster.sync(&Request { stamps: stamps(5), ..*request }, &instances), 1);
        let meta = &cluster.slices[&name].metadata;
        assert_eq!(meta.labels.as_ref().expect("set")["team"], "a");
        let annotations = meta.annotations.as_ref().expect("set");
        assert_eq!((&*annotations["note"], &*annotations[names::GENERATION]), ("b", "5"));
        assert_eq!(annotations[names::UPDATED], "2023-11-14T22:13:20.123Z");
        assert_eq!((&*annotations[names::TERM], &*annotations[names::WRITER]), ("7", "gangplank-0"));
        assert_eq!(meta.finalizers.as_deref(), Some(&["example.com/hold".to_owned()][..]));
        assert_eq!(meta.owner_references.as_ref().expect("set").len(), 2);
        let standing = cluster.standing();
        assert_eq!((standing[0].term, standing[0].generation, standing[0].service.clone()), (7, 5, web()));
    });
}

#[test]
fn a_name_that_others_hold_is_stepped_around() {
    let instances = table(&[draft("10.0.0.1", HTTP)]);
    let group = Group { family: Family::V4, ports: instance(&draft("10.0.0.1", HTTP)).ports().clone(), part: None };
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
        assert_eq!(cluster.sync(request, &Table::default()), 1, "it is not deleted twice");
    });
}

#[test]
fn a_copy_of_a_slice_is_deleted_and_the_original_stays() {
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
fn reading_names_what_it_could_not_take() {
    let mut cluster = Cluster::default();
    let all = [draft("10.0.0.1", HTTP), draft("10.0.0.2", HTTP), draft("10.0.0.3", HTTP)];
    with_request(100, &[], |request| cluster.sync(request, &table(&all)));
    let slice = cluster.slices.values_mut().next().expect("one slice");
    slice.metadata.name = Some("web-1".into());
    slice.endpoints[0].addresses[0] = "240.0.0.1".into();
    slice.endpoints[1].hostname = Some("10-0-0-9".into());
    let annotations = slice.metadata.annotations.as_mut().expect("ours");
    annotations.insert(names::INSTANCES.into(), r#"{"10.0.0.3":{"weight":700}}"#.into());
    let (read, skipped) = read(&web(), [&*slice], &DOOR);
    assert_eq!(read.iter().map(|one| one.id().to_string()).collect::<Vec<_>>(), ["10.0.0.3:8080"]);
    let said: Vec<String> = skipped.iter().map(ToString::to_string).collect();
    assert_eq!(
        said,
        [
            "slice web-1: 240.0.0.1: ipaddress: 240.0.0.1: reserved (240.0.0.0/4) addresses cannot be reached by pods",
            "slice web-1: 10.0.0.2: host_name: \"10-0-0-9\" spells the address 10.0.0.9, which is not this instance's",
            "slice web-1: 10.0.0.3: annotation gangplank.dev/instances: weight: must be a finite number in 0..=655, got 700: the defaults are taken",
        ]
    );

    slice.ports.as_mut().expect("set")[0].port = Some(70_000);
    let (read, skipped) = super::read(&web(), [&*slice], &DOOR);
    assert!(read.is_empty());
    assert_eq!(skipped.len(), 3);
    assert_eq!(skipped[2].to_string(), "slice web-1: 10.0.0.3: ports[0]: must be 1..=65535, got 70000");
}

#[test]
fn the_newer_slice_is_believed_and_a_lost_annotation_is_told() {
    let mut cluster = Cluster::default();
    let heavy = Draft { weight: Some(5.0), ..draft("10.0.0.1", HTTP) };
    with_request(100, &[], |request| cluster.sync(request, &table(&[heavy])));
    let mut slices: Vec<EndpointSlice> = cluster.slices.into_values().collect();
    let mut older = slices[0].clone();
    older.metadata.name = Some("web-0000000000".into());
    let annotations = older.metadata.annotations.as_mut().expect("ours");
    annotations.remove(names::INSTANCES);
    annotations.insert(names::GENERATION.into(), "0".into());
    slices.insert(0, older.clone());
    let (both, _) = read(&web(), &slices, &DOOR);
    assert_eq!(both.iter().map(|one| one.weight().get()).collect::<Vec<_>>(), [5.0]);

    let (alone, skipped) = read(&web(), [&older], &DOOR);
    assert_eq!(alone[0].weight().get(), 1.0);
    assert_eq!(
        skipped.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["slice web-0000000000: annotation gangplank.dev/instances is missing: weights and priorities are lost"]
    );
}

#[test]
fn of_foreign_slices_is_taken_what_can_be_answered() {
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
    let found = foreign(&web(), &slice, &Door { names_allowed: false, ..DOOR });
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
    assert_eq!(foreign(&web(), &crowded, &DOOR).len(), 5, "its ports are cut to what an instance carries");
}

#[test]
fn a_key_orders_the_members() {
    // place() looks members up by address: the table's order has to be that of addresses.
    let all = table(&[draft("2001:db8::1", HTTP), draft("10.0.0.10", HTTP), draft("9.0.0.1", HTTP)]);
    let ips: Vec<Option<IpAddr>> = all.iter().map(|one| one.address().ip()).collect();
    assert!(ips.is_sorted());
    let first = all.iter().next().expect("three");
    assert!(InstanceKey::first_of(first.address()) < Instance::key(first));
}
