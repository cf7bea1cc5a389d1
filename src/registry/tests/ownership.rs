//! An instance is changed by who has registered it, also after a restart, a take-over and a hand-over.

use std::net::Ipv4Addr;

use super::{standby::TestReplica, *};
use crate::model::{PortSet, Stamp};

pub(super) fn identity(name: &str, overrides: bool) -> Requester {
    Requester::Identity { registrant: registrant(name), overrides, peer: Ipv4Addr::LOCALHOST.into() }
}

pub(super) fn registrant(name: &str) -> Registrant {
    Registrant::new(name.into()).expect("a name")
}

pub(super) fn register_by(by: Requester, address: &str, port: u16, weight: f32) -> Command {
    match register("web", address, port, weight) {
        Command::Register { service, instance, .. } => Command::Register { service, instance, by },
        other => panic!("{other:?} registers"),
    }
}

/// Without a port: everything at the address.
pub(super) fn remove_by(by: Requester, address: &str, port: Option<u16>) -> Command {
    let service = VALIDATOR.service("prod", "web").expect("valid");
    let ports = port.map(|port| (Protocol::Tcp, port)).into_iter().collect();
    let address = VALIDATOR.address(address).expect("valid");
    Command::Unregister { service, address, ports: PortSet::new(ports), by }
}

/// Who has registered each instance of web.
fn registrants(catalog: &Catalog) -> Vec<(String, Option<String>)> {
    let web = catalog.get(&VALIDATOR.service("prod", "web").expect("valid")).unwrap_or_default();
    let of = |one: &Arc<Instance>| (one.id().to_string(), one.registrant().map(ToString::to_string));
    web.instances.iter().map(of).collect()
}

pub(super) fn outcomes(acks: &[Ack]) -> Vec<Outcome> {
    acks.iter().flat_map(|ack| ack.outcomes.clone()).collect()
}

#[test]
fn another_identity_changes_nothing_in_the_same_batch_and_after_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let [vm, other, ops] = [identity("vm-1", false), identity("vm-2", false), identity("ops", true)];
    let owned = || Outcome::Owned(registrant("vm-1"));
    let (acks, catalog, metrics) = TestRegistry::on(&dir, 10).run_with(vec![vec![
        register_by(vm.clone(), "10.0.0.1", 80, 1.0),
        register_by(vm.clone(), "10.0.0.1", 81, 1.0),
        register_by(other.clone(), "10.0.0.1", 80, 2.0),
        remove_by(other.clone(), "10.0.0.1", Some(80)),
        register_by(other.clone(), "10.0.0.1", 82, 1.0),
        remove_by(other.clone(), "10.0.0.1", None),
    ]]);
    let created = || Outcome::Created;
    assert_eq!(outcomes(&acks), [created(), created(), owned(), owned(), created(), owned()]);
    assert!(
        scrape(&metrics).contains("gangplank_registry_commands_total{outcome=\"owned\"} 3"),
        "{}",
        scrape(&metrics)
    );
    let of = |port: u16, by: &str| (format!("10.0.0.1:{port}"), Some(by.to_owned()));
    assert_eq!(registrants(&catalog), [of(80, "vm-1"), of(81, "vm-1"), of(82, "vm-2")]);

    let (acks, catalog, _) = TestRegistry::on(&dir, 10).run_with(vec![vec![
        register_by(other.clone(), "10.0.0.1", 80, 2.0),
        register_by(vm, "10.0.0.1", 80, 1.0),
        remove_by(other.clone(), "10.0.0.1", Some(82)),
        register_by(ops.clone(), "10.0.0.1", 80, 1.0),
        remove_by(ops, "10.0.0.1", Some(81)),
        register_by(other, "10.0.0.1", 81, 1.0),
    ]]);
    let (removed, updated) = (|| Outcome::Removed(1), Outcome::Updated);
    assert_eq!(outcomes(&acks), [owned(), Outcome::Unchanged, removed(), updated, removed(), created()]);
    assert_eq!(registrants(&catalog), [of(80, "ops"), of(81, "vm-2")], "an override takes the instance over");
}

#[test]
fn what_belongs_to_nobody_is_taken_over_once_and_nameless_callers_leave_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let vm = identity("vm-1", false);
    let nameless = Requester::Unrestricted;
    let (_, catalog, _) =
        TestRegistry::on(&dir, 10).run_with(vec![vec![register_by(nameless.clone(), "10.0.0.1", 80, 1.0)]]);
    assert_eq!(registrants(&catalog), [("10.0.0.1:80".into(), None)]);

    let (acks, catalog, metrics) = TestRegistry::on(&dir, 10).run_with(vec![vec![
        register_by(vm.clone(), "10.0.0.1", 80, 1.0),
        register_by(vm, "10.0.0.1", 80, 1.0),
        register_by(nameless, "10.0.0.1", 80, 3.0),
        register_by(identity("vm-2", false), "10.0.0.1", 80, 1.0),
    ]]);
    let owned = Outcome::Owned(registrant("vm-1"));
    assert_eq!(outcomes(&acks), [Outcome::Updated, Outcome::Unchanged, Outcome::Updated, owned]);
    assert_eq!(registrants(&catalog), [("10.0.0.1:80".into(), Some("vm-1".into()))]);
    assert!(scrape(&metrics).contains("gangplank_registry_changes_total 2"), "a watch sees both");
}

/// A follower reads it from the slices, and goes on with it when it writes.
#[test]
fn registrant_counts_at_the_next_writer() {
    let dir = tempfile::tempdir().expect("a directory");
    let replica = TestReplica::start(&dir);
    replica.stand_down();
    let instance = |by: Option<&str>, address: &str, clock: u64| match register("web", address, 80, 1.0) {
        Command::Register { instance, .. } => {
            Arc::new(Arc::unwrap_or_clone(instance).with_registrant(by.map(registrant)).with_stamp(Stamp {
                clock,
                term: 1,
                generation: 3,
            }))
        }
        other => panic!("{other:?} registers"),
    };
    let now = UnixMillis::now().0 * 1_000;
    let web = VALIDATOR.service("prod", "web").expect("valid");
    let in_slices = vec![instance(Some("vm-1"), "10.0.0.1", now - 9), instance(None, "10.0.0.2", now - 8)];
    assert_eq!(replica.restore(3, vec![(web.clone(), in_slices)]), Ok(3));
    let ranges = vec![ClusterFact::ServiceRanges(Vec::new())];
    replica.runtime.block_on(replica.handle.learn(ranges)).expect("it writes");
    // Handed over by the process that wrote before.
    let handed = instance(Some("vm-3"), "10.0.0.3", now - 7);
    let word = OutboxWord { service: web, id: handed.id(), stamp: handed.stamp(), instance: Some(handed) };
    replica.runtime.block_on(replica.handle.merge(vec![word])).expect("it writes");

    let other = identity("vm-2", false);
    let commands = (1..=3).map(|last| register_by(other.clone(), &format!("10.0.0.{last}"), 80, 2.0)).collect();
    let acked = replica.submit(commands).expect("it writes");
    let owned = |by| Outcome::Owned(registrant(by));
    assert_eq!(acked.outcomes, [owned("vm-1"), Outcome::Updated, owned("vm-3")]);
    let of = |last: u8, by: &str| (format!("10.0.0.{last}:80"), Some(by.to_owned()));
    assert_eq!(registrants(replica.handle.catalog()), [of(1, "vm-1"), of(2, "vm-2"), of(3, "vm-3")]);
    let asks = |by: Requester, last: u8| {
        replica.handle.changes_others_instance(&remove_by(by, &format!("10.0.0.{last}"), None))
    };
    assert_eq!([1, 2, 3].map(|last| asks(other.clone(), last)), [true, false, true]);
    assert!(!asks(Requester::Unrestricted, 1) && !asks(other, 9));
    replica.end();
}

/// The text of a name is shared, so an instance is larger by a pointer and its length.
#[test]
fn registrant_takes_16_bytes_of_an_instance() {
    let named = |instance: &Command| match instance {
        Command::Register { by: Requester::Identity { registrant, .. }, .. } => registrant.as_str().as_ptr(),
        other => panic!("{other:?} has a name"),
    };
    let vm = identity("vm-1", false);
    let [one, two] = ["10.0.0.1", "10.0.0.2"].map(|address| register_by(vm.clone(), address, 80, 1.0));
    assert_eq!(named(&one), named(&two));
    assert_eq!(size_of::<Option<Registrant>>(), 16);
    assert_eq!(size_of::<Instance>(), 128);
}
