//! The process: arguments, logs, signals, exit code.

use std::{
    fmt,
    io::{self, Write as _},
    process::ExitCode,
};

use clap::{CommandFactory as _, Parser, Subcommand};
use gangplank::{
    app, cli,
    config::ServeArgs,
    telemetry::{self, LogArgs},
};
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

/// Registrations allocate on one thread and free on another, which glibc's allocator is slow at.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// DNS inside Kubernetes for services that live outside it.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true, max_term_width = 100)]
struct Gangplank {
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Run the server: takes registrations over gRPC, answers DNS
    Serve {
        #[command(flatten)]
        serve: Box<ServeArgs>,
        #[command(flatten)]
        log: LogArgs,
    },
    #[command(flatten)]
    Client(Box<cli::Subcommand>),
    #[command(flatten)]
    Generator(cli::Generator),
}

#[tokio::main]
async fn main() -> ExitCode {
    match Gangplank::parse().command {
        CliCommand::Client(subcommand) => cli::run(*subcommand).await,
        CliCommand::Generator(generator) => cli::generate(&generator, Gangplank::command()),
        CliCommand::Serve { serve, log } => match run(*serve, &log).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(err) => {
                // Not `eprintln!`, which panics where stderr cannot be written.
                let _ = writeln!(io::stderr(), "error: {err:#}");
                ExitCode::FAILURE
            }
        },
    }
}

/// Serves until SIGTERM or SIGINT; a second signal ends the process at once.
async fn run(serve: ServeArgs, log: &LogArgs) -> anyhow::Result<()> {
    telemetry::init(log)?;
    // Before the first line on stdout: a supervisor that waits for that line may send a signal at once.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    // Without a handler SIGHUP, which asks other servers to reload, would kill this one undrained.
    let ignored_hangups = async {
        while hangup.recv().await.is_some() {
            info!("SIGHUP is ignored: nothing can be reloaded; restart to change settings");
        }
    };
    let bound = app::bind(serve.check()?)?;
    for (what, address) in bound.listeners()? {
        announce(format_args!("listening {what} {address}"));
    }
    let mut signalled = async move || tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} };
    let (first, shutdown) = tokio::sync::oneshot::channel();
    let second = async {
        signalled().await;
        // The receiver is gone if the server has failed meanwhile.
        let _ = first.send(());
        signalled().await;
    };
    let shutdown = async { shutdown.await.unwrap_or(()) };
    tokio::select! {
        ended = bound.run(shutdown, |generation| announce(format_args!("ready generation {generation}"))) => ended,
        () = ignored_hangups => unreachable!("the stream of signals does not end"),
        () = second => anyhow::bail!("stopped by a second signal before the drain time was over"),
    }
}

/// Prints a line on stdout. Unlike `println!` it does not panic when stdout is closed or its disk is full,
/// so the server continues.
fn announce(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stdout(), "{line}");
}
