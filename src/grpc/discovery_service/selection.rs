//! The filter of a list or watch, and the messages of the services that match it.

use std::ops::{Deref, Range};

use crate::{
    grpc::{
        convert::{self, MAX_INSTANCES_PER_MESSAGE},
        proto::gangplank::v1,
    },
    model::{ServiceKey, UnixMillis},
    registry::Snapshot,
};

/// The services that a request selects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Filter {
    All,
    Namespace(Box<str>),
    Service(ServiceKey),
}

impl Filter {
    pub(super) fn matches(&self, key: &ServiceKey) -> bool {
        match self {
            Self::All => true,
            Self::Namespace(namespace) => key.namespace() == &**namespace,
            Self::Service(service) => key == service,
        }
    }

    /// The namespace and the service; `None` for all of them.
    pub(super) fn scope(&self) -> (Option<&str>, Option<&str>) {
        match self {
            Self::All => (None, None),
            Self::Namespace(namespace) => (Some(namespace), None),
            Self::Service(service) => (Some(service.namespace()), Some(service.name())),
        }
    }

    fn range(&self, snapshot: &Snapshot) -> Range<usize> {
        match self {
            Self::All => 0..snapshot.services().len(),
            Self::Namespace(namespace) => snapshot.namespace(namespace),
            Self::Service(service) => {
                let found = snapshot.services().binary_search_by(|(key, _)| key.cmp(service));
                found.map_or(0..0, |index| index..index + 1)
            }
        }
    }
}

/// The services of a snapshot as messages. Each message is encoded when the transport polls for it, so a
/// slow client costs no memory.
pub(super) struct Messages<S> {
    snapshot: S,
    remaining: Range<usize>,
    /// The rank of the next instance of the first remaining service, and when that service was created.
    partly_sent: Option<(usize, Option<UnixMillis>)>,
}

impl<S: Deref<Target = Snapshot>> Messages<S> {
    pub(super) fn new(snapshot: S, filter: &Filter) -> Self {
        let remaining = filter.range(&snapshot);
        Self { snapshot, remaining, partly_sent: None }
    }
}

impl<S: Deref<Target = Snapshot>> Iterator for Messages<S> {
    type Item = v1::Service;

    fn next(&mut self) -> Option<v1::Service> {
        if self.remaining.is_empty() {
            return None;
        }
        let (key, service) = self.snapshot.services().get(self.remaining.start)?;
        // `created` looks at every instance, so it is found once for all parts of a service.
        let (rank, created) = self.partly_sent.take().unwrap_or_else(|| (0, service.created()));
        let message = convert::service_part(key, service, created, rank);
        let next = rank + MAX_INSTANCES_PER_MESSAGE;
        if next < service.instances.len() {
            self.partly_sent = Some((next, created));
        } else {
            self.remaining.start += 1;
        }
        Some(message)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        grpc::tests::{Registry, VALIDATOR},
        model::{Instance, InstanceSpec, PortSet, Service},
        registry::{Command, Requester},
    };
    use std::sync::Arc;

    type InstancesByService = BTreeMap<ServiceKey, Vec<Arc<Instance>>>;

    fn by_service<'a>(services: impl IntoIterator<Item = &'a (ServiceKey, Service)>) -> InstancesByService {
        let instances = |service: &Service| service.instances.iter().cloned().collect();
        services.into_iter().map(|(key, service)| (key.clone(), instances(service))).collect()
    }

    fn random_command() -> Command {
        let service = VALIDATOR.service("prod", ["a", "b", "c"][fastrand::usize(..3)]).expect("valid");
        let address = format!("10.0.0.{}", fastrand::u8(1..4));
        if fastrand::bool() {
            let address = VALIDATOR.address(&address).expect("valid");
            return Command::Unregister { service, address, ports: PortSet::default(), by: Requester::Unrestricted };
        }
        let spec = InstanceSpec { address, weight: Some(fastrand::u8(..3).into()), ..InstanceSpec::default() };
        let instance = VALIDATOR.instance(&service, &spec, UnixMillis(1)).expect("valid");
        Command::Register { service, instance: Arc::new(instance), by: Requester::Unrestricted }
    }

    /// A snapshot is the state as of its generation, also if services change during its build.
    #[tokio::test(flavor = "multi_thread")]
    async fn snapshot_is_exact_under_concurrent_changes() {
        let registry = Registry::working(1_000);
        let handle = registry.context.registry.clone();
        let mut feed = handle.feed().subscribe(handle.catalog().generation());
        let writing = async {
            for _ in 0..2_000 {
                let commands = (0..fastrand::usize(1..4)).map(|_| random_command()).collect();
                handle.submit(commands).await.expect("it accepts").await.expect("committed");
            }
        };
        let listing = async {
            let mut lists = Vec::new();
            for _ in 0..200 {
                let list = handle.snapshots().list().await.expect("a permit");
                lists.push((list.generation(), by_service(list.services())));
                let key = VALIDATOR.service("prod", "a").expect("valid");
                let one = handle.snapshots().service(&key).await.expect("the feed holds enough");
                lists.push((one.generation(), by_service(one.services())));
            }
            lists
        };
        let ((), lists) = tokio::join!(writing, listing);
        // The state as of each generation, from the changes alone.
        let mut state = InstancesByService::new();
        let mut states = BTreeMap::from([(feed.seen(), state.clone())]);
        while let Ok(Some(batch)) = feed.try_next() {
            for event in &batch.events {
                let instances = state.entry(event.service.clone()).or_default();
                if let Some(before) = &event.change.before {
                    instances.retain(|instance| instance.id() != before.id());
                }
                instances.extend(event.change.after.clone());
                instances.sort_by(|a, b| a.key().cmp(&b.key()));
            }
            state.retain(|_, instances| !instances.is_empty());
            states.insert(batch.generation, state.clone());
        }
        for (index, (generation, listed)) in lists.iter().enumerate() {
            let (_, expected) = states.range(..=generation).next_back().expect("a generation of this run");
            let mut expected = expected.clone();
            if index % 2 == 1 {
                expected.retain(|key, _| key.name() == "a");
            }
            assert_eq!(*listed, expected, "list {index} of generation {generation}");
        }
    }
}
