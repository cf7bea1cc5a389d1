//! A real directory: the lock, the first disk version, and a start from both.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

use super::{ExpectedStore, Instances, VALIDATOR, apply, instance_of, random_batch, service};
use crate::{
    metrics::Metrics,
    model::{InstanceSpec, PortSpec, Protocol, RegistrantPool, Stamp, UnixMillis},
    store::{DataDir, DirectoryTerm, Journal, Record, RecoveryReport, StoreError, StoreOptions, create_durably},
};

fn start(path: &Path, options: &StoreOptions) -> (Journal, RecoveryReport, Instances) {
    let mut instances = Instances::new();
    let dir = DataDir::lock(path).expect("nobody else has it");
    let (journal, recovery) = dir
        .recover(options, Arc::new(Metrics::default()), &mut |record| apply(&mut instances, &record), &mut |_| {})
        .expect("a good directory");
    (journal, recovery, instances)
}

#[test]
fn second_process_is_refused_with_the_pid_of_the_first() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("state/data");
    let (mut journal, ..) = start(&path, &StoreOptions { segment_bytes: 300, ..StoreOptions::default() });
    let mode = fs::metadata(&path).expect("it was made").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);

    let refused = || match DataDir::lock(&path) {
        Err(err @ StoreError::Locked { .. }) => err.to_string(),
        other => panic!("{other:?}"),
    };
    let said = refused();
    assert!(said.contains(&format!("process {} (pid)", std::process::id())), "{said}");
    assert!(said.contains(&path.display().to_string()) && said.contains("--data-dir"), "{said}");

    let rng = &mut fastrand::Rng::with_seed(1);
    for generation in 1..30 {
        journal.append(generation, &random_batch(rng)).expect("a good disk");
        journal.reap();
    }
    assert!(fs::read_dir(&path).expect("it is there").any(|entry| {
        entry.expect("readable").file_name().to_str().is_some_and(|name| name.starts_with("snapshot-"))
    }));
    refused();
    drop(journal);
    DataDir::lock(&path).expect("free again");
}

/// A sync succeeds for a file that was removed: nothing may be acknowledged for it.
#[test]
fn journal_stops_when_its_directory_lock_or_segment_is_removed_or_replaced() {
    type Attack = fn(&Path);
    let remove: Attack = |path| fs::remove_dir_all(path).expect("removed");
    let replace: Attack = |path| {
        fs::rename(path, path.with_extension("old")).expect("renamed");
        fs::create_dir(path).expect("created");
    };
    let remove_lock: Attack = |path| fs::remove_file(path.join("LOCK")).expect("removed");
    let replace_lock: Attack = |path| {
        fs::remove_file(path.join("LOCK")).expect("removed");
        fs::write(path.join("LOCK"), "").expect("created");
    };
    let remove_segment: Attack = |path| fs::remove_file(path.join("journal-0000000001")).expect("removed");
    for (attack, gone) in [
        (remove, ""),
        (replace, ""),
        (remove_lock, "/LOCK"),
        (replace_lock, "/LOCK"),
        (remove_segment, "/journal-0000000001"),
    ] {
        for segment_bytes in [1 << 20, 1] {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let path = dir.path().join("data");
            let (mut journal, ..) = start(&path, &StoreOptions { segment_bytes, ..StoreOptions::default() });
            // With segments of one byte the next append begins another one.
            journal.check_in_place().expect("all is there");
            attack(&path);
            let rng = &mut fastrand::Rng::with_seed(1);
            let said = journal.append(1, &random_batch(rng)).expect_err("it would be lost").to_string();
            assert!(said.starts_with(&format!("{}{gone} was removed or replaced", path.display())), "{said}");
            assert!(journal.usable().is_err() && journal.check_in_place().is_err());
            journal.append(2, &random_batch(rng)).expect_err("only a restart can go on");
            drop(journal);
            let files = fs::read_dir(&path).map_or(0, Iterator::count);
            assert!(files == 0 || !gone.is_empty(), "nothing is written into another directory");
        }
    }
}

#[test]
fn new_directories_are_synced_in_their_parents() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let path = root.path().join("a/b/c");
    let synced = |path: &Path| {
        let mut synced = Vec::new();
        let record = &mut |dir: &Path| {
            synced.push(dir.to_owned());
            Ok(())
        };
        create_durably(path, record).expect("it can be created");
        synced.retain(|dir| dir.starts_with(root.path()));
        synced
    };
    let parents = [root.path().to_owned(), root.path().join("a"), root.path().join("a/b")];
    assert_eq!(synced(&path), parents);
    // Killed before it was locked: the names may not be durable yet.
    assert_eq!(synced(&path), parents);
    drop(DataDir::lock(&path).expect("nobody has it"));
    assert!(synced(&path).is_empty(), "it was locked before, so all names are durable");
    assert!(create_durably(&root.path().join("d"), &mut |_| Err(std::io::ErrorKind::Other.into())).is_err());
}

#[test]
fn appended_records_are_replayed_with_progress() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let options = StoreOptions { segment_bytes: 2000, ..StoreOptions::default() };
    let (mut journal, recovery, read) = start(dir.path(), &options);
    assert_eq!((recovery.generation, read.len(), recovery.repairs), (0, 0, vec![]));
    let rng = &mut fastrand::Rng::with_seed(2);
    let mut instances = Instances::new();
    for generation in 1..100 {
        let batch = random_batch(rng);
        journal.append(generation, &batch).expect("a good disk");
        batch.iter().for_each(|record| apply(&mut instances, record));
    }
    drop(journal);
    let mut last = None;
    let (_, recovery) = DataDir::lock(dir.path())
        .expect("free")
        .recover(&options, Arc::default(), &mut |_| {}, &mut |progress| last = Some((progress.read, progress.total)))
        .expect("a good directory");
    assert_eq!(recovery.generation, 99);
    let (read, total) = last.expect("the end is reported");
    assert!(read == total && total > 0);
    let (_, recovery, read) = start(dir.path(), &options);
    assert_eq!((read, recovery.generation, recovery.repairs), (instances, 99, vec![]));
}

fn put(name: &str, spec: InstanceSpec, registered: u64) -> Record {
    let service = service(name);
    let instance = VALIDATOR.instance(&service, &spec, UnixMillis(registered)).expect("valid");
    Record::Put { service, instance: Arc::new(instance) }
}

fn remove(put: &Record) -> Record {
    let (service, id) = instance_of(put);
    Record::Remove { service, id, stamp: Stamp::default() }
}

/// The contents of `tests/fixtures/store/v1`, by batches: a snapshot of the first, a closed
/// segment with the second, the newest segment with the third. It must never change.
fn fixture() -> [Vec<Record>; 3] {
    let port = |number, protocol, name: &str| PortSpec { number, protocol, name: name.into() };
    let full = InstanceSpec {
        address: "10.0.0.1".into(),
        ports: vec![port(8080, Protocol::Tcp, "http"), port(53, Protocol::Udp, "dns"), port(9, Protocol::Sctp, "")],
        host_name: "web-1".into(),
        node_name: "rack7.example.com".into(),
        weight: Some(2.5),
        priority: 65_535,
    };
    let six = InstanceSpec { address: "2001:db8::1".into(), weight: Some(0.0), ..InstanceSpec::default() };
    let name = InstanceSpec {
        address: "db.example.com".into(),
        ports: vec![port(1, Protocol::Tcp, "")],
        ..InstanceSpec::default()
    };
    let gone = put("web", six.clone(), 1_700_000_000_001);
    let removed = remove(&gone);
    [
        vec![put("web", full.clone(), 1_700_000_000_000), gone],
        vec![removed, put("db", name, 1_700_000_000_002)],
        vec![put("web", InstanceSpec { weight: None, priority: 0, ..full }, 1_700_000_000_000), put("six", six, 0)],
    ]
}

/// The same of `tests/fixtures/store/v1-outbox`, whose snapshot has instances that Kubernetes had
/// and such that it lacked, a removal, and a term.
fn outbox_fixture() -> [Vec<Record>; 3] {
    let at = |address: &str| InstanceSpec { address: address.into(), ..InstanceSpec::default() };
    let mirrored = |name, generation| Record::Mirrored { service: service(name), generation };
    let [web, other, db] = [put("web", at("10.0.0.1"), 1), put("web", at("10.0.0.2"), 2), put("db", at("10.0.0.1"), 3)];
    let late = put("late", at("2001:db8::1"), 4);
    [
        vec![
            Record::Term(DirectoryTerm::new(7)),
            web.clone(),
            other.clone(),
            mirrored("web", 1_700_000_001),
            db,
            remove(&late),
            remove(&put("db", at("db.example.com"), 5)),
        ],
        vec![remove(&web), late],
        vec![mirrored("db", 1_700_000_001), Record::Term(DirectoryTerm::new(8)), other],
    ]
}

/// The same of `tests/fixtures/store/v1-tombstones`, whose snapshot remembers a removal, and up to which clock it remembers none.
/// The clocks are those of the year 2200, so that the removals have not expired when the fixture is made.
fn tombstone_fixture() -> [Vec<Record>; 3] {
    const CLOCK: u64 = 7_258_118_400_000_000;
    let instance = |address: &str| put("web", InstanceSpec { address: address.into(), ..InstanceSpec::default() }, 1);
    let removed = |address: &str, clock| match remove(&instance(address)) {
        Record::Remove { service, id, .. } => {
            Record::Remove { service, id, stamp: Stamp { clock: CLOCK + clock, term: 7, generation: 1_700_000_001 } }
        }
        other => panic!("{other:?} removes nothing"),
    };
    [
        vec![
            Record::Term(DirectoryTerm::new(7)),
            instance("10.0.0.1"),
            removed("10.0.0.2", 1),
            removed("10.0.0.1", 2),
            Record::RefuseBefore { service: service("web"), clock: CLOCK + 1 },
            Record::Mirrored { service: service("web"), generation: 1_700_000_001 },
        ],
        vec![removed("10.0.0.3", 3)],
        vec![instance("10.0.0.3")],
    ]
}

/// The same of `tests/fixtures/store/v1-registrants`: of identities, and of nobody.
fn registrant_fixture() -> [Vec<Record>; 3] {
    let by = |name: &str, address: &str| {
        let spec = InstanceSpec { address: address.into(), ..InstanceSpec::default() };
        let Record::Put { service, instance } = put("web", spec, 1) else { panic!("it is put") };
        let registrant = RegistrantPool::default().get(name).expect("a name");
        Record::Put { service, instance: Arc::new(Arc::unwrap_or_clone(instance).with_registrant(registrant)) }
    };
    let spiffe = "spiffe://example.org/web";
    [
        vec![by("vm-1", "10.0.0.1"), by("vm-1", "10.0.0.2"), by("", "10.0.0.3")],
        vec![by(spiffe, "10.0.0.2")],
        vec![by("", "10.0.0.1"), by("vm-2", "10.0.0.4")],
    ]
}

/// A copy of the fixture.
fn copied(fixture: &str, clean_stop: bool) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/store").join(fixture);
    let mut names = Vec::new();
    for entry in fs::read_dir(fixtures).expect("the fixtures are in the repository") {
        let entry = entry.expect("readable");
        fs::copy(entry.path(), dir.path().join(entry.file_name())).expect("writable");
        names.push(entry.file_name().into_string().expect("UTF-8"));
    }
    names.sort();
    let all = ["clean-stop", "journal-0000000002", "journal-0000000003", "snapshot-0000000001"];
    assert_eq!(names, all[usize::from(!clean_stop)..]);
    dir
}

#[test]
fn format_version_1_is_read_with_and_without_a_clean_stop_file() {
    for (name, clean_stop) in [("v1", false), ("v1-clean-stop", true)] {
        let dir = copied(name, clean_stop);
        let mut instances = Instances::new();
        fixture().iter().flatten().for_each(|record| apply(&mut instances, record));
        let (_, recovery, read) = start(dir.path(), &StoreOptions::default());
        assert_eq!((read, recovery.generation, recovery.repairs), (instances, 1_700_000_003, vec![]), "{name}");
    }
}

#[test]
fn format_version_1_with_outbox_is_read() {
    for (name, clean_stop) in [("v1-outbox", false), ("v1-clean-stop-outbox", true)] {
        let dir = copied(name, clean_stop);
        let mut expected = ExpectedStore { outbox: true, ..ExpectedStore::default() };
        for (batch, generation) in outbox_fixture().iter().zip(1_700_000_001..) {
            expected.apply(generation, batch);
        }
        let (_, recovery, read) = start(dir.path(), &StoreOptions { outbox: true, ..StoreOptions::default() });
        assert!(expected.matches(&recovery, &read), "{recovery:?} and {read:?} are not {expected:?}");
        assert_eq!((recovery.term.term, recovery.outbox.len(), recovery.generation), (8, 3, 1_700_000_003));
        assert_eq!(recovery.repairs, Vec::<String>::new());
    }
}

#[test]
fn format_version_1_with_tombstones_is_read() {
    let dir = copied("v1-tombstones", false);
    for outbox in [true, false] {
        let data_dir = DataDir::lock(dir.path()).expect("no other process has it");
        let mut read = Vec::new();
        let options = StoreOptions { outbox, ..StoreOptions::default() };
        let recovered = data_dir.recover(&options, Arc::default(), &mut |record| read.push(record), &mut |_| {});
        let (_, recovery) = recovered.expect("a good store");
        assert!(recovery.tombstones, "the directory had a term");
        let [first, second, third] = tombstone_fixture();
        assert_eq!(read, [&first[4..=4], &first[3..=3], &second, &third].concat());
    }
}

#[test]
fn format_version_1_with_registrants_is_read() {
    let dir = copied("v1-registrants", false);
    let mut instances = Instances::new();
    registrant_fixture().iter().flatten().for_each(|record| apply(&mut instances, record));
    let (_, _, read) = start(dir.path(), &StoreOptions::default());
    assert_eq!((read.len(), &read), (4, &instances));
}

/// Writes the fixtures. Only for a new version of the format, into directories of its own:
/// `GANGPLANK_FIXTURE=tests/fixtures/store/vN cargo test --lib write_fixtures -- --ignored`
/// makes that one, `vN-outbox`, `vN-tombstones` and `vN-registrants`.
#[test]
#[ignore = "writes a fixture; run by hand for a new version of the format"]
fn write_fixtures() {
    let path = std::env::var("GANGPLANK_FIXTURE").expect("where to");
    write_fixture(Path::new(&path), &fixture(), false);
    write_fixture(Path::new(&format!("{path}-outbox")), &outbox_fixture(), true);
    write_fixture(Path::new(&format!("{path}-tombstones")), &tombstone_fixture(), true);
    write_fixture(Path::new(&format!("{path}-registrants")), &registrant_fixture(), false);
}

fn write_fixture(path: &Path, batches: &[Vec<Record>], outbox: bool) {
    let (mut journal, ..) = start(path, &StoreOptions { outbox, ..StoreOptions::default() });
    for (index, batch) in batches.iter().enumerate() {
        journal.append(1_700_000_001 + index as u64, batch).expect("a good disk");
        if index < 2 {
            journal.rotate().expect("a good disk");
        }
        if index == 0 {
            journal.compact();
            journal.reap();
        }
    }
    drop(journal);
    fs::remove_file(path.join("LOCK")).expect("not part of the fixture");
}
