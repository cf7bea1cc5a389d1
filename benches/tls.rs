//! What TLS and identities cost: registrations per second on one stream beside plaintext, to the same
//! listener (P4c), and handshakes per second beside a bare rustls server with the same certificates.
//!
//! `cargo bench --bench tls`. The client runs in the same process, for both sides.

#[path = "../tests/identity/pki.rs"]
mod pki;
#[path = "support/ratio.rs"]
mod ratio;
#[path = "support/registrant.rs"]
mod registrant;
#[path = "support/server.rs"]
mod server;

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use pki::{Credential, TestCa};
use ratio::{machine, row};
use registrant::{connect, message, stream};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use server::Server;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

/// What the server itself runs with.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Rounds of each pair.
const ROUNDS: usize = 5;

/// Messages of one round.
const MESSAGES: u32 = 100_000;

/// Handshakes of one round, and how many of them at once.
const HANDSHAKES: usize = 2_000;
const AT_ONCE: usize = 16;

/// The identity `vm-1` may register what the bench registers.
const POLICY: &str = "[[rule]]\nusers = ['vm-1']\nnamespaces = ['*']\nverbs = ['create']\n";

/// A connection with TLS and a client certificate.
async fn secured(to: SocketAddr, ca: &TestCa, credential: &Credential) -> Channel {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&ca.pem)).identity(credential.identity());
    let endpoint = Endpoint::from_shared(format!("https://localhost:{}", to.port())).expect("a URL");
    endpoint.tls_config(tls).expect("valid").connect().await.expect("a handshake")
}

fn chain(credential: &Credential) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let cert = CertificateDer::from_pem_slice(credential.cert.as_bytes()).expect("a certificate");
    (vec![cert], PrivateKeyDer::from_pem_slice(credential.key.as_bytes()).expect("a key"))
}

fn roots(ca: &TestCa) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).expect("a certificate")).expect("a CA");
    Arc::new(roots)
}

/// A server that completes handshakes with client certificates, and sends as much as a SETTINGS frame has.
async fn bare_server(ca: &TestCa, credential: &Credential) -> (SocketAddr, JoinSet<()>) {
    let (cert, key) = chain(credential);
    let verifier = WebPkiClientVerifier::builder(roots(ca)).build().expect("a CA");
    let config = ServerConfig::builder().with_client_cert_verifier(verifier).with_single_cert(cert, key);
    let acceptor = TlsAcceptor::from(Arc::new(config.expect("valid")));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    let mut running = JoinSet::new();
    running.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            let acceptor = acceptor.clone();
            connections.spawn(async move {
                let mut stream = acceptor.accept(stream).await.expect("a handshake");
                stream.write_all(&[0; 45]).await.expect("the client reads");
                let _ = stream.read_u8().await;
            });
        }
    });
    (address, running)
}

/// Handshakes, each until the server has sent something: with TLS 1.3 a client is done before its certificate is checked.
async fn handshakes(to: SocketAddr, config: &Arc<ClientConfig>) -> Duration {
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..AT_ONCE {
        let connector = TlsConnector::from(Arc::clone(config));
        tasks.spawn(async move {
            for _ in 0..HANDSHAKES / AT_ONCE {
                let stream = TcpStream::connect(to).await.expect("it listens");
                // As gRPC clients do: else the preface waits 40 ms for the acknowledgement of the handshake.
                stream.set_nodelay(true).expect("sets");
                let name = ServerName::try_from("localhost").expect("a name");
                let mut stream = connector.connect(name, stream).await.expect("a handshake");
                // The preface of HTTP/2, which gangplank waits for.
                stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("open");
                stream.read_u8().await.expect("it has sent something");
            }
        });
    }
    tasks.join_all().await;
    begun.elapsed()
}

#[tokio::main]
async fn main() {
    machine();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let dir = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).expect("a directory");
    let ca = TestCa::new();
    let (own, vm) = (ca.sign("gangplank", &[]), ca.sign("vm-1", &[]));
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).expect("a file");
        path.to_str().expect("UTF-8").to_owned()
    };
    let (cert, key) = (file("server.crt", &own.cert), file("server.key", &own.key));
    let (client_ca, policy) = (file("ca.crt", &ca.pem), file("policy.toml", POLICY));
    let files =
        ["--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &client_ca, "--authorization-policy", &policy];
    let no_quotas = ["--max-messages-per-identity", "0", "--max-instances-per-identity", "0"];
    let flags = [&files[..], &no_quotas].concat();
    let server = Server::start(&dir.path().join("data"), &flags).await;

    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let messages = |round| (0..MESSAGES).map(|n| message(round, n, 20_000)).collect();
        let plaintext = stream(connect(server.grpc).await, messages(2 * round)).await;
        let with_tls = stream(secured(server.grpc, &ca, &vm).await, messages(2 * round + 1)).await;
        ratios.push(plaintext.as_secs_f64() / with_tls.as_secs_f64());
    }
    row("registrations/s, TLS and identity ÷ plaintext", ratios, "≥ 0.8");

    let (bare, _running) = bare_server(&ca, &own).await;
    let (cert, key) = chain(&vm);
    let mut config =
        ClientConfig::builder().with_root_certificates(roots(&ca)).with_client_auth_cert(cert, key).expect("valid");
    config.resumption = rustls::client::Resumption::disabled();
    let config = Arc::new(config);
    let mut ratios = Vec::new();
    for _ in 0..ROUNDS {
        let baseline = handshakes(bare, &config).await;
        let ours = handshakes(server.grpc, &config).await;
        let rate = |took: Duration| HANDSHAKES as f64 / took.as_secs_f64();
        println!("  {:>9.0}/s bare   {:>9.0}/s ours", rate(baseline), rate(ours));
        ratios.push(baseline.as_secs_f64() / ours.as_secs_f64());
    }
    row("handshakes/s with a client certificate ÷ bare rustls", ratios, "(none)");
    server.stop().await;
}
