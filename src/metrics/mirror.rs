//! Metrics of the Kubernetes mirror: requests to the API server, and how far behind it is.

use std::{sync::atomic::AtomicU64, time::Duration};

use prometheus_client::{
    metrics::{
        counter::Counter,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use super::labels::{EnumCounter, EnumGauge, label_enum};

label_enum! {
    /// What a request asks for, as the API server's own metrics and RBAC call it.
    pub enum Verb {
        /// One object.
        Get => "get",
        /// A collection.
        List => "list",
        /// POST
        Create => "create",
        /// PUT
        Update => "update",
        /// DELETE
        Delete => "delete",
    }
}

label_enum! {
    /// How a request to the API server ended: the label `outcome`.
    pub enum RequestOutcome {
        /// Done.
        Ok => "ok",
        /// 404
        NotFound => "not_found",
        /// 409, 410: another writer was there before.
        Conflict => "conflict",
        /// 401, 403
        Forbidden => "forbidden",
        /// 422 and other faults of the request: the server's rules or an admission policy.
        Invalid => "invalid",
        /// 500 because an admission webhook failed.
        WebhookFailed => "webhook_failed",
        /// 429, or another answer with `Retry-After`.
        Busy => "busy",
        /// 5xx
        ServerError => "server_error",
        /// No answer.
        Unknown => "unknown",
    }
}

label_enum! {
    /// Why a service cannot be mirrored now.
    pub enum BlockedService {
        /// Its namespace does not exist or is being deleted.
        Namespace => "namespace",
        /// A Service of its name is not managed by the mirror.
        ForeignService => "foreign_service",
        /// The account lacks a right.
        Forbidden => "forbidden",
        /// The API server refuses the object.
        Invalid => "invalid",
        /// An admission webhook fails, and its failurePolicy is Fail.
        Webhook => "webhook",
    }
}

/// Metrics of what is written to Kubernetes: requests, how far they are behind, and what is blocked.
#[derive(Debug)]
pub struct MirrorMetrics {
    requests: EnumCounter<(Verb, RequestOutcome)>,
    request_seconds: Histogram,
    /// Services whose latest change is not in Kubernetes.
    pub behind: Gauge<u64, AtomicU64>,
    /// Age in seconds of the oldest change that Kubernetes does not have.
    pub lag_seconds: Gauge<f64, AtomicU64>,
    /// Services in the work queue, including those in backoff.
    pub queue: Gauge<u64, AtomicU64>,
    blocked: EnumGauge<BlockedService>,
    /// External changes of managed objects that were reverted.
    pub repaired: Counter,
}

impl MirrorMetrics {
    pub(super) fn register(all: &mut Registry) -> Self {
        let all = all.sub_registry_with_prefix("gangplank_mirror");
        let metrics = Self {
            requests: EnumCounter::register(
                all,
                "requests",
                ("verb", "outcome"),
                "Requests to the API server, by verb and outcome",
            ),
            // 1 ms … 8 s: the API server answers in milliseconds and is given ten seconds.
            request_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 14)),
            behind: Gauge::default(),
            lag_seconds: Gauge::default(),
            queue: Gauge::default(),
            blocked: EnumGauge::register(
                all,
                "services_blocked",
                "reason",
                "Services that cannot be mirrored for now, by reason",
            ),
            repaired: Counter::default(),
        };
        all.register_with_unit(
            "request_duration",
            "How long the API server took to answer",
            Unit::Seconds,
            metrics.request_seconds.clone(),
        );
        all.register("services_behind", "Services that are not in Kubernetes as they are here", metrics.behind.clone());
        all.register_with_unit(
            "lag",
            "Age of the oldest change that Kubernetes does not have",
            Unit::Seconds,
            metrics.lag_seconds.clone(),
        );
        all.register("queue_length", "Services that wait for their turn or for a second try", metrics.queue.clone());
        all.register(
            "repairs",
            "External changes of objects of gangplank that were reverted",
            metrics.repaired.clone(),
        );
        metrics
    }

    /// Counts a request and how long it took.
    pub fn request(&self, verb: Verb, outcome: RequestOutcome, took: Duration) {
        self.requests.at((verb, outcome)).inc();
        self.request_seconds.observe(took.as_secs_f64());
    }

    /// Services that are blocked for this reason.
    #[must_use]
    pub fn blocked_services(&self, reason: BlockedService) -> u64 {
        self.blocked.at(reason).get()
    }

    /// One more service is blocked, or one fewer.
    pub fn blocked(&self, reason: BlockedService, more: bool) {
        let gauge = self.blocked.at(reason);
        if more {
            gauge.inc()
        } else {
            gauge.dec()
        };
    }
}
