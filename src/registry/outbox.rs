//! The outbox of a process that does not write: what it accepted and Kubernetes was never seen to have. It is handed over to
//! the process that writes, and a word leaves it only after that process has answered for it.
//!
//! While a process writes, its outbox is in the journal only (`store/outbox.rs`), and the mirror empties it.

use std::{collections::HashSet, sync::Arc};

use tokio::sync::oneshot;

use super::{RegistryHandle, Unavailable, Writer, WriterMessage, restore::LatestRecords};
use crate::{
    model::{Instance, InstanceId, ServiceKey, Stamp},
    replicas::word::Word,
    store::{DirectoryTerm, Record},
};

/// The last word on one instance.
#[derive(Debug, Clone, PartialEq)]
pub struct OutboxWord {
    /// The service of the instance.
    pub service: ServiceKey,
    /// Which instance; of a removal perhaps every one at the address.
    pub id: InstanceId,
    /// The instance as it was registered; `None` if it was removed.
    pub instance: Option<Arc<Instance>>,
    /// When that was said.
    pub stamp: Stamp,
}

impl OutboxWord {
    /// The word as it is journaled.
    pub(super) fn into_record(self) -> Record {
        let Self { service, id, instance, stamp } = self;
        match instance {
            Some(instance) => Record::Put { service, instance },
            None => Record::Remove { service, id, stamp },
        }
    }
}

/// A part of an outbox.
#[derive(Debug, Default)]
pub struct OutboxPage {
    /// In order of their stamps.
    pub words: Vec<OutboxWord>,
    /// Words in the whole outbox.
    pub total: usize,
}

/// Asks for a part of the outbox.
#[derive(Debug)]
pub(super) struct OutboxRequest {
    after: Option<Stamp>,
    limit: usize,
    reply: oneshot::Sender<OutboxPage>,
}

/// Words that the process which writes has answered for.
#[derive(Debug)]
pub(super) struct HandedOver {
    words: Vec<OutboxWord>,
    done: oneshot::Sender<()>,
}

impl RegistryHandle {
    /// The first `limit` words of the outbox in order of their stamps, after a stamp; a few more if words have the same
    /// stamp. Empty while this process writes, or is about to.
    ///
    /// # Errors
    /// When the writer has ended.
    pub async fn outbox(&self, after: Option<Stamp>, limit: usize) -> Result<OutboxPage, Unavailable> {
        let (reply, page) = oneshot::channel();
        let request = OutboxRequest { after, limit, reply };
        self.queue.send(WriterMessage::Outbox(request)).await.map_err(|_| self.status.refusal())?;
        page.await.map_err(|_| self.status.refusal())
    }

    /// Removes words from the outbox, because the process that writes has answered for them. Returns when the journal has
    /// it. Does nothing while this process writes.
    ///
    /// # Errors
    /// When the writer has ended.
    pub async fn handed_over(&self, words: Vec<OutboxWord>) -> Result<(), Unavailable> {
        let (done, is_done) = oneshot::channel();
        self.queue
            .send(WriterMessage::HandedOver(HandedOver { words, done }))
            .await
            .map_err(|_| self.status.refusal())?;
        is_done.await.map_err(|_| self.status.refusal())
    }
}

impl Writer {
    pub(super) fn outbox(&self, OutboxRequest { after, limit, reply }: OutboxRequest) {
        let page = self.mirror_records.awaited().map(|local| page(&local.outbox, after, limit));
        // An error means that the caller has ended.
        let _ = reply.send(page.unwrap_or_default());
    }

    pub(super) fn handed_over(&mut self, HandedOver { mut words, done }: HandedOver) {
        if let Some(local) = self.mirror_records.awaited_mut() {
            // With the stamp: the same instance may have been registered again since the word was sent, and that word was not answered for.
            words.retain(|word| local.outbox.remove(&word.service, &word.id, word.stamp));
            let mut services: HashSet<ServiceKey> = words.iter().map(|word| word.service.clone()).collect();
            // A service is confirmed only when none of its words is left.
            for (service, ..) in local.outbox.iter() {
                services.remove(service);
            }
            let records: Vec<Record> = words.into_iter().map(OutboxWord::into_record).collect();
            // The committer logs a failure and sets the status. After a restart they are sent again, which changes nothing.
            // Journaled as mirrored, which takes them out of the outbox on disk as well.
            if !records.is_empty() && self.committer.commit_mirrored(&records, false).is_ok() {
                for service in services {
                    self.mirror_progress.confirm(&service, u64::MAX);
                }
            }
        }
        // An error means that the caller has ended.
        let _ = done.send(());
    }

    /// Everything that was accepted here and that neither Kubernetes nor another process is known to have, at the end.
    pub fn unconfirmed(&mut self) -> Vec<OutboxWord> {
        if let Some(local) = self.mirror_records.awaited() {
            return page(&local.outbox, None, usize::MAX).words;
        }
        if self.mirror_progress.lag().services == 0 {
            return Vec::new();
        }
        // Reading the journal takes a second for a million instances.
        match self.read_outbox(&mut |_| {}) {
            Ok((_, outbox)) => page(&outbox.into(), None, usize::MAX).words,
            Err(_) => self.words_of_services_behind(),
        }
    }

    /// The term of the directory, and the records that Kubernetes lacks, as the journal has them; after a failure of the journal,
    /// those of before it. Passes the records of all stored instances to `record`.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub(super) fn read_outbox(
        &mut self,
        record: &mut dyn FnMut(Record),
    ) -> Result<(DirectoryTerm, Vec<Record>), Unavailable> {
        let (term, mut outbox) = self.committer.read_back(record)?;
        // The journal may lack confirmations of the last second, and after a failure all later ones.
        outbox.retain(|record| match record {
            Record::Put { service, .. } | Record::Remove { service, .. } => self.mirror_progress.is_behind(service),
            Record::Mirrored { .. } | Record::Term(_) | Record::RefuseBefore { .. } => true,
        });
        Ok((term, outbox))
    }

    /// Where the journal cannot be read: all that is known of services of which Kubernetes lacks something, too much rather than too
    /// little.
    fn words_of_services_behind(&self) -> Vec<OutboxWord> {
        let mut words = Vec::new();
        for service in self.mirror_progress.unmirrored() {
            let registered = self.catalog.get(&service).unwrap_or_default().instances;
            words.extend(registered.iter().map(|instance| OutboxWord {
                service: service.clone(),
                id: instance.id(),
                instance: Some(Arc::clone(instance)),
                stamp: instance.stamp(),
            }));
            words.extend(self.catalog.tombstones(&service).iter().map(|removal| OutboxWord {
                service: service.clone(),
                id: removal.id.clone(),
                instance: None,
                stamp: removal.stamp,
            }));
        }
        words
    }
}

fn page(outbox: &LatestRecords, after: Option<Stamp>, limit: usize) -> OutboxPage {
    let mut words: Vec<(&ServiceKey, &InstanceId, &Word<Arc<Instance>>)> =
        outbox.iter().filter(|(.., word)| after.is_none_or(|after| word.stamp > after)).collect();
    // A selection instead of a sort of everything: an outbox may have a million words, of which one page is wanted.
    if let Some(last) = limit.checked_sub(1).filter(|last| *last < words.len()) {
        let (_, (.., last), _) = words.select_nth_unstable_by_key(last, |(.., word)| word.stamp);
        let last = last.stamp;
        // All words of the last stamp, also beyond the limit: the next page begins behind that stamp and would miss them.
        words.retain(|(.., word)| word.stamp <= last);
    }
    words.sort_unstable_by_key(|(.., word)| word.stamp);
    let words = words.into_iter().map(|(service, id, word)| OutboxWord {
        service: service.clone(),
        id: id.clone(),
        instance: word.value.clone(),
        stamp: word.stamp,
    });
    OutboxPage { words: words.collect(), total: outbox.len() }
}
