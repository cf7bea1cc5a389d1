//! Each limit returns its own error, is counted, and does not affect other clients.

use futures::stream;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::*;
use crate::grpc::proto::registry::{RegistrationResponse, ServiceInfo, service_registry_client::ServiceRegistryClient};

/// Opens a registration stream and registers the `n`th instance on it. The stream stays open while the
/// sender exists.
async fn open_stream(
    client: &mut ServiceRegistryClient<Channel>,
    n: u32,
) -> (tokio::sync::mpsc::Sender<RegistrationMsg>, tonic::Streaming<RegistrationResponse>) {
    let (send, messages) = tokio::sync::mpsc::channel(1);
    send.send(message(n)).await.expect("it is read");
    let mut answers = client.registration_event(ReceiverStream::new(messages)).await.expect("served").into_inner();
    assert_eq!(answers.message().await.expect("a good stream").expect("an answer").status, 201);
    (send, answers)
}

#[tokio::test(flavor = "multi_thread")]
async fn oversized_message_ends_the_stream_after_earlier_answers() {
    let server = TestServer::start().await;
    let mut client = ServiceRegistryClient::new(server.channel().await);
    let large = RegistrationMsg { host_name: "x".repeat(MAX_MESSAGE_BYTES), ..message(1) };
    let messages = stream::iter([message(0), large, message(2)]);
    let mut answers = client.registration_event(messages).await.expect("served").into_inner();
    assert_eq!(answers.message().await.expect("a good stream").expect("an answer").status, 201);
    let end = answers.message().await.expect_err("too large");
    assert_eq!(end.code(), Code::OutOfRange);
    assert!(end.message().contains("65536"), "{end}");

    let info = ServiceInfo { host_name: "x".repeat(MAX_MESSAGE_BYTES), ..ServiceInfo::default() };
    assert_eq!(client.register(info).await.expect_err("too large").code(), Code::OutOfRange);
}

#[tokio::test(flavor = "multi_thread")]
async fn call_beyond_the_limit_is_refused_until_another_ends() {
    let server = TestServer::serving(Registry::working(10), ServerLimits { calls: 2, ..LIMITS }).await;
    let mut client = ServiceRegistryClient::new(server.channel().await);
    let mut open = Vec::new();
    for n in 0..2 {
        open.push(open_stream(&mut client, n).await);
    }
    server.metric("gangplank_grpc_streams 2").await;
    let turned_away = client.register(ServiceInfo::default()).await.expect_err("too many");
    assert_eq!(turned_away.code(), Code::ResourceExhausted);
    assert!(turned_away.message().contains("as many calls open as it may"), "{turned_away}");
    server.metric("gangplank_grpc_streams_rejected_total 1").await;

    drop(open.pop());
    server.metric("gangplank_grpc_streams 1").await;
    assert_eq!(client.register(ServiceInfo::default()).await.expect("served").into_inner().status, 400);
    server
        .metric(
            r#"grpc_server_handled_total{grpc_type="unary",grpc_service="registry.ServiceRegistry",grpc_method="Register",grpc_code="ResourceExhausted"} 1"#,
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connection_is_closed_at_the_handshake_timeout() {
    let limits = ServerLimits { handshake: Duration::from_millis(50), ..LIMITS };
    let server = TestServer::serving(Registry::working(10), limits).await;
    let mut silent = TcpStream::connect(server.address).await.expect("it listens");
    let mut rest = Vec::new();
    let closed = soon("the connection is closed", silent.read_to_end(&mut rest)).await;
    assert!(closed.is_ok() || closed.is_err_and(|err| err.kind() == io::ErrorKind::ConnectionReset));
    server.metric("gangplank_connections{listener=\"grpc\"} 0").await;

    // A connection whose preface came in time has no handshake timeout any more.
    let mut client = server.client().await;
    server.metric("gangplank_connections{listener=\"grpc\"} 1").await;
    let key = VALIDATOR.service("prod", "web").expect("valid");
    assert!(client.service(&key).await.expect("answered").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_ends_streams_and_closes_stuck_connections_after_the_grace_period() {
    let limits = ServerLimits { grace: Duration::from_millis(200), ..LIMITS };
    let mut server = TestServer::serving(Registry::working(1_000_000), limits).await;
    let mut client = ServiceRegistryClient::new(server.channel().await);
    let (_send, mut answers) = open_stream(&mut client, 0).await;

    // Another client sends without end and reads nothing.
    let mut stuck = ServiceRegistryClient::new(server.channel().await);
    let endless = stream::iter((0..).map(|_| message(0)));
    let _answers = stuck.registration_event(endless).await.expect("served");

    server.ended().await;
    let end = soon("the end", answers.message()).await.expect_err("it stops");
    assert_eq!((end.code(), end.message()), (Code::Unavailable, "shutting down"));
    server.metric("gangplank_connections{listener=\"grpc\"} 0").await;
    assert!(TcpStream::connect(server.address).await.is_err(), "the listener is closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_methods_share_one_label() {
    let server = TestServer::start().await;
    let mut channel = tonic::client::Grpc::new(server.channel().await);
    channel.ready().await.expect("connected");
    let path = "/no.such.Service/Method".parse().expect("a path");
    let codec = tonic_prost::ProstCodec::<ServiceInfo, ServiceInfo>::default();
    let status = channel.unary(tonic::Request::new(ServiceInfo::default()), path, codec).await.expect_err("unknown");
    assert_eq!(status.code(), Code::Unimplemented);
    server
        .metric(
            r#"grpc_server_handled_total{grpc_type="unknown",grpc_service="unknown",grpc_method="unknown",grpc_code="Unimplemented"} 1"#,
        )
        .await;
}

/// Reads until the server closes the connection.
async fn closed(mut stream: TcpStream) {
    let mut rest = Vec::new();
    let closed = soon("the connection is closed", stream.read_to_end(&mut rest)).await;
    assert!(closed.is_ok() || closed.is_err_and(|err| err.kind() == io::ErrorKind::ConnectionReset));
}

/// A connection that sends the preface only.
async fn idle_peer(server: &TestServer) -> TcpStream {
    let mut stream = TcpStream::connect(server.address).await.expect("it listens");
    // RFC 9113 §3.4: the preface and an empty SETTINGS frame.
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("it reads");
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connection_is_evicted_for_a_new_one() {
    let limits = ConnectionLimits { connections: 3, ..CONNECTIONS };
    let server = TestServer::with_connections(Registry::working(10), LIMITS, limits).await;
    let mut client = ServiceRegistryClient::new(server.channel().await);
    let (send, mut answers) = open_stream(&mut client, 0).await;

    let first = idle_peer(&server).await;
    server.metric("gangplank_connections{listener=\"grpc\"} 2").await;
    let _second = idle_peer(&server).await;
    server.metric("gangplank_connections{listener=\"grpc\"} 3").await;
    // The stream's connection is the oldest but in use, so the first idle one is closed.
    let _third = idle_peer(&server).await;
    closed(first).await;
    server.metric("gangplank_connections_closed_total{listener=\"grpc\",reason=\"evicted\"} 1").await;
    server.metric("gangplank_connections{listener=\"grpc\"} 3").await;
    send.send(message(1)).await.expect("it is read");
    assert_eq!(answers.message().await.expect("a good stream").expect("an answer").status, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_is_refused_when_all_are_in_use() {
    let limits = ConnectionLimits { connections: 1, ..CONNECTIONS };
    let server = TestServer::with_connections(Registry::working(10), LIMITS, limits).await;
    let mut client = ServiceRegistryClient::new(server.channel().await);
    let (_send, _answers) = open_stream(&mut client, 0).await;
    closed(TcpStream::connect(server.address).await.expect("it listens")).await;
    server.metric("gangplank_connections_closed_total{listener=\"grpc\",reason=\"full\"} 1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_without_a_call_is_closed_when_idle() {
    let limits = ConnectionLimits { idle: Duration::from_millis(50), ..CONNECTIONS };
    let server = TestServer::with_connections(Registry::working(10), LIMITS, limits).await;
    closed(idle_peer(&server).await).await;
    server.metric("gangplank_connections_closed_total{listener=\"grpc\",reason=\"idle\"} 1").await;
    server.metric("gangplank_connections{listener=\"grpc\"} 0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn old_connection_takes_no_new_calls_and_its_stream_continues() {
    let limits = ConnectionLimits { max_age: Duration::from_millis(50), ..CONNECTIONS };
    let server = TestServer::with_connections(Registry::working(10), LIMITS, limits).await;
    let mut client = ServiceRegistryClient::new(server.channel().await);
    let (send, mut answers) = open_stream(&mut client, 0).await;
    server.metric("gangplank_connections_closed_total{listener=\"grpc\",reason=\"max_age\"} 1").await;
    send.send(message(1)).await.expect("it is read");
    assert_eq!(answers.message().await.expect("a good stream").expect("an answer").status, 201);
    // A call during the end of the old connection fails in tonic's client; the next one opens a new connection.
    let mut answered = client.register(ServiceInfo::default()).await;
    for _ in 0..10 {
        if answered.is_ok() {
            break;
        }
        answered = client.register(ServiceInfo::default()).await;
    }
    assert_eq!(answered.expect("served").into_inner().status, 400);
}
