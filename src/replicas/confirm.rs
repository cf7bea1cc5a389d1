//! When an answer may say that Kubernetes has a word.
//!
//! It is not enough that the slice was written. The writer must still have been the writer: either the Lease was safely held when
//! the write was seen to have succeeded, or a renewal that began afterwards succeeds. Else the answer could come
//! from a process that slept while another took over and undid the word.

use std::collections::BTreeMap;

use super::time::BootTime;

/// What Kubernetes was seen to hold of each slice, and since when it counts.
#[derive(Debug, Clone)]
pub struct Confirmations<S> {
    /// By slice: the highest generation that was confirmed in this term.
    confirmed: BTreeMap<S, u64>,
    /// By slice: a generation that was seen while the Lease was not safely held, and when.
    unsafe_since: BTreeMap<S, (u64, BootTime)>,
}

impl<S> Default for Confirmations<S> {
    fn default() -> Self {
        Self { confirmed: BTreeMap::new(), unsafe_since: BTreeMap::new() }
    }
}

impl<S: Ord + Clone> Confirmations<S> {
    /// Kubernetes was seen at `now` to hold `slice` as of `generation`. Returns whether that is confirmed.
    pub fn shown(&mut self, slice: &S, generation: u64, now: BootTime, safe: bool) -> bool {
        if safe {
            self.confirm(slice, generation);
        } else {
            self.unsafe_since.insert(slice.clone(), (generation, now));
        }
        safe
    }

    /// A renewal that began at `began` succeeded. Returns what is confirmed by it: slices and their generations.
    pub fn renewed(&mut self, began: BootTime) -> Vec<(S, u64)> {
        let before = |_: &S, seen: &mut (u64, BootTime)| seen.1 < began;
        let confirmed: Vec<_> =
            self.unsafe_since.extract_if(.., before).map(|(slice, (generation, _))| (slice, generation)).collect();
        for (slice, generation) in &confirmed {
            self.confirm(slice, *generation);
        }
        confirmed
    }

    /// The highest generation of `slice` that is confirmed.
    #[must_use]
    pub fn of(&self, slice: &S) -> u64 {
        self.confirmed.get(slice).copied().unwrap_or(0)
    }

    /// A term ended: nothing of it is confirmed any more.
    pub fn clear(&mut self) {
        self.confirmed.clear();
        self.unsafe_since.clear();
    }

    fn confirm(&mut self, slice: &S, generation: u64) {
        let known = self.confirmed.entry(slice.clone()).or_default();
        *known = (*known).max(generation);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_was_seen_while_unsafe_is_confirmed_by_a_renewal_that_began_afterwards() {
        let at = |seconds| BootTime(Duration::from_secs(seconds));
        let mut confirmations = Confirmations::default();
        assert!(confirmations.shown(&"a", 3, at(1), true));
        assert!(!confirmations.shown(&"b", 5, at(2), false));
        assert_eq!((confirmations.of(&"a"), confirmations.of(&"b")), (3, 0));
        assert_eq!(confirmations.renewed(at(2)), [], "it may have been sent before");
        assert_eq!(confirmations.renewed(at(3)), [("b", 5)]);
        assert_eq!(confirmations.of(&"b"), 5);
    }
}
