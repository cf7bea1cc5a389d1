//! An Event on the Lease says who writes, at every change.

use serde_json::Value;

use super::{ClusterLock, MirrorHarness, replica::Replica, serve_by};
use crate::support::{cluster::Cluster, wait_until};

/// Holder and term as the Lease has them.
fn holder(cluster: &Cluster) -> (String, String) {
    let lease = cluster.kubectl(&["get", "lease", "gangplank-writer", "-n", "gangplank", "-o", "json"]);
    let lease: Value = serde_json::from_str(&lease).expect("JSON");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    (text(&lease["spec"]["holderIdentity"]), text(&lease["metadata"]["annotations"]["gangplank.dev/term"]))
}

/// The Event of which the note contains all of these.
fn wait_for_event(cluster: &Cluster, parts: &[&str]) -> Value {
    wait_until("the Event is there", || {
        let events = ["get", "events", "-n", "gangplank", "--field-selector", "reason=WriterChanged", "-o", "json"];
        let events: Value = serde_json::from_str(&cluster.kubectl(&events)).expect("JSON");
        let events = events["items"].as_array().expect("a list");
        let holds =
            |event: &&Value| parts.iter().all(|part| event["message"].as_str().is_some_and(|m| m.contains(part)));
        events.iter().find(holds).cloned()
    })
}

#[test]
fn event_on_the_lease_names_the_old_and_the_new_writer() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let mut harness =
        MirrorHarness { server: serve_by(&kubeconfig, &["--drain", "1s"]), cluster: lock.cluster, _lock: lock };
    let (first, first_term) = holder(harness.cluster);
    wait_for_event(harness.cluster, &[&format!("{first} writes under term {first_term};")]);

    // One leaves, the next one is killed.
    let second = Replica::on_standby(&kubeconfig);
    assert!(harness.server.terminate().success());
    second.wait_until_it_writes();
    let (name, term) = holder(harness.cluster);
    let note = format!("{name} writes under term {term}; before, {first} wrote under term {first_term}");
    let event = wait_for_event(harness.cluster, &[&note]);
    assert_eq!(event["involvedObject"]["kind"], "Lease");
    assert_eq!(event["involvedObject"]["name"], "gangplank-writer");
    assert_eq!(event["type"], "Normal");
    let described = harness.cluster.kubectl(&["describe", "lease", "gangplank-writer", "-n", "gangplank"]);
    assert!(described.contains(&note), "{described}");

    let third = Replica::on_standby(&kubeconfig);
    second.kill();
    third.wait_until_it_writes();
    let (last, last_term) = holder(harness.cluster);
    let note = format!("{last} writes under term {last_term}; before, {name} wrote under term {term}");
    wait_for_event(harness.cluster, &[&note]);
}
