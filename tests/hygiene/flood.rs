//! One listener is flooded with the cheapest frames that it takes, as fast as a peer can send; the others must go on.
//!
//! Whether they go on is asserted by what they answer, not by how fast: the figures are printed.

use std::{
    io::{
        ErrorKind::{TimedOut, WouldBlock},
        Read as _, Write as _,
    },
    net::{Shutdown, SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use gangplank::grpc::proto::registry::RegistrationType;
use hickory_proto::rr::RecordType;

use super::{ALL, MIB, Target, sized};
use crate::support::{
    WAIT_TIMEOUT,
    dns::{Over, ask},
    http,
    server::Process,
    stream::{Stream, message},
    wait_until,
};

/// What the server holds of answers that its TCP peers do not read, at most.
const MAX_HELD_BYTES: f64 = 32.0 * MIB as f64;

/// A peer sends this much at most, and tries to connect so often at most.
const MAX_SENT: usize = 1 << 34;
const MAX_CONNECTIONS: usize = 20_000;

/// The preface of HTTP/2 with empty settings (RFC 9113 §3.4).
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";

/// PING and SETTINGS, each of which the server answers (RFC 9113 §6.5, §6.7).
const PING: &[u8] = b"\x00\x00\x08\x06\x00\x00\x00\x00\x00pingpong";
const SETTINGS: &[u8] = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00";

/// `web.prod.svc.cluster.local A`, framed, with the QR bit as given (RFC 1035 §4.1.1).
pub(super) fn frame(response: bool) -> Vec<u8> {
    let flags = if response { 0x80 } else { 0 };
    let mut message = vec![0, 1, flags, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["web", "prod", "svc", "cluster", "local"] {
        message.push(u8::try_from(label.len()).expect("short"));
        message.extend(label.bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    let length = u16::try_from(message.len()).expect("short").to_be_bytes();
    [&length[..], &message].concat()
}

/// Sends `unit` without end on one connection after the other and discards what comes back, until it is stopped.
/// Returns how many connections the server has closed.
fn flood(to: SocketAddr, greeting: &[u8], unit: &[u8], stop: &AtomicBool) -> usize {
    let block = unit.repeat((64 * 1024 / unit.len()).max(1));
    let (mut sent, mut closed) = (0, 0);
    for _ in 0..MAX_CONNECTIONS {
        if stop.load(Ordering::Relaxed) || sent >= MAX_SENT {
            break;
        }
        let Ok(mut stream) = TcpStream::connect(to) else { continue };
        stream.set_write_timeout(Some(Duration::from_secs(1))).expect("a timeout above zero");
        let mut answers = stream.try_clone().expect("descriptors are left");
        thread::scope(|scope| {
            scope.spawn(move || {
                let mut discarded = [0; 64 * 1024];
                while answers.read(&mut discarded).is_ok_and(|read| read > 0) {}
            });
            let mut written = stream.write_all(greeting);
            while written.is_ok() && !stop.load(Ordering::Relaxed) && sent < MAX_SENT {
                written = stream.write_all(&block);
                sent += block.len();
            }
            // A server that only takes its time has not closed the connection.
            closed += usize::from(written.is_err_and(|err| !matches!(err.kind(), WouldBlock | TimedOut)));
            let _ = stream.shutdown(Shutdown::Both);
        });
    }
    closed
}

/// How long each listener takes for one request, sorted.
struct Latencies([Vec<Duration>; 4]);

const LISTENERS: [&str; 4] = ["DNS over UDP", "DNS over TCP", "a registration", "/livez"];

impl Latencies {
    /// Asks each listener so often. Every request must be answered.
    fn measure(target: &Target, requests: usize) -> Self {
        let mut all: [Vec<Duration>; 4] = Default::default();
        let mut stream = Stream::open(target.server.grpc);
        let question = |over| {
            let answer = ask(target.server.dns, over, "web.prod.svc.cluster.local.", RecordType::A);
            assert_eq!(answer.answers.len(), 1);
        };
        for request in 0..requests {
            let mut timed = |listener: usize, act: &mut dyn FnMut()| {
                let begun = Instant::now();
                act();
                all[listener].push(begun.elapsed());
            };
            timed(0, &mut || question(Over::Udp));
            timed(1, &mut || question(Over::Tcp));
            timed(2, &mut || {
                let address = format!("10.9.{}.{}", request >> 8, request & 255);
                assert!(matches!(stream.register("prod", "flooded", &address).0, 200 | 201));
            });
            timed(3, &mut || assert_eq!(http::get(target.server.admin, "/livez").0, 200));
        }
        all.iter_mut().for_each(|latencies| latencies.sort_unstable());
        Self(all)
    }

    fn print(&self, name: &str) {
        for (listener, latencies) in LISTENERS.iter().zip(&self.0) {
            let at = |percent: usize| latencies[(latencies.len() - 1) * percent / 100];
            println!("{name}: {listener} p50 {:?}, p99 {:?}", at(50), at(99));
        }
    }
}

/// Ends the flood, also when a measurement fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Floods one listener of a server, and asks all of them meanwhile. Returns how many connections it closed.
pub(super) fn others_go_on(name: &str, of: fn(&Target) -> SocketAddr, greeting: &[u8], unit: &[u8]) -> usize {
    let target = Target::with_services(1);
    target.server.register("prod", "web", "10.1.1.1", "http=8080");
    let requests = sized(50, 500);
    Latencies::measure(&target, requests).print("idle");
    let stop = AtomicBool::new(false);
    let to = of(&target);
    thread::scope(|scope| {
        let peers: Vec<_> = (0..sized(2, 4)).map(|_| scope.spawn(|| flood(to, greeting, unit, &stop))).collect();
        let stopped = StopOnDrop(&stop);
        Latencies::measure(&target, requests).print(name);
        drop(stopped);
        let peak = target.peak_above_rest();
        assert!(peak <= ALL * MIB, "{name}: {} MiB above rest", peak / MIB);
        peers.into_iter().map(|peer| peer.join().expect("a flood ends")).sum()
    })
}

fn dns(target: &Target) -> SocketAddr {
    target.server.dns
}

#[test]
fn frames_of_zero_length_close_the_connection_and_do_not_delay_others() {
    assert!(others_go_on("zero-length frames", dns, &[], &[0, 0]) > 0, "each connection is closed");
}

#[test]
fn frames_below_a_header_close_the_connection_and_do_not_delay_others() {
    assert!(others_go_on("frames of 11 octets", dns, &[], &[0, 11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]) > 0);
}

#[test]
fn responses_close_the_connection_and_do_not_delay_others() {
    assert!(others_go_on("frames with QR=1", dns, &[], &frame(true)) > 0);
}

#[test]
fn flood_of_questions_does_not_delay_others() {
    others_go_on("questions over TCP", dns, &[], &frame(false));
}

#[test]
fn flood_of_pings_and_settings_does_not_delay_others() {
    others_go_on("PING and SETTINGS", |target| target.server.grpc, PREFACE, &[PING, SETTINGS].concat());
}

#[test]
fn flood_of_requests_to_admin_does_not_delay_others() {
    others_go_on("GET /livez", |target| target.server.admin, &[], b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n");
}

/// Registers as many addresses of prod/web as fill a message of 64 KiB.
fn fill_an_answer(target: &Target) {
    let mut stream = Stream::open(target.server.grpc);
    let register =
        |n: usize| message(RegistrationType::Register, "prod", "web", &format!("10.7.{}.{}", n >> 8, n & 255));
    let (statuses, _) = stream.exchange((0..4_000).map(register).collect());
    assert!(statuses.iter().all(|status| *status == 201));
}

/// Large answers over TCP that are never read: what the server and the kernel hold for them is bounded, and their
/// connections are closed. Some 250 of them fill the server's own budget: each further one evicts another.
#[test]
fn unread_answers_are_bounded_in_the_kernel_and_closed() {
    let mut target = Target::with_services(1);
    fill_an_answer(&target);
    let peers = sized(100, 500);
    let mut unread: Vec<TcpStream> = (0..peers)
        .map(|_| {
            let mut peer = TcpStream::connect(target.server.dns).expect("it listens");
            // As many questions as may be pipelined: 4 MiB of answers.
            peer.write_all(&frame(false).repeat(64)).expect("it reads");
            peer
        })
        .collect();
    let open = "gangplank_connections{listener=\"dns\"}";
    target.wait_metric("gangplank_connections_accepted_total{listener=\"dns\"}", |accepted| accepted == peers as f64);
    target.others_are_served();
    let mut held = 0.0;
    target.wait_metric("gangplank_dns_tcp_held_bytes", |bytes| {
        held = bytes;
        bytes > 0.0 && bytes <= MAX_HELD_BYTES
    });
    let queued = send_queues(target.server.dns.port());
    println!(
        "{peers} peers that read nothing: {:.1} MiB wait in the server, {} KiB in the kernel, {} evicted",
        held / MIB as f64,
        queued >> 10,
        target.metric("gangplank_connections_closed_total{listener=\"dns\",reason=\"evicted\"}"),
    );
    assert!(queued <= peers * 512 * 1024, "{queued} bytes wait in the kernel");
    target.end_turn();
    wait_until("all are closed", || (target.metric(open) == 0.0).then_some(()));
    for peer in &mut unread {
        peer.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout above zero");
        let mut rest = Vec::new();
        let end = peer.read_to_end(&mut rest);
        assert!(end.is_err() || rest.len() < 64 * 60_000, "closed before everything was sent");
    }
}

/// Bytes that wait to be sent from connections of this local port, as /proc/net/tcp counts them.
fn send_queues(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("Linux has it");
    let of_port = format!(":{port:04X}");
    let queues = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let queue = fields[4].split(':').next()?;
        fields[1].ends_with(&of_port).then(|| usize::from_str_radix(queue, 16).expect("a number"))
    });
    queues.sum()
}

/// A peer that reads 2 kB a second makes progress for ever; its answer has a deadline all the same.
#[test]
fn slow_reader_is_closed_before_its_answer_is_complete() {
    let target = Target::with_services(1);
    fill_an_answer(&target);
    let mut peer = TcpStream::connect(target.server.dns).expect("it listens");
    peer.write_all(&frame(false).repeat(64)).expect("it reads");
    let open = "gangplank_connections{listener=\"dns\"}";
    target.wait_metric(open, |open| open == 1.0);
    let begun = Instant::now();
    let mut received = 0;
    let mut piece = [0; 200];
    let lived = wait_until("the slow reader is closed", || {
        // 2 000 bytes a second, however often this is called.
        let due = usize::try_from(begun.elapsed().as_millis()).expect("short") * 2;
        while received + piece.len() <= due {
            match peer.read(&mut piece) {
                Ok(0) | Err(_) => break,
                Ok(read) => received += read,
            }
        }
        (target.metric(open) == 0.0).then(|| begun.elapsed())
    });
    println!("a reader of 2 kB/s is closed after {lived:?} and {received} bytes");
    assert!(lived < Duration::from_secs(15), "10 s are promised, and it lived {lived:?}");
}

/// Peers of gRPC that connect and call nothing cannot take the descriptors of DNS and admin, nor keep a registrant out.
#[test]
fn idle_peers_leave_descriptors_for_the_other_listeners() {
    const DESCRIPTORS: usize = 512;
    let data = tempfile::TempDir::new().expect("a temporary directory can be made");
    let process = Process::serve_within(DESCRIPTORS, data.path());
    let (_, [grpc, dns, admin]) = process.ready();
    let idle: Vec<TcpStream> = (0..2 * DESCRIPTORS)
        .filter_map(|_| {
            let mut peer = TcpStream::connect(grpc).ok()?;
            // A peer that the server has closed meanwhile says nothing.
            peer.write_all(PREFACE).ok()?;
            Some(peer)
        })
        .collect();
    assert!(idle.len() > DESCRIPTORS / 2, "{} peers could connect", idle.len());
    // Each on a connection of its own, which takes a descriptor.
    let questions: Vec<TcpStream> = (0..10)
        .map(|_| {
            let mut stream = TcpStream::connect(dns).expect("it listens");
            stream.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a timeout above zero");
            stream.write_all(&frame(false)).expect("it reads");
            stream.read_exact(&mut [0; 14]).expect("an answer comes");
            stream
        })
        .collect();
    assert_eq!(http::get(admin, "/livez").0, 200);
    let (status, _) = Stream::open(grpc).register("prod", "web", "10.1.1.1");
    assert_eq!(status, 201, "the idlest peers made room for a registrant");
    let open = std::fs::read_dir(format!("/proc/{}/fd", process.pid())).expect("it runs").count();
    assert!(open < DESCRIPTORS, "{open} descriptors are open");
    drop((idle, questions));
}
