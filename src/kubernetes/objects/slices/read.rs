//! Reads instances from slices: from our own, to restore the registry, and from those of others, to
//! answer DNS with them.
//!
//! Slices are checked by the model's invariants, not by the policy for registrations: a stricter rule
//! must not remove registered instances. Only addresses that pods cannot reach are left out: no
//! version ever accepted them, so somebody wrote them by hand.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::Arc,
};

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};

use super::{
    group::{Family, SliceGroup, port_spec, port_specs},
    observed::{annotation, stamp},
    record::{InstanceAnnotation, InstancesAnnotation, read_ports},
};
use crate::{
    kubernetes::objects::names,
    model::{
        Address, Instance, InstanceId, InstanceSpec, Label, MAX_INSTANCE_BYTES, PortSpec, Ports, Protocol, UnixMillis,
        Validator, invariants, parse_dashed_label,
    },
};

/// A defect in a slice of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedEndpoint {
    /// The slice.
    pub slice: String,
    /// The endpoint's address as written; `None` if the defect concerns the whole slice.
    pub address: Option<String>,
    /// What is invalid, and what is used instead, if anything.
    pub reason: String,
}

impl fmt::Display for SkippedEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { slice, address, reason } = self;
        write!(f, "slice {slice}: ")?;
        if let Some(address) = address {
            write!(f, "{address}: ")?;
        }
        f.write_str(reason)
    }
}

/// The instances in the slices of one of our services, in no order, each identity once, and the
/// defects of the slices.
///
/// All instances are ready: readiness is not part of the record. The parts of an instance with split
/// ports are joined again. An endpoint with several addresses, which gangplank never writes, is an
/// instance for each of them. If two slices differ about an instance, the one with the higher term
/// and generation wins. An instance whose entry in the annotation is missing or invalid gets the
/// defaults, and the creation time of its slice as its registration time. A slice that is being
/// deleted is ignored: its instances were removed, or are in another slice.
#[must_use]
pub fn read<'a>(
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
    validator: &Validator,
) -> (Vec<Arc<Instance>>, Vec<SkippedEndpoint>) {
    let stays = |slice: &&EndpointSlice| slice.metadata.deletion_timestamp.is_none();
    let mut slices: Vec<&EndpointSlice> = slices.into_iter().filter(stays).collect();
    slices.sort_by_cached_key(|slice| {
        let stamp = |key| std::cmp::Reverse(stamp(&slice.metadata, key).unwrap_or(0));
        (stamp(names::TERM), stamp(names::GENERATION), slice.metadata.name.clone())
    });
    let mut reader = SliceReader { validator, found: HashMap::new(), skipped: Vec::new() };
    for slice in slices {
        reader.slice(slice);
    }
    (reader.found.into_values().collect(), reader.skipped)
}

struct SliceReader<'a> {
    validator: &'a Validator,
    found: HashMap<InstanceId, Arc<Instance>>,
    skipped: Vec<SkippedEndpoint>,
}

impl SliceReader<'_> {
    fn slice(&mut self, slice: &EndpointSlice) {
        let meta = &slice.metadata;
        let name = meta.name.as_deref().unwrap_or_default();
        let mut skip = |address: Option<&str>, reason: String| {
            self.skipped.push(SkippedEndpoint { slice: name.into(), address: address.map(Into::into), reason });
        };
        let ports = match ports_of(slice) {
            Ok((ports, doubt)) => {
                if let Some(doubt) = doubt {
                    skip(None, doubt);
                }
                ports
            }
            Err(reason) => {
                for address in slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses) {
                    skip(Some(address), reason.clone());
                }
                return;
            }
        };
        let records = InstancesAnnotation::read(annotation(meta, names::INSTANCES)).unwrap_or_else(|err| {
            skip(None, format!("annotation {} {err}: weights and priorities are lost", names::INSTANCES));
            InstancesAnnotation::none()
        });
        let created = created(slice);
        for endpoint in &slice.endpoints {
            for address in &endpoint.addresses {
                let record = records.get(address).unwrap_or_else(|err| {
                    skip(Some(address), format!("annotation {}: {err}: the defaults are taken", names::INSTANCES));
                    InstanceAnnotation::default()
                });
                match instance(self.validator, endpoint, address, &ports, record, created) {
                    Ok(instance) => {
                        self.found.entry(instance.id()).or_insert_with(|| Arc::new(instance));
                    }
                    Err(err) => skip(Some(address), err),
                }
            }
        }
    }
}

/// The ports of a slice's instances, and a defect that does not make them unusable.
///
/// # Errors
/// If the ports are invalid; then none of the slice's endpoints can be used.
fn ports_of(slice: &EndpointSlice) -> Result<(Vec<PortSpec>, Option<String>), String> {
    let standing = port_specs(slice.ports.as_deref().unwrap_or_default())?;
    let ports = invariants::parse_ports(&standing).map_err(|err| err.to_string())?;
    let Some(whole) = annotation(&slice.metadata, names::PORTS) else { return Ok((standing, None)) };
    match read_ports(whole) {
        Ok(whole) => {
            // The family does not matter here.
            if SliceGroup::of_slice(Family::V4, ports, Some(whole.clone())).is_some() {
                return Ok((specs(&whole), None));
            }
            let doubt = format!("annotation {} is about other ports than the slice's: those are taken", names::PORTS);
            Ok((standing, Some(doubt)))
        }
        Err(err) => Ok((standing, Some(format!("annotation {}: {err}: the slice's ports are taken", names::PORTS)))),
    }
}

fn specs(ports: &Ports) -> Vec<PortSpec> {
    let specs = ports.as_slice().iter().map(|port| PortSpec {
        number: port.number.into(),
        protocol: port.protocol,
        name: port.name.as_ref().map(ToString::to_string).unwrap_or_default(),
    });
    specs.collect()
}

fn instance(
    validator: &Validator,
    endpoint: &Endpoint,
    address: &str,
    ports: &[PortSpec],
    record: InstanceAnnotation,
    created: UnixMillis,
) -> Result<Instance, String> {
    let InstanceAnnotation { weight, priority, registered } = record;
    let hostname = endpoint.hostname.as_deref().unwrap_or_default();
    // An instance without a host name has the label of its address.
    let ip = validator.address(address).map_err(|err| err.to_string())?.ip();
    let own = ip.is_some() && parse_dashed_label(hostname.as_bytes()) == ip;
    let spec = InstanceSpec {
        address: address.into(),
        ports: ports.to_vec(),
        host_name: if own { String::new() } else { hostname.into() },
        node_name: endpoint.node_name.clone().unwrap_or_default(),
        weight: Some(weight.get()),
        priority,
    };
    let registered = if registered == UnixMillis(0) { created } else { registered };
    spec.to_instance(registered).map_err(|err| err.to_string())
}

/// When the slice was created; the Unix epoch if it has no creation time.
fn created(slice: &EndpointSlice) -> UnixMillis {
    let created = slice.metadata.creation_timestamp.as_ref().map(|time| time.0.as_millisecond());
    UnixMillis(created.and_then(|millis| u64::try_from(millis).ok()).unwrap_or(0))
}

/// The instances in a slice of somebody else, to answer DNS with them: pods of a Service that
/// external instances joined.
///
/// Whatever DNS can answer is used. An endpoint without the condition `ready` is ready, as in
/// CoreDNS. Ports without a number, with an invalid number or name, or beyond an instance's 2 KiB
/// are left out; an invalid hostname or node name is dropped; addresses that pods cannot reach are
/// left out. An endpoint with several
/// addresses is an instance for each of them.
#[must_use]
pub fn foreign(slice: &EndpointSlice, validator: &Validator) -> Vec<Arc<Instance>> {
    let ports = usable_ports(slice.ports.as_deref().unwrap_or_default());
    let registered = created(slice);
    let mut found: HashMap<Address, Arc<Instance>> = HashMap::new();
    for endpoint in &slice.endpoints {
        let ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true);
        for text in &endpoint.addresses {
            let Ok(address) = validator.address(text) else { continue };
            let spec = InstanceSpec {
                address: text.clone(),
                ports: ports.clone(),
                host_name: usable_hostname(endpoint, &address).unwrap_or_default().into(),
                node_name: usable_node(endpoint).unwrap_or_default().into(),
                ..InstanceSpec::default()
            };
            if let Ok(instance) = spec.to_instance(registered) {
                let instance = Arc::new(instance.with_ready(ready));
                let known = found.entry(address).or_insert_with(|| Arc::clone(&instance));
                if ready && !known.ready() {
                    *known = instance;
                }
            }
        }
    }
    let mut found: Vec<Arc<Instance>> = found.into_values().collect();
    found.sort_unstable_by(|a, b| a.address().cmp(b.address()));
    found
}

/// The ports that one instance can have, in order.
fn usable_ports(ports: &[EndpointPort]) -> Vec<PortSpec> {
    /// Bytes that the other fields of an instance take at most: host, node and the numbers.
    const OTHER_FIELDS_BYTES: usize = 400;
    let mut seen = UsedPorts::default();
    let mut octets = OTHER_FIELDS_BYTES;
    let mut usable = Vec::new();
    for port in ports {
        let Ok(spec) = port_spec(port) else { continue };
        let cost = spec.name.len() + 12;
        if octets + cost <= MAX_INSTANCE_BYTES && Ports::parse(std::slice::from_ref(&spec)).is_ok() && seen.take(&spec)
        {
            octets += cost;
            usable.push(spec);
        }
    }
    usable
}

/// The ports so far, to find clashes.
#[derive(Default)]
struct UsedPorts {
    numbers: HashSet<(Protocol, i64)>,
    names: HashSet<(Protocol, String)>,
    unnamed: bool,
}

impl UsedPorts {
    /// Adds `port` unless it clashes with another; returns whether it was added.
    fn take(&mut self, port: &PortSpec) -> bool {
        let name = (port.protocol, port.name.clone());
        let unnamed = port.name.is_empty();
        if (unnamed && self.unnamed) || self.names.contains(&name) || !self.numbers.insert((port.protocol, port.number))
        {
            return false;
        }
        self.unnamed |= unnamed;
        self.names.insert(name);
        true
    }
}

fn usable_hostname<'a>(endpoint: &'a Endpoint, address: &Address) -> Option<&'a str> {
    let hostname = endpoint.hostname.as_deref()?;
    let spelled = parse_dashed_label(hostname.as_bytes());
    let other = spelled.is_some() && spelled != address.ip();
    (Label::parse(hostname).is_ok() && !other).then_some(hostname)
}

fn usable_node(endpoint: &Endpoint) -> Option<&str> {
    endpoint.node_name.as_deref().filter(|name| crate::model::DnsName::parse(name).is_ok())
}
