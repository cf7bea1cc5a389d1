//! Registered, seen, removed, and restored from the slices alone.

use std::mem;

use gangplank::grpc::proto::registry::RegistrationType;
use hickory_proto::rr::RecordType;

use super::{World, addresses, object, slices, wait_for_addresses};
use crate::support::{
    dns::{Over, answers},
    stream::{Stream, message},
    wait_until,
};

#[test]
fn what_is_registered_stands_in_a_headless_service_with_slices() {
    let Some(world) = World::start(&["--service-linger", "0s"]) else { return };
    let cluster = world.cluster;
    world.create_namespace("basics");
    let (code, said) = world.register("basics", "web", "10.0.0.1", "http=8080");
    assert_eq!(code, Some(0), "{said}");
    // 201 says that the slice has it: nothing to wait for.
    assert_eq!(addresses(cluster, "basics", "web"), ["10.0.0.1"]);

    let service = object(cluster, "/api/v1/namespaces/basics/services/web").expect("it was created");
    assert_eq!(service["spec"]["clusterIP"], "None");
    assert_eq!(service["spec"]["selector"], serde_json::Value::Null);
    assert_eq!(service["metadata"]["labels"]["service-type"], "external");
    assert_eq!(service["metadata"]["labels"]["gangplank.dev/service"], "owned");
    assert_eq!(service["spec"]["ports"][0]["name"], "http");
    assert_eq!(service["spec"]["ports"][0]["port"], 8080);

    let [slice] = &slices(cluster, "basics", "web")[..] else { panic!("one slice") };
    assert_eq!(slice["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"], "gangplank.dev");
    assert_eq!(slice["metadata"]["labels"]["service.kubernetes.io/headless"], "");
    assert_eq!(slice["metadata"]["ownerReferences"][0]["uid"], service["metadata"]["uid"]);
    for stamp in ["term", "generation", "updated", "writer"] {
        assert!(slice["metadata"]["annotations"][format!("gangplank.dev/{stamp}")].is_string(), "{stamp}: {slice}");
    }

    // One change rewrites one slice.
    let (code, said) = world.register("basics", "web", "10.0.0.2", "http=8080");
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(addresses(cluster, "basics", "web"), ["10.0.0.1", "10.0.0.2"]);
    assert_eq!(slices(cluster, "basics", "web").len(), 1);

    for address in ["10.0.0.1", "10.0.0.2"] {
        let (code, said) = world.deregister("basics", "web", address);
        assert_eq!(code, Some(0), "{said}");
    }
    assert_eq!(addresses(cluster, "basics", "web"), Vec::<String>::new());
    wait_until("the Service goes with its last instance", || {
        object(cluster, "/api/v1/namespaces/basics/services/web").is_none().then_some(())
    });
}

#[test]
fn an_empty_disk_is_restored_from_the_slices() {
    let Some(mut world) = World::start(&[]) else { return };
    world.create_namespace("restore");
    let run = |world: &World, line: &[&str]| {
        let output = world.server.run(line);
        assert!(output.status.success(), "{line:?}: {output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    for line in [
        &["register", "db", "10.1.0.1", "--port", "sql=5432", "--port", "sql=5432/udp", "-n", "restore"][..],
        &[
            "register",
            "db",
            "10.1.0.2",
            "--port",
            "sql=5432",
            "--host-name",
            "primary",
            "--weight",
            "2.5",
            "-n",
            "restore",
        ],
        &[
            "register",
            "db",
            "2001:db8::",
            "--port",
            "sql=5432",
            "--priority",
            "7",
            "--node-name",
            "rack-1",
            "-n",
            "restore",
        ],
    ] {
        run(&world, line);
    }
    let shown = |world: &World| -> serde_json::Value {
        serde_json::from_str(&run(world, &["ls", "db", "-n", "restore", "-o", "json"])).expect("JSON")
    };
    let before = shown(&world);
    world.lose_the_disk(&[]);
    let after = shown(&world);
    assert_eq!(before["instances"], after["instances"]);
    let a = answers(world.server.dns, Over::Udp, "db.restore.svc.cluster.local.", RecordType::A);
    assert_eq!(a, ["10.1.0.1", "10.1.0.2"]);
    // A namespace that exists is a name, whether or not something is registered in it.
    world.create_namespace("restore-empty");
    wait_for_addresses(world.cluster, "restore", "db", &["10.1.0.1", "10.1.0.1", "10.1.0.2", "2001:db8::"]);
}

#[test]
fn a_directory_that_comes_back_gives_way_to_what_another_wrote_since() {
    let Some(mut world) = World::start(&[]) else { return };
    world.create_namespace("terms");
    let term = |world: &World, service: &str| {
        let [slice] = &slices(world.cluster, "terms", service)[..] else { panic!("one slice") };
        let term = slice["metadata"]["annotations"]["gangplank.dev/term"].as_str().expect("it is stamped");
        term.parse::<u64>().expect("a number")
    };
    for address in ["10.4.0.1", "10.4.0.2"] {
        assert_eq!(world.register("terms", "web", address, "http=80").0, Some(0));
    }
    let first = term(&world, "web");
    assert!(world.server.terminate().success());

    // Another takes over from the slices, and goes on.
    let away = mem::replace(&mut world.server, super::serve(world.cluster, &[]));
    wait_until("it writes under a term of its own", || (term(&world, "web") == first + 1).then_some(()));
    assert_eq!(world.deregister("terms", "web", "10.4.0.1").0, Some(0));
    assert_eq!(world.register("terms", "web", "10.4.0.3", "http=80").0, Some(0));
    assert!(world.server.terminate().success());

    // The first one is behind: what was removed meanwhile does not come back with it.
    world.server = away.restart();
    let a = || answers(world.server.dns, Over::Udp, "web.terms.svc.cluster.local.", RecordType::A);
    assert_eq!(a(), ["10.4.0.2", "10.4.0.3"]);
    wait_until("it writes under a higher term", || (term(&world, "web") == first + 2).then_some(()));
    assert_eq!(addresses(world.cluster, "terms", "web"), ["10.4.0.2", "10.4.0.3"]);
}

#[test]
fn kubernetes_says_what_may_be_registered() {
    let Some(world) = World::start(&[]) else { return };
    let cluster = world.cluster;
    world.create_namespace("rules");
    let refused = |namespace: &str, service: &str, exit: i32, says: &str| {
        let (code, said) = world.register(namespace, service, "10.2.0.1", "http=80");
        assert_eq!(code, Some(exit), "{said}");
        assert!(said.contains(says), "{said:?} should contain {says:?}");
    };
    refused("rules-absent", "web", 3, "namespace: rules-absent does not exist in Kubernetes");
    refused("kube-system", "web", 1, "the cluster's own");
    refused("default", "kubernetes", 1, "the cluster's own");
    cluster.kubectl(&["create", "service", "clusterip", "native", "--tcp=80", "-n", "rules"]);
    wait_until("the native Service is known", || {
        let (code, said) = world.register("rules", "native", "10.2.0.1", "http=80");
        (code == Some(1) && said.contains("not managed by gangplank")).then_some(())
    });
    // What came in before it was known is taken out again.
    wait_for_addresses(cluster, "rules", "native", &[]);
}

#[test]
fn what_was_acknowledged_is_written_down_before_the_end() {
    let Some(mut world) = World::start(&["--kubernetes-qps", "50", "--drain", "8s"]) else { return };
    world.create_namespace("drained");
    let mut stream = Stream::open(world.server.grpc);
    // More than the burst of 100 and what a second of waiting lets through: many get 202.
    let one = |n: usize| {
        let address = format!("10.3.{}.{}", n / 250, n % 250);
        message(RegistrationType::Register, "drained", &format!("s{n}"), &address)
    };
    let (statuses, _) = stream.exchange((0..150).map(one).collect());
    assert!(statuses.iter().all(|status| matches!(status, 201 | 202)), "{statuses:?}");
    assert!(statuses.contains(&202), "the drain has something to do");
    drop(stream);
    assert!(world.server.terminate().success());
    // Nothing but the slices is left.
    world.server = super::serve(world.cluster, &[]);
    for n in [0, 75, 149] {
        let name = format!("s{n}.drained.svc.cluster.local.");
        assert_eq!(answers(world.server.dns, Over::Udp, &name, RecordType::A).len(), 1, "{name}");
    }
}
