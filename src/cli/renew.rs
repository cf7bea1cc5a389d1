//! `gangplank renew`: renews the certificate of a machine that joined.

use std::time::SystemTime;

use super::{
    error::{CommandError, ErrorKind},
    joined::{ConfigDirArgs, required, shown},
    output::print,
};

pub(super) const EXAMPLES: &str = "\
Does nothing before two thirds of the certificate's life are over. Every other
command does the same; this one is for a timer. A certificate that expired at
most 7 days ago can be renewed; later, join again with a new token.

Examples:
  gangplank renew
  gangplank renew --now --config-dir /run/secrets/gangplank

Exit codes: 0 good, renewed or not; 1 failed or refused, 2 wrong usage, 3 this
machine did not join";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Renew it although it is not due
    #[arg(long)]
    now: bool,
    #[command(flatten)]
    config_dir: ConfigDirArgs,
}

pub(super) async fn run(args: Args) -> Result<(), CommandError> {
    let Args { now, config_dir } = args;
    let dir = required(&config_dir)?;
    let Some(mut machine) = config_dir.load()? else {
        let message = format!("this machine did not join: nothing is in {}", shown(&dir));
        return Err(CommandError::new(ErrorKind::NotFound, message).hint("join:  gangplank join TOKEN"));
    };
    let due = now || machine.is_due(SystemTime::now());
    if due {
        machine.renew().await?;
    }
    let until = humantime::format_rfc3339_seconds(machine.expires());
    print(&format!("{}, good until {until}\n", if due { "renewed" } else { "not due" }))
}
