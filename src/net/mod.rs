//! Connections of every TCP listener: one accept loop, one budget of descriptors, one limiter.
//!
//! 1. [`serve()`] is the only accept loop. The caller passes the future that serves a connection.
//! 2. [`DescriptorBudget`] splits the process' limit on open files among the listeners once, at the
//!    start. No listener can take a descriptor of another, nor one of the store.
//! 3. [`ConnectionLimiter`] keeps each kind of listener within its share. At the limit, the
//!    idlest connection of the peer with the most connections is closed for a new one.
//! 4. [`run_on_runtime`] gives a transport threads of its own, so that a flood of one does not delay
//!    the others.
//! 5. [`tls`] does the handshakes of the listeners that have a certificate.
//! 6. [`backoff`] says how long a client of another server waits before it tries again.
//!
//! Independent of protocols: transports import this module, and it imports `metrics` only.

mod accept;
pub mod backoff;
mod budget;
mod limiter;
mod runtime;
pub mod tls;

pub use accept::serve;
pub use budget::{ConnectionCaps, DescriptorBudget, raise_open_files_limit};
pub use limiter::{ConnectionHandle, ConnectionLimiter, EvictionPolicy, InUse, Permit, Signal, peer_group};
pub use runtime::{run_in_thread, run_on_runtime};
