//! The start: the registry is filled from the store before it gets a writer.

use std::{collections::HashMap, sync::Arc, time::Instant};

use indexmap::IndexMap;
use ipnet::IpNet;
use tokio::sync::{Semaphore, mpsc};
use tracing::{error, info, warn};

use super::{
    Catalog, Feed, InstanceQuotas, MirrorProgress, NamespacePolicy, QUEUE_LEN, RefusedWords, RegisteredNames,
    RegistryHandle, Snapshots, Status, Writer, WriterMessage, apply::Applier, batch_limit::BatchLimit,
    commit::Committer, decide::Decider, mirror_records::MirrorRecords, restore::LocalState, stamper::Stamper,
};
use crate::{
    metrics::Metrics,
    model::{HybridClock, InstanceKey, Service, ServiceKey, Stamp, UnixMillis},
    replicas::{tombstones::Tombstones, word::TombstoneLifetime},
    store::{self, DataDir, Record, RecoveryProgress, StoreError},
    zone::Publisher,
};

/// The configuration of a registry.
#[derive(Debug, Clone)]
pub struct RegistryOptions {
    /// Instances that may be registered; more get [`Outcome::Full`](super::Outcome::Full).
    pub max_instances: usize,
    /// How many of them an identity and a namespace may have.
    pub quotas: InstanceQuotas,
    /// Addresses that nobody may register.
    pub deny_addresses: Vec<IpNet>,
    /// How registrations are checked against Kubernetes; `None` without Kubernetes.
    pub kubernetes: Option<NamespacePolicy>,
}

/// A registry that has not read its store yet. It refuses every submission with
/// [`Unavailable::NotReady`](super::Unavailable::NotReady).
#[derive(Debug)]
pub struct Unrecovered {
    queue: mpsc::Receiver<WriterMessage>,
    catalog: Arc<Catalog>,
    feed: Arc<Feed>,
    status: Status,
    mirror_progress: Arc<MirrorProgress>,
    refused_words: Arc<RefusedWords>,
    names: Arc<RegisteredNames>,
    metrics: Arc<Metrics>,
    options: RegistryOptions,
}

/// A registry: its handle, and the state that [`Unrecovered::recover`] makes into its writer.
#[must_use]
pub fn new(options: RegistryOptions, metrics: Arc<Metrics>) -> (RegistryHandle, Unrecovered) {
    let (sender, queue) = mpsc::channel(QUEUE_LEN);
    let catalog = Arc::new(Catalog::default());
    let feed = Arc::new(Feed::new());
    let status = Status::new();
    let mirror_progress = Arc::new(MirrorProgress::new(options.kubernetes.is_some()));
    let refused_words = Arc::<RefusedWords>::default();
    let names = Arc::<RegisteredNames>::default();
    let handle = RegistryHandle {
        queue: sender,
        catalog: Arc::clone(&catalog),
        feed: Arc::clone(&feed),
        snapshots: Arc::new(Snapshots::new(Arc::clone(&catalog), Arc::clone(&feed), Arc::clone(&metrics))),
        status: status.clone(),
        mirror_progress: Arc::clone(&mirror_progress),
        refused_words: Arc::clone(&refused_words),
        names: Arc::clone(&names),
        merges: Arc::new(Semaphore::new(1)),
    };
    (handle, Unrecovered { queue, catalog, feed, status, mirror_progress, refused_words, names, metrics, options })
}

/// What the records of a store amount to.
#[derive(Debug, Default)]
pub(super) struct Replayed {
    /// In the order of their first record. With a million services, cache misses dominate the
    /// time of a start: the index map publishes services in the order of their memory, and growing it does
    /// not hash them again.
    services: IndexMap<ServiceKey, Service, foldhash::fast::RandomState>,
    tombstones: HashMap<ServiceKey, Tombstones, foldhash::fast::RandomState>,
    /// Not behind any stamp.
    clock: HybridClock,
}

impl Unrecovered {
    /// Reads `data_dir` and publishes its services. The registry accepts submissions afterwards; with
    /// Kubernetes, after [`Writer::await_restore`]. Blocks.
    ///
    /// # Errors
    /// When the store cannot be read; the registry stays not ready.
    pub fn recover(
        self,
        data_dir: DataDir,
        options: &store::StoreOptions,
        publisher: Publisher,
        progress: &mut dyn FnMut(RecoveryProgress),
    ) -> Result<Writer, StoreError> {
        let Self {
            queue,
            catalog,
            feed,
            status,
            mirror_progress,
            refused_words,
            names,
            metrics,
            options: RegistryOptions { max_instances, quotas, deny_addresses, kubernetes },
        } = self;
        let mut stored = Replayed::default();
        let mut take = |record| stored.replay(record);
        let (mut journal, recovery) = data_dir.recover(options, Arc::clone(&metrics), &mut take, progress)?;
        for repair in &recovery.repairs {
            warn!("{repair}");
        }
        // The clock first: tombstones expire by it, and the wall clock may be behind what is stored.
        let clock = stored.settled_clock();
        let Replayed { services, mut tombstones, clock: _ } = stored;
        if !recovery.tombstones {
            // Never used with Kubernetes: nobody can bring back what was removed.
            tombstones.clear();
        }
        let wall = UnixMillis::now();
        let now = clock.now(wall.0.saturating_mul(1_000));
        tombstones.retain(|_, tombstones| {
            tombstones.expire(TombstoneLifetime::DEFAULT.expired_before(now));
            !tombstones.is_empty()
        });
        // The generation never decreases for one data directory. The clock puts it ahead of the generations
        // of a data directory that was lost.
        let generation = recovery.generation.saturating_add(1).max(unix_seconds());
        // The generation is stored before it is published. Otherwise the next start, with a clock that was
        // set back, would publish a lower one, and secondaries and cursors would take old data for new.
        // After a failure the journal is unusable, which the committer reports.
        //
        // The process that wrote under the directory's term has ended, or this directory is a copy of its. What is stored from here on,
        // until the next take-over, was not published under that term and must not make the directory look newer.
        let mut term = recovery.term;
        let ended = kubernetes.is_some() && term.term > 0 && term.published.is_none();
        if ended {
            term.published = Some(recovery.changed);
        }
        let noted = ended.then_some(Record::Term(term));
        let _ = journal.append(generation, noted.as_slice());

        let mut stamper = Stamper::new(clock, if kubernetes.is_some() { term.term } else { 0 });
        if let Some(behind) = stamper.new_lead(wall).filter(|_| kubernetes.is_some()) {
            error!(
                ?behind,
                "the clock of this machine is behind the last change that is stored: one of the two is wrong. Registrations are not \
                 accepted before the API server answers, or the clock is set"
            );
        }
        let mut applier = Applier::new(
            publisher,
            Arc::clone(&catalog),
            feed,
            Arc::clone(&mirror_progress),
            names,
            Arc::clone(&metrics),
        );
        applier.load(generation, services, tombstones);
        let local = kubernetes.is_some().then_some(LocalState {
            term,
            generation: term.published.unwrap_or(recovery.changed),
            outbox: recovery.outbox.into(),
            stored: None,
        });
        if let Some(local) = &local {
            // DNS answers from here on. Registrations wait for the comparison with Kubernetes.
            status.restoring();
            metrics.registry.set_outbox(local.outbox.len());
            let unmirrored = local.unmirrored(&catalog);
            mirror_progress.mark_dirty(unmirrored.map(|service| (service, generation, UnixMillis::now())), []);
        } else {
            status.ready();
        }
        let mut decider = Decider::new(Arc::clone(&catalog), max_instances, kubernetes, stamper, recovery.tombstones);
        decider.set_quotas(quotas);
        decider.facts().addresses.set_denied(deny_addresses);
        let committer = Committer::new(journal, status.clone(), generation);
        info!(services = catalog.len(), instances = catalog.instances(), generation, "recovered");
        Ok(Writer {
            queue,
            decider,
            committer,
            applier,
            mirror_records: MirrorRecords::new(local),
            catalog,
            status,
            mirror_progress,
            refused_words,
            metrics,
            held_over: None,
            limit: BatchLimit::new(),
            sweep_at: recovery.tombstones.then(Instant::now),
            clock: Instant::now,
        })
    }
}

impl Replayed {
    pub(super) fn into_services(self) -> Vec<(ServiceKey, Service)> {
        self.services.into_iter().collect()
    }

    /// Not behind any stamp of what is left. A stamp from the future that was corrected since does not count.
    fn settled_clock(&self) -> HybridClock {
        if self.clock.last() <= HybridClock::highest(UnixMillis::now().0.saturating_mul(1_000)) {
            return self.clock;
        }
        let mut clock = HybridClock::default();
        for (_, service) in &self.services {
            service.instances.iter().for_each(|instance| clock.observe(instance.stamp().clock));
        }
        for tombstones in self.tombstones.values() {
            clock.observe(tombstones.refuse_before());
            tombstones.iter().for_each(|removal| clock.observe(removal.stamp.clock));
        }
        clock
    }

    /// Takes the next record of the store.
    pub(super) fn replay(&mut self, record: Record) {
        match record {
            Record::Put { service, instance } => {
                self.clock.observe(instance.stamp().clock);
                self.services.entry(service).or_default().instances.put(instance);
            }
            Record::Remove { service, id, stamp } => {
                self.clock.observe(stamp.clock);
                if let Some(stored) = self.services.get_mut(&service) {
                    stored.instances.remove(&InstanceKey::from(&id));
                    if stored.instances.is_empty() {
                        // O(1). The order matters for speed only.
                        self.services.swap_remove(&service);
                    }
                }
                if stamp != Stamp::default() {
                    let tombstones = self.tombstones.entry(service).or_default();
                    if tombstones.get(&InstanceKey::from(&id)) > Some(stamp) {
                        // Corrected: it was from the future.
                        tombstones.restamp(id, stamp);
                    } else {
                        tombstones.insert(id, stamp);
                    }
                    // As when it was written: the record with the result follows.
                    tombstones.shrink();
                }
            }
            Record::RefuseBefore { service, clock } => {
                self.clock.observe(clock);
                let tombstones = self.tombstones.entry(service).or_default();
                // The last record counts: a lower one corrects one from the future.
                tombstones.lower_refuse_before(clock);
                tombstones.raise_refuse_before(clock);
            }
            // The store does not pass these on: it returns them as a whole in `Recovery`.
            Record::Mirrored { .. } | Record::Term(_) => {}
        }
    }
}

fn unix_seconds() -> u64 {
    UnixMillis::now().0 / 1_000
}
