//! What hands do to slices, with kubectl: and what of that the protocol has to repair.

use super::*;

/// Values that no client asked for begin here.
const BY_HAND: Value = 1_000_000;

/// What a hand does to a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Edit {
    RemoveWord,
    ChangeValue,
    DropTombstone,
    DeleteSlice,
    /// Only the annotations.
    Nothing,
}

/// What becomes of a slice's annotations in an edit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Annotations {
    Kept,
    LowerTerm,
    HigherTerm,
    /// A term that no Lease ever had.
    AbsurdTerm,
    HigherGeneration,
}

/// What a hand did to a key that is not repaired yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Edited {
    time: Micros,
    /// Of the youngest word that the hand took away.
    stamp: Stamp,
}

impl World {
    pub(super) fn edit(&mut self, slice: usize, edit: Edit, annotations: Annotations) {
        let Some((_, before)) = self.slices[slice].clone() else { return };
        let mut after = before.clone();
        let live = |word: &Word<Value>| !word.is_tombstone();
        let words: Vec<Key> = before.words.iter().filter(|(_, word)| live(word)).map(|(key, _)| *key).collect();
        let tombstones: Vec<Key> = before.words.iter().filter(|(_, word)| !live(word)).map(|(key, _)| *key).collect();
        let from = if edit == Edit::DropTombstone { tombstones } else { words };
        let key = (!from.is_empty()).then(|| from[self.random.between(0, from.len() as u64) as usize]);
        match (edit, key) {
            (Edit::RemoveWord | Edit::DropTombstone, Some(key)) => {
                after.words.remove(&key);
            }
            (Edit::ChangeValue, Some(key)) => {
                let value = BY_HAND + self.next_value;
                self.next_value += 1;
                after.words.entry(key).and_modify(|word| word.value = Some(value));
            }
            (Edit::RemoveWord | Edit::DropTombstone | Edit::ChangeValue, None) => return,
            (Edit::DeleteSlice | Edit::Nothing, _) => {}
        }
        match annotations {
            Annotations::Kept => {}
            Annotations::LowerTerm => after.term -= self.random.between(1, 3),
            Annotations::HigherTerm => after.term = after.term.saturating_add(self.random.between(1, 4)),
            Annotations::AbsurdTerm => after.term = u64::MAX - self.random.between(0, 2),
            Annotations::HigherGeneration => after.generation += self.random.between(1, 5),
        }
        let deleted = edit == Edit::DeleteSlice;
        for key in self.keys().filter(|key| key.slice == slice) {
            // The age limit goes with the slice, and that speaks of all keys.
            if deleted || last_word(&before.words, key) != last_word(&after.words, key) {
                let stamp = last_word(&before.words, key).map(|word| word.stamp).unwrap_or_default();
                let known = self.edited.get(&key).map_or(stamp, |edited| edited.stamp.max(stamp));
                self.edited.insert(key, Edited { time: self.time, stamp: known });
            }
        }
        self.version += 1;
        let found = (!deleted).then_some((self.version, after));
        self.change(slice, found);
    }

    /// A namespace, with the slice in it, is deleted; for more than a minute it is away, longer than any request is late.
    pub(super) fn delete_namespace(&mut self, slice: usize) {
        self.edit(slice, Edit::DeleteSlice, Annotations::Kept);
        self.version += 1;
        self.namespaces
            .insert(slice, (self.version, self.time, self.time + self.random.between(61 * SECOND, 90 * SECOND)));
        self.change(slice, None);
    }

    pub(super) fn namespace_is_away(&self, slice: usize) -> bool {
        self.namespaces.get(&slice).is_some_and(|(.., until)| *until > self.time)
    }

    /// The watch shows a replica that a slice is gone as of `version`: if that is because of its namespace, so it says.
    pub(super) fn show_namespace(&mut self, index: usize, epoch: u32, slice: usize, version: u64) {
        let Some(&(deletion, deleted, until)) = self.namespaces.get(&slice) else { return };
        if version < deletion || until < self.time {
            return;
        }
        let mut forgotten = false;
        self.step(index, epoch, |replica, _| forgotten = replica.namespace_deleted(slice));
        if !forgotten {
            return;
        }
        let keys = self.keys().filter(|key| key.slice == slice);
        if self.target(Target::Holder) != Some(index) {
            // It was deposed and does not know. What only it had accepted is forgotten all the same.
            keys.for_each(|key| self.checker.lost_with_directory(key, index));
        } else if self.deletions_seen.insert((slice, deletion)) {
            keys.for_each(|key| self.checker.namespace_deleted(key, deleted, self.time));
        }
    }

    /// A replica wrote `record`. Words that are as young as those that a hand took away are repaired by it; a late request, sent
    /// before there were such words, puts nothing right.
    pub(super) fn put_right(&mut self, slice: usize, record: &Record) {
        self.edited.retain(|key, edited| {
            let word = last_word(&record.words, *key);
            let stands =
                word.is_some_and(|word| word.stamp >= edited.stamp) || record.refuse_before >= edited.stamp.clock;
            key.slice != slice || !stands
        });
    }

    /// A take-over lists slices. What a hand did to them and is not repaired is the truth from now on.
    pub(super) fn edits_are_listed(&mut self) {
        for (key, edited) in std::mem::take(&mut self.edited) {
            let word = self.slices[key.slice].as_ref().and_then(|(_, record)| last_word(&record.words, key));
            let value = word.and_then(|word| word.value).filter(|value| *value >= BY_HAND);
            self.checker.edited(key, edited.time, value, self.time);
        }
    }
}
