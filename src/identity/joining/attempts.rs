//! How often machines without an identity may call: by address, and all together.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use crate::net::peer_group;

/// Calls of one address, or of one IPv6 /64, at once, and one more each [`ADDRESS_INTERVAL`].
const ADDRESS_BURST: u32 = 100;
const ADDRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Calls of all addresses at once, but for renewals of machines that are known, and one more each [`TOTAL_INTERVAL`].
const TOTAL_BURST: u32 = 500;
const TOTAL_INTERVAL: Duration = Duration::from_millis(10);

/// Addresses that are remembered. With more, those that have their whole burst again are forgotten first.
const MAX_ADDRESSES: usize = 4096;

/// What was used of a burst, as the time at which all of it is there again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bucket {
    full_at: Instant,
}

impl Bucket {
    pub(super) const fn new(now: Instant) -> Self {
        Self { full_at: now }
    }

    pub(super) fn take(&mut self, now: Instant, burst: u32, interval: Duration) -> bool {
        let full_at = self.full_at.max(now) + interval;
        if full_at.duration_since(now) > interval * burst {
            return false;
        }
        self.full_at = full_at;
        true
    }
}

/// Counts attempts.
#[derive(Debug)]
pub(super) struct Attempts {
    total: Bucket,
    by_address: HashMap<IpAddr, Bucket>,
}

impl Attempts {
    pub(super) fn new(now: Instant) -> Self {
        Self { total: Bucket::new(now), by_address: HashMap::new() }
    }

    /// Whether a call of `peer` may go on; counts it. One that its address may not make costs the others nothing.
    pub(super) fn admit(&mut self, peer: IpAddr, now: Instant) -> bool {
        self.admit_address(peer, now).unwrap_or(false) && self.admit_stranger(now)
    }

    /// The same, counted against the address alone. `None` when so many addresses call that this one is not known.
    pub(super) fn admit_address(&mut self, peer: IpAddr, now: Instant) -> Option<bool> {
        let group = peer_group(peer);
        if !self.by_address.contains_key(&group) && self.by_address.len() >= MAX_ADDRESSES {
            self.by_address.retain(|_, bucket| bucket.full_at > now);
            if self.by_address.len() >= MAX_ADDRESSES {
                return None;
            }
        }
        let bucket = self.by_address.entry(group).or_insert_with(|| Bucket::new(now));
        Some(bucket.take(now, ADDRESS_BURST, ADDRESS_INTERVAL))
    }

    /// Whether a call of one of all that nobody knows may go on; counts it.
    pub(super) fn admit_stranger(&mut self, now: Instant) -> bool {
        self.total.take(now, TOTAL_BURST, TOTAL_INTERVAL)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    fn address(number: u32) -> IpAddr {
        IpAddr::V4(number.into())
    }

    #[test]
    fn address_has_its_burst_and_then_its_rate() {
        let now = Instant::now();
        let mut attempts = Attempts::new(now);
        for _ in 0..ADDRESS_BURST {
            assert!(attempts.admit(address(1), now));
        }
        assert!(!attempts.admit(address(1), now));
        assert!(attempts.admit(address(2), now), "another address");
        assert!(attempts.admit(address(1), now + ADDRESS_INTERVAL));
        assert!(!attempts.admit(address(1), now + ADDRESS_INTERVAL));
        let of_64 = |last: u16| IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, last));
        for last in 0..100 {
            assert!(attempts.admit(of_64(last), now));
        }
        assert!(!attempts.admit(of_64(7), now), "one /64 is one host");
    }

    #[test]
    fn flood_from_many_addresses_is_bounded() {
        let now = Instant::now();
        let mut attempts = Attempts::new(now);
        let admitted = (0..100_000).filter(|number| attempts.admit(address(*number), now)).count();
        assert_eq!(admitted, TOTAL_BURST as usize);
        assert_eq!(attempts.by_address.len(), MAX_ADDRESSES);
        // Who is known needs no more than a place of its address, and here not even that.
        assert!(!attempts.admit_stranger(now));
        assert_eq!(attempts.admit_address(address(1), now), Some(true));
        assert_eq!(attempts.admit_address(address(200_000), now), None);
        let later = now + TOTAL_INTERVAL * TOTAL_BURST;
        assert!(attempts.admit(address(200_000), later), "an honest one, after the flood");
        assert_eq!(attempts.by_address.len(), 1);
    }
}
