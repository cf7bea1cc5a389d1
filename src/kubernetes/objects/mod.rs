//! The Kubernetes objects that gangplank writes and reads, as pure functions: objects in, objects
//! out, without I/O, clock or tasks, so that every rule of placement can be unit-tested.
//!
//! The record of a service in the cluster is its EndpointSlices ([`slices`]); its headless Service
//! ([`services`]) owns them and names them, and the older Endpoints object ([`endpoints`]) is there for
//! clients that still read it. [`names`] has the labels and annotations of all three.

pub mod endpoints;
pub mod names;
pub mod services;
pub mod slices;
