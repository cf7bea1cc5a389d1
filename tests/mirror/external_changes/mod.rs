//! External changes to the objects that gangplank wrote, with the controllers of a real cluster
//! running: changes to our objects are reverted within five seconds, foreign objects stay unchanged to
//! the byte, and a name that was taken over is released.

mod endpoints;
mod joined;
mod namespaces;
mod policy;
mod takeover;

use std::time::{Duration, Instant};

use gangplank::{
    kubernetes::objects::slices::{Family, SliceGroup},
    model::{PortSpec, Ports, Protocol, Validator},
};
use serde_json::{Value, json};

use super::{MirrorHarness, addresses, object, service_path, slice_path, slices, wait_for_addresses};
use crate::support::{
    cluster::{Cluster, Who},
    wait_until,
};

/// An external change, as a description and a function.
type Edit = (&'static str, fn(&mut Value));

/// How long an external edit may last.
const MAX_REPAIR_TIME: Duration = Duration::from_secs(5);

/// Waits until `look` returns something, for at most [`MAX_REPAIR_TIME`].
fn soon<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    let found = wait_until(what, look);
    let took = begun.elapsed();
    assert!(took <= MAX_REPAIR_TIME, "{what}: only after {took:?}");
    found
}

/// A request of the administrator, which must succeed.
fn admin(cluster: &Cluster, method: &str, path: &str, body: Option<&Value>) -> Value {
    let (status, answer) = cluster.request(Who::Admin, method, path, body).expect("the API server runs");
    assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
    answer
}

fn create(cluster: &Cluster, path: &str, object: &Value) -> Value {
    admin(cluster, "POST", path, Some(object))
}

/// Changes an object as kubectl does: reads it, and writes it if nobody else did meanwhile.
fn edit(cluster: &Cluster, path: &str, change: &dyn Fn(&mut Value)) -> Value {
    wait_until("nobody else writes at the same moment", || {
        let mut object = cluster.get_json(path);
        change(&mut object);
        let (status, answer) = cluster.request(Who::Admin, "PUT", path, Some(&object)).expect("the API server runs");
        assert!(matches!(status, 200 | 409), "{path}: {status} {answer}");
        (status == 200).then_some(answer)
    })
}

/// The content of slices without their names and timestamps.
fn content(slices: &[Value]) -> Vec<Value> {
    let ours =
        ["kubernetes.io/service-name", "endpointslice.kubernetes.io/managed-by", "service.kubernetes.io/headless"];
    let one = |slice: &Value| {
        let meta = &slice["metadata"];
        let stamped = ["term", "generation", "updated", "writer"]
            .iter()
            .all(|stamp| meta["annotations"][format!("gangplank.dev/{stamp}")].is_string());
        json!({
            "labels": ours.map(|label| &meta["labels"][label]),
            "instances": meta["annotations"]["gangplank.dev/instances"],
            "stamped": stamped,
            "owners": meta["ownerReferences"],
            "type": slice["addressType"],
            "endpoints": slice["endpoints"],
            "ports": slice["ports"],
        })
    };
    let mut all: Vec<Value> = slices.iter().map(one).collect();
    all.sort_by_cached_key(Value::to_string);
    all
}

fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().expect("it has a name")
}

fn uid(object: &Value) -> &str {
    object["metadata"]["uid"].as_str().expect("it has a uid")
}

/// A slice of somebody else.
fn foreign_slice(service: &str, name: &str, address: &str) -> Value {
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "labels": {
            "kubernetes.io/service-name": service, "endpointslice.kubernetes.io/managed-by": "somebody.example"}},
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]})
}

/// The first name of the slice of IPv4 instances with TCP port 8080, `http`.
fn first_name(namespace: &str, service: &str) -> String {
    let key = Validator { zone_wire_len: 15, names_allowed: false }.service(namespace, service).expect("valid names");
    let http = PortSpec { number: 8080, protocol: Protocol::Tcp, name: "http".into() };
    let ports = Ports::parse(&[http]).expect("a valid port");
    SliceGroup { family: Family::V4, ports, part: None, resolved: false }.slice_name(&key, 0)
}

impl MirrorHarness {
    /// Registers an instance, which must be in Kubernetes when the answer arrives.
    fn mirrored(&self, namespace: &str, service: &str, address: &str, port: &str) {
        let (code, said) = self.register(namespace, service, address, port);
        assert!(
            code == Some(0) && said.contains("registered"),
            "{service} {address}: {said}\n{}",
            self.server.stderr()
        );
    }

    /// Whether a registration is refused with 409.
    fn conflicts(&self, namespace: &str, service: &str) -> bool {
        let (code, said) = self.register(namespace, service, "10.250.0.1", "http=8080");
        if code == Some(0) {
            self.deregister(namespace, service, "10.250.0.1"); // it was too early
        }
        code != Some(0) && said.contains("not managed by gangplank")
    }
}

#[test]
fn external_edits_of_slices_are_reverted() {
    let Some(harness) = MirrorHarness::with_controllers(&[]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("edits");
    for address in ["10.3.0.1", "10.3.0.2"] {
        harness.mirrored("edits", "web", address, "http=8080");
    }
    let right = content(&slices(cluster, "edits", "web"));
    let edits: [Edit; 13] = [
        ("an endpoint removed, a label and an annotation added", |slice| {
            slice["endpoints"].as_array_mut().expect("a list").remove(0);
            slice["metadata"]["labels"]["team"] = "a".into();
            slice["metadata"]["annotations"]["example.com/note"] = "b".into();
        }),
        ("an endpoint added", |slice| {
            let more = json!({"addresses": ["10.3.9.9"], "conditions": {"ready": true}});
            slice["endpoints"].as_array_mut().expect("a list").push(more);
        }),
        ("all endpoints removed", |slice| slice["endpoints"] = json!([])),
        ("an endpoint not ready", |slice| slice["endpoints"][0]["conditions"]["ready"] = false.into()),
        ("a hostname", |slice| slice["endpoints"][0]["hostname"] = "other".into()),
        ("a port's number", |slice| slice["ports"][0]["port"] = 81.into()),
        ("no ports", |slice| slice["ports"] = json!([])),
        ("the instances' annotation removed", |slice| {
            slice["metadata"]["annotations"].as_object_mut().expect("a map").remove("gangplank.dev/instances");
        }),
        ("a stamp removed", |slice| {
            slice["metadata"]["annotations"].as_object_mut().expect("a map").remove("gangplank.dev/term");
        }),
        ("the annotation of something else", |slice| {
            slice["metadata"]["annotations"]["gangplank.dev/instances"] = r#"{"10.3.0.1":{"weight":9}}"#.into();
        }),
        ("the owner removed", |slice| slice["metadata"]["ownerReferences"] = json!([])),
        ("the Service's label removed", |slice| {
            slice["metadata"]["labels"].as_object_mut().expect("a map").remove("kubernetes.io/service-name");
        }),
        ("given to another Service", |slice| {
            slice["metadata"]["labels"]["kubernetes.io/service-name"] = "other".into();
        }),
    ];
    for (what, change) in edits {
        let [slice] = &slices(cluster, "edits", "web")[..] else { panic!("one slice") };
        let edited = edit(cluster, &slice_path("edits", name(slice)), &change);
        soon(what, || {
            let now = slices(cluster, "edits", "web");
            let written =
                now.iter().all(|slice| slice["metadata"]["resourceVersion"] != edited["metadata"]["resourceVersion"]);
            (written && content(&now) == right).then_some(())
        });
        if what.contains("a label and an annotation") {
            let [slice] = &slices(cluster, "edits", "web")[..] else { panic!("one slice") };
            assert_eq!(slice["metadata"]["labels"]["team"], "a", "what others write stays");
            assert_eq!(slice["metadata"]["annotations"]["example.com/note"], "b");
        }
    }
    assert!(harness.metric("gangplank_mirror_repairs_total") >= 5.0, "it is counted");
    assert_eq!(object(cluster, &service_path("edits", "other")), None, "nothing was made of the other name");
    soon("what was given away is gone", || slices(cluster, "edits", "other").is_empty().then_some(()));
}

#[test]
fn slice_given_to_another_manager_is_left_alone() {
    let Some(harness) = MirrorHarness::with_controllers(&[]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("given-away");
    harness.mirrored("given-away", "web", "10.4.0.1", "http=8080");
    let [slice] = &slices(cluster, "given-away", "web")[..] else { panic!("one slice") };
    let given = edit(cluster, &slice_path("given-away", name(slice)), &|slice| {
        slice["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"] = "somebody.example".into();
    });
    wait_for_addresses(cluster, "given-away", "web", &["10.4.0.1", "10.4.0.1"]);
    harness.mirrored("given-away", "web", "10.4.0.2", "http=8080");
    wait_for_addresses(cluster, "given-away", "web", &["10.4.0.1", "10.4.0.1", "10.4.0.2"]);
    assert_eq!(cluster.get_json(&slice_path("given-away", name(slice))), given);
    // Relabelled as ours again, there is one slice too many.
    edit(cluster, &slice_path("given-away", name(slice)), &|slice| {
        slice["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"] = "gangplank.dev".into();
    });
    soon("each address once", || (addresses(cluster, "given-away", "web") == ["10.4.0.1", "10.4.0.2"]).then_some(()));
}

#[test]
fn deleted_slices_are_recreated() {
    let Some(harness) = MirrorHarness::with_controllers(&[]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("deleted");
    let all = ["10.5.0.1", "10.5.0.2", "10.5.0.3"];
    for (address, port) in all.into_iter().zip(["http=8080", "http=8081", "http=8082"]) {
        harness.mirrored("deleted", "web", address, port);
    }
    let before = slices(cluster, "deleted", "web");
    assert_eq!(before.len(), 3);
    let right = content(&before);
    let comes_back = |what: &str, gone: &[&Value]| {
        soon(what, || {
            let now = slices(cluster, "deleted", "web");
            let new = now.iter().all(|slice| gone.iter().all(|gone| uid(gone) != uid(slice)));
            (new && content(&now) == right).then_some(())
        });
    };
    admin(cluster, "DELETE", &slice_path("deleted", name(&before[0])), None);
    comes_back("one slice", &[&before[0]]);
    let before = slices(cluster, "deleted", "web");
    admin(cluster, "DELETE", &slice_path("deleted", ""), None);
    comes_back("all slices", &before.iter().collect::<Vec<_>>());

    // A slice that waits for its finalizer must not hold endpoints.
    let before = slices(cluster, "deleted", "web");
    let before = before.iter().find(|slice| slice["ports"][0]["port"] == 8080).expect("one has that port");
    let held = slice_path("deleted", name(before));
    edit(cluster, &held, &|slice| slice["metadata"]["finalizers"] = json!(["example.com/hold"]));
    harness.mirrored("deleted", "web", "10.5.0.4", "http=8080");
    let kept = slices(cluster, "deleted", "web");
    let kept = kept.iter().find(|slice| uid(slice) == uid(before)).expect("it stands");
    assert_eq!(kept["metadata"]["finalizers"], json!(["example.com/hold"]), "what others wrote stays: {kept}");
    assert_eq!(harness.deregister("deleted", "web", "10.5.0.4").0, Some(0));
    admin(cluster, "DELETE", &held, None);
    soon("a slice in its place", || {
        let now = slices(cluster, "deleted", "web");
        let living: Vec<Value> = now.into_iter().filter(|one| one["metadata"]["deletionTimestamp"].is_null()).collect();
        (content(&living) == right).then_some(())
    });
    edit(cluster, &held, &|slice| slice["metadata"]["finalizers"] = json!([]));
    comes_back("without the one that was held", &[before]);
}

#[test]
fn foreign_slices_are_left_alone() {
    let Some(harness) = MirrorHarness::with_controllers(&["--service-linger", "0s"]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("beside");
    // Under the very name that ours would have, and under another.
    let first = first_name("beside", "web");
    let all: Vec<Value> = [first.as_str(), "by-hand"]
        .into_iter()
        .map(|name| create(cluster, &slice_path("beside", ""), &foreign_slice("web", name, "10.6.9.9")))
        .collect();
    harness.mirrored("beside", "web", "10.6.0.1", "http=8080");
    harness.mirrored("beside", "web", "10.6.0.2", "http=8080");
    wait_for_addresses(cluster, "beside", "web", &["10.6.0.1", "10.6.0.2", "10.6.9.9", "10.6.9.9"]);
    let untouched = || {
        for slice in &all {
            assert_eq!(&cluster.get_json(&slice_path("beside", name(slice))), slice);
        }
    };
    untouched();
    for address in ["10.6.0.1", "10.6.0.2"] {
        assert_eq!(harness.deregister("beside", "web", address).0, Some(0));
    }
    wait_until("our Service is gone", || object(cluster, &service_path("beside", "web")).is_none().then_some(()));
    wait_for_addresses(cluster, "beside", "web", &["10.6.9.9", "10.6.9.9"]);
    untouched();
    // The name is free again some day.
    admin(cluster, "DELETE", &slice_path("beside", &first), None);
    harness.mirrored("beside", "web", "10.6.0.3", "http=8080");
    wait_for_addresses(cluster, "beside", "web", &["10.6.0.3", "10.6.9.9"]);
}

#[test]
fn external_edits_of_the_service_are_reverted() {
    let Some(harness) = MirrorHarness::with_controllers(&[]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("service-edits");
    harness.mirrored("service-edits", "web", "10.7.0.1", "http=8080");
    let path = service_path("service-edits", "web");
    let right = cluster.get_json(&path);
    let edits: [Edit; 4] = [
        ("a selector", |service| {
            service["spec"]["selector"] = json!({"app": "web"});
            // With one, a headless Service may have the cluster's families only.
            service["spec"]["ipFamilyPolicy"] = "SingleStack".into();
            service["spec"]["ipFamilies"] = json!(["IPv4"]);
        }),
        ("other ports", |service| service["spec"]["ports"] = json!([{"name": "x", "port": 1, "protocol": "TCP"}])),
        ("no ports", |service| service["spec"]["ports"] = json!([])),
        ("our other label removed", |service| {
            service["metadata"]["labels"].as_object_mut().expect("a map").remove("service-type");
        }),
    ];
    for (what, change) in edits {
        edit(cluster, &path, &|service| {
            change(service);
            service["metadata"]["annotations"] = json!({"example.com/note": what});
            service["metadata"]["labels"]["team"] = "a".into();
        });
        soon(what, || {
            let now = cluster.get_json(&path);
            let same =
                ["selector", "ports", "clusterIP"].iter().all(|field| now["spec"][field] == right["spec"][field])
                    && now["metadata"]["labels"]["service-type"] == "external";
            same.then(|| {
                assert_eq!(now["metadata"]["annotations"]["example.com/note"], what, "what others write stays");
                assert_eq!(now["metadata"]["labels"]["team"], "a");
                assert_eq!(uid(&now), uid(&right));
            })
        });
    }
    assert!(addresses(cluster, "service-edits", "web").contains(&"10.7.0.1".to_owned()));
}
