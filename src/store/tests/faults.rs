//! Disks that are full or fail: nothing is acknowledged after that until a restart.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    sync::{Arc, atomic::AtomicBool},
};

use rustix::io::Errno;

use super::{
    Instances, apply, open, open_with, random_put,
    simulated_disk::{Operation, SimulatedDisk},
    small,
};
use crate::{
    metrics::Metrics,
    model::Stamp,
    store::{
        DirectoryTerm, Journal, Record, StoreOptions,
        compaction::{CompactionPlan, StoreContext, compact},
        disk::Directory as _,
        frame::{self, FileId, Header},
    },
};

fn batch(seed: u64) -> Vec<Record> {
    let rng = &mut fastrand::Rng::with_seed(seed);
    (0..3).map(|_| random_put(rng)).collect()
}

/// Appends batches `1..=count`, all of which succeed.
fn fill(journal: &mut Journal, instances: &mut Instances, count: u64) {
    for generation in 1..=count {
        let batch = batch(generation);
        journal.append(generation, &batch).expect("a good disk");
        batch.iter().for_each(|record| apply(instances, record));
    }
}

#[test]
fn no_append_succeeds_after_a_failed_write_or_sync_until_a_restart() {
    for (operation, kind, says) in [
        (Operation::Write, ErrorKind::StorageFull, "cannot write data/journal-0000000001"),
        (Operation::Write, ErrorKind::Other, "cannot write data/journal-0000000001"),
        (Operation::Sync, ErrorKind::Other, "cannot sync data/journal-0000000001"),
        (Operation::Sync, ErrorKind::StorageFull, "cannot sync data/journal-0000000001"),
    ] {
        let (disk, metrics) = (SimulatedDisk::default(), Arc::new(Metrics::default()));
        let (mut journal, _, mut instances) = open_with(&disk, &small(), &metrics).expect("a new directory");
        fill(&mut journal, &mut instances, 2);
        assert_eq!(metrics.store.failed.get(), 0);

        // Only once: a second try of the operation would succeed.
        disk.fail(operation, kind, 1);
        let said = journal.append(3, &batch(3)).expect_err("the disk failed").to_string();
        assert!(said.starts_with(says) && said.contains("until gangplank is restarted"), "{said}");
        assert_eq!(said.contains("the disk is full"), kind == ErrorKind::StorageFull, "{said}");
        for _ in 0..3 {
            assert_eq!(journal.append(4, &batch(4)).expect_err("still failed").to_string(), said);
        }
        assert!(journal.usable().is_err());
        assert_eq!(metrics.store.failed.get(), 1);
        drop(journal);

        let (mut journal, _, read) = open_with(&disk, &small(), &metrics).expect("a restart");
        let mut with_third = instances.clone();
        batch(3).iter().for_each(|record| apply(&mut with_third, record));
        assert!(read == instances || read == with_third, "{operation:?}");
        journal.append(5, &batch(5)).expect("the disk works again");
        assert_eq!(metrics.store.failed.get(), 0);
    }
}

#[test]
fn failed_segment_creation_stops_the_journal() {
    for operation in [Operation::Create, Operation::Write, Operation::Sync, Operation::Rename, Operation::SyncDir] {
        let disk = SimulatedDisk::default();
        let (mut journal, _, mut instances) = open(&disk).expect("a new directory");
        fill(&mut journal, &mut instances, 2);
        disk.fail(operation, ErrorKind::StorageFull, 1);
        let said = journal.rotate().expect_err("the disk is full").to_string();
        assert!(said.starts_with("cannot create data/journal-0000000002: nothing is accepted"), "{said}");
        assert!(journal.append(3, &batch(3)).is_err());
        drop(journal);
        disk.clear_faults();
        let (mut journal, recovery, read) = open(&disk).expect("a restart");
        assert_eq!((read, recovery.repairs), (instances, vec![]));
        journal.append(3, &batch(3)).expect("the disk works again");
    }
}

#[test]
fn segment_grows_while_descriptors_are_exhausted() {
    let disk = SimulatedDisk::default();
    let (mut journal, _, mut instances) = open_with(&disk, &small(), &Arc::default()).expect("a new directory");
    let mut generation = 0;
    let mut append = |journal: &mut Journal, batches| {
        for _ in 0..batches {
            generation += 1;
            let batch = batch(generation);
            journal.append(generation, &batch).expect("what is open can be written");
            batch.iter().for_each(|record| apply(&mut instances, record));
        }
    };
    for missing in [Errno::MFILE, Errno::NFILE] {
        let newest = || {
            let names = disk.list().expect("no fault").into_iter();
            names.filter(|name| name.starts_with("journal") && !name.ends_with(".tmp")).max()
        };
        let before = newest();
        disk.fail(Operation::Create, missing, u32::MAX);
        append(&mut journal, 100);
        assert_eq!(newest(), before);
        disk.clear_faults();
        append(&mut journal, 1);
        assert!(newest() > before, "the next segment is begun");
    }
    drop(journal);
    let (_, recovery, read) = open(&disk).expect("nothing is corrupt");
    assert_eq!((read, recovery.repairs), (instances, vec![]));
}

/// The system drops the pages that it could not write, reports the next sync as a success, and still
/// returns the pages to readers: a start may not take them for durable.
#[test]
fn restart_rewrites_the_batch_of_a_failed_sync() {
    let disk = SimulatedDisk::default();
    let (mut journal, _, mut instances) = open(&disk).expect("a new directory");
    fill(&mut journal, &mut instances, 2);
    disk.fail(Operation::Sync, ErrorKind::Other, 1);
    journal.append(3, &batch(3)).expect_err("the sync failed");
    drop(journal);

    let (mut journal, _, read) = open(&disk).expect("a restart");
    batch(3).iter().for_each(|record| apply(&mut instances, record));
    assert_eq!(read, instances, "the batch is served now");
    journal.append(4, &batch(4)).expect("all is well");
    batch(4).iter().for_each(|record| apply(&mut instances, record));
    disk.power_cut(&mut fastrand::Rng::with_seed(1));
    drop(journal);
    let (_, _, read) = open(&disk).expect("nothing is corrupt");
    assert_eq!(read, instances);
}

#[test]
fn store_is_read_from_a_full_disk() {
    let disk = SimulatedDisk::default();
    let (mut journal, _, mut instances) = open(&disk).expect("a new directory");
    fill(&mut journal, &mut instances, 3);
    drop(journal);
    disk.fail(Operation::Write, ErrorKind::StorageFull, u32::MAX);
    let (mut journal, recovery, read) = open(&disk).expect("reading needs no space");
    assert_eq!(read, instances);
    assert!(recovery.repairs[0].contains("the disk is full"), "{:?}", recovery.repairs);
    assert!(journal.usable().is_err());
    disk.clear_faults();
    assert!(journal.append(9, &batch(9)).is_err(), "not until a restart");
}

#[test]
fn failed_compaction_is_retried_and_stops_no_append() {
    for operation in [Operation::Create, Operation::Write, Operation::Sync, Operation::Rename, Operation::SyncDir] {
        let (disk, metrics) = (SimulatedDisk::default(), Arc::new(Metrics::default()));
        let (mut journal, _, mut instances) = open_with(&disk, &small(), &metrics).expect("a new directory");
        fill(&mut journal, &mut instances, 2);
        journal.rotate().expect("a good disk");
        disk.fail(operation, ErrorKind::StorageFull, 1);
        journal.compact();
        journal.reap();
        assert_eq!(metrics.store.compactions_counted(), (0, 1), "{operation:?}");
        assert!(disk.contents().contains_key("journal-0000000001"), "{operation:?}: nothing was removed");

        journal.append(3, &batch(3)).expect("registrations go on");
        batch(3).iter().for_each(|record| apply(&mut instances, record));
        journal.rotate().expect("a good disk");
        journal.compact();
        journal.reap();
        assert_eq!(metrics.store.compactions_counted(), (1, 1), "{operation:?}");
        drop(journal);
        let names: Vec<String> = disk.contents().into_keys().collect();
        assert_eq!(names, ["clean-stop", "journal-0000000003", "snapshot-0000000002"], "{operation:?}");
        let (_, recovery, read) = open(&disk).expect("a restart");
        assert_eq!((read, recovery.generation, recovery.repairs), (instances, 3, vec![]), "{operation:?}");
    }
}

#[test]
fn obsolete_files_that_cannot_be_removed_go_with_the_next_snapshot() {
    let (disk, metrics) = (SimulatedDisk::default(), Arc::new(Metrics::default()));
    let (mut journal, _, mut instances) = open_with(&disk, &small(), &metrics).expect("a new directory");
    fill(&mut journal, &mut instances, 2);
    for (generations, times) in [(3..=3, 1), (4..=9, 0)] {
        for generation in generations {
            journal.append(generation, &batch(generation)).expect("a good disk");
            batch(generation).iter().for_each(|record| apply(&mut instances, record));
        }
        journal.rotate().expect("a good disk");
        disk.fail(Operation::Remove, ErrorKind::PermissionDenied, times);
        journal.compact();
        journal.reap();
        assert_eq!(disk.contents().contains_key("journal-0000000001"), times > 0);
    }
    assert_eq!(metrics.store.compactions_counted(), (2, 0));
    drop(journal);
    let names: Vec<String> = disk.contents().into_keys().collect();
    assert_eq!(names, ["clean-stop", "journal-0000000003", "snapshot-0000000002"]);
    let (_, _, read) = open(&disk).expect("a restart");
    assert_eq!(read, instances);
}

#[test]
fn write_amplification_of_snapshots_is_below_three() {
    let (disk, metrics) = (SimulatedDisk::default(), Arc::new(Metrics::default()));
    let (mut journal, ..) = open_with(&disk, &small(), &metrics).expect("a new directory");
    for generation in 1..=200 {
        journal.append(generation, &batch(generation)).expect("a good disk");
        journal.reap();
    }
    let journal_bytes = metrics.store.journal_written_bytes.get();
    let snapshot_bytes = metrics.store.snapshot_written_bytes.get();
    assert!(snapshot_bytes > 0 && snapshot_bytes < 3 * journal_bytes, "{snapshot_bytes} of {journal_bytes}");
}

/// The names of a snapshot and of what it replaces are in one directory, which a crash may leave
/// half written: the old may go only when the new is there.
#[test]
fn start_removes_files_only_after_the_name_of_the_snapshot_is_durable() {
    for seed in 0..50 {
        let disk = SimulatedDisk::default();
        let (mut journal, _, mut instances) = open(&disk).expect("a new directory");
        fill(&mut journal, &mut instances, 2);
        journal.rotate().expect("a good disk");
        journal.append(3, &batch(3)).expect("a good disk");
        batch(3).iter().for_each(|record| apply(&mut instances, record));
        disk.fail(Operation::SyncDir, ErrorKind::Other, 1);
        journal.compact();
        journal.reap();
        assert!(disk.contents().contains_key("snapshot-0000000001"), "it has its name, but only in memory");
        drop(journal);
        let (journal, _, read) = open(&disk).expect("a restart");
        assert_eq!(read, instances);
        assert!(!disk.contents().contains_key("journal-0000000001"));
        disk.power_cut(&mut fastrand::Rng::with_seed(seed));
        drop(journal);
        let (_, _, read) = open(&disk).unwrap_or_else(|err| panic!("seed {seed}: {err}"));
        assert_eq!(read, instances, "seed {seed}");
    }
}

#[test]
fn empty_snapshot_holds_the_generation() {
    let (disk, metrics) = (SimulatedDisk::default(), Arc::new(Metrics::default()));
    let (mut journal, _, mut instances) = open_with(&disk, &small(), &metrics).expect("a new directory");
    fill(&mut journal, &mut instances, 2);
    journal.rotate().expect("a good disk");
    journal.compact();
    journal.reap();
    let gone = instances.into_keys().map(|(service, id)| Record::Remove { service, id, stamp: Stamp::default() });
    journal.append(7, &gone.collect::<Vec<_>>()).expect("a good disk");
    journal.rotate().expect("a good disk");
    journal.compact();
    journal.reap();
    // As a killed process leaves it, with nothing in the newest segment.
    let contents = disk.contents();
    let header_and_end = frame::HEADER_LEN + frame::FRAME_LEN;
    assert_eq!(contents["snapshot-0000000002"].len(), header_and_end);
    assert_eq!(metrics.store.snapshot_bytes.get(), header_and_end as i64);
    assert_eq!(contents["journal-0000000003"].len(), frame::HEADER_LEN);
    let (_, recovery, read) = open(&SimulatedDisk::holding(&contents)).expect("a restart");
    assert_eq!((recovery.generation, read.len()), (7, 0));
}

#[test]
fn io_error_in_an_append_or_a_new_segment_stops_the_journal() {
    for (operation, rotates) in [
        (Operation::Write, false),
        (Operation::Sync, false),
        (Operation::Create, true),
        (Operation::Rename, true),
        (Operation::SyncDir, true),
    ] {
        let disk = SimulatedDisk::default();
        let (mut journal, _, mut instances) = open(&disk).expect("a new directory");
        fill(&mut journal, &mut instances, 2);
        disk.fail(operation, Errno::IO, 1);
        if rotates {
            journal.rotate().expect_err("the disk failed");
        } else {
            journal.append(3, &batch(3)).expect_err("the disk failed");
        }
        journal.append(4, &batch(4)).expect_err("only a restart can go on");
        drop(journal);
        let (_, _, read) = open(&disk).expect("a restart");
        let mut with_third = instances.clone();
        batch(3).iter().for_each(|record| apply(&mut with_third, record));
        assert!(read == instances || read == with_third, "{operation:?}");
    }
}

#[test]
fn io_error_in_a_compaction_loses_nothing() {
    for operation in [Operation::Read, Operation::Write, Operation::Sync, Operation::Rename, Operation::SyncDir] {
        let (disk, metrics) = (SimulatedDisk::default(), Arc::new(Metrics::default()));
        let (mut journal, _, mut instances) = open_with(&disk, &small(), &metrics).expect("a new directory");
        fill(&mut journal, &mut instances, 2);
        journal.rotate().expect("a good disk");
        disk.fail(operation, Errno::IO, 1);
        journal.compact();
        journal.reap();
        assert_eq!(metrics.store.compactions_counted(), (0, 1), "{operation:?}");
        drop(journal);
        let (_, recovery, read) = open(&disk).expect("a restart");
        assert_eq!((read, recovery.repairs), (instances, vec![]), "{operation:?}");
    }
}

#[test]
fn read_error_of_a_compaction_names_the_file() {
    let mut seen = BTreeSet::new();
    for operations in 0.. {
        let disk = SimulatedDisk::default();
        let (mut journal, _, mut instances) = open(&disk).expect("a new directory");
        fill(&mut journal, &mut instances, 2);
        journal.rotate().expect("a good disk");
        journal.compact();
        journal.reap();
        journal.append(3, &batch(3)).expect("a good disk");
        journal.rotate().expect("a good disk");
        let (snapshot, segments) = journal.compaction_input();
        let name = FileId::journal(2).file_name();
        let bytes = disk.contents().remove(&name).expect("it is there");
        let header = bytes[..frame::HEADER_LEN].try_into().expect("the length of a header");
        let context = StoreContext {
            files: Arc::new(disk.clone()),
            dir: "data".into(),
            id: Header::decode(header, FileId::journal(2)).expect("intact").id,
            outbox: false,
            tombstones: false,
            metrics: Arc::default(),
        };
        let plan = CompactionPlan { snapshot, segments, lossy: false, keep: Vec::new() };
        disk.fail_after(operations, Errno::IO);
        let compacted = compact(&context, &plan, &AtomicBool::new(false));
        let Some((operation, name)) = disk.failed() else { break };
        if matches!(operation, Operation::Open | Operation::Stat | Operation::Read) {
            let said = compacted.expect_err("the disk failed").to_string();
            assert_eq!(said, format!("cannot read data/{name}: {}", std::io::Error::from(Errno::IO)));
            seen.insert((format!("{operation:?}"), name));
        }
    }
    // Of the snapshot and of the segment.
    assert_eq!(seen.len(), 6, "{seen:?}");
}

/// A directory, and what a start from it reads.
struct Start {
    contents: BTreeMap<String, Vec<u8>>,
    options: StoreOptions,
    instances: Instances,
}

/// Directories whose starts go, together, through every operation that a start has.
fn starts() -> Vec<Start> {
    let options = StoreOptions { segment_bytes: 1 << 30, ..small() };
    let new = Start { contents: BTreeMap::new(), options: options.clone(), instances: Instances::new() };

    let disk = SimulatedDisk::default();
    let (mut journal, _, mut instances) = open_with(&disk, &options, &Arc::default()).expect("a new directory");
    fill(&mut journal, &mut instances, 3);
    let killed = disk.contents();
    drop(journal);
    let closed = Start { contents: disk.contents(), options: options.clone(), instances: instances.clone() };
    let mut contents = killed;
    contents.get_mut("journal-0000000001").expect("it is there").extend([0xF7; 40]);
    let torn = Start { contents, options: options.clone(), instances };

    // A snapshot, what it replaced, a closed segment, and a newest one that holds nothing.
    let disk = SimulatedDisk::default();
    let (mut journal, _, mut instances) = open_with(&disk, &options, &Arc::default()).expect("a new directory");
    fill(&mut journal, &mut instances, 2);
    let obsolete = disk.contents();
    journal.rotate().expect("a good disk");
    journal.compact();
    journal.reap();
    journal.append(3, &batch(3)).expect("a good disk");
    batch(3).iter().for_each(|record| apply(&mut instances, record));
    journal.rotate().expect("a good disk");
    let mut contents = disk.contents();
    contents.extend(obsolete);
    contents.insert("snapshot-0000000002.tmp".into(), vec![1]);
    let rotated = Start { contents, options: options.clone(), instances };

    // The loss of a batch in the closed segment is accepted.
    drop(journal);
    let mut contents = disk.contents();
    contents.get_mut("journal-0000000002").expect("it is there")[frame::HEADER_LEN + 40] ^= 1;
    let options = StoreOptions { accept_loss: true, ..options };
    let (_, _, instances) =
        open_with(&SimulatedDisk::holding(&contents), &options, &Arc::default()).expect("the loss is accepted");
    let corrupt = Start { contents, options: options.clone(), instances };

    // A start without the outbox resets the term.
    let disk = SimulatedDisk::default();
    let with_outbox = StoreOptions { outbox: true, accept_loss: false, ..options };
    let (mut journal, _, mut instances) = open_with(&disk, &with_outbox, &Arc::default()).expect("a new directory");
    fill(&mut journal, &mut instances, 2);
    journal.append(3, &[Record::Term(DirectoryTerm::new(3))]).expect("a good disk");
    let options = StoreOptions { outbox: false, ..with_outbox };
    let switched_off = Start { contents: disk.contents(), options, instances };

    vec![new, closed, torn, rotated, corrupt, switched_off]
}

/// An error with its causes.
fn chain(err: &dyn std::error::Error) -> String {
    std::iter::successors(Some(err), |err| err.source()).map(|err| format!("{err}: ")).collect()
}

/// Each operation of a start fails in turn. The start fails, or succeeds and accepts nothing, and then
/// the file is named; or it goes on, because the operation was not necessary.
#[test]
fn io_error_at_any_operation_of_a_start_loses_nothing() {
    let (mut refused, mut read_only, mut went_on) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (case, start) in starts().iter().enumerate() {
        for power_cut in [false, true] {
            for operations in 0.. {
                let disk = SimulatedDisk::holding(&start.contents);
                let mut acknowledged = start.instances.clone();
                disk.fail_after(operations, Errno::IO);
                let opened = open_with(&disk, &start.options, &Arc::default());
                let mut opened = opened.map(|(mut journal, recovery, read)| {
                    assert_eq!(read, start.instances, "case {case}, operation {operations}");
                    journal.reap();
                    (journal, recovery)
                });
                let Some((operation, name)) = disk.failed() else {
                    assert!(operations >= 8, "case {case} has {operations} operations");
                    break;
                };
                let place = format!("case {case}, operation {operations}: {operation:?} of {name:?}");
                // The directory has no name here; a temporary file gets the name that is meant.
                let file = format!("data/{}", name.trim_end_matches(".tmp"));
                let file = file.trim_end_matches('/');
                match &mut opened {
                    Err(err) => {
                        let said = chain(err);
                        assert!(said.contains(file) && said.contains("os error 5"), "{place}: {said}");
                        refused.insert(format!("{operation:?}"));
                    }
                    Ok((journal, recovery)) => match journal.usable() {
                        Err(err) => {
                            let said = format!("{} {}", chain(&err), recovery.repairs.join(" "));
                            assert!(said.contains(file), "{place}: {said}");
                            journal.append(9, &batch(9)).expect_err("nothing is accepted until a restart");
                            read_only.insert(format!("{operation:?}"));
                        }
                        Ok(()) => {
                            journal.append(9, &batch(9)).unwrap_or_else(|err| panic!("{place}: {err}"));
                            batch(9).iter().for_each(|record| apply(&mut acknowledged, record));
                            went_on.insert(format!("{operation:?}"));
                        }
                    },
                }
                if power_cut {
                    disk.cut_after(0);
                    drop(opened);
                    disk.power_cut(&mut fastrand::Rng::with_seed(operations));
                } else {
                    drop(opened);
                }
                let (mut journal, _, read) = open_with(&disk, &start.options, &Arc::default())
                    .unwrap_or_else(|err| panic!("{place}: {}", chain(&err)));
                assert_eq!(read, acknowledged, "{place}");
                journal.append(10, &batch(10)).unwrap_or_else(|err| panic!("{place}: {err}"));
            }
        }
    }
    // What is read must be read; what cannot be written does not keep DNS from answering; a compaction
    // is tried again.
    for operation in ["List", "Open", "Stat", "Read", "Rename", "SyncDir"] {
        assert!(refused.contains(operation), "{operation} in {refused:?}");
    }
    for operation in ["Create", "Write", "Truncate", "Sync", "Rename", "SyncDir"] {
        assert!(read_only.contains(operation), "{operation} in {read_only:?}");
    }
    for operation in ["Remove", "Rename", "SyncDir"] {
        assert!(went_on.contains(operation), "{operation} in {went_on:?}");
    }
}
