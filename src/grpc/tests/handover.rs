//! The outbox of a process that does not write goes to the one that does; streams end when a process stops writing.

use tonic::Code;

use super::*;
use crate::{
    grpc::proto::{
        gangplank::internal::v1::{HandOverRequest, Word, hand_over_client::HandOverClient},
        registry::service_registry_client::ServiceRegistryClient,
    },
    model::ServerAddress,
    registry::LeaseHolder,
};

fn holder(server: &TestServer) -> LeaseHolder {
    let addresses = vec![ServerAddress::new(server.address.ip(), server.address.port())];
    LeaseHolder { name: "the writer".into(), addresses }
}

/// Registers the first `count` instances on `server`, which nothing mirrors.
async fn accept(server: &TestServer, count: u32) {
    let mut client = ServiceRegistryClient::new(server.channel().await);
    let messages = futures::stream::iter((1..=count).map(message));
    let mut answers = client.registration_event(messages).await.expect("served").into_inner();
    for _ in 0..count {
        let answer = soon("an answer", answers.message()).await.expect("a good stream").expect("one per message");
        assert_eq!(answer.status, 202);
    }
}

/// Confirms everything that `server` accepts, for ever.
fn mirror(server: &TestServer, tasks: &mut JoinSet<()>) {
    let registry = server.registry.context.registry.clone();
    tasks.spawn(async move {
        loop {
            let dirty = registry.mirror_progress().take_dirty().await;
            let generation = registry.catalog().generation();
            let services = dirty.changed.into_iter().chain(dirty.repeated).chain(dirty.merged);
            let confirmed = services.map(|service| (service, generation)).collect();
            registry.mirrored(confirmed).await.expect("it is there");
        }
    });
}

fn hand_over_from(server: &TestServer, tasks: &mut JoinSet<()>) {
    let ServerContext { registry, metrics, .. } = server.registry.context.clone();
    tasks.spawn(hand_over(registry, metrics, None, server.stop.clone()));
}

#[tokio::test(flavor = "multi_thread")]
async fn outbox_is_handed_over_until_it_is_empty() {
    const COUNT: u32 = 600; // more than one request
    let (deposed, writer) = (
        TestServer::serving(Registry::mirrored().await, LIMITS).await,
        TestServer::serving(Registry::mirrored().await, LIMITS).await,
    );
    accept(&deposed, COUNT).await;
    let mut tasks = JoinSet::new();
    hand_over_from(&deposed, &mut tasks);
    deposed.registry.context.registry.stand_down(holder(&writer)).await.expect("it is there");
    // Nothing leaves the outbox before Kubernetes has it.
    let sent = async {
        while writer.registry.context.registry.catalog().instances() < COUNT as usize {
            tokio::task::yield_now().await;
        }
    };
    soon("all of them are sent", sent).await;
    deposed.metric(&format!("gangplank_registry_outbox_words {COUNT}")).await;
    mirror(&writer, &mut tasks);
    deposed.metric("gangplank_registry_outbox_words 0").await;
    deposed.metric(&format!("gangplank_registry_handed_over_words_total{{result=\"confirmed\"}} {COUNT}")).await;
    let (sent, accepted) = (&writer.registry.context.registry, &deposed.registry.context.registry);
    let of = |registry: &RegistryHandle| registry.catalog().services().remove(0).1.instances;
    assert_eq!(of(sent), of(accepted), "with all attributes and stamps");
}

#[tokio::test(flavor = "multi_thread")]
async fn words_wait_for_a_process_that_writes() {
    let (deposed, writer) = (
        TestServer::serving(Registry::mirrored().await, LIMITS).await,
        TestServer::serving(Registry::mirrored().await, LIMITS).await,
    );
    accept(&deposed, 1).await;
    let mut tasks = JoinSet::new();
    hand_over_from(&deposed, &mut tasks);
    // Nobody is known to write, then one that does not.
    deposed.registry.context.registry.stand_down(LeaseHolder::default()).await.expect("it is there");
    let other = TestServer::serving(Registry::mirrored().await, LIMITS).await;
    other.registry.context.registry.stand_down(holder(&writer)).await.expect("it is there");
    deposed.registry.context.registry.status().standby(&holder(&other));
    let refused = "grpc_server_handled_total{grpc_type=\"unary\",grpc_service=\"gangplank.internal.v1.HandOver\",\
                   grpc_method=\"Send\",grpc_code=\"Unavailable\"} 2";
    other.metric(refused).await;
    deposed.metric("gangplank_registry_outbox_words 1").await;
    mirror(&writer, &mut tasks);
    deposed.registry.context.registry.status().standby(&holder(&writer));
    deposed.metric("gangplank_registry_outbox_words 0").await;
    assert_eq!(writer.registry.context.registry.catalog().instances(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn words_beyond_the_limits_are_refused() {
    let server = TestServer::serving(Registry::mirrored().await, LIMITS).await;
    let mut client = HandOverClient::new(server.channel().await);
    let many = HandOverRequest { words: vec![Word::default(); 257], wait_millis: 0 };
    assert_eq!(client.send(many).await.expect_err("too many").code(), Code::InvalidArgument);
    let invalid = HandOverRequest { words: vec![Word::default()], wait_millis: 0 };
    let answer = client.send(invalid).await.expect("answered").into_inner();
    assert_eq!((answer.results[0].result, &*answer.results[0].details), (4, "message: must be there"));

    let unmirrored = TestServer::start().await;
    let mut client = HandOverClient::new(unmirrored.channel().await);
    let refused = client.send(HandOverRequest::default()).await.expect_err("no Kubernetes");
    assert_eq!(refused.code(), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_a_deposed_process_end_after_what_waits_got_202() {
    let server = TestServer::serving(Registry::mirrored().await, LIMITS).await;
    let mut client = ServiceRegistryClient::new(server.channel().await);
    let (sender, receiver) = tokio::sync::mpsc::channel(8);
    let messages = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut answers = client.registration_event(messages).await.expect("served").into_inner();
    sender.send(message(1)).await.expect("the stream is open");
    let registry = server.registry.context.registry.clone();
    soon("it is accepted", registry.mirror_progress().take_dirty()).await;
    registry.stand_down(holder(&server)).await.expect("it is there");
    let answer = soon("an answer", answers.message()).await.expect("a good stream").expect("one per message");
    assert_eq!(answer.status, 202);
    let end = soon("the end", answers.message()).await.expect_err("it ends");
    assert_eq!(end.code(), Code::Unavailable);
    assert!(end.message().starts_with("another gangplank has taken the Lease"), "{}", end.message());
    assert_eq!(end.metadata().get("gangplank-writer").expect("it is there"), server.address.to_string().as_str());

    // A stream that is opened on standby gets 503s instead.
    let mut answers =
        client.registration_event(futures::stream::iter([message(2)])).await.expect("served").into_inner();
    let answer = soon("an answer", answers.message()).await.expect("a good stream").expect("one per message");
    assert_eq!(answer.status, 503);
    assert!(soon("the end", answers.message()).await.expect("a good end").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_a_process_whose_journal_failed_end_once_it_gives_the_lease_up() {
    let server = TestServer::serving(Registry::mirrored().await, LIMITS).await;
    let mut client = ServiceRegistryClient::new(server.channel().await);
    let (sender, receiver) = tokio::sync::mpsc::channel(8);
    let messages = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut answers = client.registration_event(messages).await.expect("served").into_inner();
    std::fs::remove_dir_all(server.registry.dir.path()).expect("it can be removed");
    for n in 1..=2 {
        sender.send(message(n)).await.expect("the stream is open");
        let answer = soon("an answer", answers.message()).await.expect("a good stream").expect("one per message");
        assert_eq!(answer.status, 503, "it has the Lease, and the stream goes on: {answer:?}");
    }
    let registry = &server.registry.context.registry;
    assert!(matches!(registry.status().phase(), Phase::StorageFailed(_)));
    registry.stand_down(LeaseHolder::default()).await.expect("it is there");
    registry.status().standby(&holder(&server));
    let end = soon("the end", answers.message()).await.expect_err("it ends");
    assert_eq!(end.code(), Code::Unavailable);
    let begin = "this gangplank cannot write its journal and has given up the Lease gangplank-writer; register at ";
    assert!(end.message().starts_with(begin), "{}", end.message());
    assert_eq!(end.metadata().get("gangplank-writer").expect("it is there"), server.address.to_string().as_str());
}
