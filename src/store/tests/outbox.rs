//! The outbox and the term over snapshots and restarts, and that nothing of them is left over.

use std::sync::Arc;

use fastrand::Rng;

use super::{
    ExpectedStore, Instances, VALIDATOR, apply, instance_of, mirror, open_with, random_batch, service,
    simulated_disk::{Operation, SimulatedDisk},
};
use crate::{
    model::{InstanceSpec, Stamp, UnixMillis},
    store::{
        DirectoryTerm, Journal, Record, RecoveryReport, StoreOptions,
        frame::{FRAME_LEN, HEADER_LEN},
    },
};

fn with(outbox: bool) -> StoreOptions {
    StoreOptions { outbox, segment_bytes: 1 << 30, accept_loss: false }
}

fn start(disk: &SimulatedDisk, outbox: bool) -> (Journal, RecoveryReport, Instances) {
    open_with(disk, &with(outbox), &Arc::default()).expect("a good disk")
}

/// The same instance of a service each time, as it was registered at that time.
fn put(name: &str, registered: u64) -> Record {
    let service = service(name);
    let spec = InstanceSpec { address: "10.0.0.1".into(), ..InstanceSpec::default() };
    let instance = VALIDATOR.instance(&service, &spec, UnixMillis(registered)).expect("valid");
    Record::Put { service, instance: Arc::new(instance) }
}

fn remove(name: &str) -> Record {
    let (service, id) = instance_of(&put(name, 0));
    Record::Remove { service, id, stamp: Stamp::default() }
}

fn mirrored(name: &str, generation: u64) -> Record {
    Record::Mirrored { service: service(name), generation }
}

/// Everything so far becomes a snapshot.
fn compact(journal: &mut Journal) {
    journal.rotate().expect("a good disk");
    journal.compact();
    journal.reap();
    assert_eq!(journal.compaction_input().1, [], "the compaction was done");
}

fn snapshot(disk: &SimulatedDisk) -> Vec<u8> {
    let contents = disk.contents();
    let (_, bytes) = contents.iter().find(|(name, _)| name.starts_with("snapshot")).expect("one was made");
    bytes.clone()
}

/// What a store's outbox is after records of generations from 1 on, whenever it was compacted.
fn outbox_of(records: &[&Record]) -> Vec<Record> {
    let mut found = Vec::new();
    // A bit is set if everything up to its record becomes a snapshot.
    for ends in 0..1 << records.len() {
        let disk = SimulatedDisk::default();
        let (mut journal, ..) = start(&disk, true);
        for (index, &record) in records.iter().enumerate() {
            journal.append(index as u64 + 1, std::slice::from_ref(record)).expect("a good disk");
            if ends >> index & 1 == 1 {
                compact(&mut journal);
            }
        }
        drop(journal);
        found.push(start(&disk, true).1.outbox);
    }
    assert!(found.iter().all(|outbox| *outbox == found[0]), "{found:?}");
    found.remove(0)
}

#[test]
fn only_mirrored_changes_leave_the_outbox() {
    let [web, again, gone] = &[put("web", 1), put("web", 2), remove("web")];
    // Their names begin alike.
    let [we, web_1] = &[put("we", 1), put("web-1", 1)];
    let [none, first, second] = &[0, 1, 2].map(|generation| mirrored("web", generation));
    let [db, a] = &[put("db", 1), remove("a")];
    let table: &[(&[&Record], &[&Record])] = &[
        (&[web], &[web]),
        (&[web, first], &[]),
        (&[web, none], &[web]),
        (&[we, web_1, second], &[we, web_1]),
        (&[web, again, first], &[again]),
        (&[web, first, again], &[again]),
        (&[web, again, second, first], &[]),
        (&[web, first, gone], &[gone]),
        (&[web, gone, first], &[gone]),
        (&[web, gone, second], &[]),
        (&[web, gone, again], &[again]),
        (&[gone, again, first], &[again]),
        (&[web, gone, second, again], &[again]),
        // By generation, not by name.
        (&[web, db, a], &[web, db, a]),
    ];
    for (records, expected) in table {
        assert_eq!(outbox_of(records).iter().collect::<Vec<_>>(), *expected, "{records:?}");
    }
}

#[test]
fn change_that_is_journaled_again_as_mirrored_leaves_the_outbox() {
    for (word, other) in [(put("web", 1), put("db", 1)), (remove("web"), remove("db"))] {
        for compactions in 0..8 {
            let disk = SimulatedDisk::default();
            let (mut journal, ..) = start(&disk, true);
            let step = |journal: &mut Journal, index: u8| {
                if compactions >> index & 1 == 1 {
                    compact(journal);
                }
            };
            journal.append(5, &[word.clone(), other.clone()]).expect("a good disk");
            step(&mut journal, 0);
            journal.append_mirrored(5, std::slice::from_ref(&word)).expect("a good disk");
            step(&mut journal, 1);
            let (_, outbox) = journal.read_back(&mut |_| {}).expect("a good disk");
            assert_eq!(outbox, std::slice::from_ref(&other));
            journal.append(6, &[put("mail", 1)]).expect("a good disk");
            step(&mut journal, 2);
            drop(journal);
            assert_eq!(start(&disk, true).1.outbox, [other.clone(), put("mail", 1)], "{compactions:b}");
        }
    }
}

#[test]
fn last_term_survives_compactions() {
    let disk = SimulatedDisk::default();
    let stored = |term| DirectoryTerm { term, followed: term == 5, published: (term == 3).then_some(2) };
    for (term, before) in [(3, 0), (5, 3), (4, 5)] {
        let (mut journal, recovery, _) = start(&disk, true);
        assert_eq!(recovery.term, stored(before));
        journal.append(term, &[Record::Term(DirectoryTerm::new(9)), Record::Term(stored(term))]).expect("a good disk");
        compact(&mut journal);
        journal.append(term + 1, &[put("web", term)]).expect("a good disk");
        compact(&mut journal);
    }
    assert_eq!(start(&disk, true).1.term, stored(4));
}

#[test]
fn mirrored_changes_take_no_space_in_a_snapshot() {
    let disk = SimulatedDisk::default();
    let (mut journal, ..) = start(&disk, true);
    journal.append(1, &[Record::Term(DirectoryTerm::new(1))]).expect("a good disk");
    let mut lengths = Vec::new();
    for cycle in 0..40 {
        let generation = 2 + 3 * cycle;
        let (name, stays) = (format!("service-{cycle:02}"), put("web", 1 << 40));
        journal.append(generation, &[put(&name, cycle), stays]).expect("a good disk");
        journal.append(generation + 1, &[remove(&name)]).expect("a good disk");
        let with_removal = cycle % 2 == 0;
        if with_removal {
            compact(&mut journal);
            lengths.push(snapshot(&disk).len());
        }
        let all = [mirrored(&name, generation + 1), mirrored("web", generation)];
        journal.append(generation + 2, &all).expect("a good disk");
        compact(&mut journal);
        lengths.push(snapshot(&disk).len());
    }
    let (with_removal, without) = (lengths[0], lengths[1]);
    assert!(with_removal > without + 20, "{lengths:?}");
    let expected = [with_removal, without, without];
    assert!(lengths.iter().zip(expected.iter().cycle()).all(|(length, expected)| length == expected), "{lengths:?}");

    // Without any registered instance, only the term is left.
    journal.append(1000, &[remove("web"), mirrored("web", 999)]).expect("a good disk");
    journal.append(1001, &[mirrored("web", 1000)]).expect("a good disk");
    compact(&mut journal);
    assert_eq!(snapshot(&disk).len(), HEADER_LEN + FRAME_LEN + 6);
}

#[test]
fn mirrored_generation_is_stored_as_the_highest() {
    let disk = SimulatedDisk::default();
    let (mut journal, ..) = start(&disk, true);
    journal.append(5, &[mirrored("web", 9)]).expect("a good disk");
    compact(&mut journal);
    drop(journal);
    assert_eq!(start(&disk, true).1.generation, 9);
}

#[test]
fn snapshot_without_outbox_has_nothing_of_it_but_that_there_was_a_term() {
    // Two stores with the same history, of which one was written with the outbox.
    let [plain, other] = [false, true].map(|outbox| {
        let disk = SimulatedDisk::default();
        let (mut journal, ..) = start(&disk, outbox);
        journal.append(1, &[put("web", 1), put("db", 1), put("a", 1)]).expect("a good disk");
        let extra = [Record::Term(DirectoryTerm::new(2)), mirrored("web", 1)];
        journal.append(2, if outbox { &extra } else { &[] }).expect("a good disk");
        compact(&mut journal);
        journal.append(3, &[remove("db"), put("web", 2)]).expect("a good disk");
        drop(journal);
        let (mut journal, recovery, _) = start(&disk, false);
        assert_eq!((recovery.term.term, recovery.outbox), (0, vec![]));
        compact(&mut journal);
        drop(journal);
        disk
    });
    // The header has the store's id, the frame a checksum. Only that there was a term is left.
    let payload = |disk: &SimulatedDisk| snapshot(disk)[HEADER_LEN + FRAME_LEN..].to_vec();
    let term: [u8; 4] = [10, 2, 34, 0];
    assert_eq!([&payload(&plain)[..], &term].concat(), payload(&other));

    // With the outbox again, everything counts as unmirrored.
    for disk in [plain, other] {
        let (_, recovery, read) = start(&disk, true);
        assert_eq!((recovery.term.term, recovery.generation), (0, 3));
        assert_eq!(read.len(), 2);
        assert_eq!(recovery.outbox, [put("a", 1), put("web", 2)]);
    }
}

/// The term is in a segment that no snapshot has yet, and the removal before it in one that a
/// snapshot without the outbox has forgotten.
#[test]
fn start_without_outbox_resets_the_term() {
    for fails in [false, true] {
        let disk = SimulatedDisk::default();
        let (mut journal, ..) = start(&disk, true);
        journal.append(1, &[put("web", 1), mirrored("web", 0)]).expect("a good disk");
        journal.append(2, &[remove("web")]).expect("a good disk");
        journal.rotate().expect("a good disk");
        journal.append(3, &[Record::Term(DirectoryTerm::new(2))]).expect("a good disk");
        drop(journal);
        if fails {
            disk.fail(Operation::Write, std::io::ErrorKind::StorageFull, 1);
        }
        start(&disk, false).0.reap();
        disk.clear_faults();
        let (_, recovery, _) = start(&disk, true);
        let (term, outbox) = if fails { (2, vec![remove("web")]) } else { (0, vec![]) };
        assert_eq!((recovery.term.term, recovery.outbox), (term, outbox));
    }
}

/// Lives of a directory that is opened with and without the outbox: as long as there is a term,
/// nothing that Kubernetes lacks is missing, and nothing in the outbox is out of date.
#[test]
fn outbox_switched_off_and_on_is_never_too_small() {
    let (mut unmirrored, mut forgotten) = (0, 0);
    for seed in 0..60 {
        let rng = &mut Rng::with_seed(seed);
        let (mut disk, mut expected, mut generation) = (SimulatedDisk::default(), ExpectedStore::default(), 0);
        for _ in 0..8 {
            let options = StoreOptions { segment_bytes: rng.u64(100..2000), ..with(rng.bool()) };
            let (mut journal, recovery, read) = open_with(&disk, &options, &Arc::default()).expect("a good disk");
            assert_eq!((&read, recovery.generation), (&expected.instances, generation), "seed {seed}");
            expected.outbox = options.outbox;
            if options.outbox {
                assert_eq!(recovery.term, expected.term, "seed {seed}");
                let outbox: Vec<_> = recovery.outbox.iter().map(instance_of).collect();
                for (record, instance) in recovery.outbox.iter().zip(&outbox) {
                    let last = expected.last.get(instance).map(|(_, last)| last);
                    let gone = last.is_none() && matches!(record, Record::Remove { .. });
                    assert!(last == Some(record) || gone, "seed {seed}: {record:?} is out of date");
                }
                for (instance, record) in expected.unmirrored() {
                    let there = outbox.contains(instance);
                    let may_be_forgotten = expected.term.term == 0 && matches!(record, Record::Remove { .. });
                    assert!(there || may_be_forgotten, "seed {seed}: {record:?} is not there");
                    unmirrored += usize::from(there);
                    forgotten += usize::from(!there);
                }
                // A start without a term drops the removals, and begins a term.
                if expected.term.term == 0 {
                    expected.last.retain(|_, (_, record)| !matches!(record, Record::Remove { .. }));
                    generation += 1;
                    let batch = [Record::Term(DirectoryTerm::new(generation))];
                    journal.append(generation, &batch).expect("a good disk");
                    expected.apply(generation, &batch);
                }
            } else {
                expected.term = DirectoryTerm::default();
            }
            for _ in 0..rng.usize(..20) {
                let mut batch = random_batch(rng);
                if options.outbox {
                    mirror(&mut batch, generation + 1, &expected, rng);
                }
                generation += 1;
                journal.append(generation, &batch).expect("a good disk");
                expected.apply(generation, &batch);
                if rng.bool() {
                    journal.reap();
                }
            }
            let killed = SimulatedDisk::holding(&disk.contents());
            drop(journal);
            if rng.bool() {
                disk = killed;
            }
        }
    }
    assert!(unmirrored > 100 && forgotten > 0, "{unmirrored} {forgotten}");
}

#[test]
fn open_journal_reads_what_a_start_would_find() {
    let mut entries = 0;
    for seed in 0..40 {
        let rng = &mut Rng::with_seed(seed);
        let (disk, mut expected) =
            (SimulatedDisk::default(), ExpectedStore { outbox: true, ..ExpectedStore::default() });
        let options = StoreOptions { segment_bytes: rng.u64(100..2000), ..with(true) };
        let (mut journal, ..) = open_with(&disk, &options, &Arc::default()).expect("a good disk");
        for generation in 1..rng.u64(2..40) {
            let mut batch = random_batch(rng);
            mirror(&mut batch, generation, &expected, rng);
            journal.append(generation, &batch).expect("a good disk");
            expected.apply(generation, &batch);
            if rng.u8(..4) == 0 {
                let mut read = Instances::new();
                let (term, found) = journal.read_back(&mut |record| apply(&mut read, &record)).expect("a good disk");
                let recovery = RecoveryReport {
                    generation,
                    changed: 0,
                    repairs: Vec::new(),
                    term,
                    outbox: found.clone(),
                    tombstones: true,
                };
                assert!(expected.matches(&recovery, &read), "seed {seed}");
                let found: std::collections::BTreeMap<_, _> =
                    found.iter().map(|record| (instance_of(record), record)).collect();
                let wanted = expected.unmirrored();
                assert!(found.iter().map(|(instance, record)| (instance, *record)).eq(wanted), "seed {seed}");
                entries += found.len();
            }
        }
        // The journal goes on, and so does its compaction.
        drop(journal);
        let (_, recovery, read) = open_with(&disk, &options, &Arc::default()).expect("a good disk");
        assert!(expected.matches(&recovery, &read), "seed {seed}");
    }
    assert!(entries > 500, "{entries}");
}

/// As without an API server: nothing is ever mirrored.
#[test]
fn outbox_has_one_entry_per_instance_however_often_it_changes() {
    let disk = SimulatedDisk::default();
    let names = ["web", "db", "a"];
    let mut generation = 0;
    for _ in 0..3 {
        let (mut journal, ..) = start(&disk, true);
        for round in 0..300 {
            generation += 1;
            let change = |name: &&str| if round % 2 == 0 { put(name, generation) } else { remove(name) };
            journal.append(generation, &names.iter().map(change).collect::<Vec<_>>()).expect("a good disk");
        }
        compact(&mut journal);
        drop(journal);
        assert_eq!(start(&disk, true).1.outbox.len(), names.len());
    }
    assert!(snapshot(&disk).len() < 1000, "three removals are small");
}
