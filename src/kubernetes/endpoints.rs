//! The older Endpoints object, for those who still read it: one object for all instances.
//!
//! It holds a thousand addresses at most. The label `skip-mirror` keeps Kubernetes from making a
//! second set of slices of it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use k8s_openapi::{
    api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset, Endpoints},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::{
    names,
    slices::{Family, Group, PortList, hostname, owner},
};
use crate::model::{Instance, Port, ServiceKey, Table};

/// Most addresses of an Endpoints object, as Kubernetes' own controller has it.
pub const MAX_ADDRESSES: usize = 1000;

/// The Endpoints object of a service whose Service has the uid `service_uid`.
///
/// Ready instances come first where not all fit, and an annotation says that some are missing.
#[must_use]
pub fn desired(
    key: &ServiceKey,
    service_uid: &str,
    instances: &Table<Arc<Instance>>,
    publish_not_ready: bool,
) -> Endpoints {
    let (subsets, truncated) = subsets(instances, publish_not_ready);
    let annotations = truncated.then(|| BTreeMap::from([(names::OVER_CAPACITY.into(), names::TRUNCATED.into())]));
    Endpoints {
        metadata: ObjectMeta {
            name: Some(key.name().into()),
            namespace: Some(key.namespace().into()),
            labels: Some(labels().map(|(label, value)| (label.into(), value.into())).into()),
            annotations,
            owner_references: Some(vec![owner(key, service_uid)]),
            ..ObjectMeta::default()
        },
        subsets: Some(subsets).filter(|subsets| !subsets.is_empty()),
    }
}

/// What has to be PUT so that an Endpoints object of ours is as [`desired`] again; `None` when it
/// is, or is being deleted. Metadata of others stays.
#[must_use]
pub fn amend(existing: &Endpoints, desired: &Endpoints) -> Option<Endpoints> {
    if existing.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let mut endpoints = existing.clone();
    let meta = &mut endpoints.metadata;
    meta.labels.get_or_insert_default().extend(desired.metadata.labels.clone().unwrap_or_default());
    match &desired.metadata.annotations {
        Some(ours) => meta.annotations.get_or_insert_default().extend(ours.clone()),
        None => _ = meta.annotations.as_mut().and_then(|standing| standing.remove(names::OVER_CAPACITY)),
    }
    for ours in desired.metadata.owner_references.iter().flatten() {
        let owners = meta.owner_references.get_or_insert_default();
        if !owners.contains(ours) {
            owners
                .retain(|one| (&one.api_version, &one.kind, &one.name) != (&ours.api_version, &ours.kind, &ours.name));
            owners.push(ours.clone());
        }
    }
    if plain(existing.subsets.as_deref()) != plain(desired.subsets.as_deref()) {
        endpoints.subsets.clone_from(&desired.subsets);
    }
    if endpoints == *existing {
        return None;
    }
    endpoints.metadata.managed_fields = None;
    Some(endpoints)
}

fn labels() -> [(&'static str, &'static str); 3] {
    [(names::SERVICE, names::OWNED), (names::SKIP_MIRROR, "true"), (names::HEADLESS, "")]
}

/// The subsets, and whether addresses had to be left out.
fn subsets(instances: &Table<Arc<Instance>>, publish_not_ready: bool) -> (Vec<EndpointSubset>, bool) {
    let mut subsets: Vec<EndpointSubset> = Vec::new();
    let mut places: HashMap<PortList<'_>, Vec<usize>> = HashMap::new();
    let mut seated = HashSet::new();
    for ready in [true, false] {
        for instance in instances.iter().filter(|one| (one.ready() || publish_not_ready) == ready) {
            let Some(ip) = instance.address().ip() else { continue };
            let places = places.entry(PortList(instance.ports()));
            for &mut at in
                places.or_insert_with(|| parts(instance).into_iter().map(|p| place(&mut subsets, p)).collect())
            {
                if seated.contains(&(at, ip)) {
                    continue;
                }
                if seated.len() == MAX_ADDRESSES {
                    subsets.retain(|subset| subset.addresses.is_some() || subset.not_ready_addresses.is_some());
                    return (subsets, true);
                }
                seated.insert((at, ip));
                let address = EndpointAddress {
                    ip: ip.to_string(),
                    hostname: hostname(instance, ip).map(Into::into),
                    node_name: instance.node_name().map(ToString::to_string),
                    target_ref: None,
                };
                let subset = &mut subsets[at];
                let list = if ready { &mut subset.addresses } else { &mut subset.not_ready_addresses };
                list.get_or_insert_default().push(address);
            }
        }
    }
    (subsets, false)
}

/// The subset with these ports, which is made where there is none.
fn place(subsets: &mut Vec<EndpointSubset>, ports: Vec<EndpointPort>) -> usize {
    let ports = Some(ports).filter(|ports| !ports.is_empty());
    subsets.iter().position(|subset| subset.ports == ports).unwrap_or_else(|| {
        subsets.push(EndpointSubset { ports, ..EndpointSubset::default() });
        subsets.len() - 1
    })
}

/// An instance's ports as subsets can have them: no name twice, and none without a name beside
/// others.
fn parts(instance: &Instance) -> Vec<Vec<EndpointPort>> {
    let mut parts = Vec::new();
    // The family does not matter: a subset takes both.
    for group in Group::all(Family::V4, instance.ports()) {
        let (named, unnamed): (Vec<_>, Vec<_>) = group.slice_ports().partition(|port| port.name.is_some());
        let port = |port: &Port| EndpointPort {
            app_protocol: None,
            name: port.name.as_ref().map(ToString::to_string),
            port: port.number.into(),
            protocol: Some(port.protocol.as_str().into()),
        };
        let part = |ports: Vec<&Port>| ports.into_iter().map(port).collect::<Vec<_>>();
        if unnamed.is_empty() {
            parts.push(part(named)); // which may be empty: an address without ports
        } else {
            parts.push(part(unnamed));
            parts.extend(Some(part(named)).filter(|named| !named.is_empty()));
        }
    }
    parts
}

/// Name, number, protocol, application protocol.
type PlainPort<'a> = (&'a str, i32, &'a str, Option<&'a str>);

/// Readiness, address, hostname, node name, and whether it points at an object.
type PlainAddress<'a> = (bool, &'a str, Option<&'a str>, Option<&'a str>, bool);

/// What two lists of subsets are compared by: in any order, with what the API server fills in.
fn plain(subsets: Option<&[EndpointSubset]>) -> Vec<(Vec<PlainPort<'_>>, Vec<PlainAddress<'_>>)> {
    let mut all: Vec<_> = subsets.unwrap_or_default().iter().map(plain_subset).collect();
    all.sort_unstable();
    all
}

fn plain_subset(subset: &EndpointSubset) -> (Vec<PlainPort<'_>>, Vec<PlainAddress<'_>>) {
    fn plain_port(port: &EndpointPort) -> PlainPort<'_> {
        let EndpointPort { app_protocol, name, port, protocol } = port;
        (name.as_deref().unwrap_or(""), *port, protocol.as_deref().unwrap_or("TCP"), app_protocol.as_deref())
    }
    fn plain_address(ready: bool, address: &EndpointAddress) -> PlainAddress<'_> {
        let EndpointAddress { ip, hostname, node_name, target_ref } = address;
        (ready, ip, hostname.as_deref(), node_name.as_deref(), target_ref.is_some())
    }
    let EndpointSubset { addresses, not_ready_addresses, ports } = subset;
    let mut ports: Vec<_> = ports.iter().flatten().map(plain_port).collect();
    let ready = addresses.iter().flatten().map(|address| plain_address(true, address));
    let others = not_ready_addresses.iter().flatten().map(|address| plain_address(false, address));
    let mut all: Vec<_> = ready.chain(others).collect();
    ports.sort_unstable();
    all.sort_unstable();
    (ports, all)
}
