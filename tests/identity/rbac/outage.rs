//! The API server cannot be asked.

use std::time::{Duration, Instant};

use tonic::Code;

use super::{super::matrix::call_with, RbacServer};
use crate::support::proxy::Fault;

const HEALTH: &str = "/grpc.health.v1.Health/Check";

/// A longer while than reviews are remembered.
const FORGOTTEN: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread")]
async fn what_was_decided_holds_and_nothing_else_is_decided() {
    let Some(rbac) = RbacServer::start("outage-stale", &[]) else { return };
    rbac.cluster.kubectl(&["create", "serviceaccount", "unknown", "-n", "outage-stale"]);
    let (known, unknown) = (rbac.token("web", "gangplank"), rbac.token("unknown", "gangplank"));
    let mut stream = rbac.open(&known).await;
    assert_eq!(stream.register("web", "10.1.0.1").await, 201);
    assert_eq!(stream.register("denied", "10.1.0.1").await, 403);

    let away = rbac.proxy.inject(Fault::Drop, |_| true);
    let begun = Instant::now();
    let channel = rbac.connect().await;
    let asked = async |token: &str| call_with(&channel, &[&format!("Bearer {token}")], HEALTH, Vec::new()).await;
    let refused = asked(&unknown).await.expect_err("nobody can say whose it is");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    // The token itself counts for as long as any review does, and no longer.
    let refused = loop {
        match asked(&known).await {
            Ok(_) => assert!(begun.elapsed() < FORGOTTEN, "it is remembered for too long"),
            Err(refused) => break refused,
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");

    // An open stream has been decided on; what is new has not.
    assert_eq!(stream.register("web", "10.1.0.2").await, 202);
    assert_eq!(stream.register("denied", "10.1.0.2").await, 403);
    stream.send("api", "10.1.0.2");
    let (status, why) = stream.answer().await.expect("answered");
    assert_eq!((status, why.as_str()), (503, "whether this is allowed: Kubernetes cannot be asked now; try again"));
    assert!(rbac.metric("gangplank_stale_decisions_total") >= 1.0);
    assert!(rbac.metric("gangplank_reviews_total{kind=\"access\",result=\"error\"}") >= 1.0);

    away.lift();
    let status = loop {
        match stream.register("api", "10.1.0.2").await {
            503 => assert!(begun.elapsed() < 4 * FORGOTTEN, "it is asked again"),
            status => break status,
        }
    };
    assert_eq!(status, 403);
    let log = rbac.secured.server.stderr();
    assert!(log.contains("Kubernetes cannot be asked whose tokens are shown"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_that_nobody_confirms_ends_after_a_while() {
    let Some(rbac) = RbacServer::start("outage-end", &["--authorization-stale", "10s"]) else { return };
    let mut stream = rbac.open(&rbac.token("web", "gangplank")).await;
    assert_eq!(stream.register("web", "10.1.0.1").await, 201);
    rbac.proxy.inject(Fault::Drop, |call| call.resource.ends_with("reviews"));
    let begun = Instant::now();
    let status = tokio::time::timeout(2 * FORGOTTEN, stream.end()).await.expect("it ends");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let after = begun.elapsed();
    assert!((Duration::from_secs(5)..FORGOTTEN).contains(&after), "after {after:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_review_delays_only_what_comes_after_it_on_its_stream() {
    let Some(rbac) = RbacServer::start("outage-slow", &[]) else { return };
    let token = rbac.token("web", "gangplank");
    let (mut stream, mut other) = (rbac.open(&token).await, rbac.open(&token).await);
    assert_eq!(stream.register("web", "10.1.0.1").await, 201);
    assert_eq!(other.register("web", "10.1.0.2").await, 201);
    let slow = rbac.proxy.inject(Fault::Hang, |call| call.is("create", "subjectaccessreviews"));
    for (service, address) in [("web", "10.1.0.3"), ("api", "10.1.0.3"), ("web", "10.1.0.4")] {
        stream.send(service, address);
    }
    assert_eq!(stream.answer().await.expect("answered").0, 201, "before it");
    slow.wait_hits(1);
    assert_eq!(other.register("web", "10.1.0.5").await, 201, "another stream");
    slow.lift();
    // The review was lost with its connection.
    assert_eq!(stream.answer().await.expect("answered").0, 503);
    assert_eq!(stream.answer().await.expect("answered").0, 201, "in order");
}
