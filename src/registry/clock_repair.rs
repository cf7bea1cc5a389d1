//! Stamps from the future: what a clock that was set wrong, or an edit of a slice, leaves behind.
//!
//! Of two words on an instance the later stamp counts, so a stamp of next year would be the last word until then: no change by
//! another process would count, the removal would be remembered for a year, and a clock that goes on behind it would stamp everything
//! so. Three rules keep that away:
//!
//! - Ages are measured by the wall clock ([`HybridClock::now`]), and a word from the future that is handed over, or waits in the
//!   outbox at a take-over, counts for nothing if anybody else may have written since ([`AgeLimit`](crate::replicas::word::AgeLimit)).
//! - A process whose clock is behind what it has stored accepts nothing without the API server: only that tells which of the two is
//!   wrong.
//! - At the end of a take-over the wall clock is right to a second, or the Lease would not have been taken, and what is
//!   registered is settled. Then everything that is still stamped in the future is stamped anew, here, and the clock starts
//!   from the wall clock.

use tracing::{error, warn};

use super::{
    KubernetesState, Unavailable, Writer,
    writer::{MAX_DIFFERENCES_AT_START, PendingAcks},
};
use crate::model::{HybridClock, UnixMillis};

impl Writer {
    /// Stamps anew what is stamped in the future. The slices follow.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub(super) fn restamp_future(&mut self) -> Result<(), Unavailable> {
        let now = UnixMillis::now();
        if self.decider.stamper().lead(now).is_none() {
            return Ok(());
        }
        let highest = HybridClock::highest(now.0.saturating_mul(1_000));
        // Read before anything is stamped anew: the new stamps follow the highest one that is not from the future.
        let clock = self.latest_clock(highest);
        self.decider.stamper().reset(clock);
        let expiring = self.decider.expiring_behind(highest);
        let mut services = self.catalog.known_services();
        services.sort_unstable();
        services.dedup();
        let mut restamped = 0;
        for service in &services {
            self.decider.stamper().set_generation(self.committer.generation() + 1);
            let before = self.decider.pending();
            self.decider.restamp(service, highest, now);
            restamped += self.decider.pending() - before;
            // In parts: all of a million instances would be one batch, in memory and in the journal.
            if self.decider.pending() >= MAX_DIFFERENCES_AT_START {
                self.finish(PendingAcks::default());
            }
        }
        self.finish(PendingAcks::default());
        self.committer.usable()?;
        expiring.into_iter().for_each(|service| self.decider.note_new_expiry(service));
        warn!(
            restamped,
            "changes were stamped in the future, by a clock that was set wrong or by an edit of a slice: they count as made now"
        );
        Ok(())
    }

    /// The highest clock of what is known here, up to `highest`.
    fn latest_clock(&self, highest: u64) -> HybridClock {
        let mut clock = HybridClock::default();
        let mut observe = |seen: u64| {
            if seen <= highest {
                clock.observe(seen);
            }
        };
        for (_, service) in self.catalog.services() {
            service.instances.iter().for_each(|instance| observe(instance.stamp().clock));
        }
        for (_, tombstones) in self.catalog.all_tombstones() {
            observe(tombstones.refuse_before());
            tombstones.iter().for_each(|removal| observe(removal.stamp.clock));
        }
        clock
    }

    /// Says once that the clock was set back while this process ran.
    pub(super) fn check_clock(&mut self) {
        if let Some(lead) = self.decider.stamper().new_lead(UnixMillis::now()) {
            error!(
                ?lead,
                "the clock of this machine is behind the last change, so it was set back, or was wrong before: changes are stamped \
                 ahead of it until another process takes the Lease, or this one again"
            );
        }
    }

    /// What is accepted while the comparison runs comes after what the slices hold, whatever the clocks of their writers.
    pub(super) fn observe_slices(&mut self, held: &KubernetesState) {
        let highest = HybridClock::highest(UnixMillis::now().0.saturating_mul(1_000));
        let instances = held.services.iter().flat_map(|(_, instances)| instances).map(|instance| instance.stamp());
        let removals =
            held.tombstones.iter().flat_map(|(_, tombstones)| tombstones.iter()).map(|removal| removal.stamp);
        let latest = instances.chain(removals).filter(|stamp| stamp.clock <= highest).max();
        self.decider.stamper().observe(latest.unwrap_or_default());
    }
}
