//! The one writer: everything that waits becomes one batch, and every batch takes four steps in
//! this order.
//!
//! 1. check: each command against the state machine
//! 2. append: the journal, one sync for the batch: **durable**
//! 3. publish: zone and catalog: **visible**
//! 4. answer: every submission's oneshot: **acknowledged**
//!
//! So an acknowledged registration survives `kill -9` and already resolves. The change feed comes
//! last and carries the times of all four. The writer runs on a thread of its own, because a sync
//! blocks; a client that goes away meanwhile changes nothing, because nobody waits for it here.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use indexmap::IndexMap;
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{
    Ack, Batch, Catalog, ClusterFact, Feed, KubernetesRefusal, MirrorProgress, NamespacePolicy, Outcome, QUEUE,
    RegistryHandle, Restored, Status, Submission, Unavailable, Work,
    restore::{self, LocalState, Verdict},
    state::{Pending, State},
};
use crate::{
    metrics::{CommandOutcome, Metrics},
    model::{Instance, InstanceChange, InstanceKey, Service, ServiceKey, UnixMillis},
    store::{self, DataDir, Journal, Progress, Record, StoreError},
    zone::{Publisher, ServiceChange},
};

/// Commands after which a batch takes no more submissions, so that the first of them does not
/// wait for all that a flood of clients sends meanwhile.
const BATCH_COMMANDS: usize = 65_536;

/// How long a start waits for the API server when the store alone could go on.
const RESTORE_PATIENCE: Duration = Duration::from_secs(5);

/// Confirmations that wait for the next batch's sync before they get one of their own.
const UNSAVED: usize = 1024;

/// How long they wait for it.
const SAVED_WITHIN: Duration = Duration::from_secs(1);

/// What the registry is told before it begins.
#[derive(Debug, Clone)]
pub struct Options {
    /// Instances that may be registered.
    pub max_instances: usize,
    /// How registrations are checked where there is a Kubernetes; `None` where there is none.
    pub kubernetes: Option<NamespacePolicy>,
}

/// A registry that has not read its store yet. It refuses every submission as not ready.
#[derive(Debug)]
pub struct Unrecovered {
    queue: mpsc::Receiver<Work>,
    catalog: Arc<Catalog>,
    feed: Arc<Feed>,
    status: Status,
    mirror_progress: Arc<MirrorProgress>,
    metrics: Arc<Metrics>,
    options: Options,
}

/// The writer: consumes submissions until it is told to stop.
#[derive(Debug)]
pub struct Writer {
    queue: mpsc::Receiver<Work>,
    state: State,
    journal: Journal,
    publisher: Publisher,
    catalog: Arc<Catalog>,
    feed: Arc<Feed>,
    status: Status,
    mirror_progress: Arc<MirrorProgress>,
    metrics: Arc<Metrics>,
    generation: u64,
    /// What the store said, until it was compared with what Kubernetes holds.
    origin: Option<LocalState>,
    /// What the mirror has reported and the journal does not say yet. A report that is lost costs
    /// a comparison at the next start, and nothing else as long as no other directory wrote since.
    unsaved: Vec<Record>,
    /// When that has to be in the journal.
    save_at: Option<Instant>,
}

/// Submissions whose commands were decided and that wait for the batch.
type Decided = Vec<(oneshot::Sender<Result<Ack, Unavailable>>, Vec<Outcome>)>;

/// A registry: the handle for everyone, and what becomes its writer.
#[must_use]
pub fn new(options: Options, metrics: Arc<Metrics>) -> (RegistryHandle, Unrecovered) {
    let (sender, queue) = mpsc::channel(QUEUE);
    let catalog = Arc::new(Catalog::default());
    let feed = Arc::new(Feed::new());
    let status = Status::new();
    let mirror_progress = Arc::new(MirrorProgress::new(options.kubernetes.is_some()));
    let handle = RegistryHandle {
        queue: sender,
        catalog: Arc::clone(&catalog),
        feed: Arc::clone(&feed),
        status: status.clone(),
        mirror_progress: Arc::clone(&mirror_progress),
    };
    (handle, Unrecovered { queue, catalog, feed, status, mirror_progress, metrics, options })
}

impl Unrecovered {
    /// Reads what `data_dir` holds, publishes it, and only then accepts submissions; with a
    /// Kubernetes not before [`Writer::await_restore`]. Blocks.
    ///
    /// # Errors
    /// When the store cannot be read; the registry stays not ready.
    pub fn recover(
        self,
        data_dir: DataDir,
        options: &store::Options,
        mut publisher: Publisher,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Writer, StoreError> {
        let Self {
            queue,
            catalog,
            feed,
            status,
            mirror_progress,
            metrics,
            options: Options { max_instances, kubernetes },
        } = self;
        // Published in the order in which they lie in memory, and not hashed again as they grow: with
        // a million of them a start is a matter of cache misses.
        let mut services: IndexMap<ServiceKey, Service, foldhash::fast::RandomState> = IndexMap::default();
        let mut replay = |record| match record {
            Record::Put { service, instance } => {
                services.entry(service).or_default().instances.put(instance);
            }
            Record::Remove { service, id } => {
                if let Some(held) = services.get_mut(&service) {
                    held.instances.remove(&InstanceKey::from(&id));
                    if held.instances.is_empty() {
                        services.swap_remove(&service);
                    }
                }
            }
            // The store keeps these to itself, and gives their sum.
            Record::Mirrored { .. } | Record::Term { .. } => {}
        };
        let (journal, recovery) = data_dir.recover(options, Arc::clone(&metrics), &mut replay, progress)?;
        for repair in &recovery.repairs {
            warn!("{repair}");
        }
        // Never back for one data directory, and ahead of what a lost directory had handed out.
        let generation = recovery.generation.saturating_add(1).max(unix_seconds());

        catalog.reserve(services.len());
        publisher.reserve(services.len(), services.values().flat_map(|service| &service.instances));
        for (service, mut after) in services {
            after.generation = generation;
            let new = |instance: &Arc<_>| InstanceChange { before: None, after: Some(Arc::clone(instance)) };
            let changes: Vec<InstanceChange> = after.instances.iter().map(new).collect();
            let change = ServiceChange { service: &service, changes: &changes, after: &after, foreign: None };
            publisher.publish(generation, &[change]);
            catalog.set(service, after);
        }
        publisher.publish(generation, &[]);
        catalog.set_generation(generation);
        feed.begin(generation);
        let origin = kubernetes.is_some().then_some(LocalState { term: recovery.term, outbox: recovery.outbox });
        if let Some(origin) = &origin {
            status.restoring();
            let unmirrored = origin.unmirrored(&catalog);
            mirror_progress.note(unmirrored.map(|service| (service, generation, UnixMillis::now())));
        } else {
            status.ready();
        }
        if let Err(err) = journal.usable() {
            storage_failed(&status, &err);
        }
        info!(services = catalog.len(), instances = catalog.instances(), generation, "recovered");

        let state = State::new(Arc::clone(&catalog), max_instances, kubernetes);
        metrics.registry.set_registered(catalog.len(), catalog.instances(), generation);
        let unsaved = Vec::new();
        Ok(Writer {
            queue,
            state,
            journal,
            publisher,
            catalog,
            feed,
            status,
            mirror_progress,
            metrics,
            generation,
            origin,
            unsaved,
            save_at: None,
        })
    }
}

impl Writer {
    /// The generation that is published.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Waits for what Kubernetes holds, where there is one, and only then accepts submissions. A
    /// store that has been in step with Kubernetes before waits a few seconds only: its own word
    /// is good while the API server is away. Gives back whether it was not stopped meanwhile.
    /// Blocks.
    pub fn await_restore(&mut self, runtime: &Handle, stop: &CancellationToken) -> bool {
        let Some(origin) = &self.origin else { return true };
        let known = origin.term != 0;
        let give_up = Instant::now() + RESTORE_PATIENCE;
        while self.origin.is_some() {
            let next = runtime.block_on(async {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => Err(true),
                    work = self.queue.recv() => work.ok_or(true),
                    () = tokio::time::sleep_until(give_up.into()), if known => Err(false),
                }
            });
            match next {
                Ok(work) => self.batch(work),
                Err(true) => return false,
                Err(false) => {
                    warn!("Kubernetes does not answer; going on with what is stored, and its slices follow later");
                    break;
                }
            }
        }
        self.status.ready();
        true
    }

    /// Works until `stop`, then answers what still waits. Blocks: run it on a thread of its own.
    pub fn run(mut self, runtime: &Handle, stop: &CancellationToken) {
        loop {
            let first = runtime.block_on(async {
                let save_at = self.save_at;
                let save = async { tokio::time::sleep_until(save_at.unwrap_or_else(Instant::now).into()).await };
                tokio::select! {
                    biased;
                    first = self.queue.recv() => Ok(first),
                    () = stop.cancelled() => {
                        self.queue.close();
                        Ok(self.queue.recv().await)
                    }
                    () = save, if save_at.is_some() => Err(()),
                }
            });
            match first {
                Ok(Some(first)) => self.batch(first),
                Ok(None) => break,
                Err(()) => self.save(),
            }
        }
        self.save();
    }

    fn batch(&mut self, first: Work) {
        let mut decided = Decided::new();
        let mut restored = None;
        let mut commands = 0;
        let mut next = Some(first);
        // 1. check
        while let Some(work) = next {
            match work {
                // Not even what changes nothing: the catalog may be behind what the disk holds.
                Work::Commands(submission) if self.status.accepting() == Err(Unavailable::StorageFailed) => {
                    let _ = submission.reply.send(Err(Unavailable::StorageFailed));
                }
                Work::Commands(Submission { commands: submitted, received, reply }) => {
                    commands += submitted.len();
                    let outcomes = submitted.into_iter().map(|command| self.state.decide(command, received)).collect();
                    decided.push((reply, outcomes));
                }
                Work::ClusterFacts(facts) => facts.into_iter().for_each(|fact| self.learn(fact)),
                Work::Mirrored(services) => {
                    let records =
                        services.into_iter().map(|(service, generation)| Record::Mirrored { service, generation });
                    self.unsaved.extend(records);
                    self.save_at.get_or_insert_with(|| Instant::now() + SAVED_WITHIN);
                }
                Work::Restore(held, reply) => {
                    // What came before is published first: the comparison is with the catalog.
                    restored = Some((held, reply));
                    break;
                }
            }
            next = if commands < BATCH_COMMANDS { self.queue.try_recv().ok() } else { None };
        }
        self.commit(decided, commands);
        if let Some((held, reply)) = restored
            && let Some(term) = self.restore(held)
        {
            let _ = reply.send(term);
        }
        if self.unsaved.len() >= UNSAVED || self.save_at.is_some_and(|at| at <= Instant::now()) {
            self.save();
        }
    }

    /// Everything that was decided since the last batch becomes one, and `decided` is answered.
    /// Gives back whether the journal took it.
    fn commit(&mut self, decided: Decided, commands: usize) -> bool {
        let mut pending = self.state.take();
        if pending.is_empty() {
            if !decided.is_empty() {
                self.observe(&decided, commands, 0);
                self.answer(decided);
            }
            return true;
        }
        let unsettled = self.origin.as_mut().map_or_else(HashSet::new, |origin| origin.add(&pending.records));
        pending.records.append(&mut self.unsaved);
        self.save_at = None;
        // What is served tells one generation from the next.
        let generation = self.generation + u64::from(!pending.services.is_empty());
        // 2. append: durable. After a failure nothing is acknowledged any more: what reached the
        // disk is unknown, and a later sync that succeeds proves nothing.
        if let Err(err) = self.journal.append(generation, &pending.records) {
            storage_failed(&self.status, &err);
            for (reply, _) in decided {
                let _ = reply.send(Err(Unavailable::StorageFailed));
            }
            return false;
        }
        self.generation = generation;
        let (durable, since_durable) = (UnixMillis::now(), Instant::now());
        // 3. publish: visible.
        let events = self.publish(pending);
        self.mirror_progress.note(unsettled.into_iter().map(|service| (service, self.generation, UnixMillis::now())));
        let visible = UnixMillis::now();
        self.metrics.registry.observe_publish(since_durable.elapsed());
        for event in &events {
            let took = Duration::from_millis(visible.0.saturating_sub(event.received.0));
            self.metrics.registry.observe_programming(took);
        }
        // What a registrant counts after its answer is counted before it.
        self.observe(&decided, commands, events.len());
        // 4. answer: acknowledged.
        self.answer(decided);
        let acknowledged = UnixMillis::now();
        if !events.is_empty() {
            self.feed.push(Batch { generation: self.generation, events, durable, visible, acknowledged });
        }
        true
    }

    fn learn(&mut self, fact: ClusterFact) {
        match fact {
            ClusterFact::Namespace { name, exists } => {
                if self.state.facts().set_namespace(name.clone(), exists) {
                    self.publisher.set_namespace(&name, exists);
                }
            }
            ClusterFact::NamespacesComplete => self.state.facts().namespaces_are_complete(),
            ClusterFact::Service { service, foreign } => self.state.facts().set_foreign(service, foreign),
            ClusterFact::Endpoints { service, instances } => self.serve(service, instances),
        }
    }

    /// Shows in DNS what others have, beside what is registered. It is nobody's record: it takes no
    /// generation, and goes on when the journal cannot be written.
    fn serve(&mut self, service: ServiceKey, instances: Vec<Arc<Instance>>) {
        let changes = self.state.facts().set_endpoints(service.clone(), instances);
        if changes.is_empty() {
            return;
        }
        // As it is published: a batch that is being decided comes on top.
        let after = self.catalog.get(&service).unwrap_or_default();
        let foreign = self.state.facts().endpoints(&service);
        let change = ServiceChange { service: &service, changes: &changes, after: &after, foreign };
        self.publisher.publish(self.generation, &[change]);
    }

    /// Compares the store's word with what Kubernetes holds, and becomes what is newer. Gives back
    /// the term from now on; `None` when the journal did not take it.
    fn restore(&mut self, mut held: Restored) -> Option<u64> {
        let origin = self.origin.take()?;
        self.state.settle();
        // Nothing of ours belongs there, whoever wrote a slice that says so.
        held.services.retain(|(service, _)| self.state.facts().refuse(service) != Some(KubernetesRefusal::Reserved));
        let (services, instances) =
            (held.services.len(), held.services.iter().map(|(_, held)| held.len()).sum::<usize>());
        let Verdict { term, records } = restore::decide(&origin, held, &self.catalog.services());
        info!(term, services, instances, changes = records.len(), "compared with Kubernetes");
        self.state.replay(records, UnixMillis::now());
        self.commit(Decided::new(), 0).then_some(term)
    }

    /// Puts into the journal what has waited for a batch to go with.
    fn save(&mut self) {
        self.save_at = None;
        let records = std::mem::take(&mut self.unsaved);
        if records.is_empty() || self.status.accepting() == Err(Unavailable::StorageFailed) {
            return;
        }
        if let Err(err) = self.journal.append(self.generation, &records) {
            storage_failed(&self.status, &err);
        }
    }

    /// Makes the batch visible, to DNS first.
    fn publish(&mut self, pending: Pending) -> Vec<super::Event> {
        let Pending { mut services, events, .. } = pending;
        for pending in services.values_mut() {
            pending.after.generation = self.generation;
        }
        let facts = self.state.facts();
        let changes: Vec<ServiceChange<'_>> = services
            .iter()
            .map(|(service, pending)| ServiceChange {
                service,
                changes: &pending.changes,
                after: &pending.after,
                foreign: facts.endpoints(service),
            })
            .collect();
        self.publisher.publish(self.generation, &changes);
        for (key, pending) in services {
            self.catalog.set(key, pending.after);
        }
        self.catalog.set_generation(self.generation);
        // After the catalog: the mirror reads it as soon as it hears of the change.
        self.mirror_progress.note(events.iter().map(|event| (event.service.clone(), self.generation, event.received)));
        events
    }

    fn answer(&self, decided: Decided) {
        for (reply, outcomes) in decided {
            // Whoever went away has lost only the answer.
            let _ = reply.send(Ok(Ack { generation: self.generation, outcomes }));
        }
    }

    fn observe(&self, decided: &Decided, commands: usize, changed: usize) {
        let registry = &self.metrics.registry;
        registry.observe_batch(decided.len(), commands, changed, self.generation);
        registry.set_registered(self.catalog.len(), self.catalog.instances(), self.generation);
        registry.set_queue_length(self.queue.len());
        for outcome in decided.iter().flat_map(|(_, outcomes)| outcomes) {
            registry.count(counted(*outcome), 1);
        }
    }
}

fn counted(outcome: Outcome) -> CommandOutcome {
    match outcome {
        Outcome::Created => CommandOutcome::Created,
        Outcome::Updated => CommandOutcome::Updated,
        Outcome::Unchanged => CommandOutcome::Unchanged,
        Outcome::Removed(_) => CommandOutcome::Removed,
        Outcome::NotFound => CommandOutcome::NotFound,
        Outcome::Full { .. } => CommandOutcome::Full,
        Outcome::Refused(_) => CommandOutcome::Refused,
    }
}

fn storage_failed(status: &Status, err: &StoreError) {
    let error = err as &dyn std::error::Error;
    error!(error, "the journal cannot be written: registrations are refused, DNS goes on; mend the disk, then restart");
    status.storage_failed(&err.to_string());
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
