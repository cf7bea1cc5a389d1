//! Whether this process certainly is the only writer.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::SeqCst},
};

use tokio::sync::watch;

use crate::{
    model::UnixMillis,
    replicas::{
        election::RENEW_DEADLINE,
        time::{BootTime, Now},
    },
};

/// What the elector knows, for those who write, and what they see that it must know. Clones share it.
#[derive(Debug, Clone)]
pub(in crate::kubernetes) struct Fence {
    renewed: watch::Sender<Option<BootTime>>,
    /// Under which this process writes.
    term: Arc<AtomicU64>,
    /// The last term of a slice that was higher.
    higher: watch::Sender<u64>,
}

impl Fence {
    pub(in crate::kubernetes) fn new() -> Self {
        Self { renewed: watch::Sender::new(None), term: Arc::default(), higher: watch::Sender::new(0) }
    }

    /// The Lease was renewed by a request that began at this time, and its holder writes. Does nothing after a slice with a
    /// higher term was seen.
    pub(in crate::kubernetes) fn renewed(&self, began: BootTime) {
        if *self.higher.borrow() <= self.term() {
            self.renewed.send_replace(Some(began));
        }
    }

    /// Nothing is written any more.
    pub(in crate::kubernetes) fn close(&self) {
        self.renewed.send_replace(None);
    }

    /// When the last successful renewal began: changes with each renewal, and is `None` while nothing is written.
    pub(in crate::kubernetes) fn renewals(&self) -> watch::Receiver<Option<BootTime>> {
        self.renewed.subscribe()
    }

    /// From now on this process writes under `term`, if it writes.
    pub(in crate::kubernetes) fn set_term(&self, term: u64) {
        self.term.store(term, SeqCst);
    }

    /// Under which this process writes.
    pub(in crate::kubernetes) fn term(&self) -> u64 {
        self.term.load(SeqCst)
    }

    /// A slice shows `term`. If another process can have written it under a Lease that this one does not know of, nothing is written or
    /// confirmed from now on, until this process writes under a higher term. Returns whether that is so.
    pub(in crate::kubernetes) fn deposed_by(&self, term: u64) -> bool {
        let (mine, unix_seconds) = (self.term(), UnixMillis::now().0 / 1_000);
        let now = Now { boot: BootTime::default(), unix_seconds, eligible: true };
        let deposed = term > mine && term <= now.highest_term(mine);
        if deposed {
            self.higher.send_replace(term);
            self.close();
        }
        deposed
    }

    /// Changes with each slice by which this process was [deposed](Self::deposed_by), to the slice's term.
    pub(in crate::kubernetes) fn higher_terms(&self) -> watch::Receiver<u64> {
        self.higher.subscribe()
    }

    /// Waits until no other process can hold the Lease.
    pub(super) async fn safe(&self) {
        self.wait_for(|began| is_safe(began, boot_time())).await;
    }

    /// Waits until what was seen in Kubernetes before this call counts: no other process had taken over
    /// by then. The rule of [`crate::replicas::confirm`] for one write.
    pub(in crate::kubernetes) async fn confirmed(&self) {
        let seen = boot_time();
        // Either the Lease was safely held when it was seen, or a renewal that began later succeeded: nobody had it in
        // between.
        self.wait_for(|began| is_safe(began, seen) || began > seen).await;
    }

    async fn wait_for(&self, holds: impl Fn(BootTime) -> bool) {
        // The sender is this value.
        let _ = self.renewed.subscribe().wait_for(|renewed| renewed.is_some_and(&holds)).await;
    }
}

fn is_safe(began: BootTime, now: BootTime) -> bool {
    now.since(began) < RENEW_DEADLINE
}

/// Time since boot, by a clock that goes on through suspensions.
pub(in crate::kubernetes) fn boot_time() -> BootTime {
    // CLOCK_MONOTONIC stops while a machine sleeps: a process that wakes would believe that its Lease is still young.
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    BootTime(std::time::Duration::new(seconds.unwrap_or_default(), nanos.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt as _;

    use super::*;

    fn ago(seconds: u64) -> BootTime {
        BootTime(boot_time().0 - Duration::from_secs(seconds))
    }

    #[tokio::test]
    async fn nothing_is_written_or_confirmed_after_the_renew_deadline() {
        let fence = Fence::new();
        assert!(fence.safe().now_or_never().is_none(), "the Lease is not held");
        fence.renewed(ago(9));
        assert!(fence.safe().now_or_never().is_some() && fence.confirmed().now_or_never().is_some());
        fence.renewed(ago(11));
        assert!(fence.safe().now_or_never().is_none());
        let mut waiting = Box::pin(fence.confirmed());
        assert!(waiting.as_mut().now_or_never().is_none());
        fence.renewed(BootTime(boot_time().0 + Duration::from_millis(1)));
        waiting.await;
        fence.close();
        assert!(fence.safe().now_or_never().is_none());
    }

    #[tokio::test]
    async fn slice_of_a_higher_term_closes_it_until_the_term_is_higher_still() {
        let fence = Fence::new();
        fence.set_term(7);
        fence.renewed(ago(1));
        let mut terms = fence.higher_terms();
        assert!(!fence.deposed_by(6) && !fence.deposed_by(7), "its own, and those before");
        assert!(!fence.deposed_by(u64::MAX), "no Lease had that one");
        assert!(fence.safe().now_or_never().is_some());
        assert!(fence.deposed_by(9));
        assert!(terms.changed().now_or_never().is_some() && *terms.borrow_and_update() == 9);
        fence.renewed(ago(1));
        assert!(fence.safe().now_or_never().is_none(), "a renewal that was under way changes nothing");
        fence.set_term(10);
        fence.renewed(ago(1));
        assert!(fence.safe().now_or_never().is_some());
    }
}
