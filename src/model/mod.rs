//! What gangplank knows, in types that cannot hold a bad value.
//!
//! Text becomes one of these types once, at the door, and is not looked at again. There is no
//! I/O here, no protobuf and no DNS encoding; what Kubernetes or a resolver would refuse is
//! refused here first, so that nothing behind the door meets a surprise.

mod address;
pub mod cow_tree;
mod dns;
mod instance;
mod name;
mod port;
mod service;
mod validator;
pub mod view;

pub use address::{Address, AddressError, DashedLabel, parse_dashed_label};
pub use cow_tree::CowTree;
pub use dns::{Rcode, RecordType};
pub use instance::{Instance, InstanceChange, InstanceId, InstanceKey, UnixMillis, Weight, WeightError};
pub use name::{DnsName, Label, MAX_LABEL, MAX_WIRE_NAME, NameError, Namespace, ServiceKey, ServiceName};
pub use port::{Port, PortError, PortSet, PortSpec, Ports, Protocol};
pub use service::{Service, Timeline};
pub use validator::{Field, InstanceSpec, InvalidInstance, MAX_INSTANCE_BYTES, Validator};
