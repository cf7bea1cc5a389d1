//! Every page of the admin listener, as the router itself lists them, with every kind of credential.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Instant,
};

use gangplank::admin;

use super::{
    Credential, SecuredServer, TestCa,
    joining::{self, Machine, create_token},
    matrix::END_TIMEOUT,
};
use crate::support::{
    http,
    https::{Answer, HttpsClient},
    secrets,
    server::Server,
    wait_until,
};

/// Beside loopback, where the tests read metrics.
pub(crate) const BEYOND: [&str; 2] = ["--admin-listen", "0.0.0.0:0"];

/// `prometheus` scrapes, the group `readers` reads all, and so does everybody whose user no rule can name: a machine that
/// joined may not all the same.
const POLICY: &str = "\
[[rule]]
users = ['prometheus']
paths = ['/metrics']

[[rule]]
groups = ['readers']
paths = ['*']

[[rule]]
users = ['gangplank:registrant:0123456789abcdef']
paths = ['*']

[[rule]]
users = ['stranger', 'vm-1']
namespaces = ['*']
verbs = ['*']
";

/// Ways to write `/metrics`, or a page of instances, of which none is a page.
pub(super) const ODD_PATHS: [&str; 16] = [
    "//metrics",
    "/metrics/",
    "/%6detrics",
    "/METRICS",
    "/./metrics",
    "/livez/../metrics",
    "/livez/%2e%2e/metrics",
    "/livez%2f..%2fmetrics",
    "/livez/",
    "/livez;/metrics",
    "/livez%00/metrics",
    "/readyz/../api/v1/services",
    "/api/v1/../../metrics",
    "/api/v1/services/",
    "/api/v1/namespaces/../services",
    "/api/v1/namespaces/shop/services/..",
];

/// Where the admin listener beyond loopback is reached.
pub(crate) fn beyond(server: &Server) -> SocketAddr {
    let port = server.greeting.iter().find_map(|line| line.strip_prefix("listening admin 0.0.0.0:")?.parse().ok());
    (Ipv4Addr::LOCALHOST, port.expect("it listens there")).into()
}

/// A client that trusts the CA of the server, and shows this.
pub(super) fn client(ca: &TestCa, shown: Option<&Credential>) -> HttpsClient {
    shown.iter().for_each(|shown| secrets::remember(&shown.key));
    HttpsClient::new(&ca.pem, shown.map(|shown| (shown.cert.as_str(), shown.key.as_str())))
}

/// Every page of the router, with names in the place of its parameters, and whether everybody may see it.
pub(super) fn pages() -> Vec<(String, bool)> {
    let named = |path: &str| path.replace("{namespace}", "shop").replace("{name}", "web");
    let pages: Vec<_> = admin::pages().map(|(path, open)| (named(path), open)).collect();
    assert!(pages.iter().all(|(path, _)| !path.contains('{')), "a parameter that is not known here: {pages:?}");
    let open: Vec<&str> = pages.iter().filter(|(_, open)| *open).map(|(path, _)| path.as_str()).collect();
    assert_eq!(open, ["/livez", "/readyz", "/readyz/registrations"], "what everybody may see");
    pages
}

/// The value of one series, as loopback says it.
pub(super) fn metric(server: &Server, series: &str) -> f64 {
    let metrics = http::get(server.admin, "/metrics").1;
    let value = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {series} in {metrics}")).parse().expect("a number")
}

fn refusals(server: &Server) -> (f64, f64) {
    let unauthenticated = metric(server, "gangplank_unauthenticated_calls_total{reason=\"no_credentials\"}");
    (unauthenticated, metric(server, "gangplank_authorization_decisions_total{result=\"denied\"}"))
}

pub(super) fn assert_challenged(answer: &Answer, what: &str) {
    assert_eq!(answer.status, 401, "{what}: {answer:?}");
    assert!(answer.head.to_ascii_lowercase().contains("\r\nwww-authenticate: bearer"), "{what}: {answer:?}");
}

#[test]
fn no_page_is_shown_without_an_identity_or_a_right() {
    let secured = SecuredServer::start_with_flags(POLICY, &BEYOND);
    let (server, ca) = (&secured.server, &secured.ca);
    let to = beyond(server);
    let nobody = client(ca, None);
    let [prometheus, stranger, vm] =
        ["prometheus", "stranger", "vm-1"].map(|user| client(ca, Some(&ca.sign(user, &[]))));
    let reader = client(ca, Some(&ca.sign("ada", &["readers"])));
    let joined = client(ca, Some(&ca.sign("gangplank:registrant:0123456789abcdef", &[])));
    let mut refused = refusals(server);
    for (path, open) in pages() {
        let status = |who: &HttpsClient| who.get(to, &path, &[]).expect("answered").status;
        if open {
            for who in [&nobody, &stranger, &joined, &reader] {
                assert_eq!(status(who), 200, "{path}");
            }
            // Whatever else is shown.
            assert_eq!(nobody.get(to, &path, &[("Authorization", "Bearer any")]).expect("answered").status, 200);
            continue;
        }
        assert_challenged(&nobody.get(to, &path, &[]).expect("answered"), &path);
        for who in [&stranger, &vm, &joined] {
            assert_eq!(status(who), 403, "{path}");
        }
        let read = status(&reader);
        assert!(read == 200 || (read == 404 && path.ends_with("/web")), "{path}: {read}");
        assert_eq!(status(&prometheus), if path == "/metrics" { 200 } else { 403 }, "{path}");
        // A token is not passed over for the certificate.
        let with_token = reader.get(to, &path, &[("Authorization", "Bearer any")]).expect("answered");
        assert_challenged(&with_token, &path);
        assert!(with_token.body.contains("it runs without --kubernetes"), "{with_token:?}");
        // Each is counted.
        refused = (refused.0 + 1.0, refused.1 + if path == "/metrics" { 3.0 } else { 4.0 });
        assert_eq!(refusals(server), refused, "{path}");
    }
    let said = nobody.get(to, "/metrics", &[]).expect("answered").body;
    assert!(said.contains("needs a client certificate") && said.contains("--audience gangplank"), "{said}");
    let said = stranger.get(to, "/metrics", &[]).expect("answered").body;
    assert!(said.contains("stranger may not get /metrics") && said.contains("nonResourceURLs"), "{said}");
    let log = server.stderr();
    for part in [
        "refused: the caller has no identity peer=127.0.0.1 call=\"/metrics\"",
        "denied: get /metrics user=stranger peer=127.0.0.1 reason=stranger may not get /metrics",
    ] {
        assert!(log.contains(part), "{part} in {log}");
    }
    assert!(log.contains("admin over TLS: /livez and /readyz answer everybody"), "{log}");
    assert!(!log.contains("Bearer any"), "{log}");
    // Plaintext over loopback stays as it is; beyond it nothing is said in plaintext.
    assert_eq!(http::get(server.admin, "/api/v1/services").0, 200);
    assert!(plaintext_status(to).is_none(), "in plaintext");
}

/// The status of `/livez` in plaintext; `None` if the connection ends without one.
fn plaintext_status(to: SocketAddr) -> Option<u16> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(to).expect("it listens");
    let _ = stream.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()
}

#[test]
fn odd_targets_and_methods_are_no_way_round() {
    let secured = SecuredServer::start_with_flags(POLICY, &BEYOND);
    let ca = &secured.ca;
    let to = beyond(&secured.server);
    let nobody = client(ca, None);
    let prometheus = client(ca, Some(&ca.sign("prometheus", &[])));
    let reader = client(ca, Some(&ca.sign("ada", &["readers"])));
    let status = |who: &HttpsClient, request: &str| -> u16 {
        who.connect(to).expect("a handshake").last(request, &[]).unwrap_or_else(|err| panic!("{request}: {err}")).status
    };
    for path in ODD_PATHS {
        assert_eq!(status(&nobody, &format!("GET {path}")), 401, "{path}");
        assert_eq!(status(&prometheus, &format!("GET {path}")), 403, "{path}");
        // Who may see everything learns that there is no such page.
        let seen = status(&reader, &format!("GET {path}"));
        assert!(seen == 404 || seen == 400, "{path}: {seen}");
    }
    // The same page in another form.
    for target in ["http://localhost/metrics", "http://127.0.0.1:9153/metrics", "/metrics?a=/livez", "/metrics#/livez"]
    {
        let request = format!("GET {target}");
        assert_eq!(status(&nobody, &request), 401, "{target}");
        assert_eq!(status(&prometheus, &request), 200, "{target}");
    }
    let long = format!("GET /livez/{}", "x".repeat(600));
    assert_eq!(status(&nobody, &long), 404, "no page has such a path");
    for method in ["HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "get", "X"] {
        let request = format!("{method} /metrics");
        let (none, without, with) =
            (status(&nobody, &request), status(&prometheus, &format!("{method} /")), status(&prometheus, &request));
        assert_eq!(none, 401, "{method}");
        let expected = if method == "HEAD" { (403, 200) } else { (405, 405) };
        assert_eq!((without, with), expected, "{method}");
    }
    for request in ["OPTIONS *", "CONNECT localhost:9153"] {
        let answer = nobody.connect(to).expect("a handshake").last(request, &[]);
        assert!(answer.is_ok_and(|answer| answer.status == 401), "{request}");
    }
    // The host is looked at first.
    let connection = nobody.connect(to).expect("a handshake");
    assert_eq!(connection.last("GET http://evil.example/metrics", &[]).expect("answered").status, 421);
    let connection = prometheus.connect(to).expect("a handshake");
    assert_eq!(connection.alpn(), Some(&b"http/1.1"[..]));
    assert_eq!(connection.last("GET http://evil.example/metrics", &[]).expect("answered").status, 421);
    // One bearer token is one header.
    for headers in
        [&[("Authorization", "Basic dTpw")][..], &[("Authorization", "Bearer a"), ("Authorization", "Bearer b")]]
    {
        let refused = reader.get(to, "/metrics", headers).expect("answered");
        assert_challenged(&refused, "/metrics");
        assert!(refused.body.contains("must be \"Bearer TOKEN\", once"), "{refused:?}");
    }
}

#[test]
fn certificate_that_is_not_good_sees_nothing() {
    let secured = SecuredServer::start_with_flags(POLICY, &BEYOND);
    let (to, other) = (beyond(&secured.server), TestCa::new());
    for (credential, why) in [
        (other.sign("ada", &["readers"]), "another CA"),
        (secured.ca.sign_for("ada", &["readers"], -7200, -3600), "expired"),
        (secured.ca.sign_for("ada", &["readers"], 3600, 7200), "not valid yet"),
    ] {
        for (path, _) in pages() {
            let answered = client(&secured.ca, Some(&credential)).get(to, &path, &[]);
            assert!(answered.is_err(), "{why}: {path}: {answered:?}");
        }
    }
    let failed = "gangplank_tls_handshakes_failed_total{reason=\"bad_certificate\"}";
    assert_eq!(metric(&secured.server, failed), 3.0 * pages().len() as f64);
    assert!(secured.server.stderr().contains("refused: the TLS handshake failed"), "{}", secured.server.stderr());
}

/// Asks for `/metrics` on one connection again and again until the answer has this status.
fn asked_until(secured: &SecuredServer, shown: &Credential, status: u16, change: impl FnOnce()) -> Answer {
    let mut connection = client(&secured.ca, Some(shown)).connect(beyond(&secured.server)).expect("a handshake");
    let first = connection.ask("GET /metrics", &[]).expect("answered");
    assert_eq!(first.status, 200, "{first:?}");
    change();
    let begun = Instant::now();
    let last = wait_until("the connection sees no more", || {
        let answer = connection.ask("GET /metrics", &[]).expect("the connection stays open");
        (answer.status == status).then_some(answer)
    });
    assert!(begun.elapsed() < END_TIMEOUT, "after {:?}", begun.elapsed());
    last
}

#[test]
fn connection_sees_nothing_more_when_its_certificate_or_its_right_has_ended() {
    let secured = SecuredServer::start_with_flags(POLICY, &BEYOND);
    let short = secured.ca.sign_for("prometheus", &[], -3600, 5);
    let expired = asked_until(&secured, &short, 401, || {});
    assert!(expired.body.contains("has expired"), "{expired:?}");

    let good = secured.ca.sign("prometheus", &[]);
    let denied = asked_until(&secured, &good, 403, || {
        secured.write("policy.toml", "");
    });
    assert!(denied.body.contains("prometheus may not get /metrics"), "{denied:?}");

    secured.write("policy.toml", POLICY);
    wait_until("the policy is in force", || {
        let answer = client(&secured.ca, Some(&good)).get(beyond(&secured.server), "/metrics", &[]);
        (answer.expect("answered").status == 200).then_some(())
    });
    let untrusted = asked_until(&secured, &good, 401, || {
        secured.write("ca.crt", &TestCa::new().pem);
    });
    assert!(untrusted.body.contains("not of the client CA any more"), "{untrusted:?}");
}

#[test]
fn with_neither_policy_nor_kubernetes_a_certificate_is_enough() {
    let secured = SecuredServer::start_without_policy(&BEYOND);
    let to = beyond(&secured.server);
    let anybody = client(&secured.ca, Some(&secured.ca.sign("anybody", &[])));
    let joined = client(&secured.ca, Some(&secured.ca.sign("gangplank:registrant:0123456789abcdef", &[])));
    for (path, open) in pages() {
        let status = |who: &HttpsClient| who.get(to, &path, &[]).expect("answered").status;
        assert_eq!(status(&anybody), if path.ends_with("/web") { 404 } else { 200 }, "{path}");
        assert_eq!(status(&joined), if open { 200 } else { 403 }, "{path}");
        assert_eq!(status(&client(&secured.ca, None)), if open { 200 } else { 401 }, "{path}");
    }
}

#[test]
fn machine_that_joined_sees_no_page() {
    let server = Server::start_with(&[&joining::FLAGS[..], &BEYOND, &["--admin-host", "pages.example.com"]].concat());
    let machine = Machine::joined(&create_token(&server, &["-n", "shop", "--service", "web"]));
    let (cert, key) = (machine.file("client.crt"), machine.file("client.key"));
    let ca = std::fs::read_to_string(server.data_dir().join("ca.crt")).expect("a CA");
    let (joined, nobody) = (HttpsClient::new(&ca, Some((&cert, &key))), HttpsClient::new(&ca, None));
    let to = beyond(&server);
    for (path, open) in pages() {
        let (of_joined, of_nobody) = (joined.get(to, &path, &[]), nobody.get(to, &path, &[]));
        let (of_joined, of_nobody) = (of_joined.expect("answered"), of_nobody.expect("answered"));
        assert_eq!((of_joined.status, of_nobody.status), if open { (200, 200) } else { (403, 401) }, "{path}");
        assert!(open || of_joined.body.contains("its join token allows no pages"), "{of_joined:?}");
    }
    assert!(server.stderr().contains("only /livez and /readyz answer here"), "{}", server.stderr());

    let name = String::from_utf8(server.run(&["registrants", "ls", "-A", "-o", "name"]).stdout).expect("UTF-8");
    assert!(server.run(&["registrants", "revoke", name.trim()]).status.success());
    let revoked = joined.get(to, "/metrics", &[]).expect("answered");
    assert_challenged(&revoked, "revoked");
    assert!(revoked.body.contains("was revoked"), "{revoked:?}");
}

/// With a CA of its own and a policy: a machine sees the pages of a rule with its name, and of no other rule.
#[test]
fn machine_that_a_rule_names_sees_its_pages() {
    let files = tempfile::tempdir().expect("a directory");
    let everybody = "[[rule]]\nusers = ['*']\npaths = ['*']\n";
    let policy = super::flag_file(files.path(), "policy.toml", everybody);
    let more = ["--authorization-policy", &policy];
    let server = Server::start_with(&[&joining::FLAGS[..], &BEYOND, &more].concat());
    let [monitor, other] = std::array::from_fn(|_| Machine::joined(&create_token(&server, &["-n", "shop"])));
    let ca = std::fs::read_to_string(server.data_dir().join("ca.crt")).expect("a CA");
    let client = |of: &Machine| HttpsClient::new(&ca, Some((&of.file("client.crt"), &of.file("client.key"))));
    let (shown, other) = (client(&monitor), client(&other));
    let status = |who: &HttpsClient, path: &str| who.get(beyond(&server), path, &[]).expect("answered").status;
    for (path, open) in pages() {
        assert_eq!(status(&shown, &path), if open { 200 } else { 403 }, "{path}");
    }
    assert!(!server.stderr().contains("only /livez and /readyz answer here"), "{}", server.stderr());

    let config: serde_json::Value = serde_json::from_str(&monitor.file("client.json")).expect("JSON");
    let name = config["registrant"].as_str().expect("a name");
    super::flag_file(
        files.path(),
        "policy.toml",
        &format!("{everybody}\n[[rule]]\nusers = ['{name}']\npaths = ['/metrics']\n"),
    );
    wait_until("the policy is in force", || (status(&shown, "/metrics") == 200).then_some(()));
    for (path, open) in pages() {
        let seen = open || path == "/metrics";
        assert_eq!(
            (status(&shown, &path), status(&other, &path)),
            (if seen { 200 } else { 403 }, if open { 200 } else { 403 })
        );
    }
    assert!(server.run(&["registrants", "revoke", name]).status.success());
    assert_challenged(&shown.get(beyond(&server), "/metrics", &[]).expect("answered"), "revoked");
}

#[test]
fn plaintext_needs_rights_with_authorization_only() {
    let secured = SecuredServer::start_with_flags(POLICY, &["--authorization", "policy"]);
    for (path, open) in pages() {
        let (status, body) = http::get(secured.server.admin, &path);
        assert_eq!(status, if open { 200 } else { 403 }, "{path}: {body}");
        assert!(open || body.contains(&format!("gangplank:loopback may not get {path}")), "{body}");
    }
    secured.write("policy.toml", "[[rule]]\nusers = ['gangplank:loopback']\npaths = ['/metrics']\n");
    wait_until("the policy is in force", || (http::get(secured.server.admin, "/metrics").0 == 200).then_some(()));

    for insecure in ["--insecure", "--insecure=admin"] {
        let server = Server::start_with(&[&BEYOND[..], &[insecure]].concat());
        for (path, _) in pages() {
            let expected = if path.ends_with("/web") { 404 } else { 200 };
            assert_eq!(http::get(beyond(&server), &path).0, expected, "{insecure}: {path}");
        }
        assert!(server.stderr().contains("admin in plaintext, by --insecure"), "{}", server.stderr());
    }
}
