//! What DNS answers from: one immutable value per service in a lock-free map.

use std::{net::IpAddr, sync::Arc};

use crate::model::{Change, DnsName, Service, ServiceKey};

/// How the zone presents itself.
#[derive(Debug, Clone)]
pub struct ZoneConfig {
    /// The cluster's zone, `cluster.local` by default.
    pub origin: DnsName,
    /// Seconds that an answer may be cached, 0..=3600.
    pub ttl: u32,
    /// Networks whose reverse names are answered as a zone of ours: address and prefix length.
    pub reverse_zones: Vec<(IpAddr, u8)>,
    /// Addresses of `ns.dns.<origin>`.
    pub ns_addresses: Vec<IpAddr>,
    /// Serve instances that are not ready.
    pub publish_not_ready: bool,
}

/// What queries are answered from. Shared; reading takes no lock.
#[derive(Debug)]
pub struct Zone {}

/// Everything that changed under one service.
#[derive(Debug, Clone, Copy)]
pub struct ServiceChange<'a> {
    /// Which service.
    pub service: &'a ServiceKey,
    /// Its instances that changed.
    pub changes: &'a [Change],
    /// The service as it is now; empty when it is gone.
    pub after: &'a Service,
}

/// The one who may change a [`Zone`].
#[derive(Debug)]
pub struct Publisher {}

impl Zone {
    /// An empty zone that is not ready: everything in it is SERVFAIL until [`Zone::set_ready`].
    #[must_use]
    pub fn new(_config: ZoneConfig) -> (Arc<Self>, Publisher) {
        (Arc::new(Self {}), Publisher {})
    }

    /// Whether misses may be told from what is not loaded yet.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        false
    }

    /// From now on a miss is NXDOMAIN.
    pub fn set_ready(&self) {}
}

impl Publisher {
    /// Makes the changes of one generation visible, service by service, and then the generation
    /// itself as the SOA serial.
    pub fn publish(&mut self, _generation: u64, _changes: &[ServiceChange<'_>]) {}
}
