//! What one slice holds, and what a writer does about a slice that it sees.

use std::collections::BTreeMap;

use super::{lease::DirectoryId, word::Word};

/// The record in one slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceRecord<K, V> {
    /// The term under which it was written.
    pub term: u64,
    /// The writer's generation that it shows.
    pub generation: u64,
    /// Who wrote it.
    pub writer: DirectoryId,
    /// Instances and tombstones.
    pub words: BTreeMap<K, Word<V>>,
    /// The highest clock of a tombstone that there was no room for; 0 where none was dropped.
    pub refuse_before: u64,
}

/// What a writer makes of a slice that it sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    /// A higher term: this writer is deposed.
    Outranks,
    /// This writer's own, in this term, as it sent it last.
    Own,
    /// Says that it is this writer's own, in this term, but not what this writer sent last: an older version, or a hand changed it
    /// and left the annotations as they were. It confirms nothing; what differs is overwritten.
    Altered,
    /// From a lower term: a request of the writer before that came late, or one not rewritten yet.
    Late,
    /// Of this term, but not by this writer, or of a term that no Lease can have handed out: a hand did it. It is overwritten.
    Forged,
}

/// What a writer knows when it judges a slice.
#[derive(Debug, Clone, Copy)]
pub struct JudgingWriter<'a, K, V> {
    /// Its directory.
    pub id: DirectoryId,
    /// Its term.
    pub term: u64,
    /// The highest term that a Lease can have handed out: [`Election::highest_term`](super::election::Election::highest_term).
    pub highest_term: u64,
    /// What this writer sent last for the slice in this term.
    pub sent: Option<&'a SliceRecord<K, V>>,
}

impl<K: Ord + Clone, V: Clone + PartialEq> SliceRecord<K, V> {
    /// How `writer` takes this slice.
    #[must_use]
    pub fn judge(&self, writer: JudgingWriter<'_, K, V>) -> Judgement {
        if self.term > writer.highest_term {
            Judgement::Forged
        } else if self.term > writer.term {
            Judgement::Outranks
        } else if self.term < writer.term {
            Judgement::Late
        } else if self.writer != writer.id {
            Judgement::Forged
        } else if writer.sent == Some(self) {
            Judgement::Own
        } else {
            Judgement::Altered
        }
    }

    /// Whether a slice that says this has to stay. `expired_before` is that of tombstones: an empty slice still says that older words
    /// may have been removed.
    #[must_use]
    pub fn is_needed(&self, expired_before: u64) -> bool {
        !self.words.is_empty() || (self.refuse_before > 0 && self.refuse_before >= expired_before)
    }

    /// Drops the oldest tombstones until at most `room` are left. What is dropped is remembered as an age: a put that is no younger
    /// could be one that a dropped tombstone removed.
    pub fn shrink(&mut self, room: usize) {
        let tombstones = self.words.values().filter(|word| word.is_tombstone());
        let Some(clock) = dropped_to(tombstones.map(|word| (word.stamp.clock, 1)), room) else { return };
        self.words.retain(|_, word| !word.is_tombstone() || word.stamp.clock > clock);
        self.refuse_before = self.refuse_before.max(clock);
    }
}

/// The highest clock of the tombstones that have to be dropped, oldest first, until the rest fits `room`; `None` if all fit.
/// `tombstones` are clocks and sizes.
pub(super) fn dropped_to(tombstones: impl Iterator<Item = (u64, usize)>, room: usize) -> Option<u64> {
    let mut tombstones: Vec<(u64, usize)> = tombstones.collect();
    let mut surplus = tombstones.iter().map(|(_, size)| size).sum::<usize>().saturating_sub(room);
    tombstones.sort_unstable();
    let dropped = tombstones.into_iter().take_while(|(_, size)| {
        let drops = surplus > 0;
        surplus = surplus.saturating_sub(*size);
        drops
    });
    dropped.last().map(|(clock, _)| clock)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Stamp;

    const ME: DirectoryId = DirectoryId(1);

    fn record(term: u64, writer: u128, words: &[(u8, Option<u8>, u64)]) -> SliceRecord<u8, u8> {
        let word = |&(key, value, clock): &(u8, Option<u8>, u64)| {
            (key, Word { value, stamp: Stamp { clock, term, generation: 1 } })
        };
        let words = words.iter().map(word).collect();
        SliceRecord { term, generation: 1, writer: DirectoryId(writer), words, refuse_before: 0 }
    }

    #[test]
    fn term_and_writer_say_what_a_slice_is() {
        let sent = record(5, 1, &[(1, Some(1), 1)]);
        let judged = |slice: SliceRecord<u8, u8>| {
            slice.judge(JudgingWriter { id: ME, term: 5, highest_term: 9, sent: Some(&sent) })
        };
        assert_eq!(judged(record(10, 1, &[])), Judgement::Forged, "no Lease had that term");
        assert_eq!(judged(record(6, 1, &[])), Judgement::Outranks);
        assert_eq!(judged(sent.clone()), Judgement::Own);
        assert_eq!(judged(record(5, 1, &[])), Judgement::Altered, "a word is missing");
        assert_eq!(judged(record(5, 2, &[])), Judgement::Forged);
        assert_eq!(judged(record(4, 1, &[])), Judgement::Late);
    }

    #[test]
    fn oldest_tombstones_go_first_and_leave_their_age() {
        let mut slice = record(5, 1, &[(1, Some(1), 1), (2, None, 30), (3, None, 10), (4, None, 20)]);
        slice.shrink(1);
        assert_eq!(slice.words.keys().copied().collect::<Vec<_>>(), [1, 2]);
        assert_eq!(slice.refuse_before, 20);
    }

    #[test]
    fn slice_whose_tombstones_were_all_dropped_stays_as_long_as_they_would_have() {
        let mut slice = record(5, 1, &[(2, None, 30)]);
        slice.shrink(0);
        assert!(slice.words.is_empty() && slice.is_needed(30) && !slice.is_needed(31));
        assert!(!record(5, 1, &[]).is_needed(0));
    }
}
