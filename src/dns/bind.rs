//! Sockets: one TCP listener and a UDP socket per thread on every address.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    num::NonZeroUsize,
};

use socket2::{Domain, Protocol, Socket, Type};

/// Attempts to find a port that is free for both transports.
const MAX_BIND_ATTEMPTS: usize = 16;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Requested receive buffer of each UDP socket in bytes: a burst of a few thousand queries. The
/// kernel may grant less (net.core.rmem_max).
const RECEIVE_BUFFER: usize = 4 << 20;

/// What is bound to one address.
#[derive(Debug)]
pub(super) struct Sockets {
    /// With its real port.
    pub(super) address: SocketAddr,
    pub(super) tcp: TcpListener,
    pub(super) udp: Vec<UdpSocket>,
}

impl Sockets {
    /// Binds `address` for TCP, then for UDP once per thread.
    pub(super) fn bind(address: SocketAddr, threads: NonZeroUsize) -> io::Result<Self> {
        let mut attempts = if address.port() == 0 { MAX_BIND_ATTEMPTS } else { 1 };
        loop {
            attempts -= 1;
            // 1. TCP, which no second process can have as well.
            let tcp = bind_tcp(address).map_err(|err| bind_error(address, "TCP", &err))?;
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

fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket(address, Type::STREAM, Protocol::TCP)?;
    // Connections of an earlier run that linger do not keep the port; a listener that lives does.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn bind_udp(address: SocketAddr, threads: NonZeroUsize) -> io::Result<Vec<UdpSocket>> {
    // With SO_REUSEPORT a second process of the same user would share the port in silence: a
    // socket without it fails if anybody has the port.
    socket(address, Type::DGRAM, Protocol::UDP)?.bind(&address.into())?;
    let one = |_| {
        let socket = socket(address, Type::DGRAM, Protocol::UDP)?;
        socket.set_reuse_port(true)?;
        // The kernel grants what net.core.rmem_max allows.
        let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER);
        socket.bind(&address.into())?;
        Ok(socket.into())
    };
    (0..threads.get()).map(one).collect()
}

fn socket(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if address.is_ipv6() {
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

/// Replaces wildcards by the addresses of this machine's interfaces, so that every socket has one
/// address and answers from that address. Link-local addresses are left out: they need a scope, and pods
/// do not use them.
pub(super) fn expand_wildcards(listen: &[SocketAddr]) -> io::Result<Vec<SocketAddr>> {
    let mut expanded = Vec::new();
    for address in listen {
        if !address.ip().is_unspecified() {
            expanded.push(*address);
            continue;
        }
        let interfaces = if_addrs::get_if_addrs()
            .map_err(|err| io::Error::new(err.kind(), format!("cannot list this machine's addresses: {err}")))?;
        let mut own: Vec<IpAddr> = interfaces
            .iter()
            .filter(|interface| !interface.is_link_local())
            .map(if_addrs::Interface::ip)
            .filter(|ip| ip.is_ipv4() == address.is_ipv4())
            .collect();
        own.sort_unstable();
        if own.is_empty() {
            let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
            let says = format!("cannot listen for DNS on {address}: this machine has no {family} address");
            return Err(io::Error::new(io::ErrorKind::AddrNotAvailable, says));
        }
        expanded.extend(own.into_iter().map(|ip| SocketAddr::new(ip, address.port())));
    }
    let mut seen = Vec::new();
    expanded.retain(|address| {
        let new = address.port() == 0 || !seen.contains(address);
        seen.push(*address);
        new
    });
    Ok(expanded)
}
