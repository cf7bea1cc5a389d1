//! One question to one server, over UDP and, where the answer is cut off, over TCP again.
//!
//! No resolver stands between: what is printed is what the server said.

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
const PATIENCE: Duration = Duration::from_secs(2);

/// Attempts over UDP; a datagram may be lost.
const ATTEMPTS: usize = 2;

/// The largest answer over UDP that is asked for (DNS flag day 2020).
const UDP_ANSWER: u16 = 1232;

/// What a server said.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) message: Message,
    /// From the question to its answer, of the attempt that succeeded.
    pub(super) took: Duration,
    pub(super) tcp: bool,
}

impl Reply {
    /// The response code, with the upper bits that EDNS carries (RFC 6891 §6.1.3).
    pub(super) fn rcode(&self) -> ResponseCode {
        let low = self.message.metadata.response_code.low();
        self.message
            .edns
            .as_ref()
            .map_or_else(|| ResponseCode::from_low(low), |edns| ResponseCode::from(edns.rcode_high(), low))
    }

    /// Who answered (RFC 5001), if the server says.
    pub(super) fn nsid(&self) -> Option<String> {
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
pub(super) enum AskError {
    /// Nothing came.
    #[error("no answer within {} s", .0.as_secs())]
    Silence(Duration),
    /// The socket failed; on UDP too, where the machine says that nobody listens.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What came is not an answer to this question.
    #[error("the answer cannot be read: {0}")]
    Garbage(String),
}

/// Asks `server`; over UDP first unless `tcp`.
pub(super) async fn ask(server: SocketAddr, name: &Name, kind: RecordType, tcp: bool) -> Result<Reply, AskError> {
    if tcp {
        return over_tcp(server, name, kind).await;
    }
    let mut last = AskError::Silence(PATIENCE);
    for _ in 0..ATTEMPTS {
        match over_udp(server, name, kind).await {
            // RFC 7766 §5: what was cut off is asked again over TCP.
            Ok(reply) if reply.message.metadata.truncation => return over_tcp(server, name, kind).await,
            Ok(reply) => return Ok(reply),
            Err(silence @ AskError::Silence(_)) => last = silence,
            Err(err) => return Err(err),
        }
    }
    Err(last)
}

async fn over_udp(server: SocketAddr, name: &Name, kind: RecordType) -> Result<Reply, AskError> {
    let (question, id) = question(name, kind)?;
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    // Connected, so that only this server can answer, and a refusal by its machine is seen.
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
    timeout(PATIENCE, answer).await.unwrap_or(Err(AskError::Silence(PATIENCE)))
}

async fn over_tcp(server: SocketAddr, name: &Name, kind: RecordType) -> Result<Reply, AskError> {
    let (question, id) = question(name, kind)?;
    let answer = async {
        let asked = Instant::now();
        let mut stream = TcpStream::connect(server).await?;
        // RFC 1035 §4.2.2: two octets of length; RFC 7766 §8: in one write.
        let length = u16::try_from(question.len()).map_err(|err| AskError::Garbage(err.to_string()))?;
        stream.write_all(&[&length.to_be_bytes(), question.as_slice()].concat()).await?;
        let mut octets = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut octets).await?;
        let message = read(&octets, id, name, kind)?;
        Ok(Reply { message, took: asked.elapsed(), tcp: true })
    };
    timeout(PATIENCE, answer).await.unwrap_or(Err(AskError::Silence(PATIENCE)))
}

/// The question as octets, and its id.
fn question(name: &Name, kind: RecordType) -> Result<(Vec<u8>, u16), AskError> {
    let mut message = Message::query();
    message.metadata.id = fastrand::u16(..);
    // Nothing recurses here, and pods' resolvers set it too.
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name.clone(), kind));
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_ANSWER);
    let nobody = NSIDPayload::new(Vec::new()).map_err(|err| AskError::Garbage(err.to_string()))?;
    edns.options_mut().insert(EdnsOption::NSID(nobody));
    message.set_edns(edns);
    let octets = message.to_vec().map_err(|err| AskError::Garbage(err.to_string()))?;
    Ok((octets, message.metadata.id))
}

/// Takes `octets` as the answer to this question (RFC 5452 §4).
fn read(octets: &[u8], id: u16, name: &Name, kind: RecordType) -> Result<Message, AskError> {
    let message = Message::from_vec(octets).map_err(|err| AskError::Garbage(err.to_string()))?;
    let ours = message.metadata.message_type == MessageType::Response && message.metadata.id == id;
    // A server that could not read the question may send none back.
    let echoed = message.queries.iter().all(|query| query.name() == name && query.query_type() == kind);
    if ours && echoed { Ok(message) } else { Err(AskError::Garbage("it answers something else".into())) }
}
