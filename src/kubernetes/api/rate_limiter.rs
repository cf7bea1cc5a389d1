//! The rate limit of all requests to the API server: a token bucket, with pauses.
//!
//! When the server says how long to wait (`Retry-After`, RFC 9110 §10.2.3), or does not answer, all
//! requests pause: retrying one service after the other would not help a server in trouble.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

/// Pause after the first failure; it doubles with each further one in a row.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Longest pause after failures.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// Longest Retry-After that is honoured.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// A token bucket.
#[derive(Debug)]
pub(in crate::kubernetes) struct RateLimiter {
    /// Time per token.
    interval: Duration,
    /// Size of the bucket.
    burst: u32,
    state: Mutex<BucketState>,
    /// First come, first served: whoever waits for a token holds it.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct BucketState {
    /// When the bucket will be full; each request moves this by the interval.
    full_at: Instant,
    paused_until: Instant,
    failures: u32,
}

impl RateLimiter {
    /// `per_second` requests, with a burst of twice as many.
    pub(in crate::kubernetes) fn new(per_second: u32) -> Self {
        let now = Instant::now();
        Self {
            interval: Duration::from_secs(1) / per_second,
            burst: per_second.saturating_mul(2),
            state: Mutex::new(BucketState { full_at: now, paused_until: now, failures: 0 }),
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// Waits until a request may be made.
    pub(in crate::kubernetes) async fn acquire(&self) {
        let _turn = self.turn.lock().await;
        loop {
            let wait = self.take(Instant::now());
            match wait {
                None => return,
                Some(until) => sleep_until(until).await,
            }
        }
    }

    /// Whether requests pause after a failure.
    pub(in crate::kubernetes) fn is_paused(&self) -> bool {
        self.lock().paused_until > Instant::now()
    }

    /// Takes a token, or returns when to try again.
    fn take(&self, now: Instant) -> Option<Instant> {
        let mut state = self.lock();
        if state.paused_until > now {
            return Some(state.paused_until);
        }
        // The bucket as one number: when it would be full again. How empty it is follows from the distance to now.
        let full_at = state.full_at.max(now) + self.interval;
        let room = self.interval * self.burst;
        if full_at > now + room {
            return Some(full_at - room);
        }
        state.full_at = full_at;
        None
    }

    /// The server answered.
    pub(in crate::kubernetes) fn answered(&self) {
        self.lock().failures = 0;
    }

    /// The server failed or did not answer; `retry_after` is what the answer says.
    pub(in crate::kubernetes) fn failed(&self, retry_after: Option<Duration>) {
        self.pause(Instant::now(), retry_after);
    }

    fn pause(&self, now: Instant, retry_after: Option<Duration>) {
        let mut state = self.lock();
        let pause = match retry_after {
            // Bounded: a header with a wrong number must not stop the mirror for a day.
            Some(asked) => asked.min(MAX_RETRY_AFTER),
            // A request that fails during a pause was sent before it.
            None if state.paused_until > now => return,
            None => {
                let doublings = state.failures.min(16);
                state.failures += 1;
                FIRST_PAUSE.saturating_mul(1 << doublings).min(MAX_PAUSE)
            }
        };
        // Never earlier: a short pause must not end a longer one that the server has asked for.
        state.paused_until = state.paused_until.max(now + pause);
    }

    fn lock(&self) -> MutexGuard<'_, BucketState> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_passes_then_the_rate_holds() {
        let rate_limiter = RateLimiter::new(10);
        let now = Instant::now();
        let passed = (0..100).filter(|_| rate_limiter.take(now).is_none()).count();
        assert_eq!(passed, 20);
        let later = now + Duration::from_secs(1);
        assert_eq!((0..100).filter(|_| rate_limiter.take(later).is_none()).count(), 10);
        assert_eq!(rate_limiter.take(later), Some(later + Duration::from_millis(100)));
    }

    #[test]
    fn retry_after_pauses_all_requests() {
        let rate_limiter = RateLimiter::new(10);
        let now = Instant::now();
        rate_limiter.pause(now, Some(Duration::from_secs(7)));
        rate_limiter.pause(now, Some(Duration::from_secs(2)));
        assert_eq!(rate_limiter.take(now), Some(now + Duration::from_secs(7)));
        assert_eq!(rate_limiter.take(now + Duration::from_secs(7)), None);
    }

    #[test]
    fn pause_doubles_with_failures_in_a_row_until_an_answer() {
        let rate_limiter = RateLimiter::new(10);
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..8 {
            rate_limiter.pause(now, None);
            rate_limiter.pause(now, None); // sent before the pause: counts once
            let until = rate_limiter.take(now).expect("paused");
            pauses.push((until - now).as_millis());
            now = until;
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        rate_limiter.answered();
        rate_limiter.pause(now, None);
        assert_eq!(rate_limiter.take(now), Some(now + FIRST_PAUSE));
    }
}
