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
        /// The registrant was revoked, or is unknown.
        Revoked => "revoked",
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

label_enum! {
    /// What an identity or a namespace has as much of as it may.
    pub enum QuotaKind {
        /// Instances of an identity.
        IdentityInstances => "identity_instances",
        /// Instances of a namespace.
        NamespaceInstances => "namespace_instances",
        /// Messages a second of an identity.
        IdentityMessages => "identity_messages",
        /// Open calls of an identity.
        IdentityStreams => "identity_streams",
    }
}

/// Who called, and what was decided.
#[derive(Debug)]
pub struct IdentityMetrics {
    /// Calls without an identity.
    pub unauthenticated: EnumCounter<AuthenticationFailure>,
    /// Decisions.
    pub decisions: EnumCounter<Decision>,
    /// Times that a quota was used up.
    pub over_quota: EnumCounter<QuotaKind>,
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
            over_quota: EnumCounter::register(
                all,
                "over_quota",
                "quota",
                "Registrations and calls that were refused for a quota, and messages that had to wait for one",
            ),
            policy_reload_errors,
        }
    }
}
