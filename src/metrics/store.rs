//! Metrics of the journal and its snapshots.

use prometheus_client::{
    metrics::{
        counter::Counter,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use super::labels::{EnumCounter, label_enum};

label_enum! {
    enum CompactionResult {
        Succeeded => "ok",
        Failed => "failed",
    }
}

/// Metrics of the journal and its snapshots.
#[derive(Debug)]
pub struct StoreMetrics {
    /// How long the sync of a batch took.
    pub sync_seconds: Histogram,
    /// How long a compaction took, in the background.
    pub compaction_seconds: Histogram,
    /// Bytes in all segments of the journal.
    pub journal_bytes: Gauge,
    /// Bytes in the snapshot.
    pub snapshot_bytes: Gauge,
    /// Bytes written to the journal.
    pub journal_written_bytes: Counter,
    /// Bytes written to snapshots.
    pub snapshot_written_bytes: Counter,
    compactions: EnumCounter<CompactionResult>,
    /// 1 when nothing is acknowledged any more.
    pub failed: Gauge,
}

impl StoreMetrics {
    pub(super) fn register(all: &mut Registry) -> Self {
        let store = all.sub_registry_with_prefix("gangplank_store");
        let metrics = Self {
            // 50 µs (a fast SSD) to 1.6 s (a disk in trouble).
            sync_seconds: Histogram::new(exponential_buckets(50e-6, 2.0, 16)),
            // 10 ms to 5 min.
            compaction_seconds: Histogram::new(exponential_buckets(0.01, 2.0, 16)),
            journal_bytes: Gauge::default(),
            snapshot_bytes: Gauge::default(),
            journal_written_bytes: Counter::default(),
            snapshot_written_bytes: Counter::default(),
            compactions: EnumCounter::register(
                store,
                "compactions",
                "result",
                "Compactions by result; a failed one is tried again at the next segment and costs only disk space",
            ),
            failed: Gauge::default(),
        };
        store.register_with_unit(
            "sync",
            "Time to sync one batch of registrations to the disk",
            Unit::Seconds,
            metrics.sync_seconds.clone(),
        );
        store.register_with_unit(
            "compaction",
            "Time to merge journal and snapshot into a new snapshot, in the background",
            Unit::Seconds,
            metrics.compaction_seconds.clone(),
        );
        store.register_with_unit(
            "journal",
            "Size of the journal, all segments",
            Unit::Bytes,
            metrics.journal_bytes.clone(),
        );
        store.register_with_unit("snapshot", "Size of the snapshot", Unit::Bytes, metrics.snapshot_bytes.clone());
        store.register_with_unit(
            "journal_written",
            "Written to the journal since the start",
            Unit::Bytes,
            metrics.journal_written_bytes.clone(),
        );
        store.register_with_unit(
            "snapshot_written",
            "Written to snapshots since the start",
            Unit::Bytes,
            metrics.snapshot_written_bytes.clone(),
        );
        store.register(
            "failed",
            "1 after a failed write or sync: nothing is acknowledged until a restart",
            metrics.failed.clone(),
        );
        metrics
    }

    /// Counts a compaction that left a new snapshot, or one that failed and changed nothing.
    pub fn compacted(&self, ok: bool) {
        let result = if ok { CompactionResult::Succeeded } else { CompactionResult::Failed };
        self.compactions.at(result).inc();
    }

    /// Compactions that succeeded, and that failed.
    #[cfg(test)]
    pub(crate) fn compactions_counted(&self) -> (u64, u64) {
        (self.compactions.at(CompactionResult::Succeeded).get(), self.compactions.at(CompactionResult::Failed).get())
    }
}
