//! Metrics of identities and rights.

use prometheus_client::{metrics::counter::Counter, registry::Registry};

use super::labels::{EnumCounter, label_enum};

label_enum! {
    /// Why a call has no identity.
    pub enum AuthenticationFailure {
        /// No certificate was shown.
        NoCredentials => "no_credentials",
        /// The certificate does not say one name.
        BadCertificate => "bad_certificate",
        /// The certificate has expired.
        Expired => "expired",
        /// The certificate is not of the client CA any more.
        Untrusted => "untrusted",
    }
}

label_enum! {
    /// What was decided of an act.
    pub enum Decision {
        /// Allowed.
        Allowed => "allowed",
        /// Denied.
        Denied => "denied",
    }
}

/// Who called, and what was decided.
#[derive(Debug)]
pub struct IdentityMetrics {
    /// Calls without an identity.
    pub unauthenticated: EnumCounter<AuthenticationFailure>,
    /// Decisions.
    pub decisions: EnumCounter<Decision>,
    /// Times that a changed policy file was invalid.
    pub policy_reload_errors: Counter,
}

impl IdentityMetrics {
    pub(super) fn register(all: &mut Registry) -> Self {
        let all = all.sub_registry_with_prefix("gangplank");
        let policy_reload_errors = Counter::default();
        all.register(
            "policy_reload_errors",
            "Times that a changed policy file was invalid, so that its last valid version stays in force",
            policy_reload_errors.clone(),
        );
        Self {
            unauthenticated: EnumCounter::register(
                all,
                "unauthenticated_calls",
                "reason",
                "Calls that were refused because the caller has no identity, and streams that were ended for it",
            ),
            decisions: EnumCounter::register(
                all,
                "authorization_decisions",
                "result",
                "Decisions on what an identity may do",
            ),
            policy_reload_errors,
        }
    }
}
