//! What a server in a process of its own costs: CPU per UDP query, beside a bare loop that sends
//! every datagram back, and memory per instance at a million instances.
//!
//! `cargo bench --bench footprint`. For CPU, server and echo run in turns on core 0; the generator
//! stays on core 1, with eight sockets and a bounded number of questions under way. CPU time is
//! what the kernel says of the process (`/proc/PID/stat`), so that a noisy neighbour costs time
//! but not truth. A thousand services of three instances; 70 % A, 15 % SRV, 10 % names that do not
//! exist, 5 % AAAA without data. Memory is what the resident set grew by, registry and zone
//! together; the journal lies on disk and does not count.

#[path = "support/ratio.rs"]
mod ratio;

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    net::{SocketAddr, UdpSocket},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use gangplank::grpc::proto::registry::{NamedPort, RegistrationMsg, service_registry_client::ServiceRegistryClient};
use ratio::{machine, row, spread};
use tokio_stream::StreamExt as _;

const ROUNDS: usize = 5;

/// Questions of one round: about three seconds.
const QUESTIONS: usize = 600_000;

const SERVICES: usize = 1000;
const INSTANCES: usize = 3;

/// Sockets of the generator, and questions under way on each.
const SOCKETS: usize = 8;
const WINDOW: usize = 32;

/// The argument that makes this program the echo.
const ECHO: &str = "--echo";

/// A process on core 0, and where it answers.
struct Peer {
    child: Child,
    /// Where it answers DNS, or echoes.
    dns: SocketAddr,
    /// Where it takes registrations.
    grpc: Option<SocketAddr>,
}

impl Peer {
    /// Starts `program` there and waits until it says that it is ready.
    fn start(program: &Path, args: &[&str]) -> Self {
        let mut child = Command::new("taskset")
            .args(["-c", "0"])
            .arg(program)
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .expect("taskset (util-linux) starts it");
        let (mut dns, mut grpc) = (None, None);
        for line in BufReader::new(child.stdout.take().expect("piped")).lines() {
            let line = line.expect("it prints text");
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["listening", "dns", address] => dns = Some(address.parse().expect("an address")),
                ["listening", "grpc", address] => grpc = Some(address.parse().expect("an address")),
                ["ready", ..] => break,
                _ => {}
            }
        }
        Self { child, dns: dns.expect("it says where"), grpc }
    }

    fn gangplank(data_dir: &str) -> Self {
        let any = "127.0.0.1:0";
        let listen = ["--grpc-listen", any, "--dns-listen", any, "--admin-listen", any];
        let flags = [&["serve", "--data-dir", data_dir, "--dns-threads", "1"], &listen[..]].concat();
        Self::start(Path::new(env!("CARGO_BIN_EXE_gangplank")), &flags)
    }

    /// What `/proc/PID/<file>` says.
    fn proc(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).expect("it runs")
    }

    /// Octets of memory that it occupies.
    fn resident(&self) -> f64 {
        let status = self.proc("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux says it");
        line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") * 1024.0
    }

    /// CPU seconds, user and system, since its start.
    fn cpu(&self) -> f64 {
        // The 14th and 15th fields, counted from behind the name, which may hold blanks; ticks of
        // a hundredth of a second on every Linux.
        let stat = self.proc("stat");
        let fields: Vec<&str> = stat[stat.rfind(')').expect("the name ends") + 2..].split(' ').collect();
        let ticks = |at: usize| fields[at].parse::<f64>().expect("a number");
        (ticks(11) + ticks(12)) / 100.0
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

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

fn mix() -> Vec<Vec<u8>> {
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

/// Asks all questions and returns how many were answered.
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
fn cost(peer: &Peer, questions: &[Vec<u8>]) -> f64 {
    let before = peer.cpu();
    let answered = ask(peer.dns, questions);
    (peer.cpu() - before) * 1e6 / answered as f64
}

async fn register(to: SocketAddr) {
    let messages = (0..SERVICES * INSTANCES).map(|n| RegistrationMsg {
        namespace: "bench".into(),
        service_name: format!("s{}", n % SERVICES),
        ipaddress: format!("10.{}.{}.{}", n % INSTANCES, (n / 250) % 250, n % 250 + 1),
        ports: vec![NamedPort { port: 8080, name: "http".into(), ..NamedPort::default() }],
        ..RegistrationMsg::default()
    });
    let mut client = ServiceRegistryClient::connect(format!("http://{to}")).await.expect("it listens");
    let answers =
        client.registration_event(tokio_stream::iter(messages.collect::<Vec<_>>())).await.expect("it streams");
    let mut answers = answers.into_inner();
    while let Some(answer) = answers.next().await {
        assert!(matches!(answer.expect("the stream goes on").status, 200 | 201));
    }
}

const MILLION: u32 = 1_000_000;

async fn grown(instances_per_service: u32) -> f64 {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a data directory");
    let dir = dir.path().display().to_string();
    let server = Peer::gangplank(&dir);
    let before = server.resident();
    let to = format!("http://{}", server.grpc.expect("it takes registrations"));
    let mut client = ServiceRegistryClient::connect(to).await.expect("it listens");
    let messages = (0..MILLION).map(move |n| {
        let [_, b, c, d] = n.to_be_bytes();
        RegistrationMsg {
            namespace: "bench".into(),
            service_name: format!("s{}", n / instances_per_service),
            ipaddress: format!("10.{b}.{c}.{d}"),
            ports: vec![NamedPort { port: 8080, name: "http".into(), ..NamedPort::default() }],
            ..RegistrationMsg::default()
        }
    });
    let mut answers = client.registration_event(tokio_stream::iter(messages)).await.expect("it streams").into_inner();
    for _ in 0..MILLION {
        let answer = answers.next().await.expect("one answer per message").expect("the stream goes on");
        assert_eq!(answer.status, 201);
    }
    (server.resident() - before) / f64::from(MILLION)
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    if env::args().any(|arg| arg == ECHO) {
        echo();
    }
    machine();
    // The generator's own core; taskset takes a process that runs.
    let me = std::process::id().to_string();
    let pinned = Command::new("taskset").args(["-cp", "1", &me]).stdout(Stdio::null()).status();
    assert!(pinned.is_ok_and(|status| status.success()), "two cores and taskset (util-linux) are needed");

    let dir = tempfile::tempdir().expect("a data directory");
    let dir = dir.path().display().to_string();
    let ours = Peer::gangplank(&dir);
    register(ours.grpc.expect("it takes registrations")).await;
    let bare = Peer::start(&env::current_exe().expect("this program"), &[ECHO]);

    let questions = mix();
    cost(&ours, &questions[..SERVICES]);
    let (mut costs, mut echoes, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (echo, cost) = (cost(&bare, &questions), cost(&ours, &questions));
        echoes.push(echo);
        costs.push(cost);
        ratios.push(cost / echo);
    }
    println!("µs of CPU per query: echo {:.2}, gangplank {:.2}", spread(echoes).0, spread(costs).0);
    row("CPU per query ÷ bare recv_from/send_to echo", ratios, "≤ 1.3 (P1a ÷ batched echo: later)");
    drop((ours, bare));
    row("resident octets per instance, 1 a service", vec![grown(1).await], "≤ 550");
    row("resident octets per instance, 10 a service", vec![grown(10).await], "≤ 300");
}
