//! What the services of gangplank cost etcd and the API server on top of as many native ones: a Service and a slice each, with
//! the same number of endpoints.

use gangplank::grpc::proto::registry::RegistrationType;
use serde_json::json;

use super::{resident, rounds};
use crate::{
    mirror::{every_address, make_namespace, serve, service_path, slice_path},
    support::{
        cluster::{Cluster, Who},
        http,
        stream::{Stream, message},
        wait_until,
    },
};

/// Services of each kind, for each round that is asked for, and endpoints of each.
const SERVICES_PER_ROUND: usize = 10;
const ENDPOINTS: usize = 3;

/// Bytes in etcd's database, on the API server's heap after a collection, and resident there.
#[derive(Debug, Clone, Copy)]
struct Stored {
    database: f64,
    heap: f64,
    resident: f64,
}

impl Stored {
    fn now(cluster: &Cluster) -> Self {
        let value = |text: &str, series: &str| -> f64 {
            let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
            value.unwrap_or_else(|| panic!("no {series}")).parse().expect("a number")
        };
        // Asking for the profile with gc=1 collects garbage first.
        cluster.kubectl(&["get", "--raw", "/debug/pprof/heap?gc=1"]);
        let heap = value(&cluster.kubectl(&["get", "--raw", "/metrics"]), "go_memstats_heap_alloc_bytes");
        let (_, etcd) = http::get(cluster.etcd(), "/metrics");
        Self {
            database: value(&etcd, "etcd_mvcc_db_total_size_in_use_in_bytes"),
            heap,
            resident: (resident(cluster.api_server_pid()) << 10) as f64,
        }
    }
}

fn create(cluster: &Cluster, path: &str, object: &serde_json::Value) -> serde_json::Value {
    let (status, answer) = cluster.request(Who::Admin, "POST", path, Some(object)).expect("the API server runs");
    assert_eq!(status, 201, "{answer}");
    answer
}

/// A Service with a selector, and its slice as the controller of EndpointSlices writes it.
fn native(cluster: &Cluster, n: usize) {
    let name = format!("native-{n}");
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"clusterIP": "None", "selector": {"app": name}, "ports": [{"name": "http", "port": 8080}]}});
    let uid = create(cluster, &service_path("native", ""), &service)["metadata"]["uid"].clone();
    let endpoints: Vec<_> = (0..ENDPOINTS)
        .map(|endpoint| {
            json!({"addresses": [format!("10.70.{}.{}", n / 80, n % 80 * 3 + endpoint)], "nodeName": format!("node-{endpoint}"),
                "zone": "zone-a", "conditions": {"ready": true, "serving": true, "terminating": false},
                "targetRef": {"kind": "Pod", "namespace": "native", "name": format!("{name}-5d4b8c7f9-{endpoint:05}"), "uid": uid}})
        })
        .collect();
    let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("{name}-abcde"), "generateName": format!("{name}-"),
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z"},
            "labels": {"kubernetes.io/service-name": name, "service.kubernetes.io/headless": "",
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": name, "uid": uid, "controller": true,
                "blockOwnerDeletion": true}]},
        "endpoints": endpoints, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]});
    create(cluster, &slice_path("native", ""), &slice);
}

#[test]
fn services_of_gangplank_beside_native_ones_in_etcd_and_the_api_server() {
    let Some(cluster) = Cluster::private() else { return };
    let services = rounds() * SERVICES_PER_ROUND;
    let server = serve(&cluster, &[]);
    let mut stream = Stream::open(server.grpc);
    make_namespace(&cluster, &mut stream, "figures");
    cluster.create_namespace("native");

    let empty = Stored::now(&cluster);
    (0..services).for_each(|n| native(&cluster, n));
    let natives = Stored::now(&cluster);
    let registrations = (0..services * ENDPOINTS).map(|n| {
        let mut message = message(
            RegistrationType::Register,
            "figures",
            &format!("ours-{}", n / ENDPOINTS),
            &format!("10.71.{}.{}", n / 240, n % 240),
        );
        message.node_name = format!("node-{}", n % ENDPOINTS);
        message
    });
    stream.exchange(registrations.collect());
    wait_until("all are mirrored", || {
        let all = every_address(&cluster, "figures");
        (all.values().map(Vec::len).sum::<usize>() == services * ENDPOINTS + 1).then_some(())
    });
    let both = Stored::now(&cluster);

    println!(
        "{services} native headless Services of {ENDPOINTS} endpoints, then as many of gangplank; KiB for each Service:"
    );
    let row = |what: &str, of: fn(&Stored) -> f64| {
        let each = |after: &Stored, before: &Stored| (of(after) - of(before)) / services as f64 / 1024.0;
        let (native, ours) = (each(&natives, &empty), each(&both, &natives));
        println!("{what}: native {native:.2}, ours {ours:.2}, ratio {:.2}", ours / native);
    };
    row("etcd, database in use", |stored| stored.database);
    row("API server, heap after a collection", |stored| stored.heap);
    row("API server, resident", |stored| stored.resident);
}
