//! A process beside the one of a harness, on the same cluster.

use std::{net::SocketAddr, path::Path};

use tempfile::TempDir;

use crate::support::{http, server::Process, stream::Stream, wait_until};

pub(super) struct Replica {
    process: Process,
    pub(super) grpc: SocketAddr,
    pub(super) dns: SocketAddr,
    pub(super) admin: SocketAddr,
    data: TempDir,
}

impl Replica {
    /// Starts a process on an empty data directory and waits until it follows the one that writes.
    pub(super) fn on_standby(kubeconfig: &Path) -> Self {
        Self::on_standby_with(kubeconfig, &[])
    }

    /// The same with more flags for `serve`.
    pub(super) fn on_standby_with(kubeconfig: &Path, flags: &[&str]) -> Self {
        let replica = Self::start_with(kubeconfig, TempDir::new().expect("a temporary directory can be made"), flags);
        replica.wait_until_it_follows();
        replica
    }

    /// Starts a process on a data directory.
    pub(super) fn start(kubeconfig: &Path, data: TempDir) -> Self {
        Self::start_with(kubeconfig, data, &[])
    }

    /// The same with more flags for `serve`.
    pub(super) fn start_with(kubeconfig: &Path, data: TempDir, flags: &[&str]) -> Self {
        Self::start_with_clock(kubeconfig, data, flags, 0)
    }

    /// The same with the clock shifted by so many milliseconds.
    pub(super) fn start_with_clock(kubeconfig: &Path, data: TempDir, flags: &[&str], offset: i64) -> Self {
        let kubeconfig = ["--kubeconfig", kubeconfig.to_str().expect("a path in UTF-8")];
        let drain: &[&str] = if flags.contains(&"--drain") { &[] } else { &["--drain", "1s"] };
        let process = Process::serve_with_clock(offset, data.path(), &[&kubeconfig, drain, flags].concat());
        let [grpc, dns, admin] = process.listening();
        Self { process, grpc, dns, admin, data }
    }

    pub(super) fn wait_until_it_follows(&self) {
        wait_until("it follows", || {
            let (registrations, text) = http::get(self.admin, "/readyz/registrations");
            let follows = registrations == 503 && text.contains("on standby");
            (follows && http::get(self.admin, "/readyz").0 == 200).then_some(())
        });
    }

    pub(super) fn wait_until_it_writes(&self) {
        wait_until("it writes", || (http::get(self.admin, "/readyz/registrations").0 == 200).then_some(()));
    }

    pub(super) fn register(&self, namespace: &str, service: &str, address: &str) -> u32 {
        Stream::open(self.grpc).register(namespace, service, address).0
    }

    pub(super) fn remove(&self, namespace: &str, service: &str, address: &str) -> u32 {
        Stream::open(self.grpc).remove(namespace, service, address).0
    }

    /// The value of one series of a scrape.
    pub(super) fn metric(&self, series: &str) -> f64 {
        let (status, text) = http::get(self.admin, "/metrics");
        assert_eq!(status, 200);
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().expect("a number")
    }

    /// Sends this signal.
    pub(super) fn signal(&self, name: &str) {
        self.process.signal(name);
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub(super) fn data_dir(&self) -> &Path {
        self.data.path()
    }

    /// The log so far.
    pub(super) fn stderr(&self) -> String {
        self.process.stderr()
    }

    /// Sends SIGTERM, waits for the end, and returns the data directory.
    pub(super) fn terminate(mut self) -> TempDir {
        assert!(self.process.terminate().success());
        self.data
    }

    /// Waits until it exits with this code, and returns the log and the data directory.
    pub(super) fn exit_with(mut self, code: i32) -> (String, TempDir) {
        let status = self.process.exit();
        let said = self.process.stderr();
        assert_eq!(status.code(), Some(code), "{said}");
        (said, self.data)
    }

    /// Sends SIGKILL, and returns the data directory.
    pub(super) fn kill(self) -> TempDir {
        // Dropping a process kills it.
        drop(self.process);
        self.data
    }
}
