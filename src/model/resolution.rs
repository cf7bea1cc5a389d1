//! What the lookup of a DNS name gives, for instances that are registered by a name.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use super::instance::UnixMillis;

/// Most addresses of one family that are taken from the answer for a name: about what a message over UDP
/// holds. Of more, the lowest are taken, so that all replicas take the same.
pub const MAX_RESOLVED: usize = 64;

/// What a name leads to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Resolution {
    /// Not looked up yet, or no upstream server has answered for longer than the last good answer may be used.
    #[default]
    Unavailable,
    /// The name does not exist (NXDOMAIN).
    NxDomain,
    /// Its addresses, through whatever aliases; none if it has only other records.
    Addresses(ResolvedAddresses),
}

/// The addresses of a name, each family in order and without repetition, at most [`MAX_RESOLVED`] of each.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResolvedAddresses {
    /// IPv4.
    pub v4: Box<[Ipv4Addr]>,
    /// IPv6.
    pub v6: Box<[Ipv6Addr]>,
    /// Seconds that clients may cache them: the smallest TTL of the chain that led to them, at most the zone's.
    pub ttl: u32,
}

impl ResolvedAddresses {
    /// Takes `addresses` in any order.
    #[must_use]
    pub fn new(addresses: impl IntoIterator<Item = IpAddr>, ttl: u32) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for ip in addresses {
            match ip {
                IpAddr::V4(ip) => v4.push(ip),
                IpAddr::V6(ip) => v6.push(ip),
            }
        }
        Self { v4: bounded(v4), v6: bounded(v6), ttl }
    }

    /// All addresses, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> {
        self.v4.iter().copied().map(IpAddr::V4).chain(self.v6.iter().copied().map(IpAddr::V6))
    }

    /// Whether there is no address of either family.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}

fn bounded<I: Ord>(mut addresses: Vec<I>) -> Box<[I]> {
    addresses.sort_unstable();
    addresses.dedup();
    addresses.truncate(MAX_RESOLVED);
    addresses.into()
}

impl Resolution {
    /// The addresses, if there are any.
    #[must_use]
    pub fn addresses(&self) -> Option<&ResolvedAddresses> {
        match self {
            Self::Addresses(addresses) if !addresses.is_empty() => Some(addresses),
            _ => None,
        }
    }
}

/// How the lookups of a name stand.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NameStatus {
    /// What is served.
    pub resolution: Arc<Resolution>,
    /// When `resolution` was last confirmed by an answer; `None` if no lookup was ever answered.
    pub answered: Option<UnixMillis>,
    /// Why the last lookup failed, or which part of its answer was not taken; `None` after a good one.
    pub error: Option<Arc<str>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_sorted_distinct_and_bounded() {
        let many = (0..1000u32).rev().flat_map(|n| [n, n]).map(|n| IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 | n)));
        let v6: IpAddr = "2001:db8::1".parse().expect("an address");
        let found = ResolvedAddresses::new(many.chain([v6, v6]), 5);
        assert_eq!(found.v4.len(), MAX_RESOLVED);
        assert_eq!(found.v4.first(), Some(&Ipv4Addr::new(10, 0, 0, 0)));
        assert!(found.v4.is_sorted());
        assert_eq!(found.iter().count(), MAX_RESOLVED + 1);
    }
}
