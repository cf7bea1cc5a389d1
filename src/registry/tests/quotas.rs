//! The counts of instances are exact in one batch, after a start and after a take-over.

use std::num::NonZeroUsize;

use super::{
    ownership::{identity, outcomes, register_by, registrant, remove_by},
    standby::{TestReplica, slices},
    *,
};

fn quotas(per_identity: usize, per_namespace: usize) -> InstanceQuotas {
    InstanceQuotas { per_identity: NonZeroUsize::new(per_identity), per_namespace: NonZeroUsize::new(per_namespace) }
}

fn limited(dir: &TempDir, quotas: InstanceQuotas) -> TestRegistry {
    let mut registry = TestRegistry::on(dir, 1_000);
    registry.writer.decider.set_quotas(quotas);
    registry
}

fn address(last: u8) -> String {
    format!("10.0.0.{last}")
}

#[test]
fn identity_has_as_many_instances_as_it_may_also_after_a_start() {
    let dir = tempfile::tempdir().expect("a directory");
    let by = |name: &str, last: u8| register_by(identity(name, true), &address(last), 80, 1.0);
    let remove = |name: &str, last: u8| remove_by(identity(name, true), &address(last), None);
    let over = |name: &str| Outcome::OverQuota(QuotaExceeded::Identity { registrant: registrant(name), limit: 2 });
    let nameless = register_by(Requester::Unrestricted, &address(9), 80, 1.0);
    let (acks, _, metrics) = limited(&dir, quotas(2, 0)).run_with(vec![
        vec![by("vm-1", 1), by("vm-1", 2), by("vm-1", 3), by("vm-1", 1), by("vm-2", 4), nameless],
        vec![remove("vm-1", 1), by("vm-1", 3), by("vm-1", 1)],
    ]);
    let created = || Outcome::Created;
    let first = [created(), created(), over("vm-1"), Outcome::Unchanged, created(), created()];
    assert_eq!(outcomes(&acks[..1]), first);
    assert_eq!(outcomes(&acks[1..]), [Outcome::Removed(1), created(), over("vm-1")]);
    let text = scrape(&metrics);
    assert!(text.contains("gangplank_over_quota_total{quota=\"identity_instances\"} 2"), "{text}");
    assert!(text.contains("gangplank_registry_commands_total{outcome=\"over_quota\"} 2"), "{text}");

    // vm-1 has .2 and .3, vm-2 has .4, and .9 is nobody's.
    let (acks, ..) = limited(&dir, quotas(2, 0)).run_with(vec![vec![
        by("vm-1", 1),
        by("vm-1", 9),
        by("vm-2", 2),
        by("vm-2", 3),
        by("vm-1", 9),
        by("vm-1", 1),
    ]]);
    let updated = || Outcome::Updated;
    assert_eq!(
        outcomes(&acks),
        [over("vm-1"), over("vm-1"), updated(), over("vm-2"), updated(), over("vm-1")],
        "what is taken over counts for its new registrant"
    );
}

#[test]
fn namespace_has_as_many_instances_as_its_annotation_says_or_else_the_flag() {
    let dir = tempfile::tempdir().expect("a directory");
    let put = |last: u8| vec![register("web", &address(last), 80, 1.0)];
    let (acks, ..) = limited(&dir, quotas(0, 2)).run_with(vec![put(1), put(2), put(3), put(1)]);
    let flag = Outcome::OverQuota(QuotaExceeded::Namespace { limit: 2 });
    assert_eq!(outcomes(&acks), [Outcome::Created, Outcome::Created, flag.clone(), Outcome::Unchanged]);

    let mut registry = limited(&dir, quotas(0, 2));
    let mut annotated = |quota| {
        registry.writer.decider.facts().set_quota("prod".into(), quota);
        registry.writer.decider.decide(put(3).remove(0), UnixMillis(1))
    };
    let limit = |limit| Outcome::OverQuota(QuotaExceeded::Annotation { limit });
    assert_eq!(annotated(Some(AnnotatedQuota::Limit(0))), limit(Some(0)));
    assert_eq!(annotated(Some(AnnotatedQuota::Invalid)), limit(None));
    assert_eq!(annotated(None), flag);
    assert_eq!(annotated(Some(AnnotatedQuota::Limit(3))), Outcome::Created);
    assert_eq!(annotated(Some(AnnotatedQuota::Limit(3))), Outcome::Unchanged);
}

#[test]
fn counts_are_those_of_the_slices_after_a_take_over() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    let ranges = vec![ClusterFact::ServiceRanges(Vec::new())];
    replica.runtime.block_on(replica.handle.learn(ranges)).expect("it writes");
    replica.submit(vec![register_by(identity("vm-1", false), &address(1), 80, 1.0)]).expect("it writes");
    let count = || {
        let counts = replica.handle.catalog().counts();
        (counts.of_registrant(&registrant("vm-1")), counts.of_namespace("prod"))
    };
    assert_eq!(count(), (1, 1));
    replica.stand_down();
    let (web, nobodys) = slices("web", &["10.0.0.2", "10.0.0.3"]);
    let by_vm =
        |instance: &Arc<Instance>| Arc::new(Instance::clone(instance).with_registrant(Some(registrant("vm-1"))));
    let followed = vec![nobodys[0].clone(), by_vm(&nobodys[1])];
    replica.follow(true, vec![(web.clone(), followed.clone())]);
    assert_eq!(count(), (1, 2));
    // .1 is in the outbox.
    assert_eq!(replica.restore(3, vec![(web, followed)]), Ok(3));
    assert_eq!(count(), (2, 3));
    replica.submit(vec![remove_by(Requester::Unrestricted, &address(3), None)]).expect("it writes");
    assert_eq!(count(), (1, 2));
    replica.end();
}
