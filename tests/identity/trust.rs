//! What a key, a CA or a file is tried for that it was not made for: to be somebody, or to be the server.

use std::{fs, sync::Arc};

use gangplank::{identity::joining::JoinToken, model::ServerAddress};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair,
    NameConstraints, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt as _, net::TcpListener, task::JoinSet};
use tonic::{
    Code,
    transport::{Certificate, ClientTlsConfig},
};

use super::{
    Credential, POLICY, SecuredServer, TestCa, flag_file,
    joining::{FLAGS, Machine, create_token},
    matrix::END_TIMEOUT,
    own_certificate::{registered, start},
    pki, security_flags,
    streams::{LongStream, end},
    tls_flags,
};
use crate::support::{
    secrets,
    server::{Process, Server},
    wait_until,
};

/// Who shows `credential` has no identity: the handshake fails, or the call.
async fn is_nobody(secured: &SecuredServer, credential: &Credential) -> bool {
    match secured.connect(Some(credential)).await {
        // TLS 1.3: the client's side may be complete before the server has refused.
        Ok(channel) => {
            matches!(
                registered(channel).await,
                Err(Code::Unauthenticated | Code::Unavailable | Code::Unknown | Code::Cancelled)
            )
        }
        Err(_) => true,
    }
}

/// A certificate for `user`, signed by the key of `by`, which is no CA.
fn signed_by_leaf(by: &Credential, user: &str) -> Credential {
    secrets::remember(&by.key);
    let key = KeyPair::from_pem(&by.key).expect("a key");
    let issuer = Issuer::from_ca_cert_pem(&by.cert, key).expect("a certificate");
    TestCa { pem: by.cert.clone(), issuer }.sign_with_chain(user, &[])
}

#[tokio::test(flavor = "multi_thread")]
async fn key_of_a_client_a_machine_or_the_server_signs_for_nobody() {
    let secured = start(POLICY);
    let machine = Machine::joined(&create_token(&secured.server, &["-n", "shop"]));
    let read = |name: &str| fs::read_to_string(secured.file(name)).expect("a file");
    for (whose, has) in [
        ("a client", secured.ca.sign("vm-2", &[])),
        ("a machine", Credential { cert: machine.file("client.crt"), key: machine.file("client.key") }),
        ("the server", Credential { cert: read("server.crt"), key: read("server.key") }),
    ] {
        assert!(is_nobody(&secured, &signed_by_leaf(&has, "vm-1")).await, "the key of {whose}");
    }
    assert!(!is_nobody(&secured, &secured.ca.sign("vm-1", &[])).await);
}

#[test]
fn file_with_a_certificate_that_is_no_ca_is_refused_with_its_name() {
    let (ca, files, data) = (TestCa::new(), TempDir::new().expect("a directory"), TempDir::new().expect("a directory"));
    let flags = security_flags(&ca, files.path(), POLICY);
    flag_file(files.path(), "ca.crt", &ca.sign("vm-1", &[]).cert);
    let mut process = Process::serve(data.path(), &flags);
    assert!(!process.exit().success());
    wait_until("it says why", || {
        let said = process.stderr();
        (said.contains("--tls-client-ca") && said.contains("CN=vm-1, which is not one of a CA")).then_some(())
    });
}

/// A bad version of a file leaves everything as it is; half of one, too.
#[tokio::test(flavor = "multi_thread")]
async fn invalid_file_changes_nobodys_trust() {
    let secured = start(POLICY);
    let vm = secured.ca.sign("vm-1", &[]);
    let mut stream = LongStream::open(&secured, &vm).await;
    let stolen = secured.ca.sign("vm-2", &[]);
    let half = |pem: &str| pem[..pem.len() / 2].to_owned();
    let other = TestCa::new();
    let mut errors = 0;
    // Each says something else than the one before: the same is logged once.
    for (file, good) in [("ca.crt", &secured.ca.pem), ("server-ca.crt", &secured.ca.pem)] {
        let bad = [String::new(), format!("{good}{}", half(&other.pem)), format!("{good}{}", stolen.cert), half(good)];
        for bad in bad {
            secured.write(file, &bad);
            errors += 1;
            wait_until("the invalid file is noticed", || {
                let said = secured.server.stderr();
                (said.matches("TLS: what has changed is invalid").count() >= errors).then_some(())
            });
            assert!(stream.say(&format!("10.1.0.{errors}")).await.is_ok_and(|status| status < 300));
            assert!(is_nobody(&secured, &signed_by_leaf(&stolen, "vm-1")).await);
            assert!(is_nobody(&secured, &other.sign("vm-1", &[])).await);
        }
        secured.write(file, good);
    }
    Machine::joined(&create_token(&secured.server, &["-n", "shop"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_ends_when_its_ca_expires() {
    let secured = SecuredServer::start();
    // Time enough for the server to read it and for the stream to begin.
    let short = TestCa::with(|params| params.not_after = pki::from_now(14).into());
    secured.write("ca.crt", &format!("{}{}", secured.ca.pem, short.pem));
    wait_until("both are taken", || secured.server.stderr().contains("the client CA has changed").then_some(()));
    let (of_short, of_long) = (short.sign("vm-1", &[]), secured.ca.sign("vm-1", &[]));
    let stream = LongStream::open(&secured, &of_short).await;
    let mut long = LongStream::open(&secured, &of_long).await;
    let ended = tokio::time::timeout(2 * END_TIMEOUT, end(stream.answers)).await.expect("it ends");
    let expected = "the client certificate is not of the client CA any more";
    assert_eq!((ended.code(), ended.message()), (Code::Unauthenticated, expected));
    assert!(secured.server.stderr().contains("CAs of clients have expired"));
    assert!(is_nobody(&secured, &of_short).await);
    assert_eq!(long.say("10.1.0.3").await.expect("the same stream"), 201);
}

/// What rustls does not understand is refused, and names of hosts say nothing about users.
#[tokio::test(flavor = "multi_thread")]
async fn name_constraints_do_not_let_more_names_in() {
    let secured = SecuredServer::start();
    let constrained = |permitted: Vec<GeneralSubtree>, excluded: Vec<GeneralSubtree>| {
        let constraints = NameConstraints { permitted_subtrees: permitted, excluded_subtrees: excluded };
        secured.ca.intermediate_with(|params| params.name_constraints = Some(constraints))
    };
    let directory = |name: &str| GeneralSubtree::DirectoryName(pki::name(name, &[]));
    for by in [constrained(vec![directory("vm-1")], vec![]), constrained(vec![], vec![directory("vm-2")])] {
        assert!(is_nobody(&secured, &by.sign_with_chain("vm-1", &[])).await);
    }
    let elsewhere = constrained(vec![GeneralSubtree::DnsName("example.com".into())], vec![]);
    assert!(is_nobody(&secured, &elsewhere.sign_with_chain("vm-1", &[])).await, "it is for localhost, too");
    let here = constrained(vec![GeneralSubtree::DnsName("localhost".into())], vec![]);
    assert!(!is_nobody(&secured, &here.sign_with_chain("vm-1", &[])).await);
    // Two intermediate CAs, of which the first may sign no other.
    let last = secured.ca.intermediate_with(|params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    let beyond = last.intermediate_with(|_| {}).sign_with_chain("vm-1", &[]);
    assert!(is_nobody(&secured, &Credential { cert: format!("{}{}", beyond.cert, last.pem), ..beyond }).await);
    // A CA that signs for servers signs for no clients.
    let servers = secured.ca.intermediate_with(|params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    assert!(is_nobody(&secured, &servers.sign_with_chain("vm-1", &[])).await);
}

/// The common name of a CA.
fn name_of(ca: &TestCa) -> String {
    let (_, pem) = x509_parser::pem::parse_x509_pem(ca.pem.as_bytes()).expect("PEM");
    let certificate = pem.parse_x509().expect("a certificate");
    let name = certificate.subject().iter_common_name().next().expect("a name");
    name.as_str().expect("UTF-8").to_owned()
}

/// What a CA of this name is made of.
fn named(name: &str) -> (CertificateParams, KeyPair) {
    let mut params = CertificateParams::default();
    params.distinguished_name = pki::name(name, &[]);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    (params, KeyPair::generate().expect("a key"))
}

/// A server with a certificate of `chain`, of which the first has this key, and this `--tls-server-ca`.
fn server_of(chain: &str, key: &str, server_ca: &str) -> (Server, TempDir) {
    let files = TempDir::new().expect("a directory");
    let mut flags = tls_flags(&TestCa::new(), files.path());
    // Who shows a certificate of no CA of theirs is not what is asked here.
    flags.truncate(4);
    flag_file(files.path(), "server.crt", chain);
    flag_file(files.path(), "server.key", key);
    secrets::remember(key);
    flags.extend(["--tls-server-ca".to_owned(), flag_file(files.path(), "server-ca.crt", server_ca)]);
    flags.extend(FLAGS.map(str::to_owned));
    (Server::start_on(TempDir::new().expect("a directory"), flags), files)
}

#[test]
fn machine_joins_by_any_ca_of_the_chain_and_is_told_no_key() {
    let (root, other) = (TestCa::new(), TestCa::new());
    let between = root.intermediate_with(|_| {});
    let served = between.sign_with_chain("gangplank", &[]);
    // A root that another one has signed, too: the same name and key, and two certificates. And the same key under a name that
    // has signed nothing.
    let crossed = |name: &str| {
        let (params, _) = named(name);
        params.signed_by(root.issuer.key(), &other.issuer).expect("signed").pem()
    };
    let (crossed, renamed) = (crossed(&name_of(&root)), crossed("renamed"));
    let key = root.issuer.key().serialize_pem();
    secrets::remember(&key);
    let chain = |more: &str| format!("{}{more}", served.cert);
    for (why, chain, server_ca, told) in [
        ("the root", chain(""), root.pem.clone(), root.pem.clone()),
        ("an intermediate one", chain(""), between.pem.clone(), between.pem),
        ("one of several", chain(""), format!("{}{}", other.pem, root.pem), format!("{}{}", other.pem, root.pem)),
        ("with its key beside it", chain(""), format!("{key}{}", root.pem), root.pem.clone()),
        ("a cross-signed one", chain(&crossed), root.pem.clone(), root.pem.clone()),
        ("by who has signed that", chain(&crossed), other.pem.clone(), other.pem.clone()),
        ("a key with two names", chain(&renamed), root.pem.clone(), root.pem.clone()),
    ] {
        let (server, _files) = server_of(&chain, &served.key, &server_ca);
        println!("{why}");
        let machine = Machine::joined(&create_token(&server, &["-n", "shop"]));
        assert_eq!(machine.file("server-ca.crt"), told, "{why}");
        machine.succeed(&["register", "web", "10.1.0.1"]);
        machine.succeed(&["renew", "--now"]);
        assert_eq!(machine.file("server-ca.crt"), told, "{why}");
    }
}

/// Takes connections with this certificate. Returns its port, and what the first of them has said after a complete handshake.
async fn impostor(chain: &str, key: &str) -> (u16, JoinSet<Option<Vec<u8>>>) {
    secrets::remember(key);
    let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<Vec<_>, _>>().expect("PEM");
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config =
        rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("versions");
    let mut config = config.with_no_client_auth().with_single_cert(chain, key).expect("a certificate");
    config.alpn_protocols = vec![b"h2".to_vec()];
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let port = listener.local_addr().expect("bound").port();
    let mut accepted = JoinSet::new();
    accepted.spawn(async move {
        let (stream, _) = listener.accept().await.expect("a connection");
        let mut stream = tokio_rustls::TlsAcceptor::from(Arc::new(config)).accept(stream).await.ok()?;
        let mut said = Vec::new();
        // The error of a client that has closed says as little as its end.
        let _ = stream.read_to_end(&mut said).await;
        (!said.is_empty()).then_some(said)
    });
    (port, accepted)
}

/// Each is what somebody may have who is on the way to the server.
#[tokio::test(flavor = "multi_thread")]
async fn machine_that_joins_says_nothing_to_an_impostor() {
    // Of a CA of its own, and of the operator's.
    for own in [true, false] {
        let (server, ca, _secured) = if own {
            let server = Server::start_with(&FLAGS);
            let read = |name: &str| fs::read_to_string(server.data_dir().join(name)).expect("a file");
            secrets::remember(&read("ca.key"));
            let ca = TestCa::stolen(&read("ca.crt"), &read("ca.key"));
            (server, ca, None)
        } else {
            let secured = start(POLICY);
            let SecuredServer { server, ca, files } = secured;
            (server, ca, Some(files))
        };
        let machine = Machine::joined(&create_token(&server, &["-n", "shop"]));
        let token: JoinToken = create_token(&server, &["-n", "shop"]).parse().expect("a token");
        let has = Credential { cert: machine.file("client.crt"), key: machine.file("client.key") };
        let namesake = {
            let (params, key) = named(&name_of(&ca));
            TestCa { pem: params.self_signed(&key).expect("a CA").pem(), issuer: Issuer::new(params, key) }
        };
        let other_name = {
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![SanType::DnsName("other.example.com".try_into().expect("a name"))];
            let key = KeyPair::generate().expect("a key");
            Credential { cert: params.signed_by(&key, &ca.issuer).expect("signed").pem(), key: key.serialize_pem() }
        };
        let (forged, by_machine) = (namesake.sign("gangplank", &[]), signed_by_leaf(&has, "gangplank"));
        for (why, chain, key) in [
            ("a certificate of a CA of this name", format!("{}{}", forged.cert, ca.pem), &forged.key),
            ("the same with its own CA", format!("{}{}{}", forged.cert, namesake.pem, ca.pem), &forged.key),
            ("a certificate of a machine", format!("{}{}", has.cert, ca.pem), &has.key),
            ("one that a machine has signed", format!("{}{}", by_machine.cert, ca.pem), &by_machine.key),
            ("one for another name", format!("{}{}", other_name.cert, ca.pem), &other_name.key),
        ] {
            let (port, mut said) = impostor(&chain, key).await;
            let address = ServerAddress::parse("localhost", port).expect("an address");
            let led = JoinToken { addresses: vec![address], ..token.clone() }.to_string();
            let refused = Machine::new().fail(&["join", &led]);
            assert!(refused.contains("its secret was not told"), "{why}: {refused}");
            assert_eq!(said.join_next().await.expect("one").expect("no panic"), None, "{why}");
            // A machine that joined says no more.
            let (port, mut said) = impostor(&chain, key).await;
            let url = format!("https://localhost:{port}");
            machine.fail(&["register", "web", "10.1.0.1", "--server", &url]);
            assert_eq!(said.join_next().await.expect("one").expect("no panic"), None, "{why}");
        }
    }
}

/// Where `--tls-server-ca` names the CA of the clients' certificates, too, and `--tls-client-ca` does not.
#[tokio::test(flavor = "multi_thread")]
async fn ca_of_the_server_makes_no_clients() {
    let ca = TestCa::new();
    let served = ca.sign("gangplank", &[]);
    let (server, _files) = server_of(&served.cert, &served.key, &ca.pem);
    for shown in [&ca.sign("gangplank:registrant:000000000000", &[]), &ca.sign("gangplank", &[]), &served] {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&ca.pem)).identity(shown.identity());
        secrets::remember(&shown.key);
        let endpoint = tonic::transport::Endpoint::from_shared(super::url(server.grpc)).expect("a URL");
        let answered = match endpoint.tls_config(tls).expect("valid").connect().await {
            Ok(channel) => registered(channel).await.ok(),
            Err(_) => None,
        };
        assert_eq!(answered, None);
    }
}
