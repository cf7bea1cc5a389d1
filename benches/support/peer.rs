//! Servers in processes of their own, on cores of their own, and their CPU and memory use.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
};

use gangplank::grpc::proto::registry::{NamedPort, RegistrationMsg, service_registry_client::ServiceRegistryClient};
use tokio_stream::StreamExt as _;

pub(crate) const MILLION: u32 = 1_000_000;

/// A process, and where it answers.
pub(crate) struct Peer {
    child: Child,
    /// Where it answers DNS, or echoes.
    pub(crate) dns: SocketAddr,
    /// Where it takes registrations.
    pub(crate) grpc: Option<SocketAddr>,
}

impl Peer {
    /// Starts `program` on these cores, as taskset lists them, and waits until it says that it is
    /// ready.
    pub(crate) fn start(cores: &str, program: &Path, args: &[&str]) -> Self {
        let mut child = Command::new("taskset")
            .args(["-c", cores])
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

    /// A gangplank with one thread for DNS, and its state in `data_dir`.
    pub(crate) fn gangplank(cores: &str, data_dir: &Path) -> Self {
        let (any, data_dir) = ("127.0.0.1:0", data_dir.to_str().expect("a path in UTF-8"));
        let listen = ["--grpc-listen", any, "--dns-listen", any, "--admin-listen", any];
        let flags = [&["serve", "--data-dir", data_dir, "--dns-threads", "1"], &listen[..]].concat();
        Self::start(cores, Path::new(env!("CARGO_BIN_EXE_gangplank")), &flags)
    }

    /// What `/proc/PID/<file>` says.
    fn proc(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).expect("it runs")
    }

    /// Resident memory in bytes.
    pub(crate) fn resident(&self) -> f64 {
        let status = self.proc("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux says it");
        line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") * 1024.0
    }

    /// CPU seconds, user and system, since its start.
    pub(crate) fn cpu(&self) -> f64 {
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

/// Keeps this process on these cores.
pub(crate) fn stay_on(cores: &str) {
    // taskset takes a process that runs.
    let me = std::process::id().to_string();
    let pinned = Command::new("taskset").args(["-cp", cores, &me]).stdout(Stdio::null()).status();
    assert!(pinned.is_ok_and(|status| status.success()), "two cores and taskset (util-linux) are needed");
}

/// The address of the `n`th instance.
pub(crate) fn address(n: u32) -> String {
    let [_, b, c, d] = n.to_be_bytes();
    format!("10.{b}.{c}.{d}")
}

/// The `n`th instance, in the service of its number.
pub(crate) fn instance(n: u32, service: u32, weight: f32) -> RegistrationMsg {
    RegistrationMsg {
        namespace: "bench".into(),
        service_name: format!("s{service}"),
        ipaddress: address(n),
        ports: vec![NamedPort { port: 8080, name: "http".into(), ..NamedPort::default() }],
        weight: Some(weight),
        ..RegistrationMsg::default()
    }
}

/// Registers over one stream; each message is answered with `status`.
pub(crate) async fn stream<M>(server: &Peer, messages: M, status: u32)
where
    M: ExactSizeIterator<Item = RegistrationMsg> + Send + 'static,
{
    let count = messages.len();
    let to = format!("http://{}", server.grpc.expect("it takes registrations"));
    let mut client = ServiceRegistryClient::connect(to).await.expect("it listens");
    let mut answers = client.registration_event(tokio_stream::iter(messages)).await.expect("it streams").into_inner();
    for _ in 0..count {
        let answer = answers.next().await.expect("one answer per message").expect("the stream goes on");
        assert_eq!(answer.status, status, "{answer:?}");
    }
}

/// Registers so many instances, each service has `each` of them.
pub(crate) async fn fill(server: &Peer, instances: u32, each: u32) {
    stream(server, (0..instances).map(move |n| instance(n, n / each, 1.0)), 201).await;
}
