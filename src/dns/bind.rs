//! Sockets: one TCP listener and a UDP socket per thread on every address.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    num::NonZeroUsize,
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{TcpLimits, wildcard};

/// Attempts to find a port that is free for both transports.
const MAX_BIND_ATTEMPTS: usize = 16;

/// Connections that wait to be accepted; the kernel drops more.
const BACKLOG: i32 = 1024;

/// Requested receive buffer of each UDP socket in bytes: a burst of a few thousand queries. The
/// kernel may grant less (net.core.rmem_max).
const RECEIVE_BUFFER: usize = 4 << 20;

/// Send buffer of each TCP connection in bytes, which the kernel doubles and never grows. Without it
/// the kernel holds up to 4 MiB (net.ipv4.tcp_wmem) for each peer that does not read.
const TCP_SEND_BUFFER: usize = 32 << 10;

/// Receive buffer of each TCP connection in bytes, which the kernel doubles: dozens of questions.
const TCP_RECEIVE_BUFFER: usize = 16 << 10;

/// The sockets of one address.
#[derive(Debug)]
pub(super) struct Sockets {
    /// With its real port.
    pub(super) address: SocketAddr,
    pub(super) tcp: TcpListener,
    pub(super) udp: Vec<UdpSocket>,
}

impl Sockets {
    /// Binds `address` for TCP, then for UDP once per thread.
    pub(super) fn bind(address: SocketAddr, threads: NonZeroUsize, limits: &TcpLimits) -> io::Result<Self> {
        // Port 0: the kernel chooses a port that is free for TCP, and the same one may be taken for UDP.
        let mut attempts = if address.port() == 0 { MAX_BIND_ATTEMPTS } else { 1 };
        loop {
            attempts -= 1;
            // 1. TCP first: without SO_REUSEPORT the kernel refuses a second process.
            let tcp = bind_tcp(address, limits).map_err(|err| bind_error(address, "TCP", &err))?;
            let bound = tcp.local_addr()?;
            // 2. UDP on the same port.
            match bind_udp(bound, threads) {
                Ok(udp) => return Ok(Self { address: bound, tcp, udp }),
                Err(err) if attempts > 0 && err.kind() == io::ErrorKind::AddrInUse => {}
                Err(err) => return Err(bind_error(bound, "UDP", &err)),
            }
        }
    }
}

fn bind_tcp(address: SocketAddr, limits: &TcpLimits) -> io::Result<TcpListener> {
    let socket = socket(address, Type::STREAM, Protocol::TCP)?;
    // Allows the port despite connections of an earlier run in TIME_WAIT, but not beside another listener.
    socket.set_reuse_address(true)?;
    // Accepted connections inherit these three.
    socket.set_send_buffer_size(TCP_SEND_BUFFER)?;
    socket.set_recv_buffer_size(TCP_RECEIVE_BUFFER)?;
    // If the peer's window is closed, the kernel keeps unread answers for minutes after the socket is
    // closed. This timeout ends that (RFC 5482 §2; Linux applies it to a closed window too).
    socket.set_tcp_user_timeout(Some(limits.message))?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn bind_udp(address: SocketAddr, threads: NonZeroUsize) -> io::Result<Vec<UdpSocket>> {
    // With SO_REUSEPORT a second process of the same user would share the port without an error. A socket
    // without that option cannot be bound if another process has the port.
    socket(address, Type::DGRAM, Protocol::UDP)?.bind(&address.into())?;
    let one = |_| {
        let socket = socket(address, Type::DGRAM, Protocol::UDP)?;
        socket.set_reuse_port(true)?;
        // The kernel grants what net.core.rmem_max allows.
        let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER);
        socket.bind(&address.into())?;
        let socket = socket.into();
        // Otherwise the kernel would choose the source of an answer by its route, and the resolver drops what comes from an
        // address that it did not ask.
        if address.ip().is_unspecified() {
            wildcard::request_local_addresses(&socket, address)?;
        }
        Ok(socket)
    };
    (0..threads.get()).map(one).collect()
}

fn socket(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if address.is_ipv6() {
        // 0.0.0.0 and [::] can then be bound side by side, and peers are counted by one form of their address.
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

fn bind_error(address: SocketAddr, transport: &str, err: &io::Error) -> io::Error {
    let hint = match err.kind() {
        io::ErrorKind::AddrInUse => "; another process has it: stop that one, or listen elsewhere",
        io::ErrorKind::PermissionDenied => "; ports below 1024 need the capability CAP_NET_BIND_SERVICE",
        io::ErrorKind::AddrNotAvailable => "; it is not an address of this machine",
        _ => "",
    };
    io::Error::new(err.kind(), format!("cannot listen for DNS over {transport} on {address}: {err}{hint}"))
}

/// The addresses without duplicates, and without those that a wildcard of the same port covers: the
/// kernel would not bind both.
pub(super) fn without_covered(listen: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for &address in listen {
        let is_wildcard = |other: &&SocketAddr| {
            other.ip().is_unspecified() && other.is_ipv4() == address.is_ipv4() && other.port() == address.port()
        };
        let is_covered = !address.ip().is_unspecified() && listen.iter().any(|other| is_wildcard(&other));
        // Each bind of port 0 takes another port, so two of them are not duplicates.
        if address.port() == 0 || !is_covered && !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

/// The addresses at which other machines reach sockets that are bound to `bound`: without loopback,
/// and with the addresses of this machine's interfaces for a wildcard. Link-local addresses are
/// left out: they need a scope, and pods do not use them.
///
/// # Errors
/// When the system does not list them.
pub fn reachable(bound: &[SocketAddr]) -> io::Result<Vec<IpAddr>> {
    let mut reachable = Vec::new();
    for ip in bound.iter().map(SocketAddr::ip) {
        if !ip.is_unspecified() {
            reachable.push(ip);
            continue;
        }
        let interfaces = if_addrs::get_if_addrs()
            .map_err(|err| io::Error::new(err.kind(), format!("cannot list this machine's addresses: {err}")))?;
        let own = interfaces.iter().filter(|interface| !interface.is_link_local()).map(if_addrs::Interface::ip);
        reachable.extend(own.filter(|own| own.is_ipv4() == ip.is_ipv4()));
    }
    reachable.retain(|ip| !ip.is_loopback());
    reachable.sort_unstable();
    reachable.dedup();
    Ok(reachable)
}
