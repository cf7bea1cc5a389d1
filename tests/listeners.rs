//! DNS listeners: several addresses, both families, and wildcards.

use std::net::SocketAddr;

use hickory_proto::rr::RecordType;

use crate::support::{
    dns::{Over, answers},
    server::Server,
};

/// Every address on which the server says that it answers DNS.
fn dns_addresses(server: &Server) -> Vec<SocketAddr> {
    let lines = server.greeting.iter().filter_map(|line| line.strip_prefix("listening dns "));
    lines.map(|address| address.parse().expect("an address and a port")).collect()
}

fn assert_answers(server: &Server, address: SocketAddr) {
    for over in [Over::Udp, Over::Tcp] {
        let found = answers(address, over, "web.prod.svc.cluster.local.", RecordType::A);
        assert_eq!(found, ["10.0.0.1"], "{address} over {over:?}, of {:?}", server.greeting);
    }
}

#[test]
fn every_address_answers_over_udp_and_tcp() {
    let server = Server::start_with(&["--dns-listen", "[::1]:0", "--dns-listen", "127.0.0.1:0"]);
    server.register("prod", "web", "10.0.0.1", "http=8080");
    let addresses = dns_addresses(&server);
    assert_eq!(addresses.len(), 3, "{:?}", server.greeting);
    assert!(addresses.iter().any(SocketAddr::is_ipv6));
    for address in addresses {
        assert_answers(&server, address);
    }
}

#[test]
fn wildcard_answers_on_every_address() {
    let server = Server::start_with(&["--dns-listen", "0.0.0.0:0"]);
    server.register("prod", "web", "10.0.0.1", "http=8080");
    let addresses = dns_addresses(&server);
    let wildcard = addresses.iter().find(|address| address.ip().is_unspecified()).expect("one of the two");
    // All of 127.0.0.0/8 is this machine's. The client is connected: an answer from elsewhere is lost.
    for last in 1..=100 {
        assert_answers(&server, SocketAddr::from(([127, 8, 8, last], wildcard.port())));
    }
}
