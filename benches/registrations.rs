//! Registrations per second on one stream, beside a no-op tonic stream with the same messages; and
//! ten thousand instances into one service beside ten thousand services (P4a, P6b).
//!
//! `cargo bench --bench registrations`. The client runs in the same process, for both sides.

#[path = "support/ratio.rs"]
mod ratio;
#[path = "support/registrant.rs"]
mod registrant;
#[path = "support/server.rs"]
mod server;

use std::{net::SocketAddr, path::Path, pin::Pin};

use gangplank::grpc::proto::registry::{
    RegistrationMsg, RegistrationResponse, RegistrationResult, ServiceInfo,
    service_registry_server::{ServiceRegistry, ServiceRegistryServer},
};
use ratio::{machine, row};
use registrant::{connect, message, stream};
use server::Server;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_stream::{Stream, StreamExt as _, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// What the server itself runs with.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Rounds of each pair.
const ROUNDS: usize = 5;

/// Messages of one round.
const MESSAGES: u32 = 200_000;

/// The baseline: one answer per message, and nothing else.
struct NoopRegistry;

#[tonic::async_trait]
impl ServiceRegistry for NoopRegistry {
    type RegistrationEventStream = Pin<Box<dyn Stream<Item = Result<RegistrationResponse, Status>> + Send>>;

    async fn register(&self, _: Request<ServiceInfo>) -> Result<Response<RegistrationResult>, Status> {
        Err(Status::unimplemented("this bench streams"))
    }

    async fn un_register(&self, _: Request<ServiceInfo>) -> Result<Response<RegistrationResult>, Status> {
        Err(Status::unimplemented("this bench streams"))
    }

    async fn registration_event(
        &self,
        request: Request<Streaming<RegistrationMsg>>,
    ) -> Result<Response<Self::RegistrationEventStream>, Status> {
        let answers = request.into_inner().map(|message| {
            let RegistrationMsg { r#type, namespace, service_name, ipaddress, ports, request_id, .. } = message?;
            Ok(RegistrationResponse {
                r#type,
                namespace,
                service_name,
                ipaddress,
                ports,
                request_id,
                status: 201,
                ..RegistrationResponse::default()
            })
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

async fn versus_noop(noop: SocketAddr, parent: &Path, what: &str, goal: &str) {
    let dir = tempfile::tempdir_in(parent).expect("a data directory");
    let server = Server::start(dir.path(), &[]).await;
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let messages: Vec<_> = (0..MESSAGES).map(|n| message(round, n, 20_000)).collect();
        let baseline = stream(connect(noop).await, messages.clone()).await;
        let ours = stream(connect(server.grpc).await, messages).await;
        println!(
            "  {:>9.0}/s no-op   {:>9.0}/s ours",
            f64::from(MESSAGES) / baseline.as_secs_f64(),
            f64::from(MESSAGES) / ours.as_secs_f64()
        );
        ratios.push(baseline.as_secs_f64() / ours.as_secs_f64());
    }
    server.stop().await;
    row(what, ratios, goal);
}

async fn one_service_versus_many(parent: &Path) {
    const INSTANCES: u32 = 10_000;
    let dir = tempfile::tempdir_in(parent).expect("a data directory");
    let server = Server::start(dir.path(), &[]).await;
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let many =
            stream(connect(server.grpc).await, (0..INSTANCES).map(|n| message(2 * round, n, INSTANCES)).collect())
                .await;
        let one =
            stream(connect(server.grpc).await, (0..INSTANCES).map(|n| message(2 * round + 1, n, 1)).collect()).await;
        ratios.push(one.as_secs_f64() / many.as_secs_f64());
    }
    server.stop().await;
    row("10 000 instances into 1 service ÷ into 10 000 services", ratios, "≤ 1.2");
}

#[tokio::main]
async fn main() {
    machine();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let noop = listener.local_addr().expect("it is bound");
    let mut tasks = JoinSet::new();
    tasks.spawn(
        tonic::transport::Server::builder()
            .tcp_nodelay(true)
            .add_service(ServiceRegistryServer::new(NoopRegistry))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    let disk = Path::new(env!("CARGO_TARGET_TMPDIR"));
    versus_noop(noop, disk, "registrations/s, durable ÷ no-op stream", "≥ 0.15").await;
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        versus_noop(noop, memory, "registrations/s, in memory (tmpfs) ÷ no-op stream", "≥ 0.25").await;
    }
    one_service_versus_many(disk).await;
    tasks.abort_all();
}
