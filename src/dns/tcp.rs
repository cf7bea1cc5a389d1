//! The TCP front (RFC 7766, RFC 9210): its own small loop, because every limit counts.
//!
//! A connection is one task that reads what is there, answers it, writes the answers together and
//! only then reads on. So nobody can have more unanswered than one turn's worth, and a peer that
//! does not read its answers is not read from either. An idle connection holds a few hundred
//! octets; the large buffer for answers belongs to the thread.

use std::{
    cell::RefCell,
    collections::{HashMap, hash_map::Entry},
    io,
    net::{IpAddr, SocketAddr},
    ops::ControlFlow,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    TcpLimits,
    answer::{MAX_TCP, Transport},
    responder::Responder,
};
use crate::metrics::dns::Closed;

/// Octets of the length before each message (RFC 1035 §4.2.2).
const PREFIX: usize = 2;

/// Octets that are read at a time: several questions, or a piece of a long one.
const READ_SIZE: usize = 4096;

/// Answers are collected and written together; this many octets are enough to write.
const WRITE_THRESHOLD: usize = 65_536;

/// Pause after a failed accept: without descriptors or memory the next try would fail as well, and
/// the connection stays in the backlog.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

thread_local! {
    /// Where an answer is written before its length is known.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; MAX_TCP].into());
}

/// Connections that are open, in all listeners together.
#[derive(Debug)]
pub(super) struct ConnectionLimiter {
    limits: TcpLimits,
    open: Mutex<OpenConnections>,
}

#[derive(Debug, Default)]
struct OpenConnections {
    total: usize,
    peers: HashMap<IpAddr, usize>,
}

impl ConnectionLimiter {
    pub(super) fn new(limits: TcpLimits) -> Arc<Self> {
        Arc::new(Self { limits, open: Mutex::default() })
    }

    /// Counts a connection in until the permit is dropped.
    fn acquire(self: &Arc<Self>, peer: IpAddr) -> Result<Permit, Closed> {
        let mut open = self.lock();
        if open.total >= self.limits.connections {
            return Err(Closed::Full);
        }
        let of_peer = open.peers.entry(peer).or_default();
        if self.limits.per_peer.is_some_and(|limit| *of_peer >= limit) {
            if *of_peer == 0 {
                open.peers.remove(&peer);
            }
            return Err(Closed::PeerFull);
        }
        *of_peer += 1;
        open.total += 1;
        Ok(Permit { limiter: Arc::clone(self), peer })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, OpenConnections> {
        // Nothing panics while it holds the lock.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right of one connection to be open.
struct Permit {
    limiter: Arc<ConnectionLimiter>,
    peer: IpAddr,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut open = self.limiter.lock();
        open.total -= 1;
        if let Entry::Occupied(mut of_peer) = open.peers.entry(self.peer) {
            *of_peer.get_mut() -= 1;
            if *of_peer.get() == 0 {
                of_peer.remove();
            }
        }
    }
}

/// Accepts until `stop`, then waits until every connection has its answers.
pub(super) async fn serve(
    listener: TcpListener,
    responder: Responder,
    limiter: Arc<ConnectionLimiter>,
    stop: CancellationToken,
) -> io::Result<()> {
    let mut connections = JoinSet::new();
    let mut failing = false;
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => {
                failing = false;
                accepted
            }
            Err(err) => {
                // Logged once, however long it lasts.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(error = %err, "TCP connections for DNS cannot be accepted; UDP is not affected");
                }
                tokio::select! {
                    () = stop.cancelled() => break,
                    () = sleep(ACCEPT_BACKOFF) => continue,
                }
            }
        };
        match limiter.acquire(canonical(peer)) {
            Ok(permit) => {
                let (responder, limiter, stop) = (responder.clone(), Arc::clone(&limiter), stop.clone());
                connections.spawn(async move {
                    responder.tally.connected();
                    let mut connection = Connection { stream, responder: &responder, limits: &limiter.limits };
                    if let Err(Some(err)) = connection.serve(&stop).await {
                        responder.tally.closed(err);
                    }
                    // Counted out before the peer can see its end: a peer that reconnects at once finds room.
                    responder.tally.disconnected();
                    drop(permit);
                    drop(connection);
                });
            }
            // Closed at once: a peer that knows can go elsewhere.
            Err(err) => {
                responder.tally.closed(err);
                drop(stream);
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    Ok(())
}

fn canonical(peer: SocketAddr) -> IpAddr {
    peer.ip().to_canonical()
}

/// One connection.
struct Connection<'c> {
    stream: TcpStream,
    responder: &'c Responder,
    limits: &'c TcpLimits,
}

/// Why a connection ends early: a limit, or the peer went away.
type EarlyEnd = Option<Closed>;

/// When to stop waiting, and the reason to close the connection then.
type Deadline = (Instant, Closed);

impl Connection<'_> {
    async fn serve(&mut self, stop: &CancellationToken) -> Result<(), EarlyEnd> {
        let mut rng = fastrand::Rng::new();
        let mut received = Vec::new();
        // Answers that are written are on their way, not held back for more.
        let _ = self.stream.set_nodelay(true);
        let mut deadline = self.idle();
        while self.read(&mut received, deadline, stop).await?.is_continue() {
            let whole = self.answer_all(&mut rng, &mut received).await?;
            deadline = match deadline {
                _ if received.is_empty() => self.idle(),
                // The clock runs from a message's first octet, however slowly the others come.
                (_, Closed::SlowMessage) if !whole => deadline,
                _ => (Instant::now() + self.limits.message, Closed::SlowMessage),
            };
        }
        // The peer has said all, or the server stops: what came is answered before the end.
        while received.len() < WRITE_THRESHOLD && self.read_now(&mut received)? > 0 {}
        self.answer_all(&mut rng, &mut received).await?;
        self.stream.shutdown().await.map_err(|_| None)
    }

    /// Until when a connection without a question is kept.
    fn idle(&self) -> Deadline {
        (Instant::now() + self.limits.idle, Closed::Idle)
    }

    /// Waits for something to read and reads it. Breaks when the peer has said all, or on `stop`.
    async fn read(
        &self,
        received: &mut Vec<u8>,
        (until, reason): Deadline,
        stop: &CancellationToken,
    ) -> Result<ControlFlow<()>, EarlyEnd> {
        loop {
            let ready = tokio::select! {
                () = stop.cancelled() => return Ok(ControlFlow::Break(())),
                ready = timeout_at(until, self.stream.readable()) => ready,
            };
            ready.map_err(|_| Some(reason))?.map_err(|_| None)?;
            received.reserve(READ_SIZE);
            match self.stream.try_read_buf(received) {
                Ok(0) => return Ok(ControlFlow::Break(())),
                Ok(_) => return Ok(ControlFlow::Continue(())),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Err(None),
            }
        }
    }

    /// Reads what is there already.
    fn read_now(&self, received: &mut Vec<u8>) -> Result<usize, EarlyEnd> {
        received.reserve(READ_SIZE);
        match self.stream.try_read_buf(received) {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => Ok(0),
            read => read.map_err(|_| None),
        }
    }

    /// Answers every whole message and leaves the beginning of the next one; says whether there
    /// was one.
    async fn answer_all(&mut self, rng: &mut fastrand::Rng, received: &mut Vec<u8>) -> Result<bool, EarlyEnd> {
        let (mut taken, mut answers) = (0, Vec::new());
        loop {
            let more = self.answer_some(rng, &received[taken..], &mut answers);
            if more == 0 {
                break;
            }
            taken += more;
            // RFC 7766 §6.2.1.1: what was asked in one go is answered in one go. A peer that does
            // not take its answers loses the connection.
            let written = timeout(self.limits.message, self.stream.write_all(&answers)).await;
            written.map_err(|_| Some(Closed::SlowReader))?.map_err(|_| None)?;
            answers.clear();
        }
        if taken == received.len() {
            *received = Vec::new();
        } else {
            received.drain(..taken);
        }
        Ok(taken > 0)
    }

    /// Answers the whole messages that `received` begins with, as many as may wait at once, and
    /// says how many octets they took.
    fn answer_some(&self, rng: &mut fastrand::Rng, received: &[u8], answers: &mut Vec<u8>) -> usize {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut taken = 0;
            for _ in 0..self.limits.pipelined.max(1) {
                let Some((message, octets)) = split_message(&received[taken..]) else { break };
                taken += octets;
                if let Some(len) = self.responder.respond(Transport::Tcp, rng, message, scratch) {
                    let prefix = u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes();
                    answers.extend_from_slice(&prefix);
                    answers.extend_from_slice(&scratch[..len]);
                }
                if answers.len() >= WRITE_THRESHOLD {
                    break;
                }
            }
            taken
        })
    }
}

/// The message that `received` begins with and the octets it takes with its length, if it is whole.
fn split_message(received: &[u8]) -> Option<(&[u8], usize)> {
    let (prefix, rest) = received.split_first_chunk::<PREFIX>()?;
    let len = usize::from(u16::from_be_bytes(*prefix));
    rest.get(..len).map(|message| (message, PREFIX + len))
}
