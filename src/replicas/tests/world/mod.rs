//! The world around the replicas: an API server with compare-and-swap, requests that are late or lost, watches that
//! lag, clocks that differ, and the faults of a [`FaultPlan`]. Everything is drawn from one seed.

pub(super) mod edits;
mod faults;
mod network;
mod steps;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    time::Duration,
};

use super::{
    super::{
        lease::{DirectoryId, LeaseRecord, LeaseWrite, ObservedLease, RequestId, ResourceVersion},
        time::{BootTime, Now},
        word::Word,
    },
    checker::{Checker, Violation},
    plan::{Fault, FaultPlan, Target},
    random::Random,
    replica::{Clocks, Directory, Key, Observed, Output, Record, Replica, SliceWrite, Value, last_word, value_of},
    setup::Setup,
};
use crate::model::{HybridClock, Stamp};

/// Microseconds of simulated time.
pub(super) type Micros = u64;
pub(super) const MILLISECOND: Micros = 1_000;
pub(super) const SECOND: Micros = 1_000_000;

/// Where the wall clocks begin: late enough that a whole lifetime of tombstones lies behind.
const EPOCH: Micros = 1_000_000 * SECOND;

#[derive(Debug, Clone)]
enum Request {
    ReadLease(RequestId),
    WriteLease(RequestId, Option<ResourceVersion>, LeaseRecord),
    List(u64),
    /// A follower's list, behind which its watch begins.
    ListAndWatch,
    ReadSlice(u64, usize),
    WriteSlice(u64, usize, Option<u64>, Record),
    DeleteSlice(u64, usize, u64),
}

#[derive(Debug, Clone)]
enum Response {
    Lease(Option<ObservedLease>),
    /// All slices, and the place in the log of changes behind which they stand.
    List(Vec<Option<Observed>>, usize),
    Slice(Option<Observed>),
    Written(u64),
    Conflict,
}

#[derive(Debug)]
struct Call {
    replica: usize,
    epoch: u32,
    request: Request,
    sent: Micros,
    began: BootTime,
    response: Option<Response>,
    answered: bool,
}

#[derive(Debug, Clone)]
enum SimulatedEvent {
    Fault(usize),
    Tick(usize, u32),
    Execute(usize),
    Answered(usize),
    TimedOut(usize),
    Watch(usize, u32, u32),
    Arrive(usize, usize),
    Commit(usize, u32, usize),
    Overdue(usize, u32, usize),
    Reply(usize, u32, usize, u16),
    HandOver { to: usize, from: usize, epoch: u32, words: Vec<(Key, Word<Value>)> },
    HandedOver { to: usize, epoch: u32, words: Vec<(Key, Stamp)> },
    Restart(usize),
    Sustain(Key),
    Heal,
}

/// A machine with a replica on it.
#[derive(Debug)]
struct Machine {
    replica: Option<Replica>,
    directory: Directory,
    /// On which machine, and at which of its boots, the directory was opened last.
    opened: (usize, u32),
    copies: Vec<(Directory, (usize, u32))>,
    boots: u32,
    /// Grows with every start: what belongs to a former process is dropped.
    epoch: u32,
    paused_until: Micros,
    /// Time that the process was paused, for clocks that stop.
    stopped: Micros,
    cut_off_until: Micros,
    /// Until when its peers cannot be reached.
    alone_until: Micros,
    /// Clock rate, in thousandths.
    rate: u64,
    /// Wall clock minus truth.
    skew: i64,
    /// Changes that arrived and are not in the journal yet.
    arrived: Vec<usize>,
    watching: bool,
    watch: u32,
    position: usize,
    last_watch: Micros,
    listing: bool,
}

pub(super) struct World {
    setup: Setup,
    plan: FaultPlan,
    time: Micros,
    end: Micros,
    queue: BinaryHeap<Reverse<(Micros, usize)>>,
    events: Vec<Option<SimulatedEvent>>,
    random: Random,
    version: u64,
    lease: Option<ObservedLease>,
    slices: Vec<Option<Observed>>,
    /// Every change of a slice, as watches deliver it.
    log: Vec<(usize, u64, Option<Observed>)>,
    calls: Vec<Call>,
    machines: Vec<Machine>,
    checker: Checker,
    /// What hands did to slices and is not repaired yet.
    edited: BTreeMap<Key, edits::Edited>,
    /// Namespaces that were deleted, by slice: as of which version, when, and until when they are away.
    namespaces: BTreeMap<usize, (u64, Micros, Micros)>,
    deletions_seen: BTreeSet<(usize, u64)>,
    /// Clients that repeat a registration: its value, and who has their stream.
    sustained: BTreeMap<Key, (Value, usize)>,
    next_value: Value,
    next_directory: u128,
    chaos_until: Micros,
    down_until: Micros,
    healed: bool,
    pub(super) takeovers: u64,
    trace: bool,
}

impl World {
    pub(super) fn new(setup: Setup, seed: u64, plan: FaultPlan, trace: bool) -> Self {
        let mut random = Random::new(seed);
        let machines = (0..setup.replicas)
            .map(|index| Machine {
                replica: None,
                directory: Directory::new(DirectoryId(index as u128 + 1)),
                opened: (index, 0),
                copies: Vec::new(),
                boots: 0,
                epoch: 0,
                paused_until: 0,
                stopped: 0,
                cut_off_until: 0,
                alone_until: 0,
                rate: random.between(990, 1_011),
                skew: random.between(0, 2 * setup.skew + 1) as i64 - setup.skew as i64,
                arrived: Vec::new(),
                watching: false,
                watch: 0,
                position: 0,
                last_watch: 0,
                listing: false,
            })
            .collect();
        let mut world = Self {
            setup,
            time: 0,
            end: plan.heal + setup.settle,
            queue: BinaryHeap::new(),
            events: Vec::new(),
            random,
            version: 10,
            lease: None,
            slices: vec![None; setup.slices],
            log: Vec::new(),
            calls: Vec::new(),
            machines,
            checker: Checker::new(2 * setup.skew, setup.ports),
            edited: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            deletions_seen: BTreeSet::new(),
            sustained: BTreeMap::new(),
            next_value: 1,
            next_directory: 100,
            chaos_until: 0,
            down_until: 0,
            healed: false,
            takeovers: 0,
            trace,
            plan,
        };
        for index in 0..world.plan.faults.len() {
            world.at(world.plan.faults[index].0, SimulatedEvent::Fault(index));
        }
        for index in 0..setup.replicas {
            let begin = world.random.between(0, 500 * MILLISECOND) + index as u64 * 300 * MILLISECOND;
            world.at(begin, SimulatedEvent::Restart(index));
        }
        world.at(world.plan.heal, SimulatedEvent::Heal);
        world
    }

    /// Runs the history to its end. Returns what went wrong.
    pub(super) fn run(&mut self) -> Vec<Violation> {
        while let Some(Reverse((time, index))) = self.queue.pop() {
            if time > self.end {
                break;
            }
            self.time = time;
            let event = self.events[index].take().expect("an event happens once");
            // A paused process sees what happened when it goes on.
            if let Some(machine) = self.owner(&event)
                && self.machines[machine].paused_until > time
            {
                let later = self.machines[machine].paused_until + self.random.between(0, 5 * MILLISECOND);
                self.at(later, event);
                continue;
            }
            self.happen(event);
        }
        self.time = self.end;
        self.judge()
    }

    /// What the API server saw in all of the history: requests, and each version of each slice.
    pub(super) fn summary(&self) -> String {
        format!("{} requests, {} take-overs: {:?} {:?}", self.calls.len(), self.takeovers, self.lease, self.log)
    }

    fn owner(&self, event: &SimulatedEvent) -> Option<usize> {
        match event {
            SimulatedEvent::Tick(machine, _)
            | SimulatedEvent::Watch(machine, ..)
            | SimulatedEvent::Arrive(machine, _)
            | SimulatedEvent::Commit(machine, ..)
            | SimulatedEvent::Overdue(machine, ..)
            | SimulatedEvent::Reply(machine, ..) => Some(*machine),
            SimulatedEvent::HandOver { to, .. } | SimulatedEvent::HandedOver { to, .. } => Some(*to),
            SimulatedEvent::Answered(call) | SimulatedEvent::TimedOut(call) => Some(self.calls[*call].replica),
            SimulatedEvent::Fault(_)
            | SimulatedEvent::Execute(_)
            | SimulatedEvent::Restart(_)
            | SimulatedEvent::Sustain(_)
            | SimulatedEvent::Heal => None,
        }
    }

    fn happen(&mut self, event: SimulatedEvent) {
        match event {
            SimulatedEvent::Fault(index) => self.fault(self.plan.faults[index].1.clone()),
            SimulatedEvent::Tick(machine, epoch) => self.tick(machine, epoch),
            SimulatedEvent::Execute(call) => self.execute(call),
            SimulatedEvent::Answered(call) => {
                let response = self.calls[call].response.clone();
                self.answered(call, response);
            }
            SimulatedEvent::TimedOut(call) => self.answered(call, None),
            SimulatedEvent::Watch(machine, epoch, watch) => self.watch(machine, epoch, watch),
            SimulatedEvent::Arrive(machine, op) => {
                if self.machines[machine].replica.as_ref().is_some_and(Replica::may_accept) {
                    self.machines[machine].arrived.push(op);
                    let epoch = self.machines[machine].epoch;
                    let delay = self.random.between(200, 4 * MILLISECOND);
                    self.at(self.time + delay, SimulatedEvent::Commit(machine, epoch, op));
                } else {
                    self.checker.answered(op, 503, self.time);
                }
            }
            SimulatedEvent::Commit(machine, epoch, op) => self.commit(machine, epoch, op),
            SimulatedEvent::Overdue(machine, epoch, op) => {
                self.step(machine, epoch, |replica, _| replica.overdue(op));
            }
            SimulatedEvent::Reply(machine, epoch, op, status) => {
                // A process that is gone answers nothing.
                if self.machines[machine].epoch == epoch {
                    self.checker.answered(op, status, self.time);
                    self.tell(|| format!("replica {machine} answers change {op} with {status}"));
                }
            }
            SimulatedEvent::HandOver { to, from, epoch, words } => {
                let current = self.machines[to].epoch;
                let _ = epoch;
                self.tell(|| format!("replica {from} hands over to {to}: {words:?}"));
                self.step(to, current, |replica, at| replica.take_in(at, from, words));
            }
            SimulatedEvent::HandedOver { to, epoch, words } => {
                self.step(to, epoch, |replica, _| replica.handed_over(&words));
            }
            SimulatedEvent::Restart(machine) => self.restart(machine),
            SimulatedEvent::Sustain(key) => self.sustain(key),
            SimulatedEvent::Heal => self.heal(),
        }
    }

    fn at(&mut self, time: Micros, event: SimulatedEvent) {
        self.queue.push(Reverse((time.max(self.time), self.events.len())));
        self.events.push(Some(event));
    }

    fn tell(&self, line: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{:>11.3} s  {}", self.time as f64 / SECOND as f64, line());
        }
    }

    fn boot(&self, machine: usize) -> BootTime {
        let Machine { rate, stopped, .. } = self.machines[machine];
        let stopped = if self.setup.faults.stopping_clocks { stopped } else { 0 };
        // Begins late, so that nothing is before the beginning.
        BootTime(Duration::from_micros((1_000 * SECOND + self.time - stopped.min(self.time)) * rate / 1_000))
    }

    fn clocks(&self, machine: usize) -> Clocks {
        let wall = (EPOCH + self.time).saturating_add_signed(self.machines[machine].skew);
        let now = Now { boot: self.boot(machine), unix_seconds: wall / SECOND, eligible: true };
        Clocks { now, wall }
    }

    fn keys(&self) -> impl Iterator<Item = Key> + use<> {
        self.setup.keys()
    }

    fn judge(&mut self) -> Vec<Violation> {
        let truth = |key: &Key| -> Value {
            self.slices[key.slice].as_ref().map_or(0, |(_, record)| value_of(&record.words, *key))
        };
        let replicas = || self.machines.iter().filter_map(|machine| machine.replica.as_ref());
        let mut found = Vec::new();
        if replicas().filter(|replica| replica.is_writer()).count() != 1 {
            found.push(Violation::NotOneWriter);
        }
        if self.keys().any(|key| replicas().any(|replica| replica.answers(key) != truth(&key))) {
            found.push(Violation::AnswersDiffer);
        }
        if replicas().any(|replica| !replica.outbox_is_empty()) {
            found.push(Violation::OutboxLeft);
        }
        for key in self.keys() {
            self.checker.check_end(key, truth(&key), self.time);
        }
        found.extend(self.checker.violations());
        found.sort_unstable();
        found.dedup();
        found
    }
}

/// What a crash does to the directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Disk {
    /// Nothing.
    Kept,
    /// It is empty afterwards.
    Lost,
    /// An older copy takes its place.
    Copy,
    /// A copy of the directory of a replica that may be alive takes its place.
    CopyOf(Target),
}
