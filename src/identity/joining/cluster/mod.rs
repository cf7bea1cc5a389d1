//! Tokens and registrants in Secrets that all processes share: one for each, so that none outgrows what an object may have,
//! and no two machines wait for one another.
//!
//! 1. A use of a token is counted by compare-and-swap, and before the registrant is written: it is used as often as it may
//!    be, by all processes together, and never once more. A failure between the two returns the use if it can.
//! 2. Whoever joins, renews or is revoked is so when Kubernetes has it: without an answer of the API server nothing is done.
//!    What was known before goes on to count.
//! 3. A change goes on when its caller is gone: see [`ClusterStore::complete`].
//! 4. What has no meaning any more is deleted by the process that holds the Lease.

mod import;
mod objects;

use std::{
    convert::Infallible,
    fmt,
    path::PathBuf,
    sync::{Arc, Weak},
    time::{Duration, Instant, SystemTime},
};

use futures::future::BoxFuture;
use tokio::{
    sync::{Mutex, mpsc, oneshot},
    task::JoinSet,
    time::sleep,
};
use tracing::{debug, warn};

pub(in crate::identity) use self::import::set_aside;
use self::objects::{REGISTRANT, SharedToken, TOKEN};
use super::{
    JoinedRegistrant, JoiningError, JoiningTable, Scope, Token, TokenId, TokenRefused,
    lookups::{LookUp, LookUps},
    store::JoinAttempt,
};
use crate::{
    identity::{CurrentCa, random},
    kubernetes::secrets::{
        NewSecret, SecretError, SecretEvent, SecretObserver, SecretUpdate, Secrets, SharedSecret, UpdateError,
    },
    model::{hex, wall_clock},
};

/// How often the process that holds the Lease looks for what has no meaning any more, and how much it deletes at once.
const PURGE_INTERVAL: Duration = Duration::from_secs(10);
const MAX_PURGED: usize = 200;

/// Changes that wait to be begun.
const MAX_WAITING: usize = 128;

/// How long the return of a use waits after it has failed, and how often it is tried.
const RETURN_BACKOFF: Duration = Duration::from_secs(1);
const MAX_RETURNS: usize = 5;

/// Bytes of what a use is known by.
const USE_BYTES: usize = 8;

/// Why something is not known here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NotFound {
    /// It does not exist.
    Absent,
    /// Nobody can say.
    Unknown(String),
}

/// The Secrets.
pub(in crate::identity) struct ClusterStore {
    secrets: Arc<Secrets>,
    table: Arc<JoiningTable>,
    look_ups: LookUps,
    /// What was begun, to be completed whoever waits for it.
    begin: mpsc::Sender<BoxFuture<'static, ()>>,
    begun: Mutex<mpsc::Receiver<BoxFuture<'static, ()>>>,
    ca: Arc<CurrentCa>,
    /// The data directory.
    dir: PathBuf,
}

impl fmt::Debug for ClusterStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterStore").field("secrets", &self.secrets).finish_non_exhaustive()
    }
}

impl SecretObserver for ClusterStore {
    fn observe(&self, event: &SecretEvent<'_>) {
        match event {
            SecretEvent::Set(secret) => self.set(secret),
            SecretEvent::Removed(secret) => self.removed(secret),
            SecretEvent::Listed => self.table.complete(),
        }
    }
}

impl ClusterStore {
    /// Knows nothing yet. `dir` is the data directory, which may have tokens and registrants of an earlier run.
    pub(super) fn new(secrets: Arc<Secrets>, table: Arc<JoiningTable>, ca: Arc<CurrentCa>, dir: PathBuf) -> Arc<Self> {
        let (begin, begun) = mpsc::channel(MAX_WAITING);
        let look_ups = LookUps::new(Instant::now());
        let this = Arc::new(Self { secrets, table, look_ups, begin, begun: Mutex::new(begun), ca, dir });
        let observer: Weak<dyn SecretObserver> = Arc::downgrade(&this) as Weak<dyn SecretObserver>;
        this.secrets.add_observer(observer);
        this
    }

    /// Completes what was begun, takes over what an earlier run has left in the data directory, and deletes what has no
    /// meaning any more while `is_writer`. Never ends.
    pub(super) async fn run(self: Arc<Self>, is_writer: impl Fn() -> bool + Send) -> Infallible {
        let mut begun = self.begun.lock().await;
        let mut running = JoinSet::new();
        let mut cas = self.ca.changes();
        let upkeep = async {
            loop {
                self.import().await;
                if is_writer() {
                    self.purge(wall_clock()).await;
                }
                tokio::select! {
                    () = sleep(PURGE_INTERVAL) => {}
                    _ = cas.changed() => {}
                }
            }
        };
        let complete = async {
            loop {
                tokio::select! {
                    Some(work) = begun.recv() => drop(running.spawn(work)),
                    Some(_) = running.join_next() => {}
                }
            }
        };
        tokio::select! {
            never = upkeep => never,
            never = complete => never,
        }
    }

    /// Does `work` to its end, also when the caller does not wait for it any more: between two requests nothing is torn.
    async fn complete<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, JoiningError>> + Send + 'static,
    ) -> Result<T, JoiningError> {
        let (reply, done) = oneshot::channel();
        let work = async move {
            // The receiver may be gone.
            let _ = reply.send(work.await);
        };
        let stopping = || JoiningError::Unavailable("this process is stopping".into());
        self.begin.send(Box::pin(work)).await.map_err(|_| stopping())?;
        done.await.unwrap_or_else(|_| Err(stopping()))
    }

    pub(super) async fn add_token(self: &Arc<Self>, id: TokenId, token: Token) -> Result<(), JoiningError> {
        self.table.read().room_for_token(&token.scope)?;
        let this = Arc::clone(self);
        self.complete(async move {
            let stored = SharedToken { token, last_use: String::new() };
            this.create(TOKEN, &objects::token_name(id), stored.data(id)).await
        })
        .await
    }

    pub(super) async fn remove_token(self: &Arc<Self>, id: TokenId) -> Result<bool, JoiningError> {
        let this = Arc::clone(self);
        self.complete(async move {
            let name = objects::token_name(id);
            // It may be used at the same time, which is another version.
            for _ in 0..MAX_RETURNS {
                match this.secrets.delete(&name).await {
                    Err(SecretError::Changed) => {}
                    result => return Ok(result?),
                }
            }
            Err(SecretError::Changed.into())
        })
        .await
    }

    pub(super) async fn join(self: &Arc<Self>, attempt: JoinAttempt) -> Result<Scope, JoiningError> {
        {
            // Of a token that is not known here, the numbers of its namespace are not looked at.
            let state = self.table.read();
            if let Some(token) = state.tokens.get(&attempt.token) {
                state.room_for_registrant(&attempt.user, &token.scope)?;
            }
        }
        let this = Arc::clone(self);
        self.complete(async move {
            let this_use = hex::encode(&random::<USE_BYTES>());
            let token = this.use_token(&attempt, &this_use).await?;
            let written = this.write_registrant(&attempt, &token).await;
            if written.is_err() {
                this.return_use(attempt.token, &this_use).await;
            }
            written.map(|()| token.scope)
        })
        .await
    }

    /// Checks a token and counts one use. `this_use` is what this one is known by.
    async fn use_token(&self, attempt: &JoinAttempt, this_use: &str) -> Result<Token, JoiningError> {
        let id = attempt.token;
        let name = objects::token_name(id);
        let used = self.secrets.update(&name, |secret| {
            let mut stored = SharedToken::read(id, secret).map_err(|err| self.damaged(secret, &err))?;
            // What this call has written without an answer.
            if stored.last_use == this_use {
                return Ok(SecretUpdate::Keep(stored.token));
            }
            stored.token.check(&attempt.secret, attempt.now)?;
            stored = SharedToken { token: stored.token.used_once(), last_use: this_use.to_owned() };
            Ok(SecretUpdate::Write(stored.data(id), stored.token))
        });
        updated(used.await)?.ok_or(JoiningError::Token(TokenRefused::Unknown))
    }

    /// Returns a use, if nothing has happened to the token since.
    async fn return_use(&self, id: TokenId, this_use: &str) {
        let name = objects::token_name(id);
        for _ in 0..MAX_RETURNS {
            let returned = self.secrets.update(&name, |secret| {
                let stored = SharedToken::read(id, secret).map_err(|err| self.damaged(secret, &err))?;
                if stored.last_use != this_use {
                    return Ok(SecretUpdate::Keep(()));
                }
                let token = Token { used: stored.token.used.saturating_sub(1), ..stored.token };
                Ok(SecretUpdate::Write(SharedToken { token, last_use: String::new() }.data(id), ()))
            });
            match updated(returned.await) {
                Ok(_) => return,
                Err(err) => debug!(token = %id, %err, "a use of a token that led to nothing is not returned yet"),
            }
            sleep(RETURN_BACKOFF).await;
        }
        warn!(token = %id, "a machine has used the token and did not join: the use is lost");
    }

    async fn write_registrant(&self, attempt: &JoinAttempt, token: &Token) -> Result<(), JoiningError> {
        let user = &attempt.user;
        let name = objects::registrant_name(user).ok_or(JoiningError::Revoked)?;
        if !self.table.read().registrants.contains_key(user) {
            let registrant = attempt.registrant(token, None)?;
            return self.create(REGISTRANT, &name, objects::registrant_data(user, &registrant)).await;
        }
        let written = self.secrets.update(&name, |secret| {
            let known = objects::read_registrant(user, secret).map_err(|err| self.damaged(secret, &err))?;
            let registrant = attempt.registrant(token, Some(&known))?;
            Ok(SecretUpdate::Write(objects::registrant_data(user, &registrant), ()))
        });
        updated(written.await)?.ok_or(JoiningError::Revoked)
    }

    /// Creates a Secret. After a request without an answer it may be there already: its name is random.
    async fn create(&self, new: NewSecret<'static>, name: &str, data: objects::SecretData) -> Result<(), JoiningError> {
        let new = NewSecret { name, ..new };
        let first = self.secrets.create(new, data.clone()).await;
        match first {
            Ok(true) => Ok(()),
            Ok(false) => Err(JoiningError::Unavailable("the name is taken: try again".into())),
            Err(SecretError::Unavailable(_)) => Ok(self.secrets.create(new, data).await.map(drop)?),
            Err(err) => Err(err.into()),
        }
    }

    pub(super) async fn update<T: Send + 'static>(
        self: &Arc<Self>,
        user: String,
        mut change: impl FnMut(&mut JoinedRegistrant) -> Result<T, JoiningError> + Send + 'static,
    ) -> Result<Option<T>, JoiningError> {
        let Some(name) = objects::registrant_name(&user) else { return Ok(None) };
        let this = Arc::clone(self);
        self.complete(async move {
            let changed = this.secrets.update(&name, |secret| {
                let known = objects::read_registrant(&user, secret).map_err(|err| this.damaged(secret, &err))?;
                let mut registrant = known.clone();
                let result = change(&mut registrant)?;
                Ok(if registrant == known {
                    SecretUpdate::Keep(result)
                } else {
                    SecretUpdate::Write(objects::registrant_data(&user, &registrant), result)
                })
            });
            updated(changed.await)
        })
        .await
    }

    pub(super) async fn look_up_token(&self, id: TokenId) -> Result<(), NotFound> {
        self.look_up(&objects::token_name(id)).await
    }

    pub(super) async fn look_up_registrant(&self, user: &str) -> Result<(), NotFound> {
        self.look_up(&objects::registrant_name(user).ok_or(NotFound::Absent)?).await
    }

    /// Reads a Secret that the watch has not shown.
    async fn look_up(&self, name: &str) -> Result<(), NotFound> {
        match self.look_ups.begin(name, Instant::now()) {
            LookUp::Ask => {}
            LookUp::Absent => return Err(NotFound::Absent),
            LookUp::Limited => return Err(NotFound::Unknown("too many that are not known are looked for".into())),
        }
        match self.secrets.get(name).await {
            // The observer has been told.
            Ok(Some(secret)) if secret.kind.is_some() => Ok(()),
            Ok(_) => {
                self.look_ups.absent(name, Instant::now());
                Err(NotFound::Absent)
            }
            Err(err) => Err(NotFound::Unknown(err.to_string())),
        }
    }

    fn set(&self, secret: &SharedSecret) {
        match secret.kind.as_deref() {
            Some(kind) if kind == TOKEN.kind => {
                let Some(id) = objects::token_id(&secret.name) else { return };
                match SharedToken::read(id, secret) {
                    Ok(stored) => self.table.apply(|state| state.put_token(id, stored.token)),
                    Err(err) => {
                        self.tell_damaged(secret, &err);
                        self.table.apply(|state| state.remove_token(id));
                    }
                }
            }
            Some(kind) if kind == REGISTRANT.kind => {
                let Some(user) = objects::user(&secret.name) else { return };
                match objects::read_registrant(&user, secret) {
                    Ok(registrant) => {
                        let revoked = registrant.revoked.is_some();
                        self.table.apply(|state| state.put_registrant(user, registrant));
                        if revoked {
                            self.table.ended();
                        }
                    }
                    Err(err) => {
                        self.tell_damaged(secret, &err);
                        self.table.apply(|state| state.remove_registrant(&user));
                        self.table.ended();
                    }
                }
            }
            _ => {}
        }
    }

    fn removed(&self, secret: &SharedSecret) {
        if let Some(id) = objects::token_id(&secret.name) {
            self.table.apply(|state| state.remove_token(id));
        } else if let Some(user) = objects::user(&secret.name) {
            self.table.apply(|state| state.remove_registrant(&user));
            self.table.ended();
        }
    }

    /// Deletes what has no meaning any more.
    async fn purge(&self, now: SystemTime) {
        let names: Vec<_> = {
            let state = self.table.read();
            let tokens = state.forgettable_tokens(now).map(objects::token_name);
            let registrants = state.forgettable_registrants(now).filter_map(objects::registrant_name);
            tokens.chain(registrants).take(MAX_PURGED).collect()
        };
        for name in names {
            if let Err(err) = self.secrets.delete(&name).await {
                // In the next round.
                debug!(secret = name, %err, "a token or registrant of the past is not deleted");
                if !matches!(err, SecretError::Changed) {
                    return;
                }
            }
        }
    }

    fn damaged(&self, secret: &SharedSecret, err: &str) -> JoiningError {
        JoiningError::Damaged { secret: self.secrets.path(&secret.name), reason: err.to_owned() }
    }

    fn tell_damaged(&self, secret: &SharedSecret, err: &str) {
        warn!("{}", self.damaged(secret, err));
    }
}

/// What [`Secrets::update`] has returned.
fn updated<T>(result: Result<Option<T>, UpdateError<JoiningError>>) -> Result<Option<T>, JoiningError> {
    result.map_err(|err| match err {
        UpdateError::Refused(err) => err,
        UpdateError::Secret(err) => err.into(),
    })
}

impl From<SecretError> for JoiningError {
    fn from(err: SecretError) -> Self {
        Self::Unavailable(err.to_string())
    }
}
