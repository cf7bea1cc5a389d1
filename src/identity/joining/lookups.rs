//! How often the API server is asked for what this process does not know. Whoever reaches a listener can make it ask.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::attempts::Bucket;

/// Look-ups at once, and one more each [`INTERVAL`].
const BURST: u32 = 100;
const INTERVAL: Duration = Duration::from_millis(50);

/// For how long what was not found is not looked for again.
const ABSENT_MEMORY: Duration = Duration::from_secs(5);

/// Names that are remembered as absent. With more, nothing is remembered until the oldest are forgotten.
const MAX_ABSENT: usize = 1024;

/// Whether to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LookUp {
    /// Yes.
    Ask,
    /// It was absent a moment ago.
    Absent,
    /// Too many were looked for.
    Limited,
}

/// Counts look-ups.
#[derive(Debug)]
pub(super) struct LookUps(Mutex<LookUpState>);

#[derive(Debug)]
struct LookUpState {
    bucket: Bucket,
    absent: HashMap<String, Instant>,
}

impl LookUps {
    pub(super) fn new(now: Instant) -> Self {
        Self(Mutex::new(LookUpState { bucket: Bucket::new(now), absent: HashMap::new() }))
    }

    /// Whether to look for `name` now; counts it.
    pub(super) fn begin(&self, name: &str, now: Instant) -> LookUp {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.absent.get(name).is_some_and(|since| now < *since + ABSENT_MEMORY) {
            return LookUp::Absent;
        }
        if state.bucket.take(now, BURST, INTERVAL) { LookUp::Ask } else { LookUp::Limited }
    }

    /// There is none of this name.
    pub(super) fn absent(&self, name: &str, now: Instant) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.absent.len() >= MAX_ABSENT {
            state.absent.retain(|_, since| now < *since + ABSENT_MEMORY);
        }
        if state.absent.len() < MAX_ABSENT {
            state.absent.insert(name.to_owned(), now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn look_ups_are_few_and_what_is_absent_is_remembered_for_a_while() {
        let now = Instant::now();
        let look_ups = LookUps::new(now);
        assert_eq!(look_ups.begin("a", now), LookUp::Ask);
        look_ups.absent("a", now);
        assert_eq!(look_ups.begin("a", now), LookUp::Absent);
        let asked = (0..1_000).filter(|number| look_ups.begin(&number.to_string(), now) == LookUp::Ask).count();
        assert_eq!(asked, BURST as usize - 1);
        assert_eq!(look_ups.begin("b", now), LookUp::Limited);
        let later = now + ABSENT_MEMORY;
        assert_eq!(look_ups.begin("a", later), LookUp::Ask);
        for number in 0..10 * MAX_ABSENT {
            look_ups.absent(&number.to_string(), later);
        }
        assert_eq!(look_ups.0.lock().expect("no panic").absent.len(), MAX_ABSENT);
    }
}
