//! A process that writes, stands down, follows, and writes again.

use super::*;
use crate::replicas::tombstones::Tombstones;

/// A registry that was compared with Kubernetes under term 1, and whose writer runs on a thread of its own.
pub(super) struct TestReplica {
    pub(super) handle: RegistryHandle,
    pub(super) runtime: Runtime,
    stop: CancellationToken,
    thread: std::thread::JoinHandle<Vec<OutboxWord>>,
}

impl TestReplica {
    pub(super) fn start(dir: &TempDir) -> Self {
        Self::start_under(dir, 1)
    }

    pub(super) fn start_under(dir: &TempDir, new_term: u64) -> Self {
        let (mut registry, _) = with_kubernetes(dir);
        restore(&mut registry, KubernetesState { new_term, ..KubernetesState::default() });
        Self::run(registry)
    }

    /// A registry as it is.
    pub(super) fn run(registry: TestRegistry) -> Self {
        let (handle, stop) = (registry.handle.clone(), CancellationToken::new());
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || registry.writer.run(registry.runtime.handle(), &stopped));
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        Self { handle, runtime, stop, thread }
    }

    pub(super) fn submit(&self, commands: Vec<Command>) -> Result<Ack, Unavailable> {
        let submitted = self.handle.submit(commands);
        self.runtime.block_on(async { submitted.await?.await })
    }

    pub(super) fn stand_down(&self) {
        self.runtime.block_on(self.handle.stand_down(other())).expect("the writer is there");
        assert_eq!(self.handle.status().phase(), Phase::Standby(Arc::new(other())));
    }

    pub(super) fn follow(&self, complete: bool, services: Vec<(ServiceKey, Vec<Arc<Instance>>)>) {
        let followed = FollowedServices { term: 2, generation: 7, complete, services };
        self.runtime.block_on(self.handle.follow(followed)).expect("the writer is there");
    }

    pub(super) fn restore(
        &self,
        new_term: u64,
        services: Vec<(ServiceKey, Vec<Arc<Instance>>)>,
    ) -> Result<u64, Unavailable> {
        let held = KubernetesState {
            term: new_term - 1,
            generation: 8,
            new_term,
            had_lease: true,
            services,
            tombstones: Vec::new(),
        };
        self.runtime.block_on(async { self.handle.restore(self.handle.begin_take_over().await?, held).await })
    }

    pub(super) fn addresses(&self) -> Vec<String> {
        addresses(self.handle.catalog())
    }

    pub(super) fn end(self) -> Vec<OutboxWord> {
        self.stop.cancel();
        self.thread.join().expect("no panic")
    }
}

fn addresses(catalog: &Catalog) -> Vec<String> {
    held(catalog).into_keys().map(|(service, address, _)| format!("{service} {address}")).collect()
}

/// The process that writes meanwhile.
fn other() -> LeaseHolder {
    LeaseHolder { name: "other".into(), addresses: Vec::new() }
}

/// What slices hold of one service.
pub(super) fn slices(service: &str, addresses: &[&str]) -> (ServiceKey, Vec<Arc<Instance>>) {
    let instance = |address: &&str| match register(service, address, 80, 1.0) {
        Command::Register { instance, .. } => instance,
        other => panic!("{other:?} registers"),
    };
    (VALIDATOR.service("prod", service).expect("valid"), addresses.iter().map(instance).collect())
}

#[test]
fn what_was_accepted_and_not_mirrored_counts_again_at_the_next_take_over() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    let generation = replica.submit(vec![register("web", "10.0.0.1", 80, 1.0)]).expect("it writes").generation;
    let (web, _) = slices("web", &[]);
    replica.runtime.block_on(replica.handle.mirrored(vec![(web, generation)])).expect("it is there");
    replica.submit(vec![register("web", "10.0.0.2", 80, 1.0)]).expect("it writes");

    replica.stand_down();
    assert_eq!(
        replica.submit(vec![register("web", "10.0.0.3", 80, 1.0)]),
        Err(Unavailable::Standby(Arc::new(other())))
    );
    assert_eq!(replica.addresses(), ["web 10.0.0.1", "web 10.0.0.2"], "served until something replaces it");
    // Another process has removed .1, which Kubernetes had, and added .4.
    replica.follow(true, vec![slices("web", &["10.0.0.4"]), slices("db", &["10.0.0.5"])]);
    assert_eq!(replica.addresses(), ["db 10.0.0.5", "web 10.0.0.4"]);
    replica.follow(false, vec![slices("db", &[]), slices("mail", &["10.0.0.6"])]);
    assert_eq!(replica.addresses(), ["mail 10.0.0.6", "web 10.0.0.4"]);

    assert_eq!(replica.restore(3, vec![slices("web", &["10.0.0.4"]), slices("mail", &["10.0.0.6"])]), Ok(3));
    let all = ["mail 10.0.0.6", "web 10.0.0.2", "web 10.0.0.4"];
    assert_eq!((replica.addresses(), replica.handle.status().phase()), (all.map(String::from).into(), Phase::Ready));
    assert!(replica.submit(vec![register("web", "10.0.0.3", 80, 1.0)]).is_ok());
    // The journal has all of it, and .2 and .3 are still in the outbox.
    replica.end();
    let (registry, _) = with_kubernetes(&dir);
    let local = registry.writer.mirror_records.awaited().expect("it waits for Kubernetes");
    assert_eq!((local.term.term, local.outbox.len()), (3, 2));
    assert_eq!(registry.handle.catalog().instances(), 4);
}

/// Another process has written since the copy was made, under the same term. A start stores a generation of its own.
#[test]
fn older_copy_of_a_directory_stays_older_however_often_it_starts() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    let copied = replica.submit(vec![register("web", "10.0.0.1", 80, 1.0)]).expect("it writes").generation;
    let (web, _) = slices("web", &[]);
    replica.runtime.block_on(replica.handle.mirrored(vec![(web, copied)])).expect("it is there");
    replica.end();
    for _ in 0..2 {
        drop(with_kubernetes(&dir));
    }
    let (mut registry, _) = with_kubernetes(&dir);
    // As if .1 had been registered longer ago than removals are remembered.
    let mut tombstones = Tombstones::default();
    assert!(tombstones.raise_refuse_before(UnixMillis::now().0 * 1_000 + 1_000_000));
    let held = KubernetesState {
        term: 1,
        generation: copied + 1,
        new_term: 2,
        had_lease: true,
        services: vec![slices("web", &["10.0.0.2"])],
        tombstones: vec![(VALIDATOR.service("prod", "web").expect("valid"), tombstones)],
    };
    restore(&mut registry, held);
    assert_eq!(addresses(registry.handle.catalog()), ["web 10.0.0.2"]);
}

#[test]
fn lone_removal_that_the_mirror_before_had_taken_is_looked_at_by_the_next() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    let Command::Register { service, instance, .. } = register("web", "10.0.0.1", 80, 1.0) else {
        panic!("it registers")
    };
    let address = instance.address().clone();
    let removal = Command::Unregister { service, address, ports: PortSet::default(), by: Requester::Unrestricted };
    let removed = replica.submit(vec![removal]).expect("it writes");
    assert_eq!(removed.outcomes, [Outcome::NotFound { remembered: true }]);
    let progress = replica.handle.mirror_progress();
    assert!(replica.runtime.block_on(progress.take_dirty()).changed.len() == 1, "the mirror takes it, and ends");
    let (web, _) = slices("web", &[]);
    assert!(replica.handle.services_to_mirror().contains(&web));
    let generation = replica.handle.catalog().generation();
    replica.runtime.block_on(replica.handle.mirrored(vec![(web, generation)])).expect("it is there");
    assert_eq!(progress.lag().services, 0);
    replica.end();
}

#[test]
fn term_that_is_raised_without_a_comparison_is_journaled_and_stamped() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    assert_eq!(replica.runtime.block_on(replica.handle.raise_term(5)), Ok(()));
    replica.submit(vec![register("web", "10.0.0.1", 80, 1.0)]).expect("it writes");
    let (web, _) = slices("web", &[]);
    let service = replica.handle.catalog().get(&web).expect("it is registered");
    assert_eq!(service.instances.iter().map(|one| one.stamp().term).collect::<Vec<_>>(), [5]);
    // Only the comparison gives a term to a process that has stood down.
    replica.stand_down();
    let refused = replica.runtime.block_on(replica.handle.raise_term(6));
    assert_eq!(refused, Err(Unavailable::Standby(Arc::new(other()))));
    replica.end();
    let (registry, _) = with_kubernetes(&dir);
    let local = registry.writer.mirror_records.awaited().expect("it waits for Kubernetes");
    assert_eq!((local.term.term, local.term.followed), (5, false));
}

#[test]
fn process_that_drains_follows_the_next_one_and_keeps_what_it_has_to_hand_over() {
    for mirrored in [false, true] {
        let dir = tempfile::tempdir().expect("a directory");
        let replica = TestReplica::start(&dir);
        let generation = replica.submit(vec![register("web", "10.0.0.1", 80, 1.0)]).expect("it writes").generation;
        let (web, _) = slices("web", &[]);
        if mirrored {
            replica.runtime.block_on(replica.handle.mirrored(vec![(web, generation)])).expect("it is there");
        }
        replica.handle.status().drain();
        // It has the Lease still.
        replica.follow(true, vec![slices("db", &["10.0.0.5"])]);
        assert_eq!(replica.addresses(), ["web 10.0.0.1"]);
        replica.runtime.block_on(async {
            replica.handle.end_submissions().await;
            replica.handle.stand_down(LeaseHolder::default()).await.expect("the writer is there");
        });
        replica.follow(true, vec![slices("web", &["10.0.0.4"])]);
        assert_eq!(
            (replica.addresses(), replica.handle.status().phase()),
            (vec!["web 10.0.0.4".into()], Phase::Draining)
        );
        assert_eq!(replica.end().len(), usize::from(!mirrored), "its outbox");
        assert_eq!(stored_term(&dir), (1, true));
    }
}

/// The term of a directory, as the next start reads it, and whether another process wrote after it.
fn stored_term(dir: &TempDir) -> (u64, bool) {
    let (registry, _) = with_kubernetes(dir);
    let term = registry.writer.mirror_records.awaited().expect("it waits for Kubernetes").term;
    (term.term, term.followed)
}

#[test]
fn directory_of_a_writer_that_was_outranked_is_not_the_newest_after_a_restart() {
    for (seen, followed) in [(Some(1), false), (Some(2), true), (None, true)] {
        let dir = tempfile::tempdir().expect("a directory");
        let replica = TestReplica::start(&dir);
        replica.submit(vec![register("web", "10.0.0.1", 80, 1.0)]).expect("it writes");
        replica.stand_down();
        // It has seen no slice.
        assert_eq!(replica.runtime.block_on(replica.handle.outranked(seen)), Ok(()));
        replica.end();
        assert_eq!(stored_term(&dir), (1, followed), "{seen:?}");
    }
}

/// The Lease is read before the slices.
#[test]
fn directory_whose_process_starts_while_another_one_writes_is_not_the_newest() {
    let dir = tempfile::tempdir().expect("a directory");
    TestReplica::start(&dir).end();
    let replica = TestReplica::run(with_kubernetes(&dir).0);
    assert_eq!(replica.runtime.block_on(replica.handle.outranked(None)), Ok(()));
    replica.end();
    assert_eq!(stored_term(&dir), (1, true));
    // It counts again after the next take-over.
    TestReplica::start_under(&dir, 3).end();
    assert_eq!(stored_term(&dir), (3, false));
}

#[test]
fn crash_in_a_comparison_does_not_forget_that_the_slices_are_newer() {
    for (term, generation, followed) in [(2, 1, true), (1, 1 << 40, true), (1, 0, false)] {
        let dir = tempfile::tempdir().expect("a directory");
        let replica = TestReplica::start(&dir);
        replica.submit(vec![register("web", "10.0.0.1", 80, 1.0)]).expect("it writes");
        replica.end();
        let (mut registry, _) = with_kubernetes(&dir);
        let (queue, (reply, _term)) = (registry.handle.queue.clone(), oneshot::channel());
        let held = KubernetesState {
            term,
            generation,
            new_term: 3,
            services: vec![slices("web", &["10.0.0.2"])],
            ..KubernetesState::default()
        };
        let turn = TakeOverTurn(registry.writer.mirror_records.next_turn());
        let request = WriterMessage::Restore(turn, comparison::ComparisonRequest { held, queue, reply });
        registry.writer.batch(request, registry.runtime.handle());
        // Nothing of its result has come when the process ends.
        drop(registry);
        assert_eq!(stored_term(&dir), (1, followed), "{term} {generation}");
    }
}

#[test]
fn take_over_that_is_given_up_changes_nothing_afterwards() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut replica = TestReplica::start(&dir);
    replica.stand_down();
    for round in 0..20 {
        let slices_of = |n: u8| {
            let addresses: Vec<String> = (1..=n).map(|last| format!("10.0.{round}.{last}")).collect();
            slices("web", &addresses.iter().map(String::as_str).collect::<Vec<_>>())
        };
        let new_term = 4 * round + 8;
        let state = KubernetesState {
            term: new_term - 1,
            generation: 8,
            new_term,
            services: vec![slices_of(200), slices_of(100)],
            ..KubernetesState::default()
        };
        // The journal has none of these.
        replica.follow(true, vec![slices_of(2)]);
        let (given_up, ()) = replica.runtime.block_on(async {
            let turn = replica.handle.begin_take_over().await.expect("the writer is there");
            tokio::join!(replica.handle.restore(turn, state), async {
                replica.handle.stand_down(other()).await.expect("the writer is there");
            })
        });
        assert!(matches!(given_up, Ok(_) | Err(Unavailable::Standby(_))), "{given_up:?}");
        replica.follow(true, vec![slices_of(3)]);
        assert_eq!(replica.addresses().len(), 3, "{given_up:?}");
        assert_eq!(replica.restore(new_term + 2, vec![slices_of(2)]), Ok(new_term + 2));
        let taken_over = replica.addresses();
        assert_eq!(taken_over.len(), 2);
        replica.end();
        let (registry, _) = with_kubernetes(&dir);
        assert_eq!(
            addresses(registry.handle.catalog()),
            taken_over,
            "{given_up:?}, round {round}: the journal has what was taken over"
        );
        let local = registry.writer.mirror_records.awaited().expect("it waits for Kubernetes");
        assert_eq!((local.term.term, local.term.followed), (new_term + 2, false));
        drop(registry);
        replica = TestReplica::start_under(&dir, new_term + 3);
        replica.stand_down();
    }
    replica.end();
}

/// What a list shows that is complete only when the take-over is over.
fn late_state(new_term: u64) -> KubernetesState {
    let services = vec![slices("web", &["10.0.0.9"])];
    KubernetesState { term: 1, generation: 8, new_term, had_lease: true, services, ..KubernetesState::default() }
}

#[test]
fn restore_that_comes_after_its_take_over_was_given_up_does_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    replica.stand_down();
    let late = replica.runtime.block_on(async {
        let turn = replica.handle.begin_take_over().await?;
        replica.handle.stand_down(other()).await?;
        replica.handle.restore(turn, late_state(3)).await
    });
    assert_eq!(late, Err(Unavailable::Standby(Arc::new(other()))));
    replica.follow(true, vec![slices("web", &["10.0.0.4"])]);
    assert_eq!(replica.addresses(), ["web 10.0.0.4"], "it follows");
    assert_eq!(replica.restore(4, vec![slices("web", &["10.0.0.5"])]), Ok(4));
    replica.end();
    assert_eq!(stored_term(&dir), (4, false));
}

/// The Lease was deleted during a take-over, and this process made it again: nothing tells the registry to stand down.
#[test]
fn take_over_begins_anew_although_an_earlier_one_was_not_given_up() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    replica.stand_down();
    let late = replica.runtime.block_on(async {
        let turn = replica.handle.begin_take_over().await?;
        replica.handle.begin_take_over().await?;
        replica.handle.restore(turn, late_state(3)).await
    });
    assert_eq!(late, Err(Unavailable::Standby(Arc::new(other()))));
    // This one ends, and the Lease is lost before anybody looks.
    assert_eq!(replica.restore(4, vec![slices("web", &["10.0.0.4"])]), Ok(4));
    assert_eq!(replica.restore(6, vec![slices("web", &["10.0.0.5"])]), Ok(6));
    assert_eq!(replica.handle.status().phase(), Phase::Ready);
    replica.end();
    assert_eq!(stored_term(&dir), (6, false));
}

/// Its take-over was given up, because its lists failed.
#[test]
fn process_that_has_not_written_yet_goes_on_accepting_until_another_one_is_known_to_write() {
    let dir = tempfile::tempdir().expect("a directory");
    TestReplica::start(&dir).end();
    let (registry, _) = with_kubernetes(&dir);
    registry.handle.status().ready();
    let replica = TestReplica::run(registry);
    replica.runtime.block_on(replica.handle.stand_down(LeaseHolder::default())).expect("the writer is there");
    assert_eq!(replica.handle.status().phase(), Phase::Ready);
    assert!(replica.submit(vec![register("web", "10.0.0.1", 80, 1.0)]).is_ok());
    replica.stand_down();
    assert_eq!(replica.end().len(), 1, "its outbox");
}

/// A Lease that was deleted or set back gets a term that no directory has used.
#[test]
fn term_of_the_directory_is_known_before_it_writes_and_while() {
    let dir = tempfile::tempdir().expect("a directory");
    let term = |replica: &TestReplica| {
        let term = replica.runtime.block_on(replica.handle.directory_term()).expect("the writer is there");
        (term.term, term.followed)
    };
    let replica = TestReplica::start_under(&dir, 7);
    assert_eq!(term(&replica), (7, false));
    replica.end();
    let replica = TestReplica::run(with_kubernetes(&dir).0);
    assert_eq!(term(&replica), (7, false));
    assert_eq!(replica.runtime.block_on(replica.handle.outranked(None)), Ok(()));
    assert_eq!(term(&replica), (7, true));
    replica.end();
}
