//! Services of others that external instances join.

use hickory_proto::rr::RecordType;
use serde_json::json;

use super::{
    MirrorHarness, create, edit, foreign_slice, name, soon,
    takeover::{native, ready_pod},
};
use crate::{
    mirror::{addresses, service_path, slice_path, slices, wait_for_addresses},
    support::{
        dns::{Over, answers},
        proxy::Fault,
        wait_until,
    },
};

#[test]
fn joined_name_is_answered_with_pods_and_instances() {
    let Some(harness) = MirrorHarness::with_controllers(&[]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("joined");
    let a = || answers(harness.server.dns, Over::Udp, "web.joined.svc.cluster.local.", RecordType::A);
    let srv = || answers(harness.server.dns, Over::Udp, "_http._tcp.web.joined.svc.cluster.local.", RecordType::SRV);
    let service =
        create(cluster, &service_path("joined", ""), &native("web", &json!({"gangplank.dev/service": "joined"})));
    ready_pod(cluster, "joined", "web-0", "web", "10.20.9.1");
    wait_for_addresses(cluster, "joined", "web", &["10.20.9.1"]);
    soon("the pod is answered", || (a() == ["10.20.9.1"]).then_some(()));

    harness.mirrored("joined", "web", "10.20.0.1", "http=8081");
    assert_eq!(addresses(cluster, "joined", "web"), ["10.20.0.1", "10.20.9.1"]);
    assert_eq!(a(), ["10.20.0.1", "10.20.9.1"]);
    let target = |label: &str, port: u16| format!("0 100 {port} {label}.web.joined.svc.cluster.local.");
    assert_eq!(srv(), [target("10-20-9-1", 8080), target("10-20-0-1", 8081)]);
    let ours = |slice: &&serde_json::Value| {
        slice["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"] == "gangplank.dev"
    };
    let all = slices(cluster, "joined", "web");
    let slice = all.iter().find(ours).expect("ours");
    assert_eq!(slice["metadata"]["ownerReferences"][0]["uid"], service["metadata"]["uid"]);

    // A slice by hand, and a change of it.
    let hand = create(cluster, &slice_path("joined", ""), &foreign_slice("web", "by-hand", "10.20.9.2"));
    soon("it is answered too", || (a() == ["10.20.0.1", "10.20.9.1", "10.20.9.2"]).then_some(()));
    edit(cluster, &slice_path("joined", name(&hand)), &|slice| {
        slice["endpoints"][0]["conditions"]["ready"] = false.into();
    });
    soon("not while it is not ready", || (a() == ["10.20.0.1", "10.20.9.1"]).then_some(()));
    edit(cluster, &slice_path("joined", name(&hand)), &|slice| {
        slice["endpoints"][0]["addresses"] = json!(["10.20.9.3"]);
    });
    edit(cluster, &slice_path("joined", name(&hand)), &|slice| {
        slice["endpoints"][0]["conditions"]["ready"] = true.into();
    });
    soon("the latest addresses", || (a() == ["10.20.0.1", "10.20.9.1", "10.20.9.3"]).then_some(()));

    let theirs = || -> Vec<_> { slices(cluster, "joined", "web").into_iter().filter(|slice| !ours(&slice)).collect() };
    let before = theirs();
    assert_eq!(before.len(), 2);
    harness.mirrored("joined", "web", "10.20.0.2", "http=8080");
    assert_eq!(a(), ["10.20.0.1", "10.20.0.2", "10.20.9.1", "10.20.9.3"]);
    assert_eq!(harness.deregister("joined", "web", "10.20.0.2").0, Some(0));
    assert_eq!(theirs(), before, "the slices of others are untouched");
    assert_eq!(cluster.get_json(&service_path("joined", "web")), service, "and so is the Service");

    // It does not let anybody join any more.
    let left = edit(cluster, &service_path("joined", "web"), &|service| service["metadata"]["labels"] = json!({}));
    soon("our slices are gone", || (addresses(cluster, "joined", "web") == ["10.20.9.1", "10.20.9.3"]).then_some(()));
    soon("registrations are refused", || harness.conflicts("joined", "web").then_some(()));
    soon("only what is registered is answered", || (a() == ["10.20.0.1"]).then_some(()));
    assert_eq!(cluster.get_json(&service_path("joined", "web")), left);
    assert_eq!(theirs().len(), 2);
}

#[test]
fn joined_name_without_instances_is_answered_with_pods() {
    let Some(harness) = MirrorHarness::with_controllers(&[]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("pods-only");
    create(cluster, &service_path("pods-only", ""), &native("web", &json!({"gangplank.dev/service": "joined"})));
    create(cluster, &slice_path("pods-only", ""), &foreign_slice("web", "by-hand", "10.21.9.1"));
    let a = || answers(harness.server.dns, Over::Udp, "web.pods-only.svc.cluster.local.", RecordType::A);
    soon("what stands by hand is answered", || (a() == ["10.21.9.1"]).then_some(()));
    harness.mirrored("pods-only", "web", "10.21.0.1", "http=8080");
    assert_eq!(harness.deregister("pods-only", "web", "10.21.0.1").0, Some(0));
    assert_eq!(a(), ["10.21.9.1"]);
    // Gangplank did not make that Service: it does not remove it either.
    cluster.kubectl(&["delete", "service", "web", "-n", "pods-only"]);
    wait_until("nothing is answered without it", || a().is_empty().then_some(()));
}

#[test]
fn start_waits_for_the_pods_of_joined_names() {
    let Some((mut harness, proxy)) = MirrorHarness::behind_a_proxy() else { return };
    let cluster = harness.cluster;
    harness.create_namespace("joined-start");
    create(cluster, &service_path("joined-start", ""), &native("web", &json!({"gangplank.dev/service": "joined"})));
    create(cluster, &slice_path("joined-start", ""), &foreign_slice("web", "by-hand", "10.22.9.1"));
    let a = |harness: &MirrorHarness| {
        answers(harness.server.dns, Over::Udp, "web.joined-start.svc.cluster.local.", RecordType::A)
    };
    wait_until("it is answered", || (a(&harness) == ["10.22.9.1"]).then_some(()));
    let refused = proxy.inject_first(3, Fault::answer(503), |call| {
        // The one list of other writers' slices; the list of our own slices has no such selector.
        call.is("list", "endpointslices") && call.namespace.is_empty() && call.path.contains("service-name")
    });
    harness.restart_empty_with(proxy.kubeconfig(), &[]);
    assert_eq!((a(&harness), refused.hits()), (vec!["10.22.9.1".to_owned()], 3), "once it is ready");
}
