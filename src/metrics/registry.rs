//! Metrics of the registry.

use prometheus_client::registry::Registry;

/// Metrics of the registry.
#[derive(Debug)]
pub struct RegistryMetrics {}

impl RegistryMetrics {
    /// Makes them and adds them to `all`.
    pub(super) fn register(_all: &mut Registry) -> Self {
        Self {}
    }
}
