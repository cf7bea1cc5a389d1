//! One instance: an address with its ports under a service, and its attributes.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    address::Address,
    cow_tree::Row,
    name::{DnsName, Label},
    port::{EVERY_PORT, PortSet, Ports, Protocol},
    registrant::Registrant,
    stamp::Stamp,
    wall_clock::wall_clock,
};

/// Milliseconds since 1970-01-01 UTC, by the server's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    /// This moment.
    #[must_use]
    pub fn now() -> Self {
        let since = wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default();
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

/// The identity of an instance within its service: its address and the protocols and numbers
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
            // RFC 3986 §3.2.2: brackets, so that the port is not taken for a part of the address.
            Address::Ip(std::net::IpAddr::V6(ip)) if !ports.is_empty() => write!(f, "[{ip}]")?,
            address => write!(f, "{address}")?,
        }
        if self.ports.is_every() {
            return f.write_str(":*");
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

/// One instance of a service, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Instance {
    pub(super) address: Address,
    pub(super) ports: Ports,
    pub(super) host_name: Option<Label>,
    pub(super) node_name: Option<DnsName>,
    pub(super) weight: Weight,
    pub(super) priority: u16,
    pub(super) ready: bool,
    pub(super) registered: UnixMillis,
    pub(super) stamp: Stamp,
    pub(super) registrant: Option<Registrant>,
}

impl Instance {
    /// Where it is reached.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Where it listens, in order of protocol and number; may be empty.
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

    /// When it was last registered, in the order that all replicas agree on. The default for one from
    /// before there were stamps.
    #[must_use]
    pub fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// Who registered it, and alone may change it; `None` if that is nobody.
    #[must_use]
    pub fn registrant(&self) -> Option<&Registrant> {
        self.registrant.as_ref()
    }

    /// Its identity within its service.
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

    /// The same instance with another stamp.
    #[must_use]
    pub fn with_stamp(self, stamp: Stamp) -> Self {
        Self { stamp, ..self }
    }

    /// The same instance with another registrant.
    #[must_use]
    pub fn with_registrant(self, registrant: Option<Registrant>) -> Self {
        Self { registrant, ..self }
    }

    /// Whether `other` equals this in every attribute that a registrant sets.
    #[must_use]
    pub fn same_attributes(&self, other: &Self) -> bool {
        // Destructured, so that a new field does not compile before somebody decides whether a registrant sets it.
        let Self {
            address,
            ports,
            host_name,
            node_name,
            weight,
            priority,
            ready: _,
            registered: _,
            stamp: _,
            registrant: _,
        } = self;
        (address, ports, host_name, node_name, weight, priority)
            == (&other.address, &other.ports, &other.host_name, &other.node_name, &other.weight, &other.priority)
    }

    /// Whether `other` differs at most in its stamp: DNS and readers see no difference.
    #[must_use]
    pub fn same_but_for_stamp(&self, other: &Self) -> bool {
        let own = |one: &Self| (one.ready, one.registered);
        self.same_attributes(other) && own(self) == own(other) && self.registrant == other.registrant
    }

    /// Upper estimate of the bytes of the instance in protobuf.
    pub(super) fn encoded_size(&self) -> usize {
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
        // The weight, the priority, and the time of the first registration.
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
    Every,
    None,
}

impl<'a> InstanceKey<'a> {
    /// Where the instances of `address` begin.
    #[must_use]
    pub fn first_of(address: &'a Address) -> Self {
        Self(address, KeyPorts::None)
    }

    /// The removal of all instances of the same address.
    #[must_use]
    pub fn every(&self) -> Self {
        Self(self.0, KeyPorts::Every)
    }

    /// The address of the instance.
    #[must_use]
    pub fn address(&self) -> &'a Address {
        self.0
    }

    fn ports(&self) -> impl Iterator<Item = (Protocol, u16)> {
        let (ports, set): (&[super::port::Port], &[(Protocol, u16)]) = match self.1 {
            KeyPorts::Ports(ports) => (ports.as_slice(), &[]),
            KeyPorts::Set(set) => (&[], set.as_slice()),
            KeyPorts::Every => (&[], &EVERY_PORT),
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
        // By address first: the instances of one address are neighbours, which a removal without ports relies on.
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

/// A change of one instance. At least one side is `Some`.
#[derive(Debug, Clone)]
pub struct InstanceChange {
    /// As it was; `None` for a new one.
    pub before: Option<Arc<Instance>>,
    /// As it is; `None` for a removed one.
    pub after: Option<Arc<Instance>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weight_units_are_exact() {
        let units = |w| Weight::new(w).expect("valid").units();
        assert_eq!((units(0.0), units(-0.0), units(1e-9), units(655.0)), (0, 0, 1, 42_926_080));
    }
}
