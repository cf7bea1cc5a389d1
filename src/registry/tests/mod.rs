//! The registry from its handle to its journal, compared with a model that is a plain map.

mod clock;
mod failed_journal;
mod fairness;
mod handover;
mod ownership;
mod quotas;
mod standby;

use std::{collections::BTreeMap, time::Instant};

use fastrand::Rng;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    metrics::Metrics,
    model::{DnsName, InstanceSpec, PortSpec, Protocol, RecordType, Validator, invariants, testing::unstamped},
    store::{self, DataDir},
    zone::{Hit, Lookup, QName, Zone, ZoneConfig},
};

const VALIDATOR: Validator = Validator { zone_wire_len: 15, names_allowed: false };

/// A registry on a directory, whose writer runs only when a test calls it.
struct TestRegistry {
    handle: RegistryHandle,
    writer: Writer,
    metrics: Arc<Metrics>,
    runtime: Runtime,
}

impl TestRegistry {
    fn on(dir: &TempDir, max_instances: usize) -> Self {
        Self::with_zone(dir, max_instances).0
    }

    fn with_zone(dir: &TempDir, max_instances: usize) -> (Self, Arc<Zone>) {
        let metrics = Arc::new(Metrics::new());
        let (handle, unrecovered) = new(
            super::RegistryOptions {
                max_instances,
                quotas: Default::default(),
                deny_addresses: Vec::new(),
                kubernetes: None,
            },
            Arc::clone(&metrics),
        );
        let origin = DnsName::parse("cluster.local").expect("a name");
        let (reverse_zones, ns_addresses) = (Vec::new(), Vec::new());
        let config =
            ZoneConfig { origin, ttl: 5, reverse_zones, ns_addresses, publish_not_ready: false, flatten_names: false };
        let (zone, publisher) = Zone::new(config);
        let data_dir = DataDir::lock(dir.path()).expect("no other process has it");
        let writer = unrecovered
            .recover(data_dir, &store::StoreOptions::default(), publisher, &mut |_| {})
            .expect("a good store");
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        (Self { handle, writer, metrics, runtime }, zone)
    }

    /// Submits all of them, runs the writer to its end, and returns the acknowledgements.
    fn run_with(self, submissions: Vec<Vec<Command>>) -> (Vec<Ack>, Arc<Catalog>, Arc<Metrics>) {
        let Self { handle, writer, metrics, runtime } = self;
        let acked = runtime.block_on(async {
            let mut acked = Vec::new();
            for commands in submissions {
                acked.push(handle.submit(commands).await.expect("it is ready"));
            }
            acked
        });
        let stop = CancellationToken::new();
        stop.cancel();
        // The writer answers queued submissions before it ends.
        writer.run(runtime.handle(), &stop);
        let acks = runtime.block_on(futures::future::join_all(acked));
        let acks = acks.into_iter().map(|ack| ack.expect("carried out")).collect();
        (acks, Arc::clone(handle.catalog()), metrics)
    }
}

thread_local! {
    static BEGUN: Instant = Instant::now();
}

/// With this clock the size of a batch does not depend on the load of the machine.
fn stopped_clock() -> Instant {
    BEGUN.with(|begun| *begun)
}

fn register(service: &str, address: &str, port: u16, weight: f32) -> Command {
    let service = VALIDATOR.service("prod", service).expect("valid");
    let ports = vec![PortSpec { number: port.into(), ..PortSpec::default() }];
    let spec = InstanceSpec { address: address.into(), ports, weight: Some(weight), ..InstanceSpec::default() };
    let instance = VALIDATOR.instance(&service, &spec, UnixMillis(1)).expect("valid");
    Command::Register { service, instance: Arc::new(instance), by: Requester::Unrestricted }
}

fn scrape(metrics: &Metrics) -> String {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, metrics.all()).expect("a String takes everything");
    text
}

/// Syncs when a journal is closed: one for its end record.
const AT_THE_END: u64 = 1;

/// Syncs of the journal so far, the one at the start among them.
fn syncs(metrics: &Metrics) -> u64 {
    let text = scrape(metrics);
    let count = text.lines().find_map(|line| line.strip_prefix("gangplank_store_sync_seconds_count "));
    count.expect("it is there").parse().expect("a number")
}

#[test]
fn waiting_submissions_are_one_batch_with_one_sync_and_one_generation() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut registry = TestRegistry::on(&dir, 1_000_000);
    registry.writer.clock = stopped_clock;
    let before = registry.writer.generation();
    let synced = syncs(&registry.metrics);
    let submissions = (0..100).map(|n| vec![register("web", &format!("10.0.0.{n}"), 80, 1.0)]).collect();
    let (acks, catalog, metrics) = registry.run_with(submissions);
    assert!(acks.iter().all(|ack| *ack == Ack { generation: before + 1, outcomes: vec![Outcome::Created] }));
    assert_eq!(catalog.instances(), 100);
    let text = scrape(&metrics);
    for line in ["gangplank_registry_batches_total 1", "gangplank_registry_batch_submissions_sum 100.0"] {
        assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
    }
    assert_eq!(syncs(&metrics), synced + 1 + AT_THE_END);
}

#[test]
fn unchanged_registration_writes_nothing_and_makes_no_generation() {
    let dir = tempfile::tempdir().expect("a directory");
    let same = || vec![register("web", "10.0.0.1", 80, 1.0)];
    TestRegistry::on(&dir, 10).run_with(vec![same()]);
    let registry = TestRegistry::on(&dir, 10);
    let (before, synced) = (registry.writer.generation(), syncs(&registry.metrics));
    let (acks, _, metrics) = registry.run_with(vec![same(), same()]);
    assert!(acks.iter().all(|ack| *ack == Ack { generation: before, outcomes: vec![Outcome::Unchanged] }));
    assert_eq!(syncs(&metrics), synced + AT_THE_END, "there is nothing to sync");
}

/// What identifies an instance, and its weight.
type Model = BTreeMap<(String, String, u16), f32>;

/// A command on few services, addresses and ports, so that commands often have the same instance.
fn any_command(rng: &mut Rng, model: &mut Model, most: usize) -> (Command, Outcome) {
    let service = ["web", "db"][rng.usize(..2)].to_owned();
    let address = format!("10.0.0.{}", rng.u8(1..5));
    let port = rng.u16(80..82);
    let key = (service.clone(), address.clone(), port);
    if rng.bool() {
        let weight = f32::from(rng.u8(..2));
        let outcome = match model.get(&key) {
            Some(held) if *held == weight => Outcome::Unchanged,
            Some(_) => Outcome::Updated,
            None if model.len() >= most => Outcome::Full { limit: most },
            None => Outcome::Created,
        };
        if !matches!(outcome, Outcome::Full { .. }) {
            model.insert(key, weight);
        }
        return (register(&service, &address, port, weight), outcome);
    }
    let all = rng.bool();
    let held = model.len();
    model.retain(|(s, a, p), _| !(*s == service && *a == address && (all || *p == port)));
    let removed = held - model.len();
    let outcome = if removed == 0 { Outcome::NotFound { remembered: false } } else { Outcome::Removed(removed) };
    let ports = PortSet::new(if all { Vec::new() } else { vec![(Protocol::Tcp, port)] });
    let key = VALIDATOR.service("prod", &service).expect("valid");
    (
        Command::Unregister {
            service: key,
            address: VALIDATOR.address(&address).expect("valid"),
            ports,
            by: Requester::Unrestricted,
        },
        outcome,
    )
}

fn held(catalog: &Catalog) -> Model {
    let mut model = Model::new();
    for (key, service) in catalog.services() {
        assert!(!service.instances.is_empty(), "{key} has an instance, or it is gone");
        for instance in service.instances.iter() {
            let port = instance.ports().as_slice()[0].number;
            model.insert((key.name().to_owned(), instance.address().to_string(), port), instance.weight().get());
        }
    }
    model
}

#[test]
fn random_commands_and_restarts_match_the_model() {
    const MOST: usize = 10;
    for seed in 0..40 {
        let mut rng = Rng::with_seed(seed);
        let dir = tempfile::tempdir().expect("a directory");
        let (mut model, mut generation) = (Model::new(), 0);
        // Each round is another process on the same directory.
        for round in 0..4 {
            let registry = TestRegistry::on(&dir, MOST);
            assert_eq!(held(&registry.handle.catalog), model, "recovered, seed {seed} round {round}");
            assert!(registry.writer.generation() >= generation, "never back");
            let (mut submissions, mut expected) = (Vec::new(), Vec::new());
            for _ in 0..rng.usize(1..8) {
                let steps: Vec<_> = (0..rng.usize(1..8)).map(|_| any_command(&mut rng, &mut model, MOST)).collect();
                let (commands, outcomes): (Vec<_>, Vec<_>) = steps.into_iter().unzip();
                submissions.push(commands);
                expected.push(outcomes);
            }
            let (acks, catalog, metrics) = registry.run_with(submissions);
            let outcomes: Vec<_> = acks.iter().map(|ack| ack.outcomes.clone()).collect();
            assert_eq!(outcomes, expected, "seed {seed} round {round}");
            assert_eq!(held(&catalog), model, "seed {seed} round {round}");
            generation = catalog.generation();
            let line = format!("gangplank_registry_instances {}\n", model.len());
            assert!(scrape(&metrics).contains(&line), "{line}");
        }
    }
}

/// A registry with Kubernetes, whose writer waits for the restore.
fn with_kubernetes(dir: &TempDir) -> (TestRegistry, Arc<Zone>) {
    let metrics = Arc::new(Metrics::new());
    let options = super::RegistryOptions {
        max_instances: 100_000,
        quotas: Default::default(),
        deny_addresses: Vec::new(),
        kubernetes: Some(NamespacePolicy { create_namespaces: false }),
    };
    let (handle, unrecovered) = new(options, Arc::clone(&metrics));
    let origin = DnsName::parse("cluster.local").expect("a name");
    let (reverse_zones, ns_addresses) = (Vec::new(), Vec::new());
    let config =
        ZoneConfig { origin, ttl: 5, reverse_zones, ns_addresses, publish_not_ready: false, flatten_names: false };
    let (zone, publisher) = Zone::new(config);
    let data_dir = DataDir::lock(dir.path()).expect("no other process has it");
    let options = store::StoreOptions { outbox: true, ..store::StoreOptions::default() };
    let writer = unrecovered.recover(data_dir, &options, publisher, &mut |_| {}).expect("a good store");
    // Multi-threaded, because the writer's `block_on` does not drive the timers of its runtime.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().expect("a runtime");
    (TestRegistry { handle, writer, metrics, runtime }, zone)
}

/// Also if nothing is registered, and with any clock at the next start.
#[test]
fn published_generation_is_stored_before_the_first_batch() {
    let dir = tempfile::tempdir().expect("a directory");
    for _ in 0..2 {
        let published = TestRegistry::on(&dir, 10).writer.generation();
        let data_dir = DataDir::lock(dir.path()).expect("no other process has it");
        let options = store::StoreOptions::default();
        let (_, stored) = data_dir.recover(&options, Arc::default(), &mut |_| {}, &mut |_| {}).expect("a good store");
        assert_eq!(stored.generation, published);
        let next = TestRegistry::on(&dir, 10).writer.generation();
        assert!(next > published, "{next} after {published}");
    }
}

#[test]
fn registration_is_refused_before_the_restore_and_checked_after_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let (mut registry, _) = with_kubernetes(&dir);
    let submitted = registry.runtime.block_on(registry.handle.submit(vec![register("web", "10.0.0.1", 80, 1.0)]));
    assert_eq!(submitted.err(), Some(Unavailable::NotReady));

    let facts = vec![ClusterFact::Namespace { name: "prod".into(), exists: true }, ClusterFact::NamespacesComplete];
    registry.runtime.block_on(registry.handle.learn(facts)).expect("the registry is there");
    let Command::Register { service, instance, .. } = register("web", "10.0.0.7", 80, 2.0) else {
        panic!("it registers")
    };
    let in_kubernetes = KubernetesState {
        term: 41,
        generation: 1,
        new_term: 42,
        services: vec![(service, vec![instance])],
        ..KubernetesState::default()
    };
    let handle = registry.handle.clone();
    let restoring = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async { handle.restore(handle.begin_take_over().await?, in_kubernetes).await })
    });
    let stop = CancellationToken::new();
    assert!(registry.writer.await_restore(registry.runtime.handle(), &stop), "it was not stopped");
    assert_eq!(restoring.join().expect("no panic"), Ok(42));
    assert_eq!(registry.handle.catalog().instances(), 1);
    assert_eq!(registry.handle.mirror_progress().lag().services, 1, "the mirror has to write the service");

    let elsewhere = VALIDATOR.service("stage", "web").expect("valid");
    let Command::Register { instance, .. } = register("web", "10.0.0.8", 80, 1.0) else { panic!("it registers") };
    let absent = Command::Register { service: elsewhere, instance, by: Requester::Unrestricted };
    let (acks, catalog, _) = registry.run_with(vec![vec![register("web", "10.0.0.8", 80, 1.0), absent]]);
    assert_eq!(acks[0].outcomes, [Outcome::Created, Outcome::Refused(KubernetesRefusal::NamespaceAbsent)]);
    assert_eq!(catalog.instances(), 2);

    // The same directory has a term now, so the next start does not need the API server.
    let (mut registry, _) = with_kubernetes(&dir);
    assert_eq!(registry.handle.status().phase(), Phase::Restoring);
    assert!(registry.writer.await_restore(registry.runtime.handle(), &stop), "it was not stopped");
    assert_eq!((registry.handle.status().phase(), registry.handle.catalog().instances()), (Phase::Ready, 2));
}

/// Restores from `in_kubernetes` on another thread, while the writer waits for it.
fn restore(registry: &mut TestRegistry, in_kubernetes: KubernetesState) -> u64 {
    let handle = registry.handle.clone();
    let restoring = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async { handle.restore(handle.begin_take_over().await?, in_kubernetes).await })
    });
    assert!(registry.writer.await_restore(registry.runtime.handle(), &CancellationToken::new()), "it was not stopped");
    restoring.join().expect("no panic").expect("the journal takes it")
}

#[test]
fn foreign_endpoints_are_served_and_neither_journaled_nor_mirrored() {
    let dir = tempfile::tempdir().expect("a directory");
    let (mut registry, zone) = with_kubernetes(&dir);
    assert_eq!(restore(&mut registry, KubernetesState { new_term: 1, ..KubernetesState::default() }), 1);
    let (generation, synced) = (registry.writer.generation(), syncs(&registry.metrics));
    let Command::Register { service, instance, .. } = register("web", "10.0.0.7", 80, 1.0) else {
        panic!("it registers")
    };
    let endpoints = ClusterFact::Endpoints { service, instances: vec![instance] };
    registry.runtime.block_on(registry.handle.learn(vec![endpoints])).expect("the registry is there");
    let (handle, metrics) = (registry.handle.clone(), Arc::clone(&registry.metrics));
    registry.run_with(Vec::new());
    assert_eq!((zone.services(), handle.catalog().instances()), (1, 0));
    assert_eq!(handle.mirror_progress().lag().services, 0, "nothing to mirror");
    // No generation and no sync, so a failed journal does not stop them.
    assert_eq!((handle.catalog().generation(), syncs(&metrics)), (generation, synced + AT_THE_END));
}

#[test]
fn unchanged_registration_survives_a_comparison_that_drops_the_stored_instance() {
    let dir = tempfile::tempdir().expect("a directory");
    let (mut registry, _) = with_kubernetes(&dir);
    restore(&mut registry, KubernetesState { new_term: 1, ..KubernetesState::default() });
    let (known, gone) = (register("web", "10.0.0.1", 80, 1.0), register("web", "10.0.0.2", 80, 1.0));
    let (handle, service) = (registry.handle.clone(), VALIDATOR.service("prod", "web").expect("valid"));
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let mirrored = WriterMessage::Mirrored(vec![(service, registry.writer.generation() + 1)]);
    runtime.block_on(handle.queue.send(mirrored)).expect("it is there");
    registry.run_with(vec![vec![known.clone(), gone]]);

    // The API server is down at the next start, and the same instance is registered again. Meanwhile
    // another directory has written to Kubernetes.
    let (registry, _) = with_kubernetes(&dir);
    // As after the timeout.
    registry.writer.status.ready();
    let handle = registry.handle.clone();
    let Command::Register { service, instance, .. } = register("db", "10.0.0.3", 80, 1.0) else {
        panic!("it registers")
    };
    let answer = runtime.block_on(handle.submit(vec![known])).expect("it is ready");
    let in_kubernetes = KubernetesState {
        term: 7,
        generation: 1,
        new_term: 8,
        services: vec![(service, vec![instance])],
        ..KubernetesState::default()
    };
    std::thread::spawn(move || registry.writer.run(registry.runtime.handle(), &CancellationToken::new()));
    assert_eq!(runtime.block_on(answer).map(|ack| ack.outcomes), Ok(vec![Outcome::Unchanged]));
    assert_eq!(handle.mirror_progress().lag().services, 1, "it is not in Kubernetes yet");
    assert_eq!(runtime.block_on(async { handle.restore(handle.begin_take_over().await?, in_kubernetes).await }), Ok(8));
    let held: Vec<_> = held(handle.catalog()).into_keys().map(|(service, address, _)| (service, address)).collect();
    assert_eq!(held, [("db".into(), "10.0.0.3".into()), ("web".into(), "10.0.0.1".into())]);
}

/// With Kubernetes a registration that changes nothing counts as one made now.
#[test]
fn unchanged_registration_outranks_an_older_removal_at_a_take_over() {
    let dir = tempfile::tempdir().expect("a directory");
    let (mut registry, zone) = with_kubernetes(&dir);
    restore(&mut registry, KubernetesState { new_term: 1, ..KubernetesState::default() });
    let same = || vec![register("web", "10.0.0.1", 80, 1.0)];
    let (web, generation) = (VALIDATOR.service("prod", "web").expect("valid"), registry.writer.generation());
    let (acks, catalog, _) = registry.run_with(vec![same()]);
    assert_eq!(acks[0].generation, generation + 1);
    let stamp =
        |catalog: &Catalog| catalog.get(&web).expect("it is registered").instances.iter().next().map(|i| i.stamp());
    let first = stamp(&catalog).expect("one instance");

    let (mut registry, _) = with_kubernetes(&dir);
    restore(&mut registry, KubernetesState { term: 1, new_term: 2, ..KubernetesState::default() });
    registry.writer.clock = stopped_clock;
    let mut watch = registry.handle.feed().subscribe(registry.writer.generation());
    let (generation, synced) = (registry.writer.generation(), syncs(&registry.metrics));
    let handle = registry.handle.clone();
    let (acks, catalog, metrics) = registry.run_with(vec![same(), same(), same()]);
    let unchanged = Ack { generation: generation + 1, outcomes: vec![Outcome::Unchanged] };
    assert_eq!(acks, [unchanged.clone(), unchanged.clone(), unchanged], "one batch");
    assert_eq!(syncs(&metrics), synced + 1 + AT_THE_END);
    assert!(stamp(&catalog) > Some(first));
    assert_eq!(handle.mirror_progress().lag().services, 1, "the slice has to show the stamp");
    assert!(watch.try_next().expect("nothing was dropped").is_none(), "no change to tell of");
    drop((handle, watch, zone));

    // Another process has removed the instance in the time between the two, and told 204.
    let (mut registry, _) = with_kubernetes(&dir);
    let Command::Register { instance, .. } = &same()[0] else { panic!("it registers") };
    let mut removed = crate::replicas::tombstones::Tombstones::default();
    assert!(removed.insert(instance.id(), crate::model::Stamp { clock: first.clock + 1, term: 1, generation: 9 }));
    let tombstones = vec![(web.clone(), removed)];
    let held = KubernetesState { term: 7, new_term: 8, had_lease: true, tombstones, ..KubernetesState::default() };
    assert_eq!(restore(&mut registry, held), 8);
    assert_eq!(stamp(registry.handle.catalog()), stamp(&catalog));
}

/// A stricter policy must not make an existing store unreadable.
#[test]
fn stored_instance_that_the_policy_refuses_now_is_served() {
    let dir = tempfile::tempdir().expect("a directory");
    let service = invariants::parse_service("prod", "1web").expect("two labels");
    let refused = InstanceSpec {
        address: "10.0.0.1".into(),
        host_name: "10-0-0-9".into(),
        ports: vec![PortSpec { number: 80, name: "p".repeat(63), ..PortSpec::default() }],
        ..InstanceSpec::default()
    };
    let many = (1..200).map(|number| PortSpec { number, name: format!("p{number}"), ..PortSpec::default() });
    let large = InstanceSpec { address: "10.0.0.2".into(), ports: many.collect(), ..InstanceSpec::default() };
    let unreachable = InstanceSpec { address: "240.0.0.1".into(), ..InstanceSpec::default() };
    let specs = [refused, large, unreachable];
    assert!(VALIDATOR.service("prod", "1web").is_err());
    assert!(specs.iter().all(|spec| VALIDATOR.instance(&service, spec, UnixMillis(1)).is_err()));

    let stored: Vec<Arc<Instance>> =
        specs.iter().map(|spec| Arc::new(spec.to_instance(UnixMillis(1)).expect("it can be"))).collect();
    let commands = stored
        .iter()
        .map(|instance| Command::Register {
            service: service.clone(),
            instance: Arc::clone(instance),
            by: Requester::Unrestricted,
        })
        .collect();
    TestRegistry::on(&dir, 10).run_with(vec![commands]);

    let (registry, zone) = TestRegistry::with_zone(&dir, 10);
    zone.set_ready();
    let held = registry.handle.catalog().get(&service).expect("the service was recovered");
    assert!(held.instances.iter().map(unstamped).eq(stored.iter().cloned()));
    let name = QName::from_text("1web.prod.svc.cluster.local").expect("a name");
    let reader = zone.pin();
    let Lookup::Hit(Hit::A(rrset, _)) = reader.lookup(&name, Some(RecordType::A)) else { panic!("it is served") };
    assert_eq!(rrset.len(), 3);
    drop(reader);

    // Such an instance can be removed.
    let ids = stored.iter().map(|instance| instance.id());
    let commands = ids.map(|id| Command::Unregister {
        service: service.clone(),
        address: id.address,
        ports: id.ports,
        by: Requester::Unrestricted,
    });
    let (acks, catalog, _) = registry.run_with(vec![commands.collect()]);
    assert_eq!((acks[0].outcomes.clone(), catalog.len()), (vec![Outcome::Removed(1); 3], 0));
}
