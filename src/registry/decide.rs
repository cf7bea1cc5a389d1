//! The state machine: what a command changes and what its outcome is. Pure: it has no clock and no
//! I/O, and readers do not see its state.
//!
//! Commands are checked against the catalog overlaid with the changes of the batch. The batch is then
//! made durable and applied as a whole, or dropped as a whole, so the catalog is never ahead of the
//! journal.

use std::sync::Arc;

use super::{
    Catalog, Command, InstanceQuotas, NamespacePolicy, Outcome, QuotaExceeded, Requester,
    cluster_facts::ClusterFacts,
    expiries::{Expiries, MAX_SHRUNK},
    quota::MAX_REMEMBERED,
    requester::removal,
    staged::StagedChanges,
    stamper::Stamper,
};
use crate::{
    model::{
        Address, HybridClock, Instance, InstanceChange, InstanceId, InstanceKey, PortSet, Service, ServiceKey, Stamp,
        UnixMillis,
    },
    replicas::{tombstones::Tombstones, word::TombstoneLifetime},
    store::Record,
};

/// The records and changes of all commands of one batch.
#[derive(Debug, Default)]
pub(super) struct DecidedBatch {
    /// Records for the journal, in order. Can be empty although there are changes, because readiness is
    /// not journaled. Can have records without a change, which only the journal lacked: see [`Decider::replay`].
    pub(super) records: Vec<Record>,
    pub(super) changes: StagedChanges,
}

impl DecidedBatch {
    /// Whether there is nothing to journal and nothing to apply.
    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.records.is_empty()
    }
}

/// Decides commands of one batch after the other.
#[derive(Debug)]
pub(super) struct Decider {
    catalog: Arc<Catalog>,
    max_instances: usize,
    quotas: InstanceQuotas,
    facts: ClusterFacts,
    stamper: Stamper,
    /// When tombstones expire; `None` where removals are not remembered.
    expiries: Option<Expiries>,
    /// Whether a registration that changes nothing is a word as any other, with a stamp of its own. With Kubernetes it is:
    /// a removal that was acknowledged elsewhere before it, and is found later, must not undo it.
    stamps_unchanged: bool,
    batch: DecidedBatch,
}

impl Decider {
    pub(super) fn new(
        catalog: Arc<Catalog>,
        max_instances: usize,
        policy: Option<NamespacePolicy>,
        stamper: Stamper,
        tombstones: bool,
    ) -> Self {
        let stamps_unchanged = policy.is_some();
        let facts = ClusterFacts::new(policy);
        let expiries = tombstones.then(|| {
            let mut expiries = Expiries::default();
            for (service, tombstones) in catalog.all_tombstones() {
                expiries.resize(0, tombstones.bytes());
                tombstones.oldest().into_iter().for_each(|oldest| expiries.add(oldest, service.clone()));
            }
            expiries
        });
        let (quotas, batch) = (InstanceQuotas::default(), DecidedBatch::default());
        Self { catalog, max_instances, quotas, facts, stamper, expiries, stamps_unchanged, batch }
    }

    /// From now on these quotas hold.
    pub(super) fn set_quotas(&mut self, quotas: InstanceQuotas) {
        self.quotas = quotas;
    }

    /// Stamps what is decided.
    pub(super) fn stamper(&mut self) -> &mut Stamper {
        &mut self.stamper
    }

    /// The facts that registrations are checked against.
    pub(super) fn facts(&mut self) -> &mut ClusterFacts {
        &mut self.facts
    }

    /// Stages the result of the comparison at the start. The limit of instances does not apply: each
    /// of these instances was accepted before.
    pub(super) fn replay(&mut self, records: Vec<Record>, now: UnixMillis) {
        for mut record in records {
            let mut refuse_before = None;
            if let Record::RefuseBefore { clock, .. } = &mut record {
                // One of next year would refuse until then whatever is handed over.
                *clock = (*clock).min(HybridClock::highest(now.0.saturating_mul(1_000)));
            }
            match &record {
                Record::Put { service, instance } => {
                    self.stamper.observe(instance.stamp());
                    let held = self.service(service);
                    let before = held.as_ref().and_then(|held| held.instances.get(&instance.key()).cloned());
                    // Followed from Kubernetes before: only the journal lacks the instance.
                    if before.as_ref() != Some(instance) {
                        let change = InstanceChange { before, after: Some(Arc::clone(instance)) };
                        self.batch.changes.stage(service.clone(), held, change, now);
                    }
                }
                Record::Remove { service, id, stamp } => {
                    self.stamper.observe(*stamp);
                    let held = self.service(service);
                    // `None` for a removal of something that is not registered: only its tombstone is staged then.
                    let before = held.as_ref().and_then(|held| held.instances.get(&InstanceKey::from(id)).cloned());
                    self.batch.changes.stage(service.clone(), held, InstanceChange { before, after: None }, now);
                    if *stamp != Stamp::default() {
                        refuse_before = self.bury(service, id.clone(), *stamp, now);
                    }
                }
                Record::RefuseBefore { service, clock } => {
                    self.stamper.observe(Stamp { clock: *clock, ..Stamp::default() });
                    self.raise_refuse_before(service, *clock, now);
                }
                Record::Mirrored { .. } | Record::Term(_) => {}
            }
            self.batch.records.push(record);
            self.batch.records.extend(refuse_before);
        }
    }

    /// The stamp of the last word on an instance, if any is known; with the changes of the batch so far.
    pub(super) fn last_word(&self, service: &ServiceKey, key: &InstanceKey<'_>) -> Option<Stamp> {
        let registered =
            self.service(service).and_then(|held| held.instances.get(key).map(|instance| instance.stamp()));
        registered.max(self.batch.changes.tombstones(&self.catalog, service).get(key))
    }

    /// The age limit of the tombstones of a service, with the changes of the batch so far.
    pub(super) fn refuse_before(&self, service: &ServiceKey) -> u64 {
        self.batch.changes.tombstones(&self.catalog, service).refuse_before()
    }

    /// The registered instances that a removal of `id` removes, with the changes of the batch so far.
    pub(super) fn removed_by(&self, service: &ServiceKey, id: &InstanceId) -> Vec<Arc<Instance>> {
        self.service(service).map(|held| held.instances.removed_by(id)).unwrap_or_default()
    }

    /// The limit of instances, if it is reached for a new instance, or for a removal of nothing, of a service.
    pub(super) fn reached_limit(&self, service: &ServiceKey, removal: bool) -> Option<usize> {
        let is_full = !removal && self.batch.changes.instances(&self.catalog) >= self.max_instances;
        let is_new = removal || self.service(service).is_none();
        (is_full || is_new && self.remembers_too_many(service)).then_some(self.max_instances)
    }

    /// Returns the decisions since the last call, and begins the next batch.
    pub(super) fn take(&mut self) -> DecidedBatch {
        let DecidedBatch { records, changes } = &self.batch;
        let next = DecidedBatch { records: Vec::with_capacity(records.len()), changes: changes.empty_alike() };
        std::mem::replace(&mut self.batch, next)
    }

    /// Whether anything was decided since [`Decider::take`].
    pub(super) fn has_changes(&self) -> bool {
        !self.batch.is_empty()
    }

    /// Decides one command and stages what it changes.
    pub(super) fn decide(&mut self, command: Command, received: UnixMillis) -> Outcome {
        match command {
            Command::Register { service, instance, by } => self.register(service, instance, &by, received),
            Command::Unregister { service, address, ports, by } => {
                self.unregister(&service, address, ports, &by, received)
            }
            Command::SetReady { service, id, ready } => self.set_ready(service, &id, ready, received),
        }
    }

    fn register(&mut self, key: ServiceKey, instance: Arc<Instance>, by: &Requester, received: UnixMillis) -> Outcome {
        if let Some(err) = self.facts.refuse(&key) {
            return Outcome::Refused(err);
        }
        if let Some(refusal) = self.facts.addresses.refuse(&key, instance.address(), by) {
            return Outcome::AddressRefused(refusal);
        }
        let service = self.service(&key);
        let before = service.as_ref().and_then(|service| service.instances.get(&instance.key()).cloned());
        if let Some(other) = by.refused_by(&before) {
            return Outcome::Owned(other.clone());
        }
        let exceeded = self.exceeded_quota(&key, before.as_ref(), by);
        if let Some(exceeded) = exceeded.or_else(|| self.exceeded_removals(&key, service.is_some(), by)) {
            return Outcome::OverQuota(exceeded);
        }
        // An instance that changes its owner is a change, even with the same attributes: it is written and announced.
        let registrant = by.registrant_after(before.as_ref());
        let (outcome, instance) = match &before {
            None => {
                if let Some(limit) = self.reached_limit(&key, false) {
                    return Outcome::Full { limit };
                }
                (Outcome::Created, Arc::unwrap_or_clone(instance))
            }
            Some(before) if before.same_attributes(&instance) && before.registrant() == registrant.as_ref() => {
                // Without Kubernetes nobody else can have a word on the instance: a repetition costs no journal record.
                if !self.stamps_unchanged {
                    return Outcome::Unchanged;
                }
                (Outcome::Unchanged, Instance::clone(before))
            }
            Some(before) => {
                // A registration sets neither the readiness nor the time of the first registration.
                let instance = Arc::unwrap_or_clone(instance);
                (Outcome::Updated, instance.with_ready(before.ready()).with_registered(before.registered()))
            }
        };
        let instance = Arc::new(instance.with_registrant(registrant).with_stamp(self.stamper.next(received)));
        self.batch.records.push(Record::Put { service: key.clone(), instance: Arc::clone(&instance) });
        self.batch.changes.stage(key, service, InstanceChange { before, after: Some(instance) }, received);
        outcome
    }

    fn exceeded_quota(
        &self,
        key: &ServiceKey,
        before: Option<&Arc<Instance>>,
        by: &Requester,
    ) -> Option<QuotaExceeded> {
        // What is staged may be negative; the sum never is.
        let staged = &self.batch.changes.counts;
        let sum = |held: isize, staged: isize| usize::try_from(held + staged).unwrap_or(0);
        self.quotas.exceeded(
            by,
            before,
            self.facts.quota(key.namespace()),
            |name| sum(self.catalog.counts().of_registrant(name), staged.of_registrant(name)),
            || sum(self.catalog.counts().of_namespace(key.namespace()), staged.of_namespace(key.namespace())),
        )
    }

    /// The limit of the namespace, if `by` would add a service to it that may soon only remember removals. `is_known`: it has instances.
    fn exceeded_removals(&self, key: &ServiceKey, is_known: bool, by: &Requester) -> Option<QuotaExceeded> {
        let (expiries, Requester::Identity { .. }) = (self.expiries.as_ref()?, by) else { return None };
        let (held, staged) = (self.catalog.counts(), &self.batch.changes.counts);
        let instances = held.of_namespace(key.namespace()) + staged.of_namespace(key.namespace());
        let instances = usize::try_from(instances).unwrap_or(0);
        let limit = MAX_REMEMBERED + 2 * instances;
        (!is_known
            && expiries.in_namespace(key.namespace()) >= limit
            && self.batch.changes.tombstones(&self.catalog, key).is_empty())
        .then_some(QuotaExceeded::Removals { limit })
    }

    fn unregister(
        &mut self,
        key: &ServiceKey,
        address: Address,
        ports: PortSet,
        by: &Requester,
        received: UnixMillis,
    ) -> Outcome {
        let service = self.service(key);
        let all = ports.as_slice().is_empty();
        let id = removal(address, ports);
        let found = service.as_ref().map(|service| service.instances.removed_by(&id)).unwrap_or_default();
        // All or none: what is left would be neither what the caller asked for nor what it was told.
        if let Some(other) = by.refused_by(&found) {
            return Outcome::Owned(other.clone());
        }
        let removed = found.len();
        for instance in found {
            let id = instance.id();
            let change = InstanceChange { before: Some(instance), after: None };
            self.batch.changes.stage(key.clone(), service.clone(), change, received);
            self.remove(key, id, received);
        }
        // What is not registered here may be in an outbox elsewhere, with an earlier stamp. Without a namespace, or under a
        // Service of others, nothing can be remembered in Kubernetes, and nobody can register.
        // With ports, the tombstones of the instances that were found are enough. The removal of a whole address is also about those
        // that only other processes know.
        let remembered = (all || removed == 0) && self.expiries.is_some() && self.facts.has_place_for(key);
        if remembered && removed == 0 {
            if let Some(exceeded) = self.exceeded_removals(key, service.is_some(), by) {
                return Outcome::OverQuota(exceeded);
            }
            if let Some(limit) = self.reached_limit(key, true) {
                return Outcome::Full { limit };
            }
        }
        if remembered {
            self.remove(key, id, received);
        }
        if removed == 0 { Outcome::NotFound { remembered } } else { Outcome::Removed(removed) }
    }

    /// Journals a removal, and stages its tombstone.
    fn remove(&mut self, service: &ServiceKey, id: InstanceId, received: UnixMillis) {
        let stamp = self.stamper.next(received);
        self.batch.records.push(Record::Remove { service: service.clone(), id: id.clone(), stamp });
        let refuse_before = self.bury(service, id, stamp, received);
        self.batch.records.extend(refuse_before);
    }

    /// Whether no other service may remember removals than those that do. Each keeps a slice until they expire, as if it had an
    /// instance, so there may be as many.
    fn remembers_too_many(&self, service: &ServiceKey) -> bool {
        self.expiries.as_ref().is_some_and(|expiries| expiries.len() >= self.max_instances)
            && self.batch.changes.tombstones(&self.catalog, service).is_empty()
    }

    /// Stages a tombstone, where removals are remembered. Returns a record if older ones were dropped for it.
    fn bury(&mut self, service: &ServiceKey, id: InstanceId, stamp: Stamp, received: UnixMillis) -> Option<Record> {
        self.note_expiry(service, stamp.clock)?;
        // The expiry is noted above, before the service has the tombstone: `note_expiry` asks whether it had any.
        let clock = self.change_tombstones(service, received, |tombstones| {
            tombstones.insert(id, stamp);
            tombstones.shrink()
        });
        // The new tombstone counts, too.
        self.keep_tombstone_budget(received);
        Some(Record::RefuseBefore { service: service.clone(), clock: clock? })
    }

    fn raise_refuse_before(&mut self, service: &ServiceKey, clock: u64, received: UnixMillis) {
        if self.note_expiry(service, clock).is_some() {
            self.change_tombstones(service, received, |tombstones| tombstones.raise_refuse_before(clock));
        }
    }

    fn change_tombstones<T>(
        &mut self,
        service: &ServiceKey,
        received: UnixMillis,
        change: impl FnOnce(&mut Tombstones) -> T,
    ) -> T {
        let tombstones = self.batch.changes.tombstones_mut(&self.catalog, service, received);
        let before = tombstones.bytes();
        let changed = change(tombstones);
        if let Some(expiries) = &mut self.expiries {
            expiries.resize(before, tombstones.bytes());
        }
        changed
    }

    /// Drops older tombstones of the services with the oldest, while all together take too much.
    fn keep_tombstone_budget(&mut self, received: UnixMillis) {
        for _ in 0..MAX_SHRUNK {
            let Some(service) = self.expiries.as_mut().and_then(Expiries::next_to_shrink) else { return };
            let bytes = self.batch.changes.tombstones(&self.catalog, &service).bytes();
            if bytes > 0 {
                // Half of them at once, so that the next removals of the service have room.
                let dropped = self.change_tombstones(&service, received, |tombstones| tombstones.shrink_to(bytes / 2));
                self.batch.records.extend(dropped.map(|clock| Record::RefuseBefore { service, clock }));
            }
        }
    }

    /// Notes when the tombstones of a service that has none yet expire; `None` where removals are not remembered.
    fn note_expiry(&mut self, service: &ServiceKey, clock: u64) -> Option<()> {
        let expiries = self.expiries.as_mut()?;
        // A service is in the queue once, by its first tombstone. Later ones are found when it is swept.
        let is_first = !self.batch.changes.tombstones.contains_key(service);
        if is_first && self.catalog.tombstones(service).is_empty() {
            expiries.add(clock, service.clone());
        }
        Some(())
    }

    /// Stages that tombstones of a few services have expired. Nothing is journaled: a start knows their age.
    pub(super) fn sweep(&mut self, now: UnixMillis) {
        let Some(expiries) = &mut self.expiries else { return };
        let expired_before = TombstoneLifetime::DEFAULT.expired_before(self.stamper.now(now));
        for service in expiries.take_due(expired_before) {
            let mut tombstones = self.batch.changes.tombstones(&self.catalog, &service);
            let before = tombstones.bytes();
            let changed = tombstones.expire(expired_before);
            expiries.resize(before, tombstones.bytes());
            if let Some(oldest) = tombstones.oldest() {
                expiries.add_again(oldest, expired_before, service.clone());
            }
            if changed {
                self.batch.changes.stage_tombstones(&service, tombstones, now);
            }
        }
    }

    /// Services whose tombstones expire further in the future than the stamp of any of them can be.
    pub(super) fn expiring_behind(&mut self, clock: u64) -> Vec<ServiceKey> {
        self.expiries.as_mut().map(|expiries| expiries.take_behind(clock)).unwrap_or_default()
    }

    /// The tombstones of `service` have other stamps now.
    pub(super) fn note_new_expiry(&mut self, service: ServiceKey) {
        let oldest = self.batch.changes.tombstones(&self.catalog, &service).oldest();
        if let (Some(expiries), Some(oldest)) = (&mut self.expiries, oldest) {
            expiries.add(oldest, service);
        }
    }

    /// Stamps anew what is known of `service` and is stamped above `highest`: it counts as said now, in the order in which it
    /// was said.
    pub(super) fn restamp(&mut self, service: &ServiceKey, highest: u64, now: UnixMillis) {
        let tombstones = self.batch.changes.tombstones(&self.catalog, service);
        if tombstones.refuse_before() > highest {
            let clock = now.0.saturating_mul(1_000);
            self.change_tombstones(service, now, |tombstones| tombstones.lower_refuse_before(clock));
            self.batch.records.push(Record::RefuseBefore { service: service.clone(), clock });
        }
        let mut removals: Vec<_> = tombstones.iter().filter(|removal| removal.stamp.clock > highest).collect();
        // In the order in which they were said: among themselves the new stamps must not reverse it.
        removals.sort_unstable_by_key(|removal| removal.stamp);
        for removal in &removals {
            let (id, stamp) = (removal.id.clone(), self.stamper.next(now));
            self.batch.records.push(Record::Remove { service: service.clone(), id: id.clone(), stamp });
            self.change_tombstones(service, now, |tombstones| tombstones.restamp(id, stamp));
        }
        // What is registered was registered after every removal of it.
        let is_due = |one: &&Arc<Instance>| {
            one.stamp().clock > highest || removals.iter().any(|removal| removal.id.address == *one.address())
        };
        let held = self.service(service).unwrap_or_default();
        let mut due: Vec<Arc<Instance>> = held.instances.iter().filter(is_due).cloned().collect();
        due.sort_unstable_by_key(|instance| instance.stamp());
        for before in due {
            let instance = Arc::new(Instance::clone(&before).with_stamp(self.stamper.next(now)));
            self.batch.records.push(Record::Put { service: service.clone(), instance: Arc::clone(&instance) });
            let change = InstanceChange { before: Some(before), after: Some(instance) };
            self.batch.changes.stage(service.clone(), Some(held.clone()), change, now);
        }
    }

    /// Records that were decided since [`Decider::take`].
    pub(super) fn pending(&self) -> usize {
        self.batch.records.len()
    }

    fn set_ready(&mut self, key: ServiceKey, id: &InstanceId, ready: bool, received: UnixMillis) -> Outcome {
        let service = self.service(&key);
        let found = service.as_ref().and_then(|service| service.instances.get(&InstanceKey::from(id)).cloned());
        match found {
            None => Outcome::NotFound { remembered: false },
            Some(before) if before.ready() == ready => Outcome::Unchanged,
            Some(before) => {
                let after = Arc::new(Instance::clone(&before).with_ready(ready));
                self.batch.changes.stage(
                    key,
                    service,
                    InstanceChange { before: Some(before), after: Some(after) },
                    received,
                );
                Outcome::Updated
            }
        }
    }

    /// The service with the changes of the batch so far.
    fn service(&self, key: &ServiceKey) -> Option<Service> {
        self.batch.changes.service(&self.catalog, key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{InstanceSpec, PortSpec, Registrant, testing::VALIDATOR};

    fn key(name: &str) -> ServiceKey {
        VALIDATOR.service("prod", name).expect("valid")
    }

    fn instance(address: &str, port: i64, weight: f32) -> Arc<Instance> {
        let draft = InstanceSpec {
            address: address.into(),
            ports: vec![PortSpec { number: port, ..PortSpec::default() }],
            weight: Some(weight),
            ..InstanceSpec::default()
        };
        Arc::new(VALIDATOR.instance(&key("web"), &draft, UnixMillis(1)).expect("valid"))
    }

    fn register(decider: &mut Decider, instance: &Arc<Instance>) -> Outcome {
        let by = Requester::Unrestricted;
        let command = Command::Register { service: key("web"), instance: Arc::clone(instance), by };
        decider.decide(command, UnixMillis(2))
    }

    fn unregister(decider: &mut Decider, address: &str, ports: PortSet) -> Outcome {
        let address = VALIDATOR.address(address).expect("valid");
        let by = Requester::Unrestricted;
        decider.decide(Command::Unregister { service: key("web"), address, ports, by }, UnixMillis(2))
    }

    const NOT_FOUND: Outcome = Outcome::NotFound { remembered: false };

    fn empty(max_instances: usize) -> Decider {
        Decider::new(Arc::new(Catalog::default()), max_instances, None, Stamper::default(), false)
    }

    #[test]
    fn removals_are_remembered_where_tombstones_are_kept() {
        for kept in [false, true] {
            let catalog = Arc::new(Catalog::default());
            let mut decider = Decider::new(Arc::clone(&catalog), 10, None, Stamper::default(), kept);
            let web = instance("10.0.0.1", 80, 1.0);
            assert_eq!(register(&mut decider, &web), Outcome::Created);
            assert_eq!(unregister(&mut decider, "10.0.0.1", web.ports().set()), Outcome::Removed(1));
            let batch = decider.take();
            let Record::Remove { stamp, .. } = &batch.records[1] else { panic!("{:?}", batch.records) };
            let found = batch.changes.tombstones.get(&key("web")).map(|(tombstones, _)| tombstones.get(&web.key()));
            assert_eq!(found, kept.then_some(Some(*stamp)));
        }
    }

    /// Registers and removes an instance in each of these services, one batch each.
    fn come_and_go(decider: &mut Decider, services: std::ops::Range<u64>) -> Vec<Outcome> {
        let catalog = Arc::clone(&decider.catalog);
        let mut outcomes = Vec::new();
        for n in services {
            let (service, web) = (key(&format!("s{n}")), instance("10.0.0.1", 80, 1.0));
            let (address, ports) = (web.address().clone(), web.ports().set());
            decider.stamper().set_generation(n);
            let by = Requester::Unrestricted;
            let register = Command::Register { service: service.clone(), instance: web, by: by.clone() };
            outcomes.push(decider.decide(register, UnixMillis(n)));
            decider.decide(Command::Unregister { service, address, ports, by }, UnixMillis(n));
            for (service, (tombstones, _)) in decider.take().changes.tombstones {
                catalog.set_tombstones(service, tombstones);
            }
        }
        outcomes
    }

    #[test]
    fn identity_cannot_make_a_namespace_remember_removals_without_end() {
        let mut decider = Decider::new(Arc::new(Catalog::default()), 1_000_000, None, Stamper::default(), true);
        let registrant = Registrant::new("vm-1".into()).expect("a name");
        let peer = std::net::Ipv4Addr::LOCALHOST.into();
        let vm = Requester::Identity { registrant, overrides: false, peer };
        let address = || VALIDATOR.address("10.0.0.1").expect("valid");
        let remove = |decider: &mut Decider, service: &str, by: &Requester| {
            let service =
                VALIDATOR.service(service.split_once('/').expect("two names").0, &service[5..]).expect("valid");
            let (ports, by) = (PortSet::default(), by.clone());
            decider.decide(Command::Unregister { service, address: address(), ports, by }, UnixMillis(2))
        };
        let remembered = Outcome::NotFound { remembered: true };
        for n in 0..MAX_REMEMBERED {
            assert_eq!(remove(&mut decider, &format!("prod/s{n}"), &vm), remembered);
        }
        let limit = |limit| Outcome::OverQuota(QuotaExceeded::Removals { limit });
        assert_eq!(remove(&mut decider, "prod/new", &vm), limit(MAX_REMEMBERED));
        assert_eq!(remove(&mut decider, "prod/s7", &vm), remembered, "a service that is remembered already");
        assert_eq!(remove(&mut decider, "shop/new", &vm), remembered, "another namespace");
        assert_eq!(remove(&mut decider, "prod/any", &Requester::Unrestricted), remembered, "who may do all");
        let web = instance("10.0.0.1", 80, 1.0);
        let register = |by| Command::Register { service: key("web"), instance: Arc::clone(&web), by };
        assert_eq!(
            decider.decide(register(vm.clone()), UnixMillis(2)),
            limit(MAX_REMEMBERED),
            "it could be removed at once"
        );
        assert_eq!(decider.decide(register(Requester::Unrestricted), UnixMillis(2)), Outcome::Created);
        assert_eq!(remove(&mut decider, "prod/new", &vm), remembered, "with more instances it is more");
    }

    #[test]
    fn all_tombstones_fit_one_budget_and_the_oldest_are_dropped_for_it() {
        const BUDGET: usize = 10_000;
        let mut decider = Decider::new(Arc::new(Catalog::default()), 10_000, None, Stamper::default(), true);
        decider.expiries = Some(Expiries::with_budget(BUDGET));
        for begin in (1..2_000).step_by(100) {
            come_and_go(&mut decider, begin..begin + 100);
            let all = decider.catalog.all_tombstones();
            let bytes: usize = all.iter().map(|(_, tombstones)| tombstones.bytes()).sum();
            assert_eq!(Some(bytes), decider.expiries.as_ref().map(Expiries::bytes), "it is counted right");
            assert!(bytes <= BUDGET, "{bytes}");
        }
        let remembers = |n: u64| decider.catalog.tombstones(&key(&format!("s{n}")));
        assert_eq!(
            (remembers(1).len(), remembers(1).refuse_before()),
            (0, 1_001),
            "a put that is no younger is refused"
        );
        assert_eq!((remembers(2_000).len(), remembers(2_000).refuse_before()), (1, 0));
        assert!((0..2_000).map(|n| remembers(n).len()).is_sorted(), "the oldest were dropped");
    }

    #[test]
    fn services_that_remember_removals_are_as_many_as_instances_at_most() {
        let mut decider = Decider::new(Arc::new(Catalog::default()), 10, None, Stamper::default(), true);
        let full = Outcome::Full { limit: 10 };
        let outcomes = come_and_go(&mut decider, 0..12);
        assert_eq!(outcomes, [vec![Outcome::Created; 10], vec![full.clone(); 2]].concat());
        assert_eq!(come_and_go(&mut decider, 3..4), [Outcome::Created], "its removals are remembered already");
        assert_eq!(
            unregister(&mut decider, "10.0.0.1", PortSet::default()),
            full,
            "nothing is, and it would be remembered"
        );
    }

    #[test]
    fn removal_of_what_is_not_registered_is_remembered_where_kubernetes_has_a_place_for_it() {
        let policy = NamespacePolicy { create_namespaces: true };
        let mut decider = Decider::new(Arc::default(), 10, Some(policy), Stamper::default(), true);
        let web = instance("10.0.0.1", 80, 1.0);
        assert_eq!(unregister(&mut decider, "10.0.0.1", web.ports().set()), Outcome::NotFound { remembered: true });
        assert_eq!(unregister(&mut decider, "10.0.0.2", PortSet::default()), Outcome::NotFound { remembered: true });
        let batch = decider.take();
        let (tombstones, _) = &batch.changes.tombstones[&key("web")];
        let removed: Vec<String> = tombstones.iter().map(|one| one.id.to_string()).collect();
        assert_eq!((removed, batch.records.len()), (vec!["10.0.0.1:80".into(), "10.0.0.2:*".into()], 2));
        assert!(tombstones.get(&instance("10.0.0.2", 81, 1.0).key()).is_some(), "whatever its ports");

        // Not where nobody could register, or where the mirror would have to make a namespace for it.
        decider.facts().namespaces_are_complete();
        assert_eq!(unregister(&mut decider, "10.0.0.1", PortSet::default()), NOT_FOUND);
        decider.facts().set_namespace("prod".into(), true);
        decider.facts().set_foreign(key("web"), true);
        assert_eq!(unregister(&mut decider, "10.0.0.1", PortSet::default()), NOT_FOUND);
        assert!(decider.take().is_empty());
    }

    #[test]
    fn removal_without_ports_leaves_one_tombstone_for_the_address() {
        let mut decider = Decider::new(Arc::default(), 10, None, Stamper::default(), true);
        for port in [80, 81] {
            assert_eq!(register(&mut decider, &instance("10.0.0.1", port, 1.0)), Outcome::Created);
        }
        assert_eq!(unregister(&mut decider, "10.0.0.1", PortSet::default()), Outcome::Removed(2));
        let batch = decider.take();
        let (tombstones, _) = &batch.changes.tombstones[&key("web")];
        assert_eq!(tombstones.iter().map(|one| one.id.to_string()).collect::<Vec<_>>(), ["10.0.0.1:*"]);
        assert_eq!(batch.records.len(), 2 + 3, "each instance, and the address");
        assert!(batch.changes.services[&key("web")].after.instances.is_empty());
    }

    #[test]
    fn expired_tombstones_are_swept() {
        let catalog = Arc::new(Catalog::default());
        let mut tombstones = crate::replicas::tombstones::Tombstones::default();
        let hour = 3_600_000;
        for (address, at) in [("10.0.0.1", hour), ("10.0.0.2", 3 * hour)] {
            let stamp = Stamp { clock: at * 1_000, term: 1, generation: 1 };
            assert!(tombstones.insert(instance(address, 80, 1.0).id(), stamp));
        }
        catalog.set_tombstones(key("web"), tombstones);
        let mut decider = Decider::new(Arc::clone(&catalog), 10, None, Stamper::default(), true);
        decider.sweep(UnixMillis(33 * hour));
        assert!(decider.take().is_empty());
        decider.sweep(UnixMillis(33 * hour + 1));
        let batch = decider.take();
        assert!(batch.records.is_empty());
        let (left, _) = &batch.changes.tombstones[&key("web")];
        assert_eq!(left.iter().map(|one| one.id.clone()).collect::<Vec<_>>(), [instance("10.0.0.2", 80, 1.0).id()]);
        catalog.set_tombstones(key("web"), left.clone());
        decider.sweep(UnixMillis(36 * hour));
        assert!(decider.take().changes.tombstones[&key("web")].0.is_empty());
    }

    #[test]
    fn unchanged_registration_is_stamped_anew_with_kubernetes_and_is_no_event() {
        let policy = NamespacePolicy { create_namespaces: false };
        let mut decider = Decider::new(Arc::default(), 10, Some(policy), Stamper::new(HybridClock::after(5), 3), true);
        let web = instance("10.0.0.1", 80, 1.0);
        assert_eq!(register(&mut decider, &web), Outcome::Created);
        let stamped = |batch: &DecidedBatch| match batch.records.as_slice() {
            [.., Record::Put { instance, .. }] => Arc::clone(instance),
            other => panic!("{other:?}"),
        };
        let batch = decider.take();
        let before = stamped(&batch);
        decider.catalog.set(key("web"), batch.changes.services[&key("web")].after.clone());

        decider.stamper().set_generation(9);
        assert_eq!(register(&mut decider, &web), Outcome::Unchanged);
        let batch = decider.take();
        let after = stamped(&batch);
        assert_eq!((batch.records.len(), batch.changes.events.len()), (1, 0));
        assert!(after.stamp() > before.stamp() && after.stamp().generation == 9);
        assert!(after.same_but_for_stamp(&before));
        let staged = &batch.changes.services[&key("web")];
        assert!(staged.changes.is_empty() && staged.after.instances.get(&web.key()) == Some(&after));
    }

    #[test]
    fn command_is_decided_with_the_earlier_changes_of_its_batch() {
        let mut decider = empty(10);
        let web = instance("10.0.0.1", 80, 1.0);
        assert_eq!(register(&mut decider, &web), Outcome::Created);
        assert_eq!(register(&mut decider, &web), Outcome::Unchanged);
        assert_eq!(register(&mut decider, &instance("10.0.0.1", 80, 2.0)), Outcome::Updated);
        assert_eq!(unregister(&mut decider, "10.0.0.1", web.ports().set()), Outcome::Removed(1));
        assert_eq!(unregister(&mut decider, "10.0.0.1", web.ports().set()), NOT_FOUND);
        let batch = decider.take();
        assert_eq!((batch.records.len(), batch.changes.events.len()), (3, 3));
        assert!(batch.changes.services[&key("web")].after.instances.is_empty());
        assert!(decider.take().is_empty());
    }

    #[test]
    fn unregister_without_ports_removes_every_instance_of_the_address() {
        let mut decider = empty(10);
        for (address, port) in [("10.0.0.1", 80), ("10.0.0.1", 81), ("10.0.0.2", 80)] {
            assert_eq!(register(&mut decider, &instance(address, port, 1.0)), Outcome::Created);
        }
        assert_eq!(unregister(&mut decider, "10.0.0.1", PortSet::default()), Outcome::Removed(2));
        assert_eq!(unregister(&mut decider, "10.0.0.1", PortSet::default()), NOT_FOUND);
        assert_eq!(decider.take().changes.services[&key("web")].after.instances.len(), 1);
    }

    #[test]
    fn instance_limit_counts_what_the_batch_adds_and_removes() {
        let mut decider = empty(1);
        assert_eq!(register(&mut decider, &instance("10.0.0.1", 80, 1.0)), Outcome::Created);
        assert_eq!(register(&mut decider, &instance("10.0.0.2", 80, 1.0)), Outcome::Full { limit: 1 });
        assert_eq!(register(&mut decider, &instance("10.0.0.1", 80, 3.0)), Outcome::Updated);
        assert_eq!(unregister(&mut decider, "10.0.0.1", PortSet::default()), Outcome::Removed(1));
        assert_eq!(register(&mut decider, &instance("10.0.0.2", 80, 1.0)), Outcome::Created);
    }

    #[test]
    fn readiness_is_not_journaled_and_survives_an_update() {
        let mut decider = empty(10);
        let web = instance("10.0.0.1", 80, 1.0);
        assert_eq!(register(&mut decider, &web), Outcome::Created);
        let set = |ready| Command::SetReady { service: key("web"), id: web.id(), ready };
        assert_eq!(decider.decide(set(false), UnixMillis(3)), Outcome::Updated);
        assert_eq!(decider.decide(set(false), UnixMillis(3)), Outcome::Unchanged);
        assert_eq!(register(&mut decider, &instance("10.0.0.1", 80, 2.0)), Outcome::Updated);
        let batch = decider.take();
        assert_eq!(batch.records.len(), 2);
        let after = &batch.changes.services[&key("web")].after.instances;
        let held = after.iter().next().expect("one instance");
        assert!(!held.ready());
        assert_eq!((held.weight().get(), held.registered()), (2.0, UnixMillis(1)));
    }
}
