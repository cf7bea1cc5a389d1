//! Decides after a start with Kubernetes whether the store or the EndpointSlices are newer, and what
//! has to change in the registry.
//!
//! Whoever writes to Kubernetes does so under a term of its own, higher than any before; slices and the
//! Lease show the term, and a generation that its writer had stored before. So if neither has a higher
//! term than the directory, nor its term with a higher generation, the store is newer: the stored state
//! is kept, and the mirror corrects the slices. Otherwise the slices are newer: another directory has written to Kubernetes since, or this directory is new, or it is an older copy of the one
//! that wrote. Then the outbox is laid over the slices. The outbox has the changes that this directory
//! acknowledged and that Kubernetes was never seen to have. Of two words on one instance the one with the
//! later [`Stamp`] wins, so that an old outbox undoes nothing that was acknowledged after it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::Catalog;
use crate::{
    model::{CowTree, Instance, InstanceId, InstanceKey, Service, ServiceKey, Stamp},
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
    /// The valid instances, by service.
    pub services: Vec<(ServiceKey, Vec<Arc<Instance>>)>,
}

/// The contents of the store beside the instances.
#[derive(Debug, Default)]
pub(super) struct LocalState {
    /// The term of the data directory. Once another process has written under a higher one, nothing but the
    /// outbox counts.
    pub(super) term: DirectoryTerm,
    /// The highest generation in the store; it is not lower than that of any slice which this directory wrote.
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
pub(super) struct LatestRecords(HashMap<(ServiceKey, InstanceId), Word, foldhash::fast::RandomState>);

/// A stamp, and the instance that was registered then, or `None` if it was removed.
type Word = (Stamp, Option<Arc<Instance>>);

impl LatestRecords {
    /// Adds the records of a batch; the last record of an instance replaces earlier ones.
    pub(super) fn add(&mut self, records: &[Record]) {
        for record in records {
            match record {
                Record::Put { service, instance } => {
                    let latest = (instance.stamp(), Some(Arc::clone(instance)));
                    self.0.insert((service.clone(), instance.id()), latest);
                }
                Record::Remove { service, id, stamp } => {
                    self.0.insert((service.clone(), id.clone()), (*stamp, None));
                }
                Record::Mirrored { .. } | Record::Term(_) => {}
            }
        }
    }

    /// Takes from `records` those that are the latest of their instances here too, as they are here.
    fn split_off(&self, records: &mut Vec<Record>) -> Vec<Record> {
        let own = |record: &mut Record| match record {
            Record::Put { service, instance } => {
                let latest = self.0.get(&(service.clone(), instance.id()));
                latest.is_some_and(|(_, latest)| latest.as_ref() == Some(instance))
            }
            Record::Remove { service, id, stamp } => match self.0.get(&(service.clone(), id.clone())) {
                Some((latest, None)) => {
                    *stamp = *latest;
                    true
                }
                _ => false,
            },
            Record::Mirrored { .. } | Record::Term(_) => false,
        };
        records.extract_if(.., own).collect()
    }

    /// Whether there is a record for the instance of `record`.
    pub(super) fn covers(&self, record: &Record) -> bool {
        match record {
            Record::Put { service, instance } => self.0.contains_key(&(service.clone(), instance.id())),
            Record::Remove { service, id, .. } => self.0.contains_key(&(service.clone(), id.clone())),
            Record::Mirrored { .. } | Record::Term(_) => false,
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
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
}

/// Decides which state is newer; `catalog` is everything that readers see now.
pub(super) fn compare(local: &LocalState, held: KubernetesState, catalog: &[(ServiceKey, Service)]) -> Comparison {
    let DirectoryTerm { term: own_term, followed } = local.term;
    // Higher than both, unless the Lease was set back to a backup.
    let term = held.new_term.max(own_term);
    let stored = local.stored.as_deref().unwrap_or(catalog);
    let mut wanted: HashMap<ServiceKey, CowTree<Arc<Instance>>> = HashMap::new();
    if own_term != 0 && !followed && (own_term, local.generation) >= (held.term, held.generation) {
        if local.stored.is_none() {
            return Comparison { term, ..Comparison::default() };
        }
        wanted.extend(stored.iter().map(|(service, held)| (service.clone(), held.instances.clone())));
    } else {
        for (service, instances) in held.services {
            let tree = wanted.entry(service).or_default();
            instances.into_iter().for_each(|instance| drop(tree.put(instance)));
        }
        if own_term == 0 {
            // The directory never wrote to Kubernetes, so its instances are not in any slice.
            for (service, registered) in stored {
                let tree = wanted.entry(service.clone()).or_default();
                for instance in &registered.instances {
                    merge(tree, &instance.id(), instance.stamp(), Some(instance));
                }
            }
        }
        for ((service, id), (stamp, instance)) in &local.outbox.0 {
            merge(wanted.entry(service.clone()).or_default(), id, *stamp, instance.as_ref());
        }
    }
    let mut records = differences(&wanted, catalog);
    let mut unmirrored = Vec::new();
    if local.stored.is_some() {
        // What only the journal, or only the catalog, lacks goes to both: repeating it changes nothing.
        let known: HashSet<(ServiceKey, InstanceId)> = records.iter().filter_map(instance_of).collect();
        let of_journal = differences(&wanted, stored).into_iter();
        records.extend(of_journal.filter(|record| instance_of(record).is_some_and(|one| !known.contains(&one))));
        // The journal must not take its own outbox for something that Kubernetes has.
        unmirrored = local.outbox.split_off(&mut records);
    }
    Comparison { term, records, unmirrored }
}

fn instance_of(record: &Record) -> Option<(ServiceKey, InstanceId)> {
    match record {
        Record::Put { service, instance } => Some((service.clone(), instance.id())),
        Record::Remove { service, id, .. } => Some((service.clone(), id.clone())),
        Record::Mirrored { .. } | Record::Term(_) => None,
    }
}

/// Applies one word, unless a later one on the same instance is there. Words from before there were stamps
/// have equal ones: the applied word wins.
fn merge(tree: &mut CowTree<Arc<Instance>>, id: &InstanceId, stamp: Stamp, word: Option<&Arc<Instance>>) {
    let key = InstanceKey::from(id);
    if tree.get(&key).is_some_and(|known| known.stamp() > stamp) {
        return;
    }
    match word {
        Some(instance) => drop(tree.put(Arc::clone(instance))),
        None => drop(tree.remove(&key)),
    }
}

/// The records that turn `from` into `wanted`.
fn differences(wanted: &HashMap<ServiceKey, CowTree<Arc<Instance>>>, from: &[(ServiceKey, Service)]) -> Vec<Record> {
    let mut records = Vec::new();
    let nothing = CowTree::default();
    for (service, held) in from {
        let wanted = wanted.get(service).unwrap_or(&nothing);
        let gone = held.instances.iter().filter(|instance| wanted.get(&instance.key()).is_none());
        records.extend(gone.map(|instance| Record::Remove {
            service: service.clone(),
            id: instance.id(),
            stamp: Stamp::default(),
        }));
    }
    let held: HashMap<&ServiceKey, &Service> = from.iter().map(|(service, held)| (service, held)).collect();
    for (service, wanted) in wanted {
        let held = held.get(service);
        let put = wanted.iter().filter(|instance| {
            held.and_then(|held| held.instances.get(&instance.key())).is_none_or(|held| held != *instance)
        });
        records.extend(put.map(|instance| Record::Put { service: service.clone(), instance: Arc::clone(instance) }));
    }
    records
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{InstanceId, InstanceSpec, UnixMillis, testing::VALIDATOR};

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
        KubernetesState { term, generation: 100, new_term: term + 1, services: vec![(web(), instances)] }
    }

    fn catalog(held: &[(&str, f32)]) -> Vec<(ServiceKey, Service)> {
        let mut service = Service::default();
        held.iter().for_each(|(address, weight)| drop(service.instances.put(instance(address, *weight))));
        vec![(web(), service)]
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
        let comparison = compare(&local(0, vec![]), slices(3, &[("10.0.0.1", 2.0)]), &[]);
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
        let held = KubernetesState { term: 7, generation: 1, new_term: 8, services: vec![(web(), instances)] };
        let outbox = vec![
            at(40, put("10.0.0.1", 1.0)),
            at(40, remove("10.0.0.2")),
            at(60, put("10.0.0.3", 1.0)),
            // The store of an earlier version has no stamps.
            put("10.0.0.4", 1.0),
        ];
        let comparison = compare(&local(3, outbox), held, &[]);
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
        let comparison = compare(&local, slices(7, &[("10.0.0.2", 1.0)]), &[]);
        assert_eq!(comparison.records, [put("10.0.0.1", 99.0)]);
    }
    #[test]
    fn what_was_followed_counts_for_nothing_and_the_journal_gets_the_slices() {
        // Term 3 wrote .1 and .2, and .5 only into its outbox. Then another process removed .2 and added .3, which this one
        // followed; of .4 it has not seen the removal yet.
        let held = slices(7, &[("10.0.0.1", 1.0), ("10.0.0.3", 1.0)]);
        let stored = catalog(&[("10.0.0.1", 1.0), ("10.0.0.2", 1.0), ("10.0.0.5", 1.0)]);
        let local = LocalState {
            term: DirectoryTerm { term: 3, followed: true },
            stored: Some(stored),
            ..local(3, vec![put("10.0.0.5", 1.0)])
        };
        let seen = catalog(&[("10.0.0.1", 1.0), ("10.0.0.3", 1.0), ("10.0.0.4", 1.0)]);
        let Comparison { term, mut records, unmirrored } = compare(&local, held, &seen);
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
        let local = LocalState { stored: Some(stored), ..local(3, vec![remove("10.0.0.9")]) };
        let held = KubernetesState { generation: 99, ..slices(3, &[("10.0.0.9", 1.0)]) };
        let Comparison { records, unmirrored, .. } = compare(&local, held, &catalog(&[("10.0.0.9", 1.0)]));
        assert_eq!((records, unmirrored), (vec![put("10.0.0.1", 1.0)], vec![remove("10.0.0.9")]));
    }

    #[test]
    fn slices_win_over_a_directory_that_was_followed_even_when_all_of_them_are_gone() {
        let local =
            LocalState { term: DirectoryTerm { term: 3, followed: true }, ..local(3, vec![put("10.0.0.2", 1.0)]) };
        let comparison = compare(&local, slices(0, &[]), &catalog(&[("10.0.0.1", 1.0), ("10.0.0.2", 1.0)]));
        assert_eq!(comparison.records, [remove("10.0.0.1")]);
    }
}
