//! A UDP socket on a wildcard address that answers from the address to which the query was sent.
//!
//! One socket per thread serves every address of the machine, also addresses that are added later. Unlike
//! one socket per address, it does not fail for an address that is still in duplicate address detection.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
};

use nix::{
    cmsg_space, libc,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrStorage, recvmsg, sendmmsg, setsockopt,
        sockopt,
    },
};

use super::udp::DatagramSocket;

/// A socket that is bound to `0.0.0.0` or `[::]`.
pub(super) struct WildcardSocket<'s> {
    socket: &'s UdpSocket,
    /// Buffer in which the kernel writes the destination address of a received packet.
    received: Vec<u8>,
    /// Header, peer and source of the answer: allocated once, not for each answer.
    sent: MultiHeaders<SockaddrStorage>,
}

/// The sender of a query, and the local address to which it was sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct PacketInfo {
    address: SockaddrStorage,
    asked: LocalAddress,
}

#[derive(Debug, Clone, Copy)]
enum LocalAddress {
    V4(libc::in_pktinfo),
    V6(libc::in6_pktinfo),
}

/// Makes the kernel report the local address of each packet (RFC 3542 §6.2 for IPv6).
pub(super) fn request_local_addresses(socket: &UdpSocket, bound: SocketAddr) -> io::Result<()> {
    match bound {
        SocketAddr::V4(_) => setsockopt(socket, sockopt::Ipv4PacketInfo, &true)?,
        SocketAddr::V6(_) => setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)?,
    }
    Ok(())
}

impl<'s> WildcardSocket<'s> {
    pub(super) fn new(socket: &'s UdpSocket, bound: SocketAddr) -> Self {
        // Exactly as long as the one control message of an answer: the kernel refuses padding after it.
        let sent = match bound {
            SocketAddr::V4(_) => cmsg_space!(libc::in_pktinfo),
            SocketAddr::V6(_) => cmsg_space!(libc::in6_pktinfo),
        };
        let received = cmsg_space!(libc::in_pktinfo, libc::in6_pktinfo);
        Self { socket, received, sent: MultiHeaders::preallocate(1, Some(sent)) }
    }
}

impl DatagramSocket for WildcardSocket<'_> {
    type Peer = PacketInfo;

    fn receive(&mut self, packet: &mut [u8]) -> io::Result<(usize, Option<PacketInfo>)> {
        let mut slices = [IoSliceMut::new(packet)];
        let received = recvmsg::<SockaddrStorage>(
            self.socket.as_raw_fd(),
            &mut slices,
            Some(&mut self.received),
            MsgFlags::empty(),
        )?;
        let mut asked = received.cmsgs()?.filter_map(|message| match message {
            ControlMessageOwned::Ipv4PacketInfo(info) => unicast_v4(info),
            ControlMessageOwned::Ipv6PacketInfo(info) => unicast_v6(info),
            _ => None,
        });
        let peer = match (received.address, asked.next()) {
            (Some(address), Some(asked)) if has_port(&address) => Some(PacketInfo { address, asked }),
            _ => None,
        };
        Ok((received.bytes, peer))
    }

    fn send(&mut self, answer: &[u8], peer: &PacketInfo) -> io::Result<()> {
        let slices = [[IoSlice::new(answer)]];
        let source = [match &peer.asked {
            LocalAddress::V4(info) => ControlMessage::Ipv4PacketInfo(info),
            LocalAddress::V6(info) => ControlMessage::Ipv6PacketInfo(info),
        }];
        let socket = self.socket.as_raw_fd();
        sendmmsg(socket, &mut self.sent, &slices, [Some(peer.address)], source, MsgFlags::empty())?;
        Ok(())
    }
}

/// The source of the answer to a packet. `None` for broadcast and multicast: resolvers do not use them, and
/// with a spoofed sender every server of the network would answer the victim.
fn unicast_v4(info: libc::in_pktinfo) -> Option<LocalAddress> {
    // ip(7): on receipt `ipi_spec_dst` is the local address, `ipi_addr` the packet's destination. The
    // interface stays open: the route to the peer decides, as for a socket bound to the address.
    let source = libc::in_pktinfo { ipi_ifindex: 0, ..info };
    (info.ipi_addr.s_addr == info.ipi_spec_dst.s_addr).then_some(LocalAddress::V4(source))
}

fn unicast_v6(info: libc::in6_pktinfo) -> Option<LocalAddress> {
    let address = std::net::Ipv6Addr::from(info.ipi6_addr.s6_addr);
    // A link-local address needs its interface. For any other address, routing selects the interface.
    let ipi6_ifindex = if address.is_unicast_link_local() { info.ipi6_ifindex } else { 0 };
    (!address.is_multicast()).then_some(LocalAddress::V6(libc::in6_pktinfo { ipi6_ifindex, ..info }))
}

/// Port 0 is reserved (RFC 6335 §6), and sending to it fails.
fn has_port(address: &SockaddrStorage) -> bool {
    let port = |v4: Option<u16>, v6: Option<u16>| v4.or(v6).unwrap_or(0);
    port(address.as_sockaddr_in().map(|v4| v4.port()), address.as_sockaddr_in6().map(|v6| v6.port())) != 0
}
