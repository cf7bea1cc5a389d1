//! Octets that are not what was written: found wherever they are, never taken for records.

use std::{collections::BTreeMap, sync::Arc};

use super::{Model, apply, machine::Machine, open, open_with, random_batch, small};
use crate::store::{
    Options, Record, StoreError,
    files::Files as _,
    frame::{Frame, FrameBuffer, HEADER_LEN, Header, Place, StoreId},
};

type Contents = BTreeMap<String, Vec<u8>>;

/// A store and what stood in it after each batch; index 0 is before the first.
struct Sample {
    /// As a killed process leaves it.
    killed: Contents,
    /// As a clean end leaves it.
    closed: Contents,
    models: Vec<Model>,
}

/// A snapshot, a closed segment and a newest segment, or one segment only.
fn sample(with_snapshot: bool) -> Sample {
    let rng = &mut fastrand::Rng::with_seed(7);
    let machine = Machine::default();
    let options = Options { segment_octets: 1 << 30, ..small() };
    let (mut journal, ..) = open_with(&machine, &options, &Arc::default()).expect("a new directory");
    let mut models = vec![Model::new()];
    for generation in 1..=9 {
        let batch = random_batch(rng);
        journal.append(generation, &batch).expect("a good disk");
        let mut model = models.last().expect("one at least").clone();
        batch.iter().for_each(|record| apply(&mut model, record));
        models.push(model);
        if with_snapshot && generation == 3 {
            journal.rotate().expect("a good disk");
            journal.compact();
            journal.reap();
        }
        if with_snapshot && generation == 6 {
            journal.rotate().expect("a good disk");
        }
    }
    let killed = machine.contents();
    drop(journal);
    Sample { killed, closed: machine.contents(), models }
}

fn accepting() -> Options {
    Options { accept_loss: true, ..small() }
}

/// The last frame of the newest segment.
fn last_batch(contents: &Contents) -> (String, std::ops::Range<usize>) {
    let (name, bytes) = contents.iter().rfind(|(name, _)| name.starts_with("journal")).expect("a segment");
    let starts = bytes.windows(4).enumerate().filter(|(_, four)| Frame::may_begin(four));
    let start = starts.map(|(at, _)| at).next_back().expect("a frame");
    (name.clone(), start..bytes.len())
}

#[test]
fn a_last_record_torn_at_any_octet_is_cut_and_reported() {
    let Sample { killed, models, .. } = sample(false);
    let (name, frame) = last_batch(&killed);
    for end in frame.start + 1..frame.end {
        for filler in [&[][..], &[0; 40], &[0xFF; 3]] {
            let mut torn = killed.clone();
            let bytes = torn.get_mut(&name).expect("it is there");
            bytes.truncate(end);
            bytes.extend_from_slice(filler);
            // A frame whose last octets are those of the filler is whole again.
            if bytes.starts_with(&killed[&name]) {
                continue;
            }
            let machine = Machine::holding(&torn);
            let (journal, recovery, read) = open(&machine).expect("a torn tail is no damage");
            assert_eq!(read, models[8], "torn at {end}");
            assert_eq!(recovery.generation, 8);
            let expected = format!("cut {} octets from offset {}", end + filler.len() - frame.start, frame.start);
            assert!(recovery.repairs[0].contains(&expected), "{:?} lacks {expected}", recovery.repairs);
            assert!(recovery.repairs[0].contains("data/journal-0000000001"), "{:?}", recovery.repairs);
            drop(journal);
            let (_, recovery, read) = open(&machine).expect("cut once");
            assert_eq!((read, recovery.repairs), (models[8].clone(), vec![]));
        }
    }
}

#[test]
fn a_batch_of_several_frames_is_there_whole_or_not_at_all() {
    let rng = &mut fastrand::Rng::with_seed(3);
    let machine = Machine::default();
    let (mut journal, ..) = open(&machine).expect("a new directory");
    journal.frame_octets = 60;
    let (first, second): (Vec<Record>, Vec<Record>) =
        ((0..4).flat_map(|_| random_batch(rng)).collect(), (0..4).flat_map(|_| random_batch(rng)).collect());
    journal.append(1, &first).expect("a good disk");
    let before = machine.contents()["journal-0000000001"].len();
    journal.append(2, &second).expect("a good disk");
    let whole = machine.contents();
    let mut expected = Model::new();
    first.iter().for_each(|record| apply(&mut expected, record));
    let len = whole["journal-0000000001"].len();
    for end in before..len {
        let mut torn = whole.clone();
        torn.get_mut("journal-0000000001").expect("it is there").truncate(end);
        let (_, _, read) = open(&Machine::holding(&torn)).expect("a torn tail");
        assert_eq!(read, expected, "torn at {end} of {before}..{len}");
    }
    // Pages reach the disk in any order: a hole in the last batch, its end there, is torn as well.
    for hole in before..len {
        let mut torn = whole.clone();
        torn.get_mut("journal-0000000001").expect("it is there")[hole] ^= 0x55;
        let (_, recovery, read) = open(&Machine::holding(&torn)).expect("a torn tail");
        assert_eq!(read, expected, "a hole at {hole}");
        assert_eq!(recovery.repairs.len(), 1);
    }
}

#[test]
fn a_flipped_octet_anywhere_is_found() {
    for (sample, files) in [(sample(false), 1), (sample(true), 3)] {
        assert_eq!(sample.closed.len(), files);
        for (contents, clean) in [(&sample.closed, true), (&sample.killed, false)] {
            let (newest, tail) = last_batch(contents);
            for (name, bytes) in contents {
                for at in 0..bytes.len() {
                    let mut flipped = contents.clone();
                    flipped.get_mut(name).expect("it is there")[at] ^= 1 << (at % 8);
                    let opened = open(&Machine::holding(&flipped));
                    if *name == newest && tail.contains(&at) {
                        // Nothing on the disk vouches for the last frame: of a clean end that is
                        // a mark, which holds nothing.
                        let (_, recovery, read) = opened.expect("it may be a torn tail");
                        assert_eq!(read, sample.models[if clean { 9 } else { 8 }], "{name} at {at}");
                        assert_eq!(recovery.repairs.len(), 1, "{name} at {at}");
                    } else {
                        let err = opened.err().unwrap_or_else(|| panic!("{name} at {at} was not noticed"));
                        let StoreError::Damaged { damages, .. } = &err else { panic!("{name} at {at}: {err}") };
                        let octets = damages[0].octets.clone().expect("a place");
                        assert!(octets.contains(&(at as u64)), "{name} at {at}: {err}");
                        assert!(damages[0].path.ends_with(name), "{name} at {at}: {err}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_file_cut_short_or_gone_is_found() {
    let sample = sample(true);
    for (name, bytes) in &sample.closed {
        let (newest, _) = last_batch(&sample.closed);
        let mut without = sample.closed.clone();
        without.remove(name);
        let gone = open(&Machine::holding(&without));
        // Nobody can tell that the newest segment was there, if another one is before it.
        assert!(matches!(gone, Err(StoreError::Damaged { .. })) || *name == newest, "{name} gone");
        for len in (0..bytes.len()).filter(|_| *name != newest) {
            let mut cut = sample.closed.clone();
            cut.get_mut(name).expect("it is there").truncate(len);
            assert!(matches!(open(&Machine::holding(&cut)), Err(StoreError::Damaged { .. })), "{name} cut at {len}");
        }
    }
}

#[test]
fn accepted_loss_keeps_everything_else_and_sets_the_file_aside() {
    let sample = sample(true);
    for (name, bytes) in &sample.closed {
        for at in (0..bytes.len()).step_by(5) {
            let mut flipped = sample.closed.clone();
            flipped.get_mut(name).expect("it is there")[at] ^= 1;
            let machine = Machine::holding(&flipped);
            if open(&machine).is_ok() {
                continue; // the last mark
            }
            let machine = Machine::holding(&flipped);
            let (mut journal, recovery, read) =
                open_with(&machine, &accepting(), &Arc::default()).expect("the loss is accepted");
            assert!(recovery.repairs[0].starts_with(&format!("given up: data/{name} at offset ")), "{recovery:?}");
            assert_eq!(recovery.generation, 9);
            if at < HEADER_LEN {
                assert_eq!(read, sample.models[9], "{name} at {at}: only the header is damaged");
            }
            let rng = &mut fastrand::Rng::with_seed(at as u64);
            let mut after = read.clone();
            let batch = random_batch(rng);
            journal.append(10, &batch).expect("it goes on");
            batch.iter().for_each(|record| apply(&mut after, record));
            drop(journal);
            assert!(machine.contents().contains_key(&format!("{name}.damaged")), "{name} at {at}");
            machine.power_cut(rng);
            let (_, recovery, read) = open(&machine).expect("mended");
            assert_eq!((read, recovery.repairs), (after, vec![]), "{name} at {at}");
        }
    }
}

#[test]
fn a_batch_that_is_lost_takes_no_other_with_it() {
    let Sample { closed, models, .. } = sample(false);
    let name = "journal-0000000001";
    let starts: Vec<usize> =
        closed[name].windows(4).enumerate().filter(|(_, four)| Frame::may_begin(four)).map(|(at, _)| at).collect();
    // Frame 0 is the mark of the first start; frame 9 holds the last batch.
    let mut flipped = closed;
    flipped.get_mut(name).expect("it is there")[starts[9] + 40] ^= 1;
    let said = open(&Machine::holding(&flipped)).expect_err("it was acknowledged").to_string();
    let place = format!("data/{name} at offset {} ({} octets): the checksum", starts[9], starts[10] - starts[9]);
    assert!(said.contains(&place) && said.contains("what changed after generation 8 and before 9"), "{said}");
    assert!(said.contains("--accept-loss"), "{said}");
    let (_, _, read) = open_with(&Machine::holding(&flipped), &accepting(), &Arc::default()).expect("accepted");
    assert_eq!(read, models[8]);
}

#[test]
fn a_file_of_another_store_is_refused() {
    let mut contents = sample(true).closed;
    let place = Place::journal(4);
    let (newest, _) = last_batch(&contents);
    assert_eq!(newest, Place::journal(3).name());
    let header = Header { id: StoreId::draw(), place, previous_len: contents[&newest].len() as u64 };
    contents.insert(place.name(), header.encode().to_vec());
    let said = open(&Machine::holding(&contents)).expect_err("not ours").to_string();
    assert!(said.contains("journal-0000000004: belongs to the data directory of another gangplank"), "{said}");
}

#[test]
fn what_a_later_version_wrote_is_refused_whatever_is_accepted() {
    let closed = sample(false).closed;
    let name = "journal-0000000001";
    let place = Place::journal(1);
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
        let mut bytes = buffer.seal(&frame, place, end).to_vec();
        bytes[12] |= flags;
        let crc = crc32c::crc32c_append(place.seed(end), &bytes[8..]);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        contents.get_mut(name).expect("it is there").extend_from_slice(&bytes);
        contents
    };
    for (contents, says) in [
        (version, "format version 2"),
        (appended(&[], 0x80), "frame flags 0x80"),
        (appended(&[0x0A, 2, 0x2A, 0], 0), "a record of a kind, or with a field"), // entry with tag 5
        (appended(&[0x12, 0], 0), "a record of a kind, or with a field"),          // field 2 of the payload
    ] {
        for options in [small(), accepting()] {
            let opened = open_with(&Machine::holding(&contents), &options, &Arc::default());
            let said = opened.expect_err("unknown").to_string();
            assert!(said.contains("newer gangplank") && said.contains(says), "{said}");
        }
    }
}

#[test]
fn a_record_that_no_door_lets_in_is_damage_with_its_place() {
    let closed = sample(false).closed;
    let name = "journal-0000000001";
    let end = closed[name].len() as u64;
    let mut contents = closed;
    let mut buffer = FrameBuffer::new();
    buffer.extend_raw(&[0x0A, 2, 0x0A, 0]); // a Put of nothing
    let frame = Frame { more: false, end: false, unknown_flags: 0, generation: 10, synced: end };
    contents.get_mut(name).expect("it is there").extend_from_slice(buffer.seal(&frame, Place::journal(1), end));
    let said = open(&Machine::holding(&contents)).expect_err("no instance").to_string();
    assert!(
        said.contains(&format!("{name} at offset {end}")) && said.contains("namespace: must not be empty"),
        "{said}"
    );
    let machine = Machine::holding(&contents);
    open_with(&machine, &accepting(), &Arc::default()).expect("accepted");
    open(&machine).expect("the next start is clean");
}

#[test]
fn stale_files_are_removed_at_the_start_and_foreign_ones_stay() {
    let mut contents = sample(true).closed;
    contents.insert("journal-0000000001".into(), vec![1, 2, 3]);
    contents.insert("snapshot-0000000009.tmp".into(), vec![1]);
    contents.insert("notes.txt".into(), vec![1]);
    let machine = Machine::holding(&contents);
    let file = machine.open("notes.txt").expect("it is there");
    assert_eq!(file.len().expect("open"), 1);
    let (journal, recovery, _) = open(&machine).expect("nothing that counts is damaged");
    assert_eq!(recovery.repairs, Vec::<String>::new());
    drop(journal);
    let names: Vec<String> = machine.contents().into_keys().collect();
    assert!(names.contains(&"notes.txt".into()) && !names.iter().any(|name| name.ends_with(".tmp")), "{names:?}");
    assert!(!names.contains(&"journal-0000000001".into()), "{names:?}");
}

#[test]
fn a_start_that_sets_files_aside_can_be_cut_anywhere() {
    let mut flipped = sample(true).closed;
    flipped.get_mut("journal-0000000002").expect("it is there")[100] ^= 1;
    let accepted = |machine: &Machine| open_with(machine, &accepting(), &Arc::default());
    let (_, _, expected) = accepted(&Machine::holding(&flipped)).expect("accepted");
    for seed in 0..5 {
        let rng = &mut fastrand::Rng::with_seed(seed);
        for operations in 0.. {
            let machine = Machine::holding(&flipped);
            machine.cut_after(operations);
            drop(accepted(&machine));
            if !machine.is_off() {
                assert!(operations > 15, "the cuts went through all of it");
                break;
            }
            machine.power_cut(rng);
            let (_, _, read) = accepted(&machine).expect("still accepted");
            assert_eq!(read, expected, "cut after {operations}");
        }
    }
}
