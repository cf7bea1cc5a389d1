//! One CA for all of them.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Instant};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use gangplank::{
    grpc::proto::gangplank::v1::{WatchRequest, discovery_client::DiscoveryClient, watch_response::Event},
    identity::joining::JoinToken,
};
use serde_json::json;
use tonic::Code;

use super::{Machine, Shared, decoded, empty, lead, registrants::shop};
use crate::{
    identity::{
        joining::{FLAGS, connect_to, token_of},
        matrix::{END_TIMEOUT, register_and_stay},
    },
    support::{
        server::{Process, Server},
        wait_until,
    },
};

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_start_at_once_have_one_ca() {
    let Some(shared) = Shared::start("one-ca") else { return };
    let replicas: Vec<_> = (0..4).map(|_| shared.begin(&shared.kubeconfig, empty())).collect();
    replicas.iter().for_each(super::Replica::wait_until_ready);
    let [secret] = &shared.secrets("ca")[..] else { panic!("one Secret") };
    assert_eq!(
        (secret["metadata"]["name"].as_str(), secret["type"].as_str()),
        (Some("gangplank-ca"), Some("kubernetes.io/tls"))
    );
    let (ca, key) = (shared.ca(), String::from_utf8(decoded(secret, "tls.key")).expect("PEM"));
    let mut hashes = Vec::new();
    for replica in &replicas {
        replica.handshake(&ca).await.expect("its certificate is of the CA");
        hashes.push(replica.create_token(&["-n", "shop"]).ca);
        let copy = replica.file("cluster-ca.pem");
        assert_eq!(fs::read_to_string(&copy).expect("a copy"), format!("{key}{ca}"));
        assert_eq!(fs::metadata(&copy).expect("there").permissions().mode() & 0o777, 0o600);
        assert!(!replica.file("ca.key").exists());
    }
    hashes.dedup();
    assert_eq!(hashes.len(), 1, "each token names the same CA");
    let made = replicas.iter().filter(|replica| replica.log().contains("from now on: a new one")).count();
    assert_eq!(made, 1, "whoever came first");
}

#[test]
fn secret_that_holds_no_ca_of_gangplank_is_refused_and_left_alone() {
    let Some(shared) = Shared::start("bad-ca") else { return };
    let secret = |labels: serde_json::Value, key: &str, certificate: &str| {
        json!({"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
            "metadata": {"name": "gangplank-ca", "labels": labels},
            "data": {"tls.key": STANDARD.encode(key), "tls.crt": STANDARD.encode(certificate)}})
    };
    let ours = json!({"gangplank.dev/joining": "ca"});
    let other = rcgen::KeyPair::generate().expect("a key").serialize_pem();
    let foreign = crate::identity::pki::TestCa::new();
    for (body, why) in [
        (secret(json!({}), "key", "certificate"), "is not of gangplank: it does not carry the label"),
        (secret(ours.clone(), "junk", "junk"), "is damaged: tls.key holds no private key in PEM"),
        (secret(ours.clone(), &other, "junk"), "is damaged: tls.crt holds no certificate in PEM"),
        (secret(ours, &other, &foreign.pem), "is damaged: tls.crt is not the certificate of the key"),
    ] {
        let (status, created) = shared.admin("POST", &shared.path(""), Some(&body));
        assert_eq!(status, 201, "{created}");
        let data = empty();
        let mut process = Process::serve(data.path(), &shared.flags(&shared.kubeconfig));
        assert!(!process.exit().success());
        // What it said last may be read after it has ended.
        wait_until(why, || {
            let said = process.stderr();
            (said.contains("the Secret bad-ca/gangplank-ca") && said.contains(why)).then_some(())
        });
        let after = shared.cluster.get_json(&shared.path("gangplank-ca"));
        assert_eq!(after["metadata"]["resourceVersion"], created["metadata"]["resourceVersion"], "nobody wrote it");
        shared.admin("DELETE", &shared.path("gangplank-ca"), None);
    }
}

/// A server that ran without Kubernetes, and a machine that joined it.
fn alone() -> (tempfile::TempDir, Machine) {
    let server = Server::start_with(&FLAGS);
    let token: JoinToken = token_of(&server.run(&["token", "create", "-n", "shop"])).parse().expect("a token");
    let machine = Machine::joined(&token.to_string());
    (server.into_data(), machine)
}

#[test]
fn ca_of_a_data_directory_moves_into_the_secret_and_its_machines_go_on() {
    let Some(shared) = Shared::start("moved-ca") else { return };
    shared.cluster.create_namespace("moved-shop");
    let (data, machine) = alone();
    let ca = fs::read_to_string(data.path().join("ca.crt")).expect("a CA");
    let first = shared.begin(&shared.kubeconfig, data);
    first.wait_until_ready();
    assert_eq!(shared.ca(), ca);
    wait_until("the registrant is taken over", || (shared.secrets("registrant").len() == 1).then_some(()));
    lead(&machine, &[first.grpc]);
    machine.succeed(&["renew", "--now"]);
    for file in ["ca.key", "ca.crt", "registrants.json", "registrants-import.json"] {
        wait_until("nothing of it is left to be used", || (!first.file(file).exists()).then_some(()));
    }
    for file in ["ca.key.retired", "ca.crt.retired", "registrants.json.retired"] {
        wait_until("it is kept", || first.file(file).exists().then_some(()));
    }

    // The Secret wins over another directory.
    let (data, stranger) = alone();
    let second = shared.begin(&shared.kubeconfig, data);
    second.wait_until_ready();
    assert_eq!(shared.ca(), ca);
    assert!(second.log().contains("the CA of the data directory is not used"), "{}", second.log());
    assert!(second.file("ca.key.retired").exists() && !second.file("ca.key").exists());
    lead(&machine, &[second.grpc]);
    machine.succeed(&["renew", "--now"]);
    lead(&stranger, &[second.grpc]);
    assert!(stranger.fail(&["renew", "--now"]).contains("UnknownIssuer"), "of another CA");
    assert_eq!(shared.secrets("registrant").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_deletes_the_secret_gets_another_ca_that_every_process_follows() {
    let Some(shared) = Shared::start("rotated-ca") else { return };
    let first = shared.replica();
    first.wait_until_it_writes();
    shop(&shared, &first, "rotated-shop");
    let machine = first.joined(&["-n", "rotated-shop"]);
    let mut answers = register_and_stay(connect_to(first.grpc, machine.tls()).await, "rotated-shop", "10.17.3.1").await;
    assert_eq!(answers.message().await.expect("a good stream").expect("one answer").status, 201);
    let mut discovery = DiscoveryClient::new(connect_to(first.grpc, machine.tls()).await);
    let watch = WatchRequest { namespace: "rotated-shop".into(), service: "web".into(), ..WatchRequest::default() };
    let mut events = discovery.watch(watch).await.expect("it may").into_inner();
    let old = shared.ca();
    assert_eq!(shared.admin("DELETE", &shared.path("gangplank-ca"), None).0, 200);
    wait_until("it says so", || first.log().contains("was deleted: its CA is used until").then_some(()));
    machine.succeed(&["renew", "--now"]);
    // Open streams go on meanwhile: what is registered now, they tell.
    first.succeed(&["register", "rotated-shop/web", "10.17.3.2"]);
    loop {
        let seen = events.message().await.expect("a good stream").expect("it goes on");
        if let Some(Event::Change(change)) = seen.event
            && change.instance.is_some_and(|instance| instance.address == "10.17.3.2")
        {
            break;
        }
    }
    let second = shared.replica();
    assert_ne!(shared.ca(), old);
    wait_until("the first one follows", || first.log().contains("holds another CA than before").then_some(()));
    // With the CA they end, and say why.
    let begun = Instant::now();
    let registering = tokio::time::timeout(2 * END_TIMEOUT, answers.message()).await.expect("it ends");
    let watching = async {
        loop {
            if let Err(ended) = events.message().await {
                break ended;
            }
        }
    };
    let watching = tokio::time::timeout(2 * END_TIMEOUT, watching).await.expect("it ends");
    assert!(begun.elapsed() < END_TIMEOUT, "after {:?}", begun.elapsed());
    for ended in [registering.expect_err("no more answers"), watching] {
        let expected = "the client certificate is not of the client CA any more";
        assert_eq!((ended.code(), ended.message()), (Code::Unauthenticated, expected));
    }
    wait_until("no certificate of the old CA is good", || {
        machine.fail(&["renew", "--now"]).contains("UnknownIssuer").then_some(())
    });
    lead(&machine, &[second.grpc]);
    assert!(machine.fail(&["renew", "--now"]).contains("UnknownIssuer"));
    first.joined(&["-n", "rotated-shop"]).succeed(&["renew", "--now"]);
    // A process that has the copy of the old one does not bring it back.
    let data = first.kill();
    let again = shared.begin(&shared.kubeconfig, data);
    again.wait_until_ready();
    assert!(fs::read_to_string(again.file("cluster-ca.pem")).expect("a copy").ends_with(&shared.ca()));
}
