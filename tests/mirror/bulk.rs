//! What a bulk of registrations costs: API writes per instance, counted at a proxy.
//!
//! `GANGPLANK_MIRROR_BULK` sets the number of instances; `make mirror` takes 10 000.

use std::{env, time::Instant};

use gangplank::grpc::proto::registry::RegistrationType;

use super::{make_namespace, serve_by, turn};
use crate::support::{
    cluster::Cluster,
    proxy::{Call, Proxy},
    stream::{Stream, message},
    wait_until,
};

/// Instances where nothing else is said: enough for CI.
const BULK: usize = 2_000;

/// Endpoints in a slice.
const SLICE: usize = 100;

struct Bulk {
    stream: Stream,
    cluster: Cluster,
    proxy: Proxy,
}

impl Bulk {
    /// Registers `instances` in turn under `services` services on one stream, and waits until the
    /// slices have them, `held` in all. Gives back the number of writes.
    fn register(&mut self, prefix: &str, network: u8, services: usize, instances: usize, held: usize) -> usize {
        self.proxy.forget_calls();
        let one = |n: usize| {
            let address = format!("10.{network}.{}.{}", n / 250, n % 250);
            message(RegistrationType::Register, "bulk", &format!("{prefix}{}", n % services), &address)
        };
        let begun = Instant::now();
        let (statuses, answered) = self.stream.exchange((0..instances).map(one).collect());
        assert!(statuses.iter().all(|status| matches!(status, 201 | 202)));
        wait_until("all are mirrored", || {
            let all = super::every_address(&self.cluster, "bulk");
            let ours = all.iter().filter(|(service, _)| service.starts_with(prefix));
            (ours.map(|(_, addresses)| addresses.len()).sum::<usize>() == held).then_some(())
        });
        let took = begun.elapsed();
        let write = |call: &Call| call.namespace == "bulk" && call.is_write() && call.resource != "events";
        let writes = self.proxy.count(write);
        println!(
            "{instances} instances into {services} services: {writes} writes, {:.4} each; answered within {answered:.1?}, \
             mirrored within {took:.1?}",
            writes as f64 / instances as f64
        );
        writes
    }
}

#[test]
fn a_bulk_of_registrations_costs_few_writes() {
    let instances = env::var("GANGPLANK_MIRROR_BULK").map_or(BULK, |text| text.parse().expect("a number of instances"));
    let Some(cluster) = Cluster::private() else { return };
    let _turn = turn();
    let proxy = Proxy::start(&cluster);
    let server = serve_by(proxy.kubeconfig(), &[]);
    let mut stream = Stream::open(server.grpc);
    make_namespace(&cluster, &mut stream, "bulk");
    let mut bulk = Bulk { stream, cluster, proxy };
    // Slices of one service are filled one after the other; few are written before they are full.
    let writes = bulk.register("one", 1, 1, instances, instances);
    let least = 1 + instances / SLICE;
    assert!(writes <= least + 4, "{writes} writes, {least} at least");
    // Every service that is new needs two: itself and a slice.
    let services = instances / 10;
    let writes = bulk.register("many", 2, services, instances, instances);
    assert!(writes <= 5 * services / 2, "{writes} writes, {} at least", 2 * services);
    let writes = bulk.register("many", 3, services, instances, 2 * instances);
    assert!(writes <= 3 * services / 2, "{writes} writes, {services} at least");
}
