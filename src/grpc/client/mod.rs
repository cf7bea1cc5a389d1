//! The client side of both services, in model types: for the command line and the agent.
//!
//! [`Client::connect`] dials, so that an unreachable server is an error there and not at the first call.
//! The client does not retry; [`Servers`] looks for a server that takes a call.

mod certificates;
mod joining;
mod replicas;
mod servers;
mod tls;
mod token;

use std::{collections::VecDeque, error::Error, sync::Arc, time::Duration};

use tokio::time::error::Elapsed;
use tonic::{
    Code, Request, Response, Status, Streaming,
    service::interceptor::InterceptedService,
    transport::{Channel, Endpoint},
};

pub use self::{
    certificates::{Validity, shown_certificate},
    joining::{JoinError, JoinedMachine, RegistrantView, TokenView},
    replicas::FoundReplicas,
    servers::{Attempt, Servers},
    tls::{ClientTls, ClientTlsError, ClientTlsFiles},
    token::TokenError,
};
use self::{
    joining::RegistrantCalls,
    servers::innermost,
    token::{ShowToken, is_loopback},
};
use super::{
    convert::{change_from_proto, name_from_proto, port_to_proto, service_from_proto},
    proto::{
        gangplank::v1::{
            GetNamesRequest, GetServiceRequest, ListServicesRequest, Restart, WatchRequest, WatchResponse,
            discovery_client::DiscoveryClient, restart::Reason, watch_response::Event,
        },
        registry::{RegistrationResult, ServiceInfo, service_registry_client::ServiceRegistryClient},
    },
    writer_hint,
};
pub use crate::identity::joining::{ScopeSpec, TokenId};
use crate::model::{DnsName, Instance, InstanceSpec, NameStatus, ServerAddress, Service, ServiceKey, Timeline};

/// How long a connection may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long one unary call may take. A server whose disk hangs answers late or never.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection without traffic is probed with a PING after this long, and closed after
/// [`KEEPALIVE_TIMEOUT`] without an answer. Otherwise a watch of a dead peer would show outdated
/// instances for ever.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Most bytes of one response. A service of a million instances takes some 100 MB.
const MAX_RESPONSE_BYTES: usize = 256 * 1024 * 1024;

/// Bytes that the server may send before they are read, on one stream and on one connection. The
/// latter is this large because h2 closes a connection with many small unread DATA frames, such as
/// changes are: when the sum of 256 bytes minus the length of each reaches half of this window.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 64 * 1024 * 1024;

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No server listens at the URL, or the connection was lost.
    #[error("no gangplank server at {url}")]
    Unreachable {
        /// The URL that was dialled.
        url: String,
        /// The error of the transport.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The text is not a URL.
    #[error("{url:?} is not a server URL such as http://127.0.0.1:9080 or https://gangplank.example.com:9080")]
    Url {
        /// The text.
        url: String,
    },
    /// There is nothing to know a server with an `https` URL by.
    #[error("{url}: https needs the CA of the server: give --cacert FILE")]
    NoCa {
        /// The URL.
        url: String,
    },
    /// A certificate, key or CA is invalid.
    #[error("the certificate, the key or the CA of the client is invalid: {reason}")]
    Tls {
        /// What is wrong.
        reason: String,
    },
    /// The token cannot be shown.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// Whoever is on the way to the server could read the token.
    #[error("{url}: --token-file needs https, so that nobody on the way reads the token")]
    TokenInPlaintext {
        /// The URL.
        url: String,
    },
    /// The server answered the call with a gRPC status.
    #[error("the server answered {code}: {message}")]
    Status {
        /// The status code in words.
        code: String,
        /// Its message.
        message: String,
    },
    /// This version cannot read the server's response.
    #[error("the server's answer cannot be read: {0}")]
    InvalidResponse(String),
    /// None of several servers took the call.
    #[error("no server took the call")]
    NoneAnswered {
        /// The servers that were asked last, and what each of them said.
        attempts: Vec<Attempt>,
    },
}

impl ClientError {
    /// Whether another server may answer the same call.
    fn is_of_one_server(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Status { code, .. } => {
                // The state of one process: it stops, is full, is slow, or has dropped the call. Every replica refuses
                // the rest alike.
                ["Unavailable", "ResourceExhausted", "DeadlineExceeded", "Cancelled"].contains(&code.as_str())
            }
            Self::Url { .. }
            | Self::NoCa { .. }
            | Self::Tls { .. }
            | Self::Token(_)
            | Self::TokenInPlaintext { .. }
            | Self::InvalidResponse(_)
            | Self::NoneAnswered { .. } => false,
        }
    }

    fn late(url: &str, late: Elapsed) -> Self {
        Self::Unreachable { url: url.to_owned(), source: late.into() }
    }
}

/// The server's response to a registration or removal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MutationResponse {
    /// As HTTP has it: 2xx is done, 4xx and 507 a refusal, 503 a request to try again, perhaps elsewhere.
    pub status: u32,
    /// The field and the reason of a refusal; empty on success.
    pub details: String,
    /// The generation in which DNS serves the change; 0 for a refusal.
    pub generation: u64,
    /// Where registrations are taken instead, with a refusal on standby.
    pub writers: Vec<ServerAddress>,
}

/// One event of a watch.
#[derive(Debug, Clone)]
pub enum WatchEvent {
    /// A service as it is now.
    Snapshot(ServiceKey, Service),
    /// The snapshot is complete; later, at intervals: no matching change up to this generation.
    Synced {
        /// All changes up to this generation were sent.
        generation: u64,
        /// Resumes the watch after this event.
        cursor: Vec<u8>,
    },
    /// One change.
    Change {
        /// Added, updated or removed.
        kind: ChangeKind,
        /// The service of the instance.
        service: ServiceKey,
        /// The instance after the change; before it, if the instance was removed.
        instance: Arc<Instance>,
        /// The generation of the change.
        generation: u64,
        /// When the server received the change and completed each step.
        timeline: Timeline,
        /// Resumes the watch after this event.
        cursor: Vec<u8>,
    },
    /// The watch has ended; a new one must start without a cursor.
    Restart {
        /// `slow reader`, `unknown cursor`, `shutting down`.
        reason: &'static str,
        /// The server's explanation.
        message: String,
    },
}

/// The kind of a change of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// The instance is new.
    Added,
    /// Its attributes or its readiness changed.
    Updated,
    /// The instance was removed.
    Removed,
}

/// The events of an open watch.
#[derive(Debug)]
pub struct WatchEvents {
    url: Arc<str>,
    stream: Streaming<WatchResponse>,
    /// The service of the snapshot that is being received; more parts may follow.
    part: Option<(ServiceKey, Service)>,
    /// Events that were decoded and not returned yet.
    read: VecDeque<WatchEvent>,
}

impl WatchEvents {
    /// The next event; `None` when the server ended the stream.
    ///
    /// # Errors
    /// When the connection is lost or a message cannot be read.
    pub async fn next(&mut self) -> Result<Option<WatchEvent>, ClientError> {
        loop {
            if let Some(event) = self.read.pop_front() {
                return Ok(Some(event));
            }
            let Some(message) = self.stream.message().await.map_err(|status| refused(&self.url, status))? else {
                // The last service has no next event that would complete it.
                return Ok(self.part.take().map(|(key, service)| WatchEvent::Snapshot(key, service)));
            };
            self.take(message)?;
        }
    }

    fn take(&mut self, message: WatchResponse) -> Result<(), ClientError> {
        let cursor = message.cursor;
        let event = match message.event {
            // A large service comes in several parts, which follow each other. The service is whole when something else
            // comes.
            Some(Event::Snapshot(part)) => {
                let (key, service) = service_from_proto(part)?;
                let whole = join(&mut self.part, key, service);
                self.read.extend(whole.map(|(key, service)| WatchEvent::Snapshot(key, service)));
                return Ok(());
            }
            Some(Event::Synced(synced)) => WatchEvent::Synced { generation: synced.generation, cursor },
            Some(Event::Change(change)) => change_from_proto(change, cursor)?,
            Some(Event::Restart(restart)) => restart_from_proto(restart),
            // An event that this version does not know, from a newer server.
            None => return Ok(()),
        };
        self.read.extend(self.part.take().map(|(key, service)| WatchEvent::Snapshot(key, service)));
        self.read.push_back(event);
        Ok(())
    }
}

fn restart_from_proto(restart: Restart) -> WatchEvent {
    let reason = match Reason::try_from(restart.reason) {
        Ok(Reason::SlowReader) => "slow reader",
        Ok(Reason::UnknownCursor) => "unknown cursor",
        Ok(Reason::ShuttingDown) => "shutting down",
        Ok(Reason::Unspecified) | Err(_) => "unknown",
    };
    WatchEvent::Restart { reason, message: restart.message }
}

/// Adds a part to the open service. If the part belongs to another service, the open one is complete and
/// is returned.
fn join(open: &mut Option<(ServiceKey, Service)>, key: ServiceKey, part: Service) -> Option<(ServiceKey, Service)> {
    match open {
        Some((open, service)) if *open == key => {
            service.generation = service.generation.max(part.generation);
            for instance in &part.instances {
                service.instances.put(Arc::clone(instance));
            }
            None
        }
        open => open.replace((key, part)),
    }
}

/// A connection to a server.
#[derive(Debug, Clone)]
pub struct Client {
    url: Arc<str>,
    registry: ServiceRegistryClient<InterceptedService<Channel, ShowToken>>,
    discovery: DiscoveryClient<InterceptedService<Channel, ShowToken>>,
    registrants: RegistrantCalls,
}

impl Client {
    /// Dials `url`, for instance `http://127.0.0.1:9080`, or with `https` by what `tls` trusts and shows.
    ///
    /// # Errors
    /// When `url` is not a URL, no server listens there, or one of them does not trust the other.
    pub async fn connect(url: &str, tls: &ClientTls) -> Result<Self, ClientError> {
        let channel = dial(url, tls).await?;
        let show = tls.token().clone();
        let discovery = DiscoveryClient::with_interceptor(channel.clone(), show.clone());
        Ok(Self {
            url: url.into(),
            registry: ServiceRegistryClient::with_interceptor(channel.clone(), show.clone()),
            discovery: discovery.max_decoding_message_size(MAX_RESPONSE_BYTES),
            registrants: RegistrantCalls::new(channel, show),
        })
    }

    /// Registers one instance. A refusal is a [`MutationResponse`], not an error.
    ///
    /// # Errors
    /// When the call itself fails.
    pub async fn register(
        &mut self,
        namespace: &str,
        name: &str,
        spec: &InstanceSpec,
    ) -> Result<MutationResponse, ClientError> {
        let answered = self.registry.register(call(info(namespace, name, spec))).await;
        self.answer(answered)
    }

    /// Removes one instance, or without ports in `spec` every instance of its address. Other fields of
    /// `spec` are ignored.
    ///
    /// # Errors
    /// When the call itself fails.
    pub async fn unregister(
        &mut self,
        namespace: &str,
        name: &str,
        spec: &InstanceSpec,
    ) -> Result<MutationResponse, ClientError> {
        let answered = self.registry.un_register(call(info(namespace, name, spec))).await;
        self.answer(answered)
    }

    /// One service, or `None` if there is no such service.
    ///
    /// # Errors
    /// When the call itself fails.
    pub async fn service(&mut self, key: &ServiceKey) -> Result<Option<Service>, ClientError> {
        let request = GetServiceRequest { namespace: key.namespace().to_owned(), name: key.name().to_owned() };
        let answer = match self.discovery.get_service(call(request)).await {
            Ok(answer) => answer.into_inner(),
            Err(status) if status.code() == Code::NotFound => return Ok(None),
            Err(status) => return Err(refused(&self.url, status)),
        };
        let service = answer.service.ok_or_else(|| ClientError::InvalidResponse("no service in it".into()))?;
        service_from_proto(service).map(|(_, service)| Some(service))
    }

    /// What those instances of a service lead to that are DNS names, each name once, in order. None if the server is too old
    /// to know.
    ///
    /// # Errors
    /// When the call itself fails.
    pub async fn names(&mut self, key: &ServiceKey) -> Result<Vec<(DnsName, NameStatus)>, ClientError> {
        let request = GetNamesRequest { namespace: key.namespace().to_owned(), name: key.name().to_owned() };
        match self.discovery.get_names(call(request)).await {
            Ok(answer) => answer.into_inner().names.into_iter().map(name_from_proto).collect(),
            Err(status) if status.code() == Code::Unimplemented => Ok(Vec::new()),
            Err(status) => Err(refused(&self.url, status)),
        }
    }

    /// All services in order, or those of one namespace.
    ///
    /// # Errors
    /// When the call itself fails.
    pub async fn services(&mut self, namespace: Option<&str>) -> Result<Vec<(ServiceKey, Service)>, ClientError> {
        let request = ListServicesRequest { namespace: namespace.unwrap_or_default().to_owned() };
        // Without the deadline of `call`: a long list may take longer. The keepalive notices a dead server.
        let listed = self.discovery.list_services(request).await;
        let mut stream = listed.map_err(|status| refused(&self.url, status))?.into_inner();
        let (mut services, mut part) = (Vec::new(), None);
        while let Some(message) = stream.message().await.map_err(|status| refused(&self.url, status))? {
            let service = message.service.ok_or_else(|| ClientError::InvalidResponse("no service in it".into()))?;
            let (key, service) = service_from_proto(service)?;
            services.extend(join(&mut part, key, service));
        }
        services.extend(part);
        Ok(services)
    }

    /// Watches all services, one namespace, or one service; after a cursor, or from a snapshot on.
    ///
    /// # Errors
    /// When the call itself fails.
    pub async fn watch(
        &mut self,
        namespace: Option<&str>,
        service: Option<&str>,
        cursor: Option<Vec<u8>>,
    ) -> Result<WatchEvents, ClientError> {
        let request = WatchRequest {
            namespace: namespace.unwrap_or_default().to_owned(),
            service: service.unwrap_or_default().to_owned(),
            cursor: cursor.unwrap_or_default(),
        };
        // No deadline: a watch has no end. The keepalive notices a dead server.
        let opened = self.discovery.watch(request).await;
        let stream = opened.map_err(|status| refused(&self.url, status))?.into_inner();
        Ok(WatchEvents { url: Arc::clone(&self.url), stream, part: None, read: VecDeque::new() })
    }

    fn answer(&self, answered: Result<Response<RegistrationResult>, Status>) -> Result<MutationResponse, ClientError> {
        let answered = answered.map_err(|status| refused(&self.url, status))?;
        let writers = writer_hint::read(answered.metadata());
        let RegistrationResult { status, status_details: details, generation, .. } = answered.into_inner();
        Ok(MutationResponse { status, details, generation, writers })
    }
}

/// Dials `url`, as [`Client::connect`].
async fn dial(url: &str, tls: &ClientTls) -> Result<Channel, ClientError> {
    let no_url = || ClientError::Url { url: url.to_owned() };
    let mut endpoint = Endpoint::from_shared(url.to_owned()).map_err(|_| no_url())?;
    if endpoint.uri().host().is_none_or(str::is_empty) {
        return Err(no_url());
    }
    match endpoint.uri().scheme_str() {
        Some("http") => {
            // Before the connection is made: a token that nobody should read must not be sent and then regretted.
            if tls.token().is_there()? && !is_loopback(endpoint.uri()) {
                return Err(ClientError::TokenInPlaintext { url: url.to_owned() });
            }
        }
        Some("https") => {
            tls.token().is_there()?;
            let config = tls.config().ok_or_else(|| ClientError::NoCa { url: url.to_owned() })?;
            let invalid = |err: tonic::transport::Error| ClientError::Tls { reason: innermost(&err) };
            endpoint = endpoint.tls_config(config).map_err(invalid)?;
        }
        _ => return Err(no_url()),
    }
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    // A timeout around all of it: the one of the endpoint does not cover the handshake of HTTP/2.
    let dialled = tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect()).await;
    match dialled {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(source)) => Err(ClientError::Unreachable { url: url.to_owned(), source: source.into() }),
        Err(late) => Err(ClientError::late(url, late)),
    }
}

/// A request of a unary call, with a deadline of [`CALL_TIMEOUT`].
fn call<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

fn info(namespace: &str, name: &str, spec: &InstanceSpec) -> ServiceInfo {
    let ports = spec.ports.iter().map(|port| port_to_proto(port.number, port.protocol, &port.name));
    ServiceInfo {
        namespace: namespace.to_owned(),
        service_name: name.to_owned(),
        host_name: spec.host_name.clone(),
        ipaddress: spec.address.clone(),
        node_name: spec.node_name.clone(),
        ports: ports.collect(),
        weight: spec.weight,
        priority: spec.priority.into(),
        ..ServiceInfo::default()
    }
}

/// The error of a failed call: a status from the server, or an unreachable server.
fn refused(url: &str, status: Status) -> ClientError {
    // A status from the wire has no source. An error of this side has one.
    let local = status.source().is_some() && !matches!(status.code(), Code::Cancelled | Code::DeadlineExceeded);
    // If the connection ends between two calls, hyper cancels the next one before it is sent.
    let chain = std::iter::successors(status.source(), |&err| err.source());
    let unsent = chain.filter_map(|err| err.downcast_ref::<hyper::Error>()).any(hyper::Error::is_canceled);
    if local || unsent {
        return ClientError::Unreachable { url: url.to_owned(), source: status.into() };
    }
    ClientError::Status { code: format!("{:?}", status.code()), message: status.message().to_owned() }
}
