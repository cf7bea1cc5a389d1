//! Words that are handed over. Each carries the message of a registration or removal and is parsed as one, so a word that is
//! sent here can be nothing that could not have been registered.

use std::sync::Arc;

use super::{parse, port_to_proto};
use crate::{
    grpc::proto::{
        gangplank::internal::v1::{Stamp as WireStamp, Word},
        registry::{NamedPort, RegistrationMsg, RegistrationType},
    },
    model::{Instance, InstanceId, PortSet, RegistrantPool, Stamp, UnixMillis, Validator},
    registry::{Command, OutboxWord, Requester},
};

/// A word as a message.
pub(in crate::grpc) fn word_to_proto(word: &OutboxWord) -> Word {
    let OutboxWord { service, id, instance, stamp } = word;
    let common = RegistrationMsg {
        namespace: service.namespace().to_owned(),
        service_name: service.name().to_owned(),
        ipaddress: id.address.to_string(),
        ..RegistrationMsg::default()
    };
    let message = match instance {
        Some(instance) => registration(common, instance),
        None => {
            RegistrationMsg { r#type: RegistrationType::Unregister.into(), ports: ports_to_proto(&id.ports), ..common }
        }
    };
    let Stamp { clock, term, generation } = *stamp;
    Word {
        message: Some(Box::new(message)),
        stamp: Some(WireStamp { clock, term, generation }),
        registered_millis: instance.as_ref().map_or(0, |instance| instance.registered().0),
        every_port: id.ports.is_every(),
        registrant: instance
            .as_ref()
            .and_then(|instance| instance.registrant())
            .map_or_else(String::new, ToString::to_string),
    }
}

fn ports_to_proto(ports: &PortSet) -> Vec<NamedPort> {
    let pairs = if ports.is_every() { &[] } else { ports.as_slice() };
    pairs.iter().map(|&(protocol, number)| port_to_proto(number.into(), protocol, "")).collect()
}

fn registration(common: RegistrationMsg, instance: &Instance) -> RegistrationMsg {
    let ports = instance.ports().as_slice().iter();
    let ports = ports.map(|port| {
        let name = port.name.as_ref().map_or("", |name| name.as_str());
        port_to_proto(port.number.into(), port.protocol, name)
    });
    RegistrationMsg {
        r#type: RegistrationType::Register.into(),
        host_name: instance.host_name().map_or_else(String::new, ToString::to_string),
        node_name: instance.node_name().map_or_else(String::new, ToString::to_string),
        weight: Some(instance.weight().get()),
        priority: instance.priority().into(),
        ports: ports.collect(),
        ..common
    }
}

/// The word in a message, or why it is invalid.
pub(in crate::grpc) fn word_from_proto(
    word: Word,
    validator: &Validator,
    now: UnixMillis,
) -> Result<OutboxWord, String> {
    let Word { message, stamp, registered_millis, every_port, registrant } = word;
    let message = message.ok_or("message: must be there")?;
    let WireStamp { clock, term, generation } = stamp.ok_or("stamp: must be there")?;
    let stamp = Stamp { clock, term, generation };
    // Not later than now: a clock that was wrong must not make an instance look younger than it can be.
    let registered = UnixMillis(registered_millis).min(now);
    let registrant = RegistrantPool::default().get(&registrant).map_err(|err| err.to_string())?;
    // The requester does not matter: a word is merged by its stamp.
    match parse(*message, validator, registered, Requester::Unrestricted).1.map_err(|invalid| invalid.0)? {
        Command::Register { service, instance, by: _ } => {
            let instance = Arc::unwrap_or_clone(instance).with_stamp(stamp).with_registrant(registrant);
            Ok(OutboxWord { service, id: instance.id(), instance: Some(Arc::new(instance)), stamp })
        }
        Command::Unregister { service, address, ports, by: _ } => {
            let ports = if every_port { PortSet::every() } else { ports };
            Ok(OutboxWord { service, id: InstanceId { address, ports }, instance: None, stamp })
        }
        Command::SetReady { .. } => Err("type: readiness is not handed over".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::{VALIDATOR, key, spec};

    fn word(removal: bool) -> OutboxWord {
        let stamp = Stamp { clock: 1_700_000_000_000_007, term: 3, generation: 9 };
        let mut spec = spec("10.0.0.1", &["http:80", "dns:53/udp", "9"]);
        (spec.host_name, spec.node_name, spec.weight, spec.priority) = ("one".into(), "node-1".into(), Some(2.5), 7);
        let instance = VALIDATOR.instance(&key("web.prod"), &spec, UnixMillis(5)).expect("valid").with_stamp(stamp);
        let instance = instance.with_registrant(RegistrantPool::default().get("vm-1").expect("valid"));
        let id = instance.id();
        OutboxWord { service: key("web.prod"), id, instance: (!removal).then(|| Arc::new(instance)), stamp }
    }

    #[test]
    fn words_arrive_as_they_were_sent() {
        for removal in [false, true] {
            let sent = word(removal);
            assert_eq!(word_from_proto(word_to_proto(&sent), &VALIDATOR, UnixMillis(6)), Ok(sent));
        }
        for ports in [PortSet::every(), PortSet::default()] {
            let mut sent = word(true);
            sent.id.ports = ports;
            assert_eq!(word_from_proto(word_to_proto(&sent), &VALIDATOR, UnixMillis(6)), Ok(sent));
        }
    }

    #[test]
    fn words_are_checked_like_registrations() {
        let sent = word_to_proto(&word(false));
        let message = *sent.message.clone().expect("it is there");
        let bad = |message: Option<RegistrationMsg>| {
            let word = Word { message: message.map(Box::new), ..sent.clone() };
            word_from_proto(word, &VALIDATOR, UnixMillis(1)).expect_err("bad")
        };
        assert!(bad(None).starts_with("message: "));
        let loopback = RegistrationMsg { ipaddress: "127.0.0.1".into(), ..message.clone() };
        assert!(bad(Some(loopback)).starts_with("ipaddress: 127.0.0.1: loopback"));
        assert!(bad(Some(RegistrationMsg { topology_zone: "a".into(), ..message })).starts_with("topology_zone: "));
        let named = Word { registrant: "a\nb".into(), ..sent.clone() };
        assert!(word_from_proto(named, &VALIDATOR, UnixMillis(1)).expect_err("bad").starts_with("registrant: "));
        let unstamped = Word { stamp: None, ..sent };
        assert!(word_from_proto(unstamped, &VALIDATOR, UnixMillis(1)).expect_err("bad").starts_with("stamp: "));
    }
}
