//! Answers a packet and counts the answer, for UDP and TCP.

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

/// Answers packets from one zone and counts the answers.
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
        // No packet should make `answer` panic. If one does, its sender gets no answer, and the thread
        // continues with the next packet.
        let answered = catch_unwind(AssertUnwindSafe(|| answer(&self.zone.pin(), &context, rng, packet, out)));
        let Ok(answer) = answered else {
            self.counters.panicked();
            return None;
        };
        let answer = answer?;
        self.counters.query(&AnsweredQuery {
            in_zone: answer.in_zone,
            rtype: answer.rtype,
            rcode: answer.rcode,
            request: packet.len(),
            response: answer.len,
            took: begun.elapsed(),
        });
        Some(answer.len)
    }
}
