//! What the tests share: the real binary as a child process, raw DNS and HTTP clients, and the
//! programs of others that are asked as well.
//!
//! Nothing here sleeps. Whoever waits, waits for a line, an answer or an exit, with [`PATIENCE`]
//! as the limit after which a test fails and says what it waited for.

pub(crate) mod dns;
pub(crate) mod http;
pub(crate) mod server;
pub(crate) mod tools;

use std::time::Duration;

/// How long a state may take to come before a test gives up. Long, because a busy machine is no
/// fault of the code; no test that passes ever waits this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
