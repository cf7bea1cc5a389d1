//! The process as an operator sees it: restarts, exit codes, probes, refusals.

use hickory_proto::{
    op::ResponseCode,
    rr::RecordType::{A, PTR, SRV},
};

use crate::support::{
    dns::{Over, answers, ask},
    http::get,
    server::Server,
};

const WEB: &str = "web.prod.svc.cluster.local.";

#[test]
fn registration_survives_kill_9() {
    let mut server = Server::start();
    server.register("prod", "web", "10.0.0.1", "http=8080");
    server.register("prod", "web", "10.0.0.2", "http=8080");
    let served = |server: &Server| {
        [Over::Udp, Over::Tcp].map(|over| {
            let ask = |name, rtype| answers(server.dns, over, name, rtype);
            [ask(WEB, A), ask("_http._tcp.web.prod.svc.cluster.local.", SRV), ask("1.0.0.10.in-addr.arpa.", PTR)]
        })
    };
    let before = served(&server);
    assert_eq!(before[0][0], ["10.0.0.1", "10.0.0.2"]);
    assert_eq!(before[0][2], ["10-0-0-1.web.prod.svc.cluster.local."]);
    server.kill9();
    let server = server.restart();
    assert_eq!(served(&server), before);
}

#[test]
fn removal_survives_kill_9() {
    let mut server = Server::start();
    server.register("prod", "web", "10.0.0.1", "http=8080");
    let output = server.run(&["deregister", "web", "10.0.0.1", "-n", "prod"]);
    assert!(output.status.success(), "{output:?}");
    server.kill9();
    let server = server.restart();
    assert_eq!(ask(server.dns, Over::Udp, WEB, A).response_code, ResponseCode::NXDomain);
}

#[test]
fn generation_never_decreases() {
    let server = Server::start();
    let generation = |server: &Server| -> u64 {
        let line = server.greeting.last().expect("it greets");
        line.rsplit(' ').next().and_then(|number| number.parse().ok()).expect("`ready generation N`")
    };
    let first = generation(&server);
    server.register("prod", "web", "10.0.0.1", "http=8080");
    let second = generation(&server.restart());
    assert!(second > first, "{second} after {first} and one registration");
}

#[test]
fn sigterm_exits_0() {
    let mut server = Server::start_with(&["--drain", "100ms"]);
    server.register("prod", "web", "10.0.0.1", "http=8080");
    let status = server.terminate();
    assert_eq!(status.code(), Some(0), "{status}");
    let server = server.restart();
    assert_eq!(answers(server.dns, Over::Udp, WEB, A), ["10.0.0.1"]);
}

#[test]
fn ready_server_answers_its_probes() {
    let server = Server::start();
    for path in ["/livez", "/readyz", "/readyz/registrations"] {
        let (status, body) = get(server.admin, path);
        assert_eq!(status, 200, "{path}: {body}");
    }
    let (status, body) = get(server.admin, "/metrics");
    assert_eq!(status, 200);
    assert!(body.contains("gangplank_build_info"), "{body}");
    assert_eq!(get(server.admin, "/no-such-page").0, 404);
}

/// A start script registers at every start, and must not fail because the registration is there.
#[test]
fn registering_again_exits_0_and_removing_again_exits_3() {
    let server = Server::start();
    let exit = |words: &[&str]| server.run(words).status.code();
    for command in [["register", "prod/web", "10.0.0.1:8080"], ["deregister", "prod/web", "10.0.0.1:8080"]] {
        let again = if command[0] == "register" { 0 } else { 3 };
        for format in ["wide", "json", "yaml", "name"] {
            let _ = exit(&command);
            assert_eq!(exit(&[&command[..], &["-o", format]].concat()), Some(again), "{command:?} -o {format}");
        }
    }
}

#[test]
fn invalid_namespace_is_a_usage_error() {
    let server = Server::start();
    for command in ["ls", "watch"] {
        let output = server.run(&[command, "-n", "a b"]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("namespace: must consist of") && !said.contains("the server answered"), "{said}");
    }
}
