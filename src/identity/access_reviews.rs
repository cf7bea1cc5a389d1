//! Rights by Kubernetes RBAC: what a Role says of `instances.gangplank.dev`.

use std::{
    fmt,
    hash::{Hash, Hasher},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use indexmap::Equivalent;
use tokio::time::sleep;

use super::{
    Access, AccessVerb, Identity, IdentitySource, PageAccess,
    review_cache::{FRESH, MAX_WAIT, NotReviewed, ReviewCache, ReviewLimits, Reviewed, Verdict},
    shares::Shares,
};
use crate::{
    kubernetes::api::{AccessAttributes, AccessTarget, Reviews},
    metrics::{IdentityMetrics, ReviewKind},
};

/// The group of every user that has shown who it is, which Kubernetes adds too.
const AUTHENTICATED: &str = "system:authenticated";

/// The group of everybody else.
const UNAUTHENTICATED: &str = "system:unauthenticated";

/// Decisions that are remembered, some 300 bytes each.
const MAX_ENTRIES: usize = 65_536;

/// Reviews under way at once, and as many repeated ones.
const MAX_IN_FLIGHT: usize = 64;

/// Reviews that wait: what some streams can ask for at once.
const MAX_PENDING: u64 = 16_384;

/// New questions of one user at once, and one more in each [`USER_INTERVAL`]: a quarter of what is asked for all users.
const USER_BURST: u32 = 400;
const USER_INTERVAL: Duration = Duration::from_millis(10);

/// What is asked: everything that the answer depends on.
#[derive(Debug, Clone)]
struct ReviewSpec {
    user: Arc<str>,
    groups: Arc<[Box<str>]>,
    origin: &'static str,
    verb: &'static str,
    target: ReviewTarget,
}

/// An [`AccessTarget`] that is kept.
#[derive(Debug, Clone)]
enum ReviewTarget {
    Resource { resource: Box<str>, namespace: Option<Box<str>>, service: Option<Box<str>> },
    Path(Box<str>),
}

/// A question in borrowed parts, for which nothing is allocated.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ReviewSpecRef<'a> {
    user: &'a Arc<str>,
    groups: &'a Arc<[Box<str>]>,
    origin: &'static str,
    verb: &'static str,
    target: AccessTarget<'a>,
}

impl ReviewSpec {
    fn asked(&self) -> ReviewSpecRef<'_> {
        let target = match &self.target {
            ReviewTarget::Resource { resource, namespace, service } => {
                AccessTarget::Resource { resource, namespace: namespace.as_deref(), service: service.as_deref() }
            }
            ReviewTarget::Path(path) => AccessTarget::Path(path),
        };
        ReviewSpecRef { user: &self.user, groups: &self.groups, origin: self.origin, verb: self.verb, target }
    }
}

impl PartialEq for ReviewSpec {
    fn eq(&self, other: &Self) -> bool {
        self.asked() == other.asked()
    }
}

impl Eq for ReviewSpec {}

impl Hash for ReviewSpec {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.asked().hash(state);
    }
}

impl Equivalent<ReviewSpec> for ReviewSpecRef<'_> {
    fn equivalent(&self, key: &ReviewSpec) -> bool {
        *self == key.asked()
    }
}

impl<'a> ReviewSpecRef<'a> {
    pub(super) fn access(identity: &'a Identity, access: &Access<'a>) -> Self {
        let Access { resource, verb, namespace, service, address: _, peer: _ } = *access;
        let target = AccessTarget::Resource { resource: resource.as_str(), namespace, service };
        Self::new(identity, verb, target)
    }

    pub(super) fn page(identity: &'a Identity, PageAccess { path, instances: _, peer: _ }: &PageAccess<'a>) -> Self {
        Self::new(identity, AccessVerb::Get, AccessTarget::Path(path))
    }

    fn new(identity: &'a Identity, verb: AccessVerb, target: AccessTarget<'a>) -> Self {
        let origin = match identity.source {
            IdentitySource::Certificate
            | IdentitySource::Registrant
            | IdentitySource::Token
            | IdentitySource::Loopback => AUTHENTICATED,
            IdentitySource::Anonymous => UNAUTHENTICATED,
        };
        Self { user: &identity.user, groups: &identity.groups, origin, verb: verb.as_str(), target }
    }

    fn to_question(self) -> ReviewSpec {
        let target = match self.target {
            AccessTarget::Resource { resource, namespace, service } => ReviewTarget::Resource {
                resource: resource.into(),
                namespace: namespace.map(Box::from),
                service: service.map(Box::from),
            },
            AccessTarget::Path(path) => ReviewTarget::Path(path.into()),
        };
        let (user, groups) = (Arc::clone(self.user), Arc::clone(self.groups));
        ReviewSpec { user, groups, origin: self.origin, verb: self.verb, target }
    }
}

/// Asks Kubernetes what identities may do.
pub(super) struct AccessReviews {
    reviews: Arc<Reviews>,
    cache: Arc<ReviewCache<ReviewSpec, ()>>,
    /// Of the rate at which new questions are asked.
    shares: Mutex<Shares<Arc<str>>>,
}

impl fmt::Debug for AccessReviews {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessReviews").field("cache", &self.cache).finish_non_exhaustive()
    }
}

impl AccessReviews {
    /// A decision counts for `stale` while Kubernetes cannot be asked.
    pub(super) fn new(reviews: Arc<Reviews>, stale: Duration, metrics: Arc<IdentityMetrics>) -> Self {
        let stale = stale.max(FRESH);
        let (entries, in_flight, pending) = (MAX_ENTRIES, MAX_IN_FLIGHT, MAX_PENDING);
        let limits = ReviewLimits { entries, in_flight, pending, stale, known: stale, wait: MAX_WAIT };
        let shares = Mutex::new(Shares::new(USER_BURST, USER_INTERVAL));
        Self { reviews, cache: ReviewCache::new(ReviewKind::Access, limits, metrics), shares }
    }

    /// The decision, if it needs no review. Neither waits nor allocates.
    pub(super) fn known(&self, asked: &ReviewSpecRef<'_>) -> Option<Reviewed<()>> {
        self.cache.known(asked, self.reviews.is_paused(ReviewKind::Access), Instant::now())
    }

    /// The decision, of a review that is not older than `max_age` if Kubernetes can be asked.
    pub(super) async fn decide(
        &self,
        asked: ReviewSpecRef<'_>,
        max_age: Duration,
    ) -> Result<Reviewed<()>, NotReviewed> {
        if self.cache.is_new(&asked, Instant::now()) {
            let wait = {
                let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
                shares.reserve(Arc::clone(asked.user), MAX_WAIT, Instant::now())
            };
            sleep(wait.ok_or(NotReviewed::Overloaded)?).await;
        }
        let question = asked.to_question();
        let ask = |first| {
            let (reviews, question) = (Arc::clone(&self.reviews), question.clone());
            async move {
                if reviews.is_paused(ReviewKind::Access) {
                    return Err(NotReviewed::Unavailable);
                }
                let ReviewSpecRef { user, groups, origin, verb, target } = question.asked();
                let attributes = AccessAttributes { user, groups, origin, verb, target };
                Ok(if reviews.access(attributes, first).await? { Verdict::Yes(()) } else { Verdict::No })
            }
        };
        self.cache.review(question.clone(), max_age, Instant::now(), ask).await
    }
}

#[cfg(test)]
mod tests {
    use std::{hash::BuildHasher as _, net::IpAddr};

    use super::*;
    use crate::identity::AccessResource;

    fn identity(source: IdentitySource) -> Identity {
        Identity { user: "ada".into(), groups: ["ops".into()].into(), source, expires: None }
    }

    fn access<'a>(service: Option<&'a str>, peer: &str) -> Access<'a> {
        let peer: IpAddr = peer.parse().expect("an address");
        Access {
            resource: AccessResource::Instances,
            verb: AccessVerb::Create,
            namespace: Some("shop"),
            service,
            address: Some(peer),
            peer,
        }
    }

    #[test]
    fn question_is_found_by_its_parts() {
        let ada = identity(IdentitySource::Token);
        let question = ReviewSpecRef::access(&ada, &access(Some("web"), "10.0.0.1")).to_question();
        let hasher = std::hash::RandomState::new();
        let of = |identity: &Identity, access: Access<'_>| {
            let asked = ReviewSpecRef::access(identity, &access);
            (asked.equivalent(&question), hasher.hash_one(asked) == hasher.hash_one(&question))
        };
        assert_eq!(of(&ada, access(Some("web"), "10.0.0.1")), (true, true));
        assert_eq!(of(&ada, access(Some("web"), "10.0.0.2")), (true, true), "RBAC knows no addresses");
        assert_eq!(of(&ada, access(Some("api"), "10.0.0.1")), (false, false));
        assert_eq!(of(&ada, access(None, "10.0.0.1")), (false, false));
        assert_eq!(of(&identity(IdentitySource::Anonymous), access(Some("web"), "10.0.0.1")), (false, false));
        let others = Identity { groups: [].into(), ..ada.clone() };
        assert_eq!(of(&others, access(Some("web"), "10.0.0.1")), (false, false));

        let page = |path| PageAccess { path, instances: None, peer: "10.0.0.1".parse().expect("an address") };
        let question = ReviewSpecRef::page(&ada, &page("/metrics")).to_question();
        assert!(ReviewSpecRef::page(&ada, &page("/metrics")).equivalent(&question));
        assert!(!ReviewSpecRef::page(&ada, &page("/metrics/")).equivalent(&question));
    }
}
