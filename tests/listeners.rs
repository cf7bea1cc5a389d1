//! DNS listeners: several addresses, both families, and wildcards.

use std::{
    fs,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::Instant,
};

use hickory_proto::rr::RecordType;

use crate::support::{
    dns::{Over, answers},
    namespace::{self, ip},
    server::Server,
    wait_until,
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

/// Whether an address is in duplicate address detection (RFC 4862 §5.4): nobody can bind or ask it yet.
fn is_tentative(address: Ipv6Addr) -> bool {
    const IFA_F_TENTATIVE: u8 = 0x40;
    let octets: String = address.octets().iter().map(|octet| format!("{octet:02x}")).collect();
    let table = fs::read_to_string("/proc/net/if_inet6").expect("Linux has it");
    let line = table.lines().find(|line| line.starts_with(&octets)).expect("it is an address of ours");
    let flags = line.split_whitespace().nth(4).expect("flags");
    u8::from_str_radix(flags, 16).expect("a number") & IFA_F_TENTATIVE != 0
}

/// Threads of the server, and its sockets of this port in one of the tables below /proc/net.
fn threads(server: &Server) -> usize {
    fs::read_dir(format!("/proc/{}/task", server.pid())).expect("it runs").count()
}

fn sockets(table: &str, port: u16) -> usize {
    // No peer: a TCP socket that listens, a UDP socket that is not connected.
    let own = format!(":{port:04X}");
    let table = fs::read_to_string(format!("/proc/net/{table}")).expect("Linux has it");
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|fields| fields[1].ends_with(&own) && fields[2].ends_with(":0000")).count()
}

/// Addresses that are added after the start are served by the sockets that are there; one in duplicate
/// address detection delays nothing.
#[test]
fn wildcard_starts_beside_a_tentative_address_and_answers_from_each_later_one() {
    if !namespace::entered("listeners::wildcard_starts_beside_a_tentative_address_and_answers_from_each_later_one") {
        return;
    }
    const THREADS: usize = 2;
    const LATER: u16 = 100; // of each family
    let tentative = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    ip(["link set lo up", "link add left type veth peer name right"]);
    // One second each.
    fs::write("/proc/sys/net/ipv6/conf/left/dad_transmits", "3").expect("the namespace is ours");
    ip(["link set left up", "link set right up", &format!("addr add {tentative}/64 dev left")]);
    assert!(is_tentative(tentative));
    let begun = Instant::now();
    let server = Server::start_with(&[
        "--dns-listen",
        "[::]:0",
        "--dns-listen",
        "0.0.0.0:0",
        "--dns-threads",
        &THREADS.to_string(),
    ]);
    let started = begun.elapsed();
    assert!(is_tentative(tentative), "the start did not wait for it: {started:?}");
    server.register("prod", "web", "10.0.0.1", "http=8080");
    let wildcards: Vec<SocketAddr> =
        dns_addresses(&server).into_iter().filter(|address| address.ip().is_unspecified()).collect();
    let [v6, v4] = ["v6", "v4"].map(|family| {
        let found = wildcards.iter().find(|address| address.is_ipv6() == (family == "v6"));
        found.expect("a wildcard of each family").port()
    });
    let open = || [("udp6", v6), ("tcp6", v6), ("udp", v4), ("tcp", v4)].map(|(table, port)| sockets(table, port));
    assert_eq!(open(), [THREADS, 1, THREADS, 1]);
    let before = threads(&server);

    let later: Vec<SocketAddr> = (1..=LATER)
        .flat_map(|n| {
            let [high, low] = n.to_be_bytes();
            let six = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 1, n);
            [SocketAddr::from((six, v6)), SocketAddr::from(([10, 77, high, low], v4))]
        })
        .collect();
    ip(later.iter().map(|address| match address.ip() {
        IpAddr::V6(six) => format!("addr add {six}/64 dev left nodad"),
        IpAddr::V4(four) => format!("addr add {four}/32 dev left"),
    }));
    let begun = Instant::now();
    for address in &later {
        // The client is connected: an answer from elsewhere is lost.
        assert_answers(&server, *address);
    }
    println!("started in {started:?}; {} later addresses answer twice in {:?}", later.len(), begun.elapsed());
    assert_eq!(open(), [THREADS, 1, THREADS, 1], "one socket for each thread and one for TCP, whatever is added");
    assert_eq!(threads(&server), before);
    wait_until("duplicate address detection is over", || (!is_tentative(tentative)).then_some(()));
    assert_answers(&server, SocketAddr::from((tentative, v6)));
}
