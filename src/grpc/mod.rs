//! gRPC: the registrants' service, the readers' service, health and reflection, and what processes of one gangplank
//! say to each other.
//!
//! `tonic` and protobuf types stay inside this module: `convert` converts each message once, and the
//! registry gets model types.

mod authentication;
mod call_limiter;
mod call_tracker;
mod caller;
pub mod client;
mod codec;
mod convert;
mod discovery_service;
mod handover;
mod incoming;
mod joining;
mod memory;
mod metered;
mod metered_request;
mod preface;
mod registry_service;
mod writer_hint;

use std::{io, sync::Arc, time::Duration};

use futures::future;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::{
    service::{Routes, interceptor::InterceptedService},
    transport::Server,
};
use tonic_health::{ServingStatus, server::HealthReporter};

pub use self::handover::hand_over;
use self::{
    authentication::AuthenticatedRoutes,
    call_tracker::TrackedRoutes,
    discovery_service::DiscoveryService,
    handover::{HandOverLimiter, HandOverService},
    incoming::{AcceptedConnection, Lifetime},
    joining::{JoiningService, RegistrantsService},
    memory::MemoryBudget,
    proto::{
        gangplank::{
            internal::v1::hand_over_server::HandOverServer,
            join::v1::{joining_server::JoiningServer, registrants_server::RegistrantsServer},
            v1::discovery_server::DiscoveryServer,
        },
        registry::service_registry_server::ServiceRegistryServer,
    },
    registry_service::RegistryService,
};
use crate::{
    metrics::{ListenerKind, Metrics},
    model::Validator,
    net::{self, ConnectionLimiter, EvictionPolicy},
    registry::{Phase, RegistryHandle, Status},
    security::{ListenerSecurity, Security},
};

/// Code generated from `proto/`.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub mod proto {
    /// Package `registry`.
    pub mod registry {
        tonic::include_proto!("registry");
    }
    /// Package `gangplank`.
    pub mod gangplank {
        /// Package `gangplank.v1`.
        pub mod v1 {
            tonic::include_proto!("gangplank.v1");
        }
        /// Packages for joining.
        pub mod join {
            /// Package `gangplank.join.v1`.
            pub mod v1 {
                tonic::include_proto!("gangplank.join.v1");
            }
        }
        /// Packages for processes of one gangplank. They may change with any version.
        pub mod internal {
            /// Package `gangplank.internal.v1`.
            pub mod v1 {
                tonic::include_proto!("gangplank.internal.v1");
            }
        }
    }
    /// The encoded descriptors of all, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}

/// The context that the gRPC services share.
#[derive(Debug, Clone)]
pub struct ServerContext {
    /// Receives changes, and serves readers.
    pub registry: RegistryHandle,
    /// Parses and checks registrations.
    pub validator: Validator,
    /// The metrics of the process.
    pub metrics: Arc<Metrics>,
    /// Who may call, and do what.
    pub security: Arc<Security>,
}

/// Limits on connections; configurable.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionLimits {
    /// Open connections. At the limit, the idlest connection without a call is closed for a new one.
    pub connections: usize,
    /// A connection without a call is closed after this long.
    pub idle: Duration,
    /// A connection takes no new calls after about this long; open streams continue.
    pub max_age: Duration,
}

/// Limits that are not configurable; tests lower them.
#[derive(Debug, Clone, Copy)]
struct ServerLimits {
    /// Open calls and streams on all listeners together. At the limit, a new call is answered with
    /// RESOURCE_EXHAUSTED.
    calls: usize,
    /// How long a peer may take to send the preface of HTTP/2; no other timeout applies before.
    handshake: Duration,
    /// How long clients may take to read their last responses after the stop; then connections are closed.
    grace: Duration,
    /// Memory that peers may take.
    memory: memory::MemoryLimits,
}

const LIMITS: ServerLimits = ServerLimits {
    calls: 12_000,
    handshake: Duration::from_secs(5),
    grace: Duration::from_secs(5),
    memory: memory::LIMITS,
};

/// Open calls and streams on one connection (SETTINGS_MAX_CONCURRENT_STREAMS); with more, the client
/// waits or opens another connection.
const MAX_CALLS_PER_CONNECTION: u32 = 200;

/// Most bytes of one message from a client: a registration has a few hundred.
const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// Most bytes of a call's headers.
const MAX_HEADER_LIST_BYTES: u32 = 16 * 1024;

/// Bytes that a client may send on one stream before they are read: some 400 registrations.
///
/// The two windows are chosen together. h2 treats many small unread DATA frames as an attack: each
/// frame counts as 256 bytes minus its length, and when the sum reaches half of the connection's
/// window, h2 closes the connection with ENHANCE_YOUR_CALM, "too_many_data_frames". A registrant that
/// pipelines sends such frames, of 40 bytes and more. A slow registry must delay its clients, not
/// disconnect them. With these windows, all [`MAX_CALLS_PER_CONNECTION`] streams can be full of
/// registrations without reaching that sum.
const STREAM_WINDOW: u32 = 32 * 1024;

/// Bytes that a client may send on all streams of one connection before they are read. This window
/// never fills, because the unread bytes are bounded by the calls times [`STREAM_WINDOW`].
const CONNECTION_WINDOW: u32 = 64 * 1024 * 1024;

/// A connection without traffic is probed with a PING after this long, and closed after
/// [`KEEPALIVE_TIMEOUT`] without an answer. This detects half-open peers, such as a machine that lost
/// power.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Names in the health service: each service, and the server as a whole (the empty name).
const HEALTH_SERVICES: [&str; 3] = ["", "registry.ServiceRegistry", "gangplank.v1.Discovery"];

/// Serves on every listener until `stop`. Then the messages that were read are answered, and streams end.
///
/// # Errors
/// The first listener that fails stops all.
pub async fn run(
    listeners: Vec<(TcpListener, ListenerSecurity)>,
    context: ServerContext,
    connections: ConnectionLimits,
    stop: CancellationToken,
) -> io::Result<()> {
    serve(listeners, context, connections, LIMITS, stop).await
}

async fn serve(
    listeners: Vec<(TcpListener, ListenerSecurity)>,
    context: ServerContext,
    ConnectionLimits { connections, idle, max_age }: ConnectionLimits,
    limits: ServerLimits,
    stop: CancellationToken,
) -> io::Result<()> {
    let (routes, health) = routes(&context, &stop)?;
    // tonic-health reports SERVING from its creation, which no client may see.
    set_health(&health, ServingStatus::NotServing).await;
    let security = Arc::clone(&context.security);
    // The tracker is outermost: calls that are refused for their identity are counted and limited, too.
    let routes = AuthenticatedRoutes::new(routes, Arc::clone(&security));
    let routes = TrackedRoutes::new(routes, Arc::new(Semaphore::new(limits.calls)), Arc::clone(&context.metrics));
    let budget = MemoryBudget::new(limits.memory, Arc::clone(&context.metrics));
    let metrics = Arc::clone(&context.metrics.connections);
    // No limit for a peer: all machines behind one NAT gateway are one. Connections with a call are never evicted for
    // new ones.
    let limiter = ConnectionLimiter::new(ListenerKind::Grpc, connections, None, EvictionPolicy::Unused, metrics);
    let lifetime = Lifetime { handshake: limits.handshake, idle, max_age };
    let servers = listeners.into_iter().map(|(socket, listener)| {
        let (server, routes, budget) = (server(), routes.clone(), Arc::clone(&budget));
        let security = Arc::clone(&security);
        net::serve(socket, Arc::clone(&limiter), limits.grace, stop.clone(), move |stream, permit| {
            let accepted = AcceptedConnection { stream, permit, memory: budget.connection(), listener };
            incoming::serve_connection(accepted, Arc::clone(&security), server.clone(), routes.clone(), lifetime)
        })
    });
    let health = follow_health(context.registry.status(), health, &stop);
    // Without a listener too, this future must not end before the stop.
    future::join3(future::join_all(servers), health, stop.cancelled()).await;
    Ok(())
}

fn server() -> Server {
    Server::builder()
        .max_concurrent_streams(MAX_CALLS_PER_CONNECTION)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(MAX_HEADER_LIST_BYTES)
}

fn routes(context: &ServerContext, stop: &CancellationToken) -> io::Result<(Routes, HealthReporter)> {
    let registry = RegistryService::new(context.clone(), stop.clone());
    let discovery = DiscoveryService::new(context.clone(), stop.clone());
    let (health, health_service) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let routes = Routes::new(ServiceRegistryServer::new(registry).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(DiscoveryServer::new(discovery).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(InterceptedService::new(
            HandOverServer::new(HandOverService::new(context.clone())).max_decoding_message_size(MAX_MESSAGE_BYTES),
            HandOverLimiter::new(),
        ))
        .add_service(
            JoiningServer::new(JoiningService::new(context.clone())).max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(
            RegistrantsServer::new(RegistrantsService::new(context.clone()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(health_service.max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(reflection().build_v1().map_err(io::Error::other)?.max_decoding_message_size(MAX_MESSAGE_BYTES))
        // Older clients, such as old releases of grpcurl, only use v1alpha.
        .add_service(
            reflection().build_v1alpha().map_err(io::Error::other)?.max_decoding_message_size(MAX_MESSAGE_BYTES),
        );
    Ok((routes, health))
}

/// Sets the health status to SERVING exactly while registrations are accepted. The same status is set for
/// the readers' service, although readers are served as long as the process runs.
async fn follow_health(status: &Status, mut health: HealthReporter, stop: &CancellationToken) {
    let mut phases = status.watch();
    let mut reported = ServingStatus::NotServing;
    loop {
        let serving = match *phases.borrow_and_update() {
            // The phase may stay Ready for a moment after the stop, when new calls end at once.
            Phase::Ready if !stop.is_cancelled() => ServingStatus::Serving,
            Phase::Ready
            | Phase::Recovering
            | Phase::Restoring
            | Phase::Standby(_)
            | Phase::StorageFailed(_)
            | Phase::Draining => ServingStatus::NotServing,
        };
        if reported != serving {
            reported = serving;
            set_health(&health, serving).await;
        }
        if stop.is_cancelled() {
            break;
        }
        tokio::select! {
            changed = phases.changed() => if changed.is_err() { stop.cancelled().await },
            () = stop.cancelled() => {}
        }
    }
    // Ends the streams of health watchers, after they have received NOT_SERVING.
    for name in HEALTH_SERVICES {
        health.clear_service_status(name).await;
    }
}

async fn set_health(health: &HealthReporter, status: ServingStatus) {
    for name in HEALTH_SERVICES {
        health.set_service_status(name, status).await;
    }
}

#[cfg(test)]
mod tests;
