//! One registration stream of a client that waits for its answers.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use gangplank::grpc::proto::registry::{
    NamedPort, RegistrationMsg, RegistrationResponse, RegistrationType, service_registry_client::ServiceRegistryClient,
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::mpsc,
    time::{sleep_until, timeout},
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{Status, Streaming};

use super::WAIT_TIMEOUT;

/// Messages that are queued ahead of the transport.
const WINDOW: usize = 256;

/// The message that registers an instance with the port http=8080, or removes it.
pub(crate) fn message(kind: RegistrationType, namespace: &str, service: &str, address: &str) -> RegistrationMsg {
    RegistrationMsg {
        r#type: kind.into(),
        namespace: namespace.into(),
        service_name: service.into(),
        ipaddress: address.into(),
        ports: vec![NamedPort { port: 8080, name: "http".into(), ..NamedPort::default() }],
        ..RegistrationMsg::default()
    }
}

/// A stream that is open until it is dropped.
pub(crate) struct Stream {
    runtime: Runtime,
    sender: mpsc::Sender<RegistrationMsg>,
    answers: Streaming<RegistrationResponse>,
}

impl Stream {
    /// Opens one.
    pub(crate) fn open(to: SocketAddr) -> Self {
        // A runtime thread drives the connection while the test does something else.
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("threads");
        let (sender, messages) = mpsc::channel(WINDOW);
        let answers = runtime.block_on(async {
            let mut client = ServiceRegistryClient::connect(format!("http://{to}")).await.expect("it listens");
            client.registration_event(ReceiverStream::new(messages)).await.expect("it streams").into_inner()
        });
        Self { runtime, sender, answers }
    }

    /// Sends all of them, without waiting for answers in between, and returns the status of
    /// each answer, in order, and how long all of them took.
    pub(crate) fn exchange(&mut self, messages: Vec<RegistrationMsg>) -> (Vec<u32>, Duration) {
        self.exchange_evenly(messages, Duration::ZERO)
    }

    /// The same, with the messages spread evenly over a time.
    pub(crate) fn exchange_evenly(&mut self, messages: Vec<RegistrationMsg>, over: Duration) -> (Vec<u32>, Duration) {
        let begun = Instant::now();
        let count = u32::try_from(messages.len()).expect("not that many");
        let expected: Vec<String> = messages.iter().map(|message| message.ipaddress.clone()).collect();
        let send = async {
            for (message, n) in messages.into_iter().zip(0..) {
                if !over.is_zero() {
                    sleep_until((begun + over * n / count).into()).await;
                }
                self.sender.send(message).await.expect("the stream is open");
            }
        };
        let receive = async {
            let mut statuses = Vec::with_capacity(expected.len());
            for address in &expected {
                let answer = timeout(WAIT_TIMEOUT, self.answers.next()).await.expect("an answer comes");
                let answer = answer.expect("one answer each").expect("the stream goes on");
                assert_eq!(answer.ipaddress, *address, "answers come in order");
                statuses.push(answer.status);
            }
            statuses
        };
        let ((), statuses) = self.runtime.block_on(async { tokio::join!(send, receive) });
        (statuses, begun.elapsed())
    }

    /// Waits until the server ends the stream, and returns how.
    pub(crate) fn end(mut self) -> Status {
        let ended = self.runtime.block_on(async { timeout(WAIT_TIMEOUT, self.answers.next()).await });
        ended.expect("it ends").expect("it ends with a status").expect_err("every message was answered before")
    }

    /// Registers one instance, and returns the status and how long the answer took.
    pub(crate) fn register(&mut self, namespace: &str, service: &str, address: &str) -> (u32, Duration) {
        self.one(message(RegistrationType::Register, namespace, service, address))
    }

    /// Removes one instance, and returns the status and how long the answer took.
    pub(crate) fn remove(&mut self, namespace: &str, service: &str, address: &str) -> (u32, Duration) {
        self.one(message(RegistrationType::Unregister, namespace, service, address))
    }

    fn one(&mut self, message: RegistrationMsg) -> (u32, Duration) {
        let (statuses, took) = self.exchange(vec![message]);
        (statuses[0], took)
    }
}
