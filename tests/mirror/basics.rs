//! Instances are mirrored, removed, and restored from slices alone.

use std::{fs, mem, path::Path};

use gangplank::grpc::proto::registry::RegistrationType;
use hickory_proto::rr::RecordType;

use serde_json::json;

use super::{MirrorHarness, addresses, object, service_path, slices, wait_for_addresses};
use crate::support::{
    cluster::Who,
    dns::{Over, answers},
    stream::{Stream, message},
    wait_until,
};

#[test]
fn registrations_are_mirrored_into_a_headless_service_with_slices() {
    let Some(harness) = MirrorHarness::start(&["--service-linger", "0s"]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("basics");
    let (code, said) = harness.register("basics", "web", "10.0.0.1", "http=8080");
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
    let (code, said) = harness.register("basics", "web", "10.0.0.2", "http=8080");
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(addresses(cluster, "basics", "web"), ["10.0.0.1", "10.0.0.2"]);
    assert_eq!(slices(cluster, "basics", "web").len(), 1);

    for address in ["10.0.0.1", "10.0.0.2"] {
        let (code, said) = harness.deregister("basics", "web", address);
        assert_eq!(code, Some(0), "{said}");
    }
    assert_eq!(addresses(cluster, "basics", "web"), Vec::<String>::new());
    wait_until("the Service goes with its last instance", || {
        object(cluster, "/api/v1/namespaces/basics/services/web").is_none().then_some(())
    });
}

#[test]
fn empty_data_directory_is_restored_from_slices() {
    let Some(mut harness) = MirrorHarness::start(&[]) else { return };
    harness.create_namespace("restore");
    let run = |harness: &MirrorHarness, line: &[&str]| {
        let output = harness.server.run(line);
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
        run(&harness, line);
    }
    let shown = |harness: &MirrorHarness| -> serde_json::Value {
        serde_json::from_str(&run(harness, &["ls", "db", "-n", "restore", "-o", "json"])).expect("JSON")
    };
    let before = shown(&harness);
    harness.restart_empty(&[]);
    let after = shown(&harness);
    assert_eq!(before["instances"], after["instances"]);
    let a = answers(harness.server.dns, Over::Udp, "db.restore.svc.cluster.local.", RecordType::A);
    assert_eq!(a, ["10.1.0.1", "10.1.0.2"]);
    // A namespace that exists is a name, whether or not something is registered in it.
    harness.create_namespace("restore-empty");
    wait_for_addresses(harness.cluster, "restore", "db", &["10.1.0.1", "10.1.0.1", "10.1.0.2", "2001:db8::"]);
}

#[test]
fn old_data_directory_yields_to_newer_slices() {
    let Some(mut harness) = MirrorHarness::start(&[]) else { return };
    harness.create_namespace("terms");
    let term = |harness: &MirrorHarness, service: &str| {
        let [slice] = &slices(harness.cluster, "terms", service)[..] else { panic!("one slice") };
        let term = slice["metadata"]["annotations"]["gangplank.dev/term"].as_str().expect("it is stamped");
        term.parse::<u64>().expect("a number")
    };
    for address in ["10.4.0.1", "10.4.0.2"] {
        assert_eq!(harness.register("terms", "web", address, "http=80").0, Some(0));
    }
    let first = term(&harness, "web");
    assert!(harness.server.terminate().success());

    // Another gangplank takes over from the slices.
    let away = mem::replace(&mut harness.server, super::serve(harness.cluster, &[]));
    assert_eq!(harness.deregister("terms", "web", "10.4.0.1").0, Some(0));
    assert_eq!(harness.register("terms", "web", "10.4.0.3", "http=80").0, Some(0));
    let second = term(&harness, "web");
    assert!(second > first, "it writes under a term of its own");
    assert!(harness.server.terminate().success());

    // The first data directory is out of date: removed instances must not return with it.
    harness.server = away.restart();
    let a = || answers(harness.server.dns, Over::Udp, "web.terms.svc.cluster.local.", RecordType::A);
    assert_eq!(a(), ["10.4.0.2", "10.4.0.3"]);
    assert_eq!(addresses(harness.cluster, "terms", "web"), ["10.4.0.2", "10.4.0.3"]);
    assert_eq!(harness.register("terms", "web", "10.4.0.4", "http=80").0, Some(0));
    assert!(term(&harness, "web") > second);
}

/// Makes `to` a copy of the directory `from`, which has no subdirectories.
fn copy_files(from: &Path, to: &Path) {
    for file in fs::read_dir(to).expect("a directory") {
        fs::remove_file(file.expect("an entry").path()).expect("a file");
    }
    for file in fs::read_dir(from).expect("a directory") {
        let file = file.expect("an entry");
        fs::copy(file.path(), to.join(file.file_name())).expect("both are on disk");
    }
}

#[test]
fn older_copy_of_the_data_directory_undoes_nothing() {
    let Some(mut harness) = MirrorHarness::start(&[]) else { return };
    harness.create_namespace("copies");
    for address in ["10.5.0.1", "10.5.0.2"] {
        assert_eq!(harness.register("copies", "web", address, "http=80").0, Some(0));
    }
    assert!(harness.server.terminate().success());
    let copy = tempfile::tempdir().expect("a directory");
    copy_files(harness.server.data_dir(), copy.path());

    // The same directory goes on, under the same term.
    harness.server = harness.server.restart();
    assert_eq!(harness.deregister("copies", "web", "10.5.0.1").0, Some(0));
    let output =
        harness.server.run(&["register", "web", "10.5.0.2", "--port", "http=80", "--priority", "7", "-n", "copies"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(harness.register("copies", "web", "10.5.0.3", "http=80").0, Some(0));
    harness.server.kill9();

    copy_files(copy.path(), harness.server.data_dir());
    harness.server = harness.server.restart();
    let a = answers(harness.server.dns, Over::Udp, "web.copies.svc.cluster.local.", RecordType::A);
    assert_eq!(a, ["10.5.0.2", "10.5.0.3"]);
    let output = harness.server.run(&["ls", "web", "-n", "copies", "-o", "json"]);
    let listed: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(listed["instances"][0]["priority"], 7, "{listed}");
    wait_for_addresses(harness.cluster, "copies", "web", &["10.5.0.2", "10.5.0.3"]);
    wait_until("everything is in Kubernetes", || {
        (harness.metric("gangplank_mirror_services_behind") == 0.0).then_some(())
    });
    assert_eq!(addresses(harness.cluster, "copies", "web"), ["10.5.0.2", "10.5.0.3"]);
}

#[test]
fn registrations_that_the_cluster_forbids_are_refused() {
    let Some(harness) = MirrorHarness::start(&[]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace("rules");
    let refused = |namespace: &str, service: &str, exit: i32, says: &str| {
        let (code, said) = harness.register(namespace, service, "10.2.0.1", "http=80");
        assert_eq!(code, Some(exit), "{said}");
        assert!(said.contains(says), "{said:?} should contain {says:?}");
    };
    refused("rules-absent", "web", 3, "namespace: rules-absent does not exist in Kubernetes");
    refused("kube-system", "web", 1, "the cluster's own");
    refused("default", "kubernetes", 1, "the cluster's own");
    cluster.kubectl(&["create", "service", "clusterip", "native", "--tcp=80", "-n", "rules"]);
    wait_until("the native Service is known", || {
        let (code, said) = harness.register("rules", "native", "10.2.0.1", "http=80");
        (code == Some(1) && said.contains("not managed by gangplank")).then_some(())
    });
    // An instance that was registered before the Service was known is removed again.
    wait_for_addresses(cluster, "rules", "native", &[]);
}

#[test]
fn pending_writes_are_finished_or_named_before_exit() {
    let Some(mut harness) = MirrorHarness::start(&["--kubernetes-qps", "50", "--drain", "8s"]) else { return };
    harness.create_namespace("drained");
    let mut stream = Stream::open(harness.server.grpc);
    // More than the burst of 100 and what a second of waiting lets through: many get 202.
    let one = |n: usize| {
        let address = format!("10.3.{}.{}", n / 250, n % 250);
        message(RegistrationType::Register, "drained", &format!("s{n}"), &address)
    };
    let (statuses, _) = stream.exchange((0..150).map(one).collect());
    assert!(statuses.iter().all(|status| matches!(status, 201 | 202)), "{statuses:?}");
    assert!(statuses.contains(&202), "the drain has something to do");
    drop(stream);
    // Nobody else takes the rest over: after a second it is named, and stays in the data directory.
    let status = harness.server.terminate();
    let said = harness.server.stderr();
    // Only the slices are left.
    harness.server = super::serve(harness.cluster, &[]);
    let mut named = 0;
    for n in 0..150 {
        let name = format!("s{n}.drained.svc.cluster.local.");
        let is_named = said.contains(&format!("service=drained/s{n} "));
        named += usize::from(is_named);
        let is_written = answers(harness.server.dns, Over::Udp, &name, RecordType::A).len() == 1;
        assert!(is_named || is_written, "{name} is neither in Kubernetes nor named: {said}");
    }
    assert_eq!(status.code(), Some(i32::from(named > 0)), "{named} named");
}

#[test]
fn registrations_under_names_of_others_are_counted_as_403_and_409() {
    let Some(harness) = MirrorHarness::start(&[]) else { return };
    harness.create_namespace("refusals");
    let theirs = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"clusterIP": "None"}});
    let path = service_path("refusals", "");
    let created = harness.cluster.request(Who::Admin, "POST", &path, Some(&theirs)).expect("the API server runs");
    assert_eq!(created.0, 201, "{}", created.1);
    let mut stream = Stream::open(harness.server.grpc);
    wait_until("the Service of others is known", || {
        let (status, _) = stream.register("refusals", "web", "10.0.0.1");
        if status != 409 {
            stream.remove("refusals", "web", "10.0.0.1");
        }
        (status == 409).then_some(())
    });
    for (namespace, service, status) in
        [("refusals", "web", 409), ("kube-system", "web", 403), ("default", "kubernetes", 403)]
    {
        for kind in ["register", "unregister"] {
            let series = format!(r#"gangplank_registrations_total{{type="{kind}",status="{status}"}}"#);
            let before = harness.metric(&series);
            let (answered, _) = match kind {
                "register" => stream.register(namespace, service, "10.0.0.1"),
                _ => stream.remove(namespace, service, "10.0.0.1"),
            };
            // What is not there can be removed of anything.
            let expected = if kind == "register" { status } else { 404 };
            assert_eq!(answered, expected, "{kind} {namespace}/{service}");
            let counted = harness.metric(&series) - before;
            assert_eq!(counted, if answered == status { 1.0 } else { 0.0 }, "{kind} {namespace}/{service}");
        }
    }
}
