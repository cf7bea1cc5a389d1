//! Every metric, made once. Any module may import this one; it imports none.
//!
//! Names follow CoreDNS for DNS, etcd for gRPC; label values come from closed sets, never from an
//! error's text or from the wire.

mod connections;
pub mod dns;
mod grpc;
mod guard;
mod identity;
mod joining;
mod kubernetes;
mod labels;
mod lists;
mod mirror;
mod process;
mod registry;
mod store;
mod upstream;

use std::sync::Arc;

use prometheus_client::registry::Registry;

pub use connections::{CloseReason, ConnectionMetrics, HandshakeFailure, ListenerKind};
pub use dns::DnsMetrics;
pub use grpc::{GrpcMetrics, Method, RegistrationKind, RegistrationStatus, WatchEnd};
pub use guard::GaugeGuard;
pub use identity::{AuthenticationFailure, Decision, IdentityMetrics, QuotaKind, ReviewKind, ReviewResult};
pub use joining::{JoinResult, JoiningMetrics};
pub use kubernetes::{KubernetesMetrics, LeaseRole, RestartReason, Watched};
pub use labels::{EnumCounter, EnumFamily, EnumGauge, LabelEnum, LabelValues};
pub use lists::ListMetrics;
pub use mirror::{BlockedService, MirrorMetrics, RequestOutcome, Verb};
pub use registry::{CommandOutcome, HandOverResult, RefusalReason, RegistryMetrics};
pub use store::StoreMetrics;
pub use upstream::{LookupResult, NameState, UpstreamMetrics};

/// Every metric of the process.
#[derive(Debug)]
pub struct Metrics {
    /// TCP connections of every listener.
    pub connections: Arc<ConnectionMetrics>,
    /// The DNS listeners.
    pub dns: DnsMetrics,
    /// The gRPC listeners.
    pub grpc: GrpcMetrics,
    /// Identities and what they may do.
    pub identity: Arc<IdentityMetrics>,
    /// Machines that join.
    pub joining: Arc<JoiningMetrics>,
    /// Lists of everything, over gRPC and HTTP.
    pub lists: ListMetrics,
    /// The registry: registrations, instances, batches.
    pub registry: RegistryMetrics,
    /// The journal and its snapshots.
    pub store: StoreMetrics,
    /// The watches on Kubernetes.
    pub kubernetes: KubernetesMetrics,
    /// The Kubernetes mirror.
    pub mirror: MirrorMetrics,
    /// Lookups of instances that are names.
    pub upstream: UpstreamMetrics,
    all: Registry,
}

impl Metrics {
    /// Makes every metric and registers it.
    #[must_use]
    pub fn new() -> Self {
        let mut all = Registry::default();
        process::register(&mut all);
        Self {
            connections: Arc::new(ConnectionMetrics::register(&mut all)),
            dns: DnsMetrics::register(&mut all),
            grpc: GrpcMetrics::register(&mut all),
            identity: Arc::new(IdentityMetrics::register(&mut all)),
            joining: Arc::new(JoiningMetrics::register(&mut all)),
            lists: ListMetrics::register(&mut all),
            registry: RegistryMetrics::register(&mut all),
            store: StoreMetrics::register(&mut all),
            kubernetes: KubernetesMetrics::register(&mut all),
            mirror: MirrorMetrics::register(&mut all),
            upstream: UpstreamMetrics::register(&mut all),
            all,
        }
    }

    /// The registry of all of them, for the scrape.
    #[must_use]
    pub fn all(&self) -> &Registry {
        &self.all
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
