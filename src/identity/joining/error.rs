//! Why something was not done.

use std::{io, path::PathBuf};

use super::{Full, InvalidRequest, TokenRefused};
use crate::{identity::CaError, metrics::JoinResult};

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
    /// Too many machines that are not known call at once.
    #[error("too many calls without an identity: try again later")]
    TooMany,
    /// No more can be kept.
    #[error(transparent)]
    Full(#[from] Full),
    /// Nobody knows where the server is.
    #[error("nothing says where other machines reach this server: start it with --advertise ADDR")]
    NoAddress,
    /// The Secret does not hold what it should.
    #[error("the Secret {secret} is damaged: {reason}; delete it")]
    Damaged {
        /// Its namespace and name.
        secret: String,
        /// What is wrong. Never a part of what it holds.
        reason: String,
    },
    /// Kubernetes cannot be asked, or refuses. It may have been done nevertheless.
    #[error("{0}; try again")]
    Unavailable(String),
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
            Self::Unavailable(_) | Self::Ca(CaError::Pending(_)) => JoinResult::Unavailable,
            Self::TooMany => JoinResult::RateLimited,
            Self::Full(_) | Self::NoAddress | Self::Damaged { .. } | Self::Store { .. } | Self::Ca(_) => {
                JoinResult::Failed
            }
        }
    }
}
