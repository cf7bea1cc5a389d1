//! Words that another process hands over: each is merged by its stamp, as at a take-over, and keeps it.
//!
//! Anybody who can register can send words, so a word about something new needs what any registration needs: a place in the
//! cluster, and room. One that lacks it stays with its sender, which repeats it. A stamp from the future would be
//! the last word on its instance until then, and would pull this process's clock ahead, so such a word waits too.

use std::{sync::Arc, time::Duration};

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tracing::warn;

use super::{
    KubernetesRefusal, OutboxWord, RegistryHandle, Unavailable, Writer, WriterMessage, cluster_facts::is_reserved,
    decide::Decider, writer::PendingAcks,
};
use crate::{
    model::{InstanceKey, UnixMillis},
    replicas::word::{AgeLimit, Merged, TombstoneLifetime, Word},
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
        /// [`Options::max_instances`](super::Options::max_instances).
        limit: usize,
    },
    /// Its stamp is this far ahead of the clock of this machine.
    ClockAhead(Duration),
}

/// The acknowledgement of words, after their batch is durable and visible.
#[derive(Debug)]
pub struct MergeAck {
    /// Kubernetes has everything that the outcomes depend on once it has this generation of the services.
    pub generation: u64,
    /// One per word, in order.
    pub outcomes: Vec<MergeOutcome>,
}

/// Words on their way to the writer.
#[derive(Debug)]
pub(super) struct MergeRequest {
    words: Vec<OutboxWord>,
    /// Until the words are merged, also when the caller is gone.
    _turn: OwnedSemaphorePermit,
    reply: oneshot::Sender<Result<MergeAck, Unavailable>>,
}

impl RegistryHandle {
    /// Merges words of another process, in one batch: one call after the other, so that registrations wait for one of
    /// them at most. Once a call has its turn, it is carried out even if the returned future is dropped.
    ///
    /// # Errors
    /// When this process does not write, or cannot write its journal; then the sender keeps the words.
    pub async fn merge(&self, words: Vec<OutboxWord>) -> Result<MergeAck, Unavailable> {
        self.status.accepting()?;
        let turn = Arc::clone(&self.merges).acquire_owned().await.expect("the semaphore is never closed");
        let (reply, merged) = oneshot::channel();
        let request = MergeRequest { words, _turn: turn, reply };
        self.queue.send(WriterMessage::Merge(request)).await.map_err(|_| self.status.refusal())?;
        merged.await.unwrap_or_else(|_| Err(self.status.refusal()))
    }
}

impl Writer {
    pub(super) fn merge(&mut self, MergeRequest { words, _turn, reply }: MergeRequest) {
        let merged = self.try_merge(words);
        // An error means that the caller was cancelled.
        let _ = reply.send(merged);
    }

    fn try_merge(&mut self, words: Vec<OutboxWord>) -> Result<MergeAck, Unavailable> {
        self.status.accepting()?;
        if !self.mirror_records.comparison_is_over() {
            // What is registered here may still be older than what the slices hold.
            return Err(Unavailable::NotReady);
        }
        let now = UnixMillis::now();
        self.decider.stamper().set_generation(self.committer.generation() + 1);
        let mut refused = Vec::new();
        let outcomes = words.into_iter().map(|word| {
            let (service, id) = (word.service.clone(), word.id.clone());
            let outcome = self.decider.merge(word, now);
            if outcome == MergeOutcome::TooOld {
                refused.push((service, id));
            }
            outcome
        });
        let outcomes: Vec<MergeOutcome> = outcomes.collect();
        self.applier.set_merging(true);
        self.finish(PendingAcks::default());
        self.applier.set_merging(false);
        self.committer.usable()?;
        self.metrics.registry.count_refused_words(refused.len());
        self.refused_words.add(refused);
        Ok(MergeAck { generation: self.generation(), outcomes })
    }
}

impl Decider {
    /// Merges one word, and stages what it changes.
    fn merge(&mut self, word: OutboxWord, now: UnixMillis) -> MergeOutcome {
        let OutboxWord { service, id, instance, stamp } = &word;
        let wall = now.0.saturating_mul(1_000);
        let lead = Duration::from_micros(stamp.clock.saturating_sub(wall));
        if lead > MAX_CLOCK_LEAD {
            return MergeOutcome::ClockAhead(lead);
        }
        if is_reserved(service) {
            return MergeOutcome::Refused(KubernetesRefusal::Reserved);
        }
        let key = InstanceKey::from(id);
        let (known, refuse_before) = self.last_word(service, &key);
        if known == Some(*stamp) {
            return MergeOutcome::Merged;
        }
        let limit = AgeLimit::at(self.stamper().clock(), wall, TombstoneLifetime::DEFAULT, refuse_before);
        match limit.merge(known, &Word { value: instance.as_ref(), stamp: *stamp }) {
            Merged::Outranked => return MergeOutcome::Outranked,
            Merged::TooOld => {
                warn!(
                    %service, instance = %id, %stamp,
                    "a registration that another process handed over, or wrote late, is too old to count, because its removal may \
                     have been forgotten: it is dropped, and has to be registered again"
                );
                return MergeOutcome::TooOld;
            }
            Merged::Applied => {}
        }
        let registered = self.removed_by(service, id);
        if registered.is_empty() {
            let refused = self.facts().refuse(service).map(MergeOutcome::Refused);
            let full = || self.reached_limit(service, instance.is_none()).map(|limit| MergeOutcome::Full { limit });
            if let Some(not_yet) = refused.or_else(full) {
                return not_yet;
            }
        }
        if instance.is_none() && id.ports.is_every() {
            let removed = registered.iter().filter(|one| one.stamp() < *stamp);
            let records = removed.map(|one| Record::Remove { service: service.clone(), id: one.id(), stamp: *stamp });
            self.replay(records.collect(), now);
        }
        self.replay(vec![word.into_record()], now);
        MergeOutcome::Merged
    }
}
