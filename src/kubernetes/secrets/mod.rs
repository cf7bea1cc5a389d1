//! Secrets of gangplank's own namespace, which all of its processes share: followed by a watch, and changed by
//! compare-and-swap.
//!
//! 1. What is ours carries the label [`names::JOINING`]; the Secrets of others are neither kept nor changed.
//! 2. A change names the uid and the resourceVersion of what it was made from ([`Secrets::update`]): of two processes that
//!    change one Secret at once, the later one sees what the earlier one did.
//! 3. What was read or written here is known here at once, and what others wrote by the watch; the newer version wins.
//!    A [`SecretObserver`] is told each change once, in order.
//!
//! Any process may do it, whoever holds the Lease. What is in a Secret, others know.

mod error;

use std::{
    collections::{BTreeMap, hash_map::DefaultHasher},
    fmt,
    hash::{Hash as _, Hasher as _},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use http::Request;
use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Client,
    core::{
        Request as Builder,
        params::{self, DeleteParams, GetParams, PostParams},
    },
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::Mutex as AsyncMutex,
    time::{sleep, timeout},
};

pub use self::error::{SecretError, UpdateError};
use super::{
    api::{ApiError, ConnectError, Connection, RateLimiter, connect, encode, exchange},
    cache::{Applied, CachedObject, ObjectEvent, ObjectStore},
    objects::names,
};

/// How long one request may take. A machine that joins waits for three of them.
const SECRET_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a request waits for its turn, and for the end of a pause after failures.
const MAX_WAIT: Duration = Duration::from_secs(1);

/// Requests a second; at once twice as many.
const MAX_REQUESTS_PER_SECOND: u32 = 100;

/// How often one change is tried while others change the same Secret, and the longest pause between.
const MAX_ATTEMPTS: usize = 16;
const MAX_PAUSE_MILLIS: u64 = 20;

/// Changes of one process take turns by the name of the Secret, so that they do not fail one another.
const TURNS: usize = 64;

/// A Secret as it was read or written.
#[derive(Clone)]
pub struct SharedSecret {
    /// Its name.
    pub name: String,
    /// The value of its label: what it holds. `None` if it is not of gangplank.
    pub kind: Option<String>,
    /// What it holds.
    pub data: BTreeMap<String, Vec<u8>>,
    /// With the labels and annotations of others.
    metadata: Arc<ObjectMeta>,
    type_: Option<String>,
}

impl fmt::Debug for SharedSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without what it holds.
        f.debug_struct("SharedSecret").field("name", &self.name).field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl SharedSecret {
    fn read(secret: &Secret) -> Option<Self> {
        let Secret { metadata, data, type_, .. } = secret;
        let name = metadata.name.clone()?;
        let kind = metadata.labels.as_ref().and_then(|labels| labels.get(names::JOINING)).cloned();
        let data = data.iter().flatten().map(|(key, ByteString(bytes))| (key.clone(), bytes.clone())).collect();
        // The API server's own, and large.
        let metadata = Arc::new(ObjectMeta { managed_fields: None, ..metadata.clone() });
        Some(Self { name, kind, data, metadata, type_: type_.clone() })
    }

    /// The same with other contents, to be written over this version.
    fn with(&self, data: BTreeMap<String, Vec<u8>>) -> Secret {
        // With uid and resourceVersion: the PUT fails if anybody wrote since.
        let metadata = ObjectMeta::clone(&self.metadata);
        Secret { metadata, data: Some(bytes(data)), type_: self.type_.clone(), ..Secret::default() }
    }
}

impl CachedObject for SharedSecret {
    fn uid(&self) -> &str {
        self.metadata.uid.as_deref().unwrap_or_default()
    }

    fn resource_version(&self) -> &str {
        self.metadata.resource_version.as_deref().unwrap_or_default()
    }

    fn same_content(&self, later: &Self) -> bool {
        self.data == later.data
    }
}

/// A Secret that is to be created.
#[derive(Debug, Clone, Copy)]
pub struct NewSecret<'a> {
    /// Unique in the namespace.
    pub name: &'a str,
    /// What it holds, as the value of its label.
    pub kind: &'static str,
    /// Its type; what it holds is checked by Kubernetes for some of them.
    pub type_: &'static str,
}

/// What [`Secrets::update`] makes of a Secret.
#[derive(Debug)]
pub enum SecretUpdate<T> {
    /// It is as it should be.
    Keep(T),
    /// It shall hold this.
    Write(BTreeMap<String, Vec<u8>>, T),
}

/// What became of a Secret.
#[derive(Debug)]
pub enum SecretEvent<'a> {
    /// It holds this.
    Set(&'a SharedSecret),
    /// It is gone.
    Removed(&'a SharedSecret),
    /// Every Secret that there is has been reported.
    Listed,
}

/// Learns of every change of the Secrets. Must be quick, and must not call [`Secrets`].
pub trait SecretObserver: Send + Sync {
    /// Something has changed.
    fn observe(&self, event: &SecretEvent<'_>);
}

/// Reads, writes and watches the Secrets of gangplank in one namespace, and keeps what it has read.
pub struct Secrets {
    client: Client,
    namespace: String,
    limiter: RateLimiter,
    turns: [AsyncMutex<()>; TURNS],
    shared: Mutex<SecretsState>,
}

struct SecretsState {
    store: ObjectStore<String, SharedSecret>,
    observers: Vec<Weak<dyn SecretObserver>>,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secrets").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

impl Secrets {
    /// A client with connections of its own. Makes no request. `kubeconfig` and `namespace` as for the Lease.
    ///
    /// # Errors
    /// When there is no usable kubeconfig, or no ServiceAccount where none was given.
    pub async fn connect(kubeconfig: Option<&Path>, namespace: Option<&str>) -> Result<Arc<Self>, ConnectError> {
        let Connection { client, namespace: default, .. } = connect(kubeconfig).await?;
        let namespace = namespace.map_or(default, ToOwned::to_owned);
        Ok(Arc::new(Self {
            client,
            namespace,
            limiter: RateLimiter::new(MAX_REQUESTS_PER_SECOND),
            turns: std::array::from_fn(|_| AsyncMutex::default()),
            shared: Mutex::new(SecretsState { store: ObjectStore::new(), observers: Vec::new() }),
        }))
    }

    /// Where a Secret is, for messages.
    #[must_use]
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.namespace)
    }

    pub(super) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Reports to `observer` what changes from now on, as long as it exists.
    pub fn add_observer(&self, observer: Weak<dyn SecretObserver>) {
        self.lock().observers.push(observer);
    }

    /// Reads a Secret; `None` if there is none.
    ///
    /// # Errors
    /// When the API server does not answer, or does not allow it.
    pub async fn get(&self, name: &str) -> Result<Option<SharedSecret>, SecretError> {
        let request = self.builder().get(name, &GetParams::default());
        match self.call::<Secret>(request).await {
            Ok(secret) => self.keep(&secret).map(Some),
            Err(ApiError::NotFound) => Ok(None),
            Err(err) => Err(self.error("get", err)),
        }
    }

    /// Creates a Secret. Returns whether there was none of this name.
    ///
    /// # Errors
    /// When the API server does not answer, or does not allow it. Without an answer it may have been created nevertheless.
    pub async fn create(&self, new: NewSecret<'_>, data: BTreeMap<String, Vec<u8>>) -> Result<bool, SecretError> {
        let NewSecret { name, kind, type_ } = new;
        let metadata = ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(self.namespace.clone()),
            labels: Some(BTreeMap::from([(names::JOINING.to_owned(), kind.to_owned())])),
            ..ObjectMeta::default()
        };
        let secret = Secret { metadata, data: Some(bytes(data)), type_: Some(type_.to_owned()), ..Secret::default() };
        match self.call::<Secret>(self.builder().create(&PostParams::default(), encode(&secret))).await {
            Ok(secret) => self.keep(&secret).map(|_| true),
            Err(ApiError::AlreadyExists) => Ok(false),
            Err(err) => Err(self.error("create", err)),
        }
    }

    /// Changes a Secret by compare-and-swap: `change` is called with each version that turns out to be the last one, until
    /// nobody else has changed it meanwhile. `None` if there is no such Secret of ours.
    ///
    /// After a request without an answer it is called again, with a version that may be what it has written itself.
    ///
    /// # Errors
    /// What `change` says of the version that Kubernetes has, or why it cannot be written.
    pub async fn update<T, E>(
        &self,
        name: &str,
        mut change: impl FnMut(&SharedSecret) -> Result<SecretUpdate<T>, E>,
    ) -> Result<Option<T>, UpdateError<E>> {
        // Updates of one process take turns, so that they do not fail on each other's writes.
        let _turn = self.turn(name).lock().await;
        let mut known = self.lock().store.get(name).cloned();
        let mut unanswered = None;
        for _ in 0..MAX_ATTEMPTS {
            let (current, is_fresh) = match known.take() {
                Some(secret) => (secret, false),
                None => match self.get(name).await.map_err(|err| unanswered.take().unwrap_or(err))? {
                    Some(secret) if secret.kind.is_some() => (secret, true),
                    _ => return Ok(None),
                },
            };
            let (data, result) = match change(&current) {
                // Only a fresh version decides that nothing is to be done, or that it is refused. A write of an old one
                // fails by itself.
                Ok(SecretUpdate::Keep(result)) if is_fresh => return Ok(Some(result)),
                Ok(SecretUpdate::Write(data, result)) => (data, result),
                Err(err) if is_fresh => return Err(UpdateError::Refused(err)),
                // What is known here may be old.
                Ok(SecretUpdate::Keep(_)) | Err(_) => continue,
            };
            let body = encode(&current.with(data));
            match self.call::<Secret>(self.builder().replace(name, &PostParams::default(), body)).await {
                Ok(secret) => {
                    self.keep(&secret)?;
                    return Ok(Some(result));
                }
                Err(ApiError::Conflict | ApiError::NotFound) => {}
                // It may have been written. The next attempt reads what is there, and `change` decides about that.
                Err(err @ (ApiError::TimedOut | ApiError::Unknown(_))) => unanswered = Some(self.error("update", err)),
                Err(err) => return Err(self.error("update", err).into()),
            }
            // At random: processes that failed on each other's writes must not meet again.
            sleep(Duration::from_millis(fastrand::u64(0..=MAX_PAUSE_MILLIS))).await;
        }
        let busy = || SecretError::Unavailable(format!("the Secret {} is changed by others", self.path(name)));
        Err(unanswered.unwrap_or_else(busy).into())
    }

    /// Deletes a Secret in the version that is known here. Returns whether there was one.
    ///
    /// # Errors
    /// When the API server does not answer, does not allow it, or has another version.
    pub async fn delete(&self, name: &str) -> Result<bool, SecretError> {
        let _turn = self.turn(name).lock().await;
        let known = self.lock().store.get(name).cloned();
        let known = match known {
            Some(known) => known,
            None => match self.get(name).await? {
                Some(secret) if secret.kind.is_some() => secret,
                _ => return Ok(false),
            },
        };
        // In this version only: a Secret of the same name, or a use of it that was written meanwhile, must not be
        // deleted with it.
        let version = Some(known.resource_version().to_owned());
        let preconditions = params::Preconditions { uid: known.metadata.uid.clone(), resource_version: version };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        match self.call::<serde_json::Value>(self.builder().delete(name, &params)).await {
            Ok(_) | Err(ApiError::NotFound) => {
                let mut shared = self.lock();
                // Before the watch reports it: what is deleted must not count for a moment longer.
                if let Some(removed) = shared.store.remove(&known.name, known.uid()) {
                    shared.notify(&SecretEvent::Removed(&removed));
                }
                Ok(true)
            }
            Err(err) => {
                if err == ApiError::Conflict {
                    // What is known here is old.
                    self.get(name).await?;
                }
                Err(self.error("delete", err))
            }
        }
    }

    /// Applies what the watch reports.
    pub(super) fn apply(&self, events: Vec<ObjectEvent<Secret>>) {
        let mut shared = self.lock();
        for event in events {
            match event.filter_map(SharedSecret::read) {
                Some(ObjectEvent::Init) => shared.store.init(),
                Some(ObjectEvent::InitApply(secret)) => {
                    let applied = shared.store.init_apply(secret.name.clone(), secret.clone());
                    shared.applied(&applied, &secret);
                }
                Some(ObjectEvent::InitDone(version)) => {
                    for (_, gone) in shared.store.init_done(&version) {
                        shared.notify(&SecretEvent::Removed(&gone));
                    }
                    shared.notify(&SecretEvent::Listed);
                }
                Some(ObjectEvent::Apply(secret)) => {
                    let applied = shared.store.apply(secret.name.clone(), secret.clone());
                    shared.applied(&applied, &secret);
                }
                Some(ObjectEvent::Delete(secret)) => {
                    let removed = shared.store.delete(&secret.name, secret.uid(), secret.resource_version());
                    if let Some(removed) = removed {
                        shared.notify(&SecretEvent::Removed(&removed));
                    }
                }
                None => {}
            }
        }
    }

    /// Keeps what the API server has answered, if it is ours.
    fn keep(&self, secret: &Secret) -> Result<SharedSecret, SecretError> {
        let unreadable = || SecretError::Unavailable("its answer is no Secret".into());
        let secret = SharedSecret::read(secret).ok_or_else(unreadable)?;
        if secret.kind.is_some() {
            let mut shared = self.lock();
            let applied = shared.store.apply(secret.name.clone(), secret.clone());
            shared.applied(&applied, &secret);
        }
        Ok(secret)
    }

    fn turn(&self, name: &str) -> &AsyncMutex<()> {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        let turn = usize::try_from(hasher.finish() % TURNS as u64).unwrap_or_default();
        &self.turns[turn]
    }

    fn builder(&self) -> Builder {
        Builder::new(format!("/api/v1/namespaces/{}/secrets", self.namespace))
    }

    async fn call<T: DeserializeOwned>(
        &self,
        request: Result<Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<T, ApiError> {
        let request = request.map_err(|err| ApiError::Invalid(err.to_string()))?;
        if timeout(MAX_WAIT, self.limiter.acquire()).await.is_err() {
            let why = if self.limiter.is_paused() { "it did not answer before" } else { "too many requests" };
            return Err(ApiError::Unknown(why.into()));
        }
        let answered = timeout(SECRET_TIMEOUT, exchange(&self.client, request)).await;
        let result = match answered {
            Ok((_, result)) => result,
            Err(_) => Err(ApiError::Unknown(format!("not within {SECRET_TIMEOUT:?}"))),
        };
        match &result {
            Err(ApiError::Busy(retry_after)) => self.limiter.failed(Some(*retry_after)),
            Err(ApiError::Server(_) | ApiError::TimedOut | ApiError::Unknown(_)) => self.limiter.failed(None),
            _ => self.limiter.answered(),
        }
        result
    }

    fn error(&self, verb: &'static str, err: ApiError) -> SecretError {
        match err {
            ApiError::Forbidden(reason) => SecretError::Forbidden { verb, namespace: self.namespace.clone(), reason },
            ApiError::Invalid(_) | ApiError::WebhookFailed(_) | ApiError::NamespaceTerminating => {
                SecretError::Refused(err.to_string())
            }
            ApiError::Conflict => SecretError::Changed,
            _ => SecretError::Unavailable(err.to_string()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, SecretsState> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SecretsState {
    fn applied(&self, applied: &Applied<SharedSecret>, secret: &SharedSecret) {
        if matches!(applied, Applied::Changed(_)) {
            self.notify(&SecretEvent::Set(secret));
        }
    }

    fn notify(&self, event: &SecretEvent<'_>) {
        self.observers.iter().filter_map(Weak::upgrade).for_each(|observer| observer.observe(event));
    }
}

fn bytes(data: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, ByteString> {
    data.into_iter().map(|(key, bytes)| (key, ByteString(bytes))).collect()
}
