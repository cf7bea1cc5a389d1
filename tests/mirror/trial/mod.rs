//! Two and three processes under load, with one fault after the other: nothing that was acknowledged is lost, nothing that was
//! removed comes back, and in the end all answer alike.
//!
//! Each process reaches the API server through a proxy of its own. Registrants for each process register and remove
//! instances there, as far as it takes them, and [`Words`] notes what each answer promises. In each round a fault is drawn ([`Plan`]);
//! when it is over, DNS of every process and the slices must hold what was promised: the addresses, priorities, weights and port names.
//!
//! `make trial` runs the long form. These variables set it:
//!
//! * `GANGPLANK_TRIAL_ROUNDS`: the rounds with two processes, and those with three.
//! * `GANGPLANK_TRIAL_LANES`: how many control planes, each with processes of its own, share the rounds.
//! * `GANGPLANK_TRIAL_SEED`: for the plan of all rounds, and what the registrants say; it is printed.
//! * `GANGPLANK_TRIAL_FIRST`: the number of the first round, to run a part.

mod clocks;
mod found;
mod load;
mod plan;
mod queries;
mod report;
mod rolling_update;
mod rounds;
mod words;

use std::{
    env, fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::runtime::Runtime;

use self::{
    found::Found,
    load::{Load, Pace, Registrant, SharedTarget},
    plan::Plan,
    report::{MAX_EQUAL, Report, RoundContext},
    words::{Target, Words},
};
use super::{ClusterLock, make_namespace, private_cluster_lock, replica::Replica};
use crate::support::{cluster::Cluster, http, proxy::Proxy, stream::Stream, wait_until};

/// Rounds by default: enough for CI.
const ROUNDS: usize = 2;

/// Words that are answered before a fault, and during one that nobody else notices.
const WORDS: usize = 300;

/// Of each service.
const INSTANCES: usize = 12;

const PACE: Pace = Pace { registrants: 6, interval: Duration::from_millis(12), roams: false };

/// A process, and what stays when it ends.
struct Seat {
    proxy: Proxy,
    replica: Option<Replica>,
    target: SharedTarget,
    /// By how many milliseconds its clock is shifted.
    offset: i64,
}

impl Seat {
    fn new(cluster: &Cluster) -> Self {
        Self { proxy: Proxy::start(cluster), replica: None, target: Arc::default(), offset: 0 }
    }
}

struct Trial<'c> {
    cluster: &'c Cluster,
    namespace: &'static str,
    seats: Vec<Seat>,
    words: Arc<Words>,
    pace: Pace,
    runtime: Runtime,
    directories: usize,
}

fn empty() -> TempDir {
    TempDir::new().expect("a temporary directory can be made")
}

pub(super) fn copy(from: &Path) -> TempDir {
    let copy = empty();
    for file in fs::read_dir(from).expect("a directory") {
        let file = file.expect("an entry");
        // A compaction may remove one meanwhile.
        let _ = fs::copy(file.path(), copy.path().join(file.file_name()));
    }
    copy
}

/// A variable's number.
fn number(variable: &str, otherwise: usize) -> usize {
    env::var(variable).map_or(otherwise, |text| text.parse().expect("a number"))
}

impl<'c> Trial<'c> {
    /// Starts the processes. A few more may be started on `spare` seats later.
    fn begin(
        cluster: &'c Cluster,
        namespace: &'static str,
        (processes, spare): (usize, usize),
        (instances, pace): (usize, Pace),
    ) -> Self {
        let mut trial = Self {
            cluster,
            namespace,
            seats: (0..processes + spare).map(|_| Seat::new(cluster)).collect(),
            words: Arc::new(Words::new(instances)),
            pace,
            runtime: Runtime::new().expect("a runtime"),
            directories: 0,
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
        let replica = Replica::start_with_clock(seat.proxy.kubeconfig(), data, &[], seat.offset);
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
    fn load(&self, seed: u64) -> Load {
        let targets: Vec<_> = self.seats.iter().map(|seat| Arc::clone(&seat.target)).collect();
        Load::start(&self.words, (self.namespace, &targets[..]), self.pace, seed, &self.runtime)
    }

    fn writes(&self, seat: usize) -> bool {
        let replica = self.seats[seat].replica.as_ref();
        replica.is_some_and(|replica| http::get(replica.admin, "/readyz/registrations").0 == 200)
    }

    /// Waits until one of these processes writes, and returns it.
    fn wait_for_writer(&self, but: Option<usize>) -> usize {
        wait_until("a process writes", || (0..self.seats.len()).find(|seat| Some(*seat) != but && self.writes(*seat)))
    }

    fn wait_for_words(&self, count: usize) {
        let before = self.words.promised();
        wait_until("registrants get answers", || (self.words.promised() >= before + count).then_some(()));
    }

    /// DNS of this process answers.
    fn wait_for_dns(&self, seat: usize) {
        wait_until("its DNS is ready", || (http::get(self.replica(seat).admin, "/readyz").0 == 200).then_some(()));
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

    /// What DNS of each process says.
    fn found_by_dns(&self) -> Vec<Found> {
        let replicas = self.seats.iter().filter_map(|seat| seat.replica.as_ref());
        replicas.map(|replica| Found::by_dns(replica.dns, self.namespace)).collect()
    }

    /// Waits until all hold the same, and that is what was promised.
    fn check(&self, round: &str) {
        let begun = Instant::now();
        let mut before = Vec::new();
        wait_until("all hold what was promised", || {
            let mut found = self.found_by_dns();
            found.push(Found::in_slices(self.cluster, self.namespace));
            let mut wrong = self.words.check(&found[0]);
            for (at, other) in found.iter().enumerate().filter(|(_, other)| **other != found[0]) {
                wrong.push(format!("{at} of {} is not like the first: {:?}", found.len(), found[0].difference(other)));
            }
            // Slices and watches need a moment.
            if wrong != before && begun.elapsed() > MAX_EQUAL {
                wrong.iter().for_each(|wrong| println!("{round}: after {:?}: {wrong}", begun.elapsed()));
                before.clone_from(&wrong);
            }
            wrong.is_empty().then_some(())
        });
    }

    /// Says a word on each instance whose state is not known, until all are.
    fn settle(&self, writer: usize, seed: u64) {
        let target = self.seats[writer].target.lock().expect("no panic").expect("it runs");
        let mut registrant = Registrant::new(&self.words, self.namespace, seed);
        wait_until("every instance is known again", || {
            for index in self.words.open() {
                if self.runtime.block_on(registrant.one(target, index)) {
                    self.runtime.block_on(self.words.close(index));
                }
            }
            self.words.open().is_empty().then_some(())
        });
    }
}

/// The rounds of one lane on its own processes: every so-manieth one.
fn lane(cluster: &Cluster, processes: usize, seed: u64, rounds: &[usize], failed: &AtomicBool) -> Report {
    let namespace = if processes == 2 { "trial-two" } else { "trial-three" };
    let mut report = Report::default();
    let mut trial = Trial::begin(cluster, namespace, (processes, 0), (INSTANCES, PACE));
    for &number in rounds {
        if failed.load(SeqCst) {
            break;
        }
        let plan = Plan::draw(seed, processes, number);
        let _context = RoundContext { seed, processes, number, plan, failed };
        report.add(trial.round(number, plan));
    }
    report.statuses = trial.words.statuses();
    report
}

fn run(processes: usize, first: usize) {
    let lanes = number("GANGPLANK_TRIAL_LANES", 1);
    let first = number("GANGPLANK_TRIAL_FIRST", first);
    let seed = number("GANGPLANK_TRIAL_SEED", 1) as u64;
    let rounds: Vec<usize> = (first..first + number("GANGPLANK_TRIAL_ROUNDS", ROUNDS)).collect();
    println!("{} rounds with {processes} processes in {lanes} lanes, seed {seed}", rounds.len());
    let begun = Instant::now();
    let failed = AtomicBool::new(false);
    let of_lane = |lane: usize| rounds.iter().copied().skip(lane).step_by(lanes).collect::<Vec<_>>();
    let reports: Vec<Report> = if lanes == 1 {
        let Some(lock) = ClusterLock::take() else { return };
        vec![lane(lock.cluster, processes, seed, &rounds, &failed)]
    } else {
        let _alone = private_cluster_lock();
        let clusters: Option<Vec<Cluster>> = (0..lanes).map(|_| Cluster::private()).collect();
        let Some(clusters) = clusters else { return };
        thread::scope(|scope| {
            let start = |(number, cluster)| {
                let (rounds, failed) = (of_lane(number), &failed);
                scope.spawn(move || lane(cluster, processes, seed, &rounds, failed))
            };
            let lanes: Vec<_> = clusters.iter().enumerate().map(start).collect();
            lanes.into_iter().map(|lane| lane.join().expect("nothing is wrong")).collect()
        })
    };
    let report = reports.into_iter().fold(Report::default(), Report::join);
    assert_eq!(report.rounds(), rounds.len());
    report.print(processes, begun.elapsed());
}

#[test]
fn two_processes_keep_what_was_acknowledged() {
    run(2, 0);
}

#[test]
fn three_processes_keep_what_was_acknowledged() {
    run(3, 2);
}
