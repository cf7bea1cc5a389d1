//! List, then watch, for as long as there is an API server, and again when there is one.
//!
//! kube's own `watcher` does much the same, but does not tell when a watch stands again after an
//! outage (a quiet one says nothing for hours), backoff without end for a server that accepts a
//! request and is silent, and begins a list again for one object that cannot be read. So:
//!
//! * A list comes page by page, a page is handed on before the next is asked for.
//! * Every request has a deadline, and a watch is asked for again every [`WATCH_TIMEOUT_SECONDS`].
//! * After a failure the watch goes on where it was. Only when the API server does not know that
//!   point any more everything is listed again, once, after a wait as for every failure.
//! * Backoff grow and have jitter, so that many watches do not come back at the same moment.
//! * One line in the log when the API server is lost and one when it is back, for all watches.

use std::{
    fmt::Debug,
    future::Future,
    time::{Duration, Instant},
};

use futures::StreamExt;
use kube::{
    Api, Resource,
    api::{ListParams, WatchEvent, WatchParams},
    core::{DeserializeGuard, Status},
};
use serde::de::DeserializeOwned;
use tokio::time;

use super::outage::{Outages, WatchHealth};
use crate::{
    kubernetes::{
        api::{DEFAULT_RETRY_AFTER, chain},
        cache::ObjectEvent,
    },
    metrics::{KubernetesMetrics, RestartReason, Watched},
    registry::Unavailable,
};

/// A watch is asked for again after so long, whatever comes: a connection that died without a word
/// is noticed by then.
const WATCH_TIMEOUT_SECONDS: u32 = 50;

/// The API server ends a watch itself; it gets so much longer for it.
const WATCH_GRACE: Duration = Duration::from_secs(5);

/// Within which a watch has to be granted.
const WATCH_START_TIMEOUT: Duration = Duration::from_secs(10);

/// Within which a page has to come.
const LIST_TIMEOUT: Duration = Duration::from_secs(30);

/// Most objects in a page: each may have 256 KiB of annotations and more, and a page is held as a
/// whole while it is read.
const PAGE_SIZE: u32 = 100;

/// Most events that are handed on at once.
const MAX_EVENTS_PER_BATCH: usize = 256;

/// A watch that ended sooner, without an error, was not a watch.
const MIN_WATCH_DURATION: Duration = Duration::from_secs(1);

/// First and longest wait after a failure.
const MIN_BACKOFF: Duration = Duration::from_millis(250);

/// Longest wait after a failure.
const MAX_BACKOFF: Duration = Duration::from_secs(15);

/// Longest wait where a right is missing: somebody has to grant it. The first are as short as others,
/// because an API server that has just started knows nobody's rights for a moment.
const MAX_FORBIDDEN_BACKOFF: Duration = Duration::from_secs(30);

/// Most of a Retry-After that is kept.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Takes what a watch sees.
pub(super) trait EventHandler<K> {
    /// Takes what was events, in order, as much as came at once. It may take its time: the watch
    /// backoff.
    ///
    /// # Errors
    /// When the registry is gone, which ends the watch.
    fn handle(&mut self, events: Vec<ObjectEvent<K>>) -> impl Future<Output = Result<(), Unavailable>> + Send;
}

/// What is watched, and where.
#[derive(Debug)]
pub(super) struct Reflector<'a, K> {
    pub(super) api: Api<DeserializeGuard<K>>,
    pub(super) watched: Watched,
    /// Empty for all objects.
    pub(super) labels: String,
    pub(super) metrics: &'a KubernetesMetrics,
    pub(super) outages: &'a Outages,
}

/// Why a list or watch has to begin again.
#[derive(Debug, thiserror::Error)]
enum WatchError {
    #[error(transparent)]
    Kube(#[from] kube::Error),
    #[error("the watch ended with {} ({})", .0.message, .0.code)]
    Ended(Box<Status>),
    #[error("no answer within {} s", .0.as_secs())]
    Silent(Duration),
    #[error("it ends every watch at once")]
    Closed,
}

/// How a round ended.
#[derive(Debug)]
enum ListWatchError {
    Failed(WatchError),
    Registry(Unavailable),
}

impl<T: Into<WatchError>> From<T> for ListWatchError {
    fn from(failure: T) -> Self {
        Self::Failed(failure.into())
    }
}

impl<K> Reflector<'_, K>
where
    K: Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug + Send + 'static,
{
    /// Hands everything on to `handler`, until the registry is gone.
    pub(super) async fn run(&self, handler: &mut impl EventHandler<K>) -> Unavailable {
        let mut version = None;
        let mut backoff = Backoff::default();
        let mut health = self.outages.watch();
        loop {
            let began = Instant::now();
            let failure = match self.list_and_watch(&mut version, handler, &mut health).await {
                Ok(()) => {
                    backoff = Backoff::default();
                    continue;
                }
                Err(ListWatchError::Registry(gone)) => return gone,
                Err(ListWatchError::Failed(failure)) => failure,
            };
            let reason = failure.reason();
            self.metrics.restarted(self.watched, reason);
            if failure.is_expired() {
                version = None;
            }
            if began.elapsed() >= MAX_BACKOFF {
                backoff = Backoff::default();
            }
            if reason != RestartReason::Expired {
                health.failed(reason, &chain(&failure), &self.right());
            }
            time::sleep(backoff.next(reason, failure.retry_after())).await;
        }
    }

    /// Lists if need be, and watches until the watch ends as it should.
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
            timeout: Some(WATCH_TIMEOUT_SECONDS),
            bookmarks: true,
            ..WatchParams::default()
        };
        let began = Instant::now();
        let start = time::timeout(WATCH_START_TIMEOUT, self.api.watch(&params, from));
        let events = start.await.map_err(|_| WatchError::Silent(WATCH_START_TIMEOUT))?.map_err(WatchError::from)?;
        let mut events = std::pin::pin!(events.ready_chunks(MAX_EVENTS_PER_BATCH));
        let _standing = self.metrics.watching(self.watched);
        health.found();
        let longest = Duration::from_secs(WATCH_TIMEOUT_SECONDS.into()) + WATCH_GRACE;
        loop {
            let left = longest.saturating_sub(began.elapsed());
            let Some(chunk) = time::timeout(left, events.next()).await.map_err(|_| WatchError::Silent(longest))? else {
                return if began.elapsed() < MIN_WATCH_DURATION { Err(WatchError::Closed.into()) } else { Ok(()) };
            };
            let mut events = Vec::with_capacity(chunk.len());
            let mut failure = None;
            for event in chunk {
                match self.event(event) {
                    Ok((later, one)) => {
                        // What is handed on below counts as events: nothing fails in between.
                        from.clone_from(&later);
                        events.extend(one);
                    }
                    Err(None) => {}
                    Err(Some(err)) => failure = Some(err),
                }
            }
            if !events.is_empty() {
                handler.handle(events).await.map_err(ListWatchError::Registry)?;
            }
            if let Some(failure) = failure {
                return Err(failure.into());
            }
        }
    }

    /// The version up to which the watch has come with this event, and what it says, if it can be
    /// read.
    ///
    /// # Errors
    /// Why the watch is over; nothing where only the event is worthless.
    fn event(
        &self,
        event: kube::Result<WatchEvent<DeserializeGuard<K>>>,
    ) -> Result<(String, Option<ObjectEvent<K>>), Option<WatchError>> {
        let (object, events): (_, fn(K) -> ObjectEvent<K>) = match event {
            Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => (object, ObjectEvent::Apply),
            Ok(WatchEvent::Deleted(object)) => (object, ObjectEvent::Delete),
            Ok(WatchEvent::Bookmark(bookmark)) => return Ok((bookmark.metadata.resource_version, None)),
            Ok(WatchEvent::Error(status)) => return Err(Some(WatchError::Ended(status))),
            Err(kube::Error::SerdeError(err)) => {
                tracing::warn!("an event of the watch of {} cannot be read and is passed over: {err}", self.right());
                return Err(None);
            }
            Err(err) => return Err(Some(err.into())),
        };
        let version = object.meta().resource_version.clone().ok_or(None)?;
        Ok((version, self.readable(object).map(events)))
    }

    /// Passes on every object, and returns the version of the list.
    async fn list(&self, handler: &mut impl EventHandler<K>) -> Result<String, ListWatchError> {
        let mut params = ListParams {
            label_selector: Some(self.labels.clone()).filter(|labels| !labels.is_empty()),
            limit: Some(PAGE_SIZE),
            ..ListParams::default()
        };
        let mut events = vec![ObjectEvent::Init];
        loop {
            let page = time::timeout(LIST_TIMEOUT, self.api.list(&params));
            let page = page.await.map_err(|_| WatchError::Silent(LIST_TIMEOUT))?.map_err(WatchError::from)?;
            events
                .extend(page.items.into_iter().filter_map(|object| self.readable(object)).map(ObjectEvent::InitApply));
            params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                let version = page.metadata.resource_version.unwrap_or_default();
                events.push(ObjectEvent::InitDone(version.clone()));
                handler.handle(events).await.map_err(ListWatchError::Registry)?;
                self.metrics.listed(self.watched);
                return Ok(version);
            }
            handler.handle(std::mem::take(&mut events)).await.map_err(ListWatchError::Registry)?;
        }
    }

    /// One object that cannot be read is no reason to do without the others.
    fn readable(&self, object: DeserializeGuard<K>) -> Option<K> {
        let unreadable = |err: &kube::core::error_boundary::InvalidObject| {
            let (namespace, name) = (err.metadata.namespace.as_deref(), err.metadata.name.as_deref());
            let (namespace, name) = (namespace.unwrap_or_default(), name.unwrap_or_default());
            tracing::warn!("{} {namespace}/{name} cannot be read and is passed over: {err}", K::kind(&()));
        };
        object.0.inspect_err(unreadable).ok()
    }

    /// What RBAC calls what is watched.
    fn right(&self) -> String {
        let (group, plural) = (K::group(&()), K::plural(&()));
        if group.is_empty() { plural.into_owned() } else { format!("{plural}.{group}") }
    }
}

impl WatchError {
    fn status(&self) -> Option<&Status> {
        match self {
            Self::Kube(kube::Error::Api(status)) | Self::Ended(status) => Some(status),
            _ => None,
        }
    }

    fn reason(&self) -> RestartReason {
        match self {
            Self::Silent(_) => RestartReason::Silent,
            Self::Closed => RestartReason::Unreachable,
            Self::Kube(kube::Error::Auth(_)) => RestartReason::Forbidden,
            Self::Kube(kube::Error::SerdeError(_)) => RestartReason::Refused,
            _ if self.is_expired() => RestartReason::Expired,
            _ => match self.status() {
                Some(status) if matches!(status.code, 401 | 403) => RestartReason::Forbidden,
                Some(_) => RestartReason::Refused,
                None => RestartReason::Unreachable,
            },
        }
    }

    /// Whether the API server cannot go on where the watch was: too long ago for it, or never
    /// heard of.
    fn is_expired(&self) -> bool {
        self.status().is_some_and(|status| {
            let causes = status.details.iter().flat_map(|details| &details.causes);
            status.code == 410 || causes.map(|cause| &*cause.reason).any(|cause| cause == "ResourceVersionTooLarge")
        })
    }

    /// How long the API server wants to be left alone. kube does not give the header of the answer,
    /// so where only that says it, it is what API priority and fairness asks for.
    fn retry_after(&self) -> Duration {
        let Some(status) = self.status() else { return Duration::ZERO };
        match status.details.as_ref().map_or(0, |details| details.retry_after_seconds) {
            0 if status.code == 429 => DEFAULT_RETRY_AFTER,
            seconds => Duration::from_secs(seconds.into()),
        }
    }
}

/// How long to wait after each failure in a row.
#[derive(Debug, Default)]
struct Backoff(u32);

impl Backoff {
    fn next(&mut self, reason: RestartReason, retry_after: Duration) -> Duration {
        let (first, longest) = (MIN_BACKOFF, MAX_BACKOFF);
        let longest = if reason == RestartReason::Forbidden { MAX_FORBIDDEN_BACKOFF } else { longest };
        let grown = first.saturating_mul(2u32.saturating_pow(self.0)).min(longest);
        self.0 = self.0.saturating_add(1);
        // Half of it to all of it.
        retry_after.min(MAX_RETRY_AFTER) + grown.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(code: u16, cause: &str) -> WatchError {
        let status = serde_json::json!({
            "code": code, "message": "no", "details": { "causes": [{ "reason": cause }], "retryAfterSeconds": 7 },
        });
        WatchError::Ended(serde_json::from_value(status).expect("a Status"))
    }

    #[test]
    fn a_failure_says_whether_everything_has_to_be_listed_again() {
        for (failure, reason, again) in [
            (failed(410, ""), RestartReason::Expired, true),
            (failed(504, "ResourceVersionTooLarge"), RestartReason::Expired, true),
            (failed(504, ""), RestartReason::Refused, false),
            (failed(500, ""), RestartReason::Refused, false),
            (failed(401, ""), RestartReason::Forbidden, false),
            (failed(403, ""), RestartReason::Forbidden, false),
            (WatchError::Silent(WATCH_START_TIMEOUT), RestartReason::Silent, false),
            (
                WatchError::Kube(kube::Error::ReadEvents(std::io::Error::other("cut"))),
                RestartReason::Unreachable,
                false,
            ),
        ] {
            assert_eq!((failure.reason(), failure.is_expired()), (reason, again), "{failure}");
        }
        assert_eq!(failed(429, "").retry_after(), Duration::from_secs(7));
        let busy = serde_json::json!({ "code": 429, "message": "Too many requests, please try again later." });
        let busy = WatchError::Ended(serde_json::from_value(busy).expect("a Status"));
        assert_eq!(busy.retry_after(), DEFAULT_RETRY_AFTER);
        assert_eq!(chain(&failed(500, "")), "the watch ended with no (500)");
    }

    #[test]
    fn waits_grow_to_a_limit_and_keep_what_the_server_asked_for() {
        let mut backoff = Backoff::default();
        let mut least = MIN_BACKOFF / 2;
        for _ in 0..40 {
            let wait = backoff.next(RestartReason::Unreachable, Duration::ZERO);
            assert!(wait >= least && wait <= MAX_BACKOFF, "{wait:?}");
            least = (2 * least).min(MAX_BACKOFF / 2);
        }
        let asked = Duration::from_secs(20);
        assert!(backoff.next(RestartReason::Refused, asked) >= asked);
        assert!(backoff.next(RestartReason::Refused, Duration::MAX) <= MAX_RETRY_AFTER + MAX_BACKOFF);
        let mut backoff = Backoff::default();
        assert!(backoff.next(RestartReason::Forbidden, Duration::ZERO) <= MIN_BACKOFF, "it may have just started");
        let later = (0..40).map(|_| backoff.next(RestartReason::Forbidden, Duration::ZERO)).last();
        assert!(later >= Some(MAX_FORBIDDEN_BACKOFF / 2), "{later:?}");
    }
}
