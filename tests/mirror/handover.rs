//! What a process accepted while it could not write to Kubernetes goes to the process that writes, by itself.

use hickory_proto::rr::RecordType;

use super::{ClusterLock, addresses, dns_name, make_namespace, replica::Replica, wait_for_addresses};
use crate::support::{
    dns::{Over, answers},
    proxy::{Fault, Proxy},
    stream::Stream,
    wait_until,
};

fn a(replica: &Replica, namespace: &str) -> Vec<String> {
    answers(replica.dns, Over::Udp, &dns_name(namespace, "web"), RecordType::A)
}

fn empty() -> tempfile::TempDir {
    tempfile::TempDir::new().expect("a temporary directory can be made")
}

/// A writer behind `proxy` that knows `namespace`, with two instances of web.
fn writer(proxy: &Proxy, lock: &ClusterLock, namespace: &str, instances: [&str; 2]) -> Replica {
    let first = Replica::start(proxy.kubeconfig(), empty());
    first.wait_until_it_writes();
    make_namespace(lock.cluster, &mut Stream::open(first.grpc), namespace);
    instances.iter().for_each(|address| assert_eq!(first.register(namespace, "web", address), 201));
    first
}

#[test]
fn words_of_a_writer_that_was_cut_off_are_handed_over_when_it_is_back() {
    let Some(lock) = ClusterLock::take() else { return };
    let proxy = Proxy::start(lock.cluster);
    let direct = lock.cluster.kubeconfig_for_gangplank();
    let first = writer(&proxy, &lock, "handed", ["10.16.0.1", "10.16.0.2"]);
    let second = Replica::on_standby(&direct);
    let cut = proxy.inject(Fault::Drop, |_| true);
    proxy.drop_connections();
    assert_eq!(first.register("handed", "web", "10.16.0.3"), 202);
    assert_eq!(first.register("handed", "web", "10.16.0.4"), 202);
    assert_eq!(first.remove("handed", "web", "10.16.0.2"), 202);
    second.wait_until_it_writes();
    // A later word: it was never there, and stays away.
    assert_eq!(second.register("handed", "web", "10.16.0.4"), 201);
    assert_eq!(second.remove("handed", "web", "10.16.0.4"), 204);
    assert_eq!(second.remove("handed", "web", "10.16.0.1"), 204);

    let begun = std::time::Instant::now();
    cut.lift();
    wait_for_addresses(lock.cluster, "handed", "web", &["10.16.0.3"]);
    wait_until("the outbox is empty", || (first.metric("gangplank_registry_outbox_words") == 0.0).then_some(()));
    println!("handed over {:?} after the partition", begun.elapsed());
    wait_until("both answer alike", || {
        [&first, &second].iter().all(|replica| a(replica, "handed") == ["10.16.0.3"]).then_some(())
    });
    let count = |result| first.metric(&format!("gangplank_registry_handed_over_words_total{{result=\"{result}\"}}"));
    assert_eq!((count("confirmed"), count("outranked"), count("too_old")), (2.0, 1.0, 0.0));

    // It does not send them again.
    let again = Replica::start(&direct, first.terminate());
    again.wait_until_it_follows();
    assert_eq!(again.metric("gangplank_registry_outbox_words"), 0.0);
    assert_eq!(a(&second, "handed"), ["10.16.0.3"]);
}

/// The directory of a replica that is gone, mounted by another one.
#[test]
fn words_in_a_directory_are_handed_over_at_the_start() {
    let Some(lock) = ClusterLock::take() else { return };
    let proxy = Proxy::start(lock.cluster);
    let direct = lock.cluster.kubeconfig_for_gangplank();
    let first = writer(&proxy, &lock, "mounted", ["10.16.1.1", "10.16.1.2"]);
    let second = Replica::on_standby(&direct);
    proxy.inject(Fault::Drop, |_| true);
    proxy.drop_connections();
    assert_eq!(first.register("mounted", "web", "10.16.1.3"), 202);
    let data = first.kill();
    second.wait_until_it_writes();
    assert_eq!(second.remove("mounted", "web", "10.16.1.1"), 204);

    let third = Replica::start(&direct, data);
    wait_for_addresses(lock.cluster, "mounted", "web", &["10.16.1.2", "10.16.1.3"]);
    wait_until("the outbox is empty", || (third.metric("gangplank_registry_outbox_words") == 0.0).then_some(()));
    assert_eq!(a(&second, "mounted"), ["10.16.1.2", "10.16.1.3"]);
}

/// The receiver is killed after it has journaled the words, and before it can have answered: nothing reaches Kubernetes.
#[test]
fn words_whose_receiver_is_killed_are_sent_again() {
    let Some(lock) = ClusterLock::take() else { return };
    let [of_first, of_second] = [(); 2].map(|()| Proxy::start(lock.cluster));
    let first = writer(&of_first, &lock, "killed-receiver", ["10.16.2.1", "10.16.2.2"]);
    let second = Replica::on_standby(of_second.kubeconfig());
    let cut = of_first.inject(Fault::Drop, |_| true);
    of_first.drop_connections();
    assert_eq!(first.register("killed-receiver", "web", "10.16.2.3"), 202);
    second.wait_until_it_writes();
    let lost = of_second.inject(Fault::Drop, |call| call.resource == "endpointslices" && call.is_write());
    cut.lift();
    let all = ["10.16.2.1", "10.16.2.2", "10.16.2.3"];
    wait_until("the receiver has it", || (a(&second, "killed-receiver") == all).then_some(()));
    let data = second.kill();
    assert_eq!(addresses(lock.cluster, "killed-receiver", "web"), ["10.16.2.1", "10.16.2.2"]);
    assert_eq!(first.metric("gangplank_registry_outbox_words"), 1.0);

    // The killed one is back before the first one takes over, or is the one that follows then.
    lost.lift();
    let second = Replica::start(of_second.kubeconfig(), data);
    wait_for_addresses(lock.cluster, "killed-receiver", "web", &all);
    wait_until("nothing is left", || {
        let left = [&first, &second].map(|replica| replica.metric("gangplank_registry_outbox_words"));
        (left == [0.0, 0.0]).then_some(())
    });
    assert_eq!(addresses(lock.cluster, "killed-receiver", "web"), all);
}

#[test]
fn words_of_a_paused_writer_are_handed_over_when_it_goes_on() {
    let Some(lock) = ClusterLock::take() else { return };
    let proxy = Proxy::start(lock.cluster);
    let direct = lock.cluster.kubeconfig_for_gangplank();
    let first = writer(&proxy, &lock, "paused-words", ["10.16.3.1", "10.16.3.2"]);
    let second = Replica::on_standby(&direct);
    // Its own writes get lost, so that it is paused with something in its outbox.
    let lost = proxy.inject(Fault::Drop, |call| call.resource == "endpointslices" && call.is_write());
    assert_eq!(first.register("paused-words", "web", "10.16.3.3"), 202);
    first.signal("STOP");
    second.wait_until_it_writes();
    assert_eq!(second.remove("paused-words", "web", "10.16.3.1"), 204);
    lost.lift();
    first.signal("CONT");
    wait_for_addresses(lock.cluster, "paused-words", "web", &["10.16.3.2", "10.16.3.3"]);
    wait_until("the outbox is empty", || (first.metric("gangplank_registry_outbox_words") == 0.0).then_some(()));
}
