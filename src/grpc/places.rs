//! How many calls of a kind may be open at once: a few of each peer, so that none keeps the others out.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::net::peer_group;

/// The places. A peer is a network address as the limits on connections count it, `None` without a connection.
#[derive(Debug, Clone)]
pub(super) struct Places {
    /// Of one peer.
    max_per_peer: usize,
    /// Of all.
    max: usize,
    taken: Arc<Mutex<HashMap<Option<IpAddr>, usize>>>,
}

impl Places {
    pub(super) fn new(max_per_peer: usize, max: usize) -> Self {
        Self { max_per_peer, max, taken: Arc::default() }
    }

    /// Takes a place, unless this peer or all together have as many as they may.
    pub(super) fn take(&self, peer: Option<IpAddr>) -> Option<Place> {
        let peer = peer.map(peer_group);
        let mut taken = self.lock();
        let of_peer = taken.get(&peer).copied().unwrap_or_default();
        if of_peer >= self.max_per_peer || taken.values().sum::<usize>() >= self.max {
            return None;
        }
        taken.insert(peer, of_peer + 1);
        Some(Place { places: self.clone(), peer })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Option<IpAddr>, usize>> {
        // Each change of the map is one call, so a poisoned lock guards a consistent map.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Places,
    peer: Option<IpAddr>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Entry::Occupied(mut taken) = self.places.lock().entry(self.peer) {
            *taken.get_mut() -= 1;
            if *taken.get() == 0 {
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
    fn peer_with_all_its_places_leaves_those_of_others() {
        const MAX_PER_PEER: usize = 4;
        const MAX: usize = 64;
        let places = Places::new(MAX_PER_PEER, MAX);
        let peer = |last| Some(IpAddr::from(Ipv4Addr::new(10, 0, 0, last)));
        let mut stranger: Vec<_> = (0..MAX_PER_PEER).map(|_| places.take(peer(1)).expect("there is room")).collect();
        assert!(places.take(peer(1)).is_none());
        let other = places.take(peer(2)).expect("another peer");
        stranger.pop();
        assert!(places.take(peer(1)).is_some());
        drop((stranger, other));
        assert!(places.lock().is_empty(), "ended requests leave nothing");
        let all: Vec<_> = (0..=255).map_while(|last| places.take(peer(last))).collect();
        assert_eq!(all.len(), MAX);
    }
}
