//! The older Endpoints object, for clients that still read it: one object for all instances.
//!
//! The object holds a thousand addresses at most. The label `skip-mirror` keeps Kubernetes from making a
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
    slices::{Family, PortList, SliceGroup, hostname, label, owner},
};
use crate::model::{CowTree, Instance, Port, ServiceKey};

/// Most addresses of an Endpoints object, that of Kubernetes' own controller.
pub const MAX_ADDRESSES: usize = 1000;

/// Whether an Endpoints object carries gangplank's label.
pub(in crate::kubernetes) fn is_ours(meta: &ObjectMeta) -> bool {
    label(meta, names::SERVICE) == Some(names::OWNED)
}

/// The Endpoints object of a service whose Service has the uid `service_uid`.
///
/// If not all instances fit, ready ones come first, and an annotation says that some are missing.
#[must_use]
pub fn desired(
    key: &ServiceKey,
    service_uid: &str,
    instances: &CowTree<Arc<Instance>>,
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
/// is, or is being deleted. Metadata of others is kept.
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
        None => _ = meta.annotations.as_mut().and_then(|existing| existing.remove(names::OVER_CAPACITY)),
    }
    for ours in desired.metadata.owner_references.iter().flatten() {
        let owners = meta.owner_references.get_or_insert_default();
        // A Service that was created anew has another uid. With a reference to the former one alone, the garbage
        // collector would delete the object.
        if !owners.contains(ours) {
            owners
                .retain(|one| (&one.api_version, &one.kind, &one.name) != (&ours.api_version, &ours.kind, &ours.name));
            owners.push(ours.clone());
        }
    }
    // In any order: the API server may repack subsets when it stores them.
    if plain(existing.subsets.as_deref()) != plain(desired.subsets.as_deref()) {
        endpoints.subsets.clone_from(&desired.subsets);
    }
    if endpoints == *existing {
        return None;
    }
    // Left out of a PUT: the API server keeps that account itself.
    endpoints.metadata.managed_fields = None;
    Some(endpoints)
}

fn labels() -> [(&'static str, &'static str); 3] {
    [(names::SERVICE, names::OWNED), (names::SKIP_MIRROR, "true"), (names::HEADLESS, "")]
}

/// The subsets, and whether addresses had to be left out.
fn subsets(instances: &CowTree<Arc<Instance>>, publish_not_ready: bool) -> (Vec<EndpointSubset>, bool) {
    let mut subsets: Vec<EndpointSubset> = Vec::new();
    let mut places: HashMap<PortList<'_>, Vec<usize>> = HashMap::new();
    let mut assigned = HashSet::new();
    for ready in [true, false] {
        for instance in instances.iter().filter(|one| (one.ready() || publish_not_ready) == ready) {
            let Some(ip) = instance.address().ip() else { continue };
            let places = places.entry(PortList(instance.ports()));
            for &mut at in
                places.or_insert_with(|| parts(instance).into_iter().map(|p| subset_with(&mut subsets, p)).collect())
            {
                if assigned.contains(&(at, ip)) {
                    continue;
                }
                // Ready instances come first: as far as possible, those that are missing are not ready.
                if assigned.len() == MAX_ADDRESSES {
                    subsets.retain(|subset| subset.addresses.is_some() || subset.not_ready_addresses.is_some());
                    return (subsets, true);
                }
                assigned.insert((at, ip));
                let address = EndpointAddress {
                    ip: ip.to_string(),
                    hostname: hostname(instance, Some(ip)).map(Into::into),
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
fn subset_with(subsets: &mut Vec<EndpointSubset>, ports: Vec<EndpointPort>) -> usize {
    let ports = Some(ports).filter(|ports| !ports.is_empty());
    subsets.iter().position(|subset| subset.ports == ports).unwrap_or_else(|| {
        subsets.push(EndpointSubset { ports, ..EndpointSubset::default() });
        subsets.len() - 1
    })
}

/// An instance's ports as subsets allow them: no name twice, and an unnamed port only alone.
fn parts(instance: &Instance) -> Vec<Vec<EndpointPort>> {
    let mut parts = Vec::new();
    // The family does not matter: a subset takes both.
    for group in SliceGroup::all(Family::V4, instance.ports()) {
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

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::kubernetes::objects::slices::tests::{PortTuple, TCP, UDP, instance, spec, table, web};

    const HTTP: &[PortTuple] = &[(8080, TCP, "http")];

    #[test]
    fn instances_are_grouped_in_subsets_by_their_ports() {
        let mut instances = table(&[
            spec("10.0.0.1", HTTP),
            spec("10.0.0.2", &[]),
            spec("10.0.0.3", &[(53, TCP, "dns"), (53, UDP, "dns"), (9153, TCP, "")]),
            spec("10.0.0.3", &[(53, UDP, "dns")]),
            spec("2001:db8::", HTTP),
            spec("db.example.com", HTTP),
        ]);
        let unready = (*instance(&spec("10.0.0.4", HTTP))).clone().with_ready(false);
        instances.put(Arc::new(unready));
        let endpoints = desired(&web(), "uid-1", &instances, false);
        let port = |name: &str, number: i32, protocol: &str| serde_json::json!({"name": name, "port": number, "protocol": protocol});
        assert_eq!(
            serde_json::to_value(&endpoints).expect("JSON"),
            serde_json::json!({
                "apiVersion": "v1", "kind": "Endpoints",
                "metadata": {
                    "name": "web", "namespace": "prod",
                    "labels": {
                        "gangplank.dev/service": "owned",
                        "endpointslice.kubernetes.io/skip-mirror": "true",
                        "service.kubernetes.io/headless": "",
                    },
                    "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": "web", "uid": "uid-1"}],
                },
                "subsets": [
                    {
                        "addresses": [{"ip": "10.0.0.1"}, {"ip": "2001:db8::", "hostname": "2001-db8--0"}],
                        "notReadyAddresses": [{"ip": "10.0.0.4"}],
                        "ports": [port("http", 8080, "TCP")],
                    },
                    {"addresses": [{"ip": "10.0.0.2"}]},
                    {"addresses": [{"ip": "10.0.0.3"}], "ports": [{"port": 9153, "protocol": "TCP"}]},
                    {"addresses": [{"ip": "10.0.0.3"}], "ports": [port("dns", 53, "TCP")]},
                    {"addresses": [{"ip": "10.0.0.3"}], "ports": [port("dns", 53, "UDP")]},
                ],
            })
        );
        let published = desired(&web(), "uid-1", &instances, true);
        assert!(published.subsets.expect("five").iter().all(|subset| subset.not_ready_addresses.is_none()));
        assert_eq!(desired(&web(), "uid-1", &CowTree::default(), false).subsets, None);
    }

    #[test]
    fn at_most_a_thousand_addresses_ready_ones_first() {
        let one = |at: u32| {
            let ip = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 1)) + at).to_string();
            let one = instance(&spec(&ip, HTTP));
            Arc::new((*one).clone().with_ready(at >= 10))
        };
        let count = |endpoints: &Endpoints| {
            let subsets = endpoints.subsets.as_deref().expect("some");
            let len = |list: &Option<Vec<_>>| list.as_ref().map_or(0, Vec::len);
            let truncated = endpoints.metadata.annotations.as_ref().map(|all| all[names::OVER_CAPACITY].clone());
            (len(&subsets[0].addresses), len(&subsets[0].not_ready_addresses), truncated)
        };
        let all = |count| (0..count).map(one).collect::<CowTree<_>>();
        let fits = desired(&web(), "1", &all(1000), false);
        assert_eq!(count(&fits), (990, 10, None));
        let more = desired(&web(), "1", &all(1005), false);
        assert_eq!(count(&more), (995, 5, Some("truncated".into())));
        assert_eq!(count(&desired(&web(), "1", &all(2000), false)), (1000, 0, Some("truncated".into())));

        assert_eq!(amend(&fits, &more).as_ref().map(count), Some(count(&more)));
        assert_eq!(amend(&more, &fits).map(|back| back.metadata.annotations.unwrap_or_default().len()), Some(0));
    }

    #[test]
    fn external_edits_are_reverted_and_foreign_fields_kept() {
        let instances = table(&[spec("10.0.0.1", HTTP), spec("10.0.0.2", HTTP), spec("10.0.0.3", &[(80, UDP, "")])]);
        let ours = desired(&web(), "uid-1", &instances, false);
        let mut existing = ours.clone();
        let subsets = existing.subsets.as_mut().expect("two");
        subsets.reverse();
        subsets[1].addresses.as_mut().expect("two").reverse();
        assert_eq!(amend(&existing, &ours), None, "an order is nobody's business");

        let edits: [fn(&mut Endpoints); 6] = [
            |endpoints| endpoints.metadata.labels = None,
            |endpoints| endpoints.metadata.owner_references.as_mut().expect("set")[0].uid = "stale".into(),
            |endpoints| endpoints.subsets = None,
            |endpoints| {
                let addresses = endpoints.subsets.as_mut().expect("two")[0].addresses.as_mut();
                addresses.expect("two")[0].ip = "10.9.9.9".into();
            },
            |endpoints| endpoints.subsets.as_mut().expect("two")[0].ports.as_mut().expect("one")[0].port = 1,
            |endpoints| {
                let subset = &mut endpoints.subsets.as_mut().expect("two")[0];
                subset.not_ready_addresses = subset.addresses.take();
            },
        ];
        for edit in edits {
            let mut wrong = ours.clone();
            edit(&mut wrong);
            wrong.metadata.resource_version = Some("7".into());
            wrong.metadata.annotations = Some([("note".into(), "a".into())].into());
            let amended = amend(&wrong, &ours).expect("it deviates");
            assert_eq!((&amended.subsets, &amended.metadata.labels), (&ours.subsets, &ours.metadata.labels));
            assert_eq!(amended.metadata.owner_references, ours.metadata.owner_references);
            assert_eq!(
                (&amended.metadata.annotations, &amended.metadata.resource_version),
                (&wrong.metadata.annotations, &wrong.metadata.resource_version)
            );
            assert_eq!(amend(&amended, &ours), None);
        }
    }
}
