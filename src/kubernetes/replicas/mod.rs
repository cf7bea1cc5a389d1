//! Which process writes: the Lease `gangplank-writer`, by the protocol of [`crate::replicas`].
//!
//! One process at a time holds the Lease. Only then it accepts registrations and writes; every other one is
//! on standby, and follows. A process that loses the Lease while it writes follows, too, and goes on answering DNS: what it
//! has not written yet is in its journal, and is handed over to the process that writes (`grpc::hand_over`).
//!
//! * `lease`: the object, and requests for it.
//! * `elector`: the task that drives the pure state machine.
//! * `turns`: what that task and the one that writes say to each other.
//! * `take_over_limit`: how long a take-over may take.
//! * `drain`: how long a process that stops keeps the Lease.
//! * `release`: gives the Lease up, although answers get lost.
//! * `lease_watch`: tells a process on standby that the Lease changed, ahead of its next reading.
//! * `service_slices`: the EndpointSlices that lead registrants to the writer.
//! * `writer_events`: an Event on the Lease when another process begins to write.
//!
//! The `Fence` of `api` is what it tells those who write: they ask before they write and before they confirm.

mod drain;
mod elector;
mod lease;
mod lease_watch;
mod log;
mod release;
mod service_slices;
mod take_over_limit;
mod turns;
mod writer_events;

pub(super) use self::{
    elector::Elector,
    lease::LeaseClient,
    service_slices::ServiceSlices,
    turns::{ElectorHandle, ReplicaHandle, Turn},
    writer_events::WriterEvents,
};
