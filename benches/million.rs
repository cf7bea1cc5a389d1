//! A server that holds a million instances: CPU per registration beside a server that holds a
//! thousand, time from a registration to its DNS answer, and start beside Knot DNS with the same
//! records (P6a, P3, P7).
//!
//! `cargo bench --bench million`, about five minutes and 3 GiB. The server stays on core 0 and the
//! client on core 1, except at starts, where both have both.

#[path = "support/peer.rs"]
mod peer;
#[path = "support/ratio.rs"]
mod ratio;

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use gangplank::grpc::proto::registry::service_registry_client::ServiceRegistryClient;
use peer::{MILLION, Peer, address, fill, instance, stay_on, stream};
use ratio::{machine, row, spread};
use tempfile::TempDir;
use tokio::{net::UdpSocket, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;

const ROUNDS: usize = 5;

/// Changes of one round.
const CHANGES: u32 = 200_000;

/// Registrations of which each is timed until DNS answers with it.
const TIMED: u32 = 2_000;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    machine();
    stay_on("1");
    let disk = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a data directory");
    let large = Peer::gangplank("0", disk.path());
    fill(&large, MILLION, 1).await;
    println!("resident with 1 000 000 services of one instance: {:.0} MiB", large.resident() / f64::from(1 << 20));
    cpu_per_change(&large).await;
    time_to_visible("durable", &large).await;
    bare_syncs(disk.path());
    drop(large);
    starts(disk.path());
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        let memory = TempDir::new_in(memory).expect("a data directory");
        let large = Peer::gangplank("0", memory.path());
        fill(&large, MILLION, 1).await;
        time_to_visible("in memory (tmpfs)", &large).await;
    }
}

/// P6a: CPU of the whole process for changes of instances that are spread over all there are.
async fn cpu_per_change(large: &Peer) {
    let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a data directory");
    let small = Peer::gangplank("0", dir.path());
    fill(&small, 1000, 1).await;
    let cost = async |server: &Peer, held: u32, round: usize| {
        let before = server.cpu();
        let weight = if round.is_multiple_of(2) { 2.0 } else { 3.0 };
        // A small server gets every instance many times: each time with another weight, or nothing
        // would change.
        let changes = (0..CHANGES).map(move |n| {
            let (at, turn) = ((u64::from(n % held) * 7919 % u64::from(held)) as u32, n / held);
            instance(at, at, weight + (turn % 100) as f32 * 0.01 + 2.0 * (turn / 100 % 50) as f32)
        });
        stream(server, changes, 200).await;
        (server.cpu() - before) * 1e6 / f64::from(CHANGES)
    };
    let (mut smalls, mut larges) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        smalls.push(cost(&small, 1000, round).await);
        larges.push(cost(large, MILLION, round).await);
    }
    let more: Vec<f64> = larges.iter().zip(&smalls).map(|(large, small)| large - small).collect();
    println!("µs of CPU per change: 1 000 services {:.2}, 1 000 000 {:.2}", spread(smalls).0, spread(larges).0);
    row("µs of CPU more per change at 1 000 000 services", more, "≤ 2");
}

/// P3: one registration at a time, from when it is sent until DNS answers with it over UDP.
async fn time_to_visible(what: &str, server: &Peer) {
    let to = format!("http://{}", server.grpc.expect("it takes registrations"));
    let mut client = ServiceRegistryClient::connect(to).await.expect("it listens");
    let (sender, messages) = mpsc::channel(1);
    let mut answers = client.registration_event(ReceiverStream::new(messages)).await.expect("it streams").into_inner();
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
    socket.connect(server.dns).await.expect("loopback");

    let (mut visible, mut answered, mut round_trips) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..TIMED {
        // Registered already, so only the round trip is timed.
        let begun = Instant::now();
        sender.send(instance(MILLION - 1, MILLION - 1, 1.0)).await.expect("the stream is open");
        answers.message().await.expect("the stream goes on").expect("one answer each");
        if n > 0 {
            round_trips.push(begun.elapsed());
        }

        let new = MILLION + n;
        let question = question(&format!("s{new}.bench.svc.cluster.local"));
        let begun = Instant::now();
        sender.send(instance(new, new, 1.0)).await.expect("the stream is open");
        let acknowledged = async {
            let answer = answers.message().await.expect("the stream goes on").expect("one answer each");
            assert_eq!(answer.status, 201);
            begun.elapsed()
        };
        let seen = async {
            let mut answer = [0; 512];
            loop {
                socket.send(&question).await.expect("loopback");
                let len = socket.recv(&mut answer).await.expect("every question is answered");
                // rcode NOERROR, and ANCOUNT is 1.
                if answer[3] & 0xf == 0 && answer[..len][7] == 1 {
                    break begun.elapsed();
                }
            }
        };
        let (seen, acknowledged) = tokio::join!(seen, acknowledged);
        visible.push(seen);
        answered.push(acknowledged);
    }
    println!("beside 1 000 000 instances, {what}:");
    percentiles("  round trip of a registration without effect", round_trips);
    percentiles("  sent, then visible in DNS (P3)", visible);
    percentiles("  sent, then acknowledged", answered);
}

/// The baseline of P3: the disk alone, with as many bytes as a registration takes.
fn bare_syncs(parent: &Path) {
    let path = parent.join("sync");
    let mut file = File::create(&path).expect("it can be made");
    let mut times = Vec::new();
    for _ in 0..TIMED {
        file.write_all(&[7; 100]).expect("there is room");
        let begun = Instant::now();
        file.sync_data().expect("it syncs");
        times.push(begun.elapsed());
    }
    fs::remove_file(path).expect("it is there");
    percentiles("  fdatasync of 100 bytes, alone", times);
}

/// P7: from the start of the process until it is ready, beside Knot DNS with the same records.
fn starts(data_dir: &Path) {
    let knotd = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bin/knotd");
    if !knotd.exists() {
        println!("not measured: start beside Knot DNS; `make tools` installs it");
        return;
    }
    let knot = Knot::with_the_same_records(knotd);
    let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let peer = Peer::gangplank("0,1", data_dir);
        let our = begun.elapsed().as_secs_f64();
        drop(peer);
        let their = knot.start().as_secs_f64();
        ours.push(our);
        theirs.push(their);
        ratios.push(our / their);
    }
    println!("s until ready with 1 000 000 instances: gangplank {:.2}, knotd {:.2}", spread(ours).0, spread(theirs).0);
    row("start with 1 000 000 instances ÷ Knot DNS", ratios, "≤ 1");
}

/// Knot DNS with zone files of the records of a million registrations.
struct Knot {
    program: PathBuf,
    dir: TempDir,
}

impl Knot {
    fn with_the_same_records(program: PathBuf) -> Self {
        let dir = TempDir::new().expect("a directory");
        let soa = |zone: &str| {
            format!("{zone} 5 IN SOA ns.{zone} hostmaster.{zone} 1 7200 1800 86400 5\n{zone} 5 IN NS ns.{zone}\n")
        };
        let (mut forward, mut reverse) = (soa("cluster.local."), soa("10.in-addr.arpa."));
        for n in 0..MILLION {
            let (ip, name) = (address(n), format!("s{n}.bench.svc.cluster.local."));
            let host = format!("{}.{name}", ip.replace('.', "-"));
            let backwards: Vec<&str> = ip.rsplit('.').collect();
            write!(forward, "{name} 5 IN A {ip}\n{host} 5 IN A {ip}\n_http._tcp.{name} 5 IN SRV 0 100 8080 {host}\n")
                .expect("a String");
            writeln!(reverse, "{}.in-addr.arpa. 5 IN PTR {host}", backwards.join(".")).expect("a String");
        }
        fs::write(dir.path().join("forward"), forward).expect("there is room");
        fs::write(dir.path().join("reverse"), reverse).expect("there is room");
        Self { program, dir }
    }

    /// The time from its start until it serves. It is stopped then.
    fn start(&self) -> Duration {
        // knotd does not tell which port it got for port 0, so it gets one that was free a moment ago.
        let free = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port");
        let (at, SocketAddr::V4(free)) = (self.dir.path().display(), free) else { panic!("it was bound to IPv4") };
        let config = format!(
            "server:\n  rundir: \"{at}\"\n  listen: {}@{}\ndatabase:\n  storage: \"{at}\"\n\
             log:\n  - target: stderr\n    any: info\n\
             zone:\n  - domain: cluster.local.\n    file: \"{at}/forward\"\n\
             \x20 - domain: 10.in-addr.arpa.\n    file: \"{at}/reverse\"\n",
            free.ip(),
            free.port()
        );
        let file = self.dir.path().join("knot.conf");
        fs::write(&file, config).expect("there is room");
        let begun = Instant::now();
        let command = Command::new("taskset")
            .args(["-c", "0,1"])
            .arg(&self.program)
            .arg("-c")
            .arg(&file)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = command.expect("knotd can be run");
        let lines = BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok);
        let started = lines.into_iter().any(|line| line.contains("server started"));
        let took = begun.elapsed();
        child.kill().expect("it runs");
        child.wait().expect("it ends");
        assert!(started, "knotd does not start");
        took
    }
}

fn question(name: &str) -> Vec<u8> {
    let mut packet = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        packet.push(u8::try_from(label.len()).expect("a label is short"));
        packet.extend_from_slice(label.as_bytes());
    }
    packet.push(0);
    packet.extend_from_slice(&[0, 1, 0, 1]);
    packet
}

fn percentiles(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!("{what:<44} p50 {:>9.1?}   p99 {:>9.1?}", at(50), at(99));
}
