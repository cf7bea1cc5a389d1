//! What a server in a process of its own costs: CPU per UDP query, beside a bare UDP echo, and
//! memory per instance at a million instances (P1, P5).
//!
//! `cargo bench --bench footprint`. For CPU, server and echo run in turns on core 0; the generator
//! stays on core 1, with eight sockets and a bounded number of questions in flight. CPU time is the
//! kernel's figure for the process (`/proc/PID/stat`), which a noisy neighbour does not change. A thousand services of three instances; 70 % A, 15 % SRV, 10 % names that do not
//! exist, 5 % AAAA without data. Memory is what the resident set grew by, registry and zone
//! together; the journal lies on disk and does not count.

#[path = "support/peer.rs"]
mod peer;
#[path = "support/ratio.rs"]
mod ratio;

use std::{
    env,
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use peer::{MILLION, Peer, fill};
use ratio::{machine, row, spread};

const ROUNDS: usize = 5;

/// Questions of one round: about three seconds.
const QUESTIONS: usize = 600_000;

const SERVICES: usize = 1000;
const INSTANCES: usize = 3;

/// Sockets of the generator, and questions in flight on each.
const SOCKETS: usize = 8;
const WINDOW: usize = 32;

/// The argument that makes this program the echo.
const ECHO: &str = "--echo";

fn echo() -> ! {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    println!("listening dns {}", socket.local_addr().expect("it is bound"));
    println!("ready");
    let mut packet = [0; 1500];
    loop {
        if let Ok((len, from)) = socket.recv_from(&mut packet) {
            let _ = socket.send_to(&packet[..len], from);
        }
    }
}

fn question(name: &str, rtype: u16) -> Vec<u8> {
    let mut packet = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        packet.push(u8::try_from(label.len()).expect("a label is short"));
        packet.extend_from_slice(label.as_bytes());
    }
    packet.push(0);
    packet.extend_from_slice(&rtype.to_be_bytes());
    packet.extend_from_slice(&1u16.to_be_bytes());
    packet
}

fn query_mix() -> Vec<Vec<u8>> {
    (0..SERVICES * 20)
        .map(|n| {
            let service = format!("s{}.bench.svc.cluster.local", (n * 7919) % SERVICES);
            match n % 20 {
                0..14 => question(&service, 1),
                14..17 => question(&format!("_http._tcp.{service}"), 33),
                17..19 => question(&format!("no{service}"), 1),
                _ => question(&service, 28),
            }
        })
        .collect()
}

/// Asks [`QUESTIONS`] questions, in turn those given, and returns how many were answered.
fn ask(to: SocketAddr, questions: &[Vec<u8>]) -> usize {
    let sockets: Vec<UdpSocket> = (0..SOCKETS)
        .map(|_| {
            let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
            socket.connect(to).expect("loopback");
            socket.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
            socket
        })
        .collect();
    let mut answer = [0; 1500];
    let mut answered = 0;
    let mut next = questions.iter().cycle();
    for _ in 0..QUESTIONS / (SOCKETS * WINDOW) {
        for socket in &sockets {
            for question in next.by_ref().take(WINDOW) {
                let _ = socket.send(question);
            }
        }
        for socket in &sockets {
            answered += (0..WINDOW).take_while(|_| socket.recv(&mut answer).is_ok()).count();
        }
    }
    answered
}

/// Microseconds of CPU per answered question.
fn cpu_per_query(peer: &Peer, questions: &[Vec<u8>]) -> f64 {
    let before = peer.cpu();
    let answered = ask(peer.dns, questions);
    (peer.cpu() - before) * 1e6 / answered as f64
}

/// Resident bytes per instance, of a server that is filled with [`MILLION`].
async fn resident_per_instance(instances_per_service: u32) -> f64 {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a data directory");
    let server = Peer::gangplank("0", dir.path());
    let before = server.resident();
    fill(&server, MILLION, instances_per_service).await;
    (server.resident() - before) / f64::from(MILLION)
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    if env::args().any(|arg| arg == ECHO) {
        echo();
    }
    machine();
    peer::stay_on("1");

    let dir = tempfile::tempdir().expect("a data directory");
    let ours = Peer::gangplank("0", dir.path());
    fill(&ours, (SERVICES * INSTANCES) as u32, INSTANCES as u32).await;
    let baseline = Peer::start("0", &env::current_exe().expect("this program"), &[ECHO]);

    let questions = query_mix();
    // The first round would pay for cold caches.
    cpu_per_query(&ours, &questions[..SERVICES]);
    let (mut costs, mut echoes, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (echo, cost) = (cpu_per_query(&baseline, &questions), cpu_per_query(&ours, &questions));
        echoes.push(echo);
        costs.push(cost);
        ratios.push(cost / echo);
    }
    println!("µs of CPU per query: echo {:.2}, gangplank {:.2}", spread(echoes).0, spread(costs).0);
    row("CPU per query ÷ bare recv_from/send_to echo", ratios, "≤ 1.3 (P1a ÷ batched echo: later)");
    drop((ours, baseline));
    row("resident bytes per instance, 1 per service", vec![resident_per_instance(1).await], "≤ 550");
    row("resident bytes per instance, 10 per service", vec![resident_per_instance(10).await], "≤ 300");
}
