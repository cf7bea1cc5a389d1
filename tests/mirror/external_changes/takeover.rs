//! Services that are deleted, and recreated by somebody else.

use serde_json::{Value, json};

use super::{admin, content, create, edit, name, soon, uid};
use crate::{
    mirror::{MirrorHarness, addresses, object, service_path, slice_path, slices},
    support::{cluster::Cluster, wait_until},
};

/// A pod that is ready, on a node that exists, as far as controllers can see.
pub(super) fn ready_pod(cluster: &Cluster, namespace: &str, pod: &str, app: &str, ip: &str) {
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node-{namespace}")}});
    let node_name = name(&create(cluster, "/api/v1/nodes", &node)).to_owned();
    let pods = format!("/api/v1/namespaces/{namespace}/pods");
    let spec = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": pod, "labels": {"app": app}},
        "spec": {"nodeName": node_name, "containers": [{"name": "main", "image": "none.example/none"}]}});
    create(cluster, &pods, &spec);
    let status = json!({"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
        "conditions": [{"type": "Ready", "status": "True"}]});
    let path = format!("{pods}/{pod}/status");
    edit(cluster, &path, &|pod| pod["status"] = status.clone());
}

/// A Service that selects pods.
pub(super) fn native(name: &str, labels: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "labels": labels},
        "spec": {"clusterIP": "None", "selector": {"app": name},
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]}})
}

/// Something that the garbage collector removes with the Service: once it is gone, so is
/// everything else that the collector would take.
fn canary(cluster: &Cluster, namespace: &str, service: &Value) -> String {
    let path = format!("/api/v1/namespaces/{namespace}/configmaps");
    let canary = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "canary", "ownerReferences": [
        {"apiVersion": "v1", "kind": "Service", "name": name(service), "uid": uid(service)}]}});
    create(cluster, &path, &canary);
    format!("{path}/canary")
}

#[test]
fn deleted_service_is_recreated_with_its_slices() {
    let Some(harness) = MirrorHarness::with_controllers(&[]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("gone");
    for (address, port) in [("10.10.0.1", "http=8080"), ("10.10.0.2", "http=8081"), ("2001:db8::1", "http=8080")] {
        harness.mirrored("gone", "web", address, port);
    }
    let path = service_path("gone", "web");
    for policy in ["Background", "Foreground"] {
        let before = cluster.get_json(&path);
        let mut right = content(&slices(cluster, "gone", "web"));
        let canary = canary(cluster, "gone", &before);
        admin(
            cluster,
            "DELETE",
            &path,
            Some(&json!({"kind": "DeleteOptions", "apiVersion": "v1",
            "propagationPolicy": policy})),
        );
        let again = soon("the Service and its slices, for the new one", || {
            let again = object(cluster, &path).filter(|again| uid(again) != uid(&before))?;
            for slice in &mut right {
                slice["owners"][0]["uid"] = uid(&again).into();
            }
            right.sort_by_cached_key(Value::to_string);
            (content(&slices(cluster, "gone", "web")) == right).then_some(again)
        });
        wait_until("the collector is done", || object(cluster, &canary).is_none().then_some(()));
        soon("they stand after it", || (content(&slices(cluster, "gone", "web")) == right).then_some(()));
        assert_eq!(again["spec"]["ports"], before["spec"]["ports"]);
    }
}

#[test]
fn service_held_by_a_finalizer_is_served_until_it_is_gone() {
    let Some(harness) = MirrorHarness::with_controllers(&[]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("held");
    harness.mirrored("held", "web", "10.13.0.1", "http=8080");
    let path = service_path("held", "web");
    let held = edit(cluster, &path, &|service| service["metadata"]["finalizers"] = json!(["example.com/hold"]));
    admin(cluster, "DELETE", &path, None);
    for address in ["10.13.0.2", "10.13.0.3", "10.13.0.4"] {
        harness.mirrored("held", "web", address, "http=8080");
    }
    assert_eq!(harness.deregister("held", "web", "10.13.0.1").0, Some(0));
    let all = ["10.13.0.2", "10.13.0.3", "10.13.0.4"];
    assert_eq!(addresses(cluster, "held", "web"), all);
    edit(cluster, &path, &|service| service["metadata"]["finalizers"] = json!([]));
    soon("there is another, with the slices", || {
        let again = object(cluster, &path).filter(|again| uid(again) != uid(&held))?;
        let slices = slices(cluster, "held", "web");
        let owned = slices.iter().all(|slice| slice["metadata"]["ownerReferences"][0]["uid"] == uid(&again));
        (owned && addresses(cluster, "held", "web") == all).then_some(())
    });
}

#[test]
fn name_taken_over_by_a_foreign_service_is_released_until_free() {
    let Some(harness) = MirrorHarness::with_controllers(&[]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("taken");
    ready_pod(cluster, "taken", "web-0", "web", "10.11.9.9");
    harness.mirrored("taken", "web", "10.11.0.1", "http=8080");
    harness.mirrored("taken", "web", "10.11.0.2", "http=8081");
    let path = service_path("taken", "web");
    // Gangplank would have its own there again before the second request.
    harness.server.signal("STOP");
    admin(cluster, "DELETE", &path, None);
    let service = create(cluster, &service_path("taken", ""), &native("web", &json!({})));
    harness.server.signal("CONT");
    soon("our slices are gone, the pod's are there", || {
        (addresses(cluster, "taken", "web") == ["10.11.9.9"]).then_some(())
    });
    soon("registrations are refused", || harness.conflicts("taken", "web").then_some(()));
    let theirs = slices(cluster, "taken", "web");
    wait_until("an event says so", || {
        cluster.kubectl(&["describe", "service", "web", "-n", "taken"]).contains("ForeignService").then_some(())
    });
    assert!(harness.metric("gangplank_mirror_services_blocked{reason=\"foreign_service\"}") >= 1.0);
    assert_eq!(cluster.get_json(&path), service, "it is untouched");
    assert_eq!(slices(cluster, "taken", "web"), theirs);

    admin(cluster, "DELETE", &path, None);
    soon("ours stands again", || (addresses(cluster, "taken", "web") == ["10.11.0.1", "10.11.0.2"]).then_some(()));
    assert_eq!(cluster.get_json(&path)["metadata"]["labels"]["gangplank.dev/service"], "owned");
    harness.mirrored("taken", "web", "10.11.0.3", "http=8080");
}

#[test]
fn service_without_our_label_is_foreign() {
    let Some(harness) = MirrorHarness::with_controllers(&[]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("disowned");
    harness.mirrored("disowned", "web", "10.12.0.1", "http=8080");
    let path = service_path("disowned", "web");
    let disowned = edit(cluster, &path, &|service| {
        service["metadata"]["labels"].as_object_mut().expect("a map").remove("gangplank.dev/service");
    });
    soon("our slices are gone", || addresses(cluster, "disowned", "web").is_empty().then_some(()));
    soon("registrations are refused", || harness.conflicts("disowned", "web").then_some(()));
    assert_eq!(cluster.get_json(&path), disowned);
    edit(cluster, &path, &|service| service["metadata"]["labels"]["gangplank.dev/service"] = "owned".into());
    soon("they are back", || (addresses(cluster, "disowned", "web") == ["10.12.0.1"]).then_some(()));
    harness.mirrored("disowned", "web", "10.12.0.2", "http=8080");
    let first = &slices(cluster, "disowned", "web")[0];
    assert_eq!(
        cluster.get_json(&slice_path("disowned", name(first)))["metadata"]["ownerReferences"][0]["uid"],
        disowned["metadata"]["uid"]
    );
}

/// Somebody types gangplank's label on a Service with pods: it keeps its selector, and is not deleted.
#[test]
fn native_service_with_our_label_is_untouched() {
    let Some(mut harness) = MirrorHarness::with_controllers(&["--service-linger", "0s"]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("typed");
    ready_pod(cluster, "typed", "web-0", "web", "10.13.9.9");
    let labels = json!({"gangplank.dev/service": "owned"});
    let service = create(cluster, &service_path("typed", ""), &native("web", &labels));
    soon("registrations are refused", || harness.conflicts("typed", "web").then_some(()));
    soon("the pod's slice is there", || (addresses(cluster, "typed", "web") == ["10.13.9.9"]).then_some(()));
    // A process that has not seen it before reads it the same way, and a later registration comes after it.
    harness.restart_empty(&["--service-linger", "0s"]);
    soon("registrations are refused again", || harness.conflicts("typed", "web").then_some(()));
    harness.mirrored("typed", "other", "10.13.0.1", "http=8080");
    assert_eq!(cluster.get_json(&service_path("typed", "web")), service);
}
