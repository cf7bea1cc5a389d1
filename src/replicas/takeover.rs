//! How a new writer puts the truth together: from the slices, its directory, and its outbox.

use std::collections::BTreeMap;

use super::{
    election::Tenure,
    lease::DirectoryId,
    rules::Rules,
    slice::SliceRecord,
    word::{AgeLimit, Merged, TombstoneLifetime, Word},
};
use crate::model::HybridClock;

/// What a data directory holds.
#[derive(Debug, Clone)]
pub struct Directory<K, V> {
    /// Its identity.
    pub id: DirectoryId,
    /// The term under which its words were written; 0 before the first.
    pub term: u64,
    /// The highest generation it published.
    pub generation: u64,
    /// Its hybrid clock.
    pub clock: HybridClock,
    /// Whether another replica is known to have written since `term`, or to write: then nothing is answered from here any more.
    pub followed: bool,
    /// The last word on every key, as of `term`. Empty once this replica was deposed by another.
    pub words: BTreeMap<K, Word<V>>,
    /// Words that are not confirmed to be in Kubernetes.
    pub outbox: BTreeMap<K, Word<V>>,
    /// The highest age that a dropped tombstone asks for, by the slice it was dropped from.
    pub refuse_before: u64,
}

impl<K, V> Directory<K, V> {
    /// An empty directory.
    #[must_use]
    pub fn new(id: DirectoryId) -> Self {
        Self {
            id,
            term: 0,
            followed: false,
            generation: 0,
            clock: HybridClock::default(),
            words: BTreeMap::new(),
            outbox: BTreeMap::new(),
            refuse_before: 0,
        }
    }
}

/// The truth with which a tenure begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Truth<K: Ord, V> {
    /// The last word on every key.
    pub words: BTreeMap<K, Word<V>>,
    /// Which of them Kubernetes may not have.
    pub outbox: BTreeMap<K, Word<V>>,
    /// Words of this directory that are too old to count. Whoever said them was told 202; this must not be silent.
    pub refused: Vec<(K, Word<V>)>,
    /// The generation to publish.
    pub generation: u64,
    /// The clock to go on with.
    pub clock: HybridClock,
    /// The highest age that a dropped tombstone asks for.
    pub refuse_before: u64,
}

/// A slice has the term of this tenure or a higher one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HigherTerm(pub u64);

/// Puts the truth together. What was in a namespace that was deleted under another writer comes back from an older directory only if neither
/// the Lease nor any slice is left to show that somebody wrote after that directory. `slices` is a quorum list that was begun after the Lease was taken. A slice with a term above
/// `highest_term` has it from a hand: its words count, its term does not.
///
/// # Errors
/// When a slice has the term of `tenure` or a higher one: the Lease must be taken with a higher term, then listed again.
pub fn merge<'s, K, V>(
    tenure: &Tenure,
    slices: impl Iterator<Item = &'s SliceRecord<K, V>> + Clone,
    directory: &Directory<K, V>,
    highest_term: u64,
    wall: u64,
    lifetime: TombstoneLifetime,
    rules: Rules,
) -> Result<Truth<K, V>, HigherTerm>
where
    K: Ord + Clone + 's,
    V: Clone + PartialEq + 's,
{
    let terms = slices.clone().map(|slice| slice.term).filter(|term| *term <= highest_term);
    let highest = terms.max().unwrap_or(0);
    if highest >= tenure.term {
        return Err(HigherTerm(highest));
    }
    let mut clock = directory.clock;
    let mut generation = directory.generation.max(tenure.previous.as_ref().map_or(0, |lease| lease.generation));
    let mut refuse_before = directory.refuse_before;
    let mut words = BTreeMap::new();
    for slice in slices {
        generation = generation.max(slice.generation);
        refuse_before = refuse_before.max(slice.refuse_before);
        for (key, word) in &slice.words {
            clock.observe(word.stamp.clock);
            // An instance that moved between slices may stand in both.
            if words.get(key).is_none_or(|other: &Word<V>| other.stamp < word.stamp) {
                words.insert(key.clone(), word.clone());
            }
        }
    }
    let previous_term = tenure.previous.as_ref().map_or(0, |lease| lease.term);
    let newest = !rules.directory_needs_newest_term || (directory.term >= previous_term && directory.term >= highest);
    let own = (directory.term > 0 && newest).then_some(&directory.words);
    let limit = AgeLimit::at(clock, wall, lifetime, refuse_before);
    let mut refused = Vec::new();
    for (key, word) in own.into_iter().flatten() {
        let known = words.get(key).map(|other: &Word<V>| other.stamp);
        let merged = match limit.merge(known, word) {
            Merged::TooOld if !rules.refuse_old_puts => Merged::Applied,
            merged => merged,
        };
        match merged {
            Merged::Applied => {
                words.insert(key.clone(), word.clone());
            }
            Merged::Outranked => {}
            // Not news: the writer of this word had it confirmed, and it was removed since.
            Merged::TooOld => {}
        }
    }
    let mut outbox = BTreeMap::new();
    for (key, word) in &directory.outbox {
        let known = words.get(key).map(|other: &Word<V>| other.stamp);
        let merged = match limit.merge(known, word) {
            Merged::TooOld if !rules.refuse_old_puts => Merged::Applied,
            Merged::Outranked if !rules.merge_by_stamp => Merged::Applied,
            merged => merged,
        };
        match merged {
            Merged::Applied => {
                words.insert(key.clone(), word.clone());
                outbox.insert(key.clone(), word.clone());
            }
            Merged::Outranked if known == Some(word.stamp) => {
                outbox.insert(key.clone(), word.clone());
            }
            Merged::Outranked => {}
            Merged::TooOld => refused.push((key.clone(), word.clone())),
        }
    }
    for word in words.values() {
        clock.observe(word.stamp.clock);
    }
    Ok(Truth { words, outbox, refused, generation: generation + 1, clock, refuse_before })
}
