//! Machines join a server that has a certificate of the operator's own CA: they trust that, and gangplank signs for them.

use std::{fs, time::Instant};

use gangplank::{
    grpc::proto::registry::{ServiceInfo, service_registry_client::ServiceRegistryClient},
    identity::joining::JoinToken,
    model::ServerAddress,
};
use tempfile::TempDir;
use tonic::{
    Code,
    transport::{Certificate, Channel, ClientTlsConfig},
};

use super::{
    Credential, POLICY, SecuredServer, TestCa, flag_file,
    joining::{Machine, connect_to, create_token},
    matrix::{END_TIMEOUT, register_and_stay},
    security_flags,
};
use crate::support::{
    secrets,
    server::{Process, Server},
    wait_until,
};

/// A server whose CA signs for servers and for clients, and which machines join too.
pub(super) fn start(policy: &str) -> SecuredServer {
    let (ca, files) = (TestCa::new(), tempfile::tempdir().expect("a directory"));
    let mut flags = security_flags(&ca, files.path(), policy);
    flags.extend(["--tls-server-ca".into(), flag_file(files.path(), "server-ca.crt", &ca.pem)]);
    flags.extend(super::joining::FLAGS.map(str::to_owned));
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    SecuredServer { server: Server::start_with(&flags), ca, files }
}

fn tls(ca: &str, credential: &Credential) -> ClientTlsConfig {
    secrets::remember(&credential.key);
    ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)).identity(credential.identity())
}

pub(super) async fn registered(channel: Channel) -> Result<u32, Code> {
    let info = ServiceInfo {
        namespace: "shop".into(),
        service_name: "web".into(),
        ipaddress: "10.1.0.1".into(),
        ..ServiceInfo::default()
    };
    let answered = ServiceRegistryClient::new(channel).register(info).await;
    answered.map(|answer| answer.into_inner().status).map_err(|status| status.code())
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_joins_a_server_of_the_operators_ca_and_keeps_its_scope() {
    // A rule for everybody is none for who joined.
    let everybody = "\n[[rule]]\nusers = ['*']\nnamespaces = ['other']\nverbs = ['*']\n";
    let secured = start(&format!("{POLICY}{everybody}"));
    let server = &secured.server;
    let machine = Machine::joined(&create_token(server, &["-n", "shop", "--service", "web"]));
    assert_eq!(machine.file("server-ca.crt"), secured.ca.pem);
    machine.succeed(&["register", "web", "10.1.0.1"]);
    for service in ["shop/api", "other/web"] {
        assert!(machine.fail(&["register", service, "10.1.0.1"]).contains("its join token does not allow it"));
    }
    machine.succeed(&["renew", "--now"]);

    // Those of the client CA stay who they are, and none of them is a machine that joined.
    let name = String::from_utf8(server.run(&["registrants", "ls", "-A", "-o", "name"]).stdout).expect("UTF-8");
    let shown = async |credential: &Credential| {
        registered(connect_to(server.grpc, tls(&secured.ca.pem, credential)).await).await
    };
    assert_eq!(shown(&secured.ca.sign("vm-1", &[])).await, Ok(409), "the instance is the machine's");
    assert_eq!(shown(&secured.ca.sign("vm-2", &[])).await, Ok(403));
    for joined in [name.trim(), "gangplank:registrant:000000000000"] {
        assert_eq!(shown(&secured.ca.sign(joined, &[])).await, Err(Code::Unauthenticated), "{joined}");
    }
    // Whoever has stolen the key that signs for machines is none of the others: neither a client, nor the server.
    let read = |name: &str| fs::read_to_string(server.data_dir().join(name)).expect("a file");
    secrets::remember(&read("ca.key"));
    let own = TestCa::stolen(&read("ca.crt"), &read("ca.key"));
    for (user, groups) in [("vm-1", &[][..]), ("gangplank", &[]), ("ada", &["ops"]), ("gangplank:registrant:0", &[])] {
        assert_eq!(shown(&own.sign(user, groups)).await, Err(Code::Unauthenticated), "{user}");
    }

    let mut answers = register_and_stay(connect_to(server.grpc, machine.tls()).await, "shop", "10.1.0.7").await;
    assert_eq!(answers.message().await.expect("a good stream").expect("one answer").status, 201);
    assert!(server.run(&["registrants", "revoke", name.trim()]).status.success());
    let begun = Instant::now();
    let ended = tokio::time::timeout(2 * END_TIMEOUT, answers.message()).await.expect("it ends");
    assert!(ended.expect_err("no more answers").message().contains("was revoked"));
    assert!(begun.elapsed() < END_TIMEOUT, "after {:?}", begun.elapsed());
    assert!(machine.fail(&["renew", "--now"]).contains("was revoked"));
}

#[test]
fn secret_is_told_to_no_server_of_another_ca_or_name() {
    let (secured, thief) = (start(POLICY), start(POLICY));
    let token: JoinToken = create_token(&secured.server, &["-n", "shop"]).parse().expect("a token");
    let led = |to: &str, server: &SecuredServer| {
        let address = ServerAddress::parse(to, server.server.grpc.port()).expect("an address");
        JoinToken { addresses: vec![address], ..token.clone() }.to_string()
    };
    let said = Machine::new().fail(&["join", &led("localhost", &thief)]);
    assert!(said.contains("its secret was not told") && said.contains("UnknownIssuer"), "{said}");
    assert!(!thief.server.stderr().contains("it did not join"), "it was not asked");
    // The certificate is for localhost.
    let said = Machine::new().fail(&["join", &led("127.0.0.1", &secured)]);
    assert!(said.contains("its secret was not told") && said.contains("not valid for name"), "{said}");
    Machine::joined(&led("localhost", &secured)).succeed(&["register", "web", "10.1.0.1"]);
}

/// As `docs/joining.md` says it.
#[test]
fn ca_of_the_server_is_replaced_and_its_machines_go_on() {
    let secured = start(POLICY);
    let machine = Machine::joined(&create_token(&secured.server, &["-n", "shop"]));
    let next = TestCa::new();
    let mut changes = 0;
    let mut wait_for_change = || {
        changes += 1;
        wait_until("the files are read", || {
            let said = secured.server.stderr();
            (said.matches("the certificate, the key or the client CA has changed").count() >= changes).then_some(())
        });
    };
    // 1. The next one beside it: machines hear of it when they renew.
    let both = format!("{}{}", secured.ca.pem, next.pem);
    secured.write("server-ca.crt", &both);
    wait_for_change();
    machine.succeed(&["renew", "--now"]);
    assert_eq!(machine.file("server-ca.crt"), both);
    // 2. The certificate of the next one. One without its key, which is half of the change, changes nothing.
    let served = next.sign("gangplank", &[]);
    secured.write("server.crt", &served.cert);
    secured.write("server.key", &served.key);
    wait_for_change();
    machine.succeed(&["register", "web", "10.1.0.1"]);
    // A token names the next one, and who has an older token goes without.
    let token: JoinToken = create_token(&secured.server, &["-n", "shop"]).parse().expect("a token");
    assert_ne!(token.ca, hash_of(&secured));
    Machine::joined(&token.to_string());
    // 3. The old one is taken out.
    secured.write("server-ca.crt", &next.pem);
    wait_for_change();
    machine.succeed(&["renew", "--now"]);
    assert_eq!(machine.file("server-ca.crt"), next.pem);
    machine.succeed(&["register", "web", "10.1.0.2"]);
}

/// The hash by which a token names the CA that the server began with.
fn hash_of(secured: &SecuredServer) -> [u8; 32] {
    use sha2::Digest as _;
    let (_, pem) = x509_parser::pem::parse_x509_pem(secured.ca.pem.as_bytes()).expect("PEM");
    let certificate = pem.parse_x509().expect("a certificate");
    sha2::Sha256::digest(certificate.public_key().raw).into()
}

#[test]
fn what_would_not_work_is_refused_with_the_reason() {
    // Nobody joins without the flag, and it says which.
    let secured = SecuredServer::start();
    let refused = secured.server.run(&["token", "create"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("--tls-cert without --tls-server-ca"), "{said}");
    assert!(!secured.server.data_dir().join("ca.key").exists());

    let (ca, files) = (TestCa::new(), TempDir::new().expect("a directory"));
    let mut flags = security_flags(&ca, files.path(), POLICY);
    flags.extend(["--tls-server-ca".into(), flag_file(files.path(), "server-ca.crt", &ca.pem)]);
    // Machines would not believe it.
    let elsewhere = [&flags[..], &["--advertise".into(), "other.example.com".into()]].concat();
    let server = Server::start_on(TempDir::new().expect("a directory"), elsewhere);
    let refused = server.run(&["token", "create"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("its certificate is not for other.example.com") && said.contains("--advertise"), "{said}");

    flag_file(files.path(), "server-ca.crt", &TestCa::new().pem);
    let data = TempDir::new().expect("a directory");
    let mut process = Process::serve(data.path(), &flags);
    assert!(!process.exit().success());
    wait_until("it says why", || process.stderr().contains("none of its CAs has signed").then_some(()));
}

/// Without `--tls-client-ca` and without a policy: what machines may do, their tokens say.
#[tokio::test(flavor = "multi_thread")]
async fn server_for_machines_that_join_alone_needs_no_policy() {
    let (ca, files) = (TestCa::new(), TempDir::new().expect("a directory"));
    let served = ca.sign("gangplank", &[]);
    let flags = [
        ["--tls-cert".to_owned(), flag_file(files.path(), "server.crt", &served.cert)],
        ["--tls-key".to_owned(), flag_file(files.path(), "server.key", &served.key)],
        ["--tls-server-ca".to_owned(), flag_file(files.path(), "server-ca.crt", &ca.pem)],
        super::joining::FLAGS.map(str::to_owned)[..2].to_vec().try_into().expect("two"),
        super::joining::FLAGS.map(str::to_owned)[2..].to_vec().try_into().expect("two"),
    ]
    .concat();
    let server = Server::start_on(TempDir::new().expect("a directory"), flags);
    let machine = Machine::joined(&create_token(&server, &["-n", "shop"]));
    machine.succeed(&["register", "web", "10.1.0.1"]);
    // The operator's CA signs for the server only: it makes no clients.
    let answered = connect_to_or_refused(&server, &ca).await;
    assert!(answered.is_err(), "{answered:?}");
}

/// What a client of the server's own CA is answered.
async fn connect_to_or_refused(server: &Server, ca: &TestCa) -> Result<u32, String> {
    let channel = super::connect(server.grpc, ca, Some(&ca.sign("vm-1", &[]))).await.map_err(|err| err.to_string())?;
    registered(channel).await.map_err(|code| code.to_string())
}
