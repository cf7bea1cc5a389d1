//! One service: what stands in Kubernetes is made what is registered.
//!
//! 1. Only objects of ours are written: a Service that another owns, and slices of others, are
//!    never touched. A Service turned foreign loses our slices.
//! 2. Every PUT and DELETE names uid and resourceVersion; whoever was there before wins, is read,
//!    and the rest is planned again. After an answer that never came, what stands is read first.
//! 3. Nobody misses an endpoint in between: what is new is written before what is old is deleted.
//!
//! The result of a write is noted in [`Cluster`] at once; the watch says the same a moment later.

mod refused;

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{StreamExt as _, stream};
use k8s_openapi::{
    api::{
        core::v1::{Endpoints, Namespace, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use tokio::time::Instant;
use tracing::{info, warn};

use self::refused::{Refused, Step, is_refusal};
use super::{
    Options,
    client::{Fault, Requests, Version},
    cluster::{Cluster, NamespaceState, Observed, StandingService},
    endpoints, names, services,
    slices::{Request, Stamps, Standing, Write, plan},
};
use crate::{
    metrics::{Blocked, Metrics},
    model::{CowTree, Instance, ServiceKey, UnixMillis},
    registry::RegistryHandle,
};

/// Rounds of reading what another writer did, in one go.
const ROUNDS: usize = 4;

/// Writes of one service that are under way at once.
const WRITES_AT_ONCE: usize = 8;

/// How long a Service that is being deleted is left to itself, unless it changes.
const DELETED_LOOK: Duration = Duration::from_secs(30);

/// How a service stands after it was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// As it should be, up to this generation.
    Done(u64),
    /// As it should be, but there is more to do after a while.
    Linger(u64, Duration),
    /// It cannot be as it should be until something changes in the cluster.
    Blocked(Blocked, String),
    /// Something failed; to be tried again soon.
    Failed(Fault),
}

/// Makes services in Kubernetes what they are here.
#[derive(Debug)]
pub(super) struct Reconciler {
    pub(super) requests: Requests,
    pub(super) cluster: Arc<Cluster>,
    pub(super) registry: RegistryHandle,
    pub(super) metrics: Arc<Metrics>,
    pub(super) options: Options,
    /// Who writes, as it stands on every slice.
    pub(super) writer: String,
    /// Under which term.
    pub(super) term: u64,
    /// Services of ours without instances, and since when.
    empty: Mutex<HashMap<ServiceKey, Instant>>,
}

impl Reconciler {
    pub(super) fn new(
        requests: Requests,
        cluster: Arc<Cluster>,
        registry: RegistryHandle,
        metrics: Arc<Metrics>,
        options: Options,
        writer: String,
        term: u64,
    ) -> Self {
        Self { requests, cluster, registry, metrics, options, writer, term, empty: Mutex::default() }
    }

    /// Looks at `service`. `doubtful` says that the outcome of an earlier write is not known.
    pub(super) async fn reconcile(&self, service: &ServiceKey, doubtful: bool) -> Verdict {
        if doubtful && let Err(err) = self.read_again(service).await {
            // It stays doubtful.
            return Verdict::Failed(Fault::Unknown(err.to_string()));
        }
        for _ in 0..ROUNDS {
            // What is read after the generation contains it.
            let published = self.registry.catalog().generation();
            let held = self.registry.catalog().get(service).unwrap_or_default();
            let round = Round { service, generation: published.max(held.generation), instances: &held.instances };
            match self.round(&round).await {
                Ok(verdict) => return verdict,
                Err(Fault::Conflict | Fault::AlreadyExists | Fault::NotFound) => {}
                Err(Fault::NamespaceTerminating) => {
                    return Verdict::Blocked(Blocked::Namespace, Fault::NamespaceTerminating.to_string());
                }
                Err(err @ Fault::Forbidden(_)) => return Verdict::Blocked(Blocked::Forbidden, err.to_string()),
                Err(err @ Fault::Invalid(_)) => return Verdict::Blocked(Blocked::Invalid, err.to_string()),
                Err(err) => return Verdict::Failed(err),
            }
        }
        Verdict::Failed(Fault::Conflict)
    }

    async fn round(&self, round: &Round<'_>) -> Result<Verdict, Fault> {
        let observed = self.cluster.observe(round.service);
        let empty = round.instances.is_empty();
        match observed.namespace {
            NamespaceState::Active => {}
            NamespaceState::Absent | NamespaceState::Terminating if empty => {
                self.forget_empty(round.service);
                return Ok(Verdict::Done(round.generation));
            }
            NamespaceState::Absent if self.options.create_namespaces => self.create_namespace(round.service).await?,
            NamespaceState::Absent => {
                let err = format!("the namespace {} does not exist", round.service.namespace());
                return Ok(Verdict::Blocked(Blocked::Namespace, err));
            }
            NamespaceState::Terminating => {
                let err = format!("the namespace {} is being deleted", round.service.namespace());
                return Ok(Verdict::Blocked(Blocked::Namespace, err));
            }
            NamespaceState::Unknown => return Err(Fault::Unknown("the namespaces are not read yet".into())),
        }
        let uid = match &observed.service {
            StandingService::Unknown => return Err(Fault::Unknown("the Services are not read yet".into())),
            StandingService::Foreign => {
                self.withdraw(round, &observed).await?;
                self.forget_empty(round.service);
                return Ok(if empty {
                    Verdict::Done(round.generation)
                } else {
                    let err = "a Service of this name belongs to somebody else".into();
                    Verdict::Blocked(Blocked::ForeignService, err)
                });
            }
            StandingService::Absent if empty => {
                self.withdraw(round, &observed).await?;
                self.forget_empty(round.service);
                return Ok(Verdict::Done(round.generation));
            }
            StandingService::Absent => self.create_service(round).await?,
            StandingService::Ours(standing) if standing.metadata.deletion_timestamp.is_some() => {
                // A finalizer holds it: until it goes its slices are what they should be. Then the
                // watch says so, and it is created again.
                let uid = standing.metadata.uid.as_deref().unwrap_or_default();
                self.apply(round, &observed, self.plan(round, &observed, uid, false)).await?;
                return Ok(Verdict::Linger(round.generation, DELETED_LOOK));
            }
            StandingService::Ours(standing) => standing.metadata.uid.clone().unwrap_or_default(),
            StandingService::Joined { uid } => uid.to_string(),
        };
        let endpoints = match &observed.service {
            // It may have been ours; now it is for the owner to say what stands in it.
            StandingService::Joined { .. } => self.withdraw_endpoints(round, &observed).await?,
            _ => Ok(()),
        };
        // The slices first: what the Service itself says is for people and tools, and a server that
        // refuses it must not hold up the endpoints.
        self.apply(round, &observed, self.plan(round, &observed, &uid, false)).await?;
        endpoints?;
        if let StandingService::Ours(standing) = &observed.service
            && !empty
            && let Some(amended) = services::amend(standing, round.instances)
        {
            self.replace_service(round.service, &amended).await?;
        }
        if self.options.endpoints_object
            && matches!(observed.service, StandingService::Ours(_) | StandingService::Absent)
        {
            self.write_endpoints(round, &uid).await?;
        }
        match &observed.service {
            StandingService::Ours(standing) if empty => self.linger(round, standing).await,
            _ => {
                self.forget_empty(round.service);
                Ok(Verdict::Done(round.generation))
            }
        }
    }

    /// Takes away everything of ours under a service.
    async fn withdraw(&self, round: &Round<'_>, observed: &Observed) -> Result<(), Fault> {
        let endpoints = self.withdraw_endpoints(round, observed).await?;
        self.apply(round, observed, self.plan(round, observed, "", true)).await?;
        endpoints
    }

    /// The writes that are missing; `withdraw` takes everything away.
    fn plan(&self, round: &Round<'_>, observed: &Observed, uid: &str, withdraw: bool) -> Vec<Write> {
        let nothing = CowTree::default();
        let request = Request {
            service: round.service,
            service_uid: uid,
            max_endpoints: self.options.max_endpoints,
            publish_not_ready: self.options.publish_not_ready,
            stamps: Stamps {
                term: self.term,
                generation: round.generation,
                updated: UnixMillis::now(),
                writer: &self.writer,
            },
            occupied: &observed.occupied,
        };
        plan(&request, if withdraw { &nothing } else { round.instances }, &observed.slices)
    }

    /// Makes the writes: new slices several at once, then the others in their order, which is
    /// such that nobody misses an endpoint that moves. What went well is noted even if another
    /// failed; a refusal holds up only what its endpoints would move out of.
    async fn apply(&self, round: &Round<'_>, observed: &Observed, writes: Vec<Write>) -> Result<(), Fault> {
        let standing: HashMap<&str, &Standing> = observed.slices.iter().map(|slice| (&*slice.name, slice)).collect();
        let (creations, others): (Vec<_>, Vec<_>) =
            writes.into_iter().partition(|write| matches!(write, Write::Create(_)));
        let created = stream::iter(creations)
            .map(|write| async move {
                let done = self.write(round.service, &write, None).await;
                (Step { before: None, write }, done)
            })
            .buffer_unordered(WRITES_AT_ONCE)
            .collect::<Vec<_>>();
        let mut refused = Refused::default();
        for (step, done) in created.await {
            refused.note(&step, done)?;
        }
        let mut steps: VecDeque<Step<'_>> =
            others.into_iter().map(|write| Step { before: standing.get(write.name()).copied(), write }).collect();
        refused.hold_back(&mut steps);
        while let Some(step) = steps.pop_front() {
            let done = self.write(round.service, &step.write, step.before).await;
            if refused.note(&step, done)? {
                refused.hold_back(&mut steps);
            }
        }
        refused.err.map_or(Ok(()), Err)
    }

    /// Makes one write; `before` is what stands under its name.
    async fn write(&self, service: &ServiceKey, write: &Write, before: Option<&Standing>) -> Result<(), Fault> {
        let (namespace, name) = (service.namespace(), write.name());
        match write {
            Write::Create(slice) => match self.requests.create(namespace, slice).await {
                Ok(standing) => self.cluster.wrote_slice(&standing),
                Err(Fault::AlreadyExists) => {
                    self.read_slice(service, name, None).await?;
                    return Err(Fault::AlreadyExists);
                }
                Err(err) => return Err(err),
            },
            Write::Replace(slice) => match self.requests.replace(namespace, name, slice).await {
                Ok(standing) => {
                    self.cluster.wrote_slice(&standing);
                    if before.is_some_and(|before| before.digest.is_none()) {
                        self.metrics.mirror.repaired.inc();
                        warn!(%service, slice = name, "an EndpointSlice was changed by another hand; put right");
                    }
                }
                Err(err @ (Fault::Conflict | Fault::NotFound)) => {
                    self.read_slice(service, name, before).await?;
                    return Err(err);
                }
                Err(err) => return Err(err),
            },
            Write::Delete { uid, resource_version, .. } => {
                let version = Version { name, uid, resource_version };
                match self.requests.delete::<EndpointSlice>(namespace, version).await {
                    Ok(()) | Err(Fault::NotFound) => self.cluster.removed_slice(namespace, name, uid),
                    Err(Fault::Conflict) => {
                        self.read_slice(service, name, before).await?;
                        return Err(Fault::Conflict);
                    }
                    Err(err) => return Err(err),
                }
            }
        }
        Ok(())
    }

    /// Notes what stands under the name of a slice now; `before` is what was thought to.
    async fn read_slice(&self, service: &ServiceKey, name: &str, before: Option<&Standing>) -> Result<(), Fault> {
        match self.requests.get::<EndpointSlice>(service.namespace(), name).await {
            Ok(slice) => match Standing::read(&slice) {
                Some(standing) if standing.service == *service => self.cluster.wrote_slice(&slice),
                _ => {
                    if let Some(before) = before {
                        self.cluster.removed_slice(service.namespace(), name, &before.uid);
                    }
                    self.cluster.occupied(service, name);
                }
            },
            Err(Fault::NotFound) => {
                if let Some(before) = before {
                    self.cluster.removed_slice(service.namespace(), name, &before.uid);
                }
            }
            Err(err) => return Err(err),
        }
        Ok(())
    }

    /// Reads everything of a service anew: an earlier write may or may not have been carried out.
    async fn read_again(&self, service: &ServiceKey) -> Result<(), Fault> {
        self.read_service(service).await?;
        let labels = format!("{}={},{}={}", names::SERVICE_NAME, service.name(), names::MANAGED_BY, names::MANAGER);
        let found: Vec<EndpointSlice> = self.requests.list(service.namespace(), &labels).await?;
        let observed = self.cluster.observe(service);
        found.iter().for_each(|slice| self.cluster.wrote_slice(slice));
        // What is not in the list is gone, or another hand has changed its labels.
        for standing in &observed.slices {
            if !found.iter().any(|slice| slice.metadata.uid.as_deref() == Some(&standing.uid)) {
                self.read_slice(service, &standing.name, Some(standing)).await?;
            }
        }
        Ok(())
    }

    async fn read_service(&self, service: &ServiceKey) -> Result<(), Fault> {
        match self.requests.get::<Service>(service.namespace(), service.name()).await {
            Ok(standing) => self.cluster.wrote_service(&standing),
            Err(Fault::NotFound) => {
                if let StandingService::Ours(standing) = self.cluster.observe(service).service {
                    self.cluster.removed_service(service, standing.metadata.uid.as_deref().unwrap_or_default());
                }
            }
            Err(err) => return Err(err),
        }
        Ok(())
    }

    async fn create_namespace(&self, service: &ServiceKey) -> Result<(), Fault> {
        let name = service.namespace();
        let labels = Some([(names::SERVICE.to_owned(), names::OWNED.to_owned())].into());
        let metadata = ObjectMeta { name: Some(name.into()), labels, ..ObjectMeta::default() };
        match self.requests.create_namespace(&Namespace { metadata, ..Namespace::default() }).await {
            Ok(_) => info!(namespace = name, "created the namespace"),
            Err(Fault::AlreadyExists) => {}
            Err(err) => return Err(err),
        }
        Ok(())
    }

    /// Creates the Service and gives its uid.
    async fn create_service(&self, round: &Round<'_>) -> Result<String, Fault> {
        let service = services::desired(round.service, round.instances);
        match self.requests.create(round.service.namespace(), &service).await {
            Ok(standing) => {
                self.cluster.wrote_service(&standing);
                Ok(standing.metadata.uid.unwrap_or_default())
            }
            Err(Fault::AlreadyExists) => {
                self.read_service(round.service).await?;
                Err(Fault::AlreadyExists)
            }
            Err(err) => Err(err),
        }
    }

    async fn replace_service(&self, service: &ServiceKey, amended: &Service) -> Result<(), Fault> {
        match self.requests.replace(service.namespace(), service.name(), amended).await {
            Ok(standing) => {
                self.cluster.wrote_service(&standing);
                Ok(())
            }
            Err(err @ (Fault::Conflict | Fault::NotFound)) => {
                self.read_service(service).await?;
                Err(err)
            }
            Err(err) => Err(err),
        }
    }

    /// Takes away a Service that has been without instances for long enough.
    async fn linger(&self, round: &Round<'_>, standing: &Service) -> Result<Verdict, Fault> {
        let since = *self.empty().entry(round.service.clone()).or_insert_with(Instant::now);
        let left = self.options.linger.saturating_sub(since.elapsed());
        if !left.is_zero() {
            return Ok(Verdict::Linger(round.generation, left));
        }
        let ObjectMeta { uid, resource_version, .. } = &standing.metadata;
        let (uid, resource_version) = (uid.as_deref().unwrap_or_default(), resource_version.as_deref());
        let version =
            Version { name: round.service.name(), uid, resource_version: resource_version.unwrap_or_default() };
        match self.requests.delete::<Service>(round.service.namespace(), version).await {
            Ok(()) | Err(Fault::NotFound) => self.cluster.removed_service(round.service, uid),
            Err(Fault::Conflict) => {
                self.read_service(round.service).await?;
                return Err(Fault::Conflict);
            }
            Err(err) => return Err(err),
        }
        self.forget_empty(round.service);
        Ok(Verdict::Done(round.generation))
    }

    fn forget_empty(&self, service: &ServiceKey) {
        self.empty().remove(service);
    }

    fn empty(&self) -> std::sync::MutexGuard<'_, HashMap<ServiceKey, Instant>> {
        // Nothing panics while it holds the lock.
        self.empty.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The older Endpoints object. It is not watched: it is looked at whenever its service is.
    async fn write_endpoints(&self, round: &Round<'_>, uid: &str) -> Result<(), Fault> {
        let (namespace, name) = (round.service.namespace(), round.service.name());
        let desired = endpoints::desired(round.service, uid, round.instances, self.options.publish_not_ready);
        match self.requests.get::<Endpoints>(namespace, name).await {
            Ok(standing) if !is_ours(&standing.metadata) => Ok(()),
            Ok(standing) => match endpoints::amend(&standing, &desired) {
                Some(amended) => self.requests.replace(namespace, name, &amended).await.map(drop),
                None => Ok(()),
            },
            Err(Fault::NotFound) if round.instances.is_empty() => Ok(()),
            Err(Fault::NotFound) => self.requests.create(namespace, &desired).await.map(drop),
            Err(err) => Err(err),
        }
    }

    /// Takes away the Endpoints object of ours under a Service that is not, or no longer. A refusal
    /// is given back, for when everything else is done. Most Services of a cluster never were ours,
    /// and are not asked about.
    async fn withdraw_endpoints(&self, round: &Round<'_>, observed: &Observed) -> Result<Result<(), Fault>, Fault> {
        let lingers = self.empty().contains_key(round.service);
        let something = lingers || !observed.slices.is_empty() || !round.instances.is_empty();
        if !self.options.endpoints_object || !something {
            return Ok(Ok(()));
        }
        match self.delete_endpoints(round.service).await {
            Err(err) if !is_refusal(&err) => Err(err),
            done => Ok(done),
        }
    }

    async fn delete_endpoints(&self, service: &ServiceKey) -> Result<(), Fault> {
        let standing = match self.requests.get::<Endpoints>(service.namespace(), service.name()).await {
            Ok(standing) if is_ours(&standing.metadata) => standing,
            Ok(_) | Err(Fault::NotFound) => return Ok(()),
            Err(err) => return Err(err),
        };
        let ObjectMeta { uid, resource_version, .. } = &standing.metadata;
        let (uid, resource_version) = (uid.as_deref().unwrap_or_default(), resource_version.as_deref());
        let version = Version { name: service.name(), uid, resource_version: resource_version.unwrap_or_default() };
        match self.requests.delete::<Endpoints>(service.namespace(), version).await {
            Err(Fault::NotFound) => Ok(()),
            done => done,
        }
    }
}

/// What one round goes by.
struct Round<'a> {
    service: &'a ServiceKey,
    generation: u64,
    instances: &'a CowTree<Arc<Instance>>,
}

fn is_ours(meta: &ObjectMeta) -> bool {
    services::Ownership::of(meta) == services::Ownership::Ours
}
