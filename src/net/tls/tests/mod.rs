//! Real handshakes over loopback, with certificates made here.

mod handshakes;

use std::{fs, io, net::SocketAddr, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_rustls::{TlsConnector, client::TlsStream as ClientTlsStream};

use super::*;
use crate::metrics::Metrics;

const DEADLINE: Duration = Duration::from_secs(10);

/// A CA, and certificates that it signs.
struct TestCa {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, in PEM.
struct CertifiedKey {
    cert: String,
    key: KeyPair,
}

impl TestCa {
    fn new(name: &str) -> Self {
        Self::ends(name, 4000)
    }

    /// Valid until the first day of `year`.
    fn ends(name: &str, year: i32) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a CA").pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// Valid for `years`, of which the first has only one day.
    fn sign(&self, name: &str, years: std::ops::Range<i32>) -> CertifiedKey {
        let mut params = CertificateParams::new(vec!["localhost".into()]).expect("a name");
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = rcgen::date_time_ymd(years.start, 1, 1);
        params.not_after = rcgen::date_time_ymd(years.end, 1, 1);
        let key = KeyPair::generate().expect("a key");
        let cert = params.signed_by(&key, &self.issuer).expect("signed").pem();
        CertifiedKey { cert, key }
    }
}

const VALID: std::ops::Range<i32> = 2020..2120;

struct Server {
    dir: TempDir,
    ca: TestCa,
    tls: Arc<ServerTls>,
    metrics: Metrics,
}

fn write(dir: &Path, name: &str, text: &str) {
    fs::write(dir.join(name), text).expect("a file");
}

impl Server {
    fn start() -> Self {
        let (dir, ca) = (tempfile::tempdir().expect("a directory"), TestCa::new("ca"));
        let CertifiedKey { cert, key } = ca.sign("gangplank", VALID);
        write(dir.path(), "cert", &cert);
        write(dir.path(), "key", &key.serialize_pem());
        write(dir.path(), "ca", &ca.pem);
        let at = |name: &str| dir.path().join(name);
        let files = TlsFiles { cert: at("cert"), key: at("key"), client_ca: Some(at("ca")), server_ca: None };
        let metrics = Metrics::new();
        let tls = ServerTls::load(files, Arc::clone(&metrics.connections)).expect("valid files");
        Self { dir, ca, tls, metrics }
    }

    fn client(&self, shown: Option<&CertifiedKey>) -> TlsConnector {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        for der in certificates(&self.ca.pem) {
            roots.add(der).expect("a CA");
        }
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots);
        let config = match shown {
            None => config.with_no_client_auth(),
            Some(CertifiedKey { cert, key }) => {
                let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
                config.with_client_auth_cert(certificates(cert), key).expect("a certificate")
            }
        };
        TlsConnector::from(Arc::new(config))
    }

    /// One connection: what each side has of it.
    async fn connect(
        &self,
        shown: Option<&CertifiedKey>,
    ) -> (Result<(ServerTlsStream, Option<PeerCertificates>), HandshakeError>, io::Result<ClientTlsStream<TcpStream>>)
    {
        let (listener, address) = listen().await;
        let connector = self.client(shown);
        let client = async {
            let stream = TcpStream::connect(address).await.expect("it listens");
            connector.connect(ServerName::try_from("localhost").expect("a name"), stream).await
        };
        let server = async {
            let (stream, _) = listener.accept().await.expect("a connection");
            self.tls.accept(stream, Alpn::Http2, DEADLINE).await
        };
        tokio::join!(server, client)
    }

    fn failures(&self, reason: HandshakeFailure) -> u64 {
        self.metrics.connections.handshakes_failed.at(reason).get()
    }
}

fn certificates(pem: &str) -> Vec<CertificateDer<'static>> {
    use rustls::pki_types::pem::PemObject as _;
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().expect("PEM")
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    (listener, address)
}

#[tokio::test]
async fn client_certificate_of_the_ca_is_returned() {
    let server = Server::start();
    let vm = server.ca.sign("vm-1", VALID);
    let (accepted, connected) = server.connect(Some(&vm)).await;
    let (mut stream, shown) = accepted.expect("a handshake");
    assert_eq!(shown.expect("a certificate").chain[..], certificates(&vm.cert)[..]);
    let mut client = connected.expect("a handshake");
    client.write_all(b"hello").await.expect("sent");
    client.flush().await.expect("sent");
    let mut read = [0; 5];
    stream.read_exact(&mut read).await.expect("received");
    assert_eq!(&read, b"hello");
    let (_, shown) = server.connect(None).await.0.expect("a handshake");
    assert!(shown.is_none());
}

#[tokio::test]
async fn certificate_that_is_not_good_fails_the_handshake() {
    let server = Server::start();
    for (shown, why) in [
        (TestCa::new("ca").sign("vm-1", VALID), "another CA of the same name"),
        (server.ca.sign("vm-1", 2020..2021), "expired"),
        (server.ca.sign("vm-1", 2119..2120), "not valid yet"),
    ] {
        let before = server.failures(HandshakeFailure::BadCertificate);
        let err = server.connect(Some(&shown)).await.0.expect_err(why);
        assert_eq!(err.reason, HandshakeFailure::BadCertificate, "{why}: {err}");
        assert_eq!(server.failures(HandshakeFailure::BadCertificate), before + 1, "{why}");
    }
}

/// webpki would try 200 000 paths through these: two seconds of a core.
#[tokio::test]
async fn long_chain_is_refused_without_a_search() {
    let server = Server::start();
    let same_name = TestCa::new("unknown");
    let mut shown = same_name.sign("vm-1", VALID);
    (0..9).for_each(|_| shown.cert.push_str(&TestCa::new("unknown").pem));
    let err = server.connect(Some(&shown)).await.0.expect_err("a long chain");
    assert_eq!(err.reason, HandshakeFailure::BadCertificate, "{err}");
    assert!(err.detail.contains("9 intermediate certificates, at most 3"), "{err}");
    // What a client shows beside its own, up to three, is no harm.
    let mut shown = server.ca.sign("vm-1", VALID);
    (0..3).for_each(|_| shown.cert.push_str(&TestCa::new("unknown").pem));
    assert_eq!(server.connect(Some(&shown)).await.0.expect("a handshake").1.expect("a chain").chain.len(), 4);
}

/// What a source has, whatever it is.
#[derive(Debug)]
struct Fixed(TlsContents);

impl fmt::Display for Fixed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("fixed")
    }
}

impl TlsSource for Fixed {
    fn read(&self) -> Result<TlsContents, TlsFileError> {
        Ok(self.0.clone())
    }

    fn invalid(&self, part: TlsPart, reason: String) -> TlsFileError {
        TlsFileError::Own(format!("{part:?}: {reason}"))
    }
}

#[tokio::test]
async fn server_is_known_by_the_ca_that_has_signed_its_chain() {
    let (root, other, between) = (TestCa::new("root"), TestCa::new("other"), TestCa::new("between"));
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "between");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let signed = params.signed_by(between.issuer.key(), &root.issuer).expect("signed").pem();
    let contents = |leaf: &CertifiedKey, chain: &str, cas: &[&str]| TlsContents {
        cert: format!("{}{chain}", leaf.cert).into_bytes(),
        key: leaf.key.serialize_pem().into_bytes(),
        client_ca: None,
        own_ca: None,
        server_ca: Some(cas.concat().into_bytes()),
    };
    let load = |contents| ServerTls::load(Fixed(contents), Metrics::new().connections);
    let hash = |ca: &str| {
        let [der] = &certificates(ca)[..] else { panic!("one") };
        let parsed = ParsedCertificate::try_from(der).expect("readable");
        <[u8; 32]>::from(<sha2::Sha256 as sha2::Digest>::digest(parsed.subject_public_key_info()))
    };
    // Also expired: that is for clients to say.
    for leaf in [between.sign("gangplank", VALID), between.sign("gangplank", 2020..2021)] {
        let bundle = [&other.pem[..], &root.pem];
        let tls = load(contents(&leaf, &signed, &bundle)).expect("valid");
        let known = tls.server_ca().expect("there is one");
        assert_eq!((known.hash, known.pem), (hash(&root.pem), bundle.concat()));
        assert!(tls.is_for("localhost") && !tls.is_for("other.example.com"));
        // A key beside them, as in a file for another program, is told to nobody.
        let key = root.issuer.key().serialize_pem();
        let tls = load(contents(&leaf, &signed, &[&other.pem, &key, &root.pem])).expect("valid");
        assert_eq!(tls.server_ca().expect("there is one").pem, bundle.concat());
        // A CA between is one to be known by, too.
        let tls = load(contents(&leaf, &signed, &[&signed])).expect("valid");
        assert_eq!(tls.server_ca().expect("there is one").hash, hash(&signed));
        for (chain, cas, why) in [
            (&signed[..], &[&other.pem[..]][..], "another CA"),
            ("", &[&root.pem], "the intermediate one is missing"),
            (&signed, &["junk"], "holds no certificate"),
        ] {
            let err = load(contents(&leaf, chain, cas)).expect_err(why).to_string();
            assert!(err.contains("ServerCa: "), "{why}: {err}");
        }
    }
    let leaf = between.sign("gangplank", VALID);
    let many = vec![&root.pem[..]; 100];
    assert!(load(contents(&leaf, &signed, &many)).expect_err("too large").to_string().contains("larger than 32 KiB"));
}

#[test]
fn signer_of_a_certificate_is_known_and_checked_again() {
    let (client, own) = (TestCa::new("client"), TestCa::new("own"));
    let leaf = client.sign("gangplank", VALID);
    let of = |client_ca: Option<&TestCa>, own_ca: Option<&TestCa>| {
        let pem = |ca: &TestCa| ca.pem.clone().into_bytes();
        let (cert, key) = (leaf.cert.clone().into_bytes(), leaf.key.serialize_pem().into_bytes());
        let contents =
            TlsContents { cert, key, client_ca: client_ca.map(pem), own_ca: own_ca.map(pem), server_ca: None };
        TlsState::new(&Fixed(contents.clone()), &contents, SystemTime::now()).expect("valid").signers
    };
    let both = of(Some(&client), Some(&own));
    let of_ca = |signers: &Signers, ca: &TestCa| signers.of(&certificates(&ca.sign("vm-1", VALID).cert));
    let by = |signers: &Signers, ca: &TestCa| of_ca(signers, ca).expect("one of them has signed it");
    let (by_client, by_own) = (by(&both, &client), by(&both, &own));
    assert_eq!((by_client.signer, by_own.signer), (CertificateSigner::ClientCa, CertificateSigner::OwnCa));
    // A CA that is both signs for who joined: they have fewer rights.
    assert_eq!(by(&of(Some(&own), Some(&own)), &own).signer, CertificateSigner::OwnCa);
    assert_eq!(by(&of(Some(&client), None), &client).signer, CertificateSigner::ClientCa);
    assert_eq!(by(&of(None, Some(&own)), &own).signer, CertificateSigner::OwnCa);
    assert!(both.check(&by_client).is_ok() && both.check(&by_own).is_ok());
    // What the handshake has accepted and neither has signed any more is nobody's, and not the client CA's.
    assert!(of_ca(&both, &TestCa::new("other")).is_err());
    // Each is checked against its own CA: another one of the listener is no help.
    let swapped = of(Some(&own), Some(&client));
    assert!(swapped.check(&by_client).is_err() && swapped.check(&by_own).is_err());
    assert!(of(None, Some(&own)).check(&by_client).is_err() && of(Some(&client), None).check(&by_own).is_err());
}

/// Whoever has the key of a certificate in these files can sign for everybody.
#[test]
fn certificate_that_may_not_sign_is_no_ca() {
    let ca = TestCa::new("ca");
    let leaf = ca.sign("gangplank", VALID);
    let own = |is_ca, key_usages| {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "own");
        (params.is_ca, params.key_usages) = (is_ca, key_usages);
        params.self_signed(&KeyPair::generate().expect("a key")).expect("a certificate").pem()
    };
    let any = BasicConstraints::Unconstrained;
    let load = |client_ca: &str, server_ca: &str| {
        let bytes = |text: &str| Some(text.as_bytes().to_vec());
        let contents = TlsContents {
            cert: leaf.cert.clone().into_bytes(),
            key: leaf.key.serialize_pem().into_bytes(),
            client_ca: bytes(client_ca),
            own_ca: None,
            server_ca: bytes(server_ca),
        };
        ServerTls::load(Fixed(contents), Metrics::new().connections)
    };
    assert!(load(&own(IsCa::Ca(any), vec![KeyUsagePurpose::KeyCertSign]), &ca.pem).is_ok());
    for (certificate, why) in [
        (leaf.cert.clone(), "CN=gangplank, which is not one of a CA"),
        (own(IsCa::NoCa, Vec::new()), "CN=own, which is not one of a CA"),
        (own(IsCa::ExplicitNoCa, Vec::new()), "CN=own, which is not one of a CA"),
        (own(IsCa::Ca(any), vec![KeyUsagePurpose::DigitalSignature]), "CN=own, whose key may not sign others"),
    ] {
        // One is enough, whatever is beside it.
        let beside = format!("{}{certificate}", ca.pem);
        for (part, loaded) in [("ClientCa", load(&beside, &ca.pem)), ("ServerCa", load(&ca.pem, &beside))] {
            let err = loaded.expect_err(why).to_string();
            assert!(err.contains(part) && err.contains(why), "{why}: {err}");
        }
    }
}

#[test]
fn ca_that_has_ended_signs_for_nobody() {
    let (long, short) = (TestCa::new("long"), TestCa::ends("short", 2030));
    let leaf = long.sign("gangplank", VALID);
    let at = |year, cas: &[&TestCa]| {
        let contents = TlsContents {
            cert: leaf.cert.clone().into_bytes(),
            key: leaf.key.serialize_pem().into_bytes(),
            client_ca: Some(cas.iter().map(|ca| ca.pem.as_str()).collect::<String>().into_bytes()),
            own_ca: None,
            server_ca: None,
        };
        let now = rcgen::date_time_ymd(year, 1, 1).into();
        TlsState::new(&Fixed(contents.clone()), &contents, now).expect("valid")
    };
    let knows = |state: &TlsState, ca: &TestCa| {
        let shown = certificates(&ca.sign("vm-1", VALID).cert);
        state.signers.check(&PeerCertificates { chain: shown.into(), signer: CertificateSigner::ClientCa }).is_ok()
    };
    let (before, after) = (at(2029, &[&short, &long]), at(2031, &[&short, &long]));
    assert!(knows(&before, &short) && knows(&before, &long));
    assert!(!knows(&after, &short) && knows(&after, &long));
    assert_eq!((before.ends.ended, after.ends.ended), (0, 1));
    let end = SystemTime::from(rcgen::date_time_ymd(2030, 1, 1));
    let second = Duration::from_secs(1);
    assert!(!before.ends.differ(end) && before.ends.differ(end + second));
    assert!(!after.ends.differ(end + second) && after.ends.differ(end), "the clock was set back");
    // Without any, nobody is asked for a certificate, and the server goes on.
    let none = at(2031, &[&short]);
    assert!(!knows(&none, &short) && none.signers.verifier().is_none());
}

#[test]
fn certificates_are_looked_at_again_when_the_next_one_ends() {
    let ca = TestCa::new("ca");
    let chain = [2030, 2040].map(|year| certificates(&ca.sign("vm-1", 2020..year).cert)).concat();
    let shown = PeerCertificates { chain: chain.into(), signer: CertificateSigner::ClientCa };
    let second = Duration::from_secs(1);
    let after = |year| std::time::SystemTime::from(rcgen::date_time_ymd(year, 1, 1)) + second;
    assert_eq!(shown.next_end(after(2026)), Some(after(2030)));
    assert_eq!(shown.next_end(after(2030) - second), Some(after(2030)), "in its last second it is good");
    assert_eq!(shown.next_end(after(2030)), Some(after(2040)));
    assert_eq!(shown.next_end(after(2040)), None);
}

#[tokio::test]
async fn changed_files_hold_for_new_connections_and_open_ones_go_on() {
    let server = Server::start();
    let vm = server.ca.sign("vm-1", VALID);
    let (accepted, connected) = server.connect(Some(&vm)).await;
    let (mut stream, shown) = accepted.expect("a handshake");
    let (mut client, shown) = (connected.expect("a handshake"), shown.expect("a certificate"));
    let mut changes = server.tls.changes();

    // Invalid files change nothing.
    write(server.dir.path(), "cert", "no certificate");
    let err = server.tls.reload().expect_err("invalid").to_string();
    assert!(err.contains("--tls-cert") && err.contains("holds no certificate in PEM"), "{err}");
    let other = server.ca.sign("gangplank", VALID);
    write(server.dir.path(), "cert", &other.cert);
    let err = server.tls.reload().expect_err("the key is of the old certificate").to_string();
    assert!(err.contains("--tls-key") && err.contains("is not the key of the certificate"), "{err}");
    assert!(server.connect(Some(&vm)).await.0.is_ok());

    // A new certificate.
    write(server.dir.path(), "key", &other.key.serialize_pem());
    assert!(server.tls.reload().expect("valid"));
    let connected = server.connect(Some(&vm)).await.1.expect("a handshake");
    let seen = connected.get_ref().1.peer_certificates().expect("a certificate");
    assert_eq!(seen[0], certificates(&other.cert)[0]);
    assert!(!changes.has_changed().expect("open"), "the client CA is the same");
    assert!(server.tls.check(&shown).is_ok());

    // A new client CA.
    write(server.dir.path(), "ca", &TestCa::new("other").pem);
    assert!(server.tls.reload().expect("valid"));
    changes.changed().await.expect("open");
    assert!(server.tls.check(&shown).is_err());
    assert!(server.connect(Some(&vm)).await.0.is_err());
    assert!(!server.tls.reload().expect("valid"), "nothing has changed since");

    client.write_all(b"!").await.expect("the open connection goes on");
    client.flush().await.expect("sent");
    assert_eq!(stream.read_u8().await.expect("received"), b'!');
}
