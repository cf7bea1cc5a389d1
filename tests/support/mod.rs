//! What the tests share: the real binary as a child process, raw DNS and HTTP clients, and
//! third-party programs.
//!
//! Nothing here sleeps. Tests wait for a line, an answer or an exit; after [`WAIT_TIMEOUT`] they fail
//! and print what they waited for.

pub(crate) mod cluster;
pub(crate) mod coredns;
pub(crate) mod dns;
pub(crate) mod http;
pub(crate) mod https;
pub(crate) mod knot;
pub(crate) mod ledger;
pub(crate) mod namespace;
pub(crate) mod proxy;
pub(crate) mod secrets;
pub(crate) mod server;
pub(crate) mod small_disk;
pub(crate) mod stream;
pub(crate) mod tools;

use std::{
    array, fs, iter,
    net::{Ipv4Addr, TcpListener, UdpSocket},
    thread,
    time::{Duration, Instant},
};

/// How long a test waits for a state before it fails. Long, because the machine may be busy; a test
/// that passes never waits this long.
pub(crate) const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// Polls `look` fifty times a second until it returns something; fails after [`WAIT_TIMEOUT`] and
/// prints what it waited for. For states without a notification.
pub(crate) fn wait_until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < WAIT_TIMEOUT, "waited in vain for this: {what}");
        thread::park_timeout(Duration::from_millis(20));
    }
}

/// Seconds of CPU that a process has used.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
    // utime and stime, in ticks: 100 a second on every Linux that Rust runs on.
    fields[11..13].iter().map(|ticks| ticks.parse::<f64>().expect("a number") / 100.0).sum()
}

/// Ports of 127.0.0.1 that are free over TCP and UDP, for programs that cannot bind to port 0.
///
/// They are below the kernel's ephemeral range, so that no connection and no `bind` to port 0 takes
/// one before its program does, or while that program is stopped.
pub(crate) fn free_ports<const N: usize>() -> [u16; N] {
    // The sockets stay open until all ports are found, so that the ports differ.
    let held: [(u16, UdpSocket, TcpListener); N] = array::from_fn(|_| {
        iter::repeat_with(|| fastrand::u16(10_000..32_000))
            .take(1000)
            .find_map(|port| {
                let address = (Ipv4Addr::LOCALHOST, port);
                Some((port, UdpSocket::bind(address).ok()?, TcpListener::bind(address).ok()?))
            })
            .expect("one port in a thousand is free")
    });
    held.map(|(port, ..)| port)
}
