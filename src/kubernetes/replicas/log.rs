//! What the log says of the Lease, where a person may have to do something.

use tracing::{error, warn};

use crate::{kubernetes::api::ApiError, replicas::election::Deposed};

/// This process does not write any more. `holder` is who has the Lease; empty if it is not known.
pub(super) fn deposed(lease: &str, holder: &str, reason: Deposed) {
    match reason {
        Deposed::Outranked(term) if holder.is_empty() => warn!(
            lease,
            term,
            "a slice has a higher term than this process, and nobody else is known to have the Lease: this one writes again when it holds \
             the Lease under a higher term"
        ),
        Deposed::Outranked(_) => warn!(
            lease,
            holder,
            "another process has taken the Lease: this one follows, and hands over what it accepted and Kubernetes lacks"
        ),
        Deposed::LeaseLost => {
            warn!(
                lease,
                "the Lease was lost while the API server did not answer: this process compares before it writes again"
            );
        }
        Deposed::NotAcquired => {
            warn!(lease, "the Lease could not be kept during the take-over: this process tries again");
        }
    }
}

/// A request for the Lease failed.
pub(super) fn failed(lease: &str, err: &ApiError) {
    if matches!(err, ApiError::Forbidden(_)) {
        error!(
            lease, %err,
            "this account may not get, create and update the Lease; grant it as deploy/kustomize/rbac.yaml does; retrying"
        );
    } else {
        warn!(lease, %err, "the Lease cannot be read or written; retrying");
    }
}
