//! `--advertise`: where registrants reach this process.

use std::{
    collections::HashSet,
    env,
    net::{IpAddr, SocketAddr},
};

use anyhow::Context as _;

use crate::model::ServerAddress;

/// Where registrants reach this process, as far as it is known before the listeners are bound.
#[derive(Debug, Clone)]
pub struct Advertise {
    /// `--advertise`, valid with any port.
    given: Vec<String>,
    /// The addresses of the pod.
    pod: Vec<IpAddr>,
}

impl Advertise {
    pub(super) fn new(given: Vec<String>, kubernetes: bool) -> anyhow::Result<Self> {
        for text in &given {
            ServerAddress::parse(text, 1).with_context(|| format!("--advertise {text:?}"))?;
        }
        let variable =
            |name| env::var(name).ok().filter(|value| kubernetes && !value.is_empty()).map(|value| (name, value));
        // Of a pod with both families POD_IP has the first address only.
        let pod = match variable("POD_IPS").or_else(|| variable("POD_IP")) {
            None => Vec::new(),
            Some((name, value)) => {
                let pod = value.split(',').map(|ip| ip.trim().parse()).collect::<Result<_, _>>();
                pod.with_context(|| {
                    format!("the environment variable {name}={value:?} is no list of IP addresses; give --advertise")
                })?
            }
        };
        Ok(Self { given, pod })
    }

    /// The addresses, for a server that listens at `listeners`. Empty if only wildcards listen and no flag or
    /// variable says where.
    #[must_use]
    pub fn addresses(&self, listeners: &[SocketAddr]) -> Vec<ServerAddress> {
        // Of one that others reach, if there is one.
        let first = listeners.iter().find(|listener| !listener.ip().is_loopback()).or_else(|| listeners.first());
        let port = first.map_or(0, SocketAddr::port);
        let mut all: Vec<_> = self.given.iter().filter_map(|text| ServerAddress::parse(text, port).ok()).collect();
        if all.is_empty() {
            let reachable = listeners.iter().filter(|listener| !listener.ip().is_loopback());
            all = reachable.flat_map(|listener| self.reached_at(*listener)).collect();
        }
        // Whoever reaches one of these processes is on the same machine.
        if all.is_empty() && listeners.iter().all(|listener| listener.ip().is_loopback()) {
            all = listeners.iter().map(|listener| ServerAddress::new(listener.ip(), listener.port())).collect();
        }
        // The order stays: clients try the addresses as they are listed.
        let mut seen = HashSet::new();
        all.retain(|address| seen.insert(address.clone()));
        all
    }

    fn reached_at(&self, listener: SocketAddr) -> Vec<ServerAddress> {
        let addresses = match listener.ip() {
            // IPv4 connections arrive at a socket of IPv6, too.
            IpAddr::V6(any) if any.is_unspecified() => self.pod.clone(),
            IpAddr::V4(any) if any.is_unspecified() => self.pod.iter().copied().filter(IpAddr::is_ipv4).collect(),
            one => vec![one],
        };
        addresses.into_iter().map(|ip| ServerAddress::new(ip, listener.port())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advertised_addresses_default_to_those_that_others_reach() {
        let addresses = |given: &[&str], pod: &[&str], listeners: &[&str]| {
            let given = given.iter().map(|&one| one.to_owned()).collect();
            let advertise = Advertise { given, pod: pod.iter().map(|ip| ip.parse().expect("an address")).collect() };
            let listeners: Vec<_> = listeners.iter().map(|one| one.parse().expect("an address and a port")).collect();
            ServerAddress::list(&advertise.addresses(&listeners), " ")
        };
        let pod = ["10.1.0.7", "2001:db8::7"];
        assert_eq!(
            addresses(&["a.example.com", "10.0.0.1:1"], &pod, &["0.0.0.0:9080"]),
            "a.example.com:9080 10.0.0.1:1"
        );
        assert_eq!(addresses(&["a.example.com"], &[], &["127.0.0.1:9081", "0.0.0.0:9080"]), "a.example.com:9080");
        assert_eq!(addresses(&[], &pod, &["0.0.0.0:9080"]), "10.1.0.7:9080");
        assert_eq!(addresses(&[], &pod, &["[::]:9080", "0.0.0.0:9080"]), "10.1.0.7:9080 [2001:db8::7]:9080");
        assert_eq!(addresses(&[], &pod, &["127.0.0.1:9080", "10.0.0.2:9081"]), "10.0.0.2:9081");
        assert_eq!(addresses(&[], &pod, &["127.0.0.1:9080"]), "127.0.0.1:9080", "nobody reaches the pod");
        assert_eq!(addresses(&[], &[], &["0.0.0.0:9080"]), "", "nobody knows");
    }
}
