//! A slice of ours as last observed in the cluster, in the few bytes that the cache keeps of it.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};

use super::{
    group::{Family, SliceGroup, is_slice_name, port_specs},
    record::{InstancesAnnotation, read_ports},
    render::{ContentDigest, SliceEndpoint, digest, is_owner, labels, render},
    tombstones,
};
use crate::{
    kubernetes::objects::names,
    model::{Address, Namespace, Ports, ServiceKey, ServiceName},
};

/// The highest term that is accepted. Terms grow by one for each data directory; a higher one that
/// somebody wrote by hand must not use up the numbers.
const MAX_TERM: u64 = 1 << 62;

/// A slice of ours as last observed.
#[derive(Debug, Clone, PartialEq)]
pub struct ObservedSlice {
    /// The slice's name, unique in its namespace.
    pub name: String,
    /// The uid, which tells it from an earlier or later one of the same name.
    pub uid: String,
    /// The resourceVersion that was read.
    pub resource_version: String,
    /// The service that it belongs to.
    pub service: ServiceKey,
    /// The term in which it was written; 0 if unknown.
    pub term: u64,
    /// The generation that it shows; 0 if unknown.
    pub generation: u64,
    /// It is being deleted and waits for a finalizer: its endpoints are ignored.
    pub deleting: bool,
    /// It holds tombstones and no instances.
    pub tombstones: bool,
    /// Which instances belong in it; `None` if gangplank writes no slice with these ports or this
    /// name.
    pub group: Option<SliceGroup>,
    /// The addresses in it, in order, each once.
    pub addresses: Box<[Address]>,
    /// The digest of its content if gangplank would write the same; `None` if somebody else changed
    /// one of our fields.
    pub digest: Option<ContentDigest>,
    /// Metadata of others, to be kept.
    pub foreign: Option<Box<ForeignMetadata>>,
}

/// Metadata on a slice of ours that is not ours.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ForeignMetadata {
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Finalizers.
    pub finalizers: Vec<String>,
    /// References to owners other than the Service.
    pub owners: Vec<OwnerReference>,
}

impl ObservedSlice {
    /// Reads a slice. `None` when it is not one of ours (the label
    /// `endpointslice.kubernetes.io/managed-by` decides), or names no service.
    #[must_use]
    pub fn read(slice: &EndpointSlice) -> Option<Self> {
        let meta = &slice.metadata;
        // The label says who manages a slice (KEP-752); what carries another one is never touched.
        if label(meta, names::MANAGED_BY) != Some(names::MANAGER) {
            return None;
        }
        let service = service_of(meta)?;
        let name = meta.name.clone()?;
        let tombstones = tombstones::is_of_tombstones(slice);
        let family = Family::parse(&slice.address_type).filter(|_| !tombstones);
        let group = family.filter(|_| is_slice_name(&service, &name)).and_then(|family| group_of(slice, family));
        let mut addresses: Vec<Address> = addresses_of(&slice.endpoints).collect();
        // Sorted and without duplicates, because the plan searches and counts them.
        addresses.sort_unstable();
        addresses.dedup();
        let foreign = ForeignMetadata::read(meta, &service);
        let digest = if tombstones {
            tombstones::untouched(slice, &service, &name)
        } else {
            group.as_ref().and_then(|group| untouched(slice, &service, &name, group))
        };
        Some(Self {
            uid: meta.uid.clone()?,
            resource_version: meta.resource_version.clone()?,
            term: stamp(meta, names::TERM).filter(|term| *term <= MAX_TERM).unwrap_or(0),
            generation: stamp(meta, names::GENERATION).unwrap_or(0),
            tombstones,
            deleting: meta.deletion_timestamp.is_some(),
            name,
            service,
            group,
            addresses: addresses.into(),
            digest,
            foreign: (foreign != ForeignMetadata::default()).then(|| Box::new(foreign)),
        })
    }
}

impl ForeignMetadata {
    fn read(meta: &ObjectMeta, service: &ServiceKey) -> Self {
        let others = |map: &Option<BTreeMap<String, String>>, ours: &dyn Fn(&str) -> bool| {
            let others = map.iter().flatten().filter(|(key, _)| !ours(key));
            others.map(|(key, value)| (key.clone(), value.clone())).collect()
        };
        let our_labels = labels(service).map(|(key, _)| key);
        let owners = meta.owner_references.iter().flatten().filter(|reference| !is_owner(reference, service));
        Self {
            labels: others(&meta.labels, &|key| our_labels.contains(&key)),
            annotations: others(&meta.annotations, &|key| OUR_ANNOTATIONS.contains(&key)),
            finalizers: meta.finalizers.clone().unwrap_or_default(),
            owners: owners.cloned().collect(),
        }
    }

    /// Bytes of its annotations, as Kubernetes counts them.
    pub(super) fn annotation_octets(&self) -> usize {
        self.annotations.iter().map(|(key, value)| key.len() + value.len()).sum()
    }

    /// Adds it to our metadata.
    pub(super) fn carry_over(&self, meta: &mut ObjectMeta) {
        let Self { labels, annotations, finalizers, owners } = self;
        meta.labels.get_or_insert_default().extend(labels.clone());
        meta.annotations.get_or_insert_default().extend(annotations.clone());
        meta.finalizers = Some(finalizers.clone()).filter(|finalizers| !finalizers.is_empty());
        meta.owner_references.get_or_insert_default().extend(owners.iter().cloned());
    }
}

/// Annotations that only gangplank writes.
const OUR_ANNOTATIONS: [&str; 9] = [
    names::INSTANCES,
    names::RESOLVED,
    names::PORTS,
    names::TERM,
    names::GENERATION,
    names::UPDATED,
    names::WRITER,
    names::TOMBSTONES,
    names::REFUSE_BEFORE,
];

/// The service of a slice: from its label, or without one from the name of its owner.
pub(in crate::kubernetes) fn service_of(meta: &ObjectMeta) -> Option<ServiceKey> {
    let owner = || {
        let owners = meta.owner_references.iter().flatten();
        owners.filter(|one| (&*one.api_version, &*one.kind) == ("v1", "Service")).map(|one| &*one.name).next()
    };
    let name = label(meta, names::SERVICE_NAME).or_else(owner)?;
    let namespace = Namespace::parse(meta.namespace.as_deref()?).ok()?;
    Some(ServiceKey::new(namespace, ServiceName::parse(name).ok()?))
}

/// The addresses of `endpoints` that an instance can have.
pub(super) fn addresses_of(endpoints: &[Endpoint]) -> impl Iterator<Item = Address> {
    endpoints.iter().flat_map(|one| &one.addresses).filter_map(|text| Address::parse(text).ok())
}

/// Whether the slice holds addresses that DNS names lead to, whatever the marker's value is: no instances.
pub(super) fn is_resolved(slice: &EndpointSlice) -> bool {
    annotation(&slice.metadata, names::RESOLVED).is_some()
}

fn group_of(slice: &EndpointSlice, family: Family) -> Option<SliceGroup> {
    let ports = Ports::parse(&port_specs(slice.ports.as_deref().unwrap_or_default()).ok()?).ok()?;
    let whole = match annotation(&slice.metadata, names::PORTS) {
        None => None,
        Some(text) => Some(read_ports(text).ok()?),
    };
    let resolved = is_resolved(slice);
    SliceGroup::of_slice(family, ports, whole).map(|group| SliceGroup { resolved, ..group })
}

/// The digest of a slice in which every field of ours is as it would be written again from what
/// can be read in it; `None` for any other.
fn untouched(slice: &EndpointSlice, service: &ServiceKey, name: &str, group: &SliceGroup) -> Option<ContentDigest> {
    let meta = &slice.metadata;
    let mut annotations = if group.resolved {
        InstancesAnnotation::default()
    } else {
        InstancesAnnotation::read(annotation(meta, names::INSTANCES)).ok()?
    };
    let endpoints =
        slice.endpoints.iter().map(|endpoint| endpoint_of(endpoint, &mut annotations)).collect::<Option<Vec<_>>>()?;
    // Strictly: the same address twice is no slice of ours.
    if !endpoints.is_sorted_by(|a, b| a.address < b.address)
        || endpoints.iter().any(|endpoint| Family::of(&endpoint.address) != group.family)
    {
        return None;
    }
    let mut owners = meta.owner_references.iter().flatten().filter(|reference| is_owner(reference, service));
    let owner = owners.next()?;
    // Written again and compared, field by field: whoever changed one of ours, the slice is repaired.
    let again = render(service, &owner.uid, name, group, &endpoints);
    let again_annotation = |key| annotation(&again.metadata, key);
    let same = owners.next().is_none()
        && again.metadata.owner_references.as_deref() == Some(std::slice::from_ref(owner))
        && labels(service).into_iter().all(|(key, value)| label(meta, key) == Some(value))
        && [names::INSTANCES, names::PORTS, names::RESOLVED]
            .into_iter()
            .all(|key| annotation(meta, key) == again_annotation(key))
        && [names::TERM, names::GENERATION].into_iter().all(|key| stamp(meta, key).is_some())
        && [names::UPDATED, names::WRITER].into_iter().all(|key| annotation(meta, key).is_some())
        && slice.endpoints == again.endpoints
        && same_ports(slice.ports.as_deref(), again.ports.as_deref());
    same.then(|| digest(&owner.uid, group, &endpoints))
}

/// The content of an endpoint; `None` if gangplank writes no such endpoint.
fn endpoint_of<'a>(endpoint: &'a Endpoint, annotations: &mut InstancesAnnotation) -> Option<SliceEndpoint<'a>> {
    let [address] = &endpoint.addresses[..] else { return None };
    Some(SliceEndpoint {
        address: Address::parse(address).ok()?,
        ready: endpoint.conditions.as_ref()?.ready?,
        hostname: endpoint.hostname.as_deref().map(Into::into),
        node: endpoint.node_name.as_deref(),
        record: annotations.get(address).ok()?,
    })
}

/// Whether two lists of ports are equal to the API server, which writes an empty name for an absent
/// one, and omits an empty list.
fn same_ports(existing: Option<&[EndpointPort]>, ours: Option<&[EndpointPort]>) -> bool {
    let same = |(existing, ours): (&EndpointPort, &EndpointPort)| {
        let EndpointPort { app_protocol, name, port, protocol } = existing;
        (app_protocol, name.as_deref().unwrap_or(""), port, protocol)
            == (&ours.app_protocol, ours.name.as_deref().unwrap_or(""), &ours.port, &ours.protocol)
    };
    let (existing, ours) = (existing.unwrap_or_default(), ours.unwrap_or_default());
    existing.len() == ours.len() && existing.iter().zip(ours).all(same)
}

pub(in crate::kubernetes) fn label<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.labels.as_ref()?.get(key).map(String::as_str)
}

pub(super) fn annotation<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.annotations.as_ref()?.get(key).map(String::as_str)
}

/// A stamp that is a number.
pub(super) fn stamp(meta: &ObjectMeta, key: &str) -> Option<u64> {
    annotation(meta, key)?.parse().ok()
}
