//! Metrics of the Kubernetes mirror: requests to the API server, and how far behind it is.

use std::{fmt, sync::atomic::AtomicU64, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

/// What a request asks for, as the API server's own metrics and RBAC call it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verb {
    /// One object.
    Get,
    /// A collection.
    List,
    /// POST
    Create,
    /// PUT
    Update,
    /// DELETE
    Delete,
}

/// What came of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RequestOutcome {
    /// Done.
    Ok,
    /// 404
    NotFound,
    /// 409, 410: another writer was there before.
    Conflict,
    /// 401, 403
    Forbidden,
    /// 422 and other faults of the request: the server's rules or an admission policy.
    Invalid,
    /// 429, or another answer with `Retry-After`.
    Busy,
    /// 5xx
    ServerError,
    /// No answer.
    Unknown,
}

/// Why a service is not in Kubernetes as it should be, and cannot be for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blocked {
    /// Its namespace does not exist or is being deleted.
    Namespace,
    /// A Service of its name belongs to somebody else.
    ForeignService,
    /// The account lacks a right.
    Forbidden,
    /// The server does not take what is written.
    Invalid,
}

macro_rules! label_value {
    ($label:ty { $($value:ident => $text:literal),+ $(,)? }) => {
        impl $label {
            const ALL: [Self; [$($text),+].len()] = [$(Self::$value),+];
        }

        impl EncodeLabelValue for $label {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
                fmt::Write::write_str(encoder, match self { $(Self::$value => $text),+ })
            }
        }
    };
}

label_value!(Verb { Get => "get", List => "list", Create => "create", Update => "update", Delete => "delete" });
label_value!(RequestOutcome {
    Ok => "ok",
    NotFound => "not_found",
    Conflict => "conflict",
    Forbidden => "forbidden",
    Invalid => "invalid",
    Busy => "busy",
    ServerError => "server_error",
    Unknown => "unknown",
});
label_value!(Blocked {
    Namespace => "namespace",
    ForeignService => "foreign_service",
    Forbidden => "forbidden",
    Invalid => "invalid",
});

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    verb: Verb,
    outcome: RequestOutcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BlockedLabels {
    reason: Blocked,
}

/// The mirror's metrics.
#[derive(Debug)]
pub struct MirrorMetrics {
    requests: Family<RequestLabels, Counter>,
    request_seconds: Histogram,
    /// Services that are not in Kubernetes as they are here.
    pub behind: Gauge<u64, AtomicU64>,
    /// Age in seconds of the oldest change that Kubernetes does not have.
    pub lag_seconds: Gauge<f64, AtomicU64>,
    /// Services that wait for their turn, or for a second try.
    pub queue: Gauge<u64, AtomicU64>,
    blocked: Family<BlockedLabels, Gauge>,
    /// Objects of ours that another hand had changed and that were put right.
    pub repaired: Counter,
}

impl MirrorMetrics {
    pub(super) fn register(all: &mut Registry) -> Self {
        let all = all.sub_registry_with_prefix("gangplank_mirror");
        let requests = Family::default();
        let blocked = Family::default();
        // All of them, so that a series exists at 0 before its first event.
        for verb in Verb::ALL {
            for outcome in RequestOutcome::ALL {
                requests.get_or_create_owned(&RequestLabels { verb, outcome });
            }
        }
        for reason in Blocked::ALL {
            blocked.get_or_create_owned(&BlockedLabels { reason });
        }
        let metrics = Self {
            requests,
            // 1 ms … 8 s: the API server answers in milliseconds and is given ten seconds.
            request_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 14)),
            behind: Gauge::default(),
            lag_seconds: Gauge::default(),
            queue: Gauge::default(),
            blocked,
            repaired: Counter::default(),
        };
        all.register("requests", "Requests to the API server, by verb and outcome", metrics.requests.clone());
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
            "services_blocked",
            "Services that cannot be mirrored for now, by reason",
            metrics.blocked.clone(),
        );
        all.register(
            "repairs",
            "Objects that another hand had changed and that were put right",
            metrics.repaired.clone(),
        );
        metrics
    }

    /// Counts a request and how long it took.
    pub fn request(&self, verb: Verb, outcome: RequestOutcome, took: Duration) {
        self.requests.get_or_create(&RequestLabels { verb, outcome }).inc();
        self.request_seconds.observe(took.as_secs_f64());
    }

    /// One more service is blocked, or one fewer.
    pub fn blocked(&self, reason: Blocked, more: bool) {
        let gauge = self.blocked.get_or_create(&BlockedLabels { reason });
        if more {
            gauge.inc()
        } else {
            gauge.dec()
        };
    }
}
