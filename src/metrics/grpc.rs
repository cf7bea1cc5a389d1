//! Metrics of the gRPC listeners, under the names that etcd and others use for theirs.

use std::{fmt, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// A method as metrics name it. Whatever is not in [`Method::ALL`] is [`Method::UNKNOWN`], so that
/// a client cannot make label values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Method {
    grpc_type: &'static str,
    grpc_service: &'static str,
    grpc_method: &'static str,
}

impl Method {
    /// Every method that is served.
    pub const ALL: [Self; 11] = [
        Self::new("unary", "registry.ServiceRegistry", "Register"),
        Self::new("unary", "registry.ServiceRegistry", "UnRegister"),
        Self::new("bidi_stream", "registry.ServiceRegistry", "RegistrationEvent"),
        Self::new("unary", "gangplank.v1.Discovery", "GetService"),
        Self::new("unary", "gangplank.v1.Discovery", "GetServicesByMethod"),
        Self::new("server_stream", "gangplank.v1.Discovery", "ListServices"),
        Self::new("server_stream", "gangplank.v1.Discovery", "Watch"),
        Self::new("unary", "grpc.health.v1.Health", "Check"),
        Self::new("server_stream", "grpc.health.v1.Health", "Watch"),
        Self::new("bidi_stream", "grpc.reflection.v1.ServerReflection", "ServerReflectionInfo"),
        Self::new("bidi_stream", "grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo"),
    ];

    /// What is not served.
    pub const UNKNOWN: Self = Self::new("unknown", "unknown", "unknown");

    const fn new(grpc_type: &'static str, grpc_service: &'static str, grpc_method: &'static str) -> Self {
        Self { grpc_type, grpc_service, grpc_method }
    }

    /// The method of a request to `path`, as HTTP/2 carries it: `/service/method`.
    #[must_use]
    pub fn of(path: &str) -> Self {
        let named = path.strip_prefix('/').and_then(|path| path.split_once('/'));
        let known = |(service, method): (&str, &str)| {
            Self::ALL.into_iter().find(|known| known.grpc_service == service && known.grpc_method == method)
        };
        named.and_then(known).unwrap_or(Self::UNKNOWN)
    }
}

/// What a registration asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RegistrationKind {
    /// REGISTER
    Register,
    /// UNREGISTER
    Unregister,
    /// Any other number.
    Other,
}

impl EncodeLabelValue for RegistrationKind {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        match self {
            Self::Register => "register",
            Self::Unregister => "unregister",
            Self::Other => "other",
        }
        .encode(encoder)
    }
}

/// Why a watch was told to begin again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WatchEnd {
    /// More changes happened than are kept.
    SlowReader,
    /// The cursor is none of this run.
    UnknownCursor,
    /// The server stops.
    ShuttingDown,
}

impl EncodeLabelValue for WatchEnd {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        match self {
            Self::SlowReader => "slow_reader",
            Self::UnknownCursor => "unknown_cursor",
            Self::ShuttingDown => "shutting_down",
        }
        .encode(encoder)
    }
}

/// In the order of their discriminants.
const WATCH_ENDS: [WatchEnd; 3] = [WatchEnd::SlowReader, WatchEnd::UnknownCursor, WatchEnd::ShuttingDown];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Restarted {
    reason: WatchEnd,
}

/// Statuses that answers have, in order.
const STATUSES: [u32; 7] = [200, 201, 204, 400, 404, 503, 507];

const KINDS: [RegistrationKind; 3] =
    [RegistrationKind::Register, RegistrationKind::Unregister, RegistrationKind::Other];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    r#type: RegistrationKind,
    status: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Handled {
    #[prometheus(flatten)]
    method: Method,
    grpc_code: &'static str,
}

/// Metrics of the gRPC listeners.
#[derive(Debug)]
pub struct GrpcMetrics {
    handled: Family<Handled, Counter>,
    handling: Family<Method, Histogram>,
    /// Calls that are open: unary, and streams.
    pub streams: Gauge,
    /// Calls turned away because too many were open.
    pub streams_rejected: Counter,
    /// Connections that are open.
    pub connections: Gauge,
    /// Times that a connection could not be accepted.
    pub accept_errors: Counter,
    /// By kind and status, in the order of [`KINDS`] and [`STATUSES`].
    registrations: [[Counter; STATUSES.len()]; KINDS.len()],
    /// By reason, in the order of [`WATCH_ENDS`].
    watch_restarts: [Counter; WATCH_ENDS.len()],
}

impl GrpcMetrics {
    /// Makes them and adds them to `all`.
    pub(super) fn register(all: &mut Registry) -> Self {
        let handled = Family::<Handled, Counter>::default();
        // 0.1 ms to 26 s.
        let handling =
            Family::<Method, Histogram>::new_with_constructor(|| Histogram::new(exponential_buckets(0.000_1, 4.0, 10)));
        for method in Method::ALL {
            drop(handled.get_or_create(&Handled { method, grpc_code: "OK" }));
            drop(handling.get_or_create(&method));
        }
        all.register("grpc_server_handled", "Calls that ended, by method and status code", handled.clone());
        all.register("grpc_server_handling_seconds", "How long calls and streams lasted", handling.clone());

        let registrations = Family::<Answered, Counter>::default();
        let answered = |r#type, status| registrations.get_or_create(&Answered { r#type, status }).clone();
        let restarts = Family::<Restarted, Counter>::default();
        let made = Self {
            handled,
            handling,
            streams: Gauge::default(),
            streams_rejected: Counter::default(),
            connections: Gauge::default(),
            accept_errors: Counter::default(),
            registrations: KINDS.map(|kind| STATUSES.map(|status| answered(kind, status))),
            watch_restarts: WATCH_ENDS.map(|reason| restarts.get_or_create(&Restarted { reason }).clone()),
        };
        all.register("gangplank_grpc_streams", "Calls and streams that are open", made.streams.clone());
        all.register(
            "gangplank_grpc_streams_rejected",
            "Calls turned away because too many were open",
            made.streams_rejected.clone(),
        );
        all.register("gangplank_grpc_connections", "gRPC connections that are open", made.connections.clone());
        all.register(
            "gangplank_grpc_accept_errors",
            "Times that a gRPC connection could not be accepted",
            made.accept_errors.clone(),
        );
        all.register("gangplank_registrations", "Registrations and removals answered, by status", registrations);
        all.register("gangplank_grpc_watch_restarts", "Watches told to begin again, by reason", restarts);
        made
    }

    /// Counts a call that ended with `code`, as the gRPC libraries spell it (`OK`, `NotFound`).
    pub fn ended(&self, method: Method, code: &'static str, after: Duration) {
        self.handled.get_or_create(&Handled { method, grpc_code: code }).inc();
        self.handling.get_or_create(&method).observe(after.as_secs_f64());
    }

    /// Counts a watch that is told to begin again.
    pub fn watch_restarted(&self, err: WatchEnd) {
        self.watch_restarts[err as usize].inc();
    }

    /// Counts one answer to a registration or removal.
    pub fn registration(&self, kind: RegistrationKind, status: u32) {
        let row = &self.registrations[kind as usize];
        if let Some(at) = STATUSES.iter().position(|known| *known == status) {
            row[at].inc();
        }
    }
}
