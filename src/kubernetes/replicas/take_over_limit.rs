//! How long a take-over may take.
//!
//! A process whose lists fail, for a missing right or an answer that is too large, can renew the Lease all the same: without a
//! limit nobody would write.

use std::{env, time::Duration};

use crate::replicas::time::BootTime;

/// How long the first take-over may take, from the begin of its list until the result is journaled. A million instances take some
/// seconds.
const MAX_TAKE_OVER: Duration = Duration::from_secs(60);

/// Another one, in milliseconds, for tests of the process. Only a build with debug assertions looks at it.
const TEST_LIMIT: &str = "GANGPLANK_TEST_TAKE_OVER_LIMIT_MS";

/// The limit doubles with each take-over that was given up, so often at most: where every process needs longer, one succeeds.
const MAX_DOUBLINGS: u32 = 4;

/// How long the process leaves the Lease to others then. They watch the Lease, or read it every 2 s.
pub(super) const PAUSE: Duration = Duration::from_secs(30);

/// The take-overs of one process.
#[derive(Debug, Default)]
pub(super) struct TakeOverLimit {
    began: Option<BootTime>,
    paused_at: Option<BootTime>,
    given_up: u32,
}

impl TakeOverLimit {
    /// A take-over begins, or the present one begins anew under a higher term.
    pub(super) fn begin(&mut self, now: BootTime) {
        // Not anew under a higher term: the limit is about how long nobody writes.
        self.began.get_or_insert(now);
    }

    /// The take-over is done.
    pub(super) fn complete(&mut self) {
        *self = Self::default();
    }

    /// The Lease is lost, or given up for another reason.
    pub(super) fn stop(&mut self) {
        self.began = None;
    }

    /// The limit for the present take-over.
    pub(super) fn limit(&self) -> Duration {
        first_limit() * (1 << self.given_up.min(MAX_DOUBLINGS))
    }

    /// Whether the present take-over takes too long.
    pub(super) fn is_over(&self, now: BootTime) -> bool {
        self.began.is_some_and(|began| now.since(began) >= self.limit())
    }

    /// The take-over is given up because it took too long.
    pub(super) fn give_up(&mut self, now: BootTime) {
        *self = Self { began: None, paused_at: Some(now), given_up: self.given_up + 1 };
    }

    /// Whether the Lease is left to others.
    pub(super) fn pauses(&self, now: BootTime) -> bool {
        self.paused_at.is_some_and(|paused| now.since(paused) < PAUSE)
    }
}

fn first_limit() -> Duration {
    let of_test = || env::var(TEST_LIMIT).ok().and_then(|text| text.parse().ok()).map(Duration::from_millis);
    if cfg!(debug_assertions) { of_test().unwrap_or(MAX_TAKE_OVER) } else { MAX_TAKE_OVER }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> BootTime {
        BootTime(Duration::from_secs(seconds))
    }

    #[test]
    fn take_over_that_does_not_end_is_given_up_and_others_get_their_turn() {
        let mut limit = TakeOverLimit::default();
        assert!(!limit.is_over(at(1_000)), "none has begun");
        limit.begin(at(100));
        limit.begin(at(150));
        assert!(!limit.is_over(at(159)) && !limit.pauses(at(159)));
        assert!(limit.is_over(at(160)), "a higher term does not make it longer");
        limit.give_up(at(161));
        assert!(!limit.is_over(at(1_000)) && limit.pauses(at(190)) && !limit.pauses(at(191)));
        limit.begin(at(200));
        assert!(!limit.is_over(at(319)) && limit.is_over(at(320)), "twice as long");
        limit.stop();
        assert!(!limit.is_over(at(320)));
        limit.complete();
        limit.begin(at(400));
        assert!(limit.is_over(at(460)));
    }
}
