//! What Kubernetes says that a registration is checked against. It comes through the handle like
//! everything else, so that a check never waits for the API server; it is kept in memory only.

use std::{collections::HashSet, sync::Arc};

use crate::model::{Instance, ServiceKey};

/// One thing that Kubernetes says.
#[derive(Debug, Clone)]
pub enum ClusterFact {
    /// A namespace exists and is not being deleted, or no longer so.
    Namespace {
        /// Its name.
        name: Box<str>,
        /// Whether something may be registered in it.
        exists: bool,
    },
    /// Every namespace was named: from now on one that was not does not exist.
    NamespacesComplete,
    /// A Service of this name belongs to somebody else, and does not let external instances
    /// join; or no longer so.
    Service {
        /// Its name.
        service: ServiceKey,
        /// Whether registrations are refused.
        foreign: bool,
    },
    /// What others have put under a Service that external instances may join: all of it.
    Endpoints {
        /// Its name.
        service: ServiceKey,
        /// Its pods, mostly. Served beside ours, never journaled or mirrored.
        instances: Vec<Arc<Instance>>,
    },
}

impl ClusterFact {
    /// What learning it costs, as a multiple of the cheapest: every instance is published.
    pub(super) fn cost(&self) -> usize {
        match self {
            Self::Namespace { .. } | Self::NamespacesComplete | Self::Service { .. } => 1,
            Self::Endpoints { instances, .. } => 1 + instances.len(),
        }
    }
}

/// How registrations are checked where there is a Kubernetes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamespacePolicy {
    /// A namespace that does not exist is created by the mirror, so that it is no reason to refuse.
    pub create_namespaces: bool,
}

/// Why a registration is refused that could not be mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KubernetesRefusal {
    /// `kube-system`, or `default/kubernetes`: never ours.
    Reserved,
    /// The namespace does not exist.
    NamespaceAbsent,
    /// The Service is managed by somebody else.
    ForeignService,
}

/// What is known of the cluster so far.
#[derive(Debug)]
pub(super) struct ClusterFacts {
    /// `None` without a Kubernetes: then nothing is refused.
    policy: Option<NamespacePolicy>,
    complete: bool,
    namespaces: HashSet<Box<str>>,
    foreign: HashSet<ServiceKey>,
}

impl ClusterFacts {
    pub(super) fn new(policy: Option<NamespacePolicy>) -> Self {
        Self { policy, complete: false, namespaces: HashSet::new(), foreign: HashSet::new() }
    }

    /// Why nothing may be registered under `service`, if so. What is not known yet is no reason:
    /// while the API server is away registrations go on.
    pub(super) fn refuse(&self, service: &ServiceKey) -> Option<KubernetesRefusal> {
        let policy = self.policy?;
        if is_reserved(service) {
            Some(KubernetesRefusal::Reserved)
        } else if self.complete && !policy.create_namespaces && !self.namespaces.contains(service.namespace()) {
            Some(KubernetesRefusal::NamespaceAbsent)
        } else if self.foreign.contains(service) {
            Some(KubernetesRefusal::ForeignService)
        } else {
            None
        }
    }

    /// Returns whether that changes anything.
    pub(super) fn set_namespace(&mut self, name: Box<str>, exists: bool) -> bool {
        if exists { self.namespaces.insert(name) } else { self.namespaces.remove(&name) }
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

/// Whether nothing may ever be registered under `service`: it is the cluster's own.
pub(super) fn is_reserved(service: &ServiceKey) -> bool {
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
    fn nothing_is_refused_for_what_is_not_known_yet() {
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
