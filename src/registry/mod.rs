//! The registry: the one place where anything changes.
//!
//! Changes are submitted as [`Command`]s to the [`RegistryHandle`]. One writer takes all queued
//! commands as one batch and makes the batch durable, then visible, then acknowledged, in this order.
//! Readers use the [`Catalog`] and never wait for the writer.
//!
//! There are two ways to follow changes, because followers need different things:
//!
//! - The change feed ([`Feed`]) has every change, in order of generation. It is bounded: a reader
//!   that falls behind gets an error and starts again. gRPC's watches read it.
//! - The mirror's dirty set ([`MirrorProgress`]) has the services whose latest change is not in
//!   Kubernetes, each once however often it changed, like a work queue of client-go. It never
//!   overflows, has no order, and does not contain the changes: the mirror reads the catalog. It also
//!   has the responses that wait for Kubernetes, so the writer marks a service before it answers.
//!
//! The applier (`apply.rs`) adds a change to both, after the change is in the catalog. The writer also
//! marks a service as dirty when it journals an instance without a change (`decide.rs`).
//!
//! With Kubernetes, the mirror sends the registry facts about the cluster ([`ClusterFact`]) and the
//! contents of the EndpointSlices at the take-over ([`KubernetesState`]), and confirms the services that it
//! has written. While another process writes, the registry shows what that process wrote
//! ([`FollowedServices`]). The registry depends on Kubernetes in no other way. What it accepted before, and Kubernetes
//! lacks, is handed over to that process ([`OutboxWord`]).

mod address_rules;
mod apply;
mod batch_limit;
mod catalog;
mod clock_repair;
mod cluster_facts;
mod commit;
mod comparison;
mod decide;
mod expiries;
mod feed;
mod follow;
mod merge;
mod mirror_progress;
mod mirror_records;
mod names;
mod outbox;
mod quota;
mod recover;
mod refused_words;
mod replica;
mod requester;
mod restore;
mod snapshot;
mod staged;
mod stamper;
mod status;
#[cfg(test)]
mod tests;
mod writer;

use std::{collections::HashSet, future::Future, sync::Arc};

use tokio::sync::{Semaphore, mpsc, oneshot};

pub use address_rules::{AddressRefusal, AnnotatedAddresses};
pub use catalog::Catalog;
pub use cluster_facts::{ClusterFact, KubernetesRefusal, NamespacePolicy};
pub use feed::{Batch, Event, Feed, Lagged, Subscription};
pub use follow::{FollowedServices, TakeOverTurn};
pub use merge::{LateSlice, MergeAck, MergeOutcome};
pub use mirror_progress::{Askers, DirtyServices, MirrorLag, MirrorProgress};
pub use names::RegisteredNames;
pub use outbox::{OutboxPage, OutboxWord};
pub use quota::{AnnotatedQuota, InstanceQuotas, QuotaExceeded};
pub use recover::{RegistryOptions, Unrecovered, new};
pub use refused_words::{RefusedWord, RefusedWords, WordRefusal};
pub use replica::ReplicaStatus;
pub use requester::Requester;
pub use restore::KubernetesState;
pub use snapshot::{List, ListError, ListPermit, Snapshot, Snapshots};
pub use status::{LeaseHolder, Phase, Status, StoodDown};
pub use writer::Writer;

use crate::model::{Address, DnsName, Instance, InstanceId, NameStatus, PortSet, Registrant, ServiceKey, UnixMillis};
pub(crate) use crate::store::DirectoryTerm;

/// Most commands in one submission; the caller splits longer ones.
pub const MAX_COMMANDS: usize = 1024;

/// Messages in the writer's queue; when it is full, senders wait.
const QUEUE_LEN: usize = 1024;

/// One change that is requested.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Adds the instance, or replaces the attributes of the one with the same identity.
    Register {
        /// The service of the instance; created with its first instance.
        service: ServiceKey,
        /// The instance with all attributes; none is merged with those of an earlier registration.
        instance: Arc<Instance>,
        /// Who registers it.
        by: Requester,
    },
    /// Removes an instance.
    Unregister {
        /// The service of the instance.
        service: ServiceKey,
        /// The address of the instance.
        address: Address,
        /// The ports of the instance; empty for every instance of the address.
        ports: PortSet,
        /// Who removes it.
        by: Requester,
    },
    /// Sets whether an instance is served. Not journaled: after a restart every instance is ready.
    SetReady {
        /// The service of the instance.
        service: ServiceKey,
        /// The instance.
        id: InstanceId,
        /// Whether DNS serves it.
        ready: bool,
    },
}

/// The result of one command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The instance is new.
    Created,
    /// The instance was registered already; its attributes were replaced.
    Updated,
    /// The instance was registered already with the same attributes.
    Unchanged,
    /// This many instances were removed.
    Removed(usize),
    /// There is no such instance.
    NotFound {
        /// Whether the removal counts nevertheless: it leaves a tombstone, so that no earlier word of others comes after it.
        remembered: bool,
    },
    /// The limit of registered instances is reached.
    Full {
        /// [`RegistryOptions::max_instances`].
        limit: usize,
    },
    /// A quota is used up; nothing was added.
    OverQuota(QuotaExceeded),
    /// The address may not be registered.
    AddressRefused(AddressRefusal),
    /// Another identity has registered the instance, or one of those to be removed; nothing changed.
    Owned(Registrant),
    /// The mirror could not write the registration.
    Refused(KubernetesRefusal),
}

impl Outcome {
    /// Whether it is a word on the instance, which the mirror has to write.
    #[must_use]
    pub fn is_word(&self) -> bool {
        match self {
            Self::Created | Self::Updated | Self::Unchanged | Self::Removed(_) => true,
            Self::NotFound { remembered } => *remembered,
            Self::Full { .. } | Self::AddressRefused(_) | Self::OverQuota(_) | Self::Owned(_) | Self::Refused(_) => {
                false
            }
        }
    }
}

/// The acknowledgement of a submission, after its batch is durable and visible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ack {
    /// The generation in which all outcomes are served.
    pub generation: u64,
    /// One per command, in order.
    pub outcomes: Vec<Outcome>,
}

/// Why the registry accepts nothing now. A client may try again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// The store, or the EndpointSlices, are not read yet.
    #[error("not ready: the server is still loading; try again")]
    NotReady,
    /// Another process writes to Kubernetes.
    #[error("on standby: {}{}", .0.has_the_lease(), .0.hint())]
    Standby(Arc<LeaseHolder>),
    /// The process is about to end.
    #[error("the server is shutting down; try again")]
    ShuttingDown,
    /// A write or sync of the journal failed. Nothing is acknowledged until a restart.
    #[error("the server cannot write its journal and accepts nothing until it is restarted")]
    StorageFailed,
}

/// A message in the writer's queue.
#[derive(Debug)]
enum WriterMessage {
    Submit(Submission),
    Learn(Vec<ClusterFact>),
    Mirrored(Vec<(ServiceKey, u64)>),
    /// Asks for the term of the directory.
    DirectoryTerm(oneshot::Sender<DirectoryTerm>),
    /// A take-over begins.
    TakeOver(oneshot::Sender<TakeOverTurn>),
    /// Begins the comparison with Kubernetes, of this take-over.
    Restore(TakeOverTurn, comparison::ComparisonRequest),
    /// A part of the result of the comparison.
    Differences(comparison::Differences),
    /// The comparison has sent its whole result.
    Compared(comparison::End),
    /// What another process wrote.
    Follow(follow::FollowRequest),
    /// This process does not write any more.
    StandDown(follow::StandDownRequest),
    /// Another process writes, or wrote.
    Outranked(follow::OutrankedRequest),
    /// Asks for what has to be handed over.
    Outbox(outbox::OutboxRequest),
    /// The process that writes has these words.
    HandedOver(outbox::HandedOver),
    /// What another process hands over.
    Merge(merge::MergeRequest),
    /// This process writes under another term.
    Term(TermRequest),
    /// How the lookups of some names stand.
    Resolved(Vec<(DnsName, NameStatus)>),
}

/// A term without a comparison, and who waits until it is journaled.
#[derive(Debug)]
struct TermRequest {
    term: u64,
    journaled: oneshot::Sender<()>,
}

/// Receives the acknowledgement of a submission.
type AckSender = oneshot::Sender<Result<Ack, Unavailable>>;

/// Commands whose outcomes one caller waits for.
#[derive(Debug)]
struct Submission {
    commands: Vec<Command>,
    received: UnixMillis,
    reply: AckSender,
}

/// The only way to change anything. Clones are cheap and share one bounded queue.
#[derive(Debug, Clone)]
pub struct RegistryHandle {
    queue: mpsc::Sender<WriterMessage>,
    catalog: Arc<Catalog>,
    feed: Arc<Feed>,
    snapshots: Arc<Snapshots>,
    status: Status,
    mirror_progress: Arc<MirrorProgress>,
    refused_words: Arc<RefusedWords>,
    names: Arc<RegisteredNames>,
    /// Requests of [`merge`](Self::merge) take turns, in the order of their calls.
    merges: Arc<Semaphore>,
}

impl RegistryHandle {
    /// Submits at most [`MAX_COMMANDS`] commands; waits while the queue is full. Returns a second
    /// future for the answer, so that more can be submitted meanwhile. Once submitted, the commands
    /// are carried out even if that future is dropped.
    ///
    /// # Errors
    /// When the registry accepts nothing now; nothing changes then.
    pub async fn submit(
        &self,
        commands: Vec<Command>,
    ) -> Result<impl Future<Output = Result<Ack, Unavailable>> + Send + use<>, Unavailable> {
        debug_assert!(commands.len() <= MAX_COMMANDS, "the caller splits submissions");
        // Looked at before the queue, so that a client is refused at once and not behind everybody else. The writer looks again.
        self.status.accepting()?;
        let (reply, answer) = oneshot::channel();
        // Stamped here and not by the writer: the time in the queue counts as a part of the registration's latency.
        let submission = Submission { commands, received: UnixMillis::now(), reply };
        let status = self.status.clone();
        self.queue.send(WriterMessage::Submit(submission)).await.map_err(|_| status.refusal())?;
        Ok(async move { answer.await.unwrap_or_else(|_| Err(status.refusal())) })
    }

    /// Sends facts about the cluster. Commands that are submitted after this call returns are checked
    /// against them.
    ///
    /// # Errors
    /// When the writer has ended.
    pub async fn learn(&self, facts: Vec<ClusterFact>) -> Result<(), Unavailable> {
        self.queue.send(WriterMessage::Learn(facts)).await.map_err(|_| self.status.refusal())
    }

    /// Sends the contents of all managed EndpointSlices, once for each [take-over](Self::begin_take_over). Until then the registry
    /// accepts nothing, or until a timeout if the store has been compared with Kubernetes before.
    /// Returns after the comparison is applied, with the term under which the mirror writes slices.
    ///
    /// # Errors
    /// When the writer has ended or cannot write its journal, or this take-over is over: another has begun, or this process has
    /// [stood down](Self::stand_down). The error is that of a registration at that moment.
    pub async fn restore(&self, turn: TakeOverTurn, held: KubernetesState) -> Result<u64, Unavailable> {
        let (reply, term) = oneshot::channel();
        let request = comparison::ComparisonRequest { held, queue: self.queue.clone(), reply };
        self.queue.send(WriterMessage::Restore(turn, request)).await.map_err(|_| self.status.refusal())?;
        term.await.map_err(|_| self.status.refusal())
    }

    /// From now on this process writes under `term`, and nobody else has written: it held the Lease all the time, which was
    /// deleted or set back.
    ///
    /// # Errors
    /// When the writer has ended, cannot write its journal, or has [stood down](Self::stand_down) meanwhile.
    pub async fn raise_term(&self, term: u64) -> Result<(), Unavailable> {
        let (journaled, is_journaled) = oneshot::channel();
        let request = TermRequest { term, journaled };
        self.queue.send(WriterMessage::Term(request)).await.map_err(|_| self.status.refusal())?;
        is_journaled.await.map_err(|_| self.status.refusal())
    }

    /// Confirms that Kubernetes has each service up to its generation. Responses that wait for that are
    /// sent at once; the journal has the confirmation about a second later.
    ///
    /// # Errors
    /// When the writer has ended.
    pub async fn mirrored(&self, mut services: Vec<(ServiceKey, u64)>) -> Result<(), Unavailable> {
        // The waiting responses first. That Kubernetes has a change is true before the journal knows it; a confirmation that is
        // lost only makes the outbox larger than necessary.
        services.retain(|(service, generation)| self.mirror_progress.confirm(service, *generation));
        if services.is_empty() {
            return Ok(());
        }
        self.queue.send(WriterMessage::Mirrored(services)).await.map_err(|_| self.status.refusal())
    }

    /// Says that nothing more will be submitted. Returns when everything that was is answered.
    pub async fn end_submissions(&self) {
        // It is answered behind everything else. An error means that the writer has ended.
        let _ = self.outbox(None, 1).await;
        self.status.set_quiet();
    }

    /// The services whose latest change is not in Kubernetes.
    #[must_use]
    pub fn mirror_progress(&self) -> &Arc<MirrorProgress> {
        &self.mirror_progress
    }

    /// Every service that a mirror which begins has to look at: those that are registered, or of which removals are remembered, and
    /// those whose latest change is not in Kubernetes: the mirror before it may have taken one and not have written it.
    #[must_use]
    pub fn services_to_mirror(&self) -> HashSet<ServiceKey> {
        self.catalog.known_services().into_iter().chain(self.mirror_progress.unmirrored()).collect()
    }

    /// Words that were accepted and do not count, for those who tell their owners.
    #[must_use]
    pub fn refused_words(&self) -> &RefusedWords {
        &self.refused_words
    }

    /// The DNS names that are instances.
    #[must_use]
    pub fn names(&self) -> &Arc<RegisteredNames> {
        &self.names
    }

    /// Makes visible how the lookups of names stand. Denied addresses, and those of the cluster's Services, are left out.
    ///
    /// # Errors
    /// When the writer has ended.
    pub async fn resolved(&self, statuses: Vec<(DnsName, NameStatus)>) -> Result<(), Unavailable> {
        self.queue.send(WriterMessage::Resolved(statuses)).await.map_err(|_| self.status.refusal())
    }

    /// The registered services, for readers.
    #[must_use]
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// All registered services as of one generation, for lists.
    #[must_use]
    pub fn snapshots(&self) -> &Arc<Snapshots> {
        &self.snapshots
    }

    /// The change feed, for watches.
    #[must_use]
    pub fn feed(&self) -> &Arc<Feed> {
        &self.feed
    }

    /// The phase of the registry, which decides whether registrations are accepted.
    #[must_use]
    pub fn status(&self) -> &Status {
        &self.status
    }
}
