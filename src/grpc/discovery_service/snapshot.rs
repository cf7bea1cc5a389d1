//! What stands, exactly as of one generation, although the catalog changes while it is read.
//!
//! The catalog gives every service as it was at some moment of the reading, no two at the same
//! one, and a service that is gone gives nothing at all. So the feed is read from *before* the
//! catalog is, to *behind* everything that the reading can have seen, and the last word on every
//! instance that changed in between is put over what was read. An instance that did not change in
//! between was the same at every moment of the reading. What comes out stands as of the
//! generation to which the feed was read, and what the feed says next follows it.

use std::{collections::HashMap, sync::Arc};

use tonic::Status;

use crate::{
    model::{InstanceChange, Service, ServiceKey},
    registry::{Batch, Catalog, Lagged, RegistryHandle, Subscription},
};

/// Which services a reader asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Filter {
    All,
    Namespace(Box<str>),
    Service(ServiceKey),
}

impl Filter {
    pub(super) fn wants(&self, key: &ServiceKey) -> bool {
        match self {
            Self::All => true,
            Self::Namespace(namespace) => key.namespace() == &**namespace,
            Self::Service(service) => key == service,
        }
    }
}

/// Services in order.
pub(super) type Read = Vec<(ServiceKey, Service)>;

/// Reads the catalog, in order, each service as it stands when it is come by.
pub(super) async fn read(catalog: Arc<Catalog>, filter: Filter) -> Result<Read, Status> {
    if let Filter::Service(key) = filter {
        return Ok(catalog.get(&key).map(|service| (key, service)).into_iter().collect());
    }
    // A million services take a while to copy and sort: nobody else should wait for that.
    let reading = tokio::task::spawn_blocking(move || {
        let mut services = catalog.services();
        services.retain(|(key, _)| filter.wants(key));
        services.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        services
    });
    reading.await.map_err(|err| Status::internal(format!("the catalog could not be read: {err}")))
}

/// What stands as of one generation, and the feed from there on.
///
/// # Errors
/// The outer one when the catalog cannot be read, the inner one when more changed meanwhile than
/// the feed holds.
pub(super) async fn take(
    registry: &RegistryHandle,
    filter: &Filter,
) -> Result<Result<(Read, Subscription), Lagged>, Status> {
    let catalog = registry.catalog();
    let mut feed = registry.feed().subscribe(catalog.generation());
    let mut missed = Vec::new();
    let services = {
        let mut reading = std::pin::pin!(read(Arc::clone(catalog), filter.clone()));
        loop {
            tokio::select! {
                services = &mut reading => break services?,
                batch = feed.next() => match batch {
                    Ok(batch) => missed.push(batch),
                    Err(lagged) => return Ok(Err(lagged)),
                },
            }
        }
    };
    // The catalog has a generation before the feed does, and a service before the catalog does.
    let newest = services.iter().map(|(_, service)| service.generation).max().unwrap_or(0);
    let until = newest.max(catalog.generation());
    while feed.seen() < until {
        match feed.next().await {
            Ok(batch) => missed.push(batch),
            Err(lagged) => return Ok(Err(lagged)),
        }
    }
    Ok(Ok((settle(services, &missed, filter), feed)))
}

/// Puts the last word of `missed` on every instance over what was read.
fn settle(mut services: Read, missed: &[Arc<Batch>], filter: &Filter) -> Read {
    let mut changed: HashMap<&ServiceKey, Vec<(&InstanceChange, u64)>> = HashMap::new();
    for batch in missed {
        for event in batch.events.iter().filter(|event| filter.wants(&event.service)) {
            changed.entry(&event.service).or_default().push((&event.change, batch.generation));
        }
    }
    if changed.is_empty() {
        return services;
    }
    for (key, service) in &mut services {
        apply(service, &changed.remove(key).unwrap_or_default());
    }
    for (key, changes) in changed {
        let mut service = Service::default();
        apply(&mut service, &changes);
        services.push((key.clone(), service));
    }
    services.retain(|(_, service)| !service.instances.is_empty());
    services.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
    services
}

fn apply(service: &mut Service, changes: &[(&InstanceChange, u64)]) {
    for (InstanceChange { before, after }, generation) in changes {
        match (before, after) {
            (_, Some(after)) => drop(service.instances.put(Arc::clone(after))),
            (Some(before), None) => drop(service.instances.remove(&before.key())),
            (None, None) => {}
        }
        service.generation = service.generation.max(*generation);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        grpc::tests::{Registry, VALIDATOR},
        model::{Instance, InstanceSpec, PortSet, UnixMillis},
        registry::Command,
    };

    type InstanceMap = BTreeMap<ServiceKey, Vec<Arc<Instance>>>;

    fn instances(services: &Read) -> InstanceMap {
        let instances = |service: &Service| service.instances.iter().cloned().collect();
        services.iter().map(|(key, service)| (key.clone(), instances(service))).collect()
    }

    fn some_command() -> Command {
        let service = VALIDATOR.service("prod", ["a", "b", "c"][fastrand::usize(..3)]).expect("valid");
        let address = format!("10.0.0.{}", fastrand::u8(1..4));
        if fastrand::bool() {
            let address = VALIDATOR.address(&address).expect("valid");
            return Command::Unregister { service, address, ports: PortSet::default() };
        }
        let spec = InstanceSpec { address, weight: Some(fastrand::u8(..3).into()), ..InstanceSpec::default() };
        let instance = VALIDATOR.instance(&service, &spec, UnixMillis(1)).expect("valid");
        Command::Register { service, instance: Arc::new(instance) }
    }

    /// Whichever moments of the reading show whichever services, what comes out is the last one.
    #[tokio::test(flavor = "multi_thread")]
    async fn services_read_at_different_moments_are_settled_to_one() {
        let registry = Registry::working(1_000);
        let handle = &registry.context.registry;
        let mut feed = handle.feed().subscribe(handle.catalog().generation());
        for round in 0..300 {
            fastrand::seed(round);
            // What stood at each moment, and what changed between them.
            let mut moments = vec![handle.catalog().services()];
            let mut missed = Vec::new();
            for _ in 0..fastrand::usize(1..8) {
                let commands = (0..fastrand::usize(1..4)).map(|_| some_command()).collect();
                let acked = handle.submit(commands).await.expect("it accepts").await.expect("carried out");
                while feed.seen() < acked.generation {
                    missed.push(feed.next().await.expect("awaiting"));
                }
                moments.push(handle.catalog().services());
            }
            let mut read = Read::new();
            for name in ["a", "b", "c"] {
                let key = VALIDATOR.service("prod", name).expect("valid");
                let moment = &moments[fastrand::usize(..moments.len())];
                read.extend(moment.iter().find(|(found, _)| *found == key).cloned());
            }
            let last = moments.last().expect("at least the first");
            let settled = settle(read, &missed, &Filter::All);
            assert_eq!(instances(&settled), instances(last), "round {round}");
            assert!(settled.is_sorted_by(|(a, _), (b, _)| a < b), "round {round}");
        }
    }
}
