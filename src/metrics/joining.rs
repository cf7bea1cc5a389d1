//! Metrics of joining.

use std::sync::atomic::AtomicU64;

use prometheus_client::{metrics::gauge::Gauge, registry::Registry};

use super::labels::{EnumCounter, label_enum};

label_enum! {
    /// How a call of a machine that joins or renews ended.
    pub enum JoinResult {
        /// It joined.
        Joined => "joined",
        /// It has a new certificate.
        Renewed => "renewed",
        /// No such token, or another secret.
        UnknownToken => "unknown_token",
        /// The token is too old.
        ExpiredToken => "expired_token",
        /// The token has no uses left.
        UsedToken => "used_token",
        /// A field is invalid.
        InvalidRequest => "invalid_request",
        /// The certificate is of another CA, another key, or nobody's.
        BadCertificate => "bad_certificate",
        /// The certificate expired too long ago.
        ExpiredCertificate => "expired_certificate",
        /// The registrant was revoked.
        Revoked => "revoked",
        /// Too many calls.
        RateLimited => "rate_limited",
        /// Not carried out within its time.
        Timeout => "timeout",
        /// Kubernetes could not be asked, or refused.
        Unavailable => "unavailable",
        /// The server could not do it.
        Failed => "failed",
    }
}

/// What joins.
#[derive(Debug)]
pub struct JoiningMetrics {
    /// Calls of machines that join or renew.
    pub requests: EnumCounter<JoinResult>,
    /// Tokens.
    pub tokens: Gauge<u64, AtomicU64>,
    /// Registrants that are not revoked.
    pub registrants: Gauge<u64, AtomicU64>,
}

impl JoiningMetrics {
    pub(super) fn register(all: &mut Registry) -> Self {
        let all = all.sub_registry_with_prefix("gangplank_join");
        let (tokens, registrants) = (Gauge::default(), Gauge::default());
        all.register("tokens", "Join tokens, with those that have expired within a day", tokens.clone());
        all.register("registrants", "Registrants that joined and were not revoked", registrants.clone());
        let requests =
            EnumCounter::register(all, "requests", "result", "Calls of machines that join or renew their certificate");
        Self { requests, tokens, registrants }
    }
}
