//! What a person types: one file per subcommand.
//!
//! Results go to standard output, errors alone to standard error. The exit codes are the same
//! whatever `-o` says: 0 done, 1 failed or refused, 2 usage, 3 not found or nothing changed;
//! 4 is kept for commands that wait and whose wait expires.

mod args;
mod deregister;
mod failure;
mod ls;
mod mutation;
mod output;
mod register;
mod resolve;
mod watch;

use std::process::ExitCode;

/// The subcommands that are clients of a running server.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Register an instance of a service, or replace its attributes
    #[command(after_help = register::EXAMPLES)]
    Register(register::Args),
    /// Remove an instance of a service
    #[command(after_help = deregister::EXAMPLES)]
    Deregister(deregister::Args),
    /// List services, or the instances of one service
    #[command(after_help = ls::EXAMPLES)]
    Ls(ls::Args),
    /// Print what is registered, then every change as it happens
    #[command(after_help = watch::EXAMPLES)]
    Watch(watch::Args),
    /// Ask a DNS server what clients would get
    #[command(after_help = resolve::EXAMPLES)]
    Resolve(resolve::Args),
}

/// Runs one, prints what it has to say, and gives the exit code: 0 done, 1 failed or refused,
/// 2 usage, 3 not found or nothing changed, 4 a wait expired.
pub async fn run(command: Command) -> ExitCode {
    let done = match command {
        Command::Register(args) => register::run(args).await,
        Command::Deregister(args) => deregister::run(args).await,
        Command::Ls(args) => ls::run(args).await,
        Command::Watch(args) => watch::run(args).await,
        Command::Resolve(args) => resolve::run(args).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(subcommand)]
        command: Command,
    }

    fn exit_of(line: &str) -> i32 {
        Line::try_parse_from(line.split(' ')).expect_err("wrong usage").exit_code()
    }

    #[test]
    fn the_commands_are_sound() {
        Line::command().debug_assert();
    }

    #[test]
    fn every_help_has_an_example_and_the_exit_codes() {
        for command in Line::command().get_subcommands() {
            let help = command.get_after_help().expect("an after_help").to_string();
            assert!(help.contains(&format!("gangplank {}", command.get_name())), "{help}");
            assert!(help.contains("Exit codes:"), "{help}");
            assert!(help.lines().all(|line| line.len() <= 80), "{help}");
        }
    }

    #[test]
    fn examples_of_the_help_parse() {
        for command in Line::command().get_subcommands() {
            let help = command.get_after_help().expect("an after_help").to_string();
            let examples = help.lines().map(str::trim).filter(|line| line.starts_with("gangplank "));
            for example in examples.filter(|line| !line.contains('|')) {
                if let Err(err) = Line::try_parse_from(example.split_whitespace()) {
                    panic!("{example}: {err}");
                }
            }
        }
    }

    #[test]
    fn wrong_usage_is_2() {
        assert_eq!(exit_of("gangplank register web"), 2);
        assert_eq!(exit_of("gangplank register web 10.0.0.1 --port http"), 2);
        assert_eq!(exit_of("gangplank register prod/web/x 10.0.0.1"), 2);
        assert_eq!(exit_of("gangplank ls -n prod -A"), 2);
        assert_eq!(exit_of("gangplank ls -o xml"), 2);
        assert_eq!(exit_of("gangplank watch --from xyz"), 2);
        assert_eq!(exit_of("gangplank resolve web --type NOPE"), 2);
    }
}
