//! Following and standing down: while another process writes, the registry shows what that process wrote to its EndpointSlices.
//!
//! What is followed is visible, in DNS and to readers, and nothing else: it is not journaled, because the journal keeps
//! what this process accepted until it takes over, and not mirrored. The take-over lists the slices again and compares them with
//! the journal (`restore.rs`).

use std::{collections::HashSet, sync::Arc};

use tokio::sync::oneshot;
use tracing::info;

use super::{
    LeaseHolder, Phase, RegistryHandle, Unavailable, Writer, WriterMessage, cluster_facts::is_reserved,
    commit::Committer, recover::Replayed, restore::LocalState, staged::StagedChanges,
};
use crate::{
    model::{CowTree, Instance, InstanceChange, ServiceKey, UnixMillis},
    store::{DirectoryTerm, Record},
};

/// Changes in one batch: a reader of the feed takes one batch at a time.
const MAX_CHANGES: usize = 4_096;

/// What the EndpointSlices of the process that writes hold.
#[derive(Debug)]
pub struct FollowedServices {
    /// The highest term of a slice.
    pub term: u64,
    /// The highest generation of a slice. It becomes the SOA serial.
    pub generation: u64,
    /// Whether `services` are all there are.
    pub complete: bool,
    /// All valid instances of each service.
    pub services: Vec<(ServiceKey, Vec<Arc<Instance>>)>,
}

/// [`FollowedServices`] on their way to the writer.
#[derive(Debug)]
pub(super) struct FollowRequest {
    followed: FollowedServices,
    applied: oneshot::Sender<()>,
}

/// Says that this process does not write any more.
#[derive(Debug)]
pub(super) struct StandDownRequest {
    holder: LeaseHolder,
    done: oneshot::Sender<()>,
}

/// Which take-over it is: a later one, or standing down, ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakeOverTurn(pub(super) u64);

#[cfg(test)]
impl TakeOverTurn {
    /// For tests without a writer.
    pub(crate) const fn any() -> Self {
        Self(0)
    }
}

/// Says that another process writes, or wrote.
#[derive(Debug)]
pub(super) struct OutrankedRequest {
    /// Under this term; `None` for one that holds the Lease, whatever its term.
    term: Option<u64>,
    journaled: oneshot::Sender<()>,
}

impl RegistryHandle {
    /// From now on this process does not write, but `holder`, if anybody does: registrations are refused, and what was
    /// accepted and is not in Kubernetes stays in the outbox until the next [`restore`](Self::restore). A restore that
    /// runs is given up, and one that is queued behind this call does nothing. What is visible stays, until [`follow`](Self::follow) replaces it. After a failure of the journal the
    /// phase stays [`Phase::StorageFailed`]. A process that accepts registrations and has not written yet goes on accepting them
    /// until a holder is known.
    ///
    /// # Errors
    /// When the writer has ended.
    pub async fn stand_down(&self, holder: LeaseHolder) -> Result<(), Unavailable> {
        let (done, is_done) = oneshot::channel();
        let request = StandDownRequest { holder, done };
        self.queue.send(WriterMessage::StandDown(request)).await.map_err(|_| self.status.refusal())?;
        is_done.await.map_err(|_| self.status.refusal())
    }

    /// Under which term this directory wrote to Kubernetes last, and whether another process is known to have written since.
    ///
    /// # Errors
    /// When the writer has ended.
    pub(crate) async fn directory_term(&self) -> Result<DirectoryTerm, Unavailable> {
        let (reply, term) = oneshot::channel();
        self.queue.send(WriterMessage::DirectoryTerm(reply)).await.map_err(|_| self.status.refusal())?;
        term.await.map_err(|_| self.status.refusal())
    }

    /// This process begins to take over. A [`restore`](Self::restore) of an earlier take-over counts no more, even if it
    /// is queued already; one that runs, or has ended, is given up, as by [`stand_down`](Self::stand_down).
    ///
    /// # Errors
    /// When the writer has ended.
    pub async fn begin_take_over(&self) -> Result<TakeOverTurn, Unavailable> {
        let (reply, turn) = oneshot::channel();
        self.queue.send(WriterMessage::TakeOver(reply)).await.map_err(|_| self.status.refusal())?;
        turn.await.map_err(|_| self.status.refusal())
    }

    /// Something shows `term`, or another process holds the Lease (`None`): unless the term of this directory is as high, what
    /// the directory holds is not the newest state any more, not after another start either. Returns when the journal has
    /// it. Does nothing while this process writes.
    ///
    /// # Errors
    /// When the writer has ended.
    pub async fn outranked(&self, term: Option<u64>) -> Result<(), Unavailable> {
        let (journaled, is_journaled) = oneshot::channel();
        let request = OutrankedRequest { term, journaled };
        self.queue.send(WriterMessage::Outranked(request)).await.map_err(|_| self.status.refusal())?;
        is_journaled.await.map_err(|_| self.status.refusal())
    }

    /// Shows what another process wrote, and returns when it is visible. The first complete list makes the registry
    /// readable. Does nothing unless this process is on standby, or has stood down because it drains or its journal failed.
    ///
    /// # Errors
    /// When the writer has ended.
    pub async fn follow(&self, followed: FollowedServices) -> Result<(), Unavailable> {
        let (applied, is_applied) = oneshot::channel();
        let request = FollowRequest { followed, applied };
        self.queue.send(WriterMessage::Follow(request)).await.map_err(|_| self.status.refusal())?;
        is_applied.await.map_err(|_| self.status.refusal())
    }
}

impl Writer {
    pub(super) fn stand_down(&mut self, StandDownRequest { holder, done }: StandDownRequest) {
        // The list of a take-over that is given up may be complete already, and its restore on its way.
        self.mirror_records.next_turn();
        self.stop_writing(holder);
        // An error means that the caller has ended.
        let _ = done.send(());
    }

    /// The term of the directory; while this process writes, that of its words.
    pub(super) fn directory_term(&mut self) -> DirectoryTerm {
        let awaited = self.mirror_records.awaited().map(|local| local.term);
        awaited.unwrap_or_else(|| DirectoryTerm::new(self.decider.stamper().term()))
    }

    pub(super) fn begin_take_over(&mut self, reply: oneshot::Sender<TakeOverTurn>) {
        if self.mirror_records.awaited().is_none() {
            self.stop_writing(LeaseHolder::default());
        }
        // An error means that the caller has ended.
        let _ = reply.send(TakeOverTurn(self.mirror_records.next_turn()));
    }

    fn stop_writing(&mut self, holder: LeaseHolder) {
        let awaited = self.mirror_records.awaited();
        let is_newest = awaited.is_some_and(|local| !local.term.followed);
        if is_newest
            && holder == LeaseHolder::default()
            && self.status.accepting().is_ok()
            && !self.status.is_clock_wrong()
        {
            // It has not written since its start, and nobody else is known to: it goes on as while the API server is away.
            return;
        }
        self.status.stand_down(holder);
        if awaited.is_none() {
            // Confirmed while this process held the Lease.
            self.save_confirmations();
            // Of a comparison that is given up, the journal may have a part, and the catalog still what was followed before.
            let differs = !self.mirror_records.comparison_is_over();
            let mut stored = Replayed::default();
            let mut take = |record| {
                if differs {
                    stored.replay(record);
                }
            };
            // Nothing is left to hand over, and nothing more comes: reading the journal takes a second for a million instances.
            let ends = !differs && self.status.is_quiet() && self.mirror_progress.lag().services == 0;
            let read = if ends {
                Ok((DirectoryTerm::new(self.decider.stamper().term()), Vec::new()))
            } else {
                // Of a journal that cannot be written, for the hand-over only: this process does not take over again before a restart.
                self.read_outbox(&mut take)
            };
            // The committer has reported a failure.
            let (term, outbox) = read.unwrap_or_default();
            self.mirror_records.await_comparison(LocalState {
                term,
                generation: term.published.unwrap_or_else(|| self.committer.generation()),
                outbox: outbox.into(),
                stored: differs.then(|| stored.into_services()),
            });
        }
    }

    /// Whether the catalog holds what another process writes.
    pub(super) fn follows(&self) -> bool {
        self.mirror_records.awaited().is_some_and(|local| local.stored.is_some())
    }

    pub(super) fn outranked(&mut self, OutrankedRequest { term, journaled }: OutrankedRequest) {
        if let Some(local) = self.mirror_records.awaited_mut() {
            journal_outranked(&mut local.term, term, &mut self.committer);
        }
        // An error means that the caller has ended.
        let _ = journaled.send(());
    }

    pub(super) fn follow(&mut self, FollowRequest { followed, applied }: FollowRequest) {
        if matches!(self.status.phase(), Phase::Standby(_) | Phase::StorageFailed(_) | Phase::Draining) {
            self.show(followed);
        }
        // An error means that the watch has ended.
        let _ = applied.send(());
    }

    fn show(&mut self, followed: FollowedServices) {
        let FollowedServices { term, generation: serial, complete, mut services } = followed;
        // Otherwise this process takes over already.
        let Some(local) = self.mirror_records.awaited_mut() else { return };
        // What the journal holds is kept before the catalog is overwritten: the take-over compares with it.
        local.stored.get_or_insert_with(|| self.catalog.services());
        journal_outranked(&mut local.term, Some(term), &mut self.committer);
        // Anyone with access to the API server can label a slice of a reserved service as managed by gangplank.
        services.retain(|(service, _)| !is_reserved(service));
        if complete {
            let named: HashSet<&ServiceKey> = services.iter().map(|(service, _)| service).collect();
            // A complete list says by omission that a service is gone.
            let gone = self.catalog.services().into_iter().map(|(service, _)| service);
            let gone: Vec<_> = gone.filter(|service| !named.contains(service)).collect();
            services.extend(gone.into_iter().map(|service| (service, Vec::new())));
        }
        // Once somebody was answered the serial must not go back, also where a list is behind what the watch has shown (RFC 1982).
        let serial = serial.max(if self.status.is_readable() { self.applier.serial() } else { 0 });
        let mut changes = StagedChanges::default();
        for (service, instances) in services {
            self.stage(&mut changes, &service, instances);
            // In parts: one batch with a million changes would evict everything else from the feed's ring.
            if changes.events.len() >= MAX_CHANGES {
                self.publish_followed(serial, std::mem::take(&mut changes));
            }
        }
        self.publish_followed(serial, changes);
        if complete && !self.status.is_readable() {
            // Readiness tells the age of the answers from its first moment on.
            self.status.replica().watch_answered();
        }
        if complete && self.status.set_readable() {
            self.applier.set_ready();
            let (services, instances) = (self.catalog.len(), self.catalog.instances());
            info!(services, instances, "following: DNS and readers see what another process writes");
        }
    }

    /// Stages what leads from the catalog to `instances`.
    fn stage(&self, changes: &mut StagedChanges, service: &ServiceKey, instances: Vec<Arc<Instance>>) {
        let held = self.catalog.get(service);
        let wanted: CowTree<Arc<Instance>> = instances.into_iter().collect();
        let now = UnixMillis::now();
        let before = held.as_ref().map(|held| &held.instances);
        let gone = before.into_iter().flatten().filter(|instance| wanted.get(&instance.key()).is_none());
        let gone = gone.map(|instance| InstanceChange { before: Some(Arc::clone(instance)), after: None });
        let put = wanted.iter().filter_map(|instance| {
            let before = before.and_then(|before| before.get(&instance.key())).cloned();
            (before.as_ref() != Some(instance)).then(|| InstanceChange { before, after: Some(Arc::clone(instance)) })
        });
        for change in gone.chain(put) {
            changes.stage(service.clone(), held.clone(), change, now);
        }
    }

    /// Makes changes visible. With none, only the serial is new.
    fn publish_followed(&mut self, serial: u64, changes: StagedChanges) {
        if changes.is_empty() {
            self.applier.set_serial(serial);
            return;
        }
        // The feed needs a generation of its own for each batch, the zone that of the writer, so that serials agree across replicas.
        let generation = serial.max(self.catalog.generation() + 1);
        let applied = self.applier.follow(generation, serial, changes, UnixMillis::now());
        self.metrics.registry.set_registered(self.catalog.len(), self.catalog.instances(), generation);
        self.applier.announce(applied, UnixMillis::now());
    }
}

/// Journals that a process wrote under a higher term than `own`, or, without a term, that another one holds the Lease: the
/// journal must not be taken for the newest state, not after another start either.
pub(super) fn journal_outranked(own: &mut DirectoryTerm, term: Option<u64>, committer: &mut Committer) {
    if own.term > 0 && !own.followed && term.is_none_or(|term| term > own.term) {
        own.followed = true;
        // The committer logs a failure and sets the status. DNS follows all the same.
        let _ = committer.commit(&[Record::Term(*own)], false);
    }
}
