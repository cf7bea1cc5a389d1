//! DNS over UDP: one thread, one socket, one packet at a time.
//!
//! The threads are those of the operating system, so that neither a registration nor a slow peer over TCP
//! delays them.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use super::{
    answer::{MAX_UDP, Transport},
    responder::Responder,
    wildcard::WildcardSocket,
};

/// How long a receive waits, and so how often a thread without packets checks the stop flag.
const STOP_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Pause after a lasting error of a socket, so that the thread neither spins nor ends.
const RECEIVE_BACKOFF: Duration = Duration::from_millis(50);

/// Longest query in octets; one question and an OPT record take far less. The kernel drops the rest of a
/// longer packet, and the answer is FORMERR.
const MAX_QUERY: usize = 4096;

/// A socket whose answers leave from the address that was asked.
pub(super) trait DatagramSocket {
    /// The sender of a packet.
    type Peer;

    /// Receives a packet and returns its octets and its sender; `None` for a sender that cannot be answered.
    fn receive(&mut self, packet: &mut [u8]) -> io::Result<(usize, Option<Self::Peer>)>;

    fn send(&mut self, answer: &[u8], peer: &Self::Peer) -> io::Result<()>;
}

/// A socket that is bound to one address answers from there.
impl DatagramSocket for &UdpSocket {
    type Peer = SocketAddr;

    fn receive(&mut self, packet: &mut [u8]) -> io::Result<(usize, Option<SocketAddr>)> {
        let (octets, peer) = self.recv_from(packet)?;
        // Port 0 is reserved (RFC 6335 §6), and sending to it fails.
        Ok((octets, Some(peer).filter(|peer| peer.port() != 0)))
    }

    fn send(&mut self, answer: &[u8], peer: &SocketAddr) -> io::Result<()> {
        self.send_to(answer, peer).map(|_| ())
    }
}

/// Answers on `socket`, which is bound to `address`, until `stopping`.
pub(super) fn serve(
    socket: &UdpSocket,
    address: SocketAddr,
    responder: &Responder,
    stopping: &AtomicBool,
) -> io::Result<()> {
    socket.set_read_timeout(Some(STOP_POLL_INTERVAL))?;
    if address.ip().is_unspecified() {
        answer_all(WildcardSocket::new(socket, address), responder, stopping);
    } else {
        answer_all(socket, responder, stopping);
    }
    Ok(())
}

pub(super) fn answer_all(mut socket: impl DatagramSocket, responder: &Responder, stopping: &AtomicBool) {
    let mut rng = fastrand::Rng::new();
    let mut packet = [0; MAX_QUERY];
    let mut out = [0; MAX_UDP as usize];
    let mut is_failing = false;
    // A relaxed load of a flag that is written once, at the stop: it stays in every core's cache.
    while !stopping.load(Ordering::Relaxed) {
        let (octets, peer) = match socket.receive(&mut packet) {
            Ok(received) => received,
            Err(err) if is_transient(&err) => continue,
            Err(err) => {
                responder.counters.receive_failed();
                // Logged once per outage, however long it lasts.
                if !std::mem::replace(&mut is_failing, true) {
                    tracing::warn!(error = %err, "a UDP socket for DNS cannot receive; trying again");
                }
                thread::sleep(RECEIVE_BACKOFF);
                continue;
            }
        };
        if std::mem::take(&mut is_failing) {
            tracing::info!("the UDP socket for DNS receives again");
        }
        let Some(peer) = peer else { continue };
        if let Some(len) = responder.respond(Transport::Udp, &mut rng, &packet[..octets], &mut out) {
            // An answer that cannot be sent is a lost datagram: the resolver retries.
            let _ = socket.send(&out[..len], &peer);
        }
    }
}

/// Whether the error is not a fault of the socket: the receive timed out, or the kernel reports an ICMP
/// error of an earlier answer to a closed port or an unreachable host.
fn is_transient(err: &io::Error) -> bool {
    use io::ErrorKind as E;
    matches!(
        err.kind(),
        E::WouldBlock
            | E::TimedOut
            | E::Interrupted
            | E::ConnectionRefused
            | E::ConnectionReset
            | E::HostUnreachable
            | E::NetworkUnreachable
            | E::OutOfMemory
    )
}
