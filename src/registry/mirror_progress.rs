//! What Kubernetes does not have yet, service by service, and who waits until it has.
//!
//! The writer notes a service before it answers for it; the mirror takes what is new, writes it
//! down and confirms the generation that it wrote. Only services that are behind are held. Without
//! a mirror nothing is ever behind.

use std::{
    collections::HashMap,
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Notify, oneshot};

use crate::model::{ServiceKey, UnixMillis};

/// Which services the mirror is behind with.
#[derive(Debug)]
pub struct MirrorProgress {
    /// Whether there is a mirror.
    mirrored: bool,
    behind: Mutex<Behind>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Behind {
    services: HashMap<ServiceKey, Lag, foldhash::fast::RandomState>,
    /// Noted since the mirror last asked.
    dirty: Vec<ServiceKey>,
}

/// How far behind one service is.
#[derive(Debug)]
struct Lag {
    /// Its last change.
    generation: u64,
    /// When the oldest change that is not mirrored was received.
    since: UnixMillis,
    /// Stands in the dirty.
    queued: bool,
    waiting: Vec<(u64, oneshot::Sender<()>)>,
}

/// How far behind the mirror is as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MirrorLag {
    /// Services that are not in Kubernetes as they are here.
    pub services: usize,
    /// When the oldest change among them was received.
    pub since: Option<UnixMillis>,
}

impl MirrorProgress {
    pub(super) fn new(mirrored: bool) -> Self {
        Self { mirrored, behind: Mutex::default(), changed: Notify::new() }
    }

    /// Whether there is a mirror to wait for.
    #[must_use]
    pub fn are_awaited(&self) -> bool {
        self.mirrored
    }

    /// Notes that services changed, with the generation and the time of receipt.
    pub(super) fn note(&self, changed: impl IntoIterator<Item = (ServiceKey, u64, UnixMillis)>) {
        if !self.mirrored {
            return;
        }
        let mut behind = self.lock();
        let Behind { services, dirty } = &mut *behind;
        for (service, generation, received) in changed {
            let lag = services.entry(service.clone()).or_insert_with(|| Lag {
                generation,
                since: received,
                queued: false,
                waiting: Vec::new(),
            });
            lag.generation = lag.generation.max(generation);
            if !mem::replace(&mut lag.queued, true) {
                dirty.push(service);
            }
        }
        drop(behind);
        self.changed.notify_one();
    }

    /// Services that changed since the last call; waits until there is one. For the one mirror.
    /// Cancelling loses nothing.
    pub async fn take_dirty(&self) -> Vec<ServiceKey> {
        loop {
            let dirty = {
                let mut behind = self.lock();
                let Behind { services, dirty } = &mut *behind;
                let dirty = mem::take(dirty);
                for service in &dirty {
                    services.entry(service.clone()).and_modify(|lag| lag.queued = false);
                }
                dirty
            };
            if !dirty.is_empty() {
                return dirty;
            }
            self.changed.notified().await;
        }
    }

    /// Kubernetes has everything of `service` up to `generation`. Gives back whether it was behind.
    pub(super) fn confirm(&self, service: &ServiceKey, generation: u64) -> bool {
        let mut behind = self.lock();
        let Some(lag) = behind.services.get_mut(service) else { return false };
        let (has, waits): (Vec<_>, Vec<_>) =
            mem::take(&mut lag.waiting).into_iter().partition(|(wanted, _)| *wanted <= generation);
        if lag.generation <= generation {
            behind.services.remove(service);
        } else {
            lag.waiting = waits;
            lag.since = UnixMillis::now();
        }
        drop(behind);
        // Whoever does not wait any more is of no interest.
        for (_, waiter) in has {
            let _ = waiter.send(());
        }
        true
    }

    /// Comes to an end when Kubernetes has `generation` of `service`: at once where nothing is
    /// behind. How long to wait is the caller's business.
    pub fn confirmed(&self, service: &ServiceKey, generation: u64) -> impl Future<Output = ()> + Send + use<> {
        let receiver = {
            let mut behind = self.lock();
            behind.services.get_mut(service).map(|lag| {
                if lag.waiting.len() == lag.waiting.capacity() {
                    // Those who gave up make room; not again before as many have come as are left,
                    // because thousands may wait for one service while the API server is away.
                    lag.waiting.retain(|(_, waiter)| !waiter.is_closed());
                    lag.waiting.reserve(lag.waiting.len());
                }
                let (sender, receiver) = oneshot::channel();
                lag.waiting.push((generation, sender));
                receiver
            })
        };
        async move {
            if let Some(receiver) = receiver {
                // An error means that the registry is gone, and so is whoever could confirm.
                let _ = receiver.await;
            }
        }
    }

    /// How far behind the mirror is. Walks through all that is behind.
    #[must_use]
    pub fn lag(&self) -> MirrorLag {
        let behind = self.lock();
        MirrorLag { services: behind.services.len(), since: behind.services.values().map(|lag| lag.since).min() }
    }

    fn lock(&self) -> MutexGuard<'_, Behind> {
        // Nothing panics while it holds the lock, and what it guards is whole at every step.
        self.behind.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::model::Validator;

    fn key(name: &str) -> ServiceKey {
        Validator { zone_wire_len: 15, names_allowed: false }.service("prod", name).expect("valid")
    }

    #[test]
    fn whoever_waits_hears_of_the_generation_that_was_written() {
        let mirror_progress = MirrorProgress::new(true);
        mirror_progress.note([(key("web"), 7, UnixMillis(1)), (key("db"), 7, UnixMillis(2))]);
        mirror_progress.note([(key("web"), 8, UnixMillis(3))]);
        assert_eq!(mirror_progress.take_dirty().now_or_never(), Some(vec![key("web"), key("db")]));
        assert_eq!(mirror_progress.take_dirty().now_or_never(), None);
        assert_eq!(mirror_progress.lag(), MirrorLag { services: 2, since: Some(UnixMillis(1)) });

        let mut seven = Box::pin(mirror_progress.confirmed(&key("web"), 7));
        let mut eight = Box::pin(mirror_progress.confirmed(&key("web"), 8));
        assert!(mirror_progress.confirm(&key("web"), 7));
        assert_eq!((seven.as_mut().now_or_never(), eight.as_mut().now_or_never()), (Some(()), None));
        mirror_progress.note([(key("web"), 9, UnixMillis(4))]);
        assert_eq!(mirror_progress.take_dirty().now_or_never(), Some(vec![key("web")]));
        assert!(mirror_progress.confirm(&key("web"), 9));
        assert_eq!(eight.now_or_never(), Some(()));
        assert!(!mirror_progress.confirm(&key("web"), 9), "it was not behind any more");
        assert_eq!(mirror_progress.confirmed(&key("web"), 9).now_or_never(), Some(()));
        assert_eq!(mirror_progress.lag().services, 1);
    }

    #[test]
    fn whoever_gave_up_is_forgotten_and_whoever_waits_is_not() {
        let mirror_progress = MirrorProgress::new(true);
        mirror_progress.note([(key("web"), 7, UnixMillis(1))]);
        let mut patient = Vec::new();
        for n in 0..10_000 {
            let waits = Box::pin(mirror_progress.confirmed(&key("web"), 7));
            if n % 100 == 0 {
                patient.push(waits);
            }
        }
        let held = mirror_progress.lock().services[&key("web")].waiting.len();
        assert!((100..1_000).contains(&held), "{held} are held for {} who wait", patient.len());
        assert!(mirror_progress.confirm(&key("web"), 7));
        assert!(patient.into_iter().all(|waits| waits.now_or_never() == Some(())));
    }

    #[test]
    fn without_a_mirror_nothing_is_behind() {
        let mirror_progress = MirrorProgress::new(false);
        mirror_progress.note([(key("web"), 7, UnixMillis(1))]);
        assert_eq!(mirror_progress.confirmed(&key("web"), 7).now_or_never(), Some(()));
        assert_eq!(mirror_progress.lag(), MirrorLag::default());
    }
}
