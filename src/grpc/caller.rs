//! Who has made a call, and what the call was allowed: asked before each act, and again as long as the call lasts.

use std::{
    future::{Future, pending},
    hash::Hash,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream};
use indexmap::{Equivalent, IndexMap};
use tokio::{sync::watch, time::sleep};
use tonic::{Request, Status};

use crate::{
    identity::{Access, AccessResource, AccessVerb, Authorizer, Identity, NotAllowed, StreamPermit, Unauthenticated},
    model::Registrant,
    net::backoff::jittered,
    registry::Requester,
    security::Security,
};

/// Most acts of one call that are decided again when rights change. What it does beyond is checked when it does it.
const MAX_ONGOING: usize = 1024;

/// How often what a call was allowed is asked again, where it has to be asked. Shorter than answers count, so that the
/// messages of a stream need not wait for a review.
const REVIEW_INTERVAL: Duration = Duration::from_secs(8);

/// An answer that somebody else has got is taken instead if it is not older than this.
const MAX_REVIEW_AGE: Duration = Duration::from_secs(7);

/// When it is asked for the first time, at most, and again when it could not be asked. Short calls are over before.
const MIN_REVIEW_INTERVAL: Duration = Duration::from_secs(1);

/// Reviews of one call at once.
const MAX_CONCURRENT_REVIEWS: usize = 8;

/// An authenticated caller, in the extensions of its request. The only way for a service to ask what it may do.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    identity: Arc<Identity>,
    peer: IpAddr,
    authorizer: Arc<Authorizer>,
    requester: Requester,
    /// Counts among the open calls of the identity; `None` for who may do all.
    open: Option<Arc<StreamPermit>>,
    /// What the call was allowed, to be decided again when rights change, and since when it is known; `None` for who may
    /// do all.
    ongoing: Option<Arc<Mutex<IndexMap<OngoingAccess, Instant>>>>,
}

/// An act that lasts as long as its call.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct OngoingAccess {
    verb: AccessVerb,
    namespace: Option<Box<str>>,
    service: Option<Box<str>>,
    /// `None` where rights do not depend on it.
    address: Option<IpAddr>,
}

/// The same in borrowed parts.
#[derive(PartialEq, Eq, Hash)]
struct OngoingRef<'a> {
    verb: AccessVerb,
    namespace: Option<&'a str>,
    service: Option<&'a str>,
    address: Option<IpAddr>,
}

impl Equivalent<OngoingAccess> for OngoingRef<'_> {
    fn equivalent(&self, key: &OngoingAccess) -> bool {
        let OngoingAccess { verb, namespace, service, address } = key;
        *self
            == OngoingRef {
                verb: *verb,
                namespace: namespace.as_deref(),
                service: service.as_deref(),
                address: *address,
            }
    }
}

impl Caller {
    /// The caller of a request; [`AuthenticatedRoutes`](super::authentication::AuthenticatedRoutes) has put it there.
    ///
    /// # Errors
    /// When the request has not passed there, which is a fault of this program: it is not carried out.
    pub(super) fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        request.extensions().get::<Self>().cloned().ok_or_else(|| Status::internal("the call was not authenticated"))
    }

    /// # Errors
    /// When no instance could be registered under the user's name, or the identity has too many calls open.
    pub(super) fn new(identity: Arc<Identity>, peer: IpAddr, security: &Security) -> Result<Self, Status> {
        let authorizer = &security.authorizer;
        let allows_all = authorizer.allows_all(&identity);
        let ongoing = (!allows_all).then(Arc::default);
        let (requester, open) = if allows_all {
            (Requester::Unrestricted, None)
        } else {
            let open = security.usage.begin(&identity).map_err(|err| Status::resource_exhausted(err.to_string()))?;
            let registrant = Registrant::new(Arc::clone(&identity.user));
            let registrant = registrant.map_err(|err| Status::unauthenticated(err.to_string()))?;
            (Requester::Identity { registrant, overrides: false, peer }, Some(open))
        };
        Ok(Self { identity, peer, authorizer: Arc::clone(authorizer), requester, open, ongoing })
    }

    /// On whose behalf the call changes instances, without the right to change those of others.
    pub(super) fn requester(&self) -> Requester {
        self.requester.clone()
    }

    /// How long the caller's next message has to wait; `None` if it may come.
    pub(super) fn message_wait(&self) -> Option<Duration> {
        self.open.as_ref()?.wait(Instant::now())
    }

    /// A message of the caller was read.
    pub(super) fn count_message(&self) {
        if let Some(open) = &self.open {
            open.count_message();
        }
    }

    /// Whether the caller may do this, if that is known without a review. Allocates nothing for what the call was
    /// allowed before.
    pub(super) fn known(
        &self,
        verb: AccessVerb,
        namespace: Option<&str>,
        service: Option<&str>,
        address: Option<IpAddr>,
    ) -> Option<Result<(), NotAllowed>> {
        let Some(ongoing) = &self.ongoing else { return Some(Ok(())) };
        let access = self.access(AccessResource::Instances, verb, namespace, service, address);
        if let Some(age) = self.authorizer.may_be_remembered() {
            let ongoing = ongoing.lock().unwrap_or_else(PoisonError::into_inner);
            // What the stream was allowed a moment ago: a thousand messages for one service ask nobody.
            if ongoing.get(&self.ongoing_ref(&access)).is_some_and(|known| known.elapsed() < age) {
                self.authorizer.count_allowed();
                return Some(Ok(()));
            }
        }
        let known = self.authorizer.known(&self.identity, &access)?;
        Some(known.map(|since| self.remember(&access, since)))
    }

    /// Whether the caller may do this.
    ///
    /// # Errors
    /// When it may not, with the reason, or when nobody can say.
    pub(super) async fn may(
        &self,
        verb: AccessVerb,
        namespace: Option<&str>,
        service: Option<&str>,
        address: Option<IpAddr>,
    ) -> Result<(), NotAllowed> {
        if let Some(known) = self.known(verb, namespace, service, address) {
            return known;
        }
        let access = self.access(AccessResource::Instances, verb, namespace, service, address);
        let since = self.authorizer.decide(&self.identity, &access).await?;
        self.remember(&access, since);
        Ok(())
    }

    /// Whether the caller may do this with tokens or registrants, as [`Caller::may_call`].
    pub(super) async fn may_administer(
        &self,
        resource: AccessResource,
        verb: AccessVerb,
        namespace: Option<&str>,
        service: Option<&str>,
    ) -> Result<(), Status> {
        let access = self.access(resource, verb, namespace, service, None);
        let decided = self.authorizer.decide(&self.identity, &access).await;
        decided.map(|_| ()).map_err(|err| not_allowed(&err))
    }

    const fn access<'a>(
        &self,
        resource: AccessResource,
        verb: AccessVerb,
        namespace: Option<&'a str>,
        service: Option<&'a str>,
        address: Option<IpAddr>,
    ) -> Access<'a> {
        Access { resource, verb, namespace, service, address, peer: self.peer }
    }

    /// Who calls.
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// As [`Caller::may`], where a refusal ends the call with PERMISSION_DENIED or UNAVAILABLE.
    pub(super) async fn may_call(
        &self,
        verb: AccessVerb,
        namespace: Option<&str>,
        service: Option<&str>,
    ) -> Result<(), Status> {
        self.may(verb, namespace, service, None).await.map_err(|err| not_allowed(&err))
    }

    /// Where rights are asked at intervals, they do not depend on the address: a stream that registers a thousand
    /// addresses of one service asks once.
    fn ongoing_ref<'a>(&self, access: &Access<'a>) -> OngoingRef<'a> {
        let Access { resource: _, verb, namespace, service, address, peer: _ } = *access;
        let address = address.filter(|_| self.authorizer.may_be_remembered().is_none());
        OngoingRef { verb, namespace, service, address }
    }

    /// Remembers what was allowed.
    fn remember(&self, access: &Access<'_>, since: Instant) {
        let Some(ongoing) = &self.ongoing else { return };
        let mut ongoing = ongoing.lock().unwrap_or_else(PoisonError::into_inner);
        let found = self.ongoing_ref(access);
        if let Some(known) = ongoing.get_mut(&found) {
            *known = since;
        // Beyond that each act is checked when it happens, but not again while it lasts: the list is bounded, the
        // rights are not widened.
        } else if ongoing.len() < MAX_ONGOING {
            let OngoingRef { verb, namespace, service, address } = found;
            let (namespace, service) = (namespace.map(Box::from), service.map(Box::from));
            ongoing.insert(OngoingAccess { verb, namespace, service, address }, since);
        }
    }

    /// Ready when the identity ends, as `identity_end` says, or when a right of the call was withdrawn. `None` for who
    /// may do all as long as the connection lasts.
    pub(super) fn end<F: Future<Output = Unauthenticated> + Send>(
        &self,
        identity_end: Option<F>,
    ) -> Option<impl Future<Output = Status> + Send + use<F>> {
        if identity_end.is_none() && self.ongoing.is_none() {
            return None;
        }
        // Before anything is decided, so that no change is missed.
        let (caller, changes) = (self.clone(), self.authorizer.changes());
        Some(async move {
            let identity_end = async {
                match identity_end {
                    Some(end) => end.await,
                    None => pending().await,
                }
            };
            tokio::select! {
                err = identity_end => unauthenticated(&err),
                err = caller.withdrawn(changes) => not_allowed(&err),
            }
        })
    }

    /// Ready when something that the call was allowed is denied, or could not be confirmed for too long.
    async fn withdrawn(&self, mut changes: watch::Receiver<u64>) -> NotAllowed {
        let Some(ongoing) = &self.ongoing else { return pending().await };
        // Not all calls at one moment, when a thousand begin at once.
        let mut interval = jittered(MIN_REVIEW_INTERVAL);
        loop {
            if self.authorizer.may_be_remembered().is_some() {
                sleep(interval).await;
            // Without Kubernetes rights change with the policy file only.
            } else if changes.changed().await.is_err() {
                return pending().await;
            }
            let all: Vec<_> = {
                let ongoing = ongoing.lock().unwrap_or_else(PoisonError::into_inner);
                ongoing.keys().cloned().collect()
            };
            let decided = stream::iter(all).map(|access| self.still_allowed(access));
            let mut decided = decided.buffer_unordered(MAX_CONCURRENT_REVIEWS);
            while let Some(decided) = decided.next().await {
                if let Err(err) = decided {
                    return err;
                }
            }
            let ongoing = ongoing.lock().unwrap_or_else(PoisonError::into_inner);
            // By the oldest answer: no right of the call is older than the interval when it is asked again.
            let oldest = ongoing.values().min().map_or(Duration::ZERO, Instant::elapsed);
            interval = REVIEW_INTERVAL.saturating_sub(oldest).max(MIN_REVIEW_INTERVAL);
        }
    }

    /// Decides again on what the call was allowed.
    async fn still_allowed(&self, ongoing: OngoingAccess) -> Result<(), NotAllowed> {
        let OngoingAccess { verb, namespace, service, address } = &ongoing;
        let (namespace, service) = (namespace.as_deref(), service.as_deref());
        let access = self.access(AccessResource::Instances, *verb, namespace, service, *address);
        let since = self.authorizer.decide_within(&self.identity, &access, MAX_REVIEW_AGE).await?;
        self.remember(&access, since);
        Ok(())
    }
}

/// The status of a call without an identity.
pub(super) fn unauthenticated(err: &Unauthenticated) -> Status {
    if err.is_unknown() { Status::unavailable(err.to_string()) } else { Status::unauthenticated(err.to_string()) }
}

/// The status of a call that is not carried out.
fn not_allowed(err: &NotAllowed) -> Status {
    match err {
        NotAllowed::Denied(denied) => Status::permission_denied(denied.to_string()),
        NotAllowed::Undecided(err) => Status::unavailable(format!("whether this is allowed: {err}")),
    }
}
