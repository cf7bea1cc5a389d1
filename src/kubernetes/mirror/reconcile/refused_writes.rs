//! A plan of which the API server refuses some writes.
//!
//! A refused write would be refused again, so the other writes go on: an instance that is gone has
//! to leave its slice. But no endpoint may be missing because of a refusal: what the refused write
//! was to add stays in its present slice.

use std::collections::{HashSet, VecDeque};

use crate::{
    kubernetes::{
        api::ApiError,
        objects::slices::{ObservedSlice, SliceWrite},
    },
    model::Address,
};

/// One write of a plan, and the slice as it is before.
pub(super) struct PlannedWrite<'a> {
    pub(super) before: Option<&'a ObservedSlice>,
    pub(super) write: SliceWrite,
}

impl PlannedWrite<'_> {
    fn addresses_before(&self) -> &[Address] {
        // Those that names lead to are nobody's registration.
        let of_instances = |slice: &&ObservedSlice| slice.group.as_ref().is_none_or(|group| !group.resolved);
        self.before.filter(of_instances).map_or(&[], |before| &before.addresses)
    }

    /// Whether it removes one of `addresses` from its slice.
    fn removes_any(&self, addresses: &HashSet<Address>) -> bool {
        let mut affected = self.addresses_before().iter().filter(|address| addresses.contains(address)).peekable();
        affected.peek().is_some() && {
            let after: HashSet<Address> = self.write.addresses().collect();
            affected.any(|address| !after.contains(address))
        }
    }

    /// The addresses in its slice, before or after it.
    fn addresses(&self) -> impl Iterator<Item = Address> {
        self.addresses_before().iter().cloned().chain(self.write.addresses())
    }

    /// The addresses that it adds to its slice.
    fn added(&self) -> impl Iterator<Item = Address> {
        self.write.addresses().filter(|address| !self.addresses_before().contains(address))
    }
}

/// The writes of one plan that the API server refused.
#[derive(Default)]
pub(super) struct RefusedWrites {
    /// The first refusal.
    pub(super) err: Option<ApiError>,
    /// Addresses that are not in their new slices because of a refusal.
    missing: HashSet<Address>,
    /// All addresses in slices that are not as planned, before or after.
    pub(super) outdated: HashSet<Address>,
    /// Whether the slice without addresses, which has the tombstones, is not as planned.
    pub(super) tombstones: bool,
}

impl RefusedWrites {
    /// Records the result of `planned`. Returns whether the API server refused it.
    ///
    /// # Errors
    /// The error of `result`, when it ends the whole plan: not a refusal of this one write.
    pub(super) fn record(
        &mut self,
        planned: &PlannedWrite<'_>,
        result: Result<(), ApiError>,
    ) -> Result<bool, ApiError> {
        match result {
            Ok(()) => Ok(false),
            Err(err) if is_refusal(&err) => {
                self.missing.extend(planned.added());
                self.outdated.extend(planned.addresses());
                self.tombstones |=
                    planned.write.has_tombstones() || planned.before.is_some_and(|before| before.tombstones);
                self.err.get_or_insert(err);
                Ok(true)
            }
            Err(err) => Err(err),
        }
    }

    /// Drops the writes that would remove an address which is missing elsewhere, then those that
    /// would remove what a dropped write was to add, and so on. The next plan has them again.
    pub(super) fn hold_back(&mut self, pending: &mut VecDeque<PlannedWrite<'_>>) {
        let mut before = usize::MAX;
        while !self.missing.is_empty() && pending.len() < before {
            before = pending.len();
            pending.retain(|planned| {
                let held_back = planned.removes_any(&self.missing);
                if held_back {
                    self.missing.extend(planned.added());
                    self.outdated.extend(planned.addresses());
                }
                !held_back
            });
        }
    }
}

/// Whether the API server understood the request and refuses it.
pub(super) fn is_refusal(err: &ApiError) -> bool {
    matches!(err, ApiError::Forbidden(_) | ApiError::Invalid(_) | ApiError::WebhookFailed(_))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use k8s_openapi::api::discovery::v1::EndpointSlice;
    use serde_json::json;

    use super::*;
    use crate::kubernetes::objects::names;

    fn slice(name: &str, addresses: &[&str]) -> EndpointSlice {
        let endpoints: Vec<_> = addresses.iter().map(|address| json!({ "addresses": [address] })).collect();
        let labels = json!({ names::SERVICE_NAME: "web", names::MANAGED_BY: names::MANAGER });
        let slice = json!({
            "metadata": {
                "namespace": "prod", "name": name, "uid": name, "resourceVersion": "1", "labels": labels,
            },
            "addressType": "IPv4",
            "endpoints": endpoints,
        });
        serde_json::from_value(slice).expect("an EndpointSlice")
    }

    fn refusal() -> ApiError {
        ApiError::Forbidden("exceeded quota".into())
    }

    #[test]
    fn address_stays_while_the_slice_it_moves_to_is_refused() {
        let observed = |name, addresses: &[&str]| ObservedSlice::read(&slice(name, addresses)).expect("one of ours");
        let slices = [
            observed("a", &["10.0.0.1", "10.0.0.3"]),
            observed("b", &["10.0.0.2", "10.0.0.4"]),
            observed("c", &["10.0.0.5", "10.0.0.6"]),
            observed("d", &["10.0.0.7"]),
        ];
        let [a, b, c, d] = &slices;
        let planned = |before, write| PlannedWrite { before: Some(before), write };
        // .1 was to move from `a` to a new slice, and .2 from `b` to `a`.
        let mut pending: VecDeque<PlannedWrite<'_>> = [
            planned(b, SliceWrite::Replace(slice("b", &["10.0.0.4"]))),
            planned(a, SliceWrite::Replace(slice("a", &["10.0.0.2", "10.0.0.3"]))),
            planned(c, SliceWrite::Replace(slice("c", &["10.0.0.5"]))),
            planned(d, SliceWrite::Delete { name: "d".into(), uid: "d".into(), resource_version: "1".into() }),
        ]
        .into();
        let left = |pending: &VecDeque<PlannedWrite<'_>>| {
            pending.iter().map(|planned| planned.write.name().to_owned()).collect::<Vec<_>>()
        };
        let mut refused = RefusedWrites::default();
        refused.hold_back(&mut pending);
        assert_eq!(pending.len(), 4, "nothing was refused");
        let created = PlannedWrite { before: None, write: SliceWrite::Create(slice("e", &["10.0.0.1"])) };
        assert_eq!(refused.record(&created, Err(refusal())), Ok(true));
        refused.hold_back(&mut pending);
        assert_eq!(left(&pending), ["c", "d"], "a write that only removes is still made");
        let mut outdated: Vec<String> = refused.outdated.iter().map(ToString::to_string).collect();
        outdated.sort();
        assert_eq!(outdated, ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"], "those of the slices a, b and e");
        // An address that is in the slice already is not missing when the write is refused.
        let replaced = planned(c, SliceWrite::Replace(slice("c", &["10.0.0.5", "10.0.0.7"])));
        assert_eq!(refused.record(&replaced, Err(ApiError::Invalid("another".into()))), Ok(true));
        refused.hold_back(&mut pending);
        assert_eq!((left(&pending), refused.err.clone()), (vec!["c".to_owned()], Some(refusal())));
        assert_eq!(
            refused.record(&created, Err(ApiError::Conflict)),
            Err(ApiError::Conflict),
            "a conflict ends the plan"
        );
    }

    #[test]
    fn refusals_are_forbidden_and_invalid() {
        assert!(is_refusal(&refusal()) && is_refusal(&ApiError::Invalid(String::new())));
        for err in
            [ApiError::Conflict, ApiError::NotFound, ApiError::Busy(Duration::ZERO), ApiError::Unknown(String::new())]
        {
            assert!(!is_refusal(&err), "{err}");
        }
    }
}
