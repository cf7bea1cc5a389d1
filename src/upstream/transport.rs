//! One question to one server: over UDP, and over TCP if the answer does not fit.
//!
//! hickory-net draws the id and the port of every question, sends it again, and ignores answers with another id or another
//! question. No connection is kept, and no task is spawned.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::StreamExt as _;
use hickory_net::{
    NetError,
    runtime::{DnsUdpSocket, RuntimeProvider, TokioHandle, TokioRuntimeProvider, TokioTime},
    tcp::TcpClientStream,
    udp::UdpClientStream,
    xfer::{DnsMultiplexer, DnsRequestSender as _},
};
use hickory_proto::{
    op::{DnsRequest, DnsRequestOptions, DnsResponse, Query, ResponseCode},
    rr::{Name, RecordType},
};
use tokio::{
    io::{Interest, ReadBuf},
    net::UdpSocket,
    time::timeout,
};

use super::timing::Timing;
use crate::model::Rcode;

/// How often a question is sent to one server over UDP. Each has a socket of its own.
const MAX_SENT: u8 = 2;

/// Octets of the largest UDP answer, as EDNS announces it (DNS flag day 2020).
const MAX_UDP_ANSWER: u16 = 1232;

/// Why a server's answer cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum QueryError {
    #[error("no answer within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
    /// Over UDP an ICMP error, which means that no server listens or no route leads there.
    #[error("{0}")]
    Io(String),
    #[error("invalid answer: {0}")]
    Invalid(String),
    #[error("the answer is truncated, over TCP too")]
    Truncated,
    #[error("the answer is truncated, and over TCP: {0}")]
    OverTcp(Box<Self>),
    #[error("{}", rcode_name(*.0))]
    Rcode(ResponseCode),
    #[error("it refers to other servers, so it is not a resolver")]
    Referral,
}

impl QueryError {
    /// Whether other questions to the server will fail too.
    pub(super) fn server_is_down(&self) -> bool {
        matches!(self, Self::Timeout(_) | Self::Io(_) | Self::Invalid(_))
    }
}

fn rcode_name(code: ResponseCode) -> String {
    let number = u16::from(code);
    Rcode::from_number(number).map_or_else(|| format!("response code {number}"), |code| code.name().to_owned())
}

/// Asks `server` for the records of one type, and returns an answer that is NOERROR or NXDOMAIN.
pub(super) async fn ask(
    server: SocketAddr,
    name: &Name,
    kind: RecordType,
    timing: &Timing,
) -> Result<DnsResponse, QueryError> {
    let query = Query::query(name.clone(), kind);
    let answer = match complete(server, &query, true, timing).await {
        // RFC 6891 §7: so answers a server that does not know EDNS.
        Ok(answer) if answer.metadata.response_code == ResponseCode::FormErr => {
            complete(server, &query, false, timing).await?
        }
        answer => answer?,
    };
    match answer.metadata.response_code {
        ResponseCode::NoError if is_referral(&answer) => Err(QueryError::Referral),
        ResponseCode::NoError | ResponseCode::NXDomain => Ok(answer),
        other => Err(QueryError::Rcode(other)),
    }
}

/// RFC 2308 §2.2: NS records without a SOA record are not the answer that there are no such records.
fn is_referral(answer: &DnsResponse) -> bool {
    let has = |kind| answer.authorities.iter().any(|record| record.record_type() == kind);
    let empty = answer.answers.is_empty() && !answer.metadata.authoritative;
    empty && has(RecordType::NS) && !has(RecordType::SOA)
}

async fn complete(server: SocketAddr, query: &Query, edns: bool, timing: &Timing) -> Result<DnsResponse, QueryError> {
    let mut options = DnsRequestOptions::default();
    options.use_edns = edns;
    options.edns_payload_len = MAX_UDP_ANSWER;
    let request = DnsRequest::from_query(query.clone(), options);
    let answer = over_udp(server, request.clone(), timing).await?;
    if !answer.metadata.truncation {
        return checked(answer, query);
    }
    // RFC 7766 §5: a truncated answer is asked for again over TCP.
    let answer = timeout(timing.tcp_timeout, over_tcp(server, request, timing)).await;
    let answer = answer.unwrap_or(Err(QueryError::Timeout(timing.tcp_timeout)));
    let answer = answer.and_then(|answer| checked(answer, query)).map_err(|err| QueryError::OverTcp(Box::new(err)))?;
    if answer.metadata.truncation { Err(QueryError::Truncated) } else { Ok(answer) }
}

async fn over_udp(server: SocketAddr, request: DnsRequest, timing: &Timing) -> Result<DnsResponse, QueryError> {
    let retransmit_after = u64::try_from(timing.retransmit_after.as_millis()).unwrap_or(u64::MAX);
    let mut stream = UdpClientStream::builder(server, Sockets::default())
        .with_timeout(Some(timing.udp_timeout))
        .with_max_retries(MAX_SENT)
        .with_retry_interval_floor(retransmit_after)
        .build();
    let mut request = request;
    request.options_mut().retry_interval = timing.retransmit_after;
    let answer = stream.send_message(request).next().await;
    answer.map_or(Err(QueryError::Timeout(timing.udp_timeout)), |answer| {
        answer.map_err(|err| failure(err, timing.udp_timeout))
    })
}

async fn over_tcp(server: SocketAddr, request: DnsRequest, timing: &Timing) -> Result<DnsResponse, QueryError> {
    let (connecting, sender) = TcpClientStream::new(server, None, Some(timing.tcp_timeout), Sockets::default());
    let stream = connecting.await.map_err(|err| failure(err, timing.tcp_timeout))?;
    let mut connection = DnsMultiplexer::new(stream, sender).with_timeout(timing.tcp_timeout);
    let mut answers = connection.send_message(request);
    // The connection reads and writes only while it is polled, and ends when the server closes it.
    let ends = async { while connection.next().await.is_some() {} };
    let answer = tokio::select! {
        biased;
        answer = answers.next() => answer,
        () = ends => answers.next().await,
    };
    answer.map_or(Err(QueryError::Timeout(timing.tcp_timeout)), |answer| {
        answer.map_err(|err| failure(err, timing.tcp_timeout))
    })
}

/// RFC 5452 §4.2: an answer to exactly this question. Over TCP nothing else has compared them.
fn checked(answer: DnsResponse, query: &Query) -> Result<DnsResponse, QueryError> {
    if answer.queries.as_slice() == std::slice::from_ref(query) {
        Ok(answer)
    } else {
        Err(QueryError::Invalid("it answers another question".into()))
    }
}

fn failure(err: NetError, after: Duration) -> QueryError {
    match err {
        NetError::Timeout => QueryError::Timeout(after),
        NetError::Io(err) if err.kind() == io::ErrorKind::TimedOut => QueryError::Timeout(after),
        NetError::Io(err) => QueryError::Io(err.to_string()),
        other => QueryError::Invalid(other.to_string()),
    }
}

/// hickory-net's runtime, except that UDP sockets are connected: the kernel drops what others send, and a server that is
/// not there is noticed by its ICMP error instead of a timeout.
#[derive(Clone, Default)]
struct Sockets(TokioRuntimeProvider);

impl RuntimeProvider for Sockets {
    type Handle = TokioHandle;
    type Timer = TokioTime;
    type Udp = ConnectedSocket;
    type Tcp = <TokioRuntimeProvider as RuntimeProvider>::Tcp;

    fn create_handle(&self) -> Self::Handle {
        self.0.create_handle()
    }

    fn connect_tcp(
        &self,
        server: SocketAddr,
        local: Option<SocketAddr>,
        within: Option<Duration>,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Self::Tcp>>>> {
        self.0.connect_tcp(server, local, within)
    }

    fn bind_udp(
        &self,
        local: SocketAddr,
        server: SocketAddr,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Self::Udp>>>> {
        Box::pin(async move {
            let socket = UdpSocket::bind(local).await?;
            socket.connect(server).await?;
            Ok(ConnectedSocket { socket, server })
        })
    }
}

/// A socket that sends to and receives from one server only, whatever the address that it is told.
struct ConnectedSocket {
    socket: UdpSocket,
    server: SocketAddr,
}

impl DnsUdpSocket for ConnectedSocket {
    type Time = TokioTime;

    fn poll_recv_from(&self, cx: &mut Context<'_>, octets: &mut [u8]) -> Poll<io::Result<(usize, SocketAddr)>> {
        let mut octets = ReadBuf::new(octets);
        ready!(self.socket.poll_recv(cx, &mut octets))?;
        Poll::Ready(Ok((octets.filled().len(), self.server)))
    }

    /// Also returns ICMP errors; the default waits on, because `poll_recv` of tokio is not woken by them.
    fn recv_from<'s, 'o, 'f>(
        &'s self,
        octets: &'o mut [u8],
    ) -> Pin<Box<dyn Future<Output = io::Result<(usize, SocketAddr)>> + Send + 'f>>
    where
        's: 'f,
        'o: 'f,
    {
        Box::pin(async move {
            loop {
                let ready = self.socket.ready(Interest::READABLE | Interest::ERROR).await?;
                if ready.is_error() {
                    if let Some(err) = self.socket.take_error()? {
                        return Err(err);
                    }
                    // No error any more: wait for the next one.
                    let none = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
                    let _would_block = self.socket.try_io(Interest::ERROR, none);
                }
                match self.socket.try_recv(octets) {
                    Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                    received => return received.map(|len| (len, self.server)),
                }
            }
        })
    }

    fn poll_send_to(&self, cx: &mut Context<'_>, octets: &[u8], _server: SocketAddr) -> Poll<io::Result<usize>> {
        self.socket.poll_send(cx, octets)
    }
}
