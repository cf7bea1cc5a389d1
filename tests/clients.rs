//! Third-party clients: registrants generated from the contract in other languages, and common
//! resolvers.

use std::{collections::HashMap, path::Path};

use hickory_proto::{op::ResponseCode, rr::RecordType::A};

use crate::support::{
    dns::{Over, answers, ask},
    server::Server,
    tools::{self, ROOT, stdout},
};

/// Instances of one pipelined stream: more than the windows of HTTP/2 hold, in frames as small as they come.
const STREAM: usize = 20_000;

#[derive(Debug, serde::Deserialize)]
struct Answer {
    address: String,
    ports: HashMap<String, u16>,
    status: u32,
    details: String,
}

fn read(printed: &str) -> Vec<Answer> {
    printed.lines().map(|line| serde_json::from_str(line).expect("one JSON object per line")).collect()
}

#[test]
fn go_client_of_the_frozen_contract_works() {
    let Some(gotool) = tools::require("gotool") else { return };
    registrant(&|server, command| {
        let server = server.grpc.to_string();
        let (first, rest) = command.split_first().expect("a command");
        stdout(&gotool, [*first, &server].iter().chain(rest))
    });
}

#[test]
fn python_client_of_the_frozen_contract_works() {
    python_registrant("frozen");
}

#[test]
fn python_client_of_the_current_contract_works() {
    python_registrant("current");
}

fn python_registrant(contract: &str) {
    let Some(python) = tools::require_python() else { return };
    let script = Path::new(ROOT).join("tests/tools/python/registrant.py");
    let stubs = Path::new(ROOT).join("target/tools/stubs").join(contract);
    let head = [script, stubs].map(|path| path.to_str().expect("UTF-8").to_owned());
    registrant(&|server, command| {
        let server = server.grpc.to_string();
        let command = command.iter().map(|&word| word.to_owned());
        stdout(&python, head.iter().cloned().chain([server]).chain(command))
    });
}

/// What every registrant must see, in any language: `call` runs one command.
fn registrant(call: &dyn Fn(&Server, &[&str]) -> String) {
    let server = Server::start();
    let unary = |command: &[&str]| {
        let mut answers = read(&call(&server, command));
        assert_eq!(answers.len(), 1, "{answers:?}");
        answers.remove(0)
    };
    let web = "web.prod.svc.cluster.local.";

    let created = unary(&["register", "prod", "web", "10.1.2.3", "http=8080"]);
    assert_eq!((created.status, created.address.as_str()), (201, "10.1.2.3"), "{created:?}");
    assert_eq!(created.ports, HashMap::from([("http".to_owned(), 8080)]));
    assert_eq!(answers(server.dns, Over::Udp, web, A), ["10.1.2.3"], "visible before acknowledged");
    assert_eq!(unary(&["register", "prod", "web", "10.1.2.3", "http=8080"]).status, 200);

    let refused = unary(&["register", "prod", "web", "127.0.0.1", "http=8080"]);
    assert_eq!(refused.status, 400);
    assert!(refused.details.contains("ipaddress"), "the field is named: {refused:?}");

    assert_eq!(unary(&["unregister", "prod", "web", "10.1.2.3", "http=8080"]).status, 204);
    assert_eq!(ask(server.dns, Over::Udp, web, A).response_code, ResponseCode::NXDomain);
    assert_eq!(unary(&["unregister", "prod", "web", "10.1.2.3", "http=8080"]).status, 404);

    let streamed = read(&call(&server, &["stream", &STREAM.to_string(), "prod", "many", "http=8080"]));
    let outcome: Vec<_> = streamed.iter().map(|answer| (answer.status, answer.address.clone())).collect();
    let expected = [201, 204].iter().flat_map(|&status| (0..STREAM).map(move |n| (status, address(n))));
    assert_eq!(outcome, expected.collect::<Vec<_>>(), "one answer per message, in order");
}

fn address(n: usize) -> String {
    format!("10.{}.{}.{}", n >> 16 & 255, n >> 8 & 255, n & 255)
}

#[test]
fn resolvers_find_registered_services() {
    let server = Server::start();
    server.register("prod", "web", "10.0.0.1", "http=8080");
    server.register("prod", "web", "2001:db8::7", "http=8080");
    let port = server.dns.port().to_string();
    let host = server.dns.ip().to_string();
    let web = "web.prod.svc.cluster.local";

    if let Some(dig) = tools::require("dig") {
        let dig = |words: &[&str]| stdout(&dig, ["+short", "-p", &port, &format!("@{host}")].iter().chain(words));
        for over in ["+notcp", "+tcp"] {
            assert_eq!(dig(&[over, web, "A"]), "10.0.0.1\n");
            assert_eq!(dig(&[over, web, "AAAA"]), "2001:db8::7\n");
            assert_eq!(dig(&[over, "-x", "10.0.0.1"]), format!("10-0-0-1.{web}.\n"));
        }
    }
    if let Some(nslookup) = tools::require("nslookup") {
        let said = stdout(&nslookup, [&format!("-port={port}"), web, &host]);
        assert!(said.contains("Address: 10.0.0.1\n") && said.contains("Address: 2001:db8::7\n"), "{said}");
    }
    if let Some(kdig) = tools::require("kdig") {
        assert_eq!(stdout(&kdig, ["+short", "-p", &port, &format!("@{host}"), web, "A"]), "10.0.0.1\n");
    }
    if let Some(drill) = tools::require("drill") {
        let said = stdout(&drill, ["-Q", "-p", &port, &format!("@{host}"), web, "A"]);
        assert_eq!(said.trim(), "10.0.0.1");
    }
}

#[test]
fn go_resolver_finds_registered_services() {
    let Some(gotool) = tools::require("gotool") else { return };
    let server = Server::start();
    server.register("prod", "web", "10.0.0.1", "http=8080");
    let dns = server.dns.to_string();
    for over in ["udp", "tcp"] {
        let lookup = |kind: &str, name: &str| -> serde_json::Value {
            serde_json::from_str(&stdout(&gotool, ["lookup", over, &dns, kind, name])).expect("it prints JSON")
        };
        // With the final dot: without, the machine's search list would be asked for, too.
        assert_eq!(lookup("host", "web.prod.svc.cluster.local."), serde_json::json!(["10.0.0.1"]));
        assert_eq!(
            lookup("srv", "_http._tcp.web.prod.svc.cluster.local."),
            serde_json::json!([{"Target": "10-0-0-1.web.prod.svc.cluster.local.", "Port": 8080, "Priority": 0, "Weight": 100}])
        );
        assert_eq!(lookup("addr", "10.0.0.1"), serde_json::json!(["10-0-0-1.web.prod.svc.cluster.local."]));
        let missing = lookup("host", "nobody.prod.svc.cluster.local.");
        assert_eq!(missing["notFound"], true, "{missing}");
    }
}
