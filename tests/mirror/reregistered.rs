//! A registration that changes nothing is a word as any other: the slice shows when it was made.

use gangplank::grpc::proto::registry::RegistrationType;
use serde_json::Value;

use super::{MirrorHarness, make_namespace, resolve, slices};
use crate::support::{
    cluster::Cluster,
    proxy::{Call, Fault},
    stream::{Stream, message},
    wait_until,
};

/// The stamps in the slices of a service, by address.
fn stamps(cluster: &Cluster, namespace: &str, service: &str) -> Vec<(String, [u64; 3])> {
    let mut all = Vec::new();
    for slice in slices(cluster, namespace, service) {
        let text = slice["metadata"]["annotations"]["gangplank.dev/instances"].as_str().expect("a record");
        let entries: serde_json::Map<String, Value> = serde_json::from_str(text).expect("JSON");
        all.extend(entries.into_iter().map(|(address, entry)| {
            let stamp = serde_json::from_value(entry["stamp"].clone()).expect("three numbers");
            (address, stamp)
        }));
    }
    all.sort();
    all
}

#[test]
fn repeated_registration_is_in_the_slice_with_its_own_stamp_before_it_gets_200() {
    let Some((harness, proxy)) = MirrorHarness::behind_a_proxy() else { return };
    let mut stream = Stream::open(harness.server.grpc);
    make_namespace(harness.cluster, &mut stream, "repeated");
    assert_eq!(stream.register("repeated", "web", "10.17.0.1").0, 201);
    assert_eq!(stream.register("repeated", "web", "10.17.0.2").0, 201);
    let of = || stamps(harness.cluster, "repeated", "web");
    let before = of();
    let is_put = |call: &Call| call.is("update", "endpointslices") && call.namespace == "repeated";
    let is_write = |call: &Call| call.namespace == "repeated" && call.is_write();

    proxy.forget_calls();
    assert_eq!(stream.register("repeated", "web", "10.17.0.1").0, 200);
    let after = of();
    assert!(after[0].1 > before[0].1, "{after:?} after {before:?}");
    assert_eq!(after[1], before[1], "nobody said anything of that one");
    assert_eq!((proxy.count(is_put), proxy.count(is_write)), (1, 1));
    assert_eq!(resolve(&harness.server, "repeated", "web"), ["10.17.0.1", "10.17.0.2"]);

    // What comes while a write is under way goes into the next one.
    proxy.forget_calls();
    let burst = (0..100).map(|_| message(RegistrationType::Register, "repeated", "web", "10.17.0.2"));
    let (statuses, _) = stream.exchange(burst.collect());
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
    assert!(proxy.count(is_put) <= 4, "{} writes for one burst", proxy.count(is_put));
    let burst = of();
    assert!(burst[1].1 > after[1].1 && burst[0] == after[0], "{burst:?} after {after:?}");

    // As any word it is 202 when Kubernetes does not have it within a second, and follows.
    let hangs = proxy.inject(Fault::Hang, is_put);
    assert_eq!(stream.register("repeated", "web", "10.17.0.1").0, 202);
    assert_eq!(of(), burst);
    hangs.lift();
    wait_until("the stamp follows", || (of()[0].1 > burst[0].1).then_some(()));
}
