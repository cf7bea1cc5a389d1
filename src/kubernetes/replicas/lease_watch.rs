//! A watch of the Lease, so that a process on standby learns at once that it was released.
//!
//! A hint and nothing more: the elector reads the Lease when something changed, and what it reads counts. Without
//! the watch it reads every [`RETRY_PERIOD`], so failures are retried and not reported, except for a missing right.

use std::{
    convert::Infallible,
    future,
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use k8s_openapi::api::coordination::v1::Lease;
use kube::{
    Api, Client,
    api::{WatchEvent, WatchParams},
};
use tokio::{sync::watch, time};
use tracing::warn;

use super::lease::{NAME, holder};
use crate::{net::backoff::Backoff, registry::LeaseHolder, replicas::election::RETRY_PERIOD};

/// A watch is renewed after this long, which is how a connection that died silently is noticed.
const MAX_WATCH_SECONDS: u32 = 50;
/// A watch is renewed after this long at least, so that those of many processes do not return at one moment.
const MIN_WATCH_SECONDS: u32 = 40;

/// The API server ends a watch itself; how much longer it may take.
const WATCH_GRACE: Duration = Duration::from_secs(5);

/// How long the API server may take to open a watch.
const WATCH_START_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest backoff. The shortest is [`RETRY_PERIOD`].
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// Watches the one Lease.
pub(super) struct LeaseWatch {
    api: Api<Lease>,
    /// Who held the Lease as it was last seen; `None` if it was deleted.
    holder: Option<LeaseHolder>,
    /// Whether the missing right was reported.
    forbidden: bool,
}

impl LeaseWatch {
    pub(super) fn new(client: Client, namespace: &str) -> Self {
        Self { api: Api::namespaced(client, namespace), holder: None, forbidden: false }
    }

    /// Watches while `standby` is true, and marks `changed` when another one holds the Lease, or nobody. Never ends.
    pub(super) async fn run(mut self, mut standby: watch::Receiver<bool>, changed: &watch::Sender<()>) -> Infallible {
        let mut backoff = Backoff::new(RETRY_PERIOD, MAX_BACKOFF);
        loop {
            if standby.wait_for(|standby| *standby).await.is_err() {
                return future::pending().await;
            }
            let began = Instant::now();
            tokio::select! {
                biased;
                // The holder needs no hint: its own renewals would wake it every time.
                _ = standby.wait_for(|standby| !standby) => continue,
                ended = self.watch(changed) => if ended.is_ok() || began.elapsed() >= MAX_BACKOFF {
                    backoff.reset();
                },
            }
            time::sleep(backoff.next_pause()).await;
        }
    }

    /// One watch, from the Lease as it is now, until the API server ends it.
    async fn watch(&mut self, changed: &watch::Sender<()>) -> Result<(), ()> {
        let params = WatchParams {
            field_selector: Some(format!("metadata.name={NAME}")),
            timeout: Some(fastrand::u32(MIN_WATCH_SECONDS..=MAX_WATCH_SECONDS)),
            ..WatchParams::default()
        };
        let longest = Duration::from_secs(MAX_WATCH_SECONDS.into()) + WATCH_GRACE;
        let began = Instant::now();
        // Without a version the watch begins with the Lease as it is, as if it was added.
        let opened = time::timeout(WATCH_START_TIMEOUT, self.api.watch(&params, "")).await.map_err(drop)?;
        let mut events = std::pin::pin!(opened.map_err(|err| self.failed(&err))?);
        self.forbidden = false;
        loop {
            let left = longest.saturating_sub(began.elapsed());
            let holder = match time::timeout(left, events.next()).await.map_err(drop)? {
                Some(Ok(WatchEvent::Added(lease) | WatchEvent::Modified(lease))) => Some(holder(&lease)),
                Some(Ok(WatchEvent::Deleted(_))) => None,
                Some(Ok(WatchEvent::Bookmark(_))) => continue,
                Some(Ok(WatchEvent::Error(_)) | Err(_)) => return Err(()),
                None => return Ok(()),
            };
            // Renewals, every RETRY_PERIOD, are no news.
            if self.holder != holder {
                self.holder = holder;
                changed.send_replace(());
            }
        }
    }

    fn failed(&mut self, err: &kube::Error) {
        let forbidden = matches!(err, kube::Error::Api(status) if matches!(status.code, 401 | 403));
        if forbidden && !self.forbidden {
            warn!(
                lease = NAME, %err,
                "this account may not watch the Lease: a hand-over takes up to 2 s; grant it as deploy/kustomize/rbac.yaml does; \
                 retrying"
            );
        }
        self.forbidden = forbidden;
    }
}
