//! A namespace's annotation says how many instances it may have.

use super::MirrorHarness;
use crate::support::wait_until;

#[test]
fn annotation_of_a_namespace_limits_its_instances() {
    let Some(harness) = MirrorHarness::start(&[]) else { return };
    harness.create_namespace("counted");
    let annotate = |value: &str| {
        let value = format!("gangplank.dev/max-instances{value}");
        harness.cluster.kubectl(&["annotate", "namespace", "counted", "--overwrite", &value]);
    };
    let mut addresses = (1..=250).map(|last| format!("10.71.0.{last}"));
    let mut register = |address: Option<&str>| {
        // What is registered already may be said again, so each attempt is a new one.
        let address = address.map_or_else(|| addresses.next().expect("another one"), str::to_owned);
        let output = harness.server.run(&["register", "web", &address, "-n", "counted"]);
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert!(register(None).0);
    for (value, why) in [
        ("=1", "counted has 1 instances or more, which is its limit (annotation gangplank.dev/max-instances)"),
        ("=many", "the annotation gangplank.dev/max-instances of counted is not a number"),
    ] {
        annotate(value);
        wait_until(why, || register(None).1.contains(why).then_some(()));
    }
    assert!(harness.server.stderr().contains("the annotation is not a number"), "{}", harness.server.stderr());
    assert!(register(Some("10.71.0.1")).0, "what is there may be said again");
    annotate("-");
    wait_until("no limit", || register(None).0.then_some(()));
}
