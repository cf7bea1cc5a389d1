//! Why a command did not do what was asked: what, why, and what to type next.

use std::{
    error::Error,
    fmt::{self, Write as _},
    io::{self, IsTerminal as _, Write as _},
    process::ExitCode,
};

use super::output::colour_allowed;
use crate::grpc::client::ClientError;

/// The exit codes of failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exit {
    /// Failed or refused.
    Failed = 1,
    /// Typed wrong, where clap could not see it.
    Usage = 2,
    /// Not found, or nothing changed.
    Absent = 3,
}

/// A command that ends with another code than 0.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) exit: Exit,
    /// What happened and why, without a final dot.
    what: String,
    /// What to do or type next, one line each.
    next: Vec<String>,
    /// Nobody is there to read it: standard output is closed.
    silent: bool,
}

impl Failure {
    pub(super) fn new(exit: Exit, what: impl Into<String>) -> Self {
        Self { exit, what: what.into(), next: Vec::new(), silent: false }
    }

    /// Adds one line that says what to do or type next.
    pub(super) fn next(mut self, line: impl Into<String>) -> Self {
        self.next.push(line.into());
        self
    }

    /// Says it on standard error.
    pub(super) fn report(&self) -> ExitCode {
        if !self.silent {
            let colour = colour_allowed(io::stderr().is_terminal());
            let (on, off) = if colour { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
            // Not `eprintln!`, whose panic would replace the exit code where stderr cannot be written.
            let _ = writeln!(io::stderr(), "{on}error:{off} {self}");
        }
        ExitCode::from(self.exit as u8)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        self.next.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match &error {
            ClientError::Unreachable { .. } => {
                let mut what = error.to_string();
                // The innermost cause says it in the fewest words: `Connection refused`.
                let innermost = std::iter::successors(error.source(), |cause: &&dyn Error| (*cause).source()).last();
                if let Some(cause) = innermost {
                    write!(what, ": {cause}").expect("a String takes everything");
                }
                Self::new(Exit::Failed, what)
                    .next("start one:     gangplank serve")
                    .next("name another:  --server URL, or GANGPLANK_SERVER")
            }
            ClientError::Url { .. } => Self::new(Exit::Usage, error.to_string()).next("give one: --server URL"),
            ClientError::Status { .. } => Self::new(Exit::Failed, error.to_string())
                .next("is it a gangplank server, and ready? its admin listener knows:")
                .next("curl http://127.0.0.1:9153/readyz/registrations"),
            ClientError::Answer(_) => Self::new(Exit::Failed, error.to_string())
                .next("client and server may be of different versions: gangplank --version"),
        }
    }
}

impl From<io::Error> for Failure {
    /// An error while printing.
    fn from(err: io::Error) -> Self {
        let silent = err.kind() == io::ErrorKind::BrokenPipe;
        Self { silent, ..Self::new(Exit::Failed, format!("cannot print: {err}")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_does_not_run_says_how_to_start_it() {
        let source = io::Error::other(io::Error::from(io::ErrorKind::ConnectionRefused));
        let failure = Failure::from(ClientError::Unreachable { url: "http://[::1]:1".into(), source: source.into() });
        assert_eq!(failure.exit, Exit::Failed);
        let text = failure.to_string();
        assert!(text.starts_with("no gangplank server at http://[::1]:1: connection refused\n"), "{text}");
        assert!(text.contains("gangplank serve"), "{text}");
        assert!(text.contains("--server"), "{text}");
    }

    #[test]
    fn a_bad_url_is_wrong_usage() {
        assert_eq!(Failure::from(ClientError::Url { url: "nope".into() }).exit, Exit::Usage);
    }

    #[test]
    fn a_closed_pipe_is_not_worth_a_word() {
        assert!(Failure::from(io::Error::from(io::ErrorKind::BrokenPipe)).silent);
        assert!(!Failure::from(io::Error::from(io::ErrorKind::StorageFull)).silent);
    }
}
