//! What DNS answers from: one immutable value per service in a lock-free map.
//!
//! 1. Reading takes no lock, does not allocate and sees each service as one whole value, so that
//!    an SRV target never dangles.
//! 2. One publisher writes. A change copies the chunks it touches and nothing else; nothing ever
//!    copies the zone.
//! 3. Names are published from the root down and removed from the leaves up: a name is never there
//!    without the names above it (RFC 8020). An address leads to a host name as long as the service
//!    has the host. The SOA serial comes last, so that a client that sees a serial sees its generation.
//! 4. Before the zone is ready a miss means nothing: every lookup in the zone is `Lookup::NotReady`.
//!
//! No packets here: `dns` renders the records.

mod lookup;
mod name_index;
mod names;
mod publish;
mod qname;
mod records;
mod reverse;
mod rrset;
mod service;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod update;

use std::{
    cell::OnceCell,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

use foldhash::fast::RandomState;
use papaya::{Equivalent, HashMap, HashMapRef, LocalGuard};

pub(crate) use lookup::{Apex, Hit, Lookup};
pub use name_index::NameChange;
pub(crate) use names::Alias;
pub use publish::{Publisher, ServiceChange};
pub(crate) use qname::QName;
pub(crate) use records::{AddressRecord, HostLabel, SrvRecord};
pub(crate) use reverse::PtrRecord;
pub(crate) use rrset::Rrset;
pub(crate) use service::{Addresses, ServiceRecords};

use crate::model::{DnsName, RecordType, ServiceKey};
use reverse::{Reverse, ReverseReader};

/// How the zone presents itself.
#[derive(Debug, Clone)]
pub struct ZoneConfig {
    /// The cluster's zone, `cluster.local` by default.
    pub origin: DnsName,
    /// Seconds that an answer may be cached, 0..=3600.
    pub ttl: u32,
    /// Networks whose reverse zones are served: address and prefix length.
    pub reverse_zones: Vec<(IpAddr, u8)>,
    /// Addresses of `ns.dns.<origin>`.
    pub ns_addresses: Vec<IpAddr>,
    /// Serve instances that are not ready.
    pub publish_not_ready: bool,
    /// A DNS name that is the only instance of a service is not an alias (CNAME): its addresses are served at once.
    pub flatten_names: bool,
}

/// What queries are answered from. Shared; reading takes no lock.
#[derive(Debug)]
pub struct Zone {
    settings: Settings,
    services: HashMap<ServiceKey, ServiceRecords, RandomState>,
    /// Namespaces that have a service, and how many; one more where the namespace itself is known.
    namespaces: HashMap<Box<str>, usize, RandomState>,
    reverse: Reverse,
    serial: AtomicU32,
    ready: AtomicBool,
    unservable: Unservable,
}

/// Instances that have a name which does not fit a message.
#[derive(Debug, Default)]
struct Unservable {
    instances: AtomicU64,
    /// One of them, for the log. No reader locks it.
    example: Mutex<Option<String>>,
}

/// [`ZoneConfig`] as lookups need it.
#[derive(Debug)]
struct Settings {
    /// The zone's name in wire form.
    origin: Box<[u8]>,
    origin_labels: usize,
    origin_name: DnsName,
    ttl: u32,
    reverse_zones: Vec<(IpAddr, u8)>,
    name_server: ServiceRecords,
    publish_not_ready: bool,
    flatten_names: bool,
}

impl Settings {
    fn new(config: ZoneConfig) -> Self {
        let ZoneConfig { origin, ttl, reverse_zones, ns_addresses, publish_not_ready, flatten_names } = config;
        let mut wire = Vec::with_capacity(origin.wire_len());
        for label in origin.labels() {
            wire.push(u8::try_from(label.len()).expect("a label has at most 63 octets"));
            wire.extend_from_slice(label.as_bytes());
        }
        wire.push(0);
        Self {
            origin: wire.into(),
            origin_labels: origin.labels().count(),
            origin_name: origin,
            ttl,
            reverse_zones,
            name_server: ServiceRecords::of_addresses(&ns_addresses),
            publish_not_ready,
            flatten_names,
        }
    }
}

impl Zone {
    /// An empty zone that is not ready: everything in it is SERVFAIL until [`Zone::set_ready`].
    #[must_use]
    pub fn new(config: ZoneConfig) -> (Arc<Self>, Publisher) {
        let zone = Arc::new(Self {
            settings: Settings::new(config),
            services: HashMap::default(),
            namespaces: HashMap::default(),
            reverse: Reverse::default(),
            serial: AtomicU32::new(0),
            ready: AtomicBool::new(false),
            unservable: Unservable::default(),
        });
        (Arc::clone(&zone), Publisher::new(zone))
    }

    /// Whether everything that was stored is published, so that a miss is NXDOMAIN.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        // Pairs with the release in `set_ready`: who sees the flag sees every service that was published before it.
        self.ready.load(Ordering::Acquire)
    }

    /// From now on a miss is NXDOMAIN. Logs, the first time, how many instances have names that are not served.
    pub fn set_ready(&self) {
        if self.is_ready() {
            return;
        }
        // At the start nearly every instance is new, so one line with the sum replaces a line for each.
        let example = self.unservable.example.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let (instances @ 1.., Some(example)) = (self.unservable(), example) {
            let zone = self.origin();
            tracing::warn!(
                instances,
                example,
                %zone,
                "instances have names that do not fit DNS with this zone (RFC 1035 §2.3.4): those names are not served"
            );
        }
        // After all that recovery has published: from here on a name that is not found is denied.
        self.ready.store(true, Ordering::Release);
    }

    /// The zone's name.
    #[must_use]
    pub fn origin(&self) -> &DnsName {
        &self.settings.origin_name
    }

    /// Services that have something to answer with.
    #[must_use]
    pub fn services(&self) -> usize {
        self.services.len()
    }

    /// Instances with a name that is not served, because it does not fit a message with this zone.
    #[must_use]
    pub fn unservable(&self) -> u64 {
        // A number for metrics and the log. It orders nothing.
        self.unservable.instances.load(Ordering::Relaxed)
    }

    /// Pins the zone for a few lookups. Values that the publisher replaces are not freed
    /// before the reader is dropped: do not hold one while waiting.
    #[must_use]
    pub fn pin(&self) -> ZoneReader<'_> {
        ZoneReader { zone: self, services: self.services.pin(), reverse: OnceCell::new() }
    }
}

/// The zone, pinned for lookups.
#[derive(Debug)]
pub struct ZoneReader<'z> {
    zone: &'z Zone,
    services: HashMapRef<'z, ServiceKey, ServiceRecords, RandomState, LocalGuard<'z>>,
    /// Pinned from the first lookup of an address on; by family.
    reverse: OnceCell<ReverseReader<'z>>,
}

impl ZoneReader<'_> {
    /// What `name` has of `rtype`; `None` is a type of which there is nothing here (RFC 3597).
    #[must_use]
    pub(crate) fn lookup(&self, name: &QName, rtype: Option<RecordType>) -> Lookup<'_> {
        lookup::lookup(self, name, rtype)
    }

    /// Whether `name` is the zone's name or below it.
    #[must_use]
    pub(crate) fn contains(&self, name: &QName) -> bool {
        self.labels_below_origin(name).is_some()
    }

    /// The zone's name in wire form.
    #[must_use]
    pub(crate) fn origin(&self) -> &[u8] {
        &self.zone.settings.origin
    }

    /// How many labels `name` has below the zone's name; `None` outside the zone.
    #[must_use]
    pub(crate) fn labels_below_origin(&self, name: &QName) -> Option<usize> {
        // Both names are in wire form and lower case, so equal octets are equal names, and no label is compared in its middle.
        let below = name.labels().checked_sub(self.zone.settings.origin_labels)?;
        (name.suffix(below) == self.origin()).then_some(below)
    }

    /// Seconds that a record may be cached.
    #[must_use]
    pub(crate) fn ttl(&self) -> u32 {
        self.zone.settings.ttl
    }

    /// The serial of the SOA: the low 32 bits of the generation that was published last.
    #[must_use]
    pub(crate) fn serial(&self) -> u32 {
        // Pairs with the publisher's store: who sees a serial finds in the zone what was published before it.
        self.zone.serial.load(Ordering::Acquire)
    }

    fn is_ready(&self) -> bool {
        self.zone.is_ready()
    }

    fn reverse_zones(&self) -> &[(IpAddr, u8)] {
        &self.zone.settings.reverse_zones
    }

    fn name_server(&self) -> Addresses<'_> {
        self.zone.settings.name_server.addresses()
    }

    fn service(&self, name: &[u8], namespace: &[u8]) -> Option<&ServiceRecords> {
        // Two labels of at most 63 octets and the dot.
        let mut key = [0; 127];
        key[..name.len()].copy_from_slice(name);
        key[name.len()] = b'.';
        let len = name.len() + 1 + namespace.len();
        key[name.len() + 1..len].copy_from_slice(namespace);
        self.services.get(&ServiceKeyBytes(&key[..len]))
    }

    fn has_namespace(&self, name: &[u8]) -> bool {
        // A label may hold any octets (RFC 2181 §11); one that is no text is no namespace.
        std::str::from_utf8(name).is_ok_and(|name| self.zone.namespaces.pin().contains_key(name))
    }

    fn ptr_records(&self, ip: IpAddr) -> Option<Rrset<'_, PtrRecord>> {
        // Pinned here and not in `pin`: most questions are about names. A question has one address, so one family is enough.
        self.reverse.get_or_init(|| self.zone.reverse.pin(ip)).get(ip)
    }
}

/// A [`ServiceKey`] as borrowed bytes. It hashes as one does: as its bytes.
#[derive(Hash)]
struct ServiceKeyBytes<'a>(&'a [u8]);

impl Equivalent<ServiceKey> for ServiceKeyBytes<'_> {
    fn equivalent(&self, key: &ServiceKey) -> bool {
        self.0 == key.as_str().as_bytes()
    }
}
