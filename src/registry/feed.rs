//! The change feed: every change in order of generation, kept for a while in a ring.
//!
//! The writer appends and never waits. A reader takes the batches after its position. When the ring no
//! longer has the next batch, the reader gets [`Lagged`] and starts again from the catalog.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::watch;

use crate::model::{InstanceChange, ServiceKey, Timeline, UnixMillis};

/// Changes that the ring keeps for readers that reconnect or fall behind.
const MAX_KEPT_EVENTS: usize = 65_536;

/// One change of one instance.
#[derive(Debug, Clone)]
pub struct Event {
    /// The service of the instance.
    pub service: ServiceKey,
    /// The instance before and after.
    pub change: InstanceChange,
    /// When the registry received the command.
    pub received: UnixMillis,
}

/// Everything that changed with one generation.
#[derive(Debug)]
pub struct Batch {
    /// The generation.
    pub generation: u64,
    /// The changes, in the order in which they were made.
    pub events: Vec<Event>,
    pub(super) durable: UnixMillis,
    pub(super) visible: UnixMillis,
    pub(super) acknowledged: UnixMillis,
}

impl Batch {
    /// The times of `event`, which must be in this batch.
    #[must_use]
    pub fn timeline(&self, event: &Event) -> Timeline {
        Timeline {
            received: event.received,
            durable: self.durable,
            visible: self.visible,
            acknowledged: self.acknowledged,
        }
    }
}

/// The ring no longer has the changes that follow the reader's position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more changes happened than are kept")]
pub struct Lagged;

/// The latest changes, and the channels that wake readers for the next one.
#[derive(Debug)]
pub struct Feed {
    ring: Mutex<Ring>,
    /// The generation of the newest batch.
    newest: watch::Sender<u64>,
    /// The generation that was announced last. Apart from `newest`, so that a generation without changes, such as
    /// that of a repeated registration, wakes no watch.
    announced: watch::Sender<u64>,
    epoch: u64,
}

#[derive(Debug)]
struct Ring {
    batches: VecDeque<Arc<Batch>>,
    /// Changes in all batches.
    events: usize,
    /// The generation just before the oldest batch: a reader at this position can read every batch.
    before: u64,
    /// The generation that was announced last; one without changes has no batch.
    announced: u64,
}

impl Ring {
    /// Adds the newest batch. Returns the evicted batches; the caller drops them after it has released
    /// the lock.
    #[must_use = "dropped outside the lock"]
    fn push(&mut self, batch: Arc<Batch>) -> Vec<Arc<Batch>> {
        self.events += batch.events.len();
        self.announced = batch.generation;
        self.batches.push_back(batch);
        let mut evicted = Vec::new();
        // The newest batch stays even if it alone exceeds the limit: without it every reader would lag.
        while self.events > MAX_KEPT_EVENTS && self.batches.len() > 1 {
            let Some(oldest) = self.batches.pop_front() else { break };
            self.events -= oldest.events.len();
            self.before = oldest.generation;
            evicted.push(oldest);
        }
        evicted
    }
}

impl Feed {
    pub(super) fn new() -> Self {
        Self {
            ring: Mutex::new(Ring { batches: VecDeque::new(), events: 0, before: 0, announced: 0 }),
            newest: watch::Sender::new(0),
            announced: watch::Sender::new(0),
            // The ring begins anew with each run, so a cursor of an earlier one means nothing, even if its generation exists.
            epoch: fastrand::u64(1..),
        }
    }

    /// A random number, not 0, of this run of the server. A cursor is valid within one run only.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Reads everything after `generation`.
    #[must_use]
    pub fn subscribe(self: &Arc<Self>, generation: u64) -> Subscription {
        Subscription { feed: Arc::clone(self), seen: generation, newest: self.newest.subscribe() }
    }

    /// Starts the feed after `generation`: recovered services are not changes.
    pub(super) fn start_after(&self, generation: u64) {
        {
            let mut ring = self.lock();
            (ring.before, ring.announced) = (generation, generation);
        }
        self.newest.send_replace(generation);
        self.announced.send_replace(generation);
    }

    pub(super) fn push(&self, batch: Batch) {
        let generation = batch.generation;
        let evicted = self.lock().push(Arc::new(batch));
        self.newest.send_replace(generation);
        self.announced.send_replace(generation);
        // Freeing tens of thousands of events takes milliseconds: not under the readers' lock.
        drop(evicted);
    }

    /// Announces a generation without changes.
    pub(super) fn skip(&self, generation: u64) {
        self.lock().announced = generation;
        self.announced.send_replace(generation);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Ring> {
        // Nothing panics while it holds the lock, so a poisoned one guards a consistent ring.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One reader of the feed. It holds a position, no changes, so a slow reader costs no memory.
#[derive(Debug)]
pub struct Subscription {
    feed: Arc<Feed>,
    seen: u64,
    newest: watch::Receiver<u64>,
}

impl Subscription {
    /// The generation up to which everything was read.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// The next batch; waits until there is one. Cancelling loses nothing.
    ///
    /// # Errors
    /// When the ring no longer has the next batch; the reader must start again from the catalog.
    pub async fn next(&mut self) -> Result<Arc<Batch>, Lagged> {
        loop {
            if let Some(batch) = self.try_next()? {
                return Ok(batch);
            }
            if self.newest.changed().await.is_err() {
                // Unreachable: `self.feed` owns the sender.
                std::future::pending::<()>().await;
            }
        }
    }

    /// The next batch, if there is one already.
    ///
    /// # Errors
    /// As [`Subscription::next`].
    pub fn try_next(&mut self) -> Result<Option<Arc<Batch>>, Lagged> {
        // Before the ring is read, not after: a batch that is pushed in between wakes the reader again.
        self.newest.mark_unchanged();
        let next = {
            let ring = self.feed.lock();
            if self.seen < ring.before {
                return Err(Lagged);
            }
            // By generation and not by index: evictions move the indexes under a reader.
            let at = ring.batches.partition_point(|batch| batch.generation <= self.seen);
            let next = ring.batches.get(at).cloned();
            // Behind the newest batch there can be generations without changes.
            let seen = next.as_ref().map_or(ring.announced, |batch| batch.generation);
            self.seen = self.seen.max(seen);
            next
        };
        Ok(next)
    }

    /// The batches up to `generation`; waits until it is announced. Cancelling loses what was read.
    ///
    /// # Errors
    /// As [`Subscription::next`].
    pub(super) async fn read_until(&mut self, generation: u64) -> Result<Vec<Arc<Batch>>, Lagged> {
        let mut announced = self.feed.announced.subscribe();
        let mut batches = Vec::new();
        while self.seen < generation {
            match self.try_next()? {
                Some(batch) => batches.push(batch),
                None if self.seen < generation => {
                    // Fails only without a sender, which `self.feed` owns.
                    let _ = announced.wait_for(|announced| *announced >= generation).await;
                }
                None => {}
            }
        }
        Ok(batches)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Validator;

    fn batch(generation: u64, events: usize) -> Arc<Batch> {
        let service = Validator { zone_wire_len: 15, names_allowed: false }.service("prod", "web").expect("valid");
        let change = InstanceChange { before: None, after: None };
        let event = Event { service, change, received: UnixMillis(1) };
        let events = vec![event; events];
        Arc::new(Batch {
            generation,
            events,
            durable: UnixMillis(2),
            visible: UnixMillis(3),
            acknowledged: UnixMillis(4),
        })
    }

    #[test]
    fn evicted_batch_is_returned_and_not_freed_under_the_lock() {
        let feed = Feed::new();
        let oldest = batch(1, MAX_KEPT_EVENTS);
        assert!(feed.lock().push(Arc::clone(&oldest)).is_empty());
        let evicted = {
            let mut ring = feed.lock();
            let evicted = ring.push(batch(2, 1));
            // The ring has evicted the batch without freeing it: the caller owns it.
            assert_eq!((ring.batches.len(), ring.events, ring.before), (1, 1, 1));
            evicted
        };
        assert!(matches!(&evicted[..], [batch] if Arc::ptr_eq(batch, &oldest)));
    }
}
