//! Real sockets on loopback: binding, answers, and errors, over UDP and TCP. Tests wait for an event, never
//! for a time to pass.

mod connections;

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    dns::{
        DnsConfig, TcpLimits, bind,
        responder::Responder,
        udp::{DatagramSocket, answer_all},
    },
    metrics::{Metrics, dns::ListenerLabels},
};

const WEB: &str = "web.prod.svc.cluster.local.";

/// Longer than anything here should take.
const LONG: Duration = Duration::from_secs(20);

/// Short enough to be waited for.
const SHORT: Duration = Duration::from_millis(150);

fn limits() -> TcpLimits {
    TcpLimits { connections: 100, per_peer: None, idle: LONG, message: LONG, pipelined: 64 }
}

fn dns_config(listen: &[&str], tcp: TcpLimits) -> DnsConfig {
    let listen = listen.iter().map(|address| address.parse().expect("an address")).collect();
    DnsConfig { listen, threads: NonZeroUsize::new(2).expect("not 0"), nsid: NSID.to_vec(), tcp }
}

/// Listeners that run on a thread of their own.
struct Running {
    addresses: Vec<SocketAddr>,
    descriptors: usize,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Running {
    fn start(world: &TestZone, config: &DnsConfig) -> Self {
        let bound = bind(config).expect("binds");
        let (metrics, stop) = (Arc::new(Metrics::new()), CancellationToken::new());
        let (zone, m, stopped, addresses) = (Arc::clone(&world.zone), metrics.clone(), stop.clone(), bound.addresses());
        let descriptors = bound.descriptors();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
            runtime.block_on(bound.run(zone, m, stopped))
        });
        Self { addresses, descriptors, metrics, stop, thread: Some(thread) }
    }

    fn address(&self) -> SocketAddr {
        self.addresses[0]
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address()).expect("connects");
        stream.set_read_timeout(Some(LONG)).expect("a timeout");
        stream
    }

    /// The value of the metric whose line begins so.
    fn metric(&self, line: &str) -> f64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, self.metrics.all()).expect("writes to a string");
        let values = text.lines().filter(|l| l.starts_with(line)).filter_map(|l| l.rsplit(' ').next());
        values.map(|value| value.parse::<f64>().expect("a number")).sum()
    }

    fn closed(&self, reason: &str) -> f64 {
        self.metric(&format!("gangplank_connections_closed_total{{listener=\"dns\",reason=\"{reason}\"}}"))
    }

    /// Waits until so many connections are open: one that its peer saw close is counted for a moment longer.
    fn wait_open(&self, connections: f64) {
        let begun = Instant::now();
        while self.metric("gangplank_connections{listener=\"dns\"}") != connections {
            assert!(begun.elapsed() < Duration::from_secs(10), "{connections} are never open");
            thread::yield_now();
        }
    }

    fn end(mut self) -> io::Result<()> {
        self.stop.cancel();
        self.thread.take().expect("runs").join().expect("no panic")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn framed(packet: &[u8]) -> Vec<u8> {
    [&u16::try_from(packet.len()).expect("short").to_be_bytes()[..], packet].concat()
}

fn send(stream: &mut TcpStream, packet: &[u8]) {
    stream.write_all(&framed(packet)).expect("sent");
}

fn receive(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut len = [0; 2];
    stream.read_exact(&mut len)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(len))];
    stream.read_exact(&mut message)?;
    Ok(message)
}

/// Reads until the server ends the connection, and returns the octets before the end.
fn drained(stream: &mut TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => rest,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => rest,
        Err(error) => panic!("the server should have ended it: {error}"),
    }
}

fn ask_udp(from: &UdpSocket, to: SocketAddr, packet: &[u8]) -> (Vec<u8>, SocketAddr) {
    from.set_read_timeout(Some(LONG)).expect("a timeout");
    from.send_to(packet, to).expect("sent");
    let mut octets = vec![0; 2048];
    let (len, peer) = from.recv_from(&mut octets).expect("an answer");
    octets.truncate(len);
    (octets, peer)
}

#[test]
fn udp_and_tcp_answer_on_one_port_over_ipv4_and_ipv6() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0", "[::1]:0"], limits()));
    assert_eq!(server.addresses.len(), 2);
    for address in &server.addresses {
        assert_ne!(address.port(), 0);
        let any: IpAddr = if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
        let client = UdpSocket::bind((any, 0)).expect("binds");
        let (octets, peer) = ask_udp(&client, *address, &query_for(WEB, A).packet());
        assert_eq!(peer, *address);
        assert_eq!(Message::from_vec(&octets).expect("parses").answers.len(), 2);
        let mut stream = TcpStream::connect(address).expect("connects");
        send(&mut stream, &query_for(WEB, A).packet());
        let octets = receive(&mut stream).expect("an answer");
        assert_eq!(Message::from_vec(&octets).expect("parses").answers.len(), 2);
    }
    let zone = "zone=\"cluster.local.\"";
    for (address, family) in server.addresses.iter().zip(["1", "2"]) {
        for proto in ["udp", "tcp"] {
            let server_label = format!("server=\"dns://{address}\"");
            let labels = format!("{server_label},{zone},proto=\"{proto}\",family=\"{family}\",type=\"A\"");
            assert_eq!(server.metric(&format!("gangplank_dns_requests_total{{{labels}}}")), 1.0);
        }
    }
    server.end().expect("ends well");
}

#[test]
fn udp_ignores_responses_and_short_packets() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], limits()));
    let client = UdpSocket::bind("127.0.0.1:0").expect("binds");
    let mut response = query_for(WEB, A).packet();
    response[2] |= 0x80;
    client.send_to(&response, server.address()).expect("sent");
    client.send_to(b"short", server.address()).expect("sent");
    let asked = TestQuery { id: 77, ..query_for(WEB, A) };
    let (octets, _) = ask_udp(&client, server.address(), &asked.packet());
    assert_eq!(octets[..2], [0, 77]);
    server.end().expect("ends well");
}

/// 127.0.0.0/8 is all this machine's, so there are many addresses without a privilege.
#[test]
fn wildcard_is_one_socket_per_thread_and_answers_from_the_address_that_was_asked() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["0.0.0.0:0"], limits()));
    assert_eq!(server.addresses.len(), 1);
    assert_eq!(server.descriptors, 3, "two threads and TCP");
    let port = server.address().port();
    let packet = query_for(WEB, A).packet();
    let client = UdpSocket::bind("0.0.0.0:0").expect("binds");
    for last in 1..=254 {
        let asked = SocketAddr::from(([127, 3, 2, last], port));
        assert_eq!(ask_udp(&client, asked, &packet).1, asked);
    }
    let asked = SocketAddr::from(([127, 9, 9, 9], port));
    let mut stream = TcpStream::connect(asked).expect("connects");
    send(&mut stream, &packet);
    receive(&mut stream).expect("an answer");
    server.end().expect("ends well");
}

#[test]
fn ipv6_wildcard_answers_from_the_address_that_was_asked() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["[::]:0"], limits()));
    let asked = SocketAddr::from((Ipv6Addr::LOCALHOST, server.address().port()));
    let client = UdpSocket::bind("[::1]:0").expect("binds");
    assert_eq!(ask_udp(&client, asked, &query_for(WEB, A).packet()).1, asked);
    server.end().expect("ends well");
}

#[test]
fn broadcast_is_not_answered() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["0.0.0.0:0"], limits()));
    let client = UdpSocket::bind("127.0.0.1:0").expect("binds");
    client.set_broadcast(true).expect("sets");
    let port = server.address().port();
    client.send_to(&TestQuery { id: 1, ..query_for(WEB, A) }.packet(), ("127.255.255.255", port)).expect("sent");
    // The next question is answered, and is the first that is: a datagram overtakes none on loopback,
    // but two threads may, so the broadcast is looked for twice.
    for id in [2, 3] {
        let asked = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        assert_eq!(ask_udp(&client, asked, &TestQuery { id, ..query_for(WEB, A) }.packet()).0[..2], [0, id as u8]);
    }
    server.end().expect("ends well");
}

/// Fails twice with an error that has no kind of its own, then has a question, then stops.
struct BrokenSocket<'s> {
    calls: usize,
    answers: &'s mut usize,
    stopping: &'s AtomicBool,
}

impl DatagramSocket for BrokenSocket<'_> {
    type Peer = ();

    fn receive(&mut self, packet: &mut [u8]) -> io::Result<(usize, Option<()>)> {
        self.calls += 1;
        match self.calls {
            1 | 2 => Err(io::Error::from_raw_os_error(5)), // EIO
            3 => {
                let query = query_for("web.prod.svc.cluster.local.", A).packet();
                packet[..query.len()].copy_from_slice(&query);
                Ok((query.len(), Some(())))
            }
            _ => {
                self.stopping.store(true, Ordering::Relaxed);
                Err(io::ErrorKind::TimedOut.into())
            }
        }
    }

    fn send(&mut self, _: &[u8], (): &()) -> io::Result<()> {
        *self.answers += 1;
        Ok(())
    }
}

#[test]
fn unknown_error_of_a_socket_is_counted_and_the_next_question_is_answered() {
    let metrics = Metrics::new();
    let listener = ListenerLabels { server: "dns://test".into(), proto: "udp", family: "1", zone: "z.".into() };
    let counters = metrics.dns.single_writer(&listener);
    let responder = Responder { zone: Arc::clone(&sample_zone().zone), nsid: Arc::new([]), counters };
    let (mut answers, stopping) = (0, AtomicBool::new(false));
    answer_all(BrokenSocket { calls: 0, answers: &mut answers, stopping: &stopping }, &responder, &stopping);
    assert_eq!(answers, 1);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, metrics.all()).expect("a String takes everything");
    assert!(text.contains("gangplank_dns_udp_receive_errors_total{server=\"dns://test\"} 2"), "{text}");
}

#[test]
fn address_in_use_is_refused_and_named() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], limits()));
    let address = server.address().to_string();
    let error = bind(&dns_config(&[&address], limits())).expect_err("taken").to_string();
    assert!(error.contains(&format!("over TCP on {address}")) && error.contains("another process"), "{error}");
    server.end().expect("ends well");
    // And a foreign UDP socket, even one that would share.
    let foreign = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).expect("a socket");
    foreign.set_reuse_port(true).expect("sets");
    // On an address of its own, because another test may have the port over TCP.
    let any: SocketAddr = "127.44.0.1:0".parse().expect("valid");
    foreign.bind(&any.into()).expect("binds");
    let address = foreign.local_addr().expect("bound").as_socket().expect("an address").to_string();
    let error = bind(&dns_config(&[&address], limits())).expect_err("taken").to_string();
    assert!(error.contains(&format!("over UDP on {address}")), "{error}");
    let error = bind(&dns_config(&["192.0.2.1:0"], limits())).expect_err("not an address of this machine").to_string();
    assert!(error.contains("not an address of this machine"), "{error}");
}
