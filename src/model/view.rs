//! How a service looks as JSON or YAML: one shape for `-o json`, `-o yaml` and the admin API.
//!
//! The shapes are part of the interface: fields are added, never renamed or taken away.
//!
//! ```json
//! {
//!   "namespace": "prod", "name": "web", "generation": 1712, "created": "2026-11-21T10:00:00.000Z",
//!   "instances": [{
//!     "address": "10.0.0.1", "ports": [{"port": 8080, "protocol": "TCP", "name": "http"}],
//!     "host_name": null, "node_name": "vm-7", "weight": 1.0, "share": 0.5, "priority": 0,
//!     "ready": true, "registered": "2026-11-21T10:00:00.000Z", "registrant": "vm-7"
//!   }]
//! }
//! ```
//!
//! A service with instances that are DNS names has the field `names` beside `instances`, where the server looks names up:
//!
//! ```json
//! "names": [{"name": "db.example.com", "state": "resolved", "addresses": ["192.0.2.7"], "ttl": 5,
//!            "answered": "2026-11-21T10:00:00.000Z", "error": null}]
//! ```
//!
//! `state` is `resolved`, `unresolved` or `nxdomain`; `ttl` is in seconds; `answered` is `null` before the first answer.
//!
//! A list is `{"services": […]}`. They borrow what they show and allocate nothing of its size,
//! so that a list of a million services can be written piece by piece.

use std::{fmt, net::IpAddr};

use serde::{Serialize, Serializer, ser::SerializeStruct as _};

use super::{DnsName, Instance, NameStatus, Port, Registrant, Resolution, Service, ServiceKey, Timeline, UnixMillis};

/// A service with its instances.
#[derive(Debug, Clone, Copy)]
pub struct ServiceView<'a> {
    /// Which one.
    pub key: &'a ServiceKey,
    /// Its value.
    pub service: &'a Service,
}

impl Serialize for ServiceView<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { key, service } = self;
        let mut fields = serializer.serialize_struct("Service", 5)?;
        fields.serialize_field("namespace", key.namespace())?;
        fields.serialize_field("name", key.name())?;
        fields.serialize_field("generation", &service.generation)?;
        fields.serialize_field("created", &service.created().map(Rfc3339))?;
        fields.serialize_field("instances", &InstanceList(service))?;
        fields.end()
    }
}

/// A service with what the names among its instances lead to.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct NamedServiceView<'a> {
    /// The service.
    #[serde(flatten)]
    pub service: ServiceView<'a>,
    /// Its names. Without any the field is not there.
    #[serde(skip_serializing_if = "NameViews::is_empty")]
    pub names: NameViews<'a>,
}

/// What names lead to.
#[derive(Debug, Clone, Copy)]
pub struct NameViews<'a>(pub &'a [(DnsName, NameStatus)]);

impl NameViews<'_> {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for NameViews<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct NameView<'a> {
            name: DisplayText<'a, DnsName>,
            state: &'static str,
            addresses: Vec<IpAddr>,
            ttl: Option<u32>,
            answered: Option<Rfc3339>,
            error: Option<&'a str>,
        }
        serializer.collect_seq(self.0.iter().map(|(name, status)| {
            let (state, found) = match &*status.resolution {
                Resolution::Unavailable => ("unresolved", None),
                Resolution::NxDomain => ("nxdomain", None),
                Resolution::Addresses(found) => ("resolved", Some(found)),
            };
            NameView {
                name: DisplayText(name),
                state,
                addresses: found.map_or_else(Vec::new, |found| found.iter().collect()),
                ttl: found.map(|found| found.ttl),
                answered: status.answered.map(Rfc3339),
                error: status.error.as_deref(),
            }
        }))
    }
}

/// A service without its instances: the fields that come before them.
#[derive(Debug, Clone, Copy)]
pub struct ServiceHead<'a> {
    /// Which one.
    pub key: &'a ServiceKey,
    /// Its value.
    pub service: &'a Service,
}

impl Serialize for ServiceHead<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { key, service } = self;
        let mut fields = serializer.serialize_struct("Service", 4)?;
        fields.serialize_field("namespace", key.namespace())?;
        fields.serialize_field("name", key.name())?;
        fields.serialize_field("generation", &service.generation)?;
        fields.serialize_field("created", &service.created().map(Rfc3339))?;
        fields.end()
    }
}

/// Several services: `{"services": […]}`.
#[derive(Debug, Clone, Copy)]
pub struct ServicesView<'a>(pub &'a [(ServiceKey, Service)]);

impl Serialize for ServicesView<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        struct ServiceList<'a>(&'a [(ServiceKey, Service)]);
        impl Serialize for ServiceList<'_> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_seq(self.0.iter().map(|(key, service)| ServiceView { key, service }))
            }
        }
        let mut fields = serializer.serialize_struct("Services", 1)?;
        fields.serialize_field("services", &ServiceList(self.0))?;
        fields.end()
    }
}

struct InstanceList<'a>(&'a Service);

impl Serialize for InstanceList<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let shares = TrafficShares::of(self.0);
        let views = self.0.instances.iter();
        serializer.collect_seq(views.map(|instance| InstanceView { instance, share: Some(shares.share(instance)) }))
    }
}

/// One instance.
#[derive(Debug, Clone, Copy)]
pub struct InstanceView<'a> {
    /// What is shown.
    pub instance: &'a Instance,
    /// Its part of the service's traffic, 0..=1; `None` where its siblings are not known.
    pub share: Option<f64>,
}

impl Serialize for InstanceView<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { instance, share } = self;
        let mut fields = serializer.serialize_struct("Instance", 10)?;
        fields.serialize_field("address", &DisplayText(instance.address()))?;
        fields.serialize_field("ports", &PortListView(instance.ports().as_slice()))?;
        fields.serialize_field("host_name", &instance.host_name().map(|label| label.as_str()))?;
        fields.serialize_field("node_name", &instance.node_name().map(|name| name.as_str()))?;
        fields.serialize_field("weight", &instance.weight().get())?;
        fields.serialize_field("share", share)?;
        fields.serialize_field("priority", &instance.priority())?;
        fields.serialize_field("ready", &instance.ready())?;
        fields.serialize_field("registered", &Rfc3339(instance.registered()))?;
        fields.serialize_field("registrant", &instance.registrant().map(Registrant::as_str))?;
        fields.end()
    }
}

struct PortListView<'a>(&'a [Port]);

impl Serialize for PortListView<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct PortView<'a> {
            port: u16,
            protocol: &'static str,
            name: Option<&'a str>,
        }
        serializer.collect_seq(self.0.iter().map(|port| PortView {
            port: port.number,
            protocol: port.protocol.as_str(),
            name: port.name.as_ref().map(|name| name.as_str()),
        }))
    }
}

/// When a change reached each station.
#[derive(Debug, Clone, Copy)]
pub struct TimelineView(pub Timeline);

impl Serialize for TimelineView {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Timeline { received, durable, visible, acknowledged } = self.0;
        let mut fields = serializer.serialize_struct("Timeline", 4)?;
        fields.serialize_field("received", &Rfc3339(received))?;
        fields.serialize_field("durable", &Rfc3339(durable))?;
        fields.serialize_field("visible", &Rfc3339(visible))?;
        fields.serialize_field("acknowledged", &Rfc3339(acknowledged))?;
        fields.end()
    }
}

/// A moment as `2026-11-21T10:00:00.000Z`.
#[derive(Debug, Clone, Copy)]
pub struct Rfc3339(pub UnixMillis);

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// 9999-12-31, the last day that RFC 3339 can write; the clock of a confused machine
        /// must not make a list fail.
        const LAST: u64 = 253_402_300_799_999;
        let moment = UnixMillis(self.0.0.min(LAST)).to_system_time();
        fmt::Display::fmt(&humantime::format_rfc3339_millis(moment), f)
    }
}

impl Serialize for Rfc3339 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

struct DisplayText<'a, T: ?Sized>(&'a T);

impl<T: fmt::Display + ?Sized> Serialize for DisplayText<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self.0)
    }
}

/// What part of a service's traffic each of its instances gets: its weight over that of all that
/// are ready. Where no ready instance has a weight, all ready ones get the same.
#[derive(Debug, Clone, Copy)]
pub struct TrafficShares {
    units: u64,
    ready: usize,
}

impl TrafficShares {
    /// Adds up the ready instances of `service`.
    #[must_use]
    pub fn of(service: &Service) -> Self {
        let ready = || service.instances.iter().filter(|instance| instance.ready());
        Self { units: ready().map(|instance| u64::from(instance.weight().units())).sum(), ready: ready().count() }
    }

    /// How many are ready.
    #[must_use]
    pub fn ready(&self) -> usize {
        self.ready
    }

    /// The part of `instance`, which is one of those added up, 0..=1.
    #[must_use]
    pub fn share(&self, instance: &Instance) -> f64 {
        match (instance.ready(), self.units) {
            (false, _) => 0.0,
            // As DNS draws them: without any weight all are equally likely.
            (true, 0) => 1.0 / self.ready as f64,
            (true, units) => f64::from(instance.weight().units()) / units as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::model::{InstanceSpec, PortSpec, Protocol, testing::VALIDATOR};

    fn service(instances: &[(&str, f32, bool)]) -> (ServiceKey, Service) {
        let key = VALIDATOR.service("prod", "web").expect("valid");
        let instances = instances.iter().map(|(address, weight, ready)| {
            let spec = InstanceSpec {
                address: (*address).into(),
                ports: vec![
                    PortSpec { number: 8080, protocol: Protocol::Tcp, name: "http".into() },
                    PortSpec { number: 53, protocol: Protocol::Udp, name: String::new() },
                ],
                node_name: "vm-7".into(),
                weight: Some(*weight),
                priority: 3,
                ..InstanceSpec::default()
            };
            let instance = VALIDATOR.instance(&key, &spec, UnixMillis(1_700_000_000_123)).expect("valid");
            Arc::new(instance.with_ready(*ready))
        });
        (key.clone(), Service { instances: instances.collect(), generation: 1712 })
    }

    #[test]
    fn json_of_a_service_is_stable() {
        let (key, service) =
            service(&[("10.0.0.1", 0.5, true), ("2001:db8::1", 1.5, true), ("db.example.com", 9.0, false)]);
        let shown = serde_json::to_value(ServiceView { key: &key, service: &service }).expect("JSON");
        let instance = |address: &str, weight: f64, share: f64, ready: bool| {
            json!({
                "address": address,
                "ports": [
                    {"port": 8080, "protocol": "TCP", "name": "http"},
                    {"port": 53, "protocol": "UDP", "name": null},
                ],
                "host_name": null, "node_name": "vm-7", "weight": weight, "share": share, "priority": 3, "registrant": null,
                "ready": ready, "registered": "2023-11-14T22:13:20.123Z",
            })
        };
        let instances = [
            instance("10.0.0.1", 0.5, 0.25, true),
            instance("2001:db8::1", 1.5, 0.75, true),
            instance("db.example.com", 9.0, 0.0, false),
        ];
        let expected = json!({
            "namespace": "prod", "name": "web", "generation": 1712, "created": "2023-11-14T22:13:20.123Z",
            "instances": instances,
        });
        assert_eq!(shown, expected);
        let list = serde_json::to_value(ServicesView(&[(key, service)])).expect("JSON");
        assert_eq!(list, json!({"services": [expected]}));
        assert_eq!(serde_json::to_value(ServicesView(&[])).expect("JSON"), json!({"services": []}));
    }

    #[test]
    fn shares_without_weights_are_equal() {
        let (_, service) = service(&[("10.0.0.1", 0.0, true), ("10.0.0.2", 0.0, true), ("10.0.0.3", 5.0, false)]);
        let shares = TrafficShares::of(&service);
        let all: Vec<f64> = service.instances.iter().map(|instance| shares.share(instance)).collect();
        assert_eq!(all, [0.5, 0.5, 0.0]);
        assert_eq!(shares.ready(), 2);
    }

    #[test]
    fn rfc3339_is_capped_at_year_9999() {
        assert_eq!(Rfc3339(UnixMillis(u64::MAX)).to_string(), "9999-12-31T23:59:59.999Z");
        assert_eq!(Rfc3339(UnixMillis(0)).to_string(), "1970-01-01T00:00:00.000Z");
    }
}
