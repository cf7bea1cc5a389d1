//! How long a response waits for Kubernetes.
//!
//! DNS always has a change before its response is sent. With a mirror, the response also waits for the
//! EndpointSlice: 201, 200, 204, and 404 for a removal, mean that the slice has the change. When that takes too long, the
//! response is 202 and the slice follows.
//!
//! A removal for which Kubernetes has no place, because there is no such namespace or the Service is not ours, is in no slice. Its 404
//! is true as long as this process writes: after a pause, another one may have registered the instance in a namespace
//! of which this one has not learnt. So the 404 waits until it is certain, by the Lease; after the timeout the response is 503.

use std::{
    future::{Ready, ready},
    time::Duration,
};

use futures::future::Either;
use tokio::time::{Instant, timeout_at};

use crate::{
    model::{Address, ServiceKey},
    registry::{Command, Outcome, RegistryHandle},
};

/// How long a response may wait for its slice, from the time at which its message was read.
const MIRROR_TIMEOUT: Duration = Duration::from_secs(1);

/// The slice that the response to a command waits for.
#[derive(Debug)]
pub(super) struct MirrorWait {
    /// The service, the address of its slice, and the deadline; `None` without a mirror.
    wanted: Option<(ServiceKey, Address, Instant)>,
}

impl MirrorWait {
    /// The wait for `command`; its timeout begins now.
    pub(super) fn of(command: &Command, registry: &RegistryHandle) -> Self {
        if !registry.mirror_progress().is_mirrored() {
            return Self { wanted: None };
        }
        let (service, address) = match command {
            Command::Register { service, instance, .. } => (service, instance.address()),
            Command::Unregister { service, address, .. } => (service, address),
            Command::SetReady { service, id, .. } => (service, &id.address),
        };
        Self { wanted: Some((service.clone(), address.clone(), Instant::now() + MIRROR_TIMEOUT)) }
    }

    /// Returns true when Kubernetes has the change of `generation`, or certainly no instance to remove, and false after the
    /// timeout. Returns true at once without a mirror, and for a refusal.
    pub(super) fn wait(
        self,
        registry: &RegistryHandle,
        outcome: &Outcome,
        generation: u64,
    ) -> Either<Ready<bool>, impl Future<Output = bool> + Send + use<>> {
        let progress = registry.mirror_progress();
        let is_word = outcome.is_word();
        let waits = is_word || matches!(outcome, Outcome::NotFound { .. });
        match self.wanted.filter(|_| waits) {
            None => Either::Left(ready(true)),
            Some((service, address, until)) => {
                // A word is in a slice, or will be. For what is in none, the Lease says whether this process may speak
                // for the cluster.
                let confirmed = if is_word {
                    Either::Left(progress.confirmed(&service, generation, address))
                } else {
                    Either::Right(progress.still_writes())
                };
                Either::Right(async move { timeout_at(until, confirmed).await.is_ok() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::FutureExt as _;

    use super::*;
    use crate::{
        metrics::Metrics,
        model::{PortSet, testing::VALIDATOR},
        registry::{self, NamespacePolicy, RegistryOptions, Requester},
    };

    #[tokio::test]
    async fn removal_that_no_slice_confirms_waits_until_no_other_process_can_have_the_lease() {
        let kubernetes = Some(NamespacePolicy { create_namespaces: false });
        let (registry, _unrecovered) = registry::new(
            RegistryOptions { max_instances: 10, quotas: Default::default(), deny_addresses: Vec::new(), kubernetes },
            Arc::new(Metrics::new()),
        );
        let service = VALIDATOR.service("absent", "web").expect("valid");
        let address = VALIDATOR.address("10.0.0.1").expect("valid");
        let removal = Command::Unregister { service, address, ports: PortSet::default(), by: Requester::Unrestricted };
        let not_found = |wait: MirrorWait| wait.wait(&registry, &Outcome::NotFound { remembered: false }, 7);
        let begun = Instant::now();
        assert!(!not_found(MirrorWait::of(&removal, &registry)).await, "it is not certain in time");
        assert!(begun.elapsed() >= MIRROR_TIMEOUT);

        // The process has been paused, and has renewed the Lease since.
        let mut waits = Box::pin(not_found(MirrorWait::of(&removal, &registry)));
        assert!(waits.as_mut().now_or_never().is_none());
        registry.mirror_progress().take_askers().await.answer();
        assert_eq!(waits.now_or_never(), Some(true));
        let refused = Outcome::Full { limit: 10 };
        assert_eq!(MirrorWait::of(&removal, &registry).wait(&registry, &refused, 7).now_or_never(), Some(true));
    }
}
