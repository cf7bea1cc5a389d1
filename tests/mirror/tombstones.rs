//! No old outbox, late request or lost directory brings back what was removed.

use gangplank::grpc::proto::registry::RegistrationType;
use hickory_proto::rr::RecordType;
use serde_json::Value;

use super::{
    ClusterLock, MirrorHarness, addresses, dns_name, every_slice, make_namespace, object, replica::Replica, resolve,
    serve_by, service_path, slice_path, slices, wait_for_addresses,
};
use crate::support::{
    cluster::{Cluster, Who},
    dns::{Over, answers},
    proxy::{Fault, Proxy},
    stream::{Stream, message},
    wait_until,
};

/// The removals that a service's slice remembers.
fn tombstones(cluster: &Cluster, namespace: &str, service: &str) -> Value {
    let all = every_slice(cluster, namespace, service);
    let texts: Vec<&str> =
        all.iter().filter_map(|slice| slice["metadata"]["annotations"]["gangplank.dev/tombstones"].as_str()).collect();
    assert!(texts.len() <= 1, "one slice of tombstones: {texts:?}");
    texts.first().map_or(Value::Null, |text| serde_json::from_str(text).expect("JSON"))
}

fn new_directory() -> tempfile::TempDir {
    tempfile::TempDir::new().expect("a temporary directory can be made")
}

/// The first process accepts registrations while it cannot reach the API server, and sleeps. The second removes the same
/// instances and is killed with its directory. A third knows only what the slices say.
#[test]
fn outbox_that_slept_brings_back_nothing_that_another_directory_removed() {
    let Some(lock) = ClusterLock::take() else { return };
    let cluster = lock.cluster;
    let proxy = Proxy::start(cluster);
    let direct = cluster.kubeconfig_for_gangplank();
    let first = Replica::start(proxy.kubeconfig(), new_directory());
    first.wait_until_it_writes();
    let mut stream = Stream::open(first.grpc);
    make_namespace(cluster, &mut stream, "outbox-slept");
    let away = proxy.inject(Fault::Drop, |_| true);
    for address in ["10.14.0.1", "10.14.0.2", "10.14.0.3"] {
        assert_eq!(stream.register("outbox-slept", "web", address).0, 202, "Kubernetes does not have it");
    }
    drop(stream);
    let slept = first.kill();

    // .1 is removed; .2 too, and registered again with another priority by nobody else; of .3 nobody else ever heard.
    let second = Replica::start(&direct, new_directory());
    second.wait_until_it_writes();
    let mut stream = Stream::open(second.grpc);
    for address in ["10.14.0.1", "10.14.0.2"] {
        wait_until("it is mirrored", || (stream.register("outbox-slept", "web", address).0 != 404).then_some(()));
        assert_eq!(stream.remove("outbox-slept", "web", address).0, 204);
    }
    assert_eq!(stream.register("outbox-slept", "web", "10.14.0.2").0, 201);
    let remembered = tombstones(cluster, "outbox-slept", "web");
    assert!(remembered["10.14.0.1:8080"].is_array() && remembered["10.14.0.2:8080"].is_array(), "{remembered}");
    drop(stream);
    // With its directory.
    drop(second.kill());
    let third = Replica::start(&direct, new_directory());
    third.wait_until_it_writes();
    // That of .2 is not needed beside its later registration.
    assert_eq!(tombstones(cluster, "outbox-slept", "web")["10.14.0.1:8080"], remembered["10.14.0.1:8080"]);
    let registered = every_slice(cluster, "outbox-slept", "web");
    drop(third.terminate());

    away.lift();
    let first = Replica::start(proxy.kubeconfig(), slept);
    first.wait_until_it_writes();
    wait_for_addresses(cluster, "outbox-slept", "web", &["10.14.0.2", "10.14.0.3"]);
    let name = dns_name("outbox-slept", "web");
    assert_eq!(answers(first.dns, Over::Udp, &name, RecordType::A), ["10.14.0.2", "10.14.0.3"]);
    // The later registration of .2 counts, not the one that slept.
    let stamp = |slices: &[Value]| -> Value {
        let texts = slices.iter().filter_map(|one| one["metadata"]["annotations"]["gangplank.dev/instances"].as_str());
        let mut found = texts.filter_map(|text| {
            serde_json::from_str::<Value>(text).expect("JSON").get("10.14.0.2").map(|entry| entry["stamp"].clone())
        });
        found.next().expect("it has a stamp")
    };
    assert_eq!(stamp(&every_slice(cluster, "outbox-slept", "web")), stamp(&registered));
    assert_eq!(Stream::open(first.grpc).remove("outbox-slept", "web", "10.14.0.1").0, 404);
    drop(first.terminate());
}

/// UNREGISTER without ports: whatever is registered at the address.
fn remove_all_at(stream: &mut Stream, namespace: &str, service: &str, address: &str) -> u32 {
    let mut all = message(RegistrationType::Unregister, namespace, service, address);
    all.ports.clear();
    stream.exchange(vec![all]).0[0]
}

/// A 404 is a removal that counts: what another process accepted before it, and Kubernetes never had, does not come back.
#[test]
fn removal_of_what_is_not_registered_outranks_an_outbox_that_slept() {
    let Some(lock) = ClusterLock::take() else { return };
    let cluster = lock.cluster;
    let proxy = Proxy::start(cluster);
    let first = Replica::start(proxy.kubeconfig(), new_directory());
    first.wait_until_it_writes();
    let mut stream = Stream::open(first.grpc);
    make_namespace(cluster, &mut stream, "absent-removed");
    let away = proxy.inject(Fault::Drop, |_| true);
    for address in ["10.18.0.1", "10.18.0.2", "10.18.0.3"] {
        assert_eq!(stream.register("absent-removed", "web", address).0, 202, "Kubernetes does not have it");
    }
    drop(stream);
    let slept = first.kill();

    let second = Proxy::start(cluster);
    let writer = Replica::start(second.kubeconfig(), new_directory());
    writer.wait_until_it_writes();
    let mut stream = Stream::open(writer.grpc);
    wait_until("the namespace is known", || {
        assert_eq!(stream.remove("absent-removed", "web", "10.18.0.1").0, 404);
        (!tombstones(cluster, "absent-removed", "web").is_null()).then_some(())
    });
    second.forget_calls();
    assert_eq!(remove_all_at(&mut stream, "absent-removed", "web", "10.18.0.2"), 404);
    let remembered = tombstones(cluster, "absent-removed", "web");
    assert!(remembered["10.18.0.1:8080"].is_array() && remembered["10.18.0.2:*"].is_array(), "{remembered}");
    assert_eq!(second.count(|call| call.namespace == "absent-removed" && call.is_write()), 1);
    // As any word it is 202 when Kubernetes does not have it within a second.
    let hangs = second.inject(Fault::Hang, |call| call.is("update", "endpointslices"));
    assert_eq!(stream.remove("absent-removed", "web", "10.18.0.9").0, 202);
    hangs.lift();
    wait_until("it follows", || {
        tombstones(cluster, "absent-removed", "web")["10.18.0.9:8080"].is_array().then_some(())
    });
    drop(stream);
    // With its directory.
    drop(writer.kill());

    away.lift();
    let first = Replica::start(proxy.kubeconfig(), slept);
    first.wait_until_it_writes();
    wait_for_addresses(cluster, "absent-removed", "web", &["10.18.0.3"]);
    assert_eq!(answers(first.dns, Over::Udp, &dns_name("absent-removed", "web"), RecordType::A), ["10.18.0.3"]);
    // Removed and registered again with all of its address remembered.
    let mut stream = Stream::open(first.grpc);
    assert_eq!(remove_all_at(&mut stream, "absent-removed", "web", "10.18.0.3"), 204);
    assert_eq!(stream.register("absent-removed", "web", "10.18.0.3").0, 201);
    let data = first.kill();
    let first = Replica::start(proxy.kubeconfig(), data);
    first.wait_until_it_writes();
    assert_eq!(answers(first.dns, Over::Udp, &dns_name("absent-removed", "web"), RecordType::A), ["10.18.0.3"]);
    drop(first.terminate());
}

#[test]
fn removal_that_nobody_could_have_registered_leaves_nothing() {
    let Some((harness, proxy)) = MirrorHarness::behind_a_proxy() else { return };
    let cluster = harness.cluster;
    let mut stream = Stream::open(harness.server.grpc);
    make_namespace(cluster, &mut stream, "leaves-nothing");
    cluster.kubectl(&["create", "service", "clusterip", "theirs", "--tcp=80", "-n", "leaves-nothing"]);
    wait_until("it is known to be of others", || {
        (stream.register("leaves-nothing", "theirs", "10.19.0.1").0 == 409).then_some(())
    });
    // What was accepted before that was known may be remembered.
    let before = harness.metric("gangplank_registry_tombstones");
    proxy.forget_calls();
    assert_eq!(stream.remove("leaves-nothing", "theirs", "10.19.0.2").0, 404);
    assert_eq!(stream.remove("nowhere", "web", "10.19.0.2").0, 404);
    assert_eq!(remove_all_at(&mut stream, "kube-system", "web", "10.19.0.2"), 404);
    assert_eq!(harness.metric("gangplank_registry_tombstones"), before);
    assert_eq!(proxy.count(|call| call.is_write() && call.resource == "endpointslices"), 0);
    assert_eq!(every_slice(cluster, "leaves-nothing", "theirs"), Vec::<Value>::new());
}

/// A request to create a slice that is carried out after its instance was removed, when nobody is there to see it.
#[test]
fn late_creation_of_a_slice_brings_back_nothing() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let flags = ["--service-linger", "0s", "--drain", "1s"];
    let mut harness = MirrorHarness { server: serve_by(&kubeconfig, &flags), cluster: lock.cluster, _lock: lock };
    let cluster = harness.cluster;
    harness.create_namespace("late-slice");
    assert_eq!(harness.register("late-slice", "web", "10.15.0.1", "http=80").0, Some(0));
    let [slice] = &slices(cluster, "late-slice", "web")[..] else { panic!("one slice") };
    let mut late = slice.clone();
    assert_eq!(harness.deregister("late-slice", "web", "10.15.0.1").0, Some(0));
    wait_until("the Service is gone, and the slice of the instance", || {
        let gone = object(cluster, &service_path("late-slice", "web")).is_none();
        (gone && slices(cluster, "late-slice", "web").is_empty()).then_some(())
    });
    assert_eq!(resolve(&harness.server, "late-slice", "web"), Vec::<String>::new());
    let remembered = tombstones(cluster, "late-slice", "web");
    assert!(remembered["10.15.0.1:*"].is_array(), "{remembered}: it needs no Service");
    // As docs/kubernetes.md says of what remains.
    let bytes: usize = every_slice(cluster, "late-slice", "web").iter().map(|slice| slice.to_string().len()).sum();
    assert!(bytes < 2048, "{bytes}");
    // The other tests on the cluster leave some too.
    assert!(harness.metric("gangplank_registry_tombstones") >= 1.0);

    assert!(harness.server.terminate().success());
    for field in ["uid", "resourceVersion", "creationTimestamp", "generation", "managedFields", "ownerReferences"] {
        late["metadata"].as_object_mut().expect("an object").remove(field);
    }
    let (status, said) =
        cluster.request(Who::Admin, "POST", &slice_path("late-slice", ""), Some(&late)).expect("the API server runs");
    assert_eq!(status, 201, "{said}");
    // Neither the directory that removed it nor an empty one takes it for registered.
    for empty in [true, false] {
        if empty {
            harness.restart_empty(&flags);
        } else {
            harness.server.kill9();
            harness.server = serve_by(&kubeconfig, &flags);
        }
        wait_for_addresses(cluster, "late-slice", "web", &[]);
        assert_eq!(resolve(&harness.server, "late-slice", "web"), Vec::<String>::new());
        assert_eq!(tombstones(cluster, "late-slice", "web"), remembered);
    }
}

#[test]
fn edited_or_deleted_slice_of_tombstones_is_repaired() {
    let Some(harness) = MirrorHarness::start(&["--service-linger", "0s"]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("tombstones-edited");
    assert_eq!(harness.register("tombstones-edited", "web", "10.16.0.1", "http=80").0, Some(0));
    assert_eq!(harness.deregister("tombstones-edited", "web", "10.16.0.1").0, Some(0));
    let remembered = tombstones(cluster, "tombstones-edited", "web");
    assert!(remembered["10.16.0.1:*"].is_array(), "{remembered}");
    let name = || {
        wait_until("there is one slice", || match &every_slice(cluster, "tombstones-edited", "web")[..] {
            [slice] => Some(slice["metadata"]["name"].as_str().expect("a name").to_owned()),
            _ => None,
        })
    };
    let path = slice_path("tombstones-edited", &name());
    let slice = format!("endpointslice/{}", name());
    cluster.kubectl(&["annotate", &slice, "-n", "tombstones-edited", "--overwrite", "gangplank.dev/tombstones={}"]);
    let is_back = || (tombstones(cluster, "tombstones-edited", "web") == remembered).then_some(());
    wait_until("the edit is overwritten", is_back);
    let (status, said) = cluster.request(Who::Admin, "DELETE", &path, None).expect("the API server runs");
    assert_eq!(status, 200, "{said}");
    wait_until("it is created again", is_back);
    assert_eq!(addresses(cluster, "tombstones-edited", "web"), Vec::<String>::new());
}

/// Deletes a namespace and the slices of web in it, as the namespace controller does, which this control plane lacks.
pub(super) fn delete_namespace(cluster: &Cluster, name: &str) {
    cluster.kubectl(&["delete", "namespace", name, "--wait=false"]);
    for slice in every_slice(cluster, name, "web") {
        let path = slice_path(name, slice["metadata"]["name"].as_str().expect("a name"));
        assert_eq!(cluster.request(Who::Admin, "DELETE", &path, None).expect("the API server runs").0, 200);
    }
    let path = format!("/api/v1/namespaces/{name}");
    let mut namespace = object(cluster, &path).expect("it waits for its finalizer");
    namespace["spec"]["finalizers"] = Value::Array(Vec::new());
    let (status, said) =
        cluster.request(Who::Admin, "PUT", &format!("{path}/finalize"), Some(&namespace)).expect("the API server runs");
    assert_eq!(status, 200, "{said}");
    wait_until("it is gone", || object(cluster, &path).is_none().then_some(()));
}

/// Everything in a namespace is deleted with it, a slice of tombstones too.
#[test]
fn tombstones_are_written_again_when_their_namespace_is_back() {
    let Some(harness) = MirrorHarness::start(&["--service-linger", "0s"]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("tombstones-back");
    assert_eq!(harness.register("tombstones-back", "web", "10.16.1.1", "http=80").0, Some(0));
    assert_eq!(harness.deregister("tombstones-back", "web", "10.16.1.1").0, Some(0));
    let remembered = tombstones(cluster, "tombstones-back", "web");
    assert!(remembered["10.16.1.1:*"].is_array(), "{remembered}");

    delete_namespace(cluster, "tombstones-back");
    harness.create_namespace("tombstones-back");
    wait_until("the slice is back", || (tombstones(cluster, "tombstones-back", "web") == remembered).then_some(()));
}
