//! Joining: a machine exchanges a token for a client certificate of the own CA, and may then do what the token says.
//!
//! 1. A token is known by the hash of its secret. It is good for a time, and for a number of machines.
//! 2. A machine that joined is a registrant: a user name that the server gives, and the scope of the token. Its key never
//!    leaves it.
//! 3. What a registrant may do is its scope, and nothing else. One that was revoked has no identity, whatever its certificate.
//! 4. A change is stored before it is answered, and before it counts: in the data directory (`directory`), or, with
//!    Kubernetes, in Secrets that all processes share (`cluster`).
//!
//! Only for a server with a CA of its own.

mod attempts;
mod cluster;
mod directory;
mod error;
mod format;
mod lookups;
mod pem;
mod request;
mod scope;
mod state;
mod store;
mod table;
mod token;

use std::{
    convert::Infallible,
    net::IpAddr,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

pub(super) use self::cluster::set_aside;
use self::{
    attempts::Attempts,
    cluster::{ClusterStore, NotFound},
    directory::DirectoryStore,
    request::VerifiedRequest,
    state::{RENEWAL_GRACE, USER_PREFIX},
    store::{JoinAttempt, Store},
    table::JoiningTable,
};
pub use self::{
    error::JoiningError,
    pem::{ClientCertificate, certificates_from_pem},
    request::{InvalidRequest, new_request, request_with},
    scope::{InvalidScope, Scope, ScopeSpec},
    state::{Full, JoinedRegistrant, Token, TokenRefused},
    token::{InvalidToken, JoinToken, Secret, TokenId},
};
use super::{
    Access, CaError, CurrentCa, Denied, Identity, IdentitySource, PublicKeyHash, Unauthenticated, ca, certificate,
    is_name, random,
};
use crate::{
    kubernetes::secrets::Secrets,
    metrics::{JoinResult, JoiningMetrics},
    model::{ServerAddress, hex},
};

/// How long the certificate of a registrant is valid.
const CERTIFICATE_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// Longest life of a token.
const MAX_TTL: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Most machines that one token is good for.
const MAX_USES: u32 = 10_000;

/// Most bytes of a certificate that is renewed. Those of this CA have some 500.
const MAX_CERTIFICATE_BYTES: usize = 4 * 1024;

/// Most bytes of what a machine calls itself: a DNS name.
const MAX_HOST: usize = 253;

/// Most addresses in a token.
const MAX_ADDRESSES: usize = 8;

/// What an earlier run without Kubernetes has left in the data directory: to be taken over, and what is not used any more.
const IMPORT_FILE: &str = "registrants-import.json";
const RETIRED_FILE: &str = "registrants.json.retired";

/// Bytes of a registrant's name, which are random.
const NAME_BYTES: usize = 6;

/// What a machine that joined gets.
#[derive(Debug)]
pub struct Joined {
    /// The user in the certificate.
    pub user: String,
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// What it may do.
    pub scope: Scope,
}

/// Tokens and registrants of this server, and its CA.
#[derive(Debug)]
pub struct RegistrantStore {
    ca: Arc<CurrentCa>,
    /// Where other machines reach this server.
    addresses: Vec<ServerAddress>,
    /// What is stored, as far as it is known here.
    table: Arc<JoiningTable>,
    store: Store,
    attempts: Mutex<Attempts>,
    metrics: Arc<JoiningMetrics>,
    /// Whether the CA signs for servers, too.
    signs_servers: bool,
}

/// Of one server.
#[derive(Debug)]
pub struct RegistrantsConfig {
    /// What signs for machines that join.
    pub ca: Arc<CurrentCa>,
    /// Whether it signs for this server and its replicas, too.
    pub signs_servers: bool,
    /// Where other machines reach this server.
    pub addresses: Vec<ServerAddress>,
}

impl RegistrantStore {
    /// Reads what is stored in `dir`. The caller has the lock of the directory.
    ///
    /// # Errors
    /// When the file cannot be read or understood.
    pub fn open(dir: &Path, config: RegistrantsConfig, metrics: Arc<JoiningMetrics>) -> Result<Arc<Self>, CaError> {
        let table = JoiningTable::new(Arc::clone(&metrics));
        let store = Store::Directory(DirectoryStore::open(dir, Arc::clone(&table))?);
        Ok(Self::new(config, table, store, metrics))
    }

    /// Those in Secrets, of which nothing is known yet. What an earlier run has left in the data directory `dir` is taken
    /// over.
    #[must_use]
    pub fn shared(
        secrets: Arc<Secrets>,
        dir: &Path,
        config: RegistrantsConfig,
        metrics: Arc<JoiningMetrics>,
    ) -> Arc<Self> {
        let table = JoiningTable::new(Arc::clone(&metrics));
        let cluster = ClusterStore::new(secrets, Arc::clone(&table), Arc::clone(&config.ca), dir.to_owned());
        Self::new(config, table, Store::Cluster(cluster), metrics)
    }

    fn new(
        config: RegistrantsConfig,
        table: Arc<JoiningTable>,
        store: Store,
        metrics: Arc<JoiningMetrics>,
    ) -> Arc<Self> {
        let RegistrantsConfig { ca, signs_servers, addresses } = config;
        let attempts = Mutex::new(Attempts::new(Instant::now()));
        Arc::new(Self { ca, addresses, table, store, attempts, metrics, signs_servers })
    }

    /// Does what is to be done beside the calls: with Secrets, completes changes, and deletes what has no meaning any more
    /// while `is_writer`. Never ends.
    pub async fn run(&self, is_writer: impl Fn() -> bool + Send) -> Infallible {
        match &self.store {
            Store::Directory(_) => std::future::pending().await,
            Store::Cluster(cluster) => Arc::clone(cluster).run(is_writer).await,
        }
    }

    /// Whether a machine without an identity may join now; counted against its address.
    #[must_use]
    pub fn admit(&self, peer: IpAddr) -> bool {
        self.admitted(|attempts| attempts.admit(peer, Instant::now()))
    }

    /// Whether a machine may send a renewal now; counted against its address. Whether it is a stranger, its message says.
    #[must_use]
    pub fn admit_renewal(&self, peer: IpAddr) -> bool {
        self.admitted(|attempts| attempts.admit_address(peer, Instant::now()).unwrap_or(true))
    }

    fn admitted(&self, admit: impl FnOnce(&mut Attempts) -> bool) -> bool {
        let admitted = admit(&mut self.attempts.lock().unwrap_or_else(PoisonError::into_inner));
        if !admitted {
            self.metrics.requests.at(JoinResult::RateLimited).inc();
        }
        admitted
    }

    /// Counts how a call of a machine ended.
    pub fn count(&self, result: JoinResult) {
        self.metrics.requests.at(result).inc();
    }

    /// Whether a certificate of the own CA with this user is a server's.
    pub(super) fn is_server(&self, user: &str) -> bool {
        self.signs_servers && user == ca::SERVER_USER
    }

    /// Where other machines reach this server.
    #[must_use]
    pub fn addresses(&self) -> &[ServerAddress] {
        &self.addresses
    }

    /// Creates a token. It names this server, which is known by the hash `server`, and `others` after it.
    ///
    /// # Errors
    /// The field that is invalid, or why it cannot be stored.
    pub async fn create_token(
        &self,
        scope: Scope,
        created_by: &str,
        (ttl, uses): (Duration, u32),
        server: Option<PublicKeyHash>,
        others: &[ServerAddress],
        now: SystemTime,
    ) -> Result<(JoinToken, Token), JoiningError> {
        let field = |field, reason| JoiningError::Field { field, reason };
        if ttl.is_zero() || ttl > MAX_TTL {
            return Err(field("ttl_seconds", format!("must be 1..={}", MAX_TTL.as_secs())));
        }
        if uses == 0 || uses > MAX_USES {
            return Err(field("uses", format!("must be 1..={MAX_USES}")));
        }
        let mut addresses = self.addresses.clone();
        addresses.extend(others.iter().filter(|other| !self.addresses.contains(other)).cloned());
        addresses.truncate(MAX_ADDRESSES);
        if addresses.is_empty() {
            return Err(JoiningError::NoAddress);
        }
        // By which machines get their certificates.
        self.ca.get()?;
        let no_certificate = || JoiningError::Unavailable("the server has no certificate yet".into());
        let ca = server.ok_or_else(no_certificate)?;
        let (id, secret) = (TokenId::generate(), Secret::generate());
        let secret_hash = state::hash(secret.expose());
        let created_by = created_by.to_owned();
        let token = Token { scope, created_by, created: now, expires: now + ttl, uses, used: 0, secret: secret_hash };
        self.store.add_token(id, token.clone(), now).await?;
        Ok((JoinToken { id, secret, ca, addresses }, token))
    }

    /// Removes a token. Returns whether there was one.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub async fn revoke_token(&self, id: TokenId, now: SystemTime) -> Result<bool, JoiningError> {
        self.store.remove_token(id, now).await
    }

    /// Exchanges a token for a certificate. A machine that proves to have the key of its `previous` certificate keeps its name,
    /// and so what it has registered, unless it was revoked.
    ///
    /// # Errors
    /// When the token or the request is not good, or it cannot be stored.
    pub async fn join(
        &self,
        id: TokenId,
        secret: &[u8],
        request: &[u8],
        host: &str,
        previous: &[u8],
        now: SystemTime,
    ) -> Result<Joined, JoiningError> {
        // First, so that who has no token has no work done.
        let is_known = self.table.read().tokens.contains_key(&id);
        if !is_known && let Err(NotFound::Unknown(reason)) = self.store.look_up_token(id).await {
            return Err(JoiningError::Unavailable(format!("whether there is such a token: {reason}")));
        }
        self.table.read().check_token(id, secret, now)?;
        if host.len() > MAX_HOST || !(host.is_empty() || is_name(host)) {
            let reason = format!("must have at most {MAX_HOST} bytes, and no characters that are not shown");
            return Err(JoiningError::Field { field: "host", reason });
        }
        let request = VerifiedRequest::parse(request)?;
        let user = self
            .user_of(previous, &request)
            .await?
            .unwrap_or_else(|| format!("{USER_PREFIX}{}", hex::encode(&random::<NAME_BYTES>())));
        let ca::SignedCertificate { certificate, not_after } =
            self.ca.get()?.sign_client(&request.public_key, &user, now, CERTIFICATE_LIFETIME)?;
        let (secret, host) = (secret.to_vec(), host.to_owned());
        let attempt = JoinAttempt { token: id, secret, user: user.clone(), host, expires: not_after, now };
        let scope = self.store.join(attempt).await?;
        Ok(Joined { user, certificate, scope })
    }

    /// The registrant that a certificate of this CA names, if it is for the key of the request, and was not revoked.
    async fn user_of(&self, certificate: &[u8], request: &VerifiedRequest) -> Result<Option<String>, JoiningError> {
        let der = CertificateDer::from(certificate);
        let known = certificate.len() <= MAX_CERTIFICATE_BYTES && self.ca.get()?.has_signed(&der);
        let facts = certificate::facts(&der).filter(|facts| known && facts.public_key == request.der);
        let Some(user) = facts.map(|facts| facts.user.to_string()) else { return Ok(None) };
        let is_known = self.is_known(&user).await?;
        let state = self.table.read();
        let active = state.registrants.get(&user).is_some_and(|registrant| registrant.revoked.is_none());
        Ok((is_known && active).then_some(user))
    }

    /// Whether there is such a registrant, which another process may have added a moment ago.
    async fn is_known(&self, user: &str) -> Result<bool, JoiningError> {
        if self.table.read().registrants.contains_key(user) {
            return Ok(true);
        }
        match self.store.look_up_registrant(user).await {
            Ok(()) => Ok(self.table.read().registrants.contains_key(user)),
            Err(NotFound::Absent) => Ok(false),
            Err(NotFound::Unknown(reason)) => Err(JoiningError::Unavailable(format!("who joined: {reason}"))),
        }
    }

    /// Signs a new certificate for a registrant that has one, valid or expired at most 7 days ago, and proves by
    /// the signature of its request that it has the key.
    ///
    /// # Errors
    /// When the certificate or the request is not good, or it cannot be stored.
    pub async fn renew(&self, certificate: &[u8], request: &[u8], now: SystemTime) -> Result<Joined, JoiningError> {
        let refused = JoiningError::Certificate;
        if certificate.len() > MAX_CERTIFICATE_BYTES {
            return Err(refused("it has more than 4 KiB"));
        }
        let der = CertificateDer::from(certificate);
        let facts = certificate::facts(&der);
        // A name is random, so strangers know none: however many call, who joined renews.
        let is_known = facts.as_ref().is_some_and(|facts| self.table.read().registrants.contains_key(&*facts.user));
        if !is_known && !self.attempts.lock().unwrap_or_else(PoisonError::into_inner).admit_stranger(Instant::now()) {
            return Err(JoiningError::TooMany);
        }
        if !self.ca.get()?.has_signed(&der) {
            return Err(refused("this server's CA has not signed it"));
        }
        let shown = facts.ok_or_else(|| refused("it cannot be read"))?;
        if !self.is_known(&shown.user).await? {
            return Err(refused("the registrant is unknown"));
        }
        if now > shown.not_after + RENEWAL_GRACE {
            return Err(JoiningError::Expired);
        }
        let request = VerifiedRequest::parse(request)?;
        if request.der != shown.public_key {
            return Err(refused("the request is for another key"));
        }
        let user = shown.user.to_string();
        let ca::SignedCertificate { certificate, not_after } =
            self.ca.get()?.sign_client(&request.public_key, &user, now, CERTIFICATE_LIFETIME)?;
        let renewed = self.store.update(user.clone(), now, move |registrant| {
            if registrant.revoked.is_some() {
                return Err(JoiningError::Revoked);
            }
            registrant.expires = registrant.expires.max(not_after);
            Ok(registrant.scope.clone())
        });
        let scope = renewed.await?.ok_or_else(|| refused("the registrant is unknown"))?;
        Ok(Joined { user, certificate, scope })
    }

    /// Revokes a registrant. Returns whether there was one.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub async fn revoke(&self, user: &str, now: SystemTime) -> Result<bool, JoiningError> {
        let revoked = self.store.update(user.to_owned(), now, move |registrant| {
            registrant.revoked.get_or_insert(now);
            Ok(())
        });
        let found = revoked.await?.is_some();
        self.table.ended();
        Ok(found)
    }

    /// Whether another machine can join with a token, as far as it is known here.
    #[must_use]
    pub fn is_usable(&self, id: TokenId, now: SystemTime) -> bool {
        self.table.read().tokens.get(&id).is_some_and(|token| token.is_usable(now).is_ok())
    }

    /// The tokens, by id.
    ///
    /// # Errors
    /// While not all of them are known.
    pub fn tokens(&self) -> Result<Vec<(TokenId, Token)>, JoiningError> {
        self.listed()?;
        Ok(self.table.read().tokens.iter().map(|(id, token)| (*id, token.clone())).collect())
    }

    /// The registrants, in the order in which they joined.
    ///
    /// # Errors
    /// While not all of them are known.
    pub fn registrants(&self) -> Result<Vec<(String, JoinedRegistrant)>, JoiningError> {
        self.listed()?;
        let mut all: Vec<_> =
            self.table.read().registrants.iter().map(|(user, one)| (user.clone(), one.clone())).collect();
        all.sort_unstable_by(|(a_user, a), (b_user, b)| (a.joined, a_user).cmp(&(b.joined, b_user)));
        Ok(all)
    }

    /// Whether what is not known here does not exist.
    fn listed(&self) -> Result<(), JoiningError> {
        let unknown = "the Secrets of tokens and registrants are not listed yet: Kubernetes does not answer, or does not let \
                       this account list and watch secrets, as deploy/kustomize/rbac-own-ca.yaml does";
        if self.table.is_complete() { Ok(()) } else { Err(JoiningError::Unavailable(unknown.into())) }
    }

    /// Whether the user of a certificate of the own CA still has an identity, as far as it is known here.
    pub(super) fn check(&self, user: &str) -> Result<(), Unauthenticated> {
        match self.table.read().registrants.get(user) {
            Some(registrant) if registrant.revoked.is_none() => Ok(()),
            Some(_) | None => Err(Unauthenticated::Revoked),
        }
    }

    /// Whether the user of a certificate of the own CA has an identity. Waits only for what is not known here.
    pub(super) async fn identify(&self, user: &str) -> Result<(), Unauthenticated> {
        let unknown = !self.table.read().registrants.contains_key(user);
        if unknown && let Err(NotFound::Unknown(reason)) = self.store.look_up_registrant(user).await {
            return Err(Unauthenticated::RegistrantUnknown(reason));
        }
        self.check(user)
    }

    /// What the scope of a registrant says; `None` for who did not join.
    pub(super) fn decide(&self, identity: &Identity, access: &Access<'_>) -> Option<Result<(), Denied>> {
        if !is_registrant(identity) {
            return None;
        }
        let state = self.table.read();
        let registrant = state.registrants.get(&*identity.user).filter(|registrant| registrant.revoked.is_none());
        Some(match registrant {
            Some(registrant) => registrant.scope.decide(&identity.user, access),
            None => Err(Denied(format!("{identity} may not {access}: it was revoked"))),
        })
    }

    /// Changes whenever a registrant may have been revoked.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.table.changes()
    }
}

/// Whether the identity is of a machine that joined, here or at another server of the same CA.
pub(super) fn is_registrant(identity: &Identity) -> bool {
    identity.source == IdentitySource::Registrant
        || (identity.source == IdentitySource::Certificate && is_registrant_name(&identity.user))
}

/// Whether a user of this name is a machine that joined.
pub(super) fn is_registrant_name(user: &str) -> bool {
    user.starts_with(USER_PREFIX)
}

/// Exactly `N` bytes in hexadecimal digits.
fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    hex::decode(text)?.try_into().ok()
}

#[cfg(test)]
mod tests;
