//! Instances that are DNS names, in slices of type FQDN: what the slices hold, what CoreDNS makes of them, and that no
//! process loses one.

use std::net::SocketAddr;

use hickory_proto::{op::ResponseCode, rr::RecordType};
use serde_json::{Value, json};

use super::{ClusterLock, MirrorHarness, every_slice, replica::Replica, resolve, serve_by, slice_path, slices};
use crate::support::{
    cluster::{CONTEXT, Cluster, Who},
    coredns::CoreDns,
    dns::{Over, ask},
    knot::Knot,
    server::Server,
    tools, wait_until,
};

/// Each endpoint of a service, in order: type of its slice, address, and whether it is ready.
fn endpoints(cluster: &Cluster, namespace: &str, service: &str) -> Vec<(String, String, bool)> {
    let mut all = Vec::new();
    for slice in slices(cluster, namespace, service) {
        for endpoint in slice["endpoints"].as_array().into_iter().flatten() {
            let text = |value: &Value| value.as_str().expect("text").to_owned();
            let ready = endpoint["conditions"]["ready"].as_bool().expect("it is set");
            all.push((text(&slice["addressType"]), text(&endpoint["addresses"][0]), ready));
        }
    }
    all.sort();
    all
}

fn wait_for_endpoints(cluster: &Cluster, namespace: &str, service: &str, wanted: &[(&str, &str, bool)]) {
    let wanted: Vec<_> =
        wanted.iter().map(|(kind, address, ready)| ((*kind).into(), (*address).into(), *ready)).collect();
    wait_until(&format!("{service} has {wanted:?}"), || {
        (endpoints(cluster, namespace, service) == wanted).then_some(())
    });
}

/// The instances of the service `db` as `ls` has them.
fn listed(server: &Server, grpc: SocketAddr) -> Value {
    let url = format!("http://{grpc}");
    let output = server.run(&["ls", "db", "-n", KEPT, "--server", &url, "-o", "json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut list: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let mut instances = list["instances"].take();
    // It depends on the others.
    instances.as_array_mut().expect("a list").iter_mut().for_each(|one| one["share"] = Value::Null);
    instances
}

/// The records that CoreDNS has at the name of a service.
fn records(coredns: &CoreDns, namespace: &str, service: &str) -> (ResponseCode, Vec<String>) {
    let answer = ask(coredns.address, Over::Tcp, &super::dns_name(namespace, service), RecordType::A);
    let records = answer.answers.iter().map(|record| format!("{} {}", record.record_type(), record.data));
    (answer.response_code, records.collect())
}

/// The namespace of the first test, which is that of its helpers.
const KEPT: &str = "named-kept";

/// A slice as gangplank writes it, which is all that is left of a data directory.
fn slice_of_a_name(cluster: &Cluster, service: &str, address: &str, ports: &[(&str, u16)]) {
    let ports: Vec<Value> =
        ports.iter().map(|(name, port)| json!({"name": name, "port": port, "protocol": "TCP"})).collect();
    let entry = json!({ address: {"weight": 0.5, "priority": 3, "registered": 1_700_000_000_123_u64} });
    let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "FQDN",
        "metadata": {"name": format!("{service}-0123456789"),
            "labels": {"kubernetes.io/service-name": service, "endpointslice.kubernetes.io/managed-by": "gangplank.dev"},
            "annotations": {"gangplank.dev/instances": entry.to_string()}},
        "endpoints": [{"addresses": [address], "hostname": "db", "nodeName": "vm-1", "conditions": {"ready": true}}],
        "ports": ports});
    let (status, said) =
        cluster.request(Who::Admin, "POST", &slice_path(KEPT, ""), Some(&slice)).expect("the API server runs");
    assert_eq!(status, 201, "{said}");
}

/// What is left when a data directory is lost is the slice. The process that finds it has no server to ask for names.
#[test]
fn name_of_a_slice_is_kept_by_processes_that_look_none_up() {
    let Some(lock) = ClusterLock::take() else { return };
    let Some(program) = tools::require("coredns") else { return };
    let cluster = lock.cluster;
    cluster.create_namespace(KEPT);
    slice_of_a_name(cluster, "db", "db.example.com", &[("sql", 5432)]);
    slice_of_a_name(cluster, "ports", "db.example.com", &[("sql", 5432), ("admin", 80)]);
    let kubeconfig = cluster.kubeconfig_for_gangplank();
    let mut harness = MirrorHarness { server: serve_by(&kubeconfig, &[]), cluster, _lock: lock };
    let coredns = CoreDns::with_kubernetes(&program, &cluster.kubeconfig_admin(), CONTEXT);
    wait_until("the slice has the Service as its owner", || {
        let all = slices(cluster, KEPT, "db");
        (all.len() == 1 && all[0]["metadata"]["ownerReferences"][0]["kind"] == "Service").then_some(())
    });
    let alone = [("FQDN", "db.example.com", true)];
    wait_for_endpoints(cluster, KEPT, "db", &alone);
    let alias = |service| records(&coredns, KEPT, service).1;
    wait_until("CoreDNS answers with an alias", || (alias("db") == ["CNAME db.example.com."]).then_some(()));
    // A row for each port of the slice; of equal rows CoreDNS leaves out those of addresses only.
    wait_until("CoreDNS knows the other", || (alias("ports") == ["CNAME db.example.com."; 2]).then_some(()));

    // Beside an address it is not ready, and the name keeps its record.
    let (code, said) = harness.register(KEPT, "db", "10.70.0.1", "sql=5432");
    assert_eq!(code, Some(0), "{said}");
    let beside = [("FQDN", "db.example.com", false), ("IPv4", "10.70.0.1", true)];
    wait_for_endpoints(cluster, KEPT, "db", &beside);
    wait_until("CoreDNS answers with the address", || {
        (records(&coredns, KEPT, "db") == (ResponseCode::NoError, vec!["A 10.70.0.1".into()])).then_some(())
    });
    let before = listed(&harness.server, harness.server.grpc);
    let name = before.as_array().expect("a list").iter().find(|one| one["address"] == "db.example.com");
    let name = name.unwrap_or_else(|| panic!("no name in {before}"));
    assert_eq!((&name["weight"], &name["priority"]), (&json!(0.5), &json!(3)), "{name}");
    assert_eq!((&name["host_name"], &name["node_name"]), (&json!("db"), &json!("vm-1")), "{name}");

    // Another process follows it; one with an empty directory restores it; the other takes over and keeps it.
    let replica = Replica::on_standby(&kubeconfig);
    wait_until("the follower has the same", || (listed(&harness.server, replica.grpc) == before).then_some(()));
    harness.server.kill9();
    cluster.release_lease();
    replica.wait_until_it_writes();
    assert_eq!(listed(&harness.server, replica.grpc), before);
    let url = format!("http://{}", replica.grpc);
    let removed = harness.server.run(&["deregister", "db", "10.70.0.1", "-n", KEPT, "--server", &url]);
    assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    wait_for_endpoints(cluster, KEPT, "db", &alone);
    replica.kill();
    cluster.release_lease();
    harness.server = serve_by(&kubeconfig, &[]);
    let restored = listed(&harness.server, harness.server.grpc);
    assert_eq!(restored, json!([name]), "all that is left");
    wait_for_endpoints(cluster, KEPT, "db", &alone);
}

#[test]
fn name_beside_an_address_is_shown_by_its_addresses() {
    const NAMESPACE: &str = "named";
    const EXAMPLE: &str = "example.com.";
    let Some(program) = tools::require("coredns") else { return };
    let Some(knotd) = tools::require("knotd") else { return };
    let zone = |serial: u32, second: &str| {
        format!(
            "{EXAMPLE} 60 IN SOA ns.{EXAMPLE} admin.{EXAMPLE} {serial} 7200 1800 86400 5\n{EXAMPLE} 60 IN NS ns.{EXAMPLE}\n\
             db.{EXAMPLE} 1 IN A 192.0.2.7\ndb.{EXAMPLE} 1 IN A {second}\ndb.{EXAMPLE} 1 IN AAAA 2001:db8::7\n"
        )
    };
    let knot = Knot::start(&knotd, &[(EXAMPLE, zone(1, "192.0.2.8"))]);
    let upstream = knot.address.to_string();
    let Some(mut harness) = MirrorHarness::start(&["--upstream", &upstream]) else { return };
    let cluster = harness.cluster;
    harness.create_namespace(NAMESPACE);
    let register = |harness: &MirrorHarness, address: &str| {
        let (code, said) = harness.register(NAMESPACE, "mixed", address, "sql=5432");
        assert_eq!(code, Some(0), "{said}");
    };
    register(&harness, "db.example.com");
    wait_for_endpoints(cluster, NAMESPACE, "mixed", &[("FQDN", "db.example.com", true)]);

    register(&harness, "10.71.0.1");
    let shown = |second| {
        [
            ("FQDN", "db.example.com", false),
            ("IPv4", "10.71.0.1", true),
            ("IPv4", "192.0.2.7", true),
            ("IPv4", second, true),
            ("IPv6", "2001:db8::7", true),
        ]
    };
    wait_for_endpoints(cluster, NAMESPACE, "mixed", &shown("192.0.2.8"));
    let coredns = CoreDns::with_kubernetes(&program, &cluster.kubeconfig_admin(), CONTEXT);
    let answered = |server: &Server, wanted: &[&str]| {
        let records = |addresses: &[String]| addresses.iter().map(|address| format!("A {address}")).collect::<Vec<_>>();
        let wanted: Vec<String> = wanted.iter().map(ToString::to_string).collect();
        wait_until(&format!("both answer {wanted:?}"), || {
            let mut ours = resolve(server, NAMESPACE, "mixed");
            let (_, mut theirs) = self::records(&coredns, NAMESPACE, "mixed");
            ours.sort();
            theirs.sort();
            (ours == wanted && theirs == records(&wanted)).then_some(())
        });
    };
    answered(&harness.server, &["10.71.0.1", "192.0.2.7", "192.0.2.8"]);

    // They follow the upstream, and an address that is an instance is shown once.
    knot.reload(EXAMPLE, &zone(2, "192.0.2.9"));
    wait_for_endpoints(cluster, NAMESPACE, "mixed", &shown("192.0.2.9"));
    answered(&harness.server, &["10.71.0.1", "192.0.2.7", "192.0.2.9"]);
    register(&harness, "192.0.2.7");
    wait_for_endpoints(cluster, NAMESPACE, "mixed", &shown("192.0.2.9"));

    // Only what was registered is restored.
    let addresses = |harness: &MirrorHarness| -> Vec<String> {
        let url = format!("http://{}", harness.server.grpc);
        let output = harness.server.run(&["ls", "mixed", "-n", NAMESPACE, "--server", &url, "-o", "json"]);
        let list: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let instances = list["instances"].as_array().expect("a list").iter();
        instances.map(|one| one["address"].as_str().expect("text").to_owned()).collect()
    };
    let registered = ["10.71.0.1", "192.0.2.7", "db.example.com"];
    assert_eq!(addresses(&harness), registered);
    harness.restart_empty(&["--upstream", &upstream]);
    assert_eq!(addresses(&harness), registered);
    wait_for_endpoints(cluster, NAMESPACE, "mixed", &shown("192.0.2.9"));

    // A removal is remembered, and takes the addresses along.
    assert_eq!(harness.deregister(NAMESPACE, "mixed", "db.example.com").0, Some(0));
    wait_for_endpoints(cluster, NAMESPACE, "mixed", &[("IPv4", "10.71.0.1", true), ("IPv4", "192.0.2.7", true)]);
    let tombstones = every_slice(cluster, NAMESPACE, "mixed").into_iter();
    let texts: Vec<String> = tombstones
        .filter_map(|slice| Some(slice["metadata"]["annotations"]["gangplank.dev/tombstones"].as_str()?.to_owned()))
        .collect();
    assert!(texts.len() == 1 && texts[0].contains("db.example.com"), "{texts:?}");
}
