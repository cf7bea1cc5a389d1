//! One instance: an address with its ports under a service, and what was said about it.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    address::{Address, AddressError, parse_dashed_label},
    name::{DnsName, Label, NameError, Namespace, ServiceKey, ServiceName},
    port::{DraftPort, PortError, PortSet, Ports, Protocol},
    table::Row,
};

/// Most octets that what one instance carries may take, counted as protobuf would encode it.
/// It keeps a million instances within memory, and a slice within what Kubernetes stores.
pub const MAX_INSTANCE_OCTETS: usize = 2048;

/// Most octets of a name in a message (RFC 1035 §2.3.4).
const MAX_WIRE_NAME: usize = 255;

/// Milliseconds since 1970-01-01 UTC, by the server's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    /// This moment.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    /// The same moment for the standard library.
    #[must_use]
    pub fn to_system_time(self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.0)
    }
}

/// The share of traffic an instance should get beside its siblings: finite, 0..=655, where 655 is
/// what still fits the 16 bits of an SRV weight at two decimals.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Weight(f32);

/// The weight is not a finite number in 0..=655.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("must be a finite number in 0..=655, got {0}")]
pub struct WeightError(f32);

impl Weight {
    /// One [unit](Self::units) is this part of a weight of 1.
    pub const UNITS_PER_ONE: u64 = 1 << 16;

    /// Takes `weight`.
    ///
    /// # Errors
    /// When it is not finite, below 0 or above 655.
    pub fn new(weight: f32) -> Result<Self, WeightError> {
        // -0.0 is 0, so that the very same registration compares as such.
        if (0.0..=655.0).contains(&weight) { Ok(Self(weight + 0.0)) } else { Err(WeightError(weight)) }
    }

    /// The weight as a number.
    #[must_use]
    pub fn get(self) -> f32 {
        self.0
    }

    /// The weight in whole units of 1/65 536, in which sums are exact in any order. Only a
    /// weight of 0 has none.
    #[must_use]
    pub fn units(self) -> u32 {
        if self.0 == 0.0 {
            return 0;
        }
        // 655 × 65 536 fits 26 bits; the cast saturates and cannot lose more than a fraction.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0..=655 was checked")]
        let units = (f64::from(self.0) * Self::UNITS_PER_ONE as f64).round() as u32;
        units.max(1)
    }
}

/// A weight of 1, which an absent one means.
impl Default for Weight {
    fn default() -> Self {
        Self(1.0)
    }
}

/// What tells one instance of a service from another: its address and the protocols and numbers
/// of its ports. Everything else is an attribute that a registration replaces.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId {
    /// Where it is reached.
    pub address: Address,
    /// On which ports; may be empty.
    pub ports: PortSet,
}

/// `10.0.0.1:8080`, `10.0.0.1:53/UDP`, `[2001:db8::1]:80,443`, or the address alone.
impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports = self.ports.as_slice();
        match &self.address {
            Address::Ip(std::net::IpAddr::V6(ip)) if !ports.is_empty() => write!(f, "[{ip}]")?,
            address => write!(f, "{address}")?,
        }
        for (index, (protocol, number)) in ports.iter().enumerate() {
            write!(f, "{}{number}", if index == 0 { ':' } else { ',' })?;
            if *protocol != Protocol::Tcp {
                write!(f, "/{protocol}")?;
            }
        }
        Ok(())
    }
}

/// The field of a registration that cannot stand, named as the wire contract names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// `namespace`
    Namespace,
    /// `service_name`
    ServiceName,
    /// `host_name`
    HostName,
    /// `ipaddress`
    Address,
    /// `node_name`
    NodeName,
    /// `ports[i]`
    Port(usize),
    /// `weight`
    Weight,
    /// The message as a whole.
    Instance,
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Namespace => f.write_str("namespace"),
            Self::ServiceName => f.write_str("service_name"),
            Self::HostName => f.write_str("host_name"),
            Self::Address => f.write_str("ipaddress"),
            Self::NodeName => f.write_str("node_name"),
            Self::Port(index) => write!(f, "ports[{index}]"),
            Self::Weight => f.write_str("weight"),
            Self::Instance => f.write_str("instance"),
        }
    }
}

/// Which field of a registration cannot stand, and why.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct InvalidInstance {
    /// The field.
    pub field: Field,
    /// Why, and where it helps what was given.
    pub reason: String,
}

impl InvalidInstance {
    /// Longest part of a bad value that a message repeats, in characters.
    const SHOWN: usize = 80;

    fn new(field: Field, reason: &dyn fmt::Display) -> Self {
        Self { field, reason: reason.to_string() }
    }

    fn text(field: Field, why: NameError, given: &str) -> Self {
        let shown: String = given.chars().take(Self::SHOWN).collect();
        let rest = if shown.len() < given.len() { "…" } else { "" };
        Self { field, reason: format!("{why}, got {shown:?}{rest}") }
    }
}

/// An instance as a client wrote it, before it is checked. Texts are empty where nothing was said.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Draft {
    /// An IP address or a DNS name.
    pub address: String,
    /// The ports.
    pub ports: Vec<DraftPort>,
    /// One label, or empty.
    pub host_name: String,
    /// A DNS name, or empty.
    pub node_name: String,
    /// Absent means 1.
    pub weight: Option<f32>,
    /// SRV priority.
    pub priority: u16,
}

/// What the door measures a registration against, beyond the types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Door {
    /// Octets of the zone's name in a message: what is left of 255 is for the service.
    pub zone_wire_len: usize,
    /// Whether an instance may be a DNS name, which needs somebody to look it up.
    pub names_allowed: bool,
}

impl Door {
    /// Takes the two names of a service.
    ///
    /// # Errors
    /// The field that cannot stand.
    pub fn service(&self, namespace: &str, name: &str) -> Result<ServiceKey, InvalidInstance> {
        let ns = Namespace::parse(namespace).map_err(|why| InvalidInstance::text(Field::Namespace, why, namespace))?;
        let name = ServiceName::parse(name).map_err(|why| InvalidInstance::text(Field::ServiceName, why, name))?;
        Ok(ServiceKey::new(ns, name))
    }

    /// Takes the address of an instance.
    ///
    /// # Errors
    /// When it is none, or a DNS name and names are not allowed here.
    pub fn address(&self, text: &str) -> Result<Address, InvalidInstance> {
        let address = Address::parse(text).map_err(|why| match why {
            AddressError::NotAName(_) => {
                let shown: String = text.chars().take(InvalidInstance::SHOWN).collect();
                InvalidInstance { field: Field::Address, reason: format!("{why}, got {shown:?}") }
            }
            AddressError::Empty => InvalidInstance::new(Field::Address, &why),
            _ => InvalidInstance { field: Field::Address, reason: format!("{text}: {why}") },
        })?;
        if matches!(address, Address::Name(_)) && !self.names_allowed {
            return Err(InvalidInstance::new(
                Field::Address,
                &format_args!(
                    "{address} is a DNS name, and this server looks none up: that needs --upstream, which is not there yet"
                ),
            ));
        }
        Ok(address)
    }

    /// Takes the ports of an instance.
    ///
    /// # Errors
    /// The first port that cannot stand.
    pub fn ports(&self, drafts: &[DraftPort]) -> Result<Ports, InvalidInstance> {
        Ports::parse(drafts).map_err(|(index, why)| match why {
            PortError::Name(name) => {
                let InvalidInstance { field, reason } =
                    InvalidInstance::text(Field::Port(index), name, &drafts[index].name);
                InvalidInstance { field, reason: format!("name: {reason}") }
            }
            why => InvalidInstance::new(Field::Port(index), &why),
        })
    }

    /// Takes a whole instance of `service`.
    ///
    /// # Errors
    /// The first field that cannot stand; nothing is corrected silently.
    pub fn instance(
        &self,
        service: &ServiceKey,
        draft: &Draft,
        registered: UnixMillis,
    ) -> Result<Instance, InvalidInstance> {
        let address = self.address(&draft.address)?;
        let ports = self.ports(&draft.ports)?;
        let label = |field, text: &str| match text {
            "" => Ok(None),
            text => Label::parse(text).map(Some).map_err(|why| InvalidInstance::text(field, why, text)),
        };
        let host_name = label(Field::HostName, &draft.host_name)?;
        if let Some(spelled) = host_name.as_ref().and_then(|label| parse_dashed_label(label.as_str().as_bytes()))
            && address.ip() != Some(spelled)
        {
            return Err(InvalidInstance::new(
                Field::HostName,
                &format_args!("{:?} spells the address {spelled}, which is not this instance's", draft.host_name),
            ));
        }
        let node_name = match draft.node_name.as_str() {
            "" => None,
            text => Some(DnsName::parse(text).map_err(|why| InvalidInstance::text(Field::NodeName, why, text))?),
        };
        let weight = draft.weight.map_or_else(|| Ok(Weight::default()), Weight::new);
        let weight = weight.map_err(|why| InvalidInstance::new(Field::Weight, &why))?;
        let instance = Instance {
            address,
            ports,
            host_name,
            node_name,
            weight,
            priority: draft.priority,
            ready: true,
            registered,
        };
        self.check_sizes(service, &instance)?;
        Ok(instance)
    }

    /// Every name that the instance would give must fit a message, and the whole must be small.
    fn check_sizes(&self, service: &ServiceKey, instance: &Instance) -> Result<(), InvalidInstance> {
        // `_name._proto.` is the longest prefix of a port, `label.` that of a host.
        let port = instance
            .ports
            .as_slice()
            .iter()
            .filter_map(|port| Some(port.name.as_ref()?.as_str().len() + 2 + port.protocol.srv_label().len() + 1));
        // A dashed IPv6 label takes at most 39 octets.
        let host = instance.host_name.as_ref().map_or(39, |label| label.as_str().len()) + 1;
        let longest = port.max().unwrap_or(0).max(host);
        // `svc` and its length octet stand between namespace and zone.
        let octets = longest + service.as_str().len() + 1 + "svc".len() + 1 + self.zone_wire_len;
        if octets > MAX_WIRE_NAME {
            return Err(InvalidInstance::new(
                Field::Instance,
                &format_args!(
                    "its longest name would take {octets} octets with the zone, 255 are allowed (RFC 1035 §2.3.4)"
                ),
            ));
        }
        let carried = instance.octets();
        if carried > MAX_INSTANCE_OCTETS {
            return Err(InvalidInstance::new(
                Field::Instance,
                &format_args!("carries {carried} octets, {MAX_INSTANCE_OCTETS} are allowed"),
            ));
        }
        Ok(())
    }
}

/// One instance of a service, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Instance {
    address: Address,
    ports: Ports,
    host_name: Option<Label>,
    node_name: Option<DnsName>,
    weight: Weight,
    priority: u16,
    ready: bool,
    registered: UnixMillis,
}

impl Instance {
    /// Where it is reached.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Its ports.
    #[must_use]
    pub fn ports(&self) -> &Ports {
        &self.ports
    }

    /// Its host label as registered; without one the address with dashes is the label.
    #[must_use]
    pub fn host_name(&self) -> Option<&Label> {
        self.host_name.as_ref()
    }

    /// The machine it runs on.
    #[must_use]
    pub fn node_name(&self) -> Option<&DnsName> {
        self.node_name.as_ref()
    }

    /// Its share of traffic.
    #[must_use]
    pub fn weight(&self) -> Weight {
        self.weight
    }

    /// Its SRV priority; lower is preferred (RFC 2782).
    #[must_use]
    pub fn priority(&self) -> u16 {
        self.priority
    }

    /// Whether it is served. In memory only: not journaled.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.ready
    }

    /// When it was first registered.
    #[must_use]
    pub fn registered(&self) -> UnixMillis {
        self.registered
    }

    /// What tells it from its siblings.
    #[must_use]
    pub fn id(&self) -> InstanceId {
        InstanceId { address: self.address.clone(), ports: self.ports.set() }
    }

    /// The same instance with another readiness.
    #[must_use]
    pub fn with_ready(self, ready: bool) -> Self {
        Self { ready, ..self }
    }

    /// The same instance with another time of first registration.
    #[must_use]
    pub fn with_registered(self, registered: UnixMillis) -> Self {
        Self { registered, ..self }
    }

    /// Whether `other` says the same in every attribute a registrant sets.
    #[must_use]
    pub fn same_attributes(&self, other: &Self) -> bool {
        let Self { address, ports, host_name, node_name, weight, priority, ready: _, registered: _ } = self;
        (address, ports, host_name, node_name, weight, priority)
            == (&other.address, &other.ports, &other.host_name, &other.node_name, &other.weight, &other.priority)
    }

    /// Octets of what it carries, close above what protobuf takes for it.
    #[must_use]
    pub fn octets(&self) -> usize {
        // A text takes a tag and a length, a port its own frame and number as well.
        let text = |len: usize| len + 3;
        let ports = self.ports.as_slice().iter();
        let ports: usize = ports.map(|port| text(port.name.as_ref().map_or(0, |n| n.as_str().len())) + 9).sum();
        let address = match &self.address {
            Address::Ip(_) => 16,
            Address::Name(name) => name.as_str().len(),
        };
        let host = self.host_name.as_ref().map_or(0, |n| text(n.as_str().len()));
        let node = self.node_name.as_ref().map_or(0, |n| text(n.as_str().len()));
        text(address) + ports + host + node + 5 + 4 + 10
    }

    /// The key it is ordered by.
    #[must_use]
    pub fn key(&self) -> InstanceKey<'_> {
        InstanceKey(&self.address, KeyPorts::Ports(&self.ports))
    }
}

/// [`InstanceId`] borrowed: the order of a service's instances, by address, then by ports.
#[derive(Debug, Clone, Copy)]
pub struct InstanceKey<'a>(&'a Address, KeyPorts<'a>);

#[derive(Debug, Clone, Copy)]
enum KeyPorts<'a> {
    Ports(&'a Ports),
    Set(&'a PortSet),
    None,
}

impl<'a> InstanceKey<'a> {
    /// Where the instances of `address` begin.
    #[must_use]
    pub fn first_of(address: &'a Address) -> Self {
        Self(address, KeyPorts::None)
    }

    fn ports(&self) -> impl Iterator<Item = (Protocol, u16)> {
        let (ports, set): (&[super::port::Port], &[(Protocol, u16)]) = match self.1 {
            KeyPorts::Ports(ports) => (ports.as_slice(), &[]),
            KeyPorts::Set(set) => (&[], set.as_slice()),
            KeyPorts::None => (&[], &[]),
        };
        ports.iter().map(|port| (port.protocol, port.number)).chain(set.iter().copied())
    }
}

impl<'a> From<&'a InstanceId> for InstanceKey<'a> {
    fn from(id: &'a InstanceId) -> Self {
        Self(&id.address, KeyPorts::Set(&id.ports))
    }
}

impl Ord for InstanceKey<'_> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.cmp(other.0).then_with(|| self.ports().cmp(other.ports()))
    }
}

impl PartialOrd for InstanceKey<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for InstanceKey<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for InstanceKey<'_> {}

impl Row for Arc<Instance> {
    type Key<'a> = InstanceKey<'a>;

    fn key(&self) -> InstanceKey<'_> {
        Instance::key(self)
    }

    fn order(&self, key: &InstanceKey<'_>) -> std::cmp::Ordering {
        Instance::key(self).cmp(key)
    }
}

/// What happened to one instance. At least one side is there.
#[derive(Debug, Clone)]
pub struct Change {
    /// As it was; `None` for a new one.
    pub before: Option<Arc<Instance>>,
    /// As it is; `None` for a removed one.
    pub after: Option<Arc<Instance>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOOR: Door = Door { zone_wire_len: 15, names_allowed: false };

    fn service() -> ServiceKey {
        DOOR.service("prod", "web").expect("valid")
    }

    fn draft() -> Draft {
        Draft {
            address: "10.0.0.1".into(),
            ports: vec![DraftPort { number: 8080, name: "http".into(), ..DraftPort::default() }],
            ..Draft::default()
        }
    }

    fn refused(draft: &Draft) -> String {
        DOOR.instance(&service(), draft, UnixMillis(0)).expect_err("must be refused").to_string()
    }

    #[test]
    fn a_good_one_passes_and_shows_itself() {
        let instance = DOOR.instance(&service(), &draft(), UnixMillis(7)).expect("valid");
        assert_eq!(instance.id().to_string(), "10.0.0.1:8080");
        assert!(instance.ready());
        assert_eq!(instance.weight().units(), 65_536);
    }

    #[test]
    fn each_refusal_names_its_field() {
        for (bad, says) in [
            (Draft { address: "10.0.0".into(), ..draft() }, "ipaddress: neither"),
            (Draft { address: "127.0.0.1".into(), ..draft() }, "ipaddress: 127.0.0.1: loopback"),
            (Draft { address: "db.example.com".into(), ..draft() }, "ipaddress: db.example.com is a DNS name, and"),
            (Draft { host_name: "a.b".into(), ..draft() }, "host_name: must be one label"),
            (Draft { host_name: "10-0-0-9".into(), ..draft() }, "host_name: \"10-0-0-9\" spells the address 10.0.0.9"),
            (Draft { node_name: "Node".into(), ..draft() }, "node_name: must consist of"),
            (Draft { weight: Some(f32::NAN), ..draft() }, "weight: must be a finite number in 0..=655, got NaN"),
            (Draft { weight: Some(655.5), ..draft() }, "weight: must be"),
            (Draft { weight: Some(-1.0), ..draft() }, "weight: must be"),
            (
                Draft { ports: vec![DraftPort { number: 0, ..DraftPort::default() }], ..draft() },
                "ports[0]: must be 1..=65535, got 0",
            ),
            (
                Draft { ports: vec![DraftPort { number: 1, name: "A".into(), ..DraftPort::default() }], ..draft() },
                "ports[0]: name: must consist of",
            ),
        ] {
            let said = refused(&bad);
            assert!(said.starts_with(says), "{said:?} should begin with {says:?}");
        }
        assert!(DOOR.instance(&service(), &Draft { host_name: "10-0-0-1".into(), ..draft() }, UnixMillis(0)).is_ok());
    }

    #[test]
    fn what_does_not_fit_a_message_is_refused() {
        let ports = (1..200).map(|n| DraftPort { number: n, name: format!("p{n}"), ..DraftPort::default() });
        let said = refused(&Draft { ports: ports.collect(), ..draft() });
        assert!(said.starts_with("instance: carries"), "{said}");

        let narrow = Door { zone_wire_len: 200, ..DOOR };
        let long = Draft { host_name: "h".repeat(60), ..draft() };
        let said = narrow.instance(&service(), &long, UnixMillis(0)).expect_err("too long").to_string();
        assert!(said.contains("255 are allowed"), "{said}");
    }

    #[test]
    fn weights_sum_exactly_in_units() {
        let units = |w| Weight::new(w).expect("valid").units();
        assert_eq!((units(0.0), units(-0.0), units(1e-9), units(655.0)), (0, 0, 1, 42_926_080));
    }
}
