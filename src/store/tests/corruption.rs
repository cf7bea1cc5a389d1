//! Bytes that are not what was written: found wherever they are, never taken for records.

use std::{collections::BTreeMap, sync::Arc};

use super::{Instances, apply, open, open_with, random_batch, simulated_disk::SimulatedDisk, small};
use crate::store::{
    DirectoryTerm, Record, StoreError, StoreOptions,
    clean_stop::CLEAN_STOP,
    disk::Directory as _,
    frame::{FRAME_LEN, FileId, Frame, FrameBuffer, HEADER_LEN, Header, StoreId},
};

type FileContents = BTreeMap<String, Vec<u8>>;

/// A store, and the registered instances after each batch; index 0 is before the first.
struct Sample {
    /// As a killed process leaves it.
    killed: FileContents,
    /// As a clean end leaves it.
    closed: FileContents,
    states: Vec<Instances>,
}

/// A snapshot, a closed segment and a newest segment, or one segment only.
fn sample(with_snapshot: bool) -> Sample {
    let rng = &mut fastrand::Rng::with_seed(7);
    let disk = SimulatedDisk::default();
    let options = StoreOptions { segment_bytes: 1 << 30, ..small() };
    let (mut journal, ..) = open_with(&disk, &options, &Arc::default()).expect("a new directory");
    let mut states = vec![Instances::new()];
    for generation in 1..=9 {
        let batch = random_batch(rng);
        journal.append(generation, &batch).expect("a good disk");
        let mut instances = states.last().expect("one at least").clone();
        batch.iter().for_each(|record| apply(&mut instances, record));
        states.push(instances);
        if with_snapshot && generation == 3 {
            journal.rotate().expect("a good disk");
            journal.compact();
            journal.reap();
        }
        if with_snapshot && generation == 6 {
            journal.rotate().expect("a good disk");
        }
    }
    let killed = disk.contents();
    drop(journal);
    Sample { killed, closed: disk.contents(), states }
}

fn accepting() -> StoreOptions {
    StoreOptions { accept_loss: true, ..small() }
}

/// The last frame of the newest segment.
fn last_batch(contents: &FileContents) -> (String, std::ops::Range<usize>) {
    let (name, bytes) = contents.iter().rfind(|(name, _)| name.starts_with("journal")).expect("a segment");
    let starts = bytes.windows(4).enumerate().filter(|(_, four)| Frame::starts_with_magic(four));
    let start = starts.map(|(at, _)| at).next_back().expect("a frame");
    (name.clone(), start..bytes.len())
}

#[test]
fn torn_write_is_cut_off_and_reported_at_any_byte() {
    let Sample { killed, states, .. } = sample(false);
    let (name, frame) = last_batch(&killed);
    for end in frame.start + 1..frame.end {
        for filler in [&[][..], &[0; 40], &[0xFF; 3]] {
            let mut torn = killed.clone();
            let bytes = torn.get_mut(&name).expect("it is there");
            bytes.truncate(end);
            bytes.extend_from_slice(filler);
            // A frame whose last bytes are those of the filler is whole again.
            if bytes.starts_with(&killed[&name]) {
                continue;
            }
            let disk = SimulatedDisk::holding(&torn);
            let (journal, recovery, read) = open(&disk).expect("a torn tail is no corruption");
            assert_eq!(read, states[8], "torn at {end}");
            assert_eq!(recovery.generation, 8);
            let expected = format!("cut {} bytes from offset {}", end + filler.len() - frame.start, frame.start);
            assert!(recovery.repairs[0].contains(&expected), "{:?} lacks {expected}", recovery.repairs);
            assert!(recovery.repairs[0].contains("data/journal-0000000001"), "{:?}", recovery.repairs);
            drop(journal);
            let (_, recovery, read) = open(&disk).expect("cut once");
            assert_eq!((read, recovery.repairs), (states[8].clone(), vec![]));
        }
    }
}

#[test]
fn batch_of_several_frames_is_atomic() {
    let rng = &mut fastrand::Rng::with_seed(3);
    let disk = SimulatedDisk::default();
    let (mut journal, ..) = open(&disk).expect("a new directory");
    journal.frame_bytes = 60;
    let (first, second): (Vec<Record>, Vec<Record>) =
        ((0..4).flat_map(|_| random_batch(rng)).collect(), (0..4).flat_map(|_| random_batch(rng)).collect());
    journal.append(1, &first).expect("a good disk");
    let before = disk.contents()["journal-0000000001"].len();
    journal.append(2, &second).expect("a good disk");
    let whole = disk.contents();
    let mut expected = Instances::new();
    first.iter().for_each(|record| apply(&mut expected, record));
    let len = whole["journal-0000000001"].len();
    for end in before..len {
        let mut torn = whole.clone();
        torn.get_mut("journal-0000000001").expect("it is there").truncate(end);
        let (_, _, read) = open(&SimulatedDisk::holding(&torn)).expect("a torn tail");
        assert_eq!(read, expected, "torn at {end} of {before}..{len}");
    }
    // Pages reach the disk in any order: a hole in the last batch, its end there, is torn as well.
    for hole in before..len {
        let mut torn = whole.clone();
        torn.get_mut("journal-0000000001").expect("it is there")[hole] ^= 0x55;
        let (_, recovery, read) = open(&SimulatedDisk::holding(&torn)).expect("a torn tail");
        assert_eq!(read, expected, "a hole at {hole}");
        assert_eq!(recovery.repairs.len(), 1);
    }
}

#[test]
fn flipped_bit_is_detected_in_any_byte() {
    for (sample, files) in [(sample(false), 1), (sample(true), 3)] {
        assert_eq!(sample.closed.len(), files + 1, "and the clean-stop file");
        for (contents, clean) in [(&sample.closed, true), (&sample.killed, false)] {
            let (newest, tail) = last_batch(contents);
            for (name, bytes) in contents {
                for at in 0..bytes.len() {
                    let mut flipped = contents.clone();
                    flipped.get_mut(name).expect("it is there")[at] ^= 1 << (at % 8);
                    let opened = open(&SimulatedDisk::holding(&flipped));
                    if !clean && *name == newest && tail.contains(&at) {
                        // After a crash nothing on the disk covers the last frame.
                        let (_, recovery, read) = opened.expect("it may be a torn write");
                        assert_eq!(read, sample.states[8], "{name} at {at}");
                        assert_eq!(recovery.repairs.len(), 1, "{name} at {at}");
                        continue;
                    }
                    let err = opened.err().unwrap_or_else(|| panic!("{name} at {at} was not noticed"));
                    let StoreError::Corrupt { corruptions, .. } = &err else { panic!("{name} at {at}: {err}") };
                    assert!(corruptions[0].path.ends_with(name), "{name} at {at}: {err}");
                    if name != CLEAN_STOP {
                        let bytes = corruptions[0].bytes.clone().expect("a range");
                        assert!(bytes.contains(&(at as u64)), "{name} at {at}: {err}");
                    }
                }
            }
        }
    }
}

#[test]
fn truncated_or_missing_file_is_detected_after_a_clean_stop() {
    let sample = sample(true);
    for (name, bytes) in &sample.closed {
        let mut without = sample.closed.clone();
        without.remove(name);
        let opened = open(&SimulatedDisk::holding(&without));
        // Without the clean-stop file it looks as after a crash.
        assert!(matches!(opened, Err(StoreError::Corrupt { .. })) || name == CLEAN_STOP, "{name} is gone");
        for len in 0..bytes.len() {
            let mut cut = sample.closed.clone();
            cut.get_mut(name).expect("it is there").truncate(len);
            let opened = open(&SimulatedDisk::holding(&cut));
            assert!(matches!(opened, Err(StoreError::Corrupt { .. })), "{name} cut at {len}");
        }
    }
    let stop = sample.closed.iter().filter(|(name, _)| *name == CLEAN_STOP);
    let only_the_clean_stop: FileContents = stop.map(|(name, bytes)| (name.clone(), bytes.clone())).collect();
    let said = open(&SimulatedDisk::holding(&only_the_clean_stop)).expect_err("it is no new directory").to_string();
    assert!(said.contains("journal-0000000001: is missing, and so are the 2 segments after it"), "{said}");
}

/// What was seen: after a clean stop a segment cut to a tenth was taken for a torn write.
#[test]
fn active_segment_cut_after_a_clean_stop_refuses_until_the_loss_is_accepted() {
    let Sample { closed, states, .. } = sample(false);
    let name = "journal-0000000001";
    let len = closed[name].len();
    let mut cut = closed;
    cut.get_mut(name).expect("it is there").truncate(len / 10);
    let disk = SimulatedDisk::holding(&cut);
    for _ in 0..2 {
        let said = open(&disk).expect_err("acknowledged batches are gone").to_string();
        let place = format!("data/{name} at offset {} ({} bytes): bytes are missing", len / 10, len - len / 10);
        assert!(said.contains(&place) && said.contains("and up to 9"), "{said}");
    }
    let (journal, recovery, read) = open_with(&disk, &accepting(), &Arc::default()).expect("the loss is accepted");
    assert_eq!(read, states[usize::try_from(recovery.generation).expect("small")]);
    let after_a_crash = SimulatedDisk::holding(&disk.contents());
    drop(journal);
    for disk in [after_a_crash, disk] {
        let (_, recovery, again) = open(&disk).expect("accepted once and for all");
        assert_eq!((again, recovery.repairs), (read.clone(), vec![]));
    }
}

/// The file is a lower bound: it stays true when the journal has grown and the process has crashed.
#[test]
fn segment_cut_below_the_last_clean_stop_is_detected_after_a_crash_too() {
    let disk = SimulatedDisk::holding(&sample(false).closed);
    let options = StoreOptions { segment_bytes: 1 << 30, ..small() };
    let (mut journal, _, mut instances) = open_with(&disk, &options, &Arc::default()).expect("intact");
    let stopped_at = disk.contents()["journal-0000000001"].len();
    for generation in 10..=12 {
        let batch = random_batch(&mut fastrand::Rng::with_seed(generation));
        journal.append(generation, &batch).expect("a good disk");
        batch.iter().for_each(|record| apply(&mut instances, record));
    }
    let killed = disk.contents();
    let cut_at = |len: usize| {
        let mut cut = killed.clone();
        cut.get_mut("journal-0000000001").expect("it is there").truncate(len);
        open(&SimulatedDisk::holding(&cut))
    };
    let frame = stopped_at - FRAME_LEN; // the sync marker of the second start
    assert!(matches!(cut_at(frame - 1), Err(StoreError::Corrupt { .. })));
    let (_, _, read) = cut_at(killed["journal-0000000001"].len()).expect("a crash");
    assert_eq!(read, instances);
    assert_eq!(cut_at(killed["journal-0000000001"].len() - 1).expect("a torn write").1.generation, 11);
}

#[test]
fn accepted_loss_keeps_all_other_records_and_the_corrupt_file() {
    let sample = sample(true);
    for (name, bytes) in &sample.closed {
        for at in (0..bytes.len()).step_by(5) {
            let mut flipped = sample.closed.clone();
            flipped.get_mut(name).expect("it is there")[at] ^= 1;
            let disk = SimulatedDisk::holding(&flipped);
            let (mut journal, recovery, read) =
                open_with(&disk, &accepting(), &Arc::default()).expect("the loss is accepted");
            assert!(recovery.repairs[0].starts_with(&format!("loss accepted: data/{name}")), "{recovery:?}");
            assert_eq!(recovery.generation, 9);
            if at < HEADER_LEN || name == CLEAN_STOP {
                assert_eq!(read, sample.states[9], "{name} at {at}: only the header is corrupt");
            }
            let rng = &mut fastrand::Rng::with_seed(at as u64);
            let mut after = read.clone();
            let batch = random_batch(rng);
            journal.append(10, &batch).expect("it goes on");
            batch.iter().for_each(|record| apply(&mut after, record));
            drop(journal);
            let kept = disk.contents().contains_key(&format!("{name}.corrupt"));
            assert!(kept || name == CLEAN_STOP, "{name} at {at}");
            disk.power_cut(rng);
            let (_, recovery, read) = open(&disk).expect("the tail was cut");
            assert_eq!((read, recovery.repairs), (after, vec![]), "{name} at {at}");
        }
    }
}

/// Kubernetes may have what was lost.
#[test]
fn directory_with_an_accepted_loss_is_not_the_newest_state_any_more() {
    let disk = SimulatedDisk::default();
    let options = StoreOptions { outbox: true, segment_bytes: 1 << 30, ..small() };
    let (mut journal, ..) = open_with(&disk, &options, &Arc::default()).expect("a new directory");
    let term = |followed| DirectoryTerm { followed, ..DirectoryTerm::new(5) };
    journal.append(1, &[Record::Term(term(false))]).expect("a good disk");
    let rng = &mut fastrand::Rng::with_seed(7);
    (2..6).for_each(|generation| journal.append(generation, &random_batch(rng)).expect("a good disk"));
    drop(journal);
    let (_, recovery, _) = open_with(&disk, &options, &Arc::default()).expect("a good disk");
    assert_eq!(recovery.term, term(false));
    let mut contents = disk.contents();
    let (name, last) = last_batch(&contents);
    let bytes = contents.get_mut(&name).expect("it is there");
    // The last frames are sync markers.
    let at = last.start - 2 * FRAME_LEN;
    bytes[at] ^= 1;
    let disk = SimulatedDisk::holding(&contents);
    let accepting = StoreOptions { accept_loss: true, ..options };
    assert!(open_with(&disk, &options, &Arc::default()).is_err(), "a loss");
    let (journal, recovery, _) = open_with(&disk, &accepting, &Arc::default()).expect("it is accepted");
    assert_eq!(recovery.term, term(true));
    drop(journal);
    let (_, recovery, _) = open_with(&disk, &options, &Arc::default()).expect("nothing is corrupt any more");
    assert_eq!(recovery.term, term(true), "it is journaled");
}

#[test]
fn corrupt_batch_loses_no_other_batch() {
    let Sample { closed, states, .. } = sample(false);
    let name = "journal-0000000001";
    let starts: Vec<usize> = closed[name]
        .windows(4)
        .enumerate()
        .filter(|(_, four)| Frame::starts_with_magic(four))
        .map(|(at, _)| at)
        .collect();
    // Frame 0 is the mark of the first start; frame 9 holds the last batch.
    let mut flipped = closed;
    flipped.get_mut(name).expect("it is there")[starts[9] + 40] ^= 1;
    let said = open(&SimulatedDisk::holding(&flipped)).expect_err("it was acknowledged").to_string();
    let file_id = format!("data/{name} at offset {} ({} bytes): the checksum", starts[9], starts[10] - starts[9]);
    assert!(said.contains(&file_id) && said.contains("what changed after generation 8 and before 9"), "{said}");
    assert!(said.contains("--accept-loss"), "{said}");
    let (_, _, read) = open_with(&SimulatedDisk::holding(&flipped), &accepting(), &Arc::default()).expect("accepted");
    assert_eq!(read, states[8]);
}

#[test]
fn file_of_another_store_is_refused() {
    let mut contents = sample(true).closed;
    let file_id = FileId::journal(4);
    let (newest, _) = last_batch(&contents);
    assert_eq!(newest, FileId::journal(3).file_name());
    let header = Header { id: StoreId::random(), file_id, previous_len: contents[&newest].len() as u64 };
    contents.insert(file_id.file_name(), header.encode().to_vec());
    let said = open(&SimulatedDisk::holding(&contents)).expect_err("not ours").to_string();
    assert!(said.contains("journal-0000000004: belongs to the data directory of another gangplank"), "{said}");
}

#[test]
fn newer_format_is_refused_even_with_accept_loss() {
    let closed = sample(false).closed;
    let name = "journal-0000000001";
    let file_id = FileId::journal(1);
    let end = closed[name].len() as u64;

    let mut version = closed.clone();
    let bytes = version.get_mut(name).expect("it is there");
    bytes[8] = 2;
    let crc = crc32c::crc32c(&bytes[..44]);
    bytes[44..48].copy_from_slice(&crc.to_le_bytes());

    let frame = Frame { more: false, end: false, unknown_flags: 0, generation: 10, synced: end };
    let appended = |payload: &[u8], flags: u8| {
        let mut contents = closed.clone();
        let mut buffer = FrameBuffer::new();
        buffer.extend_raw(payload);
        let mut bytes = buffer.finish(&frame, file_id, end).to_vec();
        bytes[12] |= flags;
        let crc = crc32c::crc32c_append(file_id.seed(end), &bytes[8..]);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        contents.get_mut(name).expect("it is there").extend_from_slice(&bytes);
        contents
    };
    for (contents, says) in [
        (version, "format version 2"),
        (appended(&[], 0x80), "frame flags 0x80"),
        (appended(&[0x0A, 2, 0x32, 0], 0), "a record of a kind, or with a field"), // entry with tag 6
        (appended(&[0x12, 0], 0), "a record of a kind, or with a field"),          // field 2 of the payload
    ] {
        for options in [small(), accepting()] {
            let opened = open_with(&SimulatedDisk::holding(&contents), &options, &Arc::default());
            let said = opened.expect_err("unknown").to_string();
            assert!(said.contains("newer gangplank") && said.contains(says), "{said}");
        }
    }
}

#[test]
fn invalid_record_is_corruption_with_its_offset() {
    let closed = sample(false).closed;
    let name = "journal-0000000001";
    let end = closed[name].len() as u64;
    let mut contents = closed;
    let mut buffer = FrameBuffer::new();
    buffer.extend_raw(&[0x0A, 2, 0x0A, 0]); // a Put of nothing
    let frame = Frame { more: false, end: false, unknown_flags: 0, generation: 10, synced: end };
    contents.get_mut(name).expect("it is there").extend_from_slice(buffer.finish(&frame, FileId::journal(1), end));
    let said = open(&SimulatedDisk::holding(&contents)).expect_err("no instance").to_string();
    assert!(
        said.contains(&format!("{name} at offset {end}")) && said.contains("namespace: must not be empty"),
        "{said}"
    );
    let disk = SimulatedDisk::holding(&contents);
    open_with(&disk, &accepting(), &Arc::default()).expect("accepted");
    open(&disk).expect("the next start is clean");
}

#[test]
fn obsolete_files_are_removed_and_foreign_files_stay() {
    let mut contents = sample(true).closed;
    contents.insert("journal-0000000001".into(), vec![1, 2, 3]);
    contents.insert("snapshot-0000000009.tmp".into(), vec![1]);
    contents.insert("notes.txt".into(), vec![1]);
    let disk = SimulatedDisk::holding(&contents);
    let file = disk.open("notes.txt").expect("it is there");
    assert_eq!(file.len().expect("open"), 1);
    let (journal, recovery, _) = open(&disk).expect("nothing that counts is corrupt");
    assert_eq!(recovery.repairs, Vec::<String>::new());
    drop(journal);
    let names: Vec<String> = disk.contents().into_keys().collect();
    assert!(names.contains(&"notes.txt".into()) && !names.iter().any(|name| name.ends_with(".tmp")), "{names:?}");
    assert!(!names.contains(&"journal-0000000001".into()), "{names:?}");
}

#[test]
fn accepting_a_loss_survives_a_crash_at_any_operation_and_keeps_the_corrupt_file() {
    let closed = sample(true).closed;
    let accepted = |disk: &SimulatedDisk| open_with(disk, &accepting(), &Arc::default());
    for name in closed.keys().filter(|name| *name != CLEAN_STOP) {
        let mut flipped = closed.clone();
        flipped.get_mut(name).expect("it is there")[100] ^= 1;
        let (_, _, expected) = accepted(&SimulatedDisk::holding(&flipped)).expect("accepted");
        for seed in 0..6 {
            let rng = &mut fastrand::Rng::with_seed(seed);
            for operations in 0.. {
                let disk = SimulatedDisk::holding(&flipped);
                disk.cut_after(operations);
                drop(accepted(&disk));
                if !disk.is_off() {
                    assert!(operations > 15, "the cuts went through all of it");
                    break;
                }
                // Killed, or without power.
                if seed % 2 == 0 {
                    disk.restart();
                } else {
                    disk.power_cut(rng);
                }
                let (journal, _, read) = accepted(&disk).expect("still accepted");
                assert_eq!(read, expected, "{name}, cut after {operations}");
                drop(journal);
                let contents = disk.contents();
                let kept = contents.get(&format!("{name}.corrupt"));
                let kept = kept.unwrap_or_else(|| panic!("{name} is gone, cut after {operations}, seed {seed}"));
                assert_eq!(kept[..=100], flipped[name][..=100], "{name}, cut after {operations}");
            }
        }
    }
}
