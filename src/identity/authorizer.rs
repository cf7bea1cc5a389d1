//! May it: yes or no.

use std::{
    convert::Infallible,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{sync::watch, time::sleep};
use tracing::{info, warn};

use super::{
    Access, AccessVerb, Denied, Identity, IdentitySource, Policy, PolicyError, RefusalLog, joining::Registrants, policy,
};
use crate::metrics::{Decision, IdentityMetrics};

/// How often the policy file is read.
const RELOAD_INTERVAL: Duration = Duration::from_secs(5);

/// Where rights come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authorization {
    /// Plaintext connections may do all, and registrants that joined what their token says.
    Plaintext,
    /// A policy file. `plaintext` says whether it also holds for plaintext connections, which else may do all.
    Policy {
        /// The file.
        file: PathBuf,
        /// Whether it holds for plaintext, too.
        plaintext: bool,
    },
}

/// Decides what identities may do.
#[derive(Debug)]
pub struct Authorizer {
    policy: Option<PolicyFile>,
    /// The user in the certificate of this server, which its replicas share: they hand over to each other.
    replica: Option<Arc<str>>,
    /// Whether a plaintext connection may do all.
    plaintext: bool,
    /// Who joined: each may do what its token said, whatever the policy says.
    registrants: Option<Arc<Registrants>>,
    metrics: Arc<IdentityMetrics>,
    log: Arc<RefusalLog>,
}

#[derive(Debug)]
struct PolicyFile {
    path: PathBuf,
    text: Mutex<String>,
    policy: ArcSwap<Policy>,
    changes: watch::Sender<u64>,
}

impl Authorizer {
    /// Reads the policy, if there is one.
    ///
    /// # Errors
    /// When the file cannot be read or is invalid, with the line.
    pub fn new(
        authorization: Authorization,
        replica: Option<Arc<str>>,
        metrics: Arc<IdentityMetrics>,
        log: Arc<RefusalLog>,
    ) -> Result<Self, PolicyError> {
        let (policy, plaintext) = match authorization {
            Authorization::Plaintext => (None, true),
            Authorization::Policy { file, plaintext } => {
                let text = policy::read(&file)?;
                let parsed = Policy::parse(&text).map_err(|err| err.of(&file))?;
                let policy = PolicyFile {
                    path: file,
                    text: Mutex::new(text),
                    policy: ArcSwap::from_pointee(parsed),
                    changes: watch::Sender::new(0),
                };
                (Some(policy), !plaintext)
            }
        };
        Ok(Self { policy, replica, plaintext, registrants: None, metrics, log })
    }

    /// The same, which also decides on registrants that joined.
    #[must_use]
    pub fn with_registrants(self, registrants: Option<Arc<Registrants>>) -> Self {
        Self { registrants, ..self }
    }

    /// Whether `identity` may do what it asks for.
    ///
    /// # Errors
    /// When it may not, with the reason.
    pub fn decide(&self, identity: &Identity, access: &Access<'_>) -> Result<(), Denied> {
        let joined = self.registrants.as_ref().and_then(|registrants| registrants.decide(identity, access));
        let decided = match &self.policy {
            _ if self.allows_all(identity) => return Ok(()),
            _ if let Some(decided) = joined => decided,
            _ if access.verb == AccessVerb::HandOver && self.is_replica(identity) => Ok(()),
            Some(file) => file.policy.load().decide(identity, access),
            None => Err(Denied(format!("{identity} may not {access}: the server has no --authorization-policy"))),
        };
        self.metrics.decisions.at(if decided.is_ok() { Decision::Allowed } else { Decision::Denied }).inc();
        if let Err(denied) = &decided {
            self.log.refused(|suppressed| {
                warn!(user = %identity, peer = %access.peer, reason = %denied, suppressed, "denied: {access}");
            });
        }
        decided
    }

    fn is_replica(&self, identity: &Identity) -> bool {
        identity.source == IdentitySource::Certificate && self.replica.as_ref() == Some(&identity.user)
    }

    /// Whether `identity` may do all, whatever the policy says.
    #[must_use]
    pub fn allows_all(&self, identity: &Identity) -> bool {
        match identity.source {
            IdentitySource::Loopback | IdentitySource::Anonymous => self.plaintext,
            IdentitySource::Certificate => false,
        }
    }

    /// Changes whenever rights may have changed, after which what lasts has to be decided again.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        match &self.policy {
            Some(file) => file.changes.subscribe(),
            None => watch::Sender::new(0).subscribe(),
        }
    }

    /// Reads the policy file again at intervals, for ever. An invalid one leaves the old one in force; the error is
    /// logged once.
    pub async fn follow_policy(self: Arc<Self>) -> Infallible {
        let mut reported = None;
        loop {
            sleep(RELOAD_INTERVAL).await;
            let authorizer = Arc::clone(&self);
            let reloaded = tokio::task::spawn_blocking(move || authorizer.reload()).await;
            match reloaded {
                Ok(Ok(changed)) => {
                    reported = None;
                    if changed {
                        info!("the new version of the policy file is in force");
                    }
                }
                Ok(Err(err)) => {
                    let err = err.to_string();
                    if reported.as_ref() != Some(&err) {
                        warn!(error = err, "the policy file is invalid; its last valid version stays in force");
                        self.metrics.policy_reload_errors.inc();
                        reported = Some(err);
                    }
                }
                Err(err) => warn!(error = %err, "reading the policy file panicked"),
            }
        }
    }

    /// Reads the policy file once. Returns whether it has changed.
    fn reload(&self) -> Result<bool, PolicyError> {
        let Some(file) = &self.policy else { return Ok(false) };
        let read = policy::read(&file.path)?;
        let mut text = file.text.lock().unwrap_or_else(PoisonError::into_inner);
        if *text == read {
            return Ok(false);
        }
        let parsed = Policy::parse(&read).map_err(|err| err.of(&file.path))?;
        *text = read;
        file.policy.store(Arc::new(parsed));
        file.changes.send_modify(|count| *count += 1);
        Ok(true)
    }
}
