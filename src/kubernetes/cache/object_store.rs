//! The objects of one kind, from three sources that overtake each other: lists, the events of a
//! watch, and the answers to our own writes.
//!
//! Invariants:
//! * The highest resourceVersion wins. Versions are numbers that grow with every write of a kind
//!   (KEP-5504); where one is not a number, the later report wins.
//! * A deleted object stays deleted: it returns only with a version newer than its deletion. So a
//!   late event cannot revive what we deleted, nor the late answer to a write what another deleted.
//! * After a complete list, what the list did not name is gone, unless it was written after the list.
//!   Late reports from before the list do not bring it back.

use std::{
    borrow::Borrow,
    collections::{HashMap, VecDeque},
    hash::Hash,
};

/// Deletions that are remembered. More than that arrive at once only after a watch was away for
/// long, and then a forgotten one costs a reconcile that finds nothing.
const MAX_RECENT_DELETIONS: usize = 4096;

/// An object in the store.
pub(in crate::kubernetes) trait CachedObject {
    /// `metadata.uid`
    fn uid(&self) -> &str;

    /// `metadata.resourceVersion`
    fn resource_version(&self) -> &str;

    /// Whether `later` has the same content, apart from its version.
    fn same_content(&self, later: &Self) -> bool;
}

/// What became of a reported object.
#[derive(Debug, PartialEq)]
pub(in crate::kubernetes) enum Applied<T> {
    /// It is stored, with the object that it replaces.
    Changed(Option<T>),
    /// It is stored; its content was known.
    Unchanged,
    /// A newer version is known.
    Stale,
}

/// The objects of one kind.
#[derive(Debug)]
pub(in crate::kubernetes) struct ObjectStore<K, T> {
    objects: HashMap<K, StoredObject<T>>,
    deletions: RecentDeletions,
    /// The number of the current or last list.
    list: u32,
    complete: bool,
    /// The resourceVersion of the last complete list.
    listed_as_of: Option<u64>,
}

#[derive(Debug)]
struct StoredObject<T> {
    object: T,
    /// The last list that named it.
    list: u32,
}

impl<K: Eq + Hash + Clone, T: CachedObject> ObjectStore<K, T> {
    pub(in crate::kubernetes) fn new() -> Self {
        Self {
            objects: HashMap::new(),
            deletions: RecentDeletions::default(),
            list: 0,
            complete: false,
            listed_as_of: None,
        }
    }

    /// Whether there was a complete list: an object that is not stored does not exist.
    pub(in crate::kubernetes) fn is_complete(&self) -> bool {
        self.complete
    }

    pub(in crate::kubernetes) fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&T>
    where
        K: Borrow<Q>,
    {
        self.objects.get(key).map(|stored| &stored.object)
    }

    pub(in crate::kubernetes) fn keys(&self) -> impl Iterator<Item = &K> {
        self.objects.keys()
    }

    /// Applies an object from an event or from the answer to a write.
    pub(in crate::kubernetes) fn apply(&mut self, key: K, object: T) -> Applied<T> {
        // The last list would have named it: it was deleted between its version and the list's,
        // and no event will say so again.
        let before_list =
            self.listed_as_of.zip(number(object.resource_version())).is_some_and(|(list, its)| its <= list);
        if before_list && !self.objects.contains_key(&key) {
            return Applied::Stale;
        }
        self.apply_known(key, object)
    }

    fn apply_known(&mut self, key: K, object: T) -> Applied<T> {
        let list = match self.objects.get_mut(&key) {
            Some(stored) if !is_newer(object.resource_version(), stored.object.resource_version()) => {
                return Applied::Stale;
            }
            Some(stored) if stored.object.uid() == object.uid() && stored.object.same_content(&object) => {
                stored.object = object;
                return Applied::Unchanged;
            }
            Some(stored) => stored.list,
            None => 0,
        };
        if self.deletions.cover(object.uid(), object.resource_version()) {
            return Applied::Stale;
        }
        Applied::Changed(self.objects.insert(key, StoredObject { object, list }).map(|before| before.object))
    }

    /// A list begins.
    pub(in crate::kubernetes) fn init(&mut self) {
        // Only compared for equality with the current list, so that wrapping around does no harm.
        self.list = self.list.wrapping_add(1);
    }

    /// Applies an object of the current list.
    pub(in crate::kubernetes) fn init_apply(&mut self, key: K, object: T) -> Applied<T> {
        let applied = self.apply_known(key.clone(), object);
        if let Some(stored) = self.objects.get_mut(&key) {
            // Also where the object itself is stale: the list has named it, so it exists.
            stored.list = self.list;
        }
        applied
    }

    /// The list is complete, as of `version`. Returns what is gone.
    pub(in crate::kubernetes) fn init_done(&mut self, version: &str) -> Vec<(K, T)> {
        self.complete = true;
        // Not the highest of all lists: a restored etcd begins at an older version.
        self.listed_as_of = number(version);
        let list = self.list;
        let gone = |_: &K, stored: &mut StoredObject<T>| {
            let version_of = number(stored.object.resource_version());
            // A write since the list, which is too old to name it.
            let written_since = version_of.zip(number(version)).is_some_and(|(its, list)| its > list);
            stored.list != list && !written_since
        };
        self.objects.extract_if(gone).map(|(key, stored)| (key, stored.object)).collect()
    }

    /// An event reports that the object `uid` was deleted as of `version`. Returns the stored object.
    pub(in crate::kubernetes) fn delete(&mut self, key: &K, uid: &str, version: &str) -> Option<T> {
        self.deletions.record(uid, version);
        let stored = self.objects.get(key)?;
        // An event about an earlier object of the same name must not remove the one that replaced it.
        let applies = stored.object.uid() == uid || is_newer(version, stored.object.resource_version());
        applies.then(|| self.objects.remove(key).expect("looked up above").object)
    }

    /// We deleted the object `uid` in the stored version. Returns it.
    pub(in crate::kubernetes) fn remove(&mut self, key: &K, uid: &str) -> Option<T> {
        let stored = self.objects.get(key).filter(|stored| stored.object.uid() == uid)?;
        self.deletions.record(uid, stored.object.resource_version());
        self.objects.remove(key).map(|stored| stored.object)
    }
}

/// The last [`MAX_RECENT_DELETIONS`] deletions: uid, and the highest version that is known to be
/// deleted.
#[derive(Debug, Default)]
struct RecentDeletions {
    versions: HashMap<Box<str>, u64>,
    order: VecDeque<Box<str>>,
}

impl RecentDeletions {
    fn record(&mut self, uid: &str, version: &str) {
        let Some(version) = number(version) else { return };
        // Already remembered: its place in the queue stays, so that no uid is in it twice.
        if let Some(known) = self.versions.get_mut(uid) {
            *known = version.max(*known);
            return;
        }
        if self.order.len() == MAX_RECENT_DELETIONS
            && let Some(oldest) = self.order.pop_front()
        {
            self.versions.remove(&oldest);
        }
        self.versions.insert(uid.into(), version);
        self.order.push_back(uid.into());
    }

    /// Whether this version of an object is known to be deleted.
    fn cover(&self, uid: &str, version: &str) -> bool {
        self.versions.get(uid).is_some_and(|gone| number(version).is_some_and(|version| version <= *gone))
    }
}

/// Whether `version` is newer than `known`.
fn is_newer(version: &str, known: &str) -> bool {
    match (number(version), number(known)) {
        (Some(version), Some(known)) => version > known,
        // Opaque, as versions were before Kubernetes 1.35: what differs counts as newer, the last report wins.
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
    struct TestObject(&'static str, String, &'static str);

    impl CachedObject for TestObject {
        fn uid(&self) -> &str {
            self.0
        }

        fn resource_version(&self) -> &str {
            &self.1
        }

        fn same_content(&self, later: &Self) -> bool {
            self.2 == later.2
        }
    }

    fn object(uid: &'static str, version: u64, says: &'static str) -> TestObject {
        TestObject(uid, version.to_string(), says)
    }

    #[test]
    fn highest_version_wins() {
        let mut store = ObjectStore::new();
        assert_eq!(store.apply("a", object("1", 10, "x")), Applied::Changed(None));
        assert_eq!(store.apply("a", object("1", 8, "y")), Applied::Stale);
        assert_eq!(store.apply("a", object("1", 10, "y")), Applied::Stale, "the same version again");
        assert_eq!(store.apply("a", object("1", 12, "x")), Applied::Unchanged);
        assert_eq!(
            store.apply("a", object("1", 9, "y")),
            Applied::Stale,
            "the version of unchanged content is stored too"
        );
        assert_eq!(store.apply("a", object("1", 13, "y")), Applied::Changed(Some(object("1", 12, "x"))));
        assert_eq!(
            store.apply("a", object("2", 14, "y")),
            Applied::Changed(Some(object("1", 13, "y"))),
            "another object"
        );
        assert_eq!(
            store.apply("a", TestObject("2", "later".into(), "z")),
            Applied::Changed(Some(object("2", 14, "y"))),
            "a version that is not a number is applied"
        );
    }

    #[test]
    fn deleted_object_stays_deleted() {
        let mut store = ObjectStore::new();
        store.apply("a", object("1", 10, "x"));
        assert_eq!(store.remove(&"a", "2"), None, "another object");
        assert_eq!(store.remove(&"a", "1"), Some(object("1", 10, "x")));
        assert_eq!(store.apply("a", object("1", 9, "x")), Applied::Stale, "an event from before");
        assert_eq!(store.apply("a", object("1", 10, "x")), Applied::Stale);
        assert_eq!(store.apply("a", object("2", 12, "x")), Applied::Changed(None), "another object is not deleted");
        assert_eq!(store.delete(&"a", "1", "11"), None, "the event of our removal");
        assert_eq!(store.get(&"a"), Some(&object("2", 12, "x")));
        assert_eq!(store.delete(&"a", "2", "15"), Some(object("2", 12, "x")));
        assert_eq!(store.apply("a", object("2", 14, "x")), Applied::Stale, "the late answer to a write");
        // It left the selector of the watch, and returns.
        assert_eq!(store.apply("a", object("2", 16, "x")), Applied::Changed(None));
        assert_eq!(store.delete(&"a", "3", "20"), Some(object("2", 16, "x")), "the name is free since 20");
    }

    #[test]
    fn complete_list_removes_what_it_does_not_name_and_was_not_written_since() {
        let mut store = ObjectStore::new();
        for (key, version) in [("a", 10), ("b", 11), ("c", 30)] {
            store.apply(key, object(key, version, "x"));
        }
        assert!(!store.is_complete());
        store.init();
        assert_eq!(
            store.init_apply("a", object("a", 9, "w")),
            Applied::Stale,
            "named, though a newer version is known"
        );
        assert_eq!(store.init_done("20"), [("b", object("b", 11, "x"))]);
        assert!(store.is_complete());
        assert_eq!(store.get(&"a"), Some(&object("a", 10, "x")));
        assert_eq!(store.get(&"c"), Some(&object("c", 30, "x")));
        // A list that broke off has no effect.
        store.init();
        store.init();
        store.init_apply("c", object("c", 30, "x"));
        assert_eq!(store.init_done("40"), [("a", object("a", 10, "x"))]);
    }

    #[test]
    fn late_report_from_before_a_list_does_not_revive_what_the_list_removed() {
        let mut store = ObjectStore::new();
        store.apply("a", object("a", 10, "x"));
        store.init();
        assert_eq!(store.init_done("20"), [("a", object("a", 10, "x"))]);
        assert_eq!(store.apply("a", object("a", 15, "y")), Applied::Stale, "the late answer to our write");
        assert_eq!(store.apply("b", object("b", 18, "x")), Applied::Stale, "created and deleted before the list");
        assert_eq!(store.apply("a", object("a2", 21, "x")), Applied::Changed(None));
        assert_eq!(store.apply("a", object("a2", 22, "y")), Applied::Changed(Some(object("a2", 21, "x"))));
        // A list is the truth as of its own version, whatever the last one said.
        store.init();
        assert_eq!(store.init_apply("b", object("b", 18, "x")), Applied::Changed(None));
    }

    #[test]
    fn recent_deletions_are_bounded() {
        let mut deletions = RecentDeletions::default();
        for number in 0..MAX_RECENT_DELETIONS + 10 {
            deletions.record(&number.to_string(), "7");
            deletions.record(&number.to_string(), "5");
        }
        assert_eq!((deletions.versions.len(), deletions.order.len()), (MAX_RECENT_DELETIONS, MAX_RECENT_DELETIONS));
        assert!(!deletions.cover("9", "1"));
        assert!(deletions.cover("10", "7"));
        assert!(!deletions.cover("10", "8"));
    }
}
