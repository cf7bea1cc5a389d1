//! The objects of one kind, from three sources that overtake each other: lists, the events of a
//! watch, and the answers to our own writes.
//!
//! Invariants:
//! * The newest word counts, by resourceVersion. Those are numbers that grow with every write of a
//!   kind (KEP-5504); where one is no number, the later word counts.
//! * What is gone stays gone: an object that was removed comes back only with a version newer than
//!   its removal. So a late event cannot raise what we deleted, nor the late answer to a write what
//!   somebody else deleted.
//! * After a complete list what it did not name is gone, unless it was written after the list.

use std::{
    borrow::Borrow,
    collections::{HashMap, VecDeque},
    hash::Hash,
};

/// Removals that are remembered. More can only be on their way at once when a watch was away for
/// long, and then one that is forgotten costs a look at what is not there any more.
const REMEMBERED: usize = 4096;

/// What is kept of an object.
pub(super) trait Object {
    /// `metadata.uid`
    fn uid(&self) -> &str;

    /// `metadata.resourceVersion`
    fn version(&self) -> &str;

    /// Whether `later` says the same, apart from its version.
    fn says_the_same(&self, later: &Self) -> bool;
}

/// What became of an object that was told.
#[derive(Debug, PartialEq)]
pub(super) enum Told<T> {
    /// It is held now. What was there before.
    News(Option<T>),
    /// It is held, and says what was known.
    Known,
    /// Something newer is known.
    Late,
}

/// The objects of one kind.
#[derive(Debug)]
pub(super) struct Objects<K, T> {
    held: HashMap<K, Held<T>>,
    removed: Removed,
    /// The number of the list that is being read, or was last.
    list: u32,
    complete: bool,
}

#[derive(Debug)]
struct Held<T> {
    object: T,
    /// The last list that named it.
    list: u32,
}

impl<K: Eq + Hash + Clone, T: Object> Objects<K, T> {
    pub(super) fn new() -> Self {
        Self { held: HashMap::new(), removed: Removed::default(), list: 0, complete: false }
    }

    /// Whether one list was complete: what is not held is not there.
    pub(super) fn complete(&self) -> bool {
        self.complete
    }

    pub(super) fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&T>
    where
        K: Borrow<Q>,
    {
        self.held.get(key).map(|held| &held.object)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &K> {
        self.held.keys()
    }

    /// An event or the answer to a write says that it stands so.
    pub(super) fn stands(&mut self, key: K, object: T) -> Told<T> {
        let list = match self.held.get_mut(&key) {
            Some(held) if !is_later(object.version(), held.object.version()) => return Told::Late,
            Some(held) if held.object.uid() == object.uid() && held.object.says_the_same(&object) => {
                held.object = object;
                return Told::Known;
            }
            Some(held) => held.list,
            None => 0,
        };
        if self.removed.covers(object.uid(), object.version()) {
            return Told::Late;
        }
        Told::News(self.held.insert(key, Held { object, list }).map(|before| before.object))
    }

    /// A list begins.
    pub(super) fn list_begins(&mut self) {
        self.list = self.list.wrapping_add(1);
    }

    /// The list that is being read names it.
    pub(super) fn listed(&mut self, key: K, object: T) -> Told<T> {
        let told = self.stands(key.clone(), object);
        if let Some(held) = self.held.get_mut(&key) {
            held.list = self.list;
        }
        told
    }

    /// The list is complete, as of `version`. Gives back what is gone.
    pub(super) fn list_ends(&mut self, version: &str) -> Vec<(K, T)> {
        self.complete = true;
        let list = self.list;
        let gone = |_: &K, held: &mut Held<T>| {
            let since = number(held.object.version()).zip(number(version)).is_some_and(|(its, list)| its > list);
            held.list != list && !since
        };
        self.held.extract_if(gone).map(|(key, held)| (key, held.object)).collect()
    }

    /// An event says that the object `uid` is gone since `version`. Gives back what was held.
    pub(super) fn is_gone(&mut self, key: &K, uid: &str, version: &str) -> Option<T> {
        self.removed.remember(uid, version);
        let held = self.held.get(key)?;
        let counts = held.object.uid() == uid || is_later(version, held.object.version());
        counts.then(|| self.held.remove(key).expect("looked up above").object)
    }

    /// We removed the object `uid` as it was held. Gives it back.
    pub(super) fn removed(&mut self, key: &K, uid: &str) -> Option<T> {
        let held = self.held.get(key).filter(|held| held.object.uid() == uid)?;
        self.removed.remember(uid, held.object.version());
        self.held.remove(key).map(|held| held.object)
    }
}

/// Removals, the last [`REMEMBERED`]: uid, and the version of which it is known to be gone.
#[derive(Debug, Default)]
struct Removed {
    versions: HashMap<Box<str>, u64>,
    order: VecDeque<Box<str>>,
}

impl Removed {
    fn remember(&mut self, uid: &str, version: &str) {
        let Some(version) = number(version) else { return };
        if let Some(known) = self.versions.get_mut(uid) {
            *known = version.max(*known);
            return;
        }
        if self.order.len() == REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.versions.remove(&oldest);
        }
        self.versions.insert(uid.into(), version);
        self.order.push_back(uid.into());
    }

    /// Whether an object of this version is known to be gone.
    fn covers(&self, uid: &str, version: &str) -> bool {
        self.versions.get(uid).is_some_and(|gone| number(version).is_some_and(|version| version <= *gone))
    }
}

/// Whether what is told in `version` is later than what is known in `known`.
fn is_later(version: &str, known: &str) -> bool {
    match (number(version), number(known)) {
        (Some(version), Some(known)) => version > known,
        _ => version != known,
    }
}

fn number(version: &str) -> Option<u64> {
    version.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, PartialEq)]
    struct Thing(&'static str, String, &'static str);

    impl Object for Thing {
        fn uid(&self) -> &str {
            self.0
        }

        fn version(&self) -> &str {
            &self.1
        }

        fn says_the_same(&self, later: &Self) -> bool {
            self.2 == later.2
        }
    }

    fn thing(uid: &'static str, version: u64, says: &'static str) -> Thing {
        Thing(uid, version.to_string(), says)
    }

    #[test]
    fn the_newest_word_counts() {
        let mut things = Objects::new();
        assert_eq!(things.stands("a", thing("1", 10, "x")), Told::News(None));
        assert_eq!(things.stands("a", thing("1", 8, "y")), Told::Late);
        assert_eq!(things.stands("a", thing("1", 10, "y")), Told::Late, "the echo of what is held");
        assert_eq!(things.stands("a", thing("1", 12, "x")), Told::Known);
        assert_eq!(things.stands("a", thing("1", 9, "y")), Told::Late, "the version was taken over");
        assert_eq!(things.stands("a", thing("1", 13, "y")), Told::News(Some(thing("1", 12, "x"))));
        assert_eq!(things.stands("a", thing("2", 14, "y")), Told::News(Some(thing("1", 13, "y"))), "another object");
        assert_eq!(
            things.stands("a", Thing("2", "later".into(), "z")),
            Told::News(Some(thing("2", 14, "y"))),
            "what is no number is taken"
        );
    }

    #[test]
    fn what_is_gone_stays_gone() {
        let mut things = Objects::new();
        things.stands("a", thing("1", 10, "x"));
        assert_eq!(things.removed(&"a", "2"), None, "another object");
        assert_eq!(things.removed(&"a", "1"), Some(thing("1", 10, "x")));
        assert_eq!(things.stands("a", thing("1", 9, "x")), Told::Late, "an event from before");
        assert_eq!(things.stands("a", thing("1", 10, "x")), Told::Late);
        assert_eq!(things.stands("a", thing("2", 12, "x")), Told::News(None), "another object is not gone");
        assert_eq!(things.is_gone(&"a", "1", "11"), None, "the event of our removal");
        assert_eq!(things.get(&"a"), Some(&thing("2", 12, "x")));
        assert_eq!(things.is_gone(&"a", "2", "15"), Some(thing("2", 12, "x")));
        assert_eq!(things.stands("a", thing("2", 14, "x")), Told::Late, "the late answer to a write");
        // It left the watch's selector, and is back.
        assert_eq!(things.stands("a", thing("2", 16, "x")), Told::News(None));
        assert_eq!(things.is_gone(&"a", "3", "20"), Some(thing("2", 16, "x")), "the name is free since 20");
    }

    #[test]
    fn a_complete_list_is_all_there_is_but_for_what_was_written_since() {
        let mut things = Objects::new();
        for (key, version) in [("a", 10), ("b", 11), ("c", 30)] {
            things.stands(key, thing(key, version, "x"));
        }
        assert!(!things.complete());
        things.list_begins();
        assert_eq!(things.listed("a", thing("a", 9, "w")), Told::Late, "named, though newer is known");
        assert_eq!(things.list_ends("20"), [("b", thing("b", 11, "x"))]);
        assert!(things.complete());
        assert_eq!(things.get(&"a"), Some(&thing("a", 10, "x")));
        assert_eq!(things.get(&"c"), Some(&thing("c", 30, "x")));
        // One that broke off counts for nothing.
        things.list_begins();
        things.list_begins();
        things.listed("c", thing("c", 30, "x"));
        assert_eq!(things.list_ends("40"), [("a", thing("a", 10, "x"))]);
    }

    #[test]
    fn removals_are_remembered_in_bounds() {
        let mut removed = Removed::default();
        for number in 0..REMEMBERED + 10 {
            removed.remember(&number.to_string(), "7");
            removed.remember(&number.to_string(), "5");
        }
        assert_eq!((removed.versions.len(), removed.order.len()), (REMEMBERED, REMEMBERED));
        assert!(!removed.covers("9", "1"));
        assert!(removed.covers("10", "7"));
        assert!(!removed.covers("10", "8"));
    }
}
