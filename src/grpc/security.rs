//! From an accepted connection to its peer: handshake, certificate, identity. What follows asks only for the
//! [`Peer`].

use std::{
    collections::HashSet,
    convert::Infallible,
    future::{Future, pending},
    io,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    net::TcpStream,
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::either::Either;
use tonic::{Request, Status};
use tracing::{debug, warn};

use crate::{
    identity::{
        Access, AccessResource, AccessVerb, Authenticator, Authorizer, Credentials, Denied, Identity, OpenCall,
        RefusalLog, Unauthenticated, Usage, joining::Registrants,
    },
    metrics::{AuthenticationFailure, IdentityMetrics},
    model::Registrant,
    net::tls::{PeerCertificates, ServerTls, ServerTlsStream},
    registry::Requester,
};

/// How often a certificate's time is looked at. Not one long sleep: the clock may be set.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(10);

/// Most acts of one call that are decided again when rights change. What it does beyond is checked when it does it.
const MAX_ONGOING: usize = 1024;

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

/// An authenticated caller, in the extensions of its request. The only way for a service to ask what it may do.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    identity: Arc<Identity>,
    peer: IpAddr,
    authorizer: Arc<Authorizer>,
    requester: Requester,
    /// Its place among those of the identity; `None` for who may do all.
    open: Option<Arc<OpenCall>>,
    /// What the call was allowed, to be decided again when rights change; `None` for who may do all.
    ongoing: Option<Arc<Mutex<HashSet<OngoingAccess>>>>,
}

/// An act that lasts as long as its call.
#[derive(Debug, PartialEq, Eq, Hash)]
struct OngoingAccess {
    verb: AccessVerb,
    namespace: Option<Box<str>>,
    service: Option<Box<str>>,
    address: Option<IpAddr>,
}

impl Caller {
    /// The caller of a request; [`AuthenticatedRoutes`](super::authentication::AuthenticatedRoutes) has put it there.
    ///
    /// # Errors
    /// When the request has not passed there, which is a fault of this program: it is not carried out.
    pub(super) fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        request.extensions().get::<Self>().cloned().ok_or_else(|| Status::internal("the call was not authenticated"))
    }

    /// # Errors
    /// When no instance could be registered under the user's name, or the identity has too many calls open.
    pub(super) fn new(identity: Arc<Identity>, peer: IpAddr, security: &Security) -> Result<Self, Status> {
        let authorizer = &security.authorizer;
        let allows_all = authorizer.allows_all(&identity);
        let ongoing = (!allows_all).then(Arc::default);
        let (requester, open) = if allows_all {
            (Requester::Unrestricted, None)
        } else {
            let open = security.usage.begin(&identity).map_err(|err| Status::resource_exhausted(err.to_string()))?;
            let registrant = Registrant::new(Arc::clone(&identity.user));
            let registrant = registrant.map_err(|err| Status::unauthenticated(err.to_string()))?;
            (Requester::Identity { registrant, overrides: false, peer }, Some(open))
        };
        Ok(Self { identity, peer, authorizer: Arc::clone(authorizer), requester, open, ongoing })
    }

    /// On whose behalf the call changes instances, without the right to change those of others.
    pub(super) fn requester(&self) -> Requester {
        self.requester.clone()
    }

    /// How long the caller's next message has to wait; `None` if it may come.
    pub(super) fn message_wait(&self) -> Option<Duration> {
        self.open.as_ref()?.wait(Instant::now())
    }

    /// A message of the caller was read.
    pub(super) fn count_message(&self) {
        if let Some(open) = &self.open {
            open.count_message();
        }
    }

    /// Whether the caller may do this.
    ///
    /// # Errors
    /// When it may not, with the reason.
    pub(super) fn may(
        &self,
        verb: AccessVerb,
        namespace: Option<&str>,
        service: Option<&str>,
        address: Option<IpAddr>,
    ) -> Result<(), Denied> {
        self.authorizer
            .decide(&self.identity, &self.access(AccessResource::Instances, verb, namespace, service, address))?;
        if let Some(ongoing) = &self.ongoing {
            let mut ongoing = ongoing.lock().unwrap_or_else(PoisonError::into_inner);
            if ongoing.len() < MAX_ONGOING {
                let (namespace, service) = (namespace.map(Box::from), service.map(Box::from));
                ongoing.insert(OngoingAccess { verb, namespace, service, address });
            }
        }
        Ok(())
    }

    /// Whether the caller may do this with tokens or registrants, as [`Caller::may_call`].
    pub(super) fn may_administer(
        &self,
        resource: AccessResource,
        verb: AccessVerb,
        namespace: Option<&str>,
        service: Option<&str>,
    ) -> Result<(), Status> {
        let access = self.access(resource, verb, namespace, service, None);
        let decided = self.authorizer.decide(&self.identity, &access);
        decided.map_err(|denied| Status::permission_denied(denied.to_string()))
    }

    const fn access<'a>(
        &self,
        resource: AccessResource,
        verb: AccessVerb,
        namespace: Option<&'a str>,
        service: Option<&'a str>,
        address: Option<IpAddr>,
    ) -> Access<'a> {
        Access { resource, verb, namespace, service, address, peer: self.peer }
    }

    /// Who calls.
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// As [`Caller::may`], where a refusal ends the call with PERMISSION_DENIED.
    pub(super) fn may_call(
        &self,
        verb: AccessVerb,
        namespace: Option<&str>,
        service: Option<&str>,
    ) -> Result<(), Status> {
        self.may(verb, namespace, service, None).map_err(|denied| Status::permission_denied(denied.to_string()))
    }

    /// Ready when the identity ends, as `identity_end` says, or when a right of the call was withdrawn. `None` for who
    /// may do all as long as the connection lasts.
    pub(super) fn end<F: Future<Output = Unauthenticated> + Send>(
        &self,
        identity_end: Option<F>,
    ) -> Option<impl Future<Output = Status> + Send + use<F>> {
        if identity_end.is_none() && self.ongoing.is_none() {
            return None;
        }
        // Before anything is decided, so that no change is missed.
        let (caller, changes) = (self.clone(), self.authorizer.changes());
        Some(async move {
            let identity_end = async {
                match identity_end {
                    Some(end) => end.await,
                    None => pending().await,
                }
            };
            tokio::select! {
                err = identity_end => Status::unauthenticated(err.to_string()),
                denied = caller.withdrawn(changes) => Status::permission_denied(denied.to_string()),
            }
        })
    }

    /// Ready when something that the call was allowed is denied.
    async fn withdrawn(&self, mut changes: watch::Receiver<u64>) -> Denied {
        let Some(ongoing) = &self.ongoing else { return pending().await };
        loop {
            if changes.changed().await.is_err() {
                return pending().await;
            }
            let ongoing = ongoing.lock().unwrap_or_else(PoisonError::into_inner);
            let denied = ongoing.iter().find_map(|OngoingAccess { verb, namespace, service, address }| {
                let (namespace, service) = (namespace.as_deref(), service.as_deref());
                let access = self.access(AccessResource::Instances, *verb, namespace, service, *address);
                self.authorizer.decide(&self.identity, &access).err()
            });
            if let Some(denied) = denied {
                return denied;
            }
        }
    }
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
        let expires = self.identity.as_ref().is_ok_and(|identity| identity.expires.is_some());
        let mut ended = self.ended.clone();
        expires.then_some(async move {
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
    expires: Option<SystemTime>,
    ended: watch::Sender<Option<Unauthenticated>>,
}

impl CertificateWatch {
    /// Ends the identity when the certificate expires or the client CA no longer vouches for it.
    pub(super) async fn run(self, metrics: &IdentityMetrics) {
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
            (None, Some(credentials)) => return Some(self.plaintext(stream, address, &credentials)),
            (Some(tls), Some(credentials)) => {
                if !begins_with_tls(&stream, deadline).await? {
                    return Some(self.plaintext(stream, address, &credentials));
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
        let (ended, peer) = self.peer(address, &credentials);
        let watch = certificates.map(|certificates| {
            let (tls, authenticator) = (Arc::clone(tls), self.authenticator.clone());
            let identity = peer.identity.as_ref().ok().map(Arc::clone);
            let expires = identity.as_ref().and_then(|identity| identity.expires);
            CertificateWatch { tls, certificates, authenticator, identity, expires, ended }
        });
        Some((Either::Right(Box::new(stream)), peer, watch))
    }

    fn plaintext(
        &self,
        stream: TcpStream,
        address: IpAddr,
        credentials: &Credentials,
    ) -> (SecuredStream, Peer, Option<CertificateWatch>) {
        (Either::Left(stream), self.peer(address, credentials).1, None)
    }

    fn peer(&self, address: IpAddr, credentials: &Credentials) -> (watch::Sender<Option<Unauthenticated>>, Peer) {
        let identity = self.authenticator.identify(credentials, SystemTime::now()).map(Arc::new);
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
