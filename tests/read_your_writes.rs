//! Visible before acknowledged: when an answer arrives, DNS already has the change.
//!
//! Eight pipelined streams register and remove instances, and query DNS right after each answer, for
//! A, SRV and PTR, over UDP and TCP. `GANGPLANK_VISIBILITY_CHECKS` sets how many answers are checked;
//! `make read-your-writes` checks 100 000.

use std::{env, net::SocketAddr};

use gangplank::grpc::proto::registry::{
    NamedPort, RegistrationMsg, RegistrationType, service_registry_client::ServiceRegistryClient,
};
use hickory_proto::rr::RecordType;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};

use crate::support::{
    dns::{Over, answers},
    server::Server,
};

/// Answers that are checked by default: enough for CI.
const CHECKS: usize = 10_000;

const STREAMS: usize = 8;

/// Messages of one stream in flight.
const WINDOW: usize = 32;

fn message(kind: RegistrationType, stream: usize, n: usize) -> RegistrationMsg {
    RegistrationMsg {
        r#type: kind.into(),
        namespace: "visible".into(),
        service_name: format!("s{stream}"),
        ipaddress: format!("10.{stream}.0.{n}"),
        // One port that all share, and one of its own, whose SRV record fits a datagram.
        ports: [(8080, "http".to_owned()), (9000, format!("own-{n}"))]
            .map(|(port, name)| NamedPort { port, name, ..NamedPort::default() })
            .into(),
        ..RegistrationMsg::default()
    }
}

/// Whether DNS knows the instance, asked in a way that depends on `how`.
fn known(dns: SocketAddr, stream: usize, n: usize, how: usize) -> bool {
    let service = format!("s{stream}.visible.svc.cluster.local.");
    let host = format!("10-{stream}-0-{n}.{service}");
    let over = if how.is_multiple_of(2) { Over::Udp } else { Over::Tcp };
    // 32 addresses or targets do not fit a datagram without EDNS: those are asked over TCP.
    let (name, rtype, expected) = match (how / 2 % 4, over) {
        (1, Over::Tcp) => (service, RecordType::A, format!("10.{stream}.0.{n}")),
        (2, Over::Tcp) => (format!("_http._tcp.{service}"), RecordType::SRV, format!("0 100 8080 {host}")),
        (2, Over::Udp) => (format!("_own-{n}._tcp.{service}"), RecordType::SRV, format!("0 100 9000 {host}")),
        (3, _) => (format!("{n}.0.{stream}.10.in-addr.arpa."), RecordType::PTR, host),
        _ => (host, RecordType::A, format!("10.{stream}.0.{n}")),
    };
    answers(dns, over, &name, rtype).contains(&expected)
}

async fn registrant(grpc: SocketAddr, dns: SocketAddr, stream: usize, checks: usize) {
    let mut client = ServiceRegistryClient::connect(format!("http://{grpc}")).await.expect("it listens");
    let (sender, messages) = mpsc::channel(WINDOW);
    let mut answers = client.registration_event(ReceiverStream::new(messages)).await.expect("it streams").into_inner();
    for round in 0..checks.div_ceil(2 * WINDOW) {
        for (kind, status, expected) in
            [(RegistrationType::Register, 201, true), (RegistrationType::Unregister, 204, false)]
        {
            for n in 0..WINDOW {
                sender.send(message(kind, stream, n)).await.expect("it takes them");
            }
            for n in 0..WINDOW {
                let answer = answers.next().await.expect("one answer each").expect("the stream goes on");
                assert_eq!(answer.status, status, "{answer:?}");
                let known = tokio::task::block_in_place(|| known(dns, stream, n, round + n));
                assert_eq!(known, expected, "{kind:?} of {} was acknowledged", answer.ipaddress);
            }
        }
    }
}

#[test]
fn acknowledged_change_is_in_dns() {
    let checks = env::var("GANGPLANK_VISIBILITY_CHECKS").map_or(CHECKS, |text| text.parse().expect("a number"));
    let server = Server::start();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(STREAMS).enable_all().build().expect("threads");
    runtime.block_on(async {
        let mut tasks = JoinSet::new();
        for stream in 0..STREAMS {
            tasks.spawn(registrant(server.grpc, server.dns, stream, checks.div_ceil(STREAMS)));
        }
        while let Some(ended) = tasks.join_next().await {
            ended.expect("no answer came before DNS knew");
        }
    });
}
