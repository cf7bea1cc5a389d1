//! Gangplank or the API server is killed during writes, many times: the slices converge to what was
//! acknowledged, and removed instances do not return.
//!
//! `GANGPLANK_MIRROR_KILLS` and `GANGPLANK_MIRROR_OUTAGES` set how often; `make mirror` runs the
//! long form.

use std::env;

use super::{every_address, make_namespace, private_cluster_lock, serve};
use crate::support::{cluster::Cluster, ledger::Clients, stream::Stream, wait_until};

/// Few endpoints in a slice, so that services have several.
const FLAGS: &[&str] = &["--slice-endpoints", "4", "--segment-bytes", "65536"];

/// Cycles by default: enough for CI.
const KILLS: usize = 6;
const OUTAGES: usize = 2;

fn times(variable: &str, otherwise: usize) -> usize {
    env::var(variable).map_or(otherwise, |text| text.parse().expect("a number of cycles"))
}

fn converges(cluster: &Cluster, clients: &Clients) {
    wait_until("the slices hold what was acknowledged", || clients.agree_with(&every_address(cluster, "cycles")));
}

#[test]
fn slices_converge_after_gangplank_is_killed_during_writes() {
    let cycles = times("GANGPLANK_MIRROR_KILLS", KILLS);
    let Some(cluster) = Cluster::private() else { return };
    let _lock = private_cluster_lock();
    let mut server = serve(&cluster, FLAGS);
    make_namespace(&cluster, &mut Stream::open(server.grpc), "cycles");
    let clients = Clients::new("cycles", true);
    let mut acknowledged = 0;
    for cycle in 0..cycles {
        let load = clients.run(server.grpc);
        load.wait_acknowledged(fastrand::usize(1..2_000));
        server.kill9();
        acknowledged += load.join();
        server = server.restart();
        clients.check(&format!("cycle {cycle}"), &server);
        // Every second kill hits the work that is left from the one before.
        if cycle % 2 == 1 {
            converges(&cluster, &clients);
        }
    }
    converges(&cluster, &clients);
    // Everything that was registered, not only the addresses, is in the slices.
    server.kill9();
    server = serve(&cluster, FLAGS);
    clients.check("an empty disk", &server);
    converges(&cluster, &clients);
    println!("{cycles} kills of gangplank, {acknowledged} acknowledgements, 0 lost, 0 back");
}

#[test]
fn slices_converge_after_the_api_server_is_killed_during_writes() {
    let cycles = times("GANGPLANK_MIRROR_OUTAGES", OUTAGES);
    let Some(mut cluster) = Cluster::private() else { return };
    let _lock = private_cluster_lock();
    let server = serve(&cluster, FLAGS);
    make_namespace(&cluster, &mut Stream::open(server.grpc), "cycles");
    let clients = Clients::new("cycles", true);
    let mut acknowledged = 0;
    for cycle in 0..cycles {
        let load = clients.run(server.grpc);
        load.wait_acknowledged(fastrand::usize(1..2_000));
        cluster.kill_api_server();
        load.wait_accepted();
        cluster.start_api_server();
        acknowledged += load.stop();
        clients.check(&format!("cycle {cycle}"), &server);
        converges(&cluster, &clients);
    }
    println!("{cycles} kills of the API server, {acknowledged} acknowledgements, 0 lost, 0 back");
}
