//! Tests of the store as a whole, on disks that forget, fail and rot.

mod corruption;
mod crash;
mod directory;
mod faults;
mod outbox;
mod simulated_disk;
mod tombstones;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use fastrand::Rng;

use self::simulated_disk::SimulatedDisk;
use super::{DirectoryTerm, Journal, Record, RecoveryReport, StoreError, StoreOptions, recover::StoreOpener};
use crate::{
    metrics::Metrics,
    model::{
        Instance, InstanceId, InstanceSpec, PortSpec, Protocol, ServiceKey, Stamp, UnixMillis, testing::VALIDATOR,
    },
};

/// The registered instances, by service and identity.
type Instances = BTreeMap<(ServiceKey, InstanceId), Arc<Instance>>;

fn apply(instances: &mut Instances, record: &Record) {
    match record.clone() {
        Record::Put { service, instance } => {
            instances.insert((service, instance.id()), instance);
        }
        Record::Remove { service, id, .. } => {
            instances.remove(&(service, id));
        }
        Record::Mirrored { .. } | Record::Term(_) | Record::RefuseBefore { .. } => {}
    }
}

/// What a start must find after all batches so far, without any compaction.
#[derive(Debug, Clone, Default)]
struct ExpectedStore {
    /// Whether the store keeps the outbox.
    outbox: bool,
    instances: Instances,
    /// The last `Put` or `Remove` of each instance, with its generation.
    last: BTreeMap<(ServiceKey, InstanceId), (u64, Record)>,
    mirrored: BTreeMap<ServiceKey, u64>,
    term: DirectoryTerm,
}

impl ExpectedStore {
    fn apply(&mut self, generation: u64, batch: &[Record]) {
        for record in batch {
            apply(&mut self.instances, record);
            match record {
                Record::Mirrored { service, generation } => {
                    let highest = self.mirrored.entry(service.clone()).or_default();
                    *highest = (*highest).max(*generation);
                }
                Record::Term(term) => self.term = *term,
                _ => {
                    self.last.insert(instance_of(record), (generation, record.clone()));
                }
            }
        }
    }

    /// What Kubernetes lacks.
    fn unmirrored(&self) -> BTreeMap<&(ServiceKey, InstanceId), &Record> {
        let covered = |service| self.mirrored.get(service).copied().unwrap_or(0);
        let last = self.last.iter().filter(|_| self.outbox);
        let unmirrored = last.filter(|((service, _), (generation, _))| *generation > covered(service));
        unmirrored.map(|(instance, (_, record))| (instance, record)).collect()
    }

    /// Whether a start has found exactly this, in order.
    fn matches(&self, recovery: &RecoveryReport, read: &Instances) -> bool {
        let found: Vec<_> = recovery.outbox.iter().map(|record| (instance_of(record), record)).collect();
        self.instances == *read
            && self.term == recovery.term
            && found.iter().map(|(instance, _)| self.last.get(instance).map(|(generation, _)| generation)).is_sorted()
            && found.len() == self.unmirrored().len()
            && found.iter().map(|(instance, record)| (instance, *record)).collect::<BTreeMap<_, _>>()
                == self.unmirrored()
    }
}

/// The instance that a `Put` or `Remove` is about.
fn instance_of(record: &Record) -> (ServiceKey, InstanceId) {
    match record {
        Record::Put { service, instance } => (service.clone(), instance.id()),
        Record::Remove { service, id, .. } => (service.clone(), id.clone()),
        other => panic!("{other:?} is about no instance"),
    }
}

/// Adds to the batch of `generation`, now and then, that Kubernetes has changes from before it.
fn mirror(batch: &mut Vec<Record>, generation: u64, last: &ExpectedStore, rng: &mut Rng) {
    for _ in 0..rng.usize(..3) {
        let service = service(SERVICES[rng.usize(..SERVICES.len())]);
        let before = last.mirrored.get(&service).copied().unwrap_or(0);
        let mirrored =
            Record::Mirrored { service, generation: rng.u64(before.max(generation.saturating_sub(8))..generation) };
        batch.insert(rng.usize(..=batch.len()), mirrored);
    }
    if rng.u8(..20) == 0 {
        let term = DirectoryTerm { followed: rng.bool(), ..DirectoryTerm::new(generation) };
        batch.insert(rng.usize(..=batch.len()), Record::Term(term));
    }
}

fn small() -> StoreOptions {
    StoreOptions { accept_loss: false, segment_bytes: 1500, outbox: false }
}

/// Starts the store on `disk`; with everything it read.
fn open_with(
    disk: &SimulatedDisk,
    options: &StoreOptions,
    metrics: &Arc<Metrics>,
) -> Result<(Journal, RecoveryReport, Instances), StoreError> {
    let mut instances = Instances::new();
    let files = Arc::new(disk.clone());
    let start = StoreOpener { files, dir: PathBuf::from("data"), options, metrics: Arc::clone(metrics) };
    let (journal, recovery) = start.open(&mut |record| apply(&mut instances, &record), &mut |_| {})?;
    Ok((journal, recovery, instances))
}

fn open(disk: &SimulatedDisk) -> Result<(Journal, RecoveryReport, Instances), StoreError> {
    open_with(disk, &small(), &Arc::default())
}

fn service(name: &str) -> ServiceKey {
    VALIDATOR.service("prod", name).expect("a label")
}

const SERVICES: [&str; 4] = ["web", "db", "a", "web-1"];

/// One of few instances, with one of many sets of attributes.
fn random_put(rng: &mut Rng) -> Record {
    let service = service(SERVICES[rng.usize(..SERVICES.len())]);
    let address = match rng.u8(..8) {
        0 => "db.example.com".into(),
        1 => format!("2001:db8::{}", rng.u8(1..4)),
        _ => format!("10.0.0.{}", rng.u8(1..9)),
    };
    let mut ports = Vec::new();
    if rng.u8(..4) > 0 {
        ports.push(PortSpec { number: 8080, protocol: Protocol::Tcp, name: "http".into() });
    }
    if rng.u8(..8) == 0 {
        ports.push(PortSpec { number: 53, protocol: Protocol::Udp, name: String::new() });
        ports.push(PortSpec { number: 36412, protocol: Protocol::Sctp, name: "s1ap".into() });
    }
    let spec = InstanceSpec {
        address,
        ports,
        host_name: if rng.bool() { "host-1".into() } else { String::new() },
        node_name: if rng.bool() { "node.example".into() } else { String::new() },
        weight: [None, Some(0.0), Some(655.0), Some(0.25)][rng.usize(..4)],
        priority: rng.u16(..),
    };
    let registered = UnixMillis(rng.u64(..1 << 50));
    let instance = VALIDATOR.instance(&service, &spec, registered).expect("valid");
    Record::Put { service, instance: Arc::new(instance) }
}

/// Some changes, of which the removals remove what may be there.
fn random_batch(rng: &mut Rng) -> Vec<Record> {
    let records = (0..rng.usize(1..6)).map(|_| match random_put(rng) {
        Record::Put { service, instance } if rng.u8(..3) == 0 => {
            Record::Remove { service, id: instance.id(), stamp: Stamp::default() }
        }
        put => put,
    });
    records.collect()
}
