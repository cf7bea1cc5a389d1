//! Metrics of the lookups of instances that are registered by a DNS name.

use std::time::Duration;

use prometheus_client::{
    metrics::histogram::{Histogram, exponential_buckets},
    registry::Registry,
};

use super::labels::{EnumCounter, EnumGauge, label_enum};

label_enum! {
    /// How a lookup ended: one name, both families of addresses.
    pub enum LookupResult {
        /// Addresses, or the answer that there are none.
        Answered => "answered",
        /// The name does not exist.
        NxDomain => "nxdomain",
        /// One family of addresses or both could not be looked up, or may not be used.
        Failed => "failed",
    }
}

label_enum! {
    /// What is served for a name.
    pub enum NameState {
        /// The addresses of the last lookup.
        Current => "current",
        /// Addresses of an earlier lookup, because the last one failed.
        Stale => "stale",
        /// The name has no addresses, or does not exist.
        Absent => "absent",
        /// Unknown: never answered, not answered for too long, or refused.
        Unavailable => "unavailable",
    }
}

/// Lookups, and the names that are looked up.
#[derive(Debug)]
pub struct UpstreamMetrics {
    lookups: EnumCounter<LookupResult>,
    duration: Histogram,
    /// Names by what is served for them.
    pub names: EnumGauge<NameState>,
}

impl UpstreamMetrics {
    pub(super) fn register(all: &mut Registry) -> Self {
        let all = all.sub_registry_with_prefix("gangplank_upstream");
        // 1 ms to 16 s by twos.
        let duration = Histogram::new(exponential_buckets(0.001, 2.0, 15));
        all.register(
            "lookup_duration_seconds",
            "Time that the lookup of a name took, with every alias and every server that failed",
            duration.clone(),
        );
        Self {
            lookups: EnumCounter::register(all, "lookups", "result", "Lookups of names of instances, by result"),
            duration,
            names: EnumGauge::register(
                all,
                "names",
                "state",
                "Names of instances that are looked up, by what is served for them",
            ),
        }
    }

    /// Counts a lookup that has ended.
    pub fn observe(&self, result: LookupResult, took: Duration) {
        self.lookups.at(result).inc();
        self.duration.observe(took.as_secs_f64());
    }

    /// Lookups that ended so.
    pub fn lookups(&self, result: LookupResult) -> u64 {
        self.lookups.at(result).get()
    }
}
