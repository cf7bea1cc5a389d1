//! Unary calls: every status, health, reflection, and the client's errors.

use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_check_response, health_client::HealthClient};
use tonic_reflection::pb::{
    v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    },
    v1alpha,
};

use super::*;
use crate::{
    grpc::client::{ClientError, ClientTls},
    model::{InstanceSpec, PortSpec, testing::unstamped},
};

fn spec(address: &str) -> InstanceSpec {
    let http = PortSpec { number: 8080, name: "http".into(), ..PortSpec::default() };
    InstanceSpec { address: address.into(), ports: vec![http], ..InstanceSpec::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_outcome_has_its_status() {
    let server = TestServer::serving(Registry::working(2), LIMITS).await;
    let mut client = server.client().await;
    let web = spec("10.0.0.1");

    let created = client.register("prod", "web", &web).await.expect("answered");
    assert_eq!((created.status, created.details.as_str()), (201, ""));
    let same = client.register("prod", "web", &web).await.expect("answered");
    assert_eq!((same.status, same.generation), (200, created.generation));
    let changed =
        client.register("prod", "web", &InstanceSpec { weight: Some(2.0), ..web.clone() }).await.expect("answered");
    assert_eq!((changed.status, changed.generation), (200, created.generation + 1));
    assert_eq!(client.register("prod", "web", &spec("10.0.0.2")).await.expect("answered").status, 201);
    let full = client.register("prod", "web", &spec("10.0.0.3")).await.expect("answered");
    assert_eq!((full.status, full.generation), (507, 0));
    assert!(full.details.contains("2 instances"), "{}", full.details);

    let bad = client.register("prod", "web", &spec("127.0.0.1")).await.expect("answered");
    assert_eq!((bad.status, bad.generation), (400, 0));
    assert!(bad.details.starts_with("ipaddress: 127.0.0.1: loopback"), "{}", bad.details);

    let other = InstanceSpec { ports: Vec::new(), ..spec("10.0.0.9") };
    let absent = client.unregister("prod", "web", &other).await.expect("answered");
    assert_eq!((absent.status, absent.details.as_str()), (404, "prod/web has no instance at 10.0.0.9"));
    let all_ports = InstanceSpec { ports: Vec::new(), ..spec("10.0.0.1") };
    let removed = client.unregister("prod", "web", &all_ports).await.expect("answered");
    assert_eq!((removed.status, removed.generation), (204, changed.generation + 2));

    server.registry.context.registry.status().drain();
    let late = client.register("prod", "web", &web).await.expect("answered");
    assert_eq!((late.status, late.details.as_str()), (503, "the server is shutting down; try again"));

    for line in [
        r#"gangplank_registrations_total{type="register",status="201"} 2"#,
        r#"gangplank_registrations_total{type="register",status="200"} 2"#,
        r#"gangplank_registrations_total{type="register",status="507"} 1"#,
        r#"gangplank_registrations_total{type="register",status="400"} 1"#,
        r#"gangplank_registrations_total{type="register",status="503"} 1"#,
        r#"gangplank_registrations_total{type="unregister",status="404"} 1"#,
        r#"gangplank_registrations_total{type="unregister",status="204"} 1"#,
        r#"gangplank_registry_refused_total{reason="invalid"} 1"#,
        r#"gangplank_registry_refused_total{reason="shutting_down"} 1"#,
        r#"grpc_server_handled_total{grpc_type="unary",grpc_service="registry.ServiceRegistry",grpc_method="UnRegister",grpc_code="OK"} 2"#,
        "gangplank_grpc_streams 0",
    ] {
        server.metric(line).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_unavailable_before_the_recovery() {
    let server = TestServer::serving(Registry::new(10), LIMITS).await;
    let mut client = server.client().await;
    let answer = client.register("prod", "web", &spec("10.0.0.1")).await.expect("answered");
    assert_eq!(answer.status, 503);
    assert!(answer.details.starts_with("not ready"), "{}", answer.details);

    let key = VALIDATOR.service("prod", "web").expect("valid");
    let service = client.service(&key).await.expect_err("unknown as yet");
    let services = client.services(None).await.expect_err("unknown as yet");
    let watch = client.watch(None, None, None).await.expect_err("unknown as yet");
    for err in [service, services, watch] {
        let ClientError::Status { code, message } = err else { panic!("{err}") };
        assert_eq!(code, "Unavailable");
        assert!(message.starts_with("not ready"), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn registered_instances_are_read_back_unchanged() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let key = VALIDATOR.service("prod", "web").expect("valid");
    assert!(client.service(&key).await.expect("answered").is_none());
    assert!(client.services(None).await.expect("answered").is_empty());

    stream::register_all(&server, 0..10_000).await;
    let one = InstanceSpec {
        host_name: "db1".into(),
        node_name: "node.example.com".into(),
        weight: Some(0.5),
        priority: 3,
        ..spec("2001:db8::1")
    };
    assert_eq!(client.register("prod", "db", &one).await.expect("answered").status, 201);

    let catalog = server.registry.context.registry.catalog();
    let read = client.service(&key).await.expect("answered").expect("it is there");
    let registered = catalog.get(&key).expect("it is there");
    assert_eq!(read.instances.len(), 10_000);
    assert!(read.instances.iter().cloned().eq(registered.instances.iter().map(unstamped)));
    assert_eq!(read.generation, registered.generation);

    let all = client.services(None).await.expect("answered");
    let names: Vec<_> = all.iter().map(|(key, service)| (key.to_string(), service.instances.len())).collect();
    assert_eq!(names, [("prod/db".to_owned(), 1), ("prod/web".to_owned(), 10_000)]);
    for (key, service) in &all {
        let registered = catalog.get(key).expect("it is there").instances;
        assert!(service.instances.iter().cloned().eq(registered.iter().map(unstamped)));
    }
    assert!(client.services(Some("test")).await.expect("answered").is_empty());
    assert_eq!(client.services(Some("prod")).await.expect("answered").len(), 2);

    let err = client.services(Some("Prod")).await.expect_err("no namespace");
    assert!(err.to_string().starts_with("the server answered InvalidArgument: namespace: must consist of"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn client_tells_an_unreachable_server_from_an_invalid_url() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    drop(listener);
    let err = Client::connect(&url, &ClientTls::default()).await.expect_err("no server listens");
    assert!(matches!(err, ClientError::Unreachable { .. }), "{err}");
    assert_eq!(err.to_string(), format!("no gangplank server at {url}"));
    for url in ["", "127.0.0.1:9080", "ftp://host", "http://", "not a url"] {
        let err = Client::connect(url, &ClientTls::default()).await.expect_err("no URL");
        assert!(matches!(err, ClientError::Url { .. }), "{url:?}: {err}");
    }

    let err = Client::connect("https://127.0.0.1:9080", &ClientTls::default()).await.expect_err("no CA");
    assert!(matches!(err, ClientError::NoCa { .. }), "{err}");

    // A listener that closes each connection at once.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let mut hanging_up = JoinSet::new();
    hanging_up.spawn(async move {
        loop {
            drop(listener.accept().await.expect("a connection"));
        }
    });
    let err = match Client::connect(&url, &ClientTls::default()).await {
        Err(err) => err,
        Ok(mut client) => client.services(None).await.expect_err("no answer"),
    };
    assert!(matches!(err, ClientError::Unreachable { .. }), "{err:?}");

    let mut server = TestServer::start().await;
    let mut client = server.client().await;
    server.ended().await;
    let err = client.register("prod", "web", &spec("10.0.0.1")).await.expect_err("it is gone");
    assert!(matches!(err, ClientError::Unreachable { .. }), "{err:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_follows_the_phase_of_the_registry() {
    use health_check_response::ServingStatus::{NotServing, Serving};
    let mut server = TestServer::serving(Registry::new(10), LIMITS).await;
    let mut health = HealthClient::new(server.channel().await);
    let watch = HealthCheckRequest { service: "registry.ServiceRegistry".into() };
    let mut watch = health.watch(watch).await.expect("known").into_inner();
    let mut next = async || soon("health changes", watch.message()).await.expect("healthy stream");

    assert_eq!(next().await.expect("a status").status, NotServing as i32);
    server.registry.recover();
    assert_eq!(next().await.expect("a status").status, Serving as i32);
    for name in HEALTH_SERVICES {
        let answer = health.check(HealthCheckRequest { service: name.into() }).await.expect("known").into_inner();
        assert_eq!(answer.status, Serving as i32, "{name:?}");
    }
    let unknown = health.check(HealthCheckRequest { service: "x".into() }).await.expect_err("unknown");
    assert_eq!(unknown.code(), Code::NotFound);
    server.registry.context.registry.status().drain();
    assert_eq!(next().await.expect("a status").status, NotServing as i32);
    server.stop.cancel();
    assert!(next().await.is_none(), "an open health watch does not delay the stop");
    server.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_lists_the_services_in_both_versions() {
    let server = TestServer::start().await;
    let request = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..ServerReflectionRequest::default()
    };
    let mut client = ServerReflectionClient::new(server.channel().await);
    let answers = client.server_reflection_info(futures::stream::iter([request])).await.expect("served");
    let answer = answers.into_inner().message().await.expect("a good stream").expect("an answer");
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else { panic!("{answer:?}") };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in ["registry.ServiceRegistry", "gangplank.v1.Discovery", "grpc.health.v1.Health"] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }

    let old = v1alpha::ServerReflectionRequest {
        message_request: Some(v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(
            "registry.ServiceRegistry".into(),
        )),
        ..v1alpha::ServerReflectionRequest::default()
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(server.channel().await);
    let answers = client.server_reflection_info(futures::stream::iter([old])).await.expect("served");
    let answer = answers.into_inner().message().await.expect("a good stream").expect("an answer");
    let found = answer.message_response.expect("a response");
    assert!(
        matches!(found, v1alpha::server_reflection_response::MessageResponse::FileDescriptorResponse(_)),
        "{found:?}"
    );
}
