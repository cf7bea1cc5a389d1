//! What is registered: by DNS of a process, and in the slices.

use std::{collections::BTreeMap, net::SocketAddr};

use hickory_proto::rr::RecordType;

use super::words::{Attributes, PORT_NAMES, SERVICES, State, index_of};
use crate::{
    mirror::{dns_name, slice_path},
    support::{
        cluster::Cluster,
        dns::{Over, answers},
    },
};

/// The attributes of each instance, by its index: one set, unless something is wrong.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    instances: BTreeMap<usize, Vec<Attributes>>,
    /// Addresses that no instance has.
    strange: Vec<String>,
}

impl Found {
    /// Answers to A and SRV.
    pub(super) fn by_dns(dns: SocketAddr, namespace: &str) -> Self {
        let mut found = Self::default();
        for service in 0..SERVICES {
            let name = dns_name(namespace, &format!("s{service}"));
            for address in answers(dns, Over::Tcp, &name, RecordType::A) {
                found.instance(service, &address);
            }
            for port_name in PORT_NAMES {
                for record in answers(dns, Over::Tcp, &format!("_{port_name}._tcp.{name}"), RecordType::SRV) {
                    found.srv(service, port_name, &record);
                }
            }
        }
        found
    }

    /// Priority, weight, port, target.
    fn srv(&mut self, service: usize, port_name: &'static str, record: &str) {
        let fields: Vec<&str> = record.split(' ').collect();
        let [priority, weight, _, target] = fields[..] else { panic!("no SRV record: {record}") };
        let host = target.split('.').next().unwrap_or_default().replace('-', ".");
        let number = |text: &str| text.parse::<u16>().expect("16 bits");
        let attributes = Attributes { priority: number(priority), weight: number(weight) / 100, port_name };
        if let Some(instance) = self.instance(service, &host) {
            instance.push(attributes);
        }
    }

    /// The endpoints of all slices with their records.
    pub(super) fn in_slices(cluster: &Cluster, namespace: &str) -> Self {
        let mut found = Self::default();
        let list = cluster.get_json(&slice_path(namespace, ""));
        for slice in list["items"].as_array().expect("a list") {
            let meta = &slice["metadata"];
            let service = meta["labels"]["kubernetes.io/service-name"].as_str().and_then(|name| name.strip_prefix('s'));
            let Some(service) = service.and_then(|number| number.parse().ok()) else { continue };
            let record = meta["annotations"]["gangplank.dev/instances"].as_str().unwrap_or("{}");
            let record: serde_json::Value = serde_json::from_str(record).expect("the record is JSON");
            let port_name = slice["ports"][0]["name"].as_str();
            let port_name = PORT_NAMES.into_iter().find(|name| Some(*name) == port_name);
            for endpoint in slice["endpoints"].as_array().into_iter().flatten() {
                let address = endpoint["addresses"][0].as_str().expect("an endpoint has an address");
                let entry = &record[address];
                let priority = u16::try_from(entry["priority"].as_u64().unwrap_or(0)).expect("16 bits");
                let weight = entry["weight"].as_f64().unwrap_or(1.0).to_string().parse().unwrap_or(0);
                let Some(instance) = found.instance(service, address) else { continue };
                instance.extend(port_name.map(|port_name| Attributes { priority, weight, port_name }));
            }
        }
        found
    }

    fn instance(&mut self, service: usize, address: &str) -> Option<&mut Vec<Attributes>> {
        let index = index_of(service, address);
        if index.is_none() {
            self.strange.push(format!("s{service} {address}"));
        }
        index.map(|index| self.instances.entry(index).or_default())
    }

    pub(super) fn strange(&self) -> impl Iterator<Item = &String> {
        self.strange.iter()
    }

    /// The state of an instance; an error if it has several, or an address without the rest.
    pub(super) fn state(&self, index: usize) -> Result<State, &[Attributes]> {
        match self.instances.get(&index).map(Vec::as_slice) {
            None => Ok(None),
            Some([attributes]) => Ok(Some(*attributes)),
            Some(several) => Err(several),
        }
    }

    /// Where two differ.
    pub(super) fn difference(&self, other: &Self) -> Vec<String> {
        let keys = self.instances.keys().chain(other.instances.keys());
        let differs = keys.filter(|key| self.instances.get(key) != other.instances.get(key));
        let text = |key: &usize| format!("{key}: {:?}, {:?}", self.instances.get(key), other.instances.get(key));
        differs.map(text).collect()
    }
}
