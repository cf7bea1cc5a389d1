//! Words that leave an outbox on the answer of the process that writes, and words that are merged there.

use std::time::Duration;

use futures::FutureExt as _;

use super::{standby::TestReplica, *};
use crate::model::{PortSet, Stamp};

/// The word that registers or removes `address:80` of `service`, `ago` before now.
fn word(service: &str, address: &str, removal: bool, ago: Duration) -> OutboxWord {
    let Command::Register { service, instance, .. } = register(service, address, 80, 1.0) else {
        panic!("it registers")
    };
    let clock = UnixMillis::now().0 * 1_000 - u64::try_from(ago.as_micros()).expect("not that long ago");
    let stamp = Stamp { clock, term: 1, generation: 3 };
    let instance = Arc::unwrap_or_clone(instance).with_stamp(stamp);
    OutboxWord { service, id: instance.id(), instance: (!removal).then(|| Arc::new(instance)), stamp }
}

const HOUR: Duration = Duration::from_secs(3600);

impl TestReplica {
    fn outbox(&self, after: Option<Stamp>, limit: usize) -> OutboxPage {
        self.runtime.block_on(self.handle.outbox(after, limit)).expect("the writer is there")
    }

    fn merge(&self, words: Vec<OutboxWord>) -> Result<MergeAck, Unavailable> {
        self.runtime.block_on(self.handle.merge(words))
    }

    fn outcome(&self, word: OutboxWord) -> MergeOutcome {
        self.merge(vec![word]).expect("it writes").outcomes.remove(0)
    }
}

/// All of it is in its outbox, and ages as any outbox does.
#[test]
fn directory_that_never_wrote_to_kubernetes_hands_over_what_it_holds() {
    let dir = tempfile::tempdir().expect("a directory");
    TestRegistry::on(&dir, 10).run_with(vec![vec![register("web", "10.0.0.1", 80, 1.0)]]);
    let (registry, _) = with_kubernetes(&dir);
    let local = registry.writer.mirror_records.awaited().expect("it waits for Kubernetes");
    assert_eq!((local.term.term, local.outbox.len()), (0, 1));
    registry.handle.status().standby(&LeaseHolder::default());
    let replica = TestReplica::run(registry);
    let outbox = replica.outbox(None, 9);
    assert_eq!(outbox.total, 1);
    // What the process that writes has answered for is not said again when this one takes the Lease.
    replica.runtime.block_on(replica.handle.handed_over(outbox.words)).expect("it is there");
    let held = KubernetesState { term: 4, new_term: 5, had_lease: true, ..KubernetesState::default() };
    assert_eq!(
        replica.runtime.block_on(async { replica.handle.restore(replica.handle.begin_take_over().await?, held).await }),
        Ok(5)
    );
    assert_eq!(replica.handle.catalog().instances(), 0);
    replica.end();
}

#[test]
fn word_leaves_the_outbox_when_it_was_handed_over_and_is_not_sent_again_after_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    for last in 1..=4 {
        replica.submit(vec![register("web", &format!("10.0.0.{last}"), 80, 1.0)]).expect("it writes");
    }
    assert_eq!(replica.outbox(None, 9).total, 0, "it writes itself");
    replica.stand_down();
    let first = replica.outbox(None, 2);
    assert_eq!((first.words.len(), first.total), (2, 4));
    let rest = replica.outbox(Some(first.words[1].stamp), 9).words;
    let addresses = |words: &[OutboxWord]| words.iter().map(|word| word.id.address.to_string()).collect::<Vec<_>>();
    assert_eq!(
        (addresses(&first.words), addresses(&rest)),
        (vec!["10.0.0.1".into(), "10.0.0.2".into()], vec!["10.0.0.3".into(), "10.0.0.4".into()])
    );
    let stale = OutboxWord { stamp: Stamp::default(), ..rest[1].clone() };
    let done = [&first.words[..], &[stale]].concat();
    replica.runtime.block_on(replica.handle.handed_over(done)).expect("it is there");
    assert_eq!(replica.outbox(None, 9).words, rest, "another stamp is another word");
    replica.end();

    let (registry, _) = with_kubernetes(&dir);
    let local = registry.writer.mirror_records.awaited().expect("it waits for Kubernetes");
    assert_eq!(local.outbox.len(), 2);
    assert!(scrape(&registry.metrics).contains("\ngangplank_registry_outbox_words 2\n"));
}

#[test]
fn service_whose_words_were_all_handed_over_is_not_behind() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    for (service, address) in [("web", "10.0.0.1"), ("web", "10.0.0.2"), ("db", "10.0.0.3")] {
        replica.submit(vec![register(service, address, 80, 1.0)]).expect("it writes");
    }
    replica.stand_down();
    let mut words = replica.outbox(None, 9).words;
    let web = words.remove(1);
    replica.runtime.block_on(replica.handle.handed_over(words)).expect("it is there");
    assert_eq!(replica.handle.mirror_progress().lag().services, 1);
    let left = replica.end();
    assert_eq!(left, [web]);
}

#[test]
fn handed_over_words_are_merged_by_their_stamps() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    let minute = Duration::from_secs(60);
    let put = word("web", "10.0.0.1", false, 2 * minute);
    let ack = replica.merge(vec![put.clone(), put.clone(), word("web", "10.0.0.2", true, minute)]).expect("it writes");
    assert_eq!(ack.outcomes, [MergeOutcome::Merged, MergeOutcome::Merged, MergeOutcome::Merged]);
    assert_eq!(replica.addresses(), ["web 10.0.0.1"]);
    assert_eq!(replica.handle.mirror_progress().lag().services, 1, "the mirror has to write it");
    // A registration that was removed later stays removed, also when the removal came first.
    assert_eq!(replica.outcome(word("web", "10.0.0.1", true, minute)), MergeOutcome::Merged);
    assert_eq!(replica.outcome(put), MergeOutcome::Outranked);
    assert_eq!(replica.outcome(word("web", "10.0.0.2", false, 2 * minute)), MergeOutcome::Outranked);
    assert_eq!(replica.addresses(), Vec::<String>::new());
    // A registration that was acknowledged here is later.
    replica.submit(vec![register("web", "10.0.0.3", 80, 1.0)]).expect("it writes");
    assert_eq!(replica.outcome(word("web", "10.0.0.3", true, minute)), MergeOutcome::Outranked);
    assert_eq!(replica.addresses(), ["web 10.0.0.3"]);
    replica.end();
}

#[test]
fn words_that_are_too_old_or_from_the_future_are_not_merged() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    assert_eq!(replica.outcome(word("web", "10.0.0.1", false, 23 * HOUR)), MergeOutcome::Merged);
    assert_eq!(replica.outcome(word("web", "10.0.0.2", false, 25 * HOUR)), MergeOutcome::TooOld);
    // A known instance needs no tombstone.
    let known = word("web", "10.0.0.1", true, 25 * HOUR);
    assert_eq!(replica.outcome(known), MergeOutcome::Outranked);
    let mut future = word("web", "10.0.0.4", false, Duration::ZERO);
    future.stamp.clock += 3_600_000_000;
    assert!(matches!(replica.outcome(future), MergeOutcome::ClockAhead(lead) if lead > HOUR / 2));
    let before = UnixMillis::now().0 * 1_000;
    replica.submit(vec![register("web", "10.0.0.5", 80, 1.0)]).expect("it writes");
    let instances = replica.handle.catalog().services().remove(0).1.instances;
    let clock = instances.iter().map(|one| one.stamp().clock).max().expect("some");
    assert!((before..before + 60_000_000).contains(&clock), "the clock was not pulled ahead");
    assert_eq!(replica.addresses(), ["web 10.0.0.1", "web 10.0.0.5"]);
    replica.end();
}

#[test]
fn handed_over_registration_needs_what_a_registration_needs() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    let mut reserved = word("web", "10.0.0.1", true, HOUR);
    reserved.service = VALIDATOR.service("kube-system", "web").expect("valid");
    assert_eq!(replica.outcome(reserved), MergeOutcome::Refused(KubernetesRefusal::Reserved));
    let foreign = ClusterFact::Service { service: VALIDATOR.service("prod", "db").expect("valid"), foreign: true };
    replica.runtime.block_on(replica.handle.learn(vec![foreign])).expect("it is there");
    let refused = MergeOutcome::Refused(KubernetesRefusal::ForeignService);
    assert_eq!(replica.outcome(word("db", "10.0.0.1", false, HOUR)), refused);
    assert_eq!(replica.outcome(word("db", "10.0.0.1", true, HOUR)), refused, "nothing can be remembered there");
    replica.end();
}

/// The slice is replaced afterwards, so that nobody has the words any more.
#[test]
fn words_of_a_late_slice_that_do_not_count_are_told_and_its_age_limit_is_merged() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    let [web, db] = ["web", "db"].map(|service| VALIDATOR.service("prod", service).expect("valid"));
    let foreign = ClusterFact::Service { service: db.clone(), foreign: true };
    replica.runtime.block_on(replica.handle.learn(vec![foreign])).expect("it is there");
    let merge = |service: &ServiceKey, words: Vec<OutboxWord>, refuse_before| {
        let slice = LateSlice { service: service.clone(), words, refuse_before };
        replica.runtime.block_on(replica.handle.merge_late(slice)).expect("it writes").outcomes
    };
    let told = || {
        let told = replica.handle.refused_words().take().now_or_never().unwrap_or_default();
        told.into_iter().map(|word| (word.id.address.to_string(), word.reason)).collect::<Vec<_>>()
    };
    let mut future = word("web", "10.0.0.2", false, Duration::ZERO);
    future.stamp.clock += 3_600_000_000;
    let refuse_before = UnixMillis::now().0 * 1_000 - 3_600_000_000;
    let words = vec![word("web", "10.0.0.1", false, 2 * HOUR), future, word("web", "10.0.0.3", false, 25 * HOUR)];
    merge(&web, words, refuse_before);
    assert_eq!(replica.addresses(), ["web 10.0.0.1"], "the age limit is about what the slice does not say");
    let wanted = [("10.0.0.2", WordRefusal::ClockAhead), ("10.0.0.3", WordRefusal::TooOld)];
    assert_eq!(told(), wanted.map(|(address, reason)| (address.into(), reason)));
    merge(&db, vec![word("db", "10.0.0.1", false, HOUR)], 0);
    assert_eq!(told(), [("10.0.0.1".into(), WordRefusal::Forbidden(KubernetesRefusal::ForeignService))]);
    assert_eq!(replica.handle.catalog().tombstones(&web).refuse_before(), refuse_before);
    assert_eq!(replica.outcome(word("web", "10.0.0.4", false, 2 * HOUR)), MergeOutcome::TooOld);
    assert_eq!(told(), [("10.0.0.4".into(), WordRefusal::TooOld)]);
    assert!(matches!(replica.outcome(word("db", "10.0.0.1", false, HOUR)), MergeOutcome::Refused(_)));
    assert_eq!(told(), [], "its sender keeps it");
    replica.end();
}

/// As that of each of its instances would.
#[test]
fn removal_of_an_address_that_is_too_old_for_a_tombstone_counts_for_what_is_registered() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    // Registered long ago, and known ever since.
    let held = word("web", "10.0.0.26", false, 26 * HOUR);
    replica.stand_down();
    assert_eq!(replica.restore(3, vec![(held.service, vec![held.instance.expect("it registers")])]), Ok(3));
    assert_eq!(replica.addresses(), ["web 10.0.0.26"]);
    let removal = |address: &str| {
        let mut removal = word("web", address, true, 25 * HOUR);
        removal.id.ports = PortSet::every();
        removal
    };
    assert_eq!(replica.outcome(removal("10.0.0.27")), MergeOutcome::Outranked);
    assert_eq!(replica.outcome(removal("10.0.0.26")), MergeOutcome::Merged);
    assert_eq!(replica.addresses(), Vec::<String>::new());
    replica.end();
}

#[test]
fn handed_over_removal_of_an_address_removes_what_is_older() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    for address in ["10.0.0.1", "10.0.0.2"] {
        assert_eq!(replica.outcome(word("web", address, false, 2 * HOUR)), MergeOutcome::Merged);
    }
    let mut removal = word("web", "10.0.0.1", true, HOUR);
    removal.id.ports = PortSet::every();
    assert_eq!(replica.outcome(removal), MergeOutcome::Merged);
    assert_eq!(replica.addresses(), ["web 10.0.0.2"]);
    let mut other = word("web", "10.0.0.1", false, HOUR + HOUR / 2);
    other.id.ports = PortSet::default();
    assert_eq!(replica.outcome(other), MergeOutcome::Outranked, "another set of ports");
    replica.end();
}

#[test]
fn process_that_does_not_write_merges_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    replica.stand_down();
    let refused = replica.merge(vec![word("web", "10.0.0.1", false, HOUR)]).expect_err("it is on standby");
    assert!(matches!(refused, Unavailable::Standby(_)));
    assert_eq!(replica.end(), []);
}

#[test]
fn merged_words_survive_a_restart_and_are_unconfirmed_until_they_are_mirrored() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    let put = word("web", "10.0.0.1", false, HOUR);
    assert_eq!(replica.outcome(put.clone()), MergeOutcome::Merged);
    assert_eq!(replica.end(), std::slice::from_ref(&put));
    let replica = TestReplica::start(&dir);
    assert_eq!(replica.addresses(), ["web 10.0.0.1"]);
    let generation = replica.handle.catalog().generation();
    replica.runtime.block_on(replica.handle.mirrored(vec![(put.service, generation)])).expect("it is there");
    assert_eq!(replica.end(), []);
}
