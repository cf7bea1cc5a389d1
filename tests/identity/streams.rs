//! A stream ends, with its reason, when its identity or its right does.

use std::time::Instant;

use tonic::{Code, Request, Status, client::Grpc};

use super::{
    POLICY, SecuredServer, TestCa,
    matrix::{END_TIMEOUT, open_stream},
};
use gangplank::grpc::proto::{
    gangplank::v1::{WatchRequest, discovery_client::DiscoveryClient},
    registry::{RegistrationResponse, RegistrationResult, ServiceInfo},
};

/// The status with which a stream ends.
async fn end(mut answers: tonic::Streaming<RegistrationResponse>) -> Status {
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
