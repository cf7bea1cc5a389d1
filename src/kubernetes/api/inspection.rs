//! What a person's kubeconfig, or the account of a pod, lets see of the cluster: for `gangplank check`.
//!
//! No rate limit and no retries: one look.

use std::{
    fmt,
    path::Path,
    time::{Duration, SystemTime},
};

use k8s_openapi::{
    Resource,
    api::{
        authorization::v1::{
            ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec, SubjectAccessReview,
            SubjectAccessReviewSpec, SubjectAccessReviewStatus,
        },
        discovery::v1::EndpointSlice,
    },
};
use kube::{
    Client, Config,
    config::KubeConfigOptions,
    core::{
        ObjectList, Request as Builder,
        params::{ListParams, PostParams},
    },
};
use serde::{Serialize, de::DeserializeOwned};

use super::{
    ApiError, ConfigMapClient, ConnectError, Connection, api, chain, connection, encode, exchange, path,
    read_kubeconfig,
};

/// How the name of a ServiceAccount's user begins.
const SERVICE_ACCOUNT: &str = "system:serviceaccount:";

/// One right: a verb on a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AccessRight<'a> {
    /// The verb.
    pub verb: &'a str,
    /// The API group; empty for the core.
    pub group: &'a str,
    /// The resource, in the plural.
    pub resource: &'a str,
    /// `None` for the whole cluster.
    pub namespace: Option<&'a str>,
    /// The object; `None` for all.
    pub name: Option<&'a str>,
}

/// The API server's answer to a first question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApiServerSeen {
    /// Its `Date`, in whole seconds.
    pub date: Option<SystemTime>,
    /// How long the answer took.
    pub took: Duration,
}

/// Why nothing was learnt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InspectionError(String);

impl From<ApiError> for InspectionError {
    fn from(err: ApiError) -> Self {
        Self(err.to_string())
    }
}

/// Looks at the cluster.
pub struct Inspector {
    client: Client,
    server: String,
    in_pod: bool,
}

impl fmt::Debug for Inspector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inspector").field("server", &self.server).finish_non_exhaustive()
    }
}

impl Inspector {
    /// Takes the configuration that kubectl would take, or another file or context of it; without any, the
    /// ServiceAccount of the pod. Makes no request.
    ///
    /// # Errors
    /// When there is neither.
    pub async fn connect(kubeconfig: Option<&Path>, context: Option<&str>) -> Result<Self, ConnectError> {
        let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
        let (config, in_pod) = match read_kubeconfig(kubeconfig, options).await {
            Ok(config) => (config, false),
            Err(err) if kubeconfig.is_some() || context.is_some() => return Err(err),
            Err(err) => (Config::incluster().map_err(|_| err)?, true),
        };
        let Connection { client, server, namespace: _ } = connection(config)?;
        Ok(Self { client, server, in_pod })
    }

    /// URL of the API server.
    #[must_use]
    pub fn server(&self) -> &str {
        &self.server
    }

    /// Whether it is the ServiceAccount of the pod that asks.
    #[must_use]
    pub const fn is_in_pod(&self) -> bool {
        self.in_pod
    }

    /// The same account, for ConfigMaps.
    #[must_use]
    pub fn config_maps(&self) -> ConfigMapClient {
        ConfigMapClient::of(self.client.clone(), self.server.clone())
    }

    /// Asks for something that everybody may see.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub async fn seen(&self) -> Result<ApiServerSeen, InspectionError> {
        let request = http::Request::get("/version").body(Vec::new()).map_err(|err| InspectionError(chain(&err)))?;
        let begun = std::time::Instant::now();
        let (head, answer) = exchange::<serde_json::Value>(&self.client, request).await;
        let took = begun.elapsed();
        answer?;
        let date = head.as_ref().and_then(|head| head.headers.get(http::header::DATE)?.to_str().ok());
        Ok(ApiServerSeen { date: date.and_then(|date| httpdate::parse_http_date(date).ok()), took })
    }

    /// Whether `user` has the right, or who asks without `user`.
    ///
    /// # Errors
    /// When the API server does not answer, or does not let this account ask about others.
    pub async fn may(&self, user: Option<&str>, right: AccessRight<'_>) -> Result<bool, InspectionError> {
        let AccessRight { verb, group, resource, namespace, name } = right;
        let attributes = ResourceAttributes {
            verb: Some(verb.into()),
            group: Some(group.into()),
            resource: Some(resource.into()),
            namespace: namespace.map(Into::into),
            name: name.map(Into::into),
            ..ResourceAttributes::default()
        };
        let status = match user {
            None => {
                let spec = SelfSubjectAccessReviewSpec {
                    resource_attributes: Some(attributes),
                    non_resource_attributes: None,
                };
                self.create(&SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() }).await?.status
            }
            Some(user) => {
                let spec = SubjectAccessReviewSpec {
                    resource_attributes: Some(attributes),
                    user: Some(user.into()),
                    groups: Some(groups_of(user)),
                    ..SubjectAccessReviewSpec::default()
                };
                self.create(&SubjectAccessReview { spec, ..SubjectAccessReview::default() }).await?.status
            }
        };
        Ok(status.is_some_and(|status: SubjectAccessReviewStatus| status.allowed && !status.denied.unwrap_or(false)))
    }

    /// The addresses in the EndpointSlices of a service.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub async fn slice_addresses(&self, namespace: &str, service: &str) -> Result<Vec<String>, InspectionError> {
        let params = ListParams::default().labels(&format!("kubernetes.io/service-name={service}"));
        let request = path::<EndpointSlice>(namespace).list(&params).map_err(|err| InspectionError(chain(&err)))?;
        let slices: ObjectList<EndpointSlice> = exchange(&self.client, request).await.1?;
        let endpoints = slices.items.into_iter().flat_map(|slice| slice.endpoints);
        Ok(endpoints.flat_map(|endpoint| endpoint.addresses).collect())
    }

    async fn create<K: Resource + Serialize + DeserializeOwned>(&self, object: &K) -> Result<K, InspectionError> {
        let request = Builder::new(format!("/{}/{}", api::<K>(), K::URL_PATH_SEGMENT));
        let request = request.create(&PostParams::default(), encode(object));
        let request = request.map_err(|err| InspectionError(chain(&err)))?;
        Ok(exchange(&self.client, request).await.1?)
    }
}

/// The groups that Kubernetes gives a user of this name.
fn groups_of(user: &str) -> Vec<String> {
    let mut groups = vec!["system:authenticated".to_owned()];
    if let Some((namespace, _)) = user.strip_prefix(SERVICE_ACCOUNT).and_then(|rest| rest.split_once(':')) {
        groups.extend(["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")]);
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_account_is_in_the_groups_of_its_namespace() {
        let groups = groups_of("system:serviceaccount:prod:gangplank");
        assert_eq!(groups, ["system:authenticated", "system:serviceaccounts", "system:serviceaccounts:prod"]);
        assert_eq!(groups_of("ada"), ["system:authenticated"]);
    }
}
