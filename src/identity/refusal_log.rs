//! Refusals in the log, at a bounded rate: whoever can connect could fill the disk else.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Lines in one interval.
const MAX_LINES: u32 = 10;

const INTERVAL: Duration = Duration::from_secs(1);

/// Lets some lines through, and counts the others.
#[derive(Debug, Default)]
pub struct RefusalLog {
    window: Mutex<Window>,
}

#[derive(Debug, Default)]
struct Window {
    began: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl RefusalLog {
    /// Calls `log` with the number of refusals since the last line that were not logged, unless there were too many
    /// lines in this second.
    pub fn refused(&self, log: impl FnOnce(u64)) {
        if let Some(suppressed) = self.admit(Instant::now()) {
            log(suppressed);
        }
    }

    fn admit(&self, now: Instant) -> Option<u64> {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if window.began.is_none_or(|began| now.duration_since(began) >= INTERVAL) {
            window.began = Some(now);
            window.lines = 0;
        }
        if window.lines >= MAX_LINES {
            window.suppressed += 1;
            return None;
        }
        window.lines += 1;
        Some(std::mem::take(&mut window.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_beyond_the_rate_are_counted_in_the_next_line() {
        let log = RefusalLog::default();
        let now = Instant::now();
        for _ in 0..MAX_LINES {
            assert_eq!(log.admit(now), Some(0));
        }
        assert_eq!(log.admit(now), None);
        assert_eq!(log.admit(now), None);
        assert_eq!(log.admit(now + INTERVAL), Some(2));
        assert_eq!(log.admit(now + INTERVAL), Some(0));
    }
}
