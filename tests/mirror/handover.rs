//! What a process accepted while it could not write to Kubernetes goes to the process that writes, by itself.

use std::time::{Duration, Instant};

use gangplank::grpc::proto::{
    gangplank::internal::v1::{HandOverRequest, Stamp, Word, hand_over_client::HandOverClient},
    registry::RegistrationType,
};
use hickory_proto::rr::RecordType;
use tokio::runtime::Builder;
use tonic::Code;

use super::{
    ClusterLock, addresses, dns_name, events, make_namespace, replica::Replica, tombstones::delete_namespace,
    trial::copy, wait_for_addresses,
};
use crate::support::{
    dns::{Over, answers},
    proxy::{Fault, Proxy},
    stream::{Stream, message},
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
    let mut stream = Stream::open(first.grpc);
    assert_eq!(stream.register("handed", "web", "10.16.0.1").0, 200);
    let cut = proxy.inject(Fault::Drop, |_| true);
    proxy.drop_connections();
    assert_eq!(stream.register("handed", "web", "10.16.0.3").0, 202);
    assert_eq!(first.register("handed", "web", "10.16.0.4"), 202);
    assert_eq!(first.remove("handed", "web", "10.16.0.2"), 202);
    second.wait_until_it_writes();
    // A later word: it was never there, and stays away.
    assert_eq!(second.register("handed", "web", "10.16.0.4"), 201);
    assert_eq!(second.remove("handed", "web", "10.16.0.4"), 204);
    assert_eq!(second.remove("handed", "web", "10.16.0.1"), 204);

    let begun = Instant::now();
    cut.lift();
    let end = stream.end();
    assert_eq!(end.code(), Code::Unavailable);
    let writer = end.metadata().get("gangplank-writer").expect("it says who writes");
    assert_eq!(writer, second.grpc.to_string().as_str());
    assert!(end.message().contains(&format!("register at {}", second.grpc)), "{}", end.message());
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

#[test]
fn words_that_are_too_old_are_told_by_an_event() {
    let Some(lock) = ClusterLock::take() else { return };
    let proxy = Proxy::start(lock.cluster);
    let first = writer(&proxy, &lock, "too-old", ["10.16.4.1", "10.16.4.2"]);
    let ago = Duration::from_secs(25 * 3600);
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970") - ago;
    let stamp = Stamp { clock: u64::try_from(clock.as_micros()).expect("not that late"), term: 1, generation: 1 };
    let words = ["web", "gone"].map(|service| Word {
        message: Some(Box::new(message(RegistrationType::Register, "too-old", service, "10.16.4.3"))),
        stamp: Some(stamp),
        registered_millis: 1,
        every_port: false,
        registrant: String::new(),
    });
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
    let answer = runtime.block_on(async {
        let mut client = HandOverClient::connect(format!("http://{}", first.grpc)).await.expect("it listens");
        client.send(HandOverRequest { words: words.into(), wait_millis: 0 }).await.expect("an answer").into_inner()
    });
    let details: Vec<&str> = answer.results.iter().map(|result| &*result.details).collect();
    assert!(details.len() == 2 && details.iter().all(|why| why.starts_with("too old to count")), "{details:?}");
    assert_eq!(first.metric("gangplank_registry_refused_words_total"), 2.0);
    let about = |namespace: &str, object: &str, instance: &str| {
        wait_until(&format!("an Event about the {object}"), || {
            let events = events(lock.cluster, namespace, "RegistrationTooOld");
            events.iter().any(|(about, note)| about == object && note.contains(instance)).then_some(())
        });
    };
    about("too-old", "Service web", "too-old/web: ");
    about("gangplank", "Lease gangplank-writer", "too-old/gone: ");
    assert_eq!(a(&first, "too-old"), ["10.16.4.1", "10.16.4.2"]);
}

/// The API server refuses what the writer has accepted, but not what the next one writes.
#[test]
fn words_that_a_stopping_writer_cannot_write_are_handed_over_in_its_drain_time() {
    let Some(lock) = ClusterLock::take() else { return };
    let proxy = Proxy::start(lock.cluster);
    let direct = lock.cluster.kubeconfig_for_gangplank();
    let first = writer(&proxy, &lock, "leaving", ["10.16.5.1", "10.16.5.2"]);
    proxy.inject(Fault::Drop, |call| call.resource == "endpointslices" && call.is_write());
    assert_eq!(first.register("leaving", "web", "10.16.5.3"), 202);
    let data = stop(first, 1, &["change=\"registration\"", "10.16.5.3:8080"]);

    // It is not lost: the directory still has it.
    let first = Replica::start_with(proxy.kubeconfig(), data, &["--drain", "20s"]);
    first.wait_until_it_writes();
    let second = Replica::on_standby(&direct);
    let begun = Instant::now();
    first.signal("TERM");
    second.wait_until_it_writes();
    println!("another one writes after {:?}", begun.elapsed());
    wait_for_addresses(lock.cluster, "leaving", "web", &["10.16.5.1", "10.16.5.2", "10.16.5.3"]);
    println!("handed over after {:?}", begun.elapsed());
    let (said, _) = first.exit_with(0);
    assert!(said.contains("words that Kubernetes lacked were handed over"), "{said}");
    assert_eq!(second.register("leaving", "web", "10.16.5.4"), 201);
}

/// Stops a process that keeps words, and returns its directory.
fn stop(replica: Replica, code: i32, says: &[&str]) -> tempfile::TempDir {
    replica.signal("TERM");
    let (said, data) = replica.exit_with(code);
    let line = said.lines().find(|line| says.iter().all(|words| line.contains(words)));
    assert!(line.is_some(), "no line with {says:?} in\n{said}");
    data
}

#[test]
fn writer_that_stops_without_the_api_server_names_what_it_keeps() {
    let Some(lock) = ClusterLock::take() else { return };
    let proxy = Proxy::start(lock.cluster);
    let first = writer(&proxy, &lock, "kept", ["10.16.6.1", "10.16.6.2"]);
    let away = proxy.inject(Fault::Drop, |_| true);
    proxy.drop_connections();
    assert_eq!(first.register("kept", "web", "10.16.6.3"), 202);
    assert_eq!(first.remove("kept", "web", "10.16.6.1"), 202);
    let data = stop(first, 1, &["change=\"removal\"", "service=kept/web", "10.16.6.1:8080", "data directory"]);
    away.lift();
    let again = Replica::start(proxy.kubeconfig(), data);
    wait_for_addresses(lock.cluster, "kept", "web", &["10.16.6.2", "10.16.6.3"]);
    again.terminate();
}

/// An old backup, or a snapshot of the volume, of a writer that went on under the same term.
#[test]
fn copy_from_the_middle_of_a_term_that_went_on_alone_brings_nothing_back() {
    let Some(lock) = ClusterLock::take() else { return };
    let proxy = Proxy::start(lock.cluster);
    let first = writer(&proxy, &lock, "mid-term", ["10.16.7.1", "10.16.7.2"]);
    make_namespace(lock.cluster, &mut Stream::open(first.grpc), "mid-term-gone");
    assert_eq!(first.register("mid-term-gone", "web", "10.16.7.9"), 201);
    // That Kubernetes has it is journaled with one of the next batches; until then it is in the outbox.
    (0..3).for_each(|_| assert_eq!(first.register("mid-term", "web", "10.16.7.2"), 200));
    let data = copy(first.data_dir());
    // No slice is left that tells of the removal.
    assert_eq!(first.remove("mid-term-gone", "web", "10.16.7.9"), 204);
    delete_namespace(lock.cluster, "mid-term-gone");
    assert_eq!(first.remove("mid-term", "web", "10.16.7.1"), 204);
    first.terminate();

    // The copy accepts more changes than the writer made, and has a higher generation then.
    let away = proxy.inject(Fault::Drop, |_| true);
    let alone = Replica::start(proxy.kubeconfig(), data);
    let accepted: Vec<String> = (11..31).map(|last| format!("10.16.7.{last}")).collect();
    wait_until("it accepts", || (alone.register("mid-term", "web", &accepted[0]) == 202).then_some(()));
    accepted.iter().skip(1).for_each(|address| assert_eq!(alone.register("mid-term", "web", address), 202));
    let data = alone.kill();
    away.lift();
    let again = Replica::start(proxy.kubeconfig(), data);
    again.wait_until_it_writes();
    let mut held: Vec<&str> = accepted.iter().map(String::as_str).chain(["10.16.7.2"]).collect();
    held.sort_unstable();
    wait_for_addresses(lock.cluster, "mid-term", "web", &held);
    assert_eq!(a(&again, "mid-term-gone"), [""; 0], "it was removed, and that was acknowledged");
    make_namespace(lock.cluster, &mut Stream::open(again.grpc), "mid-term-gone");
    assert_eq!(again.register("mid-term-gone", "web", "10.16.7.8"), 201);
    assert_eq!(addresses(lock.cluster, "mid-term-gone", "web"), ["10.16.7.8"]);
}
