//! What peers of a TLS listener cannot do before they have an identity: take its memory or its time.
//!
//! The strangers come from 127.0.0.2, all others from 127.0.0.1.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use gangplank::grpc::proto::registry::{ServiceInfo, service_registry_client::ServiceRegistryClient};
use hickory_proto::rr::RecordType;
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use socket2::{Domain, Socket, Type};

use super::{ALL, MIB, Target, runtime, sized};
use crate::{
    identity::{
        SecuredServer,
        admin::{BEYOND, beyond},
        connect,
        pki::TestCa,
    },
    support::{
        dns::{Over, ask},
        https::HttpsClient,
    },
};

const STRANGERS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// What a stranger does with its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stranger {
    /// Half of a ClientHello, and nothing more.
    HalfOpen,
    /// What begins like TLS and is none.
    Garbage,
    /// A handshake with a chain of 100 certificates of 2 KiB.
    Oversized,
    /// A ClientHello, again and again: the client that renegotiates before it is done.
    Repeated,
    /// A whole handshake without a certificate, and then nothing.
    NoCertificate,
}

const KINDS: [Stranger; 5] =
    [Stranger::HalfOpen, Stranger::Garbage, Stranger::Oversized, Stranger::Repeated, Stranger::NoCertificate];

/// What strangers share: one key for all of them.
struct Strangers {
    to: SocketAddr,
    plain: Arc<ClientConfig>,
    oversized: Arc<ClientConfig>,
}

impl Strangers {
    fn new(to: SocketAddr, ca: &TestCa) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).expect("a certificate")).expect("a CA");
        let plain = ClientConfig::builder().with_root_certificates(roots.clone()).with_no_client_auth();
        let names: Vec<String> = (0..80).map(|n| format!("some-rather-long-name-{n}.example.com")).collect();
        let key = KeyPair::generate().expect("a key");
        let cert = CertificateParams::new(names).expect("names").self_signed(&key).expect("a certificate");
        assert!(cert.der().len() > 2048, "{} bytes", cert.der().len());
        let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).expect("a key");
        let oversized = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![cert.der().clone(); 100], key)
            .expect("a chain");
        Self { to, plain: Arc::new(plain), oversized: Arc::new(oversized) }
    }

    fn client(config: &Arc<ClientConfig>) -> ClientConnection {
        let name = ServerName::try_from("localhost").expect("a name");
        ClientConnection::new(Arc::clone(config), name).expect("a configuration")
    }

    fn hello(&self) -> Vec<u8> {
        let mut hello = Vec::new();
        Self::client(&self.plain).write_tls(&mut hello).expect("into memory");
        hello
    }

    /// One connection, left open. The server may close it at any time.
    fn attack(&self, kind: Stranger) -> TcpStream {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("descriptors are left");
        socket.bind(&SocketAddr::from((STRANGERS, 0)).into()).expect("all of 127.0.0.0/8 is here");
        socket.connect(&self.to.into()).expect("it listens");
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("above zero");
        let _ = match kind {
            Stranger::HalfOpen => {
                let hello = self.hello();
                stream.write_all(&hello[..hello.len() / 2])
            }
            Stranger::Garbage => {
                let mut garbage = vec![0xa5; 64 * 1024];
                garbage[..3].copy_from_slice(&[22, 3, 1]);
                stream.write_all(&garbage)
            }
            Stranger::Repeated => (0..200).try_for_each(|_| stream.write_all(&self.hello())),
            Stranger::Oversized => handshake(Self::client(&self.oversized), &mut stream),
            Stranger::NoCertificate => handshake(Self::client(&self.plain), &mut stream),
        };
        stream
    }
}

/// Until the client's part is done.
fn handshake(mut client: ClientConnection, stream: &mut TcpStream) -> std::io::Result<()> {
    while client.is_handshaking() {
        client.complete_io(stream)?;
    }
    client.write_tls(stream).map(|_| ())
}

/// How long DNS takes, for each of so many questions, sorted.
fn dns_latencies(target: &Target) -> Vec<Duration> {
    let mut took: Vec<Duration> = (0..sized(200, 4_000))
        .map(|_| {
            let begun = Instant::now();
            ask(target.server.dns, Over::Udp, "web.shop.svc.cluster.local.", RecordType::A);
            begun.elapsed()
        })
        .collect();
    took.sort_unstable();
    took
}

/// Registers with a certificate, on a connection of its own.
fn registrant_is_served(target: &Target, ca: &TestCa, n: usize) -> Duration {
    let begun = Instant::now();
    let status = runtime().block_on(async {
        let channel = connect(target.server.grpc, ca, Some(&ca.sign("vm-1", &[]))).await.expect("a handshake");
        let info = ServiceInfo {
            namespace: "shop".into(),
            service_name: "web".into(),
            ipaddress: format!("10.1.0.{n}"),
            ..ServiceInfo::default()
        };
        ServiceRegistryClient::new(channel).register(info).await.expect("answered").into_inner().status
    });
    assert_eq!(status, 201);
    begun.elapsed()
}

/// Opens so many connections to one server while DNS of `target` is asked. Returns what is open, and the 99th
/// percentile of DNS.
fn attacked(target: &Target, strangers: &Arc<Strangers>, kind: Stranger) -> (Vec<TcpStream>, Duration) {
    let each = sized(200, 5_000);
    let attack = |strangers: Arc<Strangers>| move || -> Vec<_> { (0..each).map(|_| strangers.attack(kind)).collect() };
    let threads = [(); 2].map(|()| thread::spawn(attack(Arc::clone(strangers))));
    let took = dns_latencies(target);
    let open = threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect();
    (open, took[(took.len() - 1) * 99 / 100])
}

/// What the attack costs DNS is compared with the same attack on another process: the machine is as busy.
#[test]
fn handshakes_of_strangers_take_no_memory_and_delay_nobody() {
    let other = SecuredServer::start();
    let on_other = Arc::new(Strangers::new(other.server.grpc, &other.ca));
    let SecuredServer { server, ca, files: _files } = SecuredServer::start();
    let target = Target::of(server);
    let strangers = Arc::new(Strangers::new(target.server.grpc, &ca));
    for (n, kind) in (1..).zip(KINDS) {
        let (_, baseline) = attacked(&target, &on_other, kind);
        let completed = || target.metric("gangplank_tls_handshakes_total");
        let before = completed();
        let begun = Instant::now();
        let (open, dns) = attacked(&target, &strangers, kind);
        let registered = registrant_is_served(&target, &ca, n);
        println!(
            "{kind:?}, {} connections in {:.1?}: DNS p99 {dns:.2?}, ÷ attack on another process {:.1}; another registrant {registered:.1?}; peak +{} MiB",
            open.len(),
            begun.elapsed(),
            dns.as_secs_f64() / baseline.as_secs_f64(),
            target.peak_above_rest() / MIB,
        );
        assert!(target.peak_above_rest() <= ALL * MIB, "{kind:?}: {} MiB", target.peak_above_rest() / MIB);
        if kind != Stranger::NoCertificate {
            // Only the registrant's was completed; every other connection ends.
            assert_eq!(completed() - before, 1.0, "{kind:?}");
            open.into_iter().for_each(|mut stream| ends(&mut stream));
        }
    }
}

/// Strangers have at most the places of the admin listener, and who else asks has one at once.
#[test]
fn handshakes_with_the_admin_listener_keep_no_probe_out() {
    let SecuredServer { server, ca, files: _files } = SecuredServer::start_with_flags("", &BEYOND);
    let (to, target) = (beyond(&server), Target::of(server));
    let (strangers, probe) = (Strangers::new(to, &ca), HttpsClient::new(&ca.pem, None));
    for kind in KINDS {
        let begun = Instant::now();
        let open: Vec<_> = (0..sized(600, 10_000)).map(|_| strangers.attack(kind)).collect();
        let attack = begun.elapsed();
        let begun = Instant::now();
        assert_eq!(probe.get(to, "/livez", &[]).expect("answered").status, 200, "{kind:?}");
        let probed = begun.elapsed();
        let (livez, registered) = target.others_are_served();
        let peak = target.peak_above_rest() / MIB;
        println!(
            "{kind:?}, {} connections to admin in {attack:.1?}: /livez by TLS {probed:.2?}, over loopback {livez:.2?}; a registrant {registered:.1?}; peak +{peak} MiB",
            open.len(),
        );
        assert!(probed <= Duration::from_secs(1) && livez <= Duration::from_secs(1), "{kind:?}");
        assert!(target.metric("gangplank_connections{listener=\"admin\"}") <= 256.0, "{kind:?}");
        assert!(peak <= ALL, "{kind:?}: {peak} MiB");
    }
    assert!(target.metric("gangplank_connections_closed_total{listener=\"admin\",reason=\"evicted\"}") > 0.0);
}

/// Reads what the server has said until the connection ends.
fn ends(stream: &mut TcpStream) {
    let mut some = [0; 4096];
    loop {
        match stream.read(&mut some) {
            Ok(0) => return,
            Ok(_) => {}
            Err(err) if err.kind() == std::io::ErrorKind::ConnectionReset => return,
            Err(err) => panic!("the connection stays open: {err}"),
        }
    }
}
