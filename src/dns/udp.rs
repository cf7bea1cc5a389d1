//! The UDP front: one thread, one socket, one packet at a time.
//!
//! The threads are those of the operating system: neither a registration nor a slow peer over TCP
//! ever delays one.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::{
    answer::{MAX_UDP, Transport},
    responder::Responder,
};

/// How often a thread that receives nothing looks at the stop signal.
const STOP_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Longest query that is read whole, in octets: one question and an OPT record take far less. The
/// rest of a longer packet is dropped, and its beginning is a FORMERR.
const MAX_QUERY: usize = 4096;

/// Answers on `socket` until `stop`.
pub(super) fn serve(socket: &UdpSocket, responder: &Responder, stop: &CancellationToken) -> io::Result<()> {
    socket.set_read_timeout(Some(STOP_POLL_INTERVAL))?;
    let mut rng = fastrand::Rng::new();
    let mut packet = [0; MAX_QUERY];
    let mut out = [0; MAX_UDP as usize];
    while !stop.is_cancelled() {
        let (len, peer) = match socket.recv_from(&mut packet) {
            Ok(received) => received,
            Err(err) if is_transient(&err) => continue,
            Err(err) => return Err(err),
        };
        if !is_answerable(peer) {
            continue;
        }
        if let Some(len) = responder.respond(Transport::Udp, &mut rng, &packet[..len], &mut out) {
            // A lost answer is a lost datagram: the resolver asks again.
            let _ = socket.send_to(&out[..len], peer);
        }
    }
    Ok(())
}

/// Whether an answer can be sent to `peer`: port 0 belongs to nobody, and sending to it fails.
fn is_answerable(peer: SocketAddr) -> bool {
    peer.port() != 0
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
