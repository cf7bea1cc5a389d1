//! Metrics of the watches on Kubernetes.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// What is watched: the label `resource`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(non_camel_case_types, reason = "the label's values as they are written")]
pub enum Watched {
    /// Namespaces.
    namespaces,
    /// Services.
    services,
    /// EndpointSlices of ours.
    slices,
    /// EndpointSlices of others under a Service that external instances joined.
    joined,
}

/// Why a watch had to begin again: the label `reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(non_camel_case_types, reason = "the label's values as they are written")]
pub enum RestartReason {
    /// The API server does not know any more what happened since; everything is listed again.
    expired,
    /// The right to list or watch is missing, or the credentials are not accepted.
    forbidden,
    /// The API server answered something else than what was asked for.
    refused,
    /// No answer in time.
    silent,
    /// No connection, or it broke.
    unreachable,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RestartLabels {
    resource: Watched,
    reason: RestartReason,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResourceLabels {
    resource: Watched,
}

/// Metrics of the watches on Kubernetes.
#[derive(Debug)]
pub struct KubernetesMetrics {
    restarts: Family<RestartLabels, Counter>,
    lists: Family<ResourceLabels, Counter>,
    watching: Family<ResourceLabels, Gauge>,
    /// 1 once what Kubernetes holds was read for the first time.
    pub synced: Gauge,
    /// Endpoints of ours that could not be taken as they stand, or not at all.
    pub skipped_endpoints: Counter,
}

impl KubernetesMetrics {
    /// Makes them and adds them to `all`.
    pub(super) fn register(all: &mut Registry) -> Self {
        let metrics = Self {
            restarts: Family::default(),
            lists: Family::default(),
            watching: Family::default(),
            synced: Gauge::default(),
            skipped_endpoints: Counter::default(),
        };
        for resource in [Watched::namespaces, Watched::services, Watched::slices, Watched::joined] {
            let _ = metrics.lists.get_or_create(&ResourceLabels { resource });
            let _ = metrics.watching.get_or_create(&ResourceLabels { resource });
            for reason in [
                RestartReason::expired,
                RestartReason::forbidden,
                RestartReason::refused,
                RestartReason::silent,
                RestartReason::unreachable,
            ] {
                let _ = metrics.restarts.get_or_create(&RestartLabels { resource, reason });
            }
        }
        let kubernetes = all.sub_registry_with_prefix("gangplank_kubernetes");
        kubernetes.register(
            "watch_restarts",
            "Lists and watches that failed and were begun again, by reason",
            metrics.restarts.clone(),
        );
        kubernetes.register(
            "lists",
            "Complete lists: one at the start, and one whenever the API server lost track of a watch",
            metrics.lists.clone(),
        );
        kubernetes.register(
            "watches",
            "Watches that stand now: one each of namespaces, services and slices, and one per joined Service",
            metrics.watching.clone(),
        );
        kubernetes.register(
            "synced",
            "1 once everything that Kubernetes holds was read for the first time",
            metrics.synced.clone(),
        );
        kubernetes.register(
            "skipped_endpoints",
            "Endpoints in slices of gangplank that could not be taken as they stand; the log names them",
            metrics.skipped_endpoints.clone(),
        );
        metrics
    }

    /// Counts a list or watch that failed.
    pub fn restarted(&self, resource: Watched, reason: RestartReason) {
        self.restarts.get_or_create(&RestartLabels { resource, reason }).inc();
    }

    /// Counts a complete list.
    pub fn listed(&self, resource: Watched) {
        self.lists.get_or_create(&ResourceLabels { resource }).inc();
    }

    /// A watch stands, until the guard is dropped.
    #[must_use]
    pub fn watching(&self, resource: Watched) -> StandingWatch {
        let gauge = self.watching.get_or_create_owned(&ResourceLabels { resource });
        gauge.inc();
        StandingWatch(gauge)
    }
}

/// Counts as a watch that stands while it lives.
#[derive(Debug)]
pub struct StandingWatch(Gauge);

impl Drop for StandingWatch {
    fn drop(&mut self) {
        self.0.dec();
    }
}
