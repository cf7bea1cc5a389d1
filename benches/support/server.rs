//! gangplank in the process of a bench.

use std::{net::SocketAddr, path::Path};

use clap::Parser;
use gangplank::{app, config::ServeArgs};
use tokio::{sync::oneshot, task::JoinSet};

/// gangplank in this process, until it is stopped.
pub(crate) struct Server {
    /// The address of its gRPC listener.
    pub(crate) grpc: SocketAddr,
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
    pub(crate) async fn start(data_dir: &Path, flags: &[&str]) -> Self {
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
        let config = BenchArgs::parse_from(args.iter().chain(flags)).serve.check().expect("valid flags");
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
    pub(crate) async fn stop(mut self) {
        let _ = self.stop.send(());
        let ended = self.running.join_next().await.expect("it was started");
        ended.expect("it does not panic").expect("it stops cleanly");
    }
}
