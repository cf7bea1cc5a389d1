//! Time, as the protocol is told it.

use std::time::Duration;

/// Time since some moment in the past, by a clock that never goes back and goes on through suspensions
/// (CLOCK_BOOTTIME).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct BootTime(pub Duration);

impl BootTime {
    /// Time from `earlier` until now; nothing where `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// How far a term may be ahead of everything that could have led to it. A Lease's term is one more than any before it, or the
/// time in seconds; so many more acquisitions than seconds since 1970, before anybody here has seen one of them, do not happen.
pub const MAX_TERM_LEAD: u64 = 1_000_000;

/// The environment's say in an acquisition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Since boot.
    pub boot: BootTime,
    /// The wall clock, in seconds since the Unix epoch.
    pub unix_seconds: u64,
    /// Whether the Lease may be taken: the wall clock agrees with the API server's to a second, and the journal can be written.
    pub eligible: bool,
}

impl Now {
    /// The highest term that a Lease can have handed out by now, if `known` is the highest that was seen.
    #[must_use]
    pub fn highest_term(self, known: u64) -> u64 {
        known.max(self.unix_seconds).saturating_add(MAX_TERM_LEAD)
    }
}
