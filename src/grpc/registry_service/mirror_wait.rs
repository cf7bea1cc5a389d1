//! How long a response waits for Kubernetes.
//!
//! DNS always has a change before its response is sent. With a mirror, the response also waits for the
//! EndpointSlice: 201, 200, 204, and 404 for a removal, mean that the slice has the change. When that takes too long, the
//! response is 202 and the slice follows.

use std::{
    future::{Ready, ready},
    net::IpAddr,
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
    wanted: Option<(ServiceKey, Option<IpAddr>, Instant)>,
}

impl MirrorWait {
    /// The wait for `command`; its timeout begins now.
    pub(super) fn of(command: &Command, registry: &RegistryHandle) -> Self {
        if !registry.mirror_progress().is_mirrored() {
            return Self { wanted: None };
        }
        let (service, address) = match command {
            Command::Register { service, instance } => (service, instance.address()),
            Command::Unregister { service, address, .. } => (service, address),
            Command::SetReady { service, id, .. } => (service, &id.address),
        };
        let ip = match address {
            Address::Ip(ip) => Some(*ip),
            Address::Name(_) => None,
        };
        Self { wanted: Some((service.clone(), ip, Instant::now() + MIRROR_TIMEOUT)) }
    }

    /// Returns true when Kubernetes has the change of `generation`, and false after the timeout. Returns true
    /// at once without a mirror, and for an outcome without a change to mirror.
    pub(super) fn wait(
        self,
        registry: &RegistryHandle,
        outcome: Outcome,
        generation: u64,
    ) -> Either<Ready<bool>, impl Future<Output = bool> + Send + use<>> {
        match self.wanted.filter(|_| outcome.is_word()) {
            None => Either::Left(ready(true)),
            Some((service, address, until)) => {
                let confirmed = registry.mirror_progress().confirmed(&service, generation, address);
                Either::Right(async move { timeout_at(until, confirmed).await.is_ok() })
            }
        }
    }
}
