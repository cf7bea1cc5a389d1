//! All registered services in order, exactly as of one generation, for lists.
//!
//! A snapshot of a million services takes a second to copy and sort and some 50 MB to hold. So lists
//! share: one snapshot is built at a time, all lists that wait meanwhile share the next one, and only a
//! few lists are sent at once. If the client of a list disconnects, the build stops.
//!
//! The catalog changes while it is read: each service is returned as it was at some moment of the read,
//! each at another moment, and a removed service is missing. So the feed is read from a generation
//! *before* the read of the catalog to one *after* every change that the read can have seen, and the
//! last change of each instance replaces the instance as it was read. An instance that did not change
//! meanwhile was the same at every moment of the read. The result is the state as of the generation to
//! which the feed was read; the next batch of the feed follows it.

use std::{
    collections::HashMap,
    ops::Deref,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::{Mutex, OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Batch, Catalog, Feed, Lagged};
use crate::{
    metrics::{GaugeGuard, Metrics},
    model::{InstanceChange, Service, ServiceKey},
};

/// How many lists are sent and wait.
#[derive(Debug, Clone, Copy)]
struct ListLimits {
    /// Lists that are sent at once, over gRPC and HTTP together. While services change, each list may
    /// hold a snapshot of its own: about 50 bytes per service.
    lists: usize,
    /// Lists that wait for a permit; the next one is refused.
    queued: usize,
    /// How long a list waits for a permit before it is refused.
    queue_timeout: Duration,
}

const LIMITS: ListLimits = ListLimits { lists: 8, queued: 64, queue_timeout: Duration::from_secs(10) };

/// Services of a snapshot above which it is freed on a thread for blocking work: freeing takes some
/// 0.1 µs per service, and its last reader runs in the task of a connection.
const MAX_INLINE_DROP: usize = 10_000;

/// Services in order of namespace and name.
type Services = Vec<(ServiceKey, Service)>;

/// The registered services as of one generation.
#[derive(Debug, Default)]
pub struct Snapshot {
    services: Services,
    generation: u64,
}

impl Snapshot {
    /// The generation as of which the snapshot is exact.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// All services, in order of namespace and name.
    #[must_use]
    pub fn services(&self) -> &[(ServiceKey, Service)] {
        &self.services
    }

    /// The services of one namespace, as a range of [`Snapshot::services`].
    #[must_use]
    pub fn namespace(&self, namespace: &str) -> std::ops::Range<usize> {
        let below = |(key, _): &(ServiceKey, Service)| key.namespace() < namespace;
        let start = self.services.partition_point(below);
        // Sorted by namespace first, so that a namespace is one range, found without a look at the others.
        let len = self.services[start..].partition_point(|(key, _)| key.namespace() == namespace);
        start..start + len
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        if self.services.len() > MAX_INLINE_DROP
            && let Ok(runtime) = Handle::try_current()
        {
            let services = std::mem::take(&mut self.services);
            drop(runtime.spawn_blocking(move || drop(services)));
        }
    }
}

/// A snapshot with the permit to send it: other lists wait until this value is dropped.
#[derive(Debug)]
pub struct List {
    snapshot: Arc<Snapshot>,
    _permit: ListPermit,
}

impl Deref for List {
    type Target = Snapshot;

    fn deref(&self) -> &Snapshot {
        &self.snapshot
    }
}

/// Why there is no list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    /// Too many lists are being sent and wait already, or the wait timed out.
    #[error("too many lists are being sent and wait already; try again later")]
    Overloaded,
    /// More changes happened during the read of the catalog than the feed keeps.
    #[error(transparent)]
    Lagged(#[from] Lagged),
    /// The thread that reads the catalog panicked or was cancelled.
    #[error("the catalog could not be read: {0}")]
    Failed(String),
}

/// Builds snapshots and limits the lists that are sent.
#[derive(Debug)]
pub struct Snapshots {
    catalog: Arc<Catalog>,
    feed: Arc<Feed>,
    metrics: Arc<Metrics>,
    lists: Arc<Semaphore>,
    queue: Semaphore,
    queue_timeout: Duration,
    latest: Mutex<Latest>,
    /// Builds that have begun.
    begun: AtomicU64,
}

/// The snapshot that was built last.
#[derive(Debug)]
struct Latest {
    snapshot: Weak<Snapshot>,
    build: u64,
    /// Earliest start of the next build, so that builds take half of one core at most.
    not_before: Instant,
}

impl Snapshots {
    pub(super) fn new(catalog: Arc<Catalog>, feed: Arc<Feed>, metrics: Arc<Metrics>) -> Self {
        Self::within(LIMITS, catalog, feed, metrics)
    }

    fn within(limits: ListLimits, catalog: Arc<Catalog>, feed: Arc<Feed>, metrics: Arc<Metrics>) -> Self {
        Self {
            catalog,
            feed,
            metrics,
            lists: Arc::new(Semaphore::new(limits.lists)),
            queue: Semaphore::new(limits.queued),
            queue_timeout: limits.queue_timeout,
            latest: Mutex::new(Latest { snapshot: Weak::new(), build: 0, not_before: Instant::now() }),
            begun: AtomicU64::new(0),
        }
    }

    /// Waits for a permit and returns all registered services, not older than this call. Cancelling
    /// stops the build.
    ///
    /// # Errors
    /// When too many lists wait, after 10 s of waiting, or when the catalog cannot be read.
    pub async fn list(&self) -> Result<List, ListError> {
        let permit = self.permit().await?;
        Ok(List { snapshot: self.latest().await?, _permit: permit })
    }

    /// A snapshot of one service; empty if there is no such service. Needs no permit: the snapshot is one
    /// reference.
    ///
    /// # Errors
    /// When more changes happened during the call than the feed keeps.
    pub async fn service(&self, key: &ServiceKey) -> Result<Snapshot, Lagged> {
        let mut feed = self.feed.subscribe(self.catalog.generation());
        let found = self.catalog.get(key).map(|service| (key.clone(), service));
        let mut services: Services = found.into_iter().collect();
        // Everything that the read can have seen a part of is in the feed by then, and replaces what was read.
        let missed = feed.read_until(self.catalog.newest_visible()).await?;
        settle(&mut services, &missed, |changed| changed == key);
        Ok(Snapshot { services, generation: feed.seen() })
    }

    /// Waits for the permit to send a list. A caller that sends as much as a list needs a permit too.
    ///
    /// # Errors
    /// When too many lists wait, or after 10 s of waiting.
    pub async fn permit(&self) -> Result<ListPermit, ListError> {
        self.next_permit().await.inspect_err(|_| {
            self.metrics.lists.rejected.inc();
        })
    }

    async fn next_permit(&self) -> Result<ListPermit, ListError> {
        // Semaphores are fair: this succeeds only if nobody waits, so no list overtakes the queue.
        if let Ok(permit) = Arc::clone(&self.lists).try_acquire_owned() {
            return Ok(ListPermit::new(permit, &self.metrics));
        }
        let Ok(_queued) = self.queue.try_acquire() else { return Err(ListError::Overloaded) };
        let _gauge = GaugeGuard::new(&self.metrics.lists.queued);
        match timeout(self.queue_timeout, Arc::clone(&self.lists).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(ListPermit::new(permit, &self.metrics)),
            Ok(Err(_)) | Err(_) => Err(ListError::Overloaded),
        }
    }

    /// A snapshot that is not older than this call.
    async fn latest(&self) -> Result<Arc<Snapshot>, ListError> {
        // Read before the lock: a build that begins after this line sees everything that was acknowledged before the call.
        let begun = self.begun.load(Ordering::Acquire);
        // Locked until the build is over: lists that come meanwhile wait here and share the next build.
        let mut latest = self.latest.lock().await;
        if let Some(snapshot) = latest.snapshot.upgrade() {
            // Either nothing has changed since the build, or the build began after this call.
            let current = snapshot.generation == self.catalog.generation();
            if current || latest.build > begun {
                return Ok(snapshot);
            }
        }
        sleep_until(latest.not_before).await;
        // Pairs with the load above: a call that reads this number came after the build had begun, and must not use it.
        let build = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let started = Instant::now();
        self.metrics.lists.snapshots.inc();
        let built = self.build().await;
        latest.not_before = Instant::now() + started.elapsed();
        let snapshot = Arc::new(built?);
        // Weak: a snapshot lives as long as a list is sent from it, and 50 MB are not kept for the next one.
        latest.snapshot = Arc::downgrade(&snapshot);
        latest.build = build;
        Ok(snapshot)
    }

    async fn build(&self) -> Result<Snapshot, ListError> {
        let failed = |err: tokio::task::JoinError| ListError::Failed(err.to_string());
        let mut feed = self.feed.subscribe(self.catalog.generation());
        let mut missed = Vec::new();
        let mut services = {
            let cancelled = CancellationToken::new();
            // Dropping this future drops the guard, and the thread stops within a thousand services.
            let _cancel = cancelled.clone().drop_guard();
            let catalog = Arc::clone(&self.catalog);
            let reading = spawn_blocking(move || catalog.sorted(&|| cancelled.is_cancelled()));
            let mut reading = std::pin::pin!(reading);
            loop {
                tokio::select! {
                    services = &mut reading => break services.map_err(failed)?,
                    // During the read, not after it: a read of a second may take longer than the ring keeps changes.
                    batch = feed.next() => missed.push(batch?),
                }
            }
        };
        missed.extend(feed.read_until(self.catalog.newest_visible()).await?);
        if !missed.is_empty() {
            let settled = spawn_blocking(move || {
                settle(&mut services, &missed, |_| true);
                services
            });
            services = settled.await.map_err(failed)?;
        }
        Ok(Snapshot { services, generation: feed.seen() })
    }
}

#[cfg(test)]
impl Snapshots {
    /// Lists of `catalog`, which does not change, for tests of their senders.
    pub(crate) fn of(catalog: Arc<Catalog>, metrics: Arc<Metrics>) -> Self {
        let newest = catalog.services().into_iter().map(|(_, service)| service.generation).max().unwrap_or(0);
        let feed = Arc::new(Feed::new());
        feed.start_after(newest);
        catalog.begin_generation(newest);
        catalog.set_generation(newest);
        Self::new(catalog, feed, metrics)
    }
}

/// The permit to send a list, until it is dropped.
#[derive(Debug)]
pub struct ListPermit {
    _permit: OwnedSemaphorePermit,
    _open: GaugeGuard,
}

impl ListPermit {
    fn new(permit: OwnedSemaphorePermit, metrics: &Metrics) -> Self {
        Self { _permit: permit, _open: GaugeGuard::new(&metrics.lists.open) }
    }
}

/// Applies the changes in `missed` to the services that were read. `services` is sorted, before and
/// after.
fn settle(services: &mut Services, missed: &[Arc<Batch>], wanted: impl Fn(&ServiceKey) -> bool) {
    let mut changed: HashMap<&ServiceKey, Vec<(&InstanceChange, u64)>> = HashMap::new();
    for batch in missed {
        for event in batch.events.iter().filter(|event| wanted(&event.service)) {
            changed.entry(&event.service).or_default().push((&event.change, batch.generation));
        }
    }
    let (mut added, mut emptied) = (Services::new(), false);
    for (key, changes) in changed {
        // What the read saw of the service may be from the middle of the missed changes. Each change sets an instance
        // as a whole, so repeating the earlier ones does no harm: the last one decides.
        if let Ok(index) = services.binary_search_by(|(found, _)| found.cmp(key)) {
            let (_, service) = &mut services[index];
            apply(service, &changes);
            emptied |= service.instances.is_empty();
        } else {
            let mut service = Service::default();
            apply(&mut service, &changes);
            if !service.instances.is_empty() {
                added.push((key.clone(), service));
            }
        }
    }
    if emptied {
        services.retain(|(_, service)| !service.instances.is_empty());
    }
    if !added.is_empty() {
        services.append(&mut added);
        // The stable sort merges two sorted runs in one pass.
        services.sort_by(|(a, _), (b, _)| a.cmp(b));
    }
}

fn apply(service: &mut Service, changes: &[(&InstanceChange, u64)]) {
    for (InstanceChange { before, after }, generation) in changes {
        match (before, after) {
            (_, Some(after)) => drop(service.instances.put(Arc::clone(after))),
            (Some(before), None) => drop(service.instances.remove(&before.key())),
            (None, None) => {}
        }
        service.generation = service.generation.max(*generation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{InstanceSpec, UnixMillis, Validator},
        registry::Event,
    };

    const VALIDATOR: Validator = Validator { zone_wire_len: 15, names_allowed: false };

    fn snapshots(limits: ListLimits, services: usize) -> Snapshots {
        let services = (0..services).map(|n| {
            let key = VALIDATOR.service(["a", "b"][n % 2], &format!("s{n}")).expect("valid");
            let spec = InstanceSpec { address: "10.0.0.1".into(), ..InstanceSpec::default() };
            let instance = VALIDATOR.instance(&key, &spec, UnixMillis(1)).expect("valid");
            (key, Service { instances: [Arc::new(instance)].into_iter().collect(), generation: 0 })
        });
        let catalog = Arc::new(Catalog::of(services));
        Snapshots::within(limits, catalog, Arc::new(Feed::new()), Arc::new(Metrics::new()))
    }

    /// Snapshots of a catalog with one service, as of generation 1, and the service.
    fn one_service() -> (Snapshots, ServiceKey, Service) {
        let snapshots = snapshots(LIMITS, 1);
        let (key, service) = snapshots.catalog.services().remove(0);
        snapshots.catalog.begin_generation(1);
        snapshots.catalog.set_generation(1);
        snapshots.feed.start_after(1);
        (snapshots, key, service)
    }

    /// A service that is gone shows no generation, so only the begin of its removal tells that it is newer.
    #[tokio::test]
    async fn removal_that_is_being_applied_belongs_to_its_own_generation() {
        let (snapshots, key, service) = one_service();
        snapshots.catalog.begin_generation(2);
        snapshots.catalog.set(key.clone(), Service::default());
        let (mut one, mut list) = (Box::pin(snapshots.service(&key)), Box::pin(snapshots.list()));
        assert!(futures::poll!(&mut one).is_pending());
        assert!(futures::poll!(&mut list).is_pending());

        let before = service.instances.iter().next().cloned();
        let event =
            Event { service: key.clone(), change: InstanceChange { before, after: None }, received: UnixMillis(1) };
        snapshots.catalog.set_generation(2);
        snapshots.feed.push(Batch {
            generation: 2,
            events: vec![event],
            durable: UnixMillis(1),
            visible: UnixMillis(1),
            acknowledged: UnixMillis(1),
        });
        let (one, list) = (one.await.expect("the feed has it"), list.await.expect("a permit"));
        assert_eq!((one.generation(), one.services().len()), (2, 0));
        assert_eq!((list.generation(), list.services().len()), (2, 0));
    }

    /// A registration that is repeated takes a generation in which nothing changes.
    #[tokio::test]
    async fn list_during_a_generation_without_changes_ends() {
        let (snapshots, key, _) = one_service();
        snapshots.catalog.begin_generation(2);
        let (mut one, mut list) = (Box::pin(snapshots.service(&key)), Box::pin(snapshots.list()));
        assert!(futures::poll!(&mut one).is_pending());
        assert!(futures::poll!(&mut list).is_pending());
        snapshots.catalog.set_generation(2);
        snapshots.feed.skip(2);
        let (one, list) = (one.await.expect("the feed has it"), list.await.expect("a permit"));
        assert_eq!((one.generation(), one.services().len()), (2, 1));
        assert_eq!((list.generation(), list.services().len()), (2, 1));
    }

    #[tokio::test]
    async fn lists_of_one_generation_share_one_snapshot() {
        let snapshots = snapshots(LIMITS, 100);
        let lists = futures::future::join_all((0..LIMITS.lists).map(|_| snapshots.list())).await;
        let lists: Vec<List> = lists.into_iter().collect::<Result<_, _>>().expect("a permit for each");
        assert!(lists.iter().all(|list| Arc::ptr_eq(&list.snapshot, &lists[0].snapshot)));
        assert_eq!(snapshots.metrics.lists.snapshots.get(), 1);
        assert!(lists[0].services().is_sorted_by(|(a, _), (b, _)| a < b));
        let b = lists[0].namespace("b");
        assert_eq!(b, 50..100);
        assert!(lists[0].services()[b].iter().all(|(key, _)| key.namespace() == "b"));
        assert_eq!(lists[0].namespace("c"), 100..100);
    }

    #[tokio::test]
    async fn lists_beyond_the_limit_wait_and_beyond_the_queue_are_refused() {
        let limits = ListLimits { lists: 2, queued: 3, queue_timeout: Duration::from_secs(60) };
        let snapshots = snapshots(limits, 1);
        let first = snapshots.list().await.expect("a permit");
        let _second = snapshots.list().await.expect("a permit");
        let mut queued: Vec<_> = (0..3).map(|_| Box::pin(snapshots.list())).collect();
        for list in &mut queued {
            assert!(futures::poll!(list).is_pending());
        }
        assert_eq!(snapshots.metrics.lists.queued.get(), 3);
        assert_eq!(snapshots.list().await.expect_err("the queue is full"), ListError::Overloaded);
        assert_eq!(snapshots.metrics.lists.rejected.get(), 1);

        // The permit of a list that ends goes to the next one; a cancelled wait frees its place in the queue.
        drop(first);
        let third = queued.remove(0).await.expect("it has the permit");
        assert_eq!(snapshots.metrics.lists.open.get(), 2);
        drop(queued.pop());
        assert_eq!(snapshots.metrics.lists.queued.get(), 1);
        drop((queued, third));
        assert_eq!(snapshots.metrics.lists.queued.get(), 0);
        assert_eq!(snapshots.metrics.lists.open.get(), 1);
    }

    #[tokio::test]
    async fn list_that_waits_too_long_is_refused() {
        let limits = ListLimits { lists: 1, queued: 1, queue_timeout: Duration::from_millis(10) };
        let snapshots = snapshots(limits, 1);
        let _open = snapshots.list().await.expect("a permit");
        assert_eq!(snapshots.list().await.expect_err("no list ends"), ListError::Overloaded);
        assert_eq!(snapshots.metrics.lists.queued.get(), 0);
    }
}
