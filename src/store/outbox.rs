//! The outbox: the changes that Kubernetes lacks, and the term under which it is written to.
//!
//! Kubernetes lacks every `Put` and `Remove` from the generation of its batch on, until a later
//! `Mirrored` of its service names that generation or a higher one. An entry may also be marked as
//! mirrored itself, as those are that a comparison with Kubernetes adds, and those that another process took
//! over; an earlier entry of the instance is then mirrored too. A snapshot has for each
//! instance the generation since which it is unmirrored, or the mark that it is mirrored; it keeps a
//! removal as long as that is unmirrored. So the outbox has one entry per instance at most, and none
//! for what Kubernetes has.
//!
//! A snapshot that is made without the outbox does not say what is unmirrored. So a start
//! without the outbox resets the term to 0 before it may make a snapshot, and counts what such a
//! snapshot holds as unmirrored. A term of 0 stays in every snapshot: the directory had one, so removals are remembered.
//!
//! A `Mirrored` that was not synced may be lost. Then the outbox is larger than necessary, never
//! smaller.

use std::{collections::BTreeMap, ops::Range};

use super::{
    DirectoryTerm, Record,
    format::{Entry, EntryKind},
};

/// The outbox, collected while a start reads the files.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// [`super::StoreOptions::outbox`]; without it only the term is collected.
    enabled: bool,
    /// By the instance's key: since which generation it is unmirrored, and its last record.
    unmirrored: BTreeMap<Vec<u8>, (u64, Record)>,
    /// The last term; `None` in a directory that never had one.
    pub(super) term: Option<DirectoryTerm>,
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
        // Most entries of a snapshot are mirrored: no key is built for those while nothing is unmirrored.
        let since = entry.since(generation);
        let counts = self.enabled
            && (since > 0 || !self.unmirrored.is_empty() || matches!(entry.kind(), EntryKind::Mirrored { .. }));
        counts.then(|| OutboxKey { key: entry.key(), since })
    }

    /// Adds a record, and returns it if it is about instances.
    pub(super) fn take(&mut self, outbox_key: Option<OutboxKey>, record: Record) -> Option<Record> {
        match record {
            Record::Put { .. } | Record::Remove { .. } => {
                match outbox_key {
                    Some(OutboxKey { key, since: 0 }) => drop(self.unmirrored.remove(&key)),
                    Some(OutboxKey { key, since }) => drop(self.unmirrored.insert(key, (since, record.clone()))),
                    None => {}
                }
                return Some(record);
            }
            Record::Mirrored { generation, .. } => {
                if let Some(OutboxKey { key, .. }) = outbox_key {
                    // Changes after that generation are not confirmed, and stay.
                    self.unmirrored.extract_if(of_service(key), |_, (since, _)| *since <= generation).for_each(drop);
                }
            }
            Record::RefuseBefore { .. } => return Some(record),
            Record::Term(term) => self.term = Some(term),
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

/// What the closed segments of a compaction hold for the keys of one window: the last entry per key,
/// and the mirrored services that have instances there. The window has as many keys, from its first
/// key on, as there is room for.
#[derive(Debug, Default)]
pub(super) struct ClosedChanges {
    /// By the instance's key; in each is set since when it is unmirrored.
    pub(super) entries: BTreeMap<Vec<u8>, Entry>,
    pub(super) services: MirroredServices,
    pub(super) term: Option<DirectoryTerm>,
    first: Vec<u8>,
    /// The first key behind the window; `None` where the window has all keys.
    pub(super) end: Option<Vec<u8>>,
    /// Of what is held: [`size`] of each entry, [`service_size`] of each service.
    bytes: usize,
    max_bytes: usize,
}

impl ClosedChanges {
    /// A window that begins with the key `first` and has room for `max_bytes`, or for the entry and the
    /// service of its first key if those are larger.
    pub(super) fn from_key(first: Vec<u8>, max_bytes: usize) -> Self {
        Self { first, max_bytes, ..Self::default() }
    }

    /// Adds an entry from a frame of `generation`, if it is in the window; later ones win.
    pub(super) fn take(&mut self, mut entry: Entry, generation: u64) {
        let key = entry.key();
        match entry.kind() {
            EntryKind::Instance | EntryKind::RefuseBefore { .. } => {
                if key < self.first || self.end.as_ref().is_some_and(|end| key >= *end) {
                    return;
                }
                // In the journal the frame says since when. A frame of the snapshot has entries of many frames, so each
                // has to say it itself.
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
                // Only entries from before the confirmation are here yet: it does not cover those that are read later.
                for (_, covered) in self.entries.range_mut(instances) {
                    if covered.since(0) <= generation {
                        self.bytes -= covered.size();
                        covered.set_since(Some(0));
                        self.bytes += covered.size();
                    }
                }
                let new = service_size(&key);
                let highest = self.services.0.entry(key).or_insert_with(|| {
                    self.bytes += new;
                    0
                });
                // For the entries of the old snapshot too, which are settled when the merge reaches them.
                *highest = generation.max(*highest);
                self.shrink();
            }
            EntryKind::Term(term) => self.term = Some(term),
            EntryKind::Empty => {}
        }
    }

    /// Ends the window earlier, until what is in it has room. The next window begins where it ends.
    fn shrink(&mut self) {
        while self.bytes > self.max_bytes {
            let entry = self.entries.last_key_value().map(|(key, _)| key);
            let service = self.services.0.last_key_value().map(|(key, _)| key);
            // At or before the first key are only its own entry and its own service. They stay: a
            // window that ends where it begins would be followed by the same one.
            let Some(end) = entry.max(service).filter(|key| **key > self.first).cloned() else { break };
            if let Some(entry) = self.entries.remove(&end) {
                self.bytes -= size(&end, &entry);
            }
            // A service whose prefix is before the end stays, because the window has keys of its
            // instances; the next window takes it too, if the end is one of those keys.
            if self.services.0.remove(&end).is_some() {
                self.bytes -= service_size(&end);
            }
            self.end = Some(end);
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

/// Bytes that a mirrored service counts for in a window: most of what it takes is not its short key.
fn service_size(key: &[u8]) -> usize {
    key.len() + size_of::<(Vec<u8>, u64)>()
}

/// The generation up to which Kubernetes has each service, by the prefix of its instances' keys.
#[derive(Debug, Default)]
pub(super) struct MirroredServices(BTreeMap<Vec<u8>, u64>);

impl MirroredServices {
    /// Updates since when an entry of the old snapshot, from a frame of `generation`, is unmirrored.
    pub(super) fn settle(&self, key: &[u8], entry: &mut Entry, generation: u64) {
        let since = entry.since(generation);
        // Namespace and service each end with a 0: the key up to the second one is the service's.
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

    fn put(name: &str, address: &str) -> Entry {
        let service = VALIDATOR.service("prod", name).expect("valid");
        let spec = InstanceSpec { address: address.into(), ..InstanceSpec::default() };
        let instance = VALIDATOR.instance(&service, &spec, UnixMillis(1)).expect("valid").into();
        Entry::from(&Record::Put { service, instance })
    }

    fn mirrored(name: &str, generation: u64) -> Entry {
        Entry::from(&Record::Mirrored { service: VALIDATOR.service("prod", name).expect("valid"), generation })
    }

    /// Takes the records of closed segments into windows of `max_bytes`, as a merge does. Fails if a
    /// window holds more at any time.
    fn windows(segments: &[(Entry, u64)], max_bytes: usize) -> Vec<ClosedChanges> {
        let (mut windows, mut next) = (Vec::new(), Some(Vec::new()));
        while let Some(first) = next.take() {
            let mut window = ClosedChanges::from_key(first, max_bytes);
            for (entry, generation) in segments {
                window.take(entry.clone(), *generation);
                assert!(window.bytes <= max_bytes, "{} bytes are held, {max_bytes} are allowed", window.bytes);
            }
            assert!(window.end.as_ref().is_none_or(|end| *end > window.first), "an empty window is followed by itself");
            next = window.end.clone();
            windows.push(window);
        }
        windows
    }

    /// Since when the windows say that each instance of an old snapshot is unmirrored.
    fn settled(windows: &[ClosedChanges], old: &[Entry]) -> Vec<u64> {
        let settle = |old: &Entry| {
            let (key, mut entry) = (old.key(), old.clone());
            let holds =
                |window: &&ClosedChanges| window.first <= key && window.end.as_ref().is_none_or(|end| key < *end);
            let [window] = windows.iter().filter(holds).collect::<Vec<_>>()[..] else {
                panic!("not exactly one window has the key");
            };
            window.services.settle(&key, &mut entry, 500);
            entry.since(0)
        };
        old.iter().map(settle).collect()
    }

    const ADDRESSES: [&str; 3] = ["10.0.0.0", "10.0.0.1", "10.0.0.2"];

    fn name(n: u64) -> String {
        format!("s{:03}", n * 7 % 1_000)
    }

    /// A thousand services, three times and out of order; some of the mirrored generations are too
    /// low for what an old snapshot holds.
    fn segments(instances: bool) -> Vec<(Entry, u64)> {
        let mut segments = Vec::new();
        for n in 0..3_000 {
            if instances {
                segments.push((put(&name(n), ADDRESSES[1]), n));
            }
            if !instances || n % 3 > 0 {
                segments.push((mirrored(&name(n), n * 11 % 1_000), n));
            }
        }
        segments
    }

    #[test]
    fn windows_are_bounded_and_have_every_key_once() {
        for (instances, max) in [(true, 4_096), (true, 200), (false, 4_096), (false, 60)] {
            let segments = segments(instances);
            let mut unbounded = windows(&segments, usize::MAX);
            let [all] = &mut unbounded[..] else { panic!("one window has everything") };
            assert!(all.bytes > 3 * max);
            // Before, at and behind the key of the entry that may begin or end a window.
            let old: Vec<Entry> = (0..1_000).flat_map(|n| ADDRESSES.map(|address| put(&name(n), address))).collect();
            let mut windows = windows(&segments, max);
            let expected = settled(std::slice::from_ref(all), &old);
            assert!(expected.contains(&0) && expected.contains(&500));
            assert_eq!(settled(&windows, &old), expected);
            let found: Vec<_> = windows.iter_mut().flat_map(|window| std::mem::take(&mut window.entries)).collect();
            assert_eq!(found, std::mem::take(&mut all.entries).into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn window_without_room_holds_its_first_key_and_ends_before_the_next() {
        let segments = [(put("web", ADDRESSES[0]), 1), (put("web", ADDRESSES[1]), 2), (mirrored("web", 1), 3)];
        let mut window = ClosedChanges::from_key(segments[0].0.key(), 1);
        segments.iter().for_each(|(entry, generation)| window.take(entry.clone(), *generation));
        assert_eq!(window.entries.into_keys().collect::<Vec<_>>(), [segments[0].0.key()]);
        assert_eq!((window.services.0.len(), window.end), (1, Some(segments[1].0.key())));
    }
}
