//! The command line: one file per subcommand. All but `coredns` and `check` are only clients of a running server.
//!
//! Results go to standard output, errors alone to standard error. The exit codes do not depend on
//! `-o`: 0 done, 1 failed or refused, 2 usage, 3 not found, 4 the wait of a command that waits has expired.
//!
//! Registering what is already registered is 0, not an error: start scripts and `ExecStartPost=`
//! register at every start, and a unit must not fail because the registration outlived it.

mod args;
mod check;
mod completions;
mod coredns;
mod deregister;
mod error;
mod join;
mod joined;
mod ls;
mod man;
mod mutation;
mod names;
mod output;
mod register;
mod registrants;
mod renew;
mod renewal_timer;
mod replicas;
mod resolve;
mod token;
mod watch;

use std::process::ExitCode;

/// The subcommands other than `serve`.
#[derive(Debug, clap::Subcommand)]
pub enum Subcommand {
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
    /// Join a server with a token: get a certificate, with which every other command goes on
    #[command(after_help = join::EXAMPLES)]
    Join(join::Args),
    /// Renew the certificate of a machine that joined, if it is due
    #[command(after_help = renew::EXAMPLES)]
    Renew(renew::Args),
    /// Create, list and revoke join tokens
    #[command(after_help = token::EXAMPLES)]
    Token(token::Args),
    /// List and revoke the machines that joined
    #[command(after_help = registrants::EXAMPLES)]
    Registrants(registrants::Args),
    /// List the processes that answer the same, and which of them writes
    #[command(after_help = replicas::EXAMPLES)]
    Replicas(replicas::Args),
    /// Ask a DNS server what clients would get
    #[command(after_help = resolve::EXAMPLES)]
    Resolve(resolve::Args),
    /// Check everything from the process to the cluster's DNS; say what is wrong and what to type next
    #[command(after_help = check::EXAMPLES)]
    Check(Box<check::Args>),
    /// Put gangplank behind the cluster's CoreDNS: print the configuration, apply it, remove it
    #[command(after_help = coredns::EXAMPLES)]
    Coredns(Box<coredns::Args>),
}

/// The subcommands that print what packages install. They describe the whole command line.
#[derive(Debug, clap::Subcommand)]
pub enum Generator {
    /// Print the completion script of a shell
    #[command(after_help = completions::EXAMPLES)]
    Completions(completions::Args),
    /// Print the manual page of a command, or write those of all
    #[command(after_help = man::EXAMPLES)]
    Man(man::Args),
}

/// Runs a generator for `command`, the whole command line, and returns the exit code.
pub fn generate(generator: &Generator, command: clap::Command) -> ExitCode {
    let result = match generator {
        Generator::Completions(args) => completions::run(args, command),
        Generator::Man(args) => man::run(args, command),
    };
    result.map_or_else(|err| err.report(), |()| ExitCode::SUCCESS)
}

/// Runs a subcommand, prints its result or its error, and returns the exit code.
pub async fn run(subcommand: Subcommand) -> ExitCode {
    let result = match subcommand {
        Subcommand::Register(args) => register::run(args).await,
        Subcommand::Deregister(args) => deregister::run(args).await,
        Subcommand::Ls(args) => ls::run(args).await,
        Subcommand::Watch(args) => watch::run(args).await,
        Subcommand::Join(args) => join::run(args).await,
        Subcommand::Renew(args) => renew::run(args).await,
        Subcommand::Token(args) => token::run(args).await,
        Subcommand::Registrants(args) => registrants::run(args).await,
        Subcommand::Replicas(args) => replicas::run(args).await,
        Subcommand::Resolve(args) => resolve::run(args).await,
        Subcommand::Check(args) => check::run(*args).await,
        Subcommand::Coredns(args) => coredns::run(*args).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => err.report(),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    struct TestCli {
        #[command(subcommand)]
        command: TestCommand,
    }

    #[derive(Debug, clap::Subcommand)]
    enum TestCommand {
        #[command(flatten)]
        Client(Box<Subcommand>),
        #[command(flatten)]
        Generator(Generator),
    }

    fn exit_of(line: &str) -> i32 {
        TestCli::try_parse_from(line.split(' ')).expect_err("wrong usage").exit_code()
    }

    #[test]
    fn commands_have_no_conflicting_arguments() {
        TestCli::command().debug_assert();
    }

    #[test]
    fn every_help_has_an_example_and_the_exit_codes() {
        for command in TestCli::command().get_subcommands() {
            let help = command.get_after_help().expect("an after_help").to_string();
            assert!(help.contains(&format!("gangplank {}", command.get_name())), "{help}");
            assert!(help.contains("Exit codes:"), "{help}");
            assert!(help.lines().all(|line| line.chars().count() <= 80), "{help}");
        }
    }

    #[test]
    fn examples_of_the_help_parse() {
        for command in TestCli::command().get_subcommands() {
            let help = command.get_after_help().expect("an after_help").to_string();
            let examples = help.lines().map(str::trim).filter(|line| line.starts_with("gangplank "));
            for example in examples.filter(|line| !line.contains('|')) {
                // Without where its output goes.
                let words = example.split_whitespace().take_while(|word| !word.starts_with('>'));
                if let Err(err) = TestCli::try_parse_from(words) {
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
        assert_eq!(exit_of("gangplank coredns"), 2);
    }
}
