//! DNS over UDP: one thread, one socket, one packet at a time.
//!
//! The threads are those of the operating system: neither a registration nor a slow peer over TCP
//! ever delays one.

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

/// How long a receive waits: so often a thread without packets looks at the stop signal.
const STOP_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Pause after an error that a socket did not recover from at once: the thread must neither spin
/// nor end.
const RECEIVE_BACKOFF: Duration = Duration::from_millis(50);

/// Longest query that is read whole, in octets: one question and an OPT record take far less. The
/// rest of a longer packet is dropped, and its beginning is a FORMERR.
const MAX_QUERY: usize = 4096;

/// A socket whose answers leave from the address that was asked.
pub(super) trait DatagramSocket {
    /// Who asked.
    type Peer;

    /// Receives a packet and returns its octets and its sender, or `None` where there is nobody to
    /// answer.
    fn receive(&mut self, packet: &mut [u8]) -> io::Result<(usize, Option<Self::Peer>)>;

    fn send(&mut self, answer: &[u8], peer: &Self::Peer) -> io::Result<()>;
}

/// A socket that is bound to one address answers from there.
impl DatagramSocket for &UdpSocket {
    type Peer = SocketAddr;

    fn receive(&mut self, packet: &mut [u8]) -> io::Result<(usize, Option<SocketAddr>)> {
        let (octets, peer) = self.recv_from(packet)?;
        // Port 0 belongs to nobody, and sending to it fails.
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
    // A relaxed load of a flag that nobody writes until the end: it stays in every core's cache.
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
            // A lost answer is a lost datagram: the resolver asks again.
            let _ = socket.send(&out[..len], &peer);
        }
    }
}

/// Whether the error says nothing about the socket: the timeout passed, or an earlier answer met a
/// closed port or an unreachable host.
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
