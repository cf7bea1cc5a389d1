//! The CA in a Secret that all processes of one gangplank share.
//!
//! 1. Whoever comes first creates the Secret, and the others read it: no two CAs are ever in use for longer than it takes to
//!    read it.
//! 2. A Secret that does not hold a CA of gangplank is never overwritten. A process that finds one at its start ends.
//! 3. While the API server is away, a copy in the data directory is used. It is never what a new Secret is made from: who
//!    deletes the Secret wants another CA.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{sync::watch, time::sleep};
use tracing::{error, info, warn};

use super::{CaError, CaPem, CertificateAuthority, CurrentCa, InvalidCa, directory};
use crate::{
    identity::joining,
    kubernetes::secrets::{NewSecret, SecretError, SecretEvent, SecretObserver, Secrets, SharedSecret},
    model::wall_clock,
};

/// The Secret. Its type and its keys are those of Kubernetes for a certificate and its key.
const SECRET: NewSecret<'static> = NewSecret { name: "gangplank-ca", kind: KIND, type_: "kubernetes.io/tls" };
const KIND: &str = "ca";
const KEY: &str = "tls.key";
const CERTIFICATE: &str = "tls.crt";

/// The copy in the data directory: key and certificate in PEM, readable by the user of the process only.
const COPY_FILE: &str = "cluster-ca.pem";
const BEGIN_CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----";

/// How long to wait after a failure; it doubles with each further one in a row.
const MIN_BACKOFF: Duration = Duration::from_millis(500);
const MAX_BACKOFF: Duration = Duration::from_secs(15);

/// Keeps the CA in use the one in the Secret.
#[derive(Debug)]
pub struct ClusterCa {
    secrets: Arc<Secrets>,
    dir: PathBuf,
    current: Arc<CurrentCa>,
    seen: watch::Sender<ObservedSecret>,
}

/// What the watch has shown last of the Secret.
#[derive(Debug, Clone)]
enum ObservedSecret {
    Nothing,
    Secret(Box<SharedSecret>),
    Removed,
}

/// Why the Secret was not read.
enum NotRead {
    /// A person has to act.
    Fatal(CaError),
    /// It is tried again.
    Secret(SecretError),
}

impl From<CaError> for NotRead {
    fn from(err: CaError) -> Self {
        Self::Fatal(err)
    }
}

impl From<SecretError> for NotRead {
    fn from(err: SecretError) -> Self {
        Self::Secret(err)
    }
}

impl SecretObserver for ClusterCa {
    fn observe(&self, event: &SecretEvent<'_>) {
        match event {
            SecretEvent::Set(secret) if secret.name == SECRET.name => {
                self.seen.send_replace(ObservedSecret::Secret(Box::new((*secret).clone())));
            }
            SecretEvent::Removed(secret) if secret.name == SECRET.name => {
                self.seen.send_replace(ObservedSecret::Removed);
            }
            SecretEvent::Set(_) | SecretEvent::Removed(_) | SecretEvent::Listed => {}
        }
    }
}

impl ClusterCa {
    /// Reads nothing yet. `dir` is the data directory, of which the caller has the lock.
    #[must_use]
    pub fn new(secrets: Arc<Secrets>, dir: PathBuf) -> Arc<Self> {
        let current = Arc::new(CurrentCa::pending(format!("the Secret {}", secrets.path(SECRET.name))));
        let this = Arc::new(Self { current, dir, seen: watch::Sender::new(ObservedSecret::Nothing), secrets });
        let observer: Weak<dyn SecretObserver> = Arc::downgrade(&this) as Weak<dyn SecretObserver>;
        this.secrets.add_observer(observer);
        this
    }

    /// The CA in use.
    #[must_use]
    pub const fn current(&self) -> &Arc<CurrentCa> {
        &self.current
    }

    /// Reads or creates the Secret, however long the API server is away, and follows it. Ends only with an error.
    ///
    /// # Errors
    /// When at the start the Secret, or what it should be made from, does not hold what it should.
    pub async fn run(&self) -> Result<Infallible, CaError> {
        let mut seen = self.seen.subscribe();
        let mut backoff = MIN_BACKOFF;
        let mut reported = None;
        loop {
            match self.acquire().await {
                Ok(()) => break,
                Err(NotRead::Fatal(err)) => return Err(err),
                Err(NotRead::Secret(err)) => {
                    self.current.set_missing(err.to_string());
                    if reported.as_ref() != Some(&err) {
                        error!(%err, "the CA of this gangplank cannot be read: {}; retrying", self.current.place());
                        reported = Some(err);
                    }
                }
            }
            if self.current.get().is_err() {
                self.use_copy();
            }
            tokio::select! {
                () = sleep(backoff) => {}
                _ = seen.changed() => {}
            }
            backoff = (2 * backoff).min(MAX_BACKOFF);
        }
        // What was read above was seen, too.
        loop {
            let latest = seen.borrow_and_update().clone();
            match latest {
                ObservedSecret::Nothing => {}
                ObservedSecret::Removed => {
                    warn!("{} was deleted: its CA is used until another process makes a new one", self.current.place());
                }
                ObservedSecret::Secret(secret) => match self.parse(&secret) {
                    Ok((pem, ca)) => self.adopt(pem, ca).await,
                    Err(err) => error!(%err, "the CA that was read before stays in use"),
                },
            }
            // The sender is this value.
            let _ = seen.changed().await;
        }
    }

    /// Reads the Secret, or creates it.
    async fn acquire(&self) -> Result<(), NotRead> {
        let found = match self.secrets.get(SECRET.name).await? {
            Some(secret) => Some(secret),
            None => {
                let pem = self.in_directory()?;
                let imported = pem.is_some();
                let pem = pem.map_or_else(|| CaPem::generate(wall_clock()), Ok)?;
                let CaPem { key, certificate } = pem.clone();
                let data = [(KEY, key), (CERTIFICATE, certificate)];
                let data = data.map(|(key, text)| (key.to_owned(), text.into_bytes()));
                if self.secrets.create(SECRET, BTreeMap::from(data)).await? {
                    let from = if imported { "the one of the data directory" } else { "a new one" };
                    info!("{} holds the CA of this gangplank from now on: {from}", self.current.place());
                    let ca = self.checked(CertificateAuthority::parse(pem.clone()))?;
                    self.adopt(pem, ca).await;
                    return Ok(());
                }
                // Another process was faster.
                self.secrets.get(SECRET.name).await?
            }
        };
        let gone = || SecretError::Unavailable("it was created and deleted at once".into());
        let (pem, ca) = self.parse(&found.ok_or_else(gone)?)?;
        self.adopt(pem, ca).await;
        Ok(())
    }

    fn parse(&self, secret: &SharedSecret) -> Result<(CaPem, CertificateAuthority), CaError> {
        if secret.kind.as_deref() != Some(KIND) {
            return Err(self.invalid("is not of gangplank: it does not carry the label gangplank.dev/joining=ca"));
        }
        let text = |key: &str| {
            let bytes = secret.data.get(key).ok_or_else(|| self.invalid(&format!("has no {key}")))?;
            String::from_utf8(bytes.clone()).map_err(|_| self.invalid(&format!("has a {key} that is not PEM")))
        };
        let pem = CaPem { key: text(KEY)?, certificate: text(CERTIFICATE)? };
        Ok((pem.clone(), self.checked(CertificateAuthority::parse(pem))?))
    }

    fn checked(&self, parsed: Result<CertificateAuthority, InvalidCa>) -> Result<CertificateAuthority, CaError> {
        parsed.map_err(|err| match err {
            InvalidCa::Key(reason) => self.invalid(&format!("is damaged: {KEY} {reason}")),
            InvalidCa::Certificate(reason) => self.invalid(&format!("is damaged: {CERTIFICATE} {reason}")),
        })
    }

    fn invalid(&self, reason: &str) -> CaError {
        CaError::Secret { secret: self.secrets.path(SECRET.name), reason: reason.to_owned() }
    }

    /// The CA of an earlier run without Kubernetes.
    fn in_directory(&self) -> Result<Option<CaPem>, CaError> {
        let found = directory::read(&self.dir, wall_clock())?;
        found.map(|pem| directory::parse(&self.dir, pem.clone()).map(|_| pem)).transpose()
    }

    /// Uses the CA of the Secret.
    async fn adopt(&self, pem: CaPem, ca: CertificateAuthority) {
        let dir = self.dir.clone();
        let kept = tokio::task::spawn_blocking(move || keep(&dir, &pem)).await;
        let kept = kept.unwrap_or_else(|err| Err(CaError::Io { path: self.dir.clone(), err: io::Error::other(err) }));
        let place = self.current.place();
        match kept {
            Ok(None) => {}
            Ok(Some(true)) => {
                info!("the CA of the data directory is in {place}: ca.key and ca.crt are renamed to *.retired");
            }
            Ok(Some(false)) => warn!(
                "the CA of the data directory is not used, because {place} holds another: ca.key and ca.crt are renamed to \
                 *.retired, and who joined with them has to join again"
            ),
            Err(err) => warn!(%err, "no copy of the CA is kept for a time without the API server"),
        }
        let before = self.current.get().ok();
        if before.as_ref().is_none_or(|before| before.pem() != ca.pem()) {
            if before.is_some_and(|before| before.public_key_hash() != ca.public_key_hash()) {
                warn!("{place} holds another CA than before: every registrant has to join again");
            }
            self.current.set(ca);
        }
    }

    /// Uses the copy in the data directory, if there is one.
    fn use_copy(&self) {
        let copy = match read_copy(&self.dir) {
            Ok(Some(copy)) => copy,
            Ok(None) => return,
            Err(err) => {
                warn!(%err, "the copy of the CA is not used");
                return;
            }
        };
        match CertificateAuthority::parse(copy) {
            Ok(ca) => {
                info!("a copy of the CA in the data directory is used until {} is read", self.current.place());
                self.current.set(ca);
            }
            Err(_) => warn!("{COPY_FILE} in the data directory is damaged, and not used"),
        }
    }
}

/// Keeps a copy of the CA, and retires one of an earlier run without Kubernetes: whether that was the same, if there was one.
fn keep(dir: &Path, pem: &CaPem) -> Result<Option<bool>, CaError> {
    if read_copy(dir).ok().flatten().as_ref() != Some(pem) {
        directory::write(&dir.join(COPY_FILE), &format!("{}{}", pem.key, pem.certificate))?;
    }
    let Some(earlier) = directory::read(dir, wall_clock())? else { return Ok(None) };
    let same = earlier == *pem;
    // Its registrants first: by its files it is known that there may be some.
    joining::set_aside(dir, same).map_err(|err| CaError::Io { path: dir.to_owned(), err })?;
    directory::retire(dir)?;
    Ok(Some(same))
}

fn read_copy(dir: &Path) -> Result<Option<CaPem>, CaError> {
    let text = directory::text(&dir.join(COPY_FILE))?;
    Ok(text.map(|text| {
        let (key, certificate) = text.split_at(text.find(BEGIN_CERTIFICATE).unwrap_or(text.len()));
        CaPem { key: key.to_owned(), certificate: certificate.to_owned() }
    }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn copy_is_private_and_what_an_earlier_run_left_is_retired() {
        let dir = tempfile::tempdir().expect("a directory");
        let pem = CaPem::generate(wall_clock()).expect("generated");
        assert_eq!(keep(dir.path(), &pem).expect("written"), None);
        assert_eq!(read_copy(dir.path()).expect("readable"), Some(pem.clone()));
        let mode = std::fs::metadata(dir.path().join(COPY_FILE)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        CertificateAuthority::open(dir.path(), wall_clock()).expect("created");
        assert_eq!(keep(dir.path(), &pem).expect("renamed"), Some(false), "another one");
        assert_eq!(keep(dir.path(), &pem).expect("nothing to do"), None);
        assert!(dir.path().join("ca.key.retired").exists() && !dir.path().join("ca.key").exists());
    }
}
