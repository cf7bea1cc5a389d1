//! Figures of the mirror and of replicas: our own DNS beside CoreDNS' kubernetes plugin on the slices that we write, a restore
//! from slices alone, the way through CoreDNS, a take-over beside client-go's leader election, and what followers and slices cost.
//!
//! Figures are printed and never asserted: a timed test is flaky by design. The assertion is that
//! everything arrives. `GANGPLANK_MIRROR_FIGURES` sets the rounds; `make mirror-figures` takes 200
//! rounds, and 1 000 services of ten instances.

mod load;
mod stored;
mod take_over;
mod through_coredns;
mod visible;

use std::{
    env, fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use gangplank::grpc::proto::registry::{
    RegistrationMsg, RegistrationType, service_registry_client::ServiceRegistryClient,
};
use hickory_proto::rr::RecordType;
use serde_json::json;
use tokio::runtime::Runtime;

use super::{every_address, make_namespace, serve, service_path};
use crate::support::{
    cluster::{CONTEXT, Cluster, Who},
    coredns::CoreDns,
    dns::{Over, answers},
    stream::{Stream, message},
    tools, wait_until,
};

/// Rounds by default: enough to see that it works.
const ROUNDS: usize = 10;

/// Services in the restore, for each round; ten instances each.
const SERVICES_PER_ROUND: usize = 5;

/// Services of others, for each round, and bytes in each of them.
const OTHERS_PER_ROUND: usize = 20;
const OTHERS_OCTETS: usize = 16 << 10;

fn registration(service: &str, address: &str) -> RegistrationMsg {
    message(RegistrationType::Register, "figures", service, address)
}

/// Asks over and over until the service has so many addresses, and gives the time that passed
/// since `sent`.
fn seen(dns: SocketAddr, service: &str, wanted: &str, sent: Instant) -> Duration {
    let name = format!("{service}.figures.svc.cluster.local.");
    while !answers(dns, Over::Udp, &name, RecordType::A).iter().any(|address| address == wanted) {
        assert!(sent.elapsed() < crate::support::WAIT_TIMEOUT, "{service} at {wanted} is not answered by {dns}");
    }
    sent.elapsed()
}

fn percentiles(what: &str, mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!("{what}: p50 {:.2?}, p99 {:.2?}, n {}", at(50), at(99), times.len());
    at(50)
}

/// Resident memory in KiB.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("the kernel says it");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn rounds() -> usize {
    env::var("GANGPLANK_MIRROR_FIGURES").map_or(ROUNDS, |text| text.parse().expect("a number of rounds"))
}

#[test]
fn latency_beside_coredns_and_duration_of_a_restore() {
    let rounds = rounds();
    let Some(program) = tools::require("coredns") else { return };
    let Some(cluster) = Cluster::private() else { return };
    let mut server = serve(&cluster, &[]);
    make_namespace(&cluster, &mut Stream::open(server.grpc), "figures");
    let coredns = CoreDns::with_kubernetes(&program, &cluster.kubeconfig_admin(), CONTEXT);
    let runtime = Runtime::new().expect("a runtime");
    let url = format!("http://{}", server.grpc);
    let mut client = runtime.block_on(ServiceRegistryClient::connect(url)).expect("it listens");

    // One message at a time, so that nothing is coalesced.
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let (sender, messages) = tokio::sync::mpsc::channel(1024);
    let mut stream = runtime
        .block_on(client.registration_event(tokio_stream::wrappers::ReceiverStream::new(messages)))
        .expect("it streams")
        .into_inner();
    for round in 0..rounds {
        let address = format!("10.50.{}.{}", round / 250, round % 250);
        let service = format!("one-{round}");
        let sent = Instant::now();
        sender.blocking_send(registration(&service, &address)).expect("it takes them");
        ours.push(seen(server.dns, &service, &address, sent));
        theirs.push(seen(coredns.address, &service, &address, sent));
        let answer = runtime.block_on(stream.message()).expect("the stream goes on").expect("one answer each");
        assert!(matches!(answer.status, 201 | 202), "{answer:?}");
    }
    let ours = percentiles("sent, then answered by our DNS", ours);
    let theirs = percentiles("sent, then answered by CoreDNS from the slice", theirs);
    println!("ours ÷ CoreDNS, p50: {:.3}", ours.as_secs_f64() / theirs.as_secs_f64());

    let before = resident(cluster.api_server_pid());
    let services = rounds * SERVICES_PER_ROUND;
    let begun = Instant::now();
    runtime.block_on(async {
        let send = async {
            for n in 0..services * 10 {
                let address = format!("10.{}.{}.{}", 60 + n / 62_500, n / 250 % 250, n % 250);
                sender.send(registration(&format!("many-{}", n % services), &address)).await.expect("it takes them");
            }
        };
        let receive = async {
            for _ in 0..services * 10 {
                let answer = stream.message().await.expect("the stream goes on").expect("one answer each");
                assert!(matches!(answer.status, 201 | 202), "{answer:?}");
            }
        };
        tokio::join!(send, receive);
    });
    let held = |wanted: usize| {
        wait_until("all are mirrored", || {
            let all = every_address(&cluster, "figures");
            (all.values().map(Vec::len).sum::<usize>() == wanted).then_some(())
        });
    };
    held(services * 10 + rounds + 1);
    println!(
        "{} instances into {services} services: mirrored within {:.1?}; the API server grew from {} to {} MiB",
        services * 10,
        begun.elapsed(),
        before >> 10,
        resident(cluster.api_server_pid()) >> 10,
    );

    server.kill9();
    let begun = Instant::now();
    let server = serve(&cluster, &[]);
    println!("an empty disk restored from {} slices and ready within {:.2?}", services + rounds + 1, begun.elapsed());
    // The mirror compares all services meanwhile; a new one does not wait for that.
    let registered = Instant::now();
    let (status, _) = Stream::open(server.grpc).register("figures", "after", "10.49.0.1");
    println!("a new service then: {status} after {:.2?}", registered.elapsed());
    let name = format!("many-{}.figures.svc.cluster.local.", services - 1);
    assert_eq!(answers(server.dns, Over::Udp, &name, RecordType::A).len(), 10);
}

#[test]
fn memory_beside_services_of_others() {
    let Some(cluster) = Cluster::private() else { return };
    let mut server = serve(&cluster, &[]);
    let alone = resident(server.pid());
    server.kill9();

    cluster.create_namespace("crowd");
    let services = rounds() * OTHERS_PER_ROUND;
    for n in 0..services {
        let service = json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"name": format!("other-{n}"), "annotations": {"example.com/notes": "n".repeat(OTHERS_OCTETS)}},
            "spec": {"clusterIP": "None", "selector": {"app": "other"}, "ports": [{"port": 80}]}});
        let path = service_path("crowd", "");
        let (status, answer) = cluster.request(Who::Admin, "POST", &path, Some(&service)).expect("the API server runs");
        assert_eq!(status, 201, "{answer}");
    }
    let server = serve(&cluster, &[]);
    let refused = server.run(&["register", "other-0", "10.0.0.1", "--port", "80", "-n", "crowd"]);
    assert_eq!(refused.status.code(), Some(1), "they are known: {refused:?}");
    println!(
        "gangplank at its start: {alone} KiB alone, {} KiB beside {services} Services of others of {} KiB each",
        resident(server.pid()),
        OTHERS_OCTETS >> 10,
    );
}
