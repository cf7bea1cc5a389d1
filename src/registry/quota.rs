//! How many instances each identity and each namespace has, and how many it may have.
//!
//! The counts are those of the catalog with the changes of the batch: the writer alone changes both, so a limit is exact
//! however many streams an identity has, and after a start or a take-over it counts what was read.

use std::{collections::HashMap, num::NonZeroUsize, sync::Arc};

use super::Requester;
use crate::{
    metrics::QuotaKind,
    model::{Instance, Registrant},
};

/// Limits of instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InstanceQuotas {
    /// Of one identity; `None` for any number. Callers who may do all are no identity.
    pub per_identity: Option<NonZeroUsize>,
    /// Of one namespace, where its annotation does not say another limit; `None` for any number.
    pub per_namespace: Option<NonZeroUsize>,
}

/// A limit that a registration would exceed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QuotaExceeded {
    /// [`InstanceQuotas::per_identity`].
    Identity {
        /// The identity.
        registrant: Registrant,
        /// Its limit.
        limit: usize,
    },
    /// [`InstanceQuotas::per_namespace`].
    Namespace {
        /// Its limit.
        limit: usize,
    },
    /// Of the namespace's annotation.
    Annotation {
        /// Its limit; `None` if the annotation is invalid.
        limit: Option<usize>,
    },
    /// Of services of the namespace in which removals are remembered.
    Removals {
        /// Its limit.
        limit: usize,
    },
}

/// Services of a namespace in which removals may be remembered, beside two for each of its instances. Each keeps a slice in Kubernetes
/// until the removals are forgotten, so that names that come and go, or never were there, cost as much as names that stay.
pub(super) const MAX_REMEMBERED: usize = 10_000;

impl QuotaExceeded {
    pub(super) fn kind(&self) -> QuotaKind {
        match self {
            Self::Identity { .. } => QuotaKind::IdentityInstances,
            Self::Namespace { .. } | Self::Annotation { .. } => QuotaKind::NamespaceInstances,
            Self::Removals { .. } => QuotaKind::NamespaceRemovals,
        }
    }
}

/// What a namespace's annotation says of its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnnotatedQuota {
    /// So many instances.
    Limit(usize),
    /// It is invalid: nothing new is registered until it is corrected.
    Invalid,
}

/// Instances by registrant and by namespace; or what a batch adds and removes.
#[derive(Debug, Default)]
pub(super) struct InstanceCounts {
    by_registrant: HashMap<Registrant, isize, foldhash::fast::RandomState>,
    by_namespace: HashMap<Box<str>, isize, foldhash::fast::RandomState>,
}

impl InstanceCounts {
    /// Counts that `after` is in the place of `before`.
    pub(super) fn replace(&mut self, namespace: &str, before: Option<&Instance>, after: Option<&Instance>) {
        if before.is_some() != after.is_some() {
            self.add_to_namespace(namespace, if after.is_some() { 1 } else { -1 });
        }
        let [before, after] = [before, after].map(|instance| instance.and_then(Instance::registrant));
        // A change of the owner moves the instance from one account to the other.
        if before != after {
            before.into_iter().for_each(|registrant| self.add_to_registrant(registrant, -1));
            after.into_iter().for_each(|registrant| self.add_to_registrant(registrant, 1));
        }
    }

    /// Takes over what a batch adds and removes.
    pub(super) fn merge(&mut self, batch: &Self) {
        batch.by_registrant.iter().for_each(|(registrant, &by)| self.add_to_registrant(registrant, by));
        batch.by_namespace.iter().for_each(|(namespace, &by)| self.add_to_namespace(namespace, by));
    }

    fn add_to_registrant(&mut self, registrant: &Registrant, by: isize) {
        match self.by_registrant.get_mut(registrant) {
            // Removed at 0: identities come and go, and the map must not keep every one that ever was.
            Some(count) if *count + by == 0 => drop(self.by_registrant.remove(registrant)),
            Some(count) => *count += by,
            None => drop(self.by_registrant.insert(registrant.clone(), by)),
        }
    }

    fn add_to_namespace(&mut self, namespace: &str, by: isize) {
        match self.by_namespace.get_mut(namespace) {
            Some(count) if *count + by == 0 => drop(self.by_namespace.remove(namespace)),
            Some(count) => *count += by,
            None => drop(self.by_namespace.insert(namespace.into(), by)),
        }
    }

    pub(super) fn of_registrant(&self, registrant: &Registrant) -> isize {
        self.by_registrant.get(registrant).copied().unwrap_or(0)
    }

    pub(super) fn of_namespace(&self, namespace: &str) -> isize {
        self.by_namespace.get(namespace).copied().unwrap_or(0)
    }
}

impl InstanceQuotas {
    /// The limit that a registration in place of `before` exceeds, with the counts before it.
    pub(super) fn exceeded(
        &self,
        by: &Requester,
        before: Option<&Arc<Instance>>,
        annotated: Option<AnnotatedQuota>,
        of_registrant: impl FnOnce(&Registrant) -> usize,
        of_namespace: impl FnOnce() -> usize,
    ) -> Option<QuotaExceeded> {
        // The namespace has as many instances after a repetition as before.
        if before.is_none() {
            let exceeded = match (annotated, self.per_namespace) {
                (Some(AnnotatedQuota::Invalid), _) => Some(QuotaExceeded::Annotation { limit: None }),
                (Some(AnnotatedQuota::Limit(limit)), _) => {
                    (of_namespace() >= limit).then_some(QuotaExceeded::Annotation { limit: Some(limit) })
                }
                (None, Some(limit)) => {
                    (of_namespace() >= limit.get()).then_some(QuotaExceeded::Namespace { limit: limit.get() })
                }
                (None, None) => None,
            };
            if exceeded.is_some() {
                return exceeded;
            }
        }
        let (Requester::Identity { registrant, .. }, Some(limit)) = (by, self.per_identity) else { return None };
        // Registering again what it has takes no more room. Taking over what belongs to nobody, or to another, does.
        let is_own = before.is_some_and(|before| before.registrant() == Some(registrant));
        (!is_own && of_registrant(registrant) >= limit.get())
            .then(|| QuotaExceeded::Identity { registrant: registrant.clone(), limit: limit.get() })
    }
}
