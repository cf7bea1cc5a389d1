//! UDP and TCP over real sockets on loopback: binding, answers, limits, and the end. Tests wait for
//! an event, never for a time to pass.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    num::NonZeroUsize,
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    dns::{DnsConfig, TcpLimits, bind},
    metrics::Metrics,
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
    metrics: Arc<Metrics>,
    stop: CancellationToken,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Running {
    fn start(world: &TestZone, config: &DnsConfig) -> Self {
        let bound = bind(config).expect("binds");
        let (metrics, stop) = (Arc::new(Metrics::new()), CancellationToken::new());
        let (zone, m, stopped, addresses) = (Arc::clone(&world.zone), metrics.clone(), stop.clone(), bound.addresses());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
            runtime.block_on(bound.run(zone, m, stopped))
        });
        Self { addresses, metrics, stop, thread: Some(thread) }
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

    fn closed(&self, limit: &str) -> f64 {
        self.metric(&format!("gangplank_dns_tcp_closed_total{{server=\"dns://{}\",limit=\"{limit}\"", self.address()))
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

/// Reads until the server ends the connection, and says what came before.
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

#[test]
fn wildcard_answers_from_the_address_that_was_asked() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["0.0.0.0:0"], limits()));
    assert!(server.addresses.iter().all(|address| !address.ip().is_unspecified()));
    let own = server.addresses.iter().find(|address| address.ip() == Ipv4Addr::LOCALHOST).expect("127.0.0.1");
    let client = UdpSocket::bind("127.0.0.1:0").expect("binds");
    assert_eq!(ask_udp(&client, *own, &query_for(WEB, A).packet()).1, *own);
    server.end().expect("ends well");
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
    let any: SocketAddr = "127.0.0.1:0".parse().expect("valid");
    foreign.bind(&any.into()).expect("binds");
    let address = foreign.local_addr().expect("bound").as_socket().expect("an address").to_string();
    let error = bind(&dns_config(&[&address], limits())).expect_err("taken").to_string();
    assert!(error.contains(&format!("over UDP on {address}")), "{error}");
    let error = bind(&dns_config(&["192.0.2.1:0"], limits())).expect_err("not ours").to_string();
    assert!(error.contains("not an address of this machine"), "{error}");
}

#[test]
fn pipelined_questions_are_answered_in_order() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], TcpLimits { pipelined: 16, ..limits() }));
    let mut stream = server.connect();
    let mut writer = stream.try_clone().expect("clones");
    let asking = std::thread::spawn(move || {
        let all: Vec<u8> = (0..1000).flat_map(|id| framed(&TestQuery { id, ..query_for(WEB, A) }.packet())).collect();
        writer.write_all(&all).expect("sent");
        writer.shutdown(Shutdown::Write).expect("half closed");
    });
    for id in 0..1000u16 {
        assert_eq!(receive(&mut stream).expect("an answer")[..2], id.to_be_bytes());
    }
    assert!(drained(&mut stream).is_empty());
    asking.join().expect("sent");
    server.end().expect("ends well");
}

#[test]
fn fragmented_message_is_answered() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], limits()));
    let mut stream = server.connect();
    stream.set_nodelay(true).expect("sets");
    let mut response = query_for(WEB, A).packet();
    response[2] |= 0x80;
    send(&mut stream, &response);
    send(&mut stream, b"");
    for octet in framed(&query_for(WEB, A).packet()) {
        stream.write_all(&[octet]).expect("sent");
    }
    let octets = receive(&mut stream).expect("an answer");
    assert_eq!(Message::from_vec(&octets).expect("parses").answers.len(), 2);
    server.end().expect("ends well");
}

#[test]
fn connections_are_limited_in_all_and_per_peer_and_room_is_given_back() {
    let world = sample_zone();
    for (tcp, limit) in [
        (TcpLimits { connections: 2, ..limits() }, "connections"),
        (TcpLimits { per_peer: Some(2), ..limits() }, "connections_per_peer"),
    ] {
        let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], tcp));
        let packet = query_for(WEB, A).packet();
        let mut kept: Vec<TcpStream> = (0..2).map(|_| server.connect()).collect();
        for stream in &mut kept {
            send(stream, &packet);
            receive(stream).expect("an answer");
        }
        assert!(drained(&mut server.connect()).is_empty(), "the third is closed");
        assert_eq!(server.closed(limit), 1.0);
        // UDP and the others go on.
        let client = UdpSocket::bind("127.0.0.1:0").expect("binds");
        ask_udp(&client, server.address(), &packet);
        let mut first = kept.swap_remove(0);
        send(&mut first, &packet);
        receive(&mut first).expect("an answer");
        first.shutdown(Shutdown::Write).expect("closed");
        assert!(drained(&mut first).is_empty());
        let mut next = server.connect();
        send(&mut next, &packet);
        receive(&mut next).expect("an answer");
        server.end().expect("ends well");
    }
}

#[test]
fn tcp_idle_connection_is_closed() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], TcpLimits { idle: SHORT, ..limits() }));
    let mut fresh = server.connect();
    let mut used = server.connect();
    send(&mut used, &query_for(WEB, A).packet());
    receive(&mut used).expect("an answer");
    assert!(drained(&mut fresh).is_empty());
    assert!(drained(&mut used).is_empty());
    assert_eq!(server.closed("idle"), 2.0);
    server.end().expect("ends well");
}

/// One octet at a time keeps no connection open: the clock is the message's, not the octet's.
#[test]
fn slowly_sent_message_closes_the_connection() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], TcpLimits { message: SHORT, ..limits() }));
    let mut stream = server.connect();
    stream.set_nodelay(true).expect("sets");
    stream.set_read_timeout(Some(SHORT / 10)).expect("a timeout");
    let begun = std::time::Instant::now();
    let mut ended = false;
    // The pause between two octets is the wait for an answer that does not come.
    for _ in 0..1000 {
        ended = stream.write_all(&[9]).is_err()
            || match stream.read(&mut [0; 16]) {
                Ok(len) => len == 0,
                Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
            };
        if ended {
            break;
        }
    }
    assert!(ended && begun.elapsed() >= SHORT);
    assert_eq!(server.closed("slow_message"), 1.0);
    server.end().expect("ends well");
}

/// A peer that asks and never reads: its answers do not pile up, and it loses its connection.
#[test]
fn peer_that_reads_no_answers_is_closed() {
    let mut world = TestZone::new(config());
    for n in 0..1000u32 {
        world.add("web.prod", &spec(&Ipv4Addr::from_bits(0x0a00_0000 + n).to_string(), &[]));
    }
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], TcpLimits { message: SHORT, ..limits() }));
    let mut stream = server.connect();
    let question = framed(&query_for(WEB, A).packet());
    // 16 KB each: far more than the buffers of both sides hold.
    let questions = question.repeat(64);
    while stream.write_all(&questions).is_ok() {}
    assert_eq!(server.closed("slow_reader"), 1.0);
    server.end().expect("ends well");
}

#[test]
fn questions_before_the_stop_are_answered() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], limits()));
    let mut idle = server.connect();
    let mut stream = server.connect();
    for stream in [&mut idle, &mut stream] {
        send(stream, &query_for(WEB, A).packet());
        receive(stream).expect("an answer");
    }
    // Loopback delivers before the call returns, so that this is there when the server stops.
    send(&mut stream, &TestQuery { id: 99, ..query_for(WEB, A) }.packet());
    let address = server.address();
    server.end().expect("ends well");
    assert_eq!(receive(&mut stream).expect("an answer")[..2], [0, 99]);
    assert!(drained(&mut stream).is_empty());
    assert!(drained(&mut idle).is_empty());
    // Everything is let go of.
    assert!(TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok());
}
