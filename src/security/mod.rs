//! From an accepted connection to its peer: handshake, certificate, identity. What follows asks only for the
//! peer. Shared by the transports that have identities, and independent of what they speak.

mod peer;

use std::{
    convert::Infallible,
    future::pending,
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{
    HeaderMap,
    header::{AUTHORIZATION, Entry},
};
use tokio::{net::TcpStream, sync::watch, time::timeout};
use tokio_util::either::Either;
use tracing::warn;

pub(crate) use self::peer::{CertificateWatch, Peer};
use crate::{
    identity::{
        Authenticator, Authorizer, BearerToken, Credentials, RefusalLog, Unauthenticated, Usage,
        joining::RegistrantStore,
    },
    metrics::{AuthenticationFailure, IdentityMetrics},
    net::tls::{Alpn, PeerCertificates, ServerTls, ServerTlsStream},
};

/// The first octet of a TLS connection: a handshake record (RFC 8446 §5.1). HTTP begins with a letter.
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
    pub registrants: Option<Arc<RegistrantStore>>,
    /// Where refusals are logged.
    pub log: Arc<RefusalLog>,
    /// Where refusals are counted.
    pub metrics: Arc<IdentityMetrics>,
}

/// A connection before HTTP, in plaintext or not.
pub(crate) type SecuredStream = Either<TcpStream, Box<ServerTlsStream>>;

impl Security {
    /// Follows certificates and policy in their files, for ever.
    pub(crate) async fn follow_files(&self) -> Infallible {
        let certificates = async {
            match &self.tls {
                Some(tls) => Arc::clone(tls).follow_files().await,
                None => pending().await,
            }
        };
        tokio::join!(certificates, Arc::clone(&self.authorizer).follow_policy()).0
    }

    /// Without TLS and without rules: plaintext connections may do all.
    #[cfg(test)]
    pub(crate) fn plaintext_only(metrics: &crate::metrics::Metrics) -> Arc<Self> {
        let (log, metrics) = (Arc::new(RefusalLog::default()), Arc::clone(&metrics.identity));
        let source = crate::identity::Authorization::Plaintext;
        let authorizer = Authorizer::new(source, None, None, Arc::clone(&metrics), Arc::clone(&log));
        let authorizer = Arc::new(authorizer.expect("no file to read"));
        let usage = Usage::new(crate::identity::UsageLimits::default(), Arc::clone(&metrics));
        let authenticator = Authenticator::default();
        Arc::new(Self { tls: None, authenticator, authorizer, registrants: None, usage, log, metrics })
    }

    /// Counts and logs that `call` is refused because its caller has no identity.
    pub(crate) fn unauthenticated(&self, peer: &Peer, call: &str, err: &Unauthenticated) {
        self.metrics.unauthenticated.at(AuthenticationFailure::from(err)).inc();
        self.log.refused(|suppressed| {
            warn!(peer = %peer.address, call, error = %err, suppressed, "refused: the caller has no identity");
        });
    }

    /// Completes what comes before HTTP within `deadline`. Returns the stream and its peer, or logs why not.
    pub(crate) async fn secure(
        &self,
        stream: TcpStream,
        listener: ListenerSecurity,
        alpn: Alpn,
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
        let (stream, certificates) = match tls.accept(stream, alpn, deadline).await {
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
            Some(PeerCertificates { chain, signer }) => {
                let shown = chain.first().map(|der| Credentials::Certificate { der: der.clone(), signer: *signer });
                shown.unwrap_or(Credentials::NoCertificate)
            }
        };
        let (ended, peer) = self.peer(address, &credentials).await;
        let watch = certificates.map(|certificates| CertificateWatch {
            tls: Arc::clone(tls),
            certificates,
            authenticator: self.authenticator.clone(),
            identity: peer.identity.as_ref().ok().map(Arc::clone),
            unknown: peer.identity.as_ref().is_err_and(Unauthenticated::is_unknown),
            ended,
            metrics: Arc::clone(&self.metrics),
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

/// Takes the token out of a call's headers, so that nothing behind this sees it.
///
/// # Errors
/// When the header is not `Bearer TOKEN`, or is there more than once.
pub(crate) fn take_token(headers: &mut HeaderMap) -> Result<Option<BearerToken>, Unauthenticated> {
    let shown = match headers.entry(AUTHORIZATION) {
        Entry::Vacant(_) => return Ok(None),
        Entry::Occupied(shown) => shown.remove_entry_mult().1.collect::<Vec<_>>(),
    };
    match &shown[..] {
        [one] => BearerToken::parse(one.as_bytes()).map(Some),
        _ => Err(Unauthenticated::NotBearer),
    }
}

/// Whether the peer speaks TLS. `None` if it says nothing within `deadline`.
async fn begins_with_tls(stream: &TcpStream, deadline: Duration) -> Option<bool> {
    let mut first = [0];
    let peeked: io::Result<usize> = timeout(deadline, stream.peek(&mut first)).await.ok()?;
    Some(peeked.ok()? == 1 && first == [TLS_HANDSHAKE])
}
