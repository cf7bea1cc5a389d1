//! Machines that joined one of several processes.

use std::time::Instant;

use gangplank::grpc::proto::gangplank::v1::{WatchRequest, discovery_client::DiscoveryClient};
use tonic::Code;

use super::{Machine, Replica, Shared, empty, names};
use crate::{
    identity::{
        joining::connect_to,
        matrix::{END_TIMEOUT, register_and_stay},
    },
    support::wait_until,
};

/// Makes the namespace `name`, and waits until the one that writes knows it.
pub(super) fn shop(shared: &Shared, writer: &Replica, name: &str) {
    shared.cluster.create_namespace(name);
    wait_until("the namespace is known", || {
        writer.run(&["register", "first", "10.9.9.9", "-n", name]).status.success().then_some(())
    });
}

#[test]
fn machine_that_joined_a_follower_registers_at_the_writer_that_it_names() {
    let Some(shared) = Shared::start("hinted") else { return };
    let (writer, follower) = shared.writer_and_follower();
    shop(&shared, &writer, "hinted-shop");
    // It knows the follower alone, and registers within milliseconds of joining.
    let machine = follower.joined(&["-n", "hinted-shop", "--service", "web"]);
    machine.succeed(&["register", "web", "10.17.0.1"]);
    assert!(machine.succeed(&["ls", "web"]).contains("10.17.0.1"));
    assert!(machine.fail(&["register", "api", "10.17.0.1"]).contains("its join token does not allow it"));
    let registrant = names(&writer).remove(0);
    assert!(writer.succeed(&["ls", "web", "-n", "hinted-shop", "-o", "wide"]).contains(&registrant));
    // Where it never was, too.
    super::lead(&machine, &[writer.grpc]);
    machine.succeed(&["renew", "--now"]);
    machine.succeed(&["register", "web", "10.17.0.2"]);
}

#[test]
fn machine_walks_to_another_replica_when_its_server_is_gone() {
    let Some(shared) = Shared::start("walking") else { return };
    let (writer, follower) = shared.writer_and_follower();
    shop(&shared, &writer, "walking-shop");
    let machine = Machine::joined(&follower.create_token(&["-n", "walking-shop"]).to_string());
    machine.succeed(&["register", "web", "10.17.1.1"]);
    follower.kill();
    machine.succeed(&["register", "web", "10.17.1.2"]);
    machine.succeed(&["renew", "--now"]);
    assert!(machine.succeed(&["ls", "web"]).contains("10.17.1.2"));
}

/// At the loopback address of a follower. The writer is elsewhere, and speaks TLS there.
#[test]
fn plaintext_client_that_a_follower_sends_to_the_writer_uses_tls_or_says_what_it_needs() {
    let Some(shared) = Shared::start("plaintext") else { return };
    let (writer, follower) = shared.writer_and_follower();
    shop(&shared, &writer, "plaintext-shop");
    let register = ["register", "web", "10.17.9.1", "-n", "plaintext-shop", "--timeout", "0s"];
    let said = follower.fail(&register);
    assert!(said.contains("on standby") && said.contains("give its CA with --cacert FILE"), "{said}");
    let machine = writer.joined(&["-n", "plaintext-shop", "--service", "web"]);
    let file = |name: &str| machine.0.path().join(name).to_str().expect("UTF-8").to_owned();
    let [ca, cert, key] = ["server-ca.crt", "client.crt", "client.key"].map(file);
    follower.succeed(&[&register[..], &["--cacert", &ca, "--cert", &cert, "--key", &key]].concat());
    assert!(writer.succeed(&["ls", "web", "-n", "plaintext-shop"]).contains("10.17.9.1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_that_is_revoked_on_one_replica_has_no_identity_on_any() {
    let Some(shared) = Shared::start("revoked") else { return };
    let (writer, follower) = shared.writer_and_follower();
    shop(&shared, &writer, "revoked-shop");
    let machine = writer.joined(&["-n", "revoked-shop", "--service", "web"]);
    let mut answers =
        register_and_stay(connect_to(writer.grpc, machine.tls()).await, "revoked-shop", "10.17.2.1").await;
    assert_eq!(answers.message().await.expect("a good stream").expect("one answer").status, 201);
    let mut discovery = DiscoveryClient::new(connect_to(follower.grpc, machine.tls()).await);
    let watch = WatchRequest { namespace: "revoked-shop".into(), service: "web".into(), ..WatchRequest::default() };
    let mut events = discovery.watch(watch).await.expect("it may").into_inner();

    let [name] = &names(&follower)[..] else { panic!("one") };
    follower.succeed(&["registrants", "revoke", name]);
    let begun = Instant::now();
    let ended = tokio::time::timeout(END_TIMEOUT, answers.message()).await.expect("it ends at the writer");
    let ended = ended.expect_err("no more answers");
    assert!(ended.code() == Code::Unauthenticated && ended.message().contains("was revoked"), "{ended}");
    let ended = tokio::time::timeout(END_TIMEOUT, async {
        loop {
            if let Err(ended) = events.message().await {
                return ended;
            }
        }
    });
    let ended = ended.await.expect("it ends at the follower");
    assert!(ended.code() == Code::Unauthenticated && ended.message().contains("was revoked"), "{ended}");
    println!("revoked on one, ended on both after {:?}", begun.elapsed());

    // All are killed, and others begin with nothing.
    writer.kill();
    follower.kill();
    shared.cluster.release_lease_in("revoked");
    let (writer, follower) = shared.writer_and_follower();
    for replica in [&writer, &follower] {
        super::lead(&machine, &[replica.grpc]);
        assert!(machine.fail(&["register", "web", "10.17.2.2"]).contains("was revoked"));
        assert!(machine.fail(&["renew", "--now"]).contains("the registrant was revoked"));
        assert!(replica.succeed(&["registrants", "ls", "-A"]).contains(name));
    }
}

#[test]
fn processes_that_are_all_killed_lose_nobody() {
    let Some(shared) = Shared::start("killed") else { return };
    let (writer, follower) = shared.writer_and_follower();
    shop(&shared, &writer, "killed-shop");
    let token = writer.create_token(&["-n", "killed-shop", "--uses", "2"]);
    let machine = Machine::joined(&token.to_string());
    let ca = shared.ca();
    let data = writer.kill();
    drop((data, follower.kill()));
    shared.cluster.release_lease_in("killed");
    let (writer, follower) = (shared.begin(&shared.kubeconfig, empty()), shared.begin(&shared.kubeconfig, empty()));
    [&writer, &follower].into_iter().for_each(Replica::wait_until_ready);
    assert_eq!(shared.ca(), ca);
    super::lead(&machine, &[writer.grpc, follower.grpc]);
    machine.succeed(&["renew", "--now"]);
    machine.succeed(&["register", "web", "10.17.3.1"]);
    // One use was left, and is.
    let mut token = token;
    token.addresses = follower.create_token(&["-n", "killed-shop"]).addresses;
    Machine::joined(&token.to_string());
    assert!(Machine::new().fail(&["join", &token.to_string()]).contains("was used already"));
    assert_eq!(names(&writer).len(), 2);
}

/// As good as `registrants revoke`, for who has kubectl and nothing else.
#[test]
fn registrant_whose_secret_is_deleted_has_no_identity() {
    let Some(shared) = Shared::start("deleted-secret") else { return };
    let (writer, follower) = shared.writer_and_follower();
    let machine = follower.joined(&["-n", "shop"]);
    let [name] = &names(&follower)[..] else { panic!("one") };
    let secret = name.replace("gangplank:registrant:", "gangplank-registrant-");
    shared.cluster.kubectl(&["delete", "secret", &secret, "-n", "deleted-secret"]);
    for replica in [&writer, &follower] {
        super::lead(&machine, &[replica.grpc]);
        wait_until("it is forgotten", || names(replica).is_empty().then_some(()));
        assert!(machine.fail(&["ls", "web"]).contains("was revoked, or never joined"));
        assert!(machine.fail(&["renew", "--now"]).contains("the registrant is unknown"));
    }
}
