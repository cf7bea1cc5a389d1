//! The view "slices → instances": what the slices that a watch reports add up to.
//!
//! It keeps the instances of every slice, so that one event costs one slice. The restore reads our
//! own slices through it, a joined name the slices of other writers.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    mem,
    sync::Arc,
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::model::{Instance, ServiceKey};

/// Which of two slices is believed about an instance with equal stamps: the later term, then the later generation.
/// Slices of other writers have neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct SliceRank {
    /// `gangplank.dev/term`
    pub term: u64,
    /// `gangplank.dev/generation`
    pub generation: u64,
}

/// The instances that slices hold, by service.
#[derive(Debug, Default)]
pub struct SliceView {
    slices: HashMap<SliceKey, ViewedSlice>,
    /// Names of the slices of each service.
    by_service: BTreeMap<ServiceKey, BTreeSet<Box<str>>>,
    /// Services whose slices changed since [`SliceView::take_changed`].
    changed: BTreeSet<ServiceKey>,
    /// The number of the current or last list.
    list: u32,
    listing: bool,
}

/// Namespace and name of a slice.
type SliceKey = (Box<str>, Box<str>);

#[derive(Debug)]
struct ViewedSlice {
    service: ServiceKey,
    rank: SliceRank,
    instances: Vec<Arc<Instance>>,
    /// The last list that named the slice.
    list: u32,
}

impl SliceView {
    /// A list begins. What it does not name goes with [`init_done`](Self::init_done), not before.
    pub fn init(&mut self) {
        self.list = self.list.wrapping_add(1);
        self.listing = true;
    }

    /// The list is complete.
    pub fn init_done(&mut self) {
        self.listing = false;
        let list = self.list;
        let gone: Vec<SliceKey> =
            self.slices.iter().filter(|(_, slice)| slice.list != list).map(|(key, _)| key.clone()).collect();
        gone.iter().for_each(|key| self.remove(key));
    }

    /// The slice `meta` of `service` holds these instances now.
    pub fn apply(&mut self, service: &ServiceKey, meta: &ObjectMeta, rank: SliceRank, instances: Vec<Arc<Instance>>) {
        let key = key(meta);
        // Its label changed: it must not count for two services.
        if self.slices.get(&key).is_some_and(|known| known.service != *service) {
            self.remove(&key);
        }
        self.by_service.entry(service.clone()).or_default().insert(key.1.clone());
        self.changed.insert(service.clone());
        self.slices.insert(key, ViewedSlice { service: service.clone(), rank, instances, list: self.list });
    }

    /// The slice `meta` is gone, or is not looked at any more.
    pub fn delete(&mut self, meta: &ObjectMeta) {
        self.remove(&key(meta));
    }

    /// Forgets the slices of every service that is not in `services`.
    pub fn retain(&mut self, services: &BTreeSet<ServiceKey>) {
        let gone = |(key, slice): (&SliceKey, &ViewedSlice)| (!services.contains(&slice.service)).then(|| key.clone());
        let gone: Vec<SliceKey> = self.slices.iter().filter_map(gone).collect();
        gone.iter().for_each(|key| self.remove(key));
    }

    /// The instances of `service`, each once, in order of their keys: the one with the highest stamp; among
    /// equal ones that from the slice of the highest rank; among those a ready instance first, because a pod that moves between slices is in
    /// two of them for a moment.
    #[must_use]
    pub fn instances(&self, service: &ServiceKey) -> Vec<Arc<Instance>> {
        let names = self.by_service.get(service).into_iter().flatten();
        let slices = names.filter_map(|name| self.slices.get(&(service.namespace().into(), name.clone())));
        let mut all: Vec<(SliceRank, &Arc<Instance>)> =
            slices.flat_map(|slice| slice.instances.iter().map(|instance| (slice.rank, instance))).collect();
        all.sort_by(|(rank, a), (other, b)| {
            a.key().cmp(&b.key()).then(b.stamp().cmp(&a.stamp())).then(other.cmp(rank)).then(b.ready().cmp(&a.ready()))
        });
        // Sorted so that the one that counts comes first.
        all.dedup_by(|(_, later), (_, first)| later.key() == first.key());
        all.into_iter().map(|(_, instance)| Arc::clone(instance)).collect()
    }

    /// Every service with a slice.
    pub fn services(&self) -> impl Iterator<Item = &ServiceKey> {
        self.by_service.keys()
    }

    /// The services whose slices changed since the last call; none while a list is being read.
    pub fn take_changed(&mut self) -> BTreeSet<ServiceKey> {
        // In the middle of a list a service may have lost a slice that the next page names.
        if self.listing { BTreeSet::new() } else { mem::take(&mut self.changed) }
    }

    fn remove(&mut self, key: &SliceKey) {
        let Some(slice) = self.slices.remove(key) else { return };
        if let Some(names) = self.by_service.get_mut(&slice.service) {
            names.remove(&key.1);
            if names.is_empty() {
                self.by_service.remove(&slice.service);
            }
        }
        self.changed.insert(slice.service);
    }
}

fn key(meta: &ObjectMeta) -> SliceKey {
    (meta.namespace.as_deref().unwrap_or_default().into(), meta.name.as_deref().unwrap_or_default().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kubernetes::objects::slices::tests::{HTTP, VALIDATOR, instance, spec, web},
        model::Stamp,
    };

    fn meta(name: &str) -> ObjectMeta {
        ObjectMeta { namespace: Some("prod".into()), name: Some(name.into()), ..ObjectMeta::default() }
    }

    fn instances(addresses: &[&str]) -> Vec<Arc<Instance>> {
        addresses.iter().map(|address| instance(&spec(address, HTTP))).collect()
    }

    fn rank(term: u64, generation: u64) -> SliceRank {
        SliceRank { term, generation }
    }

    fn addresses(view: &SliceView, service: &ServiceKey) -> Vec<String> {
        view.instances(service).iter().map(|one| format!("{} {}", one.address(), one.ready())).collect()
    }

    #[test]
    fn instance_in_two_slices_is_told_by_the_higher_rank() {
        let mut view = SliceView::default();
        let old = Arc::new((*instances(&["10.0.0.1"])[0]).clone().with_ready(false));
        view.apply(&web(), &meta("a"), rank(2, 1), instances(&["10.0.0.1"]));
        view.apply(&web(), &meta("b"), rank(1, 9), vec![Arc::clone(&old)]);
        assert_eq!(addresses(&view, &web()), ["10.0.0.1 true"]);
        view.apply(&web(), &meta("b"), rank(2, 2), vec![Arc::clone(&old)]);
        assert_eq!(addresses(&view, &web()), ["10.0.0.1 false"]);
        view.apply(&web(), &meta("b"), rank(2, 1), vec![old]);
        assert_eq!(addresses(&view, &web()), ["10.0.0.1 true"], "of equal ranks the ready one");
        view.delete(&meta("a"));
        assert_eq!(addresses(&view, &web()), ["10.0.0.1 false"]);
        let stamp = Stamp { clock: 1, term: 1, generation: 1 };
        let stamped = Arc::new((*instances(&["10.0.0.1"])[0]).clone().with_stamp(stamp));
        view.apply(&web(), &meta("a"), rank(1, 1), vec![stamped]);
        assert_eq!(addresses(&view, &web()), ["10.0.0.1 true"], "the stamp counts more than the slice's rank");
    }

    #[test]
    fn list_replaces_the_view_only_when_it_is_complete() {
        let mut view = SliceView::default();
        view.apply(&web(), &meta("a"), SliceRank::default(), instances(&["10.0.0.1"]));
        assert_eq!(view.take_changed(), BTreeSet::from([web()]));
        view.init();
        view.apply(&web(), &meta("b"), SliceRank::default(), instances(&["10.0.0.2"]));
        assert_eq!(view.take_changed(), BTreeSet::new());
        // The list broke off, another begins.
        view.init();
        view.apply(&web(), &meta("c"), SliceRank::default(), instances(&["10.0.0.3"]));
        view.init_done();
        assert_eq!(addresses(&view, &web()), ["10.0.0.3 true"]);
        assert_eq!(view.take_changed(), BTreeSet::from([web()]));
    }

    #[test]
    fn slice_that_changes_its_service_changes_both() {
        let shop = VALIDATOR.service("prod", "shop").expect("valid");
        let mut view = SliceView::default();
        view.apply(&web(), &meta("a"), SliceRank::default(), instances(&["10.0.0.1"]));
        view.take_changed();
        view.apply(&shop, &meta("a"), SliceRank::default(), instances(&["10.0.0.1"]));
        assert_eq!(view.take_changed(), BTreeSet::from([web(), shop.clone()]));
        assert_eq!((addresses(&view, &web()).len(), addresses(&view, &shop).len()), (0, 1));
        assert_eq!(view.services().collect::<Vec<_>>(), [&shop]);
        view.retain(&BTreeSet::from([web()]));
        assert_eq!((view.take_changed(), view.services().count()), (BTreeSet::from([shop]), 0));
    }
}
