//! Sequences of faults, each aimed at a rule that faults drawn one by one hardly ever hit.

use super::{
    plan::{Fault, Target},
    random::Random,
    replica::Key,
    setup::Setup,
    world::{
        Disk, MILLISECOND, Micros, SECOND,
        edits::{Annotations, Edit},
    },
};

/// A sequence of faults that is aimed at one rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Aim {
    /// A hand writes a slice's generation while a change waits for the slice, and the writer is lost soon after.
    EditWhileWaiting,
    /// The Lease is deleted when a writer that was away for longer than it lasts comes back.
    LeaseDeletedAfterAbsence,
    /// The Lease is deleted while a writer's requests are late, so that it does not make the Lease again in time, and goes on to
    /// write slices.
    LeaseDeletedUnseen,
    /// A deposed writer hands over to one that is lost before Kubernetes has the words.
    ReceiverLost,
    /// Replicas start while the API server is away, or out of their reach.
    StartAlone,
    /// A namespace is deleted under a writer, and a replica that wrote before takes over again.
    NamespaceDeleted,
    /// A replica starts with a copy of a living replica's directory, and both go on.
    Twins,
    /// A replica starts with a copy of the writer's directory, from the middle of a term, and goes on without the API server,
    /// while the writer goes on under the same term. Then the writer gives the Lease up, and the copy takes it.
    CopyOfATerm,
}

pub(super) fn draw_aimed(
    setup: &Setup,
    aim: Aim,
    random: &mut Random,
    heal: Micros,
    faults: &mut Vec<(Micros, Fault)>,
    hot: &mut Vec<Micros>,
) {
    let slice = random.between(0, setup.slices as u64) as usize;
    let any = |random: &mut Random| Key {
        slice,
        address: random.between(0, setup.addresses as u64) as usize,
        ports: random.between(0, setup.ports as u64) as usize,
    };
    let key = any(random);
    let begin = random.between(25 * SECOND, heal - 45 * SECOND);
    let machine = Target::Holder;
    hot.push(begin);
    match aim {
        Aim::EditWhileWaiting => {
            faults.push((begin - SECOND, Fault::Chaos { time: random.between(2 * SECOND, 10 * SECOND) }));
            faults.push((begin, Fault::Register { key, sustained: false }));
            let edited = begin + random.between(10 * MILLISECOND, 900 * MILLISECOND);
            let annotations = Annotations::HigherGeneration;
            faults.push((edited, Fault::Edit { slice, edit: Edit::Nothing, annotations }));
            let crashed = edited + random.between(100 * MILLISECOND, 3 * SECOND);
            let time = random.between(SECOND, 40 * SECOND);
            faults.push((crashed, Fault::Crash { machine, time, disk: Disk::Lost, boots: false }));
        }
        Aim::LeaseDeletedAfterAbsence => {
            let time = random.between(15 * SECOND, 40 * SECOND);
            let away =
                if random.percent(50) { Fault::Pause { machine, time } } else { Fault::CutOff { machine, time } };
            faults.push((begin, away));
            let back = begin + time;
            faults.push((back + random.between(0, 2 * SECOND) - SECOND, Fault::DeleteLease));
            hot.push(back - 3 * SECOND);
            hot.push(back);
        }
        Aim::LeaseDeletedUnseen => {
            faults.push((begin - SECOND, Fault::Chaos { time: random.between(6 * SECOND, 15 * SECOND) }));
            faults.push((begin, Fault::DeleteLease));
            if random.percent(50) {
                faults.push((begin, Fault::CutOff { machine, time: random.between(3 * SECOND, 8 * SECOND) }));
            }
            for _ in 0..3 {
                let key = any(random);
                let asked = begin + random.between(0, 8 * SECOND);
                faults.push((asked, Fault::Register { key, sustained: false }));
            }
            hot.push(begin + 5 * SECOND);
        }
        Aim::ReceiverLost => {
            let time = random.between(17 * SECOND, 30 * SECOND);
            faults.push((begin, Fault::CutOff { machine, time }));
            faults.push((begin + random.between(0, time), Fault::Register { key, sustained: false }));
            let back = begin + time;
            let cut = back + random.between(0, 4 * SECOND);
            faults.push((cut, Fault::CutOff { machine, time: random.between(2 * SECOND, 10 * SECOND) }));
            let crashed = cut + random.between(0, 6 * SECOND);
            let time = random.between(SECOND, 30 * SECOND);
            faults.push((crashed, Fault::Crash { machine, time, disk: Disk::Lost, boots: false }));
            hot.push(back);
        }
        Aim::StartAlone => {
            let away = random.between(15 * SECOND, 60 * SECOND);
            let all = random.percent(50);
            if all {
                faults.push((begin, Fault::Down { time: away }));
            }
            for _ in 0..random.between(1, 4) {
                let index = random.between(0, setup.replicas as u64) as usize;
                let machine = if random.percent(60) { Target::Holder } else { Target::Machine(index) };
                let crashed = (begin + random.between(0, 12 * SECOND)).saturating_sub(2 * SECOND);
                if !all {
                    faults.push((crashed.min(begin), Fault::CutOff { machine, time: away }));
                }
                let disk = if random.percent(80) { Disk::Kept } else { Disk::Copy };
                let time = random.between(SECOND, 15 * SECOND);
                faults.push((crashed, Fault::Crash { machine, time, disk, boots: random.percent(50) }));
                hot.push(crashed + time);
            }
            hot.push(begin + away);
        }
        Aim::NamespaceDeleted => {
            let begin = begin.min(60 * SECOND);
            for _ in 0..2 {
                let key = any(random);
                let asked = begin - random.between(SECOND, 5 * SECOND);
                faults.push((asked, Fault::Register { key, sustained: false }));
            }
            let time = random.between(18 * SECOND, 40 * SECOND);
            let disk = Disk::Kept;
            faults.push((begin, Fault::Crash { machine, time, disk, boots: random.percent(30) }));
            let deleted = begin + random.between(17 * SECOND, 30 * SECOND);
            faults.push((deleted, Fault::DeleteNamespace { slice }));
            let next = deleted + random.between(100 * MILLISECOND, 15 * SECOND);
            let time = random.between(20 * SECOND, 60 * SECOND);
            faults.push((next, Fault::Crash { machine, time, disk, boots: false }));
            hot.push(deleted);
        }
        Aim::CopyOfATerm => {
            let index = random.between(0, setup.replicas as u64) as usize;
            let (copy, writer) = (Target::Machine(index), (index + 1) % setup.replicas);
            let begin = begin.min(60 * SECOND);
            let alone = random.between(15 * SECOND, 40 * SECOND);
            let released = begin + alone;
            faults.push((begin - SECOND, Fault::Register { key, sustained: false }));
            // It starts when the Lease is given up; or before, alone, and takes registrations.
            let early = random.percent(50);
            let time = if early { random.between(SECOND, 3 * SECOND) } else { alone };
            let disk = Disk::CopyOf(Target::Machine(writer));
            if early {
                faults.push((begin, Fault::CutOff { machine: copy, time: alone }));
            }
            faults.push((begin, Fault::Crash { machine: copy, time, disk, boots: random.percent(50) }));
            for _ in 0..2 {
                let key = any(random);
                let asked = begin + random.between(3 * SECOND, alone);
                faults.push((asked, Fault::Register { key, sustained: false }));
            }
            let deleted = begin + random.between(3 * SECOND, alone - 5 * SECOND);
            faults.push((deleted, Fault::DeleteNamespace { slice }));
            faults.push((released, Fault::Release { machine: writer }));
            hot.push(begin);
        }
        Aim::Twins => {
            let index = random.between(0, setup.replicas as u64) as usize;
            let twin = Target::Machine((index + 1) % setup.replicas);
            let of = if random.percent(50) { Target::Holder } else { Target::Machine(index) };
            let time = random.between(SECOND, 5 * SECOND);
            faults.push((begin, Fault::Crash { machine: twin, time, disk: Disk::CopyOf(of), boots: true }));
            let again = begin + time + random.between(SECOND, 10 * SECOND);
            if random.percent(70) {
                let time = random.between(SECOND, 5 * SECOND);
                faults.push((again, Fault::Crash { machine: twin, time, disk: Disk::Kept, boots: false }));
                hot.push(again);
            }
            if random.percent(30) {
                faults.push((begin, Fault::Down { time: random.between(SECOND, 30 * SECOND) }));
            }
        }
    }
}
