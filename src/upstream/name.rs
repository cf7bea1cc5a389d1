//! What is known of one name, over many lookups: a pure function of their outcomes and of the time.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    lookup::{LookupError, Outcome},
    timing::Timing,
    walk::Found,
};
use crate::{
    metrics::{LookupResult, NameState},
    model::{NameStatus, Resolution, ResolvedAddresses, UnixMillis},
    net::backoff::{doubled, jittered},
};

/// What holds for every name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// How long the last good answer may be used.
    pub(super) stale: Duration,
    /// Largest TTL that is served, in seconds.
    pub(super) max_ttl: u32,
    pub(super) timing: Timing,
}

/// One name.
#[derive(Debug, Default)]
pub(super) struct TrackedName {
    v4: Option<Known>,
    v6: Option<Known>,
    /// Lookups that failed in a row.
    failures: u32,
    status: NameStatus,
}

/// The last good answer for one family.
#[derive(Debug)]
struct Known {
    /// `None` if the name did not exist.
    addresses: Option<ResolvedAddresses>,
    ttl: u32,
    at: Instant,
    answered: UnixMillis,
}

impl TrackedName {
    /// A name that must not be looked up.
    pub(super) fn refused(why: &str) -> Self {
        let status = NameStatus { error: Some(why.into()), ..NameStatus::default() };
        Self { status, ..Self::default() }
    }

    pub(super) fn status(&self) -> &NameStatus {
        &self.status
    }

    /// What the metrics count it as.
    pub(super) fn state(&self) -> NameState {
        match &*self.status.resolution {
            Resolution::Unavailable => NameState::Unavailable,
            resolution if resolution.addresses().is_none() => NameState::Absent,
            _ if self.failures > 0 => NameState::Stale,
            _ => NameState::Current,
        }
    }

    /// Takes the outcome of a lookup that ended `now`, and returns how it ended and the pause until the next one.
    pub(super) fn apply(
        &mut self,
        outcome: Outcome,
        now: Instant,
        answered: UnixMillis,
        rules: &Rules,
    ) -> (LookupResult, Duration) {
        let own_zone =
            [&outcome.v4, &outcome.v6].iter().any(|family| family.as_ref().is_err_and(LookupError::is_own_zone));
        let (errors, left_out) = messages(&outcome);
        let failed = !errors.is_empty();
        self.failures = if failed { self.failures.saturating_add(1) } else { 0 };
        let known = |family: &mut Option<Known>, found: Result<Found, LookupError>| match found {
            Ok(Found { addresses, ttl, .. }) => *family = Some(Known { addresses, ttl, at: now, answered }),
            Err(_) if family.as_ref().is_some_and(|known| now - known.at >= rules.stale) => {
                *family = None;
            }
            Err(_) => {}
        };
        known(&mut self.v4, outcome.v4);
        known(&mut self.v6, outcome.v6);
        if own_zone {
            (self.v4, self.v6) = (None, None);
        }

        let resolution = self.resolution(rules.max_ttl);
        if *self.status.resolution != resolution {
            self.status.resolution = Arc::new(resolution);
        }
        // Both families: the older answer is what is known for sure.
        let oldest = [&self.v4, &self.v6].into_iter().flatten().map(|known| known.answered).min();
        self.status.answered = oldest.or(self.status.answered);
        let text = [errors, left_out].into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("; ");
        if self.status.error.as_deref().unwrap_or_default() != text {
            self.status.error = (!text.is_empty()).then(|| text.into());
        }

        let result = match &*self.status.resolution {
            _ if failed => LookupResult::Failed,
            Resolution::NxDomain => LookupResult::NxDomain,
            _ => LookupResult::Answered,
        };
        (result, self.pause(now, rules))
    }

    fn resolution(&self, max_ttl: u32) -> Resolution {
        let families = || [&self.v4, &self.v6].into_iter().flatten();
        if families().next().is_none() {
            return Resolution::Unavailable;
        }
        if families().all(|known| known.addresses.is_none()) {
            return Resolution::NxDomain;
        }
        let addresses = families().filter_map(|known| known.addresses.as_ref()).flat_map(ResolvedAddresses::iter);
        let with_addresses = |known: &&Known| known.addresses.as_ref().is_some_and(|found| !found.is_empty());
        let ttl = families().filter(with_addresses).map(|known| known.ttl).min();
        if ttl.is_none() && families().count() < 2 {
            // One family has no addresses, and nobody knows about the other: unknown is not absent.
            return Resolution::Unavailable;
        }
        let ttl = ttl.or_else(|| families().map(|known| known.ttl).min()).unwrap_or_default();
        Resolution::Addresses(ResolvedAddresses::new(addresses, ttl.min(max_ttl)))
    }

    fn pause(&self, now: Instant, rules: &Rules) -> Duration {
        let timing = &rules.timing;
        let known = || [&self.v4, &self.v6].into_iter().flatten();
        let refresh = known().map(|known| known.ttl).min().map(|ttl| timing.refresh(ttl));
        if self.failures == 0 {
            return refresh.unwrap_or(timing.max_refresh);
        }
        let backoff = jittered(doubled(timing.min_backoff, timing.max_backoff, self.failures - 1));
        // A family that was answered is looked up in time, and what may not be used any longer is dropped in time.
        let answered_now = known().filter(|known| known.at == now).map(|known| timing.refresh(known.ttl));
        let expiries = known().map(|known| (known.at + rules.stale).saturating_duration_since(now));
        answered_now.chain(expiries).fold(backoff, Duration::min)
    }
}

/// What failed, and what was left out of the rest.
fn messages(outcome: &Outcome) -> (String, String) {
    let errors = match (&outcome.v4, &outcome.v6) {
        (Err(v4), Err(v6)) => {
            let (v4, v6) = (v4.to_string(), v6.to_string());
            if v4 == v6 { v4 } else { format!("A: {v4}; AAAA: {v6}") }
        }
        (Err(err), Ok(_)) => format!("A: {err}"),
        (Ok(_), Err(err)) => format!("AAAA: {err}"),
        (Ok(_), Ok(_)) => String::new(),
    };
    let found = [&outcome.v4, &outcome.v6].into_iter().flatten();
    let left_out: Vec<&str> = found.filter_map(|found| found.left_out.as_deref()).collect();
    (errors, left_out.join("; "))
}
