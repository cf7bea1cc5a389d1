//! Metrics of lists: responses with all registered services.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};

/// Metrics of lists, over gRPC and HTTP together.
#[derive(Debug, Default)]
pub struct ListMetrics {
    /// Lists that are being sent.
    pub open: Gauge<u64, AtomicU64>,
    /// Lists that wait for a permit.
    pub queued: Gauge<u64, AtomicU64>,
    /// Lists that were refused, because the queue was full or the wait too long.
    pub rejected: Counter,
    /// Times that the catalog was copied and sorted. Lists that begin together share one copy.
    pub snapshots: Counter,
}

impl ListMetrics {
    pub(super) fn register(all: &mut Registry) -> Self {
        let made = Self::default();
        all.register("gangplank_lists", "Lists of services that are being sent", made.open.clone());
        all.register("gangplank_lists_queued", "Lists of services that wait for their turn", made.queued.clone());
        all.register(
            "gangplank_lists_rejected",
            "Lists of services that were refused because too many were asked for at once",
            made.rejected.clone(),
        );
        all.register(
            "gangplank_list_snapshots",
            "Times that everything registered was copied and sorted for lists",
            made.snapshots.clone(),
        );
        made
    }
}
