//! One text of a ConfigMap, read and replaced with the rights of a person's kubeconfig.
//!
//! For `gangplank coredns`, which is no controller: no rate limit, no Lease, no retries.

use std::{collections::BTreeMap, fmt, path::Path};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Client,
    config::KubeConfigOptions,
    core::params::{GetParams, Patch, PatchParams},
};
use serde_json::json;

use super::{ApiError, ConnectError, Connection, connection, exchange, path, read_kubeconfig};

/// Who changes the ConfigMap, for its `managedFields`.
const FIELD_MANAGER: &str = "gangplank";

/// Which text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigMapKey {
    /// The namespace of the ConfigMap.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The key in its `data`.
    pub key: String,
}

/// For messages.
impl fmt::Display for ConfigMapKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "configmap {}/{}", self.namespace, self.name)
    }
}

/// The text in one version of the ConfigMap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigMapText {
    /// The text.
    pub text: String,
    resource_version: String,
}

/// Why the text was not read or replaced.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigMapError {
    /// No such ConfigMap, or no such key in it.
    #[error("{0}")]
    NotFound(String),
    /// It is another version than the one that was read.
    #[error("it was changed meanwhile")]
    Conflict,
    /// The account lacks a right.
    #[error("{0}")]
    Forbidden(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

impl From<ApiError> for ConfigMapError {
    fn from(err: ApiError) -> Self {
        match err {
            ApiError::NotFound => Self::NotFound("it does not exist".into()),
            ApiError::Conflict => Self::Conflict,
            ApiError::Forbidden(_) => Self::Forbidden(err.to_string()),
            _ => Self::Failed(err.to_string()),
        }
    }
}

/// A client for that.
pub struct ConfigMapClient {
    client: Client,
    server: String,
}

impl fmt::Debug for ConfigMapClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigMapClient").field("server", &self.server).finish_non_exhaustive()
    }
}

impl ConfigMapClient {
    /// Takes the configuration that kubectl would take, or another file or context of it. Makes no request.
    ///
    /// # Errors
    /// When there is no usable kubeconfig.
    pub async fn connect(kubeconfig: Option<&Path>, context: Option<&str>) -> Result<Self, ConnectError> {
        let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
        let Connection { client, server, namespace: _ } = connection(read_kubeconfig(kubeconfig, options).await?)?;
        Ok(Self { client, server })
    }

    pub(super) const fn of(client: Client, server: String) -> Self {
        Self { client, server }
    }

    /// URL of the API server, for messages.
    #[must_use]
    pub fn server(&self) -> &str {
        &self.server
    }

    /// Reads the text.
    ///
    /// # Errors
    /// When it does not exist, or the API server does not answer with it.
    pub async fn read(&self, key: &ConfigMapKey) -> Result<ConfigMapText, ConfigMapError> {
        let request = path::<ConfigMap>(&key.namespace).get(&key.name, &GetParams::default());
        let request = request.map_err(|err| ConfigMapError::Failed(err.to_string()))?;
        let object: ConfigMap = exchange(&self.client, request).await.1?;
        let text = object.data.unwrap_or_default().remove(&key.key);
        let text = text.ok_or_else(|| ConfigMapError::NotFound(format!("it has no key {:?}", key.key)))?;
        Ok(ConfigMapText { text, resource_version: object.metadata.resource_version.unwrap_or_default() })
    }

    /// Replaces the text and nothing else of the ConfigMap, if it still has the version of `read`.
    ///
    /// # Errors
    /// [`ConfigMapError::Conflict`] if it has another version; when the API server refuses or does not answer. After no
    /// answer the text may have been replaced.
    pub async fn replace(&self, key: &ConfigMapKey, read: &ConfigMapText, text: &str) -> Result<(), ConfigMapError> {
        // The version makes the patch fail with 409 for any other one.
        let patch = Patch::Merge(json!({
            "metadata": {"resourceVersion": read.resource_version},
            "data": BTreeMap::from([(&key.key, text)]),
        }));
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        // A merge patch, so that other keys of the ConfigMap, and what others write there meanwhile, stay as they are.
        let request = path::<ConfigMap>(&key.namespace).patch(&key.name, &params, &patch);
        let request = request.map_err(|err| ConfigMapError::Failed(err.to_string()))?;
        exchange::<ConfigMap>(&self.client, request).await.1?;
        Ok(())
    }
}
