//! The older Endpoints object.

use serde_json::json;

use super::{MirrorHarness, admin, create, edit, soon, uid};
use crate::{
    mirror::{addresses, object, service_path, slices},
    support::wait_until,
};

#[test]
fn endpoints_object_follows_without_a_second_slice() {
    let Some(harness) = MirrorHarness::with_controllers(&["--endpoints-object", "--service-linger", "0s"]) else {
        return;
    };
    let cluster = harness.cluster;
    harness.create_namespace("endpoints");
    let path = "/api/v1/namespaces/endpoints/endpoints/web";
    harness.mirrored("endpoints", "web", "10.40.0.1", "http=8080");
    let standing = soon("there is an Endpoints object", || object(cluster, path));
    assert_eq!(standing["metadata"]["labels"]["endpointslice.kubernetes.io/skip-mirror"], "true");
    assert_eq!(standing["subsets"][0]["addresses"], json!([{"ip": "10.40.0.1"}]));

    // The mirroring controller has seen ours once it has made a slice of a later one.
    let labels = json!({});
    let other = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "other", "labels": labels},
        "spec": {"clusterIP": "None"}});
    create(cluster, &service_path("endpoints", ""), &other);
    let by_hand = json!({"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "other"},
        "subsets": [{"addresses": [{"ip": "10.40.9.9"}], "ports": [{"port": 80}]}]});
    create(cluster, "/api/v1/namespaces/endpoints/endpoints", &by_hand);
    wait_until("the controller mirrors", || (addresses(cluster, "endpoints", "other") == ["10.40.9.9"]).then_some(()));
    assert_eq!(addresses(cluster, "endpoints", "web"), ["10.40.0.1"], "one slice, no twin");
    assert_eq!(slices(cluster, "endpoints", "web").len(), 1);

    // It is amended, and what others wrote on it stays.
    edit(cluster, path, &|endpoints| endpoints["metadata"]["annotations"]["example.com/note"] = "a".into());
    harness.mirrored("endpoints", "web", "10.40.0.2", "http=8080");
    // 201 says that the slice has it; the Endpoints object follows.
    let both = json!([{"ip": "10.40.0.1"}, {"ip": "10.40.0.2"}]);
    let amended = soon("the Endpoints object has both", || {
        let endpoints = cluster.get_json(path);
        (endpoints["subsets"][0]["addresses"] == both).then_some(endpoints)
    });
    assert_eq!(amended["metadata"]["annotations"]["example.com/note"], "a");
    assert_eq!(uid(&amended), uid(&standing));

    for address in ["10.40.0.1", "10.40.0.2"] {
        assert_eq!(harness.deregister("endpoints", "web", address).0, Some(0));
    }
    wait_until("it goes with the Service", || object(cluster, path).is_none().then_some(()));
    assert_eq!(object(cluster, &service_path("endpoints", "web")), None);
    // Somebody else's is left alone.
    assert_eq!(
        cluster.get_json("/api/v1/namespaces/endpoints/endpoints/other")["subsets"][0]["addresses"][0]["ip"],
        "10.40.9.9"
    );
}

#[test]
fn endpoints_object_is_deleted_when_its_service_is_taken_over() {
    let Some(harness) = MirrorHarness::with_controllers(&["--endpoints-object"]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("endpoints-left");
    harness.mirrored("endpoints-left", "web", "10.41.0.1", "http=8080");
    let path = "/api/v1/namespaces/endpoints-left/endpoints/web";
    assert!(object(cluster, path).is_some());
    edit(cluster, &service_path("endpoints-left", "web"), &|service| service["metadata"]["labels"] = json!({}));
    soon("it is withdrawn with the slices", || object(cluster, path).is_none().then_some(()));
    assert!(addresses(cluster, "endpoints-left", "web").is_empty());
    admin(cluster, "DELETE", &service_path("endpoints-left", "web"), None);
    let both = || object(cluster, path).is_some() && addresses(cluster, "endpoints-left", "web") == ["10.41.0.1"];
    soon("both come back", || both().then_some(()));

    // Only joined, it keeps the slices; the Endpoints object is the owner's.
    edit(cluster, &service_path("endpoints-left", "web"), &|service| {
        service["metadata"]["labels"] = json!({"gangplank.dev/service": "joined"});
    });
    soon("it is withdrawn alone", || object(cluster, path).is_none().then_some(()));
    assert_eq!(addresses(cluster, "endpoints-left", "web"), ["10.41.0.1"]);

    // One without instances, whose Service only lingers.
    harness.mirrored("endpoints-left", "idle", "10.41.0.2", "http=8080");
    assert_eq!(harness.deregister("endpoints-left", "idle", "10.41.0.2").0, Some(0));
    let path = "/api/v1/namespaces/endpoints-left/endpoints/idle";
    soon("it stands empty", || (object(cluster, path)?["subsets"] == json!(null)).then_some(()));
    edit(cluster, &service_path("endpoints-left", "idle"), &|service| service["metadata"]["labels"] = json!({}));
    soon("it goes too", || object(cluster, path).is_none().then_some(()));
}

#[test]
fn edited_or_deleted_endpoints_object_is_repaired() {
    let Some(harness) = MirrorHarness::with_controllers(&["--endpoints-object"]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("endpoints-edited");
    harness.mirrored("endpoints-edited", "web", "10.42.0.1", "http=8080");
    let path = "/api/v1/namespaces/endpoints-edited/endpoints/web";
    let ours =
        || object(cluster, path).is_some_and(|one| one["subsets"][0]["addresses"] == json!([{"ip": "10.42.0.1"}]));
    soon("it is written", || ours().then_some(()));
    edit(cluster, path, &|endpoints| endpoints["subsets"][0]["addresses"] = json!([{"ip": "10.42.9.9"}]));
    soon("the edit is reverted", || ours().then_some(()));
    admin(cluster, "DELETE", path, None);
    soon("it is recreated", || ours().then_some(()));
}
