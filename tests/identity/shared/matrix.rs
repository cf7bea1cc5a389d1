//! Every call and every page of two processes with a shared CA, with every kind of certificate that there is; and after that not
//! one token, secret or key in anything that they have said.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use gangplank::{
    grpc::proto::registry::{RegistrationMsg, service_registry_client::ServiceRegistryClient},
    identity::joining::JoinToken,
};
use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Identity},
};

use super::{Machine, Replica, Shared, decoded, empty, names};
use crate::{
    identity::{
        Credential, TestCa,
        admin::{BEYOND, assert_challenged, pages},
        joining::connect_to,
        matrix::{CALLS, END_TIMEOUT, Without, call_with, request},
    },
    support::{http, https::HttpsClient, secrets, server::Process, wait_until},
};

/// Who scrapes, by a token; and a machine that joined, as RBAC would let it.
const SCRAPER: &str = include_str!("../../../deploy/metrics-reader.yaml");

/// The subject of the binding in [`SCRAPER`].
const SUBJECT: &str = "  - kind: ServiceAccount\n    name: prometheus\n    namespace: monitoring";

/// A replica that also shows its pages beyond loopback, and says all that it can.
struct Talkative {
    replica: Replica,
    pages: SocketAddr,
}

impl Talkative {
    fn start(shared: &Shared) -> Self {
        let data = empty();
        let mut flags = shared.flags(&shared.kubeconfig);
        flags.extend(BEYOND.map(str::to_owned));
        flags.extend(["--log".into(), "trace".into()]);
        let process = Process::serve(data.path(), &flags);
        let lines: Vec<String> = (0..5).map(|_| process.line()).collect();
        let at = |what: &str| -> Vec<SocketAddr> {
            let found = lines.iter().filter_map(|line| line.strip_prefix(&format!("listening {what} ")));
            found.map(|address| address.parse().expect("an address")).collect()
        };
        let loopback = |what: &str| *at(what).iter().find(|one| one.ip().is_loopback()).expect("it listens there");
        let (grpc, dns, admin) = (loopback("grpc"), loopback("dns"), loopback("admin"));
        let beyond = at("admin").into_iter().find(|one| !one.ip().is_loopback()).expect("it listens there");
        let pages = (Ipv4Addr::LOCALHOST, beyond.port()).into();
        let replica = Replica { process, grpc, dns, admin, data };
        replica.wait_until_ready();
        Self { replica, pages }
    }
}

/// A connection that shows a certificate; `None` if there is none.
async fn connected(replica: &Replica, ca: &str, shown: Option<(&str, &str)>) -> Channel {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca));
    let tls = match shown {
        Some((cert, key)) => tls.identity(Identity::from_pem(cert, key)),
        None => tls,
    };
    connect_to(replica.grpc, tls).await
}

/// Everything that was said by a refusal.
#[derive(Default)]
struct Said(String);

impl Said {
    fn note(&mut self, answered: &Result<Vec<u8>, Status>) {
        use std::fmt::Write as _;
        write!(self.0, "{answered:?}").expect("written");
        if let Err(status) = answered {
            write!(self.0, "{status} {:?}", status.metadata()).expect("written");
        }
    }
}

/// The names of all files below a directory.
fn paths(dir: &Path, found: &mut String) {
    for entry in fs::read_dir(dir).expect("a directory").flatten() {
        found.push_str(&entry.path().to_string_lossy());
        if entry.path().is_dir() {
            paths(&entry.path(), found);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_call_or_page_of_a_shared_ca_goes_round_its_rights_and_no_secret_is_told() {
    let Some(shared) = Shared::start("own-matrix") else { return };
    for namespace in ["own-matrix-shop", "elsewhere-matrix"] {
        shared.cluster.create_namespace(namespace);
    }
    let first = Talkative::start(&shared);
    first.replica.wait_until_it_writes();
    let servers = [first, Talkative::start(&shared)];
    let [writer, follower] = [&servers[0].replica, &servers[1].replica];
    let ca = shared.ca();
    let [secret] = &shared.secrets("ca")[..] else { panic!("one") };
    let ca_key = String::from_utf8(decoded(secret, "tls.key")).expect("PEM");

    // Who may do something, elsewhere; who was revoked; and whoever has stolen the key of the CA and joined nowhere.
    let joined = follower.joined(&["-n", "elsewhere-matrix", "--service", "web"]);
    let revoked = writer.joined(&["-n", "other"]);
    let unused = writer.create_token(&["-n", "other"]);
    let name = |machine: &Machine| {
        let config: serde_json::Value = serde_json::from_str(&machine.file("client.json")).expect("JSON");
        config["registrant"].as_str().expect("a name").to_owned()
    };
    wait_until("both are known", || (names(writer).len() == 2 && names(follower).len() == 2).then_some(()));
    follower.succeed(&["registrants", "revoke", &name(&revoked)]);
    secrets::remember(&ca_key);
    let own = TestCa::stolen(&ca, &ca_key);
    let forged = |user: &str| own.sign(user, &["system:masters"]);
    let of = |machine: &Machine| Credential { cert: machine.file("client.crt"), key: machine.file("client.key") };
    let (unknown, admin) = (forged("gangplank:registrant:000000000000"), forged("admin"));
    let strangers = [
        ("nobody", None),
        ("revoked", Some(of(&revoked))),
        ("of a name that did not join", Some(unknown)),
        ("of no machine", Some(admin)),
    ];
    let stranger = of(&joined);
    strangers.iter().filter_map(|(_, shown)| shown.as_ref()).for_each(|shown| secrets::remember(&shown.key));
    for replica in [writer, follower] {
        wait_until("the revocation is known", || revoked_at(&revoked, replica).then_some(()));
    }

    let mut said = Said::default();
    for replica in [writer, follower] {
        for (who, shown) in &strangers {
            for (path, _) in CALLS {
                let shown = shown.as_ref().map(|shown| (shown.cert.as_str(), shown.key.as_str()));
                // A connection whose identity has ended is closed after a while.
                let channel = connected(replica, &ca, shown).await;
                let answered = call_with(&channel, &[], path, request(path)).await;
                said.note(&answered);
                let refused = answered.expect_err(path);
                assert_eq!(refused.code(), Code::Unauthenticated, "{who}: {path}: {refused}");
            }
        }
        let channel = connected(replica, &ca, Some((&stranger.cert, &stranger.key))).await;
        for (path, without) in CALLS {
            let answered = call_with(&channel, &[], path, request(path)).await;
            said.note(&answered);
            match without {
                // Neither a token nor a certificate is in the message.
                Without::Open => assert_eq!(answered.expect_err(path).code(), Code::Unauthenticated, "{path}"),
                // The namespace in the message is another one's.
                without => without.check(path, answered),
            }
        }
        // In its own namespace it is bound to its service.
        let mut registry = ServiceRegistryClient::new(channel);
        for (service, status) in [("web", [201, 200, 503]), ("api", [403; 3])] {
            let message = RegistrationMsg {
                namespace: "elsewhere-matrix".into(),
                service_name: service.into(),
                ipaddress: "10.17.9.1".into(),
                ..RegistrationMsg::default()
            };
            let messages = futures::stream::iter([message]);
            let mut answers = registry.registration_event(messages).await.expect("answered").into_inner();
            let answer = answers.message().await.expect("a good stream").expect("an answer");
            assert!(status.contains(&answer.status), "{service}: {answer:?}");
        }
        // Not valid any more, or not yet, does not connect; nor does another CA of the same name and key.
        for (begin, end) in [(-7200, -3600), (3600, 7200)] {
            let Credential { cert, key } = own.sign_for(&name(&joined), &[], begin, end);
            secrets::remember(&key);
            let tls = ClientTlsConfig::new()
                .ca_certificate(Certificate::from_pem(&ca))
                .identity(Identity::from_pem(&cert, &key));
            let url = format!("https://localhost:{}", replica.grpc.port());
            let endpoint = tonic::transport::Endpoint::from_shared(url).expect("a URL").tls_config(tls).expect("valid");
            let refused = match endpoint.connect().await {
                Err(_) => true,
                Ok(channel) => call_with(&channel, &[], CALLS[0].0, request(CALLS[0].0)).await.is_err(),
            };
            assert!(refused, "valid from {begin} to {end}");
        }
    }
    assert_eq!(names(writer).len(), 2, "nobody joined");

    every_page_is_refused(&shared, &servers, &ca, &strangers, &joined, &name(&joined));

    // A stream ends when its registrant is revoked at the other process.
    let channel = connected(writer, &ca, Some((&stranger.cert, &stranger.key))).await;
    let answers = ServiceRegistryClient::new(channel).registration_event(futures::stream::pending()).await;
    let mut answers = answers.expect("answered").into_inner();
    follower.succeed(&["registrants", "revoke", &name(&joined)]);
    let ended = tokio::time::timeout(END_TIMEOUT, answers.message()).await.expect("it ends");
    said.note(&ended.map(|_| Vec::new()));

    no_secret_is_told(&servers, &unused, &said);
}

fn revoked_at(machine: &Machine, replica: &Replica) -> bool {
    super::lead(machine, &[replica.grpc]);
    let output = machine.run(&["ls", "web"]);
    String::from_utf8_lossy(&output.stderr).contains("was revoked")
}

/// Without rights, and with those that RBAC would give to who joined.
fn every_page_is_refused(
    shared: &Shared,
    servers: &[Talkative],
    ca: &str,
    strangers: &[(&str, Option<Credential>)],
    joined: &Machine,
    name: &str,
) {
    let allowed = SCRAPER.replace(SUBJECT, &format!("  - kind: User\n    name: {name}"));
    shared.cluster.apply(&allowed.replace("gangplank-metrics-reader", "own-matrix-joined"));
    let account = SCRAPER.replace("namespace: monitoring", "namespace: own-matrix");
    shared.cluster.kubectl(&["create", "serviceaccount", "prometheus", "-n", "own-matrix"]);
    shared.cluster.apply(&account.replace("gangplank-metrics-reader", "own-matrix-account"));
    let token = ["create", "token", "prometheus", "-n", "own-matrix", "--audience", "gangplank"];
    let token = shared.cluster.kubectl(&token).trim().to_owned();
    secrets::remember(&token);
    let bearer = format!("Bearer {token}");
    for Talkative { pages: to, .. } in servers {
        let client = |shown: Option<&Credential>| {
            HttpsClient::new(ca, shown.map(|shown| (shown.cert.as_str(), shown.key.as_str())))
        };
        let (cert, key) = (joined.file("client.crt"), joined.file("client.key"));
        let of_joined = HttpsClient::new(ca, Some((&cert, &key)));
        for (path, open) in pages() {
            for (who, shown) in strangers {
                let answer = client(shown.as_ref()).get(*to, &path, &[]).expect("answered");
                if open {
                    assert!(is_shown(answer.status), "{who}: {path}: {answer:?}");
                } else {
                    assert_challenged(&answer, &format!("{who}: {path}"));
                }
                secrets::assert_none_in("a page", &format!("{answer:?}"));
            }
            let answer = of_joined.get(*to, &path, &[]).expect("answered");
            assert!(if open { is_shown(answer.status) } else { answer.status == 403 }, "{path}: {answer:?}");
            let scraped = client(None).get(*to, &path, &[("Authorization", &bearer)]).expect("answered");
            let may = open || ["/metrics", "/api/v1/replica", "/api/v1/status"].contains(&path.as_str());
            assert!(if may { is_shown(scraped.status) } else { scraped.status == 403 }, "{path}: {scraped:?}");
            secrets::assert_none_in("a page", &format!("{answer:?}{scraped:?}"));
        }
    }
}

/// One that follows is not ready for registrations, and says so to everybody.
fn is_shown(status: u16) -> bool {
    matches!(status, 200 | 503)
}

/// Looks for every token, secret and key that this test, and those that ran beside it, have used.
fn no_secret_is_told(servers: &[Talkative], token: &JoinToken, Said(refusals): &Said) {
    assert!(secrets::count() > 20, "what was used is known");
    for Talkative { replica, .. } in servers {
        let log = replica.log();
        assert!(log.contains("TRACE") && log.contains("was revoked"), "it has said all that it can");
        secrets::assert_none_in("a log", &log);
        for page in ["/metrics", "/api/v1/services", "/api/v1/replica", "/readyz"] {
            secrets::assert_none_in(page, &http::get(replica.admin, page).1);
        }
        let proc = Path::new("/proc").join(replica.process.pid().to_string());
        for file in ["cmdline", "environ", "comm"] {
            let text = fs::read(proc.join(file)).expect("it runs");
            secrets::assert_none_in(file, &String::from_utf8_lossy(&text));
        }
        let mut found = String::new();
        paths(replica.data.path(), &mut found);
        secrets::assert_none_in("the names of files", &found);
        for arguments in [&["token", "ls", "-A", "-o", "json"][..], &["registrants", "ls", "-A", "-o", "json"]] {
            let listed = replica.succeed(arguments);
            secrets::assert_none_in("a list", &listed);
        }
    }
    secrets::assert_none_in("a refusal", refusals);
    secrets::assert_none_in("Debug output", &format!("{token:?}"));
}
