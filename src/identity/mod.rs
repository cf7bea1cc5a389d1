//! Who calls, and what they may do.
//!
//! 1. [`Authenticator::identify`] is the one place where a call becomes an [`Identity`].
//! 2. [`Authorizer::decide`], and [`Authorizer::decide_page`] for a page, is the one place where an identity gets a yes
//!    or a no.
//!
//! Every transport asks both, and has no rules of its own. This module knows no transport: it gets what a
//! connection has shown as [`Credentials`].

mod access;
mod access_reviews;
mod authorizer;
mod ca;
mod certificate;
pub mod joining;
mod policy;
pub mod private_file;
mod refusal_log;
mod review_cache;
mod shares;
mod token;
mod usage;

use std::{
    fmt,
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use ring::rand::{SecureRandom as _, SystemRandom};
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

pub use access::{Access, AccessResource, AccessVerb, Denied, NotAllowed, PageAccess};
pub use authorizer::{Authorization, Authorizer};
pub use ca::{
    CaError, CertificateAuthority, ClusterCa, CurrentCa, PublicKeyHash, SERVER_USER, ServerCertificate, ServerNames,
    SignedCertificate, renewal_time,
};
pub use policy::{Policy, PolicyError};
pub use refusal_log::RefusalLog;
pub use review_cache::NotReviewed;
pub use token::BearerToken;
pub use usage::{StreamPermit, TooManyStreams, Usage, UsageLimits};

use self::{joining::RegistrantStore, token::TokenReviews};
use crate::{
    kubernetes::api::Reviews,
    metrics::{AuthenticationFailure, IdentityMetrics},
    model::Registrant,
    net::tls::CertificateSigner,
};

/// The user of a plaintext connection over loopback.
const LOOPBACK_USER: &str = "gangplank:loopback";

/// The user of a plaintext connection to a listener of `--insecure`, as Kubernetes calls one without credentials.
const ANONYMOUS_USER: &str = "system:anonymous";

/// An authenticated caller, in the words of Kubernetes: a user name, and the groups it is in.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The user's name.
    pub user: Arc<str>,
    /// Its groups, in the order of the certificate, or as Kubernetes has named them.
    pub groups: Arc<[Box<str>]>,
    /// How it was authenticated.
    pub source: IdentitySource,
    /// When its credential ends; `None` if it does not.
    pub expires: Option<SystemTime>,
}

/// How an identity was authenticated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IdentitySource {
    /// By a client certificate, of `--tls-client-ca` or of this server's own.
    Certificate,
    /// By a client certificate with which a machine joined.
    Registrant,
    /// By a token that Kubernetes has reviewed.
    Token,
    /// By a plaintext connection over loopback.
    Loopback,
    /// Not at all, on a listener of `--insecure`.
    Anonymous,
}

impl IdentitySource {
    /// Whether it ends when a certificate does.
    #[must_use]
    pub const fn is_certificate(self) -> bool {
        matches!(self, Self::Certificate | Self::Registrant)
    }
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

/// What a connection has shown of its peer, or a call of its caller.
#[derive(Debug, Clone)]
pub enum Credentials {
    /// Plaintext over loopback.
    LoopbackPlaintext,
    /// Plaintext to a listener of `--insecure`.
    InsecurePlaintext,
    /// TLS without a client certificate.
    NoCertificate,
    /// TLS with a client certificate that was checked.
    Certificate {
        /// In DER.
        der: CertificateDer<'static>,
        /// The CA that has signed it.
        signer: CertificateSigner,
    },
    /// A call with a token: it is the token's user, whatever its connection has shown.
    Token {
        /// The token.
        token: BearerToken,
        /// Where the call comes from: each address may show so many tokens that are not known.
        peer: IpAddr,
    },
}

/// Why a caller has no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unauthenticated {
    /// Neither a certificate nor anything else.
    #[error(
        "this listener needs a client certificate, or a token where the server has --kubernetes, and none was shown"
    )]
    NoCredentials,
    /// The certificate says no name, or more than one.
    #[error("the client certificate {0}")]
    Certificate(String),
    /// Its time is over.
    #[error("the client certificate has expired")]
    Expired,
    /// The time of one between it and the CA is over.
    #[error("an intermediate certificate that the client has shown has expired")]
    IntermediateExpired,
    /// The CA that has signed it is not among the client CAs any more.
    #[error("the client certificate is not of the client CA any more")]
    Untrusted,
    /// The registrant was revoked, or is not known to this server.
    #[error("the registrant was revoked, or never joined this server; it may join with a new token")]
    Revoked,
    /// Nobody can say whether the registrant joined, or was revoked. Says nothing of the caller either.
    #[error("who joined is not known to this server yet: {0}")]
    RegistrantUnknown(String),
    /// What stands in `authorization` is not a token.
    #[error("authorization: must be \"Bearer TOKEN\", once")]
    NotBearer,
    /// Nobody here can say whose the token is.
    #[error("a token was shown, and this server takes none: it runs without --kubernetes")]
    TokensNotTaken,
    /// Kubernetes does not accept the token.
    #[error("the token is not accepted: it has expired or was withdrawn, or is not for the audience \"gangplank\"")]
    Token,
    /// Kubernetes does not accept the token any more, or says that it is another user's.
    #[error("the token is not accepted any more")]
    TokenEnded,
    /// Kubernetes could not be asked. Says nothing of the caller.
    #[error("whose token it is: {0}")]
    Unreviewed(#[from] NotReviewed),
}

impl Unauthenticated {
    /// Whether it says nothing of the caller: nobody could be asked.
    #[must_use]
    pub const fn is_unknown(&self) -> bool {
        matches!(self, Self::Unreviewed(_) | Self::RegistrantUnknown(_))
    }
}

impl From<&rustls::Error> for Unauthenticated {
    /// Of a certificate that was good, and is not any more. Its own end is looked at beforehand.
    fn from(err: &rustls::Error) -> Self {
        use rustls::CertificateError::{Expired, ExpiredContext};
        match err {
            rustls::Error::InvalidCertificate(Expired | ExpiredContext { .. }) => Self::IntermediateExpired,
            _ => Self::Untrusted,
        }
    }
}

impl From<&Unauthenticated> for AuthenticationFailure {
    fn from(err: &Unauthenticated) -> Self {
        match err {
            Unauthenticated::NoCredentials => Self::NoCredentials,
            Unauthenticated::Certificate(_) => Self::BadCertificate,
            Unauthenticated::Expired | Unauthenticated::IntermediateExpired => Self::Expired,
            Unauthenticated::Untrusted => Self::Untrusted,
            Unauthenticated::Revoked => Self::Revoked,
            Unauthenticated::NotBearer
            | Unauthenticated::TokensNotTaken
            | Unauthenticated::Token
            | Unauthenticated::TokenEnded => Self::BadToken,
            Unauthenticated::Unreviewed(_) | Unauthenticated::RegistrantUnknown(_) => Self::Unreviewed,
        }
    }
}

/// Makes identities.
#[derive(Debug, Clone, Default)]
pub struct Authenticator {
    /// Who joined. Nobody else has a certificate of the own CA.
    registrants: Option<Arc<RegistrantStore>>,
    /// `None` where no token is taken.
    tokens: Option<Arc<TokenReviews>>,
}

impl Authenticator {
    /// Knows who joined, with a CA that signs for them.
    #[must_use]
    pub const fn new(registrants: Option<Arc<RegistrantStore>>) -> Self {
        Self { registrants, tokens: None }
    }

    /// Takes tokens. Open streams outlast the last review of their token by `stale`, while Kubernetes cannot be asked.
    #[must_use]
    pub fn with_tokens(
        self,
        reviews: Arc<Reviews>,
        stale: Duration,
        metrics: Arc<IdentityMetrics>,
        log: Arc<RefusalLog>,
    ) -> Self {
        Self { tokens: Some(Arc::new(TokenReviews::new(reviews, stale, metrics, log))), ..self }
    }

    /// The identity of a connection or a call that has shown `credentials`, at `now`. Waits only for the review of a
    /// token, and for a registrant that is not known here.
    ///
    /// # Errors
    /// When the credentials are missing or not good, or Kubernetes cannot be asked.
    pub async fn identify(&self, credentials: &Credentials, now: SystemTime) -> Result<Arc<Identity>, Unauthenticated> {
        let identity = match credentials {
            Credentials::LoopbackPlaintext => Identity::without_groups(LOOPBACK_USER, IdentitySource::Loopback),
            Credentials::InsecurePlaintext => Identity::without_groups(ANONYMOUS_USER, IdentitySource::Anonymous),
            Credentials::NoCertificate => return Err(Unauthenticated::NoCredentials),
            Credentials::Certificate { der, .. } => certificate::identity(der)?,
            Credentials::Token { token, peer } => {
                return self.tokens.as_ref().ok_or(Unauthenticated::TokensNotTaken)?.identity(token, *peer).await;
            }
        };
        if identity.expires.is_some_and(|expires| expires <= now) {
            return Err(Unauthenticated::Expired);
        }
        let (Some(registrants), Credentials::Certificate { signer, .. }) = (&self.registrants, credentials) else {
            return Ok(Arc::new(identity));
        };
        let source = match signer {
            CertificateSigner::OwnCa if registrants.is_server(&identity.user) => IdentitySource::Certificate,
            // Nobody but who joined, whatever the certificate says.
            CertificateSigner::OwnCa => {
                registrants.identify(&identity.user).await?;
                IdentitySource::Registrant
            }
            CertificateSigner::ClientCa if joining::is_registrant_name(&identity.user) => {
                return Err(Unauthenticated::Certificate("has the name (CN) of a machine that joined".into()));
            }
            CertificateSigner::ClientCa => IdentitySource::Certificate,
        };
        Ok(Arc::new(Identity { source, ..identity }))
    }

    /// Ready when `token`, which was `identity`'s, is not any more. Asks again at intervals.
    pub async fn token_end(self, token: BearerToken, identity: Arc<Identity>) -> Unauthenticated {
        match &self.tokens {
            Some(tokens) => tokens.end(&token, &identity).await,
            None => Unauthenticated::TokensNotTaken,
        }
    }

    /// Whether the identity of a connection is still good.
    ///
    /// # Errors
    /// When its registrant was revoked since.
    pub fn check(&self, identity: &Identity) -> Result<(), Unauthenticated> {
        match &self.registrants {
            Some(registrants) if identity.source == IdentitySource::Registrant => registrants.check(&identity.user),
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
    SystemRandom::new().fill(&mut bytes).expect("the system has random bytes");
    bytes
}

/// Whether a name is one that logs and rules can hold: not empty, of bounded length, without control characters, and without
/// those that change how others are shown, such as U+202E (Unicode Standard Annex 9, §2).
fn is_name(text: &str) -> bool {
    let is_format =
        |c| matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    Registrant::is_name(text) && !text.chars().any(is_format)
}
