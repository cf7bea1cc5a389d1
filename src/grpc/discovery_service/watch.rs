//! One watch: a snapshot if it begins without a cursor, then every change, until it must end.
//!
//! It pulls from the feed when its client takes messages, and so never holds up anyone. A client
//! that is too slow finds that the feed has moved on; it is told, and its watch ends.

use std::sync::Arc;

use futures::{Stream, stream};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{
    cursor::Cursor,
    snapshot::{self, Filter},
};
use crate::{
    grpc::{
        ServerContext, convert,
        proto::gangplank::v1::{self, Restart, Synced, WatchResponse, restart::Reason, watch_response::Event},
    },
    metrics::{Metrics, WatchEnd},
    registry::{Batch, Lagged, Subscription},
};

/// After this many changes that the filter kept back, the client gets a new cursor: one that only
/// grew older would be of no use when it is needed.
const CURSOR_AGE: usize = 8_192;

/// A watch.
pub(super) struct Watch {
    feed: Subscription,
    epoch: u64,
    filter: Filter,
    stop: CancellationToken,
    /// What is left of the snapshot.
    snapshot: Box<dyn Iterator<Item = v1::Service> + Send>,
    /// Said when the snapshot is through.
    synced: Option<u64>,
    /// The batch that is being given out, and its next change.
    batch: Option<(Arc<Batch>, usize)>,
    /// Changes of the first batch that the client has seen.
    seen: usize,
    /// Changes kept back since the client last got a cursor.
    kept_back: usize,
    metrics: Arc<Metrics>,
    state: State,
}

enum State {
    Open,
    /// To be said as the last thing.
    Ending(Reason, &'static str),
    Over,
}

impl Watch {
    fn new(context: &ServerContext, feed: Subscription, filter: Filter, stop: CancellationToken) -> Self {
        Self {
            feed,
            epoch: context.registry.feed().epoch(),
            filter,
            stop,
            snapshot: Box::new(std::iter::empty()),
            synced: None,
            batch: None,
            seen: 0,
            kept_back: 0,
            metrics: Arc::clone(&context.metrics),
            state: State::Open,
        }
    }

    /// Begins with what stands.
    pub(super) async fn from_snapshot(
        context: &ServerContext,
        filter: Filter,
        stop: CancellationToken,
    ) -> Result<Self, Status> {
        let taken = tokio::select! {
            taken = snapshot::take(&context.registry, &filter) => taken?,
            () = stop.cancelled() => return Ok(Self::over(context, Reason::ShuttingDown, SHUTTING_DOWN)),
        };
        let Ok((standing, feed)) = taken else {
            return Ok(Self::over(context, Reason::SlowReader, SLOW_READER));
        };
        let synced = feed.seen();
        let parts = standing.into_iter().flat_map(|(key, service)| convert::service_parts(key, service));
        Ok(Self { snapshot: Box::new(parts), synced: Some(synced), ..Self::new(context, feed, filter, stop) })
    }

    /// Goes on behind `cursor`.
    pub(super) fn resume(context: &ServerContext, filter: Filter, cursor: Cursor, stop: CancellationToken) -> Self {
        let (generation, seen) = cursor.place();
        let feed = context.registry.feed().subscribe(generation);
        Self { seen, ..Self::new(context, feed, filter, stop) }
    }

    /// Has nothing to say but why it must begin again.
    pub(super) fn over(context: &ServerContext, reason: Reason, message: &'static str) -> Self {
        let registry = &context.registry;
        let feed = registry.feed().subscribe(registry.catalog().generation());
        let state = State::Ending(reason, message);
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
                State::Open if self.stop.is_cancelled() => {
                    self.state = State::Ending(Reason::ShuttingDown, SHUTTING_DOWN);
                }
                State::Open => {
                    if let Some(message) = self.ready() {
                        return Some(message);
                    }
                    self.wait().await;
                }
                State::Ending(reason, message) => {
                    self.state = State::Over;
                    self.metrics.grpc.watch_restarted(counted(reason));
                    let restart = Restart { reason: reason.into(), message: message.into() };
                    return Some(WatchResponse { event: Some(Event::Restart(restart)), cursor: Vec::new() });
                }
                State::Over => return None,
            }
        }
    }

    /// The next message, if it needs no waiting.
    fn ready(&mut self) -> Option<WatchResponse> {
        if let Some(part) = self.snapshot.next() {
            return Some(WatchResponse { event: Some(Event::Snapshot(part)), cursor: Vec::new() });
        }
        if let Some(generation) = self.synced.take() {
            return Some(self.synced(generation));
        }
        let (batch, at) = self.batch.as_mut()?;
        while let Some(event) = batch.events.get(*at) {
            *at += 1;
            if self.filter.wants(&event.service) {
                self.kept_back = 0;
                let cursor = Cursor::within(self.epoch, batch.generation, *at, batch.events.len());
                let timeline = batch.timeline(event);
                let change = convert::change_to_proto(&event.service, &event.change, batch.generation, timeline);
                return Some(WatchResponse { event: Some(Event::Change(change)), cursor: cursor.encode() });
            }
            self.kept_back += 1;
        }
        let generation = batch.generation;
        self.batch = None;
        (self.kept_back >= CURSOR_AGE).then(|| self.synced(generation))
    }

    fn synced(&mut self, generation: u64) -> WatchResponse {
        self.kept_back = 0;
        let cursor = Cursor::after(self.epoch, generation).encode();
        WatchResponse { event: Some(Event::Synced(Synced { generation })), cursor }
    }

    /// Waits for the next batch, or for the end.
    async fn wait(&mut self) {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {}
            batch = self.feed.next() => match batch {
                Ok(batch) => self.batch = Some((batch, std::mem::take(&mut self.seen))),
                Err(Lagged) => self.state = State::Ending(Reason::SlowReader, SLOW_READER),
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
