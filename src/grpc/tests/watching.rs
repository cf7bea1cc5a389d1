//! Watches: a map that applies their events equals the catalog.

use std::collections::BTreeMap;

use super::*;
use crate::{
    grpc::client::{ChangeKind, WatchEvent, WatchEvents},
    model::{Instance, InstanceId, InstanceSpec, ServiceKey, UnixMillis, testing::unstamped},
    registry::{Command, Outcome, Requester},
};

type InstanceMap = BTreeMap<(ServiceKey, InstanceId), Arc<Instance>>;

/// Applies an event; fails if it does not change the map.
fn apply(instances: &mut InstanceMap, event: WatchEvent) -> Option<(u64, Vec<u8>)> {
    match event {
        WatchEvent::Snapshot(key, service) => {
            for instance in &service.instances {
                let before = instances.insert((key.clone(), instance.id()), Arc::clone(instance));
                assert!(before.is_none(), "{key} twice in the snapshot");
            }
            None
        }
        WatchEvent::Synced { generation, cursor } => Some((generation, cursor)),
        WatchEvent::Change { kind, service, instance, generation, timeline, cursor } => {
            assert!(timeline.received.0 > 0);
            assert!(timeline.received <= timeline.durable && timeline.durable <= timeline.visible);
            assert!(timeline.visible <= timeline.acknowledged);
            let id = (service, instance.id());
            match kind {
                ChangeKind::Added => assert!(instances.insert(id, instance).is_none(), "added twice"),
                ChangeKind::Updated => assert!(instances.insert(id, instance).is_some(), "updated, but not there"),
                ChangeKind::Removed => assert!(instances.remove(&id).is_some(), "removed, but not there"),
            }
            Some((generation, cursor))
        }
        WatchEvent::Restart { reason, message } => panic!("{reason}: {message}"),
    }
}

/// Reads events up to `generation`; returns the last cursor.
async fn follow(watch: &mut WatchEvents, instances: &mut InstanceMap, generation: u64) -> Vec<u8> {
    loop {
        let event = soon("an event", watch.next()).await.expect("a good stream").expect("no end");
        if let Some((seen, cursor)) = apply(instances, event)
            && seen >= generation
        {
            return cursor;
        }
    }
}

async fn restart(watch: &mut WatchEvents) -> &'static str {
    loop {
        match soon("an event", watch.next()).await.expect("a good stream").expect("a restart before the end") {
            WatchEvent::Restart { reason, .. } => {
                assert!(watch.next().await.expect("a good end").is_none(), "the restart is the last message");
                return reason;
            }
            WatchEvent::Snapshot(..) | WatchEvent::Synced { .. } | WatchEvent::Change { .. } => {}
        }
    }
}

fn catalog_as_map(server: &TestServer) -> InstanceMap {
    let services = server.registry.context.registry.catalog().services();
    let rows = |(key, service): (ServiceKey, crate::model::Service)| {
        service.instances.iter().map(|i| ((key.clone(), i.id()), unstamped(i))).collect::<Vec<_>>()
    };
    services.into_iter().flat_map(rows).collect()
}

fn register(service: &str, address: &str, weight: f32) -> Command {
    let service = VALIDATOR.service("prod", service).expect("valid");
    let spec = InstanceSpec { address: address.into(), weight: Some(weight), ..InstanceSpec::default() };
    let instance = VALIDATOR.instance(&service, &spec, UnixMillis(1)).expect("valid");
    Command::Register { service, instance: Arc::new(instance), by: Requester::Unrestricted }
}

fn unregister(service: &str, address: &str) -> Command {
    let service = VALIDATOR.service("prod", service).expect("valid");
    Command::Unregister {
        service,
        address: VALIDATOR.address(address).expect("valid"),
        ports: Default::default(),
        by: Requester::Unrestricted,
    }
}

async fn submit(server: &TestServer, commands: Vec<Command>) -> (u64, Vec<Outcome>) {
    let acked = server.registry.context.registry.submit(commands).await.expect("it accepts").await.expect("done");
    (acked.generation, acked.outcomes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn watch_is_exact_under_concurrent_changes() {
    let server = TestServer::start().await;
    let handle = server.registry.context.registry.clone();
    // A service that is created and removed, one that grows and shrinks, and changes in place.
    let mut writing = JoinSet::new();
    writing.spawn(async move {
        let mut last = 0;
        for n in 0..3_000_u32 {
            let (address, service) = (format!("10.0.0.{}", 1 + n % 7), format!("s{}", n % 11));
            let commands = match n % 3 {
                0 => vec![register(&service, &address, (n % 5) as f32), register("fixed", &address, n as f32 % 600.0)],
                1 => vec![unregister(&service, &address), register(&service, &address, 1.0)],
                _ => vec![unregister(&service, &address)],
            };
            last = handle.submit(commands).await.expect("it accepts").await.expect("carried out").generation;
        }
        last
    });
    // Watches that start at different times meanwhile.
    let mut watches = Vec::new();
    let mut client = server.client().await;
    for _ in 0..40 {
        watches.push((client.watch(None, None, None).await.expect("it watches"), InstanceMap::new()));
    }
    let last = writing.join_next().await.expect("it runs").expect("it did not panic");
    let expected = catalog_as_map(&server);
    for (watch, instances) in &mut watches {
        follow(watch, instances, last).await;
        assert_eq!(*instances, expected);
    }
    let mut late = (client.watch(None, None, None).await.expect("it watches"), InstanceMap::new());
    follow(&mut late.0, &mut late.1, last).await;
    assert_eq!(late.1, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn cursor_resumes_after_its_change() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    let mut watch = client.watch(None, None, None).await.expect("it watches");
    let Ok(Some(WatchEvent::Synced { cursor: empty, .. })) = watch.next().await else {
        panic!("nothing is registered")
    };
    // One generation of many changes: a watch can resume after each of them.
    let commands: Vec<_> = (1..=20).map(|n| register("web", &format!("10.0.0.{n}"), 1.0)).collect();
    let (generation, _) = submit(&server, commands).await;
    let mut cursors = vec![empty];
    for _ in 0..20 {
        let event = soon("a change", watch.next()).await.expect("a good stream").expect("no end");
        let WatchEvent::Change { cursor, generation: with, .. } = event else { panic!("{event:?}") };
        assert_eq!(with, generation);
        cursors.push(cursor);
    }
    let (last, _) = submit(&server, vec![register("web", "10.0.0.99", 1.0)]).await;
    for (seen, cursor) in cursors.into_iter().enumerate() {
        let mut resumed = client.watch(None, None, Some(cursor)).await.expect("it watches");
        let mut instances = InstanceMap::new();
        follow(&mut resumed, &mut instances, last).await;
        assert_eq!(instances.len(), 21 - seen, "after {seen} changes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn filtered_watch_gets_its_own_changes_and_fresh_cursors() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    submit(&server, vec![register("web", "10.0.0.1", 1.0), register("db", "10.0.0.2", 1.0)]).await;
    let mut web = client.watch(Some("prod"), Some("web"), None).await.expect("it watches");
    let mut other = client.watch(Some("test"), None, None).await.expect("it watches");
    let event = soon("the snapshot", web.next()).await.expect("a good stream").expect("no end");
    let WatchEvent::Snapshot(key, service) = event else { panic!("{event:?}") };
    assert_eq!((key.to_string(), service.instances.len()), ("prod/web".to_owned(), 1));
    for watch in [&mut web, &mut other] {
        let event = soon("the end of the snapshot", watch.next()).await.expect("a good stream").expect("no end");
        assert!(matches!(event, WatchEvent::Synced { .. }), "{event:?}");
    }
    // Changes of other services only: the watch gets a new cursor at intervals.
    for n in 0..10 {
        let db = (0..1_000).map(|m| register("db", &format!("10.1.{}.{}", m / 250, 1 + m % 250), n as f32));
        submit(&server, db.collect()).await;
    }
    let event = soon("a new cursor", web.next()).await.expect("a good stream").expect("no end");
    assert!(matches!(event, WatchEvent::Synced { .. }), "{event:?}");
    submit(&server, vec![unregister("web", "10.0.0.1")]).await;
    let event = soon("a change", web.next()).await.expect("a good stream").expect("no end");
    let WatchEvent::Change { kind: ChangeKind::Removed, service, instance, .. } = event else { panic!("{event:?}") };
    assert_eq!((service.to_string(), instance.id().to_string()), ("prod/web".to_owned(), "10.0.0.1".to_owned()));

    let err = client.watch(None, Some("web"), None).await.expect_err("which namespace?");
    assert!(err.to_string().ends_with("namespace: must be given with a service"), "{err}");
    let err = client.watch(Some("prod"), Some("Web"), None).await.expect_err("no service");
    assert!(err.to_string().contains("InvalidArgument: name: must consist of"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_that_cannot_continue_ends_with_a_restart() {
    let mut server = TestServer::start().await;
    let mut client = server.client().await;
    for cursor in [vec![1], vec![0; 20], vec![255; 20]] {
        let mut watch = client.watch(None, None, Some(cursor)).await.expect("it watches");
        assert_eq!(restart(&mut watch).await, "unknown cursor");
    }
    let mut old = client.watch(None, None, None).await.expect("it watches");
    let Ok(Some(WatchEvent::Synced { cursor, .. })) = old.next().await else { panic!("nothing is registered") };

    // More changes than the ring holds, while one client does not read and another resumes late.
    let slow = Endpoint::from_shared(server.url()).expect("a URL");
    let slow = slow.initial_stream_window_size(65_535).initial_connection_window_size(65_535);
    let channel = slow.connect().await.expect("it listens");
    let mut slow = proto::gangplank::v1::discovery_client::DiscoveryClient::new(channel);
    let mut slow = slow.watch(proto::gangplank::v1::WatchRequest::default()).await.expect("it watches").into_inner();
    for n in 0..70 {
        let web = (0..1_000).map(|m| register("web", &format!("10.1.{}.{}", m / 250, 1 + m % 250), n as f32));
        submit(&server, web.collect()).await;
    }
    let mut late = client.watch(None, None, Some(cursor)).await.expect("it watches");
    assert_eq!(restart(&mut late).await, "slow reader");
    let mut last = None;
    while let Some(message) = soon("an event", slow.message()).await.expect("a good end") {
        last = message.event;
    }
    use proto::gangplank::v1::{restart::Reason, watch_response::Event};
    let Some(Event::Restart(restarted)) = last else { panic!("{last:?}") };
    assert_eq!(restarted.reason(), Reason::SlowReader);
    server.metric("gangplank_grpc_watch_restarts_total{reason=\"unknown_cursor\"} 3").await;
    server.metric("gangplank_grpc_watch_restarts_total{reason=\"slow_reader\"} 2").await;

    let mut open = client.watch(None, None, None).await.expect("it watches");
    server.stop.cancel();
    assert_eq!(restart(&mut open).await, "shutting down");
    server.ended().await;
}
