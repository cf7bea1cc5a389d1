//! Every call, as the server itself lists them, with every kind of credential.

use std::{collections::BTreeSet, time::Duration};

use gangplank::grpc::proto::registry::{
    RegistrationMsg, RegistrationResponse, RegistrationResult, RegistrationType, ServiceInfo,
    service_registry_client::ServiceRegistryClient,
};
use prost::Message as _;
use tonic::{
    Code, Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    transport::Channel,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use super::{Credential, SecuredServer, TestCa};
use crate::support::{http, wait_until};

/// What an identity without any right gets of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Without {
    /// An answer: the call needs an identity only.
    Answer,
    /// PERMISSION_DENIED.
    PermissionDenied,
    /// 403 in the answer to a message.
    Forbidden,
    /// FAILED_PRECONDITION, also without an identity: this server has no CA of its own. A server that has one is attacked in
    /// [`super::joining`].
    Open,
}

/// Every call, and what an identity without any right gets.
pub(super) const CALLS: &[(&str, Without)] = &[
    ("/registry.ServiceRegistry/Register", Without::Forbidden),
    ("/registry.ServiceRegistry/UnRegister", Without::Forbidden),
    ("/registry.ServiceRegistry/RegistrationEvent", Without::Forbidden),
    ("/gangplank.v1.Discovery/GetService", Without::PermissionDenied),
    ("/gangplank.v1.Discovery/GetNames", Without::PermissionDenied),
    ("/gangplank.v1.Discovery/GetServicesByMethod", Without::PermissionDenied),
    ("/gangplank.v1.Discovery/ListServices", Without::PermissionDenied),
    ("/gangplank.v1.Discovery/Watch", Without::PermissionDenied),
    ("/gangplank.v1.Discovery/GetReplica", Without::Answer),
    ("/gangplank.internal.v1.HandOver/Send", Without::PermissionDenied),
    ("/gangplank.join.v1.Joining/Join", Without::Open),
    ("/gangplank.join.v1.Joining/Renew", Without::Open),
    ("/gangplank.join.v1.Registrants/CreateToken", Without::PermissionDenied),
    ("/gangplank.join.v1.Registrants/ListTokens", Without::PermissionDenied),
    ("/gangplank.join.v1.Registrants/RevokeToken", Without::PermissionDenied),
    ("/gangplank.join.v1.Registrants/ListRegistrants", Without::PermissionDenied),
    ("/gangplank.join.v1.Registrants/RevokeRegistrant", Without::PermissionDenied),
    ("/grpc.health.v1.Health/Check", Without::Answer),
    ("/grpc.health.v1.Health/Watch", Without::Answer),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Without::Answer),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Without::Answer),
];

/// Bytes as they are.
#[derive(Debug, Default, Clone)]
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for RawCodec {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, dst: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(dst, &item);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, src: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut item = vec![0; bytes::Buf::remaining(src)];
        bytes::Buf::copy_to_slice(src, &mut item);
        Ok(Some(item))
    }
}

impl Without {
    /// Whether this is how a call ended.
    pub(super) fn check(self, path: &str, answered: Result<Vec<u8>, Status>) {
        match self {
            Self::Open => {
                let refused = answered.expect_err(path);
                assert_eq!(refused.code(), Code::FailedPrecondition, "{path}: {refused}");
            }
            Self::Answer => assert!(answered.is_ok(), "{path}: {answered:?}"),
            Self::PermissionDenied => {
                let refused = answered.expect_err(path);
                assert_eq!(refused.code(), Code::PermissionDenied, "{path}: {refused}");
            }
            Self::Forbidden => {
                let answer = answered.expect(path);
                let status = if is_streaming(path) {
                    RegistrationResponse::decode(&answer[..]).expect(path).status
                } else {
                    RegistrationResult::decode(&answer[..]).expect(path).status
                };
                assert_eq!(status, 403, "{path}");
            }
        }
    }
}

/// Sends one message, and returns the first answer or the status.
async fn call(channel: &Channel, path: &str, message: Vec<u8>) -> Result<Vec<u8>, Status> {
    call_with(channel, &[], path, message).await
}

/// The same with values of `authorization`.
pub(super) async fn call_with(
    channel: &Channel,
    authorization: &[&str],
    path: &str,
    message: Vec<u8>,
) -> Result<Vec<u8>, Status> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.map_err(|err| Status::unknown(err.to_string()))?;
    let path = PathAndQuery::try_from(path).expect("a path");
    // As long as the test looks, the client sends no more.
    let messages = futures::StreamExt::chain(futures::stream::iter([message]), futures::stream::pending());
    let unary = path.as_str().ends_with("/Check");
    let shown = |mut metadata: tonic::metadata::MetadataMap| {
        for value in authorization {
            metadata.append("authorization", value.parse().expect("ASCII"));
        }
        metadata
    };
    let answered = if unary || !is_streaming(path.as_str()) {
        let mut message = Request::new(futures::StreamExt::take(messages, 1));
        *message.metadata_mut() = shown(message.metadata().clone());
        grpc.streaming(message, path, RawCodec).await
    } else {
        let mut messages = Request::new(messages);
        *messages.metadata_mut() = shown(messages.metadata().clone());
        grpc.streaming(messages, path, RawCodec).await
    };
    answered?.into_inner().message().await.map(Option::unwrap_or_default)
}

/// Whether the client sends a stream.
fn is_streaming(path: &str) -> bool {
    path.ends_with("/RegistrationEvent") || path.ends_with("/ServerReflectionInfo")
}

/// A message of the call that names what nobody has a right to.
pub(super) fn request(path: &str) -> Vec<u8> {
    let info = ServiceInfo {
        namespace: "other".into(),
        service_name: "web".into(),
        ipaddress: "10.1.0.1".into(),
        ..ServiceInfo::default()
    };
    // As `name` is 2 in GetServiceRequest, and `service` in WatchRequest.
    match path.rsplit('/').next() {
        Some("Register" | "UnRegister") => info.encode_to_vec(),
        Some("RegistrationEvent") => RegistrationMsg {
            r#type: RegistrationType::Register.into(),
            namespace: info.namespace,
            service_name: info.service_name,
            ipaddress: info.ipaddress,
            ..RegistrationMsg::default()
        }
        .encode_to_vec(),
        // The same fields.
        Some("GetService" | "GetNames") => {
            gangplank::grpc::proto::gangplank::v1::GetServiceRequest { namespace: "other".into(), name: "web".into() }
                .encode_to_vec()
        }
        Some("ServerReflectionInfo") => ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        }
        .encode_to_vec(),
        _ => Vec::new(),
    }
}

/// Every call of every service that the server's reflection lists.
async fn listed(channel: &Channel) -> BTreeSet<String> {
    let mut client = ServerReflectionClient::new(channel.clone());
    let mut ask = async |request| {
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(request) };
        let answers = client.server_reflection_info(futures::stream::iter([request])).await.expect("answered");
        let answer = answers.into_inner().message().await.expect("answered").expect("one answer");
        answer.message_response.expect("a response")
    };
    let MessageResponse::ListServicesResponse(services) = ask(MessageRequest::ListServices(String::new())).await else {
        panic!("not a list");
    };
    let mut calls = BTreeSet::new();
    for service in services.service {
        let symbol = MessageRequest::FileContainingSymbol(service.name.clone());
        let MessageResponse::FileDescriptorResponse(files) = ask(symbol).await else { panic!("no file") };
        for file in files.file_descriptor_proto {
            let file = prost_types::FileDescriptorProto::decode(&file[..]).expect("a descriptor");
            for found in &file.service {
                let name = format!("{}.{}", file.package(), found.name());
                if name == service.name {
                    calls.extend(found.method.iter().map(|method| format!("/{name}/{}", method.name())));
                }
            }
        }
    }
    calls
}

#[tokio::test(flavor = "multi_thread")]
async fn no_call_is_answered_without_an_identity_or_carried_out_without_a_right() {
    let secured = SecuredServer::start();
    let ops = secured.connect(Some(&secured.ca.sign("ada", &["ops"]))).await.expect("a handshake");
    let known: BTreeSet<String> = CALLS.iter().map(|(path, _)| (*path).to_owned()).collect();
    let mut found = listed(&ops).await;
    // Reflection does not list its own older version.
    found.insert("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo".into());
    assert_eq!(found, known, "a call without a row, or a row without a call");

    let nobody = secured.connect(None).await.expect("a handshake");
    let stranger = secured.connect(Some(&secured.ca.sign("stranger", &["strangers"]))).await.expect("a handshake");
    for (path, without) in CALLS {
        let refused = call(&nobody, path, request(path)).await.expect_err(path);
        let expected = if *without == Without::Open { Code::FailedPrecondition } else { Code::Unauthenticated };
        assert_eq!(refused.code(), expected, "{path}: {refused}");

        let answered = call(&stranger, path, request(path)).await;
        without.check(path, answered);
    }
    let log = secured.server.stderr();
    assert!(log.contains("refused: the caller has no identity") && log.contains("peer=127.0.0.1"), "{log}");
    assert!(log.contains("stranger may not create instances of other/web"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificate_that_is_not_good_does_not_connect() {
    let secured = SecuredServer::start();
    let other = TestCa::new();
    for (credential, why) in [
        (other.sign("vm-1", &[]), "another CA"),
        (secured.ca.sign_for("vm-1", &[], -7200, -3600), "expired"),
        (secured.ca.sign_for("vm-1", &[], 3600, 7200), "not valid yet"),
    ] {
        // With TLS 1.3 the client learns of it with its first read.
        let refused = match secured.connect(Some(&credential)).await {
            Err(_) => true,
            Ok(channel) => call(&channel, "/grpc.health.v1.Health/Check", Vec::new()).await.is_err(),
        };
        assert!(refused, "{why}");
    }
    assert!(secured.server.stderr().contains("the TLS handshake failed"), "{}", secured.server.stderr());
    let value = |series: &str| -> f64 {
        let metrics = http::get(secured.server.admin, "/metrics").1;
        let value = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {series} in {metrics}")).parse().expect("a number")
    };
    // A client may try more than once, and learns of it just before it is counted.
    wait_until("all are counted", || {
        (value("gangplank_tls_handshakes_failed_total{reason=\"bad_certificate\"}") >= 3.0).then_some(())
    });
    assert_eq!(value("gangplank_tls_handshakes_total"), 0.0);
}

async fn register(client: &mut ServiceRegistryClient<Channel>, service: &str, address: &str) -> (u32, String) {
    let (namespace, name) = service.split_once('/').expect("NAMESPACE/NAME");
    let info = ServiceInfo {
        namespace: namespace.into(),
        service_name: name.into(),
        ipaddress: address.into(),
        ..ServiceInfo::default()
    };
    let answer = client.register(info).await.expect("answered").into_inner();
    (answer.status, answer.status_details)
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_end_at_the_namespace_the_service_and_the_address() {
    let secured = SecuredServer::start();
    let vm = secured.connect(Some(&secured.ca.sign("vm-1", &[]))).await.expect("a handshake");
    let mut client = ServiceRegistryClient::new(vm);
    assert_eq!(register(&mut client, "shop/web", "10.1.0.1").await.0, 201);
    for (service, address, why) in [
        ("other/web", "10.1.0.1", "vm-1 may not create instances of other/web"),
        ("shop/api", "10.1.0.1", "vm-1 may not create instances of shop/api"),
        ("shop/web", "10.2.0.1", "vm-1 may not register the address 10.2.0.1"),
    ] {
        assert_eq!(register(&mut client, service, address).await, (403, why.into()));
    }
    let listed = secured.server.run(&["ls", "-A", "-o", "name"]);
    assert_eq!(String::from_utf8_lossy(&listed.stdout).trim(), "shop/web", "{listed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_over_loopback_stays_as_it_is() {
    let secured = SecuredServer::start();
    secured.server.register("any", "thing", "10.9.0.1", "80");
}

/// How long a stream may go on after its right or its identity has ended.
pub(super) const END_TIMEOUT: Duration = Duration::from_secs(15);

/// Registers an instance of web on a stream that stays open. Returns the answers, of which the first is not read.
pub(super) async fn register_and_stay(
    channel: tonic::transport::Channel,
    namespace: &str,
    address: &str,
) -> tonic::Streaming<RegistrationResponse> {
    let message = RegistrationMsg {
        namespace: namespace.into(),
        service_name: "web".into(),
        ipaddress: address.into(),
        ..RegistrationMsg::default()
    };
    let messages = futures::StreamExt::chain(futures::stream::iter([message]), futures::stream::pending());
    ServiceRegistryClient::new(channel).registration_event(messages).await.expect("answered").into_inner()
}

/// A call of a stream of registrations that stays open after its first answer.
pub(super) async fn open_stream(
    secured: &SecuredServer,
    credential: &Credential,
) -> tonic::Streaming<RegistrationResponse> {
    let mut answers =
        register_and_stay(secured.connect(Some(credential)).await.expect("a handshake"), "shop", "10.1.0.7").await;
    let first = answers.message().await.expect("a good stream").expect("one answer");
    assert!(first.status == 201 || first.status == 200, "{first:?}");
    answers
}
