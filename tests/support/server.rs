//! `gangplank serve` as a child process on free ports with a data directory of its own.

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader, Read as _},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{
        Arc, Mutex,
        mpsc::{self, Receiver},
    },
    thread,
    time::Instant,
};

use tempfile::TempDir;

use super::{WAIT_TIMEOUT, secrets};

/// The binary under test.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_gangplank");

/// A server that runs until it is dropped.
///
/// Its ports are read from stdout, where it prints `listening <what> <address>` for each listener and
/// `ready generation <n>` once it answers.
#[derive(Debug)]
pub(crate) struct Server {
    /// The gRPC address.
    pub(crate) grpc: SocketAddr,
    /// The DNS address, UDP and TCP.
    pub(crate) dns: SocketAddr,
    /// The admin address.
    pub(crate) admin: SocketAddr,
    /// The lines on stdout up to and including `ready`.
    pub(crate) greeting: Vec<String>,
    process: Process,
    data: TempDir,
    flags: Vec<String>,
}

/// A child that is killed on drop, and its output.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    stdout: Receiver<String>,
    stderr: Arc<Mutex<String>>,
}

impl Server {
    /// Starts with defaults, on free ports, with a new data directory, and waits until it is ready.
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same with more flags for `serve`.
    pub(crate) fn start_with(flags: &[&str]) -> Self {
        let data = TempDir::new().expect("a temporary directory can be made");
        Self::start_on(data, flags.iter().map(|&flag| flag.to_owned()).collect())
    }

    /// Starts on this data directory and waits until it is ready.
    pub(crate) fn start_on(data: TempDir, flags: Vec<String>) -> Self {
        let process = Process::serve(data.path(), &flags);
        let (greeting, [grpc, dns, admin]) = process.ready();
        Self { grpc, dns, admin, greeting, process, data, flags }
    }

    /// Sends SIGKILL and waits for the exit.
    pub(crate) fn kill9(&mut self) {
        self.process.child.kill().expect("the server still runs");
        self.process.child.wait().expect("a killed child can be waited for");
    }

    /// Sends SIGTERM and returns the exit status.
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        self.process.terminate()
    }

    /// Sends this signal.
    pub(crate) fn signal(&self, name: &str) {
        self.process.signal(name);
    }

    /// Sends SIGTERM without waiting.
    pub(crate) fn signal_terminate(&self) {
        self.process.signal_terminate();
    }

    /// Waits for the exit and returns its status.
    pub(crate) fn exit(&mut self) -> ExitStatus {
        self.process.exit()
    }

    /// The log so far.
    pub(crate) fn stderr(&self) -> String {
        self.process.stderr()
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Kills the server and returns its data directory.
    pub(crate) fn into_data(mut self) -> TempDir {
        self.kill9();
        self.data
    }

    /// Starts again on the same data directory, with new ports; a process that still runs is killed.
    pub(crate) fn restart(self) -> Self {
        let Self { process, data, flags, .. } = self;
        drop(process);
        Self::start_on(data, flags)
    }

    /// The data directory.
    pub(crate) fn data_dir(&self) -> &Path {
        self.data.path()
    }

    /// Runs a subcommand of the binary against this server.
    pub(crate) fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Output {
        Command::new(BINARY)
            .args(arguments)
            .env("GANGPLANK_SERVER", format!("http://{}", self.grpc))
            .env("GANGPLANK_DNS", self.dns.to_string())
            .stdin(Stdio::null())
            .output()
            .expect("the binary can be run")
    }

    /// Registers through the command line, which must succeed.
    pub(crate) fn register(&self, namespace: &str, service: &str, address: &str, port: &str) {
        let output = self.run(&["register", service, address, "--port", port, "-n", namespace]);
        assert!(output.status.success(), "register {service} {address}: {output:?}");
    }
}

impl Process {
    /// Starts `gangplank serve` on free ports and on this data directory; does not wait.
    pub(crate) fn serve<S: AsRef<OsStr>>(data: &Path, flags: &[S]) -> Self {
        Self::spawn(Command::new(BINARY), data, flags)
    }

    /// The same, with its clock shifted by so many milliseconds. A release build does not do it, and says nothing.
    pub(crate) fn serve_with_clock<S: AsRef<OsStr>>(offset: i64, data: &Path, flags: &[S]) -> Self {
        Self::serve_with_variable(("GANGPLANK_TEST_CLOCK_OFFSET_MS", &offset.to_string()), data, flags)
    }

    /// The same, with an environment variable.
    pub(crate) fn serve_with_variable<S: AsRef<OsStr>>(
        (variable, value): (&str, &str),
        data: &Path,
        flags: &[S],
    ) -> Self {
        let mut command = Command::new(BINARY);
        command.env(variable, value);
        Self::spawn(command, data, flags)
    }

    /// The same with another binary than the one under test.
    pub(crate) fn serve_binary<S: AsRef<OsStr>>(binary: &Path, data: &Path, flags: &[S]) -> Self {
        Self::spawn(Command::new(binary), data, flags)
    }

    /// The same, with at most so many open descriptors.
    pub(crate) fn serve_within(descriptors: usize, data: &Path) -> Self {
        let mut limited = Command::new("prlimit");
        limited.arg(format!("--nofile={descriptors}:{descriptors}")).arg(BINARY);
        Self::spawn::<&str>(limited, data, &[])
    }

    fn spawn<S: AsRef<OsStr>>(mut gangplank: Command, data: &Path, flags: &[S]) -> Self {
        let mut child = gangplank
            .args(["serve", "--grpc-listen", "127.0.0.1:0", "--dns-listen", "127.0.0.1:0"])
            .args(["--admin-listen", "127.0.0.1:0", "--data-dir"])
            .arg(data)
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary can be run");
        let (lines, stdout) = mpsc::channel();
        let out = BufReader::new(child.stdout.take().expect("stdout is piped"));
        // Both threads end with the child's ends of the pipes.
        thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
        let stderr = Arc::new(Mutex::new(String::new()));
        let mut err = child.stderr.take().expect("stderr is piped");
        let said = Arc::clone(&stderr);
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = err.read(&mut chunk) {
                said.lock().expect("nobody panics here").push_str(&String::from_utf8_lossy(&chunk[..count]));
            }
        });
        Self { child, stdout, stderr }
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line on stdout.
    pub(crate) fn line(&self) -> String {
        self.stdout
            .recv_timeout(WAIT_TIMEOUT)
            .unwrap_or_else(|error| panic!("no line on stdout ({error}); stderr so far:\n{}", self.stderr()))
    }

    /// What was written to stderr so far.
    pub(crate) fn stderr(&self) -> String {
        self.stderr.lock().expect("nobody panics here").clone()
    }

    /// Waits until it listens, ready or not: where gRPC, DNS and admin do.
    pub(crate) fn listening(&self) -> [SocketAddr; 3] {
        ["grpc", "dns", "admin"].map(|what| {
            let prefix = format!("listening {what} ");
            loop {
                if let Some(address) = self.line().strip_prefix(&prefix) {
                    return address.parse().expect("an address and a port");
                }
            }
        })
    }

    /// Waits until it is ready: what it has printed, and where gRPC, DNS and admin listen.
    pub(crate) fn ready(&self) -> (Vec<String>, [SocketAddr; 3]) {
        let mut greeting = Vec::new();
        while !greeting.last().is_some_and(|line: &String| line.starts_with("ready generation ")) {
            greeting.push(self.line());
        }
        let addresses = ["grpc", "dns", "admin"].map(|what| {
            greeting
                .iter()
                .find_map(|line| line.strip_prefix("listening ")?.strip_prefix(what)?.strip_prefix(' '))
                .unwrap_or_else(|| panic!("no line `listening {what} ADDRESS` in {greeting:?}"))
                .parse()
                .expect("an address and a port")
        });
        (greeting, addresses)
    }

    /// Sends SIGTERM and returns the exit status.
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        self.signal_terminate();
        self.exit()
    }

    /// Sends SIGTERM without waiting.
    pub(crate) fn signal_terminate(&self) {
        self.signal("TERM");
    }

    /// Sends this signal.
    pub(crate) fn signal(&self, name: &str) {
        // The shell's builtin kill: a kill program may be missing, and libc::kill is unsafe.
        let script = format!("kill -{name} \"$0\"");
        let signal = Command::new("sh").args(["-c", &script, &self.child.id().to_string()]).status();
        assert!(signal.expect("there is a shell").success(), "the server still runs");
    }

    /// Waits for the exit and returns its status.
    pub(crate) fn exit(&mut self) -> ExitStatus {
        // stdout closes when the process ends; waiting for that, unlike `Child::wait`, can time out.
        let limit = Instant::now() + WAIT_TIMEOUT;
        loop {
            match self.stdout.recv_timeout(limit.saturating_duration_since(Instant::now())) {
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("it does not end; stderr so far:\n{}", self.stderr()),
            }
        }
        self.child.wait().expect("a child can be waited for")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both may fail because the process was already reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            println!("gangplank said:\n{}", self.stderr());
        } else {
            // Of every test, with whatever it did.
            secrets::assert_none_in("the log of a server", &self.stderr());
        }
    }
}
