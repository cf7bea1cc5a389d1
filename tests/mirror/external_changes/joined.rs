//! Services of others that external instances join.

use std::{fs, thread};

use gangplank::grpc::proto::registry::RegistrationType;
use hickory_proto::rr::RecordType;
use serde_json::{Value, json};

use super::{
    MirrorHarness, admin, create, edit, foreign_slice, name, soon,
    takeover::{native, ready_pod},
};
use crate::{
    mirror::{addresses, every_address, service_path, slice_path, slices, wait_for_addresses},
    support::{
        dns::{Over, answers},
        proxy::{Call, Fault},
        stream::{Stream, message},
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

/// Connections of ours to a port of 127.0.0.1.
fn connections_to(port: u16) -> usize {
    const ESTABLISHED: &str = "01";
    let table = fs::read_to_string("/proc/net/tcp").expect("Linux has it");
    let peer = format!("0100007F:{port:04X}");
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|fields| fields[2] == peer && fields[3] == ESTABLISHED).count()
}

/// More names than the selector of the watch takes.
#[test]
fn hundreds_of_joined_names_share_one_watch_and_their_services_are_untouched() {
    const JOINED: usize = 120;
    const NAMESPACE: &str = "many-joined";
    let Some((harness, proxy)) = MirrorHarness::behind_a_proxy() else { return };
    let cluster = harness.cluster;
    let port = proxy.url().rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
    harness.create_namespace(NAMESPACE);
    let (name, pod, instance) = (|n| format!("web-{n}"), |n| format!("10.24.9.{n}"), |n| format!("10.24.0.{n}"));
    thread::scope(|scope| {
        for part in 0..4 {
            scope.spawn(move || {
                for n in (part..JOINED).step_by(4) {
                    let labels = json!({"gangplank.dev/service": "joined"});
                    create(cluster, &service_path(NAMESPACE, ""), &native(&name(n), &labels));
                    let slice = foreign_slice(&name(n), &format!("by-hand-{n}"), &pod(n));
                    create(cluster, &slice_path(NAMESPACE, ""), &slice);
                }
            });
        }
    });
    let services = || -> Vec<Value> {
        let mut list = cluster.get_json(&service_path(NAMESPACE, ""));
        list["items"].as_array_mut().map(std::mem::take).expect("a list")
    };
    let theirs = services();
    assert_eq!(theirs.len(), JOINED);
    let answered = |n| {
        let name = format!("{}.{NAMESPACE}.svc.cluster.local.", name(n));
        answers(harness.server.dns, Over::Udp, &name, RecordType::A)
    };
    wait_until("every pod is answered", || (0..JOINED).all(|n| answered(n) == [pod(n)]).then_some(()));
    let open = r#"gangplank_kubernetes_watches{resource="joined"}"#;
    wait_until("the watch is open", || (harness.metric(open) == 1.0).then_some(()));
    let of_joined = |call: &Call| call.is("watch", "endpointslices") && call.path.contains("service-name");
    let last = proxy.calls().into_iter().rfind(of_joined).expect("a watch");
    assert!(!last.path.contains("web-"), "more names than the URL takes: {}", last.path);
    let connections = connections_to(port);

    let mut stream = Stream::open(harness.server.grpc);
    let all = |kind| (0..JOINED).map(|n| message(kind, NAMESPACE, &name(n), &instance(n))).collect();
    let (statuses, took) = stream.exchange(all(RegistrationType::Register));
    assert!(statuses.iter().all(|status| matches!(status, 201 | 202)), "{statuses:?}");
    for n in 0..JOINED {
        assert_eq!(answered(n), [instance(n), pod(n)]);
    }
    wait_until("every instance is in Kubernetes", || {
        let all = every_address(cluster, NAMESPACE);
        (0..JOINED).all(|n| all.get(&name(n)) == Some(&vec![instance(n), pod(n)])).then_some(())
    });
    println!(
        "{JOINED} joined names: {connections} connections to the API server, {} with registrations, which took {took:?}",
        connections_to(port)
    );
    assert!(connections <= 16, "{connections} connections for {JOINED} names");
    assert_eq!(harness.metric(open), 1.0);
    assert_eq!(services(), theirs, "no Service was written to");

    // The cluster is shared: nothing is left that later tests would watch.
    let (statuses, _) = stream.exchange(all(RegistrationType::Unregister));
    assert!(statuses.iter().all(|status| matches!(status, 202 | 204)), "{statuses:?}");
    wait_until("only pods are left", || {
        let all = every_address(cluster, NAMESPACE);
        (0..JOINED).all(|n| all.get(&name(n)) == Some(&vec![pod(n)])).then_some(())
    });
    assert_eq!(services(), theirs);
    admin(cluster, "DELETE", &service_path(NAMESPACE, ""), None);
    admin(cluster, "DELETE", &slice_path(NAMESPACE, ""), None);
    wait_until("no pod is answered", || (harness.metric(open) == 0.0 && answered(0).is_empty()).then_some(()));
}
