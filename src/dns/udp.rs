//! The UDP front: one thread, one socket, one packet at a time.
//!
//! Threads are those of the operating system, so that no registration and no slow peer over TCP
//! ever keeps one waiting.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::answer::{Context, MAX_UDP, Transport, answer};
use crate::{
    metrics::dns::{Query, Tally},
    zone::Zone,
};

/// How long a thread waits for a packet before it looks whether it should stop.
const LOOK: Duration = Duration::from_millis(100);

/// Largest query that is read whole, in octets. One question and an OPT record take far less; of
/// a longer packet the beginning is read, which is a FORMERR.
const MAX_QUERY: usize = 4096;

/// What a thread answers with.
#[derive(Debug, Clone)]
pub(super) struct Responder {
    pub(super) zone: Arc<Zone>,
    pub(super) nsid: Arc<[u8]>,
    pub(super) tally: Arc<Tally>,
}

impl Responder {
    /// Answers one packet into `out` and counts it; `None` where silence is the answer.
    pub(super) fn respond(
        &self,
        transport: Transport,
        rng: &mut fastrand::Rng,
        packet: &[u8],
        out: &mut [u8],
    ) -> Option<usize> {
        let begun = Instant::now();
        let context = Context { transport, nsid: &self.nsid };
        // Nothing that a peer sends should make it panic. Should one find a way, it gets silence
        // and the others their answers.
        let answered = catch_unwind(AssertUnwindSafe(|| answer(&self.zone.pin(), &context, rng, packet, out)));
        let Ok(reply) = answered else {
            self.tally.panicked();
            return None;
        };
        let reply = reply?;
        self.tally.query(&Query {
            in_zone: reply.in_zone,
            qtype: reply.qtype,
            rcode: reply.rcode.number(),
            request: packet.len(),
            response: reply.len,
            took: begun.elapsed(),
        });
        Some(reply.len)
    }
}

/// Answers on `socket` until `stop`.
pub(super) fn serve(socket: &UdpSocket, responder: &Responder, stop: &CancellationToken) -> io::Result<()> {
    socket.set_read_timeout(Some(LOOK))?;
    let mut rng = fastrand::Rng::new();
    let mut packet = [0; MAX_QUERY];
    let mut out = [0; MAX_UDP as usize];
    while !stop.is_cancelled() {
        let (len, peer) = match socket.recv_from(&mut packet) {
            Ok(received) => received,
            Err(error) if is_transient(&error) => continue,
            Err(error) => return Err(error),
        };
        if !answerable(peer) {
            continue;
        }
        if let Some(len) = responder.respond(Transport::Udp, &mut rng, &packet[..len], &mut out) {
            // A peer that cannot be reached asks again, or does not.
            let _ = socket.send_to(&out[..len], peer);
        }
    }
    Ok(())
}

/// Whether an answer could go there: nothing listens on port 0, and it makes sending fail.
fn answerable(peer: SocketAddr) -> bool {
    peer.port() != 0
}

/// Whether a socket is as good after the error as before it: nothing came, or an earlier answer
/// met a closed port.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind as E;
    matches!(
        error.kind(),
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
