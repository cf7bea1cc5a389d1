//! CoreDNS in front, with the configurations that are shipped: a real one, asked by a raw client.

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use hickory_proto::{op::ResponseCode, rr::RecordType};
use tempfile::TempDir;

use crate::support::{
    PATIENCE,
    dns::{Over, answers, ask},
    server::Server,
    tools,
};

/// A server with one service of two instances.
fn server_with_web() -> Server {
    let server = Server::start();
    server.register("prod", "web", "10.0.0.1", "http=8080");
    server.register("prod", "web", "2001:db8::1", "http=8080");
    server
}

/// CoreDNS with one of the shipped configurations, until it is dropped.
struct CoreDns {
    child: Child,
    address: SocketAddr,
    _dir: TempDir,
}

impl CoreDns {
    /// Starts it on a free port of loopback; `rewrite` makes the shipped file fit this machine.
    fn start(program: &Path, corefile: &str, gangplank: SocketAddr, rewrite: impl Fn(String) -> String) -> Self {
        let shipped = fs::read_to_string(Path::new(tools::ROOT).join("coredns").join(corefile)).expect("it is shipped");
        let free = UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port");
        let fitted = rewrite(shipped.replace("10.96.0.53:1053", &gangplank.to_string()));
        // CoreDNS takes its port from the block's name, and listens everywhere unless told where.
        let fitted = fitted.replace(":53 {\n", &format!(":{} {{\n    bind 127.0.0.1\n", free.port()));
        let dir = TempDir::new().expect("a temporary directory");
        let path = dir.path().join("Corefile");
        fs::write(&path, fitted).expect("a Corefile");
        let child = Command::new(program).arg("-conf").arg(&path).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let started = Self { child: child.expect("CoreDNS starts"), address: free, _dir: dir };
        // It listens as soon as a question is not refused by the kernel.
        let begun = Instant::now();
        while !started.listens() {
            assert!(begun.elapsed() < PATIENCE, "CoreDNS does not answer");
        }
        started
    }

    fn listens(&self) -> bool {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
        // `. IN NS`, by hand: any answer will do.
        let question = [7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1];
        socket.connect(self.address).is_ok() && socket.send(&question).is_ok() && socket.recv(&mut [0; 512]).is_ok()
    }
}

impl Drop for CoreDns {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn coredns_forwards_a_stub_domain() {
    let Some(program) = tools::require("coredns") else { return };
    let server = server_with_web();
    let coredns = CoreDns::start(&program, "stub-domain.Corefile", server.dns, |corefile| corefile);
    let through = |name: &str, rtype| answers(coredns.address, Over::Udp, name, rtype);
    assert_eq!(through("web.prod.svc.cluster.local.", RecordType::A), ["10.0.0.1"]);
    assert_eq!(through("_http._tcp.web.prod.svc.cluster.local.", RecordType::SRV).len(), 2);
    let mixed = ask(coredns.address, Over::Udp, "wEb.PROD.svc.Cluster.local.", RecordType::A);
    assert_eq!(mixed.answers.len(), 1, "CoreDNS takes the answer only with the question's case");
    for missing in ["nothing.prod.svc.cluster.local.", "web.prod.svc.cluster.local.prod.svc.cluster.local."] {
        assert_eq!(ask(coredns.address, Over::Udp, missing, RecordType::A).response_code, ResponseCode::NXDomain);
    }
    // What is registered now is there now: nothing in between remembers the miss.
    server.register("prod", "nothing", "10.0.0.9", "http=8080");
    assert_eq!(through("nothing.prod.svc.cluster.local.", RecordType::A), ["10.0.0.9"]);
}

#[test]
fn coredns_asks_for_what_others_do_not_know() {
    let Some(program) = tools::require("coredns") else { return };
    let server = server_with_web();
    // There is no Kubernetes here, so that its plugin goes; another gangplank, which knows another
    // address, stands for the resolver behind the general `forward`.
    let elsewhere = Server::start();
    elsewhere.register("other", "far", "10.9.9.9", "http=8080");
    let rewrite = |corefile: String| {
        let begin = corefile.find("    kubernetes ").expect("the plugin is configured");
        let end = begin + corefile[begin..].find("    }\n").expect("its block ends") + "    }\n".len();
        corefile.replace(&corefile[begin..end], "").replace("/etc/resolv.conf", &elsewhere.dns.to_string())
    };
    let coredns = CoreDns::start(&program, "fall-through.Corefile", server.dns, rewrite);
    let through = |name: &str, rtype| answers(coredns.address, Over::Udp, name, rtype);
    assert_eq!(through("web.prod.svc.cluster.local.", RecordType::A), ["10.0.0.1"]);
    assert_eq!(through("1.0.0.10.in-addr.arpa.", RecordType::PTR), ["10-0-0-1.web.prod.svc.cluster.local."]);
    assert_eq!(through("9.9.9.10.in-addr.arpa.", RecordType::PTR), ["10-9-9-9.far.other.svc.cluster.local."]);
    assert_eq!(
        ask(coredns.address, Over::Udp, "nothing.prod.svc.cluster.local.", RecordType::A).response_code,
        ResponseCode::NXDomain
    );
}
