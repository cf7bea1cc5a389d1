//! A list of slices that refuses what an API server refuses, and looks at its content
//! without the code that wrote it.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::{
    api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice},
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};

use super::super::{ObservedSlice, PlanOptions, SliceWrite, plan};
use crate::{
    kubernetes::objects::names,
    model::{Address, CowTree, Instance, Protocol},
};

/// The slices of a namespace, which keeps the rules of an API server.
#[derive(Default)]
pub(super) struct Cluster {
    pub(super) slices: BTreeMap<String, EndpointSlice>,
    pub(super) versions: u64,
}

impl Cluster {
    pub(super) fn apply(&mut self, write: SliceWrite) {
        match write {
            SliceWrite::Create(slice) => {
                let name = slice.metadata.name.clone().expect("a name");
                assert!(slice.metadata.uid.is_none() && slice.metadata.resource_version.is_none());
                assert!(!self.slices.contains_key(&name), "409: {name} exists");
                let uid = format!("uid-{}", self.versions);
                self.store(slice, uid);
            }
            SliceWrite::Replace(slice) => {
                let existing = &self.slices[slice.metadata.name.as_ref().expect("a name")];
                let meta = &existing.metadata;
                assert_eq!(
                    (&slice.metadata.uid, &slice.metadata.resource_version),
                    (&meta.uid, &meta.resource_version)
                );
                assert_eq!(slice.address_type, existing.address_type, "422: immutable");
                let uid = meta.uid.clone().expect("set when it was created");
                self.store(slice, uid);
            }
            SliceWrite::Delete { name, uid, resource_version } => {
                let meta = self.slices.remove(&name).expect("404").metadata;
                assert_eq!((Some(uid), Some(resource_version)), (meta.uid, meta.resource_version));
            }
        }
    }

    pub(super) fn store(&mut self, mut slice: EndpointSlice, uid: String) {
        assert_accepted(&slice);
        // As it comes back over the wire.
        slice = serde_json::from_str(&serde_json::to_string(&slice).expect("JSON")).expect("a slice");
        self.versions += 1;
        slice.metadata.uid = Some(uid);
        slice.metadata.resource_version = Some(self.versions.to_string());
        self.slices.insert(slice.metadata.name.clone().expect("a name"), slice);
    }

    pub(super) fn observed(&self) -> Vec<ObservedSlice> {
        self.slices.values().filter_map(ObservedSlice::read).collect()
    }

    /// Plans and carries out. Returns how many writes it took.
    pub(super) fn sync(&mut self, request: &PlanOptions<'_>, instances: &CowTree<Arc<Instance>>) -> usize {
        self.moments(request, instances).len()
    }

    /// Plans and carries out. Returns the addresses that are there after each write.
    pub(super) fn moments(
        &mut self,
        request: &PlanOptions<'_>,
        instances: &CowTree<Arc<Instance>>,
    ) -> Vec<HashSet<String>> {
        let mut moments = Vec::new();
        for write in plan(request, instances, &self.observed()) {
            self.apply(write);
            moments.push(self.addresses());
        }
        moments
    }

    pub(super) fn addresses(&self) -> HashSet<String> {
        let endpoints = self.slices.values().flat_map(|slice| &slice.endpoints);
        endpoints.flat_map(|endpoint| endpoint.addresses.clone()).collect()
    }

    /// That `slices` show the addresses of names where the service is no alias, and no more.
    fn assert_resolved(
        &self,
        request: &PlanOptions<'_>,
        instances: &CowTree<Arc<Instance>>,
        flat: bool,
        slices: &[&EndpointSlice],
    ) {
        let served = || instances.iter().filter(|one| one.ready() || request.publish_not_ready);
        let plain: HashSet<_> = served().map(|one| (one.address().to_string(), one.ports().set())).collect();
        let mut expected: BTreeSet<(String, Vec<(Protocol, u16)>)> = BTreeSet::new();
        for instance in served().filter(|_| flat) {
            let Address::Name(name) = instance.address() else { continue };
            let found = request.resolutions.get(name).and_then(|resolution| resolution.addresses());
            for ip in found.into_iter().flat_map(|found| found.iter()).map(|ip| ip.to_string()) {
                let ports = instance.ports().as_slice().iter().map(|port| (port.protocol, port.number));
                if plain.contains(&(ip.clone(), instance.ports().set())) {
                    continue;
                }
                let ports: Vec<_> = ports.collect();
                if ports.is_empty() {
                    expected.insert((ip.clone(), ports.clone()));
                }
                expected.extend(ports.into_iter().map(|port| (ip.clone(), vec![port])));
            }
        }
        let mut shown = BTreeSet::new();
        for slice in slices {
            assert!(!slice.metadata.annotations.as_ref().expect("ours").contains_key(names::INSTANCES));
            for row in &slice.endpoints {
                assert_eq!(row.conditions.as_ref().and_then(|conditions| conditions.ready), Some(true));
                let ports: Vec<_> = slice.ports.iter().flatten().map(plain_port).map(|port| (port.0, port.1)).collect();
                if ports.is_empty() {
                    shown.insert((row.addresses[0].clone(), ports.clone()));
                }
                shown.extend(ports.into_iter().map(|port| (row.addresses[0].clone(), vec![port])));
            }
        }
        assert_eq!(shown, expected);
    }

    /// The slices of the addresses of names.
    pub(super) fn resolved(&self) -> BTreeMap<String, Vec<Endpoint>> {
        let slices = self.slices.iter().filter(|(_, slice)| is_resolved(slice));
        slices.map(|(name, slice)| (name.clone(), slice.endpoints.clone())).collect()
    }

    /// The slices of names, and whether one of their endpoints is ready.
    pub(super) fn names(&self) -> BTreeMap<String, bool> {
        let slices = self.slices.iter().filter(|(_, slice)| slice.address_type == "FQDN");
        let is_ready = |row: &Endpoint| row.conditions.as_ref().and_then(|conditions| conditions.ready) == Some(true);
        slices.map(|(name, slice)| (name.clone(), slice.endpoints.iter().any(is_ready))).collect()
    }

    /// That the slices show exactly `instances`: looked at without the code that wrote them.
    pub(super) fn assert_shows(&self, request: &PlanOptions<'_>, instances: &CowTree<Arc<Instance>>) {
        let mut expected = 0;
        let served: HashSet<String> = instances
            .iter()
            .filter(|instance| instance.ready() || request.publish_not_ready)
            .map(|instance| instance.address().to_string())
            .collect();
        let flat = served.len() > 1 || request.flatten_names;
        for instance in instances.iter() {
            let address = instance.address().to_string();
            let ip = instance.address().ip();
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
                let there = self.slices.values().filter(|slice| !is_resolved(slice)).filter(|slice| {
                    let ports: Vec<_> = slice.ports.iter().flatten().map(plain_port).collect();
                    let whole = slice.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(names::PORTS));
                    ports == list && whole == split
                });
                let rows = there.flat_map(|slice| &slice.endpoints).filter(|row| row.addresses == [address.clone()]);
                let rows: Vec<_> = rows.collect();
                // An instance with other split ports may have the same half.
                assert!(rows.len() == 1 || split && !rows.is_empty(), "{address}: {} rows", rows.len());
                assert!(rows.iter().any(|row| {
                    let ready = row.conditions.as_ref().and_then(|conditions| conditions.ready);
                    let host = instance.host_name().map(ToString::to_string);
                    ready == Some((instance.ready() || request.publish_not_ready) && (ip.is_some() || !flat))
                        && row.node_name == instance.node_name().map(ToString::to_string)
                        && (row.hostname == host || host.is_none() && row.hostname == ip.and_then(dashed))
                }));
            }
        }
        let (resolved, of_instances): (Vec<_>, Vec<_>) = self.slices.values().partition(|slice| is_resolved(slice));
        assert_eq!(of_instances.iter().map(|slice| slice.endpoints.len()).sum::<usize>(), expected);
        self.assert_resolved(request, instances, flat, &resolved);
        for slice in self.slices.values() {
            assert!((1..=request.max_endpoints).contains(&slice.endpoints.len()));
        }
    }
}

/// Whether the slice is marked as one of addresses of names.
pub(super) fn is_resolved(slice: &EndpointSlice) -> bool {
    slice.metadata.annotations.as_ref().is_some_and(|all| all.get(names::RESOLVED).is_some_and(|value| value == "true"))
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
    assert!(["IPv4", "IPv6", "FQDN"].contains(&&**address_type));
    assert!(endpoints.len() <= 1000);
    for Endpoint { addresses, hostname, node_name, .. } in endpoints {
        assert!((1..=100).contains(&addresses.len()));
        for text in addresses {
            if address_type == "FQDN" {
                assert!(is_subdomain(text) && text.contains('.') && text.split('.').all(is_label), "{text}");
                continue;
            }
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
