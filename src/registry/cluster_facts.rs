//! Facts about the cluster that registrations are checked against. The mirror sends them through the
//! registry's handle, so that a check never waits for the API server. They are kept in memory only.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use ipnet::IpNet;

use super::{AnnotatedAddresses, AnnotatedQuota, address_rules::AddressRules};
use crate::model::{Instance, ServiceKey};

/// One fact about the cluster, as the API server reports it.
#[derive(Debug, Clone)]
pub enum ClusterFact {
    /// Whether a namespace exists and is not being deleted.
    Namespace {
        /// Its name.
        name: Box<str>,
        /// Whether instances may be registered in it.
        exists: bool,
    },
    /// How many instances a namespace may have, by its annotation; `None` without one.
    Quota {
        /// The namespace.
        namespace: Box<str>,
        /// Its limit.
        quota: Option<AnnotatedQuota>,
    },
    /// Which addresses may be registered in a namespace, by its annotation; `None` without one.
    Addresses {
        /// The namespace.
        namespace: Box<str>,
        /// What the annotation says.
        addresses: Option<AnnotatedAddresses>,
    },
    /// All ranges of the cluster's Services.
    ServiceRanges(Vec<IpNet>),
    /// The list of namespaces is complete: a namespace without a [`ClusterFact::Namespace`] does not
    /// exist.
    NamespacesComplete,
    /// Whether a Service of this name exists that the mirror does not manage, and that is not open to
    /// external instances.
    Service {
        /// Its name.
        service: ServiceKey,
        /// Whether registrations are refused.
        foreign: bool,
    },
    /// All foreign endpoints of a joined service.
    Endpoints {
        /// Its name.
        service: ServiceKey,
        /// Mostly pods. Served beside the registered instances, never journaled or mirrored.
        instances: Vec<Arc<Instance>>,
    },
}

impl ClusterFact {
    /// The cost of learning the fact, as a multiple of the cheapest: each instance is published.
    pub(super) fn cost(&self) -> usize {
        match self {
            Self::Namespace { .. }
            | Self::Quota { .. }
            | Self::Addresses { .. }
            | Self::ServiceRanges(_)
            | Self::NamespacesComplete
            | Self::Service { .. } => 1,
            Self::Endpoints { instances, .. } => 1 + instances.len(),
        }
    }
}

/// How registrations are checked against Kubernetes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamespacePolicy {
    /// Whether the mirror creates missing namespaces. If so, registrations in them are accepted.
    pub create_namespaces: bool,
}

/// Why a registration is refused: the mirror could not write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum KubernetesRefusal {
    /// The namespace is `kube-system`, or the service is `default/kubernetes`.
    Reserved,
    /// The namespace does not exist.
    NamespaceAbsent,
    /// The Service exists and is not managed by the mirror.
    ForeignService,
}

/// The facts that were received so far.
#[derive(Debug)]
pub(super) struct ClusterFacts {
    /// `None` without Kubernetes: then nothing is refused.
    policy: Option<NamespacePolicy>,
    complete: bool,
    namespaces: HashSet<Box<str>>,
    foreign: HashSet<ServiceKey>,
    quotas: HashMap<Box<str>, AnnotatedQuota>,
    /// Which addresses may be registered.
    pub(super) addresses: AddressRules,
}

impl ClusterFacts {
    pub(super) fn new(policy: Option<NamespacePolicy>) -> Self {
        Self {
            policy,
            complete: false,
            namespaces: HashSet::new(),
            foreign: HashSet::new(),
            quotas: HashMap::new(),
            addresses: AddressRules::new(policy.is_some()),
        }
    }

    /// Why a registration under `service` is refused, or `None`. A fact that was not received yet
    /// refuses nothing: while the API server is down, registrations are accepted.
    pub(super) fn refuse(&self, service: &ServiceKey) -> Option<KubernetesRefusal> {
        let policy = self.policy?;
        if is_reserved(service) {
            Some(KubernetesRefusal::Reserved)
        // Before the list is complete an unknown namespace may exist: registrations are accepted, as while the API server is away.
        } else if self.complete && !policy.create_namespaces && !self.namespaces.contains(service.namespace()) {
            Some(KubernetesRefusal::NamespaceAbsent)
        } else if self.foreign.contains(service) {
            Some(KubernetesRefusal::ForeignService)
        } else {
            None
        }
    }

    /// Whether Kubernetes has a place for what is said of `service`, as far as that is known.
    pub(super) fn has_place_for(&self, service: &ServiceKey) -> bool {
        // Unlike a registration, a removal creates no namespace, so `create_namespaces` does not help here.
        let may_exist = self.policy.is_none() || !self.complete || self.namespaces.contains(service.namespace());
        may_exist && self.refuse(service).is_none()
    }

    /// Returns whether that is a change.
    pub(super) fn set_namespace(&mut self, name: Box<str>, exists: bool) -> bool {
        if exists { self.namespaces.insert(name) } else { self.namespaces.remove(&name) }
    }

    /// The limit of instances of a namespace, by its annotation.
    pub(super) fn quota(&self, namespace: &str) -> Option<AnnotatedQuota> {
        self.quotas.get(namespace).copied()
    }

    pub(super) fn set_quota(&mut self, namespace: Box<str>, quota: Option<AnnotatedQuota>) {
        match quota {
            Some(quota) => drop(self.quotas.insert(namespace, quota)),
            None => drop(self.quotas.remove(&namespace)),
        }
    }

    pub(super) fn namespaces_are_complete(&mut self) {
        self.complete = true;
    }

    pub(super) fn set_foreign(&mut self, service: ServiceKey, foreign: bool) {
        if foreign {
            self.foreign.insert(service);
        } else {
            self.foreign.remove(&service);
        }
    }
}

/// Whether `service` belongs to the cluster itself, so that nothing may be registered under it.
pub(super) fn is_reserved(service: &ServiceKey) -> bool {
    // Every pod trusts these names: they are the API server's, and those of the cluster's own parts.
    service.namespace() == "kube-system" || (service.namespace(), service.name()) == ("default", "kubernetes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Validator;

    fn key(namespace: &str, name: &str) -> ServiceKey {
        Validator { zone_wire_len: 15, names_allowed: false }.service(namespace, name).expect("valid")
    }

    #[test]
    fn nothing_is_refused_without_kubernetes() {
        assert_eq!(ClusterFacts::new(None).refuse(&key("kube-system", "kube-dns")), None);
    }

    #[test]
    fn namespace_is_refused_only_when_the_list_is_complete() {
        let mut facts = ClusterFacts::new(Some(NamespacePolicy { create_namespaces: false }));
        assert_eq!(facts.refuse(&key("prod", "web")), None);
        assert!(facts.set_namespace("prod".into(), true));
        assert!(!facts.set_namespace("prod".into(), true), "known already");
        facts.namespaces_are_complete();
        assert_eq!(facts.refuse(&key("prod", "web")), None);
        assert_eq!(facts.refuse(&key("stage", "web")), Some(KubernetesRefusal::NamespaceAbsent));
        facts.set_foreign(key("prod", "web"), true);
        assert_eq!(facts.refuse(&key("prod", "web")), Some(KubernetesRefusal::ForeignService));
        facts.set_foreign(key("prod", "web"), false);
        assert_eq!(facts.refuse(&key("prod", "web")), None);
    }

    #[test]
    fn reserved_services_are_refused() {
        let facts = ClusterFacts::new(Some(NamespacePolicy { create_namespaces: true }));
        assert_eq!(facts.refuse(&key("kube-system", "web")), Some(KubernetesRefusal::Reserved));
        assert_eq!(facts.refuse(&key("default", "kubernetes")), Some(KubernetesRefusal::Reserved));
        assert_eq!(facts.refuse(&key("default", "web")), None);
    }
}
