//! The wait of a submission is bounded: a comparison with Kubernetes, a run of facts, and a long queue
//! delay it by one or two batches. The tests call the writer batch by batch and check the order.

use std::{
    cell::Cell,
    collections::BTreeSet,
    pin::Pin,
    time::{Duration, Instant},
};

use futures::FutureExt as _;

use super::{writer::MAX_DIFFERENCES, *};

/// The acknowledgement of a submission that is in the queue.
type PendingAck = Pin<Box<dyn Future<Output = Result<Ack, Unavailable>> + Send>>;

impl TestRegistry {
    fn submit(&self, commands: Vec<Command>) -> PendingAck {
        let submitted = self.handle.submit(commands).now_or_never().expect("the queue has room");
        Box::pin(submitted.expect("registrations are accepted"))
    }

    fn learn(&self, facts: Vec<ClusterFact>) {
        self.handle.learn(facts).now_or_never().expect("the queue has room").expect("the writer is there");
    }

    /// Waits for a message and runs the writer for one batch. Returns the number of added instances.
    fn batch(&mut self) -> usize {
        let before = self.handle.catalog().instances();
        let first = self.writer.held_over.take().or_else(|| self.writer.queue.blocking_recv());
        self.writer.batch(first.expect("the handle is there"), self.runtime.handle());
        self.handle.catalog().instances().saturating_sub(before)
    }

    /// Submits, and runs the writer until the answer is there. Returns the number of instances that each
    /// batch added.
    fn batches_until_answered(&mut self, commands: Vec<Command>) -> Vec<usize> {
        let mut answer = self.submit(commands);
        let mut batches = Vec::new();
        loop {
            batches.push(self.batch());
            if let Some(answer) = answer.as_mut().now_or_never() {
                answer.expect("carried out");
                return batches;
            }
        }
    }
}

/// A registry that was compared with Kubernetes, executed `registered`, got the confirmation of the
/// mirror, and was started again without an API server.
fn started_alone(dir: &TempDir, registered: Vec<Command>) -> TestRegistry {
    let (mut registry, _) = with_kubernetes(dir);
    restore(&mut registry, KubernetesState { new_term: 1, ..KubernetesState::default() });
    let mut answer = registry.submit(registered);
    registry.batch();
    let generation = answer.as_mut().now_or_never().expect("carried out").expect("accepted").generation;
    let services = registry.handle.catalog().services().into_iter().map(|(service, _)| (service, generation));
    registry.writer.mirror_records.confirmed(services.collect(), Instant::now());
    registry.run_with(Vec::new());

    let (registry, _) = with_kubernetes(dir);
    // As after the timeout.
    registry.writer.status.ready();
    registry
}

/// Slices that another directory has written to Kubernetes since: `services` services of one instance.
fn written_by_another(services: u32) -> KubernetesState {
    let service = |n: u32| {
        let [_, b, c, d] = n.to_be_bytes();
        match register(&format!("s{n}"), &format!("10.{b}.{c}.{d}"), 80, 1.0) {
            Command::Register { service, instance, .. } => (service, vec![instance]),
            other => panic!("{other:?} registers"),
        }
    };
    KubernetesState {
        term: 7,
        generation: 1,
        new_term: 8,
        services: (1..=services).map(service).collect(),
        ..KubernetesState::default()
    }
}

/// Begins a restore; its message is in the writer's queue.
fn begin_restore(
    registry: &TestRegistry,
    held: KubernetesState,
) -> Pin<Box<dyn Future<Output = Result<u64, Unavailable>>>> {
    let handle = registry.handle.clone();
    // No other take-over has begun.
    let restored = async move { handle.restore(TakeOverTurn(0), held).await };
    let mut restoring: Pin<Box<dyn Future<Output = _>>> = Box::pin(restored);
    assert_eq!(restoring.as_mut().now_or_never(), None, "the writer has not seen it");
    restoring
}

#[test]
fn registrations_are_acknowledged_while_a_late_restore_is_compared_and_applied() {
    const SERVICES: u32 = 20_000;
    let dir = tempfile::tempdir().expect("a directory");
    let mut registry = started_alone(&dir, vec![register("web", "10.9.0.1", 80, 1.0)]);
    let mut restoring = begin_restore(&registry, written_by_another(SERVICES));

    // The request and the submission; a part of the result may come with the second.
    let mut batches = registry.batches_until_answered(vec![register("new", "10.9.0.1", 80, 1.0)]);
    assert!(registry.handle.catalog().instances() < SERVICES as usize, "the comparison is not over");
    assert_eq!(restoring.as_mut().now_or_never(), None, "the comparison is not over");

    let mut submitted = 1;
    let term = loop {
        if let Some(term) = restoring.as_mut().now_or_never() {
            break term;
        }
        submitted += 1;
        let address = format!("10.9.{}.{}", submitted / 256, submitted % 256);
        let answered = registry.batches_until_answered(vec![register("new", &address, 80, 1.0)]);
        assert!(answered.len() <= 2, "a submission waited for {} batches", answered.len());
        batches.extend(answered);
    };
    assert_eq!(term, Ok(8));
    let most = batches.into_iter().max();
    assert!(most < Some(MAX_DIFFERENCES + 10), "a submission waited for {most:?} instances to be restored");
    // "web" was removed: Kubernetes had it once, and the other directory does not have it.
    assert_eq!(registry.handle.catalog().instances(), SERVICES as usize + submitted);
}

#[test]
fn change_during_a_comparison_replaces_its_result() {
    let dir = tempfile::tempdir().expect("a directory");
    let stored = [1, 2, 3, 4].map(|n| register("web", &format!("10.9.0.{n}"), 80, 1.0)).to_vec();
    let mut registry = started_alone(&dir, stored);
    let service = VALIDATOR.service("prod", "web").expect("valid");
    // Kubernetes has .1 and .2 with another weight, .3 unchanged, no .4, and a new .5.
    let there = [(1, 9.0), (2, 9.0), (3, 1.0), (5, 1.0)].map(|(n, weight)| {
        match register("web", &format!("10.9.0.{n}"), 80, weight) {
            Command::Register { instance, .. } => instance,
            other => panic!("{other:?} registers"),
        }
    });
    let held_there = KubernetesState {
        term: 7,
        generation: 1,
        new_term: 8,
        services: vec![(service.clone(), there.to_vec())],
        ..KubernetesState::default()
    };
    let mut restoring = begin_restore(&registry, held_there);
    // After the request, before the first part of the result: .1 changes, .3 is removed, and .4 is
    // registered again unchanged.
    let gone = Command::Unregister {
        service,
        address: VALIDATOR.address("10.9.0.3").expect("valid"),
        ports: PortSet::default(),
        by: Requester::Unrestricted,
    };
    let changes = vec![register("web", "10.9.0.1", 80, 5.0), gone, register("web", "10.9.0.4", 80, 1.0)];
    registry.batches_until_answered(changes);
    let term = loop {
        match restoring.as_mut().now_or_never() {
            Some(term) => break term,
            None => _ = registry.batch(),
        }
    };
    assert_eq!(term, Ok(8));
    let held = held(registry.handle.catalog());
    let held: Vec<_> = held.into_iter().map(|((_, address, _), weight)| (address, weight)).collect();
    let wanted = [(1, 5.0), (2, 9.0), (4, 1.0), (5, 1.0)].map(|(n, weight)| (format!("10.9.0.{n}"), weight));
    assert_eq!(held, wanted);
}

#[test]
fn partly_applied_comparison_adds_nothing_to_the_outbox() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut registry = started_alone(&dir, vec![register("web", "10.9.0.1", 80, 1.0)]);
    let restoring = begin_restore(&registry, written_by_another(20_000));
    let registered = registry.handle.catalog().instances();
    registry.batches_until_answered(vec![register("new", "10.9.0.2", 80, 1.0)]);
    while registry.handle.catalog().instances() < registered + 2_000 {
        registry.batch();
    }
    drop((restoring, registry));

    // The next start compares again, with the slices of that time. They must replace the instances that
    // came from older slices, but not the instance that was registered here.
    let (registry, _) = with_kubernetes(&dir);
    assert!(registry.handle.catalog().instances() > 2_000);
    let local = registry.writer.mirror_records.awaited().expect("a comparison is to come");
    assert_eq!((local.term.term, local.outbox.len()), (1, 1));
}

thread_local! {
    static MILLIS: Cell<u64> = const { Cell::new(0) };
}

/// A clock that advances by a millisecond each time it is read.
fn ticking() -> Instant {
    MILLIS.set(MILLIS.get() + 1);
    stopped_clock() + Duration::from_millis(MILLIS.get())
}

#[test]
fn batch_is_bounded_by_time() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut registry = TestRegistry::on(&dir, 1_000_000);
    registry.writer.clock = ticking;
    let answers = (0..5).map(|n| registry.submit(vec![register("web", &format!("10.0.0.{n}"), 80, 1.0)]));
    let mut answers: Vec<PendingAck> = answers.collect();
    let mut generations = BTreeSet::new();
    for answered in [2, 4, 5] {
        registry.batch();
        let ready = answers.drain(..).map(|mut answer| (answer.as_mut().now_or_never(), answer));
        let (ready, waiting): (Vec<_>, Vec<_>) = ready.partition(|(ack, _)| ack.is_some());
        answers = waiting.into_iter().map(|(_, answer)| answer).collect();
        assert_eq!(answers.len(), 5 - answered, "a millisecond each");
        let acks = ready.into_iter().filter_map(|(ack, _)| ack);
        generations.extend(acks.map(|ack| ack.expect("carried out").generation));
    }
    assert_eq!(generations.len(), 3, "each batch is a generation");
}

#[test]
fn batch_is_bounded_by_the_cost_of_its_commands() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut registry = TestRegistry::on(&dir, 1_000_000);
    registry.writer.clock = stopped_clock;
    let submission = |service: &str| (0..150).map(|n| register(service, &format!("10.0.0.{n}"), 80, 1.0)).collect();
    let mut answers = ["a", "b", "c"].map(|service| registry.submit(submission(service)));
    registry.batch();
    // Two submissions, 300 commands, exceed the 200 that are expected to fit into 2 ms.
    assert_eq!(answers.each_mut().map(|answer| answer.as_mut().now_or_never().is_some()), [true, true, false]);
}

#[test]
fn run_of_facts_does_not_delay_a_decided_submission() {
    let dir = tempfile::tempdir().expect("a directory");
    let (mut registry, _) = with_kubernetes(&dir);
    restore(&mut registry, KubernetesState { new_term: 1, ..KubernetesState::default() });
    registry.writer.clock = stopped_clock;
    let mut decided = registry.submit(vec![register("web", "10.0.0.1", 80, 1.0)]);
    for n in 0..600 {
        registry.learn(vec![ClusterFact::Namespace { name: format!("other{n}").into(), exists: true }]);
    }
    registry.learn(vec![ClusterFact::NamespacesComplete]);
    // No fact names "prod".
    let mut behind = registry.submit(vec![register("web", "10.0.0.2", 80, 1.0)]);

    registry.batch();
    let ack = decided.as_mut().now_or_never().expect("answered before all facts are learnt");
    assert_eq!(ack.expect("carried out").outcomes, [Outcome::Created]);
    assert!(registry.writer.queue.len() > 300, "{} messages wait", registry.writer.queue.len());
    let ack = loop {
        match behind.as_mut().now_or_never() {
            Some(ack) => break ack.expect("carried out"),
            None => _ = registry.batch(),
        }
    };
    assert_eq!(
        ack.outcomes,
        [Outcome::Refused(KubernetesRefusal::NamespaceAbsent)],
        "facts hold for what comes behind"
    );
}
