//! Lists, then watches, for as long as there is an API server, and again when there is one.
//!
//! kube's own `watcher` does much the same, but does not report when a watch is open again after an
//! outage (a quiet one has no events for hours), waits without a limit for a server that accepts a
//! request and is silent, and repeats a list for one object that cannot be decoded. So:
//!
//! * A list is read in pages; each page is handled before the next is requested.
//! * Every request has a deadline, and a watch is renewed every [`WATCH_SECONDS`].
//! * After a failure the watch continues where it was. Only when the API server cannot continue
//!   there, everything is listed again, once, after a backoff as for every failure.
//! * Backoff and renewals have jitter, so that many watches do not return at the same moment.
//! * One log line when the API server is lost and one when it is back, for all watches.

use std::{
    fmt::Debug,
    future::{self, Future},
    ops::RangeInclusive,
    time::{Duration, Instant},
};

use futures::StreamExt;
use kube::{
    Api, Resource,
    api::{ListParams, WatchEvent, WatchParams},
    core::DeserializeGuard,
};
use serde::de::DeserializeOwned;
use tokio::time;

use super::{
    error::{MAX_BACKOFF, WatchBackoff, WatchError, WatchErrorKind},
    outage::{Outages, WatchHealth},
};
use crate::{
    kubernetes::{api::chain, cache::ObjectEvent},
    metrics::{KubernetesMetrics, Watched},
    registry::{Status, Unavailable},
};

/// Seconds after which a watch is renewed, which is how a connection that died silently is noticed. A range: all of them
/// begin at one moment and must not be renewed at one.
pub(super) const WATCH_SECONDS: RangeInclusive<u32> = 40..=50;

/// The same for a watch by which identities end: with [`WATCH_GRACE`] less than the 15 s within which a revocation counts.
pub(super) const SHORT_WATCH_SECONDS: RangeInclusive<u32> = 4..=6;

/// The API server ends a watch itself; how much longer it may take.
const WATCH_GRACE: Duration = Duration::from_secs(5);

/// A watch by which this process follows another one is renewed when nothing has said for so long that it is current:
/// neither an event nor the Lease, which is read every 2 s. So a connection that died silently is noticed sooner.
const MAX_DOUBT: Duration = Duration::from_secs(3);

/// How long the API server may take to open a watch.
const WATCH_START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the API server may take for one page of a list.
const LIST_TIMEOUT: Duration = Duration::from_secs(30);

/// Most objects in a page: each may have 256 KiB of annotations and more, and a page is in memory
/// as a whole while it is handled.
const PAGE_SIZE: u32 = 100;

/// Most events that are handled at once.
const MAX_EVENTS_PER_BATCH: usize = 256;

/// A watch that ends sooner, without an error, counts as a failure: repeating it at once would be a
/// busy loop.
const MIN_WATCH_DURATION: Duration = Duration::from_secs(1);

/// Handles the events of one kind of object.
pub(super) trait EventHandler<K> {
    /// Handles events in order, as many as came at once. The watch waits meanwhile.
    ///
    /// # Errors
    /// When the registry is gone, which ends the watch.
    fn handle(&mut self, events: Vec<ObjectEvent<K>>) -> impl Future<Output = Result<(), Unavailable>> + Send;
}

/// One list and watch.
#[derive(Debug)]
pub(super) struct Reflector<'a, K> {
    pub(super) api: Api<DeserializeGuard<K>>,
    pub(super) watched: Watched,
    /// Label selector; empty for all objects.
    pub(super) labels: String,
    /// Seconds after which the watch is renewed.
    pub(super) renewal: RangeInclusive<u32>,
    pub(super) metrics: &'a KubernetesMetrics,
    pub(super) outages: &'a Outages,
    /// Is told that this watch is current, if it is the one by which this process follows another one.
    pub(super) follows: Option<&'a Status>,
}

/// Why [`Reflector::list_and_watch`] ended.
#[derive(Debug)]
enum ListWatchError {
    Watch(WatchError),
    Registry(Unavailable),
}

impl<T: Into<WatchError>> From<T> for ListWatchError {
    fn from(err: T) -> Self {
        Self::Watch(err.into())
    }
}

impl<K> Reflector<'_, K>
where
    K: Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug + Send + 'static,
{
    /// Passes every event to `handler`, until the registry is gone.
    pub(super) async fn run(&self, handler: &mut impl EventHandler<K>) -> Unavailable {
        let mut version = None;
        let mut backoff = WatchBackoff::default();
        let mut health = self.outages.watch();
        loop {
            let began = Instant::now();
            let err = match self.list_and_watch(&mut version, handler, &mut health).await {
                // The API server has ended the watch in time, which is no failure.
                Ok(()) => {
                    backoff = WatchBackoff::default();
                    continue;
                }
                Err(ListWatchError::Registry(gone)) => return gone,
                Err(ListWatchError::Watch(err)) => err,
            };
            let kind = err.kind();
            self.metrics.restarted(self.watched, kind.label());
            if kind == WatchErrorKind::Expired {
                // The API server has compacted the version away: only a list says what happened since.
                version = None;
            } else {
                health.failed(kind, &chain(&err), &self.resource());
            }
            // It worked for a while: what failed now is a new failure and not the next of a row.
            if began.elapsed() >= MAX_BACKOFF {
                backoff = WatchBackoff::default();
            }
            time::sleep(backoff.next(kind, err.retry_after())).await;
        }
    }

    /// Lists, unless `version` says where to continue, and watches until the API server ends the
    /// watch in time.
    async fn list_and_watch(
        &self,
        version: &mut Option<String>,
        handler: &mut impl EventHandler<K>,
        health: &mut WatchHealth<'_>,
    ) -> Result<(), ListWatchError> {
        let from = match version {
            Some(version) => version,
            None => version.insert(self.list(handler).await?),
        };
        let params = WatchParams {
            label_selector: Some(self.labels.clone()).filter(|labels| !labels.is_empty()),
            timeout: Some(fastrand::u32(self.renewal.clone())),
            // Bookmarks move the version on while nothing changes, so that a quiet watch does not expire.
            bookmarks: true,
            ..WatchParams::default()
        };
        let began = Instant::now();
        let start = time::timeout(WATCH_START_TIMEOUT, self.api.watch(&params, from));
        let events = start.await.map_err(|_| WatchError::Silent(WATCH_START_TIMEOUT))?.map_err(WatchError::from)?;
        let mut events = std::pin::pin!(events.ready_chunks(MAX_EVENTS_PER_BATCH));
        let _open = self.metrics.watching(self.watched);
        health.opened();
        if let Some(status) = self.follows {
            status.replica().watch_opened();
        }
        // The API server is asked to end the watch before. If it does not, the connection is dead.
        let longest = Duration::from_secs((*self.renewal.end()).into()) + WATCH_GRACE;
        loop {
            let left = longest.saturating_sub(began.elapsed());
            let next = async {
                tokio::select! {
                    chunk = events.next() => chunk,
                    () = self.doubted() => None,
                }
            };
            let Some(chunk) = time::timeout(left, next).await.map_err(|_| WatchError::Silent(longest))? else {
                return if began.elapsed() < MIN_WATCH_DURATION { Err(WatchError::Closed.into()) } else { Ok(()) };
            };
            let mut batch = Vec::with_capacity(chunk.len());
            let mut failure = None;
            for event in chunk {
                match self.decode(event) {
                    Ok((later, event)) => {
                        // The batch is handled below, whatever fails in it.
                        from.clone_from(&later);
                        batch.extend(event);
                    }
                    Err(None) => {}
                    Err(Some(err)) => failure = Some(err),
                }
            }
            if !batch.is_empty() {
                handler.handle(batch).await.map_err(ListWatchError::Registry)?;
            }
            self.is_current();
            // After the batch: events before the failure are handled, and the version says that they were.
            if let Some(err) = failure {
                return Err(err.into());
            }
        }
    }

    /// Everything until now was handled.
    fn is_current(&self) {
        if let Some(status) = self.follows {
            status.replica().watch_answered();
        }
    }

    /// Waits until nothing has said for [`MAX_DOUBT`] that what is followed is current.
    async fn doubted(&self) {
        let Some(status) = self.follows else { return future::pending().await };
        loop {
            let left = MAX_DOUBT.saturating_sub(status.staleness().unwrap_or_default());
            if left.is_zero() {
                return;
            }
            time::sleep(left).await;
        }
    }

    /// The version that the watch has reached with this event, and the event, if its object can be
    /// decoded.
    ///
    /// # Errors
    /// Why the watch is over; `None` where only this event is lost.
    fn decode(
        &self,
        event: kube::Result<WatchEvent<DeserializeGuard<K>>>,
    ) -> Result<(String, Option<ObjectEvent<K>>), Option<WatchError>> {
        let (object, wrap): (_, fn(K) -> ObjectEvent<K>) = match event {
            Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => (object, ObjectEvent::Apply),
            Ok(WatchEvent::Deleted(object)) => (object, ObjectEvent::Delete),
            // It carries nothing but the version that the watch has reached.
            Ok(WatchEvent::Bookmark(bookmark)) => return Ok((bookmark.metadata.resource_version, None)),
            Ok(WatchEvent::Error(status)) => return Err(Some(WatchError::Ended(status))),
            Err(kube::Error::SerdeError(err)) => {
                tracing::warn!("an event of the watch of {} cannot be decoded: skipped: {err}", self.resource());
                return Err(None);
            }
            Err(err) => return Err(Some(err.into())),
        };
        let version = object.meta().resource_version.clone().ok_or(None)?;
        Ok((version, decoded(object).map(wrap)))
    }

    /// Passes every object to `handler`, and returns the version of the list.
    async fn list(&self, handler: &mut impl EventHandler<K>) -> Result<String, ListWatchError> {
        let mut params = ListParams {
            label_selector: Some(self.labels.clone()).filter(|labels| !labels.is_empty()),
            limit: Some(PAGE_SIZE),
            ..ListParams::default()
        };
        let mut batch = vec![ObjectEvent::Init];
        loop {
            let page = time::timeout(LIST_TIMEOUT, self.api.list(&params));
            let page = page.await.map_err(|_| WatchError::Silent(LIST_TIMEOUT))?.map_err(WatchError::from)?;
            batch.extend(page.items.into_iter().filter_map(decoded).map(ObjectEvent::InitApply));
            // All pages are of the version of the first one: a continue token keeps it (API concepts, "Retrieving large
            // results sets").
            params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                let version = page.metadata.resource_version.unwrap_or_default();
                batch.push(ObjectEvent::InitDone(version.clone()));
                handler.handle(batch).await.map_err(ListWatchError::Registry)?;
                self.metrics.listed(self.watched);
                self.is_current();
                return Ok(version);
            }
            handler.handle(std::mem::take(&mut batch)).await.map_err(ListWatchError::Registry)?;
        }
    }

    /// The resource as RBAC names it.
    fn resource(&self) -> String {
        let (group, plural) = (K::group(&()), K::plural(&()));
        if group.is_empty() { plural.into_owned() } else { format!("{plural}.{group}") }
    }
}

/// The object. One that cannot be decoded is skipped, so that it does not cost the others.
fn decoded<K: Resource<DynamicType = ()>>(object: DeserializeGuard<K>) -> Option<K> {
    let log = |err: &kube::core::error_boundary::InvalidObject| {
        let (namespace, name) = (err.metadata.namespace.as_deref(), err.metadata.name.as_deref());
        let (namespace, name) = (namespace.unwrap_or_default(), name.unwrap_or_default());
        tracing::warn!("{} {namespace}/{name} cannot be decoded: skipped: {err}", K::kind(&()));
    };
    object.0.inspect_err(log).ok()
}
