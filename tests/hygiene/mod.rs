//! What peers of gRPC and admin cannot do to the process: take its memory, or keep others out.
//!
//! Each test attacks a real server from outside, in a small form. `GANGPLANK_ATTACK=long` makes it the
//! size of the ones that once succeeded (100 000 services, 12 000 streams); the figures are printed.

mod crowd;
mod data_frames;
mod flood;
mod handover;
mod peer;
mod tls;

use std::{
    env, fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use gangplank::grpc::proto::{
    gangplank::v1::{ListServicesRequest, WatchRequest},
    registry::{RegistrationType, service_registry_client::ServiceRegistryClient},
};
use tokio::{runtime::Runtime, task::JoinSet};

use self::peer::{DEFAULT_WINDOW, NO_WINDOW, Peer, framed};
use crate::support::{
    cpu_seconds, http,
    server::Server,
    stream::{Stream, message},
    wait_until,
};

const MIB: u64 = 1024 * 1024;

/// MiB that lists may take above rest: eight snapshots and what waits for peers.
const LISTS: u64 = 64;

/// MiB that so many calls may take whose messages are not complete: the budget of 64 MiB, what the allocator keeps, and
/// what an open call costs that says nothing: some 11 KiB, `answered_registrations…` prints it.
fn endless(calls: usize) -> u64 {
    64 + 48 + calls as u64 * 12 / 1024
}

/// MiB that all peers together may take above rest, whatever they do.
const ALL: u64 = 256;

const LIST: &str = "/gangplank.v1.Discovery/ListServices";
const WATCH: &str = "/gangplank.v1.Discovery/Watch";
const STREAM: &str = "/registry.ServiceRegistry/RegistrationEvent";

/// Connections that were closed because their peer left responses unread.
const UNREAD: &str = "gangplank_connections_closed_total{listener=\"grpc\",reason=\"slow_reader\"}";

fn sized(short: usize, long: usize) -> usize {
    if env::var("GANGPLANK_ATTACK").is_ok_and(|form| form == "long") { long } else { short }
}

/// Attacks take turns: each wants the machine for itself, and figures of its own.
static TURN: Mutex<()> = Mutex::new(());

/// A server that is attacked, with its memory before.
struct Target {
    server: Server,
    rest: u64,
    next: AtomicU32,
    turn: Option<MutexGuard<'static, ()>>,
}

impl Target {
    /// One with this many services of one instance each.
    fn with_services(count: usize) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let server = Server::start();
        if count > 0 {
            let mut stream = Stream::open(server.grpc);
            let messages = (0..count).map(|n| {
                let address = format!("10.{}.{}.{}", n >> 16 & 255, n >> 8 & 255, n & 255);
                message(RegistrationType::Register, "prod", &format!("service-{n}"), &address)
            });
            let (statuses, _) = stream.exchange(messages.collect());
            assert!(statuses.iter().all(|status| *status == 201));
        }
        Self::new(server, turn)
    }

    /// A server that runs already.
    fn of(server: Server) -> Self {
        Self::new(server, TURN.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn new(server: Server, turn: MutexGuard<'static, ()>) -> Self {
        let mut target = Self { turn: Some(turn), server, rest: 0, next: AtomicU32::new(0) };
        target.rest = target.status("VmRSS");
        // Resets the peak, VmHWM.
        fs::write(format!("/proc/{}/clear_refs", target.server.pid()), "5").expect("a process of ours");
        target
    }

    /// Lets the next attack begin. For tests that only wait for a deadline of the server from here on.
    fn end_turn(&mut self) {
        self.turn = None;
    }

    /// A figure of /proc/PID/status, in bytes.
    fn status(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.server.pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a figure that Linux has");
        let kib: u64 = line.trim_matches(|c: char| !c.is_ascii_digit()).parse().expect("a number");
        kib * 1024
    }

    /// The peak of its memory above rest.
    fn peak_above_rest(&self) -> u64 {
        self.status("VmHWM").saturating_sub(self.rest)
    }

    /// Seconds of CPU that it has used.
    fn cpu(&self) -> f64 {
        cpu_seconds(self.server.pid())
    }

    fn metric(&self, name: &str) -> f64 {
        let (status, text) = http::get(self.server.admin, "/metrics");
        assert_eq!(status, 200);
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().expect("a number")
    }

    fn wait_metric(&self, name: &str, mut expected: impl FnMut(f64) -> bool) {
        wait_until(name, || expected(self.metric(name)).then_some(()));
    }

    /// Whatever the attack does: /livez answers and a registrant registers. Returns how long both took.
    fn others_are_served(&self) -> (Duration, Duration) {
        let begun = Instant::now();
        assert_eq!(http::get(self.server.admin, "/livez").0, 200);
        let livez = begun.elapsed();
        let begun = Instant::now();
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let mut stream = Stream::open(self.server.grpc);
        let (status, _) = stream.register("prod", "other", &format!("10.255.{}.{}", n >> 8, n & 255));
        assert_eq!(status, 201);
        (livez, begun.elapsed())
    }

    /// The attack did no harm, and took no more than this many MiB. Prints its figures.
    fn check(&self, attack: &str, most: u64) {
        let (livez, registered) = self.others_are_served();
        let (rest, peak) = (self.rest / MIB, self.peak_above_rest());
        println!(
            "{attack}: rest {rest} MiB, peak +{} MiB, now +{} MiB, budget {:.0} MiB, /livez {livez:?}, another registrant {registered:?}",
            peak / MIB,
            self.status("VmRSS").saturating_sub(self.rest) / MIB,
            self.metric("gangplank_grpc_buffered_bytes") / MIB as f64,
        );
        assert!(peak <= most * MIB, "{attack}: {} MiB above rest", peak / MIB);
    }
}

fn runtime() -> Runtime {
    Runtime::new().expect("threads")
}

/// Opens connections and begins calls on each, then reads nothing more.
async fn unread(
    target: &Target,
    connections: usize,
    calls: usize,
    window: u32,
    path: &'static str,
    messages: Bytes,
) -> Vec<Peer> {
    let mut opening = JoinSet::new();
    for _ in 0..connections {
        let (to, messages) = (target.server.grpc, messages.clone());
        opening.spawn(async move {
            let mut peer = Peer::connect(to, window).await;
            for _ in 0..calls {
                if !peer.call(path, messages.clone(), path != STREAM).await {
                    break;
                }
            }
            // Until everything is sent that the server takes, and some of its answers are here.
            peer.drive(Duration::from_millis(500)).await;
            peer
        });
    }
    opening.join_all().await
}

#[test]
fn reset_lists_leave_no_work_and_no_memory() {
    let target = Target::with_services(sized(30_000, 100_000));
    let runtime = runtime();
    let calls = sized(200, 1_000);
    let cpu = target.cpu();
    runtime.block_on(async {
        let mut peer = Peer::connect(target.server.grpc, DEFAULT_WINDOW).await;
        for n in 0..calls {
            let (path, request) = match n % 2 {
                0 => (LIST, framed(&[ListServicesRequest::default()])),
                _ => (WATCH, framed(&[WatchRequest::default()])),
            };
            if !peer.call(path, request, true).await {
                peer = Peer::connect(target.server.grpc, DEFAULT_WINDOW).await;
                continue;
            }
            if n % 50 == 49 {
                // Late enough for the server to have begun them.
                peer.drive(Duration::from_millis(20)).await;
                peer.calls.clear();
                peer.drive(Duration::from_millis(1)).await;
            }
        }
    });
    let during = target.cpu() - cpu;
    target.wait_metric("gangplank_grpc_streams", |open| open == 0.0);
    target.check("lists begun and reset", LISTS);
    // What goes on for nobody shows as CPU that is used after the last of them is gone.
    let after = target.cpu();
    let begun = Instant::now();
    wait_until("two seconds", || (begun.elapsed() > Duration::from_secs(2)).then_some(()));
    let after = target.cpu() - after;
    println!("CPU during {during:.1} s, in two seconds after it {after:.2} s");
    assert!(after < 1.0, "{after} s of CPU after the attack");
    assert_eq!(target.metric("gangplank_lists"), 0.0);
}

#[test]
fn unread_watches_are_bounded_and_closed() {
    let mut target = Target::with_services(sized(30_000, 100_000));
    let runtime = runtime();
    let request = framed(&[WatchRequest::default()]);
    let peers = runtime.block_on(unread(&target, 4, 100, DEFAULT_WINDOW, WATCH, request));
    target.check("400 unread watches", LISTS);
    target.end_turn();
    assert!(target.metric("gangplank_lists_rejected_total") > 0.0, "more lists than may wait were asked for");
    target.wait_metric(UNREAD, |closed| closed >= 1.0);
    drop(peers);
    target.wait_metric("gangplank_lists", |lists| lists == 0.0);
    target.wait_metric("gangplank_grpc_buffered_bytes", |bytes| bytes < 4096.0);
    target.check("400 unread watches, closed", LISTS);
}

#[test]
fn unread_json_lists_are_bounded_and_closed() {
    let mut target = Target::with_services(sized(30_000, 100_000));
    let peers: Vec<TcpStream> = (0..250)
        .map(|_| {
            let mut stream = TcpStream::connect(target.server.admin).expect("it listens");
            stream.write_all(b"GET /api/v1/services HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").expect("it reads");
            stream
        })
        .collect();
    target.check("250 unread JSON lists", LISTS);
    target.end_turn();
    // The lists get their turns one after the other, and each is cut off or refused.
    target.wait_metric("gangplank_lists_rejected_total", |lists| lists > 0.0);
    target.wait_metric("gangplank_lists_queued", |lists| lists == 0.0);
    target.wait_metric("gangplank_lists", |lists| lists == 0.0);
    for mut stream in peers {
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("above zero");
        let mut some = [0; 1];
        assert_eq!(stream.read(&mut some).expect("some of an answer"), 1);
    }
    target.check("250 unread JSON lists, closed", LISTS);
}

#[test]
fn unread_registration_responses_have_one_budget() {
    let mut target = Target::with_services(0);
    let runtime = runtime();
    let (connections, calls) = (sized(10, 60), 199);
    // The same registration again and again: nothing is written, everything is answered.
    let registration = message(RegistrationType::Register, "prod", "web", "10.0.0.1");
    let messages = framed(vec![&registration; 4_000]);
    let peers = runtime.block_on(unread(&target, connections, calls, NO_WINDOW, STREAM, messages));
    target.check(&format!("{} streams with unread responses", connections * calls), ALL);
    target.end_turn();
    target.wait_metric(UNREAD, |closed| closed >= 1.0);
    drop(peers);
    target.wait_metric("gangplank_grpc_buffered_bytes", |bytes| bytes < 4096.0);
    target.check("streams with unread responses, closed", ALL);
}

/// Streams that had hundreds of registrations answered at once, and are open and silent since then.
#[test]
fn answered_registrations_leave_no_memory_in_open_streams() {
    let target = Target::with_services(0);
    let runtime = runtime();
    let (connections, calls) = (sized(8, 60), 199);
    // As many as a stream may have unread, so that they come as one batch.
    let messages = vec![message(RegistrationType::Register, "prod", "web", "10.0.0.1"); 700];
    let open = runtime.block_on(async {
        let mut open = Vec::new();
        for _ in 0..connections {
            let to = format!("http://{}", target.server.grpc);
            let client = ServiceRegistryClient::connect(to).await.expect("it listens");
            let mut streams = JoinSet::new();
            for _ in 0..calls {
                let (mut client, messages) = (client.clone(), messages.clone());
                streams.spawn(async move {
                    let count = messages.len();
                    let requests = stream::iter(messages).chain(stream::pending());
                    let mut responses = client.registration_event(requests).await.expect("it streams").into_inner();
                    for _ in 0..count {
                        responses.message().await.expect("the stream goes on").expect("one answer each");
                    }
                    responses
                });
            }
            open.push(streams.join_all().await);
        }
        open
    });
    let streams = connections * calls;
    assert_eq!(target.metric("gangplank_grpc_streams"), streams as f64);
    // The allocator returns pages to the kernel some time after they were freed.
    let each = wait_until("what was answered is freed", || {
        let each = target.status("VmRSS").saturating_sub(target.rest) / streams as u64;
        (each < 32 * 1024).then_some(each)
    });
    target.check(&format!("{streams} silent streams, {} KiB each", each / 1024), ALL);
    drop(open);
}

/// The begin of a message in each call, as long as a message may be, and never its end.
#[test]
fn messages_that_never_end_have_one_budget_and_a_deadline() {
    let target = Target::with_services(0);
    let runtime = runtime();
    let (connections, calls) = (sized(20, 60), 199);
    // Field 1 of almost 64 KiB.
    let mut begin = vec![0; 60_000];
    begin[1..5].copy_from_slice(&(64_u32 * 1024).to_be_bytes());
    begin[5..9].copy_from_slice(&[0x0a, 0xf0, 0xff, 0x03]);
    let peers = runtime.block_on(unread(&target, connections, calls, DEFAULT_WINDOW, STREAM, begin.into()));
    let calls = connections * calls;
    target.check(&format!("{calls} messages that never end"), endless(calls));
    target.wait_metric("gangplank_grpc_streams", |open| open == 0.0);
    drop(peers);
    target.wait_metric("gangplank_grpc_buffered_bytes", |bytes| bytes < 4096.0);
}

#[test]
fn unread_tiny_frames_are_bounded() {
    let mut target = Target::with_services(0);
    let runtime = runtime();
    let (connections, calls) = (sized(10, 60), 20);
    // The begin of a message of 32 KiB that never ends, one byte a frame, and answers that nobody reads.
    let peers = runtime.block_on(async {
        let mut peers = Vec::new();
        for _ in 0..connections {
            let registration = message(RegistrationType::Register, "prod", "web", "10.0.0.1");
            let mut peer = Peer::connect(target.server.grpc, 0).await;
            for _ in 0..calls {
                assert!(peer.call(STREAM, framed([&registration]), false).await);
            }
            for call in 0..calls {
                drop(peer.head(call).await);
            }
            for n in 0..sized(2_000, 6_000) {
                for call in &mut peer.calls {
                    let _ = call.body.send_data(Bytes::from_static(b"\0"), false);
                }
                if n % 20 == 0 {
                    peer.drive(Duration::from_micros(10)).await;
                }
            }
            peer.drive(Duration::from_millis(200)).await;
            peers.push(peer);
        }
        peers
    });
    target.check("frames of one byte", ALL);
    target.end_turn();
    target.wait_metric(UNREAD, |closed| closed >= 1.0);
    drop(peers);
    target.wait_metric("gangplank_grpc_buffered_bytes", |bytes| bytes < 4096.0);
}

#[test]
fn rapid_resets_close_the_connection_and_not_the_log() {
    let target = Target::with_services(0);
    let runtime = runtime();
    let connections = sized(50, 500);
    runtime.block_on(async {
        for _ in 0..connections {
            let mut peer = Peer::connect(target.server.grpc, DEFAULT_WINDOW).await;
            for _ in 0..200 {
                if !peer.call(LIST, framed(&[ListServicesRequest::default()]), true).await {
                    break;
                }
                peer.calls.clear();
            }
            peer.drive(Duration::from_millis(5)).await;
        }
    });
    target.wait_metric("gangplank_grpc_streams", |open| open == 0.0);
    target.check("rapid resets", LISTS);
    let said = target.server.stderr();
    let warnings = said.lines().filter(|line| line.contains("WARN")).count();
    println!(
        "{} protocol errors, {warnings} warnings",
        target.metric("gangplank_connections_closed_total{listener=\"grpc\",reason=\"malformed\"}")
    );
    assert!(warnings <= 2, "{warnings} warnings:\n{said}");
}
