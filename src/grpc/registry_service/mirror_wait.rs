//! How long an answer waits for Kubernetes.
//!
//! DNS has a change before its answer goes out, always. Where there is a mirror the answer waits a
//! moment longer, so that 201, 200 and 204 also mean that the EndpointSlice has it; when that takes
//! too long the answer is 202 and the slice follows.

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

/// Counted from the moment at which the message was read.
const MIRROR_TIMEOUT: Duration = Duration::from_secs(1);

/// What has to be waited for after a command is carried out.
#[derive(Debug)]
pub(super) struct MirrorWait {
    /// What, and until when at most; `None` without a mirror.
    wanted: Option<(ServiceKey, Option<IpAddr>, Instant)>,
}

impl MirrorWait {
    /// What `command`, which was read just now, will have to wait for.
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

    /// Whether Kubernetes has what `outcome` left in `generation`, as soon as it has, or when it
    /// was waited for long enough. Ready at once where nothing is to be had.
    pub(super) fn wait(
        self,
        registry: &RegistryHandle,
        outcome: Outcome,
        generation: u64,
    ) -> Either<Ready<bool>, impl Future<Output = bool> + Send + use<>> {
        let stands = matches!(outcome, Outcome::Created | Outcome::Updated | Outcome::Unchanged | Outcome::Removed(_));
        match self.wanted.filter(|_| stands) {
            None => Either::Left(ready(true)),
            Some((service, address, until)) => {
                let confirmed = registry.mirror_progress().confirmed(&service, generation, address);
                Either::Right(async move { timeout_at(until, confirmed).await.is_ok() })
            }
        }
    }
}
