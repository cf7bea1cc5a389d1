//! What a person types: one file per subcommand.

use std::process::ExitCode;

/// The subcommands that are clients of a running server.
#[derive(Debug, clap::Subcommand)]
pub enum Command {}

/// Runs one, prints what it has to say, and gives the exit code: 0 done, 1 failed or refused,
/// 2 usage, 3 not found or nothing changed, 4 a wait expired.
pub async fn run(command: Command) -> ExitCode {
    match command {}
}
