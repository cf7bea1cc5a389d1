//! Slices → instances: our own slices, to restore from them, and those of other writers, to answer
//! with them.
//!
//! What a slice holds is checked by the model's invariants, not by what this server admits today: a
//! rule that became stricter must not remove what was registered. Only addresses that pods cannot
//! reach are left out, which no version ever admitted: they were written by hand.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::Arc,
};

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};

use super::{
    group::{Family, SliceGroup, port_spec, port_specs},
    observed::{annotation, is_resolved},
    record::{InstanceAnnotation, InstancesAnnotation, read_ports},
};
use crate::{
    kubernetes::objects::names,
    model::{
        Address, Instance, InstanceSpec, Label, MAX_INSTANCE_BYTES, PortSpec, Ports, Protocol, UnixMillis, Validator,
        invariants, parse_dashed_label,
    },
};

/// An endpoint of one of our slices that was skipped or changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedEndpoint {
    /// The slice.
    pub slice: String,
    /// The endpoint's address as written; `None` when the whole slice is affected.
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

/// The instances that one of our slices holds, in its order, each identity once, and the endpoints
/// that were skipped or changed. [`SliceView`](super::SliceView) merges slices.
///
/// All instances are ready: readiness is not part of the record. An instance with split ports is
/// returned whole from each of its slices. An endpoint with several addresses, which gangplank does
/// not write, is an instance for each of them. An instance whose entry in the annotation is missing
/// or invalid gets the defaults, and the slice's creation time as its registration time. A slice
/// that is being deleted holds nothing: its instances were removed, or are in another slice.
#[must_use]
pub fn read_slice(slice: &EndpointSlice, validator: &Validator) -> (Vec<Arc<Instance>>, Vec<SkippedEndpoint>) {
    let meta = &slice.metadata;
    let (mut instances, mut skipped) = (Vec::new(), Vec::new());
    // The addresses of a name are not instances: the name is, and has a slice of its own.
    if meta.deletion_timestamp.is_some() || is_resolved(slice) {
        return (instances, skipped);
    }
    let name = meta.name.as_deref().unwrap_or_default();
    let mut skip = |address: Option<&str>, reason: String| {
        skipped.push(SkippedEndpoint { slice: name.into(), address: address.map(Into::into), reason });
    };
    let Some(family) = Family::parse(&slice.address_type) else {
        skip(None, format!("addressType {:?} is unknown", slice.address_type));
        return (instances, skipped);
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
            return (instances, skipped);
        }
    };
    let mut annotations = InstancesAnnotation::read(annotation(meta, names::INSTANCES)).unwrap_or_else(|err| {
        skip(None, format!("annotation {} {err}: weights, priorities and registrants are lost", names::INSTANCES));
        InstancesAnnotation::default()
    });
    let created = created(slice);
    let mut known = HashSet::new();
    for endpoint in &slice.endpoints {
        for address in &endpoint.addresses {
            let attributes = annotations.get(address).unwrap_or_else(|err| {
                skip(Some(address), format!("annotation {}: {err}: the defaults are used", names::INSTANCES));
                InstanceAnnotation::default()
            });
            match instance(validator, family, endpoint, address, &ports, attributes, created) {
                // The API server lets an address be in one slice twice.
                Ok(instance) if known.insert(instance.id()) => instances.push(Arc::new(instance)),
                Ok(_) => {}
                Err(err) => skip(Some(address), err),
            }
        }
    }
    (instances, skipped)
}

/// The ports of a slice's instances, and what is wrong with the annotation that lists them.
///
/// # Errors
/// When the ports are invalid; then no endpoint of the slice is usable.
fn ports_of(slice: &EndpointSlice) -> Result<(Vec<PortSpec>, Option<String>), String> {
    let own = port_specs(slice.ports.as_deref().unwrap_or_default())?;
    let ports = invariants::parse_ports(&own).map_err(|err| err.to_string())?;
    let Some(whole) = annotation(&slice.metadata, names::PORTS) else { return Ok((own, None)) };
    match read_ports(whole) {
        Ok(whole) => {
            // The family does not matter here.
            if SliceGroup::of_slice(Family::V4, ports, Some(whole.clone())).is_some() {
                // The slice itself has the ports of one protocol only. The annotation has all of them.
                return Ok((specs(&whole), None));
            }
            let doubt = format!("annotation {} lists other ports than the slice's: those are used", names::PORTS);
            Ok((own, Some(doubt)))
        }
        Err(err) => Ok((own, Some(format!("annotation {}: {err}: the slice's ports are used", names::PORTS)))),
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
    family: Family,
    endpoint: &Endpoint,
    address: &str,
    ports: &[PortSpec],
    attributes: InstanceAnnotation,
    created: UnixMillis,
) -> Result<Instance, String> {
    let InstanceAnnotation { weight, priority, registered, stamp, registrant } = attributes;
    let hostname = endpoint.hostname.as_deref().unwrap_or_default();
    // The label that spells the own address is the default of an instance without a host name.
    // A name was registered where names are looked up. It stays registered, and in its slice, where they are not.
    let ip = if family == Family::Fqdn {
        if Address::parse(address).is_ok_and(|address| address.ip().is_some()) {
            return Err("an IP address is no DNS name".into());
        }
        None
    } else {
        validator.address(address).map_err(|err| err.to_string())?.ip()
    };
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
    let instance = spec.to_instance(registered).map_err(|err| err.to_string())?;
    Ok(instance.with_stamp(stamp).with_registrant(registrant))
}

/// When the slice was created; 1970 when it does not say.
fn created(slice: &EndpointSlice) -> UnixMillis {
    let created = slice.metadata.creation_timestamp.as_ref().map(|time| time.0.as_millisecond());
    UnixMillis(created.and_then(|millis| u64::try_from(millis).ok()).unwrap_or(0))
}

/// The instances that a slice of another writer holds, to answer with them: pods of a Service that
/// external instances joined.
///
/// As much is used as can be answered. An endpoint is ready unless it says otherwise (as CoreDNS
/// has it); ports with an invalid or missing number or an invalid name are left out, and so are
/// those that no longer fit an instance's 2 KiB; an invalid hostname or node name is dropped;
/// addresses that pods cannot reach are left out, and so are DNS names. An endpoint with several addresses is an instance for each.
#[must_use]
pub fn read_foreign_slice(slice: &EndpointSlice, validator: &Validator) -> Vec<Arc<Instance>> {
    let ports = usable_ports(slice.ports.as_deref().unwrap_or_default());
    let registered = created(slice);
    let mut found: HashMap<Address, Arc<Instance>> = HashMap::new();
    for endpoint in &slice.endpoints {
        let ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true);
        for text in &endpoint.addresses {
            let Ok(address @ Address::Ip(_)) = validator.address(text) else { continue };
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
    /// Most bytes of the other fields of an instance: host, node and the numbers.
    const OTHER_FIELDS_BYTES: usize = 400;
    let mut used = UsedPorts::default();
    let mut bytes = OTHER_FIELDS_BYTES;
    let mut usable = Vec::new();
    for port in ports {
        let Ok(spec) = port_spec(port) else { continue };
        let cost = spec.name.len() + 12;
        if bytes + cost <= MAX_INSTANCE_BYTES && Ports::parse(std::slice::from_ref(&spec)).is_ok() && used.add(&spec) {
            bytes += cost;
            usable.push(spec);
        }
    }
    usable
}

/// The ports so far, so that none conflicts with another.
#[derive(Default)]
struct UsedPorts {
    numbers: HashSet<(Protocol, i64)>,
    names: HashSet<(Protocol, String)>,
    unnamed: bool,
}

impl UsedPorts {
    /// Adds `port` unless it conflicts with the others. Returns whether it was added.
    fn add(&mut self, port: &PortSpec) -> bool {
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
