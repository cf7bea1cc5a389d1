//! The task that holds the Lease: drives [`Election`] with the API server's answers and the time.
//!
//! A process is on standby until it has taken the Lease, and follows what the holder writes. After the
//! take-over it renews the Lease, and gives it up when nothing more is accepted, because the process drains or because its
//! journal cannot be written, and everything that was accepted is in Kubernetes or does not get there. It follows from then on.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{
    drain::Drain,
    lease::{LeaseClient, LeaseRead},
    log,
    release::{Released, release},
    take_over_limit::{PAUSE, TakeOverLimit},
    turns::{ElectorHandle, Message, ReplicaHandle, Turn},
};
use crate::{
    kubernetes::api::{ApiError, Fence, boot_time},
    metrics::{LeaseRole, Metrics},
    model::{ReplicaRole, ServerAddress},
    registry::{DirectoryTerm, LeaseHolder, Phase, RegistryHandle},
    replicas::{
        election::{Action, Deposed, Election, RETRY_PERIOD, Role},
        lease::{LeaseWrite, ObservedLease, Opened, RequestId, ResourceVersion},
        rules::Rules,
        time::{BootTime, Now},
    },
};

/// How long a request for the Lease may take: a renewal is repeated in time.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a renewal that is under way may keep the release of the Lease waiting.
const MAX_WAIT_FOR_RENEWAL: Duration = Duration::from_millis(500);

/// How long a writer that is deposed by a slice looks for who has the Lease.
const MAX_WAIT_FOR_HOLDER: Duration = Duration::from_secs(1);

/// How long the release of the Lease is tried.
const MAX_RELEASE: Duration = Duration::from_secs(5);

/// How often to look whether everything is mirrored, once nothing more is accepted.
const DRAIN_POLL: Duration = Duration::from_millis(50);

/// How long a process that cannot write its journal keeps the Lease for what is not mirrored yet. All of it is in the journal.
const MAX_HOLD_AFTER_FAILURE: Duration = Duration::from_secs(10);

/// Indices of [`Elector::failures`].
const READ: usize = 0;
const WRITE: usize = 1;

/// The answer to a request for the Lease.
enum LeaseResponse {
    Read(RequestId, BootTime, Result<LeaseRead, ApiError>),
    Written(RequestId, BootTime, LeaseWrite, Option<ApiError>),
}

/// The election of a process whose directory has this term.
fn election(client: &LeaseClient, DirectoryTerm { term, followed, published: _ }: DirectoryTerm) -> Election {
    // The id names the boot and the directory's inode: who has the lock is the only one acting for it.
    Election::new(client.me(), Opened { term, followed, resume: true }, Rules::ALL)
}

/// Holds the Lease, or waits for it.
pub(in crate::kubernetes) struct Elector {
    election: Election,
    client: Arc<LeaseClient>,
    requests: FuturesUnordered<BoxFuture<'static, LeaseResponse>>,
    registry: RegistryHandle,
    metrics: Arc<Metrics>,
    fence: Fence,
    turns: mpsc::Sender<Turn>,
    messages: mpsc::Receiver<Message>,
    /// Whether slices are read or written under the Lease.
    active: bool,
    /// Whether this process waits for the Lease, for its watch.
    standby: watch::Sender<bool>,
    /// As last read.
    holder: LeaseHolder,
    version: Option<ResourceVersion>,
    clock_agrees: bool,
    /// Since when the journal cannot be written.
    storage_failed: Option<Instant>,
    drain: Option<Drain>,
    take_over_limit: TakeOverLimit,
    /// Whether the registry was told that this process does not write.
    stood_down: bool,
    /// Whether the registry was told that another process writes, or wrote.
    outranked: bool,
    /// The last error of a read, and of a write, to log each once.
    failures: [Option<ApiError>; 2],
}

impl Elector {
    pub(in crate::kubernetes) fn new(
        client: LeaseClient,
        registry: RegistryHandle,
        metrics: Arc<Metrics>,
    ) -> (Self, ReplicaHandle) {
        let election = election(&client, DirectoryTerm::default());
        let (turns, receiver) = mpsc::channel(1);
        let (sender, messages) = mpsc::channel(1);
        let fence = Fence::new();
        let handle = ReplicaHandle { turns: receiver, elector: ElectorHandle(sender), fence: fence.clone() };
        let elector = Self {
            election,
            client: Arc::new(client),
            requests: FuturesUnordered::new(),
            registry,
            metrics,
            fence,
            turns,
            messages,
            active: false,
            standby: watch::Sender::new(false),
            holder: LeaseHolder::default(),
            version: None,
            clock_agrees: true,
            storage_failed: None,
            drain: None,
            take_over_limit: TakeOverLimit::default(),
            stood_down: false,
            outranked: false,
            failures: [None, None],
        };
        (elector, handle)
    }

    /// Runs until `stop`, then gives the Lease up.
    pub(in crate::kubernetes) async fn run(self, stop: CancellationToken) {
        let (changed, changes) = watch::channel(());
        let lease_watch = self.client.watch().run(self.standby.subscribe(), &changed);
        tokio::select! {
            ended = self.elect(changes, stop) => ended,
            never = lease_watch => match never {},
        }
    }

    /// `changes` says that the Lease changed, while this process is on standby.
    async fn elect(mut self, mut changes: watch::Receiver<()>, stop: CancellationToken) {
        let mut ticks = interval(RETRY_PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut phases = self.registry.status().watch();
        // Before the store is read there is nothing to compare.
        let recovered = phases.wait_for(|phase| *phase != Phase::Recovering);
        if stop.run_until_cancelled(recovered).await.is_none() {
            return;
        }
        // A Lease that was set back must not get a term that this directory has used. An error means that the process ends.
        if let Some(Ok(term)) = stop.run_until_cancelled(self.registry.directory_term()).await {
            self.election = election(&self.client, term);
        }
        let mut drain = interval(DRAIN_POLL);
        drain.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let phase = phases.borrow_and_update().clone();
            let now = Instant::now();
            if matches!(phase, Phase::StorageFailed(_)) {
                self.storage_failed.get_or_insert(now);
            }
            if phase == Phase::Draining {
                self.drain.get_or_insert_with(|| Drain::new(now));
            }
            let leaves = self.drain.is_some() || self.storage_failed.is_some();
            let must_leave = leaves && *self.election.role() != Role::Follower;
            let actions = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(answer) = self.requests.next(), if !self.requests.is_empty() => self.answered(answer).await,
                Some(message) = self.messages.recv() => self.handle(message).await,
                _ = drain.tick(), if must_leave => self.leave().await,
                _ = ticks.tick() => self.tick().await,
                // A reading that is under way may have begun before the change.
                Ok(()) = changes.changed(), if *self.standby.borrow() && self.requests.is_empty() => {
                    self.election.tick(self.now())
                }
                Ok(()) = phases.changed() => Vec::new(),
            };
            self.act(actions).await;
        }
        self.release().await;
        stop.cancelled().await;
    }

    async fn tick(&mut self) -> Vec<Action> {
        let now = boot_time();
        if matches!(self.election.role(), Role::TakingOver(_)) && self.take_over_limit.is_over(now) {
            error!(
                lease = self.client.name(),
                "the slices could not be listed and restored within {:?}: the Lease is given up, so that another process takes it; \
                 this one leaves it to others for {PAUSE:?}",
                self.take_over_limit.limit()
            );
            self.take_over_limit.give_up(now);
            return self.give_up_take_over().await;
        }
        self.election.published(self.registry.catalog().generation());
        self.election.tick(self.now())
    }

    fn now(&self) -> Now {
        let (boot, unix_seconds) = (boot_time(), crate::model::UnixMillis::now().0 / 1_000);
        let leaves = self.storage_failed.is_some() || self.drain.is_some();
        Now { boot, unix_seconds, eligible: self.clock_agrees && !leaves && !self.take_over_limit.pauses(boot) }
    }

    /// A slice has this term.
    async fn outranked(&mut self, term: u64) -> Vec<Action> {
        if matches!(self.election.role(), Role::TakingOver(_)) {
            self.active = false;
        }
        if self.election.writing().is_some_and(|mine| term > mine) {
            // Registrants have to be told who writes. Nothing is written or confirmed meanwhile.
            let read = timeout(MAX_WAIT_FOR_HOLDER, self.client.read()).await;
            let me = self.client.me();
            self.holder = match read {
                Ok(Ok(LeaseRead { observed: Some(ObservedLease { record, .. }), holder, .. }))
                    if record.holder != me =>
                {
                    holder
                }
                _ => LeaseHolder::default(),
            };
        }
        let mut actions = self.election.outranked(term);
        if *self.election.role() == Role::Follower {
            // The next tick may be 2 s away.
            actions.extend(self.election.tick(self.now()));
        }
        actions
    }

    async fn handle(&mut self, message: Message) -> Vec<Action> {
        match message {
            Message::Outranked(term) => self.outranked(term).await,
            Message::TakenOver(reply) => {
                let actions = self.election.taken_over(boot_time());
                if let (Some(term), Some(began)) = (self.election.writing(), self.election.renewed_at()) {
                    self.fence.renewed(began);
                    self.take_over_limit.complete();
                    info!(lease = self.client.name(), term, "this process writes");
                    // The receiver may have been stopped.
                    let _ = reply.send(());
                }
                actions
            }
        }
    }

    async fn answered(&mut self, answer: LeaseResponse) -> Vec<Action> {
        match answer {
            LeaseResponse::Read(id, began, read) => {
                let observed = match read {
                    Ok(LeaseRead { observed, holder, clock_agrees }) => {
                        self.holder = holder;
                        self.note_clock(clock_agrees);
                        self.note_failure(READ, None);
                        Some(observed)
                    }
                    Err(err) => {
                        self.note_failure(READ, Some(err));
                        None
                    }
                };
                if let Some(Some(lease)) = &observed {
                    self.note_contact(began, lease);
                }
                let was_read = observed.is_some();
                let actions = self.election.lease_read(id, began, self.now(), observed);
                if was_read && *self.election.role() == Role::Follower {
                    self.stand_by().await;
                }
                actions
            }
            LeaseResponse::Written(id, began, written, err) => {
                self.note_failure(WRITE, err);
                self.election.lease_written(id, began, written)
            }
        }
    }

    /// Stands by if another process holds the Lease, or while the clock is wrong: what is stamped in the future outranks others.
    async fn stand_by(&mut self) {
        let me = self.client.me();
        let another_writes = self.election.lease().is_some_and(|lease| !lease.released && lease.holder != me);
        match (another_writes, self.clock_agrees) {
            (true, _) => {}
            (false, true) => return,
            (false, false) => self.holder = LeaseHolder::default(),
        }
        // Registrations are accepted if the API server was away at the start, whatever the registry was told before.
        let refuses = self.registry.status().accepting().is_err();
        let was_told = refuses && (self.storage_failed.is_none() || self.stood_down);
        if !was_told && !self.active {
            self.stand_down(another_writes).await;
        }
        if self.registry.status().standby(&self.holder) && another_writes {
            let address = ServerAddress::list(&self.holder.addresses, ",");
            info!(lease = self.client.name(), holder = self.holder.name, address, "on standby: another process writes");
        }
        if another_writes && !self.outranked {
            // An error means that the registry has ended.
            self.outranked = self.registry.outranked(None).await.is_ok();
        }
    }

    /// `outranked` if another process certainly writes, or wrote.
    async fn stand_down(&mut self, outranked: bool) {
        (self.stood_down, self.outranked) = (true, outranked);
        // The receiver ends with the process.
        let _ = self.turns.send(Turn::StandDown { holder: self.holder.clone(), outranked }).await;
    }

    async fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::ReadLease(id) => {
                    let (client, began) = (Arc::clone(&self.client), boot_time());
                    self.requests.push(Box::pin(async move {
                        let read = timeout(REQUEST_TIMEOUT, client.read()).await.unwrap_or(Err(ApiError::TimedOut));
                        LeaseResponse::Read(id, began, read)
                    }));
                }
                Action::WriteLease { id, expected, record } => {
                    let (client, began) = (Arc::clone(&self.client), boot_time());
                    self.requests.push(Box::pin(async move {
                        let (written, err) = timeout(REQUEST_TIMEOUT, client.write(expected, &record))
                            .await
                            .unwrap_or((LeaseWrite::Unknown, Some(ApiError::TimedOut)));
                        LeaseResponse::Written(id, began, written, err)
                    }));
                }
                Action::TakeOver => {
                    let Role::TakingOver(tenure) = self.election.role() else { continue };
                    (self.active, self.stood_down, self.outranked) = (true, false, false);
                    self.take_over_limit.begin(boot_time());
                    let turn = Turn::TakeOver(tenure.clone(), self.election.highest_term(self.now()));
                    // The receiver takes each turn at once, and ends with the process.
                    let _ = self.turns.send(turn).await;
                }
                Action::Rewrite => {
                    if let Some(term) = self.election.writing() {
                        warn!(
                            lease = self.client.name(),
                            term, "the Lease was deleted or set back; this process goes on with a higher term"
                        );
                        // The receiver ends with the process.
                        let _ = self.turns.send(Turn::Rewrite(term)).await;
                    }
                }
                Action::Renewed(began) => {
                    self.registry.status().replica().lease_renewed(boot_time().since(began));
                    if self.election.writing().is_some() {
                        self.fence.renewed(began);
                    }
                }
                Action::Deposed(reason) => self.deposed(reason).await,
                // The registry knows the directory's term, and is told in `stand_by`.
                Action::Followed => {}
            }
        }
        // The end of a take-over needs no action.
        self.observe();
    }

    async fn deposed(&mut self, reason: Deposed) {
        self.fence.close();
        self.take_over_limit.stop();
        if !std::mem::take(&mut self.active) {
            return;
        }
        log::deposed(&self.client.name(), &self.holder.name, reason);
        self.stand_down(matches!(reason, Deposed::Outranked(_))).await;
    }

    /// Another process shall write, because this one drains or cannot write its journal: gives the Lease up, and goes on as a
    /// follower, which hands over what is not mirrored.
    async fn leave(&mut self) -> Vec<Action> {
        match self.election.role() {
            Role::Follower | Role::Acquiring(_) => return Vec::new(),
            Role::TakingOver(_) => return self.give_up_take_over().await,
            Role::Writer { .. } => {}
        }
        if self.is_mirrored_or_late() {
            if self.drain.is_none() {
                warn!(lease = self.client.name(), "the journal cannot be written: another process shall write");
            }
            self.release_and_stand_down().await;
        }
        Vec::new()
    }

    /// Releases the Lease, unless its last holder may still count on it.
    async fn give_up_take_over(&mut self) -> Vec<Action> {
        self.release_and_stand_down().await;
        if *self.election.role() == Role::Follower { Vec::new() } else { self.election.give_up() }
    }

    async fn release_and_stand_down(&mut self) {
        self.release().await;
        self.take_over_limit.stop();
        self.active = false;
        // As last read, it is the one before this process.
        self.holder = LeaseHolder::default();
        self.stand_down(false).await;
    }

    /// Services whose latest change is not in Kubernetes.
    fn behind(&self) -> usize {
        self.registry.mirror_progress().lag().services
    }

    fn is_mirrored_or_late(&self) -> bool {
        let (behind, quiet) = (self.behind(), self.registry.status().is_quiet());
        match self.drain {
            Some(drain) => drain.must_release(behind, quiet, Instant::now()),
            None => {
                let late = self.storage_failed.is_some_and(|since| since.elapsed() >= MAX_HOLD_AFTER_FAILURE);
                late || behind == 0
            }
        }
    }

    /// Gives the Lease up, so that another process need not wait for it to expire.
    async fn release(&mut self) {
        self.fence.close();
        let now = Instant::now();
        let (answered, deadline) = (now + MAX_WAIT_FOR_RENEWAL, now + MAX_RELEASE);
        // A renewal that is under way changes the version that the release expects.
        while *self.election.role() != Role::Follower
            && let Ok(Some(answer)) = timeout_at(answered, self.requests.next()).await
        {
            self.answered(answer).await;
        }
        self.election.published(self.registry.catalog().generation());
        let actions = self.election.release();
        for action in actions {
            if let Action::WriteLease { id, expected, record } = action {
                let began = boot_time();
                let lease = self.client.name();
                match release(&self.client, expected, &record, deadline).await {
                    Released::Yes => info!(lease, "released"),
                    Released::Lost => info!(lease, "another process has the Lease already"),
                    Released::Unknown => warn!(lease, "could not be released; another process takes it after 15 s"),
                }
                // A follower does nothing about it.
                let _ = self.election.lease_written(id, began, LeaseWrite::Unknown);
            }
        }
        self.observe();
    }

    /// The Lease was read by a request that began at this time.
    fn note_contact(&mut self, began: BootTime, lease: &ObservedLease) {
        let (replica, since) = (self.registry.status().replica(), boot_time().since(began));
        replica.lease_read(since, lease.record.term, lease.record.generation);
        if self.version.replace(lease.version) != Some(lease.version) {
            replica.lease_renewed(since);
        }
    }

    fn note_clock(&mut self, agrees: bool) {
        if self.clock_agrees && !agrees {
            error!(
                "the clock of this machine is more than a second from the API server's: this process does not take the Lease until it is set"
            );
        }
        self.clock_agrees = agrees;
        self.registry.status().set_clock_agrees(agrees);
    }

    fn note_failure(&mut self, request: usize, err: Option<ApiError>) {
        if self.failures[request] != err {
            err.iter().for_each(|err| log::failed(&self.client.name(), err));
            self.failures[request] = err;
        }
    }

    fn observe(&self) {
        let (label, role) = match self.election.role() {
            Role::Follower | Role::Acquiring(_) => (LeaseRole::Standby, ReplicaRole::Standby),
            Role::TakingOver(_) => (LeaseRole::TakingOver, ReplicaRole::TakingOver),
            Role::Writer { .. } => (LeaseRole::Writer, ReplicaRole::Writer),
        };
        self.metrics.kubernetes.lease(label, self.election.known_term());
        self.registry.status().replica().set_role(role, self.election.known_term());
        let standby = *self.election.role() == Role::Follower;
        self.standby.send_if_modified(|before| std::mem::replace(before, standby) != standby);
    }
}
