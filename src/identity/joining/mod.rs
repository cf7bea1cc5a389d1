//! Joining: a machine exchanges a token for a client certificate of the own CA, and may then do what the token says.
//!
//! 1. A token is known by the hash of its secret. It is good for a time, and for a number of machines.
//! 2. A machine that joined is a registrant: a user name that the server gives, and the scope of the token. Its key never
//!    leaves it.
//! 3. What a registrant may do is its scope, and nothing else. One that was revoked has no identity, whatever its certificate.
//! 4. A change is in `registrants.json` before it is answered, and before it counts.
//!
//! Only for a server with a CA of its own; not shared by replicas.

mod attempts;
mod format;
mod pem;
mod request;
mod scope;
mod state;
mod token;

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwap;
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use self::{
    attempts::Attempts,
    request::VerifiedRequest,
    state::{JoiningState, RENEWAL_GRACE, USER_PREFIX},
};
pub use self::{
    pem::{ClientCertificate, certificate_to_pem},
    request::{InvalidRequest, new_request, request_with},
    scope::{InvalidScope, Scope, ScopeSpec},
    state::{Full, JoinedRegistrant, Token, TokenRefused},
    token::{InvalidToken, JoinToken, Secret, TokenId},
};
use super::{
    Access, CaError, CertificateAuthority, Denied, Identity, IdentitySource, Unauthenticated, ca, certificate,
    private_file, random,
};
use crate::{
    metrics::{JoinResult, JoiningMetrics},
    model::{ServerAddress, hex},
};

/// The file in the data directory.
const STATE_FILE: &str = "registrants.json";

/// Most bytes of that file. Each of the tokens and registrants takes some 500.
const MAX_STATE_BYTES: u64 = 64 * 1024 * 1024;

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

/// Bytes of a registrant's name, which are random.
const NAME_BYTES: usize = 6;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum JoiningError {
    /// The token is not good.
    #[error(transparent)]
    Token(#[from] TokenRefused),
    /// The request for a certificate is not good.
    #[error(transparent)]
    Request(#[from] InvalidRequest),
    /// Another field is invalid.
    #[error("{field}: {reason}")]
    Field {
        /// The field.
        field: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The certificate cannot be renewed.
    #[error("the certificate cannot be renewed: {0}; join again with a new token")]
    Certificate(&'static str),
    /// It expired too long ago.
    #[error("the certificate expired more than 7 days ago; join again with a new token")]
    Expired,
    /// The registrant was revoked.
    #[error("the registrant was revoked")]
    Revoked,
    /// No more can be kept.
    #[error(transparent)]
    Full(#[from] Full),
    /// Nobody knows where the server is.
    #[error("nothing says where other machines reach this server: start it with --advertise ADDR")]
    NoAddress,
    /// The state cannot be stored.
    #[error("{path} cannot be written: {err}", path = path.display())]
    Store {
        /// The file.
        path: PathBuf,
        /// Why not.
        err: io::Error,
    },
    /// The CA failed.
    #[error(transparent)]
    Ca(#[from] CaError),
}

impl JoiningError {
    /// As what it is counted.
    #[must_use]
    pub const fn result(&self) -> JoinResult {
        match self {
            Self::Token(TokenRefused::Unknown) => JoinResult::UnknownToken,
            Self::Token(TokenRefused::Expired) => JoinResult::ExpiredToken,
            Self::Token(TokenRefused::Used) => JoinResult::UsedToken,
            Self::Request(_) | Self::Field { .. } => JoinResult::InvalidRequest,
            Self::Certificate(_) => JoinResult::BadCertificate,
            Self::Expired => JoinResult::ExpiredCertificate,
            Self::Revoked => JoinResult::Revoked,
            Self::Full(_) | Self::NoAddress | Self::Store { .. } | Self::Ca(_) => JoinResult::Failed,
        }
    }
}

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
pub struct Registrants {
    ca: Arc<CertificateAuthority>,
    /// Where other machines reach this server.
    addresses: Vec<ServerAddress>,
    path: PathBuf,
    /// What is stored.
    state: ArcSwap<JoiningState>,
    /// Held by the one who changes it.
    changing: Mutex<()>,
    attempts: Mutex<Attempts>,
    changes: watch::Sender<u64>,
    metrics: Arc<JoiningMetrics>,
}

impl Registrants {
    /// Reads what is stored in `dir`. The caller has the lock of the directory.
    ///
    /// # Errors
    /// When the file cannot be read or understood.
    pub fn open(
        dir: &Path,
        ca: Arc<CertificateAuthority>,
        addresses: Vec<ServerAddress>,
        metrics: Arc<JoiningMetrics>,
    ) -> Result<Arc<Self>, CaError> {
        let path = dir.join(STATE_FILE);
        let bytes = private_file::read(&path, MAX_STATE_BYTES);
        let state = match bytes.map_err(|err| CaError::Io { path: path.clone(), err })? {
            None => JoiningState::default(),
            Some(bytes) => format::decode(&bytes).map_err(|reason| CaError::Invalid { path: path.clone(), reason })?,
        };
        let registrants = Self {
            ca,
            addresses,
            path,
            state: ArcSwap::default(),
            changing: Mutex::default(),
            attempts: Mutex::new(Attempts::new(Instant::now())),
            changes: watch::Sender::new(0),
            metrics,
        };
        registrants.publish(state);
        Ok(Arc::new(registrants))
    }

    /// Whether a machine without an identity may call now; counted against its address.
    #[must_use]
    pub fn admit(&self, peer: IpAddr) -> bool {
        let admitted = self.attempts.lock().unwrap_or_else(PoisonError::into_inner).admit(peer, Instant::now());
        if !admitted {
            self.metrics.requests.at(JoinResult::RateLimited).inc();
        }
        admitted
    }

    /// Counts how a call of a machine ended.
    pub fn count(&self, result: JoinResult) {
        self.metrics.requests.at(result).inc();
    }

    /// Creates a token. Blocks.
    ///
    /// # Errors
    /// The field that is invalid, or why it cannot be stored.
    pub fn create_token(
        &self,
        scope: Scope,
        created_by: &str,
        ttl: Duration,
        uses: u32,
        now: SystemTime,
    ) -> Result<(JoinToken, Token), JoiningError> {
        let field = |field, reason| JoiningError::Field { field, reason };
        if ttl.is_zero() || ttl > MAX_TTL {
            return Err(field("ttl_seconds", format!("must be 1..={}", MAX_TTL.as_secs())));
        }
        if uses == 0 || uses > MAX_USES {
            return Err(field("uses", format!("must be 1..={MAX_USES}")));
        }
        if self.addresses.is_empty() {
            return Err(JoiningError::NoAddress);
        }
        let (id, secret) = (TokenId::generate(), Secret::generate());
        let secret_hash = state::hash(secret.expose());
        let created_by = created_by.to_owned();
        let token = Token { scope, created_by, created: now, expires: now + ttl, uses, used: 0, secret: secret_hash };
        self.change(now, |state| Ok(state.add_token(id, token.clone())?))?;
        let (ca, addresses) = (*self.ca.public_key_hash(), self.addresses.clone());
        Ok((JoinToken { id, secret, ca, addresses }, token))
    }

    /// Removes a token. Returns whether there was one. Blocks.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub fn revoke_token(&self, id: TokenId, now: SystemTime) -> Result<bool, JoiningError> {
        self.change(now, |state| Ok(state.tokens.remove(&id).is_some()))
    }

    /// Exchanges a token for a certificate. A machine that proves to have the key of its `previous` certificate keeps its name,
    /// and so what it has registered, unless it was revoked. Blocks.
    ///
    /// # Errors
    /// When the token or the request is not good, or it cannot be stored.
    pub fn join(
        &self,
        id: TokenId,
        secret: &[u8],
        request: &[u8],
        host: &str,
        previous: &[u8],
        now: SystemTime,
    ) -> Result<Joined, JoiningError> {
        // First, so that who has no token has no work done.
        self.state.load().check_token(id, secret, now)?;
        if host.len() > MAX_HOST || host.chars().any(char::is_control) {
            let reason = format!("must have at most {MAX_HOST} bytes and no control characters");
            return Err(JoiningError::Field { field: "host", reason });
        }
        let request = VerifiedRequest::parse(request)?;
        let user = self
            .user_of(previous, &request)
            .unwrap_or_else(|| format!("{USER_PREFIX}{}", hex::encode(&random::<NAME_BYTES>())));
        let ca::Signed { certificate, not_after } =
            self.ca.sign_client(&request.public_key, &user, now, CERTIFICATE_LIFETIME)?;
        let scope = self.change(now, |state| {
            // Again, by the one who changes: two machines may use the last use of a token at once.
            let scope = state.check_token(id, secret, now)?.scope.clone();
            // Revoked since the look above.
            if state.registrants.get(&user).is_some_and(|known| known.revoked.is_some()) {
                return Err(JoiningError::Revoked);
            }
            let host = host.to_owned();
            let registrant = JoinedRegistrant {
                scope: scope.clone(),
                host,
                token: id,
                joined: now,
                expires: not_after,
                revoked: None,
            };
            state.add_registrant(user.clone(), registrant)?;
            Ok(scope)
        })?;
        Ok(Joined { user, certificate, scope })
    }

    /// The registrant that a certificate of this CA names, if it is for the key of the request, and was not revoked.
    fn user_of(&self, certificate: &[u8], request: &VerifiedRequest) -> Option<String> {
        let der = CertificateDer::from(certificate);
        let known = certificate.len() <= MAX_CERTIFICATE_BYTES && self.ca.has_signed(&der);
        let facts = certificate::facts(&der).filter(|facts| known && facts.public_key == request.der)?;
        let state = self.state.load();
        let registrant = state.registrants.get(&*facts.user)?;
        registrant.revoked.is_none().then(|| facts.user.to_string())
    }

    /// Signs a new certificate for a registrant that has one, valid or expired at most 7 days ago, and proves by
    /// the signature of its request that it has the key. Blocks.
    ///
    /// # Errors
    /// When the certificate or the request is not good, or it cannot be stored.
    pub fn renew(&self, certificate: &[u8], request: &[u8], now: SystemTime) -> Result<Joined, JoiningError> {
        let refused = JoiningError::Certificate;
        if certificate.len() > MAX_CERTIFICATE_BYTES {
            return Err(refused("it has more than 4 KiB"));
        }
        let der = CertificateDer::from(certificate);
        if !self.ca.has_signed(&der) {
            return Err(refused("this server's CA has not signed it"));
        }
        let shown = certificate::facts(&der).ok_or_else(|| refused("it cannot be read"))?;
        if !self.state.load().registrants.contains_key(&*shown.user) {
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
        let ca::Signed { certificate, not_after } =
            self.ca.sign_client(&request.public_key, &user, now, CERTIFICATE_LIFETIME)?;
        let scope = self.change(now, |state| {
            let registrant = state.registrants.get_mut(&user).ok_or_else(|| refused("the registrant is unknown"))?;
            if registrant.revoked.is_some() {
                return Err(JoiningError::Revoked);
            }
            registrant.expires = registrant.expires.max(not_after);
            Ok(registrant.scope.clone())
        })?;
        Ok(Joined { user, certificate, scope })
    }

    /// Revokes a registrant. Returns whether there was one. Blocks.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub fn revoke(&self, user: &str, now: SystemTime) -> Result<bool, JoiningError> {
        let found = self.change(now, |state| {
            let Some(registrant) = state.registrants.get_mut(user) else { return Ok(false) };
            registrant.revoked.get_or_insert(now);
            Ok(true)
        })?;
        // Only now: whatever else changes ends no identity, and each open connection looks.
        self.changes.send_modify(|count| *count += 1);
        Ok(found)
    }

    /// The tokens, by id.
    #[must_use]
    pub fn tokens(&self) -> Vec<(TokenId, Token)> {
        self.state.load().tokens.iter().map(|(id, token)| (*id, token.clone())).collect()
    }

    /// The registrants, in the order in which they joined.
    #[must_use]
    pub fn registrants(&self) -> Vec<(String, JoinedRegistrant)> {
        let mut all: Vec<_> =
            self.state.load().registrants.iter().map(|(user, one)| (user.clone(), one.clone())).collect();
        all.sort_unstable_by(|(a_user, a), (b_user, b)| (a.joined, a_user).cmp(&(b.joined, b_user)));
        all
    }

    /// Whether the user of a certificate of the own CA still has an identity.
    pub(super) fn check(&self, user: &str) -> Result<(), Unauthenticated> {
        let state = self.state.load();
        match state.registrants.get(user) {
            Some(registrant) if registrant.revoked.is_none() => Ok(()),
            None if user == ca::SERVER_USER => Ok(()),
            Some(_) | None => Err(Unauthenticated::Revoked),
        }
    }

    /// What the scope of a registrant says; `None` for who did not join.
    pub(super) fn decide(&self, identity: &Identity, access: &Access<'_>) -> Option<Result<(), Denied>> {
        if identity.source != IdentitySource::Certificate || !identity.user.starts_with(USER_PREFIX) {
            return None;
        }
        let state = self.state.load();
        let registrant = state.registrants.get(&*identity.user).filter(|registrant| registrant.revoked.is_none());
        Some(match registrant {
            Some(registrant) => registrant.scope.decide(&identity.user, access),
            None => Err(Denied(format!("{identity} may not {access}: it was revoked"))),
        })
    }

    /// Changes whenever a registrant may have been revoked.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Applies `change` to what is stored, stores the result, and publishes it; or nothing of this.
    fn change<T>(
        &self,
        now: SystemTime,
        change: impl FnOnce(&mut JoiningState) -> Result<T, JoiningError>,
    ) -> Result<T, JoiningError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = JoiningState::clone(&self.state.load());
        state.purge(now);
        let result = change(&mut state)?;
        // Durable, then visible, then acknowledged.
        private_file::write(&self.path, &format::encode(&state))
            .map_err(|err| JoiningError::Store { path: self.path.clone(), err })?;
        self.publish(state);
        Ok(result)
    }

    fn publish(&self, state: JoiningState) {
        self.metrics.tokens.set(state.tokens.len() as u64);
        let active = state.registrants.values().filter(|registrant| registrant.revoked.is_none()).count();
        self.metrics.registrants.set(active as u64);
        self.state.store(Arc::new(state));
    }
}

/// Exactly `N` bytes in hexadecimal digits.
fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    hex::decode(text)?.try_into().ok()
}

#[cfg(test)]
mod tests;
