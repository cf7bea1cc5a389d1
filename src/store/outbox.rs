//! The outbox: the changes that Kubernetes lacks, and the term under which it is written to.
//!
//! Kubernetes lacks every `Put` and `Remove` from the generation of its batch on, until a later
//! `Mirrored` of its service names that generation or a higher one. Segments hold nothing else
//! about it. A snapshot says of each instance since which generation it is unmirrored, or that it
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

/// The last entry per key in the closed segments of a compaction.
#[derive(Debug, Default)]
pub(super) struct ClosedChanges {
    /// By the instance's key; each says since when it is unmirrored.
    pub(super) entries: BTreeMap<Vec<u8>, Entry>,
    pub(super) services: MirroredServices,
    pub(super) term: Option<u64>,
}

impl ClosedChanges {
    /// Adds an entry from a frame of `generation`; later ones win.
    pub(super) fn take(&mut self, mut entry: Entry, generation: u64) {
        let key = entry.key();
        match entry.kind() {
            EntryKind::Instance => {
                entry.set_since(Some(entry.since(generation)));
                self.entries.insert(key, entry);
            }
            EntryKind::Mirrored { generation } => {
                for (_, covered) in self.entries.range_mut(of_service(key.clone())) {
                    if covered.since(0) <= generation {
                        covered.set_since(Some(0));
                    }
                }
                let highest = self.services.0.entry(key).or_default();
                *highest = generation.max(*highest);
            }
            EntryKind::Term { term } => self.term = Some(term),
            EntryKind::Empty => {}
        }
    }
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
