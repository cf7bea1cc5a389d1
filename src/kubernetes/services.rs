//! The headless Service under which the slices of a service stand.
//!
//! CoreDNS reads ports from the slices, so a Service's ports are for people and tools: as many of
//! the instances' ports as one list can hold.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use k8s_openapi::{
    api::core::v1::{Service, ServicePort, ServiceSpec},
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};

use super::{names, slices::PortList};
use crate::model::{Instance, Label, Protocol, ServiceKey, Table};

/// Most ports of a Service. Kubernetes has no limit but the size of the object.
const MOST_PORTS: usize = 1000;

/// Value of `clusterIP` that makes a Service headless.
const NO_CLUSTER_IP: &str = "None";

/// What gangplank is to a Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// It created the Service, keeps it right, and removes it.
    Ours,
    /// Somebody else's, who lets external instances stand beside its own endpoints. The Service
    /// itself is not touched.
    Joined,
    /// Somebody else's: nothing may stand under its name.
    Foreign,
}

impl Ownership {
    /// As the labels of a Service say.
    #[must_use]
    pub fn of(meta: &ObjectMeta) -> Self {
        match meta.labels.as_ref().and_then(|labels| labels.get(names::SERVICE)).map(String::as_str) {
            Some(names::OWNED) => Self::Ours,
            Some(names::JOINED) => Self::Joined,
            _ => Self::Foreign,
        }
    }
}

/// The Service as gangplank creates it.
#[must_use]
pub fn desired(key: &ServiceKey, instances: &Table<Arc<Instance>>) -> Service {
    Service {
        metadata: ObjectMeta {
            name: Some(key.name().into()),
            namespace: Some(key.namespace().into()),
            labels: Some(labels().map(|(label, value)| (label.into(), value.into())).into()),
            ..ObjectMeta::default()
        },
        spec: Some(ServiceSpec {
            cluster_ip: Some(NO_CLUSTER_IP.into()),
            type_: Some("ClusterIP".into()),
            ports: Some(service_ports(instances)).filter(|ports| !ports.is_empty()),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

/// What has to be PUT so that a Service of ours is as [`desired`] again; `None` when it is, or is
/// being deleted. What gangplank does not set stays, and so does a cluster IP, which nobody can
/// change.
#[must_use]
pub fn amend(existing: &Service, instances: &Table<Arc<Instance>>) -> Option<Service> {
    if existing.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let mut service = existing.clone();
    let own = service.metadata.labels.get_or_insert_default();
    own.extend(labels().map(|(label, value)| (label.to_owned(), value.to_owned())));
    let spec = service.spec.get_or_insert_default();
    spec.selector = None;
    if spec.type_.as_deref() == Some("ExternalName") {
        spec.type_ = Some("ClusterIP".into());
        spec.external_name = None;
        spec.cluster_ip = Some(NO_CLUSTER_IP.into());
        spec.cluster_ips = None;
    }
    let ports = service_ports(instances);
    if !same_ports(spec.ports.as_deref().unwrap_or_default(), &ports) {
        spec.ports = Some(ports).filter(|ports| !ports.is_empty());
    }
    if service == *existing {
        return None;
    }
    // The API server keeps its own account of who set what.
    service.metadata.managed_fields = None;
    Some(service)
}

fn labels() -> [(&'static str, &'static str); 2] {
    [(names::SERVICE_TYPE, names::EXTERNAL), (names::SERVICE, names::OWNED)]
}

/// The ports of all instances, as far as one list can hold them: a name, and a number with its
/// protocol, only once, the first in order of protocol, number and name; ports without a name
/// only when there is one port in all.
fn service_ports(instances: &Table<Arc<Instance>>) -> Vec<ServicePort> {
    let mut lists = HashSet::new();
    let mut named: BTreeSet<(Protocol, u16, &Label)> = BTreeSet::new();
    let mut unnamed: BTreeSet<(Protocol, u16)> = BTreeSet::new();
    // Ten thousand instances have a handful of lists.
    for ports in instances.iter().map(|instance| instance.ports()).filter(|ports| lists.insert(PortList(ports))) {
        for port in ports.as_slice() {
            match &port.name {
                Some(name) => _ = named.insert((port.protocol, port.number, name)),
                None => _ = unnamed.insert((port.protocol, port.number)),
            }
        }
    }
    if named.is_empty() && unnamed.len() == 1 {
        return unnamed.into_iter().map(|(protocol, number)| service_port(protocol, number, None)).collect();
    }
    let (mut names, mut numbers) = (HashSet::new(), HashSet::new());
    let stand = named.into_iter().filter(|&(protocol, number, name)| {
        !names.contains(name) && numbers.insert((protocol, number)) && names.insert(name)
    });
    stand.take(MOST_PORTS).map(|(protocol, number, name)| service_port(protocol, number, Some(name))).collect()
}

fn service_port(protocol: Protocol, number: u16, name: Option<&Label>) -> ServicePort {
    ServicePort {
        name: name.map(ToString::to_string),
        port: number.into(),
        protocol: Some(protocol.as_str().into()),
        // What the API server would make of an absent one.
        target_port: Some(IntOrString::Int(number.into())),
        ..ServicePort::default()
    }
}

/// Whether both lists have the same ports, whatever else is said of them and in whatever order.
fn same_ports(standing: &[ServicePort], ours: &[ServicePort]) -> bool {
    fn said(port: &ServicePort) -> (&str, i32, &str) {
        let ServicePort { name, port, protocol, .. } = port;
        (name.as_deref().unwrap_or(""), *port, protocol.as_deref().unwrap_or("TCP"))
    }
    let targets: BTreeMap<_, _> = ours.iter().map(|port| (said(port), &port.target_port)).collect();
    standing.len() == ours.len()
        && standing.iter().all(|port| {
            targets.get(&said(port)).is_some_and(|target| port.target_port.is_none() || port.target_port == **target)
        })
}
