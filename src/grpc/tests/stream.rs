//! The registration stream: one answer per message, in order, also when either side stops.

use std::{
    ops::Range,
    pin::pin,
    sync::atomic::{AtomicUsize, Ordering},
    task::Poll,
};

use futures::{StreamExt as _, poll, stream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::*;
use crate::{
    grpc::{
        proto::registry::{RegistrationResponse, service_registry_client::ServiceRegistryClient},
        registry_service::RegistrationStream,
    },
    registry::MAX_COMMANDS,
};

/// Registers these instances of prod/web on one stream.
pub(super) async fn register_all(server: &TestServer, which: Range<u32>) {
    let mut client = ServiceRegistryClient::new(server.channel().await);
    let messages = stream::iter(which.clone().map(message));
    let mut answers = client.registration_event(messages).await.expect("served").into_inner();
    for n in which {
        let answer = soon("an answer", answers.message()).await.expect("a good stream").expect("one per message");
        assert_eq!((answer.status, answer.request_id), (201, n.to_string()));
    }
    assert!(answers.message().await.expect("a good end").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_pipelined_messages_get_one_answer_each_in_order() {
    let server = TestServer::start().await;
    let mut client = ServiceRegistryClient::new(server.channel().await);
    // Every kind of message in turn, so that every batch has refused messages between others.
    let messages = (0..10_000).map(|n| match n % 5 {
        0 | 1 => message(n),
        2 => RegistrationMsg { weight: Some(-1.0), ..message(n) },
        3 => RegistrationMsg { request_id: n.to_string(), ..removal(n - 2) },
        _ => removal(n),
    });
    let mut answers = client.registration_event(stream::iter(messages)).await.expect("served").into_inner();
    let mut generation = 0;
    for n in 0..10_000 {
        let answer = soon("an answer", answers.message()).await.expect("a good stream").expect("one per message");
        assert_eq!(answer.request_id, n.to_string());
        assert_eq!(answer.status, [201, 201, 400, 204, 404][n % 5], "{answer:?}");
        assert_eq!(answer.r#type, i32::from(n % 5 > 2));
        if answer.status == 400 {
            assert_eq!(answer.status_details, "weight: must be a finite number in 0..=655, got -1");
            assert_eq!(answer.ports, message(0).ports);
        } else {
            assert!(answer.generation >= generation, "generations never go back");
            generation = answer.generation;
        }
    }
    assert!(answers.message().await.expect("a good end").is_none());
    assert_eq!(server.registry.context.registry.catalog().instances(), 2_000);
    server
        .metric(
            r#"grpc_server_handled_total{grpc_type="bidi_stream",grpc_service="registry.ServiceRegistry",grpc_method="RegistrationEvent",grpc_code="OK"} 1"#,
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn message_is_answered_without_waiting_for_the_next() {
    let server = TestServer::start().await;
    let mut client = ServiceRegistryClient::new(server.channel().await);
    let (send, messages) = tokio::sync::mpsc::channel(1);
    send.send(message(0)).await.expect("it is read");
    let opened = client.registration_event(ReceiverStream::new(messages)).await;
    let mut answers = opened.expect("served").into_inner();
    for n in 1..100 {
        let answer = soon("an answer", answers.message()).await.expect("a good stream").expect("one per message");
        assert_eq!(answer.status, 201);
        send.send(message(n)).await.expect("it is read");
    }
}

/// A stream of `messages`, then of `then`, without a network.
fn registration_stream<M, T>(
    registry: &Registry,
    messages: M,
    then: T,
    stop: &CancellationToken,
) -> RegistrationStream<impl futures::Stream<Item = Result<RegistrationMsg, Status>> + Unpin + use<M, T>>
where
    M: IntoIterator<Item = RegistrationMsg>,
    T: futures::Stream<Item = Result<RegistrationMsg, Status>> + Unpin,
{
    let messages: Vec<_> = messages.into_iter().map(Ok).collect();
    let memory = MemoryBudget::new(memory::LIMITS, Arc::clone(&registry.context.metrics)).connection();
    RegistrationStream::new(
        stream::iter(messages).chain(then),
        caller(registry),
        registry.context.clone(),
        stop.clone().cancelled_owned(),
        memory,
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn submitted_batch_is_carried_out_after_a_disconnect() {
    let mut registry = Registry::new(1_000_000);
    registry.recover();
    // The writer does not run yet: the client disconnects before a command is carried out.
    let mut gone =
        registration_stream(&registry, (0..1_500).map(message), stream::pending(), &CancellationToken::new());
    assert!(poll!(gone.next()).is_pending());
    drop(gone);
    registry.write();
    let context = &registry.context;
    let mut later = registration_stream(&registry, [message(9_999)], stream::empty(), &CancellationToken::new());
    let answer = soon("an answer", later.next()).await.expect("one per message").expect("answered");
    assert_eq!(answer.status, 201);
    assert_eq!(context.registry.catalog().instances(), 1_501, "all submitted commands were carried out");
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_answers_read_messages_and_ends_the_stream_as_unavailable() {
    let mut registry = Registry::new(1_000_000);
    registry.recover();
    let stop = CancellationToken::new();
    let mut open = registration_stream(&registry, (0..2_000).map(message), stream::pending(), &stop);
    assert!(poll!(open.next()).is_pending());
    stop.cancel();
    registry.write();
    for n in 0..2_000 {
        let answer: RegistrationResponse =
            soon("an answer", open.next()).await.expect("one per message").expect("answered");
        assert_eq!((answer.status, answer.request_id), (201, n.to_string()));
    }
    let end = soon("the end", open.next()).await.expect("a status").expect_err("not answered");
    assert_eq!((end.code(), end.message()), (Code::Unavailable, "shutting down"));
    assert!(open.next().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn unanswered_messages_of_a_stream_are_bounded() {
    let mut registry = Registry::new(1_000_000);
    registry.recover();
    let read = AtomicUsize::new(0);
    // The writer does not run, so no message is answered. Small messages are bounded by their number, large
    // ones by their bytes.
    for (texts, most) in [(0, 4 * MAX_COMMANDS), (30_000, 35)] {
        read.store(0, Ordering::Relaxed);
        let endless = stream::iter(0..).map(|n| {
            read.fetch_add(1, Ordering::Relaxed);
            Ok(RegistrationMsg { host_name: "x".repeat(texts), ..message(n) })
        });
        let stop = CancellationToken::new();
        let mut open = pin!(registration_stream(&registry, [], endless, &stop));
        // Refused messages are answered at once; the test reads only the first answer.
        let first = poll!(open.next());
        assert_eq!(matches!(first, Poll::Ready(Some(Ok(_)))), texts > 0);
        assert!(read.load(Ordering::Relaxed) <= most, "{} read", read.load(Ordering::Relaxed));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn client_that_does_not_read_answers_is_not_read() {
    const ALL: u32 = 200_000;
    let server = TestServer::start().await;
    let endpoint = Endpoint::from_shared(server.url()).expect("a URL");
    let endpoint = endpoint.initial_stream_window_size(65_535).initial_connection_window_size(65_535);
    let mut client = ServiceRegistryClient::new(endpoint.connect().await.expect("it listens"));
    let sent = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&sent);
    // All messages but the first change nothing, so the transport is the limit.
    let messages = stream::iter(0..ALL).map(move |n| {
        counted.fetch_add(1, Ordering::Relaxed);
        RegistrationMsg { request_id: n.to_string(), ..message(0) }
    });
    let mut answers = client.registration_event(messages).await.expect("served").into_inner();
    // The sender stops when all windows are full.
    let before = until_blocked(&sent).await;
    assert!(before < 30_000, "{before} messages were taken although no answer was read");
    for n in 0..ALL {
        let answer = soon("an answer", answers.message()).await.expect("a good stream").expect("one per message");
        assert_eq!(answer.request_id, n.to_string());
    }
    assert!(answers.message().await.expect("a good end").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn blocked_registry_does_not_close_connections() {
    const STREAMS: u32 = 16;
    const EACH: u32 = 5_000;
    let mut registry = Registry::new(1_000_000);
    registry.recover();
    let mut server = TestServer::serving(registry, LIMITS).await;
    let channel = server.channel().await;
    let sent = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for which in 0..STREAMS {
        let (channel, sent) = (channel.clone(), Arc::clone(&sent));
        clients.spawn(async move {
            // Each message is yielded alone, so that it is a DATA frame of its own.
            let messages = stream::unfold(0, move |n| {
                let sent = Arc::clone(&sent);
                async move {
                    tokio::task::yield_now().await;
                    sent.fetch_add(1, Ordering::Relaxed);
                    (n < EACH).then(|| (message(which * EACH + n), n + 1))
                }
            });
            let mut client = ServiceRegistryClient::new(channel);
            let mut answers = client.registration_event(messages).await.expect("served").into_inner();
            for n in 0..EACH {
                let answer = answers.message().await.expect("a good stream").expect("one per message");
                assert_eq!((answer.status, answer.request_id), (201, (which * EACH + n).to_string()));
            }
        });
    }
    until_blocked(&sent).await;
    server.registry.write();
    let ended = soon("all are answered", clients.join_all()).await;
    assert_eq!(ended.len(), STREAMS as usize);
}

/// Waits until the senders are blocked; returns the number of messages that were sent.
async fn until_blocked(sent: &AtomicUsize) -> usize {
    let mut before = usize::MAX;
    while before != sent.load(Ordering::Relaxed) {
        before = sent.load(Ordering::Relaxed);
        let moves = async {
            while before == sent.load(Ordering::Relaxed) {
                tokio::task::yield_now().await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_millis(300), moves).await;
    }
    before
}
