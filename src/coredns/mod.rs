//! CoreDNS in front: what its Corefile says about gangplank, as text in and text out. No I/O.
//!
//! * [`Plan`] is what shall be there, [`corefile`] prints it as a configuration of its own.
//! * [`apply`] puts it into an existing Corefile, [`remove`] takes it out again.
//!
//! Added lines are between two comments, the markers, and a line that is replaced is kept in a third, so that
//! the text alone says what to take out: `remove(apply(text)) == text`, whatever was edited around the markers
//! meanwhile. `apply` begins with `remove`, so that it can be repeated, with other flags too. What is outside of the
//! markers stays as it is, byte for byte.
//!
//! Text that does not follow the syntax is refused with the number of the line, and so is a Corefile in which the
//! place for the lines is not certain.

mod blocks;
mod caddyfile;
mod edit;
mod fall_through;
mod stub_domain;
#[cfg(test)]
mod tests;

use std::{fmt, net::SocketAddr};

pub use self::{
    blocks::corefile,
    edit::{Wired, apply, reads_changes, remove, wired},
};
use crate::model::DnsName;

/// What CoreDNS shall forward, and to whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The cluster's zone.
    pub zone: DnsName,
    /// Where gangplank's DNS listens: 1 to [`MAX_SERVERS`].
    pub servers: Vec<SocketAddr>,
    /// How.
    pub wiring: Wiring,
}

/// The two ways to put gangplank behind CoreDNS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wiring {
    /// A server block of its own for whole namespaces, whose native Services it hides.
    StubDomain {
        /// At least one, in the order in which they are written.
        namespaces: Vec<String>,
    },
    /// What the kubernetes plugin does not know is forwarded.
    FallThrough {
        /// Reverse names too, which takes CoreDNS 1.12 or newer.
        reverse: bool,
    },
}

/// Most servers in one `forward` of CoreDNS.
pub const MAX_SERVERS: usize = 15;

/// Why a Corefile is not edited.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct CorefileError {
    /// The line that is the reason, from 1; `None` if it is what is missing.
    pub line: Option<usize>,
    /// Why.
    pub reason: String,
}

impl CorefileError {
    fn at(line: usize, reason: impl Into<String>) -> Self {
        Self { line: Some(line), reason: reason.into() }
    }

    fn missing(reason: impl Into<String>) -> Self {
        Self { line: None, reason: reason.into() }
    }
}

impl fmt::Display for CorefileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.reason),
            None => f.write_str(&self.reason),
        }
    }
}
