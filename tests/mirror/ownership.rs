//! Who has registered an instance stands in its slice: whoever writes next knows it.

use serde_json::Value;
use tempfile::TempDir;

use super::{ClusterLock, make_namespace, replica::Replica, slices};
use crate::{
    identity::{
        connect,
        ownership::{Registrant, TEAM_POLICY},
        pki::TestCa,
        security_flags,
    },
    support::{http, stream::Stream, wait_until},
};

#[test]
fn registrant_counts_at_the_next_writer_and_is_shown_by_followers() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let (ca, files) = (TestCa::new(), TempDir::new().expect("a temporary directory can be made"));
    let flags = security_flags(&ca, files.path(), TEAM_POLICY);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let client = |replica: &Replica, user: &str| {
        let credential = ca.sign(user, &["web"]);
        let channel = runtime.block_on(connect(replica.grpc, &ca, Some(&credential))).expect("a handshake");
        Registrant::new(channel, "owned")
    };
    let first = Replica::start_with(&kubeconfig, TempDir::new().expect("a temporary directory can be made"), &flags);
    first.wait_until_it_writes();
    make_namespace(lock.cluster, &mut Stream::open(first.grpc), "owned");
    let mut vm = client(&first, "vm-1");
    assert_eq!(runtime.block_on(vm.register("10.70.0.1", 1.0)).0, 201);
    assert_eq!(runtime.block_on(client(&first, "vm-2").remove("10.70.0.1")).0, 409);
    assert_eq!(first.register("owned", "web", "10.70.0.2"), 201, "in plaintext: nobody's");
    let found = slices(lock.cluster, "owned", "web");
    let records = found.iter().filter_map(|slice| slice["metadata"]["annotations"]["gangplank.dev/instances"].as_str());
    let records: Vec<Value> = records.map(|text| serde_json::from_str(text).expect("JSON")).collect();
    let of = |address: &str| records.iter().find_map(|record| record.get(address)).expect("a record");
    assert_eq!(of("10.70.0.1")["registrant"], "vm-1");
    assert_eq!(of("10.70.0.2").get("registrant"), None);

    let second = Replica::on_standby_with(&kubeconfig, &flags);
    wait_until("the follower shows it", || {
        http::get(second.admin, "/api/v1/services").1.contains("\"registrant\":\"vm-1\"").then_some(())
    });
    // Without its directory.
    drop(first.terminate());
    second.wait_until_it_writes();
    let mut other = client(&second, "vm-2");
    let (status, details) = runtime.block_on(other.remove("10.70.0.1"));
    assert!(status == 409 && details.contains("is registered by vm-1"), "{status} {details}");
    assert_eq!(runtime.block_on(other.register("10.70.0.2", 1.0)).0, 200, "nobody's");
    assert_eq!(runtime.block_on(client(&second, "vm-1").remove("10.70.0.2")).0, 409);
    assert_eq!(runtime.block_on(client(&second, "vm-1").remove("10.70.0.1")).0, 204);
}
