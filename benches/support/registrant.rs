//! A registrant with one stream.

use std::{
    hint::black_box,
    net::SocketAddr,
    time::{Duration, Instant},
};

use gangplank::grpc::proto::registry::{NamedPort, RegistrationMsg, service_registry_client::ServiceRegistryClient};
use tokio_stream::StreamExt as _;
use tonic::transport::{Channel, Endpoint};

/// A connection in plaintext.
pub(crate) async fn connect(to: SocketAddr) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{to}")).expect("a URL");
    endpoint.connect().await.expect("it listens")
}

/// The `n`th message of a round; the instances are spread over `services` services.
pub(crate) fn message(round: usize, n: u32, services: u32) -> RegistrationMsg {
    let [_, b, c, d] = n.to_be_bytes();
    RegistrationMsg {
        namespace: format!("round{round}"),
        service_name: format!("s{}", n % services),
        ipaddress: format!("10.{b}.{c}.{d}"),
        ports: vec![NamedPort { port: 8080, name: "http".into(), ..NamedPort::default() }],
        ..RegistrationMsg::default()
    }
}

/// Streams the messages of one round and waits for every answer.
pub(crate) async fn stream(to: Channel, messages: Vec<RegistrationMsg>) -> Duration {
    let mut client = ServiceRegistryClient::new(to);
    let count = messages.len();
    let begun = Instant::now();
    let answers = client.registration_event(tokio_stream::iter(messages)).await.expect("it streams");
    let mut answers = answers.into_inner();
    let mut answered = 0;
    while let Some(answer) = answers.next().await {
        let answer = answer.expect("the stream goes on");
        assert_eq!(black_box(answer).status, 201, "every message is a new instance");
        answered += 1;
        if answered == count {
            break;
        }
    }
    assert_eq!(answered, count, "one answer per message");
    begun.elapsed()
}
