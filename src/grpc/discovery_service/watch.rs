//! One watch: a snapshot if it starts without a cursor, then every change, until it ends.
//!
//! A watch reads the feed only as fast as its client reads messages, and delays no one else. When the feed
//! no longer has the next change for a slow client, the watch ends with a restart message.

use std::sync::Arc;

use futures::{Stream, stream};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{
    cursor::Cursor,
    list_error,
    selection::{Filter, Messages},
};
use crate::{
    grpc::{
        ServerContext, convert,
        proto::gangplank::v1::{self, Restart, Synced, WatchResponse, restart::Reason, watch_response::Event},
    },
    metrics::{Metrics, WatchEnd},
    registry::{Batch, Lagged, ListError, Subscription},
};

/// Filtered changes after which the client gets a new cursor. Otherwise its cursor could become older
/// than the feed.
const MAX_CURSOR_AGE: usize = 8_192;

/// A watch of the change feed.
pub(super) struct FeedWatch {
    feed: Subscription,
    epoch: u64,
    filter: Filter,
    stop: CancellationToken,
    /// The rest of the snapshot. It holds a list's permit until its last message.
    snapshot: Box<dyn Iterator<Item = v1::Service> + Send>,
    /// The generation of the snapshot, until all of it is sent.
    snapshot_generation: Option<u64>,
    /// The batch that is being sent, and the index of its next change.
    batch: Option<(Arc<Batch>, usize)>,
    /// Changes of the first batch that the client already has, if the cursor is within a batch.
    seen: usize,
    /// Filtered changes since the client last got a cursor.
    dropped: usize,
    metrics: Arc<Metrics>,
    state: WatchState,
}

enum WatchState {
    Open,
    /// The restart message is the next one, and the last.
    Ending(Reason, &'static str),
    Ended,
}

impl FeedWatch {
    fn new(context: &ServerContext, feed: Subscription, filter: Filter, stop: CancellationToken) -> Self {
        Self {
            feed,
            epoch: context.registry.feed().epoch(),
            filter,
            stop,
            snapshot: Box::new(std::iter::empty()),
            snapshot_generation: None,
            batch: None,
            seen: 0,
            dropped: 0,
            metrics: Arc::clone(&context.metrics),
            state: WatchState::Open,
        }
    }

    /// Starts with a snapshot of the selected services.
    ///
    /// # Errors
    /// When too many lists are being sent and wait already.
    pub(super) async fn from_snapshot(
        context: &ServerContext,
        filter: Filter,
        stop: CancellationToken,
    ) -> Result<Self, Status> {
        let snapshots = context.registry.snapshots();
        type Source = Box<dyn Iterator<Item = v1::Service> + Send>;
        let taking = async {
            Ok::<(u64, Source), ListError>(match &filter {
                // For one service, a copy of the whole catalog is not needed.
                Filter::Service(key) => {
                    let snapshot = Box::new(snapshots.service(key).await?);
                    (snapshot.generation(), Box::new(Messages::new(snapshot, &filter)))
                }
                Filter::All | Filter::Namespace(_) => {
                    let list = snapshots.list().await?;
                    (list.generation(), Box::new(Messages::new(list, &filter)))
                }
            })
        };
        let taken = tokio::select! {
            taken = taking => taken,
            () = stop.cancelled() => return Ok(Self::ended(context, Reason::ShuttingDown, SHUTTING_DOWN)),
        };
        match taken {
            Ok((generation, snapshot)) => {
                let feed = context.registry.feed().subscribe(generation);
                let watch = Self::new(context, feed, filter, stop);
                Ok(Self { snapshot, snapshot_generation: Some(generation), ..watch })
            }
            Err(ListError::Lagged(_)) => Ok(Self::ended(context, Reason::SlowReader, SLOW_READER)),
            Err(err) => Err(list_error(err)),
        }
    }

    /// Continues after `cursor`.
    pub(super) fn resume(context: &ServerContext, filter: Filter, cursor: Cursor, stop: CancellationToken) -> Self {
        let (generation, seen) = cursor.position();
        let feed = context.registry.feed().subscribe(generation);
        Self { seen, ..Self::new(context, feed, filter, stop) }
    }

    /// A watch that sends the restart message only.
    pub(super) fn ended(context: &ServerContext, reason: Reason, message: &'static str) -> Self {
        let registry = &context.registry;
        let feed = registry.feed().subscribe(registry.catalog().generation());
        let state = WatchState::Ending(reason, message);
        Self { state, ..Self::new(context, feed, Filter::All, CancellationToken::new()) }
    }

    /// The messages of this watch.
    pub(super) fn into_stream(self) -> impl Stream<Item = Result<WatchResponse, Status>> + Send {
        stream::unfold(Box::new(self), |mut watch| async {
            let message = watch.next().await?;
            Some((Ok(message), watch))
        })
    }

    async fn next(&mut self) -> Option<WatchResponse> {
        loop {
            match self.state {
                WatchState::Open if self.stop.is_cancelled() => {
                    self.state = WatchState::Ending(Reason::ShuttingDown, SHUTTING_DOWN);
                }
                WatchState::Open => {
                    if let Some(message) = self.ready() {
                        return Some(message);
                    }
                    self.wait().await;
                }
                WatchState::Ending(reason, message) => {
                    self.state = WatchState::Ended;
                    self.metrics.grpc.watch_restarted(counted(reason));
                    let restart = Restart { reason: reason.into(), message: message.into() };
                    return Some(WatchResponse { event: Some(Event::Restart(restart)), cursor: Vec::new() });
                }
                WatchState::Ended => return None,
            }
        }
    }

    /// The next message that can be sent without waiting for the feed.
    fn ready(&mut self) -> Option<WatchResponse> {
        // The snapshot first. Changes wait in the feed meanwhile, which was subscribed as of the same generation.
        if let Some(part) = self.snapshot.next() {
            return Some(WatchResponse { event: Some(Event::Snapshot(part)), cursor: Vec::new() });
        }
        if let Some(generation) = self.snapshot_generation.take() {
            // Releases the list's permit.
            self.snapshot = Box::new(std::iter::empty());
            return Some(self.synced(generation));
        }
        let (batch, at) = self.batch.as_mut()?;
        while let Some(event) = batch.events.get(*at) {
            *at += 1;
            if self.filter.matches(&event.service) {
                self.dropped = 0;
                // Within the batch: a client that is cut off in the middle of it does not get its beginning again.
                let cursor = Cursor::within(self.epoch, batch.generation, *at, batch.events.len());
                let timeline = batch.timeline(event);
                let change = convert::change_to_proto(&event.service, &event.change, batch.generation, timeline);
                return Some(WatchResponse { event: Some(Event::Change(change)), cursor: cursor.encode() });
            }
            // Changes that the filter hides move the position as well: a cursor that stays behind them would soon be
            // too old.
            self.dropped += 1;
        }
        let generation = batch.generation;
        self.batch = None;
        (self.dropped >= MAX_CURSOR_AGE).then(|| self.synced(generation))
    }

    fn synced(&mut self, generation: u64) -> WatchResponse {
        self.dropped = 0;
        let cursor = Cursor::after(self.epoch, generation).encode();
        WatchResponse { event: Some(Event::Synced(Synced { generation })), cursor }
    }

    /// Waits for the next batch, or for the stop.
    async fn wait(&mut self) {
        tokio::select! {
            // The stop first: where changes always come it would never be seen.
            biased;
            () = self.stop.cancelled() => {}
            batch = self.feed.next() => match batch {
                Ok(batch) => self.batch = Some((batch, std::mem::take(&mut self.seen))),
                Err(Lagged) => self.state = WatchState::Ending(Reason::SlowReader, SLOW_READER),
            },
        }
    }
}

fn counted(reason: Reason) -> WatchEnd {
    match reason {
        Reason::SlowReader => WatchEnd::SlowReader,
        Reason::UnknownCursor => WatchEnd::UnknownCursor,
        Reason::ShuttingDown | Reason::Unspecified => WatchEnd::ShuttingDown,
    }
}

const SLOW_READER: &str = "more changes happened than are kept; watch again without a cursor";
const SHUTTING_DOWN: &str = "the server is shutting down; watch again when it is back";
