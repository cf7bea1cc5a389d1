//! Acknowledged registrations survive `kill -9`: nothing is lost, nothing removed returns.
//!
//! Clients load the server ([`Clients`]). At a random number of acknowledgements it is killed and
//! started again on the same directory, and what it then serves is compared with what they recorded.
//!
//! `GANGPLANK_CRASH_CYCLES` sets the number of cycles; `make crash` runs the long form.

use std::env;

use crate::support::{ledger::Clients, server::Server};

/// Cycles by default: enough for CI.
const CYCLES: usize = 20;

#[test]
fn acknowledged_registrations_survive_kill_9() {
    let cycles = env::var("GANGPLANK_CRASH_CYCLES").map_or(CYCLES, |text| text.parse().expect("a number of cycles"));
    let clients = Clients::new("crash", false);
    // Small segments, so that the kill also meets rotations and compactions.
    let mut server = Server::start_with(&["--segment-bytes", "65536"]);
    let mut acknowledged = 0;
    for cycle in 0..cycles {
        let load = clients.run(server.grpc);
        load.wait_acknowledged(fastrand::usize(1..20_000));
        server.kill9();
        acknowledged += load.join();
        server = server.restart();
        clients.check(&format!("cycle {cycle}"), &server);
    }
    println!("{cycles} kills, {acknowledged} acknowledgements, 0 lost, 0 back");
}
