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
    collections::HashMap,
    sync::Arc,
    time::{Instant, SystemTime},
};

use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{
    Ack, Batch, Catalog, Feed, Outcome, QUEUE, RegistryHandle, Status, Submission, Unavailable,
    state::{Pending, State},
};
use crate::{
    metrics::{CommandOutcome, Metrics},
    model::{Change, InstanceKey, Service, ServiceKey, UnixMillis},
    store::{DataDir, Journal, Options, Progress, Record, StoreError},
    zone::{Publisher, ServiceChange},
};

/// Commands after which a batch takes no more submissions, so that the first of them does not
/// wait for all that a flood of clients sends meanwhile.
const BATCH_COMMANDS: usize = 65_536;

/// Publications of recovered services that are made at once.
const RECOVERY_CHUNK: usize = 1024;

/// A registry that has not read its store yet. It refuses every submission as not ready.
#[derive(Debug)]
pub struct Unrecovered {
    queue: mpsc::Receiver<Submission>,
    catalog: Arc<Catalog>,
    feed: Arc<Feed>,
    status: Status,
    metrics: Arc<Metrics>,
    max_instances: usize,
}

/// The writer: consumes submissions until it is told to stop.
#[derive(Debug)]
pub struct Writer {
    queue: mpsc::Receiver<Submission>,
    state: State,
    journal: Journal,
    publisher: Publisher,
    catalog: Arc<Catalog>,
    feed: Arc<Feed>,
    status: Status,
    metrics: Arc<Metrics>,
    generation: u64,
}

/// Submissions whose commands were decided and that wait for the batch.
type Decided = Vec<(oneshot::Sender<Result<Ack, Unavailable>>, Vec<Outcome>)>;

/// A registry for at most `max_instances` instances: the handle for everyone, and what becomes
/// its writer.
#[must_use]
pub fn new(max_instances: usize, metrics: Arc<Metrics>) -> (RegistryHandle, Unrecovered) {
    let (sender, queue) = mpsc::channel(QUEUE);
    let catalog = Arc::new(Catalog::default());
    let feed = Arc::new(Feed::new());
    let status = Status::new();
    let handle = RegistryHandle {
        queue: sender,
        catalog: Arc::clone(&catalog),
        feed: Arc::clone(&feed),
        status: status.clone(),
    };
    (handle, Unrecovered { queue, catalog, feed, status, metrics, max_instances })
}

impl Unrecovered {
    /// Reads what `data_dir` holds, publishes it, and only then accepts submissions. Blocks.
    ///
    /// # Errors
    /// When the store cannot be read; the registry stays not ready.
    pub fn recover(
        self,
        data_dir: DataDir,
        options: &Options,
        mut publisher: Publisher,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Writer, StoreError> {
        let Self { queue, catalog, feed, status, metrics, max_instances } = self;
        let mut services: HashMap<ServiceKey, Service, foldhash::fast::RandomState> = HashMap::default();
        let mut replay = |record| match record {
            Record::Put { service, instance } => {
                services.entry(service).or_default().instances.put(instance);
            }
            Record::Remove { service, id } => {
                if let Some(held) = services.get_mut(&service) {
                    held.instances.remove(&InstanceKey::from(&id));
                    if held.instances.is_empty() {
                        services.remove(&service);
                    }
                }
            }
            // The store keeps these to itself.
            Record::Mirrored { .. } | Record::Term { .. } => {}
        };
        let (journal, recovery) = data_dir.recover(options, Arc::clone(&metrics), &mut replay, progress)?;
        for repair in &recovery.repairs {
            warn!("{repair}");
        }
        // Never back for one data directory, and ahead of what a lost directory had handed out.
        let generation = recovery.generation.saturating_add(1).max(unix_seconds());

        let services: Vec<(ServiceKey, Service, Vec<Change>)> = services
            .into_iter()
            .map(|(key, service)| {
                let new = |instance: &Arc<_>| Change { before: None, after: Some(Arc::clone(instance)) };
                let changes = service.instances.iter().map(new).collect();
                (key, Service { generation, ..service }, changes)
            })
            .collect();
        for chunk in services.chunks(RECOVERY_CHUNK) {
            let changes: Vec<ServiceChange<'_>> =
                chunk.iter().map(|(service, after, changes)| ServiceChange { service, changes, after }).collect();
            publisher.publish(generation, &changes);
        }
        publisher.publish(generation, &[]);
        for (key, service, _) in services {
            catalog.set(key, service);
        }
        catalog.set_generation(generation);
        feed.begin(generation);
        status.ready();
        if let Err(why) = journal.usable() {
            storage_failed(&status, &why);
        }
        info!(services = catalog.len(), instances = catalog.instances(), generation, "recovered");

        let state = State::new(Arc::clone(&catalog), max_instances);
        metrics.registry.set_registered(catalog.len(), catalog.instances(), generation);
        Ok(Writer { queue, state, journal, publisher, catalog, feed, status, metrics, generation })
    }
}

impl Writer {
    /// The generation that is published.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Works until `stop`, then answers what still waits. Blocks: run it on a thread of its own.
    pub fn run(mut self, runtime: &Handle, stop: &CancellationToken) {
        loop {
            let first = runtime.block_on(async {
                tokio::select! {
                    biased;
                    first = self.queue.recv() => first,
                    () = stop.cancelled() => {
                        self.queue.close();
                        self.queue.recv().await
                    }
                }
            });
            let Some(first) = first else { return };
            self.batch(first);
        }
    }

    fn batch(&mut self, first: Submission) {
        if self.status.accepting() == Err(Unavailable::StorageFailed) {
            // Not even what changes nothing: the catalog may be behind what the disk holds.
            let _ = first.reply.send(Err(Unavailable::StorageFailed));
            return;
        }
        let mut decided = Decided::new();
        let mut commands = 0;
        let mut next = Some(first);
        while let Some(Submission { commands: submitted, received, reply }) = next {
            commands += submitted.len();
            // 1. check
            let outcomes = submitted.into_iter().map(|command| self.state.decide(command, received)).collect();
            decided.push((reply, outcomes));
            next = if commands < BATCH_COMMANDS { self.queue.try_recv().ok() } else { None };
        }
        let pending = self.state.take();
        if pending.is_empty() {
            self.observe(&decided, commands, 0);
            return self.answer(decided);
        }
        // 2. append: durable. After a failure nothing is acknowledged any more: what reached the
        // disk is unknown, and a later sync that succeeds proves nothing.
        if let Err(why) = self.journal.append(self.generation + 1, &pending.records) {
            storage_failed(&self.status, &why);
            for (reply, _) in decided {
                let _ = reply.send(Err(Unavailable::StorageFailed));
            }
            return;
        }
        self.generation += 1;
        let (durable, since_durable) = (UnixMillis::now(), Instant::now());
        // 3. publish: visible.
        let events = self.publish(pending);
        let visible = UnixMillis::now();
        self.metrics.registry.observe_publish(since_durable.elapsed());
        // What a registrant counts after its answer is counted before it.
        self.observe(&decided, commands, events.len());
        // 4. answer: acknowledged.
        self.answer(decided);
        let acknowledged = UnixMillis::now();
        self.feed.push(Batch { generation: self.generation, events, durable, visible, acknowledged });
    }

    /// Makes the batch visible, to DNS first.
    fn publish(&mut self, pending: Pending) -> Vec<super::Event> {
        let Pending { mut services, events, .. } = pending;
        for pending in services.values_mut() {
            pending.after.generation = self.generation;
        }
        let changes: Vec<ServiceChange<'_>> = services
            .iter()
            .map(|(service, pending)| ServiceChange { service, changes: &pending.changes, after: &pending.after })
            .collect();
        self.publisher.publish(self.generation, &changes);
        for (key, pending) in services {
            self.catalog.set(key, pending.after);
        }
        self.catalog.set_generation(self.generation);
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
    }
}

fn storage_failed(status: &Status, why: &StoreError) {
    let error = why as &dyn std::error::Error;
    error!(error, "the journal cannot be written: registrations are refused, DNS goes on; mend the disk, then restart");
    status.storage_failed(&why.to_string());
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
