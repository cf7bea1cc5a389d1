//! The walk of a person whose machine joins, from one network namespace to another.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use hickory_proto::rr::RecordType;
use tempfile::TempDir;

use crate::support::{
    coredns::{CoreDns, corefile},
    dns::{Over, answers},
    namespace,
    server::{BINARY, Server},
    tools, wait_until,
};

/// How long after Enter the name may take to be resolvable.
const MAX_TIME: Duration = Duration::from_secs(10);

/// A process that holds a network namespace of its own.
struct Vm {
    child: Child,
    config: TempDir,
}

impl Vm {
    fn start() -> Self {
        let mut child = Command::new("unshare")
            .args(["--net", "--", "sh", "-c", "echo up; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it could be run before");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("it is piped")).read_line(&mut line).expect("it says so");
        assert_eq!(line, "up\n");
        Self { child, config: TempDir::new().expect("a directory") }
    }

    /// Runs a command in the namespace, without any environment.
    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let net = format!("--net=/proc/{}/ns/net", self.child.id());
        let config = format!("GANGPLANK_CONFIG_DIR={}", self.config.path().display());
        let mut command = Command::new("nsenter");
        command.args([&net, "env", "-i", &config, "PATH=/usr/sbin:/usr/bin:/sbin:/bin", program]).args(arguments);
        let output = command.stdin(Stdio::null()).output().expect("nsenter is there where unshare is");
        assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
        output
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn vm_joins_by_one_command_and_is_resolvable_through_coredns() {
    let Some(coredns) = tools::require("coredns") else { return };
    if !namespace::entered("identity::walk::vm_joins_by_one_command_and_is_resolvable_through_coredns") {
        return;
    }
    let vm = Vm::start();
    namespace::ip([
        "link set lo up".to_owned(),
        "link add gp0 type veth peer name vm0".to_owned(),
        format!("link set vm0 netns {}", vm.child.id()),
        "addr add 10.88.0.1/24 dev gp0".to_owned(),
        "link set gp0 up".to_owned(),
    ]);
    vm.run("ip", &["addr", "add", "10.88.0.2/24", "dev", "vm0"]);
    vm.run("ip", &["link", "set", "vm0", "up"]);
    let server = Server::start_with(&["--grpc-listen", "10.88.0.1:0"]);
    let coredns = CoreDns::start(&coredns, &corefile("stub-domain.Corefile", server.dns));

    let created = server.run(&["token", "create", "-n", "prod", "--service", "web", "--address", "own"]);
    let command = String::from_utf8(created.stdout).expect("UTF-8");
    let token = command.trim().strip_prefix("gangplank join ").expect("one command");
    let enter = Instant::now();
    vm.run(BINARY, &["join", token]);
    vm.run(BINARY, &["register", "web", "10.88.0.2"]);
    wait_until("the name is there", || {
        let found = answers(coredns.address, Over::Udp, "web.prod.svc.cluster.local.", RecordType::A);
        (found == ["10.88.0.2"]).then_some(())
    });
    let took = enter.elapsed();
    println!("from Enter to an answer of CoreDNS: {took:?}");
    assert!(took < MAX_TIME, "{took:?}");
}
