//! The annotations for attributes that an endpoint has no field for.
//!
//! `gangplank.dev/instances` is compact JSON, an object by address in order of address, with the
//! attributes that are not the default:
//!
//! ```json
//! {"10.0.0.1":{"weight":0.5,"priority":3,"registered":1700000000123,"stamp":[1700000000123000,3,1700000042],"registrant":"vm-1"}}
//! ```
//!
//! `registered` is in milliseconds since 1970; `stamp` is the [`Stamp`]: its clock in microseconds since 1970, its
//! term and its generation; `registrant` is the user name of who registered it. `gangplank.dev/ports` is on the slices of a
//! part only (see [`SliceGroup`](super::SliceGroup)):
//! `[{"port":53,"protocol":"TCP","name":"dns"},{"port":53,"protocol":"UDP","name":"dns"}]`.
//!
//! Unknown fields are ignored, so that a later version can add some.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::group::MAX_PORTS;
use crate::model::{Address, PortSpec, Ports, Protocol, Registrant, RegistrantPool, Stamp, UnixMillis, Weight};

/// Most bytes of the entry of an IP address with its comma and without its registrant: 41 of the address in quotes, 67 of the
/// stamp and 80 of the rest.
pub(super) const MAX_ENTRY_BYTES: usize = 192;

/// Most bytes that the entry of a DNS name, of 253 characters, takes more than that.
pub(super) const EXTRA_NAME_BYTES: usize = 253 - 39;

/// Most bytes that the registrant adds to an entry.
pub(super) fn registrant_bytes(registrant: Option<&Registrant>) -> usize {
    // Its key with quotes, colon and comma; the text is escaped at `"` and `\` only, because it has no control characters.
    let text = |name: &str| name.len() + name.bytes().filter(|byte| matches!(byte, b'"' | b'\\')).count();
    registrant.map_or(0, |registrant| r#""registrant":"","#.len() + text(registrant.as_str()))
}

/// The highest clock and term of a stamp that is read: a number that somebody wrote by hand must not use up those
/// that follow. As a clock it is in the year 2255.
pub(super) const MAX_STAMP: u64 = 1 << 53;

/// Most bytes of the list of ports; an instance within its 2 KiB needs far fewer.
pub(super) const MAX_PORT_LIST_BYTES: usize = 16 * 1024;

/// The attributes of an instance that an endpoint has no field for.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct InstanceAnnotation {
    pub(super) weight: Weight,
    pub(super) priority: u16,
    pub(super) registered: UnixMillis,
    pub(super) stamp: Stamp,
    pub(super) registrant: Option<Registrant>,
}

#[derive(Serialize)]
struct EntryJson<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    weight: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    registered: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stamp: Option<[u64; 3]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    registrant: Option<&'a str>,
}

/// The annotation for these instances; those with default attributes are left out.
pub(super) fn instances_json<'a>(records: impl Iterator<Item = (&'a Address, &'a InstanceAnnotation)>) -> String {
    let not_default = records.filter(|(_, record)| **record != InstanceAnnotation::default());
    let entries = not_default.map(|(address, record)| {
        let InstanceAnnotation { weight, priority, registered, stamp, registrant } = record;
        let weight = Some(*weight).filter(|weight| *weight != Weight::default());
        let entry = EntryJson {
            weight: weight.map(Weight::get),
            priority: Some(*priority).filter(|priority| *priority != 0),
            registered: Some(registered.0).filter(|registered| *registered != 0),
            stamp: (*stamp != Stamp::default()).then_some([stamp.clock, stamp.term, stamp.generation]),
            registrant: registrant.as_ref().map(Registrant::as_str),
        };
        (AsText(address), entry)
    });
    let mut text = Vec::new();
    let mut serializer = serde_json::Serializer::new(&mut text);
    serde::Serializer::collect_map(&mut serializer, entries).expect("numbers under addresses are JSON");
    String::from_utf8(text).expect("JSON is UTF-8")
}

/// An address as a key of JSON.
struct AsText<'a>(&'a Address);

impl Serialize for AsText<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self.0)
    }
}

/// A parsed annotation of a slice.
#[derive(Default)]
pub(super) struct InstancesAnnotation {
    entries: HashMap<String, Value>,
    registrants: RegistrantPool,
}

impl InstancesAnnotation {
    /// Parses the annotation of a slice.
    ///
    /// # Errors
    /// If there is none, or it is not a JSON object; then every instance gets the defaults.
    pub(super) fn read(text: Option<&str>) -> Result<Self, String> {
        let text = text.ok_or("is missing")?;
        let entries = serde_json::from_str(text).map_err(|err| format!("is not what gangplank writes: {err}"))?;
        Ok(Self { entries, registrants: RegistrantPool::default() })
    }

    /// The attributes of the instance at `address`, the defaults if it has no entry.
    ///
    /// # Errors
    /// Which attribute is invalid.
    pub(super) fn get(&mut self, address: &str) -> Result<InstanceAnnotation, String> {
        #[derive(Deserialize)]
        struct ReadEntryJson {
            weight: Option<f64>,
            priority: Option<u16>,
            registered: Option<u64>,
            stamp: Option<[u64; 3]>,
            registrant: Option<String>,
        }
        // An endpoint that somebody has added has none.
        let Some(entry) = self.entries.get(address) else { return Ok(InstanceAnnotation::default()) };
        let entry = ReadEntryJson::deserialize(entry).map_err(|err| err.to_string())?;
        let ReadEntryJson { weight, priority, registered, stamp, registrant } = entry;
        let weight = match weight {
            None => Weight::default(),
            Some(weight) => exact(weight)
                .and_then(|weight| Weight::new(weight).ok())
                .ok_or_else(|| format!("weight: must be a finite number in 0..=655, got {weight}"))?,
        };
        let [clock, term, generation] = stamp.unwrap_or_default();
        if clock > MAX_STAMP || term > MAX_STAMP {
            return Err(format!("stamp: the clock and the term must be at most {MAX_STAMP}, got {clock} and {term}"));
        }
        let (registered, stamp) = (UnixMillis(registered.unwrap_or(0)), Stamp { clock, term, generation });
        let registrant = self.registrants.get(&registrant.unwrap_or_default()).map_err(|err| err.to_string())?;
        Ok(InstanceAnnotation { weight, priority: priority.unwrap_or(0), registered, stamp, registrant })
    }
}

/// The `f32` that was written, parsed from its digits: rounding the `f64` that serde read could yield
/// a neighbour, and a slice that reads differently than it was written is rewritten for ever.
fn exact(weight: f64) -> Option<f32> {
    weight.to_string().parse().ok()
}

#[derive(Serialize, Deserialize)]
struct PortEntry {
    port: i64,
    protocol: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    name: String,
}

/// The annotation for a list of ports.
pub(super) fn ports_json(ports: &Ports) -> String {
    let entries = ports.as_slice().iter().map(|port| PortEntry {
        port: port.number.into(),
        protocol: port.protocol.as_str().into(),
        name: port.name.as_ref().map(ToString::to_string).unwrap_or_default(),
    });
    serde_json::to_string(&entries.collect::<Vec<_>>()).expect("texts and numbers are JSON")
}

/// The ports in an annotation.
///
/// # Errors
/// Why they are invalid.
pub(super) fn read_ports(text: &str) -> Result<Ports, String> {
    let entries: Vec<PortEntry> = serde_json::from_str(text).map_err(|err| err.to_string())?;
    if entries.len() > MAX_PORTS {
        return Err(format!("{} ports, at most {MAX_PORTS} are looked at", entries.len()));
    }
    let spec = |entry: PortEntry| {
        let known = Protocol::ALL.into_iter().find(|known| known.as_str() == entry.protocol);
        let protocol = known.ok_or_else(|| format!("protocol: must be TCP, UDP or SCTP, got {:?}", entry.protocol))?;
        Ok(PortSpec { number: entry.port, protocol, name: entry.name })
    };
    let specs = entries.into_iter().map(spec).collect::<Result<Vec<_>, String>>()?;
    Ports::parse(&specs).map_err(|(index, err)| format!("[{index}]: {err}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(weight: f32, priority: u16, registered: u64) -> InstanceAnnotation {
        let (weight, registered) = (Weight::new(weight).expect("valid"), UnixMillis(registered));
        InstanceAnnotation { weight, priority, registered, ..InstanceAnnotation::default() }
    }

    fn registrant(name: &str) -> Option<Registrant> {
        RegistrantPool::default().get(name).expect("valid")
    }

    /// These texts exist in clusters: later versions must read them.
    #[test]
    fn json_of_the_annotations_is_stable() {
        let ip = |text: &str| Address::parse(text).expect("an address");
        let stamp = Stamp { clock: 1_700_000_000_123_000, term: 3, generation: 1_700_000_042 };
        let records = [
            (ip("10.0.0.1"), InstanceAnnotation { stamp, ..record(0.5, 3, 1_700_000_000_123) }),
            (ip("10.0.0.2"), InstanceAnnotation::default()),
            (ip("10.0.0.3"), record(0.1, 0, 7)),
            (ip("10.0.0.4"), record(0.0, 65_535, 0)),
            (ip("10.0.0.5"), InstanceAnnotation { registrant: registrant("vm-1"), ..record(1.0, 0, 7) }),
        ];
        let text = instances_json(records.iter().map(|(ip, record)| (ip, record)));
        assert_eq!(
            text,
            r#"{"10.0.0.1":{"weight":0.5,"priority":3,"registered":1700000000123,"stamp":[1700000000123000,3,1700000042]},"10.0.0.3":{"weight":0.1,"registered":7},"10.0.0.4":{"weight":0.0,"priority":65535},"10.0.0.5":{"registered":7,"registrant":"vm-1"}}"#
        );
        let mut read = InstancesAnnotation::read(Some(&text)).expect("an object");
        for (ip, record) in records {
            assert_eq!(read.get(&ip.to_string()), Ok(record));
        }
        assert_eq!(instances_json([(&ip("10.0.0.1"), &InstanceAnnotation::default())].into_iter()), "{}");
        let mut later =
            InstancesAnnotation::read(Some(r#"{"10.0.0.1":{"priority":4,"colour":"red"}}"#)).expect("an object");
        assert_eq!(later.get("10.0.0.1"), Ok(record(1.0, 4, 0)));

        let dns = [(53, Protocol::Udp, "dns"), (53, Protocol::Tcp, "dns"), (80, Protocol::Tcp, "")];
        let specs = dns.map(|(number, protocol, name)| PortSpec { number, protocol, name: name.into() });
        let ports = Ports::parse(&specs).expect("valid");
        let text = ports_json(&ports);
        assert_eq!(
            text,
            r#"[{"port":53,"protocol":"TCP","name":"dns"},{"port":80,"protocol":"TCP"},{"port":53,"protocol":"UDP","name":"dns"}]"#
        );
        assert_eq!(read_ports(&text), Ok(ports));
    }

    #[test]
    fn invalid_annotations_are_refused() {
        for bad in [None, Some(""), Some("[]"), Some("{"), Some("null"), Some("7")] {
            assert!(InstancesAnnotation::read(bad).is_err(), "{bad:?}");
        }
        for bad in [
            r#"{"a":7}"#,
            r#"{"a":{"weight":-1}}"#,
            r#"{"a":{"weight":656}}"#,
            r#"{"a":{"weight":"1"}}"#,
            r#"{"a":{"priority":65536}}"#,
            r#"{"a":{"registered":-1}}"#,
            r#"{"a":{"stamp":7}}"#,
            r#"{"a":{"stamp":[1,2]}}"#,
            r#"{"a":{"stamp":[9007199254740993,1,1]}}"#,
            r#"{"a":{"stamp":[1,9007199254740993,1]}}"#,
            r#"{"a":{"registrant":"x\ny"}}"#,
            r#"{"a":{"registrant":7}}"#,
        ] {
            assert!(InstancesAnnotation::read(Some(bad)).expect("an object").get("a").is_err(), "{bad}");
        }
        for bad in [
            "",
            "{}",
            r#"[{"port":0,"protocol":"TCP"}]"#,
            r#"[{"port":1,"protocol":"tcp"}]"#,
            r#"[{"port":1,"protocol":"TCP"},{"port":2,"protocol":"TCP"}]"#,
        ] {
            assert!(read_ports(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn largest_entry_is_within_its_limit() {
        let longest = Address::parse("2001:1db8:1234:5678:9abc:def0:1234:5678").expect("an address");
        let label = |length: usize| "n".repeat(length);
        let longest_name = format!("{0}.{0}.{0}.{1}", label(63), label(61));
        let longest_name = Address::parse(&longest_name).expect("253 characters are a name");
        for weight in [1.234_567_9e-38, 654.999_94, 1e-45, f32::MIN_POSITIVE] {
            let stamp = Stamp { clock: u64::MAX, term: u64::MAX, generation: u64::MAX };
            for name in ["", "vm-1", r#"a"b\c\\"#, "é"] {
                let registrant = registrant(name);
                let most = MAX_ENTRY_BYTES + registrant_bytes(registrant.as_ref());
                let longest_entry = InstanceAnnotation { stamp, registrant, ..record(weight, u16::MAX, u64::MAX) };
                let text = instances_json([(&longest, &longest_entry)].into_iter());
                assert!(text.len() <= most, "{text}");
                let text = instances_json([(&longest_name, &longest_entry)].into_iter());
                assert!(text.len() <= most + EXTRA_NAME_BYTES, "{text}");
            }
        }
    }

    proptest! {
        #[test]
        fn every_weight_is_read_back_bit_for_bit(bits in 0u32..=655f32.to_bits()) {
            let ip = Address::parse("10.0.0.1").expect("an address");
            let record = record(f32::from_bits(bits), 0, 0);
            let text = instances_json([(&ip, &record)].into_iter());
            let read = InstancesAnnotation::read(Some(&text)).expect("an object").get("10.0.0.1").expect("valid");
            prop_assert_eq!(read.weight.get().to_bits(), bits);
        }
    }
}
