//! Identities by token and rights by Kubernetes RBAC, on a real API server.

mod outage;
mod pages;
mod rights;
mod tokens;
mod walks;

use gangplank::grpc::proto::{
    gangplank::v1::discovery_client::DiscoveryClient,
    registry::{RegistrationMsg, RegistrationType, service_registry_client::ServiceRegistryClient},
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{
    Request, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    service::interceptor::InterceptedService,
    transport::Channel,
};

use super::SecuredServer;
use crate::{
    mirror::ClusterLock,
    support::{
        cluster::{Cluster, Who},
        proxy::Proxy,
        secrets,
    },
};

const ROLE: &str = include_str!("../../../deploy/registrant-role.yaml");

/// A gangplank that asks a cluster, by way of a proxy.
struct RbacServer {
    secured: SecuredServer,
    proxy: Proxy,
    cluster: &'static Cluster,
    /// A namespace of the test's own, with the account `web`, which may register `web` and nothing else.
    namespace: String,
    _lock: ClusterLock,
}

type Shown = InterceptedService<Channel, ShowToken>;

#[derive(Clone)]
struct ShowToken(MetadataValue<Ascii>);

impl tonic::service::Interceptor for ShowToken {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

impl RbacServer {
    /// `None` without a control plane, which is reported.
    fn start(namespace: &str, flags: &[&str]) -> Option<Self> {
        let lock = ClusterLock::take()?;
        let cluster = lock.cluster;
        cluster.create_namespace(namespace);
        cluster.apply(&ROLE.replace("namespace: shop", &format!("namespace: {namespace}")));
        let proxy = Proxy::start(cluster);
        let mut all = vec!["--kubeconfig", proxy.kubeconfig().to_str().expect("UTF-8")];
        all.extend(flags);
        let secured = SecuredServer::start_without_policy(&all);
        Some(Self { secured, proxy, cluster, namespace: namespace.to_owned(), _lock: lock })
    }

    /// A new token of an account, for an audience.
    fn token(&self, account: &str, audience: &str) -> String {
        let arguments = ["create", "token", account, "--namespace", &self.namespace, "--audience", audience];
        let token = self.cluster.kubectl(&arguments).trim().to_owned();
        secrets::remember(&token);
        token
    }

    /// A connection over TLS without a certificate.
    async fn connect(&self) -> Channel {
        self.secured.connect(None).await.expect("a handshake")
    }

    async fn registry(&self, token: &str) -> ServiceRegistryClient<Shown> {
        ServiceRegistryClient::with_interceptor(self.connect().await, show(token))
    }

    async fn discovery(&self, token: &str) -> DiscoveryClient<Shown> {
        DiscoveryClient::with_interceptor(self.connect().await, show(token))
    }

    /// An open stream of registrations.
    async fn open(&self, token: &str) -> OpenStream {
        let (messages, receiver) = mpsc::unbounded_channel();
        let mut registry = self.registry(token).await;
        let answers = registry.registration_event(UnboundedReceiverStream::new(receiver)).await;
        OpenStream { messages, answers: answers.expect("answered").into_inner(), namespace: self.namespace.clone() }
    }

    /// What Kubernetes says of an act of a user, asked by the administrator, as `kubectl auth can-i --as` does.
    fn can_i(&self, user: &str, groups: &[&str], verb: &str, namespace: &str, service: &str) -> bool {
        let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": {
            "user": user, "groups": groups, "resourceAttributes": {"group": "gangplank.dev", "resource": "instances",
            "verb": verb, "namespace": namespace, "name": service}}});
        let path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
        let (status, answer) = self.cluster.request(Who::Admin, "POST", path, Some(&review)).expect("it runs");
        assert_eq!(status, 201, "{answer}");
        answer["status"]["allowed"] == Value::Bool(true)
    }

    /// The same of a path.
    fn can_get(&self, user: &str, groups: &[&str], path: &str) -> bool {
        let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": {
            "user": user, "groups": groups, "nonResourceAttributes": {"path": path, "verb": "get"}}});
        let to = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
        let (status, answer) = self.cluster.request(Who::Admin, "POST", to, Some(&review)).expect("it runs");
        assert_eq!(status, 201, "{answer}");
        answer["status"]["allowed"] == Value::Bool(true)
    }

    fn user(&self, account: &str) -> String {
        format!("system:serviceaccount:{}:{account}", self.namespace)
    }

    fn reviews(&self, resource: &str) -> usize {
        self.proxy.count(|call| call.is("create", resource))
    }

    /// The value of one series of a scrape.
    fn metric(&self, series: &str) -> f64 {
        let (_, text) = crate::support::http::get(self.secured.server.admin, "/metrics");
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().expect("a number")
    }
}

fn show(token: &str) -> ShowToken {
    ShowToken(format!("Bearer {token}").parse().expect("ASCII"))
}

/// One stream of registrations.
struct OpenStream {
    messages: mpsc::UnboundedSender<RegistrationMsg>,
    answers: Streaming<gangplank::grpc::proto::registry::RegistrationResponse>,
    namespace: String,
}

impl OpenStream {
    fn send(&self, service: &str, address: &str) {
        let message = RegistrationMsg {
            r#type: RegistrationType::Register.into(),
            namespace: self.namespace.clone(),
            service_name: service.into(),
            ipaddress: address.into(),
            ..RegistrationMsg::default()
        };
        self.messages.send(message).expect("the stream is open");
    }

    async fn answer(&mut self) -> Result<(u32, String), Status> {
        let answer = self.answers.message().await?.expect("an answer");
        Ok((answer.status, answer.status_details))
    }

    async fn register(&mut self, service: &str, address: &str) -> u32 {
        self.send(service, address);
        self.answer().await.expect("answered").0
    }

    /// Waits for the end, and returns its status.
    async fn end(mut self) -> Status {
        loop {
            match self.answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ended without a status"),
                Err(status) => return status,
            }
        }
    }
}
