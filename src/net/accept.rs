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

/// Pause after an accept that failed for a reason that lasts, such as no descriptors left (EMFILE):
/// the loop must neither spin nor end. The connection waits in the backlog meanwhile.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// How long connections may take to end after they were closed by force.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Accepts connections until `stop` and runs `connection` for each that the limiter admits. After
/// `stop` the connections are told to drain; those that are open after `grace` are closed.
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
            // Kept across the turns of the inner loop: dropped, it would close the connection that
            // waits for room.
            let mut next = pin!(admitted(&listener, &limiter));
            loop {
                tokio::select! {
                    (stream, permit) = &mut next => {
                        connections.spawn(connection(stream, permit));
                        break;
                    }
                    // Reaped as they end, so that the set holds open connections only.
                    Some(ended) = connections.join_next() => {
                        if let Err(err) = ended {
                            warn!(error = %err, listener = limiter.listener(), "a connection's task panicked");
                        }
                    }
                }
            }
        }
    };
    let _: Option<()> = stop.run_until_cancelled(accepting).await;
    drop(listener);
    limiter.drain();
    let mut all_ended = async || while connections.join_next().await.is_some() {};
    if timeout(grace, all_ended()).await.is_err() {
        limiter.close_all();
        let _ = timeout(CLOSE_TIMEOUT, all_ended()).await;
        debug!(listener = limiter.listener(), "connections were closed at the end of the grace period");
        connections.shutdown().await;
    }
}

/// The next connection that the limiter admits, however long that takes.
async fn admitted(listener: &TcpListener, limiter: &Arc<ConnectionLimiter>) -> (TcpStream, Permit) {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            // The peer went away before its turn: nothing is wrong with the listener.
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
        // A connection that is not admitted is closed at once: a peer that knows can go elsewhere.
        if let Ok(permit) = limiter.acquire(peer.ip()).await {
            return (stream, permit);
        }
    }
}

fn is_peer_gone(err: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(err.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}
