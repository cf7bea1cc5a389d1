//! Long-running programs that never outlive the tests, and the watchdog that ends them.
//!
//! A test process ends without dropping its statics, and may be killed at any time. So a small shell
//! reads a pipe whose other end this process holds: when that end closes, for whatever reason, the
//! shell kills the programs and deletes the cluster's folder.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::Mutex,
};

use tempfile::TempDir;

use crate::support::wait_until;

/// `+PID` and `-PID`, a line each, until the pipe closes. Signals that a terminal sends to
/// its whole process group must not end the shell first. A killed program may still write for a
/// moment, so `rm` can fail once on a folder that was empty.
const WATCHDOG: &str = r#"trap '' INT TERM HUP
pids=' '
while read -r line; do
    pid=${line#?}
    case $line in
        +*) pids="$pids$pid " ;;
        -*) pids="${pids%% $pid *} ${pids#* $pid }" ;;
    esac
done
for pid in $pids; do kill -9 "$pid"; done
for attempt in 1 2 3 4 5; do rm -rf "$0" && break; done"#;

/// Kills the processes and deletes the folder of one cluster once this process lets go of it.
#[derive(Debug)]
pub(super) struct Watchdog {
    folder: PathBuf,
    shell: Mutex<(Child, Option<ChildStdin>)>,
}

impl Watchdog {
    /// Creates the folder and starts the shell.
    pub(super) fn start() -> Self {
        let folder = TempDir::with_prefix("gangplank-cluster-").expect("a temporary directory can be made").keep();
        let mut command = Command::new("sh");
        command.args(["-c", WATCHDOG]).arg(&folder).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut shell = command.spawn().expect("there is a shell");
        let pipe = shell.stdin.take();
        Self { folder, shell: Mutex::new((shell, pipe)) }
    }

    /// The cluster's folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    fn tell(&self, sign: char, pid: u32) {
        let mut shell = self.shell.lock().expect("nobody panics here");
        let pipe = shell.1.as_mut().expect("it is open until this is dropped");
        writeln!(pipe, "{sign}{pid}").expect("the watchdog reads");
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let shell = self.shell.get_mut().expect("nobody panics here");
        shell.1 = None;
        let _ = shell.0.wait();
    }
}

/// One program that runs until it is stopped, with its log in the cluster's folder.
#[derive(Debug)]
pub(super) struct Daemon {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command`, whose log is `NAME.log`, and tells the watchdog.
    pub(super) fn start(name: &'static str, command: &mut Command, watchdog: &Watchdog) -> Self {
        let log = watchdog.folder().join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log).expect("a log can be written");
        let copy = file.try_clone().expect("a descriptor is free");
        let child = command.stdin(Stdio::null()).stdout(copy).stderr(file).spawn();
        let child = child.unwrap_or_else(|error| panic!("{name} cannot be started: {error}"));
        watchdog.tell('+', child.id());
        Self { name, child, log }
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// The last lines of the log.
    pub(super) fn log_tail(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let tail = String::from_utf8_lossy(&log[log.len().saturating_sub(4000)..]).into_owned();
        format!("the end of {}'s log:\n{tail}", self.name)
    }

    /// Sends a signal by its name, without `SIG`.
    pub(super) fn signal(&self, signal: &str) {
        // The shell's builtin kill: a kill program may be missing, and libc::kill is unsafe.
        let pid = self.child.id().to_string();
        let sent = Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", signal, &pid]).status();
        assert!(sent.expect("there is a shell").success(), "{} still runs", self.name);
    }

    /// Sends SIGKILL; the program may have ended before.
    pub(super) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for the exit, and tells the watchdog to forget the process id.
    pub(super) fn wait(mut self, watchdog: &Watchdog) -> ExitStatus {
        let what = format!("the end of {}", self.name);
        let status = wait_until(&what, || self.ended());
        watchdog.tell('-', self.pid());
        status
    }
}
