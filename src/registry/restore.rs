//! Puts together, at a take-over, what is registered from then on: from the EndpointSlices, the directory and its outbox; and finds
//! what has to change in the registry for that.
//!
//! Which word counts is decided by [`replicas::takeover`](crate::replicas::takeover), which the simulation runs too. Here is what that needs of the
//! registry: the words, by service, and the records of the differences.
//!
//! - What the slices hold counts, removals and all.
//! - What the directory holds is merged with it by the stamps, unless another process wrote since: the term that the Lease and the
//!   slices show says so. And unless it is a copy of another directory, from the middle of its term: the generation says so.
//! - The outbox is merged in any case. It has the changes that this directory acknowledged and that Kubernetes was never seen to have.
//!
//! Of two words on one instance the one with the later [`Stamp`] wins, a removal whose tombstone a slice has
//! as well as a registration, so that an old directory or outbox undoes nothing that was acknowledged after it. A registration
//! of which the slices know nothing may be one whose removal is forgotten already: it counts only if it
//! is younger than that takes, or if nobody can have removed it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::Catalog;
use crate::{
    model::{CowTree, HybridClock, Instance, InstanceId, InstanceKey, PortSet, Service, ServiceKey, Stamp, UnixMillis},
    replicas::{
        rules::Rules,
        takeover::{DirectoryAge, Merge, Rank, TakenDirectory, Words},
        tombstones::Tombstones,
        word::{TombstoneLifetime, Word},
    },
    store::{DirectoryTerm, Record},
};

/// The contents of the managed EndpointSlices, from one complete list, and of the Lease.
#[derive(Debug, Default)]
pub struct KubernetesState {
    /// The highest term that anything shows; 0 without slices and without a Lease before.
    pub term: u64,
    /// The highest generation that anything of that term shows.
    pub generation: u64,
    /// The term under which this process writes from now on.
    pub new_term: u64,
    /// Whether there was a Lease before. Without one, registrations from before there were stamps count whatever their age.
    pub had_lease: bool,
    /// The valid instances, by service.
    pub services: Vec<(ServiceKey, Vec<Arc<Instance>>)>,
    /// The removals that slices remember, by service.
    pub tombstones: Vec<(ServiceKey, Tombstones)>,
}

/// What is registered here, and the removals that are remembered.
#[derive(Debug, Default)]
pub(super) struct Stored {
    pub(super) services: Vec<(ServiceKey, Service)>,
    pub(super) tombstones: Vec<(ServiceKey, Tombstones)>,
}

/// The contents of the store beside the instances.
#[derive(Debug, Default)]
pub(super) struct LocalState {
    /// The term of the data directory. Once another process has written under a higher one, nothing but the
    /// outbox counts.
    pub(super) term: DirectoryTerm,
    /// The highest generation that was published under that term, by whoever wrote then; it is not lower than that of any slice
    /// which that process wrote. What was said since without a Lease is in the outbox.
    pub(super) generation: u64,
    pub(super) outbox: LatestRecords,
    /// What the journal holds, while the catalog holds what another process writes. `None` while both are the same.
    pub(super) stored: Option<Vec<(ServiceKey, Service)>>,
}

impl LocalState {
    /// Services whose latest change may not be in Kubernetes.
    pub(super) fn unmirrored(&self, catalog: &Catalog) -> impl Iterator<Item = ServiceKey> {
        let all = if self.term.term == 0 { catalog.services() } else { Vec::new() };
        all.into_iter().map(|(service, _)| service).chain(self.outbox.0.keys().map(|(service, _)| service.clone()))
    }
}

/// The latest record of each instance: its stamp, and the instance as registered, or `None` if it was
/// removed. The size is bounded by the number of instances that ever existed, not by the number of their
/// changes.
#[derive(Debug, Default)]
pub(super) struct LatestRecords(HashMap<(ServiceKey, InstanceId), Word<Arc<Instance>>, foldhash::fast::RandomState>);

impl LatestRecords {
    /// Adds the records of a batch; the last record of an instance replaces earlier ones.
    pub(super) fn add(&mut self, records: &[Record]) {
        for record in records {
            match record {
                Record::Put { service, instance } => {
                    let latest = Word { value: Some(Arc::clone(instance)), stamp: instance.stamp() };
                    self.0.insert((service.clone(), instance.id()), latest);
                }
                Record::Remove { service, id, stamp } => {
                    self.0.insert((service.clone(), id.clone()), Word { value: None, stamp: *stamp });
                }
                Record::Mirrored { .. } | Record::Term(_) | Record::RefuseBefore { .. } => {}
            }
        }
    }

    /// Takes from `records` those that are the latest of their instances here too, as they are here.
    fn split_off(&self, records: &mut Vec<Record>) -> Vec<Record> {
        let own = |record: &mut Record| match record {
            Record::Put { service, instance } => {
                let latest = self.0.get(&(service.clone(), instance.id()));
                latest.is_some_and(|latest| latest.value.as_ref() == Some(instance))
            }
            Record::Remove { service, id, stamp } => match self.0.get(&(service.clone(), id.clone())) {
                Some(Word { value: None, stamp: latest }) => {
                    // Two stamps of one removal: the later one is the last word.
                    *stamp = (*stamp).max(*latest);
                    true
                }
                _ => false,
            },
            Record::Mirrored { .. } | Record::Term(_) | Record::RefuseBefore { .. } => false,
        };
        records.extract_if(.., own).collect()
    }

    /// Whether there is a record for the instance of `record`, or a later one for all of its address.
    pub(super) fn covers(&self, record: &Record) -> bool {
        match record {
            Record::Put { service, instance } => {
                let every = InstanceId { address: instance.address().clone(), ports: PortSet::every() };
                self.0.contains_key(&(service.clone(), instance.id()))
                    || self.0.get(&(service.clone(), every)).is_some_and(|removal| removal.stamp > instance.stamp())
            }
            Record::Remove { service, id, .. } => self.0.contains_key(&(service.clone(), id.clone())),
            Record::Mirrored { .. } | Record::Term(_) | Record::RefuseBefore { .. } => false,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// All of them, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&ServiceKey, &InstanceId, &Word<Arc<Instance>>)> {
        self.0.iter().map(|((service, id), word)| (service, id, word))
    }

    /// Removes the record of an instance, unless it has another stamp than `stamp`. Returns whether it was there.
    pub(super) fn remove(&mut self, service: &ServiceKey, id: &InstanceId, stamp: Stamp) -> bool {
        let key = (service.clone(), id.clone());
        let is_same = self.0.get(&key).is_some_and(|word| word.stamp == stamp);
        is_same && self.0.remove(&key).is_some()
    }
}

impl From<Vec<Record>> for LatestRecords {
    fn from(records: Vec<Record>) -> Self {
        let mut latest = Self::default();
        latest.add(&records);
        latest
    }
}

/// The result of a comparison.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    /// The term under which the slices are written from now on.
    pub(super) term: u64,
    /// The changes to apply to the registry, each instance once. Kubernetes has all of them.
    pub(super) records: Vec<Record>,
    /// More such changes, of the outbox: Kubernetes may not have them.
    pub(super) unmirrored: Vec<Record>,
    /// Registrations that are too old to count. Whoever made them was told 202.
    pub(super) refused: Vec<(ServiceKey, Arc<Instance>)>,
}

/// What a service should be.
#[derive(Debug, Default)]
struct WantedService {
    instances: CowTree<Arc<Instance>>,
    /// What slices remember.
    tombstones: Tombstones,
    /// Removals of this directory: one of an address is about instances that other words of it may register.
    removed: Tombstones,
    /// As [`Tombstones::refuse_before`], of this directory.
    refuse_before: u64,
}

impl WantedService {
    /// Adds what the slices remember of removals.
    fn bury(&mut self, tombstones: Tombstones) {
        for tombstone in tombstones.iter() {
            // Instances and tombstones come from several slices, which are not written together.
            for instance in self.instances.removed_by(&tombstone.id) {
                if instance.stamp() < tombstone.stamp {
                    self.instances.remove(&instance.key());
                }
            }
        }
        self.tombstones = tombstones;
    }
}

impl Words for WantedService {
    type Key = InstanceId;
    type Value = Arc<Instance>;

    fn known(&self, id: &InstanceId) -> Option<Stamp> {
        let key = InstanceKey::from(id);
        let registered = self.instances.get(&key).map(|instance| instance.stamp());
        registered.max(self.tombstones.get(&key)).max(self.removed.get(&key))
    }

    fn refuse_before(&self, _: &InstanceId) -> u64 {
        self.tombstones.refuse_before().max(self.refuse_before)
    }

    fn removed_by(&self, id: &InstanceId, before: Stamp) -> Vec<InstanceId> {
        let removed = if id.ports.is_every() { self.instances.removed_by(id) } else { Vec::new() };
        removed.into_iter().filter(|instance| instance.stamp() < before).map(|instance| instance.id()).collect()
    }

    fn apply(&mut self, id: &InstanceId, word: &Word<Arc<Instance>>) {
        match &word.value {
            Some(instance) => drop(self.instances.put(Arc::clone(instance))),
            None => {
                for instance in self.instances.removed_by(id) {
                    if instance.stamp() <= word.stamp {
                        self.instances.remove(&instance.key());
                    }
                }
                self.removed.insert(id.clone(), word.stamp);
            }
        }
    }
}

type WantedServices = HashMap<ServiceKey, WantedService>;

/// Decides what is registered from now on; `visible` is everything that readers see now. `now` is the wall clock.
pub(super) fn compare(local: &LocalState, held: KubernetesState, visible: &Stored, now: UnixMillis) -> Comparison {
    // Higher than both, unless the Lease was set back to a backup.
    let term = held.new_term.max(local.term.term);
    let stored = local.stored.as_deref().unwrap_or(&visible.services);
    let (wanted, refused) = merge(local, held, stored, &visible.tombstones, now);
    let mut records = differences(&wanted, &visible.services, &visible.tombstones);
    let mut unmirrored = Vec::new();
    if local.stored.is_some() {
        // What only the journal, or only the catalog, lacks goes to both: repeating it changes nothing.
        // Each instance once, or a part of the result would undo another.
        let known: HashSet<(ServiceKey, InstanceId)> = records.iter().filter_map(instance_of).collect();
        let of_journal = differences(&wanted, stored, &visible.tombstones).into_iter();
        records.extend(of_journal.filter(|record| instance_of(record).is_some_and(|one| !known.contains(&one))));
        // The journal must not take its own outbox for something that Kubernetes has.
        unmirrored = local.outbox.split_off(&mut records);
    }
    Comparison { term, records, unmirrored, refused }
}

/// What the slices hold, merged with the words of this directory; and the words of its outbox that are too old to count.
fn merge(
    local: &LocalState,
    held: KubernetesState,
    stored: &[(ServiceKey, Service)],
    tombstones: &[(ServiceKey, Tombstones)],
    now: UnixMillis,
) -> (WantedServices, Vec<(ServiceKey, Arc<Instance>)>) {
    let directory = Rank { term: local.term.term, generation: local.generation };
    let shown = Rank { term: held.term, generation: held.generation };
    // Whether anybody wrote after this directory decides if its words count beside its outbox.
    let age = DirectoryAge::of(directory, local.term.followed, shown, Rules::ALL);
    let mut clock = HybridClock::default();
    let mut wanted = WantedServices::new();
    for (service, instances) in held.services {
        let wanted = wanted.entry(service).or_default();
        for instance in instances.into_iter().filter(|instance| age.counts_in_slice(instance.stamp())) {
            clock.observe(instance.stamp().clock);
            wanted.instances.put(instance);
        }
    }
    for (service, tombstones) in held.tombstones {
        tombstones.iter().for_each(|tombstone| clock.observe(tombstone.stamp.clock));
        wanted.entry(service).or_default().bury(tombstones);
    }

    // Instances, tombstones and the outbox of a service are merged together: a removal of an address covers all of them.
    let mut own: HashMap<&ServiceKey, OwnWords<'_>> = HashMap::new();
    for (service, registered) in stored {
        own.entry(service).or_default().instances = Some(&registered.instances);
    }
    for (service, tombstones) in tombstones {
        own.entry(service).or_default().tombstones = Some(tombstones);
    }
    for ((service, id), word) in &local.outbox.0 {
        own.entry(service).or_default().outbox.push((id, word));
    }
    let wall = now.0.saturating_mul(1_000);
    let merge = Merge { clock, wall, lifetime: TombstoneLifetime::DEFAULT, rules: Rules::ALL };
    let mut refused = Vec::new();
    for (service, OwnWords { instances, tombstones, outbox }) in own {
        let wanted = wanted.entry(service.clone()).or_default();
        wanted.refuse_before = tombstones.map_or(0, Tombstones::refuse_before);
        let put = instances.into_iter().flatten().map(|instance| {
            let word = Word { value: Some(Arc::clone(instance)), stamp: instance.stamp() };
            (instance.id(), word)
        });
        let removed = tombstones.into_iter().flat_map(Tombstones::iter);
        let removed = removed.map(|one| (one.id.clone(), Word { value: None, stamp: one.stamp }));
        let outbox = outbox.into_iter().map(|(id, word)| (id.clone(), word.clone()));
        let taken = TakenDirectory { age, is_first: !held.had_lease, refuse_before: wanted.refuse_before };
        let too_old = merge.take_over(wanted, taken, put.chain(removed), outbox);
        refused.extend(too_old.into_iter().filter_map(|(_, word)| Some((service.clone(), word.value?))));
    }
    (wanted, refused)
}

/// What this directory holds of one service.
#[derive(Debug, Default)]
struct OwnWords<'a> {
    instances: Option<&'a CowTree<Arc<Instance>>>,
    tombstones: Option<&'a Tombstones>,
    outbox: Vec<(&'a InstanceId, &'a Word<Arc<Instance>>)>,
}

fn instance_of(record: &Record) -> Option<(ServiceKey, InstanceId)> {
    match record {
        Record::Put { service, instance } => Some((service.clone(), instance.id())),
        Record::Remove { service, id, .. } => Some((service.clone(), id.clone())),
        Record::Mirrored { .. } | Record::Term(_) | Record::RefuseBefore { .. } => None,
    }
}

/// The record that raises what is known here to `tombstones`.
fn refuse_before(service: &ServiceKey, tombstones: &Tombstones, known: Option<&Tombstones>) -> Option<Record> {
    let clock = tombstones.refuse_before();
    let is_news = clock > known.map_or(0, Tombstones::refuse_before);
    is_news.then(|| Record::RefuseBefore { service: service.clone(), clock })
}

/// The records that turn `from`, of which these tombstones are known, into `wanted`.
fn differences(
    wanted: &WantedServices,
    from: &[(ServiceKey, Service)],
    tombstones: &[(ServiceKey, Tombstones)],
) -> Vec<Record> {
    let mut records = Vec::new();
    let nothing = WantedService::default();
    for (service, held) in from {
        let wanted = wanted.get(service).unwrap_or(&nothing);
        let gone = held.instances.iter().filter(|instance| wanted.instances.get(&instance.key()).is_none());
        records.extend(gone.map(|instance| Record::Remove {
            service: service.clone(),
            id: instance.id(),
            // Without a tombstone nothing is remembered of the removal: it is what the slices say, not a word of its own.
            stamp: wanted.tombstones.get(&instance.key()).unwrap_or_default(),
        }));
    }
    let held: HashMap<&ServiceKey, &Service> = from.iter().map(|(service, held)| (service, held)).collect();
    let known: HashMap<&ServiceKey, &Tombstones> = tombstones.iter().map(|(key, known)| (key, known)).collect();
    for (service, WantedService { instances, tombstones, removed: _, refuse_before: _ }) in wanted {
        let (held, known) = (held.get(service), known.get(service));
        let registered = |key: &InstanceKey<'_>| held.and_then(|held| held.instances.get(key));
        for tombstone in tombstones.iter() {
            let key = InstanceKey::from(&tombstone.id);
            // One that is registered again needs none; one that is registered here only was removed above.
            let is_needed = instances.get(&key).is_none() && registered(&key).is_none();
            if is_needed && known.and_then(|known| known.get(&key)) < Some(tombstone.stamp) {
                let (id, stamp) = (tombstone.id.clone(), tombstone.stamp);
                records.push(Record::Remove { service: service.clone(), id, stamp });
            }
        }
        records.extend(refuse_before(service, tombstones, known.copied()));
        let put = instances.iter().filter(|instance| registered(&instance.key()).is_none_or(|held| held != *instance));
        records.extend(put.map(|instance| Record::Put { service: service.clone(), instance: Arc::clone(instance) }));
    }
    records
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{InstanceId, InstanceSpec, PortSet, UnixMillis, testing::VALIDATOR};

    fn web() -> ServiceKey {
        VALIDATOR.service("prod", "web").expect("valid")
    }

    fn instance(address: &str, weight: f32) -> Arc<Instance> {
        let draft = InstanceSpec { address: address.into(), weight: Some(weight), ..InstanceSpec::default() };
        Arc::new(VALIDATOR.instance(&web(), &draft, UnixMillis(1)).expect("valid"))
    }

    fn put(address: &str, weight: f32) -> Record {
        Record::Put { service: web(), instance: instance(address, weight) }
    }

    fn remove(address: &str) -> Record {
        let InstanceId { address, ports } = instance(address, 1.0).id();
        Record::Remove { service: web(), id: InstanceId { address, ports }, stamp: Stamp::default() }
    }

    fn slices(term: u64, held: &[(&str, f32)]) -> KubernetesState {
        let instances = held.iter().map(|(address, weight)| instance(address, *weight)).collect();
        let services = vec![(web(), instances)];
        KubernetesState { term, generation: 100, new_term: term + 1, services, ..KubernetesState::default() }
    }

    fn catalog(held: &[(&str, f32)]) -> Stored {
        let mut service = Service::default();
        held.iter().for_each(|(address, weight)| drop(service.instances.put(instance(address, *weight))));
        Stored { services: vec![(web(), service)], tombstones: Vec::new() }
    }

    /// At one second after 1970 no word is too old.
    fn compare(local: &LocalState, held: KubernetesState, stored: &Stored) -> Comparison {
        super::compare(local, held, stored, UnixMillis(1_000))
    }

    fn local(term: u64, outbox: Vec<Record>) -> LocalState {
        LocalState { term: DirectoryTerm::new(term), generation: 100, outbox: outbox.into(), stored: None }
    }

    #[test]
    fn stored_state_is_kept_when_this_directory_wrote_last() {
        // 10.0.0.2 was removed from the slice by hand, and a removal was not written yet.
        let held = slices(3, &[("10.0.0.1", 1.0), ("10.0.0.9", 1.0)]);
        let local = local(3, vec![remove("10.0.0.9")]);
        let comparison = compare(&local, held, &catalog(&[("10.0.0.1", 1.0), ("10.0.0.2", 1.0)]));
        assert_eq!((comparison.term, comparison.records), (4, vec![]));
    }

    #[test]
    fn empty_directory_takes_the_slices_under_a_new_term() {
        let comparison = compare(&local(0, vec![]), slices(3, &[("10.0.0.1", 2.0)]), &Stored::default());
        assert_eq!(comparison.term, 4);
        assert_eq!(comparison.records, [put("10.0.0.1", 2.0)]);
    }

    #[test]
    fn directory_without_a_term_is_laid_over_the_slices() {
        let held = slices(0, &[("10.0.0.1", 2.0), ("10.0.0.2", 1.0)]);
        let comparison = compare(&local(0, vec![]), held, &catalog(&[("10.0.0.1", 5.0), ("10.0.0.3", 1.0)]));
        assert_eq!(comparison.records, [put("10.0.0.2", 1.0)]);
    }

    #[test]
    fn slices_replace_an_older_directory_except_for_its_outbox() {
        // Since then another directory removed .2, added .3 and changed .1. The outbox still has the
        // change of .4, the removal of .5 and the registration of .6.
        let held = slices(7, &[("10.0.0.1", 9.0), ("10.0.0.3", 1.0), ("10.0.0.4", 1.0), ("10.0.0.5", 1.0)]);
        let local = local(3, vec![put("10.0.0.4", 4.0), remove("10.0.0.5"), put("10.0.0.6", 1.0)]);
        let had = [("10.0.0.1", 1.0), ("10.0.0.2", 1.0), ("10.0.0.4", 4.0), ("10.0.0.6", 1.0)];
        let comparison = compare(&local, held, &catalog(&had));
        assert_eq!(comparison.term, 8);
        let wanted = [remove("10.0.0.2"), put("10.0.0.1", 9.0), put("10.0.0.3", 1.0)];
        assert_eq!(comparison.records, wanted);
    }

    /// The record with a stamp of this clock.
    fn at(clock: u64, record: Record) -> Record {
        let stamp = Stamp { clock, term: 3, generation: 1 };
        match record {
            Record::Put { service, instance } => {
                Record::Put { service, instance: Arc::new(Arc::unwrap_or_clone(instance).with_stamp(stamp)) }
            }
            Record::Remove { service, id, .. } => Record::Remove { service, id, stamp },
            other => other,
        }
    }

    #[test]
    fn older_copy_of_a_directory_takes_what_the_slices_hold() {
        // The copy was made at generation 100. Then .2 was removed, .3 was added and .1 was changed.
        let held = KubernetesState { generation: 103, ..slices(3, &[("10.0.0.1", 9.0), ("10.0.0.3", 1.0)]) };
        let comparison = compare(&local(3, vec![]), held, &catalog(&[("10.0.0.1", 1.0), ("10.0.0.2", 1.0)]));
        assert_eq!(comparison.term, 4);
        assert_eq!(comparison.records, [remove("10.0.0.2"), put("10.0.0.1", 9.0), put("10.0.0.3", 1.0)]);
    }

    #[test]
    fn later_word_wins_over_an_outbox_that_was_away() {
        let stamped = |address: &str, clock| match at(clock, put(address, 9.0)) {
            Record::Put { instance, .. } => instance,
            _ => unreachable!("a put stays one"),
        };
        let instances = vec![stamped("10.0.0.1", 50), stamped("10.0.0.2", 50), stamped("10.0.0.3", 50)];
        let services = vec![(web(), instances)];
        let held = KubernetesState { term: 7, generation: 1, new_term: 8, services, ..KubernetesState::default() };
        let outbox = vec![
            at(40, put("10.0.0.1", 1.0)),
            at(40, remove("10.0.0.2")),
            at(60, put("10.0.0.3", 1.0)),
            // The store of an earlier version has no stamps.
            put("10.0.0.4", 1.0),
        ];
        let comparison = compare(&local(3, outbox), held, &Stored::default());
        let mut found = comparison.records;
        found.sort_by_key(|record| format!("{record:?}"));
        let kept = |address: &str| Record::Put { service: web(), instance: stamped(address, 50) };
        let mut wanted = vec![kept("10.0.0.1"), kept("10.0.0.2"), at(60, put("10.0.0.3", 1.0)), put("10.0.0.4", 1.0)];
        wanted.sort_by_key(|record| format!("{record:?}"));
        assert_eq!(found, wanted);
    }

    #[test]
    fn outbox_keeps_the_last_record_of_an_instance_only() {
        let mut outbox = LatestRecords::default();
        for n in 0..100 {
            outbox.add(&[put("10.0.0.1", n as f32), put("10.0.0.2", 1.0), remove("10.0.0.2")]);
        }
        assert_eq!(outbox.len(), 2);
        let local = LocalState { term: DirectoryTerm::new(3), generation: 100, outbox, stored: None };
        let comparison = compare(&local, slices(7, &[("10.0.0.2", 1.0)]), &Stored::default());
        assert_eq!(comparison.records, [put("10.0.0.1", 99.0)]);
    }

    #[test]
    fn removal_of_an_address_that_came_meanwhile_covers_what_was_put_there_before() {
        let InstanceId { address, .. } = instance("10.0.0.1", 1.0).id();
        let every = Record::Remove {
            service: web(),
            id: InstanceId { address, ports: PortSet::every() },
            stamp: Stamp { clock: 9, term: 3, generation: 1 },
        };
        let newer = LatestRecords::from(vec![every]);
        assert!(newer.covers(&at(8, put("10.0.0.1", 1.0))) && !newer.covers(&at(10, put("10.0.0.1", 1.0))));
        assert!(!newer.covers(&at(8, put("10.0.0.2", 1.0))));
    }

    const HOUR: u64 = 3_600_000_000;

    /// Tombstones of instances, with their clocks.
    fn buried(removed: &[(&str, u64)]) -> Vec<(ServiceKey, Tombstones)> {
        let mut tombstones = Tombstones::default();
        for (address, clock) in removed {
            assert!(tombstones.insert(instance(address, 1.0).id(), Stamp { clock: *clock, term: 3, generation: 1 }));
        }
        vec![(web(), tombstones)]
    }

    #[test]
    fn tombstone_in_a_slice_outranks_older_words_and_no_later_one() {
        let clock = 100 * HOUR;
        let held =
            || KubernetesState { tombstones: buried(&[("10.0.0.1", clock), ("10.0.0.2", clock)]), ..slices(7, &[]) };
        let outbox = vec![at(clock - 1, put("10.0.0.1", 1.0)), at(clock + 1, put("10.0.0.2", 2.0))];
        let now = UnixMillis(clock / 1_000);
        let found = super::compare(&local(3, outbox), held(), &Stored::default(), now);
        assert_eq!(found.records, [at(clock, remove("10.0.0.1")), at(clock + 1, put("10.0.0.2", 2.0))]);
        assert!(found.refused.is_empty());
        // What is registered here is removed with the stamp of the removal; one that is known is no news.
        let stored = Stored { tombstones: buried(&[("10.0.0.2", clock)]), ..catalog(&[("10.0.0.1", 1.0)]) };
        let found = super::compare(&local(3, vec![]), held(), &stored, now);
        assert_eq!(found.records, [at(clock, remove("10.0.0.1"))]);
    }

    #[test]
    fn removal_of_an_address_outranks_every_older_word_on_its_instances() {
        let every = InstanceId { ports: PortSet::every(), ..instance("10.0.0.1", 1.0).id() };
        let removal = |clock| at(clock, Record::Remove { service: web(), id: every.clone(), stamp: Stamp::default() });
        let mut tombstones = Tombstones::default();
        assert!(tombstones.insert(every.clone(), Stamp { clock: 5, term: 3, generation: 1 }));
        let buried = || vec![(web(), tombstones.clone())];
        // In a slice, against instances in others, of the outbox, and of the directory that wrote last.
        let held = || KubernetesState { tombstones: buried(), ..slices(7, &[("10.0.0.1", 1.0), ("10.0.0.2", 1.0)]) };
        let found = compare(&local(3, vec![at(4, put("10.0.0.1", 2.0))]), held(), &Stored::default());
        assert_eq!(found.records, [removal(5), put("10.0.0.2", 1.0)]);
        let found = compare(&local(3, vec![at(6, put("10.0.0.1", 2.0))]), held(), &catalog(&[("10.0.0.2", 1.0)]));
        assert_eq!(found.records, [removal(5), at(6, put("10.0.0.1", 2.0))]);
        let found = compare(&local(7, vec![]), held(), &catalog(&[("10.0.0.1", 1.0), ("10.0.0.2", 1.0)]));
        assert_eq!(found.records, [at(5, remove("10.0.0.1")), removal(5)]);
        // In the outbox, before and after a registration there, against what the slices hold.
        for (clock, wanted) in [(4, vec![remove("10.0.0.1")]), (6, vec![at(6, put("10.0.0.1", 2.0))])] {
            let outbox = vec![removal(5), at(clock, put("10.0.0.1", 2.0))];
            let held = slices(7, &[("10.0.0.1", 1.0)]);
            let found = compare(&local(3, outbox), held, &catalog(&[("10.0.0.1", 1.0)]));
            assert_eq!(found.records, wanted, "registered at {clock}");
        }
    }

    #[test]
    fn tombstone_in_one_slice_removes_the_instance_that_another_still_has() {
        // The writer was stopped between the two.
        let held = KubernetesState { tombstones: buried(&[("10.0.0.1", 5)]), ..slices(7, &[("10.0.0.1", 1.0)]) };
        assert_eq!(compare(&local(0, vec![]), held, &Stored::default()).records, [at(5, remove("10.0.0.1"))]);
    }

    #[test]
    fn directory_that_wrote_last_takes_the_tombstones_it_lacks() {
        let mut tombstones = buried(&[("10.0.0.1", 5), ("10.0.0.2", 5)]);
        assert!(tombstones[0].1.raise_refuse_before(4));
        let held = KubernetesState { tombstones, ..slices(3, &[]) };
        let mut service = Service::default();
        let Record::Put { instance, .. } = at(9, put("10.0.0.3", 1.0)) else { unreachable!("a put stays one") };
        service.instances.put(instance);
        let stored = Stored { services: vec![(web(), service)], tombstones: buried(&[("10.0.0.1", 6)]) };
        let refuse = Record::RefuseBefore { service: web(), clock: 4 };
        assert_eq!(compare(&local(3, vec![]), held, &stored).records, [at(5, remove("10.0.0.2")), refuse]);
    }

    #[test]
    fn unknown_put_of_an_outbox_counts_for_24_hours_and_is_told_when_it_is_refused() {
        let clock = 100 * HOUR;
        let outbox = |age: u64| vec![at(clock - age * HOUR, put("10.0.0.1", 1.0))];
        let now = UnixMillis(clock / 1_000);
        let found = super::compare(&local(3, outbox(23)), slices(7, &[]), &catalog(&[("10.0.0.1", 1.0)]), now);
        assert_eq!((found.records.len(), found.refused.len()), (1, 0), "the stamp differs");
        let found = super::compare(&local(3, outbox(25)), slices(7, &[]), &catalog(&[("10.0.0.1", 1.0)]), now);
        assert_eq!(found.records, [remove("10.0.0.1")]);
        assert_eq!(
            found.refused.iter().map(|(_, instance)| instance.id()).collect::<Vec<_>>(),
            [instance("10.0.0.1", 1.0).id()]
        );
        // Tombstones as young as that were dropped.
        let mut tombstones = buried(&[("10.0.0.2", clock)]);
        assert!(tombstones[0].1.raise_refuse_before(clock - 22 * HOUR));
        let held = KubernetesState { tombstones, ..slices(7, &[]) };
        assert_eq!(super::compare(&local(3, outbox(23)), held, &Stored::default(), now).refused.len(), 1);
        // The directory itself was the last that wrote, so nobody can have removed it.
        assert!(super::compare(&local(8, outbox(25)), slices(7, &[]), &Stored::default(), now).refused.is_empty());
    }

    /// A directory of a server without Kubernetes, with a registration at `clock`.
    fn without_kubernetes(clock: u64) -> (LocalState, Stored) {
        let stamp = Stamp { clock, term: 0, generation: 9 };
        let old = Arc::new(Arc::unwrap_or_clone(instance("10.0.0.1", 1.0)).with_stamp(stamp));
        let mut service = Service::default();
        service.instances.put(Arc::clone(&old));
        let outbox = vec![Record::Put { service: web(), instance: old }];
        (local(0, outbox), Stored { services: vec![(web(), service)], tombstones: Vec::new() })
    }

    #[test]
    fn registrations_of_a_server_without_kubernetes_have_no_age_until_there_is_a_lease() {
        let now = UnixMillis(100 * HOUR / 1_000);
        for (age, had_lease, refused) in [(90, false, 0), (23, true, 0), (25, true, 1)] {
            let (local, stored) = without_kubernetes((100 - age) * HOUR);
            let held = KubernetesState { had_lease, ..slices(7, &[]) };
            let found = super::compare(&local, held, &stored, now);
            assert_eq!((found.records.len(), found.refused.len()), (refused, refused), "{age} h, {had_lease}");
        }
    }

    /// The copy was made at generation 100. Offline it accepted ten more changes; meanwhile the directory itself wrote two, and .3
    /// was acknowledged with 201.
    #[test]
    fn copy_of_a_directory_that_went_on_alone_undoes_nothing() {
        let clock = 100 * HOUR;
        let stamped = |address: &str, clock| match at(clock, put(address, 1.0)) {
            Record::Put { instance, .. } => instance,
            _ => unreachable!("a put stays one"),
        };
        let services = vec![(web(), vec![stamped("10.0.0.1", clock), stamped("10.0.0.3", clock + 1)])];
        let held = KubernetesState {
            term: 3,
            generation: 102,
            new_term: 4,
            had_lease: true,
            services,
            tombstones: buried(&[("10.0.0.2", clock + 2)]),
        };
        let mut service = Service::default();
        for (address, clock) in [("10.0.0.1", clock), ("10.0.0.2", clock), ("10.0.0.4", clock + 3)] {
            service.instances.put(stamped(address, clock));
        }
        let stored = Stored { services: vec![(web(), service)], tombstones: Vec::new() };
        let local = LocalState { generation: 110, ..local(3, vec![at(clock + 3, put("10.0.0.4", 1.0))]) };
        let found = super::compare(&local, held, &stored, UnixMillis(clock / 1_000));
        let wanted = [at(clock + 2, remove("10.0.0.2")), at(clock + 1, put("10.0.0.3", 1.0))];
        assert_eq!(found.records, wanted);
    }

    /// The removal of .2 had no room, so that the slice shows only its age.
    #[test]
    fn copy_that_went_on_alone_brings_back_nothing_whose_removal_was_dropped() {
        let clock = 100 * HOUR;
        let stamped = |clock| match at(clock, put("10.0.0.2", 1.0)) {
            Record::Put { instance, .. } => instance,
            _ => unreachable!("a put stays one"),
        };
        let mut service = Service::default();
        service.instances.put(stamped(clock));
        let stored = Stored { services: vec![(web(), service)], tombstones: Vec::new() };
        let local = LocalState { generation: 110, ..local(3, Vec::new()) };
        let mut tombstones = Tombstones::default();
        assert!(tombstones.raise_refuse_before(clock + 1));
        let held = KubernetesState { generation: 102, tombstones: vec![(web(), tombstones)], ..slices(3, &[]) };
        let found = super::compare(&local, held, &stored, UnixMillis(clock / 1_000)).records;
        assert_eq!(found, [remove("10.0.0.2"), Record::RefuseBefore { service: web(), clock: clock + 1 }]);
    }

    #[test]
    fn removal_of_an_address_from_the_future_counts_for_nothing_and_an_old_one_for_what_is_registered() {
        let now = 100 * HOUR;
        let every = InstanceId { ports: PortSet::every(), ..instance("10.0.0.1", 1.0).id() };
        let removal = |clock| at(clock, Record::Remove { service: web(), id: every.clone(), stamp: Stamp::default() });
        let Record::Put { instance, .. } = at(now - 30 * HOUR, put("10.0.0.1", 1.0)) else { panic!("a put stays one") };
        for (clock, registered) in [(now + HOUR, 1), (now - 26 * HOUR, 0), (now - 31 * HOUR, 1)] {
            let services = vec![(web(), vec![Arc::clone(&instance)])];
            let held = KubernetesState { had_lease: true, services, ..slices(7, &[]) };
            let found =
                super::compare(&local(3, vec![removal(clock)]), held, &Stored::default(), UnixMillis(now / 1_000));
            assert_eq!(found.records.len(), registered, "removed at {clock}");
        }
    }

    /// The list was older than the directory: etcd was set back, or what the directory wrote was deleted.
    #[test]
    fn directory_that_wrote_in_the_newest_term_is_merged_by_its_stamps() {
        let clock = 100 * HOUR;
        let stamped = |address: &str, clock| match at(clock, put(address, 1.0)) {
            Record::Put { instance, .. } => instance,
            _ => unreachable!("a put stays one"),
        };
        let mut service = Service::default();
        for (address, age) in [("10.0.0.1", 1), ("10.0.0.2", 25), ("10.0.0.3", 1)] {
            service.instances.put(stamped(address, clock - age * HOUR));
        }
        let tombstones = buried(&[("10.0.0.4", clock)]);
        let stored = Stored { services: vec![(web(), service)], tombstones };
        let addresses = |generation| {
            // .1 is older in the slice, .4 was removed by the directory, and .3 by another process.
            let services = vec![(web(), vec![stamped("10.0.0.1", clock - 2 * HOUR), stamped("10.0.0.4", clock - 1)])];
            let tombstones = buried(&[("10.0.0.3", clock)]);
            let held = KubernetesState { generation, had_lease: true, services, tombstones, ..slices(3, &[]) };
            super::compare(&local(3, vec![]), held, &stored, UnixMillis(clock / 1_000)).records
        };
        assert_eq!(addresses(100), [at(clock, remove("10.0.0.3"))], "nobody can have removed .2");
        let mut records = addresses(101);
        records.sort_by_key(|record| format!("{record:?}"));
        // It is a copy of a directory that wrote more: its words are in the slices, or were removed.
        let held = [at(clock - 2 * HOUR, put("10.0.0.1", 1.0)), at(clock - 1, put("10.0.0.4", 1.0))];
        let mut wanted = [&[remove("10.0.0.2"), at(clock, remove("10.0.0.3"))], &held[..]].concat();
        wanted.sort_by_key(|record| format!("{record:?}"));
        assert_eq!(records, wanted);
    }

    #[test]
    fn words_without_stamps_count_until_there_is_a_lease() {
        let now = UnixMillis(100 * HOUR / 1_000);
        for had_lease in [false, true] {
            let held = KubernetesState { had_lease, ..slices(7, &[]) };
            let found = super::compare(&local(3, vec![put("10.0.0.1", 1.0)]), held, &Stored::default(), now);
            assert_eq!((found.records.len(), found.refused.len()), if had_lease { (0, 1) } else { (1, 0) });
        }
    }

    #[test]
    fn what_was_followed_counts_for_nothing_and_the_journal_gets_the_slices() {
        // Term 3 wrote .1 and .2, and .5 only into its outbox. Then another process removed .2 and added .3, which this one
        // followed; of .4 it has not seen the removal yet.
        let held = slices(7, &[("10.0.0.1", 1.0), ("10.0.0.3", 1.0)]);
        let stored = catalog(&[("10.0.0.1", 1.0), ("10.0.0.2", 1.0), ("10.0.0.5", 1.0)]);
        let local = LocalState {
            term: DirectoryTerm { followed: true, ..DirectoryTerm::new(3) },
            stored: Some(stored.services),
            ..local(3, vec![put("10.0.0.5", 1.0)])
        };
        let seen = catalog(&[("10.0.0.1", 1.0), ("10.0.0.3", 1.0), ("10.0.0.4", 1.0)]);
        let Comparison { term, mut records, unmirrored, .. } = compare(&local, held, &seen);
        records.sort_by_key(|record| format!("{record:?}"));
        let mut wanted = [remove("10.0.0.4"), remove("10.0.0.2"), put("10.0.0.3", 1.0)];
        wanted.sort_by_key(|record| format!("{record:?}"));
        assert_eq!((term, &records[..]), (8, &wanted[..]));
        assert_eq!(unmirrored, [put("10.0.0.5", 1.0)], "in the catalog again, and still in the outbox");
    }

    #[test]
    fn stored_state_that_nobody_followed_is_back_in_the_catalog() {
        // The Lease's last holder wrote nothing: the directory's own state is the newest.
        let stored = catalog(&[("10.0.0.1", 1.0)]);
        let local = LocalState { stored: Some(stored.services), ..local(3, vec![remove("10.0.0.9")]) };
        let held = KubernetesState { generation: 99, ..slices(3, &[("10.0.0.9", 1.0)]) };
        let Comparison { records, unmirrored, .. } = compare(&local, held, &catalog(&[("10.0.0.9", 1.0)]));
        assert_eq!((records, unmirrored), (vec![put("10.0.0.1", 1.0)], vec![remove("10.0.0.9")]));
    }

    #[test]
    fn slices_win_over_a_directory_that_was_followed_even_when_all_of_them_are_gone() {
        let local = LocalState {
            term: DirectoryTerm { followed: true, ..DirectoryTerm::new(3) },
            ..local(3, vec![put("10.0.0.2", 1.0)])
        };
        let comparison = compare(&local, slices(0, &[]), &catalog(&[("10.0.0.1", 1.0), ("10.0.0.2", 1.0)]));
        assert_eq!(comparison.records, [remove("10.0.0.1")]);
    }
}
