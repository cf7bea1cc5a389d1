//! One address opens more connections than a listener has room for, and keeps nobody else out.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
};

use hickory_proto::rr::RecordType;
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

use super::{
    flood::{PREFACE, frame},
    sized,
};
use crate::support::{
    WAIT_TIMEOUT,
    dns::{Over, ask},
    http,
    server::Process,
    stream::Stream,
    wait_until,
};

/// Where the crowd comes from. All others come from 127.0.0.1.
const CROWD: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// A server with less room than the crowd wants.
struct Crowded {
    process: Process,
    grpc: SocketAddr,
    dns: SocketAddr,
    admin: SocketAddr,
    _data: TempDir,
}

impl Crowded {
    fn start() -> Self {
        let data = TempDir::new().expect("a temporary directory");
        let process = Process::serve_within(Self::connections(), data.path());
        let (_, [grpc, dns, admin]) = process.ready();
        Self { process, grpc, dns, admin, _data: data }
    }

    /// Of the crowd, and the limit on descriptors: no listener gets as many.
    fn connections() -> usize {
        sized(600, 6_000)
    }

    /// Connects that often from one address, and writes `greeting` on each connection.
    fn crowd(to: SocketAddr, greeting: &[u8]) -> Vec<TcpStream> {
        let connect = |_| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("descriptors are left");
            socket.bind(&SocketAddr::from((CROWD, 0)).into()).expect("all of 127.0.0.0/8 is here");
            socket.connect(&to.into()).expect("it listens");
            let mut peer = TcpStream::from(socket);
            // The server may have closed it already, to make room.
            let _ = peer.write_all(greeting);
            peer
        };
        (0..Self::connections()).map(connect).collect()
    }

    /// The crowd filled the listener, and had to make room for itself.
    fn check(&self, listener: &str) {
        let metric = |series: &str| -> f64 {
            let (_, text) = http::get(self.admin, "/metrics");
            let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
            value.unwrap_or_else(|| panic!("no {series} in {text}")).parse().expect("a number")
        };
        let max = metric(&format!("gangplank_connections_max{{listener=\"{listener}\"}}"));
        let open = metric(&format!("gangplank_connections{{listener=\"{listener}\"}}"));
        let evicted =
            || metric(&format!("gangplank_connections_closed_total{{listener=\"{listener}\",reason=\"evicted\"}}"));
        let expected = Self::connections() as f64 - max;
        wait_until("the rest of the crowd is evicted", || (evicted() >= expected).then_some(()));
        println!("{listener}: {open} of {max} connections are open, {} were evicted", evicted());
        assert!(open <= max, "{open} of {max}");
        assert!(self.process.stderr().lines().filter(|line| line.contains("WARN")).count() <= 5);
    }
}

/// Asks once on a connection that stays open.
fn ask_on(stream: &mut TcpStream) {
    stream.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a timeout above zero");
    stream.write_all(&frame(false)).expect("the server reads");
    let mut length = [0; 2];
    stream.read_exact(&mut length).expect("an answer comes");
    stream.read_exact(&mut vec![0; usize::from(u16::from_be_bytes(length))]).expect("the whole answer");
}

#[test]
fn crowd_on_dns_over_tcp_keeps_nobody_out() {
    let server = Crowded::start();
    let mut early = TcpStream::connect(server.dns).expect("it listens");
    ask_on(&mut early);
    let crowd = Crowded::crowd(server.dns, &frame(false));
    for over in [Over::Tcp, Over::Udp] {
        ask(server.dns, over, "web.prod.svc.cluster.local.", RecordType::A);
    }
    ask_on(&mut early);
    server.check("dns");
    drop(crowd);
}

#[test]
fn crowd_on_grpc_keeps_nobody_out() {
    let server = Crowded::start();
    let mut early = Stream::open(server.grpc);
    let crowd = Crowded::crowd(server.grpc, PREFACE);
    assert_eq!(Stream::open(server.grpc).register("prod", "web", "10.0.0.1").0, 201);
    assert_eq!(early.register("prod", "web", "10.0.0.2").0, 201);
    server.check("grpc");
    drop(crowd);
}

#[test]
fn crowd_on_admin_keeps_nobody_out() {
    let server = Crowded::start();
    const REQUEST: &[u8] = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut early = TcpStream::connect(server.admin).expect("it listens");
    early.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a timeout above zero");
    let mut livez = || {
        early.write_all(REQUEST).expect("the server reads");
        let mut head = [0; 12];
        early.read_exact(&mut head).expect("an answer comes");
        assert_eq!(&head, b"HTTP/1.1 200");
        let mut rest = [0; 1024];
        assert!(early.read(&mut rest).expect("the rest of the answer") > 0);
    };
    livez();
    let crowd = Crowded::crowd(server.admin, REQUEST);
    assert_eq!(http::get(server.admin, "/livez").0, 200);
    livez();
    server.check("admin");
    drop(crowd);
}
