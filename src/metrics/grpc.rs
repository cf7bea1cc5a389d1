//! Metrics of the gRPC listeners, under the names that etcd and others use for theirs.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use super::labels::{EnumCounter, label_enum};

/// A method as labels. Every method that is not in [`Method::ALL`] is [`Method::UNKNOWN`], so that a client
/// cannot create series.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Method {
    grpc_type: &'static str,
    grpc_service: &'static str,
    grpc_method: &'static str,
}

impl Method {
    /// Every method that is served.
    pub const ALL: [Self; 14] = [
        Self::new("unary", "registry.ServiceRegistry", "Register"),
        Self::new("unary", "registry.ServiceRegistry", "UnRegister"),
        Self::new("bidi_stream", "registry.ServiceRegistry", "RegistrationEvent"),
        Self::new("unary", "gangplank.v1.Discovery", "GetService"),
        Self::new("unary", "gangplank.v1.Discovery", "GetNames"),
        Self::new("unary", "gangplank.v1.Discovery", "GetServicesByMethod"),
        Self::new("server_stream", "gangplank.v1.Discovery", "ListServices"),
        Self::new("server_stream", "gangplank.v1.Discovery", "Watch"),
        Self::new("unary", "gangplank.internal.v1.HandOver", "Send"),
        Self::new("unary", "gangplank.v1.Discovery", "GetReplica"),
        Self::new("unary", "grpc.health.v1.Health", "Check"),
        Self::new("server_stream", "grpc.health.v1.Health", "Watch"),
        Self::new("bidi_stream", "grpc.reflection.v1.ServerReflection", "ServerReflectionInfo"),
        Self::new("bidi_stream", "grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo"),
    ];

    /// Any other method.
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

label_enum! {
    /// The type of a registration message.
    pub enum RegistrationKind {
        /// REGISTER
        Register => "register",
        /// UNREGISTER
        Unregister => "unregister",
        /// Any other number.
        Other => "other",
    }
}

label_enum! {
    /// `status` of an answer to a registration or removal.
    pub enum RegistrationStatus {
        /// Already registered: the same, or updated.
        Ok => "200",
        /// A new instance.
        Created => "201",
        /// Durable and served, but not in Kubernetes yet.
        Accepted => "202",
        /// Removed.
        Removed => "204",
        /// A field is invalid.
        Invalid => "400",
        /// Registrations are not allowed in this namespace.
        Forbidden => "403",
        /// There is nothing to remove, or no such namespace.
        NotFound => "404",
        /// A Service of this name is not managed by the mirror.
        Conflict => "409",
        /// Try again later.
        Unavailable => "503",
        /// A quota of an identity or a namespace is used up.
        OverQuota => "429",
        /// The limit of instances is reached.
        Full => "507",
    }
}

label_enum! {
    /// The reason of a restart message.
    pub enum WatchEnd {
        /// More changes happened than are kept.
        SlowReader => "slow_reader",
        /// The cursor is not of this run.
        UnknownCursor => "unknown_cursor",
        /// The server stops.
        ShuttingDown => "shutting_down",
    }
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
    /// Bytes that are held for peers: unread frames, unanswered registrations, unread responses.
    pub buffered_bytes: Gauge,
    /// Times that a call or a connection found no memory left for it and waited.
    pub memory_waits: Counter,
    registrations: EnumCounter<(RegistrationKind, RegistrationStatus)>,
    watch_restarts: EnumCounter<WatchEnd>,
}

impl GrpcMetrics {
    /// Creates the metrics and adds them to `all`. Series of known methods start at 0.
    pub(super) fn register(all: &mut Registry) -> Self {
        let handled = Family::<Handled, Counter>::default();
        // 0.1 ms to 26 s.
        let handling =
            Family::<Method, Histogram>::new_with_constructor(|| Histogram::new(exponential_buckets(0.000_1, 4.0, 10)));
        // From the start: of a series that appears with its first call, `rate()` does not see that call.
        for method in Method::ALL {
            drop(handled.get_or_create(&Handled { method, grpc_code: "OK" }));
            drop(handling.get_or_create(&method));
        }
        all.register("grpc_server_handled", "Calls that ended, by method and status code", handled.clone());
        all.register("grpc_server_handling_seconds", "How long calls and streams lasted", handling.clone());

        let registrations = EnumCounter::register(
            all,
            "gangplank_registrations",
            ("type", "status"),
            "Registrations and removals answered, by status",
        );
        let watch_restarts = EnumCounter::register(
            all,
            "gangplank_grpc_watch_restarts",
            "reason",
            "Watches that were ended with a restart message, by reason",
        );
        let made = Self {
            handled,
            handling,
            streams: Gauge::default(),
            streams_rejected: Counter::default(),
            buffered_bytes: Gauge::default(),
            memory_waits: Counter::default(),
            registrations,
            watch_restarts,
        };
        all.register("gangplank_grpc_streams", "Calls and streams that are open", made.streams.clone());
        all.register(
            "gangplank_grpc_streams_rejected",
            "Calls turned away because too many were open",
            made.streams_rejected.clone(),
        );
        all.register(
            "gangplank_grpc_buffered_bytes",
            "Bytes held for gRPC peers: received and not read, not answered, and not taken",
            made.buffered_bytes.clone(),
        );
        all.register(
            "gangplank_grpc_memory_waits",
            "Times that a gRPC call or connection found no memory left for it and waited",
            made.memory_waits.clone(),
        );
        made
    }

    /// Counts a call that ended with `code`, as the gRPC libraries spell it (`OK`, `NotFound`).
    pub fn ended(&self, method: Method, code: &'static str, after: Duration) {
        self.handled.get_or_create(&Handled { method, grpc_code: code }).inc();
        self.handling.get_or_create(&method).observe(after.as_secs_f64());
    }

    /// Counts a watch that ends with a restart message.
    pub fn watch_restarted(&self, err: WatchEnd) {
        self.watch_restarts.at(err).inc();
    }

    /// Counts one answer to a registration or removal.
    pub fn registration(&self, kind: RegistrationKind, status: RegistrationStatus) {
        self.registrations.at((kind, status)).inc();
    }
}
