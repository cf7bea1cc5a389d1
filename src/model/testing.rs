//! What the tests of many modules build: services and instances from short texts.

use std::sync::Arc;

use super::{Instance, InstanceSpec, PortSpec, Protocol, ServiceKey, Stamp, UnixMillis, Validator};

/// A policy that admits everything that fits under `cluster.local`.
pub(crate) const VALIDATOR: Validator = Validator { zone_wire_len: 15, names_allowed: true };

/// The service that `service.namespace` names.
pub(crate) fn key(service: &str) -> ServiceKey {
    let (name, namespace) = service.split_once('.').expect("service.namespace");
    VALIDATOR.service(namespace, name).expect("valid")
}

/// An instance at `address` with ports such as `http:80`, `9` or `dns:53/udp`.
pub(crate) fn spec(address: &str, ports: &[&str]) -> InstanceSpec {
    let port = |text: &&str| {
        let (text, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = Protocol::ALL.into_iter().find(|p| p.srv_label()[1..] == *protocol).expect("a protocol");
        let (name, number) = text.split_once(':').unwrap_or(("", text));
        PortSpec { number: number.parse().expect("a number"), protocol, name: name.into() }
    };
    InstanceSpec { address: address.into(), ports: ports.iter().map(port).collect(), ..InstanceSpec::default() }
}

/// The instance as a registrant sent it, without the server's stamp.
pub(crate) fn unstamped(instance: &Arc<Instance>) -> Arc<Instance> {
    Arc::new(Instance::clone(instance).with_stamp(Stamp::default()))
}

/// The instance by the invariants alone, as one that was stored, first registered at 0.
pub(crate) fn instance(spec: &InstanceSpec) -> Arc<Instance> {
    Arc::new(spec.to_instance(UnixMillis(0)).expect("valid"))
}
