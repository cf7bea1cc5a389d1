//! How many requests are read and merged at once: a few of each peer, so that none keeps the others out.
//!
//! A request has its place before its body is read. So those that are refused cost no memory and next to no time.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tonic::{Request, Status, service::Interceptor};

use crate::grpc::incoming::ConnectionInfo;

/// Places of one peer. A process hands over one request at a time, and several may be behind one address.
const MAX_PER_PEER: usize = 4;

/// Places in all. Bounds the memory of requests that wait, and how long the last of them waits.
const MAX_PLACES: usize = 64;

/// The places. A peer is a network address as the limits on connections count it, `None` without a connection.
#[derive(Debug, Clone, Default)]
pub(in crate::grpc) struct Places(Arc<Mutex<HashMap<Option<IpAddr>, usize>>>);

impl Places {
    /// Takes a place, unless this peer or all together have as many as they may.
    fn take(&self, peer: Option<IpAddr>) -> Option<Place> {
        let mut taken = self.lock();
        let of_peer = taken.get(&peer).copied().unwrap_or_default();
        if of_peer >= MAX_PER_PEER || taken.values().sum::<usize>() >= MAX_PLACES {
            return None;
        }
        taken.insert(peer, of_peer + 1);
        Some(Place { places: self.clone(), peer })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Option<IpAddr>, usize>> {
        // Each change of the map is one call, so a poisoned lock guards a consistent map.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Interceptor for Places {
    /// Puts a [`Place`] into the extensions of a request, or refuses the request.
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let peer = request.extensions().get::<ConnectionInfo>().map(|connection| connection.handle.peer());
        let place = self.take(peer).ok_or_else(super::busy)?;
        request.extensions_mut().insert(Arc::new(place));
        Ok(request)
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
        let places = Places::default();
        let peer = |last| Some(IpAddr::from(Ipv4Addr::new(10, 0, 0, last)));
        let mut stranger: Vec<_> = (0..MAX_PER_PEER).map(|_| places.take(peer(1)).expect("there is room")).collect();
        assert!(places.take(peer(1)).is_none());
        let other = places.take(peer(2)).expect("another peer");
        stranger.pop();
        assert!(places.take(peer(1)).is_some());
        drop((stranger, other));
        assert!(places.lock().is_empty(), "ended requests leave nothing");
        let all: Vec<_> = (0..=255).map_while(|last| places.take(peer(last))).collect();
        assert_eq!(all.len(), MAX_PLACES);
    }
}
