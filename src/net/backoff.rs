//! Pauses between attempts, which grow with every failure.

use std::time::Duration;

/// The pauses of one who tries again until it succeeds: [`doubled`] and [`jittered`].
#[derive(Debug, Clone)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    /// Before the first failure.
    #[must_use]
    pub const fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, failures: 0 }
    }

    /// The pause after another failure.
    pub fn next_pause(&mut self) -> Duration {
        let pause = doubled(self.min, self.max, self.failures);
        self.failures = self.failures.saturating_add(1);
        jittered(pause)
    }

    /// After a success.
    pub const fn reset(&mut self) {
        self.failures = 0;
    }
}

/// `min`, doubled for each of the `earlier` failures in a row, and at most `max`.
#[must_use]
pub fn doubled(min: Duration, max: Duration, earlier: u32) -> Duration {
    // A shift by 32 or more would overflow; `max` is reached long before.
    min.saturating_mul(1 << earlier.min(31)).min(max)
}

/// At random between half of `pause` and all of it, so that those who failed together do not come back together.
#[must_use]
pub fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.5 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pause_doubles_to_its_maximum_and_begins_again() {
        let second = Duration::from_secs(1);
        let mut backoff = Backoff::new(second, 10 * second);
        for round in 0..2 {
            for longest in [1, 2, 4, 8, 10, 10] {
                let pause = backoff.next_pause();
                assert!(
                    pause >= longest * second / 2 && pause <= longest * second,
                    "{round}: {pause:?} of {longest} s"
                );
            }
            assert!((0..100).all(|_| backoff.next_pause() <= 10 * second));
            backoff.reset();
        }
        assert_eq!(doubled(second, Duration::MAX, u32::MAX), second * (1 << 31));
        assert_eq!(doubled(second, 4 * second, 40), 4 * second);
    }
}
