//! Who answers through CoreDNS while gangplank mirrors its registrations: gangplank counts the questions that reach it.

use std::{path::Path, process::Output};

use hickory_proto::rr::RecordType;

use crate::{
    mirror::ClusterLock,
    support::{
        cluster::CONTEXT,
        coredns::CoreDns,
        dns::{Over, answers, ask},
        http,
        server::Server,
        tools, wait_until,
    },
};

const NAMESPACE: &str = "front-mirrored";

/// Questions that each check asks.
const QUESTIONS: usize = 20;

/// What the command prints, with a kubeconfig for the kubernetes plugin, and with gangplank, which refuses, as the
/// resolver for the rest.
fn in_front_of(program: &Path, server: &Server, kubeconfig: &Path, flags: &[&str]) -> CoreDns {
    let dns = server.dns.to_string();
    let Output { stdout, .. } = server.run(&[&["coredns", "--server", &dns], flags].concat());
    let corefile = String::from_utf8(stdout).expect("UTF-8");
    let access = format!("pods insecure\n        kubeconfig {} {CONTEXT}\n", kubeconfig.display());
    let corefile = corefile.replace("pods insecure\n", &access).replace("/etc/resolv.conf", &dns);
    CoreDns::start(program, &corefile)
}

/// How many questions have reached gangplank.
fn reached(server: &Server) -> u64 {
    let (_, page) = http::get(server.admin, "/metrics");
    let series = page.lines().filter(|line| line.starts_with("gangplank_dns_requests_total{"));
    series.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

#[test]
fn what_is_in_slices_is_asked_of_gangplank_in_a_stub_domain_only() {
    let (Some(program), Some(lock)) = (tools::require("coredns"), ClusterLock::take()) else { return };
    let (ours, admin) = (lock.cluster.kubeconfig_for_gangplank(), lock.cluster.kubeconfig_admin());
    let server = Server::start_with(&["--kubeconfig", ours.to_str().expect("a path in UTF-8")]);
    lock.cluster.create_namespace(NAMESPACE);
    wait_until("the namespace is known, and the instance in its slice", || {
        let output = server.run(&["register", "web", "10.0.0.1", "--port", "http=80", "-n", NAMESPACE]);
        output.status.success().then_some(())
    });
    let web = format!("web.{NAMESPACE}.svc.cluster.local.");
    let nothing = format!("nothing.{NAMESPACE}.svc.cluster.local.");
    let through = |coredns: &CoreDns, name: &str| {
        let before = reached(&server);
        for _ in 0..QUESTIONS {
            let _ = ask(coredns.address, Over::Udp, name, RecordType::A);
        }
        reached(&server) - before
    };

    let fall_through = in_front_of(&program, &server, &admin, &[]);
    wait_until("CoreDNS has read the slice", || (through(&fall_through, &web) == 0).then_some(()));
    assert_eq!(answers(fall_through.address, Over::Udp, &web, RecordType::A), ["10.0.0.1"]);
    assert_eq!(through(&fall_through, &nothing), QUESTIONS as u64);

    let stub_domain = in_front_of(&program, &server, &admin, &["--wiring", "stub-domain", "-n", NAMESPACE]);
    assert_eq!(answers(stub_domain.address, Over::Udp, &web, RecordType::A), ["10.0.0.1"]);
    assert_eq!([&web, &nothing].map(|name| through(&stub_domain, name)), [QUESTIONS as u64; 2]);
}
