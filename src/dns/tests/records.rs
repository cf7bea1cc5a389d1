//! A plain list of records as oracle: the records that the registrations must have, as strings, found
//! by a search from end to end, without the zone's lookup, weights or reverse entries.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{oracle::any_name, *};
/// Records by owner and type, as `rdata`.
#[derive(Debug, Default)]
struct RecordSet(BTreeSet<(String, u16, String)>);

impl RecordSet {
    fn of(registrations: &[Registration]) -> Self {
        // The last word on an instance is the one that counts.
        let mut instances = BTreeMap::new();
        for (service, spec, ready) in registrations {
            let ports: BTreeSet<_> = spec.ports.iter().map(|port| (port.protocol.srv_label(), port.number)).collect();
            instances.insert((service, spec.address.clone(), ports), (spec, ready));
        }
        let mut list = Self::default();
        let mut ports: BTreeMap<(String, String, i64), (f64, u16)> = BTreeMap::new();
        for ((service, address, _), (spec, _)) in instances.into_iter().filter(|(_, (_, ready))| **ready) {
            let service = format!("{service}.svc.cluster.local.");
            let host = if spec.host_name.is_empty() { dashed(&address) } else { spec.host_name.clone() };
            let host = format!("{host}.{service}");
            let rtype = if address.contains(':') { AAAA } else { A };
            list.add(&service, rtype, &address);
            list.add(&host, rtype, &address);
            list.add(&reverse(&address), PTR, &host);
            for port in spec.ports.iter().filter(|port| !port.name.is_empty()) {
                let owner = format!("_{}.{}.{service}", port.name, port.protocol.srv_label());
                let (weight, priority) =
                    ports.entry((owner, host.clone(), port.number)).or_insert((0.0, spec.priority));
                *weight += f64::from(spec.weight.unwrap_or(1.0));
                *priority = spec.priority.min(*priority);
            }
        }
        for ((owner, target, port), (weight, priority)) in ports {
            let weight = if weight == 0.0 { 0.0 } else { (weight * 100.0).round().clamp(1.0, 65_535.0) };
            list.add(&owner, SRV, &format!("{priority} {weight} {port} {target}"));
        }
        list.add("cluster.local.", SOA, "");
        list.add("cluster.local.", NS, "ns.dns.cluster.local.");
        list.add("ns.dns.cluster.local.", A, "192.0.2.53");
        list.add("dns-version.cluster.local.", TXT, "1.1.0");
        // It is there before the first service is.
        list.add("svc.cluster.local.", 0, "");
        list
    }

    fn add(&mut self, owner: &str, rtype: u16, rdata: &str) {
        self.0.insert((owner.to_owned(), rtype, rdata.to_owned()));
    }

    /// The response code, and the records without their TTL.
    fn search(&self, name: &str, rtype: u16) -> (u16, Vec<String>) {
        let in_zone = name == "cluster.local." || name.ends_with(".cluster.local.");
        let below = format!(".{name}");
        let exists = self.0.iter().any(|(owner, _, _)| owner == name || in_zone && owner.ends_with(&below));
        let found = self.0.iter().filter(|(owner, held, _)| owner == name && *held == rtype);
        let found = found.map(|(_, _, rdata)| rdata.clone()).collect();
        match (exists, in_zone) {
            (true, _) => (0, found),
            (false, true) => (3, found),
            (false, false) => (5, found),
        }
    }
}

fn dashed(address: &str) -> String {
    let label = address.replace(['.', ':'], "-");
    if label.ends_with('-') { label + "0" } else { label }
}

fn reverse(address: &str) -> String {
    match address.parse().expect("an address") {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa.")
        }
        IpAddr::V6(ip) => {
            let nibbles = ip.octets().into_iter().rev().flat_map(|octet| [octet & 15, octet >> 4]);
            nibbles.map(|nibble| format!("{nibble:x}.")).collect::<String>() + "ip6.arpa."
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn list_of_records_gets_the_same_answers(
        mut registrations in any_registrations(),
        names in prop::collection::vec(any_name(), 1..12),
        rtype in prop::sample::select(vec![A, AAAA, SRV, PTR, TXT, SOA, NS, MX]),
    ) {
        let ns_addresses = vec!["192.0.2.53".parse().expect("valid")];
        let mut zone = TestZone::new(ZoneConfig { ns_addresses, ..config() });
        // What names give is compared in `names.rs`.
        registrations.retain(|(_, spec, _)| !NAMES.contains(&spec.address.as_str()));
        register(&mut zone, &registrations);
        let list = RecordSet::of(&registrations);
        for name in names {
            let response = exchange(&zone, &query_for(&name, rtype).tcp());
            let (rcode, expected) = list.search(&name, rtype);
            let mut found: Vec<String> = response.message.answers.iter().map(|record| record.data.to_string()).collect();
            found.sort();
            if rtype == SOA {
                // Its numbers are tested elsewhere.
                found.iter_mut().for_each(String::clear);
            }
            prop_assert_eq!((response.rcode(), found), (rcode, expected), "{} {}", name, rtype);
        }
    }
}
