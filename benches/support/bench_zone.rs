//! A zone of any size, and the mix of queries that all benches use.

use std::{collections::HashMap, net::Ipv4Addr, sync::Arc};

use gangplank::{
    model::{DnsName, Instance, InstanceChange, InstanceSpec, PortSpec, Service, ServiceKey, UnixMillis, Validator},
    zone::{Publisher, ServiceChange, Zone, ZoneConfig},
};

const VALIDATOR: Validator = Validator { zone_wire_len: 15, names_allowed: false };

/// A zone and its publisher.
pub(crate) struct BenchZone {
    pub(crate) zone: Arc<Zone>,
    publisher: Publisher,
    services: HashMap<ServiceKey, Service>,
    generation: u64,
}

/// The service with this number: `s<number>.ns<number mod 100>`.
pub(crate) fn service(number: u32) -> ServiceKey {
    VALIDATOR.service(&format!("ns{}", number % 100), &format!("s{number}")).expect("valid")
}

/// An instance at the `number`th address of 10.0.0.0/8.
pub(crate) fn instance(service: &ServiceKey, number: u32, weight: f32) -> Arc<Instance> {
    let spec = InstanceSpec {
        address: Ipv4Addr::from_bits(0x0a00_0000 + number).to_string(),
        ports: vec![PortSpec { number: 80, name: "http".into(), ..PortSpec::default() }],
        weight: Some(weight),
        ..InstanceSpec::default()
    };
    Arc::new(VALIDATOR.instance(service, &spec, UnixMillis(0)).expect("valid"))
}

impl BenchZone {
    pub(crate) fn new() -> Self {
        let (zone, publisher) = Zone::new(ZoneConfig {
            origin: DnsName::parse("cluster.local").expect("valid"),
            ttl: 5,
            reverse_zones: Vec::new(),
            ns_addresses: Vec::new(),
            publish_not_ready: false,
            flatten_names: false,
        });
        zone.set_ready();
        Self { zone, publisher, services: HashMap::new(), generation: 0 }
    }

    /// This many services of this many instances.
    pub(crate) fn of(services: u32, instances: u32) -> Self {
        let mut bench_zone = Self::new();
        for number in 0..services {
            let key = service(number);
            for index in 0..instances {
                bench_zone.put(&key, instance(&key, number * instances + index, 1.0));
            }
        }
        bench_zone
    }

    /// Registers an instance and publishes it.
    pub(crate) fn put(&mut self, key: &ServiceKey, instance: Arc<Instance>) {
        let known = self.services.entry(key.clone()).or_default();
        let before = known.instances.put(Arc::clone(&instance));
        let changes = [InstanceChange { before, after: Some(instance) }];
        self.publish(&[ServiceChange { service: key, changes: &changes }]);
    }

    /// Publishes changes that were made elsewhere.
    pub(crate) fn publish(&mut self, changes: &[ServiceChange<'_>]) {
        self.generation += 1;
        self.publisher.publish(self.generation, changes);
    }
}

/// Queries about `services` services: 70 % A, 15 % SRV, 10 % NXDOMAIN, 5 % AAAA without data.
pub(crate) fn mix(services: u32, rng: &mut fastrand::Rng) -> Vec<Vec<u8>> {
    let one = |n: u32, rng: &mut fastrand::Rng| {
        let number = rng.u32(0..services);
        let name = format!("s{number}.ns{}.svc.cluster.local", number % 100);
        match n % 20 {
            0..14 => query(&name, 1),
            14..17 => query(&format!("_http._tcp.{name}"), 33),
            17..19 => query(&format!("x{name}"), 1),
            _ => query(&name, 28),
        }
    };
    let mut queries: Vec<_> = (0..20_000).map(|n| one(n, rng)).collect();
    rng.shuffle(&mut queries);
    queries
}

fn query(name: &str, qtype: u16) -> Vec<u8> {
    let mut packet = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
    for label in name.split('.') {
        packet.push(u8::try_from(label.len()).expect("short"));
        packet.extend(label.as_bytes());
    }
    packet.push(0);
    packet.extend(qtype.to_be_bytes());
    // Class IN, and an OPT record that takes 1232 octets.
    packet.extend([0, 1, 0, 0, 41, 0x04, 0xd0, 0, 0, 0, 0, 0, 0]);
    packet
}
