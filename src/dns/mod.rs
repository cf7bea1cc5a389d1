//! The DNS listeners: UDP and TCP in front of one pure function, packet in, packet out.
//!
//! 1. [`answer()`] computes every answer; UDP and TCP move octets and enforce limits.
//! 2. UDP threads are those of the operating system, each with a socket of its own. TCP runs on a
//!    runtime of its own, within caps: a flood of registrations does not reach it, nor its own UDP.
//! 3. An answer leaves from the address that was asked. A wildcard is one socket per thread, and
//!    the kernel reports the destination address of each packet.
//! 4. Every thread and task is joined, and the first that fails stops the rest.
//!
//! This module only reads the zone, and logs no answers.

mod answer;
mod bind;
mod question;
mod render;
mod responder;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod wildcard;
mod wire;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

pub use answer::{AnswerSummary, Context, MAX_TCP, MAX_UDP, Transport, answer};

use crate::{
    metrics::{ListenerKind, Metrics, dns::ListenerLabels},
    net::{self, ConnectionLimiter, EvictionPolicy},
    zone::Zone,
};
use bind::Sockets;
pub use bind::reachable;
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
    /// What connections may take.
    pub tcp: TcpLimits,
}

/// Limits on TCP connections (RFC 7766 §6.2, RFC 9210 §4).
#[derive(Debug, Clone)]
pub struct TcpLimits {
    /// Connections in all.
    pub connections: usize,
    /// Connections of one peer address; `None` for no limit, because CoreDNS is one peer.
    pub per_peer: Option<usize>,
    /// A connection without a question for this long is closed.
    pub idle: Duration,
    /// How long a message may take to arrive, and how long its answer may take to be read.
    pub message: Duration,
    /// Questions that may wait on one connection.
    pub pipelined: usize,
}

/// Sockets that are bound and do not answer yet.
#[derive(Debug)]
pub struct BoundSockets {
    sockets: Vec<Sockets>,
    nsid: Arc<[u8]>,
    tcp: TcpLimits,
}

/// Binds every address: TCP before UDP, because SO_REUSEPORT would let a second process in silently.
///
/// # Errors
/// When an address cannot be bound; the error names it.
pub fn bind(config: &DnsConfig) -> io::Result<BoundSockets> {
    let DnsConfig { listen, threads, nsid, tcp } = config;
    let addresses = bind::without_covered(listen);
    let sockets =
        addresses.into_iter().map(|address| Sockets::bind(address, *threads, tcp)).collect::<io::Result<_>>()?;
    let nsid = nsid[..nsid.len().min(MAX_NSID)].into();
    Ok(BoundSockets { sockets, nsid, tcp: tcp.clone() })
}

impl BoundSockets {
    /// The addresses that were bound, with their real ports.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.sockets.iter().map(|sockets| sockets.address).collect()
    }

    /// The addresses at which other machines reach the sockets: wildcards are replaced by the machine's
    /// addresses.
    ///
    /// # Errors
    /// When the system does not list them.
    pub fn reachable_addresses(&self) -> io::Result<Vec<IpAddr>> {
        bind::reachable(&self.addresses())
    }

    /// Descriptors that are open.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        self.sockets.iter().map(|sockets| 1 + sockets.udp.len()).sum()
    }

    /// Answers until `stop`, then drains TCP and returns.
    ///
    /// # Errors
    /// The first listener that fails stops all.
    pub async fn run(self, zone: Arc<Zone>, metrics: Arc<Metrics>, stop: CancellationToken) -> io::Result<()> {
        let Self { sockets, nsid, tcp: limits } = self;
        // Stops these listeners alone, when one of them fails.
        let stop = stop.child_token();
        // For the UDP threads. The token locks a mutex on every look, which all threads would share for every packet.
        let stopping = Arc::new(AtomicBool::new(false));
        let mut running: JoinSet<io::Result<()>> = JoinSet::new();
        // Kept, not returned: threads that run by then have to be joined below.
        let mut started = Ok(());
        let mut workers = 1;
        let mut tcp_listeners = Vec::new();
        for Sockets { address, tcp, udp } in sockets {
            let listener = |proto| ListenerLabels {
                server: format!("dns://{address}"),
                proto,
                family: if address.is_ipv4() { "1" } else { "2" },
                zone: format!("{}.", zone.origin()),
            };
            let responder = |counters| Responder { zone: Arc::clone(&zone), nsid: Arc::clone(&nsid), counters };
            workers = workers.max(udp.len());
            for (index, socket) in udp.into_iter().enumerate() {
                // Counters of its own for each thread, so that no packet pays for an atomic that two cores write.
                let responder = responder(metrics.dns.single_writer(&listener("udp")));
                let stopping = Arc::clone(&stopping);
                let serve = move || udp::serve(&socket, address, &responder, &stopping);
                match net::run_in_thread(format!("dns-udp-{index}"), serve) {
                    Ok(ended) => drop(running.spawn(async move { with_listener(address, "UDP", ended.await) })),
                    Err(err) => started = Err(err),
                }
            }
            tcp_listeners.push((address, tcp, responder(metrics.dns.multi_writer(&listener("tcp")))));
        }
        // One limiter for all TCP listeners: the limits are those of the process.
        let connections = Arc::clone(&metrics.connections);
        let limiter = ConnectionLimiter::new(
            ListenerKind::Dns,
            limits.connections,
            limits.per_peer,
            EvictionPolicy::Any,
            connections,
        );
        let shared = tcp::TcpState::new(limits, limiter, metrics);
        let stopped = stop.clone();
        let tcp = async move {
            let serve = |(address, listener, responder)| {
                let (shared, stop) = (Arc::clone(&shared), stopped.clone());
                async move {
                    let listener = with_listener(address, "TCP", TcpListener::from_std(listener))?;
                    tcp::serve(listener, responder, shared, stop).await;
                    Ok(())
                }
            };
            future::try_join_all(tcp_listeners.into_iter().map(serve)).await.map(|_| ())
        };
        match net::run_on_runtime("dns-tcp", workers, tcp) {
            Ok(ended) => drop(running.spawn(ended)),
            Err(err) => started = Err(err),
        }
        let mut result = started;
        if result.is_err() {
            stop.cancel();
        }
        while !running.is_empty() {
            tokio::select! {
                () = stop.cancelled(), if !stopping.load(Ordering::Relaxed) => stopping.store(true, Ordering::Relaxed),
                Some(ended) = running.join_next() => {
                    let ended = ended.unwrap_or_else(|panicked| Err(io::Error::other(panicked)));
                    if ended.is_err() {
                        stop.cancel();
                    }
                    // The first error is the cause. Those after it follow from the stop.
                    result = result.and(ended);
                }
            }
        }
        result
    }
}

/// Adds the listener to an error.
fn with_listener<T>(address: SocketAddr, transport: &str, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|err| io::Error::new(err.kind(), format!("DNS over {transport} on {address}: {err}")))
}
