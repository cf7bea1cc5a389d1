//! The services over the network: a real server on loopback with a real registry.

mod handover;
mod limits;
mod mirrored;
mod stream;
mod unary;
mod watching;

use std::{future::Future, net::SocketAddr, time::Duration};

use futures::FutureExt as _;
use tempfile::TempDir;
use tokio::{runtime::Handle, task::JoinSet};
use tonic::transport::{Channel, Endpoint};

use super::{
    client::{Client, ClientTls},
    proto::registry::{NamedPort, RegistrationMsg, RegistrationType},
    *,
};
use crate::{
    identity::Credentials,
    model::DnsName,
    registry::{self, Unrecovered, Writer},
    store::{DataDir, StoreOptions},
    zone::{Zone, ZoneConfig},
};

pub(super) const VALIDATOR: Validator = Validator { zone_wire_len: 15, names_allowed: false };

/// How long a test waits for one event.
const TEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Limits that no test reaches unless it lowers them.
const CONNECTIONS: ConnectionLimits =
    ConnectionLimits { connections: 1000, idle: Duration::from_secs(600), max_age: Duration::from_secs(3600) };

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(TEST_TIMEOUT, future).await.unwrap_or_else(|_| panic!("{what}: not within {TEST_TIMEOUT:?}"))
}

/// A caller who may do all.
fn caller(registry: &Registry) -> caller::Caller {
    let security = &registry.context.security;
    let now = std::time::SystemTime::now();
    let identity = security.authenticator.identify(&Credentials::LoopbackPlaintext, now).now_or_never();
    let identity = identity.expect("waits for nothing").expect("needs nothing");
    caller::Caller::new(identity, std::net::Ipv4Addr::LOCALHOST.into(), security).expect("a name")
}

/// A registry with a store of its own; a test starts its recovery and its writer.
pub(super) struct Registry {
    pub(super) context: ServerContext,
    unrecovered: Option<Unrecovered>,
    writer: Option<Writer>,
    stop: CancellationToken,
    dir: TempDir,
}

impl Registry {
    fn new(max_instances: usize) -> Self {
        Self::with(registry::RegistryOptions {
            max_instances,
            quotas: Default::default(),
            deny_addresses: Vec::new(),
            kubernetes: None,
        })
    }

    fn with(options: registry::RegistryOptions) -> Self {
        let metrics = Arc::new(Metrics::new());
        let (registry, unrecovered) = registry::new(options, Arc::clone(&metrics));
        Self {
            context: ServerContext {
                registry,
                validator: VALIDATOR,
                security: Security::plaintext_only(&metrics),
                metrics,
            },
            unrecovered: Some(unrecovered),
            writer: None,
            stop: CancellationToken::new(),
            dir: tempfile::tempdir().expect("a directory for the store"),
        }
    }

    /// From now on submissions are queued; they wait for [`Registry::write`].
    fn recover(&mut self) {
        let unrecovered = self.unrecovered.take().expect("recovered once");
        let config = ZoneConfig {
            origin: DnsName::parse("cluster.local").expect("a name"),
            ttl: 5,
            reverse_zones: Vec::new(),
            ns_addresses: Vec::new(),
            publish_not_ready: false,
            flatten_names: false,
        };
        let (_, publisher) = Zone::new(config);
        let data_dir = DataDir::lock(self.dir.path()).expect("no other process has it");
        let writer = unrecovered.recover(data_dir, &StoreOptions::default(), publisher, &mut |_| {});
        self.writer = Some(writer.expect("an empty store"));
    }

    fn write(&mut self) {
        let writer = self.writer.take().expect("recovered, and writing begins once");
        let (runtime, stop) = (Handle::current(), self.stop.clone());
        // A thread of its own, as in the process: the writer blocks on the disk.
        std::thread::spawn(move || {
            let mut writer = writer;
            writer.await_restore(&runtime, &stop);
            writer.run(&runtime, &stop);
        });
    }

    /// A registry with an empty Kubernetes, whose mirror is the test itself.
    pub(super) async fn mirrored() -> Self {
        let rules = registry::NamespacePolicy { create_namespaces: true };
        let mut registry = Self::with(registry::RegistryOptions {
            max_instances: 1_000_000,
            quotas: Default::default(),
            deny_addresses: Vec::new(),
            kubernetes: Some(rules),
        });
        registry.recover();
        registry.write();
        let handle = registry.context.registry.clone();
        let turn = soon("the take-over", handle.begin_take_over()).await.expect("the writer is there");
        let restored = handle.restore(turn, registry::KubernetesState { new_term: 1, ..Default::default() });
        assert_eq!(soon("the start", restored).await, Ok(1));
        registry
    }

    pub(super) fn working(max_instances: usize) -> Self {
        let mut registry = Self::new(max_instances);
        registry.recover();
        registry.write();
        registry
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A server on a port of its own.
struct TestServer {
    registry: Registry,
    address: SocketAddr,
    stop: CancellationToken,
    running: JoinSet<io::Result<()>>,
}

impl TestServer {
    async fn start() -> Self {
        Self::serving(Registry::working(1_000_000), LIMITS).await
    }

    async fn serving(registry: Registry, limits: ServerLimits) -> Self {
        Self::with_connections(registry, limits, CONNECTIONS).await
    }

    async fn with_connections(registry: Registry, limits: ServerLimits, connections: ConnectionLimits) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = listener.local_addr().expect("bound");
        let stop = CancellationToken::new();
        let mut running = JoinSet::new();
        running.spawn(serve(
            vec![(listener, ListenerSecurity::Loopback)],
            registry.context.clone(),
            connections,
            limits,
            stop.clone(),
        ));
        Self { registry, address, stop, running }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    async fn client(&self) -> Client {
        Client::connect(&self.url(), &ClientTls::default()).await.expect("it listens")
    }

    async fn channel(&self) -> Channel {
        Endpoint::from_shared(self.url()).expect("a URL").connect().await.expect("it listens")
    }

    /// Stops the server and waits for its end.
    async fn ended(&mut self) {
        self.stop.cancel();
        let ended = soon("the server ends", self.running.join_next()).await;
        ended.expect("it runs").expect("it did not panic").expect("it did not fail");
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        let all = self.registry.context.metrics.all();
        prometheus_client::encoding::text::encode(&mut text, all).expect("a String takes everything");
        text
    }

    /// Waits for a line of the metrics.
    async fn metric(&self, line: &str) {
        let seen = async {
            while !self.metrics().lines().any(|found| found == line) {
                tokio::task::yield_now().await;
            }
        };
        if tokio::time::timeout(TEST_TIMEOUT, seen).await.is_err() {
            panic!("no line {line:?} in\n{}", self.metrics());
        }
    }
}

/// A message that registers the `n`th instance of prod/web.
fn message(n: u32) -> RegistrationMsg {
    let [_, a, b, c] = n.to_be_bytes();
    RegistrationMsg {
        namespace: "prod".into(),
        service_name: "web".into(),
        ipaddress: format!("10.{a}.{b}.{c}"),
        ports: vec![NamedPort { port: 8080, name: "http".into(), ..NamedPort::default() }],
        request_id: n.to_string(),
        ..RegistrationMsg::default()
    }
}

fn removal(n: u32) -> RegistrationMsg {
    RegistrationMsg { r#type: RegistrationType::Unregister.into(), ..message(n) }
}
