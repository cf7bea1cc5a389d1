//! The wall clock.

use std::{
    env,
    sync::LazyLock,
    time::{Duration, SystemTime},
};

/// Shifts the wall clock by so many milliseconds, for tests of processes whose clocks are apart. Only a build with debug
/// assertions looks at it, so that no installed server can be set wrong by it.
const TEST_OFFSET: &str = "GANGPLANK_TEST_CLOCK_OFFSET_MS";

/// This moment by the wall clock: whatever is stamped, compared with the API server's clock or stored reads it here.
#[must_use]
pub fn wall_clock() -> SystemTime {
    let now = SystemTime::now();
    let offset = test_clock_offset();
    let by = Duration::from_millis(offset.unsigned_abs());
    if offset < 0 { now - by } else { now + by }
}

/// By how many milliseconds a test has shifted it; 0 in every release build.
#[must_use]
pub fn test_clock_offset() -> i64 {
    static OFFSET: LazyLock<i64> =
        LazyLock::new(|| env::var(TEST_OFFSET).map_or(0, |text| text.parse().expect("a number of milliseconds")));
    if cfg!(debug_assertions) { *OFFSET } else { 0 }
}
