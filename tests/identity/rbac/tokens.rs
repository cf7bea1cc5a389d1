//! Whose token a call shows.

use std::time::Instant;

use futures::{StreamExt as _, stream};
use tonic::{Code, transport::Endpoint};

use super::{
    super::matrix::{CALLS, END_TIMEOUT, Without, call_with, request},
    RbacServer,
};
use crate::support::server::BINARY;

const HEALTH: &str = "/grpc.health.v1.Health/Check";

#[tokio::test(flavor = "multi_thread")]
async fn every_call_checks_its_token() {
    let Some(rbac) = RbacServer::start("token-matrix", &[]) else { return };
    rbac.cluster.kubectl(&["create", "serviceaccount", "gone", "-n", "token-matrix"]);
    let good = rbac.token("web", "gangplank");
    let bad = [
        ("another audience", rbac.token("web", "https://kubernetes.default.svc")),
        ("a deleted account", rbac.token("gone", "gangplank")),
        ("no token", "nonsense".into()),
        // The signature ends in other bits.
        ("another signature", good[..good.len() - 8].to_owned() + "AAAAAAAA"),
    ];
    rbac.cluster.kubectl(&["delete", "serviceaccount", "gone", "-n", "token-matrix"]);
    let tls = rbac.connect().await;
    let plaintext = Endpoint::from_shared(format!("http://{}", rbac.secured.server.grpc)).expect("a URL");
    let plaintext = plaintext.connect().await.expect("it listens");
    let certificate = rbac.secured.connect(Some(&rbac.secured.ca.sign("ada", &[]))).await.expect("a handshake");
    // Calls that need no identity look at no token.
    for (path, without) in CALLS.iter().filter(|(_, without)| *without != Without::Open) {
        for channel in [&tls, &plaintext, &certificate] {
            for (what, token) in &bad {
                let refused = call_with(channel, &[&format!("Bearer {token}")], path, request(path)).await;
                let refused = refused.expect_err(what);
                assert_eq!(refused.code(), Code::Unauthenticated, "{path} with {what}: {refused}");
            }
            let good = format!("Bearer {good}");
            for headers in [&[good.as_str(), good.as_str()][..], &["Basic dTpw"], &["Bearer"]] {
                let refused = call_with(channel, headers, path, request(path)).await.expect_err("refused");
                assert_eq!(refused.message(), "authorization: must be \"Bearer TOKEN\", once", "{path}");
            }
            // In plaintext, too, it is the token's user, who has no right to what the calls ask for.
            without.check(path, call_with(channel, &[&good], path, request(path)).await);
        }
    }
    let none = call_with(&tls, &[], HEALTH, Vec::new()).await.expect_err("no identity");
    assert_eq!(none.code(), Code::Unauthenticated);

    let log = rbac.secured.server.stderr();
    assert!(log.contains("a token is refused") && log.contains("the token is not accepted"), "{log}");
    let metrics = crate::support::http::get(rbac.secured.server.admin, "/metrics").1;
    for token in bad.iter().map(|(_, token)| token).chain([&good]) {
        assert!(
            !log.contains(token.as_str()) && !metrics.contains(token.as_str()),
            "a token in the log or the metrics"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reviews_are_remembered_and_one_token_is_reviewed_once_at_a_time() {
    let Some(rbac) = RbacServer::start("token-cache", &[]) else { return };
    let (good, channel) = (format!("Bearer {}", rbac.token("web", "gangplank")), rbac.connect().await);
    for shown in [good.as_str(), "Bearer nonsense"] {
        let before = rbac.reviews("tokenreviews");
        let headers = [shown];
        let calls = stream::iter(0..100).map(|_| call_with(&channel, &headers, HEALTH, Vec::new()));
        let answers: Vec<_> = calls.buffer_unordered(100).collect().await;
        assert!(answers.iter().all(|answer| answer.is_ok() == (shown == good)), "{answers:?}");
        assert_eq!(rbac.reviews("tokenreviews") - before, 1, "a hundred calls at once");
    }
    assert_eq!(rbac.metric("gangplank_reviews_total{kind=\"token\",result=\"yes\"}"), 1.0);
    assert_eq!(rbac.metric("gangplank_reviews_total{kind=\"token\",result=\"no\"}"), 1.0);
    assert_eq!(rbac.metric("gangplank_review_cache_entries{kind=\"token\"}"), 2.0);
    assert_eq!(rbac.metric("gangplank_reviews_in_flight{kind=\"token\"}"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn flood_of_new_tokens_reaches_the_api_server_at_a_bounded_rate() {
    let Some(rbac) = RbacServer::start("token-flood", &[]) else { return };
    let mut stream = rbac.open(&rbac.token("web", "gangplank")).await;
    assert_eq!(stream.register("web", "10.1.0.1").await, 201);
    let (channel, before, begun) = (rbac.connect().await, rbac.reviews("tokenreviews"), Instant::now());
    let tokens: Vec<String> = (0..2_000).map(|n| format!("Bearer flood-{n}")).collect();
    let call = async |token: &String| call_with(&channel, &[token.as_str()], HEALTH, Vec::new()).await;
    let answers = stream::iter(&tokens).map(call).buffer_unordered(200);
    let codes: Vec<Code> = answers.map(|answer| answer.expect_err("nobody's token").code()).collect().await;
    let reviews = rbac.reviews("tokenreviews") - before;
    // What one address may ask at once, then its rate; and those of the open stream.
    let most = 200.0 + 20.0 * begun.elapsed().as_secs_f64() + 10.0;
    assert!((reviews as f64) <= most, "{reviews} reviews within {:?}", begun.elapsed());
    assert!(codes.iter().all(|code| matches!(code, Code::Unauthenticated | Code::Unavailable)), "{codes:?}");
    assert_eq!(stream.register("web", "10.1.0.2").await, 201, "who is known goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_ends_when_the_account_of_its_token_is_deleted() {
    let Some(rbac) = RbacServer::start("token-deleted", &[]) else { return };
    let token = rbac.token("web", "gangplank");
    let mut stream = rbac.open(&token).await;
    assert_eq!(stream.register("web", "10.1.0.1").await, 201);
    rbac.cluster.kubectl(&["delete", "serviceaccount", "web", "-n", "token-deleted"]);
    let deleted = Instant::now();
    let status = tokio::time::timeout(2 * END_TIMEOUT, stream.end()).await.expect("it ends");
    assert_eq!((status.code(), status.message()), (Code::Unauthenticated, "the token is not accepted any more"));
    assert!(deleted.elapsed() < END_TIMEOUT, "after {:?}", deleted.elapsed());
    let refused = call_with(&rbac.connect().await, &[&format!("Bearer {token}")], HEALTH, Vec::new()).await;
    assert_eq!(refused.expect_err("refused").code(), Code::Unauthenticated);
    assert!(rbac.metric("gangplank_unauthenticated_calls_total{reason=\"bad_token\"}") >= 1.0);
}

#[test]
fn server_without_a_cluster_takes_no_token() {
    let server = crate::support::server::Server::start();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let refused = runtime.block_on(async {
        let channel = Endpoint::from_shared(format!("http://{}", server.grpc)).expect("a URL").connect().await;
        call_with(&channel.expect("it listens"), &["Bearer any"], HEALTH, Vec::new()).await
    });
    let refused = refused.expect_err("it does not become who is on the machine");
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.message().contains("it runs without --kubernetes"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_show_the_token_in_a_file() {
    let Some(rbac) = RbacServer::start("token-file", &[]) else { return };
    let file = rbac.secured.write("token", &rbac.token("web", "gangplank"));
    let run = |url: &str, arguments: &[&str]| {
        let mut command = std::process::Command::new(BINARY);
        command.args(arguments).env("GANGPLANK_SERVER", url).env("GANGPLANK_CACERT", rbac.secured.file("ca.crt"));
        let output = command.env("GANGPLANK_TOKEN_FILE", &file).output().expect("it can be run");
        (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let url = rbac.secured.url();
    let register = |service| ["register", service, "10.1.0.1", "-n", "token-file"];
    let registered = run(&url, &register("web"));
    assert_eq!(registered.0, Some(0), "{registered:?}");
    let denied = run(&url, &register("api"));
    let expected = "system:serviceaccount:token-file:web may not create instances of token-file/api";
    assert!(denied.0 == Some(1) && denied.1.contains(expected), "{denied:?}");
    // Over plaintext, a token stays on this machine. The address is for documentation: RFC 5737.
    let refused = run("http://192.0.2.1:9080", &register("web"));
    assert!(refused.0 == Some(2) && refused.1.contains("--token-file needs https"), "{refused:?}");
    let local = run(&format!("http://{}", rbac.secured.server.grpc), &register("api"));
    assert!(local.0 == Some(1) && local.1.contains(expected), "it is the token's user there, too: {local:?}");
    rbac.secured.write("token", "not\na token");
    let invalid = run(&url, &register("web"));
    assert!(invalid.0 == Some(2) && invalid.1.contains("holds no token"), "{invalid:?}");
}
