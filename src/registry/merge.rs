//! Words that another process hands over, or wrote late: each is merged by its stamp, as at a take-over, and keeps it.
//!
//! Anybody who can register can send words, so a word about something new needs what any registration needs: a place in the
//! cluster, and room. One that lacks it stays with its sender, which repeats it. A stamp from the future would be
//! the last word on its instance until then, and would pull this process's clock ahead, so such a word waits too.

use std::{sync::Arc, time::Duration};

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tracing::warn;

use super::{
    KubernetesRefusal, OutboxWord, RefusedWord, RegistryHandle, Unavailable, WordRefusal, Writer, WriterMessage,
    cluster_facts::is_reserved, decide::Decider, writer::PendingAcks,
};
use crate::{
    model::{Instance, InstanceId, InstanceKey, ServiceKey, Stamp, UnixMillis},
    replicas::{
        rules::Rules,
        takeover::{Merge, Words},
        word::{Merged, TombstoneLifetime, Word},
    },
    store::Record,
};

/// How far the stamp of a word may be ahead of the wall clock. The clocks of two processes that can hold the Lease are
/// about 2 s apart at most.
const MAX_CLOCK_LEAD: Duration = Duration::from_secs(5);

/// What became of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MergeOutcome {
    /// It counts from now on, or did already.
    Merged,
    /// A later word on the instance is known.
    Outranked,
    /// Nothing is known of the instance, and its removal may have been forgotten.
    TooOld,
    /// The cluster, as it is now, forbids the registration.
    Refused(KubernetesRefusal),
    /// The limit of registered instances is reached.
    Full {
        /// [`RegistryOptions::max_instances`](super::RegistryOptions::max_instances).
        limit: usize,
    },
    /// Its stamp is this far ahead of the clock of this machine.
    ClockAhead(Duration),
}

impl MergeOutcome {
    /// Why the word does not count, if that is not for another word on the instance.
    fn refusal(&self) -> Option<WordRefusal> {
        match self {
            Self::Merged | Self::Outranked => None,
            Self::TooOld => Some(WordRefusal::TooOld),
            Self::Refused(refusal) => Some(WordRefusal::Forbidden(*refusal)),
            Self::Full { .. } => Some(WordRefusal::Full),
            Self::ClockAhead(_) => Some(WordRefusal::ClockAhead),
        }
    }
}

/// The acknowledgement of words, after their batch is durable and visible.
#[derive(Debug)]
pub struct MergeAck {
    /// Kubernetes has everything that the outcomes depend on once it has this generation of the services.
    pub generation: u64,
    /// One per word, in order.
    pub outcomes: Vec<MergeOutcome>,
}

/// What a slice says that a process of an earlier term wrote late.
#[derive(Debug)]
pub struct LateSlice {
    /// The service of the slice.
    pub service: ServiceKey,
    /// What it says and is not known here.
    pub words: Vec<OutboxWord>,
    /// The highest clock of a tombstone that it had no room for; 0 where none was dropped.
    pub refuse_before: u64,
}

/// Words on their way to the writer.
#[derive(Debug)]
pub(super) struct MergeRequest {
    words: Vec<OutboxWord>,
    /// Until the words are merged, also when the caller is gone.
    _turn: OwnedSemaphorePermit,
    /// From a late slice: its service, and its age limit. Nobody repeats the words.
    late: Option<(ServiceKey, u64)>,
    reply: oneshot::Sender<Result<MergeAck, Unavailable>>,
}

impl RegistryHandle {
    /// Merges words of another process, in one batch: one call after the other, so that registrations wait for one of
    /// them at most. Once a call has its turn, it is carried out even if the returned future is dropped.
    ///
    /// # Errors
    /// When this process does not write, or cannot write its journal; then the sender keeps the words.
    pub async fn merge(&self, words: Vec<OutboxWord>) -> Result<MergeAck, Unavailable> {
        self.send_words(words, None).await
    }

    /// Merges what a slice says that was written late. A word that does not count is among the [refused
    /// ones](RegistryHandle::refused_words): the slice is about to be replaced, and whoever wrote it does not write any more.
    ///
    /// # Errors
    /// When this process does not write, or cannot write its journal; then the slice must not be replaced.
    pub async fn merge_late(&self, slice: LateSlice) -> Result<MergeAck, Unavailable> {
        let LateSlice { service, words, refuse_before } = slice;
        self.send_words(words, Some((service, refuse_before))).await
    }

    async fn send_words(
        &self,
        words: Vec<OutboxWord>,
        late: Option<(ServiceKey, u64)>,
    ) -> Result<MergeAck, Unavailable> {
        self.status.accepting()?;
        // One at a time in the writer's queue, so that processes that hand over do not crowd out registrations.
        let turn = Arc::clone(&self.merges).acquire_owned().await.expect("the semaphore is never closed");
        let (reply, merged) = oneshot::channel();
        let request = MergeRequest { words, late, _turn: turn, reply };
        self.queue.send(WriterMessage::Merge(request)).await.map_err(|_| self.status.refusal())?;
        merged.await.unwrap_or_else(|_| Err(self.status.refusal()))
    }
}

impl Writer {
    pub(super) fn merge(&mut self, MergeRequest { words, late, _turn, reply }: MergeRequest) {
        let merged = self.try_merge(words, late);
        // An error means that the caller was cancelled.
        let _ = reply.send(merged);
    }

    fn try_merge(&mut self, words: Vec<OutboxWord>, late: Option<(ServiceKey, u64)>) -> Result<MergeAck, Unavailable> {
        self.status.accepting()?;
        if !self.mirror_records.comparison_is_over() {
            // What is registered here may still be older than what the slices hold.
            return Err(Unavailable::NotReady);
        }
        let now = UnixMillis::now();
        self.decider.stamper().set_generation(self.committer.generation() + 1);
        let mut refused = Vec::new();
        let outcomes = words.into_iter().map(|word| {
            let outcome = self.decider.merge(&word, now);
            let reason = outcome.refusal().filter(|reason| late.is_some() || *reason == WordRefusal::TooOld);
            if let Some(reason) = reason {
                let OutboxWord { service, id, stamp, .. } = word;
                warn!(
                    %service, instance = %id, %stamp,
                    "a word that another process handed over, or wrote late, is {reason}: it is dropped, and has to be said again"
                );
                refused.push(RefusedWord { service, id, reason });
            }
            outcome
        });
        let outcomes: Vec<MergeOutcome> = outcomes.collect();
        if let Some((service, clock)) = late {
            // After the words: it is about what the slice does not say any more.
            self.decider.merge_refuse_before(service, clock, now);
        }
        self.applier.set_merging(true);
        self.finish(PendingAcks::default());
        self.applier.set_merging(false);
        // The batch may have failed: nothing of it counts then, and the sender must keep its words.
        self.committer.usable()?;
        self.metrics.registry.count_refused_words(refused.len());
        self.refused_words.add(refused);
        Ok(MergeAck { generation: self.generation(), outcomes })
    }
}

impl Decider {
    /// Merges one word, and stages what it changes.
    fn merge(&mut self, word: &OutboxWord, now: UnixMillis) -> MergeOutcome {
        let OutboxWord { service, id, instance, stamp } = word;
        let wall = now.0.saturating_mul(1_000);
        let lead = Duration::from_micros(stamp.clock.saturating_sub(wall));
        // Before anything is changed: the stamper would follow such a clock, and stamp everything in the future from then on.
        if lead > MAX_CLOCK_LEAD {
            return MergeOutcome::ClockAhead(lead);
        }
        if is_reserved(service) {
            return MergeOutcome::Refused(KubernetesRefusal::Reserved);
        }
        let merge =
            Merge { clock: self.stamper().clock(), wall, lifetime: TombstoneLifetime::DEFAULT, rules: Rules::ALL };
        let word = Word { value: instance.clone(), stamp: *stamp };
        let mut words = ServiceWords { decider: self, service, now };
        // Handed over before, and the answer was lost. Merging is repeatable.
        if words.known(id) == Some(*stamp) {
            return MergeOutcome::Merged;
        }
        let judged = merge.judge(&words, id, &word);
        match judged {
            Merged::Applied => {
                if let Some(not_yet) = words.decider.lacks(service, id, instance.is_none()) {
                    return not_yet;
                }
            }
            Merged::Outranked | Merged::TooOld => {}
        }
        match merge.apply(&mut words, id, &word, judged) {
            Merged::Applied => MergeOutcome::Merged,
            Merged::Outranked => MergeOutcome::Outranked,
            Merged::TooOld => MergeOutcome::TooOld,
        }
    }

    /// Tombstones of the service up to `clock` were dropped by another process.
    fn merge_refuse_before(&mut self, service: ServiceKey, clock: u64, now: UnixMillis) {
        if clock > self.refuse_before(&service) {
            self.replay(vec![Record::RefuseBefore { service, clock }], now);
        }
    }

    /// What a word about something new lacks: a place in the cluster, or room.
    fn lacks(&mut self, service: &ServiceKey, id: &InstanceId, removal: bool) -> Option<MergeOutcome> {
        if !self.removed_by(service, id).is_empty() {
            return None;
        }
        let refused = self.facts().refuse(service).map(MergeOutcome::Refused);
        refused.or_else(|| self.reached_limit(service, removal).map(|limit| MergeOutcome::Full { limit }))
    }
}

/// The words on the instances of one service, with the changes of the batch so far.
struct ServiceWords<'a> {
    decider: &'a mut Decider,
    service: &'a ServiceKey,
    now: UnixMillis,
}

impl Words for ServiceWords<'_> {
    type Key = InstanceId;
    type Value = Arc<Instance>;

    fn known(&self, id: &InstanceId) -> Option<Stamp> {
        self.decider.last_word(self.service, &InstanceKey::from(id))
    }

    fn refuse_before(&self, _: &InstanceId) -> u64 {
        self.decider.refuse_before(self.service)
    }

    fn removed_by(&self, id: &InstanceId, before: Stamp) -> Vec<InstanceId> {
        let removed = if id.ports.is_every() { self.decider.removed_by(self.service, id) } else { Vec::new() };
        removed.into_iter().filter(|instance| instance.stamp() < before).map(|instance| instance.id()).collect()
    }

    fn apply(&mut self, id: &InstanceId, word: &Word<Arc<Instance>>) {
        let Word { value, stamp } = word;
        let removed = if value.is_none() { self.removed_by(id, *stamp) } else { Vec::new() };
        let remove = |id| Record::Remove { service: self.service.clone(), id, stamp: *stamp };
        let last = match value {
            Some(instance) => Record::Put { service: self.service.clone(), instance: Arc::clone(instance) },
            None => remove(id.clone()),
        };
        let records = removed.into_iter().map(remove).chain([last]).collect();
        self.decider.replay(records, self.now);
    }
}
