//! A process on standby knows how old its answers may be, says so, and is no longer ready when they are too old.

use std::time::Instant;

use hickory_proto::rr::RecordType;
use serde_json::Value;

use super::{ClusterLock, MirrorHarness, dns_name, replica::Replica, serve_by};
use crate::support::{
    dns::{Over, answers},
    http,
    proxy::{Call, Fault, Proxy},
    wait_until,
};

/// The age of what a process on standby answers, as its readiness and its metrics say, in seconds.
fn ages(replica: &Replica) -> (u16, f64, f64) {
    let (status, page) = http::get(replica.admin, "/readyz?format=json");
    let page: Value = serde_json::from_str(&page).expect("JSON");
    let (_, metrics) = http::get(replica.admin, "/metrics");
    let metric = metrics.lines().find_map(|line| line.strip_prefix("gangplank_kubernetes_watch_age_seconds "));
    let metric = metric.expect("it is there").parse().expect("a number");
    (status, page["checks"][0]["age_seconds"].as_f64().expect("it follows"), metric)
}

#[test]
fn process_that_is_cut_off_is_old_and_then_not_ready() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let proxy = Proxy::start(lock.cluster);
    let harness = MirrorHarness { server: serve_by(&kubeconfig, &[]), cluster: lock.cluster, _lock: lock };
    harness.create_namespace("stale");
    assert_eq!(harness.register("stale", "web", "10.16.0.1", "http=80").0, Some(0));
    let patient = Replica::on_standby(proxy.kubeconfig());
    let strict = Replica::on_standby_with(proxy.kubeconfig(), &["--max-staleness", "5s"]);
    let a = |dns| answers(dns, Over::Udp, &dns_name("stale", "web"), RecordType::A);
    assert_eq!(a(strict.dns), ["10.16.0.1"]);
    // Nothing changes in the slices, and yet both know that they have everything.
    let quiet = Instant::now();
    wait_until("a quiet while has passed", || {
        for replica in [&patient, &strict] {
            let (status, age, metric) = ages(replica);
            assert!(status == 200 && age < 5.0 && metric < 5.0, "{status}, {age} s, {metric} s");
        }
        (quiet.elapsed().as_secs() >= 8).then_some(())
    });

    // Connections stay open, and nothing passes.
    let hung = proxy.inject(Fault::Hang, |_| true);
    let stalled = proxy.inject(Fault::Stall, |_| true);
    let cut = Instant::now();
    assert_eq!(harness.register("stale", "web", "10.16.0.2", "http=80").0, Some(0));
    wait_until("it is not ready", || (http::get(strict.admin, "/readyz").0 == 503).then_some(()));
    println!("not ready {:?} after the cut, with --max-staleness 5s", cut.elapsed());
    let said = http::get(strict.admin, "/readyz").1;
    assert!(said.starts_with("not ready: dns: on standby: what "), "{said}");
    let (status, age, metric) = ages(&patient);
    assert!(status == 200 && age > 5.0 && metric >= age - 0.1, "{status}, {age} s, {metric} s");
    for replica in [&patient, &strict] {
        assert_eq!(a(replica.dns), ["10.16.0.1"], "names are answered as before");
    }

    stalled.lift();
    hung.lift();
    wait_until("it is ready again", || (http::get(strict.admin, "/readyz").0 == 200).then_some(()));
    for replica in [&patient, &strict] {
        let both = || (a(replica.dns) == ["10.16.0.1", "10.16.0.2"]).then_some(());
        wait_until("it has what was missing", both);
        wait_until("it is current", || (ages(replica).1 < 5.0).then_some(()));
    }
}

/// No slice shows the new writer's term and generation, because it has nothing to write.
#[test]
fn idle_follower_keeps_its_watch_after_a_take_over() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let proxy = Proxy::start(lock.cluster);
    let mut harness =
        MirrorHarness { server: serve_by(&kubeconfig, &["--drain", "1s"]), cluster: lock.cluster, _lock: lock };
    harness.create_namespace("idle");
    assert_eq!(harness.register("idle", "web", "10.17.1.1", "http=80").0, Some(0));
    // Two of them would compete for the Lease.
    let second = Replica::on_standby(&kubeconfig);
    let no_lease = proxy.inject(Fault::answer(403), |call| call.is_write() && call.resource == "leases");
    let follower = Replica::on_standby_with(proxy.kubeconfig(), &["--max-staleness", "10s"]);
    assert!(harness.server.terminate().success());
    second.wait_until_it_writes();
    proxy.forget_calls();
    wait_until("the Lease was read twelve times, in 24 s", || {
        assert_eq!(http::get(follower.admin, "/readyz").0, 200);
        (proxy.count(|call| call.is("get", "leases")) >= 12).then_some(())
    });
    let opened = proxy.count(|call| call.is("watch", "endpointslices"));
    println!("the watch was opened {opened} times in 24 s");
    assert!(opened <= 4, "{opened}: two to learn that nothing is missing, and two in their time");
    assert!(ages(&follower).1 < 5.0);
    no_lease.lift();
}

/// The Lease, which is read over another connection, says that something is missing.
#[test]
fn watch_that_has_fallen_silent_is_renewed_within_seconds() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let proxy = Proxy::start(lock.cluster);
    let harness = MirrorHarness { server: serve_by(&kubeconfig, &[]), cluster: lock.cluster, _lock: lock };
    harness.create_namespace("silent-watch");
    assert_eq!(harness.register("silent-watch", "web", "10.17.0.1", "http=80").0, Some(0));
    let follower = Replica::on_standby(proxy.kubeconfig());
    let of_slices = |call: &Call| call.is("watch", "endpointslices");
    wait_until("the slices are watched", || (proxy.count(of_slices) > 0).then_some(()));
    let stalled = proxy.inject_first(1, Fault::Stall, of_slices);
    let before = proxy.count(of_slices);
    let begun = Instant::now();
    assert_eq!(harness.register("silent-watch", "web", "10.17.0.2", "http=80").0, Some(0));
    let a = || answers(follower.dns, Over::Udp, &dns_name("silent-watch", "web"), RecordType::A);
    wait_until("it has what was missing", || (a().len() == 2).then_some(()));
    println!("seen {:?} after the watch fell silent, by {} watches", begun.elapsed(), proxy.count(of_slices) - before);
    assert!(begun.elapsed().as_secs() < 20, "the watch was renewed in its time only");
    stalled.lift();
}
