//! The command line with several servers: whichever it asks, a registration reaches the one that writes.

use std::{net::TcpListener, process::Output};

use hickory_proto::rr::RecordType;

use super::{ClusterLock, MirrorHarness, dns_name, replica::Replica, serve_by};
use crate::support::{
    dns::{Over, answers},
    wait_until,
};

/// A URL where nobody listens.
fn dead() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    format!("http://{}", listener.local_addr().expect("bound"))
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

#[test]
fn registration_reaches_the_writer_by_way_of_a_follower() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let harness = MirrorHarness { server: serve_by(&kubeconfig, &[]), cluster: lock.cluster, _lock: lock };
    harness.create_namespace("by-hint");
    let follower = Replica::on_standby(&kubeconfig);
    let (dead, standby) = (dead(), format!("http://{}", follower.grpc));
    let run = |command: &[&str]| harness.server.run(&[command, &["-n", "by-hint"]].concat());

    let registered = run(&["register", "web", "10.14.0.1:80", "--server", &standby]);
    assert!(registered.status.success(), "{}", stderr(&registered));
    // Without time for a second round.
    let both = format!("{dead},{standby}");
    let registered = run(&["register", "web", "10.14.0.2:80", "--server", &both, "--timeout", "0s"]);
    assert!(registered.status.success(), "{}", stderr(&registered));
    let a = |dns| answers(dns, Over::Udp, &dns_name("by-hint", "web"), RecordType::A);
    assert_eq!(a(harness.server.dns), ["10.14.0.1", "10.14.0.2"]);
    let removed = run(&["deregister", "web", "10.14.0.1", "--server", &dead, "--server", &standby]);
    assert!(removed.status.success(), "{}", stderr(&removed));
    assert_eq!(a(harness.server.dns), ["10.14.0.2"]);

    // Every process answers readers, so the first that answers is asked.
    wait_until("the follower has the removal", || (a(follower.dns) == ["10.14.0.2"]).then_some(()));
    let listed = run(&["ls", "web", "-o", "name", "--server", &dead, "--server", &standby]);
    assert_eq!(String::from_utf8_lossy(&listed.stdout), "by-hint/web 10.14.0.2:80\n", "{}", stderr(&listed));
    // A refusal of the request is the answer: nobody else is asked.
    let refused = run(&["register", "web", "127.0.0.1:80", "--server", &standby]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("refused: ipaddress"), "{}", stderr(&refused));
}

#[test]
fn registrations_go_on_when_the_writer_is_killed() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let mut harness = MirrorHarness { server: serve_by(&kubeconfig, &[]), cluster: lock.cluster, _lock: lock };
    harness.create_namespace("killed-writer");
    let second = Replica::on_standby(&kubeconfig);
    let (writer, standby) = (format!("http://{}", harness.server.grpc), format!("http://{}", second.grpc));
    let servers = format!("{writer},{standby}");
    for last in 1..=6 {
        if last == 4 {
            harness.server.kill9();
            // Nobody writes for the next 15 s: a short look tells who was asked and what each said.
            let given_up = harness.server.run(&[
                "register",
                "web",
                "10.15.0.99:80",
                "-n",
                "killed-writer",
                "--server",
                &servers,
                "--timeout",
                "1s",
            ]);
            let said = stderr(&given_up);
            assert_eq!(given_up.status.code(), Some(1), "{said}");
            assert!(said.starts_with("error: no server took the call\n"), "{said}");
            assert!(said.contains(&format!("  {writer}: ")) && said.contains("onnection refused"), "{said}");
            assert!(said.contains(&format!("  {standby}: on standby: another gangplank has the Lease")), "{said}");
        }
        let address = format!("10.15.0.{last}:80");
        let command = ["register", "web", &address, "-n", "killed-writer", "--server", &servers, "--timeout", "1m"];
        let registered = harness.server.run(&command);
        assert!(registered.status.success(), "{}", stderr(&registered));
    }
    let mut all = answers(second.dns, Over::Udp, &dns_name("killed-writer", "web"), RecordType::A);
    all.sort();
    assert_eq!(all, (1..=6).map(|last| format!("10.15.0.{last}")).collect::<Vec<_>>());
}

#[test]
fn every_server_that_is_down_is_named() {
    let server = crate::support::server::Server::start();
    let (one, other) = (dead(), dead());
    for command in [&["register", "web", "10.0.0.1:80"][..], &["deregister", "web", "10.0.0.1"], &["ls"]] {
        let output = server.run(&[command, &["--server", &one, "--server", &other]].concat());
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert_eq!(said.lines().count(), 3, "{said}");
        assert!(said.starts_with("error: no server took the call\n"), "{said}");
        assert!(said.contains(&format!("  {one}: ")) && said.contains(&format!("  {other}: ")), "{said}");
    }
}
