//! The loop that keeps Kubernetes in step: what changed here, what changed there, and what has to
//! be tried again, each service in its turn, a bounded number at once.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{
    client::Fault,
    cluster::Changed,
    queue::Queue,
    reconcile::{Reconciler, Verdict},
};
use crate::{
    metrics::Blocked,
    model::{ServiceKey, UnixMillis},
};

/// Services that are written at once.
const AT_ONCE: usize = 16;

/// How long a service waits that the server refuses: a right may be given, a policy changed.
const BLOCKED_RETRY: Duration = Duration::from_secs(30);

/// How long it waits the first time: an API server that has just started knows nobody's rights for
/// a moment.
const FIRST_BLOCKED_RETRY: Duration = Duration::from_secs(1);

/// How long it waits at least when the server has refused it and it changes meanwhile.
const REFUSED_REST: Duration = Duration::from_secs(2);

/// How often the gauges are set.
const GAUGES_EVERY: Duration = Duration::from_secs(1);

/// Longest text of an event, in characters (events.k8s.io allows 1024 octets).
const NOTE: usize = 250;

/// An event is a courtesy: nothing waits for it, and it is given up after this long.
const EVENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Events that are on their way at once; more are left out.
const MAX_EVENTS: usize = 64;

/// The mirror at work.
pub(super) struct Mirror {
    reconciler: Arc<Reconciler>,
    events: Recorder,
    /// Events on their way.
    telling: FuturesUnordered<BoxFuture<'static, ()>>,
    queue: Queue,
    /// Services that cannot be as they should be.
    blocked: HashMap<ServiceKey, Blocked>,
    /// Services with a write of which nobody knows whether it was carried out.
    doubtful: HashSet<ServiceKey>,
}

impl std::fmt::Debug for Mirror {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mirror").field("queue", &self.queue.len()).field("blocked", &self.blocked.len()).finish()
    }
}

impl Mirror {
    pub(super) fn new(reconciler: Reconciler, events: Recorder) -> Self {
        Self {
            reconciler: Arc::new(reconciler),
            events,
            telling: FuturesUnordered::new(),
            queue: Queue::default(),
            blocked: HashMap::new(),
            doubtful: HashSet::new(),
        }
    }

    /// Works until `stop`. Begins with everything that is registered here or stands there.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let registered = self.reconciler.registry.catalog().services().into_iter().map(|(service, _)| service);
        let everything: HashSet<ServiceKey> = registered.chain(self.reconciler.cluster.every_service()).collect();
        self.add(everything);

        let mirror_progress = Arc::clone(self.reconciler.registry.mirror_progress());
        let cluster = Arc::clone(&self.reconciler.cluster);
        let mut gauges = interval(GAUGES_EVERY);
        gauges.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut running = FuturesUnordered::new();
        loop {
            while running.len() < AT_ONCE
                && let Some(service) = self.queue.next(Instant::now())
            {
                let (reconciler, doubtful) = (Arc::clone(&self.reconciler), self.doubtful.remove(&service));
                running.push(async move {
                    let verdict = reconciler.reconcile(&service, doubtful).await;
                    (service, verdict)
                });
            }
            let due = self.queue.next_due().filter(|_| running.len() < AT_ONCE);
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some((service, verdict)) = running.next(), if !running.is_empty() => {
                    self.judge(service, verdict).await;
                }
                Some(()) = self.telling.next(), if !self.telling.is_empty() => {}
                news = mirror_progress.take_dirty() => self.add(news),
                changed = cluster.changed() => self.changed(changed),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                _ = gauges.tick() => self.set_gauges(),
            }
        }
    }

    fn add(&mut self, services: impl IntoIterator<Item = ServiceKey>) {
        let now = Instant::now();
        services.into_iter().for_each(|service| self.queue.add(service, now));
    }

    /// What changed in the cluster is looked at; of a namespace, whatever is registered in it.
    fn changed(&mut self, changed: Vec<Changed>) {
        let mut namespaces = HashSet::new();
        for changed in changed {
            match changed {
                Changed::Service(service) => self.add([service]),
                Changed::Namespace(namespace) => drop(namespaces.insert(namespace)),
            }
        }
        if !namespaces.is_empty() {
            let services = self.reconciler.registry.catalog().services().into_iter().map(|(service, _)| service);
            let inside: Vec<_> = services.filter(|service| namespaces.contains(service.namespace())).collect();
            self.add(inside);
        }
    }

    /// What follows from how a service stands.
    async fn judge(&mut self, service: ServiceKey, verdict: Verdict) {
        let now = Instant::now();
        match verdict {
            Verdict::Done(generation) => {
                self.unblock(&service);
                self.queue.done(service.clone(), now);
                report(&self.reconciler, service, generation).await;
            }
            Verdict::Linger(generation, wait) => {
                self.unblock(&service);
                self.queue.later(service.clone(), wait, now);
                report(&self.reconciler, service, generation).await;
            }
            Verdict::Blocked(reason, err) => {
                let again = self.blocked.contains_key(&service);
                let wait = if again { BLOCKED_RETRY } else { FIRST_BLOCKED_RETRY };
                match reason {
                    // Kubernetes says when that changes.
                    Blocked::Namespace | Blocked::ForeignService => {
                        self.queue.later(service.clone(), wait, now);
                    }
                    Blocked::Forbidden | Blocked::Invalid => {
                        self.queue.refused(service.clone(), wait, REFUSED_REST.min(wait), now);
                    }
                }
                self.block(service, reason, &err);
            }
            Verdict::Failed(err) => {
                debug!(%service, %err, "not mirrored yet; trying again");
                if matches!(err, Fault::Unknown(_) | Fault::Server(_)) {
                    self.doubtful.insert(service.clone());
                }
                self.queue.failed(service, now);
            }
        }
    }

    fn block(&mut self, service: ServiceKey, reason: Blocked, err: &str) {
        let before = self.blocked.insert(service.clone(), reason);
        if before == Some(reason) {
            return;
        }
        warn!(%service, "cannot be mirrored: {err}; DNS goes on, and it is tried again");
        let metrics = &self.reconciler.metrics.mirror;
        before.into_iter().for_each(|before| metrics.blocked(before, false));
        metrics.blocked(reason, true);
        // A namespace that is not there takes no events.
        if reason != Blocked::Namespace {
            self.publish(&service, reason, err);
        }
    }

    fn unblock(&mut self, service: &ServiceKey) {
        if let Some(reason) = self.blocked.remove(service) {
            self.reconciler.metrics.mirror.blocked(reason, false);
            tracing::info!(%service, "is mirrored again");
        }
    }

    /// Tells whoever looks at the Service with kubectl.
    fn publish(&mut self, service: &ServiceKey, reason: Blocked, err: &str) {
        let reason = match reason {
            Blocked::Namespace => "NamespaceAbsent",
            Blocked::ForeignService => "ForeignService",
            Blocked::Forbidden => "Forbidden",
            Blocked::Invalid => "Refused",
        };
        let event = Event {
            type_: EventType::Warning,
            reason: reason.into(),
            note: Some(format!("external instances are not mirrored: {err}").chars().take(NOTE).collect()),
            action: "Mirror".into(),
            secondary: None,
        };
        let regarding = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Service".into()),
            namespace: Some(service.namespace().into()),
            name: Some(service.name().into()),
            // `kubectl describe` looks for it.
            uid: self.reconciler.cluster.service_uid(service),
            ..ObjectReference::default()
        };
        if self.telling.len() >= MAX_EVENTS {
            return;
        }
        let (events, service) = (self.events.clone(), service.clone());
        self.telling.push(Box::pin(async move {
            match timeout(EVENT_TIMEOUT, events.publish(&event, &regarding)).await {
                Ok(Ok(())) => {}
                Ok(Err(err)) => debug!(%service, %err, "the event was not taken"),
                Err(_) => debug!(%service, "the event was not taken in time"),
            }
        }));
    }

    fn set_gauges(&self) {
        let lag = self.reconciler.registry.mirror_progress().lag();
        let metrics = &self.reconciler.metrics.mirror;
        metrics.behind.set(lag.services as u64);
        let age = lag.since.map_or(0, |since| UnixMillis::now().0.saturating_sub(since.0));
        metrics.lag_seconds.set(age as f64 / 1000.0);
        metrics.queue.set(self.queue.len() as u64);
    }
}

/// Whoever waits is told. At the end of a drain the registry is gone before the mirror, which goes
/// on with what it has to write; the store then compares once more at the next start.
async fn report(reconciler: &Reconciler, service: ServiceKey, generation: u64) {
    let _ = reconciler.registry.mirrored(vec![(service, generation)]).await;
}
