//! The one writer: all queued submissions become one batch, and every batch takes four steps in this
//! order.
//!
//! 1. decide: each command against the state machine
//! 2. commit: the journal, one sync for the batch: **durable**
//! 3. apply: zone and catalog: **visible**
//! 4. answer: every submission's oneshot: **acknowledged**
//!
//! So an acknowledged registration survives `kill -9` and already resolves. The change feed comes last
//! and carries the times of all four steps. The writer runs on a thread of its own, because a sync
//! blocks. The writer never waits for a client, so a disconnect does not interrupt a batch.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::mpsc};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    Ack, AckSender, Catalog, ClusterFact, MirrorProgress, OutboxWord, Outcome, Phase, RefusedWords, Status, Submission,
    TakeOverTurn, TermRequest, Unavailable, WriterMessage,
    apply::Applier,
    batch_limit::{BatchLimit, MAX_BATCH_TIME},
    commit::Committer,
    comparison,
    decide::{DecidedBatch, Decider},
    follow::journal_outranked,
    mirror_records::MirrorRecords,
    restore::LocalState,
};
use crate::{
    metrics::{CommandOutcome, Metrics},
    model::UnixMillis,
    store::{DirectoryTerm, Record},
};

/// Total [`ClusterFact::cost`] of the facts that one batch takes once it has decided a submission:
/// about a millisecond.
const MAX_FACTS_COST: usize = 256;

/// Records of a comparison in one batch while registrations are accepted. Registrations wait about
/// ten milliseconds for such a batch.
pub(super) const MAX_DIFFERENCES: usize = 1024;

/// The same while registrations are not accepted yet, so that none can wait.
pub(super) const MAX_DIFFERENCES_AT_START: usize = 65_536;

/// How long a start waits for the API server before the writer accepts registrations on the stored
/// state, which another data directory may have changed since.
const RESTORE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often tombstones of a few services are swept, while any have expired; otherwise a tenth as often.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// The writer: takes submissions until the stop token is cancelled.
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
    pub(super) refused_words: Arc<RefusedWords>,
    pub(super) metrics: Arc<Metrics>,
    /// A message that was taken from the queue and is the first of the next batch.
    pub(super) held_over: Option<WriterMessage>,
    pub(super) limit: BatchLimit,
    /// When expired tombstones are looked for; `None` where removals are not remembered.
    pub(super) sweep_at: Option<Instant>,
    /// Measures batches; tests replace it.
    pub(super) clock: fn() -> Instant,
}

/// Submissions of one batch whose commands were decided, until they are answered.
#[derive(Debug, Default)]
pub(super) struct PendingAcks {
    replies: Vec<(AckSender, Vec<Outcome>)>,
    /// Commands of all submissions.
    commands: usize,
}

impl PendingAcks {
    fn refuse(self, err: Unavailable) {
        for (reply, _) in self.replies {
            let _ = reply.send(Err(err.clone()));
        }
    }
}

/// Why the writer woke without a message.
enum Woken {
    Stopped,
    TimedOut,
}

/// The next message; `None` when the queue is closed and empty. Cancelling loses nothing.
async fn receive(
    held_over: &mut Option<WriterMessage>,
    queue: &mut mpsc::Receiver<WriterMessage>,
) -> Option<WriterMessage> {
    match held_over.take() {
        Some(message) => Some(message),
        None => queue.recv().await,
    }
}

impl Writer {
    pub(super) fn is_standby(&self) -> bool {
        matches!(self.status.phase(), Phase::Standby(_))
    }

    /// The generation that DNS serves.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.catalog.generation()
    }

    /// Waits with Kubernetes for the comparison with its EndpointSlices, then accepts submissions. If
    /// the store was compared before, and nobody is known to have written since, the wait is limited to 5 s: the
    /// stored state is good enough while the API server is down. Follows meanwhile what another process writes. Returns false if `stop` was cancelled meanwhile. Blocks.
    pub fn await_restore(&mut self, runtime: &Handle, stop: &CancellationToken) -> bool {
        let mut deadline = Instant::now() + RESTORE_TIMEOUT;
        while !self.mirror_records.comparison_is_over() {
            // A comparison that has begun needs no API server any more, so it has no timeout.
            let may_time_out = self.mirror_records.awaited().is_some();
            let next = runtime.block_on(async {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => Err(Woken::Stopped),
                    message = receive(&mut self.held_over, &mut self.queue) => message.ok_or(Woken::Stopped),
                    () = tokio::time::sleep_until(deadline.into()), if may_time_out => Err(Woken::TimedOut),
                }
            });
            match next {
                Ok(message) => self.batch(message, runtime),
                Err(Woken::Stopped) => return false,
                // The clock may be set meanwhile.
                Err(Woken::TimedOut) if !self.may_begin_alone() => deadline = Instant::now() + RESTORE_TIMEOUT,
                Err(Woken::TimedOut) => {
                    warn!(
                        "this process has neither the Lease nor another writer to follow; going on with what is stored"
                    );
                    break;
                }
            }
        }
        self.status.ready();
        true
    }

    /// Whether the stored state is good enough while the API server does not answer.
    pub(super) fn may_begin_alone(&mut self) -> bool {
        // Another process that has the Lease may have changed anything since.
        let is_newest = |local: &LocalState| local.term.term != 0 && !local.term.followed;
        let is_newest = self.mirror_records.awaited().is_some_and(is_newest) && !self.is_standby();
        // Only the API server tells whether the clock is wrong, or what is stored.
        is_newest && !self.status.is_clock_wrong() && self.decider.stamper().lead(UnixMillis::now()).is_none()
    }

    /// Takes submissions until `stop`, then answers those that are still queued. Returns what is
    /// [unconfirmed](Self::unconfirmed) then. Blocks: needs a thread of its own.
    pub fn run(mut self, runtime: &Handle, stop: &CancellationToken) -> Vec<OutboxWord> {
        loop {
            let first = runtime.block_on(async {
                let save_at = self.mirror_records.save_at();
                let sweep = async { tokio::time::sleep_until(self.sweep_at.unwrap_or_else(Instant::now).into()).await };
                let save = async { tokio::time::sleep_until(save_at.unwrap_or_else(Instant::now).into()).await };
                tokio::select! {
                    biased;
                    // Before `stop`, whose branch does not look at `held_over`.
                    first = receive(&mut self.held_over, &mut self.queue) => Ok(first),
                    () = stop.cancelled() => {
                        self.queue.close();
                        Ok(self.queue.recv().await)
                    }
                    () = save, if save_at.is_some() => Err(Woken::TimedOut),
                    () = sweep, if self.sweep_at.is_some() => Err(Woken::TimedOut),
                }
            });
            match first {
                Ok(Some(first)) => self.batch(first, runtime),
                Ok(None) => break,
                Err(_) => {
                    let now = Instant::now();
                    if self.mirror_records.is_due(now) {
                        self.save_confirmations();
                    }
                    if self.sweep_at.is_some_and(|at| at <= now) {
                        self.sweep();
                    }
                }
            }
        }
        self.save_confirmations();
        self.unconfirmed()
    }

    /// Takes messages, from `first` on, until a limit is reached or the queue is empty, and carries them
    /// out as one batch.
    pub(super) fn batch(&mut self, first: WriterMessage, runtime: &Handle) {
        let mut pending = PendingAcks::default();
        let mut facts_cost = 0;
        let mut then = None;
        let begun = (self.clock)();
        self.decider.stamper().set_generation(self.committer.generation() + 1);
        let mut next = Some(first);
        // 1. decide
        while let Some(message) = next {
            match message {
                WriterMessage::Submit(submission) => self.decide(submission, &mut pending),
                WriterMessage::Learn(facts) => {
                    let cost: usize = facts.iter().map(ClusterFact::cost).sum();
                    if !pending.replies.is_empty() && facts_cost + cost > MAX_FACTS_COST {
                        // Submissions after the facts must be checked against them, so no message may
                        // overtake the facts: they begin the next batch.
                        self.held_over = Some(WriterMessage::Learn(facts));
                        break;
                    }
                    facts_cost += cost;
                    facts.into_iter().for_each(|fact| self.learn(fact));
                }
                WriterMessage::Resolved(statuses) => self.resolved(statuses),
                WriterMessage::Mirrored(services) => self.mirror_records.confirmed(services, Instant::now()),
                // Earlier decisions must be applied first: the comparison reads the catalog, and the
                // journaled records filter its result.
                WriterMessage::DirectoryTerm(_)
                | WriterMessage::TakeOver(_)
                | WriterMessage::Restore(..)
                | WriterMessage::Differences(_)
                | WriterMessage::Compared(_)
                | WriterMessage::Follow(_)
                | WriterMessage::StandDown(_)
                | WriterMessage::Outranked(_)
                | WriterMessage::Term(_)
                | WriterMessage::Outbox(_)
                | WriterMessage::HandedOver(_)
                | WriterMessage::Merge(_) => {
                    then = Some(message);
                    break;
                }
            }
            // Most of a command's cost comes later, in steps 2 and 3, so the clock cannot limit commands:
            // `BatchLimit` does. The clock limits facts and confirmations.
            let is_full = self.limit.is_reached(pending.commands)
                || (self.clock)().saturating_duration_since(begun) >= MAX_BATCH_TIME;
            next = if is_full { None } else { self.queue.try_recv().ok() };
        }
        let commands = pending.commands;
        let commit = self.finish(pending);
        self.limit.observe(commands, (self.clock)().saturating_duration_since(begun), commit);
        match then {
            Some(WriterMessage::DirectoryTerm(reply)) => {
                // An error means that the caller has ended.
                let _ = reply.send(self.directory_term());
            }
            Some(WriterMessage::TakeOver(reply)) => self.begin_take_over(reply),
            Some(WriterMessage::Restore(turn, request)) => self.compare(turn, request, runtime),
            Some(WriterMessage::Differences(part)) => self.apply_differences(part),
            Some(WriterMessage::Compared(end)) => self.end_comparison(end),
            Some(WriterMessage::Follow(request)) => self.follow(request),
            Some(WriterMessage::StandDown(request)) => self.stand_down(request),
            Some(WriterMessage::Outranked(request)) => self.outranked(request),
            Some(WriterMessage::Term(request)) => self.raise_term(request),
            Some(WriterMessage::Outbox(request)) => self.outbox(request),
            Some(WriterMessage::HandedOver(words)) => self.handed_over(words),
            Some(WriterMessage::Merge(request)) => self.merge(request),
            _ => {}
        }
        self.metrics.registry.set_outbox(self.mirror_records.outbox_len());
        if self.mirror_records.is_due(Instant::now()) {
            self.save_confirmations();
        }
    }

    fn decide(&mut self, submission: Submission, pending: &mut PendingAcks) {
        let Submission { commands, received, reply } = submission;
        if let Phase::Standby(holder) = self.status.phase() {
            // Submitted before this process stood down.
            let _ = reply.send(Err(Unavailable::Standby(holder)));
            return;
        }
        if self.follows() {
            // Submitted before this process began to drain.
            let _ = reply.send(Err(self.status.refusal()));
            return;
        }
        if let Err(err) = self.committer.usable() {
            // Even a command that changes nothing is refused: the catalog may be behind the disk.
            let _ = reply.send(Err(err));
            return;
        }
        pending.commands += commands.len();
        let outcomes = commands.into_iter().map(|command| self.decider.decide(command, received)).collect();
        pending.replies.push((reply, outcomes));
    }

    /// Takes steps 2 to 4 for the decisions since the last batch. Returns the time of the commit.
    pub(super) fn finish(&mut self, pending: PendingAcks) -> Duration {
        let batch = self.decider.take();
        if batch.is_empty() {
            if pending.replies.is_empty() {
                return Duration::ZERO;
            }
            if let Err(err) = self.committer.check() {
                pending.refuse(err);
                return Duration::ZERO;
            }
            self.observe(&pending, 0);
            self.answer(pending);
            return Duration::ZERO;
        }
        let DecidedBatch { mut records, changes } = batch;
        self.mirror_records.note(&records);
        records.append(&mut self.mirror_records.take_unsaved());
        // 2. commit: durable.
        let begun = (self.clock)();
        let committed = self.committer.commit(&records, !changes.is_empty());
        let commit = (self.clock)().saturating_duration_since(begun);
        if let Err(err) = committed {
            pending.refuse(err);
            return commit;
        }
        let generation = self.committer.generation();
        // 3. apply: visible.
        let applied = self.applier.apply(generation, changes, UnixMillis::now());
        // Before the answer, so that a client which reads the metrics after its answer finds its change counted.
        self.observe(&pending, applied.changes());
        // 4. answer: acknowledged.
        self.answer(pending);
        self.applier.announce(applied, UnixMillis::now());
        commit
    }

    fn learn(&mut self, fact: ClusterFact) {
        match fact {
            ClusterFact::Namespace { name, exists } => {
                if self.decider.facts().set_namespace(name.clone(), exists) {
                    self.applier.set_namespace(&name, exists);
                }
            }
            ClusterFact::Quota { namespace, quota } => self.decider.facts().set_quota(namespace, quota),
            ClusterFact::Addresses { namespace, addresses } => {
                self.decider.facts().addresses.set_annotated(namespace, addresses);
            }
            ClusterFact::ServiceRanges(ranges) => self.set_service_ranges(ranges),
            ClusterFact::NamespacesComplete => self.decider.facts().namespaces_are_complete(),
            ClusterFact::Service { service, foreign } => self.decider.facts().set_foreign(service, foreign),
            ClusterFact::Endpoints { service, instances } => self.applier.set_foreign_endpoints(service, instances),
        }
    }

    /// Begins the comparison with the EndpointSlices. A second request is dropped, and so is one of a take-over that was
    /// given up: its caller gets an error.
    fn compare(&mut self, TakeOverTurn(turn): TakeOverTurn, request: comparison::ComparisonRequest, runtime: &Handle) {
        if !self.mirror_records.is_current(turn) {
            return;
        }
        let Some((number, mut local)) = self.mirror_records.begin_comparison() else { return };
        if (local.term.term, local.generation) < (request.held.term, request.held.generation) {
            // The result is journaled in parts: a start after half of them must not take the journal for the newest state.
            journal_outranked(&mut local.term, None, &mut self.committer);
        }
        // Readers have seen generations of the process that was followed.
        self.committer.advance_to(self.catalog.generation().max(request.held.generation));
        self.observe_slices(&request.held);
        let max_records = if self.status.accepting().is_ok() { MAX_DIFFERENCES } else { MAX_DIFFERENCES_AT_START };
        comparison::start(request, (number, local), Arc::clone(&self.catalog), max_records, runtime);
    }

    /// Applies a part of the comparison's result as a batch of its own.
    fn apply_differences(&mut self, part: comparison::Differences) {
        let comparison::Differences { number, mut records, mirrored, applied: reply } = part;
        self.mirror_records.retain_current(number, &mut records);
        self.decider.replay(records, UnixMillis::now());
        let DecidedBatch { records, changes } = self.decider.take();
        if !records.is_empty() {
            let committed = if mirrored {
                self.committer.commit_mirrored(&records, !changes.is_empty())
            } else {
                self.committer.commit(&records, !changes.is_empty())
            };
            if committed.is_err() {
                // The rest is not applied and the term is not stored, so the next start compares again. Until then what is
                // registered is not known, unless another process writes and is followed; that one gets the outbox.
                let (term, outbox) = self.read_outbox(&mut |_| {}).unwrap_or_default();
                let generation = term.published.unwrap_or_else(|| self.committer.generation());
                let local = LocalState { term, generation, outbox: outbox.into(), stored: None };
                self.mirror_records.await_comparison(local);
                return;
            }
            let applied = self.applier.apply(self.committer.generation(), changes, UnixMillis::now());
            self.observe(&PendingAcks::default(), applied.changes());
            self.applier.announce(applied, UnixMillis::now());
        }
        // An error means that the comparison was stopped together with its runtime.
        let _ = reply.send(());
    }

    /// Stores the term and answers the request, after the whole result is applied.
    fn end_comparison(&mut self, end: comparison::End) {
        let comparison::End { number, new_term, term, refused, reply } = end;
        self.metrics.registry.count_refused_words(refused.len());
        self.refused_words.add(refused);
        if !self.mirror_records.end_comparison(number) {
            return;
        }
        self.decider.stamper().set_term(term);
        if let Some(term) = new_term
            && self.committer.commit(&[Record::Term(DirectoryTerm::new(term))], false).is_err()
        {
            return;
        }
        if self.restamp_future().is_err() {
            return;
        }
        if new_term.is_some() {
            // The serial may have been that of another process.
            self.applier.set_serial(self.committer.generation());
        }
        self.status.ready();
        // An error means that the watch which sent the request has ended.
        let _ = reply.send(term);
    }

    fn raise_term(&mut self, TermRequest { term, journaled }: TermRequest) {
        // A process that stood down meanwhile gets its term by a comparison.
        if !self.mirror_records.comparison_is_over()
            || self.committer.commit(&[Record::Term(DirectoryTerm::new(term))], false).is_err()
        {
            return;
        }
        self.decider.stamper().set_term(term);
        // An error means that another turn has come.
        let _ = journaled.send(());
    }

    /// Forgets expired tombstones of a few services, in a batch of its own.
    fn sweep(&mut self) {
        self.check_clock();
        // The generations of a catalog that follows are not the journal's.
        let changed = !self.is_standby() && !self.follows() && self.committer.usable().is_ok() && {
            self.decider.stamper().set_generation(self.committer.generation() + 1);
            self.decider.sweep(UnixMillis::now());
            self.decider.has_changes()
        };
        self.finish(PendingAcks::default());
        self.sweep_at = Some(Instant::now() + SWEEP_INTERVAL * if changed { 1 } else { 10 });
    }

    /// Journals the mirror's confirmations without a batch.
    pub(super) fn save_confirmations(&mut self) {
        let records = self.mirror_records.take_unsaved();
        if !records.is_empty() && self.committer.usable().is_ok() {
            // The committer logs a failure and sets the status.
            let _ = self.committer.commit(&records, false);
        }
    }

    fn answer(&self, pending: PendingAcks) {
        for (reply, outcomes) in pending.replies {
            // An error means that the caller was cancelled. The change stays.
            let _ = reply.send(Ok(Ack { generation: self.generation(), outcomes }));
        }
    }

    fn observe(&self, pending: &PendingAcks, changed: usize) {
        let registry = &self.metrics.registry;
        registry.observe_batch(pending.replies.len(), pending.commands, changed, self.generation());
        registry.set_registered(self.catalog.len(), self.catalog.instances(), self.generation());
        registry.set_queue_length(self.queue.len());
        for outcome in pending.replies.iter().flat_map(|(_, outcomes)| outcomes) {
            registry.count(counted(outcome), 1);
            if let Outcome::OverQuota(exceeded) = outcome {
                self.metrics.identity.over_quota.at(exceeded.kind()).inc();
            }
        }
    }
}

fn counted(outcome: &Outcome) -> CommandOutcome {
    match outcome {
        Outcome::Created => CommandOutcome::Created,
        Outcome::Updated => CommandOutcome::Updated,
        Outcome::Unchanged => CommandOutcome::Unchanged,
        Outcome::Removed(_) => CommandOutcome::Removed,
        Outcome::NotFound { .. } => CommandOutcome::NotFound,
        Outcome::Full { .. } => CommandOutcome::Full,
        Outcome::AddressRefused(_) => CommandOutcome::AddressRefused,
        Outcome::OverQuota(_) => CommandOutcome::OverQuota,
        Outcome::Owned(_) => CommandOutcome::Owned,
        Outcome::Refused(_) => CommandOutcome::Refused,
    }
}
