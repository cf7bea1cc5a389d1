//! The payload of a frame: records as protobuf, version 1, and their conversion to the model.
//!
//! These types are separate from the model's and do not change with it. What is read passes the
//! model's [`invariants`] again, but not the rules for new registrations, which may have become
//! stricter. A field or a kind of record that is not known here was written by a later version;
//! protobuf would skip it and a compaction would then lose it, so it is refused. A later version
//! that adds one does not increase the version number: its records show it.

use std::sync::Arc;

use prost::Message;

use super::{DirectoryTerm, Record};
use crate::model::{
    Instance, InstanceId, InstanceSpec, PortSet, PortSpec, Protocol, RegistrantPool, ServiceKey, Stamp, UnixMillis,
    invariants,
};

/// The payload of a frame.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Payload {
    #[prost(message, repeated, tag = "1")]
    pub(super) entries: Vec<Entry>,
}

impl Payload {
    /// Reads a payload whose checksum matches.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        let payload = Self::decode(bytes).map_err(|err| DecodeError::Invalid(err.to_string()))?;
        // protobuf skips unknown fields. Every known one is encoded in one way only, so the length
        // shows whether something was skipped.
        if payload.encoded_len() != bytes.len() {
            return Err(DecodeError::Newer("a record of a kind, or with a field, that is not known here".into()));
        }
        Ok(payload)
    }
}

/// One record.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Entry {
    #[prost(oneof = "EntryBody", tags = "1, 2, 3, 4, 5")]
    body: Option<EntryBody>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum EntryBody {
    #[prost(message, tag = "1")]
    Put(PutEntry),
    #[prost(message, tag = "2")]
    Remove(RemoveEntry),
    #[prost(message, tag = "3")]
    Mirrored(MirroredEntry),
    #[prost(message, tag = "4")]
    Term(TermEntry),
    #[prost(message, tag = "5")]
    RefuseBefore(RefuseBeforeEntry),
}

/// An instance as it is from here on.
#[derive(Clone, PartialEq, Message)]
struct PutEntry {
    #[prost(string, tag = "1")]
    namespace: String,
    #[prost(string, tag = "2")]
    service: String,
    /// An IP address or a DNS name, in the model's canonical form.
    #[prost(string, tag = "3")]
    address: String,
    /// In the model's order.
    #[prost(message, repeated, tag = "4")]
    ports: Vec<StoredPort>,
    #[prost(string, tag = "5")]
    host_name: String,
    #[prost(string, tag = "6")]
    node_name: String,
    /// Never left out for a default: absent means 0, not 1.
    #[prost(float, tag = "7")]
    weight: f32,
    #[prost(uint32, tag = "8")]
    priority: u32,
    /// Milliseconds since 1970-01-01 UTC.
    #[prost(uint64, tag = "9")]
    registered: u64,
    /// The generation since which it is unmirrored; 0 when Kubernetes has it. Absent means the
    /// generation of the frame: in segments, except for what came from Kubernetes, and in snapshots
    /// that were made without the outbox.
    #[prost(uint64, optional, tag = "10")]
    since: Option<u64>,
    /// Absent in stores from before there were stamps.
    #[prost(message, optional, tag = "11")]
    stamp: Option<StoredStamp>,
    /// A user name. Empty for nobody: in stores from before there were identities, too.
    #[prost(string, tag = "12")]
    registrant: String,
}

/// The removal of an instance.
#[derive(Clone, PartialEq, Message)]
struct RemoveEntry {
    #[prost(string, tag = "1")]
    namespace: String,
    #[prost(string, tag = "2")]
    service: String,
    #[prost(string, tag = "3")]
    address: String,
    /// In the model's order, without names.
    #[prost(message, repeated, tag = "4")]
    ports: Vec<StoredPort>,
    /// As in `PutEntry`. A snapshot holds a removal while it is unmirrored or remembered.
    #[prost(uint64, optional, tag = "5")]
    since: Option<u64>,
    #[prost(message, optional, tag = "6")]
    stamp: Option<StoredStamp>,
}

/// Kubernetes has every change of a service up to a generation. Only in segments: a snapshot has
/// it in the entries of the instances.
#[derive(Clone, PartialEq, Message)]
struct MirroredEntry {
    #[prost(string, tag = "1")]
    namespace: String,
    #[prost(string, tag = "2")]
    service: String,
    #[prost(uint64, tag = "3")]
    generation: u64,
}

/// Removals of a service up to a clock are not remembered any more.
#[derive(Clone, PartialEq, Message)]
struct RefuseBeforeEntry {
    #[prost(string, tag = "1")]
    namespace: String,
    #[prost(string, tag = "2")]
    service: String,
    /// Of the hybrid logical clock, microseconds since 1970-01-01 UTC.
    #[prost(uint64, tag = "3")]
    clock: u64,
}

/// The term under which Kubernetes is written to from here on; 0 after a start without Kubernetes.
#[derive(Clone, PartialEq, Message)]
struct TermEntry {
    #[prost(uint64, tag = "1")]
    term: u64,
    /// Another process has written since under a higher one.
    #[prost(bool, tag = "2")]
    followed: bool,
    /// The highest generation that was published under it, once its process has ended.
    #[prost(uint64, optional, tag = "3")]
    published: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct StoredPort {
    #[prost(uint32, tag = "1")]
    number: u32,
    /// 0 TCP, 1 UDP, 2 SCTP.
    #[prost(uint32, tag = "2")]
    protocol: u32,
    #[prost(string, tag = "3")]
    name: String,
}

/// When a registration or a removal was accepted.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct StoredStamp {
    /// Hybrid logical clock, microseconds since 1970-01-01 UTC.
    #[prost(uint64, tag = "1")]
    clock: u64,
    #[prost(uint64, tag = "2")]
    term: u64,
    #[prost(uint64, tag = "3")]
    generation: u64,
}

impl From<&TermEntry> for DirectoryTerm {
    fn from(&TermEntry { term, followed, published }: &TermEntry) -> Self {
        Self { term, followed, published }
    }
}

impl StoredStamp {
    fn new(stamp: Stamp) -> Option<Self> {
        let Stamp { clock, term, generation } = stamp;
        (stamp != Stamp::default()).then_some(Self { clock, term, generation })
    }
}

impl From<Option<StoredStamp>> for Stamp {
    fn from(stored: Option<StoredStamp>) -> Self {
        stored.map_or_else(Self::default, |StoredStamp { clock, term, generation }| Self { clock, term, generation })
    }
}

/// Why a payload or an entry cannot be used although its checksum matches.
#[derive(Debug, PartialEq)]
pub(super) enum DecodeError {
    /// This program would not write it.
    Invalid(String),
    /// A later version wrote it.
    Newer(String),
}

impl From<&Record> for Entry {
    fn from(record: &Record) -> Self {
        let body = match record {
            Record::Put { service, instance } => EntryBody::Put(PutEntry::new(service, instance)),
            Record::Remove { service, id, stamp } => EntryBody::Remove(RemoveEntry {
                namespace: service.namespace().into(),
                service: service.name().into(),
                address: id.address.to_string(),
                ports: id
                    .ports
                    .as_slice()
                    .iter()
                    .map(|&(protocol, number)| StoredPort::new(protocol, number, ""))
                    .collect(),
                since: None,
                stamp: StoredStamp::new(*stamp),
            }),
            Record::Mirrored { service, generation } => EntryBody::Mirrored(MirroredEntry {
                namespace: service.namespace().into(),
                service: service.name().into(),
                generation: *generation,
            }),
            Record::Term(DirectoryTerm { term, followed, published }) => {
                EntryBody::Term(TermEntry { term: *term, followed: *followed, published: *published })
            }
            Record::RefuseBefore { service, clock } => EntryBody::RefuseBefore(RefuseBeforeEntry {
                namespace: service.namespace().into(),
                service: service.name().into(),
                clock: *clock,
            }),
        };
        Self { body: Some(body) }
    }
}

impl PutEntry {
    fn new(service: &ServiceKey, instance: &Instance) -> Self {
        let port = |port: &crate::model::Port| {
            StoredPort::new(port.protocol, port.number, port.name.as_ref().map_or("", |name| name.as_str()))
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
            stamp: StoredStamp::new(instance.stamp()),
            registrant: instance.registrant().map_or_else(String::new, |registrant| registrant.as_str().into()),
        }
    }
}

impl StoredPort {
    fn new(protocol: Protocol, number: u16, name: &str) -> Self {
        // Fixed by the format, whatever order the model has them in.
        let protocol = match protocol {
            Protocol::Tcp => 0,
            Protocol::Udp => 1,
            Protocol::Sctp => 2,
        };
        Self { number: number.into(), protocol, name: name.into() }
    }

    fn protocol(&self) -> Result<Protocol, DecodeError> {
        match self.protocol {
            0 => Ok(Protocol::Tcp),
            1 => Ok(Protocol::Udp),
            2 => Ok(Protocol::Sctp),
            other => Err(DecodeError::Newer(format!("protocol {other} of a port"))),
        }
    }
}

impl Entry {
    /// Appends the entry to a payload.
    pub(super) fn append_to(&self, payload: &mut Vec<u8>) {
        // Field 1 of `Payload`, length-delimited: entries are encoded one by one, so that a batch
        // needs no list of them.
        payload.push(1 << 3 | 2);
        self.encode_length_delimited(payload).expect("a Vec grows");
    }

    pub(super) fn kind(&self) -> EntryKind {
        match &self.body {
            Some(EntryBody::Put(_) | EntryBody::Remove(_)) => EntryKind::Instance,
            Some(EntryBody::Mirrored(mirrored)) => EntryKind::Mirrored { generation: mirrored.generation },
            Some(EntryBody::Term(term)) => EntryKind::Term(term.into()),
            Some(EntryBody::RefuseBefore(refuse)) => EntryKind::RefuseBefore { clock: refuse.clock },
            None => EntryKind::Empty,
        }
    }

    /// Identifies an instance; a snapshot is sorted by key. The key of a `Mirrored` and of a `RefuseBefore` is the
    /// prefix of the keys of its service's instances, and of no others.
    pub(super) fn key(&self) -> Vec<u8> {
        let (namespace, service, address, ports) = match &self.body {
            Some(EntryBody::Put(put)) => (&put.namespace, &put.service, &put.address, &put.ports),
            Some(EntryBody::Remove(remove)) => (&remove.namespace, &remove.service, &remove.address, &remove.ports),
            Some(EntryBody::Mirrored(mirrored)) => return key_of_service(&mirrored.namespace, &mirrored.service),
            Some(EntryBody::RefuseBefore(refuse)) => return key_of_service(&refuse.namespace, &refuse.service),
            // After every name.
            Some(EntryBody::Term(_)) => return vec![0xFF],
            None => return Vec::new(),
        };
        let mut key = key_of_service(namespace, service);
        key.reserve_exact(address.len() + 1 + 3 * ports.len());
        key.extend_from_slice(address.as_bytes());
        key.push(0);
        for port in ports {
            // Big-endian, so that keys are in the order of the numbers. A port has 16 bits.
            let [.., high, low] = port.number.to_be_bytes();
            key.extend_from_slice(&[port.protocol.to_le_bytes()[0], high, low]);
        }
        key
    }

    pub(super) fn is_removal(&self) -> bool {
        matches!(self.body, Some(EntryBody::Remove(_)))
    }

    /// The clock of a removal; 0 for any other entry, and from before there were stamps.
    pub(super) fn removal_clock(&self) -> u64 {
        match &self.body {
            Some(EntryBody::Remove(remove)) => Stamp::from(remove.stamp).clock,
            _ => 0,
        }
    }

    /// Bytes that the entry takes in a file, without its length.
    pub(super) fn size(&self) -> usize {
        self.encoded_len()
    }

    /// The generation since which an entry from a frame of `generation` is unmirrored; 0 if
    /// Kubernetes has it.
    pub(super) fn since(&self, generation: u64) -> u64 {
        match &self.body {
            Some(EntryBody::Put(PutEntry { since, .. }) | EntryBody::Remove(RemoveEntry { since, .. })) => {
                since.unwrap_or(generation)
            }
            _ => 0,
        }
    }

    /// Sets that generation; `None` leaves it out.
    pub(super) fn set_since(&mut self, generation: Option<u64>) {
        if let Some(EntryBody::Put(PutEntry { since, .. }) | EntryBody::Remove(RemoveEntry { since, .. })) =
            &mut self.body
        {
            *since = generation;
        }
    }
}

/// The prefix of the keys of a service's instances.
fn key_of_service(namespace: &str, service: &str) -> Vec<u8> {
    let mut key = Vec::with_capacity(namespace.len() + service.len() + 2);
    for text in [namespace, service] {
        key.extend_from_slice(text.as_bytes());
        key.push(0); // no name holds one
    }
    key
}

/// What an entry is about, as far as a merge needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EntryKind {
    /// About an instance: added, replaced or removed.
    Instance,
    /// Kubernetes has every change of a service up to this generation.
    Mirrored { generation: u64 },
    /// A term.
    Term(DirectoryTerm),
    /// Removals of a service up to this clock are not remembered.
    RefuseBefore { clock: u64 },
    /// Not written by this program.
    Empty,
}

/// Converts entries to records.
#[derive(Debug, Default)]
pub(super) struct RecordDecoder {
    /// The last service: neighbours in a snapshot share one allocation.
    service: Option<ServiceKey>,
    registrants: RegistrantPool,
}

impl RecordDecoder {
    pub(super) fn record(&mut self, entry: Entry) -> Result<Record, DecodeError> {
        let invalid = |err: &dyn std::fmt::Display| DecodeError::Invalid(err.to_string());
        match entry.body {
            Some(EntryBody::Put(put)) => {
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
                let instance = spec.to_instance(UnixMillis(put.registered));
                let registrant = self.registrants.get(&put.registrant).map_err(|err| invalid(&err))?;
                let instance = instance.map_err(|err| invalid(&err))?.with_stamp(put.stamp.into());
                Ok(Record::Put { service, instance: Arc::new(instance.with_registrant(registrant)) })
            }
            Some(EntryBody::Remove(remove)) => {
                let service = self.service(&remove.namespace, &remove.service)?;
                let address = invariants::parse_address(&remove.address).map_err(|err| invalid(&err))?;
                let mut ports = Vec::with_capacity(remove.ports.len());
                // The number 0 alone stands for the ports of every instance.
                let every = matches!(&remove.ports[..], [port] if port.number == 0);
                for port in remove.ports.into_iter().filter(|_| !every) {
                    match u16::try_from(port.number) {
                        Ok(number @ 1..) => ports.push((port.protocol()?, number)),
                        _ => return Err(invalid(&format_args!("port {}", port.number))),
                    }
                }
                let ports = if every { PortSet::every() } else { PortSet::new(ports) };
                let id = InstanceId { address, ports };
                Ok(Record::Remove { service, id, stamp: remove.stamp.into() })
            }
            Some(EntryBody::Mirrored(MirroredEntry { namespace, service, generation })) => {
                Ok(Record::Mirrored { service: self.service(&namespace, &service)?, generation })
            }
            Some(EntryBody::Term(term)) => Ok(Record::Term((&term).into())),
            Some(EntryBody::RefuseBefore(RefuseBeforeEntry { namespace, service, clock })) => {
                Ok(Record::RefuseBefore { service: self.service(&namespace, &service)?, clock })
            }
            None => Err(invalid(&"an empty record")),
        }
    }

    fn service(&mut self, namespace: &str, name: &str) -> Result<ServiceKey, DecodeError> {
        if let Some(last) = &self.service
            && last.name() == name
            && last.namespace() == namespace
        {
            return Ok(last.clone());
        }
        let key = invariants::parse_service(namespace, name).map_err(|err| DecodeError::Invalid(err.to_string()))?;
        self.service = Some(key.clone());
        Ok(key)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        model::Registrant,
        store::frame::{FRAME_LEN, FileId, FileKind, Frame, FrameBuffer},
    };

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
            (clock, term, generation) in any::<(u64, u64, u64)>(),
            kind in 0..6u8,
            registrant in prop::option::of("[ -~é]{1,40}"),
        ) -> Option<Record> {
            let service = invariants::parse_service(&namespace, &name).expect("labels");
            let stamp = Stamp { clock, term, generation };
            let registrant = registrant.map(|name| Registrant::new(name.into()).expect("a name"));
            let instance = spec.to_instance(UnixMillis(registered)).ok()?.with_stamp(stamp).with_registrant(registrant);
            Some(match kind {
                0 => Record::Term(DirectoryTerm {
                    term: registered,
                    followed: generation % 2 == 1,
                    published: (clock % 2 == 1).then_some(generation),
                }),
                1 if clock % 2 == 0 => Record::RefuseBefore { service, clock: registered },
                1 => Record::Mirrored { service, generation: registered },
                2 => Record::Remove { service, id: InstanceId { ports: PortSet::every(), ..instance.id() }, stamp },
                3 => Record::Remove { service, id: instance.id(), stamp },
                _ => Record::Put { service, instance: Arc::new(instance) },
            })
        }
    }

    const FILE: FileId = FileId { kind: FileKind::Journal, number: 3 };

    proptest! {
        #[test]
        fn decoded_records_equal_the_encoded_ones(
            records in prop::collection::vec(record(), 0..20),
            generation in any::<u64>(),
            offset in any::<u64>(),
            since in prop::option::of(any::<u64>()),
        ) {
            let records: Vec<Record> = records.into_iter().flatten().collect();
            let mut buffer = FrameBuffer::new();
            for record in &records {
                let mut entry = Entry::from(record);
                prop_assert_eq!(entry.kind() == EntryKind::Instance, entry.since(7) == 7);
                entry.set_since(since);
                buffer.push(&entry);
            }
            let frame = Frame { more: true, end: false, unknown_flags: 0, generation, synced: 7 };
            let bytes = buffer.finish(&frame, FILE, offset).to_vec();
            prop_assert_eq!(Frame::claimed_payload_len(&bytes), Some(bytes.len() - FRAME_LEN));
            prop_assert_eq!(Frame::decode(&bytes, FILE, offset), Some(frame));
            prop_assert_eq!(Frame::decode(&bytes, FILE, offset ^ 1), None);
            prop_assert_eq!(Frame::decode(&bytes, FileId::journal(4), offset), None);
            prop_assert_eq!(Frame::decode(&bytes, FileId::snapshot(3), offset), None);
            let payload = Payload::read(&bytes[FRAME_LEN..]).expect("just written");
            for entry in payload.entries.iter().filter(|entry| entry.kind() == EntryKind::Instance) {
                prop_assert_eq!(entry.since(generation), since.unwrap_or(generation));
            }
            let mut reader = RecordDecoder::default();
            let read: Result<Vec<Record>, DecodeError> =
                payload.entries.into_iter().map(|entry| reader.record(entry)).collect();
            prop_assert_eq!(read, Ok(records));
        }

        #[test]
        fn keys_are_equal_for_the_same_instance_only(one in record(), other in record()) {
            let id = |record: &Record| match record {
                Record::Put { service, instance } => Some((service.clone(), instance.id())),
                Record::Remove { service, id, .. } => Some((service.clone(), id.clone())),
                Record::Mirrored { .. } | Record::Term(_) | Record::RefuseBefore { .. } => None,
            };
            let (Some(one), Some(other)) = (one, other) else { return Ok(()) };
            let (key, other_key) = (Entry::from(&one).key(), Entry::from(&other).key());
            if let (Some(one), Some(other)) = (id(&one), id(&other)) {
                prop_assert_eq!(key == other_key, one == other);
                let (service, id) = one;
                prop_assert_eq!(&key, &Entry::from(&Record::Remove { service, id, stamp: Stamp::default() }).key());
            }
            if let (Some((instance_of, _)), Record::Mirrored { service, .. } | Record::RefuseBefore { service, .. }) =
                (id(&one), &other)
            {
                prop_assert_eq!(key.starts_with(&other_key), instance_of == *service);
                let own = Entry::from(&Record::Mirrored { service: instance_of, generation: 0 }).key();
                prop_assert!(key.starts_with(&own));
            }
            if let (Some(_), Record::Term(_)) = (id(&one), &other) {
                prop_assert!(key < other_key);
            }
        }

        #[test]
        fn any_bytes_are_decoded_or_refused_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(payload) = Payload::read(&bytes) {
                let mut reader = RecordDecoder::default();
                payload.entries.into_iter().for_each(|entry| drop(reader.record(entry)));
            }
        }
    }
}
