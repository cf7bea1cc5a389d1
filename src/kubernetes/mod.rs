//! Kubernetes: what is registered, as headless Services and EndpointSlices, and back.
//!
//! The record of a service in the cluster is its EndpointSlices ([`slices`]); its headless
//! Service ([`services`]) gives them a name, and the older Endpoints object ([`endpoints`]) is
//! there for those who still read it. These parts are pure: objects in, objects out, without I/O,
//! clock or tasks, so that every rule of placement can be tested by itself.

pub mod endpoints;
pub mod names;
pub mod services;
pub mod slices;
