//! Late writes: what a slice of ours says that was written under an earlier term, and that is not known here.
//!
//! A request of a former writer can be carried out after another process has taken over and listed the slices. Its words may have
//! been answered with 202, so they are merged as those of an outbox are, not overwritten. That comes before the
//! [`ClusterCache`](super::ClusterCache) knows the slice: the mirror replaces only versions that are in the cache.
//!
//! And a slice of a later term: it deposes this process, and is not replaced.

use k8s_openapi::api::discovery::v1::EndpointSlice;
use tracing::info;

use crate::{
    kubernetes::{
        api::Fence,
        objects::slices::{ObservedSlice, read_slice, read_tombstones},
    },
    model::{InstanceId, InstanceKey, ServiceKey, Stamp, Validator},
    registry::{Catalog, LateSlice, MergeOutcome, OutboxWord, RegistryHandle, Unavailable},
};

/// Merges late writes into the registry of the process that writes.
#[derive(Debug, Clone)]
pub(in crate::kubernetes) struct LateWrites {
    registry: RegistryHandle,
    validator: Validator,
    /// Has the term under which this process writes. A slice with this term is this process's own, or somebody has edited it.
    fence: Fence,
}

impl LateWrites {
    pub(in crate::kubernetes) fn new(registry: RegistryHandle, validator: Validator, fence: Fence) -> Self {
        Self { registry, validator, fence }
    }

    /// Merges what `slice` says, which was read as `observed`. Returns when it is durable and served.
    ///
    /// # Errors
    /// When this process does not write any more, is deposed by the slice, or cannot write its journal: then the slice must not be
    /// replaced.
    pub(in crate::kubernetes) async fn merge(
        &self,
        slice: &EndpointSlice,
        observed: &ObservedSlice,
    ) -> Result<(), Unavailable> {
        if self.fence.deposed_by(observed.term) {
            return Err(Unavailable::NotReady);
        }
        if observed.term >= self.fence.term() || observed.deleting {
            return Ok(());
        }
        let late = unknown_words(slice, &observed.service, &self.validator, self.registry.catalog());
        if late.words.is_empty() && late.refuse_before == 0 {
            return Ok(());
        }
        let merged = self.registry.merge_late(late).await?;
        let words = merged.outcomes.iter().filter(|outcome| **outcome == MergeOutcome::Merged).count();
        let (service, slice, term) = (&observed.service, &*observed.name, observed.term);
        info!(%service, slice, term, words, "merged what a process of an earlier term wrote late");
        Ok(())
    }
}

/// What a slice says that is later than what is known here. An endpoint without a stamp was added by somebody else.
fn unknown_words(slice: &EndpointSlice, service: &ServiceKey, validator: &Validator, catalog: &Catalog) -> LateSlice {
    let (held, known) = (catalog.get(service).unwrap_or_default(), catalog.tombstones(service));
    let is_unknown = |key: &InstanceKey<'_>, stamp: Stamp| {
        let registered = held.instances.get(key).map(|instance| instance.stamp());
        registered.max(known.get(key)).unwrap_or_default() < stamp
    };
    let word = |id: InstanceId, instance, stamp| OutboxWord { service: service.clone(), id, instance, stamp };
    let late = |words, refuse_before| LateSlice { service: service.clone(), words, refuse_before };
    if let Some(tombstones) = read_tombstones(slice) {
        let unknown = tombstones.iter().filter(|one| is_unknown(&InstanceKey::from(&one.id), one.stamp));
        let unknown = unknown.map(|one| word(one.id.clone(), None, one.stamp)).collect();
        let refuse_before = tombstones.refuse_before();
        return late(unknown, if refuse_before > known.refuse_before() { refuse_before } else { 0 });
    }
    let (instances, _) = read_slice(slice, validator);
    let unknown = instances.into_iter().filter(|instance| is_unknown(&instance.key(), instance.stamp()));
    let unknown = unknown.map(|instance| word(instance.id(), Some(instance.clone()), instance.stamp())).collect();
    late(unknown, 0)
}
