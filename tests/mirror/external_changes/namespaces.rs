//! Namespaces that are deleted and recreated, and Services that are left without instances.

use std::time::{Duration, Instant};

use hickory_proto::rr::RecordType;
use serde_json::json;

use super::{MirrorHarness, admin, soon, uid};
use crate::{
    mirror::{addresses, object, service_path, slices, wait_for_addresses},
    support::{
        dns::{Over, answers},
        wait_until,
    },
};

#[test]
fn recreated_namespace_gets_its_services_and_slices_back() {
    let Some(harness) = MirrorHarness::with_controllers(&[]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("again");
    harness.mirrored("again", "web", "10.30.0.1", "http=8080");
    admin(cluster, "DELETE", "/api/v1/namespaces/again", None);
    soon("registrations are refused", || {
        let (code, said) = harness.register("again", "web", "10.30.0.2", "http=8080");
        if code == Some(0) {
            harness.deregister("again", "web", "10.30.0.2"); // it was too early
        }
        (code != Some(0) && said.contains("does not exist")).then_some(())
    });
    wait_until("it is gone", || object(cluster, "/api/v1/namespaces/again").is_none().then_some(()));
    let a = || answers(harness.server.dns, Over::Udp, "web.again.svc.cluster.local.", RecordType::A);
    assert_eq!(a(), ["10.30.0.1"], "DNS goes on");
    cluster.create_namespace("again");
    soon("everything is back", || (addresses(cluster, "again", "web") == ["10.30.0.1"]).then_some(()));
    let service = cluster.get_json(&service_path("again", "web"));
    assert_eq!(slices(cluster, "again", "web")[0]["metadata"]["ownerReferences"][0]["uid"], service["metadata"]["uid"]);
    soon("registrations go on", || {
        (harness.register("again", "web", "10.30.0.2", "http=8080").0 == Some(0)).then_some(())
    });
    wait_for_addresses(cluster, "again", "web", &["10.30.0.1", "10.30.0.2"]);
}

#[test]
fn namespaces_are_created_if_configured() {
    let Some(harness) = MirrorHarness::with_controllers(&["--create-namespaces"]) else { return };
    let cluster = harness.cluster;
    // Without the right that deploy/kustomize/rbac.yaml leaves out, it is accepted and not mirrored.
    let (code, said) = harness.register("made-here", "web", "10.31.0.1", "http=8080");
    assert!(code == Some(0) && said.contains("accepted, not in Kubernetes yet"), "{said}");
    wait_until("it is shown", || {
        (harness.metric("gangplank_mirror_services_blocked{reason=\"forbidden\"}") >= 1.0).then_some(())
    });
    cluster.apply(
        r#"{"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "make-namespaces"},
                "rules": [{"apiGroups": [""], "resources": ["namespaces"], "verbs": ["create"]}]},
            {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "make-namespaces"},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "make-namespaces"},
                "subjects": [{"kind": "ServiceAccount", "name": "gangplank", "namespace": "gangplank"}]}]}"#,
    );
    // A change of the service is a reason to try at once.
    wait_until("both are there", || {
        harness.register("made-here", "web", "10.31.0.2", "http=8080");
        harness.deregister("made-here", "web", "10.31.0.2");
        (addresses(cluster, "made-here", "web").contains(&"10.31.0.1".to_owned())).then_some(())
    });
    let namespace = cluster.get_json("/api/v1/namespaces/made-here");
    assert_eq!(namespace["metadata"]["labels"]["gangplank.dev/service"], "owned");
    harness.mirrored("made-here-too", "web", "10.31.0.3", "http=8080");
    assert_eq!(addresses(cluster, "made-here-too", "web"), ["10.31.0.3"]);

    // Deleted by somebody else, it is created again once it is gone.
    let before = cluster.get_json("/api/v1/namespaces/made-here-too");
    admin(cluster, "DELETE", "/api/v1/namespaces/made-here-too", None);
    wait_until("it stands again", || {
        object(cluster, "/api/v1/namespaces/made-here-too").filter(|again| uid(again) != uid(&before))
    });
    soon("with everything in it", || (addresses(cluster, "made-here-too", "web") == ["10.31.0.3"]).then_some(()));
    cluster.kubectl(&["delete", "clusterrolebinding", "make-namespaces"]);
}

#[test]
fn empty_service_is_deleted_after_the_linger_time() {
    const LINGER: Duration = Duration::from_secs(3);
    let Some(harness) = MirrorHarness::with_controllers(&["--service-linger", "3s"]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("linger");
    let path = service_path("linger", "web");
    harness.mirrored("linger", "web", "10.32.0.1", "http=8080");
    let before = cluster.get_json(&path);
    assert_eq!(harness.deregister("linger", "web", "10.32.0.1").0, Some(0));
    assert_eq!(slices(cluster, "linger", "web"), [json!(null); 0], "the slices go at once");
    harness.mirrored("linger", "web", "10.32.0.2", "http=8080");
    let again = cluster.get_json(&path);
    assert_eq!(uid(&again), uid(&before), "it is the same Service");

    let begun = Instant::now();
    assert_eq!(harness.deregister("linger", "web", "10.32.0.2").0, Some(0));
    assert_eq!(slices(cluster, "linger", "web"), [json!(null); 0]);
    wait_until("the Service goes after the linger", || object(cluster, &path).is_none().then_some(()));
    assert!(begun.elapsed() >= LINGER, "after {:?}", begun.elapsed());
}
