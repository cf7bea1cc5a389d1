//! Two and three processes under load, with one fault after the other: nothing that was acknowledged is lost, nothing that was
//! removed comes back, and in the end all answer alike.
//!
//! Each process reaches the API server through a proxy of its own. Registrants for each process register and remove
//! instances there, as far as it takes them, and [`Words`] notes what each answer promises. In each round a fault is drawn; when it is
//! over, DNS of every process and the slices must hold what was promised.
//!
//! `GANGPLANK_TRIAL_ROUNDS` sets the rounds, `GANGPLANK_TRIAL_SEED` the order of the faults (the load is another one each time); `make trial` runs the long form.

mod rolling_update;
mod words;

use std::{
    collections::BTreeSet,
    env, fs,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use fastrand::Rng;
use hickory_proto::rr::RecordType;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use self::words::{Load, SERVICES, Target, Words};
use super::{ClusterLock, addresses, dns_name, make_namespace, replica::Replica};
use crate::support::{
    cluster::Cluster,
    dns::{Over, answers},
    http,
    proxy::{Fault as Injected, Proxy},
    stream::Stream,
    wait_until,
};

/// Rounds by default: enough for CI.
const ROUNDS: usize = 3;

/// Words that are answered before a fault, and during one that nobody else notices.
const WORDS: usize = 300;

#[derive(Debug, Clone, Copy)]
enum Fault {
    /// The API server cannot be reached, until another process has taken over, if it is the writer.
    Partition,
    /// SIGSTOP, for a while in which the Lease stays, or until another process has taken over.
    ShortPause,
    Pause,
    /// SIGKILL; then it starts again on its directory, on an older copy, or on an empty one.
    Kill,
    OldCopy,
    LostDisk,
    /// SIGTERM, and a new start.
    Restart,
    /// The Lease is deleted.
    LostLease,
}

const FAULTS: [Fault; 8] = [
    Fault::Partition,
    Fault::Pause,
    Fault::OldCopy,
    Fault::LostDisk,
    Fault::Kill,
    Fault::ShortPause,
    Fault::Restart,
    Fault::LostLease,
];

/// A process, and what stays when it ends.
struct Seat {
    proxy: Proxy,
    replica: Option<Replica>,
    target: Arc<Mutex<Option<Target>>>,
}

impl Seat {
    fn new(cluster: &Cluster) -> Self {
        Self { proxy: Proxy::start(cluster), replica: None, target: Arc::default() }
    }
}

struct Trial {
    cluster: &'static Cluster,
    namespace: &'static str,
    seats: Vec<Seat>,
    words: Arc<Words>,
    runtime: Runtime,
    directories: usize,
    rng: Rng,
}

fn empty() -> TempDir {
    TempDir::new().expect("a temporary directory can be made")
}

fn copy(from: &Path) -> TempDir {
    let copy = empty();
    for file in fs::read_dir(from).expect("a directory") {
        let file = file.expect("an entry");
        // A compaction may remove one meanwhile.
        let _ = fs::copy(file.path(), copy.path().join(file.file_name()));
    }
    copy
}

impl Trial {
    /// Starts the processes. A few more may be started on `spare` seats later.
    fn begin(lock: &ClusterLock, namespace: &'static str, (processes, spare): (usize, usize), seed: u64) -> Self {
        let cluster = lock.cluster;
        let mut trial = Self {
            cluster,
            namespace,
            seats: (0..processes + spare).map(|_| Seat::new(cluster)).collect(),
            words: Arc::new(Words::new()),
            runtime: Runtime::new().expect("a runtime"),
            directories: 0,
            rng: Rng::with_seed(seed),
        };
        for seat in 0..processes {
            trial.start(seat, empty(), None);
            if seat == 0 {
                trial.replica(0).wait_until_it_writes();
                make_namespace(cluster, &mut Stream::open(trial.replica(0).grpc), namespace);
            } else {
                trial.replica(seat).wait_until_it_follows();
            }
        }
        trial
    }

    fn replica(&self, seat: usize) -> &Replica {
        self.seats[seat].replica.as_ref().expect("it runs")
    }

    /// Starts a process on a directory; on its own one with the number of that.
    fn start(&mut self, seat: usize, data: TempDir, directory: Option<usize>) {
        let directory = directory.unwrap_or(self.directories);
        self.directories = self.directories.max(directory + 1);
        let seat = &mut self.seats[seat];
        let replica = Replica::start(seat.proxy.kubeconfig(), data);
        *seat.target.lock().expect("no panic") = Some(Target { grpc: replica.grpc, directory });
        seat.replica = Some(replica);
    }

    /// Ends registrations at a process that is about to end. Returns it, and the number of its directory.
    fn take(&mut self, seat: usize) -> (Replica, usize) {
        let seat = &mut self.seats[seat];
        let target = seat.target.lock().expect("no panic").take().expect("it runs");
        (seat.replica.take().expect("it runs"), target.directory)
    }

    /// Registrants at all processes.
    fn load(&self) -> Load {
        let targets: Vec<_> = self.seats.iter().map(|seat| Arc::clone(&seat.target)).collect();
        self.words.run(self.namespace, &targets, &self.runtime)
    }

    fn writes(&self, seat: usize) -> bool {
        let replica = self.seats[seat].replica.as_ref();
        replica.is_some_and(|replica| http::get(replica.admin, "/readyz/registrations").0 == 200)
    }

    /// Waits until one of these processes writes, and returns it.
    fn wait_for_writer(&self, but: Option<usize>) -> usize {
        wait_until("a process writes", || (0..self.seats.len()).find(|seat| Some(*seat) != but && self.writes(*seat)))
    }

    fn wait_for_words(&self) {
        let before = self.words.answered().0;
        wait_until("registrants get answers", || (self.words.answered().0 >= before + WORDS).then_some(()));
    }

    /// Under load; the fault is over when this returns.
    fn fault(&mut self, fault: Fault, seat: usize, is_writer: bool) {
        let others_take_over = |trial: &Self| {
            if is_writer {
                trial.wait_for_writer(Some(seat));
            }
            trial.wait_for_words();
        };
        match fault {
            Fault::Partition => {
                let cut = self.seats[seat].proxy.inject(Injected::Drop, |_| true);
                self.seats[seat].proxy.drop_connections();
                others_take_over(self);
                cut.lift();
            }
            Fault::ShortPause => {
                self.replica(seat).signal("STOP");
                let begun = Instant::now();
                let pause = Duration::from_millis(self.rng.u64(100..9_000));
                wait_until("the pause is over", || (begun.elapsed() >= pause).then_some(()));
                self.replica(seat).signal("CONT");
            }
            Fault::Pause => {
                self.replica(seat).signal("STOP");
                others_take_over(self);
                self.replica(seat).signal("CONT");
            }
            Fault::Kill => {
                let (replica, directory) = self.take(seat);
                let data = replica.kill();
                if self.rng.bool() {
                    others_take_over(self);
                }
                self.start(seat, data, Some(directory));
            }
            Fault::OldCopy => {
                let old = copy(self.replica(seat).data_dir());
                self.wait_for_words();
                let (replica, directory) = self.take(seat);
                drop(replica.kill());
                self.words.lose(directory);
                if self.rng.bool() {
                    others_take_over(self);
                }
                self.start(seat, old, None);
            }
            Fault::LostDisk => {
                let (replica, directory) = self.take(seat);
                drop(replica.kill());
                self.words.lose(directory);
                self.start(seat, empty(), None);
            }
            Fault::Restart => {
                let (replica, directory) = self.take(seat);
                let data = replica.terminate();
                self.start(seat, data, Some(directory));
            }
            Fault::LostLease => {
                self.cluster.kubectl(&["delete", "lease", "gangplank-writer", "-n", "gangplank"]);
            }
        }
    }

    /// One writer, and every other one follows it and has handed over what it had. Returns the writer.
    fn wait_until_settled(&self) -> usize {
        wait_until("one writes, the others follow, and nothing is left to hand over", || {
            let writers: Vec<_> = (0..self.seats.len()).filter(|seat| self.writes(*seat)).collect();
            let [writer] = writers[..] else { return None };
            let settled = self.seats.iter().enumerate().all(|(seat, _)| {
                let replica = self.replica(seat);
                let page = http::get(replica.admin, "/readyz/registrations").1;
                let follows = page.contains("on standby") && http::get(replica.admin, "/readyz").0 == 200;
                (seat == writer || follows) && replica.metric("gangplank_registry_outbox_words") == 0.0
            });
            settled.then_some(writer)
        })
    }

    /// The addresses of each service, by DNS of every process and in the slices.
    fn found(&self) -> Vec<Vec<BTreeSet<String>>> {
        let services = || (0..SERVICES).map(|service| format!("s{service}"));
        let by_dns = |replica: &Replica| {
            let addresses =
                |service: String| answers(replica.dns, Over::Udp, &dns_name(self.namespace, &service), RecordType::A);
            services().map(|service| addresses(service).into_iter().collect()).collect()
        };
        let replicas = self.seats.iter().filter_map(|seat| seat.replica.as_ref()).map(by_dns);
        let slices =
            services().map(|service| addresses(self.cluster, self.namespace, &service).into_iter().collect()).collect();
        replicas.chain([slices]).collect()
    }

    /// Waits until all hold the same, and that is what was promised.
    fn check(&self, round: &str) {
        let begun = Instant::now();
        let mut before = Vec::new();
        wait_until("all hold what was promised", || {
            let found = self.found();
            let mut wrong = self.words.check(&found[0], &self.runtime);
            if found.iter().any(|one| *one != found[0]) {
                wrong.push(format!("not alike: {found:?}"));
            }
            if wrong != before {
                wrong.iter().for_each(|wrong| println!("{round}: after {:?}: {wrong}", begun.elapsed()));
                before.clone_from(&wrong);
            }
            wrong.is_empty().then_some(())
        });
    }

    fn round(&mut self, number: usize) {
        let fault = FAULTS[if number < FAULTS.len() { number } else { self.rng.usize(..FAULTS.len()) }];
        let writer = self.wait_for_writer(None);
        // Mostly the writer: a follower has little to lose.
        let seat = if number % 5 == 4 { (writer + 1) % self.seats.len() } else { writer };
        let round = format!("round {number}: {fault:?} of the {}", if seat == writer { "writer" } else { "follower" });
        let load = self.load();
        self.wait_for_words();
        let begun = Instant::now();
        self.words.take_gap();
        self.fault(fault, seat, seat == writer);
        let healed = Instant::now();
        self.wait_for_writer(None);
        self.wait_for_words();
        let gap = self.words.take_gap();
        load.join(&self.runtime);
        let writer = self.wait_until_settled();
        let settled = healed.elapsed();
        self.check(&round);
        let alike = healed.elapsed().saturating_sub(settled);
        // And nothing comes back late.
        let target = self.seats[writer].target.lock().expect("no panic").expect("it runs");
        wait_until("every instance is known again", || {
            self.words.settle(self.namespace, target, &self.runtime).then_some(())
        });
        self.check(&round);
        let (answered, durable) = self.words.answered();
        println!(
            "{round}, {:.1?}; no word was taken for {gap:.1?}; settled {settled:.1?} after it, alike {alike:.1?} after that; {answered} words so far, {durable} with 202",
            healed - begun
        );
    }
}

fn run(namespace: &'static str, processes: usize, first: usize) {
    let Some(lock) = ClusterLock::take() else { return };
    let number =
        |variable: &str, otherwise: usize| env::var(variable).map_or(otherwise, |text| text.parse().expect("a number"));
    let rounds = number("GANGPLANK_TRIAL_ROUNDS", ROUNDS);
    let seed = (number("GANGPLANK_TRIAL_SEED", 1) * 10 + processes) as u64;
    println!("{rounds} rounds with {processes} processes, seed {seed}");
    let mut trial = Trial::begin(&lock, namespace, (processes, 0), seed);
    // A short form has other faults with two processes than with three.
    (first..first + rounds).for_each(|round| trial.round(round));
}

#[test]
fn two_processes_keep_what_was_acknowledged() {
    run("trial-two", 2, 0);
}

#[test]
fn three_processes_keep_what_was_acknowledged() {
    run("trial-three", 3, 3);
}
