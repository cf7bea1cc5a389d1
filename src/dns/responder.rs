//! From a packet to a counted answer: what UDP and TCP share.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

use super::answer::{Context, Transport, answer};
use crate::{
    metrics::dns::{AnsweredQuery, DnsCounters},
    zone::Zone,
};

/// Answers packets from one zone and counts the answers; a transport has one or several.
#[derive(Debug, Clone)]
pub(super) struct Responder {
    pub(super) zone: Arc<Zone>,
    pub(super) nsid: Arc<[u8]>,
    pub(super) counters: Arc<DnsCounters>,
}

impl Responder {
    /// Writes the answer to `packet` into `out`, counts it and returns its length; `None` if there is
    /// no answer.
    pub(super) fn respond(
        &self,
        transport: Transport,
        rng: &mut fastrand::Rng,
        packet: &[u8],
        out: &mut [u8],
    ) -> Option<usize> {
        let begun = Instant::now();
        let context = Context { transport, nsid: &self.nsid };
        // No packet should make `answer` panic. If one does, its sender gets no answer, and the
        // thread goes on for everybody else.
        let answered = catch_unwind(AssertUnwindSafe(|| answer(&self.zone.pin(), &context, rng, packet, out)));
        let Ok(reply) = answered else {
            self.counters.panicked();
            return None;
        };
        let reply = reply?;
        self.counters.query(&AnsweredQuery {
            in_zone: reply.in_zone,
            rtype: reply.rtype,
            rcode: reply.rcode,
            request: packet.len(),
            response: reply.len,
            took: begun.elapsed(),
        });
        Some(reply.len)
    }
}
