//! A writer that is killed, and one that stops, until another process takes registrations: beside client-go's leader election
//! with the same durations.
//!
//! Only with `GANGPLANK_MIRROR_FIGURES`: each kill takes 15 s and more, and the other program is not among the tools of CI.

use std::{
    env,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::rounds;
use crate::{
    mirror::{make_namespace, replica::Replica},
    support::{WAIT_TIMEOUT, cluster::Cluster, stream::Stream, tools, wait_until},
};

/// Of the rounds that are asked for.
const ROUNDS_PER_KILL: usize = 40;

/// Between two renewals of a Lease: an end comes anywhere in between.
const RENEWAL: Duration = Duration::from_secs(2);

/// One process of client-go's election.
struct Candidate {
    child: Child,
    lines: Receiver<(String, Instant)>,
}

impl Candidate {
    fn start(cluster: &Cluster, number: usize) -> Self {
        let mut child = Command::new(tools::bin().join("election"))
            .arg(cluster.kubeconfig_admin())
            .args(["gangplank", "election", &format!("candidate-{number}")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("`tests/tools/install.sh election` builds it");
        let out = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let (sender, lines) = mpsc::channel();
        // Ends with the child's end of the pipe.
        thread::spawn(move || {
            out.lines().map_while(Result::ok).try_for_each(|line| sender.send((line, Instant::now())))
        });
        Self { child, lines }
    }

    /// When it says this.
    fn wait_for(&self, wanted: &str) -> Instant {
        loop {
            let (line, at) = self.lines.recv_timeout(WAIT_TIMEOUT).expect("it goes on");
            if line == wanted {
                return at;
            }
        }
    }

    fn end(mut self, signal: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", signal, &pid]).status();
        assert!(sent.expect("there is a shell").success());
        self.child.wait().expect("a child can be waited for");
    }
}

impl Drop for Candidate {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn empty() -> TempDir {
    TempDir::new().expect("a temporary directory can be made")
}

fn pause() {
    let pause = RENEWAL.mul_f64(fastrand::f64());
    let begun = Instant::now();
    wait_until("the pause is over", || (begun.elapsed() >= pause).then_some(()));
}

/// Until this process takes a registration.
fn accepted_by(replica: &Replica, address: &str) -> Instant {
    wait_until("registrations are accepted", || {
        matches!(replica.register("figures", "web", address), 200..=202).then(Instant::now)
    })
}

fn report(what: &str, ours: &mut [f64], theirs: &mut [f64]) {
    let median = |times: &mut [f64]| {
        times.sort_unstable_by(f64::total_cmp);
        (times[times.len() / 2], times[0], times[times.len() - 1])
    };
    let (ours, theirs) = (median(ours), median(theirs));
    let text = |(median, least, most)| format!("{median:.2} s ({least:.2} to {most:.2})");
    println!("{what}: ours {}, client-go {}, ratio {:.2}", text(ours), text(theirs), ours.0 / theirs.0);
}

#[test]
fn take_over_beside_leader_election_of_client_go() {
    if env::var_os("GANGPLANK_MIRROR_FIGURES").is_none() {
        return;
    }
    let Some(cluster) = Cluster::private() else { return };
    let kubeconfig = cluster.kubeconfig_for_gangplank();
    let mut writer = Replica::start(&kubeconfig, empty());
    writer.wait_until_it_writes();
    make_namespace(&cluster, &mut Stream::open(writer.grpc), "figures");
    let mut leader = Candidate::start(&cluster, 0);
    leader.wait_for("leading");

    for (signal, what) in [("TERM", "stopped"), ("KILL", "killed")] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..rounds().div_ceil(ROUNDS_PER_KILL) {
            let follower = Replica::on_standby(&kubeconfig);
            pause();
            let begun = Instant::now();
            writer.signal(signal);
            let accepted = accepted_by(&follower, &format!("10.52.0.{}", round + 1));
            ours.push((accepted - begun).as_secs_f64());
            if signal == "TERM" {
                writer.exit_with(0);
            }
            writer = follower;

            let candidate = Candidate::start(&cluster, round + 1);
            candidate.wait_for("following");
            pause();
            let begun = Instant::now();
            leader.end(signal);
            theirs.push((candidate.wait_for("leading") - begun).as_secs_f64());
            leader = candidate;
            println!("{what}, round {round}: ours {:.2} s, client-go {:.2} s", ours[round], theirs[round]);
        }
        report(&format!("{what} → another one takes over"), &mut ours, &mut theirs);
    }
}
