//! A real CoreDNS in front, with the configurations in `coredns/`, queried by a raw client.

mod away;
mod command;
mod mirrored;
mod pod;

use std::{fs, path::Path};

use hickory_proto::{op::ResponseCode, rr::RecordType};

use crate::support::{
    coredns::{CoreDns, corefile},
    dns::{Over, answers, ask},
    server::Server,
    tools::{self, ROOT},
};

/// A server with one service of two instances.
fn server_with_web() -> Server {
    let server = Server::start();
    server.register("prod", "web", "10.0.0.1", "http=8080");
    server.register("prod", "web", "2001:db8::1", "http=8080");
    server
}

/// A configuration without the kubernetes plugin: there is no cluster here.
fn without_kubernetes(corefile: &str) -> String {
    let begin = corefile.find("    kubernetes ").expect("the plugin is configured");
    let end = begin + corefile[begin..].find("    }\n").expect("its block ends") + "    }\n".len();
    format!("{}{}", &corefile[..begin], &corefile[end..])
}

/// The files have one source: the command that they name.
#[test]
fn shipped_configurations_are_what_the_command_prints() {
    let server = Server::start();
    for (file, flags) in [
        ("fall-through.Corefile", &["--server", "10.96.0.53:1053"][..]),
        ("stub-domain.Corefile", &["--wiring", "stub-domain", "-n", "prod", "--server", "10.96.0.53:1053"]),
    ] {
        let printed = server.run(&[&["coredns"], flags].concat());
        let shipped = fs::read_to_string(Path::new(ROOT).join("coredns").join(file)).expect("it is shipped");
        assert_eq!(String::from_utf8(printed.stdout).expect("UTF-8"), shipped, "{file}");
    }
}

#[test]
fn coredns_forwards_a_stub_domain() {
    let Some(program) = tools::require("coredns") else { return };
    let server = server_with_web();
    let coredns = CoreDns::start(&program, &corefile("stub-domain.Corefile", server.dns));
    let through = |name: &str, rtype| answers(coredns.address, Over::Udp, name, rtype);
    assert_eq!(through("web.prod.svc.cluster.local.", RecordType::A), ["10.0.0.1"]);
    assert_eq!(through("_http._tcp.web.prod.svc.cluster.local.", RecordType::SRV).len(), 2);
    let mixed = ask(coredns.address, Over::Udp, "wEb.PROD.svc.Cluster.local.", RecordType::A);
    assert_eq!(mixed.answers.len(), 1, "CoreDNS takes the answer only with the question's case");
    for missing in ["nothing.prod.svc.cluster.local.", "web.prod.svc.cluster.local.prod.svc.cluster.local."] {
        assert_eq!(ask(coredns.address, Over::Udp, missing, RecordType::A).response_code, ResponseCode::NXDomain);
    }
    // A new instance is answered at once: CoreDNS has not cached the NXDOMAIN.
    server.register("prod", "nothing", "10.0.0.9", "http=8080");
    assert_eq!(through("nothing.prod.svc.cluster.local.", RecordType::A), ["10.0.0.9"]);
}

#[test]
fn resolve_shows_what_differs_through_coredns() {
    let Some(program) = tools::require("coredns") else { return };
    let server = server_with_web();
    let coredns = CoreDns::start(&program, &corefile("stub-domain.Corefile", server.dns));
    let (direct, via) = (server.dns.to_string(), coredns.address.to_string());
    let resolve = |name: &str| {
        let output = server.run(&["resolve", name, "--dns", &direct, "--via", &via, "-o", "json"]);
        let view: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        (output.status.code(), view["questions"].as_array().expect("questions").clone())
    };
    let (code, questions) = resolve("web.prod.svc.cluster.local");
    assert_eq!(questions.len(), 3, "A, AAAA, and the SRV of the port: {questions:?}");
    for question in &questions {
        assert_eq!(question["via"]["differences"], serde_json::json!([]), "{question}");
        assert!(question["nsid"].is_string(), "{question}");
        assert_eq!(question["nsid"], question["via"]["nsid"], "gangplank has answered: {question}");
    }
    assert_eq!(code, Some(0));
    // A namespace that CoreDNS does not ask gangplank for.
    server.register("test", "web", "10.0.0.2", "http=8080");
    let (code, questions) = resolve("web.test.svc.cluster.local");
    let differences = questions[0]["via"]["differences"].as_array().expect("differences");
    assert!(["rcode", "records", "nsid"].iter().all(|what| differences.contains(&(*what).into())), "{questions:?}");
    assert_eq!(code, Some(1));
}

#[test]
fn coredns_falls_through_to_gangplank() {
    let Some(program) = tools::require("coredns") else { return };
    let server = server_with_web();
    // There is no Kubernetes here, so that its plugin goes; another gangplank, which knows another
    // address, stands for the resolver behind the general `forward`.
    let elsewhere = Server::start();
    elsewhere.register("other", "far", "10.9.9.9", "http=8080");
    let corefile = without_kubernetes(&corefile("fall-through.Corefile", server.dns));
    let corefile = corefile.replace("/etc/resolv.conf", &elsewhere.dns.to_string());
    let coredns = CoreDns::start(&program, &corefile);
    let through = |name: &str, rtype| answers(coredns.address, Over::Udp, name, rtype);
    assert_eq!(through("web.prod.svc.cluster.local.", RecordType::A), ["10.0.0.1"]);
    assert_eq!(through("1.0.0.10.in-addr.arpa.", RecordType::PTR), ["10-0-0-1.web.prod.svc.cluster.local."]);
    assert_eq!(through("9.9.9.10.in-addr.arpa.", RecordType::PTR), ["10-9-9-9.far.other.svc.cluster.local."]);
    assert_eq!(
        ask(coredns.address, Over::Udp, "nothing.prod.svc.cluster.local.", RecordType::A).response_code,
        ResponseCode::NXDomain
    );
}
