//! Machines that join: by one command, within their scope, until they are revoked; and what is tried without a token.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use gangplank::{
    grpc::proto::{
        gangplank::join::v1::{
            JoinRequest, RenewRequest, Scope, joining_client::JoiningClient, registrants_client::RegistrantsClient,
        },
        registry::service_registry_client::ServiceRegistryClient,
    },
    identity::joining::{JoinToken, Secret, TokenId, new_request},
    model::ServerAddress,
};
use tempfile::TempDir;
use tonic::{
    Code,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use super::matrix::{END_TIMEOUT, register_and_stay};
use crate::support::{
    http, secrets,
    server::{BINARY, Process, Server},
    wait_until,
};

/// Beside loopback, where the tests connect.
pub(super) const FLAGS: [&str; 4] = ["--grpc-listen", "0.0.0.0:0", "--advertise", "localhost"];

/// A machine with a configuration directory and nothing else.
pub(crate) struct Machine(pub(super) TempDir);

impl Machine {
    pub(super) fn new() -> Self {
        Self(TempDir::new().expect("a directory"))
    }

    pub(super) fn command(&self) -> Command {
        let mut command = Command::new(BINARY);
        command.env_clear().env("GANGPLANK_CONFIG_DIR", self.0.path()).stdin(Stdio::null());
        command
    }

    pub(super) fn run(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().expect("the binary can be run")
    }

    /// Runs what must succeed, and returns what it prints.
    pub(crate) fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// Runs what must fail, and returns what it says.
    pub(super) fn fail(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(!output.status.success(), "{arguments:?}: {output:?}");
        let said = String::from_utf8(output.stderr).expect("UTF-8");
        secrets::assert_none_in("what a command says", &said);
        said
    }

    pub(crate) fn joined(token: &str) -> Self {
        let machine = Self::new();
        machine.succeed(&["join", token, "--no-timer"]);
        secrets::remember(&machine.file("client.key"));
        machine
    }

    pub(super) fn file(&self, name: &str) -> String {
        fs::read_to_string(self.0.path().join(name)).expect("a file")
    }

    pub(super) fn tls(&self) -> ClientTlsConfig {
        let identity = Identity::from_pem(self.file("client.crt"), self.file("client.key"));
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(self.file("server-ca.crt"))).identity(identity)
    }
}

/// What an operator on the server's machine types. Returns the token alone.
pub(super) fn create_token(server: &Server, arguments: &[&str]) -> String {
    token_of(&server.run(&[&["token", "create"], arguments].concat()))
}

/// The token that `token create` has printed.
pub(super) fn token_of(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    let line = String::from_utf8_lossy(&output.stdout);
    let token = line.trim().strip_prefix("gangplank join ").expect("one command").to_owned();
    secrets::remember(&token);
    secrets::remember_bytes(token.parse::<JoinToken>().expect("a token").secret.expose());
    token
}

async fn connect(server: &Server, tls: ClientTlsConfig) -> Channel {
    connect_to(server.grpc, tls).await
}

pub(super) async fn connect_to(server: SocketAddr, tls: ClientTlsConfig) -> Channel {
    let url = format!("https://localhost:{}", server.port());
    let endpoint = Endpoint::from_shared(url).expect("a URL").tls_config(tls).expect("valid");
    endpoint.connect().await.expect("a handshake")
}

/// A connection that shows nothing.
async fn stranger(server: &Server) -> Channel {
    let ca = fs::read_to_string(server.data_dir().join("ca.crt")).expect("a CA");
    connect(server, ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca))).await
}

fn requests(server: &Server, result: &str) -> u64 {
    let metrics = http::get(server.admin, "/metrics").1;
    let prefix = format!("gangplank_join_requests_total{{result=\"{result}\"}} ");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&prefix));
    line.expect("a metric").parse().expect("a number")
}

#[test]
fn machine_that_joined_registers_without_flags_within_its_scope() {
    let server = Server::start_with(&FLAGS);
    let token = create_token(&server, &["-n", "shop", "--service", "web"]);
    let machine = Machine::new();
    let said = machine.succeed(&["join", &token]);
    assert!(said.contains("joined https://localhost:") && said.contains("for shop/web"), "{said}");
    // Systemd does not run where the tests do, and the command says so.
    assert!(said.contains("gangplank-renew.timer") || said.contains("gangplank renew"), "{said}");
    for file in ["client.key", "client.crt", "server-ca.crt", "client.json"] {
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &fs::metadata(machine.0.path().join(file)).expect("there").permissions(),
        );
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    machine.succeed(&["register", "web", "10.1.0.1", "--port", "80"]);
    assert!(machine.succeed(&["ls", "web"]).contains("10.1.0.1"));
    for (arguments, why) in [
        (&["register", "api", "10.1.0.1"][..], "may not create instances of shop/api"),
        (&["register", "other/web", "10.1.0.1"], "may not create instances of other/web"),
        (&["ls"], "may not list instances of the namespace shop"),
        (&["token", "create"], "may not create tokens of the namespace shop"),
        (&["registrants", "ls"], "may not list registrants"),
    ] {
        let said = machine.fail(arguments);
        assert!(said.contains(why), "{arguments:?}: {said}");
    }
    machine.succeed(&["deregister", "web", "10.1.0.1"]);
    let again = Machine::new().fail(&["join", &token]);
    assert!(again.contains("the token was used already"), "{again}");

    let listed = String::from_utf8(server.run(&["token", "ls", "-A"]).stdout).expect("UTF-8");
    assert!(listed.contains("shop/web") && listed.contains("1/1"), "{listed}");
    let registrants = String::from_utf8(server.run(&["registrants", "ls", "-n", "shop"]).stdout).expect("UTF-8");
    assert!(registrants.contains("gangplank:registrant:"), "{registrants}");
    let log = server.stderr();
    secrets::remember(&machine.file("client.key"));
    assert!(log.contains("joined") && log.contains("created a join token"), "{log}");
}

#[test]
fn policy_does_not_widen_the_scope_and_says_who_creates_tokens() {
    let files = TempDir::new().expect("a directory");
    let policy = files.path().join("policy.toml");
    let text = "[[rule]]\nusers = ['*']\nnamespaces = ['*']\nverbs = ['*']\n";
    fs::write(&policy, text).expect("written");
    let policy_file = policy.to_str().expect("UTF-8");
    let flags = [&FLAGS[..], &["--authorization-policy", policy_file]].concat();
    let server = Server::start_with(&flags);
    let machine = Machine::joined(&create_token(&server, &["-n", "shop", "--address", "own,10.1.0.0/16"]));
    machine.succeed(&["register", "any", "10.1.0.1"]);
    assert!(machine.fail(&["register", "any", "10.2.0.1"]).contains("may not register the address 10.2.0.1"));
    assert!(machine.fail(&["register", "other/web", "10.1.0.1"]).contains("its join token does not allow it"));

    // With the policy for plaintext, too, an operator over loopback needs a rule about tokens.
    let mut flags: Vec<String> = flags.into_iter().map(str::to_owned).collect();
    flags.extend(["--authorization".into(), "policy".into()]);
    let server = Server::start_on(server.into_data(), flags);
    let refused = server.run(&["token", "create", "-n", "shop"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("gangplank:loopback may not create tokens of the namespace shop"), "{said}");
    let more = "[[rule]]\nusers = ['gangplank:loopback']\nnamespaces = ['shop']\nverbs = ['create', 'get']\n\
                resources = ['tokens', 'instances']\n";
    fs::write(&policy, more).expect("written");
    wait_until("the policy is in force", || {
        server.run(&["token", "create", "-n", "shop", "--verb", "get"]).status.success().then_some(())
    });
    let escalated = server.run(&["token", "create", "-n", "shop", "--verb", "delete"]);
    let said = String::from_utf8_lossy(&escalated.stderr).into_owned();
    assert!(
        said.contains("may not delete instances of the namespace shop"),
        "nobody gives more than they have: {said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_registrant_loses_its_streams_and_comes_back_by_no_way() {
    let server = Server::start_with(&FLAGS);
    let machine = Machine::joined(&create_token(&server, &["-n", "shop", "--service", "web"]));
    let mut answers = register_and_stay(connect(&server, machine.tls()).await, "shop", "10.1.0.7").await;
    assert_eq!(answers.message().await.expect("a good stream").expect("one answer").status, 201);

    let name = String::from_utf8(server.run(&["registrants", "ls", "-A", "-o", "name"]).stdout).expect("UTF-8");
    assert!(server.run(&["registrants", "revoke", name.trim()]).status.success());
    let begun = Instant::now();
    let ended = tokio::time::timeout(2 * END_TIMEOUT, answers.message()).await.expect("it ends");
    println!("from the revocation to the end of the stream: {:?}", begun.elapsed());
    assert!(begun.elapsed() < END_TIMEOUT, "after {:?}", begun.elapsed());
    let ended = ended.expect_err("no more answers");
    assert!(ended.code() == Code::Unauthenticated && ended.message().contains("was revoked"), "{ended}");

    assert!(machine.fail(&["register", "web", "10.1.0.8"]).contains("was revoked"));
    assert!(machine.fail(&["renew", "--now"]).contains("the registrant was revoked"));
    let server = server.restart();
    let mut registry = ServiceRegistryClient::new(connect(&server, machine.tls()).await);
    let refused = registry.register(gangplank::grpc::proto::registry::ServiceInfo::default()).await;
    assert_eq!(refused.expect_err("after a restart, too").code(), Code::Unauthenticated);
}

#[test]
fn secret_is_told_to_no_server_but_that_of_the_token() {
    let (server, thief) = (Server::start_with(&FLAGS), Server::start_with(&FLAGS));
    let token: JoinToken = create_token(&server, &["-n", "shop"]).parse().expect("a token");
    let led_astray = JoinToken { addresses: vec![localhost(&thief)], ..token.clone() };
    let machine = Machine::new();
    let said = machine.fail(&["join", &led_astray.to_string()]);
    assert!(said.contains("its secret was not told") && said.contains("UnknownIssuer"), "{said}");
    for result in ["joined", "unknown_token", "invalid_request"] {
        assert_eq!(requests(&thief, result), 0, "{result}");
    }
    // A server that cannot be reached is passed over.
    let mut both = token;
    both.addresses = vec![ServerAddress::parse("localhost:1", 1).expect("an address"), localhost(&server)];
    machine.succeed(&["join", &both.to_string(), "--no-timer"]);
    let mut mistyped = both.to_string();
    let other = if mistyped.pop() == Some('A') { 'B' } else { 'A' };
    mistyped.push(other);
    let typo = machine.fail(&["join", &mistyped]);
    assert!(typo.contains("the token is not whole, or mistyped"), "{typo}");
}

fn localhost(server: &Server) -> ServerAddress {
    ServerAddress::parse("localhost", server.grpc.port()).expect("an address")
}

/// A server whose clock is so many hours behind, on which a machine joins; then the same with the right clock.
fn joined_hours_ago(hours: i64) -> (Server, Machine) {
    let data = TempDir::new().expect("a directory");
    let past = Process::serve_with_clock(-hours * 3_600_000, data.path(), &FLAGS);
    let (_, [grpc, ..]) = past.ready();
    let mut command = Command::new(BINARY);
    command.args(["token", "create", "-n", "shop"]).env("GANGPLANK_SERVER", format!("http://{grpc}"));
    let created = command.output().expect("the binary can be run");
    let line = String::from_utf8(created.stdout).expect("UTF-8");
    let machine = Machine::joined(line.trim().strip_prefix("gangplank join ").expect("a command"));
    drop(past);
    let server = Server::start_on(data, FLAGS.map(str::to_owned).to_vec());
    let config: serde_json::Value = serde_json::from_str(&machine.file("client.json")).expect("JSON");
    let old = config["servers"][0].as_str().expect("a URL").to_owned();
    let moved = machine.file("client.json").replace(&old, &format!("https://{}", localhost(&server)));
    fs::write(machine.0.path().join("client.json"), moved).expect("written");
    (server, machine)
}

#[test]
fn command_renews_a_certificate_past_two_thirds_of_its_life() {
    let (server, machine) = joined_hours_ago(17);
    let (old, key) = (machine.file("client.crt"), machine.file("client.key"));
    machine.succeed(&["register", "web", "10.1.0.1"]);
    let renewed = machine.file("client.crt");
    assert!(renewed != old && machine.file("client.key") == key);
    assert_eq!(requests(&server, "renewed"), 1);
    machine.succeed(&["register", "web", "10.1.0.2"]);
    assert_eq!(machine.file("client.crt"), renewed, "not again before it is due");
    assert!(machine.succeed(&["renew"]).contains("not due"));
}

#[test]
fn certificate_that_expired_this_week_is_renewed_and_an_older_one_is_not() {
    let (server, machine) = joined_hours_ago(24 * 7);
    machine.succeed(&["register", "web", "10.1.0.1"]);
    assert_eq!(requests(&server, "renewed"), 1);

    let (server, machine) = joined_hours_ago(24 * 8 + 1);
    let said = machine.fail(&["register", "web", "10.1.0.1"]);
    assert!(said.contains("the certificate has expired, and could not be renewed"), "{said}");
    assert_eq!(requests(&server, "renewed"), 0);
    assert_eq!(requests(&server, "expired_certificate"), 1);
    // With a new token it is the same machine, and what it registered is still its own.
    let name = machine.file("client.json");
    machine.succeed(&["join", &create_token(&server, &["-n", "shop"]), "--no-timer"]);
    assert!(name.lines().any(|line| line.contains("registrant") && machine.file("client.json").contains(line)));
    machine.succeed(&["register", "web", "10.1.0.1"]);
}

#[test]
fn replaced_ca_accepts_no_certificate_of_the_old_one() {
    let server = Server::start_with(&FLAGS);
    let machine = Machine::joined(&create_token(&server, &["-n", "shop"]));
    let (key, data) = (machine.file("client.key"), server.into_data());
    for file in ["ca.key", "ca.crt", "registrants.json"] {
        fs::remove_file(data.path().join(file)).expect("removed");
    }
    let server = Server::start_on(data, FLAGS.map(str::to_owned).to_vec());
    // Neither trusts the other.
    let url = format!("https://{}", localhost(&server));
    assert!(machine.fail(&["register", "web", "10.1.0.1", "--server", &url]).contains("UnknownIssuer"));
    let new_ca = server.data_dir().join("ca.crt");
    let files = ["--cacert", new_ca.to_str().expect("UTF-8"), "--cert", "client.crt", "--key", "client.key"];
    let shown = machine
        .command()
        .current_dir(machine.0.path())
        .args(["ls", "-n", "shop", "--server", &url])
        .args(files)
        .output();
    assert!(!shown.expect("the binary can be run").status.success(), "a certificate of the old CA");
    let token = create_token(&server, &["-n", "shop"]);
    machine.succeed(&["join", &token, "--no-timer"]);
    machine.succeed(&["register", "web", "10.1.0.1"]);
    assert!(machine.file("client.key") != key, "a new key");

    // What somebody else has put there stays.
    let other = Machine::new();
    fs::write(other.0.path().join("client.key"), "of somebody else").expect("written");
    let said = other.fail(&["join", &token, "--no-timer"]);
    assert!(said.contains("client.key: is not of `gangplank join`"), "{said}");
}

pub(super) fn join_request(token: &JoinToken, request: Vec<u8>) -> JoinRequest {
    JoinRequest {
        token_id: token.id.to_string(),
        secret: token.secret.expose().to_vec(),
        certificate_request: request,
        host: "vm".into(),
        ..JoinRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_tried_without_a_token_is_refused_counted_and_bounded() {
    let server = Server::start_with(&FLAGS);
    let token: JoinToken = create_token(&server, &["-n", "shop"]).parse().expect("a token");
    let (_, request) = new_request().expect("a key");
    let mut joining = JoiningClient::new(stranger(&server).await);
    let good = join_request(&token, request.clone());
    let other_id = TokenId::generate().to_string();
    for (message, code, counted) in [
        (JoinRequest::default(), Code::Unauthenticated, "unknown_token"),
        (
            JoinRequest { secret: Secret::generate().expose().to_vec(), ..good.clone() },
            Code::Unauthenticated,
            "unknown_token",
        ),
        (JoinRequest { token_id: other_id, ..good.clone() }, Code::Unauthenticated, "unknown_token"),
        (
            JoinRequest { certificate_request: b"junk".to_vec(), ..good.clone() },
            Code::InvalidArgument,
            "invalid_request",
        ),
        (JoinRequest { certificate_request: vec![0; 9000], ..good.clone() }, Code::InvalidArgument, "invalid_request"),
        (JoinRequest { host: "x".repeat(254), ..good.clone() }, Code::InvalidArgument, "invalid_request"),
    ] {
        let before = requests(&server, counted);
        let refused = joining.join(message).await.expect_err(counted);
        assert_eq!((refused.code(), requests(&server, counted)), (code, before + 1), "{refused}");
    }
    // Larger than a message may be.
    let refused = joining.join(JoinRequest { certificate_request: vec![0; 100_000], ..good.clone() }).await;
    assert_eq!(refused.expect_err("too large").code(), Code::OutOfRange);
    let refused = joining.renew(RenewRequest { certificate: vec![0x30; 100], certificate_request: request }).await;
    assert_eq!(refused.expect_err("no certificate").code(), Code::Unauthenticated);
    // Whoever has no identity creates no token.
    let scope = Some(Scope { namespace: "shop".into(), ..Scope::default() });
    let create = gangplank::grpc::proto::gangplank::join::v1::CreateTokenRequest { scope, ..Default::default() };
    let refused = RegistrantsClient::new(stranger(&server).await).create_token(create).await;
    assert_eq!(refused.expect_err("no identity").code(), Code::Unauthenticated);

    // A flood: beyond its burst an address waits, and nothing of the token is used.
    let mut limited = 0;
    for _ in 0..300 {
        let refused = joining.join(JoinRequest::default()).await.expect_err("no token");
        limited += u32::from(refused.code() == Code::ResourceExhausted);
    }
    assert!(limited > 0 && requests(&server, "rate_limited") == u64::from(limited), "{limited}");
    let joined = loop {
        match joining.join(good.clone()).await {
            Err(refused) if refused.code() == Code::ResourceExhausted => tokio::task::yield_now().await,
            joined => break joined,
        }
    };
    assert!(joined.expect("its one use is still there").into_inner().registrant.starts_with("gangplank:registrant:"));
    let log = server.stderr();
    assert!(log.contains("refused: it did not join or renew") && log.contains("peer=127.0.0.1"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_without_an_identity_that_say_nothing_are_few_and_end() {
    let server = Server::start_with(&FLAGS);
    let silent = async |channel: Channel| {
        let mut grpc = tonic::client::Grpc::new(channel);
        grpc.ready().await.expect("connected");
        let path = tonic::codegen::http::uri::PathAndQuery::from_static("/gangplank.join.v1.Joining/Join");
        let nothing = futures::stream::pending::<JoinRequest>();
        let codec =
            tonic_prost::ProstCodec::<JoinRequest, gangplank::grpc::proto::gangplank::join::v1::JoinResponse>::default(
            );
        grpc.client_streaming(tonic::Request::new(nothing), path, codec).await.expect_err("nothing was said").code()
    };
    let channel = stranger(&server).await;
    let begun = Instant::now();
    let codes = futures::future::join_all((0..80).map(|_| silent(channel.clone()))).await;
    let of = |code| codes.iter().filter(|one| **one == code).count();
    assert_eq!((of(Code::ResourceExhausted), of(Code::DeadlineExceeded)), (64, 16), "{codes:?}");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    server.register("shop", "web", "10.1.0.1", "80");
}

#[test]
fn server_without_a_ca_of_its_own_says_so() {
    let server = Server::start();
    let refused = server.run(&["token", "create"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("this server has no CA of its own"), "{refused:?}");
    assert!(!Path::new(&server.data_dir().join("ca.key")).exists());
    let machine = Machine::new();
    assert_eq!(machine.run(&["renew"]).status.code(), Some(3));
    assert!(machine.fail(&["join", "gp1.junk"]).contains("the token is not whole"));
}

#[test]
fn expired_and_revoked_tokens_are_refused() {
    let server = Server::start_with(&FLAGS);
    let token = create_token(&server, &["-n", "shop", "--ttl", "1s", "--uses", "1000"]);
    wait_until("the token expires", || {
        let output = Machine::new().run(&["join", &token, "--no-timer"]);
        String::from_utf8_lossy(&output.stderr).contains("the token has expired").then_some(())
    });
    let token = create_token(&server, &["-n", "shop"]);
    let id = token.parse::<JoinToken>().expect("a token").id.to_string();
    assert!(server.run(&["token", "revoke", &id]).status.success());
    assert!(Machine::new().fail(&["join", &token]).contains("the token is unknown"));
    assert!(!server.run(&["token", "revoke", &id]).status.success(), "there is none any more");
}
