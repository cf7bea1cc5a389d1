//! From an accepted connection to its peer: handshake, certificate, identity. What follows asks only for the
//! [`Peer`].

use std::{
    convert::Infallible,
    future::{Future, pending},
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    net::TcpStream,
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::either::Either;
use tracing::{debug, warn};

use crate::{
    identity::{
        Authenticator, Authorizer, Credentials, Identity, IdentitySource, RefusalLog, Unauthenticated, Usage,
        joining::Registrants,
    },
    metrics::{AuthenticationFailure, IdentityMetrics},
    net::tls::{PeerCertificates, ServerTls, ServerTlsStream},
};

/// How often a certificate's time is looked at. Not one long sleep: the clock may be set.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(10);

/// How long a connection is open for whose certificate nobody can say: long enough to tell its calls so.
const UNKNOWN_LIFETIME: Duration = Duration::from_secs(2);

/// The first octet of a TLS connection: a handshake record (RFC 8446 §5.1). HTTP/2 begins with `P`.
const TLS_HANDSHAKE: u8 = 22;

/// How a listener takes connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListenerSecurity {
    /// Plaintext over loopback; with a certificate, TLS too.
    Loopback,
    /// Plaintext by `--insecure`; with a certificate, TLS too.
    Insecure,
    /// TLS only.
    Tls,
}

/// Who may connect, and do what: shared by all listeners.
#[derive(Debug)]
pub struct Security {
    /// Certificate and client CA; `None` without TLS.
    pub tls: Option<Arc<ServerTls>>,
    /// Makes identities.
    pub authenticator: Authenticator,
    /// Decides on them.
    pub authorizer: Arc<Authorizer>,
    /// What identities use.
    pub usage: Usage,
    /// Who joined; `None` without a CA of its own.
    pub registrants: Option<Arc<Registrants>>,
    /// Where refusals are logged.
    pub log: Arc<RefusalLog>,
}

/// A connection before HTTP/2, in plaintext or not.
pub(super) type SecuredStream = Either<TcpStream, Box<ServerTlsStream>>;

/// The other end of a connection.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) address: IpAddr,
    identity: Result<Arc<Identity>, Unauthenticated>,
    /// Set when the identity ends.
    ended: watch::Receiver<Option<Unauthenticated>>,
}

impl Peer {
    /// The identity for a call that begins now.
    pub(super) fn identity(&self) -> Result<Arc<Identity>, Unauthenticated> {
        match &*self.ended.borrow() {
            Some(err) => Err(err.clone()),
            None => self.identity.clone(),
        }
    }

    /// Ready when the identity ends. `None` if it lasts as long as the connection.
    pub(super) fn end(&self) -> Option<impl Future<Output = Unauthenticated> + Send + use<>> {
        let can_end = self.identity.as_ref().is_ok_and(|identity| identity.source == IdentitySource::Certificate);
        let mut ended = self.ended.clone();
        can_end.then_some(async move {
            let err = ended.wait_for(Option::is_some).await.ok().and_then(|ended| ended.clone());
            match err {
                Some(err) => err,
                // The connection has ended.
                None => pending().await,
            }
        })
    }
}

/// Follows the certificate of a connection as long as the connection is open.
pub(super) struct CertificateWatch {
    tls: Arc<ServerTls>,
    certificates: PeerCertificates,
    authenticator: Authenticator,
    identity: Option<Arc<Identity>>,
    /// Nobody could say whose certificate it is.
    unknown: bool,
    expires: Option<SystemTime>,
    ended: watch::Sender<Option<Unauthenticated>>,
}

impl CertificateWatch {
    /// Ends the identity when the certificate expires or the client CA no longer vouches for it. Returns when the connection
    /// should be closed, because another one may have an identity.
    pub(super) async fn run(self, metrics: &IdentityMetrics) {
        if self.unknown {
            return sleep(UNKNOWN_LIFETIME).await;
        }
        let mut changes = self.tls.changes();
        let mut revocations = self.authenticator.changes();
        // The CA may have changed since the handshake.
        let mut check = true;
        loop {
            let expired = self.expires.is_some_and(|expires| expires <= SystemTime::now());
            let err = if expired {
                Some(Unauthenticated::Expired)
            } else if let Some(Err(err)) = self.identity.as_ref().map(|identity| self.authenticator.check(identity)) {
                Some(err)
            } else if check && let Err(err) = self.tls.check(&self.certificates) {
                debug!(%err, "a client certificate is not good any more");
                Some(Unauthenticated::Untrusted)
            } else {
                None
            };
            if let Some(err) = err {
                metrics.unauthenticated.at(AuthenticationFailure::from(&err)).inc();
                self.ended.send_replace(Some(err));
                return pending().await;
            }
            let left = self.expires.and_then(|expires| expires.duration_since(SystemTime::now()).ok());
            tokio::select! {
                changed = changes.changed() => check = changed.is_ok(),
                () = changed(&mut revocations) => check = false,
                () = sleep(left.unwrap_or(EXPIRY_INTERVAL).min(EXPIRY_INTERVAL)) => check = false,
            }
        }
    }
}

impl Security {
    /// Follows certificates and policy in their files, for ever.
    pub(super) async fn follow_files(&self) -> Infallible {
        let certificates = async {
            match &self.tls {
                Some(tls) => Arc::clone(tls).follow_files().await,
                None => pending().await,
            }
        };
        tokio::join!(certificates, Arc::clone(&self.authorizer).follow_policy()).0
    }

    /// Completes what comes before HTTP/2 within `deadline`. Returns the stream and its peer, or logs why not.
    pub(super) async fn secure(
        &self,
        stream: TcpStream,
        listener: ListenerSecurity,
        deadline: Duration,
    ) -> Option<(SecuredStream, Peer, Option<CertificateWatch>)> {
        let address = stream.peer_addr().ok()?.ip().to_canonical();
        let plaintext = match listener {
            ListenerSecurity::Tls => None,
            ListenerSecurity::Loopback => Some(Credentials::LoopbackPlaintext),
            ListenerSecurity::Insecure => Some(Credentials::InsecurePlaintext),
        };
        let tls = match (&self.tls, plaintext) {
            (None, None) => {
                warn!("a TLS listener without a certificate takes no connection");
                return None;
            }
            (None, Some(credentials)) => return Some(self.plaintext(stream, address, &credentials).await),
            (Some(tls), Some(credentials)) => {
                if !begins_with_tls(&stream, deadline).await? {
                    return Some(self.plaintext(stream, address, &credentials).await);
                }
                tls
            }
            (Some(tls), None) => tls,
        };
        let (stream, certificates) = match tls.accept(stream, deadline).await {
            Ok(accepted) => accepted,
            Err(err) => {
                self.log.refused(|suppressed| {
                    warn!(peer = %address, error = %err, suppressed, "refused: the TLS handshake failed");
                });
                return None;
            }
        };
        let credentials = match &certificates {
            None => Credentials::NoCertificate,
            Some(chain) => chain.first().cloned().map_or(Credentials::NoCertificate, Credentials::Certificate),
        };
        let (ended, peer) = self.peer(address, &credentials).await;
        let watch = certificates.map(|certificates| {
            let (tls, authenticator) = (Arc::clone(tls), self.authenticator.clone());
            let identity = peer.identity.as_ref().ok().map(Arc::clone);
            let unknown = peer.identity.as_ref().is_err_and(Unauthenticated::is_unknown);
            let expires = identity.as_ref().and_then(|identity| identity.expires);
            CertificateWatch { tls, certificates, authenticator, identity, unknown, expires, ended }
        });
        Some((Either::Right(Box::new(stream)), peer, watch))
    }

    async fn plaintext(
        &self,
        stream: TcpStream,
        address: IpAddr,
        credentials: &Credentials,
    ) -> (SecuredStream, Peer, Option<CertificateWatch>) {
        (Either::Left(stream), self.peer(address, credentials).await.1, None)
    }

    async fn peer(&self, address: IpAddr, credentials: &Credentials) -> (watch::Sender<Option<Unauthenticated>>, Peer) {
        let identity = self.authenticator.identify(credentials, SystemTime::now()).await;
        let (sender, ended) = watch::channel(None);
        (sender, Peer { address, identity, ended })
    }
}

/// Ready when what `changes` follows has changed; never without it.
async fn changed(changes: &mut Option<watch::Receiver<u64>>) {
    if let Some(changes) = changes
        && changes.changed().await.is_ok()
    {
        return;
    }
    pending::<()>().await;
}

/// Whether the peer speaks TLS. `None` if it says nothing within `deadline`.
async fn begins_with_tls(stream: &TcpStream, deadline: Duration) -> Option<bool> {
    let mut first = [0];
    let peeked: io::Result<usize> = timeout(deadline, stream.peek(&mut first)).await.ok()?;
    Some(peeked.ok()? == 1 && first == [TLS_HANDSHAKE])
}
