//! Objects of which the API server refused a write, and when each may be written again.
//!
//! As client-go's ItemExponentialFailureRateLimiter, with the object as the item: other objects of
//! the same service are written meanwhile.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use crate::{kubernetes::api::ApiError, model::ServiceKey, net::backoff::doubled};

/// Backoff after the first refusal: an API server that has just started knows nobody's rights for a
/// moment.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);

/// Longest backoff: a right may be granted, a policy changed, a webhook repaired.
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// Longest backoff of an object that would be written with other content.
const MAX_CHANGED_BACKOFF: Duration = Duration::from_secs(2);

/// The names of objects that are not slices. No name of a slice has a capital letter.
pub(super) const SERVICE: &str = "Service";
pub(super) const NAMESPACE: &str = "Namespace";
pub(super) const ENDPOINTS: &str = "Endpoints";

/// The objects that back off, by service. Time is an argument.
#[derive(Debug, Default)]
pub(super) struct ObjectBackoff {
    services: HashMap<ServiceKey, HashMap<Box<str>, RefusedObject>>,
}

#[derive(Debug)]
struct RefusedObject {
    err: ApiError,
    /// In a row.
    refusals: u32,
    at: Instant,
    /// The last change of the service that was known then.
    generation: u64,
}

impl RefusedObject {
    fn backoff(&self) -> Duration {
        doubled(FIRST_BACKOFF, MAX_BACKOFF, self.refusals - 1)
    }
}

impl ObjectBackoff {
    /// The refusal of `object`, while it backs off; `generation` is the last change of the service.
    pub(super) fn refusal(
        &self,
        service: &ServiceKey,
        object: &str,
        generation: u64,
        now: Instant,
    ) -> Option<ApiError> {
        let refused = self.services.get(service)?.get(object)?;
        let changed = generation != refused.generation;
        let backoff = if changed { refused.backoff().min(MAX_CHANGED_BACKOFF) } else { refused.backoff() };
        (refused.at + backoff > now).then(|| refused.err.clone())
    }

    /// A write of `object` was refused.
    pub(super) fn refused(
        &mut self,
        service: &ServiceKey,
        object: &str,
        generation: u64,
        err: &ApiError,
        now: Instant,
    ) {
        let objects = self.services.entry(service.clone()).or_default();
        let refusals = objects.get(object).map_or(0, |before| before.refusals) + 1;
        objects.insert(object.into(), RefusedObject { err: err.clone(), refusals, at: now, generation });
    }

    /// A write of `object` was accepted.
    pub(super) fn accepted(&mut self, service: &ServiceKey, object: &str) {
        if let Some(objects) = self.services.get_mut(service) {
            objects.remove(object);
            if objects.is_empty() {
                self.services.remove(service);
            }
        }
    }

    /// Everything of `service` is as it should be.
    pub(super) fn forget(&mut self, service: &ServiceKey) {
        self.services.remove(service);
    }

    /// When the first refused object of `service` may be written again.
    pub(super) fn retry_after(&self, service: &ServiceKey, now: Instant) -> Option<Duration> {
        let objects = self.services.get(service)?.values();
        objects.map(|refused| (refused.at + refused.backoff()).saturating_duration_since(now)).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Validator;

    #[test]
    fn backoff_of_a_refused_object_grows_and_ends_with_a_success() {
        let service = Validator { zone_wire_len: 15, names_allowed: false }.service("prod", "web").expect("valid");
        let (mut objects, mut now) = (ObjectBackoff::default(), Instant::now());
        let err = ApiError::WebhookFailed("connection refused".into());
        let mut waits = Vec::new();
        for _ in 0..7 {
            objects.refused(&service, SERVICE, 5, &err, now);
            let wait = objects.retry_after(&service, now).expect("refused");
            assert_eq!(objects.refusal(&service, SERVICE, 5, now), Some(err.clone()));
            assert_eq!(objects.refusal(&service, "web-0123456789", 5, now), None, "another object is not delayed");
            assert_eq!(objects.refusal(&service, SERVICE, 6, now + wait.min(MAX_CHANGED_BACKOFF)), None, "changed");
            now += wait;
            assert_eq!(objects.refusal(&service, SERVICE, 5, now), None);
            waits.push(wait.as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30]);
        objects.accepted(&service, SERVICE);
        assert_eq!(objects.retry_after(&service, now), None);
    }
}
