//! One process at a time writes: the Lease, standby, and what a process that lost the Lease may do.

use std::{fs, net::SocketAddr, time::Instant};

use gangplank::replicas::election::RETRY_PERIOD;
use hickory_proto::rr::RecordType;
use tempfile::TempDir;

use super::{ClusterLock, MirrorHarness, addresses, replica::Replica, serve, serve_by, wait_for_addresses};
use crate::support::{
    dns::{Over, answers},
    http,
    proxy::{Call, Proxy},
    server::Process,
    stream::Stream,
    wait_until,
};

fn a(dns: SocketAddr, name: &str) -> Vec<String> {
    answers(dns, Over::Udp, &format!("{name}.svc.cluster.local."), RecordType::A)
}

#[test]
fn second_process_waits_on_standby_and_takes_over() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let mut harness =
        MirrorHarness { server: serve_by(&kubeconfig, &["--drain", "1s"]), cluster: lock.cluster, _lock: lock };
    harness.create_namespace("standby");
    assert_eq!(harness.register("standby", "web", "10.6.0.1", "http=80").0, Some(0));

    let second = Replica::on_standby(&kubeconfig);
    assert_eq!(second.register("standby", "web", "10.6.0.9"), 503);
    assert_eq!(harness.register("standby", "web", "10.6.0.2", "http=80").0, Some(0));
    assert_eq!(addresses(harness.cluster, "standby", "web"), ["10.6.0.1", "10.6.0.2"]);

    // It leaves in order: the other need not wait until the Lease expires.
    let begun = Instant::now();
    harness.server.signal_terminate();
    second.wait_until_it_writes();
    println!("handed over after {:?}", begun.elapsed());
    assert!(harness.server.exit().success());
    assert_eq!(a(second.dns, "web.standby"), ["10.6.0.1", "10.6.0.2"]);
    assert_eq!(second.register("standby", "web", "10.6.0.3"), 201);

    // It is killed: the next one waits.
    let third = Replica::on_standby(&kubeconfig);
    let begun = Instant::now();
    drop(second);
    third.wait_until_it_writes();
    println!("taken over {:?} after a kill", begun.elapsed());
    assert_eq!(a(third.dns, "web.standby"), ["10.6.0.1", "10.6.0.2", "10.6.0.3"]);
    wait_for_addresses(harness.cluster, "standby", "web", &["10.6.0.1", "10.6.0.2", "10.6.0.3"]);
}

/// The process on standby has just read the Lease when the writer leaves: it does not wait for its next reading.
#[test]
fn released_lease_is_taken_at_once() {
    let Some(lock) = ClusterLock::take() else { return };
    let proxy = Proxy::start(lock.cluster);
    let flags = ["--drain", "1s"];
    let mut harness = MirrorHarness { server: serve(lock.cluster, &flags), cluster: lock.cluster, _lock: lock };
    harness.create_namespace("at-once");
    assert_eq!(harness.register("at-once", "web", "10.6.1.1", "http=80").0, Some(0));
    let second = Replica::on_standby(proxy.kubeconfig());
    let is_watched = |call: &Call| call.is("watch", "leases") && call.status == Some(200);
    wait_until("the Lease is watched", || (proxy.count(is_watched) > 0).then_some(()));
    proxy.forget_calls();
    wait_until("the Lease is read", || (proxy.count(|call| call.is("get", "leases")) > 0).then_some(()));
    let begun = Instant::now();
    harness.server.signal_terminate();
    second.wait_until_it_writes();
    let took = begun.elapsed();
    println!("handed over after {took:?}");
    assert!(took < RETRY_PERIOD.mul_f64(0.75), "{took:?}");
    assert!(harness.server.exit().success());
    assert_eq!(a(second.dns, "web.at-once"), ["10.6.1.1"]);
}

#[test]
fn paused_writer_stops_when_it_goes_on_and_undoes_nothing() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let mut harness = MirrorHarness { server: serve_by(&kubeconfig, &[]), cluster: lock.cluster, _lock: lock };
    harness.create_namespace("paused");
    for address in ["10.7.0.1", "10.7.0.2"] {
        assert_eq!(Stream::open(harness.server.grpc).register("paused", "web", address).0, 201);
    }
    let second = Replica::on_standby(&kubeconfig);
    harness.server.signal("STOP");
    second.wait_until_it_writes();
    assert_eq!(Stream::open(second.grpc).remove("paused", "web", "10.7.0.1").0, 204);
    assert_eq!(second.register("paused", "web", "10.7.0.3"), 201);

    harness.server.signal("CONT");
    assert_eq!(harness.server.exit().code(), Some(1));
    let log = harness.server.stderr();
    assert!(log.contains("the Lease gangplank/gangplank-writer is held by"), "{log}");
    assert_eq!(a(second.dns, "web.paused"), ["10.7.0.2", "10.7.0.3"]);
    assert_eq!(addresses(harness.cluster, "paused", "web"), ["10.7.0.2", "10.7.0.3"]);
}

#[test]
fn directory_that_slept_brings_back_nothing_that_was_removed() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let flags = ["--service-linger", "0s", "--drain", "1s"];
    let mut harness = MirrorHarness { server: serve_by(&kubeconfig, &flags), cluster: lock.cluster, _lock: lock };
    harness.create_namespace("slept");
    assert_eq!(harness.register("slept", "web", "10.8.0.1", "http=80").0, Some(0));
    assert!(harness.server.terminate().success());

    // Another one removes everything: no slice is left that could show its term.
    let slept = std::mem::replace(&mut harness.server, serve_by(&kubeconfig, &flags));
    assert_eq!(harness.deregister("slept", "web", "10.8.0.1").0, Some(0));
    wait_for_addresses(harness.cluster, "slept", "web", &[]);
    assert!(harness.server.terminate().success());

    harness.server = slept.restart();
    assert_eq!(a(harness.server.dns, "web.slept"), Vec::<String>::new());
    assert_eq!(harness.register("slept", "other", "10.8.0.2", "http=80").0, Some(0));
    assert_eq!(addresses(harness.cluster, "slept", "web"), Vec::<String>::new());
}

#[test]
fn deleted_lease_is_made_again_by_its_holder() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let harness = MirrorHarness { server: serve_by(&kubeconfig, &[]), cluster: lock.cluster, _lock: lock };
    harness.create_namespace("deleted-lease");
    assert_eq!(harness.register("deleted-lease", "web", "10.9.0.1", "http=80").0, Some(0));
    let lease = || harness.cluster.kubectl(&["get", "lease", "gangplank-writer", "-n", "gangplank", "-o", "json"]);
    let term = |json: &str| {
        let json: serde_json::Value = serde_json::from_str(json).expect("JSON");
        let term = json["metadata"]["annotations"]["gangplank.dev/term"].as_str().expect("it is there").to_owned();
        term.parse::<u64>().expect("a number")
    };
    let before = term(&lease());
    harness.cluster.kubectl(&["delete", "lease", "gangplank-writer", "-n", "gangplank"]);
    wait_until("it is there again", || {
        let found = harness.cluster.kubectl(&["get", "leases", "-n", "gangplank", "-o", "name"]);
        found.contains("gangplank-writer").then_some(())
    });
    assert!(term(&lease()) > before);
    assert_eq!(harness.register("deleted-lease", "web", "10.9.0.2", "http=80").0, Some(0));
    assert_eq!(addresses(harness.cluster, "deleted-lease", "web"), ["10.9.0.1", "10.9.0.2"]);
}

/// The process on a copy of a directory whose owner runs is another one.
#[test]
fn copy_of_a_directory_in_use_waits_on_standby() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let harness = MirrorHarness { server: serve_by(&kubeconfig, &[]), cluster: lock.cluster, _lock: lock };
    harness.create_namespace("copied");
    assert_eq!(harness.register("copied", "web", "10.10.0.1", "http=80").0, Some(0));
    let copy = TempDir::new().expect("a temporary directory can be made");
    for file in fs::read_dir(harness.server.data_dir()).expect("a directory") {
        let file = file.expect("an entry");
        fs::copy(file.path(), copy.path().join(file.file_name())).expect("both are on disk");
    }
    let flags = ["--kubeconfig", kubeconfig.to_str().expect("a path in UTF-8")];
    let process = Process::serve(copy.path(), &flags);
    let [grpc, _, admin] = process.listening();
    wait_until("it is on standby", || http::get(admin, "/readyz/registrations").1.contains("on standby").then_some(()));
    assert_eq!(Stream::open(grpc).register("copied", "web", "10.10.0.9").0, 503);
    assert_eq!(harness.register("copied", "web", "10.10.0.2", "http=80").0, Some(0));
    assert_eq!(addresses(harness.cluster, "copied", "web"), ["10.10.0.1", "10.10.0.2"]);
}
