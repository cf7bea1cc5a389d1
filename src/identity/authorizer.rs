//! May it: yes or no.

use std::{
    convert::Infallible,
    fmt,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use tokio::{sync::watch, time::sleep};
use tracing::{info, warn};

use super::{
    Access, AccessVerb, Denied, Identity, IdentitySource, NotAllowed, PageAccess, Policy, PolicyError, RefusalLog,
    access_reviews::{AccessReviews, ReviewSpecRef},
    joining::{self, RegistrantStore},
    policy,
    review_cache::{FRESH, Reviewed, Verdict},
};
use crate::{
    kubernetes::api::Reviews,
    metrics::{Decision, IdentityMetrics},
};

/// How often the policy file is read.
const RELOAD_INTERVAL: Duration = Duration::from_secs(5);

/// How long the policy file must not change before it is put in force.
const SETTLE_TIME: Duration = Duration::from_secs(1);

/// Where rights come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authorization {
    /// Plaintext connections may do all, registrants that joined what their token says, and other clients with a
    /// certificate may see the pages of the admin listener.
    Plaintext,
    /// A policy file. `plaintext` says whether it also holds for plaintext connections, which else may do all.
    Policy {
        /// The file.
        file: PathBuf,
        /// Whether it holds for plaintext, too.
        plaintext: bool,
    },
    /// Kubernetes RBAC. `plaintext` as with a policy.
    Kubernetes {
        /// Whether it holds for plaintext, too.
        plaintext: bool,
    },
}

/// Decides what identities may do.
#[derive(Debug)]
pub struct Authorizer {
    rules: AuthorizationMode,
    /// The user in the certificate of this server, which its replicas share: they hand over to each other.
    replica: Option<Arc<str>>,
    /// Whether a plaintext connection may do all.
    plaintext: bool,
    /// Who joined: each may do what its token said, whatever the policy says.
    registrants: Option<Arc<RegistrantStore>>,
    metrics: Arc<IdentityMetrics>,
    log: Arc<RefusalLog>,
}

#[derive(Debug)]
enum AuthorizationMode {
    None,
    /// As none, but who has a certificate of the client CA may see pages.
    ClientCa,
    Policy(PolicyFile),
    Kubernetes(AccessReviews),
}

#[derive(Debug)]
struct PolicyFile {
    path: PathBuf,
    text: Mutex<String>,
    policy: ArcSwap<Policy>,
    changes: watch::Sender<u64>,
}

impl Authorizer {
    /// Reads the policy, if there is one. `reviews` is how Kubernetes is asked, and how long what it has said counts
    /// while it cannot be.
    ///
    /// # Errors
    /// When the file cannot be read or is invalid, with the line.
    pub fn new(
        authorization: Authorization,
        reviews: Option<(Arc<Reviews>, Duration)>,
        replica: Option<Arc<str>>,
        metrics: Arc<IdentityMetrics>,
        log: Arc<RefusalLog>,
    ) -> Result<Self, PolicyError> {
        let (rules, plaintext) = match authorization {
            Authorization::Plaintext => (AuthorizationMode::ClientCa, true),
            Authorization::Policy { file, plaintext } => {
                let text = policy::read(&file)?;
                let parsed = Policy::parse(&text).map_err(|err| err.of(&file))?;
                let policy = PolicyFile {
                    path: file,
                    text: Mutex::new(text),
                    policy: ArcSwap::from_pointee(parsed),
                    changes: watch::Sender::new(0),
                };
                (AuthorizationMode::Policy(policy), !plaintext)
            }
            Authorization::Kubernetes { plaintext } => {
                let rules = reviews.map_or(AuthorizationMode::None, |(reviews, stale)| {
                    AuthorizationMode::Kubernetes(AccessReviews::new(reviews, stale, Arc::clone(&metrics)))
                });
                (rules, !plaintext)
            }
        };
        Ok(Self { rules, replica, plaintext, registrants: None, metrics, log })
    }

    /// The same, which also decides on registrants that joined.
    #[must_use]
    pub fn with_registrants(self, registrants: Option<Arc<RegistrantStore>>) -> Self {
        Self { registrants, ..self }
    }

    /// Whether `identity` may do what it asks for, if that is known now: by the policy, or as Kubernetes has said lately.
    /// Neither waits nor allocates unless it is denied. A yes says since when it is known.
    pub fn known(&self, identity: &Identity, access: &Access<'_>) -> Option<Result<Instant, NotAllowed>> {
        if self.allows_all(identity) {
            return Some(Ok(Instant::now()));
        }
        let decided = match self.unreviewed(identity, access) {
            Ok(decided) => decided,
            Err(reviews) => verdict(reviews.known(&ReviewSpecRef::access(identity, access))?, identity, access),
        };
        Some(self.record(decided, identity, access, access.peer))
    }

    /// Whether `identity` may do what it asks for. A yes says since when it is known.
    ///
    /// # Errors
    /// When it may not, with the reason, or when nobody can say.
    pub async fn decide(&self, identity: &Identity, access: &Access<'_>) -> Result<Instant, NotAllowed> {
        self.decide_within(identity, access, FRESH).await
    }

    /// As [`Authorizer::decide`], by a review that is not older than `max_age` where Kubernetes can be asked.
    ///
    /// # Errors
    /// When it may not, with the reason, or when nobody can say.
    pub async fn decide_within(
        &self,
        identity: &Identity,
        access: &Access<'_>,
        max_age: Duration,
    ) -> Result<Instant, NotAllowed> {
        if self.allows_all(identity) {
            return Ok(Instant::now());
        }
        let decided = match self.unreviewed(identity, access) {
            Ok(decided) => decided,
            Err(reviews) => reviewed(reviews, ReviewSpecRef::access(identity, access), max_age, identity, access).await,
        };
        self.record(decided, identity, access, access.peer)
    }

    /// Whether `identity` may see a page.
    ///
    /// # Errors
    /// When it may not, with the reason, or when nobody can say.
    pub async fn decide_page(&self, identity: &Identity, page: &PageAccess<'_>) -> Result<(), NotAllowed> {
        if self.allows_all(identity) {
            return Ok(());
        }
        let denied = |why: &str| Err(NotAllowed::Denied(Denied(format!("{identity} may not {page}{why}"))));
        let decided = match &self.rules {
            AuthorizationMode::Policy(file) if identity.source == IdentitySource::Registrant => {
                let policy = file.policy.load();
                let named = policy.decide_named_page(identity, page).then(Instant::now);
                named.map_or_else(|| denied(": its join token allows no pages, and no rule names it"), Ok)
            }
            _ if joining::is_registrant(identity) => denied(": its join token allows no pages"),
            AuthorizationMode::Policy(file) => {
                file.policy.load().decide_page(identity, page).map(|()| Instant::now()).map_err(NotAllowed::from)
            }
            AuthorizationMode::Kubernetes(reviews) => {
                match reviewed(reviews, ReviewSpecRef::page(identity, page), FRESH, identity, page).await {
                    Ok(_) if let Some(access) = &page.instances => {
                        reviewed(reviews, ReviewSpecRef::access(identity, access), FRESH, identity, access).await
                    }
                    decided => decided,
                }
            }
            AuthorizationMode::ClientCa if identity.source == IdentitySource::Certificate => Ok(Instant::now()),
            AuthorizationMode::None | AuthorizationMode::ClientCa => {
                denied(": the server has neither --authorization-policy nor --kubernetes")
            }
        };
        self.record(decided, identity, page, page.peer).map(|_| ())
    }

    /// The decision, where Kubernetes is not asked; else whom to ask.
    fn unreviewed(
        &self,
        identity: &Identity,
        access: &Access<'_>,
    ) -> Result<Result<Instant, NotAllowed>, &AccessReviews> {
        let joined = self.registrants.as_ref().and_then(|registrants| registrants.decide(identity, access));
        Ok(match &self.rules {
            _ if let Some(decided) = joined => decided.map(|()| Instant::now()).map_err(NotAllowed::from),
            _ if access.verb == AccessVerb::HandOver && self.is_replica(identity) => Ok(Instant::now()),
            AuthorizationMode::Policy(file) => {
                file.policy.load().decide(identity, access).map(|()| Instant::now()).map_err(NotAllowed::from)
            }
            AuthorizationMode::Kubernetes(reviews) => return Err(reviews),
            AuthorizationMode::None | AuthorizationMode::ClientCa => Err(NotAllowed::Denied(Denied(format!(
                "{identity} may not {access}: the server has neither --authorization-policy nor --kubernetes"
            )))),
        })
    }

    /// Counts a decision, and logs a refusal.
    fn record(
        &self,
        decided: Result<Instant, NotAllowed>,
        identity: &Identity,
        act: &impl fmt::Display,
        peer: IpAddr,
    ) -> Result<Instant, NotAllowed> {
        let counted = match &decided {
            Ok(_) => Decision::Allowed,
            Err(NotAllowed::Denied(_)) => Decision::Denied,
            Err(NotAllowed::Undecided(_)) => Decision::Undecided,
        };
        self.metrics.decisions.at(counted).inc();
        if let Err(err) = &decided {
            self.log.refused(|suppressed| {
                let what = if counted == Decision::Denied { "denied" } else { "not decided" };
                warn!(user = %identity, %peer, reason = %err, suppressed, "{what}: {act}");
            });
        }
        decided
    }

    /// Counts a yes that a caller has remembered.
    pub fn count_allowed(&self) {
        self.metrics.decisions.at(Decision::Allowed).inc();
    }

    /// For how long after [`Authorizer::decide`] a caller may remember a yes. `None` where it changes at once.
    #[must_use]
    pub fn may_be_remembered(&self) -> Option<Duration> {
        matches!(self.rules, AuthorizationMode::Kubernetes(_)).then_some(FRESH)
    }

    fn is_replica(&self, identity: &Identity) -> bool {
        identity.source == IdentitySource::Certificate && self.replica.as_ref() == Some(&identity.user)
    }

    /// Whether `identity` may do all, whatever the policy says.
    #[must_use]
    pub fn allows_all(&self, identity: &Identity) -> bool {
        match identity.source {
            IdentitySource::Loopback | IdentitySource::Anonymous => self.plaintext,
            IdentitySource::Certificate | IdentitySource::Registrant | IdentitySource::Token => false,
        }
    }

    /// Changes whenever rights may have changed, after which what lasts has to be decided again.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        match &self.rules {
            AuthorizationMode::Policy(file) => file.changes.subscribe(),
            AuthorizationMode::None | AuthorizationMode::ClientCa | AuthorizationMode::Kubernetes(_) => {
                watch::Sender::new(0).subscribe()
            }
        }
    }

    /// Reads the policy file again at intervals, for ever. An invalid one leaves the old one in force; the error is
    /// logged once.
    pub async fn follow_policy(self: Arc<Self>) -> Infallible {
        let mut reported = None;
        loop {
            sleep(RELOAD_INTERVAL).await;
            match self.reload().await {
                Ok(changed) => {
                    reported = None;
                    if changed {
                        info!("the new version of the policy file is in force");
                    }
                }
                Err(err) => {
                    let err = err.to_string();
                    if reported.as_ref() != Some(&err) {
                        warn!(error = err, "the policy file is invalid; its last valid version stays in force");
                        self.metrics.policy_reload_errors.inc();
                        reported = Some(err);
                    }
                }
            }
        }
    }

    /// Reads the policy file, and puts it in force if it has changed and nobody is writing it. Returns whether it has.
    async fn reload(self: &Arc<Self>) -> Result<bool, PolicyError> {
        let Some(text) = self.changed_text().await? else { return Ok(false) };
        // Half of a file may be valid, and allow more than all of it.
        sleep(SETTLE_TIME).await;
        if self.changed_text().await?.as_ref() != Some(&text) {
            return Ok(false);
        }
        let AuthorizationMode::Policy(file) = &self.rules else { return Ok(false) };
        let parsed = Policy::parse(&text).map_err(|err| err.of(&file.path))?;
        *file.text.lock().unwrap_or_else(PoisonError::into_inner) = text;
        file.policy.store(Arc::new(parsed));
        file.changes.send_modify(|count| *count += 1);
        Ok(true)
    }

    /// What is in the policy file, if it is not what is in force.
    async fn changed_text(self: &Arc<Self>) -> Result<Option<String>, PolicyError> {
        let authorizer = Arc::clone(self);
        // A file on a network may block.
        let read = tokio::task::spawn_blocking(move || {
            let AuthorizationMode::Policy(file) = &authorizer.rules else { return Ok(None) };
            let read = policy::read(&file.path)?;
            let text = file.text.lock().unwrap_or_else(PoisonError::into_inner);
            Ok((*text != read).then_some(read))
        });
        read.await.unwrap_or_else(|err| {
            warn!(error = %err, "reading the policy file panicked");
            Ok(None)
        })
    }
}

/// The decision of a review.
async fn reviewed(
    reviews: &AccessReviews,
    asked: ReviewSpecRef<'_>,
    max_age: Duration,
    identity: &Identity,
    act: &(impl fmt::Display + Sync),
) -> Result<Instant, NotAllowed> {
    match reviews.decide(asked, max_age).await {
        Ok(reviewed) => verdict(reviewed, identity, act),
        Err(err) => Err(NotAllowed::Undecided(err)),
    }
}

fn verdict(
    Reviewed { verdict, at }: Reviewed<()>,
    identity: &Identity,
    act: &impl fmt::Display,
) -> Result<Instant, NotAllowed> {
    match verdict {
        Verdict::Yes(()) => Ok(at),
        Verdict::No => Err(NotAllowed::Denied(Denied(format!("{identity} may not {act}")))),
    }
}
