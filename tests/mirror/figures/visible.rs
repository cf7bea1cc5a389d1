//! From the acknowledgement of a registration until every follower answers with it, beside CoreDNS' kubernetes plugin, which
//! watches the same slice.

use std::time::Instant;

use super::{percentiles, rounds, seen};
use crate::{
    mirror::{make_namespace, replica::Replica, serve_by},
    support::{
        cluster::{CONTEXT, Cluster},
        coredns::CoreDns,
        stream::Stream,
        tools,
    },
};

#[test]
fn acknowledged_registration_on_every_follower_beside_coredns() {
    let Some(program) = tools::require("coredns") else { return };
    let Some(cluster) = Cluster::private() else { return };
    // Asking for one releases the Lease, so all processes share it.
    let kubeconfig = cluster.kubeconfig_for_gangplank();
    let server = serve_by(&kubeconfig, &[]);
    let mut stream = Stream::open(server.grpc);
    make_namespace(&cluster, &mut stream, "figures");
    let followers = [(); 2].map(|()| Replica::on_standby(&kubeconfig));
    let coredns = CoreDns::with_kubernetes(&program, &cluster.kubeconfig_admin(), CONTEXT);
    seen(coredns.address, "first", "10.9.9.9", Instant::now());

    // One at a time, in turns: whoever is asked has the machine for itself.
    let asked = [followers[0].dns, followers[1].dns, coredns.address];
    let mut times = asked.map(|_| Vec::new());
    for round in 0..times.len() * rounds() {
        let address = format!("10.51.{}.{}", round / 250, round % 250);
        let service = format!("seen-{round}");
        let (status, _) = stream.register("figures", &service, &address);
        let acknowledged = Instant::now();
        assert!(matches!(status, 201 | 202), "{status}");
        let which = round % asked.len();
        times[which].push(seen(asked[which], &service, &address, acknowledged));
    }
    let sorted = times.map(|mut times| {
        times.sort_unstable();
        times
    });
    for (times, who) in sorted.iter().zip(["one follower", "the other one", "CoreDNS, from the slice"]) {
        percentiles(&format!("acknowledged, then answered by {who}"), times.clone());
    }
    for percent in [50, 99] {
        let [one, other, theirs] =
            sorted.each_ref().map(|times| times[(times.len() - 1) * percent / 100].as_secs_f64());
        println!("acknowledged → visible, p{percent}: the later follower ÷ CoreDNS {:.3}", one.max(other) / theirs);
    }
}
