//! `gangplank man`: prints the manual page of a command, or writes those of all.

use std::{
    fs,
    io::{self, Write as _},
    path::PathBuf,
};

use clap::Command;
use clap_mangen::Man;

use super::{
    error::{CommandError, ErrorKind},
    output::print,
};

pub(super) const EXAMPLES: &str = "\
The Debian package installs all pages: man gangplank-serve.

Examples:
  gangplank man serve | man -l -
  gangplank man token create | man -l -
  gangplank man --directory /usr/local/share/man/man1

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no such command";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The command whose page is printed, such as `token create`; that of gangplank itself without one
    command: Vec<String>,
    /// Write the pages of all commands into this directory, which is created
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    directory: Option<PathBuf>,
}

pub(super) fn run(args: &Args, command: Command) -> Result<(), CommandError> {
    let Args { command: path, directory } = args;
    let version = command.get_version().unwrap_or_default().to_owned();
    let mut root = without_help(command);
    root.build();
    if let Some(directory) = directory {
        let failed = |err: io::Error| {
            CommandError::new(
                ErrorKind::Failed,
                format!("the pages cannot be written to {}: {err}", directory.display()),
            )
        };
        fs::create_dir_all(directory).map_err(failed)?;
        return all(&root).into_iter().try_for_each(|command| {
            let (file, page) = page(command, &version).map_err(failed)?;
            fs::write(directory.join(file), page).map_err(failed)
        });
    }
    let found = path.iter().try_fold(&root, |command, name| command.find_subcommand(name));
    let command = found.ok_or_else(|| {
        CommandError::new(ErrorKind::NotFound, format!("there is no command {}", path.join(" ")))
            .hint("list them:  gangplank --help")
    })?;
    let (_, page) =
        page(command, &version).map_err(|err| CommandError::new(ErrorKind::Failed, format!("no page: {err}")))?;
    print(&String::from_utf8_lossy(&page))
}

/// Without the subcommand `help`, which needs no page.
fn without_help(command: Command) -> Command {
    command.disable_help_subcommand(true).mut_subcommands(without_help)
}

/// The command and those below it.
fn all(command: &Command) -> Vec<&Command> {
    let below = command.get_subcommands().filter(|below| !below.is_hide_set()).flat_map(all);
    std::iter::once(command).chain(below).collect()
}

/// The page's file name and its roff.
fn page(command: &Command, version: &str) -> io::Result<(String, Vec<u8>)> {
    let man = Man::new(command.clone()).source(format!("gangplank {version}")).manual("gangplank");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    if command.get_arguments().any(|argument| !argument.is_hide_set()) {
        man.render_options_section(&mut page)?;
    }
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    if let Some(help) = command.get_after_help() {
        // As it is laid out, and not filled into one paragraph.
        page.extend_from_slice(b".SH NOTES\n.nf\n");
        for line in help.to_string().lines() {
            // A dot or a quote at the start of a line would be a request of roff.
            writeln!(page, "\\&{}", line.replace('\\', "\\e").replace('-', "\\-"))?;
        }
        page.extend_from_slice(b".fi\n");
    }
    Ok((man.get_filename(), page))
}
