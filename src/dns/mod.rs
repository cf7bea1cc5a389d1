//! The DNS listeners: UDP and TCP in front of one pure function, packet in, packet out.
//!
//! 1. [`answer()`] decides everything; UDP and TCP move octets and enforce limits.
//! 2. UDP threads are those of the operating system, each with a socket of its own. TCP runs on
//!    the runtime, within caps.
//! 3. Every socket is bound to one address, so an answer leaves from the address that was asked.
//! 4. Every thread and task is joined, and the first that fails stops the rest.
//!
//! Nothing here changes the zone, and no answer is logged.

mod answer;
mod bind;
mod question;
mod render;
mod responder;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod wire;

use std::{io, net::SocketAddr, num::NonZeroUsize, sync::Arc, thread, time::Duration};

use tokio::{net::TcpListener, sync::oneshot, task::JoinSet};
use tokio_util::sync::CancellationToken;

pub use answer::{Context, MAX_TCP, MAX_UDP, Response, Transport, answer};

use crate::{
    metrics::{Metrics, dns::Listener},
    zone::Zone,
};
use bind::Sockets;
use responder::Responder;

/// Longest NSID payload in octets: it must leave room for the answer (RFC 5001 sets no limit).
pub const MAX_NSID: usize = 255;

/// Settings of the DNS listeners.
#[derive(Debug, Clone)]
pub struct DnsConfig {
    /// Where to listen, UDP and TCP both; port 0 takes a free port that is the same for both.
    pub listen: Vec<SocketAddr>,
    /// UDP threads on each address, each with a socket of its own.
    pub threads: NonZeroUsize,
    /// The payload of the NSID option (RFC 5001), at most [`MAX_NSID`] octets.
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
    /// A connection that asks nothing for this long is closed.
    pub idle: Duration,
    /// A message must arrive whole, and its answer be taken, within this long.
    pub message: Duration,
    /// Questions that may wait on one connection.
    pub pipelined: usize,
}

/// Sockets that are bound and do not answer yet.
#[derive(Debug)]
pub struct Bound {
    sockets: Vec<Sockets>,
    nsid: Arc<[u8]>,
    tcp: TcpLimits,
}

/// Binds every address: TCP before UDP, because SO_REUSEPORT would let a second process in silently.
///
/// # Errors
/// When an address cannot be bound; the error names it.
pub fn bind(config: &DnsConfig) -> io::Result<Bound> {
    let DnsConfig { listen, threads, nsid, tcp } = config;
    let addresses = bind::expand_wildcards(listen)?;
    let sockets = addresses.into_iter().map(|address| Sockets::bind(address, *threads)).collect::<io::Result<_>>()?;
    let nsid = nsid[..nsid.len().min(MAX_NSID)].into();
    Ok(Bound { sockets, nsid, tcp: tcp.clone() })
}

impl Bound {
    /// The addresses that were bound, wildcards expanded, with their real ports.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.sockets.iter().map(|sockets| sockets.address).collect()
    }

    /// Answers until `stop`, then drains TCP and returns.
    ///
    /// # Errors
    /// The first listener that fails stops all.
    pub async fn run(self, zone: Arc<Zone>, metrics: Arc<Metrics>, stop: CancellationToken) -> io::Result<()> {
        let Self { sockets, nsid, tcp } = self;
        // Stops these listeners alone, when one of them fails.
        let stop = stop.child_token();
        let limiter = tcp::ConnectionLimiter::new(tcp);
        let mut running: JoinSet<io::Result<()>> = JoinSet::new();
        let mut started = Ok(());
        for Sockets { address, tcp, udp } in sockets {
            let listener = |proto| Listener {
                server: format!("dns://{address}"),
                proto,
                family: if address.is_ipv4() { "1" } else { "2" },
                zone: format!("{}.", zone.origin()),
            };
            let responder = |tally| Responder { zone: Arc::clone(&zone), nsid: Arc::clone(&nsid), tally };
            for (index, socket) in udp.into_iter().enumerate() {
                let responder = responder(metrics.dns.sole(&listener("udp")));
                let stopped = stop.clone();
                let serve = move || udp::serve(&socket, &responder, &stopped);
                match in_thread(format!("dns-udp-{index}"), serve) {
                    Ok(ended) => drop(running.spawn(async move { with_listener(address, "UDP", ended.await) })),
                    Err(err) => started = Err(err),
                }
            }
            let responder = responder(metrics.dns.shared(&listener("tcp")));
            let (limiter, stopped) = (Arc::clone(&limiter), stop.clone());
            running.spawn(async move {
                let served = async { tcp::serve(TcpListener::from_std(tcp)?, responder, limiter, stopped).await };
                with_listener(address, "TCP", served.await)
            });
        }
        let mut result = started;
        if result.is_err() {
            stop.cancel();
        }
        while let Some(ended) = running.join_next().await {
            let ended = ended.unwrap_or_else(|panicked| Err(io::Error::other(panicked)));
            if ended.is_err() {
                stop.cancel();
            }
            result = result.and(ended);
        }
        result
    }
}

/// Runs `work` on a thread of its own. The future is ready when the thread has ended and is joined.
fn in_thread(
    name: String,
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<impl Future<Output = io::Result<()>> + Send> {
    let (done, ended) = oneshot::channel::<()>();
    let thread = thread::Builder::new().name(name).spawn(move || {
        // Dropped when the thread ends, also by a panic.
        let _done = done;
        work()
    })?;
    Ok(async move {
        let _ = ended.await;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

/// Adds the listener to an error.
fn with_listener(address: SocketAddr, transport: &str, result: io::Result<()>) -> io::Result<()> {
    result.map_err(|err| io::Error::new(err.kind(), format!("DNS over {transport} on {address}: {err}")))
}
