//! The headless Service that owns the slices of a service.
//!
//! CoreDNS reads ports from the slices, so a Service's ports are for people and tools: as many of
//! the instances' ports as one list can hold.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use k8s_openapi::{
    api::core::v1::{Service, ServicePort, ServiceSpec},
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};

use super::{
    names,
    slices::{PortList, label},
};
use crate::model::{CowTree, Instance, Label, Protocol, ServiceKey};

/// Most ports of a Service. Kubernetes has no limit but the size of the object.
const MAX_PORTS: usize = 1000;

/// Value of `clusterIP` that makes a Service headless.
const NO_CLUSTER_IP: &str = "None";

/// Whether gangplank manages a Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// Gangplank created the Service, reverts external changes, and deletes it.
    Ours,
    /// Managed by somebody else, who lets external instances join its endpoints. Gangplank does not
    /// touch the Service itself.
    Joined,
    /// Managed by somebody else: no instance can be registered under its name.
    Foreign,
}

impl Ownership {
    /// From the Service as it is, unless a Service with `known_uid` was ours already: then only the label of
    /// gangplank decides, and other edits of it are reverted.
    ///
    /// The label alone makes no Service ours: a native one on which somebody types `owned` would lose its selector.
    #[must_use]
    pub fn of(service: &Service, known_uid: Option<&str>) -> Self {
        match label(&service.metadata, names::SERVICE) {
            Some(names::OWNED) if is_made_by_gangplank(service) => Self::Ours,
            Some(names::OWNED) if known_uid.is_some() && service.metadata.uid.as_deref() == known_uid => Self::Ours,
            Some(names::JOINED) => Self::Joined,
            _ => Self::Foreign,
        }
    }
}

/// Whether a Service is one that gangplank creates: external, headless, and without a selector.
fn is_made_by_gangplank(service: &Service) -> bool {
    label(&service.metadata, names::SERVICE_TYPE) == Some(names::EXTERNAL)
        && service.spec.as_ref().is_some_and(|spec| {
            spec.cluster_ip.as_deref() == Some(NO_CLUSTER_IP) && spec.selector.as_ref().is_none_or(BTreeMap::is_empty)
        })
}

/// The Service as gangplank creates it.
#[must_use]
pub fn desired(key: &ServiceKey, instances: &CowTree<Arc<Instance>>) -> Service {
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
/// being deleted. Fields that gangplank does not set are kept, and so is a cluster IP, which is
/// immutable.
#[must_use]
pub fn amend(existing: &Service, instances: &CowTree<Arc<Instance>>) -> Option<Service> {
    if existing.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let mut service = existing.clone();
    let own = service.metadata.labels.get_or_insert_default();
    own.extend(labels().map(|(label, value)| (label.to_owned(), value.to_owned())));
    let spec = service.spec.get_or_insert_default();
    // With a selector Kubernetes' own controller would write slices beside ours.
    spec.selector = None;
    // A CNAME would hide the addresses. Only this type may become headless: the cluster IP of any other is immutable.
    if spec.type_.as_deref() == Some("ExternalName") {
        spec.type_ = Some("ClusterIP".into());
        spec.external_name = None;
        spec.cluster_ip = Some(NO_CLUSTER_IP.into());
        spec.cluster_ips = None;
    }
    let mut ports = service_ports(instances);
    let existing_ports = spec.ports.as_deref().unwrap_or_default();
    if !same_ports(existing_ports, &ports) {
        // Somebody may have set an application protocol, which gangplank has no opinion on.
        let others: HashMap<_, _> = existing_ports.iter().map(|port| (port_key(port), &port.app_protocol)).collect();
        for port in &mut ports {
            port.app_protocol = others.get(&port_key(port)).and_then(|&protocol| protocol.clone());
        }
        spec.ports = Some(ports).filter(|ports| !ports.is_empty());
    }
    if service == *existing {
        return None;
    }
    // managedFields are the API server's own.
    service.metadata.managed_fields = None;
    Some(service)
}

fn labels() -> [(&'static str, &'static str); 2] {
    [(names::SERVICE_TYPE, names::EXTERNAL), (names::SERVICE, names::OWNED)]
}

/// The ports of all instances, as far as one list can hold them: a name, and a number with its
/// protocol, only once, the first in order of protocol, number and name; ports without a name
/// only when there is one port in all.
fn service_ports(instances: &CowTree<Arc<Instance>>) -> Vec<ServicePort> {
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
    // The API server wants names as soon as there are two ports.
    if named.is_empty() && unnamed.len() == 1 {
        return unnamed.into_iter().map(|(protocol, number)| service_port(protocol, number, None)).collect();
    }
    let (mut names, mut numbers) = (HashSet::new(), HashSet::new());
    let usable = named.into_iter().filter(|&(protocol, number, name)| {
        !names.contains(name) && numbers.insert((protocol, number)) && names.insert(name)
    });
    usable.take(MAX_PORTS).map(|(protocol, number, name)| service_port(protocol, number, Some(name))).collect()
}

fn service_port(protocol: Protocol, number: u16, name: Option<&Label>) -> ServicePort {
    ServicePort {
        name: name.map(ToString::to_string),
        port: number.into(),
        protocol: Some(protocol.as_str().into()),
        // The default of the API server.
        target_port: Some(IntOrString::Int(number.into())),
        ..ServicePort::default()
    }
}

/// Whether both lists have the same ports, whatever else is said of them and in whatever order.
fn same_ports(existing: &[ServicePort], ours: &[ServicePort]) -> bool {
    let targets: HashMap<_, _> = ours.iter().map(|port| (port_key(port), &port.target_port)).collect();
    existing.len() == ours.len()
        && existing.iter().all(|port| {
            targets
                .get(&port_key(port))
                .is_some_and(|target| port.target_port.is_none() || port.target_port == **target)
        })
}

/// What tells a port of a Service from the others.
fn port_key(port: &ServicePort) -> (&str, i32, &str) {
    let ServicePort { name, port, protocol, .. } = port;
    (name.as_deref().unwrap_or(""), *port, protocol.as_deref().unwrap_or("TCP"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kubernetes::objects::slices::tests::{PortTuple, TCP, UDP, spec, table, web};

    fn ports(lists: &[&[PortTuple]]) -> Vec<(String, i32, String)> {
        let specs = lists.iter().enumerate().map(|(at, ports)| spec(&format!("10.0.{}.1", at), ports));
        let service = desired(&web(), &table(&specs.collect::<Vec<_>>()));
        let ports = service.spec.and_then(|spec| spec.ports).unwrap_or_default();
        ports.iter().map(port_key).map(|(name, number, protocol)| (name.into(), number, protocol.into())).collect()
    }

    /// The defaults that an API server fills in.
    fn defaulted(mut service: Service) -> Service {
        let spec = service.spec.as_mut().expect("set");
        spec.cluster_ips = Some(vec!["None".into()]);
        spec.session_affinity = Some("None".into());
        spec.ip_families = Some(vec!["IPv4".into()]);
        service.metadata.uid = Some("1".into());
        service
    }

    #[test]
    fn service_is_headless_and_labelled_as_owned() {
        let service = desired(&web(), &table(&[spec("10.0.0.1", &[(8080, TCP, "http")])]));
        assert_eq!(
            serde_json::to_value(&service).expect("JSON"),
            serde_json::json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": {
                    "name": "web", "namespace": "prod",
                    "labels": {"service-type": "external", "gangplank.dev/service": "owned"},
                },
                "spec": {
                    "type": "ClusterIP", "clusterIP": "None",
                    "ports": [{"name": "http", "port": 8080, "protocol": "TCP", "targetPort": 8080}],
                },
            })
        );
        assert_eq!(Ownership::of(&service, None), Ownership::Ours);
    }

    #[test]
    fn only_a_service_as_gangplank_makes_it_is_ours() {
        let mut ours = desired(&web(), &table(&[]));
        ours.metadata.uid = Some("a".into());
        let edited = |edit: &dyn Fn(&mut Service)| {
            let mut service = ours.clone();
            edit(&mut service);
            [None, Some("a"), Some("b")].map(|known| Ownership::of(&service, known))
        };
        let labelled = |value: Option<&str>| {
            edited(&|service| {
                service.metadata.labels = value.map(|value| [(names::SERVICE.to_owned(), value.to_owned())].into());
            })
        };
        use Ownership::{Foreign, Joined, Ours};
        assert_eq!(edited(&|_| {}), [Ours; 3]);
        assert_eq!(labelled(Some("joined")), [Joined; 3]);
        assert_eq!(labelled(Some("Owned")), [Foreign; 3]);
        assert_eq!(labelled(None), [Foreign; 3]);
        // A native one with the label, and an edit of one that was ours.
        let selecting = |service: &mut Service| {
            service.spec.as_mut().expect("set").selector = Some([("app".into(), "web".into())].into());
        };
        assert_eq!(labelled(Some("owned")), [Foreign, Ours, Foreign]);
        assert_eq!(edited(&selecting), [Foreign, Ours, Foreign]);
        assert_eq!(
            edited(&|service| service.spec.as_mut().expect("set").cluster_ip = Some("10.0.0.1".into())),
            [Foreign, Ours, Foreign]
        );
    }

    #[test]
    fn ports_are_the_valid_part_of_the_union() {
        let port = |name: &str, number, protocol: &str| (name.to_owned(), number, protocol.to_owned());
        assert_eq!(ports(&[&[]]), []);
        assert_eq!(ports(&[&[(80, TCP, "")], &[(80, TCP, "")]]), [port("", 80, "TCP")]);
        assert_eq!(ports(&[&[(80, TCP, "")], &[(81, TCP, "")]]), [], "two without a name");
        assert_eq!(ports(&[&[(80, TCP, ""), (443, TCP, "https")]]), [port("https", 443, "TCP")]);
        let dns: &[PortTuple] = &[(53, UDP, "dns"), (53, TCP, "dns"), (9153, TCP, "metrics")];
        assert_eq!(ports(&[dns]), [port("dns", 53, "TCP"), port("metrics", 9153, "TCP")]);
        let (one, other): (&[PortTuple], &[PortTuple]) = (&[(80, TCP, "web")], &[(80, TCP, "http"), (81, TCP, "web")]);
        assert_eq!(ports(&[one, other]), [port("http", 80, "TCP"), port("web", 81, "TCP")]);
        assert_eq!(ports(&[other, one]), ports(&[one, other]));
    }

    proptest! {
        #[test]
        fn any_list_of_ports_is_valid_in_kubernetes(
            lists in prop::collection::vec(prop::collection::btree_map(
                (1i64..6, prop::sample::select(vec![TCP, UDP])), prop::sample::select(vec!["", "a", "b", "c"]), 0..5,
            ), 0..8),
        ) {
            let lists: Vec<Vec<PortTuple>> = lists.into_iter().map(|list| {
                let mut seen = HashSet::new();
                let ports = list.into_iter().map(|((number, protocol), name)| (number, protocol, name));
                let kept = ports.filter(|port| seen.insert((port.2, Some(port.1).filter(|_| !port.2.is_empty()))));
                kept.collect()
            }).collect();
            let all = ports(&lists.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let names: HashSet<_> = all.iter().map(|port| &port.0).collect();
            let numbers: HashSet<_> = all.iter().map(|port| (port.1, &port.2)).collect();
            prop_assert_eq!((names.len(), numbers.len()), (all.len(), all.len()));
            prop_assert!(all.len() < 2 || all.iter().all(|port| !port.0.is_empty()));
            // Every name has a port, unless its numbers went to other names.
            for (number, protocol, name) in lists.iter().flatten().filter(|port| !port.2.is_empty()) {
                let taken = numbers.contains(&(i32::try_from(*number).expect("small"), &protocol.as_str().to_owned()));
                prop_assert!(taken || names.contains(&(*name).to_owned()));
            }
        }
    }

    #[test]
    fn external_edits_are_reverted_and_foreign_fields_kept() {
        let instances = table(&[spec("10.0.0.1", &[(8080, TCP, "http"), (8443, TCP, "https")])]);
        let right = defaulted(desired(&web(), &instances));
        assert_eq!(amend(&right, &instances), None);
        let edits: [fn(&mut Service); 6] = [
            |service| _ = service.metadata.labels.as_mut().expect("set").remove(names::SERVICE_TYPE),
            |service| service.metadata.labels = None,
            |service| service.spec.as_mut().expect("set").selector = Some([("app".into(), "web".into())].into()),
            |service| service.spec.as_mut().expect("set").ports = None,
            |service| _ = service.spec.as_mut().expect("set").ports.as_mut().expect("set").pop(),
            |service| {
                let ports = service.spec.as_mut().expect("set").ports.as_mut().expect("set");
                ports[1].target_port = Some(IntOrString::Int(1));
            },
        ];
        for edit in edits {
            let mut wrong = right.clone();
            edit(&mut wrong);
            wrong.metadata.annotations = Some([("note".into(), "a".into())].into());
            wrong.metadata.managed_fields = Some(Vec::new());
            let amended = amend(&wrong, &instances).expect("it deviates");
            assert_eq!(amended.spec, right.spec);
            assert_eq!(amended.metadata.labels, right.metadata.labels);
            assert_eq!(
                (&amended.metadata.uid, &amended.metadata.annotations),
                (&wrong.metadata.uid, &wrong.metadata.annotations)
            );
            assert_eq!(amended.metadata.managed_fields, None);
            assert_eq!(amend(&amended, &instances), None);
        }

        let mut alias = right.clone();
        let changed = alias.spec.as_mut().expect("set");
        (changed.type_, changed.external_name, changed.cluster_ip) =
            (Some("ExternalName".into()), Some("x.y".into()), None);
        let amended = amend(&alias, &instances).expect("it deviates").spec.expect("set");
        assert_eq!(
            (amended.type_.as_deref(), amended.external_name, amended.cluster_ip.as_deref()),
            (Some("ClusterIP"), None, Some("None"))
        );

        let mut noted = right.clone();
        let ports = noted.spec.as_mut().expect("set").ports.as_mut().expect("set");
        ports[0].app_protocol = Some("h2c".into());
        assert_eq!(amend(&noted, &instances), None, "what others say of a port is theirs");
        let fewer = table(&[spec("10.0.0.1", &[(8080, TCP, "http")])]);
        let amended = amend(&noted, &fewer).expect("a port less").spec.expect("set");
        assert_eq!(amended.ports.expect("one")[0].app_protocol.as_deref(), Some("h2c"));

        let mut going = right;
        going.metadata.deletion_timestamp = serde_json::from_str(r#""2026-11-21T10:00:00Z""#).expect("a time");
        going.metadata.labels = None;
        assert_eq!(amend(&going, &instances), None);
    }
}
