//! What pods lose while gangplank is killed and started again under queries: with one gangplank behind CoreDNS, and
//! with two.

use std::{
    net::{SocketAddr, UdpSocket},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RecordType},
};

use crate::support::{
    coredns::CoreDns,
    dns::{Over, answers},
    free_ports,
    server::Server,
    tools, wait_until,
};

const NAME: &str = "web.prod.svc.cluster.local.";

/// Clients that ask one question after the other.
const CLIENTS: usize = 4;

/// How long glibc waits for an answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Questions, and how they ended.
#[derive(Debug, Default)]
struct Counts {
    answered: usize,
    server_failures: usize,
    other: usize,
    slowest: Duration,
}

impl Counts {
    fn add(mut self, more: &Self) -> Self {
        self.answered += more.answered;
        self.server_failures += more.server_failures;
        self.other += more.other;
        self.slowest = self.slowest.max(more.slowest);
        self
    }
}

/// A gangplank with one instance, whose DNS listens at this port too.
fn gangplank(port: u16) -> Server {
    let server = Server::start_with(&["--dns-listen", &format!("127.0.0.1:{port}")]);
    server.register("prod", "web", "10.0.0.1", "http=8080");
    server
}

fn in_front_of(program: &Path, ports: &[u16]) -> CoreDns {
    let servers: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    let flags = ["coredns", "--wiring", "stub-domain", "-n", "prod", "--server", &servers.join(",")];
    let corefile = Server::start().run(&flags);
    CoreDns::start(program, &String::from_utf8(corefile.stdout).expect("UTF-8"))
}

/// Asks until `stop`.
fn ask_until(server: SocketAddr, stop: &AtomicBool) -> Counts {
    let mut counts = Counts::default();
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    socket.connect(server).expect("loopback is there");
    socket.set_read_timeout(Some(CLIENT_TIMEOUT)).expect("a timeout above zero");
    let mut buffer = [0; 512];
    while !stop.load(Ordering::Relaxed) {
        let mut question = Message::new(fastrand::u16(..), MessageType::Query, OpCode::Query);
        question.add_query(Query::query(Name::from_ascii(NAME).expect("a name"), RecordType::A));
        let asked = Instant::now();
        socket.send(&question.to_vec().expect("it can be encoded")).expect("CoreDNS listens");
        let answer = socket.recv(&mut buffer).ok().and_then(|octets| Message::from_vec(&buffer[..octets]).ok());
        counts.slowest = counts.slowest.max(asked.elapsed());
        match answer.filter(|answer| answer.id == question.id) {
            Some(answer) if answer.answers.len() == 1 => counts.answered += 1,
            Some(answer) if answer.response_code == ResponseCode::ServFail => counts.server_failures += 1,
            _ => counts.other += 1,
        }
    }
    counts
}

/// Counts what clients get during `disturbance`.
fn under_queries(coredns: &CoreDns, disturbance: impl FnOnce()) -> Counts {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| ask_until(coredns.address, &stop))).collect();
        disturbance();
        stop.store(true, Ordering::Relaxed);
        let counts = clients.into_iter().map(|client| client.join().expect("a client does not panic"));
        counts.fold(Counts::default(), |sum, one| sum.add(&one))
    })
}

#[test]
fn one_of_two_gangplanks_is_killed_and_no_answer_is_lost() {
    let Some(program) = tools::require("coredns") else { return };
    let ports: [u16; 2] = free_ports();
    let [mut first, second] = ports.map(gangplank);
    let coredns = in_front_of(&program, &ports);
    let killed = under_queries(&coredns, || {
        wait_for_queries(&coredns, 200);
        first.kill9();
        wait_for_queries(&coredns, 2000);
    });
    println!("two, one of them killed: {killed:?}");
    // How many there are depends on the machine; CoreDNS has asked both many times.
    assert!(killed.answered > 200, "{killed:?}");
    assert_eq!((killed.server_failures, killed.other), (0, 0), "{killed:?}");
    let back = under_queries(&coredns, || {
        let first = first.restart();
        wait_for_queries(&coredns, 1000);
        drop(first);
    });
    println!("two, one of them started again: {back:?}");
    assert_eq!(back.other, 0, "never NXDOMAIN, nor without an answer: {back:?}");
    drop(second);
}

#[test]
fn only_gangplank_is_killed_and_started_again() {
    let Some(program) = tools::require("coredns") else { return };
    let [port] = free_ports();
    let mut server = gangplank(port);
    let coredns = in_front_of(&program, &[port]);
    let mut back = Duration::ZERO;
    let counts = under_queries(&coredns, || {
        wait_for_queries(&coredns, 200);
        server.kill9();
        wait_for_queries(&coredns, 20);
        let server = server.restart();
        let ready = Instant::now();
        wait_until("CoreDNS has its answers again", || {
            (answers(coredns.address, Over::Udp, NAME, RecordType::A).len() == 1).then_some(())
        });
        back = ready.elapsed();
        wait_for_queries(&coredns, 200);
        drop(server);
    });
    println!("one, killed and started again: {counts:?}, answered again {back:?} after it was ready");
    assert!(counts.answered > 20 && counts.server_failures > 0, "{counts:?}");
    assert_eq!(counts.other, 0, "never NXDOMAIN, nor without an answer: {counts:?}");
    assert!(back < Duration::from_secs(2), "{back:?}");
}

/// Waits while this many questions are asked and answered, with or without an address.
fn wait_for_queries(coredns: &CoreDns, count: usize) {
    for _ in 0..count {
        let _ = answers(coredns.address, Over::Udp, NAME, RecordType::A);
    }
}
