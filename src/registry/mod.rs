//! The registry: the one place where anything changes.
//!
//! Everyone who wants a change hands [`Command`]s to the [`RegistryHandle`]; one writer takes all
//! that wait as one batch and makes it durable, then visible, then acknowledged, in this order.
//! Readers use the [`Catalog`] and the [`Feed`] and never wait for the writer.
//!
//! A mirror, where there is one, tells the registry what Kubernetes says ([`ClusterFact`]), gives it what
//! the EndpointSlices held at the start ([`Restored`]), learns from [`MirrorProgress`] what it has to
//! write, and reports what is written. The registry knows no more of Kubernetes than that.

mod catalog;
mod cluster_facts;
mod feed;
mod mirror_progress;
mod restore;
mod state;
mod status;
#[cfg(test)]
mod tests;
mod writer;

use std::{future::Future, sync::Arc};

use tokio::sync::{mpsc, oneshot};

pub use catalog::Catalog;
pub use cluster_facts::{ClusterFact, KubernetesRefusal, NamespacePolicy};
pub use feed::{Batch, Event, Feed, Lagged, Subscription};
pub use mirror_progress::{MirrorLag, MirrorProgress};
pub use restore::Restored;
pub use status::{Phase, Status};
pub use writer::{Options, Unrecovered, Writer, new};

use crate::model::{Address, Instance, InstanceId, PortSet, ServiceKey, UnixMillis};

/// Most commands in one submission.
pub const MAX_COMMANDS: usize = 1024;

/// Submissions that may wait for the writer; a sender beyond that waits for a place.
const QUEUE: usize = 1024;

/// Something to change.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Adds the instance, or replaces the attributes of the one with the same identity.
    Register {
        /// Under this service.
        service: ServiceKey,
        /// The instance as it should be.
        instance: Arc<Instance>,
    },
    /// Removes an instance.
    Unregister {
        /// Under this service.
        service: ServiceKey,
        /// At this address.
        address: Address,
        /// With these ports; without any, every instance of the address.
        ports: PortSet,
    },
    /// Sets whether an instance is served. Not journaled: after a restart it is ready.
    SetReady {
        /// Under this service.
        service: ServiceKey,
        /// Which one.
        id: InstanceId,
        /// Whether it is served.
        ready: bool,
    },
}

/// What became of one command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A new instance.
    Created,
    /// It was there; its attributes were replaced.
    Updated,
    /// It was there just so.
    Unchanged,
    /// This many instances were removed.
    Removed(usize),
    /// There is no such instance.
    NotFound,
    /// The server holds as many instances as it may.
    Full {
        /// How many that is.
        limit: usize,
    },
    /// Kubernetes has no place for it.
    Refused(KubernetesRefusal),
}

/// The answer to a submission, after its batch is durable and visible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ack {
    /// The generation in which all outcomes are served.
    pub generation: u64,
    /// One per command, in order.
    pub outcomes: Vec<Outcome>,
}

/// Why the registry takes nothing now. A client may try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// Not recovered yet, or what Kubernetes holds is not read yet.
    #[error("not ready: the server is still loading; try again")]
    NotReady,
    /// On its way out.
    #[error("the server is shutting down; try again")]
    ShuttingDown,
    /// A write or sync failed. Nothing is acknowledged until a restart.
    #[error("the server cannot write its journal and accepts nothing until it is restarted")]
    StorageFailed,
}

/// What waits for the writer.
#[derive(Debug)]
enum Work {
    Commands(Submission),
    ClusterFacts(Vec<ClusterFact>),
    Restore(Restored, oneshot::Sender<u64>),
    Mirrored(Vec<(ServiceKey, u64)>),
}

/// Commands, and who waits for what becomes of them.
#[derive(Debug)]
struct Submission {
    commands: Vec<Command>,
    received: UnixMillis,
    reply: oneshot::Sender<Result<Ack, Unavailable>>,
}

/// The only way to change anything. Clones are cheap and share one bounded queue.
#[derive(Debug, Clone)]
pub struct RegistryHandle {
    queue: mpsc::Sender<Work>,
    catalog: Arc<Catalog>,
    feed: Arc<Feed>,
    status: Status,
    mirror_progress: Arc<MirrorProgress>,
}

impl RegistryHandle {
    /// Hands in at most [`MAX_COMMANDS`] commands, waiting for a place in the queue. The answer
    /// is a future of its own, so that more can be handed in meanwhile. Once handed in, the
    /// commands are carried out even if nobody waits any more.
    ///
    /// # Errors
    /// When the registry takes nothing now; nothing changes then.
    pub async fn submit(
        &self,
        commands: Vec<Command>,
    ) -> Result<impl Future<Output = Result<Ack, Unavailable>> + Send + use<>, Unavailable> {
        debug_assert!(commands.len() <= MAX_COMMANDS, "the caller cuts submissions");
        self.status.accepting()?;
        let (reply, answer) = oneshot::channel();
        let submission = Submission { commands, received: UnixMillis::now(), reply };
        let status = self.status.clone();
        self.queue.send(Work::Commands(submission)).await.map_err(|_| status.refusal())?;
        Ok(async move { answer.await.unwrap_or_else(|_| Err(status.refusal())) })
    }

    /// Tells what Kubernetes says. What is told in one call holds for everything that is
    /// submitted afterwards.
    ///
    /// # Errors
    /// When the registry is gone.
    pub async fn learn(&self, facts: Vec<ClusterFact>) -> Result<(), Unavailable> {
        self.queue.send(Work::ClusterFacts(facts)).await.map_err(|_| self.status.refusal())
    }

    /// Gives what all EndpointSlices of ours hold, once after each start; until then, or until it
    /// was waited for long enough, nothing is accepted. Gives back the term under which slices are
    /// written from now on, after the registry holds what it should.
    ///
    /// # Errors
    /// When the registry is gone, or cannot write its journal.
    pub async fn restore(&self, restored: Restored) -> Result<u64, Unavailable> {
        let (reply, term) = oneshot::channel();
        self.queue.send(Work::Restore(restored, reply)).await.map_err(|_| self.status.refusal())?;
        term.await.map_err(|_| self.status.refusal())
    }

    /// Kubernetes has everything of each service up to its generation: whoever waits for it is
    /// told at once, and the store some time later.
    ///
    /// # Errors
    /// When the registry is gone.
    pub async fn mirrored(&self, mut services: Vec<(ServiceKey, u64)>) -> Result<(), Unavailable> {
        services.retain(|(service, generation)| self.mirror_progress.confirm(service, *generation));
        if services.is_empty() {
            return Ok(());
        }
        self.queue.send(Work::Mirrored(services)).await.map_err(|_| self.status.refusal())
    }

    /// What Kubernetes does not have yet.
    #[must_use]
    pub fn mirror_progress(&self) -> &Arc<MirrorProgress> {
        &self.mirror_progress
    }

    /// What is registered.
    #[must_use]
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// What changes.
    #[must_use]
    pub fn feed(&self) -> &Arc<Feed> {
        &self.feed
    }

    /// Whether registrations are accepted.
    #[must_use]
    pub fn status(&self) -> &Status {
        &self.status
    }
}
