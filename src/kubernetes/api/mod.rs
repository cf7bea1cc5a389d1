//! Requests to the API server, and errors that say what to do next.
//!
//! kube's own retries are off: only the caller knows whether a write is still wanted. Every request
//! has a timeout, and `Retry-After` is honoured for every answer.

mod config_map;
mod fence;
mod inspection;
mod rate_limiter;
mod retry_after;
mod reviews;

use std::{future::Future, path::Path, sync::Arc, time::Duration};

use http::{Request, response::Parts};
use k8s_openapi::{NamespaceResourceScope, Resource, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Client, Config,
    client::Body,
    config::{KubeConfigOptions, Kubeconfig},
    core::{
        Request as Builder, Status,
        params::{self, DeleteParams, GetParams, ListParams, PostParams},
    },
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::time::{Instant, timeout};

pub use self::config_map::{ConfigMapClient, ConfigMapError, ConfigMapKey, ConfigMapText};
pub(super) use self::fence::{Fence, boot_time};
pub use self::inspection::{AccessRight, ApiServerSeen, InspectionError, Inspector};
pub(super) use self::rate_limiter::RateLimiter;
pub use self::reviews::{AccessAttributes, AccessTarget, ReviewError, ReviewedToken, Reviews};
use crate::metrics::{Metrics, RequestOutcome, Verb};

/// How long one request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait after a 429 that does not say.
pub(super) const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(1);

/// Why there is no client for the API server. It names the configuration that was tried.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The file of `--kubeconfig`.
    #[error("--kubeconfig {path}: cannot be used: {err}")]
    Kubeconfig {
        /// Which file.
        path: String,
        /// Why, with its causes.
        err: String,
    },
    /// The files of `KUBECONFIG`, or `~/.kube/config`.
    #[error("no kubeconfig that can be used, neither in KUBECONFIG nor ~/.kube/config: {0}")]
    DefaultKubeconfig(String),
    /// The ServiceAccount of the pod.
    #[error("--kubernetes: not in a pod with a ServiceAccount; outside of a cluster give --kubeconfig FILE")]
    InCluster(#[source] kube::config::InClusterError),
    /// No client can be made of the configuration.
    #[error("the API server's address or certificates cannot be used")]
    Client(#[source] Box<kube::Error>),
}

/// What a kubeconfig or a ServiceAccount gives.
pub(super) struct Connection {
    pub(super) client: Client,
    /// The server's URL, for messages.
    pub(super) server: String,
    /// The default namespace.
    pub(super) namespace: String,
}

/// A client as the mirror needs it.
pub(super) async fn connect(kubeconfig: Option<&Path>) -> Result<Connection, ConnectError> {
    let config = match kubeconfig {
        Some(path) => read_kubeconfig(Some(path), KubeConfigOptions::default()).await?,
        None => Config::incluster().map_err(ConnectError::InCluster)?,
    };
    connection(config)
}

/// A kubeconfig, or without a path the one that kubectl would take.
async fn read_kubeconfig(path: Option<&Path>, options: KubeConfigOptions) -> Result<Config, ConnectError> {
    // kube's errors print their causes and return them as sources too: `chain` prints each once.
    let unusable = |err: kube::config::KubeconfigError| match path {
        Some(path) => ConnectError::Kubeconfig { path: path.display().to_string(), err: chain(&err) },
        None => ConnectError::DefaultKubeconfig(chain(&err)),
    };
    let file = path.map_or_else(Kubeconfig::read, Kubeconfig::read_from).map_err(unusable)?;
    Config::from_custom_kubeconfig(file, &options).await.map_err(unusable)
}

fn connection(mut config: Config) -> Result<Connection, ConnectError> {
    // Retries within kube would hide errors from the rate limit, and write what is not wanted any more.
    config.default_retry = false;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    // Watches are quiet for long; every other request has a timeout of its own.
    config.read_timeout = None;
    let (server, namespace) = (config.cluster_url.to_string(), config.default_namespace.clone());
    let client = Client::try_from(config).map_err(|err| ConnectError::Client(Box::new(err)))?;
    Ok(Connection { client: retry_after::honoured_by(client), server, namespace })
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum ApiError {
    /// There is no such object, or no such namespace.
    #[error("not found")]
    NotFound,
    /// The object is another one, or has another version, than the request names.
    #[error("changed meanwhile")]
    Conflict,
    /// There is an object of this name.
    #[error("exists already")]
    AlreadyExists,
    /// The namespace is being deleted.
    #[error("its namespace is being deleted")]
    NamespaceTerminating,
    /// The account lacks a right.
    #[error("not allowed: {0}")]
    Forbidden(String),
    /// The server's rules or an admission policy refuse the object.
    #[error("refused: {0}")]
    Invalid(String),
    /// An admission webhook of the cluster failed, and its failurePolicy is Fail. A fault of this object,
    /// not of the server; nothing was stored.
    #[error("refused, because a webhook failed: {0}")]
    WebhookFailed(String),
    /// The server is overloaded and says how long to wait.
    #[error("the API server is busy; it asks to wait {}", humantime::format_duration(*.0))]
    Busy(Duration),
    /// The server failed.
    #[error("the API server failed: {0}")]
    Server(String),
    /// No answer within [`REQUEST_TIMEOUT`]: perhaps of this object alone, behind a webhook that hangs.
    #[error("no answer from the API server: not within {}", humantime::format_duration(REQUEST_TIMEOUT))]
    TimedOut,
    /// No answer: the request may or may not have been carried out.
    #[error("no answer from the API server: {0}")]
    Unknown(String),
}

impl ApiError {
    /// The error of a failed answer.
    fn of(status: &Status) -> Self {
        let message = || status.message.clone();
        let cause = |wanted: &str| {
            status.details.iter().flat_map(|details| &details.causes).any(|cause| cause.reason == wanted)
        };
        let seconds = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
        let retry_after = (seconds > 0).then(|| Duration::from_secs(seconds.into()));
        // The API server's own words: no field of the Status says that a webhook is behind the code.
        // A webhook that denies chooses the code, 500 and 429 too; they mean the object nevertheless.
        let denied = status.message.starts_with("admission webhook ") && status.message.contains("denied the request");
        match status.code {
            401 | 403 if denied => Self::Forbidden(message()),
            _ if denied => Self::Invalid(message()),
            500..=599 if status.message.contains("failed calling webhook") => Self::WebhookFailed(message()),
            404 => Self::NotFound,
            // Before the conflicts, with which it shares the code.
            409 if status.reason == "AlreadyExists" => Self::AlreadyExists,
            409 | 410 => Self::Conflict,
            // No missing right: it ends by itself when the namespace is gone.
            403 if cause("NamespaceTerminating") => Self::NamespaceTerminating,
            401 | 403 => Self::Forbidden(message()),
            429 => Self::Busy(retry_after.unwrap_or(DEFAULT_RETRY_AFTER)),
            400..=499 => Self::Invalid(message()),
            _ if retry_after.is_some() => Self::Busy(retry_after.unwrap_or(DEFAULT_RETRY_AFTER)),
            _ => Self::Server(message()),
        }
    }

    fn outcome(&self) -> RequestOutcome {
        match self {
            Self::NotFound => RequestOutcome::NotFound,
            Self::Conflict | Self::AlreadyExists => RequestOutcome::Conflict,
            Self::NamespaceTerminating | Self::Forbidden(_) => RequestOutcome::Forbidden,
            Self::Invalid(_) => RequestOutcome::Invalid,
            Self::WebhookFailed(_) => RequestOutcome::WebhookFailed,
            Self::Busy(_) => RequestOutcome::Busy,
            Self::Server(_) => RequestOutcome::ServerError,
            Self::TimedOut | Self::Unknown(_) => RequestOutcome::Unknown,
        }
    }
}

/// Makes requests within the rate limit and counts them. Writes wait until no other process can hold the Lease.
pub(super) struct ApiClient {
    client: Client,
    rate_limiter: RateLimiter,
    fence: Fence,
    metrics: Arc<Metrics>,
}

impl std::fmt::Debug for ApiClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiClient").field("rate_limiter", &self.rate_limiter).finish_non_exhaustive()
    }
}

/// Which object a DELETE is for, and in which version.
#[derive(Debug, Clone, Copy)]
pub(super) struct Preconditions<'a> {
    pub(super) name: &'a str,
    pub(super) uid: &'a str,
    pub(super) resource_version: &'a str,
}

impl<'a> Preconditions<'a> {
    /// Those of an object as it was read.
    pub(super) fn of(meta: &'a ObjectMeta) -> Self {
        let text = |text: &'a Option<String>| text.as_deref().unwrap_or_default();
        Self { name: text(&meta.name), uid: text(&meta.uid), resource_version: text(&meta.resource_version) }
    }
}

impl ApiClient {
    pub(super) fn new(client: Client, per_second: u32, fence: Fence, metrics: Arc<Metrics>) -> Self {
        Self { client, rate_limiter: RateLimiter::new(per_second), fence, metrics }
    }

    pub(super) const fn fence(&self) -> &Fence {
        &self.fence
    }

    /// Waits until what was seen before this call counts, see [`Fence::confirmed`].
    pub(super) async fn confirmed(&self) {
        self.fence.confirmed().await;
    }

    pub(super) async fn get<K: NamespacedObject>(&self, namespace: &str, name: &str) -> Result<K, ApiError> {
        self.call(Verb::Get, path::<K>(namespace).get(name, &GetParams::default())).await
    }

    pub(super) async fn list<K: NamespacedObject>(&self, namespace: &str, labels: &str) -> Result<Vec<K>, ApiError> {
        let list: kube::core::ObjectList<K> =
            self.call(Verb::List, path::<K>(namespace).list(&ListParams::default().labels(labels))).await?;
        Ok(list.items)
    }

    pub(super) async fn create<K: NamespacedObject>(&self, namespace: &str, object: &K) -> Result<K, ApiError> {
        self.call(Verb::Create, path::<K>(namespace).create(&PostParams::default(), encode(object))).await
    }

    /// Creates a cluster-scoped object.
    pub(super) async fn create_namespace<K>(&self, object: &K) -> Result<K, ApiError>
    where
        K: Resource + Serialize + DeserializeOwned,
    {
        let request = Builder::new(format!("/{}/{}", api::<K>(), K::URL_PATH_SEGMENT));
        self.call(Verb::Create, request.create(&PostParams::default(), encode(object))).await
    }

    /// Replaces an object, in the version of its uid and resourceVersion.
    pub(super) async fn replace<K: NamespacedObject>(
        &self,
        namespace: &str,
        name: &str,
        object: &K,
    ) -> Result<K, ApiError> {
        self.call(Verb::Update, path::<K>(namespace).replace(name, &PostParams::default(), encode(object))).await
    }

    pub(super) async fn delete<K: NamespacedObject>(
        &self,
        namespace: &str,
        version: Preconditions<'_>,
    ) -> Result<(), ApiError> {
        let Preconditions { name, uid, resource_version } = version;
        let preconditions =
            params::Preconditions { uid: Some(uid.into()), resource_version: Some(resource_version.into()) };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        // The answer is a Status or the object.
        self.call::<serde_json::Value>(Verb::Delete, path::<K>(namespace).delete(name, &params)).await.map(drop)
    }

    async fn call<T: DeserializeOwned>(
        &self,
        verb: Verb,
        request: Result<Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<T, ApiError> {
        let request = request.map_err(|err| ApiError::Invalid(err.to_string()))?;
        // In this order: after a wait for a token the Lease may be lost, so it is looked at last, just before the
        // request.
        self.rate_limiter.acquire().await;
        if matches!(verb, Verb::Create | Verb::Update | Verb::Delete) {
            self.fence.safe().await;
        }
        let result = self.send(verb, request).await;
        match &result {
            Err(ApiError::Busy(retry_after)) => self.rate_limiter.failed(Some(*retry_after)),
            Err(ApiError::Server(_) | ApiError::Unknown(_)) => self.rate_limiter.failed(None),
            // One object may hang while the server answers for the others. A server that hangs as a
            // whole gets no more than a request per slot and timeout.
            Err(ApiError::TimedOut) => {}
            // A refusal is an answer, too: the server is well.
            _ => self.rate_limiter.answered(),
        }
        result
    }

    async fn send<T: DeserializeOwned>(&self, verb: Verb, request: Request<Vec<u8>>) -> Result<T, ApiError> {
        let begun = Instant::now();
        let (_, result) = exchange(&self.client, request).await;
        let outcome = result.as_ref().err().map_or(RequestOutcome::Ok, ApiError::outcome);
        self.metrics.mirror.request(verb, outcome, begun.elapsed());
        result
    }
}

/// One request, within [`REQUEST_TIMEOUT`]: the head of the answer, if there was one, and what it says.
pub(super) async fn exchange<T: DeserializeOwned>(
    client: &Client,
    request: Request<Vec<u8>>,
) -> (Option<Parts>, Result<T, ApiError>) {
    let answered = within(async {
        let response = client.send(request.map(Body::from)).await?;
        let (head, body) = response.into_parts();
        Ok((head, body.collect_bytes().await?))
    });
    let (head, body) = match answered.await {
        Err(err) => return (None, Err(err)),
        Ok(answer) => answer,
    };
    let result = if head.status.is_success() {
        // A success whose body cannot be read has been carried out, but nobody knows as which version.
        serde_json::from_slice(&body).map_err(|err| ApiError::Unknown(format!("its answer cannot be read: {err}")))
    } else {
        // A proxy in front answers in its own words, mostly HTML or plain text.
        let mut status: Status = serde_json::from_slice(&body).unwrap_or_else(|_| Status {
            message: String::from_utf8_lossy(&body).trim().to_owned(),
            ..Status::default()
        });
        status.code = head.status.as_u16();
        Err(ApiError::of(&status))
    };
    (Some(head), result)
}

/// What requests need of a kind of object: it is in a namespace, and can be read and written as JSON.
pub(super) trait NamespacedObject:
    Resource<Scope = NamespaceResourceScope> + Clone + Serialize + DeserializeOwned
{
}

impl<K: Resource<Scope = NamespaceResourceScope> + Clone + Serialize + DeserializeOwned> NamespacedObject for K {}

fn api<K: Resource>() -> String {
    if K::GROUP.is_empty() { format!("api/{}", K::VERSION) } else { format!("apis/{}", K::API_VERSION) }
}

fn path<K: NamespacedObject>(namespace: &str) -> Builder {
    Builder::new(format!("/{}/namespaces/{namespace}/{}", api::<K>(), K::URL_PATH_SEGMENT))
}

pub(super) fn encode(object: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(object).expect("Kubernetes objects are JSON")
}

/// The answer, or why there is none within [`REQUEST_TIMEOUT`].
async fn within<T>(answer: impl Future<Output = Result<T, kube::Error>>) -> Result<T, ApiError> {
    match timeout(REQUEST_TIMEOUT, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(err)) => Err(ApiError::Unknown(chain(&err))),
        Err(_) => Err(ApiError::TimedOut),
    }
}

/// An error and its causes, each once.
pub(super) fn chain(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut source = err.source();
    while let Some(err) = source {
        let more = err.to_string();
        // Many errors of kube and hyper print their cause themselves.
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = err.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn missing_kubeconfig_is_named_with_each_cause_once() {
        let err = connect(Some(Path::new("/no/such/file"))).await.err().expect("there is none").to_string();
        assert!(err.starts_with("--kubeconfig /no/such/file: cannot be used"), "{err}");
        assert_eq!(err.matches("No such file").count(), 1, "{err}");
    }

    fn fault(code: u16, reason: &str, retry_after: Option<u64>) -> ApiError {
        let status = serde_json::json!({
            "code": code, "reason": reason, "message": "so",
            "details": retry_after.map(|seconds| serde_json::json!({ "retryAfterSeconds": seconds })),
        });
        ApiError::of(&serde_json::from_value(status).expect("a Status"))
    }

    #[test]
    fn errors_follow_from_code_reason_and_retry_after() {
        assert_eq!(fault(404, "NotFound", None), ApiError::NotFound);
        assert_eq!(fault(409, "AlreadyExists", None), ApiError::AlreadyExists);
        assert_eq!(fault(409, "Conflict", None), ApiError::Conflict);
        assert_eq!(fault(410, "Expired", None), ApiError::Conflict);
        assert_eq!(fault(403, "Forbidden", None), ApiError::Forbidden("so".into()));
        assert_eq!(fault(422, "Invalid", None), ApiError::Invalid("so".into()));
        assert_eq!(fault(429, "TooManyRequests", Some(7)), ApiError::Busy(Duration::from_secs(7)));
        assert_eq!(fault(429, "", None), ApiError::Busy(DEFAULT_RETRY_AFTER));
        assert_eq!(fault(503, "", Some(3)), ApiError::Busy(Duration::from_secs(3)));
        assert_eq!(fault(500, "InternalError", None), ApiError::Server("so".into()));
    }

    fn with_message(code: u16, message: &str) -> ApiError {
        ApiError::of(&Status { code, message: message.into(), ..Status::default() })
    }

    #[test]
    fn failed_webhook_is_a_fault_of_the_object() {
        let text = r#"Internal error occurred: failed calling webhook "a.b.c": failed to call webhook: Post "https://127.0.0.1:1/?timeout=1s": dial tcp 127.0.0.1:1: connect: connection refused"#;
        assert_eq!(with_message(500, text), ApiError::WebhookFailed(text.into()));
        for code in [400, 404, 409, 429, 500, 503] {
            let denied = r#"admission webhook "a.b.c" denied the request: no"#;
            assert_eq!(with_message(code, denied), ApiError::Invalid(denied.into()), "{code}");
        }
    }
}
