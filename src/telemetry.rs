//! Logs: to stderr, as text for people or as JSON for machines. Answers are counted, not logged.

use std::{
    env,
    io::{self, IsTerminal as _},
};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

/// The flags of logging.
#[derive(Debug, Args)]
pub struct LogArgs {
    /// What is logged: error, warn, info, debug, trace, or a list such as info,gangplank::store=debug
    #[arg(long, env = "GANGPLANK_LOG", value_name = "FILTER", default_value = "info,kube_client=error,h2=error")]
    log: String,

    /// How a line looks
    #[arg(long, env = "GANGPLANK_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// Installs the process-wide subscriber, which logs to stderr.
///
/// # Errors
/// When the filter is invalid, or a subscriber is installed already.
pub fn init(args: &LogArgs) -> anyhow::Result<()> {
    let LogArgs { log, log_format } = args;
    let filter = EnvFilter::try_new(log).with_context(|| format!("--log {log:?} is not a filter such as info"))?;
    // A line that cannot be written is lost: to report that on the same stderr would panic.
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).log_internal_errors(false);
    let colour = io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    match log_format {
        LogFormat::Text => builder.with_ansi(colour).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(|err| anyhow::anyhow!("logs cannot be set up: {err}"))
}
