//! Every duration of the lookups. Tests divide all of them by one number.

use std::time::Duration;

/// How long lookups take at most, and when names are looked up again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timing {
    /// A question over UDP to one server, with its retransmission.
    pub(super) udp_timeout: Duration,
    /// When the question is sent a second time.
    pub(super) retransmit_after: Duration,
    /// A question over TCP to one server, with the connection.
    pub(super) tcp_timeout: Duration,
    /// One family of addresses of a name, with every alias and every server.
    pub(super) lookup_timeout: Duration,
    /// A name with a smaller TTL is not looked up more often.
    pub(super) min_refresh: Duration,
    /// A name with a larger TTL is looked up nevertheless, so that changes are noticed.
    pub(super) max_refresh: Duration,
    /// First pause after a lookup that failed; doubled for every further one.
    pub(super) min_backoff: Duration,
    /// Longest pause after lookups that failed.
    pub(super) max_backoff: Duration,
    /// First time for which a server that did not answer comes last; doubled for every further one.
    pub(super) min_avoidance: Duration,
    /// Longest time for which it comes last.
    pub(super) max_avoidance: Duration,
    /// A second of a TTL.
    pub(super) ttl_second: Duration,
}

impl Timing {
    /// As in production.
    pub(super) const fn new() -> Self {
        Self {
            udp_timeout: Duration::from_secs(2),
            retransmit_after: Duration::from_millis(800),
            tcp_timeout: Duration::from_secs(3),
            lookup_timeout: Duration::from_secs(15),
            min_refresh: Duration::from_secs(5),
            max_refresh: Duration::from_secs(300),
            min_backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(60),
            min_avoidance: Duration::from_secs(1),
            max_avoidance: Duration::from_secs(30),
            ttl_second: Duration::from_secs(1),
        }
    }

    /// Everything `times` as fast.
    #[cfg(test)]
    pub(super) fn faster(times: u32) -> Self {
        let new = Self::new();
        Self {
            udp_timeout: new.udp_timeout / times,
            retransmit_after: new.retransmit_after / times,
            tcp_timeout: new.tcp_timeout / times,
            lookup_timeout: new.lookup_timeout / times,
            min_refresh: new.min_refresh / times,
            max_refresh: new.max_refresh / times,
            min_backoff: new.min_backoff / times,
            max_backoff: new.max_backoff / times,
            min_avoidance: new.min_avoidance / times,
            max_avoidance: new.max_avoidance / times,
            ttl_second: new.ttl_second / times,
        }
    }

    /// When a name whose records have `ttl` is looked up again: at random between 80 and 90 % of its TTL, within the limits.
    pub(super) fn refresh(&self, ttl: u32) -> Duration {
        let spread = fastrand::f64() / 10.0;
        let ttl = self.ttl_second.saturating_mul(ttl).min(self.max_refresh);
        ttl.mul_f64(0.8 + spread).max(self.min_refresh.mul_f64(1.0 + spread))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_looked_up_ahead_of_their_ttl_within_limits() {
        let timing = Timing::new();
        let seconds = |ttl| timing.refresh(ttl).as_secs_f64();
        for _ in 0..1000 {
            assert!((48.0..=54.0).contains(&seconds(60)));
            for small in [0, 1, 4] {
                assert!((5.0..=5.5).contains(&seconds(small)), "a TTL of {small} s is no flood");
            }
            for large in [300, 86_400, u32::MAX] {
                assert!((240.0..=270.0).contains(&seconds(large)), "a change is noticed within five minutes");
            }
        }
        let apart: Vec<f64> = (0..100).map(|_| seconds(100)).collect();
        assert!(apart.iter().any(|one| (one - apart[0]).abs() > 1.0), "not all at once");
    }
}
