//! A data directory, and how words are merged into what is known.

use super::*;

/// What a data directory holds.
#[derive(Debug, Clone)]
pub(in super::super) struct Directory {
    pub(in super::super) id: DirectoryId,
    /// The term under which its words were written; 0 before the first.
    pub(in super::super) term: u64,
    /// The highest generation it stored: a start stores one, too.
    pub(in super::super) generation: u64,
    /// The highest generation that was published under `term`, by whoever wrote then: this directory, or the one of which it is a copy.
    pub(in super::super) published: u64,
    pub(in super::super) clock: HybridClock,
    /// Whether another replica is known to have written since `term`, or to write: then nothing is answered from here any more.
    pub(in super::super) followed: bool,
    /// The last word on every key, as of `term`. Empty once this replica was deposed by another.
    pub(in super::super) words: WordMap,
    /// Words that are not confirmed to be in Kubernetes.
    pub(in super::super) outbox: WordMap,
    /// By slice: the highest clock of a tombstone that it had no room for.
    pub(in super::super) refuse_before: BTreeMap<usize, u64>,
}

impl Directory {
    /// An empty directory.
    pub(in super::super) fn new(id: DirectoryId) -> Self {
        Self {
            id,
            term: 0,
            followed: false,
            generation: 0,
            published: 0,
            clock: HybridClock::default(),
            words: BTreeMap::new(),
            outbox: BTreeMap::new(),
            refuse_before: BTreeMap::new(),
        }
    }

    pub(super) fn raise_refuse_before(&mut self, slice: usize, clock: u64) {
        let known = self.refuse_before.entry(slice).or_default();
        *known = clock.max(*known);
    }

    /// Drops the oldest tombstones of a slice until at most `room` are left, as those of a service in the server.
    pub(super) fn shrink(&mut self, slice: usize, room: usize) {
        let tombstones = self.words.iter().filter(|(key, word)| key.slice == slice && word.is_tombstone());
        let Some(clock) = dropped_to(tombstones.map(|(_, word)| (word.stamp.clock, 1)), room) else { return };
        self.words.retain(|key, word| key.slice != slice || !word.is_tombstone() || word.stamp.clock > clock);
        self.raise_refuse_before(slice, clock);
    }

    /// The registered instances that a removal of `key` removes.
    pub(super) fn registered(&self, key: Key) -> Vec<Key> {
        let covered = self.words.keys().copied().filter(|other| key.covers(*other));
        covered.filter(|other| value_of(&self.words, *other) != 0).collect()
    }

    /// How new it is.
    fn rank(&self, rules: Rules) -> Rank {
        let generation = if rules.rank_ends_with_tenure { self.published } else { self.generation };
        Rank { term: self.term, generation }
    }

    /// The directory of a writer that begins: what the slices hold, with what this one has. And the words that it refuses.
    /// What was in a namespace that was deleted under another writer comes back from an older directory only if neither the Lease nor
    /// any slice is left to show that somebody wrote after that directory. `slices` is a quorum list that was begun after the
    /// Lease was taken. A slice with a term above `highest_term` has it from a hand: its words count, its term does not.
    pub(super) fn take_over(
        &self,
        tenure: &Tenure,
        slices: &[Option<Observed>],
        highest_term: u64,
        merge: Merge,
    ) -> Result<TakenOver, HigherTerm> {
        let records = || slices.iter().flatten().map(|(_, record)| record);
        let ranks = records().filter(|record| record.term <= highest_term);
        let ranks = ranks.map(|record| Rank { term: record.term, generation: record.generation });
        let highest = ranks.clone().max().unwrap_or_default();
        if highest.term >= tenure.term {
            return Err(HigherTerm(highest.term));
        }
        let lease = tenure.previous.as_ref();
        let lease = lease.map(|lease| Rank { term: lease.term, generation: lease.generation });
        let age = DirectoryAge::of(
            self.rank(merge.rules),
            self.followed,
            highest.max(lease.unwrap_or_default()),
            merge.rules,
        );

        let mut taken = Self { id: self.id, refuse_before: self.refuse_before.clone(), ..Self::new(self.id) };
        taken.generation = self.generation.max(lease.map_or(0, |lease| lease.generation));
        taken.clock = self.clock;
        for (slice, record) in slices.iter().enumerate().filter_map(|(slice, found)| Some((slice, &found.as_ref()?.1)))
        {
            taken.generation = taken.generation.max(record.generation);
            taken.raise_refuse_before(slice, record.refuse_before);
            for (key, word) in record.words.iter().filter(|(_, word)| age.counts_in_slice(word.stamp)) {
                taken.clock.observe(word.stamp.clock);
                taken.words.insert(*key, *word);
            }
        }
        let words = |words: &WordMap| words.clone().into_iter();
        let merge = Merge { clock: taken.clock, ..merge };
        let mut refused = Vec::new();
        for slice in 0..slices.len() {
            let of_slice = |words: &WordMap| words.clone().into_iter().filter(move |(key, _)| key.slice == slice);
            let refuse_before = self.refuse_before.get(&slice).copied().unwrap_or(0);
            let directory = TakenDirectory { age, is_first: lease.is_none(), refuse_before };
            refused.extend(merge.take_over(&mut taken, directory, of_slice(&self.words), of_slice(&self.outbox)));
        }
        let is_last = |(key, word): &(Key, Word<Value>)| taken.known(key) == Some(word.stamp);
        taken.outbox = words(&self.outbox).filter(is_last).collect();
        taken.words.values().for_each(|word| taken.clock.observe(word.stamp.clock));
        taken.term = tenure.term;
        taken.generation += 1;
        taken.published = taken.generation;
        Ok((taken, refused))
    }
}

/// A directory with which a writer begins, and the words that it refuses.
type TakenOver = (Directory, Vec<(Key, Word<Value>)>);

/// A slice has the term of this tenure or a higher one: the Lease must be taken with a higher term, then listed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HigherTerm(pub(super) u64);

impl Words for Directory {
    type Key = Key;
    type Value = Value;

    fn known(&self, key: &Key) -> Option<Stamp> {
        last_word(&self.words, *key).map(|word| word.stamp)
    }

    fn refuse_before(&self, key: &Key) -> u64 {
        self.refuse_before.get(&key.slice).copied().unwrap_or(0)
    }

    fn removed_by(&self, key: &Key, before: Stamp) -> Vec<Key> {
        let removed = if key.is_every() { self.registered(*key) } else { Vec::new() };
        removed.into_iter().filter(|one| self.known(one) < Some(before)).collect()
    }

    fn apply(&mut self, key: &Key, word: &Word<Value>) {
        if key.is_every() {
            self.words.retain(|other, known| !key.covers(*other) || known.stamp > word.stamp);
        }
        self.words.insert(*key, *word);
    }
}

/// The directory of the writer, into which words of others are merged: they are its own from then on, and Kubernetes may lack
/// them.
pub(super) struct Receiver<'a>(pub(super) &'a mut Directory);

impl Words for Receiver<'_> {
    type Key = Key;
    type Value = Value;

    fn known(&self, key: &Key) -> Option<Stamp> {
        self.0.known(key)
    }

    fn refuse_before(&self, key: &Key) -> u64 {
        self.0.refuse_before(key)
    }

    fn removed_by(&self, key: &Key, before: Stamp) -> Vec<Key> {
        self.0.removed_by(key, before)
    }

    fn apply(&mut self, key: &Key, word: &Word<Value>) {
        self.0.generation += 1;
        self.0.published = self.0.generation;
        let removed = if word.is_tombstone() { self.removed_by(key, word.stamp) } else { Vec::new() };
        self.0.outbox.extend(removed.into_iter().chain([*key]).map(|key| (key, *word)));
        self.0.apply(key, word);
        self.0.clock.observe(word.stamp.clock);
    }
}
