//! Instances as EndpointSlices, and back.
//!
//! A slice has one address family and one list of ports for all its endpoints, so the instances
//! of a service are grouped ([`SliceGroup`]) by these. Within a group [`plan`] places each instance in a
//! slice once and leaves it there, so that one change rewrites one slice however large the
//! service is. Attributes that an endpoint has no field for are in one annotation of the slice;
//! the slices of a service are therefore its whole record, and [`read`] restores from them alone.
//!
//! An existing slice is kept in memory as an [`ObservedSlice`]: its addresses, and a digest of
//! everything that gangplank would write, which detects external edits.
//!
//! Instances that are DNS names are not mirrored: an FQDN slice is deprecated, and two of them
//! make CoreDNS answer two CNAMEs. Readiness is rendered but not part of the record.

mod group;
mod observed;
mod plan;
mod read;
mod record;
mod render;
#[cfg(test)]
pub(super) mod tests;

pub use group::{Family, SliceGroup};
pub use observed::{ForeignMetadata, ObservedSlice};
pub use plan::{DEFAULT_MAX_ENDPOINTS, MAX_ENDPOINTS, PlanOptions, SliceWrite, plan};
pub use read::{SkippedEndpoint, foreign, read};
pub use render::{ContentDigest, SliceStamps};

pub(super) use {
    group::PortList,
    render::{hostname, owner},
};
