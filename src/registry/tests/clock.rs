//! Stamps of next year: they are corrected at a take-over, and nothing else happens for them meanwhile.

use super::{standby::TestReplica, *};
use crate::{
    model::{HybridClock, PortSet, Stamp},
    replicas::tombstones::Tombstones,
};

/// Microseconds.
const YEAR: u64 = 365 * 24 * 3600 * 1_000_000;

fn now() -> u64 {
    UnixMillis::now().0 * 1_000
}

fn at(clock: u64) -> Stamp {
    Stamp { clock, term: 1, generation: 3 }
}

fn web() -> ServiceKey {
    VALIDATOR.service("prod", "web").expect("valid")
}

fn instance(address: &str, clock: u64) -> Arc<Instance> {
    let Command::Register { instance, .. } = register("web", address, 80, 1.0) else { panic!("it registers") };
    Arc::new(Arc::unwrap_or_clone(instance).with_stamp(at(clock)))
}

fn removed(address: &str, clock: u64) -> Tombstones {
    let mut tombstones = Tombstones::default();
    assert!(tombstones.insert(instance(address, clock).id(), at(clock)));
    tombstones
}

/// Slices that a wrong clock, or an edit, has stamped a year ahead: .1 is registered, .2 was registered and removed.
fn from_next_year() -> KubernetesState {
    let ahead = ["10.0.0.1", "10.0.0.2"].map(|address| instance(address, now() + YEAR));
    // 3 s ahead is within `HybridClock::MAX_LEAD`, so that stamp is right.
    let instances = ahead.into_iter().chain([instance("10.0.0.4", now() + 3_000_000)]).collect();
    let mut tombstones = removed("10.0.0.2", now() + YEAR + 60_000_000);
    assert!(tombstones.insert(instance("10.0.0.3", 0).id(), at(now() - 3_600_000_000)));
    KubernetesState {
        term: 7,
        new_term: 8,
        had_lease: true,
        services: vec![(web(), instances)],
        tombstones: vec![(web(), tombstones)],
        ..KubernetesState::default()
    }
}

/// The stamps of what is registered and of what was removed, by address.
fn stamps(catalog: &Catalog) -> BTreeMap<String, u64> {
    let instances = catalog.get(&web()).unwrap_or_default().instances;
    let registered = instances.iter().map(|one| (format!("{} is there", one.address()), one.stamp().clock));
    let tombstones = catalog.tombstones(&web());
    let removed = tombstones.iter().map(|one| (format!("{} is gone", one.id.address), one.stamp.clock));
    registered.chain(removed).collect()
}

#[test]
fn what_is_stamped_in_the_future_is_stamped_anew_at_the_end_of_a_take_over() {
    let dir = tempfile::tempdir().expect("a directory");
    for start in 0..2 {
        let (mut registry, _) = with_kubernetes(&dir);
        assert!(
            registry.writer.decider.stamper().lead(UnixMillis::now()).is_none(),
            "start {start}: the journal has it"
        );
        restore(
            &mut registry,
            if start == 0 {
                from_next_year()
            } else {
                KubernetesState { term: 8, new_term: 9, ..KubernetesState::default() }
            },
        );
        let stamps = stamps(registry.handle.catalog());
        assert_eq!(
            stamps.keys().collect::<Vec<_>>(),
            ["10.0.0.1 is there", "10.0.0.2 is gone", "10.0.0.3 is gone", "10.0.0.4 is there"]
        );
        assert!(stamps["10.0.0.1 is there"] > stamps["10.0.0.4 is there"], "what is a little ahead stays as it is");
        assert!(stamps.values().all(|clock| *clock <= HybridClock::highest(now())), "{stamps:?}");
        registry.writer.decider.sweep(UnixMillis::now());
        assert!(!registry.writer.decider.has_changes(), "no removal is forgotten");
        if start == 0 {
            assert_eq!(registry.handle.mirror_progress().lag().services, 1, "the slices have to show it");
        }
    }
    let replica = TestReplica::start_under(&dir, 10);
    let removal = Command::Unregister {
        service: web(),
        address: VALIDATOR.address("10.0.0.1").expect("valid"),
        ports: PortSet::default(),
        by: Requester::Unrestricted,
    };
    replica.submit(vec![removal, register("web", "10.0.0.2", 80, 1.0)]).expect("it writes");
    let stamps = stamps(replica.handle.catalog());
    assert!(stamps.contains_key("10.0.0.2 is there") && !stamps.contains_key("10.0.0.1 is there"), "{stamps:?}");
    assert!(stamps.values().all(|clock| *clock <= HybridClock::highest(now())), "{stamps:?}");
    replica.end();
}

#[test]
fn age_limit_from_the_future_is_lowered() {
    let dir = tempfile::tempdir().expect("a directory");
    let (mut registry, _) = with_kubernetes(&dir);
    let mut tombstones = Tombstones::default();
    assert!(tombstones.raise_refuse_before(now() + YEAR));
    let held = KubernetesState { tombstones: vec![(web(), tombstones)], ..from_next_year() };
    restore(&mut registry, held);
    let refuse_before = registry.handle.catalog().tombstones(&web()).refuse_before();
    assert!((1..=HybridClock::highest(now())).contains(&refuse_before), "{refuse_before}");
    drop(registry);
    let (registry, _) = with_kubernetes(&dir);
    assert_eq!(registry.handle.catalog().tombstones(&web()).refuse_before(), refuse_before);
}

#[test]
fn process_with_a_clock_behind_its_journal_accepts_nothing_before_the_api_server_answers() {
    let dir = tempfile::tempdir().expect("a directory");
    let (mut registry, _) = with_kubernetes(&dir);
    restore(&mut registry, KubernetesState { new_term: 1, ..KubernetesState::default() });
    assert!(with_kubernetes_is_good_enough(registry, &dir), "its clock is right");

    // The clock is set a year back between two starts.
    let (mut registry, _) = with_kubernetes(&dir);
    restore(&mut registry, KubernetesState { term: 1, new_term: 2, ..KubernetesState::default() });
    registry.writer.decider.stamper().observe(at(now() + YEAR));
    let (_, catalog, _) = registry.run_with(vec![vec![register("web", "10.0.0.1", 80, 1.0)]]);
    assert!(stamps(&catalog)["10.0.0.1 is there"] > now() + YEAR / 2);
    let (mut registry, _) = with_kubernetes(&dir);
    assert!(!registry.writer.may_begin_alone());
    // The API server agrees with the clock of now: what is stored was wrong, and nobody has written since.
    restore(&mut registry, KubernetesState { term: 2, new_term: 3, ..KubernetesState::default() });
    let stamps = stamps(registry.handle.catalog());
    assert!(stamps["10.0.0.1 is there"] <= HybridClock::highest(now()), "{stamps:?}");
    assert!(with_kubernetes_is_good_enough(registry, &dir));
}

fn with_kubernetes_is_good_enough(registry: TestRegistry, dir: &TempDir) -> bool {
    drop(registry);
    with_kubernetes(dir).0.writer.may_begin_alone()
}

#[test]
fn what_is_accepted_while_the_slices_are_compared_comes_after_them() {
    let dir = tempfile::tempdir().expect("a directory");
    let (mut registry, _) = with_kubernetes(&dir);
    // As the former writer's clock stamps it.
    let slice = instance("10.0.0.1", now() + 2_000_000);
    let held = KubernetesState {
        new_term: 8,
        services: vec![(web(), vec![Arc::clone(&slice)])],
        ..KubernetesState::default()
    };
    registry.writer.observe_slices(&held);
    restore(&mut registry, KubernetesState { new_term: 8, ..KubernetesState::default() });
    let (_, catalog, _) = registry.run_with(vec![vec![register("web", "10.0.0.1", 80, 2.0)]]);
    assert!(stamps(&catalog)["10.0.0.1 is there"] > slice.stamp().clock);
}
