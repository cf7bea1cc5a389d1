//! What DNS answers from: one immutable value per service in a lock-free map.
//!
//! 1. Reading takes no lock, does not allocate and sees each service as one whole value, so that
//!    an SRV target never dangles.
//! 2. One publisher writes. A change copies the chunks it touches and nothing else; nothing ever
//!    copies the zone.
//! 3. The order of writing is the order in which names lead to each other: addresses to names
//!    (`reverse`) first, then the service, then its namespace, and backwards for what goes. The
//!    serial of the SOA comes last, so that whoever sees it sees what it stands for.
//! 4. Until it is ready a miss means nothing, and every lookup in the zone says so.
//!
//! No packets here: records are records, and `dns` writes them down.

mod lookup;
mod qname;
mod reverse;
mod rrset;
mod service;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::{
    cell::OnceCell,
    iter,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use foldhash::fast::RandomState;
use papaya::{Equivalent, HashMap, HashMapRef, LocalGuard};

pub use lookup::{Apex, Bailiwick, Hit, Lookup, RecordType, ReverseName};
pub use qname::{InvalidName, QName};
pub use reverse::PtrRecord;
pub use rrset::Rrset;
pub use service::{AddressRecord, Addresses, HostLabel, HostLabelRef, ServiceRecords, SrvRecord};

use crate::model::{CowTree, DnsName, Instance, InstanceChange, Service, ServiceKey};
use reverse::{Reverse, ReverseReader};
use service::{RecordsUpdate, ServedInstance};

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
pub struct Zone {
    settings: Settings,
    services: HashMap<ServiceKey, ServiceRecords, RandomState>,
    /// Namespaces that have a service, and how many; one more where the namespace itself is known.
    namespaces: HashMap<Box<str>, usize, RandomState>,
    reverse: Reverse,
    serial: AtomicU32,
    ready: AtomicBool,
}

/// [`ZoneConfig`] as lookups need it.
#[derive(Debug)]
pub(crate) struct Settings {
    /// The zone's name in wire form.
    origin: Box<[u8]>,
    origin_labels: usize,
    origin_name: DnsName,
    ttl: u32,
    reverse_zones: Vec<(IpAddr, u8)>,
    name_server: ServiceRecords,
    publish_not_ready: bool,
}

/// Everything that changed under one service.
#[derive(Debug, Clone, Copy)]
pub struct ServiceChange<'a> {
    /// Which service.
    pub service: &'a ServiceKey,
    /// Its instances that changed.
    pub changes: &'a [InstanceChange],
    /// The service as it is now; empty when it is gone.
    pub after: &'a Service,
    /// What others have under the same name, as it is now. Served beside it; what changed of it
    /// stands among the changes.
    pub foreign: Option<&'a CowTree<Arc<Instance>>>,
}

impl Settings {
    fn new(config: ZoneConfig) -> Self {
        let ZoneConfig { origin, ttl, reverse_zones, ns_addresses, publish_not_ready } = config;
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
        });
        (Arc::clone(&zone), Publisher { zone })
    }

    /// Whether misses may be told from what is not loaded yet.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// From now on a miss is NXDOMAIN.
    pub fn set_ready(&self) {
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

    /// Holds the zone for a few lookups. Values that are replaced meanwhile are not freed before
    /// it is let go, so that it must not be held while waiting for anything.
    #[must_use]
    pub fn pin(&self) -> ZoneReader<'_> {
        ZoneReader { zone: self, services: self.services.pin(), reverse: OnceCell::new() }
    }
}

/// The zone, held for lookups.
#[derive(Debug)]
pub struct ZoneReader<'z> {
    zone: &'z Zone,
    services: HashMapRef<'z, ServiceKey, ServiceRecords, RandomState, LocalGuard<'z>>,
    /// Held from the first lookup of an address on; by family.
    reverse: OnceCell<ReverseReader<'z>>,
}

impl ZoneReader<'_> {
    /// To what part of the tree `name` belongs.
    #[must_use]
    pub fn locate(&self, name: &QName) -> Bailiwick {
        lookup::locate(&self.zone.settings, name)
    }

    /// What `name` has of `rtype`; `place` is where [`ZoneReader::locate`] found it.
    #[must_use]
    pub fn lookup(&self, place: Bailiwick, name: &QName, rtype: RecordType) -> Lookup<'_> {
        lookup::lookup(self, place, name, rtype)
    }

    /// The zone's name in wire form.
    #[must_use]
    pub fn origin(&self) -> &[u8] {
        &self.zone.settings.origin
    }

    /// Labels of the zone's name.
    #[must_use]
    pub fn origin_labels(&self) -> usize {
        self.zone.settings.origin_labels
    }

    /// Seconds that a record may be cached.
    #[must_use]
    pub fn ttl(&self) -> u32 {
        self.zone.settings.ttl
    }

    /// The serial of the SOA: the low 32 bits of the generation that was published last.
    #[must_use]
    pub fn serial(&self) -> u32 {
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
        std::str::from_utf8(name).is_ok_and(|name| self.zone.namespaces.pin().contains_key(name))
    }

    fn ptr_records(&self, ip: IpAddr) -> Option<Rrset<'_, PtrRecord>> {
        self.reverse.get_or_init(|| self.zone.reverse.pin(ip)).get(ip)
    }
}

/// A [`ServiceKey`] as borrowed octets. It hashes as one does: as its bytes.
#[derive(Hash)]
struct ServiceKeyBytes<'a>(&'a [u8]);

impl Equivalent<ServiceKey> for ServiceKeyBytes<'_> {
    fn equivalent(&self, key: &ServiceKey) -> bool {
        self.0 == key.as_str().as_bytes()
    }
}

/// The one who may change a [`Zone`].
#[derive(Debug)]
pub struct Publisher {
    zone: Arc<Zone>,
}

impl Publisher {
    /// Makes room for so many services, and for `instances` at an address each, so that nothing is
    /// moved while they come.
    pub fn reserve<'a>(&mut self, services: usize, instances: impl IntoIterator<Item = &'a Arc<Instance>>) {
        self.zone.services.pin().reserve(services);
        self.zone.reverse.reserve(instances.into_iter().filter_map(|instance| instance.address().ip()));
    }

    /// Makes the changes of one generation visible, service by service, and then the generation
    /// itself as the SOA serial.
    pub fn publish(&mut self, generation: u64, changes: &[ServiceChange<'_>]) {
        for change in changes {
            self.publish_service(change);
        }
        // RFC 1982: serials wrap, so that the low half of the generation is one.
        self.zone.serial.store(generation as u32, Ordering::Release);
    }

    /// A namespace exists whether or not it has a service of ours, or no longer so. Each call must
    /// be news.
    pub fn set_namespace(&mut self, name: &str, exists: bool) {
        self.count_namespace(name, |count| if exists { count + 1 } else { count.saturating_sub(1) });
    }

    fn publish_service(&self, change: &ServiceChange<'_>) {
        let ServiceChange { service, changes, after, foreign } = *change;
        let zone = &*self.zone;
        let publish_not_ready = zone.settings.publish_not_ready;
        let services = zone.services.pin();
        let old = services.get(service);

        let mut edit = RecordsUpdate::new(old.cloned().unwrap_or_default(), publish_not_ready);
        let mut touched: Vec<(IpAddr, HostLabel)> = Vec::with_capacity(changes.len());
        for InstanceChange { before, after } in changes {
            let of = |instance| ServedInstance::of(instance, publish_not_ready);
            let (before, after) = (before.as_deref().and_then(of), after.as_deref().and_then(of));
            // In before out, so that rows that stay are changed in place.
            after.iter().for_each(|served| edit.add(served));
            before.iter().for_each(|served| edit.subtract(served));
            touched.extend([before, after].into_iter().flatten().map(|c| (c.ip, c.target)));
        }
        touched.sort_unstable();
        touched.dedup();
        let tables: Vec<&CowTree<Arc<Instance>>> = iter::once(&after.instances).chain(foreign).collect();
        let new = edit.finish(&tables);

        let had = |(ip, target): &(IpAddr, HostLabel)| old.is_some_and(|old| old.names(*ip, target));
        let (come, gone): (Vec<_>, Vec<_>) =
            touched.into_iter().filter(|name| had(name) != new.names(name.0, &name.1)).partition(|name| !had(name));

        // 1. Addresses lead to names before the service has them.
        for (ip, target) in come {
            zone.reverse.add(ip, PtrRecord::new(service, &target));
        }
        // 2. The service, as one value, and its namespace.
        match (old.is_some(), new.is_empty()) {
            (false, true) => {}
            (true, true) => {
                services.remove(service);
                self.count_namespace(service.namespace(), |count| count.saturating_sub(1));
            }
            (true, false) => {
                services.insert(service.clone(), new);
            }
            (false, false) => {
                services.insert(service.clone(), new);
                self.count_namespace(service.namespace(), |count| count + 1);
            }
        }
        // 3. What the service no longer has.
        for (ip, target) in gone {
            zone.reverse.remove(ip, &PtrRecord::new(service, &target));
        }
    }

    fn count_namespace(&self, namespace: &str, change: impl Fn(usize) -> usize) {
        let namespaces = self.zone.namespaces.pin();
        match change(namespaces.get(namespace).copied().unwrap_or(0)) {
            0 => {
                namespaces.remove(namespace);
            }
            count => {
                namespaces.insert(namespace.into(), count);
            }
        }
    }
}
