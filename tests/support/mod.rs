//! What the tests share: the real binary as a child process, raw DNS and HTTP clients, and the
//! programs of others that are asked as well.
//!
//! Nothing here sleeps. Whoever waits, waits for a line, an answer or an exit, with [`PATIENCE`]
//! as the limit after which a test fails and says what it waited for.

pub(crate) mod cluster;
pub(crate) mod coredns;
pub(crate) mod dns;
pub(crate) mod http;
pub(crate) mod ledger;
pub(crate) mod proxy;
pub(crate) mod server;
pub(crate) mod stream;
pub(crate) mod tools;

use std::{
    array, iter,
    net::{Ipv4Addr, TcpListener, UdpSocket},
    thread,
    time::{Duration, Instant},
};

/// How long a state may take to come before a test gives up. Long, because a busy machine is no
/// fault of the code; no test that passes ever waits this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Looks again and again, fifty times a second, until `look` finds something; fails after
/// [`PATIENCE`] and says what it waited for. For states that nobody announces.
pub(crate) fn wait_until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "waited in vain for this: {what}");
        thread::park_timeout(Duration::from_millis(20));
    }
}

/// Ports of 127.0.0.1 that are free over TCP and UDP, for programs that cannot be told to take any.
///
/// They lie below those that the kernel hands out, so that no connection and no `bind` to port 0
/// takes one before its program does, or while that program is away.
pub(crate) fn free_ports<const N: usize>() -> [u16; N] {
    // Held until all are found, so that they differ.
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
