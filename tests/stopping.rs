//! Exit codes of a stop in which something goes wrong.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use hickory_proto::rr::RecordType;
use tempfile::TempDir;

use crate::support::{
    dns::{Over, answers},
    server::{Process, Server},
    tools, wait_until,
};

/// Takes a write lease on a file (fcntl(2)): whoever opens it waits until the lease is released.
const HOLD: &str = "import fcntl, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
file = open(sys.argv[1], 'rb+')
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print('held', flush=True)
sys.stdin.read()
";

/// A file that cannot be opened, for lease-break-time (45 s) at most.
struct HeldFile(Child);

impl HeldFile {
    fn hold(python: &Path, file: &Path) -> Self {
        let mut holder = Command::new(python)
            .args(["-c", HOLD])
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it can be run");
        let mut line = String::new();
        let stdout = holder.stdout.take().expect("it is piped");
        BufReader::new(stdout).read_line(&mut line).expect("it can be read");
        assert_eq!(line, "held\n");
        Self(holder)
    }
}

impl Drop for HeldFile {
    fn drop(&mut self) {
        // The holder ends with its stdin, and the lease with the holder.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// A data directory with three registrations, and its segment.
fn stored() -> (TempDir, PathBuf) {
    let mut server = Server::start_with(&["--drain", "0s"]);
    for last in 1..=3 {
        server.register("prod", "web", &format!("10.0.0.{last}"), "http=8080");
    }
    server.terminate();
    let data = server.into_data();
    let names = fs::read_dir(data.path()).expect("it is there").map(|entry| entry.expect("it can be read").path());
    let is_segment = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().contains("journal"));
    let segment = names.filter(is_segment).max().expect("a journal has a segment");
    (data, segment)
}

/// The signal comes as soon as the addresses are announced. The recovery hangs when the stop begins, and
/// fails then: in the drain time, or after it.
#[test]
fn part_that_fails_while_the_server_stops_gives_exit_code_1() {
    let Some(python) = tools::require_python() else { return };
    for drain in ["2s", "0s"] {
        let (data, segment) = stored();
        let mut bytes = fs::read(&segment).expect("it is there");
        let at = bytes.windows(4).position(|bytes| bytes == b"prod").expect("the namespace is in the record");
        bytes[at] = b'P';
        fs::write(&segment, bytes).expect("damage");
        let held = HeldFile::hold(&python, &segment);
        let mut process = Process::serve(data.path(), &["--drain", drain]);
        process.listening();
        process.signal_terminate();
        wait_until("the stop begins", || process.stderr().contains("shutting down").then_some(()));
        drop(held);
        let status = process.exit();
        let said = process.stderr();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains("while stopping: the registry failed") && said.contains("--accept-loss"), "{said}");
    }
}

#[test]
fn stop_with_a_journal_that_cannot_be_closed_gives_exit_code_1_and_loses_nothing() {
    let Some(python) = tools::require_python() else { return };
    let (data, segment) = stored();
    let held = HeldFile::hold(&python, &segment);
    let mut process = Process::serve(data.path(), &["--drain", "0s"]);
    process.listening();
    let status = process.terminate();
    let said = process.stderr();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("not everything stopped in time: the registry;"), "{said}");
    drop(held);
    let process = Process::serve(data.path(), &["--drain", "0s"]);
    let (_, [_, dns, _]) = process.ready();
    let found = answers(dns, Over::Udp, "web.prod.svc.cluster.local.", RecordType::A);
    assert_eq!(found, ["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
}

/// Nothing that was acknowledged is lost by it, so it is no failure of the stop.
#[test]
fn data_directory_that_is_gone_at_the_stop_gives_exit_code_0_and_a_warning() {
    let folder = TempDir::new().expect("a temporary directory");
    let data = folder.path().join("data");
    let mut process = Process::serve(&data, &["--drain", "0s"]);
    process.ready();
    fs::rename(&data, folder.path().join("moved")).expect("it is there");
    let status = process.terminate();
    let said = process.stderr();
    assert_eq!(status.code(), Some(0), "{said}");
    assert!(said.contains("was not closed cleanly"), "{said}");
}
