//! Words, and the one rule by which two copies of the truth become one.

use crate::model::{HybridClock, Stamp};

/// What was said last of one instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word<V> {
    /// What the instance is; `None` where it was removed (a tombstone).
    pub value: Option<V>,
    /// When this was said.
    pub stamp: Stamp,
}

impl<V> Word<V> {
    /// Whether the word is that of a removal.
    #[must_use]
    pub const fn is_tombstone(&self) -> bool {
        self.value.is_none()
    }
}

/// How long tombstones are kept, in microseconds of the hybrid clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TombstoneLifetime(pub u64);

impl TombstoneLifetime {
    /// 32 hours: a replica that was away over night, or for a day, still brings its words home.
    pub const DEFAULT: Self = Self(32 * 3600 * 1_000_000);

    /// A removal said before this may be forgotten already.
    #[must_use]
    pub const fn expired_before(self, now: u64) -> u64 {
        now.saturating_sub(self.0)
    }

    /// A put said before this is refused where nothing is known of its key: its removal may have been forgotten. A quarter
    /// of the lifetime stands between the two limits for clocks apart and words under way.
    #[must_use]
    pub const fn refused_before(self, now: u64) -> u64 {
        now.saturating_sub(self.0 / 4 * 3)
    }
}

/// What becomes of a word that arrives from elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merged {
    /// The word counts from now on, with the stamp that it has.
    Applied,
    /// A word that is as young, or younger, is known already; or a removal so old that whatever it removes is refused anyway.
    Outranked,
    /// Nothing is known of its key, and the word is so old that its removal may have been forgotten; or its stamp is from a time
    /// that has not come, so that nobody knows how old it is. Whoever sent it must be told.
    TooOld,
}

/// What a merge measures the age of words against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AgeLimit {
    /// Puts of unknown keys with a clock at or below this are refused.
    refused_to: u64,
    /// The highest clock that a stamp can have by now.
    highest: u64,
}

impl AgeLimit {
    /// The limit at wall clock `wall`. `refuse_before` is the highest stamp of a tombstone that a slice had no room for
    /// (0 where none was dropped).
    #[must_use]
    pub fn at(clock: HybridClock, wall: u64, lifetime: TombstoneLifetime, refuse_before: u64) -> Self {
        let highest = HybridClock::highest(wall);
        Self { refused_to: lifetime.refused_before(clock.now(wall)).max(refuse_before.min(highest)), highest }
    }

    /// The rule. The younger stamp wins; where nothing is known, a removal leaves its tombstone,
    /// and a put counts, unless it is too old. A word from the future may be older than what is known, and counts for nothing.
    #[must_use]
    pub fn merge<V>(self, known: Option<Stamp>, word: &Word<V>) -> Merged {
        match known {
            Some(known) if word.stamp <= known => Merged::Outranked,
            Some(_) if word.stamp.clock > self.highest => Merged::TooOld,
            None if word.stamp.clock > self.highest && !word.is_tombstone() => Merged::TooOld,
            None if word.stamp.clock > self.highest => Merged::Outranked,
            Some(_) => Merged::Applied,
            None if word.stamp.clock > self.refused_to => Merged::Applied,
            // With its tombstone the key would be known, and a younger put that is too old, too, would count.
            None if word.is_tombstone() => Merged::Outranked,
            None => Merged::TooOld,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(value: Option<u8>, clock: u64) -> Word<u8> {
        Word { value, stamp: Stamp { clock, term: 1, generation: 1 } }
    }

    #[test]
    fn younger_word_wins_and_the_same_one_changes_nothing() {
        let limit = AgeLimit::at(HybridClock::default(), 0, TombstoneLifetime::DEFAULT, 0);
        let known = Some(word(Some(1), 10).stamp);
        assert_eq!(limit.merge(known, &word(None, 11)), Merged::Applied);
        assert_eq!(limit.merge(known, &word(Some(2), 10)), Merged::Outranked);
        assert_eq!(limit.merge(known, &word(Some(2), 9)), Merged::Outranked);
    }

    #[test]
    fn word_from_the_future_counts_for_nothing() {
        let year = 365 * 24 * 3600 * 1_000_000;
        let limit = AgeLimit::at(HybridClock::default(), 1_000, TombstoneLifetime::DEFAULT, 0);
        let known = Some(word(Some(1), 900).stamp);
        let ahead = [word(None, year), word(Some(2), year)];
        assert_eq!(ahead.map(|word| limit.merge(known, &word)), [Merged::TooOld, Merged::TooOld]);
        assert_eq!(ahead.map(|word| limit.merge(None, &word)), [Merged::Outranked, Merged::TooOld]);
        assert_eq!(limit.merge(known, &word(Some(2), 5_000_000)), Merged::Applied, "clocks are a little apart");
        assert_eq!(limit.merge(Some(ahead[0].stamp), &word(Some(2), 1_000)), Merged::Outranked);
    }

    #[test]
    fn old_put_of_an_unknown_key_is_refused_and_an_old_removal_leaves_nothing() {
        let limit = AgeLimit::at(HybridClock::default(), 1_000, TombstoneLifetime(400), 0);
        assert_eq!(limit.merge(None, &word(Some(1), 701)), Merged::Applied);
        assert_eq!(limit.merge(None, &word(Some(1), 700)), Merged::TooOld);
        assert_eq!(limit.merge(None, &word(None, 701)), Merged::Applied);
        assert_eq!(limit.merge(None, &word(None, 700)), Merged::Outranked);
        let year = 365 * 24 * 3600 * 1_000_000;
        let absurd = AgeLimit::at(HybridClock::after(year), 1_000, TombstoneLifetime(400), year);
        assert_eq!(absurd.merge(None, &word(Some(1), 701)), Merged::TooOld, "refused for a few seconds");
        let later = AgeLimit::at(HybridClock::after(year), 10_000_000, TombstoneLifetime(400), 0);
        assert_eq!(
            later.merge(None, &word(Some(1), 15_000_000)),
            Merged::Applied,
            "one stamp of next year makes nothing old"
        );
        let full = AgeLimit::at(HybridClock::default(), 1_000, TombstoneLifetime(400), 900);
        assert_eq!(full.merge(None, &word(Some(1), 900)), Merged::TooOld, "a tombstone that young was dropped");
    }
}
