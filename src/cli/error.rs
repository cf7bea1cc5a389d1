//! The error of a command: what happened, why, and what to type next.

use std::{
    error::Error,
    fmt::{self, Write as _},
    io::{self, IsTerminal as _, Write as _},
    process::ExitCode,
};

use super::output::colour_allowed;
use crate::grpc::client::{Attempt, ClientError, ClientTlsError, JoinError};

/// What went wrong, as the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ErrorKind {
    /// Failed or refused.
    Failed = 1,
    /// Wrong usage that clap cannot detect.
    Usage = 2,
    /// The service, instance or record does not exist.
    NotFound = 3,
    /// What was waited for has not happened in time.
    WaitExpired = 4,
}

/// Ends a command with an exit code other than 0.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CommandError {
    pub(super) kind: ErrorKind,
    /// What happened and why, without a final dot.
    message: String,
    /// What to do or type next, one line each.
    hints: Vec<String>,
    /// Nothing is printed: all was said on standard output, or that is closed (`gangplank ls | head`), which is no error.
    silent: bool,
}

impl CommandError {
    pub(super) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hints: Vec::new(), silent: false }
    }

    /// Adds a line that says what to do or type next.
    pub(super) fn hint(mut self, line: impl Into<String>) -> Self {
        self.hints.push(line.into());
        self
    }

    /// An exit code for which all was said on standard output.
    pub(super) const fn said(kind: ErrorKind) -> Self {
        Self { kind, message: String::new(), hints: Vec::new(), silent: true }
    }

    /// Prints the error to standard error and returns the exit code.
    pub(super) fn report(&self) -> ExitCode {
        if !self.silent {
            let colour = colour_allowed(io::stderr().is_terminal());
            let (on, off) = if colour { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
            // Not `eprintln!`, whose panic would replace the exit code where stderr cannot be written.
            let _ = writeln!(io::stderr(), "{on}error:{off} {self}");
        }
        ExitCode::from(self.kind as u8)
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.hints.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

/// Codes of a server that has understood a call and says what is wrong with it.
const ANSWERS: [&str; 5] = ["NotFound", "InvalidArgument", "FailedPrecondition", "AlreadyExists", "ResourceExhausted"];

impl From<ClientError> for CommandError {
    fn from(error: ClientError) -> Self {
        match &error {
            ClientError::Unreachable { .. } => {
                let mut message = error.to_string();
                // hyper and tonic wrap the cause several times; only the innermost is short: `Connection refused`.
                let innermost = std::iter::successors(error.source(), |cause: &&dyn Error| (*cause).source()).last();
                if let Some(cause) = innermost {
                    write!(message, ": {cause}").expect("a String takes everything");
                }
                Self::new(ErrorKind::Failed, message)
                    .hint("start one:     gangplank serve")
                    .hint("name another:  --server URL, or GANGPLANK_SERVER")
            }
            ClientError::Url { .. } => Self::new(ErrorKind::Usage, error.to_string()).hint("give one: --server URL"),
            ClientError::NoCa { .. } => Self::new(ErrorKind::Usage, error.to_string()),
            ClientError::Tls { .. } => Self::new(ErrorKind::Usage, error.to_string()),
            ClientError::TokenInPlaintext { .. } => Self::new(ErrorKind::Usage, error.to_string()),
            ClientError::Token(err) => {
                let source = err.source().map_or_else(String::new, |source| format!(": {source}"));
                Self::new(ErrorKind::Usage, format!("{err}{source}"))
            }
            ClientError::Status { code, .. } if code == "Unauthenticated" => {
                Self::new(ErrorKind::Failed, error.to_string())
                    .hint("join with a token:   gangplank join TOKEN")
                    .hint("show a certificate:  --cert FILE --key FILE")
                    .hint("show a token:        --token-file FILE")
            }
            ClientError::Status { code, .. } if code == "PermissionDenied" => {
                Self::new(ErrorKind::Failed, error.to_string())
                    .hint("a rule of the server's --authorization-policy has to allow it, or a Role in Kubernetes")
            }
            // The server has understood, and says all there is to say.
            ClientError::Status { code, .. } if ANSWERS.contains(&code.as_str()) => {
                Self::new(ErrorKind::Failed, error.to_string())
            }
            ClientError::Status { .. } => Self::new(ErrorKind::Failed, error.to_string())
                .hint("check that it is a gangplank server and ready:")
                .hint("curl http://127.0.0.1:9153/readyz/registrations"),
            ClientError::NoneAnswered { attempts } => {
                let failure = Self::new(ErrorKind::Failed, error.to_string());
                let said = attempts.iter().map(|Attempt { url, reason }| format!("{url}: {reason}"));
                said.fold(failure, Self::hint)
            }
            ClientError::InvalidResponse(_) => Self::new(ErrorKind::Failed, error.to_string())
                .hint("client and server may be of different versions: gangplank --version"),
        }
    }
}

impl From<JoinError> for CommandError {
    fn from(err: JoinError) -> Self {
        match err {
            JoinError::Client(ClientError::Status { message, .. }) => Self::new(ErrorKind::Failed, message),
            JoinError::Client(err) => err.into(),
            JoinError::Token(_) => Self::new(ErrorKind::Usage, err.to_string()),
            JoinError::NotVerified(reasons) => {
                let failure =
                    Self::new(ErrorKind::Failed, "no server of the token was verified; its secret was not told");
                reasons.into_iter().fold(failure, Self::hint)
            }
            JoinError::File { .. } | JoinError::Invalid { .. } | JoinError::Key(_) => {
                Self::new(ErrorKind::Failed, err.to_string())
            }
        }
    }
}

impl From<ClientTlsError> for CommandError {
    fn from(err: ClientTlsError) -> Self {
        let source = err.source().map_or_else(String::new, |source| format!(": {source}"));
        Self::new(ErrorKind::Usage, format!("{err}{source}"))
    }
}

impl From<io::Error> for CommandError {
    /// Standard output could not be written.
    fn from(err: io::Error) -> Self {
        // As other commands: a closed pipe ends them without a word.
        let silent = err.kind() == io::ErrorKind::BrokenPipe;
        Self { silent, ..Self::new(ErrorKind::Failed, format!("cannot print: {err}")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreachable_server_hints_at_serve() {
        let source = io::Error::other(io::Error::from(io::ErrorKind::ConnectionRefused));
        let failure =
            CommandError::from(ClientError::Unreachable { url: "http://[::1]:1".into(), source: source.into() });
        assert_eq!(failure.kind, ErrorKind::Failed);
        let text = failure.to_string();
        assert!(text.starts_with("no gangplank server at http://[::1]:1: connection refused\n"), "{text}");
        assert!(text.contains("gangplank serve"), "{text}");
        assert!(text.contains("--server"), "{text}");
    }

    #[test]
    fn every_server_that_was_asked_is_named() {
        let attempt = |url: &str, reason: &str| Attempt { url: url.into(), reason: reason.into() };
        let attempts = vec![attempt("http://a:1", "on standby"), attempt("http://b:1", "Connection refused")];
        let failure = CommandError::from(ClientError::NoneAnswered { attempts });
        assert_eq!(failure.kind, ErrorKind::Failed);
        assert_eq!(
            failure.to_string(),
            "no server took the call\n  http://a:1: on standby\n  http://b:1: Connection refused"
        );
    }

    #[test]
    fn invalid_url_is_a_usage_error() {
        assert_eq!(CommandError::from(ClientError::Url { url: "nope".into() }).kind, ErrorKind::Usage);
    }

    #[test]
    fn what_the_server_says_needs_no_hint() {
        let status = |code: &str| {
            let status = ClientError::Status { code: code.into(), message: "name: there is no such registrant".into() };
            CommandError::from(status).to_string()
        };
        assert_eq!(status("NotFound"), "the server answered NotFound: name: there is no such registrant");
        assert!(status("Unimplemented").contains("check that it is a gangplank server"));
    }

    #[test]
    fn closed_pipe_is_silent() {
        assert!(CommandError::from(io::Error::from(io::ErrorKind::BrokenPipe)).silent);
        assert!(!CommandError::from(io::Error::from(io::ErrorKind::StorageFull)).silent);
    }
}
