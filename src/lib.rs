//! gangplank: DNS inside Kubernetes for services that live outside it.

pub mod admin;
pub mod cli;
pub mod dns;
pub mod grpc;
pub mod metrics;
pub mod model;
pub mod registry;
pub mod store;
pub mod zone;
