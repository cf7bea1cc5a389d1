//! Metrics of the watches on Kubernetes.

use std::{sync::atomic::AtomicU64, time::Duration};

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::{Registry, Unit},
};

use super::{
    guard::GaugeGuard,
    labels::{EnumCounter, EnumGauge, LabelEnum as _, label_enum},
};

label_enum! {
    /// What is watched: the label `resource`.
    pub enum Watched {
        /// Namespaces.
        Namespaces => "namespaces",
        /// Services.
        Services => "services",
        /// Managed EndpointSlices.
        Slices => "slices",
        /// EndpointSlices of others under a Service that external instances joined.
        Joined => "joined",
        /// Ranges of the cluster's Services.
        ServiceCidrs => "servicecidrs",
        /// Managed Endpoints objects.
        Endpoints => "endpoints",
        /// Secrets of a CA of gangplank's own, its tokens and its registrants.
        Secrets => "secrets",
    }
}

label_enum! {
    /// Why a watch had to begin again: the label `reason`.
    pub enum RestartReason {
        /// The API server no longer has the changes since the last one seen; everything is listed again.
        Expired => "expired",
        /// The right to list or watch is missing, or the credentials are not accepted.
        Forbidden => "forbidden",
        /// The API server answered something else than what was asked for.
        Refused => "refused",
        /// No answer in time.
        Silent => "silent",
        /// No connection, or it broke.
        Unreachable => "unreachable",
    }
}

label_enum! {
    /// What this process is to the Lease `gangplank-writer`: the label `role`.
    pub enum LeaseRole {
        /// Another process holds the Lease, or none does yet.
        Standby => "standby",
        /// This process holds the Lease and reads the slices.
        TakingOver => "taking_over",
        /// This process holds the Lease and writes.
        Writer => "writer",
    }
}

/// Metrics of the watches on Kubernetes, and of the Lease.
#[derive(Debug)]
pub struct KubernetesMetrics {
    restarts: EnumCounter<(Watched, RestartReason)>,
    lists: EnumCounter<Watched>,
    watching: EnumGauge<Watched>,
    lease_role: EnumGauge<LeaseRole>,
    lease_term: Gauge,
    lease_age: Gauge<f64, AtomicU64>,
    watch_age: Gauge<f64, AtomicU64>,
    /// 1 once what Kubernetes holds was read for the first time.
    pub synced: Gauge,
    /// Endpoints in our slices that are invalid.
    pub skipped_endpoints: Counter,
}

impl KubernetesMetrics {
    pub(super) fn register(all: &mut Registry) -> Self {
        let kubernetes = all.sub_registry_with_prefix("gangplank_kubernetes");
        let metrics = Self {
            restarts: EnumCounter::register(
                kubernetes,
                "watch_restarts",
                ("resource", "reason"),
                "Lists and watches that failed and were begun again, by reason",
            ),
            lists: EnumCounter::register(
                kubernetes,
                "lists",
                "resource",
                "Complete lists: one at the start, and one whenever the API server lost track of a watch",
            ),
            watching: EnumGauge::register(
                kubernetes,
                "watches",
                "resource",
                "Open watches: one for each resource while it is watched",
            ),
            lease_role: EnumGauge::register(
                kubernetes,
                "lease_role",
                "role",
                "1 for what this process is to the Lease gangplank-writer",
            ),
            lease_term: Gauge::default(),
            lease_age: Gauge::default(),
            watch_age: Gauge::default(),
            synced: Gauge::default(),
            skipped_endpoints: Counter::default(),
        };
        kubernetes.register("lease_term", "The highest term that this process has seen", metrics.lease_term.clone());
        kubernetes.register_with_unit(
            "lease_age",
            "Time since the Lease was renewed, by this process or as it has seen it; 0 before",
            Unit::Seconds,
            metrics.lease_age.clone(),
        );
        kubernetes.register_with_unit(
            "watch_age",
            "Time since this process, on standby, certainly had everything that the writer has written to Kubernetes; 0 if it \
             writes",
            Unit::Seconds,
            metrics.watch_age.clone(),
        );
        kubernetes.register(
            "synced",
            "1 once everything that Kubernetes holds was read for the first time",
            metrics.synced.clone(),
        );
        kubernetes.register(
            "skipped_endpoints",
            "Endpoints in slices of gangplank that are invalid; the log names them",
            metrics.skipped_endpoints.clone(),
        );
        metrics
    }

    /// Counts a list or watch that failed.
    pub fn restarted(&self, resource: Watched, reason: RestartReason) {
        self.restarts.at((resource, reason)).inc();
    }

    /// Notes what this process is to the Lease, and the highest term that it has seen.
    pub fn lease(&self, role: LeaseRole, term: u64) {
        // All of them: exactly one is 1, also after a change.
        for &other in LeaseRole::ALL {
            self.lease_role.at(other).set(u64::from(other == role));
        }
        self.lease_term.set(i64::try_from(term).unwrap_or(i64::MAX));
    }

    /// Sets the ages, for a scrape.
    pub fn set_ages(&self, watch: Option<Duration>, lease: Option<Duration>) {
        self.watch_age.set(watch.unwrap_or_default().as_secs_f64());
        self.lease_age.set(lease.unwrap_or_default().as_secs_f64());
    }

    /// Counts a complete list.
    pub fn listed(&self, resource: Watched) {
        self.lists.at(resource).inc();
    }

    /// Counts an open watch until the guard is dropped.
    #[must_use]
    pub fn watching(&self, resource: Watched) -> GaugeGuard {
        GaugeGuard::new(self.watching.at(resource))
    }
}
