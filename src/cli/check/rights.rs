//! The rights that a server needs for its flags.

use super::finding::CheckId;
use crate::{admin::client::KubernetesFlags, kubernetes::api::AccessRight};

/// The Lease by which one process writes.
const LEASE: &str = "gangplank-writer";

/// Where the Lease is unless the server says otherwise: the namespace of the manifests.
const DEFAULT_LEASE_NAMESPACE: &str = "gangplank";

const EVERY_VERB: &[&str] = &["get", "list", "watch", "create", "update", "delete"];

/// Where the flags come from that a right depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    Always,
    /// By a flag, which is or is not there; `None`: nobody has said.
    Flag(Option<bool>),
}

/// The rights that belong to one check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RightsNeeded<'a> {
    pub(super) id: CheckId,
    pub(super) need: Need,
    pub(super) rights: Vec<AccessRight<'a>>,
}

/// What is needed, a check for each resource. `flags` are `None` when the server did not tell them.
pub(super) fn rights_needed(flags: Option<&KubernetesFlags>) -> Vec<RightsNeeded<'_>> {
    let lease_namespace = flags.and_then(|flags| flags.lease_namespace.as_deref()).unwrap_or(DEFAULT_LEASE_NAMESPACE);
    let on = |group, resource, verbs: &[&'static str]| {
        let right = |verb: &&'static str| AccessRight { verb, group, resource, namespace: None, name: None };
        verbs.iter().map(right).collect::<Vec<_>>()
    };
    let within = |mut rights: Vec<AccessRight<'static>>, name| {
        rights.iter_mut().for_each(|right| right.name = name);
        rights
    };
    let in_lease_namespace = |rights: Vec<AccessRight<'static>>| {
        rights.into_iter().map(|right| AccessRight { namespace: Some(lease_namespace), ..right }).collect::<Vec<_>>()
    };
    let flag = |get: fn(&KubernetesFlags) -> bool| Need::Flag(flags.map(get));
    let namespaces: &[&str] = match flags {
        Some(flags) if flags.create_namespaces => &["list", "watch", "create"],
        _ => &["list", "watch"],
    };
    let leases = within(on("coordination.k8s.io", "leases", &["get", "watch", "update"]), Some(LEASE));
    let reviews = [
        on("authentication.k8s.io", "tokenreviews", &["create"]),
        on("authorization.k8s.io", "subjectaccessreviews", &["create"]),
    ];
    let needed = |id, need, rights| RightsNeeded { id, need, rights };
    vec![
        needed(CheckId::RightsNamespaces, Need::Always, on("", "namespaces", namespaces)),
        needed(CheckId::RightsServices, Need::Always, on("", "services", EVERY_VERB)),
        needed(CheckId::RightsEndpointslices, Need::Always, on("discovery.k8s.io", "endpointslices", EVERY_VERB)),
        needed(CheckId::RightsServicecidrs, Need::Always, on("networking.k8s.io", "servicecidrs", &["list", "watch"])),
        needed(CheckId::RightsEvents, Need::Always, on("events.k8s.io", "events", &["create", "patch"])),
        needed(
            CheckId::RightsLeases,
            Need::Always,
            in_lease_namespace([leases, on("coordination.k8s.io", "leases", &["create"])].concat()),
        ),
        needed(CheckId::RightsEndpoints, flag(|flags| flags.endpoints_object), on("", "endpoints", EVERY_VERB)),
        needed(CheckId::RightsSecrets, flag(|flags| flags.own_ca), in_lease_namespace(on("", "secrets", EVERY_VERB))),
        needed(CheckId::RightsReviews, Need::Always, reviews.concat()),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_yaml_ng::Value;

    use super::*;

    /// `group/resource/name/verb` of every rule of a file of `deploy/kustomize`.
    fn of_manifest(file: &str) -> BTreeSet<String> {
        let path = format!("{}/deploy/kustomize/{file}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(path).expect("it is there");
        let words = |rule: &Value, key: &str| {
            let words = rule[key].as_sequence().cloned().unwrap_or_default();
            words.iter().map(|word| word.as_str().expect("text").to_owned()).collect::<Vec<_>>()
        };
        let mut found = BTreeSet::new();
        for document in serde_yaml_ng::Deserializer::from_str(&text) {
            let object = <Value as serde::Deserialize>::deserialize(document).expect("YAML");
            for rule in object["rules"].as_sequence().cloned().unwrap_or_default() {
                let mut names = words(&rule, "resourceNames");
                if names.is_empty() {
                    names.push(String::new());
                }
                for (group, resource) in words(&rule, "apiGroups").iter().zip(words(&rule, "resources")) {
                    for name in &names {
                        found.extend(
                            words(&rule, "verbs").iter().map(|verb| format!("{group}/{resource}/{name}/{verb}")),
                        );
                    }
                }
            }
        }
        found
    }

    #[test]
    fn rights_are_those_of_the_manifests() {
        let flags = KubernetesFlags { own_ca: true, endpoints_object: true, ..KubernetesFlags::default() };
        let needed = rights_needed(Some(&flags));
        // Those of reviews are in a role of Kubernetes' own.
        let rights = needed.iter().filter(|one| one.id != CheckId::RightsReviews).flat_map(|one| &one.rights);
        let rights: BTreeSet<String> = rights
            .map(|AccessRight { verb, group, resource, name, .. }| {
                format!("{group}/{resource}/{}/{verb}", name.unwrap_or_default())
            })
            .collect();
        let files = ["rbac.yaml", "rbac-own-ca.yaml", "endpoints-object/rbac.yaml"];
        let manifests: BTreeSet<String> = files.into_iter().flat_map(of_manifest).collect();
        assert_eq!(rights, manifests);
    }
}
