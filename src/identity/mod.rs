//! Who calls, and what they may do.
//!
//! 1. [`Authenticator::identify`] is the one place where a call becomes an [`Identity`].
//! 2. [`Authorizer::decide`] is the one place where an identity gets a yes or a no.
//!
//! Every transport asks both, and has no rules of its own. This module knows no transport: it gets what a
//! connection has shown as [`Credentials`].

mod access;
mod authorizer;
mod ca;
mod certificate;
pub mod joining;
mod policy;
pub mod private_file;
mod refusal_log;
mod usage;

use std::{fmt, sync::Arc, time::SystemTime};

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

pub use access::{Access, AccessResource, AccessVerb, Denied};
pub use authorizer::{Authorization, Authorizer};
pub use ca::{CaError, CertificateAuthority, PublicKeyHash, ServerCertificate, ServerNames, Signed, renewal_time};
pub use policy::{Policy, PolicyError};
pub use refusal_log::RefusalLog;
pub use usage::{OpenCall, TooManyStreams, Usage, UsageLimits};

use self::joining::Registrants;
use crate::{metrics::AuthenticationFailure, model::Registrant};

/// The user of a plaintext connection over loopback.
const LOOPBACK_USER: &str = "gangplank:loopback";

/// The user of a plaintext connection to a listener of `--insecure`, as Kubernetes calls one without credentials.
const ANONYMOUS_USER: &str = "system:anonymous";

/// An authenticated caller, in the words of Kubernetes: a user name, and the groups it is in.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The user's name.
    pub user: Arc<str>,
    /// Its groups, in the order of the certificate.
    pub groups: Arc<[Box<str>]>,
    /// How it was authenticated.
    pub source: IdentitySource,
    /// When its credential ends; `None` if it does not.
    pub expires: Option<SystemTime>,
}

/// How an identity was authenticated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IdentitySource {
    /// By a client certificate.
    Certificate,
    /// By a plaintext connection over loopback.
    Loopback,
    /// Not at all, on a listener of `--insecure`.
    Anonymous,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.user)
    }
}

impl Identity {
    fn without_groups(user: &str, source: IdentitySource) -> Self {
        Self { user: user.into(), groups: [].into(), source, expires: None }
    }
}

/// What a connection has shown of its peer.
#[derive(Debug, Clone)]
pub enum Credentials {
    /// Plaintext over loopback.
    LoopbackPlaintext,
    /// Plaintext to a listener of `--insecure`.
    InsecurePlaintext,
    /// TLS without a client certificate.
    NoCertificate,
    /// TLS with a client certificate that the client CA has signed, in DER.
    Certificate(CertificateDer<'static>),
}

/// Why a caller has no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unauthenticated {
    /// Neither a certificate nor anything else.
    #[error("this listener needs a client certificate, and none was shown")]
    NoCredentials,
    /// The certificate says no name, or more than one.
    #[error("the client certificate {0}")]
    Certificate(String),
    /// Its time is over.
    #[error("the client certificate has expired")]
    Expired,
    /// The CA that has signed it is not among the client CAs any more.
    #[error("the client certificate is not of the client CA any more")]
    Untrusted,
    /// The registrant was revoked, or is not known to this server.
    #[error("the registrant was revoked, or never joined this server; it may join with a new token")]
    Revoked,
}

impl From<&Unauthenticated> for AuthenticationFailure {
    fn from(err: &Unauthenticated) -> Self {
        match err {
            Unauthenticated::NoCredentials => Self::NoCredentials,
            Unauthenticated::Certificate(_) => Self::BadCertificate,
            Unauthenticated::Expired => Self::Expired,
            Unauthenticated::Untrusted => Self::Untrusted,
            Unauthenticated::Revoked => Self::Revoked,
        }
    }
}

/// Makes identities.
#[derive(Debug, Clone, Default)]
pub struct Authenticator {
    /// With a CA of its own: who joined, and nobody else has a certificate.
    pub registrants: Option<Arc<Registrants>>,
}

impl Authenticator {
    /// The identity of a connection that has shown `credentials`, at `now`.
    ///
    /// # Errors
    /// When the credentials are missing or not good.
    pub fn identify(&self, credentials: &Credentials, now: SystemTime) -> Result<Identity, Unauthenticated> {
        let identity = match credentials {
            Credentials::LoopbackPlaintext => Identity::without_groups(LOOPBACK_USER, IdentitySource::Loopback),
            Credentials::InsecurePlaintext => Identity::without_groups(ANONYMOUS_USER, IdentitySource::Anonymous),
            Credentials::NoCertificate => return Err(Unauthenticated::NoCredentials),
            Credentials::Certificate(der) => certificate::identity(der)?,
        };
        if identity.expires.is_some_and(|expires| expires <= now) {
            return Err(Unauthenticated::Expired);
        }
        self.check(&identity)?;
        Ok(identity)
    }

    /// Whether the identity of a connection is still good.
    ///
    /// # Errors
    /// When its registrant was revoked since.
    pub fn check(&self, identity: &Identity) -> Result<(), Unauthenticated> {
        match &self.registrants {
            Some(registrants) if identity.source == IdentitySource::Certificate => registrants.check(&identity.user),
            _ => Ok(()),
        }
    }

    /// Changes whenever [`Authenticator::check`] may say something else. `None` if it never does.
    #[must_use]
    pub fn changes(&self) -> Option<watch::Receiver<u64>> {
        self.registrants.as_ref().map(|registrants| registrants.changes())
    }
}

/// The user in a certificate.
///
/// # Errors
/// When it does not say one.
pub fn certificate_user(der: &CertificateDer<'_>) -> Result<Arc<str>, Unauthenticated> {
    certificate::identity(der).map(|identity| identity.user)
}

/// Random bytes, for secrets and names.
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let random = rustls::crypto::ring::default_provider().secure_random;
    random.fill(&mut bytes).expect("the system has random bytes");
    bytes
}

/// Whether a name is one that logs and rules can hold: not empty, of bounded length, without control characters.
fn is_name(text: &str) -> bool {
    Registrant::is_name(text)
}
