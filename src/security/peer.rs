//! The other end of a connection, and its certificate as long as the connection is open.

use std::{
    future::{Future, pending},
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{sync::watch, time::sleep};
use tracing::debug;

use crate::{
    identity::{Authenticator, Identity, Unauthenticated},
    metrics::{AuthenticationFailure, IdentityMetrics},
    net::tls::{PeerCertificates, ServerTls, changed},
};

/// How often a certificate's time is looked at. Not one long sleep: the clock may be set.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(10);

/// How long a connection is open for whose certificate nobody can say: long enough to tell its calls so.
const UNKNOWN_LIFETIME: Duration = Duration::from_secs(2);

/// The other end of a connection.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) address: IpAddr,
    pub(super) identity: Result<Arc<Identity>, Unauthenticated>,
    /// Set when the identity ends.
    pub(super) ended: watch::Receiver<Option<Unauthenticated>>,
}

impl Peer {
    /// The identity for a call that begins now.
    pub(crate) fn identity(&self) -> Result<Arc<Identity>, Unauthenticated> {
        match &*self.ended.borrow() {
            Some(err) => Err(err.clone()),
            None => self.identity.clone(),
        }
    }

    /// Ready when the identity ends. `None` if it lasts as long as the connection.
    pub(crate) fn end(&self) -> Option<impl Future<Output = Unauthenticated> + Send + use<>> {
        let can_end = self.identity.as_ref().is_ok_and(|identity| identity.source.is_certificate());
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
pub(crate) struct CertificateWatch {
    pub(super) tls: Arc<ServerTls>,
    pub(super) certificates: PeerCertificates,
    pub(super) authenticator: Authenticator,
    /// `None` if the certificate says none.
    pub(super) identity: Option<Arc<Identity>>,
    /// Nobody could say whose certificate it is.
    pub(super) unknown: bool,
    pub(super) ended: watch::Sender<Option<Unauthenticated>>,
    pub(super) metrics: Arc<IdentityMetrics>,
}

impl CertificateWatch {
    /// Ends the identity when the certificate expires or the client CA no longer vouches for it. Returns when the connection
    /// should be closed, because another one may have an identity.
    pub(crate) async fn run(self) {
        if self.unknown {
            return sleep(UNKNOWN_LIFETIME).await;
        }
        let expires = self.identity.as_ref().and_then(|identity| identity.expires);
        let mut next_end = self.certificates.next_end(SystemTime::now());
        let mut changes = self.tls.changes();
        let mut revocations = self.authenticator.changes();
        // The CA may have changed since the handshake.
        let mut check = true;
        loop {
            let now = SystemTime::now();
            let expired = expires.is_some_and(|expires| expires <= now);
            // An intermediate certificate may have ended.
            if next_end.is_some_and(|end| end <= now) {
                check = true;
                next_end = self.certificates.next_end(now);
            }
            let err = if expired {
                Some(Unauthenticated::Expired)
            } else if let Some(Err(err)) = self.identity.as_ref().map(|identity| self.authenticator.check(identity)) {
                Some(err)
            } else if check && let Err(err) = self.tls.check(&self.certificates) {
                debug!(%err, "a client certificate is not good any more");
                Some(Unauthenticated::from(&err))
            } else {
                None
            };
            if let Some(err) = err {
                self.metrics.unauthenticated.at(AuthenticationFailure::from(&err)).inc();
                self.ended.send_replace(Some(err));
                return pending().await;
            }
            let left = next_end.and_then(|end| end.duration_since(now).ok());
            tokio::select! {
                changed = changes.changed() => check = changed.is_ok(),
                () = changed(&mut revocations) => check = false,
                () = sleep(left.unwrap_or(EXPIRY_INTERVAL).min(EXPIRY_INTERVAL)) => check = false,
            }
        }
    }
}
