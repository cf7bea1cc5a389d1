//! Questions to the API server about others: whose token it is (TokenReview), and what a user may do
//! (SubjectAccessReview).
//!
//! Nothing is remembered here. While requests fail there is a pause, in which nobody asks: see
//! [`Reviews::is_paused`].

use std::{
    fmt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use k8s_openapi::{
    Resource,
    api::{
        authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus},
        authorization::v1::{
            NonResourceAttributes, ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
            SubjectAccessReviewStatus,
        },
    },
};
use kube::{
    Client,
    core::{Request as Builder, params::PostParams},
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::{ApiError, ConnectError, api, connect, encode, exchange, rate_limiter::RateLimiter};
use crate::metrics::{IdentityMetrics, ReviewKind, ReviewResult};

/// How long one review may take. The API server answers in milliseconds.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(3);

/// First reviews of a token, a second; at once twice as many. Who sends ever new tokens makes the API server check no more.
const MAX_TOKENS_PER_SECOND: u32 = 200;

/// First reviews of an act of a user, a second; at once twice as many.
const MAX_ACCESSES_PER_SECOND: u32 = 400;

/// The API group of what is registered.
const GROUP: &str = "gangplank.dev";

/// Most characters of the API server's reason that are kept.
const MAX_REASON: usize = 256;

/// Why there is no answer: the API server cannot be asked, or does not let this account ask.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Kubernetes cannot be asked: {0}")]
pub struct ReviewError(String);

/// What the API server says of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReviewedToken {
    /// It is a user's.
    Authenticated {
        /// Its name.
        user: String,
        /// Its groups.
        groups: Vec<String>,
    },
    /// It is nobody's, or not for the audience; with the reason, for the log.
    Refused(String),
}

/// What a user wants to do.
#[derive(Debug, Clone, Copy)]
pub struct AccessAttributes<'a> {
    /// The user's name.
    pub user: &'a str,
    /// The groups that the authenticator found, which rules of RBAC can name.
    pub groups: &'a [Box<str>],
    /// One more group, by how it was authenticated.
    pub origin: &'a str,
    /// The verb, in the words of RBAC.
    pub verb: &'a str,
    /// The object of the verb.
    pub target: AccessTarget<'a>,
}

/// On what a user acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AccessTarget<'a> {
    /// A resource of gangplank's: no objects of it exist, but RBAC has rules for it.
    Resource {
        /// The resource.
        resource: &'a str,
        /// `None` for all.
        namespace: Option<&'a str>,
        /// The service; `None` for all.
        service: Option<&'a str>,
    },
    /// A path of the admin listener: a non-resource URL.
    Path(&'a str),
}

/// Makes reviews.
pub struct Reviews {
    client: Client,
    tokens: RateLimiter,
    accesses: RateLimiter,
    /// Whether the last review failed, to log the change only.
    failing: AtomicBool,
    metrics: Arc<IdentityMetrics>,
}

impl fmt::Debug for Reviews {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reviews").finish_non_exhaustive()
    }
}

impl Reviews {
    /// A client with connections of its own, so that reviews wait for nothing else. Makes no request. `kubeconfig` as
    /// for the mirror; `None` for the ServiceAccount of the pod.
    ///
    /// # Errors
    /// When there is no usable kubeconfig, or no ServiceAccount where none was given.
    pub async fn connect(kubeconfig: Option<&Path>, metrics: Arc<IdentityMetrics>) -> Result<Self, ConnectError> {
        let client = connect(kubeconfig).await?.client;
        Ok(Self {
            client,
            tokens: RateLimiter::new(MAX_TOKENS_PER_SECOND),
            accesses: RateLimiter::new(MAX_ACCESSES_PER_SECOND),
            failing: AtomicBool::new(false),
            metrics,
        })
    }

    /// Whether reviews of this kind have just failed: for the next 0.1 to 5 s, or as long as the API server has asked to
    /// wait, another would only wait for its timeout.
    #[must_use]
    pub fn is_paused(&self, kind: ReviewKind) -> bool {
        self.limiter(kind).is_paused()
    }

    /// Asks whose token it is, for `audience`. The `first` review of a token waits for its turn within the rate limit.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub async fn token(&self, token: &str, audience: &str, first: bool) -> Result<ReviewedToken, ReviewError> {
        let spec = TokenReviewSpec { token: Some(token.to_owned()), audiences: Some(vec![audience.to_owned()]) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let status = self.review(ReviewKind::Token, &review, first).await?.status.unwrap_or_default();
        let reviewed = reviewed_token(status, audience);
        let authenticated = matches!(reviewed, ReviewedToken::Authenticated { .. });
        self.count(ReviewKind::Token, if authenticated { ReviewResult::Yes } else { ReviewResult::No });
        Ok(reviewed)
    }

    /// Asks whether the user may do it. The `first` review of a question waits for its turn within the rate limit.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub async fn access(&self, attributes: AccessAttributes<'_>, first: bool) -> Result<bool, ReviewError> {
        let AccessAttributes { user, groups, origin, verb, target } = attributes;
        let mut groups: Vec<String> = groups.iter().map(ToString::to_string).collect();
        // So a rule can say by which way somebody has to have come.
        if !groups.iter().any(|group| group == origin) {
            groups.push(origin.to_owned());
        }
        let verb = Some(verb.to_owned());
        let mut spec = SubjectAccessReviewSpec {
            user: Some(user.to_owned()),
            groups: Some(groups),
            ..SubjectAccessReviewSpec::default()
        };
        match target {
            AccessTarget::Resource { resource, namespace, service } => {
                spec.resource_attributes = Some(ResourceAttributes {
                    group: Some(GROUP.into()),
                    resource: Some(resource.to_owned()),
                    verb,
                    namespace: namespace.map(ToOwned::to_owned),
                    name: service.map(ToOwned::to_owned),
                    ..ResourceAttributes::default()
                });
            }
            AccessTarget::Path(path) => {
                spec.non_resource_attributes = Some(NonResourceAttributes { path: Some(path.to_owned()), verb });
            }
        }
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        let allowed =
            self.review(ReviewKind::Access, &review, first).await?.status.is_some_and(|status| is_allowed(&status));
        self.count(ReviewKind::Access, if allowed { ReviewResult::Yes } else { ReviewResult::No });
        Ok(allowed)
    }

    async fn review<K>(&self, kind: ReviewKind, review: &K, first: bool) -> Result<K, ReviewError>
    where
        K: Resource + Serialize + DeserializeOwned,
    {
        let limiter = self.limiter(kind);
        // Repeated reviews are as many as there are known users and tokens; only new questions can be made up without
        // end.
        if first {
            limiter.acquire().await;
        }
        let request = Builder::new(format!("/{}/{}", api::<K>(), K::URL_PATH_SEGMENT));
        let request = request.create(&PostParams::default(), encode(review));
        let request = request.map_err(|err| ReviewError(err.to_string()))?;
        let begun = Instant::now();
        let answered = timeout(REVIEW_TIMEOUT, exchange(&self.client, request)).await;
        let result = match answered {
            Ok((_, result)) => result,
            Err(_) => Err(ApiError::Unknown(format!("not within {REVIEW_TIMEOUT:?}"))),
        };
        self.metrics.review_seconds.observe(begun.elapsed().as_secs_f64());
        match result {
            Ok(reviewed) => {
                limiter.answered();
                if self.failing.swap(false, Ordering::Relaxed) {
                    info!("Kubernetes reviews tokens and rights again");
                }
                Ok(reviewed)
            }
            Err(err) => {
                match &err {
                    ApiError::Busy(retry_after) => limiter.failed(Some(*retry_after)),
                    // A fault of this question, which must not keep others waiting.
                    ApiError::Invalid(_) => {}
                    _ => limiter.failed(None),
                }
                self.count(kind, ReviewResult::Error);
                if !self.failing.swap(true, Ordering::Relaxed) {
                    warn!(%err, "Kubernetes cannot be asked whose tokens are shown, and who may do what");
                }
                Err(ReviewError(err.to_string()))
            }
        }
    }

    fn limiter(&self, kind: ReviewKind) -> &RateLimiter {
        match kind {
            ReviewKind::Token => &self.tokens,
            ReviewKind::Access => &self.accesses,
        }
    }

    fn count(&self, kind: ReviewKind, result: ReviewResult) {
        self.metrics.reviews.at((kind, result)).inc();
    }
}

/// `denied` means that no other authorizer may allow it either: an answer that says both is no yes.
fn is_allowed(status: &SubjectAccessReviewStatus) -> bool {
    status.allowed && !status.denied.unwrap_or(false)
}

/// What the status of a TokenReview says. One that does not name the audience is of an authenticator that knows none:
/// the token is for the API server itself (TokenReviewStatus, `audiences`).
fn reviewed_token(status: TokenReviewStatus, audience: &str) -> ReviewedToken {
    let TokenReviewStatus { audiences, authenticated, error, user } = status;
    let refused = |reason: &str| {
        // One line of the log, whatever an authenticator says.
        let plain = reason.chars().map(|c| if c.is_control() { ' ' } else { c });
        ReviewedToken::Refused(plain.take(MAX_REASON).collect())
    };
    if authenticated != Some(true) {
        return refused(
            error.as_deref().filter(|error| !error.is_empty()).unwrap_or("nobody's, or not for the audience"),
        );
    }
    if !audiences.unwrap_or_default().iter().any(|of| of == audience) {
        return refused("not for the audience");
    }
    match user {
        Some(user) => ReviewedToken::Authenticated {
            user: user.username.unwrap_or_default(),
            groups: user.groups.unwrap_or_default(),
        },
        None => refused("of no user"),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;

    fn status(authenticated: Option<bool>, audiences: &[&str]) -> TokenReviewStatus {
        let user = UserInfo { username: Some("ada".into()), groups: Some(vec!["ops".into()]), ..UserInfo::default() };
        let audiences = audiences.iter().map(|&audience| audience.to_owned()).collect();
        TokenReviewStatus { audiences: Some(audiences), authenticated, error: None, user: Some(user) }
    }

    #[test]
    fn token_counts_only_for_its_audience() {
        let good = ReviewedToken::Authenticated { user: "ada".into(), groups: vec!["ops".into()] };
        assert_eq!(reviewed_token(status(Some(true), &["gangplank"]), "gangplank"), good);
        let refused = |status| matches!(reviewed_token(status, "gangplank"), ReviewedToken::Refused(_));
        assert!(refused(status(Some(true), &["https://kubernetes.default.svc"])));
        assert!(refused(status(Some(true), &[])), "for the API server itself");
        assert!(refused(TokenReviewStatus { audiences: None, ..status(Some(true), &[]) }));
        assert!(refused(status(Some(false), &["gangplank"])));
        assert!(refused(status(None, &["gangplank"])));
        assert!(refused(TokenReviewStatus { user: None, ..status(Some(true), &["gangplank"]) }));
    }

    #[test]
    fn reason_of_a_refusal_is_one_line_of_bounded_length() {
        let said = TokenReviewStatus { error: Some(format!("a\nb{}", "c".repeat(1000))), ..status(None, &[]) };
        let ReviewedToken::Refused(reason) = reviewed_token(said, "gangplank") else { panic!("refused") };
        assert!(reason.starts_with("a bccc") && reason.len() == MAX_REASON, "{reason}");
    }
}
