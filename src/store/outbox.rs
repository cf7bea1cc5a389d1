//! The outbox: what Kubernetes lacks of what is stored, and the term it is written under.
//!
//! Every `Put` and `Remove` is lacking in Kubernetes since the generation of its batch, until a
//! `Mirrored` of its service comes behind it that names that generation or a later one. In the
//! segments nothing else is written. A snapshot says of each instance since when it is lacking,
//! or that it is not, and holds a removal as long as it is lacking; once that is over, the next
//! snapshot has neither. Nothing here grows with what Kubernetes has.
//!
//! A snapshot made without the outbox has forgotten removals and says nothing of the rest. So a
//! start without the outbox takes the term back before it may make one, and what such a snapshot
//! holds counts as lacking.
//!
//! An un-synced `Mirrored` may be lost; then the outbox is larger than it need be. It is never
//! smaller.

use std::{collections::BTreeMap, ops::Range};

use super::{
    Record,
    format::{Entry, Subject},
};

/// The outbox while a start reads the files.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// Whether anything but the term is kept.
    keeps: bool,
    /// By the key of the instance: since when it is lacking, and what.
    lacking: BTreeMap<Vec<u8>, (u64, Record)>,
    pub(super) term: u64,
}

/// Where an entry belongs in the outbox, if anywhere.
#[derive(Debug)]
pub(super) struct Slot {
    key: Vec<u8>,
    since: u64,
}

impl Outbox {
    pub(super) fn new(keeps: bool) -> Self {
        Self { keeps, ..Self::default() }
    }

    /// Looks at an entry of a frame of `generation` before it becomes a record.
    pub(super) fn slot(&self, entry: &Entry, generation: u64) -> Option<Slot> {
        // What Kubernetes has, and that is most of a snapshot, costs nothing more than this.
        let since = entry.since(generation);
        let counts = self.keeps && (since > 0 || matches!(entry.subject(), Subject::Mirrored { .. }));
        counts.then(|| Slot { key: entry.key(), since })
    }

    /// Takes in the record that the entry became, and gives it back if it is not for here alone.
    pub(super) fn take(&mut self, slot: Option<Slot>, record: Record) -> Option<Record> {
        match record {
            Record::Put { .. } | Record::Remove { .. } => {
                if let Some(Slot { key, since }) = slot {
                    self.lacking.insert(key, (since, record.clone()));
                }
                return Some(record);
            }
            Record::Mirrored { generation, .. } => {
                if let Some(Slot { key, .. }) = slot {
                    self.lacking.extract_if(of_service(key), |_, (since, _)| *since <= generation).for_each(drop);
                }
            }
            Record::Term { term } => self.term = term,
        }
        None
    }

    /// What is lacking, in order of generation.
    pub(super) fn into_records(self) -> Vec<Record> {
        let mut lacking: Vec<(u64, Record)> = self.lacking.into_values().collect();
        lacking.sort_by_key(|(since, _)| *since);
        lacking.into_iter().map(|(_, record)| record).collect()
    }
}

/// What the segments of a compaction say last.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Of each instance that they name, since when it is lacking included.
    pub(super) entries: BTreeMap<Vec<u8>, Entry>,
    pub(super) services: Services,
    pub(super) term: Option<u64>,
}

impl Changes {
    /// Takes in an entry of a frame of `generation`; later ones win.
    pub(super) fn take(&mut self, mut entry: Entry, generation: u64) {
        let key = entry.key();
        match entry.subject() {
            Subject::Instance => {
                entry.set_since(Some(entry.since(generation)));
                self.entries.insert(key, entry);
            }
            Subject::Mirrored { generation } => {
                for (_, covered) in self.entries.range_mut(of_service(key.clone())) {
                    if covered.since(0) <= generation {
                        covered.set_since(Some(0));
                    }
                }
                let highest = self.services.0.entry(key).or_default();
                *highest = generation.max(*highest);
            }
            Subject::Term { term } => self.term = Some(term),
            Subject::Nothing => {}
        }
    }
}

/// Up to which generation Kubernetes has services, by what the keys of their instances begin with.
#[derive(Debug, Default)]
pub(super) struct Services(BTreeMap<Vec<u8>, u64>);

impl Services {
    /// Notes in an entry of the old snapshot, from a frame of `generation`, since when it is
    /// lacking now.
    pub(super) fn settle(&self, key: &[u8], entry: &mut Entry, generation: u64) {
        let since = entry.since(generation);
        let service = key.split_inclusive(|octet| *octet == 0).take(2).map(<[u8]>::len).sum();
        let covered = since == 0 || self.0.get(&key[..service]).is_some_and(|mirrored| *mirrored >= since);
        entry.set_since(Some(if covered { 0 } else { since }));
    }
}

/// The keys of a service's instances.
fn of_service(first: Vec<u8>) -> Range<Vec<u8>> {
    let mut behind = first.clone();
    if let Some(last) = behind.last_mut() {
        *last += 1; // it is the 0 that ends the name
    }
    first..behind
}
