//! Renders a slice: every field that gangplank sets.

use std::{borrow::Cow, collections::BTreeMap, net::IpAddr};

use k8s_openapi::{
    api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use sha2::Sha256;

use super::{
    group::SliceGroup,
    record::{InstanceAnnotation, instances_json, ports_json},
};
use crate::{
    kubernetes::objects::names,
    model::{Address, DashedLabel, Instance, Registrant, ServiceKey, UnixMillis, view::Rfc3339},
};

/// Annotations that are set when a slice is written. They alone are no reason to write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SliceStamps<'a> {
    /// The term of the writer.
    pub term: u64,
    /// The generation that the slices show once written.
    pub generation: u64,
    /// The time of the write.
    pub updated: UnixMillis,
    /// The name of the writing process.
    pub writer: &'a str,
}

impl SliceStamps<'_> {
    /// As annotations.
    pub(super) fn annotations(&self) -> [(&'static str, String); 4] {
        let Self { term, generation, updated, writer } = self;
        [
            (names::TERM, term.to_string()),
            (names::GENERATION, generation.to_string()),
            (names::UPDATED, Rfc3339(*updated).to_string()),
            (names::WRITER, (*writer).to_owned()),
        ]
    }
}

/// The digest by which contents of slices are compared: half of a SHA-256. Only in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContentDigest([u8; 16]);

impl ContentDigest {
    pub(super) fn of(sha256: &[u8; 32]) -> Self {
        Self(sha256[..16].try_into().expect("half of 32 bytes"))
    }
}

/// One endpoint.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct SliceEndpoint<'a> {
    pub(super) address: Address,
    pub(super) ready: bool,
    pub(super) hostname: Option<Cow<'a, str>>,
    pub(super) node: Option<&'a str>,
    pub(super) record: InstanceAnnotation,
}

impl<'a> SliceEndpoint<'a> {
    /// The endpoint of an instance.
    pub(super) fn of(instance: &'a Instance, ready: bool) -> Self {
        Self {
            address: instance.address().clone(),
            ready,
            hostname: hostname(instance, instance.address().ip()),
            node: instance.node_name().map(|name| name.as_str()),
            record: InstanceAnnotation {
                weight: instance.weight(),
                priority: instance.priority(),
                registered: instance.registered(),
                stamp: instance.stamp(),
                registrant: instance.registrant().cloned(),
            },
        }
    }

    /// An address that the name of `instance` leads to. The slice has no record of the instance.
    pub(super) fn resolved(instance: &'a Instance, address: Address) -> Self {
        Self {
            ready: true,
            hostname: hostname(instance, address.ip()),
            address,
            node: instance.node_name().map(|name| name.as_str()),
            record: InstanceAnnotation::default(),
        }
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint {
            addresses: vec![self.address.to_string()],
            conditions: Some(EndpointConditions { ready: Some(self.ready), ..EndpointConditions::default() }),
            hostname: self.hostname.as_deref().map(Into::into),
            node_name: self.node.map(Into::into),
            ..Endpoint::default()
        }
    }
}

/// The host name of an endpoint.
///
/// Without one CoreDNS derives it from the address, as gangplank's own DNS does, with one
/// difference: an address that begins or ends in `::` gets a label that begins or ends with a
/// dash, which glibc and Go refuse to look up. Such endpoints get an explicit one.
///
/// `ip` is `None` for a DNS name.
pub(in crate::kubernetes) fn hostname(instance: &Instance, ip: Option<IpAddr>) -> Option<Cow<'_, str>> {
    if let Some(label) = instance.host_name() {
        return Some(Cow::Borrowed(label.as_str()));
    }
    let Some(ip @ IpAddr::V6(v6)) = ip else { return None };
    let (first, last) = (v6.segments()[0], v6.segments()[7]);
    // `::` at an end means that the segment there is 0.
    if first != 0 && last != 0 {
        return None; // IPv4 has no `::`
    }
    let label = DashedLabel::new(ip);
    (label.as_str() != ip.to_string().replace([':', '.'], "-")).then(|| Cow::Owned(label.as_str().to_owned()))
}

/// The reference to its Service, by which the garbage collector removes an object with it.
pub(in crate::kubernetes) fn owner(service: &ServiceKey, uid: &str) -> OwnerReference {
    OwnerReference {
        api_version: "v1".into(),
        kind: "Service".into(),
        name: service.name().into(),
        uid: uid.into(),
        ..OwnerReference::default()
    }
}

/// Whether a reference is to the Service, as from [`owner`], whatever its other fields are.
pub(super) fn is_owner(reference: &OwnerReference, service: &ServiceKey) -> bool {
    (&*reference.api_version, &*reference.kind, &*reference.name) == ("v1", "Service", service.name())
}

/// The labels of our slices.
pub(super) fn labels(service: &ServiceKey) -> [(&'static str, &str); 3] {
    [(names::SERVICE_NAME, service.name()), (names::MANAGED_BY, names::MANAGER), (names::HEADLESS, "")]
}

/// The slice `name` of `service` with these rows, which are in order of address. The stamps are
/// not on it yet.
pub(super) fn render(
    service: &ServiceKey,
    uid: &str,
    name: &str,
    group: &SliceGroup,
    endpoints: &[SliceEndpoint<'_>],
) -> EndpointSlice {
    let records = endpoints.iter().map(|endpoint| (&endpoint.address, &endpoint.record));
    let mut annotations = BTreeMap::from([if group.resolved {
        (names::RESOLVED.to_owned(), "true".to_owned())
    } else {
        (names::INSTANCES.to_owned(), instances_json(records))
    }]);
    if group.part.is_some() {
        annotations.insert(names::PORTS.to_owned(), ports_json(&group.ports));
    }
    let ports: Vec<EndpointPort> = group
        .slice_ports()
        .map(|port| EndpointPort {
            app_protocol: None,
            // The API server turns an absent name into an empty one.
            name: Some(port.name.as_ref().map(ToString::to_string).unwrap_or_default()),
            port: Some(port.number.into()),
            protocol: Some(port.protocol.as_str().into()),
        })
        .collect();
    EndpointSlice {
        metadata: ObjectMeta {
            name: Some(name.into()),
            namespace: Some(service.namespace().into()),
            labels: Some(labels(service).map(|(key, value)| (key.into(), value.into())).into()),
            annotations: Some(annotations),
            owner_references: Some(vec![owner(service, uid)]),
            ..ObjectMeta::default()
        },
        address_type: group.family.as_str().into(),
        endpoints: endpoints.iter().map(SliceEndpoint::endpoint).collect(),
        ports: Some(ports).filter(|ports| !ports.is_empty()),
    }
}

/// The digest of what [`render`] writes for the same arguments.
pub(super) fn digest(uid: &str, group: &SliceGroup, endpoints: &[SliceEndpoint<'_>]) -> ContentDigest {
    let mut content = Vec::with_capacity(512 + endpoints.len() * 64);
    // Each text is preceded by its length, so that different contents have different bytes.
    let text = |content: &mut Vec<u8>, text: Option<&str>| {
        let len = text.map_or(u32::MAX, |text| u32::try_from(text.len()).unwrap_or(u32::MAX - 1));
        content.extend(len.to_le_bytes());
        content.extend(text.unwrap_or_default().as_bytes());
    };
    text(&mut content, Some(uid));
    content.extend([group.family as u8, group.part.map_or(0, |part| 1 + part as u8), u8::from(group.resolved)]);
    content.extend(u32::try_from(group.ports.as_slice().len()).unwrap_or(u32::MAX).to_le_bytes());
    for port in group.ports.as_slice() {
        content.push(port.protocol as u8);
        content.extend(port.number.to_le_bytes());
        text(&mut content, port.name.as_ref().map(|name| name.as_str()));
    }
    // Without `..`: a field that is added does not compile until it is digested, or its changes would never be written.
    for SliceEndpoint { address, ready, hostname, node, record } in endpoints {
        // No length of IP addresses: the family is digested above, and decides it.
        match address {
            Address::Ip(IpAddr::V4(v4)) => content.extend(v4.octets()),
            Address::Ip(IpAddr::V6(v6)) => content.extend(v6.octets()),
            Address::Name(name) => text(&mut content, Some(name.as_str())),
        }
        content.push(u8::from(*ready));
        text(&mut content, hostname.as_deref());
        text(&mut content, *node);
        let InstanceAnnotation { weight, priority, registered, stamp, registrant } = record;
        content.extend(weight.get().to_bits().to_le_bytes());
        content.extend(priority.to_le_bytes());
        for number in [registered.0, stamp.clock, stamp.term, stamp.generation] {
            content.extend(number.to_le_bytes());
        }
        text(&mut content, registrant.as_ref().map(Registrant::as_str));
    }
    let hash = <Sha256 as sha2::Digest>::digest(&content);
    ContentDigest::of(&hash.into())
}
