//! How much each identity uses at a time: open calls, and messages a second.

use std::{
    collections::HashMap,
    num::{NonZeroU32, NonZeroUsize},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::Identity;
use crate::metrics::{IdentityMetrics, QuotaKind};

/// Identities beyond which those are forgotten that use nothing, when another one comes.
const MIN_SWEEP: usize = 1024;

/// What one identity may use at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UsageLimits {
    /// Calls that are open at a time, streams and others; `None` for any number.
    pub streams: Option<NonZeroUsize>,
    /// Registrations and removals a second, on all of its streams; `None` for any number.
    pub messages_per_second: Option<NonZeroU32>,
}

/// An identity has as many calls open as it may.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{user} has {limit} calls open, which is the limit of one identity (--max-streams-per-identity)")]
pub struct TooManyStreams {
    user: Arc<str>,
    limit: usize,
}

/// What the identities use.
#[derive(Debug)]
pub struct Usage {
    limits: UsageLimits,
    metrics: Arc<IdentityMetrics>,
    users: Mutex<Users>,
}

#[derive(Debug, Default)]
struct Users {
    by_name: HashMap<Arc<str>, Arc<UserUsage>>,
    /// When there are so many, those that use nothing are forgotten.
    sweep_at: usize,
}

#[derive(Debug)]
struct UserUsage {
    streams: AtomicUsize,
    messages: Mutex<Allowance>,
}

/// A token bucket that holds the messages of one second.
#[derive(Debug)]
struct Allowance {
    /// Below zero if several streams took the last one at once.
    left: f64,
    at: Instant,
}

impl Allowance {
    fn refill(&mut self, rate: f64, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + passed * rate).min(rate);
        self.at = self.at.max(now);
    }
}

/// An open call of an identity. It ends with the last clone.
#[derive(Debug)]
pub struct StreamPermit {
    user: Arc<UserUsage>,
    rate: Option<f64>,
    metrics: Arc<IdentityMetrics>,
}

impl Usage {
    /// Nobody uses anything yet.
    #[must_use]
    pub fn new(limits: UsageLimits, metrics: Arc<IdentityMetrics>) -> Self {
        Self { limits, metrics, users: Mutex::default() }
    }

    /// A call begins.
    ///
    /// # Errors
    /// When the identity has as many open as it may.
    pub fn begin(&self, identity: &Identity) -> Result<Arc<StreamPermit>, TooManyStreams> {
        let rate = self.limits.messages_per_second.map(|rate| f64::from(rate.get()));
        let user = self.user(&identity.user, rate);
        // Before the comparison: two that begin at once must not both find the last place.
        let open = user.streams.fetch_add(1, Ordering::AcqRel) + 1;
        let call = Arc::new(StreamPermit { user, rate, metrics: Arc::clone(&self.metrics) });
        match self.limits.streams {
            Some(limit) if open > limit.get() => {
                self.metrics.over_quota.at(QuotaKind::IdentityStreams).inc();
                Err(TooManyStreams { user: Arc::clone(&identity.user), limit: limit.get() })
            }
            _ => Ok(call),
        }
    }

    fn user(&self, name: &Arc<str>, rate: Option<f64>) -> Arc<UserUsage> {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(user) = users.by_name.get(name) {
            return Arc::clone(user);
        }
        let now = Instant::now();
        if users.by_name.len() >= users.sweep_at.max(MIN_SWEEP) {
            // One whose messages are not forgotten yet would begin with a full second again.
            users.by_name.retain(|_, user| Arc::strong_count(user) > 1 || !user.is_idle(rate, now));
            users.sweep_at = users.by_name.len() * 2;
        }
        let messages = Mutex::new(Allowance { left: rate.unwrap_or(0.0), at: now });
        let user = Arc::new(UserUsage { streams: AtomicUsize::new(0), messages });
        users.by_name.insert(Arc::clone(name), Arc::clone(&user));
        user
    }
}

impl UserUsage {
    fn is_idle(&self, rate: Option<f64>, now: Instant) -> bool {
        let Some(rate) = rate else { return true };
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.refill(rate, now);
        messages.left >= rate
    }
}

impl StreamPermit {
    /// How long the next message has to wait at `now`; `None` if it may come.
    #[must_use]
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        let rate = self.rate?;
        let mut messages = self.user.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.refill(rate, now);
        if messages.left >= 1.0 {
            return None;
        }
        self.metrics.over_quota.at(QuotaKind::IdentityMessages).inc();
        Some(Duration::from_secs_f64((1.0 - messages.left) / rate))
    }

    /// A message has come.
    pub fn count_message(&self) {
        if self.rate.is_some() {
            self.user.messages.lock().unwrap_or_else(PoisonError::into_inner).left -= 1.0;
        }
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        self.user.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{identity::IdentitySource, metrics::Metrics};

    fn identity(user: &str) -> Identity {
        Identity { user: user.into(), groups: [].into(), source: IdentitySource::Certificate, expires: None }
    }

    fn usage(streams: usize, messages: u32) -> (Usage, Arc<Metrics>) {
        let metrics = Arc::new(Metrics::new());
        let limits =
            UsageLimits { streams: NonZeroUsize::new(streams), messages_per_second: NonZeroU32::new(messages) };
        (Usage::new(limits, Arc::clone(&metrics.identity)), metrics)
    }

    #[test]
    fn streams_of_an_identity_are_limited_until_one_ends() {
        let (usage, metrics) = usage(2, 0);
        let (vm, other) = (identity("vm-1"), identity("vm-2"));
        let first = usage.begin(&vm).expect("room");
        let _second = usage.begin(&vm).expect("room");
        let refused = usage.begin(&vm).expect_err("full").to_string();
        assert_eq!(refused, "vm-1 has 2 calls open, which is the limit of one identity (--max-streams-per-identity)");
        assert!(usage.begin(&other).is_ok(), "each its own");
        drop(first);
        assert!(usage.begin(&vm).is_ok(), "a refused one takes no place");
        assert_eq!(metrics.identity.over_quota.at(QuotaKind::IdentityStreams).get(), 1);
    }

    #[test]
    fn messages_of_all_streams_share_one_second() {
        let (usage, _) = usage(0, 10);
        let vm = identity("vm-1");
        let calls = [usage.begin(&vm).expect("room"), usage.begin(&vm).expect("room")];
        let now = Instant::now();
        for n in 0..10 {
            assert_eq!(calls[n % 2].wait(now), None, "message {n}");
            calls[n % 2].count_message();
        }
        let wait = calls[0].wait(now).expect("used up");
        assert!(wait <= Duration::from_millis(101), "{wait:?}");
        let later = now + Duration::from_millis(101);
        assert_eq!(calls[1].wait(later), None);
        calls[1].count_message();
        drop(calls);
        let again = usage.begin(&vm).expect("room");
        assert!(again.wait(later).is_some(), "another call begins with what is left");
        assert_eq!(usage.begin(&identity("vm-2")).expect("room").wait(now), None);
    }

    #[test]
    fn identities_that_use_nothing_are_forgotten() {
        let (usage, _) = usage(1, 0);
        let _open = usage.begin(&identity("open")).expect("room");
        (0..10 * MIN_SWEEP).for_each(|n| drop(usage.begin(&identity(&format!("vm-{n}")))));
        assert!(usage.users.lock().expect("no panic").by_name.len() <= MIN_SWEEP + 1);
        assert!(usage.begin(&identity("open")).is_err(), "it is still known");
    }
}
