//! Whether this process certainly is the only writer.

use tokio::sync::watch;

use crate::replicas::{election::RENEW_DEADLINE, time::BootTime};

/// What the elector knows, for those who write. Clones share it.
#[derive(Debug, Clone)]
pub(in crate::kubernetes) struct Fence(watch::Sender<Option<BootTime>>);

impl Fence {
    pub(in crate::kubernetes) fn new() -> Self {
        Self(watch::Sender::new(None))
    }

    /// The Lease was renewed by a request that began at this time, and its holder writes.
    pub(in crate::kubernetes) fn renewed(&self, began: BootTime) {
        self.0.send_replace(Some(began));
    }

    /// Nothing is written any more.
    pub(in crate::kubernetes) fn close(&self) {
        self.0.send_replace(None);
    }

    /// When the last successful renewal began: changes with each renewal, and is `None` while nothing is written.
    pub(in crate::kubernetes) fn renewals(&self) -> watch::Receiver<Option<BootTime>> {
        self.0.subscribe()
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
        let _ = self.0.subscribe().wait_for(|renewed| renewed.is_some_and(&holds)).await;
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
}
