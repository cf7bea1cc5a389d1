//! What the frames carry: the records as protobuf, version 1, and how they become the model's.
//!
//! These types are apart from the model's, and stay as they are when the model moves on. What is
//! read goes through the model's door again, so that nothing stored can be what nothing could
//! register. A field or a kind of record that is not known here was written by a later version;
//! protobuf would skip it, and a compaction would then lose it, so it is refused. A later version
//! that adds one raises no number for it: its records tell.

use std::sync::Arc;

use prost::Message;

use super::Record;
use crate::model::{
    Instance, InstanceId, InstanceSpec, PortSet, PortSpec, Protocol, ServiceKey, UnixMillis, Validator,
};

/// The payload of a frame.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Payload {
    #[prost(message, repeated, tag = "1")]
    pub(super) entries: Vec<Entry>,
}

impl Payload {
    /// Reads a payload whose checksum was right.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, Unreadable> {
        let payload = Self::decode(bytes).map_err(|err| Unreadable::Invalid(err.to_string()))?;
        // protobuf skips fields that it does not know. We write every known one in one way only,
        // so what was skipped is missing in the length.
        if payload.encoded_len() != bytes.len() {
            return Err(Unreadable::Newer("a record of a kind, or with a field, that is not known here".into()));
        }
        Ok(payload)
    }
}

/// One record.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Entry {
    #[prost(oneof = "Change", tags = "1, 2, 3, 4")]
    change: Option<Change>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Change {
    #[prost(message, tag = "1")]
    Put(Put),
    #[prost(message, tag = "2")]
    Remove(Remove),
    #[prost(message, tag = "3")]
    Mirrored(Mirrored),
    #[prost(message, tag = "4")]
    Term(Term),
}

/// An instance stands so.
#[derive(Clone, PartialEq, Message)]
struct Put {
    #[prost(string, tag = "1")]
    namespace: String,
    #[prost(string, tag = "2")]
    service: String,
    /// An IP address or a DNS name, as the model writes it.
    #[prost(string, tag = "3")]
    address: String,
    /// In the model's order.
    #[prost(message, repeated, tag = "4")]
    ports: Vec<Port>,
    #[prost(string, tag = "5")]
    host_name: String,
    #[prost(string, tag = "6")]
    node_name: String,
    /// Always what it is: absent means 0, not 1.
    #[prost(float, tag = "7")]
    weight: f32,
    #[prost(uint32, tag = "8")]
    priority: u32,
    /// Milliseconds since 1970-01-01 UTC.
    #[prost(uint64, tag = "9")]
    registered: u64,
    /// The generation since which Kubernetes lacks it; 0 when Kubernetes has it. Absent means
    /// since the generation of the frame: so it is in a segment, and in a snapshot that was made
    /// without the outbox.
    #[prost(uint64, optional, tag = "10")]
    since: Option<u64>,
}

/// An instance is gone.
#[derive(Clone, PartialEq, Message)]
struct Remove {
    #[prost(string, tag = "1")]
    namespace: String,
    #[prost(string, tag = "2")]
    service: String,
    #[prost(string, tag = "3")]
    address: String,
    /// In the model's order, without names.
    #[prost(message, repeated, tag = "4")]
    ports: Vec<Port>,
    /// As in `Put`. A snapshot holds it only as long as Kubernetes lacks it.
    #[prost(uint64, optional, tag = "5")]
    since: Option<u64>,
}

/// Kubernetes has everything of a service up to a generation. Only in segments: a snapshot has
/// drawn the consequences.
#[derive(Clone, PartialEq, Message)]
struct Mirrored {
    #[prost(string, tag = "1")]
    namespace: String,
    #[prost(string, tag = "2")]
    service: String,
    #[prost(uint64, tag = "3")]
    generation: u64,
}

/// The term from here on.
#[derive(Clone, PartialEq, Message)]
struct Term {
    #[prost(uint64, tag = "1")]
    term: u64,
}

#[derive(Clone, PartialEq, Message)]
struct Port {
    #[prost(uint32, tag = "1")]
    number: u32,
    /// 0 TCP, 1 UDP, 2 SCTP.
    #[prost(uint32, tag = "2")]
    protocol: u32,
    #[prost(string, tag = "3")]
    name: String,
}

/// Why a payload or an entry with a right checksum was not taken.
#[derive(Debug, PartialEq)]
pub(super) enum Unreadable {
    /// It is nothing this program would write.
    Invalid(String),
    /// A later version wrote it.
    Newer(String),
}

impl From<&Record> for Entry {
    fn from(record: &Record) -> Self {
        let change = match record {
            Record::Put { service, instance } => Change::Put(Put::new(service, instance)),
            Record::Remove { service, id } => Change::Remove(Remove {
                namespace: service.namespace().into(),
                service: service.name().into(),
                address: id.address.to_string(),
                ports: id.ports.as_slice().iter().map(|&(protocol, number)| Port::new(protocol, number, "")).collect(),
                since: None,
            }),
            Record::Mirrored { service, generation } => Change::Mirrored(Mirrored {
                namespace: service.namespace().into(),
                service: service.name().into(),
                generation: *generation,
            }),
            Record::Term { term } => Change::Term(Term { term: *term }),
        };
        Self { change: Some(change) }
    }
}

impl Put {
    fn new(service: &ServiceKey, instance: &Instance) -> Self {
        let port = |port: &crate::model::Port| {
            Port::new(port.protocol, port.number, port.name.as_ref().map_or("", |name| name.as_str()))
        };
        Self {
            namespace: service.namespace().into(),
            service: service.name().into(),
            address: instance.address().to_string(),
            ports: instance.ports().as_slice().iter().map(port).collect(),
            host_name: instance.host_name().map_or_else(String::new, |name| name.as_str().into()),
            node_name: instance.node_name().map_or_else(String::new, |name| name.as_str().into()),
            weight: instance.weight().get(),
            priority: instance.priority().into(),
            registered: instance.registered().0,
            since: None,
        }
    }
}

impl Port {
    fn new(protocol: Protocol, number: u16, name: &str) -> Self {
        let protocol = match protocol {
            Protocol::Tcp => 0,
            Protocol::Udp => 1,
            Protocol::Sctp => 2,
        };
        Self { number: number.into(), protocol, name: name.into() }
    }

    fn protocol(&self) -> Result<Protocol, Unreadable> {
        match self.protocol {
            0 => Ok(Protocol::Tcp),
            1 => Ok(Protocol::Udp),
            2 => Ok(Protocol::Sctp),
            other => Err(Unreadable::Newer(format!("protocol {other} of a port"))),
        }
    }
}

impl Entry {
    /// Adds it to a payload that is being written.
    pub(super) fn append_to(&self, payload: &mut Vec<u8>) {
        // Field 1 of `Payload`, length-delimited: written one by one, so that a batch needs no
        // list of all its entries.
        payload.push(1 << 3 | 2);
        self.encode_length_delimited(payload).expect("a Vec grows");
    }

    /// What it is about.
    pub(super) fn subject(&self) -> Subject {
        match &self.change {
            Some(Change::Put(_) | Change::Remove(_)) => Subject::Instance,
            Some(Change::Mirrored(mirrored)) => Subject::Mirrored { generation: mirrored.generation },
            Some(Change::Term(term)) => Subject::Term { term: term.term },
            None => Subject::Nothing,
        }
    }

    /// The same for every entry about one instance, and different for any other. Snapshots are in
    /// the order of these octets. That of a `Mirrored` is what the keys of its service's
    /// instances, and no others, begin with.
    pub(super) fn key(&self) -> Vec<u8> {
        let (namespace, service, address, ports) = match &self.change {
            Some(Change::Put(put)) => (&put.namespace, &put.service, &put.address, &put.ports),
            Some(Change::Remove(remove)) => (&remove.namespace, &remove.service, &remove.address, &remove.ports),
            Some(Change::Mirrored(mirrored)) => return key_of_service(&mirrored.namespace, &mirrored.service),
            // Behind every name.
            Some(Change::Term(_)) => return vec![0xFF],
            None => return Vec::new(),
        };
        let mut key = key_of_service(namespace, service);
        key.reserve_exact(address.len() + 1 + 3 * ports.len());
        key.extend_from_slice(address.as_bytes());
        key.push(0);
        for port in ports {
            let [.., high, low] = port.number.to_be_bytes();
            key.extend_from_slice(&[port.protocol.to_le_bytes()[0], high, low]);
        }
        key
    }

    /// Whether it says that an instance is gone.
    pub(super) fn removes(&self) -> bool {
        matches!(self.change, Some(Change::Remove(_)))
    }

    /// Since which generation Kubernetes lacks what it says, in a frame of `generation`; 0 when it
    /// lacks nothing.
    pub(super) fn since(&self, generation: u64) -> u64 {
        match &self.change {
            Some(Change::Put(Put { since, .. }) | Change::Remove(Remove { since, .. })) => since.unwrap_or(generation),
            _ => 0,
        }
    }

    /// Notes that generation, or with `None` that nobody wants to know.
    pub(super) fn set_since(&mut self, generation: Option<u64>) {
        if let Some(Change::Put(Put { since, .. }) | Change::Remove(Remove { since, .. })) = &mut self.change {
            *since = generation;
        }
    }
}

/// What the key of every instance of a service begins with.
fn key_of_service(namespace: &str, service: &str) -> Vec<u8> {
    let mut key = Vec::with_capacity(namespace.len() + service.len() + 2);
    for text in [namespace, service] {
        key.extend_from_slice(text.as_bytes());
        key.push(0); // no name holds one
    }
    key
}

/// What an entry is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subject {
    /// An instance, which stands or is gone.
    Instance,
    /// A service, of which Kubernetes has everything up to this generation.
    Mirrored { generation: u64 },
    /// The term.
    Term { term: u64 },
    /// Nothing that this program would write.
    Nothing,
}

/// Turns entries into records of the model.
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// The last service met: neighbours in a snapshot share it.
    service: Option<ServiceKey>,
}

impl Reader {
    /// What was once let in at the door, whatever zone and options that was with.
    const VALIDATOR: Validator = Validator { zone_wire_len: 1, names_allowed: true };

    pub(super) fn record(&mut self, entry: Entry) -> Result<Record, Unreadable> {
        let invalid = |err: &dyn std::fmt::Display| Unreadable::Invalid(err.to_string());
        match entry.change {
            Some(Change::Put(put)) => {
                let service = self.service(&put.namespace, &put.service)?;
                let mut ports = Vec::with_capacity(put.ports.len());
                for port in put.ports {
                    let protocol = port.protocol()?;
                    ports.push(PortSpec { number: port.number.into(), protocol, name: port.name });
                }
                let priority = u16::try_from(put.priority).map_err(|_| invalid(&"priority above 65535"))?;
                let spec = InstanceSpec {
                    address: put.address,
                    ports,
                    host_name: put.host_name,
                    node_name: put.node_name,
                    weight: Some(put.weight),
                    priority,
                };
                let instance = Self::VALIDATOR.instance(&service, &spec, UnixMillis(put.registered));
                Ok(Record::Put { service, instance: Arc::new(instance.map_err(|err| invalid(&err))?) })
            }
            Some(Change::Remove(remove)) => {
                let service = self.service(&remove.namespace, &remove.service)?;
                let address = Self::VALIDATOR.address(&remove.address).map_err(|err| invalid(&err))?;
                let mut ports = Vec::with_capacity(remove.ports.len());
                for port in remove.ports {
                    match u16::try_from(port.number) {
                        Ok(number @ 1..) => ports.push((port.protocol()?, number)),
                        _ => return Err(invalid(&format_args!("port {}", port.number))),
                    }
                }
                Ok(Record::Remove { service, id: InstanceId { address, ports: PortSet::new(ports) } })
            }
            Some(Change::Mirrored(Mirrored { namespace, service, generation })) => {
                Ok(Record::Mirrored { service: self.service(&namespace, &service)?, generation })
            }
            Some(Change::Term(Term { term })) => Ok(Record::Term { term }),
            None => Err(invalid(&"an empty record")),
        }
    }

    fn service(&mut self, namespace: &str, name: &str) -> Result<ServiceKey, Unreadable> {
        if let Some(last) = &self.service
            && last.name() == name
            && last.namespace() == namespace
        {
            return Ok(last.clone());
        }
        let key = Self::VALIDATOR.service(namespace, name).map_err(|err| Unreadable::Invalid(err.to_string()))?;
        self.service = Some(key.clone());
        Ok(key)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::frame::{FRAME_LEN, Frame, FrameBuffer, Kind, Place};

    fn label() -> impl Strategy<Value = String> {
        "[a-z]([a-z0-9-]{0,20}[a-z0-9])?"
    }

    fn address() -> impl Strategy<Value = String> {
        prop_oneof![
            (1..=126u8, any::<[u8; 3]>()).prop_map(|(a, [b, c, d])| format!("{a}.{b}.{c}.{d}")),
            any::<[u16; 7]>().prop_map(|rest| {
                let [b, c, d, e, f, g, h] = rest;
                std::net::Ipv6Addr::new(0x2001, b, c, d, e, f, g, h).to_string()
            }),
            (label(), label()).prop_map(|(host, domain)| format!("{host}.{domain}.com")),
        ]
    }

    prop_compose! {
        fn spec()(
            address in address(),
            ports in prop::collection::btree_map((0..3usize, 1..=65_535u16), label(), 0..6),
            host_name in prop_oneof![Just(String::new()), label()],
            node_name in prop_oneof![Just(String::new()), label()],
            weight in prop_oneof![Just(None), (0.0..=655.0f32).prop_map(Some)],
            priority in any::<u16>(),
        ) -> InstanceSpec {
            let ports = ports.into_iter().enumerate().map(|(index, ((protocol, number), name))| PortSpec {
                number: number.into(),
                protocol: Protocol::ALL[protocol],
                // Unique, and one without a name.
                name: if index == 0 { String::new() } else { format!("{name}{index}") },
            });
            InstanceSpec { address, ports: ports.collect(), host_name, node_name, weight, priority }
        }
    }

    prop_compose! {
        fn record()(
            (namespace, name) in (label(), label()),
            spec in spec(),
            registered in any::<u64>(),
            kind in 0..6u8,
        ) -> Option<Record> {
            let service = Reader::VALIDATOR.service(&namespace, &name).expect("labels");
            let instance = Reader::VALIDATOR.instance(&service, &spec, UnixMillis(registered)).ok()?;
            Some(match kind {
                0 => Record::Term { term: registered },
                1 => Record::Mirrored { service, generation: registered },
                2 | 3 => Record::Remove { service, id: instance.id() },
                _ => Record::Put { service, instance: Arc::new(instance) },
            })
        }
    }

    const PLACE: Place = Place { kind: Kind::Journal, number: 3 };

    proptest! {
        #[test]
        fn records_are_read_back_as_they_were(
            records in prop::collection::vec(record(), 0..20),
            generation in any::<u64>(),
            offset in any::<u64>(),
            since in prop::option::of(any::<u64>()),
        ) {
            let records: Vec<Record> = records.into_iter().flatten().collect();
            let mut buffer = FrameBuffer::new();
            for record in &records {
                let mut entry = Entry::from(record);
                prop_assert_eq!(entry.subject() == Subject::Instance, entry.since(7) == 7);
                entry.set_since(since);
                buffer.push(&entry);
            }
            let frame = Frame { more: true, end: false, unknown_flags: 0, generation, synced: 7 };
            let bytes = buffer.seal(&frame, PLACE, offset).to_vec();
            prop_assert_eq!(Frame::claimed(&bytes), Some(bytes.len() - FRAME_LEN));
            prop_assert_eq!(Frame::decode(&bytes, PLACE, offset), Some(frame));
            prop_assert_eq!(Frame::decode(&bytes, PLACE, offset ^ 1), None);
            prop_assert_eq!(Frame::decode(&bytes, Place::journal(4), offset), None);
            prop_assert_eq!(Frame::decode(&bytes, Place::snapshot(3), offset), None);
            let payload = Payload::read(&bytes[FRAME_LEN..]).expect("just written");
            for entry in payload.entries.iter().filter(|entry| entry.subject() == Subject::Instance) {
                prop_assert_eq!(entry.since(generation), since.unwrap_or(generation));
            }
            let mut reader = Reader::default();
            let read: Result<Vec<Record>, Unreadable> =
                payload.entries.into_iter().map(|entry| reader.record(entry)).collect();
            prop_assert_eq!(read, Ok(records));
        }

        #[test]
        fn a_key_is_that_of_the_instance(one in record(), other in record()) {
            let id = |record: &Record| match record {
                Record::Put { service, instance } => Some((service.clone(), instance.id())),
                Record::Remove { service, id } => Some((service.clone(), id.clone())),
                Record::Mirrored { .. } | Record::Term { .. } => None,
            };
            let (Some(one), Some(other)) = (one, other) else { return Ok(()) };
            let (key, other_key) = (Entry::from(&one).key(), Entry::from(&other).key());
            if let (Some(one), Some(other)) = (id(&one), id(&other)) {
                prop_assert_eq!(key == other_key, one == other);
                let (service, id) = one;
                prop_assert_eq!(&key, &Entry::from(&Record::Remove { service, id }).key());
            }
            if let (Some((instance_of, _)), Record::Mirrored { service, .. }) = (id(&one), &other) {
                prop_assert_eq!(key.starts_with(&other_key), instance_of == *service);
                let own = Entry::from(&Record::Mirrored { service: instance_of, generation: 0 }).key();
                prop_assert!(key.starts_with(&own));
            }
            if let (Some(_), Record::Term { .. }) = (id(&one), &other) {
                prop_assert!(key < other_key);
            }
        }

        #[test]
        fn any_octets_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(payload) = Payload::read(&bytes) {
                let mut reader = Reader::default();
                payload.entries.into_iter().for_each(|entry| drop(reader.record(entry)));
            }
        }
    }
}
