//! Removals are remembered over snapshots, restarts and power cuts, as long and as many as tombstones may be.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use fastrand::Rng;

use super::{VALIDATOR, random_put, service, simulated_disk::SimulatedDisk};
use crate::{
    model::{InstanceId, InstanceSpec, ServiceKey, Stamp, UnixMillis},
    replicas::word::TombstoneLifetime,
    store::{DirectoryTerm, Journal, Record, RecoveryReport, StoreError, StoreOptions, recover::StoreOpener},
};

/// The removals that a start remembers, and the clocks up to which it does not.
#[derive(Debug, Clone, Default, PartialEq)]
struct Remembered {
    removed: BTreeMap<(ServiceKey, InstanceId), Stamp>,
    refuse_before: BTreeMap<ServiceKey, u64>,
}

impl Remembered {
    fn apply(&mut self, record: &Record) {
        match record {
            Record::Put { service, instance } => drop(self.removed.remove(&(service.clone(), instance.id()))),
            Record::Remove { service, id, stamp } => {
                let is_dropped = self.refuse_before.get(service).is_some_and(|clock| *clock >= stamp.clock);
                if !is_dropped && stamp.clock >= expired_before() {
                    self.removed.insert((service.clone(), id.clone()), *stamp);
                }
            }
            Record::RefuseBefore { service, clock } => {
                self.refuse_before.insert(service.clone(), *clock);
                self.removed.retain(|(other, _), stamp| other != service || stamp.clock > *clock);
            }
            Record::Mirrored { .. } | Record::Term(_) => {}
        }
    }
}

fn now() -> u64 {
    UnixMillis::now().0 * 1_000
}

fn expired_before() -> u64 {
    TombstoneLifetime::DEFAULT.expired_before(now())
}

fn open(disk: &SimulatedDisk, options: &StoreOptions) -> Result<(Journal, RecoveryReport, Remembered), StoreError> {
    let mut remembered = Remembered::default();
    let files = Arc::new(disk.clone());
    let start = StoreOpener { files, dir: PathBuf::from("data"), options, metrics: Arc::default() };
    let (journal, recovery) = start.open(&mut |record| remembered.apply(&record), &mut |_| {})?;
    Ok((journal, recovery, remembered))
}

fn options(outbox: bool) -> StoreOptions {
    StoreOptions { outbox, segment_bytes: 1 << 30, accept_loss: false }
}

fn removal(address: &str, clock: u64) -> Record {
    let spec = InstanceSpec { address: address.into(), ..InstanceSpec::default() };
    let id = VALIDATOR.instance(&service("web"), &spec, UnixMillis(1)).expect("valid").id();
    Record::Remove { service: service("web"), id, stamp: Stamp { clock, term: 1, generation: 1 } }
}

/// What is remembered of these records after a compaction by a process with or without the outbox.
fn after_compaction(records: &[Record], outbox: bool) -> (usize, u64) {
    let disk = SimulatedDisk::default();
    let (mut journal, ..) = open(&disk, &options(true)).expect("a good disk");
    journal.append(1, records).expect("a good disk");
    journal.append(2, &[Record::Mirrored { service: service("web"), generation: 1 }]).expect("a good disk");
    drop(journal);
    for _ in 0..2 {
        let (mut journal, recovery, _) = open(&disk, &options(outbox)).expect("a good disk");
        assert!(outbox || recovery.outbox.is_empty());
        journal.rotate().expect("a good disk");
        journal.compact();
        journal.reap();
        assert_eq!(journal.compaction_input().1, [], "the compaction was done");
    }
    let (_, _, remembered) = open(&disk, &options(outbox)).expect("a good disk");
    (remembered.removed.len(), remembered.refuse_before.values().sum())
}

#[test]
fn snapshot_keeps_removals_of_their_lifetime_in_a_directory_that_had_a_term() {
    let (now, hour) = (now(), 3_600_000_000);
    let removals =
        [removal("10.0.0.1", now - hour), removal("10.0.0.2", now - 31 * hour), removal("10.0.0.3", now - 33 * hour)];
    let term = [Record::Term(DirectoryTerm::new(3))];
    let records = [&term[..], &removals].concat();
    assert_eq!(after_compaction(&records, true), (2, 0));
    assert_eq!(after_compaction(&records, false), (2, 0), "without Kubernetes, but there was a term");
    assert_eq!(after_compaction(&removals, false), (0, 0), "there never was one");
    let dropped = [Record::RefuseBefore { service: service("web"), clock: now - 2 * hour }];
    assert_eq!(after_compaction(&[&records[..], &dropped].concat(), true), (1, now - 2 * hour));
    let outdated = [Record::RefuseBefore { service: service("web"), clock: now - 33 * hour }];
    assert_eq!(after_compaction(&[&records[..], &outdated].concat(), true), (2, 0));
}

/// Lives of a directory, with power cuts at any operation and windows of a few entries.
#[test]
fn removals_are_remembered_whatever_is_compacted_and_cut_off() {
    let (mut found, mut refused) = (0, 0);
    for seed in 0..150 {
        let rng = &mut Rng::with_seed(seed);
        let disk = SimulatedDisk::default();
        let (mut expected, mut generation, mut clock) = (Remembered::default(), 0, now() - 1_000_000_000);
        for life in 0..5 {
            if life < 4 {
                disk.cut_after(rng.u64(..250));
            }
            let options = StoreOptions { segment_bytes: rng.u64(100..2000), ..options(true) };
            if let Ok((mut journal, recovery, remembered)) = open(&disk, &options) {
                if recovery.generation == generation {
                    assert_eq!(remembered, expected, "seed {seed}, life {life}");
                }
                // Otherwise the batch that was under way is there too.
                expected = remembered;
                generation = recovery.generation;
                found += expected.removed.len();
                refused += expected.refuse_before.len();
                for _ in 0..rng.u64(..60) {
                    clock += 1;
                    let stamp = Stamp { clock, term: 1, generation };
                    let record = match random_put(rng) {
                        Record::Put { service, instance } if rng.bool() => {
                            Record::Remove { service, id: instance.id(), stamp }
                        }
                        Record::Put { service, .. } if rng.u8(..20) == 0 => {
                            let before = expected.refuse_before.get(&service).copied().unwrap_or(0);
                            Record::RefuseBefore { service, clock: before.max(clock - rng.u64(..10)) }
                        }
                        put => put,
                    };
                    let mirrored = Record::Mirrored { service: service("web"), generation };
                    let batch = if rng.bool() { vec![mirrored, record] } else { vec![record] };
                    if journal.append(generation + 1, &batch).is_err() {
                        break;
                    }
                    generation += 1;
                    batch.iter().for_each(|record| expected.apply(record));
                    if rng.bool() {
                        journal.reap();
                    }
                }
            }
            if rng.u8(..3) == 0 { disk.restart() } else { disk.power_cut(rng) }
        }
    }
    assert!(found > 300 && refused > 30, "{found} {refused}");
}
