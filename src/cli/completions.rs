//! `gangplank completions`: prints the completion script of a shell.

use clap_complete::Shell;

use super::{error::CommandError, output::print};

pub(super) const EXAMPLES: &str = "\
The Debian package installs it for bash, zsh and fish.

Examples:
  gangplank completions bash >/etc/bash_completion.d/gangplank
  gangplank completions zsh >/usr/local/share/zsh/site-functions/_gangplank
  gangplank completions fish >~/.config/fish/completions/gangplank.fish

Exit codes: 0 done, 1 failed, 2 wrong usage";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell that reads the script
    shell: Shell,
}

pub(super) fn run(args: &Args, mut command: clap::Command) -> Result<(), CommandError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "gangplank", &mut script);
    print(&String::from_utf8_lossy(&script))
}
