//! The removals of one service that are remembered, so that no older word brings back what was removed.

use std::{fmt, ops::ControlFlow, sync::Arc};

use super::slice::dropped_to;
use crate::model::{Address, CowTree, InstanceId, InstanceKey, Stamp, cow_tree::Row};

/// Most bytes that the tombstones of one service take in the annotation of its slice: about 850 of them. Each removal
/// writes the annotation again, so the limit is well below the 256 KiB that Kubernetes allows.
pub const MAX_TOMBSTONE_BYTES: usize = 64 * 1024;

/// What is left of [`MAX_TOMBSTONE_BYTES`] when it is exceeded. Dropping some in advance keeps the search for the oldest rare.
const SHRUNK_BYTES: usize = MAX_TOMBSTONE_BYTES / 8 * 7;

/// One removal.
#[derive(Debug, PartialEq, Eq)]
pub struct Tombstone {
    /// The instance that was removed.
    pub id: InstanceId,
    /// When it was removed.
    pub stamp: Stamp,
    /// Bytes that it takes in the annotation, with its comma.
    bytes: u16,
}

impl Tombstone {
    fn new(id: InstanceId, stamp: Stamp) -> Self {
        /// Counts what is written.
        struct Counter(usize);
        impl fmt::Write for Counter {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                self.0 += text.len();
                Ok(())
            }
        }
        let mut counter = Counter(0);
        let Stamp { clock, term, generation } = stamp;
        fmt::Write::write_fmt(&mut counter, format_args!("\"{id}\":[{clock},{term},{generation}],"))
            .expect("counting does not fail");
        Self { id, stamp, bytes: u16::try_from(counter.0).unwrap_or(u16::MAX) }
    }
}

impl Row for Arc<Tombstone> {
    type Key<'a> = InstanceKey<'a>;

    fn key(&self) -> InstanceKey<'_> {
        InstanceKey::from(&self.id)
    }

    fn order(&self, key: &InstanceKey<'_>) -> std::cmp::Ordering {
        InstanceKey::from(&self.id).cmp(key)
    }

    fn weight(&self) -> u64 {
        self.bytes.into()
    }
}

/// The tombstones of a service, as an immutable value: a clone is cheap.
///
/// A tombstone stays when its instance is registered again: of the two the later one counts. So a registration need not
/// write the slice of the tombstones.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tombstones {
    removed: CowTree<Arc<Tombstone>>,
    refuse_before: u64,
}

impl Tombstones {
    /// Whether nothing is remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.refuse_before == 0
    }

    /// Tombstones that are held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.removed.len()
    }

    /// In order of address and ports.
    pub fn iter(&self) -> impl Iterator<Item = &Tombstone> {
        self.removed.iter().map(|tombstone| &**tombstone)
    }

    /// When the instance was removed, by itself or with all of its address; `None` if that is not known.
    #[must_use]
    pub fn get(&self, key: &InstanceKey<'_>) -> Option<Stamp> {
        let stamp = |key: &InstanceKey<'_>| self.removed.get(key).map(|tombstone| tombstone.stamp);
        stamp(key).max(stamp(&key.every()))
    }

    /// The highest clock of a tombstone that there was no room for; 0 where none was dropped.
    #[must_use]
    pub fn refuse_before(&self) -> u64 {
        self.refuse_before
    }

    /// Remembers a removal. Returns whether that was news.
    pub fn insert(&mut self, id: InstanceId, stamp: Stamp) -> bool {
        let known = self.get(&InstanceKey::from(&id));
        if stamp.clock <= self.refuse_before || known.is_some_and(|known| known >= stamp) {
            return false;
        }
        if id.ports.is_every() {
            self.drop_all_of(&id.address, stamp);
        }
        self.removed.put(Arc::new(Tombstone::new(id, stamp)));
        true
    }

    /// Remembers a removal that is known already with another stamp, by this one.
    pub fn restamp(&mut self, id: InstanceId, stamp: Stamp) {
        self.removed.remove(&InstanceKey::from(&id));
        self.insert(id, stamp);
    }

    /// Drops the tombstones of an address which that of all its instances makes redundant.
    fn drop_all_of(&mut self, address: &Address, before: Stamp) {
        let mut redundant = Vec::new();
        let _ = self.removed.visit_from(&InstanceKey::first_of(address), &mut |one| {
            if one.id.address != *address {
                return ControlFlow::Break(());
            }
            if one.stamp < before {
                redundant.push(Arc::clone(one));
            }
            ControlFlow::Continue(())
        });
        for one in redundant {
            self.removed.remove(&InstanceKey::from(&one.id));
        }
    }

    /// Tombstones with a clock up to `clock` were dropped. Returns whether that was news.
    pub fn raise_refuse_before(&mut self, clock: u64) -> bool {
        let is_news = clock > self.refuse_before;
        if is_news {
            self.refuse_before = clock;
            self.retain_after(clock);
        }
        is_news
    }

    /// Corrects a [`refuse_before`](Self::refuse_before) that is higher than it can be.
    pub fn lower_refuse_before(&mut self, clock: u64) {
        self.refuse_before = self.refuse_before.min(clock);
    }

    /// Bytes that they take in the annotation.
    #[must_use]
    pub fn bytes(&self) -> usize {
        usize::try_from(self.removed.weight()).unwrap_or(usize::MAX)
    }

    /// Drops the oldest tombstones if there are more than fit [`MAX_TOMBSTONE_BYTES`]. Returns the new
    /// [`refuse_before`](Self::refuse_before) if any was dropped.
    pub fn shrink(&mut self) -> Option<u64> {
        if self.bytes() <= MAX_TOMBSTONE_BYTES { None } else { self.shrink_to(SHRUNK_BYTES) }
    }

    /// As [`Tombstones::shrink`], until they take `bytes` at most.
    pub fn shrink_to(&mut self, bytes: usize) -> Option<u64> {
        let clocks = self.removed.iter().map(|one| (one.stamp.clock, usize::from(one.bytes)));
        let clock = dropped_to(clocks, bytes)?;
        self.raise_refuse_before(clock).then_some(clock)
    }

    /// Forgets what was said before `clock`. Returns whether there was any.
    pub fn expire(&mut self, clock: u64) -> bool {
        let before = self.len();
        self.retain_after(clock.saturating_sub(1));
        let is_outdated = self.refuse_before > 0 && self.refuse_before < clock;
        if is_outdated {
            self.refuse_before = 0;
        }
        is_outdated || self.len() < before
    }

    /// The lowest clock of what is remembered; `None` if that is nothing. O(n).
    #[must_use]
    pub fn oldest(&self) -> Option<u64> {
        let refuse_before = Some(self.refuse_before).filter(|clock| *clock > 0);
        self.removed.iter().map(|one| one.stamp.clock).chain(refuse_before).min()
    }

    fn retain_after(&mut self, clock: u64) {
        let gone: Vec<Arc<Tombstone>> = self.removed.iter().filter(|one| one.stamp.clock <= clock).cloned().collect();
        for one in gone {
            self.removed.remove(&InstanceKey::from(&one.id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{PortSet, Protocol, testing::VALIDATOR};

    fn id(n: u32) -> InstanceId {
        let address = VALIDATOR.address(&format!("10.0.{}.{}", n / 250, n % 250 + 1)).expect("valid");
        InstanceId { address, ports: PortSet::new(vec![(Protocol::Tcp, 8080)]) }
    }

    fn at(clock: u64) -> Stamp {
        Stamp { clock, term: 3, generation: 1_700_000_042 }
    }

    #[test]
    fn later_removal_of_an_instance_replaces_the_earlier_one() {
        let mut tombstones = Tombstones::default();
        assert!(
            tombstones.insert(id(1), at(5)) && !tombstones.insert(id(1), at(5)) && !tombstones.insert(id(1), at(4))
        );
        assert!(tombstones.insert(id(1), at(6)));
        assert_eq!((tombstones.get(&InstanceKey::from(&id(1))), tombstones.len()), (Some(at(6)), 1));
        assert_eq!(tombstones.get(&InstanceKey::from(&id(2))), None);
    }

    #[test]
    fn removal_of_an_address_is_one_of_all_its_instances() {
        let mut tombstones = Tombstones::default();
        let every = InstanceId { ports: PortSet::every(), ..id(1) };
        let other = InstanceId { ports: PortSet::new(vec![(Protocol::Udp, 53)]), ..id(1) };
        let bare = InstanceId { ports: PortSet::default(), ..id(1) };
        for (id, clock) in [(id(1), 5), (other.clone(), 9), (id(2), 5)] {
            assert!(tombstones.insert(id, at(clock)));
        }
        assert!(tombstones.insert(every.clone(), at(7)) && !tombstones.insert(bare.clone(), at(7)));
        let get = |id: &InstanceId| tombstones.get(&InstanceKey::from(id));
        assert_eq!(
            (get(&id(1)), get(&other), get(&bare), get(&id(2))),
            (Some(at(7)), Some(at(9)), Some(at(7)), Some(at(5)))
        );
        assert_eq!(tombstones.len(), 3, "that of the instance is redundant: {tombstones:?}");
        assert_eq!(every.to_string(), "10.0.0.2:*");
    }

    #[test]
    fn oldest_tombstones_are_dropped_at_the_limit_and_leave_their_age() {
        let now = 1_700_000_000_000_000;
        let mut tombstones = Tombstones::default();
        let mut dropped = None;
        for n in 0..2_000 {
            // Not in order of the keys.
            assert!(tombstones.insert(id(n * 7 % 2_000), at(now + u64::from(n))), "{n}");
            dropped = tombstones.shrink().or(dropped);
            assert!(tombstones.removed.weight() <= MAX_TOMBSTONE_BYTES as u64);
        }
        assert!(tombstones.len() > 800, "{} fit", tombstones.len());
        let refuse_before = tombstones.refuse_before();
        assert_eq!(dropped, Some(refuse_before));
        assert_eq!(refuse_before + 1 + tombstones.len() as u64, now + 2_000, "only older ones were dropped");
        assert!(!tombstones.insert(id(2_001), at(refuse_before)), "no put that old counts anyway");
    }

    #[test]
    fn expired_tombstones_and_their_age_limit_are_forgotten() {
        let mut tombstones = Tombstones::default();
        assert!(tombstones.insert(id(1), at(5)) && tombstones.insert(id(2), at(9)));
        assert!(tombstones.raise_refuse_before(7) && !tombstones.raise_refuse_before(6));
        assert_eq!((tombstones.len(), tombstones.oldest()), (1, Some(7)));
        assert!(!tombstones.expire(7) && tombstones.expire(8));
        assert_eq!((tombstones.refuse_before(), tombstones.oldest()), (0, Some(9)));
        assert!(tombstones.expire(10) && tombstones.is_empty() && tombstones.oldest().is_none());
    }
}
