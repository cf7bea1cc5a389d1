//! A process whose journal cannot be written any more still knows what Kubernetes lacks.

use std::{fs, path::PathBuf};

use super::{standby::TestReplica, *};

/// A process that has accepted a registration and a removal which Kubernetes lacks, and whose journal was taken away then.
fn failed(dir: &TempDir) -> (TestReplica, [PathBuf; 2]) {
    let replica = TestReplica::start(dir);
    let generation = replica.submit(vec![register("db", "10.0.0.9", 80, 1.0)]).expect("it writes").generation;
    let db = VALIDATOR.service("prod", "db").expect("valid");
    replica.runtime.block_on(replica.handle.mirrored(vec![(db, generation)])).expect("it is there");
    replica.submit(vec![register("web", "10.0.0.1", 80, 1.0)]).expect("it writes");
    let journal = fs::read_dir(dir.path()).expect("it is there").map(|entry| entry.expect("an entry").path());
    let mut journal: Vec<PathBuf> = journal.filter(|path| path.to_string_lossy().contains("journal")).collect();
    assert_eq!(journal.len(), 1, "{journal:?}");
    let paths = [journal.remove(0), dir.path().join("away")];
    fs::rename(&paths[0], &paths[1]).expect("another name");
    assert_eq!(replica.submit(vec![register("web", "10.0.0.2", 80, 1.0)]), Err(Unavailable::StorageFailed));
    (replica, paths)
}

fn named(words: &[OutboxWord]) -> Vec<String> {
    words.iter().map(|word| format!("{} {}", word.service.name(), word.id.address)).collect()
}

#[test]
fn words_that_kubernetes_lacks_are_named_at_the_end_though_the_journal_cannot_be_written() {
    for readable in [true, false] {
        let dir = tempfile::tempdir().expect("a directory");
        let (replica, [journal, away]) = failed(&dir);
        if readable {
            fs::rename(away, journal).expect("another name");
        }
        let words = named(&replica.end());
        // What was refused may be durable.
        assert!(words.contains(&"web 10.0.0.1".into()) && !words.contains(&"db 10.0.0.9".into()), "{words:?}");
    }
}

#[test]
fn words_are_handed_over_from_a_journal_that_can_be_read_only() {
    let dir = tempfile::tempdir().expect("a directory");
    let (replica, [journal, away]) = failed(&dir);
    fs::rename(away, journal).expect("another name");
    replica.runtime.block_on(replica.handle.stand_down(LeaseHolder::default())).expect("the writer is there");
    let words = replica.runtime.block_on(replica.handle.outbox(None, 10)).expect("the writer is there").words;
    assert!(named(&words).contains(&"web 10.0.0.1".into()), "{words:?}");
    replica.runtime.block_on(replica.handle.handed_over(words)).expect("the writer is there");
    assert_eq!(named(&replica.end()), [""; 0]);
}
