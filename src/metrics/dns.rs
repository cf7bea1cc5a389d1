//! Metrics of the DNS listeners.

use prometheus_client::registry::Registry;

/// Metrics of the DNS listeners.
#[derive(Debug)]
pub struct DnsMetrics {}

impl DnsMetrics {
    /// Makes them and adds them to `all`.
    pub(super) fn register(_all: &mut Registry) -> Self {
        Self {}
    }
}
