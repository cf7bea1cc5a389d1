//! The slice that holds the tombstones of a service, and no endpoint.
//!
//! It is apart from the slices of instances, so that a removal leaves those as they would be without it. It has no
//! owner: neither the Service's end nor somebody who deletes the Service takes it away, and the Service need not stay for
//! it. `gangplank.dev/tombstones` is compact JSON, an object by instance with its [`Stamp`]:
//!
//! ```json
//! {"10.0.0.1:8080":[1700000000123000,3,1700000042],"[2001:db8::1]:53/UDP":[1700000000124000,3,1700000043]}
//! ```
//!
//! The ports `*` are those of every instance of the address.
//!
//! `gangplank.dev/refuse-before` is on it when tombstones were dropped because there was no room for them: the clock of the
//! latest of those.

use std::{collections::BTreeMap, fmt::Write as _};

use k8s_openapi::{api::discovery::v1::EndpointSlice, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use sha2::Sha256;

use super::{
    group::{Family, slice_name},
    observed::{annotation, label},
    record::MAX_STAMP,
    render::{ContentDigest, labels},
};
use crate::{
    kubernetes::objects::names,
    model::{InstanceId, PortSet, Protocol, ServiceKey, Stamp, invariants},
    replicas::tombstones::Tombstones,
};

/// The name of the slice number `index` of the tombstones of `service`; 0 unless somebody else's slice has that name.
pub(super) fn name(service: &ServiceKey, index: u32) -> String {
    slice_name(service, &format!("gangplank.dev/tombstones/1\nindex {index}\n"))
}

/// The slice with these tombstones. The stamps are not on it yet.
pub(super) fn render(service: &ServiceKey, name: &str, tombstones: &Tombstones) -> EndpointSlice {
    let mut annotations = BTreeMap::from([(names::TOMBSTONES.to_owned(), json(tombstones))]);
    if tombstones.refuse_before() > 0 {
        annotations.insert(names::REFUSE_BEFORE.to_owned(), tombstones.refuse_before().to_string());
    }
    EndpointSlice {
        metadata: ObjectMeta {
            name: Some(name.into()),
            namespace: Some(service.namespace().into()),
            labels: Some(labels(service).map(|(key, value)| (key.into(), value.into())).into()),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        },
        // A slice must have a type. Without endpoints it does not matter which.
        address_type: Family::V4.as_str().into(),
        endpoints: Vec::new(),
        ports: None,
    }
}

fn json(tombstones: &Tombstones) -> String {
    let mut text = String::from("{");
    for one in tombstones.iter() {
        let Stamp { clock, term, generation } = one.stamp;
        let comma = if text.len() > 1 { "," } else { "" };
        // Addresses, names and ports have no character that JSON escapes.
        write!(text, "{comma}\"{}\":[{clock},{term},{generation}]", one.id).expect("a String takes everything");
    }
    text.push('}');
    text
}

/// The digest of what [`render`] writes.
pub(super) fn digest(tombstones: &Tombstones) -> ContentDigest {
    let content = format!("tombstones {} {}", tombstones.refuse_before(), json(tombstones));
    let hash = <Sha256 as sha2::Digest>::digest(content.as_bytes());
    ContentDigest::of(&hash.into())
}

/// Whether the slice holds tombstones, whatever else is in it.
pub(super) fn is_of_tombstones(slice: &EndpointSlice) -> bool {
    annotation(&slice.metadata, names::TOMBSTONES).is_some()
}

/// The digest of a slice of tombstones as it would be written again; `None` for any other.
pub(super) fn untouched(slice: &EndpointSlice, service: &ServiceKey, slice_name: &str) -> Option<ContentDigest> {
    let meta = &slice.metadata;
    let tombstones = read_tombstones(slice)?;
    let again = render(service, slice_name, &tombstones);
    let same = [names::TOMBSTONES, names::REFUSE_BEFORE]
        .into_iter()
        .all(|key| annotation(meta, key) == annotation(&again.metadata, key))
        && labels(service).into_iter().all(|(key, value)| label(meta, key) == Some(value))
        && slice.endpoints.is_empty()
        && slice.ports.as_ref().is_none_or(Vec::is_empty);
    same.then(|| digest(&tombstones))
}

/// The tombstones that a slice holds; `None` if it is none of tombstones. Entries that gangplank would not write are left out.
#[must_use]
pub fn read_tombstones(slice: &EndpointSlice) -> Option<Tombstones> {
    let meta = &slice.metadata;
    let entries: BTreeMap<String, [u64; 3]> = serde_json::from_str(annotation(meta, names::TOMBSTONES)?).ok()?;
    let mut tombstones = Tombstones::default();
    let refuse_before = annotation(meta, names::REFUSE_BEFORE).and_then(|clock| clock.parse().ok());
    tombstones.raise_refuse_before(refuse_before.filter(|clock| *clock <= MAX_STAMP).unwrap_or(0));
    for (id, [clock, term, generation]) in entries {
        // As in the slices of instances: a number that somebody typed must not use up the clocks to come.
        if clock <= MAX_STAMP
            && term <= MAX_STAMP
            && let Some(id) = parse_id(&id)
        {
            tombstones.insert(id, Stamp { clock, term, generation });
        }
    }
    Some(tombstones)
}

/// Parses what `InstanceId` displays.
fn parse_id(text: &str) -> Option<InstanceId> {
    let (address, ports) = match text.strip_prefix('[') {
        Some(rest) => rest.split_once("]:")?,
        // An IPv6 address without ports has no brackets.
        None if text.matches(':').count() > 1 => (text, ""),
        None => text.split_once(':').unwrap_or((text, "")),
    };
    let address = invariants::parse_address(address).ok()?;
    if ports == "*" {
        return Some(InstanceId { address, ports: PortSet::every() });
    }
    let mut all = Vec::new();
    for port in ports.split(',').filter(|port| !port.is_empty()) {
        let (number, protocol) = port.split_once('/').unwrap_or((port, Protocol::Tcp.as_str()));
        let protocol = Protocol::ALL.into_iter().find(|known| known.as_str() == protocol)?;
        all.push((protocol, number.parse().ok().filter(|number| *number > 0)?));
    }
    Some(InstanceId { address, ports: PortSet::new(all) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kubernetes::objects::slices::{
            ObservedSlice,
            tests::{HTTP, UDP, VALIDATOR, instance, spec, web},
        },
        replicas::tombstones::MAX_TOMBSTONE_BYTES,
    };

    fn tombstones() -> Tombstones {
        let mut tombstones = Tombstones::default();
        let dns = &[(53, UDP, "dns"), (8080, Protocol::Tcp, "http")];
        let specs = [spec("10.0.0.1", HTTP), spec("10.0.0.1", &[]), spec("2001:db8::1", dns), spec("2001:db8::2", &[])];
        let names = [spec("db.example.com", dns), spec("db.example.com", &[])];
        for (spec, clock) in specs.iter().chain(&names).zip(1_700_000_000_000_000..) {
            assert!(tombstones.insert(instance(spec).id(), Stamp { clock, term: 3, generation: 42 }));
        }
        for (address, clock) in ["10.0.0.3", "2001:db8::3", "mail.example.com"].into_iter().zip(1_700_000_000_000_010..)
        {
            let id = InstanceId { address: VALIDATOR.address(address).expect("valid"), ports: PortSet::every() };
            assert!(tombstones.insert(id, Stamp { clock, term: 3, generation: 42 }));
        }
        tombstones
    }

    /// These texts exist in clusters: later versions must read them.
    #[test]
    fn json_of_tombstones_is_stable_and_read_back() {
        let mut written = tombstones();
        written.raise_refuse_before(1_600_000_000_000_000);
        let mut slice = render(&web(), &name(&web(), 0), &written);
        assert_eq!(name(&web(), 0), "web-6914143a82");
        let text = annotation(&slice.metadata, names::TOMBSTONES).expect("written");
        assert_eq!(
            text,
            r#"{"10.0.0.1":[1700000000000001,3,42],"10.0.0.1:8080":[1700000000000000,3,42],"10.0.0.3:*":[1700000000000010,3,42],"[2001:db8::1]:8080,53/UDP":[1700000000000002,3,42],"2001:db8::2":[1700000000000003,3,42],"[2001:db8::3]:*":[1700000000000011,3,42],"db.example.com":[1700000000000005,3,42],"db.example.com:8080,53/UDP":[1700000000000004,3,42],"mail.example.com:*":[1700000000000012,3,42]}"#
        );
        assert_eq!(read_tombstones(&slice), Some(written.clone()));
        assert_eq!(untouched(&slice, &web(), &name(&web(), 0)), Some(digest(&written)));
        assert_ne!(digest(&tombstones()), digest(&written));
        // As the API server returns it.
        slice.metadata.uid = Some("u".into());
        slice.metadata.resource_version = Some("1".into());
        let observed = ObservedSlice::read(&slice).expect("ours");
        assert!(observed.tombstones && observed.group.is_none() && observed.digest == Some(digest(&written)));
        slice.metadata.annotations.get_or_insert_default().insert(names::REFUSE_BEFORE.into(), "x".into());
        assert_eq!(ObservedSlice::read(&slice).expect("ours").digest, None, "somebody edited it");
    }

    #[test]
    fn entries_that_gangplank_would_not_write_are_left_out() {
        let mut slice = render(&web(), "web-0", &Tombstones::default());
        let text = r#"{"":[1,1,1],"10.0.0.1:0":[1,1,1],"10.0.0.1:80/X":[1,1,1],"[::1":[1,1,1],"10.0.0.2":[9007199254740993,1,1],"10.0.0.3:80":[1,1,1]}"#;
        slice.metadata.annotations.get_or_insert_default().insert(names::TOMBSTONES.into(), text.into());
        let read = read_tombstones(&slice).expect("it is of tombstones");
        assert_eq!(read.iter().map(|one| one.id.to_string()).collect::<Vec<_>>(), ["10.0.0.3:80"]);
    }

    #[test]
    fn annotation_of_the_most_tombstones_is_within_their_limit() {
        let mut full = Tombstones::default();
        for n in 0..1_500_u64 {
            let ports = &[(53, UDP, "dns"), (8080, Protocol::Tcp, "http")];
            let id = instance(&spec(&format!("2001:db8::{:x}", n + 1), ports)).id();
            assert!(full.insert(id, Stamp { clock: MAX_STAMP - 2_000 + n, term: MAX_STAMP, generation: u64::MAX }));
            full.shrink();
            assert!(json(&full).len() <= MAX_TOMBSTONE_BYTES + 2);
        }
    }
}
