//! One process at a time writes: the Lease, standby, and what a process that lost the Lease may do.

use std::{fs, net::SocketAddr, time::Instant};

use gangplank::{
    grpc::proto::registry::{RegistrationType, ServiceInfo, service_registry_client::ServiceRegistryClient},
    replicas::election::{LEASE_DURATION, RETRY_PERIOD},
};
use hickory_proto::rr::RecordType;
use tempfile::TempDir;
use tokio::runtime::Builder;

use super::{
    ClusterLock, MirrorHarness, addresses, dns_probe::DnsProbe, make_namespace, replica::Replica, serve, serve_by,
    slices, wait_for_addresses,
};
use crate::support::{
    cluster::Cluster,
    dns::{Over, answers},
    http,
    proxy::{Call, Fault, InjectedFault, Proxy},
    server::Process,
    stream::{Stream, message},
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
fn standby_names_the_writer_to_registrants() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let harness = MirrorHarness { server: serve_by(&kubeconfig, &[]), cluster: lock.cluster, _lock: lock };
    let writer = harness.server.grpc.to_string();
    let lease = harness.cluster.kubectl(&["get", "lease", "gangplank-writer", "-n", "gangplank", "-o", "json"]);
    let lease: serde_json::Value = serde_json::from_str(&lease).expect("JSON");
    assert_eq!(lease["metadata"]["annotations"]["gangplank.dev/address"], writer.as_str());

    let data = TempDir::new().expect("a temporary directory can be made");
    let advertised = ["--advertise", "gangplank.example.com", "--advertise", "[2001:db8::1]:9080"];
    let kubeconfig = kubeconfig.to_str().expect("a path in UTF-8");
    let process = Process::serve(data.path(), &[&["--kubeconfig", kubeconfig][..], &advertised].concat());
    let [grpc, _, admin] = process.listening();
    let at = format!("; register at {writer}");
    wait_until("it names the writer", || http::get(admin, "/readyz/registrations").1.contains(&at).then_some(()));
    wait_until("the log too", || process.stderr().contains(&format!("address=\"{writer}\"")).then_some(()));

    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
    let addresses = runtime.block_on(async {
        let mut client = ServiceRegistryClient::connect(format!("http://{grpc}")).await.expect("it listens");
        let info = ServiceInfo {
            namespace: "named".into(),
            service_name: "web".into(),
            ipaddress: "10.6.2.1".into(),
            ..ServiceInfo::default()
        };
        let answer = client.register(info.clone()).await.expect("an answer");
        assert_eq!(answer.metadata().get("gangplank-writer").expect("it is there"), writer.as_str());
        let result = answer.into_inner();
        assert_eq!(result.status, 503);
        assert!(result.status_details.ends_with(&at), "{}", result.status_details);
        let message = message(RegistrationType::Register, "named", "web", "10.6.2.1");
        let answers = client.registration_event(tokio_stream::iter([message])).await.expect("it streams");
        assert_eq!(answers.metadata().get("gangplank-writer").expect("it is there"), writer.as_str());
        let answer = answers.into_inner().message().await.expect("an answer").expect("one");
        assert_eq!(answer.status, 503);
        assert!(answer.status_details.ends_with(&at), "{}", answer.status_details);
        drop(harness.server);
        harness.cluster.release_lease();
        wait_until("it writes", || (http::get(admin, "/readyz/registrations").0 == 200).then_some(()));
        let lease = harness.cluster.kubectl(&["get", "lease", "gangplank-writer", "-n", "gangplank", "-o", "json"]);
        let lease: serde_json::Value = serde_json::from_str(&lease).expect("JSON");
        lease["metadata"]["annotations"]["gangplank.dev/address"].clone()
    });
    assert_eq!(addresses, format!("gangplank.example.com:{},[2001:db8::1]:9080", grpc.port()));
}

#[test]
fn paused_writer_follows_when_it_goes_on_and_undoes_nothing() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let harness = MirrorHarness { server: serve_by(&kubeconfig, &[]), cluster: lock.cluster, _lock: lock };
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
    wait_until("it follows", || (a(harness.server.dns, "web.paused") == ["10.7.0.2", "10.7.0.3"]).then_some(()));
    let (status, page) = http::get(harness.server.admin, "/readyz/registrations");
    assert!(status == 503 && page.contains("on standby"), "{status} {page}");
    assert_eq!(http::get(harness.server.admin, "/readyz").0, 200);
    assert_eq!(Stream::open(harness.server.grpc).register("paused", "web", "10.7.0.9").0, 503);
    assert_eq!(a(second.dns, "web.paused"), ["10.7.0.2", "10.7.0.3"]);
    assert_eq!(addresses(harness.cluster, "paused", "web"), ["10.7.0.2", "10.7.0.3"]);

    // It writes again, with what the other one wrote.
    second.terminate();
    wait_until("it writes", || (http::get(harness.server.admin, "/readyz/registrations").0 == 200).then_some(()));
    assert_eq!(Stream::open(harness.server.grpc).register("paused", "web", "10.7.0.4").0, 201);
    assert_eq!(addresses(harness.cluster, "paused", "web"), ["10.7.0.2", "10.7.0.3", "10.7.0.4"]);
}

/// A writer that is cut off goes on with 202. Another one takes over; the first one hands over what it accepted, follows,
/// and undoes nothing.
#[test]
fn writer_that_was_cut_off_follows_and_what_it_accepted_is_kept() {
    let Some(lock) = ClusterLock::take() else { return };
    let proxy = Proxy::start(lock.cluster);
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let server = serve_by(proxy.kubeconfig(), &["--drain", "1s"]);
    let mut harness = MirrorHarness { server, cluster: lock.cluster, _lock: lock };
    make_namespace(harness.cluster, &mut Stream::open(harness.server.grpc), "cut-off");
    for address in ["10.15.0.1", "10.15.0.2"] {
        assert_eq!(Stream::open(harness.server.grpc).register("cut-off", "web", address).0, 201);
    }
    let probe = DnsProbe::start(harness.server.dns, "cut-off");
    let second = Replica::on_standby(&kubeconfig);
    let cut = proxy.inject(Fault::Drop, |_| true);
    proxy.drop_connections();
    assert_eq!(Stream::open(harness.server.grpc).register("cut-off", "web", "10.15.0.3").0, 202);
    second.wait_until_it_writes();
    assert_eq!(Stream::open(second.grpc).remove("cut-off", "web", "10.15.0.1").0, 204);
    assert_eq!(second.register("cut-off", "web", "10.15.0.4"), 201);
    assert_eq!(Stream::open(harness.server.grpc).remove("cut-off", "web", "10.15.0.2").0, 202);

    cut.lift();
    let of_both = ["10.15.0.3", "10.15.0.4"];
    wait_until("it follows", || (a(harness.server.dns, "web.cut-off") == of_both).then_some(()));
    assert_eq!(Stream::open(harness.server.grpc).register("cut-off", "web", "10.15.0.9").0, 503);
    wait_for_addresses(harness.cluster, "cut-off", "web", &of_both);

    second.terminate();
    wait_until("it writes", || (http::get(harness.server.admin, "/readyz/registrations").0 == 200).then_some(()));
    assert_eq!(addresses(harness.cluster, "cut-off", "web"), of_both);
    assert_eq!(a(harness.server.dns, "web.cut-off"), of_both);
    probe.end();
    assert!(harness.server.terminate().success());
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
    // One that follows sees at once that it is gone, and leaves it to its holder.
    let second = Replica::on_standby(&kubeconfig);
    let before = term(&lease());
    harness.cluster.kubectl(&["delete", "lease", "gangplank-writer", "-n", "gangplank"]);
    wait_until("it is there again", || {
        let found = harness.cluster.kubectl(&["get", "leases", "-n", "gangplank", "-o", "name"]);
        found.contains("gangplank-writer").then_some(())
    });
    assert!(term(&lease()) > before);
    let held: serde_json::Value = serde_json::from_str(&lease()).expect("JSON");
    assert_eq!(held["metadata"]["annotations"]["gangplank.dev/address"], harness.server.grpc.to_string());
    assert_eq!(second.register("deleted-lease", "web", "10.9.0.9"), 503);
    let after = term(&lease()).to_string();
    wait_until("it writes under the new term", || {
        assert_eq!(harness.register("deleted-lease", "web", "10.9.0.2", "http=80").0, Some(0));
        let slices = slices(harness.cluster, "deleted-lease", "web");
        slices.iter().any(|slice| slice["metadata"]["annotations"]["gangplank.dev/term"] == after).then_some(())
    });
    assert_eq!(addresses(harness.cluster, "deleted-lease", "web"), ["10.9.0.1", "10.9.0.2"]);
}

/// A process that has the Lease and waits for its list of the slices, until the fault is lifted.
fn taking_over(proxy: &Proxy) -> (Replica, InjectedFault) {
    let hung = proxy.inject(Fault::Hang, |call| call.is("list", "endpointslices"));
    let replica = Replica::start(proxy.kubeconfig(), TempDir::new().expect("a temporary directory can be made"));
    let role = "gangplank_kubernetes_lease_role{role=\"taking_over\"}";
    wait_until("it takes over", || (replica.metric(role) == 1.0).then_some(()));
    (replica, hung)
}

/// The renewal is carried out, so the next one is refused.
#[test]
fn take_over_goes_on_after_a_renewal_whose_answer_was_lost() {
    let Some(lock) = ClusterLock::take() else { return };
    let proxy = Proxy::start(lock.cluster);
    let (replica, hung) = taking_over(&proxy);
    proxy.inject_first(1, Fault::DropAfter, |call| call.is("update", "leases")).wait_hits(1);
    let is_refused = |call: &Call| call.is("update", "leases") && call.status == Some(409);
    wait_until("the next one is refused", || (proxy.count(is_refused) > 0).then_some(()));
    let begun = Instant::now();
    hung.lift();
    replica.wait_until_it_writes();
    println!("it writes {:?} after the slices could be read", begun.elapsed());
    assert!(begun.elapsed() < LEASE_DURATION, "it did not wait for its own Lease");
}

#[test]
fn process_that_stops_while_it_takes_over_releases_the_lease() {
    let Some(lock) = ClusterLock::take() else { return };
    let proxy = Proxy::start(lock.cluster);
    let direct = lock.cluster.kubeconfig_for_gangplank();
    let (replica, _hung) = taking_over(&proxy);
    let second = Replica::on_standby(&direct);
    let begun = Instant::now();
    replica.signal("TERM");
    second.wait_until_it_writes();
    println!("another one writes {:?} after the signal", begun.elapsed());
    assert!(begun.elapsed() < LEASE_DURATION.mul_f64(0.5), "{:?}", begun.elapsed());
}

/// It renews the Lease, and cannot list the slices: without a limit nobody would write.
#[test]
fn take_over_that_does_not_end_leaves_the_lease_to_another_process() {
    let Some(lock) = ClusterLock::take() else { return };
    let proxy = Proxy::start(lock.cluster);
    let direct = lock.cluster.kubeconfig_for_gangplank();
    proxy.inject(Fault::Hang, |call| call.is("list", "endpointslices"));
    let data = TempDir::new().expect("a temporary directory can be made");
    let kubeconfig = proxy.kubeconfig().to_str().expect("UTF-8");
    let limit = ("GANGPLANK_TEST_TAKE_OVER_LIMIT_MS", "3000");
    let stuck = Process::serve_with_variable(limit, data.path(), &["--kubeconfig", kubeconfig]);
    let [_, _, admin] = stuck.listening();
    let takes_over = "gangplank_kubernetes_lease_role{role=\"taking_over\"} 1";
    wait_until("it takes over", || http::get(admin, "/metrics").1.contains(takes_over).then_some(()));
    let begun = Instant::now();
    let second = Replica::start(&direct, TempDir::new().expect("a temporary directory can be made"));
    second.wait_until_it_writes();
    println!("another one writes after {:?}", begun.elapsed());
    assert!(begun.elapsed() < LEASE_DURATION, "{:?}: it was given up, and did not expire", begun.elapsed());
    assert!(stuck.stderr().contains("could not be listed and restored within 3s: the Lease is given up"));
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

/// The addresses and the port in the slices that kube-proxy sees of the Service.
fn endpoints(cluster: &Cluster, service: &str) -> Vec<String> {
    let selector = format!("kubernetes.io/service-name%3D{service},!service.kubernetes.io/headless");
    let path = format!("/apis/discovery.k8s.io/v1/namespaces/gangplank/endpointslices?labelSelector={selector}");
    let list = cluster.get_json(&path);
    let slices = list["items"].as_array().expect("a list").iter();
    let mut found: Vec<_> = slices
        .flat_map(|slice| {
            let port = &slice["ports"][0];
            assert_eq!((&port["name"], slice["ports"].as_array().map(Vec::len)), (&"grpc".into(), Some(1)));
            let endpoints = slice["endpoints"].as_array().into_iter().flatten();
            endpoints.map(|endpoint| format!("{} {}", endpoint["addresses"][0].as_str().expect("text"), port["port"]))
        })
        .collect();
    found.sort();
    found
}

#[test]
fn slices_of_the_grpc_service_follow_the_writer() {
    let Some(lock) = ClusterLock::take() else { return };
    let cluster = lock.cluster;
    let kubeconfig = cluster.kubeconfig_for_gangplank();
    cluster.apply(
        "{apiVersion: v1, kind: Service, metadata: {name: gangplank, namespace: gangplank}, \
         spec: {ports: [{name: grpc, port: 9080}]}}",
    );
    let at = |address| vec!["--grpc-service", "gangplank", "--advertise", address];
    let both = [&at("10.250.0.1:9080")[..], &["--advertise", "[2001:db8::1]:9080", "--drain", "1s"]].concat();
    let mut harness = MirrorHarness { server: serve_by(&kubeconfig, &both), cluster, _lock: lock };
    let leads_to = |expected: &[&str]| {
        wait_until("the Service leads there", || (endpoints(cluster, "gangplank") == expected).then_some(()));
    };
    leads_to(&["10.250.0.1 9080", "2001:db8::1 9080"]);

    // A hand edits one and deletes the other.
    let patch = r#"[{"op": "replace", "path": "/endpoints/0/addresses/0", "value": "10.250.0.66"}]"#;
    let slice = "gangplank-gangplank-ipv4";
    cluster.kubectl(&["patch", "endpointslice", slice, "-n", "gangplank", "--type=json", "-p", patch]);
    cluster.kubectl(&["delete", "endpointslice", "gangplank-gangplank-ipv6", "-n", "gangplank"]);
    leads_to(&["10.250.0.1 9080", "2001:db8::1 9080"]);

    // A hand-over: the next writer has no IPv6 address.
    let second = Replica::on_standby_with(&kubeconfig, &at("10.250.0.2:9081"));
    assert_eq!(endpoints(cluster, "gangplank"), ["10.250.0.1 9080", "2001:db8::1 9080"], "standby writes nothing");
    harness.server.signal_terminate();
    leads_to(&["10.250.0.2 9081"]);
    assert!(harness.server.exit().success());

    // A kill.
    let third = Replica::on_standby_with(&kubeconfig, &at("10.250.0.3:9080"));
    drop(second);
    third.wait_until_it_writes();
    leads_to(&["10.250.0.3 9080"]);

    // A slice that is not ours stays as it is.
    cluster.kubectl(&[
        "label",
        "endpointslice",
        slice,
        "-n",
        "gangplank",
        "endpointslice.kubernetes.io/managed-by=somebody",
        "--overwrite",
    ]);
    cluster.kubectl(&["patch", "endpointslice", slice, "-n", "gangplank", "--type=json", "-p", patch]);
    wait_until("the log says so", || third.stderr().contains("is not writer.gangplank.dev").then_some(()));
    assert_eq!(endpoints(cluster, "gangplank"), ["10.250.0.66 9080"]);
}

#[test]
fn grpc_service_needs_an_address_that_others_reach() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let data = TempDir::new().expect("a temporary directory can be made");
    let flags = ["--kubeconfig", kubeconfig.to_str().expect("a path in UTF-8"), "--grpc-service", "gangplank"];
    let mut process = Process::serve(data.path(), &flags);
    assert_eq!(process.exit().code(), Some(1));
    assert!(process.stderr().contains("give --advertise ADDR"), "{}", process.stderr());
}
