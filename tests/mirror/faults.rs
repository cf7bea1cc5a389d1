//! An API server that refuses, conflicts, expires watches, hangs or goes silent, one fault at a time.
//! A proxy counts gangplank's requests, and DNS is probed all the time.

use std::{env, time::Duration};

use gangplank::grpc::proto::registry::RegistrationType;

use super::{
    MirrorHarness, dns_probe::DnsProbe, every_address, make_namespace, private_cluster_lock, resolve, serve_by,
    slice_path, wait_for_addresses,
};
use crate::support::{
    cluster::{Cluster, Who},
    http,
    proxy::{Call, Fault, Proxy},
    server::Server,
    stream::{Stream, message},
    wait_until,
};

/// A gangplank behind a proxy, with `web` at 10.0.0.1 in a namespace of its own.
struct Faulty {
    stream: Stream,
    steady: DnsProbe,
    harness: MirrorHarness,
    proxy: Proxy,
    namespace: &'static str,
}

impl Faulty {
    fn start(namespace: &'static str) -> Option<Self> {
        let (harness, proxy) = MirrorHarness::behind_a_proxy()?;
        let mut stream = Stream::open(harness.server.grpc);
        make_namespace(harness.cluster, &mut stream, namespace);
        assert_eq!(stream.register(namespace, "web", "10.0.0.1").0, 201);
        let steady = DnsProbe::start(harness.server.dns, namespace);
        proxy.forget_calls();
        Some(Self { stream, steady, harness, proxy, namespace })
    }

    fn register(&mut self, service: &str, address: &str) -> u32 {
        let (status, took) = self.stream.register(self.namespace, service, address);
        assert!(took < Duration::from_secs(3), "{status} after {took:?}");
        let shown = resolve(&self.harness.server, self.namespace, service);
        assert!(shown.contains(&address.to_owned()), "DNS has it before the answer: {shown:?}");
        status
    }

    /// What was asked about the objects of the namespace, watches aside.
    fn asked(&self) -> Vec<Call> {
        let ours = |call: &Call| call.namespace == self.namespace && call.verb != "watch" && call.resource != "events";
        self.proxy.calls().into_iter().filter(ours).collect()
    }

    fn count(&self, verb: &str, resource: &str) -> usize {
        self.asked().iter().filter(|call| call.is(verb, resource)).count()
    }

    fn wait_for(&self, service: &str, wanted: &[&str]) {
        wait_for_addresses(self.harness.cluster, self.namespace, service, wanted);
    }

    fn slices(&self, service: &str) -> usize {
        super::slices(self.harness.cluster, self.namespace, service).len()
    }

    /// Waits until the mirror is, or is not, behind with something.
    fn wait_behind(&self, services: f64) {
        wait_until(&format!("the mirror is behind with {services}"), || {
            (self.harness.metric("gangplank_mirror_services_behind") == services).then_some(())
        });
    }

    fn end(self) {
        self.steady.end();
    }
}

/// Matches one verb on slices in a namespace.
fn slices_of(namespace: &'static str, verb: &'static str) -> impl Fn(&Call) -> bool + Send + Sync {
    move |call| call.is(verb, "endpointslices") && call.namespace == namespace
}

/// Matches one verb of the watch of gangplank's own slices. The watch of joined slices has another selector, and may be open
/// for the Services of other tests.
fn is_of_own_slices(call: &Call, verb: &str) -> bool {
    call.is(verb, "endpointslices") && call.path.contains("managed-by%3Dgangplank.dev")
}

/// Matches the first page of a list of every namespace: other tests' objects may fill more of them.
fn is_new_list(call: &Call, resource: &str) -> bool {
    call.is("list", resource) && call.namespace.is_empty() && !call.path.contains("continue=")
}

#[test]
fn retry_after_delays_every_service() {
    let Some(mut on) = Faulty::start("busy") else { return };
    let busy = Fault::answer(429).retry_after(3);
    let busy = on.proxy.inject_first(1, busy, |call| call.namespace == "busy" && call.is_write());
    assert_eq!(on.register("web", "10.0.0.2"), 202);
    assert_eq!(on.register("other", "10.0.1.1"), 202, "another service waits too");
    on.wait_for("web", &["10.0.0.1", "10.0.0.2"]);
    on.wait_for("other", &["10.0.1.1"]);
    let asked = on.asked();
    assert_eq!((asked[0].status, busy.hits()), (Some(429), 1));
    let waited = asked[1].at - asked[0].at;
    assert!(waited >= Duration::from_secs(3), "asked again after {waited:?}: {asked:?}");
    assert_eq!(on.count("update", "endpointslices"), 2, "{asked:?}");
    assert_eq!(on.register("web", "10.0.0.3"), 201);
    on.end();
}

#[test]
fn conflicting_update_is_reread_and_retried() {
    let Some(mut on) = Faulty::start("conflict") else { return };
    on.proxy.inject_first(1, Fault::answer(409), slices_of("conflict", "update"));
    assert_eq!(on.register("web", "10.0.0.2"), 201);
    let asked: Vec<_> = on.asked().iter().map(|call| (call.verb, call.status)).collect();
    assert_eq!(asked, [("update", Some(409)), ("get", Some(200)), ("update", Some(200))]);
    // More conflicts in a row than one attempt retries.
    on.proxy.forget_calls();
    on.proxy.inject_first(9, Fault::answer(409), slices_of("conflict", "update"));
    on.register("web", "10.0.0.3");
    on.wait_for("web", &["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    assert_eq!((on.count("update", "endpointslices"), on.count("get", "endpointslices")), (10, 9), "{:?}", on.asked());
    assert_eq!(on.slices("web"), 1);
    on.end();
}

#[test]
fn expired_watch_lists_once() {
    let Some(on) = Faulty::start("gone") else { return };
    for (fault, times) in [(Fault::ErrorEvent(410), 1), (Fault::answer(410), 1), (Fault::ErrorEvent(410), 4)] {
        on.proxy.forget_calls();
        let gone = on.proxy.inject_first(times, fault, |call| is_of_own_slices(call, "watch"));
        on.proxy.drop_connections();
        let watch = |call: &Call| is_of_own_slices(call, "watch");
        wait_until("the watch is open again", || (gone.hits() == times && on.proxy.count(watch) > times).then_some(()));
        let lists = |resource| on.proxy.count(|call| is_new_list(call, resource));
        let own = on.proxy.count(|call| is_new_list(call, "endpointslices") && is_of_own_slices(call, "list"));
        assert_eq!((own, lists("services"), lists("namespaces")), (times, 0, 0), "{fault:?}");
        // The new watch works: an external change is seen.
        on.harness.cluster.kubectl(&["delete", "endpointslices", "--all", "-n", "gone"]);
        on.wait_for("web", &["10.0.0.1"]);
        on.wait_for("first", &["10.9.9.9"]);
    }
    let own = |call: &Call| is_new_list(call, "endpointslices") && is_of_own_slices(call, "list");
    let lists = on.proxy.calls().into_iter().filter(own);
    let at: Vec<_> = lists.map(|call| call.at).collect();
    let waits: Vec<_> = at.windows(2).map(|pair| pair[1] - pair[0]).collect();
    // A unit test covers how the waits grow: 250 ms at first, jittered down to half of it.
    assert!(waits.iter().all(|wait| *wait >= Duration::from_millis(125)), "no storm: {waits:?}");
    on.end();
}

#[test]
fn failing_api_server_is_retried_with_backoff() {
    let Some(mut on) = Faulty::start("failing") else { return };
    let first = on.proxy.inject_first(4, Fault::answer(500), |call| call.namespace == "failing" && call.is_write());
    let then = on.proxy.inject(Fault::answer(503), |call| call.namespace == "failing" && call.is_write());
    assert_eq!(on.register("web", "10.0.0.2"), 202);
    then.wait_hits(4);
    assert_eq!(first.hits(), 4);
    let failed: Vec<_> = on.asked().into_iter().filter(Call::is_write).map(|call| call.at).collect();
    // A service waits 50 ms at first and twice as long each time, jittered down to half of it.
    let (took, least) = (failed[7] - failed[0], Duration::from_millis(25 * 127));
    assert!(took >= least, "8 attempts within {took:?}");
    then.lift();
    on.wait_for("web", &["10.0.0.1", "10.0.0.2"]);
    assert_eq!(on.register("web", "10.0.0.3"), 201);
    on.end();
}

#[test]
fn refused_slice_does_not_delay_the_other_slices() {
    let Some(mut on) = Faulty::start("quota") else { return };
    assert_eq!(on.register("web", "10.0.0.2"), 201);
    let full = on.proxy.inject(Fault::answer(403), slices_of("quota", "create"));
    assert_eq!(on.stream.register("quota", "web", "2001:db8::1").0, 202, "it needs a slice of its own");
    full.wait_hits(1);
    // What is in another slice than the refused one is confirmed, though the service is behind.
    assert_eq!(on.register("web", "10.0.0.3"), 201);
    assert_eq!(on.register("web", "10.0.0.3"), 200);
    on.wait_behind(1.0);
    assert!(full.hits() <= 3, "{full:?}: a refused slice is not written again with every change");
    // A tombstone needs a slice of its own too, without which an older registration could undo the removal.
    assert_eq!(on.stream.remove("quota", "web", "10.0.0.1").0, 202);
    on.wait_for("web", &["10.0.0.2", "10.0.0.3"]);
    assert_eq!(on.register("web", "10.0.0.4"), 201, "no other word is delayed");
    full.lift();
    on.wait_for("web", &["10.0.0.2", "10.0.0.3", "10.0.0.4", "2001:db8::1"]);
    on.end();
}

#[test]
fn refused_service_does_not_delay_registrations_in_its_slices() {
    let Some(mut on) = Faulty::start("amended") else { return };
    let refused =
        on.proxy.inject(Fault::answer(422), |call| call.is("update", "services") && call.namespace == "amended");
    // Another port, so that the Service changes too.
    let mut other = message(RegistrationType::Register, "amended", "web", "10.0.0.2");
    other.ports[0].name = "admin".into();
    other.ports[0].port = 9090;
    assert_eq!(on.stream.exchange(vec![other]).0, [201]);
    refused.wait_hits(1);
    for n in 3..20 {
        assert_eq!(on.register("web", &format!("10.0.0.{n}")), 201);
    }
    assert!(refused.hits() <= 4, "{refused:?}: the refused Service is not written again with every change");
    on.wait_behind(1.0);
    refused.lift();
    on.wait_behind(0.0);
    on.end();
}

/// Hundreds of services of one namespace behind a webhook that hangs.
#[test]
fn hanging_namespace_does_not_delay_the_others() {
    const HANGING: usize = 300;
    let Some(mut on) = Faulty::start("healthy") else { return };
    make_namespace(on.harness.cluster, &mut on.stream, "stuck");
    let hung = on.proxy.inject(Fault::Hang, |call| call.namespace == "stuck" && call.is_write());
    let many = (0..HANGING).map(|n| {
        message(RegistrationType::Register, "stuck", &format!("s{n}"), &format!("10.1.{}.{}", n / 250, n % 250))
    });
    let (statuses, _) = on.stream.exchange(many.collect());
    assert_eq!(statuses, [202; HANGING]);
    hung.wait_hits(16);
    // Until requests have timed out and are tried again.
    for n in 0.. {
        let service = format!("s{n}");
        assert_eq!(on.register(&service, "10.0.1.1"), 201, "after {hung:?}");
        assert_eq!(on.register(&service, "10.0.1.2"), 201, "after {hung:?}");
        if hung.hits() >= 20 {
            break;
        }
    }
    let asked = |call: &Call| call.namespace == "stuck" && call.is_write();
    assert!(on.proxy.count(asked) < 40, "{}", on.proxy.count(asked));
    hung.lift();
    wait_until("all are mirrored", || (every_address(on.harness.cluster, "stuck").len() == HANGING + 1).then_some(()));
    on.end();
}

/// Every slice was deleted while gangplank was away: all have to be written again.
#[test]
fn registration_does_not_wait_for_the_repair_of_all_slices() {
    const SERVICES: usize = 800;
    let Some(cluster) = Cluster::private() else { return };
    let _lock = private_cluster_lock();
    let kubeconfig = cluster.kubeconfig_for_gangplank();
    let server: Server = serve_by(&kubeconfig, &[]);
    let mut stream = Stream::open(server.grpc);
    make_namespace(&cluster, &mut stream, "repair");
    let many = (0..SERVICES).map(|n| {
        message(RegistrationType::Register, "repair", &format!("s{n}"), &format!("10.1.{}.{}", n / 250, n % 250))
    });
    stream.exchange(many.collect());
    wait_until("all are mirrored", || (every_address(&cluster, "repair").len() == SERVICES + 1).then_some(()));
    let data = server.into_data();
    // As a collection: one by one they would take a minute.
    let deleted = cluster.request(Who::Admin, "DELETE", &slice_path("repair", ""), None);
    assert_eq!(deleted.expect("the API server answers").0, 200);
    wait_until("no slice is left", || every_address(&cluster, "repair").is_empty().then_some(()));
    // Slow enough that it lasts for some seconds on any machine.
    let flags = ["--kubeconfig", kubeconfig.to_str().expect("a path in UTF-8"), "--kubernetes-qps", "100"];
    let server = Server::start_on(data, flags.map(str::to_owned).into());
    let mut stream = Stream::open(server.grpc);
    let waiting = || {
        let (_, text) = http::get(server.admin, "/metrics");
        let length = text.lines().find_map(|line| line.strip_prefix("gangplank_mirror_queue_length "));
        length.expect("it is there").parse::<f64>().expect("a number")
    };
    wait_until("slices are written again", || (waiting() > 0.0).then_some(()));
    let mut during = 0;
    while waiting() > 0.0 {
        // A service that is new, and one that waits for its own turn.
        for service in [format!("new{during}"), format!("s{}", SERVICES - 1 - during)] {
            let (status, took) = stream.register("repair", &service, "10.2.0.1");
            assert_eq!(status, 201, "{service} after {took:?}, while {} wait", waiting());
        }
        during += 1;
    }
    assert!(during >= 3, "{during} rounds during the repair");
}

#[test]
fn write_without_an_answer_is_reread_before_it_is_retried() {
    let Some(mut on) = Faulty::start("hanging") else { return };
    // Stored, but the answer is lost.
    let hung = on.proxy.inject_first(1, Fault::HangAfter, slices_of("hanging", "update"));
    assert_eq!(on.register("web", "10.0.0.2"), 202);
    on.wait_behind(1.0);
    assert_eq!(on.register("other", "10.0.1.1"), 201, "other services go on");
    on.wait_behind(0.0);
    assert_eq!((hung.hits(), on.count("update", "endpointslices"), on.slices("web")), (1, 1, 1), "{:?}", on.asked());
    on.wait_for("web", &["10.0.0.1", "10.0.0.2"]);
    // Not stored.
    let hung = on.proxy.inject_first(1, Fault::Hang, slices_of("hanging", "update"));
    on.proxy.forget_calls();
    assert_eq!(on.register("web", "10.0.0.3"), 202);
    on.wait_for("web", &["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    assert_eq!((hung.hits(), on.count("update", "endpointslices"), on.slices("web")), (1, 2, 1), "{:?}", on.asked());
    assert_eq!(on.register("web", "10.0.0.4"), 201);
    on.end();
}

#[test]
fn create_without_an_answer_is_not_repeated() {
    let Some(mut on) = Faulty::start("dropped") else { return };
    for (service, resource) in [("a", "services"), ("b", "endpointslices")] {
        on.proxy.forget_calls();
        on.proxy.inject_first(1, Fault::DropAfter, move |call| call.is("create", resource));
        on.register(service, "10.0.1.1");
        on.wait_for(service, &["10.0.1.1"]);
        on.wait_behind(0.0);
        assert_eq!((on.count("create", resource), on.slices(service)), (1, 1), "{:?}", on.asked());
        assert_eq!(on.register(service, "10.0.1.2"), 201);
        assert_eq!(on.slices(service), 1);
    }
    on.end();
}

/// A watch is renewed every 50 s, which is when silence is noticed; `GANGPLANK_MIRROR_LONG`
/// waits for it.
#[test]
fn silent_watch_is_restarted() {
    let Some(mut on) = Faulty::start("silent") else { return };
    let silent = on.proxy.inject_first(1, Fault::Stall, |call| call.is("watch", "endpointslices"));
    // Gangplank knows its own writes without the watch.
    assert_eq!(on.register("web", "10.0.0.2"), 201);
    silent.wait_hits(1);
    on.harness.cluster.kubectl(&["delete", "endpointslices", "--all", "-n", "silent"]);
    assert_eq!(on.register("other", "10.0.1.1"), 201);
    if env::var_os("GANGPLANK_MIRROR_LONG").is_none() {
        silent.lift();
    }
    on.wait_for("web", &["10.0.0.1", "10.0.0.2"]);
    on.wait_for("first", &["10.9.9.9"]);
    on.end();
}

#[test]
fn writes_respect_the_rate_limit() {
    const RATE: usize = 20;
    let services = if env::var_os("GANGPLANK_MIRROR_LONG").is_some() { 300 } else { 100 };
    let Some(cluster) = Cluster::private() else { return };
    let _lock = private_cluster_lock();
    let proxy = Proxy::start(&cluster);
    let server: Server = serve_by(proxy.kubeconfig(), &["--kubernetes-qps", &RATE.to_string()]);
    let mut stream = Stream::open(server.grpc);
    make_namespace(&cluster, &mut stream, "rate");
    proxy.forget_calls();
    let steady = DnsProbe::start(server.dns, "rate");
    let register = RegistrationType::Register;
    let bulk =
        (0..services).map(|n| message(register, "rate", &format!("s{n}"), &format!("10.0.{}.{}", n / 250, n % 250)));
    let (statuses, took) = stream.exchange(bulk.collect());
    println!(
        "{services} services: answers within {took:?}, {} with 202",
        statuses.iter().filter(|&&s| s == 202).count()
    );
    assert!(statuses.iter().all(|status| matches!(status, 201 | 202)), "{statuses:?}");
    wait_until("all are mirrored", || (every_address(&cluster, "rate").len() == services + 1).then_some(()));
    let requests = |call: &Call| call.namespace == "rate" && call.verb != "watch" && call.resource != "events";
    let at: Vec<_> = proxy.calls().into_iter().filter(requests).map(|call| call.at).collect();
    let most = |seconds: u64| {
        let within = |first: usize| {
            at[first..].iter().take_while(|one| **one - at[first] < Duration::from_secs(seconds)).count()
        };
        (0..at.len()).map(within).max().unwrap_or_default()
    };
    let late = at.partition_point(|one| *one - at[0] < Duration::from_secs(2));
    let rest = (at.len() - late) as f64 / (at[at.len() - 1] - at[late]).as_secs_f64();
    println!(
        "{} requests in {:?}; at most {} within 1 s, {} within 5 s; {rest:.1}/s after the first 2 s",
        at.len(),
        at[at.len() - 1] - at[0],
        most(1),
        most(5)
    );
    // Twice the rate at once, then the rate; a token more for what comes late.
    assert!(most(1) <= 3 * RATE + 2 && most(5) <= 7 * RATE + 2 && rest <= 1.1 * RATE as f64);
    steady.end();
}
