//! A service as the registry holds it.

use std::{ops::ControlFlow, sync::Arc};

use super::{
    address::Address,
    cow_tree::CowTree,
    instance::{Instance, InstanceId, InstanceKey, UnixMillis},
};

/// Everything registered under one name, as an immutable value: a clone is cheap and does not
/// change when the registry does.
#[derive(Debug, Clone, Default)]
pub struct Service {
    /// In order of address and ports.
    pub instances: CowTree<Arc<Instance>>,
    /// The generation of its last change.
    pub generation: u64,
}

impl Service {
    /// When its oldest instance was registered.
    #[must_use]
    pub fn created(&self) -> Option<UnixMillis> {
        self.instances.iter().map(|instance| instance.registered()).min()
    }
}

impl CowTree<Arc<Instance>> {
    /// The instances at `address`, whatever their ports.
    #[must_use]
    pub fn at(&self, address: &Address) -> Vec<Arc<Instance>> {
        let mut found = Vec::new();
        // Instances are sorted by address, so those of one address are neighbours: the first other one ends the search.
        let _ = self.visit_from(&InstanceKey::first_of(address), &mut |instance| {
            if instance.address() != address {
                return ControlFlow::Break(());
            }
            found.push(Arc::clone(instance));
            ControlFlow::Continue(())
        });
        found
    }

    /// The instances that a removal of `id` removes.
    #[must_use]
    pub fn removed_by(&self, id: &InstanceId) -> Vec<Arc<Instance>> {
        if id.ports.is_every() {
            self.at(&id.address)
        } else {
            self.get(&InstanceKey::from(id)).cloned().into_iter().collect()
        }
    }
}

/// When a change reached each station, by the server's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timeline {
    /// The registry took it from its queue's sender.
    pub received: UnixMillis,
    /// The journal was synced. Equal to `received` for what is not journaled.
    pub durable: UnixMillis,
    /// DNS answers with it.
    pub visible: UnixMillis,
    /// The registrant was answered.
    pub acknowledged: UnixMillis,
}
