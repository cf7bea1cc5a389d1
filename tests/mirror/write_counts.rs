//! API writes per instance of a bulk registration, counted at a proxy.
//!
//! `GANGPLANK_MIRROR_BULK` sets the number of instances; `make mirror` takes 10 000.

use std::{
    env,
    time::{Duration, Instant},
};

use gangplank::grpc::proto::registry::RegistrationType;

use super::{every_address, make_namespace, private_cluster_lock, serve_by};
use crate::support::{
    cluster::Cluster,
    proxy::{Call, Proxy},
    stream::{Stream, message},
    wait_until,
};

/// Instances by default: enough for CI.
const BULK: usize = 2_000;

/// Endpoints in a slice.
const SLICE: usize = 100;

struct Bulk {
    stream: Stream,
    cluster: Cluster,
    proxy: Proxy,
    /// 10.N.0.0/16 has the addresses of the next round.
    network: u8,
}

/// In which order instances come.
#[derive(Debug, Clone, Copy)]
enum Order {
    /// All of a service, then all of the next.
    OneByOne,
    /// One instance of each service, then the next of each: every slice is written many times.
    InTurn,
}

impl Bulk {
    /// Registers `instances` under `services` services on one stream, and waits until the slices
    /// have them, `held` in all. Returns the number of writes.
    fn register(&mut self, prefix: &str, services: usize, order: Order, instances: usize, held: usize) -> usize {
        self.proxy.forget_calls();
        self.network += 1;
        let one = |n: usize| {
            let address = format!("10.{}.{}.{}", self.network, n / 250, n % 250);
            let service = match order {
                Order::OneByOne => n * services / instances,
                Order::InTurn => n % services,
            };
            message(RegistrationType::Register, "bulk", &format!("{prefix}{service}"), &address)
        };
        let begun = Instant::now();
        let (statuses, answered) = self.stream.exchange((0..instances).map(one).collect());
        assert!(statuses.iter().all(|status| matches!(status, 201 | 202)));
        wait_until("all are mirrored", || {
            let all = every_address(&self.cluster, "bulk");
            let ours = all.iter().filter(|(service, _)| service.starts_with(prefix));
            (ours.map(|(_, addresses)| addresses.len()).sum::<usize>() == held).then_some(())
        });
        let took = begun.elapsed();
        let write = |call: &Call| call.namespace == "bulk" && call.is_write() && call.resource != "events";
        let writes = self.proxy.count(write);
        println!(
            "{instances} instances into {services} services, {order:?}: {writes} writes, {:.4} each; answered within {answered:.1?}, \
             mirrored within {took:.1?}",
            writes as f64 / instances as f64
        );
        writes
    }
}

#[test]
fn bulk_registration_needs_few_api_writes() {
    let instances = env::var("GANGPLANK_MIRROR_BULK").map_or(BULK, |text| text.parse().expect("a number of instances"));
    let Some(cluster) = Cluster::private() else { return };
    let _lock = private_cluster_lock();
    let proxy = Proxy::start(&cluster);
    let server = serve_by(proxy.kubeconfig(), &[]);
    let mut stream = Stream::open(server.grpc);
    make_namespace(&cluster, &mut stream, "bulk");
    let mut bulk = Bulk { stream, cluster, proxy, network: 0 };
    // Slices of one service are filled one after the other; few are written before they are full.
    let writes = bulk.register("one", 1, Order::OneByOne, instances, instances);
    let least = 1 + instances / SLICE;
    assert!(writes <= least + 4 + least / 16, "{writes} writes, {least} at least");
    // Every service that is new needs two: itself and a slice.
    let services = instances / 10;
    let writes = bulk.register("many", services, Order::OneByOne, instances, instances);
    assert!(writes <= 9 * services / 4, "{writes} writes, {} at least", 2 * services);
    // With services in turn a slice is written again soon; how often depends on timing, but never once
    // for each instance. In the first round every service is new, in the second it exists.
    for held in [instances, 2 * instances] {
        let writes = bulk.register("mixed", services, Order::InTurn, instances, held);
        assert!(writes <= instances * 3 / 4, "{writes} writes of {instances} instances");
    }
}

/// Registrants that register again and again cost a write of their slice each time, but many at once cost one.
#[test]
fn repeated_registrations_of_one_slice_share_its_writes() {
    const INSTANCES: usize = 1_000;
    const INTERVAL: Duration = Duration::from_secs(5);
    let Some(cluster) = Cluster::private() else { return };
    let _lock = private_cluster_lock();
    let proxy = Proxy::start(&cluster);
    let server = serve_by(proxy.kubeconfig(), &["--slice-endpoints", "1000"]);
    let mut stream = Stream::open(server.grpc);
    make_namespace(&cluster, &mut stream, "again");
    let one = |n: usize| {
        let address = format!("10.1.{}.{}", n / 250, n % 250);
        message(RegistrationType::Register, "again", "web", &address)
    };
    let register_all = |stream: &mut Stream| stream.exchange((0..INSTANCES).map(one).collect()).0;
    assert!(register_all(&mut stream).iter().all(|status| matches!(status, 201 | 202)));
    wait_until("all are mirrored", || register_all(&mut stream).iter().all(|status| *status == 200).then_some(()));
    let is_put = |call: &Call| call.is("update", "endpointslices") && call.namespace == "again";

    // All at once, in a loop.
    proxy.forget_calls();
    let begun = Instant::now();
    let mut rounds = 0_usize;
    while begun.elapsed() < Duration::from_secs(3) {
        assert!(register_all(&mut stream).iter().all(|status| matches!(status, 200 | 202)));
        rounds += 1;
    }
    let (puts, took) = (proxy.count(is_put), begun.elapsed().as_secs_f64());
    println!(
        "in a loop: {rounds} rounds of {INSTANCES}, {:.0} registrations/s, {:.1} PUTs/s",
        (rounds * INSTANCES) as f64 / took,
        puts as f64 / took
    );
    assert!(puts as f64 <= 5.0 * took, "{puts} writes of one slice in {took:.1} s");

    // Each every five seconds, evenly: two hundred in a second.
    proxy.forget_calls();
    let (statuses, took) = stream.exchange_evenly((0..INSTANCES).map(one).collect(), INTERVAL);
    let (puts, took) = (proxy.count(is_put), took.as_secs_f64());
    println!("evenly: {:.0} registrations/s, {:.1} PUTs/s", INSTANCES as f64 / took, puts as f64 / took);
    assert!(statuses.iter().all(|status| matches!(status, 200 | 202)));
    assert!(puts as f64 <= 5.0 * took, "{puts} writes of one slice in {took:.1} s");
}
