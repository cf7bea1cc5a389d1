//! The cache as the watches and the mirror use it.

use futures::FutureExt;
use k8s_openapi::{
    Metadata,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use serde_json::json;

use super::*;
use crate::{
    kubernetes::objects::names,
    model::{self, ServiceName},
};

fn key(namespace: &str, name: &str) -> ServiceKey {
    let namespace = model::Namespace::parse(namespace).expect("valid");
    ServiceKey::new(namespace, ServiceName::parse(name).expect("valid"))
}

fn namespace(name: &str, version: u64) -> Namespace {
    let meta =
        json!({ "metadata": { "name": name, "uid": format!("uid-{name}"), "resourceVersion": version.to_string() } });
    serde_json::from_value(meta).expect("a Namespace")
}

fn deleting<T: Metadata<Ty = ObjectMeta>>(mut object: T) -> T {
    object.metadata_mut().deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    object
}

fn service(name: &str, label: Option<&str>, version: u64) -> Service {
    let service = json!({ "metadata": {
        "namespace": "prod", "name": name, "uid": format!("uid-{name}"), "resourceVersion": version.to_string(),
        "labels": label.map(|value| json!({ names::SERVICE: value, names::SERVICE_TYPE: names::EXTERNAL })),
        "managedFields": [{ "manager": "someone" }],
    }, "spec": { "clusterIP": "None" } });
    serde_json::from_value(service).expect("a Service")
}

fn slice(service: &str, name: &str, uid: &str, version: u64, address: &str) -> EndpointSlice {
    let slice = json!({
        "metadata": {
            "namespace": "prod", "name": name, "uid": uid, "resourceVersion": version.to_string(),
            "labels": { names::MANAGED_BY: names::MANAGER, names::SERVICE_NAME: service },
        },
        "addressType": "IPv4", "endpoints": [{ "addresses": [address] }],
    });
    serde_json::from_value(slice).expect("an EndpointSlice")
}

fn events(event: ObjectEvent<EndpointSlice>) -> Vec<ObjectEvent<CachedSlice>> {
    vec![event.filter_map(CachedSlice::read).expect("it has a name")]
}

/// What the mirror would receive now.
fn changes(cluster: &ClusterCache) -> Vec<ChangedKey> {
    cluster.changed().now_or_never().unwrap_or_default()
}

fn web() -> Vec<ChangedKey> {
    vec![ChangedKey::Service(key("prod", "web"))]
}

fn addresses(cluster: &ClusterCache) -> Vec<String> {
    let slices = cluster.observe(&key("prod", "web")).slices;
    slices.iter().flat_map(|slice| &slice.addresses).map(ToString::to_string).collect()
}

/// Facts as text.
fn said(facts: &[ClusterFact]) -> Vec<String> {
    let one = |fact: &ClusterFact| match fact {
        ClusterFact::Namespace { name, exists } => format!("{name} {exists}"),
        ClusterFact::Quota { namespace, quota } => format!("{namespace} quota {quota:?}"),
        ClusterFact::Addresses { namespace, addresses } => format!("{namespace} addresses {addresses:?}"),
        ClusterFact::ServiceRanges(ranges) => format!("{ranges:?}"),
        ClusterFact::NamespacesComplete => "complete".into(),
        ClusterFact::Service { service, foreign } => format!("{service} foreign {foreign}"),
        ClusterFact::Endpoints { .. } => "endpoints".into(),
    };
    facts.iter().map(one).collect()
}

#[test]
fn late_event_does_not_undo_our_write() {
    let cluster = ClusterCache::new();
    cluster.slice_written(&slice("web", "web-1", "a", 20, "10.0.0.2"));
    assert_eq!(addresses(&cluster), ["10.0.0.2"]);
    cluster.apply_slices(events(ObjectEvent::Apply(slice("web", "web-1", "a", 18, "10.0.0.1"))));
    assert_eq!(addresses(&cluster), ["10.0.0.2"]);
    cluster.apply_slices(events(ObjectEvent::Apply(slice("web", "web-1", "a", 20, "10.0.0.2"))));
    assert_eq!(changes(&cluster), [], "our own write is no change");

    cluster.apply_slices(events(ObjectEvent::Apply(slice("web", "web-1", "a", 21, "10.0.0.3"))));
    assert_eq!((addresses(&cluster), changes(&cluster)), (vec!["10.0.0.3".into()], web()));
    cluster.slice_written(&slice("web", "web-1", "a", 19, "10.0.0.9"));
    assert_eq!(addresses(&cluster), ["10.0.0.3"], "a late answer");

    cluster.slice_deleted("prod", "web-1", "a");
    cluster.apply_slices(events(ObjectEvent::Apply(slice("web", "web-1", "a", 21, "10.0.0.3"))));
    cluster.apply_slices(events(ObjectEvent::Delete(slice("web", "web-1", "a", 22, "10.0.0.3"))));
    assert_eq!((addresses(&cluster), changes(&cluster)), (vec![], vec![]));
}

#[test]
fn slice_that_changes_its_service_changes_both() {
    let cluster = ClusterCache::new();
    cluster.apply_slices(events(ObjectEvent::Apply(slice("web", "web-1", "a", 1, "10.0.0.1"))));
    cluster.apply_slices(events(ObjectEvent::Apply(slice("web", "web-2", "b", 2, "10.0.0.2"))));
    assert_eq!(changes(&cluster), web(), "several changes are one key");
    assert_eq!(cluster.managed_services(), [key("prod", "web")]);
    cluster.apply_slices(events(ObjectEvent::Apply(slice("db", "web-2", "b", 3, "10.0.0.2"))));
    assert_eq!(changes(&cluster), [ChangedKey::Service(key("prod", "db")), web().remove(0)]);
    assert_eq!(addresses(&cluster), ["10.0.0.1"]);
    assert_eq!(cluster.managed_services(), [key("prod", "db"), key("prod", "web")]);
    // Another writer removed the label with the Service's name.
    let mut nobodys = slice("db", "web-2", "b", 4, "10.0.0.2");
    nobodys.metadata.labels.as_mut().expect("it has labels").remove(names::SERVICE_NAME);
    cluster.apply_slices(events(ObjectEvent::Apply(nobodys)));
    assert_eq!(changes(&cluster), [ChangedKey::Service(key("prod", "db"))]);
    cluster.apply_slices(events(ObjectEvent::Delete(slice("web", "web-1", "a", 5, "10.0.0.1"))));
    assert_eq!((changes(&cluster), cluster.managed_services()), (web(), vec![]));
}

#[test]
fn list_removes_what_it_does_not_name() {
    let cluster = ClusterCache::new();
    assert!(!cluster.observe(&key("prod", "web")).listed);
    cluster.apply_slices(events(ObjectEvent::Apply(slice("web", "web-1", "a", 1, "10.0.0.1"))));
    cluster.apply_slices(events(ObjectEvent::Apply(slice("web", "web-2", "b", 2, "10.0.0.2"))));
    cluster.mark_occupied(&key("prod", "web"), "web-3");
    assert_eq!(cluster.observe(&key("prod", "web")).occupied, HashSet::from(["web-3".into()]));
    changes(&cluster);
    cluster.apply_slices(events(ObjectEvent::Init));
    cluster.apply_slices(events(ObjectEvent::InitApply(slice("web", "web-2", "b", 2, "10.0.0.2"))));
    cluster.slice_written(&slice("web", "web-4", "d", 9, "10.0.0.4"));
    assert_eq!(changes(&cluster), [], "half a list changes nothing");
    cluster.apply_slices(events(ObjectEvent::InitDone("8".into())));
    assert_eq!((addresses(&cluster), changes(&cluster)), (vec!["10.0.0.2".into(), "10.0.0.4".into()], web()));
    let observed = cluster.observe(&key("prod", "web"));
    assert_eq!((observed.listed, observed.occupied), (true, HashSet::new()));
}

#[test]
fn service_is_ours_joined_foreign_or_absent() {
    let cluster = ClusterCache::new();
    let state = || cluster.observe(&key("prod", "web")).service;
    let joined = || cluster.joined().borrow().iter().cloned().collect::<Vec<_>>();
    assert_eq!(state(), ServiceState::Unknown);
    let first =
        vec![ObjectEvent::Init, ObjectEvent::InitApply(service("Web", None, 1)), ObjectEvent::InitDone("1".into())];
    assert_eq!(said(&cluster.apply_services(first)), [""; 0], "an invalid name for a service of ours");
    assert_eq!(state(), ServiceState::Absent);

    cluster.service_written(&service("web", Some("owned"), 2));
    let ServiceState::Ours(held) = state() else { panic!("{:?}", state()) };
    assert_eq!(held.metadata.managed_fields, None);
    let mut touched = service("web", Some("owned"), 3);
    touched.metadata.managed_fields = None;
    assert_eq!(said(&cluster.apply_services(vec![ObjectEvent::Apply(touched)])), [""; 0]);
    assert_eq!(changes(&cluster), [], "only managedFields changed");
    assert_eq!(cluster.managed_services(), [key("prod", "web")]);

    let see = |seen| (said(&cluster.apply_services(vec![seen])), changes(&cluster));
    assert_eq!(see(ObjectEvent::Apply(service("web", None, 4))), (vec!["prod/web foreign true".into()], web()));
    assert_eq!(state(), ServiceState::Foreign);
    let joins = ObjectEvent::Apply(service("web", Some("joined"), 5));
    assert_eq!(see(joins), (vec!["prod/web foreign false".into()], web()));
    assert_eq!((state(), joined()), (ServiceState::Joined { uid: "uid-web".into() }, vec![key("prod", "web")]));
    assert_eq!(cluster.managed_services(), []);
    let leaves = ObjectEvent::Apply(service("web", Some("no"), 6));
    assert_eq!(see(leaves), (vec!["prod/web foreign true".into()], web()));
    assert_eq!(joined(), []);
    assert_eq!(see(ObjectEvent::Delete(service("web", None, 7))), (vec!["prod/web foreign false".into()], web()));
    assert_eq!(state(), ServiceState::Absent);
    assert_eq!(see(ObjectEvent::Apply(service("web", Some("joined"), 6))), (vec![], vec![]), "late");

    cluster.service_written(&service("db", Some("owned"), 10));
    cluster.service_deleted(&key("prod", "db"), "uid-db");
    assert_eq!(see(ObjectEvent::Apply(service("db", Some("owned"), 10))), (vec![], vec![]), "late");
    assert_eq!(cluster.observe(&key("prod", "db")).service, ServiceState::Absent);
}

#[test]
fn only_the_watch_changes_the_owner() {
    let cluster = ClusterCache::new();
    let see = |seen| (said(&cluster.apply_services(vec![seen])), changes(&cluster));
    // Our POST met an existing Service, and it was read before the watch reported it.
    cluster.service_written(&service("web", None, 3));
    cluster.service_written(&service("web", Some("joined"), 4));
    assert_eq!(see(ObjectEvent::Apply(service("web", None, 3))), (vec!["prod/web foreign true".into()], web()));
    cluster.service_written(&service("web", Some("owned"), 5));
    cluster.service_deleted(&key("prod", "web"), "uid-web");
    assert_eq!(cluster.observe(&key("prod", "web")).service, ServiceState::Foreign);
    let ours = ObjectEvent::Apply(service("web", Some("owned"), 5));
    assert_eq!(see(ours), (vec!["prod/web foreign false".into()], web()));
}

#[test]
fn terminating_namespace_is_reported_as_absent() {
    let cluster = ClusterCache::new();
    let state = || cluster.observe(&key("prod", "web")).namespace;
    assert_eq!(state(), NamespaceState::Unknown);
    let see = |seen| said(&cluster.apply_namespaces(seen));
    let page = vec![
        ObjectEvent::Init,
        ObjectEvent::InitApply(namespace("prod", 1)),
        ObjectEvent::InitApply(namespace("stage", 2)),
    ];
    assert_eq!(see(page), ["prod true", "stage true"]);
    assert_eq!(state(), NamespaceState::Active);
    assert_eq!(
        see(vec![ObjectEvent::InitApply(deleting(namespace("old", 3))), ObjectEvent::InitDone("3".into())]),
        ["complete"]
    );
    cluster.apply_slices(events(ObjectEvent::Apply(slice("web", "web-1", "a", 1, "10.0.0.1"))));
    changes(&cluster);

    assert_eq!(see(vec![ObjectEvent::Apply(deleting(namespace("prod", 4)))]), ["prod false"]);
    assert_eq!(state(), NamespaceState::Terminating);
    assert_eq!(changes(&cluster), [ChangedKey::Namespace("prod".into()), web().remove(0)]);
    assert_eq!(see(vec![ObjectEvent::Delete(deleting(namespace("prod", 5)))]), [""; 0], "known already");
    assert_eq!(state(), NamespaceState::Absent);
    assert_eq!(see(vec![ObjectEvent::Init, ObjectEvent::InitDone("9".into())]), ["stage false"]);
}

#[tokio::test]
async fn waiter_is_woken_and_cancel_safe() {
    let cluster = Arc::new(ClusterCache::new());
    let mut waits = Box::pin(cluster.changed());
    assert_eq!(waits.as_mut().now_or_never(), None);
    cluster.apply_slices(events(ObjectEvent::Apply(slice("web", "web-1", "a", 1, "10.0.0.1"))));
    drop(waits);
    assert_eq!(cluster.changed().await, web());
    let tell = async { cluster.apply_slices(events(ObjectEvent::Delete(slice("web", "web-1", "a", 2, "10.0.0.1")))) };
    assert_eq!(futures::join!(cluster.changed(), tell).0, web());
}
