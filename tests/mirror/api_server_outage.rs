//! The API server is killed or frozen. Registrations stay served and can be changed, also by a
//! gangplank that is killed during the outage; afterwards the slices hold the same.

use std::time::{Duration, Instant};

use gangplank::grpc::proto::registry::RegistrationType;
use hickory_proto::{op::ResponseCode, rr::RecordType};
use tempfile::TempDir;

use super::{
    addresses, dns_name, dns_probe::DnsProbe, every_address, make_namespace, private_cluster_lock, resolve, serve,
    wait_for_addresses,
};
use crate::support::{
    cluster::Cluster,
    dns::{Over, ask},
    http,
    ledger::Clients,
    server::{Process, Server},
    stream::{Stream, message},
    wait_until,
};

/// Without Kubernetes an answer is sent after one second; the rest is for a busy machine.
const AT_ONCE: Duration = Duration::from_secs(3);

/// Registers an instance, which must be accepted without Kubernetes, and answered by DNS.
fn accepted(server: &Server, stream: &mut Stream, service: &str, address: &str) {
    let (status, took) = stream.register("outage", service, address);
    assert!(status == 202 && took < AT_ONCE, "{status} after {took:?}");
    assert!(resolve(server, "outage", service).contains(&address.to_owned()), "DNS has it before the answer");
}

fn survive(begin: impl Fn(&mut Cluster), end: impl Fn(&mut Cluster)) {
    let Some(mut cluster) = Cluster::private() else { return };
    let _lock = private_cluster_lock();
    let server = serve(&cluster, &[]);
    let mut stream = Stream::open(server.grpc);
    make_namespace(&cluster, &mut stream, "load");
    make_namespace(&cluster, &mut stream, "outage");
    for address in ["10.0.0.1", "10.0.0.2", "10.0.0.3"] {
        assert_eq!(stream.register("outage", "web", address).0, 201);
    }
    let clients = Clients::new("load", true);
    let load = clients.run(server.grpc);
    load.wait_acknowledged(500);
    let steady = DnsProbe::start(server.dns, "outage");
    begin(&mut cluster);
    load.wait_accepted();

    accepted(&server, &mut stream, "web", "10.0.0.4");
    accepted(&server, &mut stream, "new", "10.0.1.1");
    let (status, took) = stream.remove("outage", "web", "10.0.0.2");
    assert!(status == 202 && took < AT_ONCE, "{status} after {took:?}");
    assert_eq!(resolve(&server, "outage", "web"), ["10.0.0.1", "10.0.0.3", "10.0.0.4"]);
    // An answer does not wait for the previous one.
    let address = |n: usize| format!("10.0.2.{n}");
    let many = (1..=200).map(|n| message(RegistrationType::Register, "outage", "many", &address(n)));
    let (statuses, took) = stream.exchange(many.collect());
    println!("200 answers within {took:?} while the API server is away");
    assert!(statuses == [202; 200] && took < AT_ONCE, "{statuses:?} after {took:?}");
    steady.end();

    // Gangplank is killed too, and restarted on its data directory.
    let mut server = server;
    server.kill9();
    load.join();
    let begun = Instant::now();
    let server = server.restart();
    println!("ready again {:?} after kill -9, without the API server", begun.elapsed());
    for path in ["/readyz", "/readyz/registrations"] {
        assert_eq!(http::get(server.admin, path).0, 200, "{path}");
    }
    clients.check("after kill -9", &server);
    assert_eq!(resolve(&server, "outage", "web"), ["10.0.0.1", "10.0.0.3", "10.0.0.4"]);
    assert_eq!(resolve(&server, "outage", "many").len(), 200);
    let load = clients.run(server.grpc);
    load.wait_accepted();
    let mut stream = Stream::open(server.grpc);
    accepted(&server, &mut stream, "web", "10.0.0.5");
    let (status, _) = stream.remove("outage", "web", "10.0.0.3");
    assert_eq!(status, 202);
    assert_eq!(resolve(&server, "outage", "web"), ["10.0.0.1", "10.0.0.4", "10.0.0.5"]);

    let steady = DnsProbe::start(server.dns, "outage");
    end(&mut cluster);
    let back = Instant::now();
    // The slices still hold both addresses that were removed during the outage.
    wait_for_addresses(&cluster, "outage", "web", &["10.0.0.1", "10.0.0.4", "10.0.0.5"]);
    wait_for_addresses(&cluster, "outage", "new", &["10.0.1.1"]);
    wait_until("all 200 are mirrored", || (addresses(&cluster, "outage", "many").len() == 200).then_some(()));
    load.stop();
    clients.check("afterwards", &server);
    wait_until("the slices hold what was acknowledged", || clients.agree_with(&every_address(&cluster, "load")));
    println!("the slices equal the state {:?} after the API server is back", back.elapsed());
    wait_until("Kubernetes is waited for again", || {
        let address = format!("10.0.3.{}", fastrand::u8(1..));
        (stream.register("outage", "after", &address).0 == 201).then_some(())
    });
    assert_eq!(resolve(&server, "outage", "web"), ["10.0.0.1", "10.0.0.4", "10.0.0.5"], "nothing is back");
    steady.end();
}

#[test]
fn killed_api_server_does_not_stop_registrations() {
    survive(Cluster::kill_api_server, Cluster::start_api_server);
}

#[test]
fn frozen_api_server_does_not_stop_registrations() {
    survive(Cluster::pause_api_server, Cluster::resume_api_server);
}

#[test]
fn empty_data_directory_waits_for_the_api_server() {
    let Some(mut cluster) = Cluster::private() else { return };
    let _lock = private_cluster_lock();
    let mut server = serve(&cluster, &[]);
    make_namespace(&cluster, &mut Stream::open(server.grpc), "empty");
    server.kill9();
    cluster.kill_api_server();

    let data = TempDir::new().expect("a temporary directory");
    let kubeconfig = cluster.kubeconfig_for_gangplank();
    let process = Process::serve(data.path(), &["--kubeconfig", kubeconfig.to_str().expect("a path in UTF-8")]);
    let [grpc, dns, admin] = process.listening();
    let refused = |path: &str| {
        let (status, said) = http::get(admin, path);
        (status == 503 && said.contains("Kubernetes")).then_some(said)
    };
    for path in ["/readyz", "/readyz/registrations"] {
        println!("{path}: {}", wait_until("it says that it waits for Kubernetes", || refused(path)));
    }
    wait_until("the log says why", || process.stderr().contains("API server").then_some(()));
    let code = || ask(dns, Over::Udp, &dns_name("empty", "first"), RecordType::A).response_code;
    assert_eq!(code(), ResponseCode::ServFail);
    let mut stream = Stream::open(grpc);
    assert_eq!(stream.register("empty", "web", "10.0.0.1").0, 503);
    assert_eq!(code(), ResponseCode::ServFail);

    cluster.start_api_server();
    wait_until("it is ready", || (http::get(admin, "/readyz/registrations").0 == 200).then_some(()));
    assert_eq!(code(), ResponseCode::NoError, "everything is there at once");
    wait_until("Kubernetes is waited for again", || {
        let address = format!("10.0.3.{}", fastrand::u8(1..));
        (stream.register("empty", "web", &address).0 == 201).then_some(())
    });
}
