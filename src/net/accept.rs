//! The accept loop that gRPC, DNS over TCP and admin share.

use std::{future::Future, io, pin::pin, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::limiter::{ConnectionLimiter, Permit};

/// Pause after an accept that failed for a lasting reason, such as no free descriptors (EMFILE), so that
/// the loop neither spins nor ends. The connection waits in the backlog meanwhile.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// How long connections may take to end after [`Signal::Close`](super::Signal::Close).
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Accepts connections until `stop` and runs `connection` for each that the limiter admits. After `stop`
/// the connections get [`Signal::Drain`](super::Signal::Drain); those that are still open after `grace` are
/// closed.
pub async fn serve<F>(
    listener: TcpListener,
    limiter: Arc<ConnectionLimiter>,
    grace: Duration,
    stop: CancellationToken,
    connection: impl Fn(TcpStream, Permit) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut connections = JoinSet::new();
    let accepting = async {
        loop {
            // Outside of the inner loop: each turn would drop the future, and with it the connection
            // that waits for admission.
            let mut next = pin!(admitted(&listener, &limiter));
            loop {
                tokio::select! {
                    (stream, permit) = &mut next => {
                        connections.spawn(connection(stream, permit));
                        break;
                    }
                    // Joined as they end, so that the set holds open connections only.
                    Some(ended) = connections.join_next() => {
                        if let Err(err) = ended {
                            warn!(error = %err, listener = limiter.listener(), "a connection's task panicked");
                        }
                    }
                }
            }
        }
    };
    // Dropping the future may drop a connection between its accept and its task: the peer sees a close, as after the
    // stop.
    let _: Option<()> = stop.run_until_cancelled(accepting).await;
    // Before the drain: the kernel refuses new peers at once, who then try another server.
    drop(listener);
    limiter.drain();
    let mut all_ended = async || while connections.join_next().await.is_some() {};
    if timeout(grace, all_ended()).await.is_err() {
        limiter.close_all();
        // They get a moment to end by themselves; what does not is aborted below, so that the stop has an end.
        let _ = timeout(CLOSE_TIMEOUT, all_ended()).await;
        debug!(listener = limiter.listener(), "connections were closed at the end of the grace period");
        connections.shutdown().await;
    }
}

/// Waits for the next connection that the limiter admits.
async fn admitted(listener: &TcpListener, limiter: &Arc<ConnectionLimiter>) -> (TcpStream, Permit) {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            // The peer disconnected before the accept, which is no fault of the listener.
            Err(err) if is_peer_gone(&err) => continue,
            Err(err) => {
                // Logged once per outage, however long it lasts.
                if limiter.accept_failed() {
                    warn!(error = %err, listener = limiter.listener(), "connections cannot be accepted; trying again");
                }
                sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        if limiter.accept_succeeded() {
            info!(listener = limiter.listener(), "connections are accepted again");
        }
        // A refused connection is closed at once, so that the peer can try another server.
        if let Some(permit) = limiter.acquire(peer.ip()).await {
            return (stream, permit);
        }
    }
}

fn is_peer_gone(err: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(err.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}
