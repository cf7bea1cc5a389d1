//! One query to one server, over UDP and, if the answer is truncated, again over TCP.
//!
//! No resolver is in between: what is printed is what the server answered.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Edns, Message, MessageType, Query, ResponseCode},
    rr::{
        Name, RecordType,
        rdata::opt::{EdnsCode, EdnsOption, NSIDPayload},
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

/// How long one attempt waits for its answer.
const QUERY_TIMEOUT: Duration = Duration::from_secs(2);

/// Attempts over UDP; a datagram may be lost.
const MAX_UDP_ATTEMPTS: usize = 2;

/// Octets of the largest UDP answer, as EDNS announces it (DNS flag day 2020).
const MAX_UDP_ANSWER: u16 = 1232;

/// Option "extended DNS error" (RFC 8914).
const EXTENDED_ERROR: u16 = 15;

/// "Network Error" (RFC 8914 §4.24).
pub(in crate::cli) const NETWORK_ERROR: u16 = 23;

/// A server's answer.
#[derive(Debug)]
pub(in crate::cli) struct Reply {
    pub(in crate::cli) message: Message,
    /// From sending the query to receiving the answer, of the attempt that succeeded.
    pub(in crate::cli) took: Duration,
    pub(in crate::cli) tcp: bool,
}

impl Reply {
    /// The response code, with the upper bits that EDNS carries (RFC 6891 §6.1.3).
    pub(in crate::cli) fn rcode(&self) -> ResponseCode {
        let low = self.message.metadata.response_code.low();
        self.message
            .edns
            .as_ref()
            .map_or_else(|| ResponseCode::from_low(low), |edns| ResponseCode::from(edns.rcode_high(), low))
    }

    /// Why the server failed (RFC 8914), if the answer says so.
    pub(in crate::cli) fn extended_error(&self) -> Option<u16> {
        match self.message.edns.as_ref()?.option(EdnsCode::from(EXTENDED_ERROR))? {
            EdnsOption::Unknown(_, octets) => Some(u16::from_be_bytes(*octets.first_chunk()?)),
            _ => None,
        }
    }

    /// The name server identifier (RFC 5001), if the answer has one.
    pub(in crate::cli) fn nsid(&self) -> Option<String> {
        match self.message.edns.as_ref()?.option(EdnsCode::NSID)? {
            EdnsOption::NSID(who) if !who.as_ref().is_empty() => {
                Some(String::from_utf8_lossy(who.as_ref()).escape_debug().to_string())
            }
            _ => None,
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(in crate::cli) enum QueryError {
    /// No answer within the given time.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// The socket failed; over UDP also after an ICMP error, which means that no server listens.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The message is malformed, or not an answer to this query.
    #[error("invalid answer: {0}")]
    InvalidAnswer(String),
}

/// Sends a query to `server`, over UDP first unless `tcp`.
pub(in crate::cli) async fn query(
    server: SocketAddr,
    name: &Name,
    kind: RecordType,
    tcp: bool,
) -> Result<Reply, QueryError> {
    if tcp {
        return over_tcp(server, name, kind).await;
    }
    let mut last = QueryError::Timeout(QUERY_TIMEOUT);
    for _ in 0..MAX_UDP_ATTEMPTS {
        match over_udp(server, name, kind).await {
            // RFC 7766 §5: a truncated answer is asked for again over TCP.
            Ok(reply) if reply.message.metadata.truncation => return over_tcp(server, name, kind).await,
            Ok(reply) => return Ok(reply),
            Err(err @ QueryError::Timeout(_)) => last = err,
            Err(err) => return Err(err),
        }
    }
    Err(last)
}

async fn over_udp(server: SocketAddr, name: &Name, kind: RecordType) -> Result<Reply, QueryError> {
    let (question, id) = question(name, kind)?;
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    // Connected: the kernel drops datagrams of other senders, and reports ICMP errors.
    socket.connect(server).await?;
    let asked = Instant::now();
    socket.send(&question).await?;
    let answer = async {
        let mut datagram = [0; 65_535];
        loop {
            let octets = socket.recv(&mut datagram).await?;
            // A late answer to an earlier attempt, or a forged one: the right one may still come.
            if let Ok(message) = read(&datagram[..octets], id, name, kind) {
                return Ok(Reply { message, took: asked.elapsed(), tcp: false });
            }
        }
    };
    timeout(QUERY_TIMEOUT, answer).await.unwrap_or(Err(QueryError::Timeout(QUERY_TIMEOUT)))
}

async fn over_tcp(server: SocketAddr, name: &Name, kind: RecordType) -> Result<Reply, QueryError> {
    let (question, id) = question(name, kind)?;
    let answer = async {
        let asked = Instant::now();
        let mut stream = TcpStream::connect(server).await?;
        // RFC 1035 §4.2.2: two octets of length; RFC 7766 §8: in one write.
        let length = u16::try_from(question.len()).map_err(|err| QueryError::InvalidAnswer(err.to_string()))?;
        stream.write_all(&[&length.to_be_bytes(), question.as_slice()].concat()).await?;
        let mut octets = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut octets).await?;
        let message = read(&octets, id, name, kind)?;
        Ok(Reply { message, took: asked.elapsed(), tcp: true })
    };
    timeout(QUERY_TIMEOUT, answer).await.unwrap_or(Err(QueryError::Timeout(QUERY_TIMEOUT)))
}

/// The query as octets, and its id.
fn question(name: &Name, kind: RecordType) -> Result<(Vec<u8>, u16), QueryError> {
    let mut message = Message::query();
    message.metadata.id = fastrand::u16(..);
    // gangplank does not recurse, but stub resolvers of pods set RD, so this client does too.
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name.clone(), kind));
    let mut edns = Edns::new();
    edns.set_max_payload(MAX_UDP_ANSWER);
    let empty = NSIDPayload::new(Vec::new()).map_err(|err| QueryError::InvalidAnswer(err.to_string()))?;
    edns.options_mut().insert(EdnsOption::NSID(empty));
    message.set_edns(edns);
    let octets = message.to_vec().map_err(|err| QueryError::InvalidAnswer(err.to_string()))?;
    Ok((octets, message.metadata.id))
}

/// Parses `octets` as the answer to this query (RFC 5452 §4).
fn read(octets: &[u8], id: u16, name: &Name, kind: RecordType) -> Result<Message, QueryError> {
    let message = Message::from_vec(octets).map_err(|err| QueryError::InvalidAnswer(err.to_string()))?;
    let is_response = message.metadata.message_type == MessageType::Response && message.metadata.id == id;
    // A server that could not parse the query may return no question section.
    let echoed = message.queries.iter().all(|query| query.name() == name && query.query_type() == kind);
    if is_response && echoed { Ok(message) } else { Err(QueryError::InvalidAnswer("it answers another query".into())) }
}
