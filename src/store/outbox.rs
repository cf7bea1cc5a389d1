//! The outbox: the changes that Kubernetes lacks, and the term under which it is written to.
//!
//! Kubernetes lacks every `Put` and `Remove` from the generation of its batch on, until a later
//! `Mirrored` of its service names that generation or a higher one. An entry may also say by itself
//! that it is mirrored: those that a comparison with Kubernetes adds do. A snapshot says of each instance since which generation it is unmirrored, or that it
//! is mirrored; it keeps a removal as long as that is unmirrored. So the outbox has one entry per
//! instance at most, and none for what Kubernetes has.
//!
//! A snapshot that is made without the outbox drops removals and the rest of this. So a start
//! without the outbox resets the term before it may make a snapshot, and counts what such a
//! snapshot holds as unmirrored.
//!
//! A `Mirrored` that was not synced may be lost. Then the outbox is larger than necessary, never
//! smaller.

use std::{collections::BTreeMap, ops::Range};

use super::{
    Record,
    format::{Entry, EntryKind},
};

/// The outbox, collected while a start reads the files.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// [`super::Options::outbox`]; without it only the term is collected.
    enabled: bool,
    /// By the instance's key: since which generation it is unmirrored, and its last record.
    unmirrored: BTreeMap<Vec<u8>, (u64, Record)>,
    pub(super) term: u64,
}

/// An entry's place in the outbox, taken before the entry becomes a record.
#[derive(Debug)]
pub(super) struct OutboxKey {
    key: Vec<u8>,
    since: u64,
}

impl Outbox {
    pub(super) fn new(enabled: bool) -> Self {
        Self { enabled, ..Self::default() }
    }

    /// The place of an entry from a frame of `generation`; `None` if it does not change the outbox.
    pub(super) fn outbox_key(&self, entry: &Entry, generation: u64) -> Option<OutboxKey> {
        // Most entries of a snapshot are mirrored: no key is built for those.
        let since = entry.since(generation);
        let counts = self.enabled && (since > 0 || matches!(entry.kind(), EntryKind::Mirrored { .. }));
        counts.then(|| OutboxKey { key: entry.key(), since })
    }

    /// Adds a record, and returns it if it is about an instance.
    pub(super) fn take(&mut self, outbox_key: Option<OutboxKey>, record: Record) -> Option<Record> {
        match record {
            Record::Put { .. } | Record::Remove { .. } => {
                if let Some(OutboxKey { key, since }) = outbox_key {
                    self.unmirrored.insert(key, (since, record.clone()));
                }
                return Some(record);
            }
            Record::Mirrored { generation, .. } => {
                if let Some(OutboxKey { key, .. }) = outbox_key {
                    self.unmirrored.extract_if(of_service(key), |_, (since, _)| *since <= generation).for_each(drop);
                }
            }
            Record::Term { term } => self.term = term,
        }
        None
    }

    /// The outbox in order of generation.
    pub(super) fn into_records(self) -> Vec<Record> {
        let mut unmirrored: Vec<(u64, Record)> = self.unmirrored.into_values().collect();
        unmirrored.sort_by_key(|(since, _)| *since);
        unmirrored.into_iter().map(|(_, record)| record).collect()
    }
}

/// The last entry per key in the closed segments of a compaction, for the keys of one window: as many
/// from its first key on as there is room for.
#[derive(Debug, Default)]
pub(super) struct ClosedChanges {
    /// By the instance's key; each says since when it is unmirrored.
    pub(super) entries: BTreeMap<Vec<u8>, Entry>,
    pub(super) services: MirroredServices,
    pub(super) term: Option<u64>,
    first: Vec<u8>,
    /// The first key behind the window; `None` where the window has all keys.
    pub(super) end: Option<Vec<u8>>,
    /// Of keys, entries and services, as they are encoded.
    bytes: usize,
    max_bytes: usize,
}

impl ClosedChanges {
    /// A window that begins with the key `first` and has room for `max_bytes`, or for one entry that is
    /// larger.
    pub(super) fn from_key(first: Vec<u8>, max_bytes: usize) -> Self {
        Self { first, max_bytes, ..Self::default() }
    }

    /// Adds an entry from a frame of `generation`, if it is in the window; later ones win.
    pub(super) fn take(&mut self, mut entry: Entry, generation: u64) {
        let key = entry.key();
        match entry.kind() {
            EntryKind::Instance => {
                if key < self.first || self.end.as_ref().is_some_and(|end| key >= *end) {
                    return;
                }
                entry.set_since(Some(entry.since(generation)));
                self.bytes += size(&key, &entry);
                if let Some((key, replaced)) = self.entries.remove_entry(&key) {
                    self.bytes -= size(&key, &replaced);
                }
                self.entries.insert(key, entry);
                self.shrink();
            }
            EntryKind::Mirrored { generation } => {
                let instances = of_service(key.clone());
                if instances.end <= self.first || self.end.as_ref().is_some_and(|end| key >= *end) {
                    return;
                }
                for (_, covered) in self.entries.range_mut(instances) {
                    if covered.since(0) <= generation {
                        self.bytes -= covered.size();
                        covered.set_since(Some(0));
                        self.bytes += covered.size();
                    }
                }
                let new = key.len();
                let highest = self.services.0.entry(key).or_insert_with(|| {
                    self.bytes += new;
                    0
                });
                *highest = generation.max(*highest);
                self.shrink();
            }
            EntryKind::Term { term } => self.term = Some(term),
            EntryKind::Empty => {}
        }
    }

    /// Ends the window earlier, until what is in it has room.
    fn shrink(&mut self) {
        while self.bytes > self.max_bytes && self.entries.len() > 1 {
            let (key, entry) = self.entries.pop_last().expect("more than one");
            self.bytes -= size(&key, &entry);
            // The service of the window's last key comes before that key, and stays.
            for service in self.services.0.split_off(&key).into_keys() {
                self.bytes -= service.len();
            }
            self.end = Some(key);
        }
    }

    /// Removes the first entry whose key is before `key`, or the first of all.
    pub(super) fn pop_before(&mut self, key: Option<&Vec<u8>>) -> Option<Entry> {
        let first = self.entries.first_entry()?;
        key.is_none_or(|key| first.key() < key).then(|| first.remove())
    }
}

/// Bytes that an entry counts for in a window.
fn size(key: &[u8], entry: &Entry) -> usize {
    key.len() + entry.size()
}

/// The generation up to which Kubernetes has each service, by the prefix of its instances' keys.
#[derive(Debug, Default)]
pub(super) struct MirroredServices(BTreeMap<Vec<u8>, u64>);

impl MirroredServices {
    /// Updates since when an entry of the old snapshot, from a frame of `generation`, is unmirrored.
    pub(super) fn settle(&self, key: &[u8], entry: &mut Entry, generation: u64) {
        let since = entry.since(generation);
        let service = key.split_inclusive(|byte| *byte == 0).take(2).map(<[u8]>::len).sum();
        let covered = since == 0 || self.0.get(&key[..service]).is_some_and(|mirrored| *mirrored >= since);
        entry.set_since(Some(if covered { 0 } else { since }));
    }
}

/// The range of the keys of a service's instances.
fn of_service(first: Vec<u8>) -> Range<Vec<u8>> {
    let mut behind = first.clone();
    if let Some(last) = behind.last_mut() {
        *last += 1; // the 0 that ends the name
    }
    first..behind
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{InstanceSpec, UnixMillis, testing::VALIDATOR};

    fn put(name: &str) -> Entry {
        let service = VALIDATOR.service("prod", name).expect("valid");
        let spec = InstanceSpec { address: "10.0.0.1".into(), ..InstanceSpec::default() };
        let instance = VALIDATOR.instance(&service, &spec, UnixMillis(1)).expect("valid").into();
        Entry::from(&Record::Put { service, instance })
    }

    fn mirrored(name: &str, generation: u64) -> Entry {
        Entry::from(&Record::Mirrored { service: VALIDATOR.service("prod", name).expect("valid"), generation })
    }

    /// Takes a thousand services, three times and out of order, and says that each is mirrored.
    fn window(first: Vec<u8>, max_bytes: usize) -> (ClosedChanges, usize) {
        let mut window = ClosedChanges::from_key(first, max_bytes);
        let mut most = 0;
        for n in 0..3_000 {
            let name = format!("s{:03}", n * 7 % 1_000);
            window.take(put(&name), n);
            window.take(mirrored(&name, n), n);
            most = most.max(window.bytes);
        }
        (window, most)
    }

    #[test]
    fn windows_are_bounded_and_have_every_key_once() {
        let (all, unbounded) = window(Vec::new(), usize::MAX);
        let (expected, max) = (all.entries.into_iter().collect::<Vec<_>>(), 4_096);
        assert!(unbounded > 10 * max && all.end.is_none());
        let (mut found, mut next) = (Vec::new(), Some(Vec::new()));
        while let Some(first) = next {
            let (mut window, most) = window(first, max);
            assert!(most <= max, "{most} bytes are held, {max} are allowed");
            next = window.end.take();
            found.extend(std::mem::take(&mut window.entries));
        }
        assert_eq!(found, expected);
    }
}
