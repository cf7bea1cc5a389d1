//! The power is cut, or the process killed, at any operation, and now and then a sync fails: what
//! was acknowledged is there, the outbox and the term too, and nothing else is.

use std::io;

use fastrand::Rng;

use super::{
    Ledger,
    machine::{Machine, Operation},
    mirror, open_with, random_batch,
};
use crate::store::Options;

/// Crash points of a default run; `GANGPLANK_CRASH_POINTS` sets another number.
const POINTS: u64 = 600;

#[test]
fn what_was_acknowledged_survives_an_end_at_any_operation() {
    let points = std::env::var("GANGPLANK_CRASH_POINTS").map_or(POINTS, |text| text.parse().expect("a number"));
    let mut seen = Seen::default();
    let mut seed = 0;
    while seen.cuts < points {
        life(seed, &mut seen);
        seed += 1;
    }
    // The test is worth something only if it went through all of this.
    assert!(seen.in_recovery > 0 && seen.in_append > 0 && seen.in_compaction > 0 && seen.repairs > 0, "{seen:?}");
    assert!(seen.late > 0 && seen.never > 0, "{seen:?}");
    assert!(seen.lacking > seen.starts / 10 && seen.lacking < seen.starts, "{seen:?}");
}

/// What the crashes hit.
#[derive(Debug, Default)]
struct Seen {
    cuts: u64,
    in_recovery: u64,
    in_append: u64,
    in_compaction: u64,
    repairs: u64,
    /// Batches that were not acknowledged and were there, and such that were not.
    late: u64,
    never: u64,
    /// Starts that read something, and such that found something in the outbox.
    starts: u64,
    lacking: u64,
}

/// One data directory from its first start on, through a few power cuts.
fn life(seed: u64, seen: &mut Seen) {
    let rng = &mut Rng::with_seed(seed);
    let machine = Machine::default();
    let options = Options { accept_loss: false, segment_octets: rng.u64(100..3000), outbox: rng.bool() };
    let frame_octets = if rng.bool() { 100 } else { 1 << 20 };
    let (mut acknowledged, mut generation) = (Ledger { outbox: options.outbox, ..Ledger::default() }, 0);
    // The batch that was under way when the power went, applied.
    let mut perhaps: Option<Ledger> = None;
    for cut in 0..6 {
        let last = cut == 5;
        if !last {
            let within = if rng.bool() { 20 } else { 250 };
            machine.cut_after(rng.u64(..within));
        }
        let mut ended = false;
        match open_with(&machine, &options, &std::sync::Arc::default()) {
            Err(err) => assert!(machine.is_off(), "seed {seed}: {err}"),
            Ok((mut journal, recovery, read)) => {
                let late = perhaps.as_ref().filter(|_| recovery.generation > generation);
                let expected = late.unwrap_or(&acknowledged);
                assert!(expected.agrees(&recovery, &read), "seed {seed}, cut {cut}: read what was never acknowledged");
                assert!(recovery.generation >= generation, "seed {seed}, cut {cut}: the generation went back");
                seen.repairs += recovery.repairs.len() as u64;
                seen.starts += 1;
                seen.lacking += u64::from(!recovery.outbox.is_empty());
                if journal.usable().is_ok() {
                    if perhaps.is_some() {
                        if late.is_some() { seen.late += 1 } else { seen.never += 1 }
                    }
                    if let Some(late) = late {
                        acknowledged = late.clone();
                    }
                    perhaps = None;
                    generation = recovery.generation;
                    journal.frame_octets = frame_octets;
                    ended = true;
                    for _ in 0..rng.u64(..60) {
                        let faulty = rng.u8(..100) == 0;
                        if faulty {
                            machine.fail(Operation::Sync, io::ErrorKind::Other, 1);
                        }
                        let mut batch = random_batch(rng);
                        if options.outbox {
                            mirror(&mut batch, generation + 1, &acknowledged, rng);
                        }
                        let mut after = acknowledged.clone();
                        after.apply(generation + 1, &batch);
                        if let Err(err) = journal.append(generation + 1, &batch) {
                            assert!(machine.is_off() || faulty, "seed {seed}: {err}");
                            assert!(journal.append(generation + 1, &batch).is_err(), "seed {seed}: after a failure");
                            perhaps = Some(after);
                            seen.in_append += 1;
                            break;
                        }
                        generation += 1;
                        acknowledged = after;
                        if rng.bool() {
                            journal.reap();
                        }
                    }
                }
            }
        }
        let staged = |name: &String| name.starts_with("snapshot") && name.ends_with(".tmp");
        seen.in_compaction += u64::from(machine.is_off() && machine.contents().keys().any(staged));
        seen.cuts += u64::from(!last);
        seen.in_recovery += u64::from(!ended && !last);
        // Killed, its writes stay in the system's memory, whether or not they reach the disk.
        if rng.u8(..3) == 0 { machine.restart() } else { machine.power_cut(rng) }
    }
}
