//! One of the processes that answer the same: what it says of itself, to people and programs.

use serde::Serialize;

use super::{ServerAddress, UnixMillis, view::Rfc3339};

/// What a process is to the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaRole {
    /// Without Kubernetes there are no others.
    Alone,
    /// Follows the one that writes.
    Standby,
    /// Holds the Lease and reads the EndpointSlices; takes no registrations yet.
    TakingOver,
    /// Takes registrations and writes them to Kubernetes.
    Writer,
}

impl ReplicaRole {
    /// As tables show it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Standby => "standby",
            Self::TakingOver => "taking-over",
            Self::Writer => "writer",
        }
    }
}

/// What a process says of itself. As JSON: fields are added, never renamed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Replica {
    /// Host name and data directory, as the Lease names its holder; empty without Kubernetes.
    pub name: String,
    /// The version of gangplank.
    pub version: String,
    /// Whether it writes, follows, takes over, or is alone.
    pub role: ReplicaRole,
    /// Since when it is that.
    #[serde(serialize_with = "rfc3339")]
    pub since: UnixMillis,
    /// The highest term that it has seen; 0 without Kubernetes.
    pub term: u64,
    /// The generation that it answers; on standby, the highest one that the EndpointSlices show.
    pub generation: u64,
    /// On standby: how old its answers may be, in seconds; `None` otherwise, and before it has read the EndpointSlices.
    pub age_seconds: Option<f64>,
    /// Seconds since the Lease was renewed, as far as it knows; `None` without Kubernetes.
    pub lease_age_seconds: Option<f64>,
    /// Of the writer: services of which Kubernetes does not have the latest change yet.
    pub services_behind: u64,
    /// On standby: registrations and removals that it accepted and has to hand over to the writer.
    pub outbox_words: u64,
    /// Where it takes registrations when it writes: `ADDRESS:PORT`.
    #[serde(serialize_with = "displayed")]
    pub addresses: Vec<ServerAddress>,
    /// The process that holds the Lease, as far as it knows; empty if it does not, or if the Lease was not renewed for 15 s.
    pub writer: String,
    /// Where that one takes registrations.
    #[serde(serialize_with = "displayed")]
    pub writer_addresses: Vec<ServerAddress>,
}

fn rfc3339<S: serde::Serializer>(at: &UnixMillis, serializer: S) -> Result<S::Ok, S::Error> {
    Rfc3339(*at).serialize(serializer)
}

fn displayed<S: serde::Serializer>(addresses: &[ServerAddress], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(addresses.iter().map(ToString::to_string))
}
