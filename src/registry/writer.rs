//! The one writer: everything that waits becomes one batch, and every batch takes four steps in
//! this order.
//!
//! 1. decide: each command against the state machine
//! 2. commit: the journal, one sync for the batch: **durable**
//! 3. apply: zone and catalog: **visible**
//! 4. answer: every submission's oneshot: **acknowledged**
//!
//! So an acknowledged registration survives `kill -9` and already resolves. The change feed comes
//! last and carries the times of all four. The writer runs on a thread of its own, because a sync
//! blocks; a client that goes away meanwhile changes nothing, because nobody waits for it here.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::mpsc};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    Ack, Catalog, ClusterFact, KubernetesRefusal, KubernetesState, MirrorProgress, Outcome, Reply, Status, Submission,
    WriterMessage,
    apply::Applier,
    commit::Committer,
    decide::{DecidedBatch, Decider},
    mirror_records::MirrorRecords,
    restore::{self, Comparison},
};
use crate::{
    metrics::{CommandOutcome, Metrics},
    model::UnixMillis,
};

/// Commands after which a batch takes no more submissions, so that the first of them does not
/// wait for all that a flood of clients sends meanwhile.
const MAX_BATCH_COMMANDS: usize = 65_536;

/// How long a start waits for the API server when the store alone could go on.
const RESTORE_TIMEOUT: Duration = Duration::from_secs(5);

/// The writer: consumes submissions until it is told to stop.
#[derive(Debug)]
pub struct Writer {
    pub(super) queue: mpsc::Receiver<WriterMessage>,
    pub(super) decider: Decider,
    pub(super) committer: Committer,
    pub(super) applier: Applier,
    pub(super) mirror_records: MirrorRecords,
    pub(super) catalog: Arc<Catalog>,
    pub(super) status: Status,
    pub(super) mirror_progress: Arc<MirrorProgress>,
    pub(super) metrics: Arc<Metrics>,
}

/// Submissions of one batch whose commands were decided, until they are answered.
#[derive(Debug, Default)]
struct PendingAcks {
    replies: Vec<(Reply, Vec<Outcome>)>,
    /// Commands of all of them.
    commands: usize,
}

/// Why the writer woke without a message.
enum Woken {
    Stopped,
    TimedOut,
}

impl Writer {
    /// The generation that is served.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.catalog.generation()
    }

    /// Waits for what Kubernetes holds, where there is one, and only then accepts submissions. A
    /// store that was compared with Kubernetes before waits for 5 s only: its state is good enough
    /// while the API server is away. Returns false if it was stopped meanwhile. Blocks.
    pub fn await_restore(&mut self, runtime: &Handle, stop: &CancellationToken) -> bool {
        let Some(local) = self.mirror_records.local() else { return true };
        let was_compared = local.term != 0;
        let give_up = Instant::now() + RESTORE_TIMEOUT;
        while self.mirror_records.local().is_some() {
            let next = runtime.block_on(async {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => Err(Woken::Stopped),
                    message = self.queue.recv() => message.ok_or(Woken::Stopped),
                    () = tokio::time::sleep_until(give_up.into()), if was_compared => Err(Woken::TimedOut),
                }
            });
            match next {
                Ok(message) => self.batch(message),
                Err(Woken::Stopped) => return false,
                Err(Woken::TimedOut) => {
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
                let save_at = self.mirror_records.save_at();
                let save = async { tokio::time::sleep_until(save_at.unwrap_or_else(Instant::now).into()).await };
                tokio::select! {
                    biased;
                    first = self.queue.recv() => Ok(first),
                    () = stop.cancelled() => {
                        self.queue.close();
                        Ok(self.queue.recv().await)
                    }
                    () = save, if save_at.is_some() => Err(Woken::TimedOut),
                }
            });
            match first {
                Ok(Some(first)) => self.batch(first),
                Ok(None) => break,
                Err(_) => self.save_confirmations(),
            }
        }
        self.save_confirmations();
    }

    fn batch(&mut self, first: WriterMessage) {
        let mut pending = PendingAcks::default();
        let mut restore = None;
        let mut next = Some(first);
        // 1. decide
        while let Some(message) = next {
            match message {
                WriterMessage::Submit(submission) => self.decide(submission, &mut pending),
                WriterMessage::Learn(facts) => facts.into_iter().for_each(|fact| self.learn(fact)),
                WriterMessage::Mirrored(services) => self.mirror_records.confirmed(services, Instant::now()),
                WriterMessage::Restore(held, reply) => {
                    // What came before is applied first: the comparison is with the catalog.
                    restore = Some((held, reply));
                    break;
                }
            }
            next = if pending.commands < MAX_BATCH_COMMANDS { self.queue.try_recv().ok() } else { None };
        }
        self.finish(pending);
        if let Some((held, reply)) = restore
            && let Some(term) = self.restore(held)
        {
            let _ = reply.send(term);
        }
        if self.mirror_records.is_due(Instant::now()) {
            self.save_confirmations();
        }
    }

    fn decide(&mut self, submission: Submission, pending: &mut PendingAcks) {
        let Submission { commands, received, reply } = submission;
        if let Err(err) = self.committer.usable() {
            let _ = reply.send(Err(err));
            return;
        }
        pending.commands += commands.len();
        let outcomes = commands.into_iter().map(|command| self.decider.decide(command, received)).collect();
        pending.replies.push((reply, outcomes));
    }

    /// Steps 2 to 4 for everything that was decided since the last batch. Returns whether the
    /// journal took it.
    fn finish(&mut self, pending: PendingAcks) -> bool {
        let batch = self.decider.take();
        if batch.is_empty() {
            if !pending.replies.is_empty() {
                self.observe(&pending, 0);
                self.answer(pending);
            }
            return true;
        }
        let DecidedBatch { mut records, changes } = batch;
        let unmirrored = self.mirror_records.note_unmirrored(&records);
        records.append(&mut self.mirror_records.take_unsaved());
        // 2. commit: durable.
        if let Err(err) = self.committer.commit(&records, !changes.is_empty()) {
            for (reply, _) in pending.replies {
                let _ = reply.send(Err(err));
            }
            return false;
        }
        let generation = self.committer.generation();
        // 3. apply: visible.
        let applied = self.applier.apply(generation, changes, UnixMillis::now());
        self.mirror_progress.mark_dirty(unmirrored.into_iter().map(|service| (service, generation, UnixMillis::now())));
        // What a registrant counts after its answer is counted before it.
        self.observe(&pending, applied.changes());
        // 4. answer: acknowledged.
        self.answer(pending);
        self.applier.announce(applied, UnixMillis::now());
        true
    }

    fn learn(&mut self, fact: ClusterFact) {
        match fact {
            ClusterFact::Namespace { name, exists } => {
                if self.decider.facts().set_namespace(name.clone(), exists) {
                    self.applier.set_namespace(&name, exists);
                }
            }
            ClusterFact::NamespacesComplete => self.decider.facts().namespaces_are_complete(),
            ClusterFact::Service { service, foreign } => self.decider.facts().set_foreign(service, foreign),
            ClusterFact::Endpoints { service, instances } => self.applier.set_foreign_endpoints(service, instances),
        }
    }

    /// Compares what is registered with what Kubernetes holds, and applies what follows. Returns
    /// the term from now on; `None` when the journal did not take it.
    fn restore(&mut self, mut held: KubernetesState) -> Option<u64> {
        let local = self.mirror_records.take_local()?;
        self.decider.comparison_is_over();
        // Nothing of ours belongs there, whoever wrote a slice that says so.
        held.services.retain(|(service, _)| self.decider.facts().refuse(service) != Some(KubernetesRefusal::Reserved));
        let (services, instances) =
            (held.services.len(), held.services.iter().map(|(_, held)| held.len()).sum::<usize>());
        let Comparison { term, records } = restore::compare(&local, held, &self.catalog.services());
        info!(term, services, instances, changes = records.len(), "compared with Kubernetes");
        self.decider.replay(records, UnixMillis::now());
        self.finish(PendingAcks::default()).then_some(term)
    }

    /// Puts into the journal what has waited for a batch to go with.
    fn save_confirmations(&mut self) {
        let records = self.mirror_records.take_unsaved();
        if !records.is_empty() && self.committer.usable().is_ok() {
            // A failure is in the status and in the log.
            let _ = self.committer.commit(&records, false);
        }
    }

    fn answer(&self, pending: PendingAcks) {
        for (reply, outcomes) in pending.replies {
            // A client that went away does not hear the answer.
            let _ = reply.send(Ok(Ack { generation: self.generation(), outcomes }));
        }
    }

    fn observe(&self, pending: &PendingAcks, changed: usize) {
        let registry = &self.metrics.registry;
        registry.observe_batch(pending.replies.len(), pending.commands, changed, self.generation());
        registry.set_registered(self.catalog.len(), self.catalog.instances(), self.generation());
        registry.set_queue_length(self.queue.len());
        for outcome in pending.replies.iter().flat_map(|(_, outcomes)| outcomes) {
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
