//! Processes that do not write: they answer what the writer answers, and go on when it is gone.

use std::net::SocketAddr;

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::RecordType,
};

use super::{ClusterLock, MirrorHarness, dns_name, dns_probe::DnsProbe, make_namespace, replica::Replica, serve_by};
use crate::support::{
    dns::{Over, answers, ask},
    http,
    proxy::{Fault, Proxy},
    stream::Stream,
    wait_until,
};

/// Everything in an answer but its id; records in order, because weights shuffle them.
fn content(answer: &Message) -> (ResponseCode, bool, [Vec<String>; 3]) {
    let sorted = |records: &[hickory_proto::rr::Record]| {
        let mut records: Vec<String> = records.iter().map(ToString::to_string).collect();
        records.sort();
        records
    };
    let sections = [sorted(&answer.answers), sorted(&answer.authorities), sorted(&answer.additionals)];
    (answer.response_code, answer.authoritative, sections)
}

/// Asks both for each name and type, until they answer alike in everything, the SOA serial too.
fn wait_until_equal(one: SocketAddr, other: SocketAddr, names: &[String]) {
    const TYPES: [RecordType; 6] =
        [RecordType::A, RecordType::AAAA, RecordType::SRV, RecordType::PTR, RecordType::SOA, RecordType::ANY];
    for name in names {
        for rtype in TYPES {
            wait_until(&format!("both say the same of {name} {rtype}"), || {
                let said = |dns| content(&ask(dns, Over::Tcp, name, rtype));
                (said(one) == said(other)).then_some(())
            });
        }
    }
}

#[test]
fn follower_answers_dns_and_readers_as_the_writer_does() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let harness = MirrorHarness { server: serve_by(&kubeconfig, &[]), cluster: lock.cluster, _lock: lock };
    let mut stream = Stream::open(harness.server.grpc);
    make_namespace(harness.cluster, &mut stream, "followed");
    let register = |arguments: &[&str]| {
        let output = harness.server.run(&[&["register", "-n", "followed"], arguments].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    register(&["web", "10.11.0.1", "--port", "http=80", "--weight", "3"]);
    register(&["web", "10.11.0.2", "--port", "http=80", "--port", "dns=53/udp", "--host-name", "two"]);
    register(&["web", "fd00:11::3", "--port", "http=80", "--priority", "5"]);

    let follower = Replica::on_standby(&kubeconfig);
    let zone = "svc.cluster.local.";
    let mut names: Vec<String> = ["web", "_http._tcp.web", "_dns._udp.web", "two.web", "10-11-0-1.web", "none"]
        .map(|name| format!("{name}.followed.{zone}"))
        .into();
    names.extend([format!("followed.{zone}"), format!("absent.{zone}"), "cluster.local.".into()]);
    wait_until_equal(harness.server.dns, follower.dns, &names);

    // Every kind of change, each seen without a restart of anything.
    register(&["web", "10.11.0.1", "--port", "http=8080", "--weight", "1"]);
    register(&["late", "10.11.0.9", "--port", "http=80"]);
    names.extend([dns_name("followed", "late")]);
    wait_until_equal(harness.server.dns, follower.dns, &names);
    assert_eq!(harness.deregister("followed", "late", "10.11.0.9").0, Some(0));
    assert_eq!(harness.deregister("followed", "web", "10.11.0.2").0, Some(0));
    // A slice that is deleted shows no generation any more: the serial follows with the next change.
    register(&["web", "10.11.0.1", "--port", "http=8080", "--weight", "2"]);
    wait_until_equal(harness.server.dns, follower.dns, &names);
    let gone = ask(follower.dns, Over::Udp, &dns_name("followed", "late"), RecordType::A);
    assert_eq!(gone.response_code, ResponseCode::NXDomain);

    // Readers see the same; registrants are told who writes.
    let list = |server: SocketAddr| {
        let output =
            harness.server.run(&["ls", "-n", "followed", "--server", &format!("http://{server}"), "-o", "json"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut list: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        forget_generations(&mut list);
        list
    };
    assert_eq!(list(follower.grpc), list(harness.server.grpc));
    assert_eq!(follower.register("followed", "web", "10.11.0.4"), 503);
}

/// Each process counts its own generations.
fn forget_generations(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(fields) => {
            fields.remove("generation");
            fields.values_mut().for_each(forget_generations);
        }
        serde_json::Value::Array(values) => values.iter_mut().for_each(forget_generations),
        _ => {}
    }
}

#[test]
fn follower_answers_every_question_while_it_takes_over() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let flags = ["--drain", "1s"];
    let mut harness = MirrorHarness { server: serve_by(&kubeconfig, &flags), cluster: lock.cluster, _lock: lock };
    make_namespace(harness.cluster, &mut Stream::open(harness.server.grpc), "asked-all-the-time");
    let second = Replica::on_standby(&kubeconfig);
    let probe = DnsProbe::start(second.dns, "asked-all-the-time");
    harness.server.signal_terminate();
    second.wait_until_it_writes();
    assert!(harness.server.exit().success());
    assert_eq!(second.register("asked-all-the-time", "web", "10.12.0.1"), 201);
    probe.end();

    // The new writer is killed without a word.
    let third = Replica::on_standby(&kubeconfig);
    let probe = DnsProbe::start(third.dns, "asked-all-the-time");
    second.kill();
    third.wait_until_it_writes();
    assert_eq!(answers(third.dns, Over::Udp, &dns_name("asked-all-the-time", "web"), RecordType::A), ["10.12.0.1"]);
    assert_eq!(third.register("asked-all-the-time", "web", "10.12.0.2"), 201);
    probe.end();
}

/// What a directory holds is not the truth any more once another process wrote: not after a restart either, and not when
/// nobody can be asked.
#[test]
fn directory_that_followed_neither_answers_nor_accepts_while_the_api_server_is_away() {
    let Some(lock) = ClusterLock::take() else { return };
    let proxy = Proxy::start(lock.cluster);
    let direct = lock.cluster.kubeconfig_for_gangplank();
    // It writes first, under a term of its own.
    let first = Replica::start(proxy.kubeconfig(), tempfile::TempDir::new().expect("a temporary directory"));
    first.wait_until_it_writes();
    let mut stream = Stream::open(first.grpc);
    make_namespace(lock.cluster, &mut stream, "outdated");
    assert_eq!(stream.register("outdated", "web", "10.13.0.1").0, 201);
    let data = first.terminate();

    let mut harness = MirrorHarness { server: serve_by(&direct, &[]), cluster: lock.cluster, _lock: lock };
    let mut stream = Stream::open(harness.server.grpc);
    wait_until("it writes", || (stream.remove("outdated", "web", "10.13.0.1").0 == 204).then_some(()));
    assert_eq!(stream.register("outdated", "web", "10.13.0.2").0, 201);
    let first = Replica::start(proxy.kubeconfig(), data);
    first.wait_until_it_follows();
    let a = |dns| answers(dns, Over::Udp, &dns_name("outdated", "web"), RecordType::A);
    wait_until("it has followed", || (a(first.dns) == ["10.13.0.2"]).then_some(()));
    let data = first.kill();

    // The first fault that matches counts.
    let lease = proxy.inject(Fault::Drop, |call| call.is("get", "leases"));
    let away = proxy.inject(Fault::Drop, |_| true);
    let first = Replica::start(proxy.kubeconfig(), data);
    // The Lease is read every two seconds: a directory that nobody followed is served after five.
    lease.wait_hits(5);
    let said = ask(first.dns, Over::Udp, &dns_name("outdated", "web"), RecordType::A);
    assert_eq!(said.response_code, ResponseCode::ServFail);
    assert_eq!(http::get(first.admin, "/readyz").0, 503);
    assert_eq!(first.register("outdated", "web", "10.13.0.3"), 503);
    lease.lift();
    away.lift();
    first.wait_until_it_follows();
    assert_eq!(a(first.dns), ["10.13.0.2"]);
    assert!(harness.server.terminate().success());
}

/// Resolvers ask it until the end of its drain time.
#[test]
fn process_that_drains_answers_what_the_next_writer_registers() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let long = ["--drain", "60s"];
    let server = serve_by(&kubeconfig, &long);
    let mut harness = MirrorHarness { server, cluster: lock.cluster, _lock: lock };
    make_namespace(harness.cluster, &mut Stream::open(harness.server.grpc), "still-asked");
    assert_eq!(Stream::open(harness.server.grpc).register("still-asked", "web", "10.13.2.1").0, 201);
    let second = Replica::on_standby(&kubeconfig);
    let follower = Replica::on_standby_with(&kubeconfig, &long);
    harness.server.signal_terminate();
    follower.signal("TERM");
    second.wait_until_it_writes();
    assert_eq!(second.register("still-asked", "web", "10.13.2.2"), 201);
    assert_eq!(second.remove("still-asked", "web", "10.13.2.1"), 204);
    for (name, dns) in [("the former writer", harness.server.dns), ("the follower", follower.dns)] {
        let a = || answers(dns, Over::Udp, &dns_name("still-asked", "web"), RecordType::A);
        wait_until(&format!("{name} answers what is new"), || (a() == ["10.13.2.2"]).then_some(()));
    }
    drop(follower);
    harness.server.kill9();
}

/// No slice shows it: the new writer has nothing to write.
#[test]
fn directory_whose_writer_has_seen_only_the_lease_of_the_next_one_is_not_answered_from() {
    let Some(lock) = ClusterLock::take() else { return };
    let proxy = Proxy::start(lock.cluster);
    let direct = lock.cluster.kubeconfig_for_gangplank();
    let first = Replica::start(proxy.kubeconfig(), tempfile::TempDir::new().expect("a temporary directory"));
    first.wait_until_it_writes();
    make_namespace(lock.cluster, &mut Stream::open(first.grpc), "lease-only");
    assert_eq!(first.register("lease-only", "web", "10.13.1.1"), 201);
    let second = Replica::on_standby(&direct);
    // The first fault that matches counts.
    let _slices = proxy.inject(Fault::Drop, |call| call.resource == "endpointslices");
    let away = proxy.inject(Fault::Drop, |_| true);
    proxy.drop_connections();
    second.wait_until_it_writes();
    away.lift();
    wait_until("it knows who writes", || {
        http::get(first.admin, "/readyz/registrations").1.contains("on standby").then_some(())
    });
    let data = first.terminate();

    let lease = proxy.inject(Fault::Drop, |call| call.is("get", "leases"));
    let _away = proxy.inject(Fault::Drop, |_| true);
    let first = Replica::start(proxy.kubeconfig(), data);
    // The Lease is read every two seconds: a directory that nobody followed is served after five.
    lease.wait_hits(5);
    let said = ask(first.dns, Over::Udp, &dns_name("lease-only", "web"), RecordType::A);
    assert_eq!(said.response_code, ResponseCode::ServFail);
    assert_eq!(first.register("lease-only", "web", "10.13.1.2"), 503);
}

/// A slice with gangplank's labels under the Service of somebody else: it would lead that Service's clients elsewhere.
#[test]
fn slices_under_a_foreign_service_are_neither_followed_nor_restored() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let cluster = lock.cluster;
    let harness = MirrorHarness { server: serve_by(&kubeconfig, &[]), cluster, _lock: lock };
    let mut stream = Stream::open(harness.server.grpc);
    make_namespace(cluster, &mut stream, "forged");
    let follower = Replica::on_standby(&kubeconfig);

    let slice = |service: &str| {
        serde_json::json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("{service}-forged"), "namespace": "forged", "labels": {
                "kubernetes.io/service-name": service, "endpointslice.kubernetes.io/managed-by": "gangplank.dev",
                "service.kubernetes.io/headless": ""}},
            "endpoints": [{"addresses": ["10.66.6.6"], "conditions": {"ready": true}}], "ports": []})
    };
    let native = |name: &str| {
        serde_json::json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "forged"},
            "spec": {"selector": {"app": name}, "ports": [{"port": 80}]}})
    };
    // The writer removes slices of its own under such a Service: it must not see these first.
    harness.server.signal("STOP");
    cluster.apply(&native("before").to_string());
    cluster.apply(&slice("before").to_string());
    cluster.apply(&slice("after").to_string());
    let shown = |service: &str| answers(follower.dns, Over::Udp, &dns_name("forged", service), RecordType::A);
    wait_until("a slice without a Service is followed", || (shown("after") == ["10.66.6.6"]).then_some(()));
    assert_eq!(shown("before"), [""; 0]);
    cluster.apply(&native("after").to_string());
    wait_until("it is not any more", || shown("after").is_empty().then_some(()));

    // The follower takes the Lease, whose holder does not answer.
    follower.wait_until_it_writes();
    assert_eq!((shown("before"), shown("after")), (vec![], vec![]));
    assert!(follower.stderr().contains("are not restored"), "{}", follower.stderr());
    harness.server.signal("CONT");
}
