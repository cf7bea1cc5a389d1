//! The messages of the readers' service: services, instances and changes, in both directions.

use std::{net::IpAddr, sync::Arc};

use prost_types::Timestamp;

use super::port_to_proto;
use crate::{
    grpc::{
        client::{ChangeKind, ClientError, WatchEvent},
        proto::{
            gangplank::v1::{self, resolved_name::State},
            registry::Protocol as WireProtocol,
        },
    },
    model::{
        DnsName, Instance, InstanceChange, InstanceSpec, NameStatus, PortSpec, Protocol, RegistrantPool, Resolution,
        ResolvedAddresses, Service, ServiceKey, Timeline, UnixMillis, invariants,
    },
};

/// Instances in one message of a list or of a watch's snapshot: some 6 KB, because a stream keeps buffers
/// as large as its largest message. At 2 KiB per instance, a message stays far below the 4 MiB that gRPC
/// clients accept.
pub(in crate::grpc) const MAX_INSTANCES_PER_MESSAGE: usize = 64;

pub(super) fn timestamp(at: UnixMillis) -> Timestamp {
    Timestamp {
        seconds: i64::try_from(at.0 / 1_000).unwrap_or(i64::MAX),
        nanos: i32::try_from(at.0 % 1_000).expect("below 1 000") * 1_000_000,
    }
}

pub(super) fn millis(at: Option<Timestamp>) -> UnixMillis {
    let Some(at) = at else { return UnixMillis(0) };
    // A Timestamp can be before 1970; no server means that.
    let seconds = u64::try_from(at.seconds).unwrap_or(0);
    let nanos = u64::try_from(at.nanos).unwrap_or(0);
    UnixMillis(seconds.saturating_mul(1_000).saturating_add(nanos / 1_000_000))
}

/// The protocol with this number, if there is one.
pub(in crate::grpc) fn protocol_from_proto(number: i32) -> Option<Protocol> {
    match WireProtocol::try_from(number).ok()? {
        WireProtocol::Tcp => Some(Protocol::Tcp),
        WireProtocol::Udp => Some(Protocol::Udp),
        WireProtocol::Sctp => Some(Protocol::Sctp),
    }
}

fn instance_to_proto(instance: &Instance) -> v1::Instance {
    let ports = instance.ports().as_slice().iter();
    v1::Instance {
        address: instance.address().to_string(),
        ports: ports
            .map(|port| port_to_proto(port.number.into(), port.protocol, port.name.as_ref().map_or("", |n| n.as_str())))
            .collect(),
        host_name: instance.host_name().map_or_else(String::new, ToString::to_string),
        node_name: instance.node_name().map_or_else(String::new, ToString::to_string),
        weight: instance.weight().get(),
        priority: instance.priority().into(),
        ready: instance.ready(),
        registered: Some(timestamp(instance.registered())),
        registrant: instance.registrant().map_or_else(String::new, ToString::to_string),
    }
}

/// How the lookups of a name stand.
pub(in crate::grpc) fn name_to_proto(name: &DnsName, status: &NameStatus) -> v1::ResolvedName {
    let NameStatus { resolution, answered, error } = status;
    let found = resolution.addresses();
    let state = match **resolution {
        Resolution::Unavailable => State::Unavailable,
        Resolution::NxDomain => State::NxDomain,
        Resolution::Addresses(_) => State::Resolved,
    };
    v1::ResolvedName {
        name: name.to_string(),
        state: state.into(),
        addresses: found.map(|found| found.iter().map(|ip| ip.to_string()).collect()).unwrap_or_default(),
        ttl: found.map_or(0, |found| found.ttl),
        answered: answered.map(timestamp),
        error: error.as_deref().unwrap_or_default().to_owned(),
    }
}

/// How the lookups of a name stand, as the server says.
pub(in crate::grpc) fn name_from_proto(message: v1::ResolvedName) -> Result<(DnsName, NameStatus), ClientError> {
    let v1::ResolvedName { name, state, addresses, ttl, answered, error } = message;
    let invalid = |what: &str| ClientError::InvalidResponse(format!("{what} of a name"));
    let parsed = DnsName::parse(&name).map_err(|_| invalid("the text"))?;
    let addresses = addresses.iter().map(|ip| ip.parse().map_err(|_| invalid("an address")));
    let addresses: Vec<IpAddr> = addresses.collect::<Result<_, _>>()?;
    let resolution = match State::try_from(state) {
        Ok(State::NxDomain) => Resolution::NxDomain,
        Ok(State::Resolved) => Resolution::Addresses(ResolvedAddresses::new(addresses, ttl)),
        // A state of a later version is not one that this one knows to be good.
        _ => Resolution::Unavailable,
    };
    let answered = answered.map(|at| millis(Some(at)));
    let error = (!error.is_empty()).then(|| error.into());
    Ok((parsed, NameStatus { resolution: Arc::new(resolution), answered, error }))
}

/// The service as one message, of unbounded size.
pub(in crate::grpc) fn service_to_proto(key: &ServiceKey, service: &Service) -> v1::Service {
    instances_to_proto(key, service, service.created(), 0, service.instances.len())
}

/// At most [`MAX_INSTANCES_PER_MESSAGE`] instances of the service, from the one at `rank` on.
pub(in crate::grpc) fn service_part(
    key: &ServiceKey,
    service: &Service,
    created: Option<UnixMillis>,
    rank: usize,
) -> v1::Service {
    instances_to_proto(key, service, created, rank, MAX_INSTANCES_PER_MESSAGE)
}

fn instances_to_proto(
    key: &ServiceKey,
    service: &Service,
    created: Option<UnixMillis>,
    rank: usize,
    limit: usize,
) -> v1::Service {
    let instances = service.instances.iter_from(rank).take(limit);
    v1::Service {
        namespace: key.namespace().to_owned(),
        name: key.name().to_owned(),
        instances: instances.map(|instance| instance_to_proto(instance)).collect(),
        generation: service.generation,
        created: created.map(timestamp),
    }
}

/// A change as a message, without its cursor.
pub(in crate::grpc) fn change_to_proto(
    service: &ServiceKey,
    change: &InstanceChange,
    generation: u64,
    timeline: Timeline,
) -> v1::Change {
    let (kind, instance) = match (&change.before, &change.after) {
        (None, after) => (v1::change::Kind::Added, after),
        (Some(_), after @ Some(_)) => (v1::change::Kind::Updated, after),
        (before @ Some(_), None) => (v1::change::Kind::Removed, before),
    };
    let Timeline { received, durable, visible, acknowledged } = timeline;
    v1::Change {
        kind: kind.into(),
        namespace: service.namespace().to_owned(),
        service: service.name().to_owned(),
        instance: instance.as_deref().map(instance_to_proto),
        generation,
        timeline: Some(v1::Timeline {
            received: Some(timestamp(received)),
            durable: Some(timestamp(durable)),
            visible: Some(timestamp(visible)),
            acknowledged: Some(timestamp(acknowledged)),
        }),
    }
}

/// The key of a service in a response.
fn key_from_proto(namespace: &str, name: &str) -> Result<ServiceKey, ClientError> {
    invariants::parse_service(namespace, name).map_err(|err| ClientError::InvalidResponse(err.to_string()))
}

/// A service in a response, or a part of one.
pub(in crate::grpc) fn service_from_proto(service: v1::Service) -> Result<(ServiceKey, Service), ClientError> {
    let key = key_from_proto(&service.namespace, &service.name)?;
    let instances = service.instances.into_iter().map(|instance| instance_from_proto(&key, instance).map(Arc::new));
    let instances = instances.collect::<Result<_, _>>()?;
    Ok((key, Service { instances, generation: service.generation }))
}

/// A change in a response.
pub(in crate::grpc) fn change_from_proto(change: v1::Change, cursor: Vec<u8>) -> Result<WatchEvent, ClientError> {
    let kind = match v1::change::Kind::try_from(change.kind) {
        Ok(v1::change::Kind::Added) => ChangeKind::Added,
        Ok(v1::change::Kind::Updated) => ChangeKind::Updated,
        Ok(v1::change::Kind::Removed) => ChangeKind::Removed,
        // Not skipped as an unknown event is: whoever misses a change shows an instance that is not as it was
        // registered.
        Ok(v1::change::Kind::Unspecified) | Err(_) => {
            return Err(ClientError::InvalidResponse(format!("a change of kind {}", change.kind)));
        }
    };
    let service = key_from_proto(&change.namespace, &change.service)?;
    let instance =
        change.instance.ok_or_else(|| ClientError::InvalidResponse("a change without an instance".into()))?;
    let instance = Arc::new(instance_from_proto(&service, instance)?);
    let v1::Timeline { received, durable, visible, acknowledged } = change.timeline.unwrap_or_default();
    let timeline = Timeline {
        received: millis(received),
        durable: millis(durable),
        visible: millis(visible),
        acknowledged: millis(acknowledged),
    };
    Ok(WatchEvent::Change { kind, service, instance, generation: change.generation, timeline, cursor })
}

fn instance_from_proto(service: &ServiceKey, instance: v1::Instance) -> Result<Instance, ClientError> {
    let unreadable =
        |err: &dyn std::fmt::Display| ClientError::InvalidResponse(format!("an instance of {service}: {err}"));
    let mut ports = Vec::with_capacity(instance.ports.len());
    for port in instance.ports {
        let protocol = protocol_from_proto(port.protocol)
            .ok_or_else(|| unreadable(&format_args!("the protocol {} is unknown", port.protocol)))?;
        ports.push(PortSpec { number: port.port.into(), protocol, name: port.name });
    }
    let spec = InstanceSpec {
        address: instance.address,
        ports,
        host_name: instance.host_name,
        node_name: instance.node_name,
        weight: Some(instance.weight),
        priority: u16::try_from(instance.priority).map_err(|err| unreadable(&err))?,
    };
    let registrant = RegistrantPool::default().get(&instance.registrant).map_err(|err| unreadable(&err))?;
    let read = spec.to_instance(millis(instance.registered)).map_err(|err| unreadable(&err))?;
    Ok(read.with_ready(instance.ready).with_registrant(registrant))
}
