//! Writes what is registered into Kubernetes: a controller with a [`WorkQueue`] of services and a
//! bounded number of concurrent reconciles.

mod reconcile;
mod work_queue;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

pub(super) use self::reconcile::Reconciler;
use self::{
    reconcile::ReconcileOutcome,
    work_queue::{Priority, WorkQueue},
};
use crate::{
    kubernetes::{api::ApiError, cache::ChangedKey},
    metrics::BlockedService,
    model::{ServiceKey, UnixMillis, Validator},
    registry::{DirtyServices, RefusedWord, WordRefusal},
};

/// When a service is retried that waits for its namespace or for its name. The watch reports both.
const BLOCKED_BACKOFF: Duration = Duration::from_secs(30);

/// How long the mirror waits for more instances of a service that are registered again as they were: registrants that repeat
/// themselves every few seconds share the writes of their slices. Short beside the second for which an answer waits.
const REPEAT_DELAY: Duration = Duration::from_millis(300);

/// How long the mirror waits for more names of a service that lead elsewhere: a service of many names is written once.
const RESOLVED_DELAY: Duration = Duration::from_secs(1);

const GAUGE_INTERVAL: Duration = Duration::from_secs(1);

/// Longest note of an Event, in characters (events.k8s.io allows 1024 bytes).
const MAX_NOTE_CHARS: usize = 250;

/// How long publishing an Event may take. Nothing waits for Events.
const EVENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Events that are being published at once; further ones are dropped.
const MAX_PENDING_EVENTS: usize = 64;

/// What the mirror writes, and how. See the flags of `serve`.
#[derive(Debug, Clone)]
pub(super) struct MirrorOptions {
    pub(super) create_namespaces: bool,
    /// 1..=1000
    pub(super) max_endpoints: usize,
    pub(super) endpoints_object: bool,
    pub(super) linger: Duration,
    pub(super) publish_not_ready: bool,
    pub(super) flatten_names: bool,
    /// Checks what is read from slices.
    pub(super) validator: Validator,
}

/// Why Kubernetes cannot show a service now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BlockReason {
    /// Its namespace does not exist or is being deleted.
    Namespace,
    /// The name belongs to a Service of another owner.
    ForeignService,
    /// A right is missing, or an admission policy refuses an object.
    Forbidden,
    /// The API server refuses an object.
    Invalid,
    /// An admission webhook fails.
    Webhook,
}

impl BlockReason {
    fn label(self) -> BlockedService {
        match self {
            Self::Namespace => BlockedService::Namespace,
            Self::ForeignService => BlockedService::ForeignService,
            Self::Forbidden => BlockedService::Forbidden,
            Self::Invalid => BlockedService::Invalid,
            Self::Webhook => BlockedService::Webhook,
        }
    }

    fn event_reason(self) -> &'static str {
        match self {
            Self::Namespace => "NamespaceAbsent",
            Self::ForeignService => "ForeignService",
            Self::Forbidden => "Forbidden",
            Self::Invalid => "Refused",
            Self::Webhook => "WebhookFailed",
        }
    }
}

/// The controller.
pub(super) struct Mirror {
    reconciler: Arc<Reconciler>,
    events: Recorder,
    /// The Lease, which Events are about where there is no Service.
    lease: ObjectReference,
    publishing: FuturesUnordered<BoxFuture<'static, ()>>,
    queue: WorkQueue,
    /// Services that Kubernetes cannot show, and why.
    blocked: HashMap<ServiceKey, BlockReason>,
    /// Services with a write that may or may not have been carried out.
    outcome_unknown: HashSet<ServiceKey>,
}

impl std::fmt::Debug for Mirror {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mirror").field("queue", &self.queue.len()).field("blocked", &self.blocked.len()).finish()
    }
}

impl Mirror {
    pub(super) fn new(reconciler: Reconciler, events: Recorder, lease: ObjectReference) -> Self {
        Self {
            reconciler: Arc::new(reconciler),
            events,
            lease,
            publishing: FuturesUnordered::new(),
            queue: WorkQueue::default(),
            blocked: HashMap::new(),
            outcome_unknown: HashSet::new(),
        }
    }

    /// Runs until `stop`. Begins with every service that is registered, was removed lately, has objects of ours, or has changed:
    /// the mirror before this one may have taken a service and not have written it.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let registry = self.reconciler.registry.clone();
        let mut services = registry.services_to_mirror();
        services.extend(self.reconciler.cache.managed_services());
        self.add(services, Priority::Resync);

        let mirror_progress = Arc::clone(registry.mirror_progress());
        // What was unmirrored at the start: nobody waits for that any more.
        let DirtyServices { changed, repeated, merged, resolved: _ } =
            mirror_progress.take_dirty().now_or_never().unwrap_or_default();
        self.add(changed.into_iter().chain(repeated).chain(merged), Priority::Resync);
        let cluster = Arc::clone(&self.reconciler.cache);
        // What changed while this process did not write: as many as there are services.
        self.changed(cluster.changed().now_or_never().unwrap_or_default(), Priority::Resync);
        let mut gauges = interval(GAUGE_INTERVAL);
        gauges.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut running = FuturesUnordered::new();
        loop {
            while let Some(service) = self.queue.next(Instant::now()) {
                let (reconciler, outcome_unknown) =
                    (Arc::clone(&self.reconciler), self.outcome_unknown.remove(&service));
                running.push(async move {
                    let outcome = reconciler.reconcile(&service, outcome_unknown).await;
                    (service, outcome)
                });
            }
            let due = self.queue.next_due();
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some((service, outcome)) = running.next(), if !running.is_empty() => {
                    self.handle_outcome(service, outcome).await;
                }
                Some(()) = self.publishing.next(), if !self.publishing.is_empty() => {}
                dirty = mirror_progress.take_dirty() => self.dirty(dirty),
                refused = registry.refused_words().take() => self.refused(refused),
                changed = cluster.changed() => self.changed(changed, Priority::Edited),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                _ = gauges.tick() => self.set_gauges(),
            }
        }
    }

    fn dirty(&mut self, DirtyServices { changed, repeated, merged, resolved }: DirtyServices) {
        self.add(changed, Priority::Live);
        // Another process keeps them until they are written, and no registrant waits.
        self.add(merged, Priority::Merged);
        let now = Instant::now();
        repeated.into_iter().for_each(|service| self.queue.add_within(service, Priority::Live, REPEAT_DELAY, now));
        resolved.into_iter().for_each(|service| self.queue.add_within(service, Priority::Edited, RESOLVED_DELAY, now));
    }

    fn add(&mut self, services: impl IntoIterator<Item = ServiceKey>, priority: Priority) {
        let now = Instant::now();
        services.into_iter().for_each(|service| self.queue.add(service, priority, now));
    }

    /// Queues the services that changed in the cluster; for a namespace, those in it that are registered or of which a removal is
    /// remembered.
    fn changed(&mut self, changed: Vec<ChangedKey>, priority: Priority) {
        let mut namespaces = HashSet::new();
        for changed in changed {
            match changed {
                ChangedKey::Service(service) => self.add([service], priority),
                ChangedKey::Namespace(namespace) => drop(namespaces.insert(namespace)),
                ChangedKey::Annotation { namespace, annotation } => self.invalid_annotation(&namespace, annotation),
            }
        }
        if !namespaces.is_empty() {
            let mut inside = self.reconciler.registry.catalog().known_services();
            inside.retain(|service| namespaces.contains(service.namespace()));
            self.add(inside, priority);
        }
    }

    async fn handle_outcome(&mut self, service: ServiceKey, outcome: ReconcileOutcome) {
        let now = Instant::now();
        match outcome {
            ReconcileOutcome::Done(generation) => {
                self.unblock(&service);
                self.queue.done(&service, now);
                report(&self.reconciler, service, generation).await;
            }
            ReconcileOutcome::RequeueAfter(generation, wait) => {
                self.unblock(&service);
                self.queue.requeue_after(&service, wait, now);
                report(&self.reconciler, service, generation).await;
            }
            ReconcileOutcome::Blocked(reason, err) => {
                // Refused objects back off one by one; the service may change meanwhile.
                let wait = self.reconciler.retry_refused_after(&service).unwrap_or(BLOCKED_BACKOFF);
                self.queue.requeue_after(&service, wait, now);
                self.block(service, reason, &err);
            }
            ReconcileOutcome::Failed(err) => {
                debug!(%service, %err, "not mirrored yet; will be retried");
                let no_result = matches!(err, ApiError::Unknown(_) | ApiError::TimedOut | ApiError::Server(_));
                if no_result {
                    self.outcome_unknown.insert(service.clone());
                }
                self.queue.failed(&service, no_result, now);
            }
        }
    }

    fn block(&mut self, service: ServiceKey, reason: BlockReason, err: &str) {
        let before = self.blocked.insert(service.clone(), reason);
        if before == Some(reason) {
            return;
        }
        warn!(%service, "cannot be mirrored: {err}; DNS answers, and the mirror retries");
        let metrics = &self.reconciler.metrics.mirror;
        before.into_iter().for_each(|before| metrics.blocked(before.label(), false));
        metrics.blocked(reason.label(), true);
        // There can be no Event in a namespace that does not exist.
        if reason != BlockReason::Namespace {
            let (regarding, note) = (self.regarding(&service), format!("external instances are not mirrored: {err}"));
            self.publish(service.to_string().into(), regarding, reason.event_reason(), &note);
        }
    }

    fn unblock(&mut self, service: &ServiceKey) {
        if let Some(reason) = self.blocked.remove(service) {
            self.reconciler.metrics.mirror.blocked(reason.label(), false);
            tracing::info!(%service, "is mirrored again");
        }
    }

    /// Tells of words that do not count.
    fn refused(&mut self, words: Vec<RefusedWord>) {
        let mut by_service: BTreeMap<(ServiceKey, WordRefusal), Vec<String>> = BTreeMap::new();
        for RefusedWord { service, id, reason } in words {
            by_service.entry((service, reason)).or_default().push(id.to_string());
        }
        for ((service, reason), instances) in by_service {
            let (count, instances) = (instances.len(), instances.join(", "));
            let note = match reason {
                WordRefusal::TooOld => format!(
                    "{service}: registrations that Kubernetes never had are too old to count and have to be made again: {count} \
                     ({instances})"
                ),
                _ => format!(
                    "{service}: what another process accepted is {reason} and has to be said again: {count} ({instances})"
                ),
            };
            let known = self.reconciler.cache.service_uid(&service).is_some();
            let regarding = if known { self.regarding(&service) } else { self.lease.clone() };
            let event = if reason == WordRefusal::TooOld { "RegistrationTooOld" } else { "RegistrationRefused" };
            self.publish(service.to_string().into(), regarding, event, &note);
        }
    }

    /// Tells of a namespace's annotation, in the namespace, where its owner looks.
    fn invalid_annotation(&mut self, namespace: &str, annotation: &'static str) {
        let regarding = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Namespace".into()),
            namespace: Some(namespace.into()),
            name: Some(namespace.into()),
            uid: self.reconciler.cache.namespace_uid(namespace),
            ..ObjectReference::default()
        };
        let note = format!(
            "the annotation {annotation} is invalid: nothing new is registered in {namespace} until it is corrected"
        );
        self.publish(namespace.into(), regarding, "InvalidAnnotation", &note);
    }

    /// The Service, as the object of an Event.
    fn regarding(&self, service: &ServiceKey) -> ObjectReference {
        ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Service".into()),
            namespace: Some(service.namespace().into()),
            name: Some(service.name().into()),
            // `kubectl describe` selects Events by uid.
            uid: self.reconciler.cache.service_uid(service),
            ..ObjectReference::default()
        }
    }

    /// Publishes a warning about an object.
    fn publish(&mut self, about: Box<str>, regarding: ObjectReference, reason: &str, note: &str) {
        let event = Event {
            type_: EventType::Warning,
            reason: reason.into(),
            note: Some(note.chars().take(MAX_NOTE_CHARS).collect()),
            action: "Mirror".into(),
            secondary: None,
        };
        if self.publishing.len() >= MAX_PENDING_EVENTS {
            return;
        }
        let events = self.events.clone();
        self.publishing.push(Box::pin(async move {
            match timeout(EVENT_TIMEOUT, events.publish(&event, &regarding)).await {
                Ok(Ok(())) => {}
                Ok(Err(err)) => debug!(%about, %err, "the Event was not published"),
                Err(_) => debug!(%about, "the Event was not published in time"),
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

/// Reports the mirrored generation to the registry. At the end of a drain the registry ends before
/// the mirror, which finishes its writes; the next start compares again.
async fn report(reconciler: &Reconciler, service: ServiceKey, generation: u64) {
    let _ = reconciler.registry.mirrored(vec![(service, generation)]).await;
}
