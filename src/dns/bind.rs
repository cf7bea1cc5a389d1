//! Sockets: one TCP listener and a UDP socket per thread on every address.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    num::NonZeroUsize,
};

use socket2::{Domain, Protocol, Socket, Type};

/// How often a free port is looked for that both transports can have.
const TRIES: usize = 16;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Octets of each UDP socket's receive buffer that are asked for: a burst of a few thousand
/// queries. The system may give less.
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
        let mut tries = if address.port() == 0 { TRIES } else { 1 };
        loop {
            tries -= 1;
            // 1. TCP, which no second process can have as well.
            let tcp = bind_tcp(address).map_err(|error| cannot(address, "TCP", &error))?;
            let bound = tcp.local_addr()?;
            // 2. UDP on the same port.
            match bind_udp(bound, threads) {
                Ok(udp) => return Ok(Self { address: bound, tcp, udp }),
                Err(error) if tries > 0 && error.kind() == io::ErrorKind::AddrInUse => {}
                Err(error) => return Err(cannot(bound, "UDP", &error)),
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
    // SO_REUSEPORT would share the port with another process of the same user: a socket without
    // it finds out.
    socket(address, Type::DGRAM, Protocol::UDP)?.bind(&address.into())?;
    let one = |_| {
        let socket = socket(address, Type::DGRAM, Protocol::UDP)?;
        socket.set_reuse_port(true)?;
        // The system gives what it allows.
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

fn cannot(address: SocketAddr, transport: &str, error: &io::Error) -> io::Error {
    let hint = match error.kind() {
        io::ErrorKind::AddrInUse => "; another process has it: stop that one, or listen elsewhere",
        io::ErrorKind::PermissionDenied => "; ports below 1024 need the capability CAP_NET_BIND_SERVICE",
        io::ErrorKind::AddrNotAvailable => "; it is not an address of this machine",
        _ => "",
    };
    io::Error::new(error.kind(), format!("cannot listen for DNS over {transport} on {address}: {error}{hint}"))
}

/// Replaces wildcards by the addresses of this machine's interfaces, so that every socket has one
/// address and answers from it. Link-local addresses are left out: they need a scope, and pods
/// do not use them.
pub(super) fn expand(listen: &[SocketAddr]) -> io::Result<Vec<SocketAddr>> {
    let mut expanded = Vec::new();
    for address in listen {
        if !address.ip().is_unspecified() {
            expanded.push(*address);
            continue;
        }
        let interfaces = if_addrs::get_if_addrs()
            .map_err(|error| io::Error::new(error.kind(), format!("cannot list this machine's addresses: {error}")))?;
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
