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

    /// Whether the last lookup failed, so that the next one may take long.
    pub(super) fn is_doubtful(&self) -> bool {
        self.failures > 0
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
        // Not what was answered just now: with a short limit it would be looked up without a pause.
        let earlier = known().filter(|known| known.at != now);
        let expiries = earlier.map(|known| (known.at + rules.stale).saturating_duration_since(now));
        answered_now.chain(expiries).fold(backoff, Duration::min).max(timing.min_backoff / 2)
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

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::upstream::walk::WalkError;

    const STALE: u64 = 100;

    fn rules() -> Rules {
        Rules { stale: Duration::from_secs(STALE), max_ttl: 5, timing: Timing::new() }
    }

    /// What one family gave.
    #[derive(Debug, Clone)]
    enum Gave {
        Addresses(Vec<u8>, u32),
        NxDomain(u32),
        Failure,
        OwnZone,
    }

    fn gave() -> impl Strategy<Value = Gave> {
        prop_oneof![
            4 => (vec(1..20_u8, 0..3), 0..10_u32).prop_map(|(hosts, ttl)| Gave::Addresses(hosts, ttl)),
            2 => (0..10_u32).prop_map(Gave::NxDomain),
            6 => Just(Gave::Failure),
            1 => Just(Gave::OwnZone),
        ]
    }

    fn ip(host: u8, v4: bool) -> std::net::IpAddr {
        if v4 { [192, 0, 2, host].into() } else { [0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(host)].into() }
    }

    fn found(gave: &Gave, v4: bool) -> Result<Found, LookupError> {
        let addresses = |hosts: &[u8], ttl| ResolvedAddresses::new(hosts.iter().map(|host| ip(*host, v4)), ttl);
        match gave {
            Gave::Addresses(hosts, ttl) => {
                Ok(Found { addresses: Some(addresses(hosts, *ttl)), ttl: *ttl, left_out: None })
            }
            Gave::NxDomain(ttl) => Ok(Found { addresses: None, ttl: *ttl, left_out: None }),
            Gave::Failure => Err(LookupError::Timeout(Duration::from_secs(15))),
            Gave::OwnZone => Err(WalkError::InOwnZone("a.cluster.local".into()).into()),
        }
    }

    /// What is served after the last of these lookups, found by looking back from it: for each family the last answer that is
    /// young enough.
    fn expected(history: &[(u64, Gave, Gave)]) -> Resolution {
        let (now, ..) = history[history.len() - 1];
        let refused =
            history.iter().rposition(|(_, v4, v6)| matches!(v4, Gave::OwnZone) || matches!(v6, Gave::OwnZone));
        let since = &history[refused.map_or(0, |at| at + 1)..];
        let last = |v4: bool| {
            let family = since.iter().rev().map(move |(at, four, six)| (*at, if v4 { four } else { six }));
            // An answer that was too old at one lookup is not used at a later one either.
            family
                .filter(move |(at, _)| now - at < STALE || *at == now)
                .find(|(_, gave)| !matches!(gave, Gave::Failure))
        };
        let (four, six) = (last(true).map(|(_, gave)| gave), last(false).map(|(_, gave)| gave));
        let hosts = |gave: Option<&Gave>| match gave {
            Some(Gave::Addresses(hosts, ttl)) if !hosts.is_empty() => Some((hosts.clone(), *ttl)),
            _ => None,
        };
        match (hosts(four), hosts(six)) {
            (None, None) => match (four, six) {
                (None, None) => Resolution::Unavailable,
                (None | Some(Gave::NxDomain(_)), None | Some(Gave::NxDomain(_))) => Resolution::NxDomain,
                (None, _) | (_, None) => Resolution::Unavailable,
                (Some(four), Some(six)) => {
                    let ttl = [four, six].map(|gave| match gave {
                        Gave::Addresses(_, ttl) | Gave::NxDomain(ttl) => *ttl,
                        Gave::Failure | Gave::OwnZone => unreachable!("filtered"),
                    });
                    Resolution::Addresses(ResolvedAddresses::new([], ttl[0].min(ttl[1]).min(5)))
                }
            },
            (four, six) => {
                let ttl = [&four, &six].into_iter().flatten().map(|(_, ttl)| *ttl).min().unwrap_or_default();
                let four = four.into_iter().flat_map(|(hosts, _)| hosts).map(|host| ip(host, true));
                let six = six.into_iter().flat_map(|(hosts, _)| hosts).map(|host| ip(host, false));
                Resolution::Addresses(ResolvedAddresses::new(four.chain(six), ttl.min(5)))
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_served_is_the_last_answer_that_is_young_enough(lookups in vec((0..60_u64, gave(), gave()), 1..12)) {
            let begun = Instant::now();
            let mut tracked = TrackedName::default();
            let (mut history, mut clock) = (Vec::new(), 0);
            for (pause, v4, v6) in lookups {
                clock += pause;
                let outcome = Outcome { v4: found(&v4, true), v6: found(&v6, false) };
                let failed = outcome.v4.is_err() || outcome.v6.is_err();
                let now = begun + Duration::from_secs(clock);
                let before = tracked.status().clone();
                let (result, next) = tracked.apply(outcome, now, UnixMillis(clock), &rules());
                history.push((clock, v4, v6));
                let status = tracked.status();
                prop_assert_eq!(&*status.resolution, &expected(&history), "{:?}", history);
                prop_assert_eq!(status.error.is_some(), failed);
                prop_assert_eq!(result == LookupResult::Failed, failed);
                prop_assert!(before.resolution != status.resolution || Arc::ptr_eq(&before.resolution, &status.resolution));
                prop_assert!(next <= Duration::from_secs(60) || !failed, "{next:?} after a failure");
                prop_assert!(next <= Duration::from_secs(270));
                prop_assert!(failed || next >= Duration::from_secs(5), "{next:?}");
            }
        }
    }

    #[test]
    fn pauses_grow_while_lookups_fail_and_end_when_the_last_answer_is_too_old() {
        let begun = Instant::now();
        let at = |seconds: f64| begun + Duration::from_secs_f64(seconds);
        let lookup = |gave: Gave| Outcome { v4: found(&gave, true), v6: found(&gave, false) };
        let mut tracked = TrackedName::default();
        let failing =
            |tracked: &mut TrackedName, now| tracked.apply(lookup(Gave::Failure), now, UnixMillis(1), &rules()).1;
        let pauses: Vec<f64> = (0..9).map(|_| failing(&mut tracked, begun).as_secs_f64()).collect();
        for (pause, longest) in pauses.iter().zip([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]) {
            assert!((longest / 2.0..=longest).contains(pause), "{pauses:?}");
        }
        tracked.apply(lookup(Gave::Addresses(vec![1], 60)), begun, UnixMillis(1), &rules());
        assert!(failing(&mut tracked, begun) <= Duration::from_secs(1), "a success begins anew");
        // Two seconds before the answer is too old, the pause is two seconds.
        (0..9).for_each(|_| {
            failing(&mut tracked, at(97.0));
        });
        assert_eq!(failing(&mut tracked, at(98.0)), Duration::from_secs(2));
        assert_eq!(tracked.state(), NameState::Stale);
        failing(&mut tracked, at(100.0));
        assert_eq!(tracked.state(), NameState::Unavailable);
    }
}
