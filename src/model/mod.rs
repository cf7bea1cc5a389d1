//! What gangplank knows, in types that cannot hold an invalid value.
//!
//! Text becomes one of these types once, where it enters, and is not parsed again. Two sets of rules
//! apply: the [`invariants`], also to what is read back from disk and from EndpointSlices, and the
//! policy of the [`Validator`], to registrations only. There is no I/O here, no protobuf and no DNS
//! encoding; what Kubernetes or a resolver would refuse is refused here first.

mod address;
mod address_pattern;
pub mod cow_tree;
mod dns;
pub mod hex;
mod instance;
pub mod invariants;
mod name;
mod port;
mod registrant;
mod replica;
mod resolution;
mod server_address;
mod service;
mod stamp;
#[cfg(test)]
pub(crate) mod testing;
mod validator;
pub mod view;
mod wall_clock;

pub use address::{Address, AddressError, DashedLabel, parse_dashed_label};
pub use address_pattern::{AddressPattern, parse_network};
pub use cow_tree::CowTree;
pub use dns::{Rcode, RecordType};
pub use instance::{Instance, InstanceChange, InstanceId, InstanceKey, UnixMillis, Weight, WeightError};
pub use invariants::{Field, InstanceSpec, InvalidInstance};
pub use name::{DnsName, Label, MAX_LABEL, MAX_WIRE_NAME, NameError, Namespace, ServiceKey, ServiceName};
pub use port::{Port, PortError, PortSet, PortSpec, Ports, Protocol};
pub use registrant::{Registrant, RegistrantError, RegistrantPool};
pub use replica::{Replica, ReplicaRole};
pub use resolution::{MAX_RESOLVED, NameStatus, Resolution, ResolvedAddresses};
pub use server_address::{ServerAddress, ServerAddressError};
pub use service::{Service, Timeline};
pub use stamp::{HybridClock, Stamp};
pub use validator::{MAX_INSTANCE_BYTES, Validator};
pub use wall_clock::{test_clock_offset, wall_clock};
