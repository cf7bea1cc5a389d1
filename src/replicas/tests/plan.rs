//! What happens to a history: changes by clients, and faults, most changes close to faults.

use super::{
    aims::draw_aimed,
    random::Random,
    replica::Key,
    setup::Setup,
    world::{
        Disk, MILLISECOND, Micros, SECOND,
        edits::{Annotations, Edit},
    },
};

/// Whom a fault hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Machine(usize),
    /// Whoever holds the Lease then.
    Holder,
}

/// Something that happens to a history.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    /// A client registers a new value; one that is sustained does it again wherever the next writer is.
    Register {
        key: Key,
        sustained: bool,
    },
    /// A client registers what is there.
    RegisterAgain {
        key: Key,
    },
    /// Of an instance, or of every one of its address.
    Remove {
        key: Key,
    },
    Crash {
        machine: Target,
        time: Micros,
        disk: Disk,
        /// The machine boots meanwhile.
        boots: bool,
    },
    CrashAll {
        time: Micros,
    },
    /// The process stops and goes on (SIGSTOP, a suspended machine).
    Pause {
        machine: Target,
        time: Micros,
    },
    /// The API server cannot be reached.
    CutOff {
        machine: Target,
        time: Micros,
    },
    /// The other replicas cannot be reached.
    Alone {
        machine: usize,
        time: Micros,
    },
    /// Requests and watches are late, out of order, or lost.
    Chaos {
        time: Micros,
    },
    /// The API server answers nobody.
    Down {
        time: Micros,
    },
    /// A copy of the directory is made, for a crash to come.
    Copy {
        machine: usize,
    },
    /// The writer leaves in order.
    Release {
        machine: usize,
    },
    DeleteLease,
    /// The namespace in which a slice is.
    DeleteNamespace {
        slice: usize,
    },
    /// A hand writes a term into the Lease that no Lease ever had.
    EditLease,
    /// A hand edits a slice.
    Edit {
        slice: usize,
        edit: Edit,
        annotations: Annotations,
    },
}

impl Fault {
    pub(super) fn is_change(&self) -> bool {
        matches!(self, Self::Register { .. } | Self::RegisterAgain { .. } | Self::Remove { .. })
    }
}

/// Faults in the order in which they happen.
#[derive(Debug, Clone)]
pub(super) struct FaultPlan {
    pub(super) faults: Vec<(Micros, Fault)>,
    /// When everything heals.
    pub(super) heal: Micros,
}

impl FaultPlan {
    pub(super) fn draw(setup: &Setup, seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0xABC_DEF1_2345);
        let heal = if setup.away > 100 * SECOND { 100 * SECOND + setup.away } else { 130 * SECOND };
        let mut faults = Vec::new();
        let mut hot = Vec::new();
        for _ in 0..random.between(1, 7) {
            let time = random.between(8 * SECOND, heal - 10 * SECOND);
            hot.push(time);
            if let Some(fault) = draw_fault(setup, &mut random) {
                faults.push((time, fault));
            }
        }
        if setup.faults.old_copies {
            draw_old_copies(setup, &mut random, heal, &mut faults, &mut hot);
        }
        if setup.faults.edits {
            draw_edits(setup, &mut random, heal, &mut faults, &mut hot);
        }
        if !setup.aims.is_empty() {
            for _ in 0..random.between(1, 3) {
                let aim = setup.aims[random.between(0, setup.aims.len() as u64) as usize];
                draw_aimed(setup, aim, &mut random, heal, &mut faults, &mut hot);
            }
        }
        let all: Vec<Key> = setup.keys().collect();
        // Half of the histories fight over few keys.
        let few = random.percent(50);
        let keys = if few { random.between(1, all.len() as u64 + 1) } else { all.len() as u64 };
        for index in 0..random.between(4, setup.changes) {
            let time = if index < 2 {
                random.between(3 * SECOND, 9 * SECOND)
            } else if random.percent(75) {
                let near = hot[random.between(0, hot.len() as u64) as usize];
                let span = if random.percent(50) { 4 * SECOND } else { 45 * SECOND };
                (near + random.between(0, span + 3 * SECOND)).saturating_sub(3 * SECOND).max(3 * SECOND)
            } else {
                random.between(3 * SECOND, heal)
            };
            let key = all[random.between(0, keys) as usize];
            let change = match random.between(0, 100) {
                _ if index < 2 => Fault::Register { key, sustained: random.percent(setup.sustained) },
                0..45 => Fault::Register { key, sustained: random.percent(setup.sustained) },
                45..65 => Fault::RegisterAgain { key },
                65..90 => Fault::Remove { key },
                _ => Fault::Remove { key: key.every() },
            };
            faults.push((time.min(heal), change));
        }
        faults.sort_by_key(|(time, _)| *time);
        Self { faults, heal }
    }
}

fn draw_fault(setup: &Setup, random: &mut Random) -> Option<Fault> {
    let index = random.between(0, setup.replicas as u64) as usize;
    let machine = Target::Machine(index);
    let long = if random.percent(30) { setup.away.max(60 * SECOND) } else { 40 * SECOND };
    let time = random.between(SECOND, long);
    let fault = match random.between(0, 13) {
        0 | 1 if random.percent(20) => Fault::CrashAll { time: time.min(30 * SECOND) },
        0 | 1 => {
            let disk = if setup.faults.lost_disks && random.percent(40) {
                Disk::Lost
            } else if setup.faults.old_copies && random.percent(60) {
                Disk::Copy
            } else {
                Disk::Kept
            };
            Fault::Crash { machine, time: time.min(setup.away), disk, boots: random.percent(30) }
        }
        2 | 3 => Fault::Pause { machine, time: time.min(60 * SECOND) },
        4..=6 => Fault::CutOff { machine, time },
        7 => Fault::Chaos { time: time.min(60 * SECOND) },
        8 => Fault::Down { time: time.min(40 * SECOND) },
        9 => Fault::Release { machine: index },
        10 => Fault::Alone { machine: index, time },
        11 if setup.faults.deleted_leases => Fault::DeleteLease,
        _ => Fault::Chaos { time: time.min(60 * SECOND) },
    };
    Some(fault)
}

/// Edits by hand, some of them close together.
fn draw_edits(
    setup: &Setup,
    random: &mut Random,
    heal: Micros,
    faults: &mut Vec<(Micros, Fault)>,
    hot: &mut Vec<Micros>,
) {
    for _ in 0..random.between(1, 5) {
        let near = hot[random.between(0, hot.len() as u64) as usize];
        let mut time = if random.percent(50) { near } else { random.between(8 * SECOND, heal - 10 * SECOND) };
        hot.push(time);
        if random.percent(15) {
            faults.push((time.min(heal - 10 * SECOND), Fault::EditLease));
        }
        for _ in 0..random.between(1, 4) {
            time += random.between(0, 3 * SECOND);
            let slice = random.between(0, setup.slices as u64) as usize;
            let edit = match random.between(0, 10) {
                0..3 => Edit::RemoveWord,
                3 | 4 => Edit::ChangeValue,
                5 | 6 => Edit::DropTombstone,
                7 | 8 => Edit::DeleteSlice,
                _ => Edit::Nothing,
            };
            let annotations = match random.between(0, 10) {
                0..5 => Annotations::Kept,
                5 => Annotations::LowerTerm,
                6 => Annotations::HigherTerm,
                7 => Annotations::AbsurdTerm,
                _ => Annotations::HigherGeneration,
            };
            faults.push((time.min(heal - 10 * SECOND), Fault::Edit { slice, edit, annotations }));
        }
    }
}

/// Copies of directories, and crashes soon after one was made, with changes between.
fn draw_old_copies(
    setup: &Setup,
    random: &mut Random,
    heal: Micros,
    faults: &mut Vec<(Micros, Fault)>,
    hot: &mut Vec<Micros>,
) {
    for _ in 0..4 {
        let machine = random.between(0, setup.replicas as u64) as usize;
        faults.push((random.between(5 * SECOND, heal - 15 * SECOND), Fault::Copy { machine }));
    }
    for machine in 0..setup.replicas {
        let copied = random.between(10 * SECOND, heal - 15 * SECOND);
        faults.push((copied, Fault::Copy { machine }));
        let crashed = copied + random.between(50 * MILLISECOND, 4 * SECOND);
        if random.percent(50) {
            let time = random.between(SECOND, 20 * SECOND);
            let machine = Target::Machine(machine);
            faults.push((crashed, Fault::Crash { machine, time, disk: Disk::Copy, boots: random.percent(30) }));
            hot.push(copied + (crashed - copied) / 2);
        }
    }
}
