//! A real CoreDNS as a child process.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;

use super::{free_ports, tools::ROOT, wait_until};

/// CoreDNS until it is dropped.
pub(crate) struct CoreDns {
    /// Its address, UDP and TCP.
    pub(crate) address: SocketAddr,
    child: Child,
    dir: TempDir,
}

impl CoreDns {
    /// Starts it on a free port of loopback, with `corefile`, whose blocks end their heads in `:53 {`.
    /// `program` comes from `tools::require("coredns")`.
    pub(crate) fn start(program: &Path, corefile: &str) -> Self {
        let [port] = free_ports();
        // CoreDNS takes its port from the block's name, and listens on every address without `bind`.
        let fitted = corefile.replace(":53 {\n", &format!(":{port} {{\n    bind 127.0.0.1\n"));
        Self::start_at(program, SocketAddr::from((Ipv4Addr::LOCALHOST, port)), &fitted)
    }

    /// Starts it with `corefile` as it is, which listens at `address`.
    pub(crate) fn start_at(program: &Path, address: SocketAddr, corefile: &str) -> Self {
        let dir = TempDir::new().expect("a temporary directory");
        let path = dir.path().join("Corefile");
        fs::write(&path, corefile).expect("a Corefile");
        let child = Command::new(program).arg("-conf").arg(&path).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let mut started = Self { child: child.expect("CoreDNS starts"), address, dir };
        // CoreDNS listens once the kernel no longer refuses a query.
        wait_until("CoreDNS answers", || {
            let ended = started.child.try_wait().expect("a child can be waited for");
            assert!(ended.is_none(), "CoreDNS: {ended:?}, with this Corefile:\n{corefile}");
            started.listens().then_some(())
        });
        started
    }

    /// Only the kubernetes plugin, outside of the cluster: answers from that cluster's objects, for
    /// `cluster.local` and the reverse zones.
    ///
    /// CoreDNS listens before it has read everything: poll until the answer is there.
    pub(crate) fn with_kubernetes(program: &Path, kubeconfig: &Path, context: &str) -> Self {
        let corefile = format!(
            ".:53 {{\n    kubernetes cluster.local in-addr.arpa ip6.arpa {{\n        kubeconfig {} {context}\n    }}\n}}\n",
            kubeconfig.display()
        );
        Self::start(program, &corefile)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The file that it reads.
    pub(crate) fn corefile(&self) -> PathBuf {
        self.dir.path().join("Corefile")
    }

    fn listens(&self) -> bool {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
        // `. IN NS`, as bytes: any answer will do.
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

/// A configuration of `coredns/`, with the address of this gangplank.
pub(crate) fn corefile(name: &str, gangplank: SocketAddr) -> String {
    let text = fs::read_to_string(Path::new(ROOT).join("coredns").join(name)).expect("it is shipped");
    text.replace("10.96.0.53:1053", &gangplank.to_string())
}
