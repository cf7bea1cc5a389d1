//! Which word counts where copies of the truth meet: at a take-over, in a hand-over, and in a slice that was written late.
//!
//! The server and the simulation call the same functions, each with its own [`Words`]: so the rules that are simulated are
//! those by which the server decides. I/O, and what else a registration needs (a namespace, room), are the callers'.

use super::{
    rules::Rules,
    word::{AgeLimit, Merged, TombstoneLifetime, Word},
};
use crate::model::{HybridClock, Stamp};

/// The last word on each instance, as far as it is known to the process that merges.
pub trait Words {
    /// An instance, or every instance of an address.
    type Key;
    /// What an instance is.
    type Value;

    /// The stamp of the last word on `key`: one of its own, or the removal of its whole address.
    fn known(&self, key: &Self::Key) -> Option<Stamp>;

    /// The highest clock of a tombstone that the slice of `key` had no room for; 0 where none was dropped.
    fn refuse_before(&self, key: &Self::Key) -> u64;

    /// Where `key` is every instance of an address: those that are registered with a stamp before `before`. Otherwise nothing.
    fn removed_by(&self, key: &Self::Key, before: Stamp) -> Vec<Self::Key>;

    /// `word` is the last one on `key` from now on.
    fn apply(&mut self, key: &Self::Key, word: &Word<Self::Value>);
}

/// A term, and a generation of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Rank {
    /// The term.
    pub term: u64,
    /// The highest generation that was published in it.
    pub generation: u64,
}

/// How old a directory is, beside what Kubernetes shows at a take-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirectoryAge {
    /// It never wrote to Kubernetes, or served without it since: all of its words are in its outbox.
    NeverWrote,
    /// Another process has written since, it is a copy of a directory that wrote more under the same term, or words of it were
    /// lost: only its outbox counts.
    Outdated,
    /// Nobody has published anything after it.
    Latest,
}

impl DirectoryAge {
    /// `directory` is what was published under its term. What was said since, without a Lease, is in its outbox and does not
    /// make it newer: so a copy of the directory of another process is never taken for the newest one. `shown` is the highest
    /// rank of a slice and of the Lease before. `followed`: another process is known to have written after the directory, or a
    /// loss in it was accepted.
    #[must_use]
    pub fn of(directory: Rank, followed: bool, shown: Rank, rules: Rules) -> Self {
        if directory.term == 0 {
            Self::NeverWrote
        } else if rules.directory_needs_newest_term && (followed || directory.term < shown.term)
            || rules.directory_needs_newest_generation && directory.term == shown.term && directory < shown
        {
            Self::Outdated
        } else {
            Self::Latest
        }
    }

    /// Whether no word of the directory is too old to count, because nobody can have removed what it registered. `is_first`: there was
    /// no Lease before.
    ///
    /// A directory that never wrote is no exception where there was one: a removal that another process answered with 404 may be
    /// forgotten, and must not be undone. Its words count for as long as those of any outbox, and are handed over like those.
    fn has_no_age(self, is_first: bool) -> bool {
        match self {
            Self::Latest => true,
            Self::NeverWrote => is_first,
            Self::Outdated => false,
        }
    }

    /// Whether a word that a slice shows counts beside the directory. What has no stamp, and is not in the directory that was the
    /// last to write, was added by a hand.
    #[must_use]
    pub fn counts_in_slice(self, stamp: Stamp) -> bool {
        self != Self::Latest || stamp.clock > 0
    }
}

/// By what words are merged.
#[derive(Debug, Clone, Copy)]
pub struct Merge {
    /// Not behind any stamp that is known.
    pub clock: HybridClock,
    /// The wall clock, in microseconds.
    pub wall: u64,
    /// How long removals are remembered.
    pub lifetime: TombstoneLifetime,
    /// The server runs with all of them.
    pub rules: Rules,
}

impl Merge {
    /// What is to become of a word that another process said, in an outbox, a hand-over or a late slice.
    #[must_use]
    pub fn judge<W: Words>(&self, words: &W, key: &W::Key, word: &Word<W::Value>) -> Merged {
        let limit = AgeLimit::at(self.clock, self.wall, self.lifetime, words.refuse_before(key));
        match limit.merge(words.known(key), word) {
            Merged::TooOld if !self.rules.refuse_old_puts => Merged::Applied,
            Merged::Outranked if !self.rules.merge_by_stamp => Merged::Applied,
            merged => merged,
        }
    }

    /// Carries out what was [judged](Self::judge). Returns what became of the word.
    pub fn apply<W: Words>(&self, words: &mut W, key: &W::Key, word: &Word<W::Value>, merged: Merged) -> Merged {
        match merged {
            Merged::Applied => words.apply(key, word),
            // The removal of an address that is too old to leave a tombstone counts for the instances that are known, as that of
            // each of them would. One from the future counts for nothing.
            Merged::Outranked if word.is_tombstone() && word.stamp.clock <= HybridClock::highest(self.wall) => {
                let removed = words.removed_by(key, word.stamp);
                removed.iter().for_each(|key| words.apply(key, word));
                if !removed.is_empty() {
                    return Merged::Applied;
                }
            }
            Merged::Outranked | Merged::TooOld => {}
        }
        merged
    }

    /// Judges a word, and carries that out.
    pub fn merge<W: Words>(&self, words: &mut W, key: &W::Key, word: &Word<W::Value>) -> Merged {
        let merged = self.judge(words, key, word);
        self.apply(words, key, word, merged)
    }

    /// Puts the truth together with which a process begins to write. `words` is what the slices show; the directory's words are
    /// merged with it, then its outbox. Returns the words of the outbox that are too old to count: whoever said them was told
    /// 202, so that must not be silent.
    pub fn take_over<W: Words>(
        &self,
        words: &mut W,
        taken: TakenDirectory,
        directory: impl IntoIterator<Item = (W::Key, Word<W::Value>)>,
        outbox: impl IntoIterator<Item = (W::Key, Word<W::Value>)>,
    ) -> Vec<(W::Key, Word<W::Value>)> {
        let TakenDirectory { age, is_first, .. } = taken;
        let counts = match age {
            DirectoryAge::Latest => true,
            DirectoryAge::NeverWrote => is_first,
            DirectoryAge::Outdated => false,
        };
        if counts {
            for (key, word) in directory {
                // One that is too old is no news to anybody: Kubernetes had it, and it was removed since.
                self.merge_own(words, taken, age.has_no_age(is_first), (&key, &word));
            }
        }
        let mut refused = Vec::new();
        for (key, word) in outbox {
            // Words from before there were stamps are laid over the slices, once.
            let has_no_age = age.has_no_age(is_first) || (is_first && word.stamp.clock == 0);
            if self.merge_own(words, taken, has_no_age, (&key, &word)) == Merged::TooOld {
                refused.push((key, word));
            }
        }
        refused
    }

    /// Merges a word of the directory that takes over.
    fn merge_own<W: Words>(
        &self,
        words: &mut W,
        taken: TakenDirectory,
        has_no_age: bool,
        (key, word): (&W::Key, &Word<W::Value>),
    ) -> Merged {
        if !has_no_age {
            return self.merge(words, key, word);
        }
        let refuse_before = words.refuse_before(key).min(HybridClock::highest(self.wall));
        let merged = match words.known(key) {
            // A slice with the same stamp and another value was changed by a hand.
            Some(known) if known > word.stamp => Merged::Outranked,
            // Somebody has dropped a removal of which the directory does not know: a copy of it has gone on.
            None if refuse_before > taken.refuse_before
                && word.stamp.clock <= refuse_before
                && !word.is_tombstone() =>
            {
                Merged::TooOld
            }
            Some(_) | None => Merged::Applied,
        };
        self.apply(words, key, word, merged)
    }
}

/// The directory that takes over, as far as it is about one slice.
#[derive(Debug, Clone, Copy)]
pub struct TakenDirectory {
    /// Beside what Kubernetes shows.
    pub age: DirectoryAge,
    /// Whether there was no Lease before: then nobody can have removed what this directory alone has.
    pub is_first: bool,
    /// The highest clock of a tombstone that the directory itself has dropped.
    pub refuse_before: u64,
}
