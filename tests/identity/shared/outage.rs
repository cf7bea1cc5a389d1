//! The API server is away.

use std::{
    thread,
    time::{Duration, Instant},
};

use hickory_proto::rr::RecordType;
use serde_json::json;

use super::{Machine, Shared, empty, names};
use crate::identity::matrix::END_TIMEOUT;
use crate::support::{
    dns::{Over, answers, ask},
    proxy::{Fault, Proxy},
    wait_until,
};

/// How long a process may take to answer DNS, and by a copy of the CA over TLS, without the API server.
const MAX_START: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread")]
async fn process_that_starts_without_the_api_server_has_the_copy_of_the_ca_or_waits_for_it() {
    let Some(shared) = Shared::start("away-at-start") else { return };
    let proxy = Proxy::start(shared.cluster);
    let first = shared.begin(proxy.kubeconfig(), empty());
    first.wait_until_ready();
    let machine = first.joined(&["-n", "shop"]);
    let (ca, data) = (shared.ca(), first.kill());

    let away = proxy.inject(Fault::Drop, |_| true);
    let begun = Instant::now();
    let (copy, none) = (shared.begin(proxy.kubeconfig(), data), shared.begin(proxy.kubeconfig(), empty()));
    for replica in [&copy, &none] {
        ask(replica.dns, Over::Udp, "web.shop.svc.cluster.local.", RecordType::A);
    }
    while copy.handshake(&ca).await.is_err() {
        assert!(begun.elapsed() < MAX_START, "{}", copy.log());
    }
    println!("by the copy of the CA after {:?}", begun.elapsed());
    assert!(copy.log().contains("a copy of the CA in the data directory is used"), "{}", copy.log());
    super::lead(&machine, &[copy.grpc]);
    // Who joined is not known: nobody says that it was revoked.
    let said = machine.fail(&["ls", "web"]);
    assert!(said.contains("who joined is not known to this server yet"), "{said}");
    none.handshake(&ca).await.expect_err("it has no certificate");
    assert!(none.metric("gangplank_tls_handshakes_failed_total{reason=\"not_ready\"}") > 0);
    assert!(none.fail(&["token", "create"]).contains("the CA of this gangplank is not known yet"));
    assert!(begun.elapsed() < 2 * MAX_START);

    away.lift();
    for replica in [&copy, &none] {
        replica.wait_until_ready();
        super::lead(&machine, &[replica.grpc]);
        wait_until("it is known", || machine.run(&["renew", "--now"]).status.success().then_some(()));
    }
}

#[test]
fn without_the_api_server_nobody_joins_and_who_joined_goes_on() {
    let Some(shared) = Shared::start("away") else { return };
    shared.cluster.create_namespace("away-shop");
    let proxy = Proxy::start(shared.cluster);
    let replica = shared.begin(proxy.kubeconfig(), empty());
    replica.wait_until_ready();
    replica.wait_until_it_writes();
    let machine = replica.joined(&["-n", "away-shop"]);
    let token = replica.create_token(&["-n", "away-shop"]);
    wait_until("the namespace is known", || {
        machine.run(&["register", "web", "10.17.4.1"]).status.success().then_some(())
    });

    let away = proxy.inject(Fault::Drop, |_| true);
    proxy.drop_connections();
    for (said, what) in [
        (Machine::new().fail(&["join", &token.to_string()]), "join"),
        (machine.fail(&["renew", "--now"]), "renew"),
        (replica.fail(&["token", "create", "-n", "away-shop"]), "token create"),
        (replica.fail(&["registrants", "revoke", &names(&replica)[0]]), "registrants revoke"),
    ] {
        assert!(said.contains("Kubernetes cannot be asked"), "{what}: {said}");
    }
    machine.succeed(&["register", "web", "10.17.4.2"]);
    assert!(replica.metric("gangplank_join_requests_total{result=\"unavailable\"}") >= 2);
    // A revocation that was made meanwhile, with kubectl or by another process, is not known here.
    let user = names(&replica).remove(0);
    let secret = user.replace("gangplank:registrant:", "gangplank-registrant-");
    shared.edit(&secret, "registrant.json", |registrant| registrant["revoked"] = registrant["joined"].clone());
    machine.succeed(&["register", "web", "10.17.4.3"]);
    away.lift();
    wait_until("it is known once the API server answers", || {
        let output = machine.run(&["register", "web", "10.17.4.4"]);
        String::from_utf8_lossy(&output.stderr).contains("was revoked").then_some(())
    });
    // Its use was not lost.
    Machine::joined(&token.to_string());
}

/// The use is counted, and the registrant cannot be written.
#[test]
fn use_that_led_to_nothing_is_returned() {
    let Some(shared) = Shared::start("returned") else { return };
    let proxy = Proxy::start(shared.cluster);
    let replica = shared.begin(proxy.kubeconfig(), empty());
    replica.wait_until_ready();
    let token = replica.create_token(&["-n", "shop"]);
    let refused = proxy.inject(Fault::answer(500), |call| call.is("create", "secrets"));
    Machine::new().fail(&["join", &token.to_string()]);
    assert!(refused.hits() >= 1);
    refused.lift();
    wait_until("the use is there again", || {
        Machine::new().run(&["join", &token.to_string()]).status.success().then_some(())
    });
    assert!(Machine::new().fail(&["join", &token.to_string()]).contains("was used already"));
}

/// Each request is carried out, and its answer is lost once.
#[test]
fn lost_answers_use_a_token_once() {
    let Some(shared) = Shared::start("lost-answers") else { return };
    let proxy = Proxy::start(shared.cluster);
    let replica = shared.begin(proxy.kubeconfig(), empty());
    replica.wait_until_ready();
    let token = replica.create_token(&["-n", "shop", "--uses", "2"]);
    for verb in ["update", "create"] {
        proxy.inject_first(1, Fault::DropAfter, move |call| call.is(verb, "secrets"));
    }
    Machine::joined(&token.to_string());
    let listed = replica.succeed(&["token", "ls", "-A"]);
    assert!(listed.contains("1/2"), "{listed}");
    assert_eq!(names(&replica).len(), 1);
}

/// It takes connections, and says nothing.
#[test]
fn api_server_that_hangs_keeps_nobody_waiting() {
    let Some(shared) = Shared::start("shared-hanging") else { return };
    let proxy = Proxy::start(shared.cluster);
    let replica = shared.begin(proxy.kubeconfig(), empty());
    replica.wait_until_ready();
    let machine = replica.joined(&["-n", "shop"]);
    let token = replica.create_token(&["-n", "shop"]);
    let hung = proxy.inject(Fault::Hang, |call| call.resource == "secrets" && call.verb != "watch");
    for command in [&["join", &token.to_string()][..], &["renew", "--now"]] {
        let begun = Instant::now();
        let machine = if command[0] == "join" { &Machine::new() } else { &machine };
        let said = machine.fail(command);
        assert!(said.contains("Kubernetes cannot be asked: no answer from the API server: not within 2s"), "{said}");
        assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    }
    hung.lift();
    wait_until("it is asked again", || machine.run(&["renew", "--now"]).status.success().then_some(()));
}

/// The connection of the watch has died, and nothing says so.
#[test]
fn revocation_is_known_in_time_although_the_watch_is_silent() {
    let Some(shared) = Shared::start("shared-silent") else { return };
    let proxy = Proxy::start(shared.cluster);
    let writer = shared.replica();
    writer.wait_until_it_writes();
    let follower = shared.begin(proxy.kubeconfig(), empty());
    follower.wait_until_ready();
    let machine = follower.joined(&["-n", "shop"]);
    machine.succeed(&["renew", "--now"]);
    let silent = proxy.inject_first(1, Fault::Stall, |call| call.is("watch", "secrets"));
    // What it has to say now is held back.
    writer.succeed(&["token", "create"]);
    silent.wait_hits(1);
    wait_until("it joined", || (names(&writer).len() == 1).then_some(()));
    writer.succeed(&["registrants", "revoke", &names(&writer)[0]]);
    let begun = Instant::now();
    wait_until("it is known", || {
        let output = machine.run(&["ls", "web"]);
        String::from_utf8_lossy(&output.stderr).contains("was revoked").then_some(())
    });
    println!("revoked behind a silent watch after {:?}", begun.elapsed());
    assert!(begun.elapsed() < END_TIMEOUT, "after {:?}", begun.elapsed());
}

/// Else a watch that is renewed often would begin at an ever older version, and list everything again and again.
#[test]
fn api_server_says_where_a_short_watch_goes_on() {
    let Some(shared) = Shared::start("short-watch") else { return };
    let version = shared.cluster.get_json(&shared.path(""))["metadata"]["resourceVersion"].clone();
    let path = format!(
        "{}?watch=true&allowWatchBookmarks=true&timeoutSeconds=4&labelSelector=gangplank.dev/joining&resourceVersion={}",
        shared.path(""),
        version.as_str().expect("a number")
    );
    let said = thread::scope(|scope| {
        let watch = scope.spawn(|| shared.cluster.kubectl(&["get", "--raw", &path]));
        // Secrets of others, which the watch does not show.
        for number in 0.. {
            if watch.is_finished() {
                break;
            }
            let name = format!("other-{number}");
            let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}});
            assert_eq!(shared.admin("POST", &shared.path(""), Some(&secret)).0, 201);
        }
        watch.join().expect("kubectl ends")
    });
    assert!(said.contains("BOOKMARK") && !said.contains("other-"), "{said}");
}

/// What a process accepted while it was cut off goes to the one that writes by then: they know each other by the CA.
#[test]
fn replicas_hand_over_by_their_ca() {
    let Some(shared) = Shared::start("own-handover") else { return };
    shared.cluster.create_namespace("own-handover-shop");
    let proxy = Proxy::start(shared.cluster);
    let first = shared.begin(proxy.kubeconfig(), empty());
    first.wait_until_ready();
    first.wait_until_it_writes();
    let second = shared.replica();
    let machine = first.joined(&["-n", "own-handover-shop"]);
    wait_until("the namespace is known", || {
        machine.run(&["register", "web", "10.17.7.1"]).status.success().then_some(())
    });
    let away = proxy.inject(Fault::Drop, |_| true);
    proxy.drop_connections();
    machine.succeed(&["register", "web", "10.17.7.2"]);
    second.wait_until_it_writes();
    away.lift();
    wait_until("the other one has it", || {
        let found = answers(second.dns, Over::Udp, "web.own-handover-shop.svc.cluster.local.", RecordType::A);
        (found == ["10.17.7.1", "10.17.7.2"]).then_some(())
    });
    assert!(second.succeed(&["ls", "web", "-n", "own-handover-shop", "-o", "wide"]).contains(&names(&second)[0]));
}
