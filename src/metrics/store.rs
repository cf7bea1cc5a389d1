//! Metrics of the journal and its snapshots.

use prometheus_client::registry::Registry;

/// Metrics of the journal and its snapshots.
#[derive(Debug)]
pub struct StoreMetrics {}

impl StoreMetrics {
    /// Makes them and adds them to `all`.
    pub(super) fn register(_all: &mut Registry) -> Self {
        Self {}
    }
}
