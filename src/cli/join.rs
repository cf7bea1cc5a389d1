//! `gangplank join`: exchanges a token for a certificate.

use std::io::{self, Read as _};

use super::{
    error::{CommandError, ErrorKind},
    joined::{ConfigDirArgs, required, scope_text, shown},
    output::print,
    renewal_timer,
};
use crate::grpc::client::JoinedMachine;

pub(super) const EXAMPLES: &str = "\
On the server, `gangplank token create` prints the whole command. The server is
verified by the hash of its CA in the token before the token's secret is told.
The key is made here and stays here. From then on commands need no --server and
no certificate, and each renews the certificate when it is due; a systemd timer
does it on machines where no command runs.

A token on a command line can be seen by every user of the machine while the
command runs: give `-`, and the token on standard input, where that matters.

Examples:
  gangplank join gp1.AQEBAQEBAQECAgIC
  gangplank join - --config-dir /run/secrets/gangplank

Exit codes: 0 joined, 1 failed or refused, 2 wrong usage";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The token, or `-` for standard input
    token: String,
    #[command(flatten)]
    config_dir: ConfigDirArgs,
    /// Install no systemd timer that renews the certificate
    #[arg(long)]
    no_timer: bool,
}

pub(super) async fn run(args: Args) -> Result<(), CommandError> {
    let Args { token, config_dir, no_timer } = args;
    let dir = required(&config_dir)?;
    let token = if token == "-" { from_stdin()? } else { token };
    let host = gethostname::gethostname().to_string_lossy().into_owned();
    let machine = JoinedMachine::join(&token, &host, &dir).await?;
    let server = machine.servers().first().map_or("", String::as_str);
    let until = humantime::format_rfc3339_seconds(machine.expires());
    let scope = scope_text(machine.namespace(), machine.service());
    print(&format!(
        "joined {server} as {}, for {scope}\nthe certificate is in {}, good until {until}\n",
        machine.registrant(),
        shown(&dir)
    ))?;
    if no_timer {
        return print(
            "no timer renews it: every gangplank command does, or gangplank renew, once in 7 days at least\n",
        );
    }
    print(&renewal_timer::install(config_dir.is_given().then_some(dir.as_path())))
}

fn from_stdin() -> Result<String, CommandError> {
    let mut text = String::new();
    // A token is far shorter. Whatever is piped here by mistake is not read into memory as a whole.
    let read = io::stdin().take(8192).read_to_string(&mut text);
    read.map_err(|err| CommandError::new(ErrorKind::Failed, format!("standard input cannot be read: {err}")))?;
    Ok(text)
}
