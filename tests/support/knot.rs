//! Knot DNS, with zones of the test's own.

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead as _, BufReader},
    net::{SocketAddr, TcpListener, UdpSocket},
    process::{Child, Command, Stdio},
    thread,
};

use tempfile::TempDir;

/// knotd, killed on drop.
pub(crate) struct Knot {
    child: Child,
    pub(crate) address: SocketAddr,
    dir: TempDir,
}

impl Knot {
    pub(crate) fn start(knotd: &std::path::Path, zones: &[(&str, String)]) -> Self {
        let dir = TempDir::new().expect("a temporary directory can be made");
        let at = dir.path().display();
        // knotd cannot report a port that the kernel chose, so it gets one that was free a moment ago.
        let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = free.local_addr().expect("it is bound");
        drop((UdpSocket::bind(address).expect("it is free for both"), free));
        let (ip, port) = (address.ip(), address.port());
        let mut config = format!(
            "server:\n  rundir: \"{at}\"\n  listen: {ip}@{port}\ndatabase:\n  storage: \"{at}\"\n\
             log:\n  - target: stderr\n    any: info\nzone:\n"
        );
        for (zone, records) in zones {
            fs::write(dir.path().join(zone), records).expect("it can be written");
            writeln!(config, "  - domain: {zone}\n    storage: \"{at}\"\n    file: \"{zone}\"").expect("a String");
        }
        let file = dir.path().join("knot.conf");
        fs::write(&file, config).expect("it can be written");
        let command = Command::new(knotd).arg("-c").arg(&file).stdin(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut child = command.expect("knotd can be run");
        let mut said = Vec::new();
        let mut lines = BufReader::new(child.stderr.take().expect("stderr is piped")).lines().map_while(Result::ok);
        while let Some(line) = lines.next() {
            let started = line.contains("server started");
            said.push(line);
            if started {
                // A full pipe would stop it.
                thread::spawn(move || lines.for_each(drop));
                return Self { child, address, dir };
            }
        }
        let _ = child.wait();
        panic!("knotd does not start:\n{}", said.join("\n"));
    }

    /// Serves other records in `zone`, whose serial must be higher.
    pub(crate) fn reload(&self, zone: &str, records: &str) {
        fs::write(self.dir.path().join(zone), records).expect("it can be written");
        let hangup = Command::new("kill").args(["-HUP", &self.child.id().to_string()]).status();
        assert!(hangup.expect("kill can be run").success());
    }
}

impl Drop for Knot {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
