//! Registrations per second on one stream, beside a no-op tonic stream with the same messages; and
//! ten thousand instances into one service beside ten thousand services (P4a, P6b).
//!
//! `cargo bench --bench registrations`. The client runs in the same process, for both sides.

#[path = "support/ratio.rs"]
mod ratio;

use std::{
    hint::black_box,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    time::{Duration, Instant},
};

use clap::Parser;
use gangplank::{
    app,
    config::ServeArgs,
    grpc::proto::registry::{
        NamedPort, RegistrationMsg, RegistrationResponse, RegistrationResult, ServiceInfo,
        service_registry_client::ServiceRegistryClient,
        service_registry_server::{ServiceRegistry, ServiceRegistryServer},
    },
};
use ratio::{machine, row};
use tokio::{net::TcpListener, sync::oneshot, task::JoinSet};
use tokio_stream::{Stream, StreamExt as _, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// What the server itself runs with.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Rounds of each pair.
const ROUNDS: usize = 5;

/// Messages of one round.
const MESSAGES: u32 = 200_000;

/// gangplank in this process, until it is stopped.
struct Server {
    /// The address of its gRPC listener.
    grpc: SocketAddr,
    stop: oneshot::Sender<()>,
    running: JoinSet<anyhow::Result<()>>,
}

#[derive(Debug, Parser)]
struct BenchArgs {
    #[command(flatten)]
    serve: ServeArgs,
}

impl Server {
    /// Starts one on free ports of loopback and waits until it is ready.
    async fn start(data_dir: &Path) -> Self {
        let dir = data_dir.display().to_string();
        let free_port = "127.0.0.1:0";
        let args = [
            "bench",
            "--data-dir",
            &dir,
            "--grpc-listen",
            free_port,
            "--dns-listen",
            free_port,
            "--admin-listen",
            free_port,
            "--drain",
            "0s",
        ];
        let config = BenchArgs::parse_from(args).serve.check().expect("valid flags");
        let bound = app::bind(config).expect("ports are free");
        let listeners = bound.listeners().expect("they are bound");
        let address = |what| listeners.iter().find(|(name, _)| *name == what).expect("it listens").1;
        let grpc = address("grpc");
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, is_ready) = oneshot::channel();
        let shutdown = async { stopped.await.unwrap_or(()) };
        let mut running = JoinSet::new();
        running.spawn(bound.run(shutdown, move |_| ready.send(()).expect("the bench waits")));
        is_ready.await.expect("it recovers");
        Self { grpc, stop, running }
    }

    /// Stops it and waits for its end.
    async fn stop(mut self) {
        let _ = self.stop.send(());
        let ended = self.running.join_next().await.expect("it was started");
        ended.expect("it does not panic").expect("it stops cleanly");
    }
}

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

/// The `n`th message of a round; the instances are spread over `services` services.
fn message(round: usize, n: u32, services: u32) -> RegistrationMsg {
    let [_, b, c, d] = n.to_be_bytes();
    RegistrationMsg {
        namespace: format!("round{round}"),
        service_name: format!("s{}", n % services),
        ipaddress: format!("10.{b}.{c}.{d}"),
        ports: vec![NamedPort { port: 8080, name: "http".into(), ..NamedPort::default() }],
        ..RegistrationMsg::default()
    }
}

/// Streams the messages of one round and waits for every answer.
async fn stream(to: SocketAddr, messages: Vec<RegistrationMsg>) -> Duration {
    let mut client = ServiceRegistryClient::connect(format!("http://{to}")).await.expect("it listens");
    let count = messages.len();
    let begun = Instant::now();
    let answers = client.registration_event(tokio_stream::iter(messages)).await.expect("it streams");
    let mut answers = answers.into_inner();
    let mut answered = 0;
    while let Some(answer) = answers.next().await {
        let answer = answer.expect("the stream goes on");
        assert_eq!(black_box(answer).status, 201, "every message is a new instance");
        answered += 1;
        if answered == count {
            break;
        }
    }
    assert_eq!(answered, count, "one answer per message");
    begun.elapsed()
}

async fn versus_noop(noop: SocketAddr, parent: &Path, what: &str, goal: &str) {
    let dir = tempfile::tempdir_in(parent).expect("a data directory");
    let server = Server::start(dir.path()).await;
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let messages: Vec<_> = (0..MESSAGES).map(|n| message(round, n, 20_000)).collect();
        let baseline = stream(noop, messages.clone()).await;
        let ours = stream(server.grpc, messages).await;
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
    let server = Server::start(dir.path()).await;
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let many = stream(server.grpc, (0..INSTANCES).map(|n| message(2 * round, n, INSTANCES)).collect()).await;
        let one = stream(server.grpc, (0..INSTANCES).map(|n| message(2 * round + 1, n, 1)).collect()).await;
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
