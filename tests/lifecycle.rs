//! Start, stop, and disk faults: what is refused, what is reported, and what keeps working.

use std::{
    fs::{self, OpenOptions},
    io::{Seek as _, SeekFrom, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Instant,
};

use hickory_proto::{op::ResponseCode, rr::RecordType};
use tempfile::TempDir;

use crate::support::{
    WAIT_TIMEOUT,
    dns::{Over, answers, ask},
    http,
    server::{BINARY, Process, Server},
    small_disk::SmallDisk,
};

const WEB: &str = "web.prod.svc.cluster.local.";

/// Polls until `reached` returns true. Each poll goes over a socket, so that the loop yields the CPU.
fn wait_for(what: &str, mut reached: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !reached() {
        assert!(begun.elapsed() < WAIT_TIMEOUT, "waited in vain for this: {what}");
    }
}

/// `gangplank serve` that is expected to refuse to start.
fn refused(flags: &[&str]) -> String {
    let Output { status, stdout, stderr } =
        Command::new(BINARY).arg("serve").args(flags).stdin(Stdio::null()).output().expect("the binary can be run");
    let stderr = String::from_utf8(stderr).expect("UTF-8");
    assert_eq!(status.code(), Some(1), "{}{stderr}", String::from_utf8_lossy(&stdout));
    stderr
}

#[test]
fn sigterm_makes_the_server_unready_and_dns_answers_until_the_end_of_the_drain() {
    let mut server = Server::start_with(&["--drain", "5s"]);
    server.register("prod", "web", "10.0.0.1", "http=8080");
    assert_eq!(http::get(server.admin, "/readyz").0, 200);
    assert_eq!(http::get(server.admin, "/readyz/registrations").0, 200);
    server.signal_terminate();
    wait_for("readiness is down", || http::get(server.admin, "/readyz").0 == 503);
    assert_eq!(http::get(server.admin, "/readyz/registrations").0, 503);
    assert_eq!(http::get(server.admin, "/livez").0, 200);
    assert_eq!(answers(server.dns, Over::Udp, WEB, RecordType::A), ["10.0.0.1"]);
    assert_eq!(answers(server.dns, Over::Tcp, WEB, RecordType::A), ["10.0.0.1"]);
    let late = server.run(&["register", "web", "10.0.0.2", "-n", "prod"]);
    assert_eq!(late.status.code(), Some(1), "{late:?}");
    assert_eq!(server.exit().code(), Some(0));

    let server = server.restart();
    assert_eq!(answers(server.dns, Over::Udp, WEB, RecordType::A), ["10.0.0.1"]);
}

#[test]
fn sighup_does_not_end_the_process() {
    let mut server = Server::start_with(&["--drain", "0s"]);
    let sent = Command::new("sh").args(["-c", "kill -HUP \"$0\"", &server.pid().to_string()]).status();
    assert!(sent.expect("there is a shell").success());
    wait_for("the log says that it is ignored", || server.stderr().contains("SIGHUP is ignored"));
    server.register("prod", "web", "10.0.0.1", "http=8080");
    assert_eq!(server.terminate().code(), Some(0));
}

#[test]
fn second_process_on_the_data_directory_is_refused_with_its_holder() {
    let server = Server::start();
    let dir = server.data_dir().display().to_string();
    let any = "127.0.0.1:0";
    let said = refused(&["--data-dir", &dir, "--grpc-listen", any, "--dns-listen", any, "--admin-listen", any]);
    assert!(said.contains(&dir) && said.contains(&server.pid().to_string()), "{said}");
}

#[test]
fn second_process_on_an_address_is_refused_with_the_address() {
    let server = Server::start();
    let any = "127.0.0.1:0".to_owned();
    for (flag, taken) in
        [("--grpc-listen", server.grpc), ("--dns-listen", server.dns), ("--admin-listen", server.admin)]
    {
        let data = TempDir::new().expect("a temporary directory");
        let dir = data.path().display().to_string();
        let mut flags = vec!["--data-dir", &dir];
        let taken = taken.to_string();
        for listen in ["--grpc-listen", "--dns-listen", "--admin-listen"] {
            flags.extend([listen, if listen == flag { &taken } else { &any }]);
        }
        let said = refused(&flags);
        assert!(said.contains(flag) && said.contains(&taken), "{said}");
    }
    assert_eq!(ask(server.dns, Over::Udp, WEB, RecordType::A).response_code, ResponseCode::NXDomain);
}

#[test]
fn torn_tail_is_cut_and_earlier_damage_refuses_to_start() {
    let mut server = Server::start();
    for last in 1..=3 {
        server.register("prod", "web", &format!("10.0.0.{last}"), "http=8080");
    }
    server.kill9();
    let newest = newest_segment(server.data_dir());
    let whole = fs::read(&newest).expect("the segment is there");
    OpenOptions::new().append(true).open(&newest).and_then(|mut file| file.write_all(b"torn")).expect("a longer file");
    let server = server.restart();
    // The log comes through another pipe than the greeting, and may be read later.
    wait_for("the cut is said", || ["torn", "cut"].iter().any(|word| server.stderr().contains(word)));
    let mut served = answers(server.dns, Over::Udp, WEB, RecordType::A);
    served.sort();
    assert_eq!(served, ["10.0.0.1", "10.0.0.2", "10.0.0.3"]);

    // One bit of the first record: valid records follow it, so it is no torn tail.
    let data = server.into_data();
    let offset = whole.windows(4).position(|bytes| bytes == b"prod").expect("the namespace stands in the record");
    let mut file = OpenOptions::new().write(true).open(&newest).expect("the segment is there");
    file.seek(SeekFrom::Start(offset as u64)).and_then(|_| file.write_all(b"pROD")).expect("damage");
    let dir = data.path().display().to_string();
    let any = "127.0.0.1:0";
    let flags = ["--data-dir", &dir, "--grpc-listen", any, "--dns-listen", any, "--admin-listen", any];
    let said = refused(&flags);
    let name = newest.file_name().expect("a file").to_string_lossy().into_owned();
    assert!(said.contains(&name) && said.contains("--accept-loss"), "{said}");

    let process = Process::serve(data.path(), &["--accept-loss"]);
    process.ready();
}

#[test]
fn full_stdout_and_stderr_change_neither_the_server_nor_exit_codes() {
    let full = || OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
    let [.., high, low] = std::process::id().to_be_bytes();
    // A loopback address that no other test has: the ports are printed where nobody can read them.
    let [grpc, dns, admin] = [1, 2, 3].map(|port| SocketAddr::from(([127, 77, high, low], 20_000 + port)));
    let data = TempDir::new().expect("a temporary directory");
    let mut child = Command::new(BINARY)
        .args(["serve", "--drain", "0s", "--data-dir"])
        .arg(data.path())
        .args(["--grpc-listen", &grpc.to_string(), "--dns-listen", &dns.to_string()])
        .args(["--admin-listen", &admin.to_string()])
        .stdin(Stdio::null())
        .stdout(full())
        .stderr(full())
        .spawn()
        .expect("the binary can be run");
    let ended = |child: &mut Child| child.try_wait().expect("a child can be waited for");
    wait_for("it is ready, or has ended", || {
        ended(&mut child).is_some() || TcpStream::connect(admin).is_ok() && http::get(admin, "/readyz").0 == 200
    });
    assert_eq!(ended(&mut child), None, "it goes on without its words");

    let client = |arguments: &[&str]| {
        let server = format!("http://{grpc}");
        let mut command = Command::new(BINARY);
        command.args(arguments).env("GANGPLANK_SERVER", server).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(full()).status().expect("the binary can be run").code()
    };
    assert_eq!(client(&["register", "web", "10.0.0.1", "-n", "prod"]), Some(0));
    assert_eq!(client(&["ls", "-n", "empty"]), Some(0));
    assert_eq!(client(&["ls", "nope"]), Some(3));
    assert_eq!(answers(dns, Over::Udp, WEB, RecordType::A), ["10.0.0.1"]);
    let stopped = Command::new("sh").args(["-c", "kill -TERM \"$0\"", &child.id().to_string()]).status();
    assert!(stopped.expect("there is a shell").success(), "it still runs");
    assert_eq!(child.wait().expect("a child can be waited for").code(), Some(0));
}

/// The journal segment that was written last.
fn newest_segment(data: &Path) -> PathBuf {
    let files = fs::read_dir(data).expect("the data directory is there").map(|entry| entry.expect("readable").path());
    let mut segments: Vec<PathBuf> =
        files.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().contains("journal"))).collect();
    segments.sort();
    segments.pop().expect("a journal has a segment")
}

/// The next registration notices: it is refused, and so is one that would change nothing.
#[test]
fn removed_data_directory_or_lock_refuses_registrations_and_not_dns() {
    let remove_all = |path: &Path| fs::remove_dir_all(path).expect("the directory is there");
    let remove_lock = |path: &Path| fs::remove_file(path.join("LOCK")).expect("the lock is there");
    for (remove, unchanged) in [(&remove_all as &dyn Fn(&Path), false), (&remove_all, true), (&remove_lock, false)] {
        let data = TempDir::new().expect("a temporary directory");
        let path = data.path().join("data");
        let mut process = Process::serve(&path, &["--drain", "0s"]);
        let (_, [grpc, dns, admin]) = process.ready();
        let register = |address: &str| {
            Command::new(BINARY)
                .args(["register", "web", address, "--port", "http=8080", "-n", "prod"])
                .env("GANGPLANK_SERVER", format!("http://{grpc}"))
                .stdin(Stdio::null())
                .output()
                .expect("the binary can be run")
        };
        assert!(register("10.0.0.1").status.success());
        remove(&path);
        let refusal = register(if unchanged { "10.0.0.1" } else { "10.0.0.2" });
        assert_eq!(refusal.status.code(), Some(1), "{refusal:?}");
        let (status, body) = http::get(admin, "/readyz/registrations");
        assert_eq!(status, 503, "{body}");
        assert_eq!(http::get(admin, "/readyz").0, 200);
        assert_eq!(answers(dns, Over::Udp, WEB, RecordType::A), ["10.0.0.1"]);
        let name = path.display().to_string();
        wait_for("the log names the directory", || {
            process.stderr().lines().any(|line| line.contains(&name) && line.contains("was removed or replaced"))
        });
        assert_eq!(process.terminate().code(), Some(0));
    }
}

#[test]
fn segment_cut_after_a_clean_stop_refuses_to_start() {
    let data = TempDir::new().expect("a temporary directory");
    let mut process = Process::serve(data.path(), &["--drain", "0s"]);
    let (_, [grpc, ..]) = process.ready();
    let server = format!("http://{grpc}");
    for last in 1..=20 {
        let address = format!("10.0.0.{last}");
        let mut register = Command::new(BINARY);
        register.args(["register", "web", &address, "-n", "prod", "--server", &server]).stdin(Stdio::null());
        assert!(register.output().expect("the binary can be run").status.success());
    }
    assert_eq!(process.terminate().code(), Some(0));
    let newest = newest_segment(data.path());
    let file = OpenOptions::new().write(true).open(&newest).expect("the segment is there");
    file.set_len(file.metadata().expect("it is open").len() / 10).expect("it can be cut");
    let dir = data.path().display().to_string();
    let any = "127.0.0.1:0";
    let flags = ["--data-dir", &dir, "--grpc-listen", any, "--dns-listen", any, "--admin-listen", any];
    let said = refused(&flags);
    assert!(said.contains("bytes are missing at the end") && said.contains("--accept-loss"), "{said}");
    Process::serve(data.path(), &["--accept-loss"]).ready();
}

/// A small tmpfs, mounted read-only between two starts: root ignores permission bits.
#[test]
fn read_only_file_system_serves_dns_and_refuses_registrations() {
    let Some(disk) = SmallDisk::mount() else { return };
    let data = disk.path().join("data");
    let run = |grpc: SocketAddr, address: &str| {
        Command::new(BINARY)
            .args(["register", "web", address, "-n", "prod", "--server", &format!("http://{grpc}")])
            .stdin(Stdio::null())
            .output()
            .expect("the binary can be run")
    };
    let mut process = Process::serve(&data, &["--drain", "0s"]);
    let (_, [grpc, ..]) = process.ready();
    assert!(run(grpc, "10.0.0.1").status.success());
    assert_eq!(process.terminate().code(), Some(0));

    let remount = |how: &str| {
        let mounted = Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(disk.path()).status();
        assert!(mounted.expect("it was mounted with this command").success());
    };
    remount("ro");
    for lock in [true, false] {
        if !lock {
            remount("rw");
            fs::remove_file(data.join("LOCK")).expect("it is there");
            remount("ro");
        }
        let mut process = Process::serve(&data, &["--drain", "0s"]);
        let (_, [grpc, dns, admin]) = process.ready();
        assert_eq!(answers(dns, Over::Udp, WEB, RecordType::A), ["10.0.0.1"]);
        assert_eq!(run(grpc, "10.0.0.2").status.code(), Some(1));
        let (status, body) = http::get(admin, "/readyz/registrations");
        assert_eq!(status, 503, "{body}");
        assert!(body.contains("read-only"), "{body}");
        assert_eq!(http::get(admin, "/readyz").0, 200);
        wait_for("the error is logged", || process.stderr().contains("the file system is read-only"));
        let dir = data.display().to_string();
        let any = "127.0.0.1:0";
        let flags = ["--data-dir", &dir, "--grpc-listen", any, "--dns-listen", any, "--admin-listen", any];
        assert!(refused(&flags).contains("in use by"), "it is locked all the same");
        assert_eq!(process.terminate().code(), Some(0));
    }
    remount("rw");
    let process = Process::serve(&data, &["--drain", "0s"]);
    let (_, [grpc, ..]) = process.ready();
    assert!(run(grpc, "10.0.0.2").status.success());
}

#[test]
fn full_disk_stops_registrations_until_a_restart_and_not_dns() {
    let Some(disk) = SmallDisk::mount() else { return };
    let mut process = Process::serve(disk.path(), &["--drain", "0s"]);
    let (_, [grpc, dns, admin]) = process.ready();
    let client = |arguments: &[&str]| {
        Command::new(BINARY)
            .args(arguments)
            .env("GANGPLANK_SERVER", format!("http://{}", grpc))
            .stdin(Stdio::null())
            .output()
            .expect("the binary can be run")
    };
    let register = |address: &str| client(&["register", "web", address, "--port", "http=8080", "-n", "prod"]);
    assert!(register("10.0.0.1").status.success());

    let filler = disk.path().join("filler");
    let full = fs::write(&filler, vec![1; 1 << 20]);
    assert!(full.is_err(), "a megabyte does not fit");
    // The rest of the last page still has room for a few records.
    let mut acknowledged = vec!["10.0.0.1".to_owned()];
    let refusal = (2..=254).find_map(|last| {
        let address = format!("10.0.0.{last}");
        let output = register(&address);
        if output.status.success() {
            acknowledged.push(address);
            return None;
        }
        Some(output)
    });
    let refusal = refusal.expect("a full disk takes no more");
    assert_eq!(refusal.status.code(), Some(1), "{refusal:?}");
    let (status, body) = http::get(admin, "/readyz/registrations");
    assert_eq!(status, 503, "{body}");
    assert_eq!(http::get(admin, "/readyz").0, 200);

    // Free space is not enough: only a restart finds out what was written.
    fs::remove_file(&filler).expect("it was written");
    assert_eq!(register("10.1.0.1").status.code(), Some(1));
    acknowledged.sort();
    assert_eq!(answers(dns, Over::Tcp, WEB, RecordType::A), acknowledged);
    wait_for("the log says what to do", || process.stderr().contains("restart"));

    assert_eq!(process.terminate().code(), Some(0));
    let process = Process::serve(disk.path(), &["--drain", "0s"]);
    let (_, [_, dns, _]) = process.ready();
    assert_eq!(answers(dns, Over::Tcp, WEB, RecordType::A), acknowledged);
}
