//! A raw DNS client: one query, one answer, no cache, no retries.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{Name, RData, RecordType},
};

use super::WAIT_TIMEOUT;

/// The transport of a question.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Over {
    /// One datagram.
    Udp,
    /// One connection.
    Tcp,
}

/// Sends a query and returns the answer, whose id and question are checked.
pub(crate) fn ask(server: SocketAddr, over: Over, name: &str, rtype: RecordType) -> Message {
    let id = fastrand::u16(..);
    let mut question = Message::new(id, MessageType::Query, OpCode::Query);
    question.add_query(Query::query(Name::from_ascii(name).expect("a test asks for a name"), rtype));
    let packet = question.to_vec().expect("a question can be encoded");
    let answer = match over {
        Over::Udp => exchange_udp(server, &packet),
        Over::Tcp => exchange_tcp(server, &packet),
    };
    let answer = Message::from_vec(&answer).expect("hickory can read the answer");
    assert_eq!((answer.id, &answer.queries), (id, &question.queries), "the answer is to this question");
    answer
}

/// The data of the answer section, sorted, as text.
pub(crate) fn answers(server: SocketAddr, over: Over, name: &str, rtype: RecordType) -> Vec<String> {
    let mut data: Vec<String> =
        ask(server, over, name, rtype).answers.iter().map(|record| RData::to_string(&record.data)).collect();
    data.sort();
    data
}

/// Sends one datagram and returns the answer.
pub(crate) fn exchange_udp(server: SocketAddr, packet: &[u8]) -> Vec<u8> {
    let local = if server.is_ipv4() { IpAddr::from(Ipv4Addr::LOCALHOST) } else { Ipv6Addr::LOCALHOST.into() };
    let socket = UdpSocket::bind((local, 0)).expect("a free port");
    socket.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a timeout above zero");
    socket.connect(server).expect("loopback is there");
    socket.send(packet).expect("the server's port is open");
    let mut answer = vec![0; 65_536];
    let octets = socket.recv(&mut answer).expect("an answer comes");
    answer.truncate(octets);
    answer
}

/// Sends one framed message (RFC 1035 §4.2.2) on a new connection and returns the answer.
pub(crate) fn exchange_tcp(server: SocketAddr, packet: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(server).expect("the server's port is open");
    stream.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a timeout above zero");
    let length = u16::try_from(packet.len()).expect("a message has at most 65535 octets").to_be_bytes();
    stream.write_all(&[&length, packet].concat()).expect("the server reads");
    let mut length = [0; 2];
    stream.read_exact(&mut length).expect("an answer comes");
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer).expect("the answer is whole");
    answer
}
