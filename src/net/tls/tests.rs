//! Real handshakes over loopback, with certificates made here.

use std::{fs, io, net::SocketAddr, path::Path};

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
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
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
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
        let files = TlsFiles { cert: at("cert"), key: at("key"), client_ca: Some(at("ca")) };
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
    assert_eq!(shown.expect("a certificate")[..], certificates(&vm.cert)[..]);
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
    assert_eq!(server.connect(Some(&shown)).await.0.expect("a handshake").1.expect("a chain").len(), 4);
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

#[tokio::test]
async fn silent_and_half_open_handshakes_end_at_the_deadline() {
    let server = Server::start();
    for begun in [&b""[..], &[22, 3, 1]] {
        let (listener, address) = listen().await;
        let mut client = TcpStream::connect(address).await.expect("it listens");
        client.write_all(begun).await.expect("sent");
        let (stream, _) = listener.accept().await.expect("a connection");
        let err = server.tls.accept(stream, Alpn::Http2, Duration::from_millis(50)).await.expect_err("too slow");
        assert_eq!(err.reason, HandshakeFailure::Timeout);
    }
}

#[tokio::test]
async fn oldest_of_too_many_handshakes_is_given_up() {
    let server = Server::start();
    let (listener, address) = listen().await;
    let handshakes = Handshakes::new(2);
    let config = Arc::clone(&server.tls.state.load_full().expect("loaded").configs.http2);
    let half_open = async || {
        let mut client = TcpStream::connect(address).await.expect("it listens");
        client.write_all(&[22]).await.expect("sent");
        (client, listener.accept().await.expect("a connection").0)
    };
    let (first, second, third) = (half_open().await, half_open().await, half_open().await);
    let run = |stream| handshakes.run(stream, Arc::clone(&config), DEADLINE);
    let (mut oldest, mut middle, mut newest) =
        (Box::pin(run(first.1)), Box::pin(run(second.1)), Box::pin(run(third.1)));
    let err = tokio::select! {
        biased;
        ended = &mut oldest => ended,
        ended = &mut middle => ended,
        ended = &mut newest => ended,
    };
    assert_eq!(err.expect_err("given up").reason, HandshakeFailure::Evicted);
    drop(first.0);
    drop(second.0);
    let err = middle.await.expect_err("its client has gone");
    assert_eq!(err.reason, HandshakeFailure::Closed);
}

#[tokio::test]
async fn handshake_that_is_too_long_or_no_tls_fails() {
    let server = Server::start();
    for (octets, reason) in [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), HandshakeFailure::NotTls),
        // A ClientHello of 65 535 octets, one in each record.
        (one_by_one(&[1, 0, 0xff, 0xff]), HandshakeFailure::TooLarge),
        // One of 65 793.
        (one_by_one(&[1, 1, 1, 1]), HandshakeFailure::TooLarge),
    ] {
        let (listener, address) = listen().await;
        let client = async {
            let mut client = TcpStream::connect(address).await.expect("it listens");
            // The server may close the connection before it has read all.
            let _ = client.write_all(&octets).await;
            let _ = client.read(&mut [0]).await;
        };
        let accept = async {
            let (stream, _) = listener.accept().await.expect("a connection");
            server.tls.accept(stream, Alpn::Http2, DEADLINE).await.map(|_| ()).expect_err("no handshake")
        };
        let (err, ()) = tokio::join!(accept, client);
        assert_eq!(err.reason, reason, "{err}");
    }
}

/// A handshake message that begins with `head`, one octet in each record.
fn one_by_one(head: &[u8]) -> Vec<u8> {
    let message = head.iter().copied().chain(std::iter::repeat(0)).take(MAX_HANDSHAKE_BYTES);
    message.flat_map(|octet| [22, 3, 1, 0, 1, octet]).collect()
}

#[tokio::test]
async fn no_session_is_resumed() {
    let server = Server::start();
    let vm = server.ca.sign("vm-1", VALID);
    let connector = server.client(Some(&vm));
    for _ in 0..2 {
        let (listener, address) = listen().await;
        let client = async {
            let stream = TcpStream::connect(address).await.expect("it listens");
            connector.connect(ServerName::try_from("localhost").expect("a name"), stream).await.expect("a handshake")
        };
        let accept = async {
            let (stream, _) = listener.accept().await.expect("a connection");
            server.tls.accept(stream, Alpn::Http2, DEADLINE).await.expect("a handshake").0
        };
        let (mut accepted, mut client) = tokio::join!(accept, client);
        // A ticket would come with the first data.
        accepted.write_all(b"!").await.expect("sent");
        accepted.flush().await.expect("sent");
        assert_eq!(client.read_u8().await.expect("received"), b'!');
        assert_eq!(client.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Full));
    }
}
