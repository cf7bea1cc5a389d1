//! A stream ends, with its reason, when its identity or its right does.

use std::time::Instant;

use tonic::{Code, Request, Status, client::Grpc, transport::Channel};

use super::{
    Credential, POLICY, SecuredServer, TestCa,
    matrix::{END_TIMEOUT, open_stream},
};
use gangplank::grpc::proto::{
    gangplank::v1::{WatchRequest, discovery_client::DiscoveryClient},
    registry::{
        RegistrationMsg, RegistrationResponse, RegistrationResult, ServiceInfo,
        service_registry_client::ServiceRegistryClient,
    },
};

/// A stream of registrations on which more is said later.
pub(super) struct LongStream {
    messages: tokio::sync::mpsc::UnboundedSender<RegistrationMsg>,
    pub(super) answers: tonic::Streaming<RegistrationResponse>,
}

impl LongStream {
    pub(super) async fn open(secured: &SecuredServer, credential: &Credential) -> Self {
        Self::on(secured.connect(Some(credential)).await.expect("a handshake")).await.expect("a good stream")
    }

    pub(super) async fn on(channel: Channel) -> Result<Self, Status> {
        let (messages, said) = tokio::sync::mpsc::unbounded_channel();
        messages.send(message("10.1.0.1")).expect("it is read");
        let said = futures::stream::unfold(said, |mut said| async { said.recv().await.map(|one| (one, said)) });
        let mut answers = ServiceRegistryClient::new(channel).registration_event(said).await?.into_inner();
        answers.message().await?;
        Ok(Self { messages, answers })
    }

    /// Registers one more. Returns the status in the answer.
    pub(super) async fn say(&mut self, address: &str) -> Result<u32, Status> {
        self.messages.send(message(address)).expect("it is read");
        self.answers.message().await.map(|answer| answer.expect("an answer").status)
    }
}

fn message(address: &str) -> RegistrationMsg {
    RegistrationMsg {
        namespace: "shop".into(),
        service_name: "web".into(),
        ipaddress: address.into(),
        ..RegistrationMsg::default()
    }
}

/// The status with which a stream ends.
pub(super) async fn end(mut answers: tonic::Streaming<RegistrationResponse>) -> Status {
    let begun = Instant::now();
    let ended = tokio::time::timeout(2 * END_TIMEOUT, answers.message()).await.expect("it ends");
    assert!(begun.elapsed() < END_TIMEOUT, "after {:?}", begun.elapsed());
    ended.expect_err("no more answers")
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_ends_when_its_certificate_expires() {
    let secured = SecuredServer::start();
    let status = end(open_stream(&secured, &secured.ca.sign_for("vm-1", &[], -3600, 4)).await).await;
    assert_eq!((status.code(), status.message()), (Code::Unauthenticated, "the client certificate has expired"));
}

/// A call whose message has not come yet cannot be kept for later.
#[tokio::test(flavor = "multi_thread")]
async fn call_that_waits_for_its_message_ends_with_its_certificate() {
    let secured = SecuredServer::start();
    let vm = secured.ca.sign_for("vm-1", &[], -3600, 4);
    let mut grpc = Grpc::new(secured.connect(Some(&vm)).await.expect("a handshake"));
    grpc.ready().await.expect("connected");
    let codec = tonic_prost::ProstCodec::<ServiceInfo, RegistrationResult>::default();
    let path = "/registry.ServiceRegistry/Register".parse().expect("a path");
    let begun = Instant::now();
    let call = grpc.client_streaming(Request::new(futures::stream::pending()), path, codec);
    let status = tokio::time::timeout(2 * END_TIMEOUT, call).await.expect("it ends").expect_err("no answer");
    assert_eq!((status.code(), status.message()), (Code::Unauthenticated, "the client certificate has expired"));
    assert!(begun.elapsed() < END_TIMEOUT, "after {:?}", begun.elapsed());
}

/// The chain is good as long as each of its certificates is.
#[tokio::test(flavor = "multi_thread")]
async fn stream_ends_when_an_intermediate_certificate_expires() {
    let secured = SecuredServer::start();
    let signed = |between: &TestCa| {
        let Credential { cert, key } = between.sign("vm-1", &[]);
        Credential { cert: format!("{cert}{}", between.pem), key }
    };
    let long = open_stream(&secured, &signed(&secured.ca.intermediate(-3600, 3600))).await;
    let status = end(open_stream(&secured, &signed(&secured.ca.intermediate(-3600, 4))).await).await;
    let expected = "an intermediate certificate that the client has shown has expired";
    assert_eq!((status.code(), status.message()), (Code::Unauthenticated, expected));
    drop(long);
}

/// As `docs/security.md` says it: who has a certificate of the new CA by then notices nothing.
#[tokio::test(flavor = "multi_thread")]
async fn client_ca_is_replaced_under_streams_that_go_on() {
    let secured = SecuredServer::start();
    let next = TestCa::new();
    let mut old = LongStream::open(&secured, &secured.ca.sign("vm-1", &[])).await;
    secured.write("ca.crt", &format!("{}{}", secured.ca.pem, next.pem));
    crate::support::wait_until("both are taken", || {
        secured.server.stderr().contains("the client CA has changed").then_some(())
    });
    // The server's own certificate is of the first CA all along.
    let mut new = LongStream::open(&secured, &next.sign("vm-1", &[])).await;
    assert_eq!(old.say("10.1.0.2").await.expect("answered"), 201);
    secured.write("ca.crt", &next.pem);
    let ended = end(old.answers).await;
    assert_eq!(ended.message(), "the client certificate is not of the client CA any more");
    assert_eq!(new.say("10.1.0.3").await.expect("the same stream"), 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_ends_when_its_ca_is_replaced() {
    let secured = SecuredServer::start();
    let stream = open_stream(&secured, &secured.ca.sign("vm-1", &[])).await;
    secured.write("ca.crt", &TestCa::new().pem);
    let status = end(stream).await;
    let expected = "the client certificate is not of the client CA any more";
    assert_eq!((status.code(), status.message()), (Code::Unauthenticated, expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_ends_when_its_right_is_withdrawn() {
    let secured = SecuredServer::start();
    let vm = secured.ca.sign("vm-1", &[]);
    let (stream, watch) = (open_stream(&secured, &vm).await, secured.connect(Some(&vm)).await.expect("a handshake"));
    let request = WatchRequest { namespace: "shop".into(), service: "web".into(), cursor: Vec::new() };
    let mut watch = DiscoveryClient::new(watch).watch(request).await.expect("answered").into_inner();
    // An invalid policy changes nothing.
    secured.write("policy.toml", "[[rule]]\nusers = ['vm-1']\nverbs = ['*']\n");
    crate::support::wait_until("the invalid policy is noticed", || {
        secured.server.stderr().contains("its last valid version stays in force").then_some(())
    });
    let said = secured.server.stderr();
    assert!(said.contains("policy.toml: line 1: the rule names neither namespaces nor paths"), "{said}");

    secured.write("policy.toml", &POLICY.replace("'web'", "'api'"));
    let status = end(stream).await;
    let expected = "vm-1 may not create instances of shop/web";
    assert_eq!((status.code(), status.message()), (Code::PermissionDenied, expected));
    let status = loop {
        match watch.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended without a status"),
            Err(status) => break status,
        }
    };
    let expected = "vm-1 may not watch instances of shop/web";
    assert_eq!((status.code(), status.message()), (Code::PermissionDenied, expected));
}
