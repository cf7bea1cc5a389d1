//! Metrics of identities and rights.

use prometheus_client::{
    metrics::{
        counter::Counter,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use super::labels::{EnumCounter, EnumGauge, label_enum};

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
        /// The token is nobody's, or there is no token where one should be.
        BadToken => "bad_token",
        /// Nobody could say whose the token is.
        Unreviewed => "unreviewed",
    }
}

label_enum! {
    /// What Kubernetes is asked.
    pub enum ReviewKind {
        /// Whose token it is: TokenReview.
        Token => "token",
        /// Whether a user may do it: SubjectAccessReview.
        Access => "access",
    }
}

label_enum! {
    /// How a review ended.
    pub enum ReviewResult {
        /// A user's token, or allowed.
        Yes => "yes",
        /// Nobody's token, or not allowed.
        No => "no",
        /// No answer.
        Error => "error",
        /// Not asked, because too many wait.
        Overloaded => "overloaded",
    }
}

label_enum! {
    /// What was decided of an act.
    pub enum Decision {
        /// Allowed.
        Allowed => "allowed",
        /// Denied.
        Denied => "denied",
        /// Kubernetes could not be asked.
        Undecided => "undecided",
    }
}

label_enum! {
    /// What an identity or a namespace has as much of as it may.
    pub enum QuotaKind {
        /// Instances of an identity.
        IdentityInstances => "identity_instances",
        /// Instances of a namespace.
        NamespaceInstances => "namespace_instances",
        /// Services of a namespace in which removals are remembered.
        NamespaceRemovals => "namespace_removals",
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
    /// Reviews by Kubernetes.
    pub reviews: EnumCounter<(ReviewKind, ReviewResult)>,
    /// Reviews that wait or are under way.
    pub reviews_in_flight: EnumGauge<ReviewKind>,
    /// What is remembered of reviews.
    pub review_cache_entries: EnumGauge<ReviewKind>,
    /// How long a review took.
    pub review_seconds: Histogram,
    /// Decisions that were older than usual.
    pub stale_decisions: Counter,
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
        let stale_decisions = Counter::default();
        all.register(
            "stale_decisions",
            "Decisions by what Kubernetes said earlier, because it could not be asked again",
            stale_decisions.clone(),
        );
        // 1 ms … 4 s: the API server answers in milliseconds and is given three seconds.
        let review_seconds = Histogram::new(exponential_buckets(0.001, 2.0, 13));
        all.register_with_unit(
            "review_duration",
            "How long Kubernetes took to review a token or a right",
            Unit::Seconds,
            review_seconds.clone(),
        );
        Self {
            reviews: EnumCounter::register(
                all,
                "reviews",
                ("kind", "result"),
                "Reviews by Kubernetes: of tokens, and of what a user may do",
            ),
            reviews_in_flight: EnumGauge::register(
                all,
                "reviews_in_flight",
                "kind",
                "Reviews that wait for their turn or for an answer",
            ),
            review_cache_entries: EnumGauge::register(
                all,
                "review_cache_entries",
                "kind",
                "Reviews that are remembered, those that do not count any more included",
            ),
            review_seconds,
            stale_decisions,
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
