//! What stands on the disk, octet by octet: version 1. Numbers are little-endian.
//!
//! ```text
//! file    = header frame*
//! header  = magic(8) version(4) store-id(16) number(8) previous-len(8) crc(4)           48 octets
//! frame   = magic(4) crc(4) length(4) flags(4) generation(8) synced(8) payload(length)
//! payload = protobuf: entries, each a Put or a Remove
//! ```
//!
//! - Every octet is under a CRC-32C. That of a frame also covers which file it is in and at
//!   which offset, so a frame is valid in its own place only; it does not cover the store id, so
//!   frames can still be read when the header of their file is gone.
//! - `synced` is the offset below which everything in this file was known to be on the disk when
//!   the frame was written. `previous-len` of a segment says the same of the whole segment
//!   before it. These two tell a torn tail from damage; see [`recover`](super::recover).
//! - Of flags and fields nothing may be ignored: what this version does not know was written by
//!   a later one. A later version keeps the header as it is and raises its number.
//! - These types are apart from the model's. What is read goes through the model's door again.

use std::sync::Arc;

use prost::Message;

use super::Record;
use crate::model::{Door, Draft, DraftPort, Instance, InstanceId, PortSet, Protocol, ServiceKey, UnixMillis};

/// The version that is written, and the latest that is understood.
const VERSION: u32 = 1;

/// Octets of a file's header.
pub(super) const HEADER_LEN: usize = 48;

/// Octets of a frame before its payload.
pub(super) const FRAME_LEN: usize = 32;

/// Most octets in a payload. It bounds what a reader must hold; a larger batch takes several frames.
pub(super) const MAX_PAYLOAD: usize = 4 << 20;

/// Each frame begins with this. None of it can stand in a name, so a search meets few others.
const FRAME_MAGIC: [u8; 4] = [0xF7, b'g', b'p', 0x1A];

/// The next frame belongs to the same batch.
const MORE: u32 = 1;

/// The last frame of a snapshot.
const END: u32 = 2;

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A segment of the journal.
    Journal,
    /// Everything that stood at the end of a segment.
    Snapshot,
}

impl Kind {
    fn magic(self) -> [u8; 8] {
        match self {
            Self::Journal => *b"\x89GPjrnl\n",
            Self::Snapshot => *b"\x89GPsnap\n",
        }
    }

    fn prefix(self) -> &'static str {
        match self {
            Self::Journal => "journal-",
            Self::Snapshot => "snapshot-",
        }
    }
}

/// Which file: segment `number`, or the snapshot of everything up to the end of that segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) kind: Kind,
    pub(super) number: u64,
}

impl Place {
    pub(super) fn journal(number: u64) -> Self {
        Self { kind: Kind::Journal, number }
    }

    pub(super) fn snapshot(number: u64) -> Self {
        Self { kind: Kind::Snapshot, number }
    }

    /// The file's name.
    pub(super) fn name(self) -> String {
        format!("{}{:010}", self.kind.prefix(), self.number)
    }

    /// The place that has this name, if it is one of ours.
    pub(super) fn of(name: &str) -> Option<Self> {
        [Kind::Journal, Kind::Snapshot].into_iter().find_map(|kind| {
            let place = Self { kind, number: name.strip_prefix(kind.prefix())?.parse().ok()? };
            (place.name() == name).then_some(place)
        })
    }

    /// What the checksum of a frame at `offset` begins with.
    pub(super) fn seed(self, offset: u64) -> u32 {
        let file = crc32c::crc32c_append(crc32c::crc32c(&self.kind.magic()), &self.number.to_le_bytes());
        crc32c::crc32c_append(file, &offset.to_le_bytes())
    }
}

/// Drawn once for each data directory, so that a file of another one is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StoreId([u8; 16]);

impl StoreId {
    pub(super) fn draw() -> Self {
        Self(fastrand::u128(..).to_le_bytes())
    }
}

/// The beginning of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) id: StoreId,
    pub(super) place: Place,
    /// Of a segment: octets of the segment before it, all of them synced. Otherwise 0.
    pub(super) previous_len: u64,
}

/// Why a header was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BadHeader {
    /// Octets are not what was written.
    Damaged,
    /// A later version wrote it.
    Newer(u32),
    /// It is the header of another file.
    Elsewhere,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&self.place.kind.magic());
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..28].copy_from_slice(&self.id.0);
        bytes[28..36].copy_from_slice(&self.place.number.to_le_bytes());
        bytes[36..44].copy_from_slice(&self.previous_len.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..44]);
        bytes[44..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the header of the file in `place`.
    pub(super) fn decode(bytes: &[u8; HEADER_LEN], place: Place) -> Result<Self, BadHeader> {
        if u32_at(bytes, 44) != crc32c::crc32c(&bytes[..44]) {
            return Err(BadHeader::Damaged);
        }
        if bytes[..8] != place.kind.magic() || u64_at(bytes, 28) != place.number {
            return Err(BadHeader::Elsewhere);
        }
        match u32_at(bytes, 8) {
            VERSION => {}
            other => return Err(BadHeader::Newer(other)),
        }
        let id = StoreId(bytes[12..28].try_into().expect("16 octets"));
        Ok(Self { id, place, previous_len: u64_at(bytes, 36) })
    }
}

/// What a frame says beside its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    /// The next frame belongs to the same batch.
    pub(super) more: bool,
    /// Nothing comes after it: the end of a snapshot.
    pub(super) end: bool,
    /// Bits that this version does not know.
    pub(super) unknown_flags: u32,
    /// The batch that it is of.
    pub(super) generation: u64,
    /// Everything in the file below this offset was on the disk when the frame was written.
    pub(super) synced: u64,
}

impl Frame {
    /// The payload length that the frame beginning with `bytes` claims, if it is a frame at all.
    pub(super) fn claimed(bytes: &[u8]) -> Option<usize> {
        let length = u32_at(bytes, 8) as usize;
        (bytes[..4] == FRAME_MAGIC && length <= MAX_PAYLOAD).then_some(length)
    }

    /// Whether `bytes` could begin a frame: a cheap check before the others.
    pub(super) fn may_begin(bytes: &[u8]) -> bool {
        bytes.starts_with(&FRAME_MAGIC)
    }

    /// Reads a whole frame, which must be valid at `offset` of the file in `place`.
    pub(super) fn decode(bytes: &[u8], place: Place, offset: u64) -> Option<Self> {
        let crc = crc32c::crc32c_append(place.seed(offset), &bytes[8..]);
        if u32_at(bytes, 4) != crc {
            return None;
        }
        let flags = u32_at(bytes, 12);
        Some(Self {
            more: flags & MORE != 0,
            end: flags & END != 0,
            unknown_flags: flags & !(MORE | END),
            generation: u64_at(bytes, 16),
            synced: u64_at(bytes, 24),
        })
    }
}

/// A frame that is being written.
#[derive(Debug)]
pub(super) struct FrameBuffer(Vec<u8>);

impl FrameBuffer {
    pub(super) fn new() -> Self {
        Self(vec![0; FRAME_LEN])
    }

    /// Begins another frame. Memory that an unusually large one took is given back.
    pub(super) fn clear(&mut self) {
        self.0.truncate(FRAME_LEN);
        self.0.shrink_to(1 << 20);
    }

    /// Octets of the payload so far.
    pub(super) fn payload_len(&self) -> usize {
        self.0.len() - FRAME_LEN
    }

    /// Adds an entry to the payload.
    pub(super) fn push(&mut self, entry: &Entry) {
        // Field 1 of `Payload`, length-delimited: written one by one, so that a batch needs no
        // list of all its entries.
        self.0.push(1 << 3 | 2);
        entry.encode_length_delimited(&mut self.0).expect("a Vec grows");
    }

    /// Adds octets as they are.
    #[cfg(test)]
    pub(super) fn extend_raw(&mut self, payload: &[u8]) {
        self.0.extend_from_slice(payload);
    }

    /// Fills in the frame's beginning for `offset` of the file in `place` and gives the whole.
    pub(super) fn seal(&mut self, frame: &Frame, place: Place, offset: u64) -> &[u8] {
        let length = u32::try_from(self.payload_len()).expect("a frame is closed before MAX_PAYLOAD");
        let flags = if frame.more { MORE } else { 0 } | if frame.end { END } else { 0 };
        self.0[..4].copy_from_slice(&FRAME_MAGIC);
        self.0[8..12].copy_from_slice(&length.to_le_bytes());
        self.0[12..16].copy_from_slice(&flags.to_le_bytes());
        self.0[16..24].copy_from_slice(&frame.generation.to_le_bytes());
        self.0[24..32].copy_from_slice(&frame.synced.to_le_bytes());
        let crc = crc32c::crc32c_append(place.seed(offset), &self.0[8..]);
        self.0[4..8].copy_from_slice(&crc.to_le_bytes());
        &self.0
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 octets"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 octets"))
}

/// The payload of a frame.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Payload {
    #[prost(message, repeated, tag = "1")]
    pub(super) entries: Vec<Entry>,
}

impl Payload {
    /// Reads a payload whose checksum was right.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, Unreadable> {
        let payload = Self::decode(bytes).map_err(|why| Unreadable::Invalid(why.to_string()))?;
        // protobuf skips fields that it does not know. We write every known one in one way only,
        // so what was skipped is missing in the length.
        if payload.encoded_len() != bytes.len() {
            return Err(Unreadable::Newer("a record of a kind, or with a field, that is not known here".into()));
        }
        Ok(payload)
    }
}

/// One record. Tags 3 (outbox done) and 4 (term) are reserved for the mirror and for replicas.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Entry {
    #[prost(oneof = "Change", tags = "1, 2")]
    change: Option<Change>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Change {
    #[prost(message, tag = "1")]
    Put(Put),
    #[prost(message, tag = "2")]
    Remove(Remove),
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
            }),
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
    /// The same for every entry about one instance, and different for any other. Snapshots are in
    /// the order of these octets.
    pub(super) fn key(&self) -> Vec<u8> {
        let (namespace, service, address, ports) = match &self.change {
            Some(Change::Put(put)) => (&put.namespace, &put.service, &put.address, &put.ports),
            Some(Change::Remove(remove)) => (&remove.namespace, &remove.service, &remove.address, &remove.ports),
            None => return Vec::new(),
        };
        let mut key = Vec::with_capacity(namespace.len() + service.len() + address.len() + 3 + 3 * ports.len());
        for text in [namespace, service, address] {
            key.extend_from_slice(text.as_bytes());
            key.push(0); // no name holds one
        }
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
}

/// Turns entries into records of the model.
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// The last service met: neighbours in a snapshot share it.
    service: Option<ServiceKey>,
}

impl Reader {
    /// What was once let in at the door, whatever zone and options that was with.
    const DOOR: Door = Door { zone_wire_len: 1, names_allowed: true };

    pub(super) fn record(&mut self, entry: Entry) -> Result<Record, Unreadable> {
        let invalid = |why: &dyn std::fmt::Display| Unreadable::Invalid(why.to_string());
        match entry.change {
            Some(Change::Put(put)) => {
                let service = self.service(&put.namespace, &put.service)?;
                let mut ports = Vec::with_capacity(put.ports.len());
                for port in put.ports {
                    let protocol = port.protocol()?;
                    ports.push(DraftPort { number: port.number.into(), protocol, name: port.name });
                }
                let priority = u16::try_from(put.priority).map_err(|_| invalid(&"priority above 65535"))?;
                let draft = Draft {
                    address: put.address,
                    ports,
                    host_name: put.host_name,
                    node_name: put.node_name,
                    weight: Some(put.weight),
                    priority,
                };
                let instance = Self::DOOR.instance(&service, &draft, UnixMillis(put.registered));
                Ok(Record::Put { service, instance: Arc::new(instance.map_err(|why| invalid(&why))?) })
            }
            Some(Change::Remove(remove)) => {
                let service = self.service(&remove.namespace, &remove.service)?;
                let address = Self::DOOR.address(&remove.address).map_err(|why| invalid(&why))?;
                let mut ports = Vec::with_capacity(remove.ports.len());
                for port in remove.ports {
                    match u16::try_from(port.number) {
                        Ok(number @ 1..) => ports.push((port.protocol()?, number)),
                        _ => return Err(invalid(&format_args!("port {}", port.number))),
                    }
                }
                Ok(Record::Remove { service, id: InstanceId { address, ports: PortSet::new(ports) } })
            }
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
        let key = Self::DOOR.service(namespace, name).map_err(|why| Unreadable::Invalid(why.to_string()))?;
        self.service = Some(key.clone());
        Ok(key)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
        fn draft()(
            address in address(),
            ports in prop::collection::btree_map((0..3usize, 1..=65_535u16), label(), 0..6),
            host_name in prop_oneof![Just(String::new()), label()],
            node_name in prop_oneof![Just(String::new()), label()],
            weight in prop_oneof![Just(None), (0.0..=655.0f32).prop_map(Some)],
            priority in any::<u16>(),
        ) -> Draft {
            let ports = ports.into_iter().enumerate().map(|(index, ((protocol, number), name))| DraftPort {
                number: number.into(),
                protocol: Protocol::ALL[protocol],
                // Unique, and one without a name.
                name: if index == 0 { String::new() } else { format!("{name}{index}") },
            });
            Draft { address, ports: ports.collect(), host_name, node_name, weight, priority }
        }
    }

    prop_compose! {
        fn record()(
            (namespace, name) in (label(), label()),
            draft in draft(),
            registered in any::<u64>(),
            remove in any::<bool>(),
        ) -> Option<Record> {
            let service = Reader::DOOR.service(&namespace, &name).expect("labels");
            let instance = Reader::DOOR.instance(&service, &draft, UnixMillis(registered)).ok()?;
            Some(if remove {
                Record::Remove { service, id: instance.id() }
            } else {
                Record::Put { service, instance: Arc::new(instance) }
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
        ) {
            let records: Vec<Record> = records.into_iter().flatten().collect();
            let mut buffer = FrameBuffer::new();
            records.iter().for_each(|record| buffer.push(&Entry::from(record)));
            let frame = Frame { more: true, end: false, unknown_flags: 0, generation, synced: 7 };
            let bytes = buffer.seal(&frame, PLACE, offset).to_vec();
            prop_assert_eq!(Frame::claimed(&bytes), Some(bytes.len() - FRAME_LEN));
            prop_assert_eq!(Frame::decode(&bytes, PLACE, offset), Some(frame));
            prop_assert_eq!(Frame::decode(&bytes, PLACE, offset ^ 1), None);
            prop_assert_eq!(Frame::decode(&bytes, Place::journal(4), offset), None);
            prop_assert_eq!(Frame::decode(&bytes, Place::snapshot(3), offset), None);
            let payload = Payload::read(&bytes[FRAME_LEN..]).expect("just written");
            let mut reader = Reader::default();
            let read: Result<Vec<Record>, Unreadable> =
                payload.entries.into_iter().map(|entry| reader.record(entry)).collect();
            prop_assert_eq!(read, Ok(records));
        }

        #[test]
        fn a_key_is_that_of_the_instance(one in record(), other in record()) {
            let id = |record: &Record| match record {
                Record::Put { service, instance } => (service.clone(), instance.id()),
                Record::Remove { service, id } => (service.clone(), id.clone()),
            };
            if let (Some(one), Some(other)) = (one, other) {
                prop_assert_eq!(Entry::from(&one).key() == Entry::from(&other).key(), id(&one) == id(&other));
                let (service, id) = id(&one);
                prop_assert_eq!(Entry::from(&one).key(), Entry::from(&Record::Remove { service, id }).key());
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

    #[test]
    fn names_are_those_of_places_and_back() {
        for (name, place) in [
            ("journal-0000000001", Some(Place::journal(1))),
            ("snapshot-0000000042", Some(Place::snapshot(42))),
            ("journal-10000000000", Some(Place::journal(10_000_000_000))),
            ("journal-1", None),
            ("journal-0000000001.tmp", None),
            ("journal-+000000001", None),
            ("LOCK", None),
        ] {
            assert_eq!(Place::of(name), place, "{name}");
            if let Some(place) = place {
                assert_eq!(place.name(), name);
            }
        }
    }
}
