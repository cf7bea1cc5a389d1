//! Protobuf ↔ model. Invalid registrations are refused here or by [`Validator`], with the field and the
//! reason. Behind this module there are no unchecked texts.
//!
//! A removal uses only the fields that identify an instance: `namespace`, `service_name`, `ipaddress`,
//! and the numbers and protocols of `ports`. Other attributes (names, weight, priority) are not even
//! checked, so that the message that registered an instance also removes it. Reserved fields are refused
//! in both.

mod discovery;
mod handover;
mod replica;
mod response;

use std::sync::Arc;

pub(super) use discovery::{
    MAX_INSTANCES_PER_MESSAGE, change_from_proto, change_to_proto, name_from_proto, name_to_proto, protocol_from_proto,
    service_from_proto, service_part, service_to_proto,
};
pub(super) use handover::{word_from_proto, word_to_proto};
pub(super) use replica::{replica_from_proto, replica_to_proto};
pub(super) use response::{Refusal, ResponseBuilder, response_status};

use super::proto::registry::{
    Health, NamedPort, Protocol as WireProtocol, RegistrationMsg, RegistrationResponse, RegistrationResult,
    RegistrationType, ServiceInfo,
};
use crate::{
    model::{
        InstanceSpec, MAX_INSTANCE_BYTES, PortError, PortSet, PortSpec, Protocol, ServiceKey, UnixMillis, Validator,
        invariants,
    },
    registry::{Command, Requester},
};

/// Most bytes of a `request_id`, which is only echoed.
const MAX_REQUEST_ID: usize = 128;

/// Most ports in a message: each takes at least 12 of the bytes of an instance. The limit bounds the
/// search for duplicate ports, which is quadratic.
const MAX_PORTS: usize = MAX_INSTANCE_BYTES / 12;

/// Longest `status_details` in bytes; longer texts are cut.
const MAX_DETAILS: usize = 512;

/// Bytes of the structs of a message and of one port, beyond their texts.
const MESSAGE_BYTES: usize = 256;
const PORT_BYTES: usize = 128;

/// Why a message is invalid: `field: reason`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct InvalidMessage(String);

impl InvalidMessage {
    fn new(text: &dyn std::fmt::Display) -> Self {
        let mut text = text.to_string();
        shorten(&mut text, MAX_DETAILS);
        Self(text)
    }

    fn unsupported(field: &dyn std::fmt::Display) -> Self {
        Self(format!("{field}: not supported yet; leave it out"))
    }
}

/// Cuts `text` to `most` bytes at the border of a character, and shows that it was cut.
fn shorten(text: &mut String, most: usize) {
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most.saturating_sub('…'.len_utf8())));
        text.push('…');
    }
}

/// The stream's message with the content of a unary call. Destructured, so that a new field does not
/// compile until it is copied.
pub(super) fn message(kind: RegistrationType, info: ServiceInfo) -> RegistrationMsg {
    let ServiceInfo {
        namespace,
        service_name,
        host_name,
        ipaddress,
        node_name,
        ports,
        weight,
        request_id,
        ttl,
        priority,
        metadata,
        methods,
        topology_zone,
        checks,
        health,
    } = info;
    RegistrationMsg {
        r#type: kind.into(),
        namespace,
        service_name,
        host_name,
        ipaddress,
        node_name,
        ports,
        weight,
        request_id,
        ttl,
        priority,
        metadata,
        methods,
        topology_zone,
        checks,
        health,
    }
}

/// The result of a unary call with the content of the stream's response.
pub(super) fn result(response: RegistrationResponse) -> RegistrationResult {
    let RegistrationResponse {
        r#type: _,
        namespace,
        service_name,
        ipaddress,
        ports,
        status,
        status_details,
        request_id,
        generation,
    } = response;
    RegistrationResult { namespace, service_name, ipaddress, ports, status, status_details, request_id, generation }
}

/// Upper estimate of the bytes of memory that a message takes until it is answered.
pub(super) fn bytes(message: &RegistrationMsg) -> usize {
    let texts = [
        &message.namespace,
        &message.service_name,
        &message.host_name,
        &message.ipaddress,
        &message.node_name,
        &message.request_id,
    ];
    let texts: usize = texts.into_iter().map(String::len).sum();
    let ports: usize = message.ports.iter().map(|port| port.name.len() + PORT_BYTES).sum();
    // Twice, because both the response and the command have the fields that identify the instance.
    MESSAGE_BYTES + 2 * texts + ports
}

/// Splits a message into the builder of its response and the command, or the reason why it is invalid.
pub(super) fn parse(
    message: RegistrationMsg,
    validator: &Validator,
    now: UnixMillis,
    by: Requester,
) -> (ResponseBuilder, Result<Command, InvalidMessage>) {
    let invalid = reserved(&message).err();
    let RegistrationMsg {
        r#type: kind,
        namespace,
        service_name,
        host_name,
        ipaddress,
        node_name,
        ports,
        weight,
        mut request_id,
        priority,
        ..
    } = message;

    // Before anything else that is wrong: the response repeats the id, so it must be cut in every case.
    let too_long = request_id.len() > MAX_REQUEST_ID;
    let invalid = if too_long {
        let length = request_id.len();
        shorten(&mut request_id, MAX_REQUEST_ID);
        Some(InvalidMessage(format!("request_id: must have at most {MAX_REQUEST_ID} bytes, got {length}")))
    } else {
        invalid
    };
    // Made first: a message that is refused gets its response with the fields that identify it.
    let mut response = ResponseBuilder { kind, namespace, service_name, ipaddress, ports, request_id };
    if let Some(invalid) = invalid {
        return (response, Err(invalid));
    }
    let command = match RegistrationType::try_from(kind) {
        Ok(RegistrationType::Register) => {
            let rest = InstanceSpec { host_name, node_name, weight, ..InstanceSpec::default() };
            register(&mut response, rest, priority, validator, now, by)
        }
        Ok(RegistrationType::Unregister) => unregister(&response, by),
        Ok(later @ (RegistrationType::Heartbeat | RegistrationType::Drain)) => {
            Err(InvalidMessage(format!("type: {} is not supported yet", later.as_str_name())))
        }
        Err(_) => Err(InvalidMessage(format!("type: {kind} is none; REGISTER is 0 and UNREGISTER 1"))),
    };
    (response, command)
}

/// Refuses reserved fields that are set. They have no effect yet, and a client must not take a field that
/// is ignored for one that works.
fn reserved(message: &RegistrationMsg) -> Result<(), InvalidMessage> {
    let set = [
        (message.ttl.is_some(), "ttl"),
        (!message.metadata.is_empty(), "metadata"),
        (!message.methods.is_empty(), "methods"),
        (!message.topology_zone.is_empty(), "topology_zone"),
        (!message.checks.is_empty(), "checks"),
        (message.health != i32::from(Health::Unspecified), "health"),
    ];
    if let Some((_, field)) = set.iter().find(|(set, _)| *set) {
        return Err(InvalidMessage::unsupported(field));
    }
    if let Some(index) = message.ports.iter().position(|port| !port.app_protocol.is_empty()) {
        return Err(InvalidMessage::unsupported(&format_args!("ports[{index}].app_protocol")));
    }
    Ok(())
}

fn register(
    response: &mut ResponseBuilder,
    rest: InstanceSpec,
    priority: u32,
    validator: &Validator,
    now: UnixMillis,
    by: Requester,
) -> Result<Command, InvalidMessage> {
    let service = service(response, validator)?;
    let priority = u16::try_from(priority)
        .map_err(|_| InvalidMessage(format!("priority: must be 0..=65535 (RFC 2782), got {priority}")))?;
    let protocols = protocols(&response.ports)?;

    // The texts move into the spec for its check, and back into the response: no text is copied.
    let ports = response.ports.iter_mut().zip(protocols).map(|(port, protocol)| PortSpec {
        number: port.port.into(),
        protocol,
        name: std::mem::take(&mut port.name),
    });
    let spec =
        InstanceSpec { address: std::mem::take(&mut response.ipaddress), ports: ports.collect(), priority, ..rest };
    let instance = validator.instance(&service, &spec, now).map_err(|err| InvalidMessage::new(&err));
    response.ipaddress = spec.address;
    for (port, lent) in response.ports.iter_mut().zip(spec.ports) {
        port.name = lent.name;
    }
    Ok(Command::Register { service, instance: Arc::new(instance?), by })
}

/// Checks the invariants only, not the policy: an instance that an earlier version or another zone
/// admitted can be removed.
fn unregister(response: &ResponseBuilder, by: Requester) -> Result<Command, InvalidMessage> {
    let service = invariants::parse_service(&response.namespace, &response.service_name)
        .map_err(|err| InvalidMessage::new(&err))?;
    let address = invariants::parse_address(&response.ipaddress).map_err(|err| InvalidMessage::new(&err))?;
    let protocols = protocols(&response.ports)?;
    let mut pairs = Vec::with_capacity(response.ports.len());
    for (index, (port, protocol)) in response.ports.iter().zip(protocols).enumerate() {
        match u16::try_from(port.port) {
            Ok(0) | Err(_) => {
                return Err(InvalidMessage(format!("ports[{index}]: {}", PortError::Number(port.port.into()))));
            }
            Ok(number) => pairs.push((protocol, number)),
        }
    }
    Ok(Command::Unregister { service, address, ports: PortSet::new(pairs), by })
}

fn service(response: &ResponseBuilder, validator: &Validator) -> Result<ServiceKey, InvalidMessage> {
    validator.service(&response.namespace, &response.service_name).map_err(|err| InvalidMessage::new(&err))
}

fn protocols(ports: &[NamedPort]) -> Result<Vec<Protocol>, InvalidMessage> {
    if ports.len() > MAX_PORTS {
        return Err(InvalidMessage(format!("ports: {} given, an instance carries at most {MAX_PORTS}", ports.len())));
    }
    let known = |(index, port): (usize, &NamedPort)| {
        protocol_from_proto(port.protocol).ok_or_else(|| {
            InvalidMessage(format!("ports[{index}].protocol: {} is none; TCP is 0, UDP 1, SCTP 2", port.protocol))
        })
    };
    ports.iter().enumerate().map(known).collect()
}

/// A port as a message.
pub(super) fn port_to_proto(number: i64, protocol: Protocol, name: &str) -> NamedPort {
    let protocol = match protocol {
        Protocol::Tcp => WireProtocol::Tcp,
        Protocol::Udp => WireProtocol::Udp,
        Protocol::Sctp => WireProtocol::Sctp,
    };
    NamedPort {
        // A number that does not fit is not a port either; the server refuses -1.
        port: i32::try_from(number).unwrap_or(-1),
        name: name.to_owned(),
        protocol: protocol.into(),
        app_protocol: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use prost_types::Duration;

    use super::*;
    use crate::{grpc::proto::registry::HealthCheck, registry::Outcome};

    const VALIDATOR: Validator = Validator { zone_wire_len: 15, names_allowed: false };

    fn port(number: i32, name: &str) -> NamedPort {
        NamedPort { port: number, name: name.into(), ..NamedPort::default() }
    }

    fn good() -> RegistrationMsg {
        RegistrationMsg {
            namespace: "prod".into(),
            service_name: "web".into(),
            ipaddress: "10.0.0.1".into(),
            ports: vec![port(8080, "http"), port(9090, "")],
            request_id: "r1".into(),
            ..RegistrationMsg::default()
        }
    }

    fn refusal(message: RegistrationMsg) -> String {
        let (response, command) = parse(message, &VALIDATOR, UnixMillis(1), Requester::Unrestricted);
        let response = response.refused(command.expect_err("must be refused").into());
        assert_eq!(response.status, 400);
        assert_eq!(response.generation, 0);
        response.status_details
    }

    #[test]
    fn registration_becomes_a_command_and_is_echoed() {
        let (response, command) = parse(
            RegistrationMsg { ipaddress: "10.0.0.1".into(), ..good() },
            &VALIDATOR,
            UnixMillis(7),
            Requester::Unrestricted,
        );
        let Ok(Command::Register { service, instance, by: _ }) = command else { panic!("{command:?}") };
        assert_eq!(service.to_string(), "prod/web");
        assert_eq!(instance.id().to_string(), "10.0.0.1:8080,9090");
        assert_eq!(instance.registered(), UnixMillis(7));
        let response = response.completed(Outcome::Created, 42, true);
        let expected = RegistrationResponse {
            namespace: "prod".into(),
            service_name: "web".into(),
            ipaddress: "10.0.0.1".into(),
            ports: good().ports,
            status: 201,
            request_id: "r1".into(),
            generation: 42,
            ..RegistrationResponse::default()
        };
        assert_eq!(response, expected);
    }

    #[test]
    fn each_refusal_names_its_field() {
        let health_check = HealthCheck::default();
        for (bad, expected) in [
            (RegistrationMsg { namespace: "Prod".into(), ..good() }, "namespace: must consist of"),
            (RegistrationMsg { namespace: String::new(), ..good() }, "namespace: must not be empty"),
            (RegistrationMsg { service_name: "1web".into(), ..good() }, "service_name: must begin with a letter"),
            (RegistrationMsg { host_name: "a.b".into(), ..good() }, "host_name: must be one label"),
            (RegistrationMsg { host_name: "10-0-0-9".into(), ..good() }, "host_name: \"10-0-0-9\" spells"),
            (RegistrationMsg { ipaddress: String::new(), ..good() }, "ipaddress: must not be empty"),
            (
                RegistrationMsg { ipaddress: "::ffff:10.0.0.1".into(), ..good() },
                "ipaddress: ::ffff:10.0.0.1: IPv4-mapp",
            ),
            (
                RegistrationMsg { ipaddress: "db.example.com".into(), ..good() },
                "ipaddress: db.example.com is a DNS name",
            ),
            (RegistrationMsg { node_name: "Node 1".into(), ..good() }, "node_name: must consist of"),
            (RegistrationMsg { ports: vec![port(0, "")], ..good() }, "ports[0]: must be 1..=65535, got 0"),
            (
                RegistrationMsg { ports: vec![port(1, "a"), port(-1, "b")], ..good() },
                "ports[1]: must be 1..=65535, got -1",
            ),
            (RegistrationMsg { ports: vec![port(1, "A")], ..good() }, "ports[0]: name: must consist of"),
            (RegistrationMsg { ports: vec![port(1, ""), port(2, "")], ..good() }, "ports[1]: only one port"),
            (RegistrationMsg { ports: vec![port(1, "a"); 171], ..good() }, "ports: 171 given"),
            (
                RegistrationMsg { ports: vec![NamedPort { protocol: 3, ..port(1, "a") }], ..good() },
                "ports[0].protocol: 3 is none",
            ),
            (
                RegistrationMsg { ports: vec![NamedPort { app_protocol: "h2c".into(), ..port(1, "a") }], ..good() },
                "ports[0].app_protocol: not supported yet",
            ),
            (RegistrationMsg { weight: Some(f32::INFINITY), ..good() }, "weight: must be a finite number"),
            (RegistrationMsg { weight: Some(655.1), ..good() }, "weight: must be a finite number"),
            (RegistrationMsg { priority: 65_536, ..good() }, "priority: must be 0..=65535"),
            (RegistrationMsg { request_id: "x".repeat(129), ..good() }, "request_id: must have at most 128 bytes"),
            (RegistrationMsg { ttl: Some(Duration::default()), ..good() }, "ttl: not supported yet"),
            (
                RegistrationMsg { metadata: [("k".to_owned(), String::new())].into(), ..good() },
                "metadata: not supported yet",
            ),
            (RegistrationMsg { methods: vec![String::new()], ..good() }, "methods: not supported yet"),
            (RegistrationMsg { topology_zone: "a".into(), ..good() }, "topology_zone: not supported yet"),
            (RegistrationMsg { checks: vec![health_check], ..good() }, "checks: not supported yet"),
            (RegistrationMsg { health: Health::Healthy.into(), ..good() }, "health: not supported yet"),
            (RegistrationMsg { health: 77, ..good() }, "health: not supported yet"),
            (RegistrationMsg { r#type: RegistrationType::Heartbeat.into(), ..good() }, "type: HEARTBEAT is not supp"),
            (RegistrationMsg { r#type: RegistrationType::Drain.into(), ..good() }, "type: DRAIN is not supported"),
            (RegistrationMsg { r#type: 9, ..good() }, "type: 9 is none"),
        ] {
            let details = refusal(bad);
            assert!(details.starts_with(expected), "{details:?} should begin with {expected:?}");
        }
    }

    #[test]
    fn long_texts_are_cut_in_the_response() {
        let long = "ä".repeat(30_000);
        for bad in [
            RegistrationMsg { namespace: long.clone(), ..good() },
            RegistrationMsg { service_name: long.clone(), ..good() },
            RegistrationMsg { host_name: long.clone(), ..good() },
            RegistrationMsg { ipaddress: long.clone(), ..good() },
            RegistrationMsg { ipaddress: format!("fe80::1%{long}"), ..good() },
            RegistrationMsg { node_name: long.clone(), ..good() },
            RegistrationMsg { ports: vec![port(1, &long)], ..good() },
        ] {
            let details = refusal(bad);
            assert!(details.len() <= MAX_DETAILS, "{} bytes: {details}", details.len());
        }
        let (response, refused) =
            parse(RegistrationMsg { request_id: long, ..good() }, &VALIDATOR, UnixMillis(1), Requester::Unrestricted);
        let response = response.refused(refused.expect_err("too long").into());
        assert!(response.request_id.len() <= MAX_REQUEST_ID && response.request_id.ends_with('…'));
    }

    #[test]
    fn refused_message_is_echoed() {
        let (response, command) =
            parse(RegistrationMsg { weight: Some(-1.0), ..good() }, &VALIDATOR, UnixMillis(1), Requester::Unrestricted);
        let response = response.refused(command.expect_err("the weight is below 0").into());
        assert_eq!((response.ipaddress.as_str(), response.ports), ("10.0.0.1", good().ports));
    }

    #[test]
    fn removal_uses_only_the_fields_of_identity() {
        let message = RegistrationMsg {
            r#type: RegistrationType::Unregister.into(),
            host_name: "not a label".into(),
            node_name: "NOR THIS".into(),
            weight: Some(f32::NAN),
            priority: u32::MAX,
            ports: vec![port(9090, ""), port(80, ""), port(9090, "UPPER")],
            ..good()
        };
        let (_, command) = parse(message.clone(), &VALIDATOR, UnixMillis(1), Requester::Unrestricted);
        let expected = Command::Unregister {
            service: VALIDATOR.service("prod", "web").expect("valid"),
            address: crate::model::Address::parse("10.0.0.1").expect("valid"),
            ports: PortSet::new(vec![(Protocol::Tcp, 80), (Protocol::Tcp, 9090)]),
            by: Requester::Unrestricted,
        };
        assert_eq!(command, Ok(expected));

        let bad = RegistrationMsg { ports: vec![port(80, ""), port(65_536, "")], ..message.clone() };
        assert_eq!(refusal(bad), "ports[1]: must be 1..=65535, got 65536");
        let bad = RegistrationMsg { ttl: Some(Duration::default()), ..message };
        assert!(refusal(bad).starts_with("ttl: not supported yet"));
    }
}
