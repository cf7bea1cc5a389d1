//! Instances as EndpointSlices, and back.
//!
//! A slice has one address family and one list of ports for all its endpoints, so the instances of
//! a service are grouped by these ([`SliceGroup`]). Within a group [`plan`] assigns each instance to
//! a slice once and leaves it there, so that one change rewrites one slice, however large the
//! service is. What an endpoint has no field for is in one annotation of the slice. So the slices of
//! a service are its whole record, and an [`SliceView`] of them restores it.
//!
//! A slice in the cluster is kept in memory as an [`ObservedSlice`]: its addresses, and a digest of
//! everything that gangplank would write, which reveals an edit by another writer.
//!
//! The removals of a service that are remembered are in a slice of their own, without endpoints.
//!
//! Instances that are DNS names are in slices of type FQDN, which few consumers read: CoreDNS answers with a CNAME for each
//! ready endpoint, beside whatever addresses the service has. So such an endpoint is ready only where its name is all that
//! the service has. Readiness is rendered but not part of the record.

mod group;
mod observed;
mod plan;
mod read;
mod record;
mod render;
#[cfg(test)]
pub(super) mod tests;
mod tombstones;
mod view;

pub use group::{Family, SliceGroup};
pub use observed::{ForeignMetadata, ObservedSlice};
pub use plan::{DEFAULT_MAX_ENDPOINTS, MAX_ENDPOINTS, PlanOptions, SliceWrite, plan};
pub use read::{SkippedEndpoint, read_foreign_slice, read_slice};
pub use render::{ContentDigest, SliceStamps};
pub use tombstones::read_tombstones;
pub use view::{SliceRank, SliceView};

pub(in crate::kubernetes) use observed::{label, service_of};
pub(super) use {
    group::PortList,
    render::{hostname, owner},
};
