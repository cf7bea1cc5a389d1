//! Tests of the store as a whole, on disks that forget, fail and rot.

mod crash;
mod damage;
mod directory;
mod faults;
mod machine;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use fastrand::Rng;

use self::machine::Machine;
use super::{Journal, Options, Record, Recovery, StoreError, recover::Start};
use crate::{
    metrics::Metrics,
    model::{Door, Draft, DraftPort, Instance, InstanceId, Protocol, ServiceKey, UnixMillis},
};

/// What stands, by service and identity.
type Model = BTreeMap<(ServiceKey, InstanceId), Arc<Instance>>;

const DOOR: Door = Door { zone_wire_len: 15, names_allowed: true };

fn apply(model: &mut Model, record: &Record) {
    match record.clone() {
        Record::Put { service, instance } => {
            model.insert((service, instance.id()), instance);
        }
        Record::Remove { service, id } => {
            model.remove(&(service, id));
        }
        Record::Mirrored { .. } | Record::Term { .. } => {}
    }
}

fn small() -> Options {
    Options { accept_loss: false, segment_octets: 1500, outbox: false }
}

/// Starts the store on `machine`; with everything it read.
fn open_with(
    machine: &Machine,
    options: &Options,
    metrics: &Arc<Metrics>,
) -> Result<(Journal, Recovery, Model), StoreError> {
    let mut model = Model::new();
    let files = Arc::new(machine.clone());
    let start = Start { files, dir: PathBuf::from("data"), lock: None, options, metrics: Arc::clone(metrics) };
    let (journal, recovery) = start.run(&mut |record| apply(&mut model, &record), &mut |_| {})?;
    Ok((journal, recovery, model))
}

fn open(machine: &Machine) -> Result<(Journal, Recovery, Model), StoreError> {
    open_with(machine, &small(), &Arc::default())
}

fn service(name: &str) -> ServiceKey {
    DOOR.service("prod", name).expect("a label")
}

/// One of few instances, with one of many sets of attributes.
fn random_put(rng: &mut Rng) -> Record {
    let service = service(["web", "db", "a", "web-1"][rng.usize(..4)]);
    let address = match rng.u8(..8) {
        0 => "db.example.com".into(),
        1 => format!("2001:db8::{}", rng.u8(1..4)),
        _ => format!("10.0.0.{}", rng.u8(1..9)),
    };
    let mut ports = Vec::new();
    if rng.u8(..4) > 0 {
        ports.push(DraftPort { number: 8080, protocol: Protocol::Tcp, name: "http".into() });
    }
    if rng.u8(..8) == 0 {
        ports.push(DraftPort { number: 53, protocol: Protocol::Udp, name: String::new() });
        ports.push(DraftPort { number: 36412, protocol: Protocol::Sctp, name: "s1ap".into() });
    }
    let draft = Draft {
        address,
        ports,
        host_name: if rng.bool() { "host-1".into() } else { String::new() },
        node_name: if rng.bool() { "node.example".into() } else { String::new() },
        weight: [None, Some(0.0), Some(655.0), Some(0.25)][rng.usize(..4)],
        priority: rng.u16(..),
    };
    let registered = UnixMillis(rng.u64(..1 << 50));
    let instance = DOOR.instance(&service, &draft, registered).expect("valid");
    Record::Put { service, instance: Arc::new(instance) }
}

/// Some changes, of which the removals remove what may be there.
fn random_batch(rng: &mut Rng) -> Vec<Record> {
    let records = (0..rng.usize(1..6)).map(|_| match random_put(rng) {
        Record::Put { service, instance } if rng.u8(..3) == 0 => Record::Remove { service, id: instance.id() },
        put => put,
    });
    records.collect()
}
