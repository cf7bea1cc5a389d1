//! gRPC: the registrants' service, the readers' service, health and reflection.
//!
//! `tonic` and protobuf types stop here: what comes in is converted once, in `convert`, and what
//! goes to the registry are model types.

mod call_tracker;
pub mod client;
mod codec;
mod convert;
mod discovery_service;
mod incoming;
mod memory;
mod metered;
mod registry_service;

use std::{io, sync::Arc, time::Duration};

use futures::future;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::{service::Routes, transport::Server};
use tonic_health::{ServingStatus, server::HealthReporter};

use self::{
    call_tracker::TrackedRoutes,
    discovery_service::DiscoveryService,
    incoming::Lifetime,
    memory::MemoryBudget,
    proto::{
        gangplank::v1::discovery_server::DiscoveryServer, registry::service_registry_server::ServiceRegistryServer,
    },
    registry_service::RegistryService,
};
use crate::{
    metrics::{ListenerKind, Metrics},
    model::Validator,
    net::{self, ConnectionLimiter, EvictionPolicy},
    registry::{Phase, RegistryHandle, Status},
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
    }
    /// The encoded descriptors of both, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}

/// What the gRPC services need.
#[derive(Debug, Clone)]
pub struct ServerContext {
    /// Where changes go, and what readers read.
    pub registry: RegistryHandle,
    /// What registrations are measured against.
    pub validator: Validator,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// Limits on connections, which operators set.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionLimits {
    /// Connections in all. When there is no room the idlest without a call is closed.
    pub connections: usize,
    /// A connection without a call is closed after this long.
    pub idle: Duration,
    /// A connection takes no new calls after about this long; open streams go on.
    pub max_age: Duration,
}

/// Limits that only tests change.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Calls and streams that may be open at once, on all listeners together. Beyond it a call
    /// is answered RESOURCE_EXHAUSTED.
    calls: usize,
    /// How long a peer may take to send the preface of HTTP/2: until then nothing else watches it.
    handshake: Duration,
    /// How long clients have to take their last answers after the stop; then connections are closed.
    grace: Duration,
    /// What peers may send and not take.
    memory: memory::Limits,
}

const LIMITS: Limits =
    Limits { calls: 12_000, handshake: Duration::from_secs(5), grace: Duration::from_secs(5), memory: memory::LIMITS };

/// Calls and streams that may be open at once on one connection; the client is told and waits or
/// opens another connection.
const MAX_CALLS_PER_CONNECTION: u32 = 200;

/// Most bytes of one message from a client: a registration has a few hundred.
const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// Most bytes of a call's headers.
const MAX_HEADER_LIST_BYTES: u32 = 16 * 1024;

/// Bytes that a client may send ahead of what was read, on one stream: some 400 registrations.
///
/// The two windows are chosen together. h2 takes small DATA frames that wait to be read for an
/// attack: each counts what it lacks to 256 bytes, and when that adds up to half the connection's
/// window, the connection is closed with ENHANCE_YOUR_CALM, "too_many_data_frames". A registrant
/// that pipelines writes just such frames, of 40 bytes and more. A registry that is slow for a
/// moment must slow its clients down, not lose them: with these windows all
/// [`MAX_CALLS_PER_CONNECTION`] streams may stand full of registrations before it comes to that.
const STREAM_WINDOW: u32 = 32 * 1024;

/// Bytes that a client may send ahead of what was read, on all streams of one connection. It
/// never fills: what can lie here in all is bounded by the calls times [`STREAM_WINDOW`].
const CONNECTION_WINDOW: u32 = 64 * 1024 * 1024;

/// A quiet connection is probed after this long, and given up [`KEEPALIVE_TIMEOUT`] later: so
/// half-open peers (a machine that lost power) are noticed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// What answers for each service, and for the server as a whole (the empty name).
const HEALTH_SERVICES: [&str; 3] = ["", "registry.ServiceRegistry", "gangplank.v1.Discovery"];

/// Serves on every listener until `stop`: then streams are told, and what was read is answered.
///
/// # Errors
/// The first listener that fails stops all.
pub async fn run(
    listeners: Vec<TcpListener>,
    context: ServerContext,
    connections: ConnectionLimits,
    stop: CancellationToken,
) -> io::Result<()> {
    serve(listeners, context, connections, LIMITS, stop).await
}

async fn serve(
    listeners: Vec<TcpListener>,
    context: ServerContext,
    ConnectionLimits { connections, idle, max_age }: ConnectionLimits,
    limits: Limits,
    stop: CancellationToken,
) -> io::Result<()> {
    let (routes, health) = routes(&context, &stop)?;
    // Its builder has the server serving from the start; nobody may see that.
    say(&health, ServingStatus::NotServing).await;
    let routes = TrackedRoutes::new(routes, Arc::new(Semaphore::new(limits.calls)), Arc::clone(&context.metrics));
    let budget = MemoryBudget::new(limits.memory, Arc::clone(&context.metrics));
    let metrics = Arc::clone(&context.metrics.connections);
    let limiter = ConnectionLimiter::new(ListenerKind::Grpc, connections, None, EvictionPolicy::Unused, metrics);
    let lifetime = Lifetime { handshake: limits.handshake, idle, max_age };
    let servers = listeners.into_iter().map(|listener| {
        let (server, routes, budget) = (server(), routes.clone(), Arc::clone(&budget));
        net::serve(listener, Arc::clone(&limiter), limits.grace, stop.clone(), move |stream, permit| {
            incoming::serve_connection(stream, permit, budget.connection(), server.clone(), routes.clone(), lifetime)
        })
    });
    // Without a listener too this lasts until the stop.
    future::join3(future::join_all(servers), follow_health(context.registry.status(), health, &stop), stop.cancelled())
        .await;
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
    // Requests for reflection and health are small too.
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let routes = Routes::new(ServiceRegistryServer::new(registry).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(DiscoveryServer::new(discovery).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(health_service.max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(reflection().build_v1().map_err(io::Error::other)?.max_decoding_message_size(MAX_MESSAGE_BYTES))
        // Older grpcurl and others ask for this one.
        .add_service(
            reflection().build_v1alpha().map_err(io::Error::other)?.max_decoding_message_size(MAX_MESSAGE_BYTES),
        );
    Ok((routes, health))
}

/// Health is what registrants go by: serving means that registrations are accepted. Readers are
/// told the same, though what is registered can be read as long as the process runs.
async fn follow_health(status: &Status, mut health: HealthReporter, stop: &CancellationToken) {
    let mut phases = status.watch();
    let mut said = ServingStatus::NotServing;
    loop {
        let serving = match *phases.borrow_and_update() {
            Phase::Ready if !stop.is_cancelled() => ServingStatus::Serving,
            Phase::Ready | Phase::Recovering | Phase::Restoring | Phase::StorageFailed(_) | Phase::Draining => {
                ServingStatus::NotServing
            }
        };
        if said != serving {
            said = serving;
            say(&health, serving).await;
        }
        if stop.is_cancelled() {
            break;
        }
        tokio::select! {
            changed = phases.changed() => if changed.is_err() { stop.cancelled().await },
            () = stop.cancelled() => {}
        }
    }
    // Ends the streams of those who watch, after they saw the last word.
    for name in HEALTH_SERVICES {
        health.clear_service_status(name).await;
    }
}

async fn say(health: &HealthReporter, status: ServingStatus) {
    for name in HEALTH_SERVICES {
        health.set_service_status(name, status).await;
    }
}

#[cfg(test)]
mod tests;
