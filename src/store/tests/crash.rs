//! The power fails, or the process is killed, at any operation, and sometimes a sync fails. Afterwards
//! exactly the acknowledged batches are there, with their outbox and term.

use std::io;

use fastrand::Rng;

use super::{
    ExpectedStore, mirror, open_with, random_batch,
    simulated_disk::{Operation, SimulatedDisk},
};
use crate::store::StoreOptions;

/// Crash points of a default run; `GANGPLANK_CRASH_POINTS` sets another number.
const POINTS: u64 = 600;

#[test]
fn acknowledged_batches_survive_a_crash_at_any_operation() {
    let points = std::env::var("GANGPLANK_CRASH_POINTS").map_or(POINTS, |text| text.parse().expect("a number"));
    let mut seen = Coverage::default();
    let mut seed = 0;
    while seen.cuts < points {
        run_history(seed, &mut seen);
        seed += 1;
    }
    // The test is worth something only if it went through all of this.
    assert!(seen.in_recovery > 0 && seen.in_append > 0 && seen.in_compaction > 0 && seen.repairs > 0, "{seen:?}");
    assert!(seen.late > 0 && seen.never > 0, "{seen:?}");
    assert!(seen.unmirrored > seen.starts / 10 && seen.unmirrored < seen.starts, "{seen:?}");
}

/// What the crashes hit.
#[derive(Debug, Default)]
struct Coverage {
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
    unmirrored: u64,
}

/// One data directory from its first start on, through a few power cuts.
fn run_history(seed: u64, seen: &mut Coverage) {
    let rng = &mut Rng::with_seed(seed);
    let disk = SimulatedDisk::default();
    let options = StoreOptions { accept_loss: false, segment_bytes: rng.u64(100..3000), outbox: rng.bool() };
    // Small ones, so that a batch takes several frames, of which a cut may leave some.
    let frame_bytes = if rng.bool() { 100 } else { 1 << 20 };
    let (mut acknowledged, mut generation) = (ExpectedStore { outbox: options.outbox, ..ExpectedStore::default() }, 0);
    // The batch that was under way when the power went, applied.
    let mut perhaps: Option<ExpectedStore> = None;
    for cut in 0..6 {
        // The last start is not disturbed: it has to find everything.
        let last = cut == 5;
        if !last {
            // 20 operations end within most recoveries, 250 in an append or a compaction.
            let within = if rng.bool() { 20 } else { 250 };
            disk.cut_after(rng.u64(..within));
        }
        let mut ended = false;
        match open_with(&disk, &options, &std::sync::Arc::default()) {
            Err(err) => assert!(disk.is_off(), "seed {seed}: {err}"),
            Ok((mut journal, recovery, read)) => {
                let late = perhaps.as_ref().filter(|_| recovery.generation > generation);
                let expected = late.unwrap_or(&acknowledged);
                assert!(expected.matches(&recovery, &read), "seed {seed}, cut {cut}: read what was never acknowledged");
                assert!(recovery.generation >= generation, "seed {seed}, cut {cut}: the generation went back");
                seen.repairs += recovery.repairs.len() as u64;
                seen.starts += 1;
                seen.unmirrored += u64::from(!recovery.outbox.is_empty());
                if journal.usable().is_ok() {
                    if perhaps.is_some() {
                        if late.is_some() { seen.late += 1 } else { seen.never += 1 }
                    }
                    if let Some(late) = late {
                        acknowledged = late.clone();
                    }
                    perhaps = None;
                    generation = recovery.generation;
                    journal.frame_bytes = frame_bytes;
                    ended = true;
                    for _ in 0..rng.u64(..60) {
                        let faulty = rng.u8(..100) == 0;
                        if faulty {
                            disk.fail(Operation::Sync, io::ErrorKind::Other, 1);
                        }
                        let mut batch = random_batch(rng);
                        if options.outbox {
                            mirror(&mut batch, generation + 1, &acknowledged, rng);
                        }
                        let mut after = acknowledged.clone();
                        after.apply(generation + 1, &batch);
                        if let Err(err) = journal.append(generation + 1, &batch) {
                            assert!(disk.is_off() || faulty, "seed {seed}: {err}");
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
        seen.in_compaction += u64::from(disk.is_off() && disk.contents().keys().any(staged));
        seen.cuts += u64::from(!last);
        seen.in_recovery += u64::from(!ended && !last);
        // Killed, its writes stay in the system's memory, whether or not they reach the disk.
        if rng.u8(..3) == 0 { disk.restart() } else { disk.power_cut(rng) }
    }
}
