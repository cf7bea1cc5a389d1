//! Connections of every TCP listener: one accept loop, one budget of descriptors, one way to make
//! room.
//!
//! 1. [`serve()`] is the only accept loop. What a connection does is a future of the caller.
//! 2. [`DescriptorBudget`] splits the process' limit on open files among the listeners once, at the
//!    start. No listener can take a descriptor of another, nor one of the store.
//! 3. [`ConnectionLimiter`] keeps each kind of listener within its share. When the share is used up
//!    the idlest connection of the peer that has most is closed for a new one.
//! 4. [`run_on_runtime`] gives a transport threads of its own, so that a flood of one does not delay
//!    the others.
//!
//! A leaf: transports import it, it imports `metrics` only and knows no protocol.

mod accept;
mod budget;
mod limiter;
mod runtime;

pub use accept::serve;
pub use budget::{ConnectionCaps, DescriptorBudget, raise_open_files_limit};
pub use limiter::{ConnectionHandle, ConnectionLimiter, EvictionPolicy, InUse, Permit, Signal};
pub use runtime::{run_in_thread, run_on_runtime};
