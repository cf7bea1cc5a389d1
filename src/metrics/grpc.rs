//! Metrics of the gRPC listeners.

use prometheus_client::registry::Registry;

/// Metrics of the gRPC listeners.
#[derive(Debug)]
pub struct GrpcMetrics {}

impl GrpcMetrics {
    /// Makes them and adds them to `all`.
    pub(super) fn register(_all: &mut Registry) -> Self {
        Self {}
    }
}
