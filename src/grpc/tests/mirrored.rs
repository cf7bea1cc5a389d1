//! With a mirror, a response waits at most a second for Kubernetes, and its status tells the result.

use futures::stream;

use super::*;
use crate::grpc::proto::registry::service_registry_client::ServiceRegistryClient;

#[tokio::test(flavor = "multi_thread")]
async fn answer_waits_for_the_slice() {
    let server = TestServer::serving(Registry::mirrored().await, LIMITS).await;
    let mirror = server.registry.context.registry.clone();
    let mut client = ServiceRegistryClient::new(server.channel().await);
    let (sender, receiver) = tokio::sync::mpsc::channel(8);
    let messages = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut answers = client.registration_event(messages).await.expect("served").into_inner();

    for (sent, status) in [(message(1), 201), (message(1), 200), (removal(1), 204)] {
        sender.send(sent).await.expect("the stream is open");
        let dirty = soon("a dirty service", mirror.mirror_progress().take_dirty()).await;
        assert_eq!((dirty.changed.len(), dirty.repeated.len()), if status == 200 { (0, 1) } else { (1, 0) });
        let generation = mirror.catalog().generation();
        let services = dirty.changed.into_iter().chain(dirty.repeated);
        mirror.mirrored(services.map(|service| (service, generation)).collect()).await.expect("it is there");
        let answer = soon("an answer", answers.message()).await.expect("a good stream").expect("one per message");
        assert_eq!(answer.status, status, "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_stays_pipelined_and_gets_202_without_the_api_server() {
    let server = TestServer::serving(Registry::mirrored().await, LIMITS).await;
    let mut client = ServiceRegistryClient::new(server.channel().await);
    // One by one, each message would wait for a second.
    let messages = stream::iter((0..3000).map(message));
    let mut answers = client.registration_event(messages).await.expect("served").into_inner();
    for n in 0..3000 {
        let answer = soon("an answer", answers.message()).await.expect("a good stream").expect("one per message");
        assert_eq!((answer.status, &*answer.request_id), (202, &*n.to_string()));
        assert!(answer.generation > 0 && answer.status_details.contains("not in Kubernetes yet"), "{answer:?}");
    }
    // An unchanged registration of the same instance is not in Kubernetes either.
    let again = stream::iter([message(7)]);
    let mut answers = client.registration_event(again).await.expect("served").into_inner();
    let answer = soon("an answer", answers.message()).await.expect("a good stream").expect("one per message");
    assert_eq!(answer.status, 202);
    server.metric(r#"gangplank_registrations_total{type="register",status="202"} 3001"#).await;
}
