//! `gangplank replicas`: who writes, and how far each process is.

use serde_json::Value;

use super::{ClusterLock, MirrorHarness, make_namespace, replica::Replica, serve_by};
use crate::support::{http, server::Server, stream::Stream, wait_until};

#[test]
fn every_replica_is_listed_with_its_role() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let harness = MirrorHarness { server: serve_by(&kubeconfig, &[]), cluster: lock.cluster, _lock: lock };
    harness.create_namespace("listed");
    assert_eq!(harness.register("listed", "web", "10.18.0.1", "http=80").0, Some(0));
    let follower = Replica::on_standby(&kubeconfig);
    // The one on standby names the writer.
    let standby = format!("http://{}", follower.grpc);
    let list = || {
        let output = harness.server.run(&["replicas", "--server", &standby, "-o", "json"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let list: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let list = list["replicas"].as_array().expect("a list").clone();
        let of = |role| list.iter().find(|one| one["role"] == role).unwrap_or_else(|| panic!("no {role} in {list:?}"));
        assert_eq!(list.len(), 2, "{list:?}");
        (of("writer").clone(), of("standby").clone())
    };
    let (writer, other) = list();
    assert_eq!(writer["term"], other["term"]);
    assert!(writer["term"].as_u64() > Some(0));
    assert_eq!(writer["server"], format!("http://{}", harness.server.grpc).as_str());
    assert_eq!((&other["writer"], &writer["writer"]), (&writer["name"], &writer["name"]));
    assert_eq!(other["writer_addresses"][0], harness.server.grpc.to_string().as_str());
    assert_eq!(writer["age_seconds"], Value::Null);
    // Other tests may have left many services in the cluster.
    wait_until("nothing is left to write", || (list().0["services_behind"] == 0).then_some(()));
    assert!(other["age_seconds"].as_f64().is_some_and(|age| age < 5.0), "{other}");
    assert!(writer["lease_age_seconds"].as_f64().is_some_and(|age| age < 5.0), "{writer}");
    assert_eq!(writer["version"], env!("CARGO_PKG_VERSION"));
    // The generation is the writer's as soon as the slice is followed.
    wait_until("both have one generation", || {
        let (writer, other) = list();
        (writer["generation"] == other["generation"]).then_some(())
    });
    // Each says the same of itself over HTTP.
    let (status, page) = http::get(follower.admin, "/api/v1/replica");
    let page: Value = serde_json::from_str(&page).expect("JSON");
    assert_eq!((status, &page["name"], &page["role"]), (200, &other["name"], &other["role"]));

    // A table for people. A server that does not answer is an error, beside what is known.
    let output = harness.server.run(&["replicas", "--server", &standby]);
    let table = String::from_utf8(output.stdout).expect("UTF-8");
    println!("{table}");
    assert_eq!(table.lines().count(), 3, "{table}");
    let dead = follower.grpc;
    follower.terminate();
    let writer = format!("http://{}", harness.server.grpc);
    let output = harness.server.run(&["replicas", "--server", &format!("{writer},http://{dead}")]);
    assert_eq!(output.status.code(), Some(1));
    let (table, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(table.lines().count(), 2, "{table}");
    assert!(said.starts_with(&format!("error: 1 of 2 servers did not answer\n  http://{dead}: ")), "{said}");
}

/// The value of a series without labels.
fn metric(replica: &Replica, name: &str) -> f64 {
    let (_, page) = http::get(replica.admin, "/metrics");
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in\n{page}")).parse().expect("a number")
}

#[test]
fn metrics_of_both_show_the_lease_and_what_is_remembered() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let writer = Replica::start(&kubeconfig, tempfile::TempDir::new().expect("a temporary directory can be made"));
    writer.wait_until_it_writes();
    let mut stream = Stream::open(writer.grpc);
    make_namespace(lock.cluster, &mut stream, "measured");
    assert_eq!(stream.register("measured", "web", "10.19.0.1").0, 201);
    let before = metric(&writer, "gangplank_registry_tombstones");
    assert_eq!(stream.remove("measured", "web", "10.19.0.1").0, 204);
    wait_until("the removal is remembered", || {
        (metric(&writer, "gangplank_registry_tombstones") > before).then_some(())
    });
    let follower = Replica::on_standby(&kubeconfig);
    let lease = lock.cluster.kubectl(&["get", "lease", "gangplank-writer", "-n", "gangplank", "-o", "json"]);
    let lease: Value = serde_json::from_str(&lease).expect("JSON");
    let term = lease["metadata"]["annotations"]["gangplank.dev/term"].as_str().expect("text");
    let term: f64 = term.parse().expect("a number");
    for (replica, role) in [(&writer, "writer"), (&follower, "standby")] {
        let role = format!("gangplank_kubernetes_lease_role{{role=\"{role}\"}}");
        wait_until("it has its role", || (metric(replica, &role) > 0.0).then_some(()));
        wait_until("it knows the term", || {
            (metric(replica, "gangplank_kubernetes_lease_term").total_cmp(&term).is_eq()).then_some(())
        });
        let age = metric(replica, "gangplank_kubernetes_lease_age_seconds");
        assert!(age > 0.0 && age < 5.0, "{age}");
        for none in ["gangplank_registry_outbox_words", "gangplank_registry_refused_words_total"] {
            assert!(metric(replica, none) < 1.0, "{none}");
        }
    }
    // Nobody renews it any more.
    writer.kill();
    wait_until("the Lease ages", || (metric(&follower, "gangplank_kubernetes_lease_age_seconds") > 5.0).then_some(()));
}

#[test]
fn process_without_kubernetes_is_alone() {
    let server = Server::start();
    server.register("prod", "web", "10.0.0.1", "http=80");
    // By name: each address of it is asked, and the process listens at one of them.
    let by_name = format!("http://localhost:{}", server.grpc.port());
    let output = server.run(&["replicas", "--server", &by_name, "-o", "json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let list: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(list["replicas"].as_array().map(Vec::len), Some(1), "{list}");
    let (one, page) = (&list["replicas"][0], http::get(server.admin, "/metrics").1);
    assert_eq!((&one["role"], &one["term"], &one["name"]), (&"alone".into(), &0.into(), &"".into()));
    let generation = format!("gangplank_registry_generation {}", one["generation"]);
    assert!(page.lines().any(|line| line == generation), "no {generation} in\n{page}");
}
