//! How many calls of a kind may be open at once: a few of each peer, so that none keeps the others out.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::net::peer_group;

/// The limiter. A peer is a network address as the limits on connections count it, `None` without a connection.
#[derive(Debug, Clone)]
pub(super) struct CallLimiter {
    /// Of one peer.
    max_per_peer: usize,
    /// Of all.
    max: usize,
    taken: Arc<Mutex<HashMap<Option<IpAddr>, usize>>>,
}

impl CallLimiter {
    pub(super) fn new(max_per_peer: usize, max: usize) -> Self {
        Self { max_per_peer, max, taken: Arc::default() }
    }

    /// Returns a permit, unless this peer or all together have as many as they may.
    pub(super) fn acquire(&self, peer: Option<IpAddr>) -> Option<CallPermit> {
        let peer = peer.map(peer_group);
        let mut taken = self.lock();
        let of_peer = taken.get(&peer).copied().unwrap_or_default();
        // Summed and not counted apart: the map has as many entries as there are permits at most, and cannot disagree
        // with itself.
        if of_peer >= self.max_per_peer || taken.values().sum::<usize>() >= self.max {
            return None;
        }
        taken.insert(peer, of_peer + 1);
        Some(CallPermit { limiter: self.clone(), peer })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Option<IpAddr>, usize>> {
        // Each change of the map is one call, so a poisoned lock guards a consistent map.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to one open call, until it is dropped.
#[derive(Debug)]
pub(super) struct CallPermit {
    limiter: CallLimiter,
    peer: Option<IpAddr>,
}

impl Drop for CallPermit {
    fn drop(&mut self) {
        if let Entry::Occupied(mut taken) = self.limiter.lock().entry(self.peer) {
            *taken.get_mut() -= 1;
            if *taken.get() == 0 {
                // A peer without open calls leaves nothing, or the map would grow with every address that ever called.
                taken.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn peer_with_all_its_permits_leaves_those_of_others() {
        const MAX_PER_PEER: usize = 4;
        const MAX: usize = 64;
        let limiter = CallLimiter::new(MAX_PER_PEER, MAX);
        let peer = |last| Some(IpAddr::from(Ipv4Addr::new(10, 0, 0, last)));
        let mut stranger: Vec<_> =
            (0..MAX_PER_PEER).map(|_| limiter.acquire(peer(1)).expect("there is room")).collect();
        assert!(limiter.acquire(peer(1)).is_none());
        let other = limiter.acquire(peer(2)).expect("another peer");
        stranger.pop();
        assert!(limiter.acquire(peer(1)).is_some());
        drop((stranger, other));
        assert!(limiter.lock().is_empty(), "ended requests leave nothing");
        let all: Vec<_> = (0..=255).map_while(|last| limiter.acquire(peer(last))).collect();
        assert_eq!(all.len(), MAX);
    }
}
