//! What stands after a start with Kubernetes: the store's word, the EndpointSlices' word, and which
//! of them is newer.
//!
//! Every data directory writes to Kubernetes under a term of its own, one above every term that it
//! found there. So a directory whose term no slice exceeds has seen everything that the slices
//! have, and more: its word stands, and the mirror puts the slices right. Otherwise somebody else
//! wrote since (or the directory is new): then the slices stand, with the outbox laid over them,
//! which is what this directory has acknowledged and Kubernetes was never seen to have.

use std::{collections::HashMap, sync::Arc};

use super::Catalog;
use crate::{
    model::{Instance, InstanceKey, Service, ServiceKey, Table},
    store::Record,
};

/// What the slices hold, from one complete list.
#[derive(Debug, Default)]
pub struct Restored {
    /// The highest term on any slice; 0 without slices.
    pub term: u64,
    /// What passed the door, by service.
    pub services: Vec<(ServiceKey, Vec<Arc<Instance>>)>,
}

/// What the store knows that matters for it.
#[derive(Debug, Default)]
pub(super) struct Origin {
    /// The term of the data directory; 0 when it never wrote to Kubernetes.
    pub(super) term: u64,
    /// What Kubernetes was never seen to have, last record per instance or more, in order.
    pub(super) outbox: Vec<Record>,
}

impl Origin {
    /// Services of which Kubernetes may not have everything.
    pub(super) fn unmirrored(&self, catalog: &Catalog) -> impl Iterator<Item = ServiceKey> {
        let all = if self.term == 0 { catalog.services() } else { Vec::new() };
        let outbox = self.outbox.iter().filter_map(|record| match record {
            Record::Put { service, .. } | Record::Remove { service, .. } => Some(service.clone()),
            Record::Mirrored { .. } | Record::Term { .. } => None,
        });
        all.into_iter().map(|(service, _)| service).chain(outbox)
    }
}

/// What becomes of it.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// Under which the slices are written from now on.
    pub(super) term: u64,
    /// What the store has to learn, the term among it.
    pub(super) records: Vec<Record>,
}

/// Decides; `catalog` is everything that the registry holds now.
pub(super) fn decide(origin: &Origin, restored: Restored, catalog: &[(ServiceKey, Service)]) -> Verdict {
    if origin.term != 0 && origin.term >= restored.term {
        return Verdict { term: origin.term, records: Vec::new() };
    }
    let term = restored.term + 1;
    let mut wanted: HashMap<ServiceKey, Table<Arc<Instance>>> = HashMap::new();
    for (service, instances) in restored.services {
        let table = wanted.entry(service).or_default();
        instances.into_iter().for_each(|instance| drop(table.put(instance)));
    }
    if origin.term == 0 {
        // It never wrote to Kubernetes: whatever it holds is not there.
        for (service, held) in catalog {
            let table = wanted.entry(service.clone()).or_default();
            held.instances.iter().for_each(|instance| drop(table.put(Arc::clone(instance))));
        }
    }
    for record in &origin.outbox {
        match record {
            Record::Put { service, instance } => {
                wanted.entry(service.clone()).or_default().put(Arc::clone(instance));
            }
            Record::Remove { service, id } => {
                if let Some(table) = wanted.get_mut(service) {
                    table.remove(&InstanceKey::from(id));
                }
            }
            Record::Mirrored { .. } | Record::Term { .. } => {}
        }
    }
    let mut records = differences(&wanted, catalog);
    records.push(Record::Term { term });
    Verdict { term, records }
}

/// What leads from `catalog` to `wanted`.
fn differences(wanted: &HashMap<ServiceKey, Table<Arc<Instance>>>, catalog: &[(ServiceKey, Service)]) -> Vec<Record> {
    let mut records = Vec::new();
    let nothing = Table::default();
    for (service, held) in catalog {
        let wanted = wanted.get(service).unwrap_or(&nothing);
        let gone = held.instances.iter().filter(|instance| wanted.get(&instance.key()).is_none());
        records.extend(gone.map(|instance| Record::Remove { service: service.clone(), id: instance.id() }));
    }
    let held: HashMap<&ServiceKey, &Service> = catalog.iter().map(|(service, held)| (service, held)).collect();
    for (service, wanted) in wanted {
        let held = held.get(service);
        let news = wanted.iter().filter(|instance| {
            held.and_then(|held| held.instances.get(&instance.key())).is_none_or(|held| held != *instance)
        });
        records.extend(news.map(|instance| Record::Put { service: service.clone(), instance: Arc::clone(instance) }));
    }
    records
}
