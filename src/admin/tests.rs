//! The real listener on a free port, with requests over raw TCP.

use std::{net::SocketAddr, time::Instant};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    task::JoinSet,
    time::timeout,
};

use super::*;
use crate::{
    model::{DnsName, InstanceSpec, Service, ServiceKey, UnixMillis, testing::VALIDATOR},
    registry::{Catalog, Phase},
    zone::ZoneConfig,
};

/// How long a test waits for one event; long enough for a slow machine.
const TEST_TIMEOUT: Duration = Duration::from_secs(20);

fn service(namespace: &str, name: &str, instances: u8) -> (ServiceKey, Service) {
    let key = VALIDATOR.service(namespace, name).expect("valid");
    let instances = (1..=instances).map(|last| {
        let spec = InstanceSpec { address: format!("10.0.0.{last}"), ..InstanceSpec::default() };
        Arc::new(VALIDATOR.instance(&key, &spec, UnixMillis(1_700_000_000_000)).expect("valid"))
    });
    (key.clone(), Service { instances: instances.collect(), generation: 7 })
}

/// A running admin listener and the state that its pages show.
struct TestAdmin {
    address: SocketAddr,
    admin: Admin,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl TestAdmin {
    async fn start(limits: AdminLimits, services: Vec<(ServiceKey, Service)>, phase: Phase) -> Self {
        let config = ZoneConfig {
            origin: DnsName::parse("cluster.local").expect("valid"),
            ttl: 5,
            reverse_zones: Vec::new(),
            ns_addresses: Vec::new(),
            publish_not_ready: false,
            flatten_names: false,
        };
        let (zone, _publisher) = Zone::new(config);
        let metrics = Arc::new(Metrics::new());
        let snapshots = Snapshots::of(Arc::new(Catalog::of(services)), Arc::clone(&metrics));
        let admin = Admin {
            zone,
            snapshots: Arc::new(snapshots),
            status: Status::at(phase),
            security: Security::plaintext_only(&metrics),
            metrics,
            hosts: vec!["admin.example".into()],
            max_staleness: None,
            options: ProcessOptions::default(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(run_within(limits, vec![(listener, ListenerSecurity::Loopback)], admin.clone(), stop.clone()));
        Self { address, admin, stop, tasks }
    }

    async fn with(services: Vec<(ServiceKey, Service)>) -> Self {
        Self::start(AdminLimits::default(), services, Phase::Ready).await
    }

    /// A connection over which `request` was sent.
    async fn send(&self, request: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.expect("it listens");
        stream.write_all(request.as_bytes()).await.expect("it reads");
        stream
    }

    async fn get(&self, path: &str) -> HttpResponse {
        self.ask(path, "*/*").await
    }

    async fn ask(&self, path: &str, accept: &str) -> HttpResponse {
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: {accept}\r\nConnection: close\r\n\r\n");
        let mut stream = self.send(&request).await;
        HttpResponse::read(&mut stream).await
    }

    /// Stops the listener and waits for its end.
    async fn stop(mut self) {
        self.stop.cancel();
        let ended = timeout(TEST_TIMEOUT, self.tasks.join_next()).await.expect("it ends after stop");
        ended.expect("one task").expect("no panic");
    }
}

#[derive(Debug)]
struct HttpResponse {
    status: u16,
    content_type: String,
    body: String,
}

impl HttpResponse {
    /// Reads until the peer closes.
    async fn read(stream: &mut TcpStream) -> Self {
        let mut bytes = Vec::new();
        timeout(TEST_TIMEOUT, stream.read_to_end(&mut bytes)).await.expect("an answer in time").expect("an answer");
        let text = String::from_utf8(bytes).expect("UTF-8");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
        let status = head.split(' ').nth(1).expect("a status").parse().expect("a number");
        let header = |name: &str| {
            let lines = head.lines().filter_map(|line| line.split_once(": "));
            lines.filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned()).next()
        };
        let chunked = header("transfer-encoding").is_some_and(|coding| coding == "chunked");
        let body = if chunked { unchunked(body) } else { body.to_owned() };
        Self { status, content_type: header("content-type").unwrap_or_default(), body }
    }

    fn json(&self) -> Value {
        assert_eq!(self.content_type, "application/json");
        serde_json::from_str(&self.body).expect("JSON")
    }
}

/// RFC 9112 §7.1; panics unless the last chunk is there.
fn unchunked(mut rest: &str) -> String {
    let mut whole = String::new();
    loop {
        let (size, after) = rest.split_once("\r\n").expect("a size");
        let size = usize::from_str_radix(size, 16).expect("in hex");
        if size == 0 {
            return whole;
        }
        whole.push_str(&after[..size]);
        rest = after[size..].strip_prefix("\r\n").expect("the end of the chunk");
    }
}

#[tokio::test]
async fn every_page_of_the_index_exists() {
    let running = TestAdmin::with(vec![service("prod", "web", 1)]).await;
    let index = running.get("/").await;
    assert_eq!(index.status, 200);
    assert!(index.body.ends_with(&pages::index()), "{}", index.body);
    for (path, _) in pages() {
        assert!(index.body.contains(&format!("\nGET {path} ")), "{}", index.body);
        let answer = running.get(&path.replace("{namespace}", "prod").replace("{name}", "web")).await;
        assert_ne!(answer.status, 404, "{path}");
    }
    let absent = running.get("/nope").await;
    assert_eq!(absent.status, 404);
    assert!(absent.body.contains(&pages::index()), "{}", absent.body);
    running.stop().await;
}

#[tokio::test]
async fn metrics_are_openmetrics() {
    let running = TestAdmin::with(vec![]).await;
    running.admin.metrics.registry.set_registered(2, 3, 1712);
    let answer = running.get("/metrics").await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.content_type, "application/openmetrics-text; version=1.0.0; charset=utf-8");
    assert!(answer.body.contains("\ngangplank_registry_instances 3\n"), "{}", answer.body);
    assert!(answer.body.ends_with("# EOF\n"), "OpenMetrics 1.0 wants its end marked");
    running.stop().await;
}

#[tokio::test]
async fn readiness_follows_the_zone_and_the_registry() {
    let running = TestAdmin::start(AdminLimits::default(), vec![], Phase::Recovering).await;
    assert_eq!(running.get("/livez").await.status, 200);
    let loading = running.get("/readyz").await;
    assert_eq!(loading.status, 503);
    assert!(loading.body.starts_with("not ready: dns: the store is still being loaded"), "{}", loading.body);
    let both = running.get("/readyz/registrations").await;
    assert_eq!((both.status, both.body.lines().count()), (503, 2), "{}", both.body);
    for path in ["/api/v1/services", "/api/v1/namespaces/prod/services", "/api/v1/namespaces/prod/services/web"] {
        let list = running.get(path).await;
        assert_eq!(list.status, 503, "{path}");
        assert!(list.json()["error"].as_str().is_some_and(|err| err.starts_with("not ready")), "{path}");
    }
    running.stop().await;

    let running = TestAdmin::with(vec![]).await;
    running.admin.zone.set_ready();
    for path in ["/readyz", "/readyz/registrations"] {
        let ready = running.get(path).await;
        assert_eq!((ready.status, ready.body.as_str()), (200, "ready\n"), "{path}");
    }
    running.admin.status.drain();
    for path in ["/readyz", "/readyz/registrations"] {
        assert_eq!(running.get(path).await.status, 503, "{path}");
        let asked = running.get(&format!("{path}?format=json")).await;
        assert_eq!(asked.status, 503, "{path}");
        assert_eq!(asked.json(), running.ask(path, "application/json").await.json());
        assert_eq!(asked.json()["ready"], false);
    }
    assert_eq!(running.get("/livez").await.status, 200);
    running.stop().await;
}

#[tokio::test]
async fn dns_is_ready_with_a_failed_journal() {
    let running = TestAdmin::start(AdminLimits::default(), vec![], Phase::StorageFailed("disk full".into())).await;
    running.admin.zone.set_ready();
    assert_eq!(running.get("/readyz").await.status, 200);
    let registrations = running.get("/readyz/registrations").await;
    assert_eq!(registrations.status, 503);
    assert!(registrations.body.contains("disk full"), "{}", registrations.body);
    running.stop().await;
}

#[tokio::test]
async fn services_are_listed_in_order() {
    let services = vec![service("prod", "web", 2), service("dev", "web", 1), service("prod", "api", 1)];
    let running = TestAdmin::with(services).await;
    let names = |list: Value| -> Vec<String> {
        let services = list["services"].as_array().expect("a list").clone();
        services.iter().map(|one| format!("{}/{}", one["namespace"], one["name"]).replace('"', "")).collect()
    };
    let all = running.get("/api/v1/services").await;
    assert_eq!(all.status, 200);
    assert_eq!(names(all.json()), ["dev/web", "prod/api", "prod/web"]);
    let some = running.get("/api/v1/namespaces/prod/services").await;
    assert_eq!(names(some.json()), ["prod/api", "prod/web"]);
    let none = running.get("/api/v1/namespaces/test/services").await;
    assert_eq!((none.status, none.json()), (200, json!({"services": []})));

    let web = running.get("/api/v1/namespaces/prod/services/web").await;
    assert_eq!(web.status, 200);
    assert_eq!(web.json()["instances"][1]["address"], "10.0.0.2");
    assert_eq!(web.json()["instances"][1]["share"], 0.5);
    running.stop().await;
}

#[tokio::test]
async fn unknown_service_is_404_and_invalid_name_is_400_in_json() {
    let running = TestAdmin::with(vec![service("prod", "web", 1)]).await;
    for (path, status, word) in [
        ("/api/v1/namespaces/prod/services/db", 404, "there is no service prod/db"),
        ("/api/v1/namespaces/Prod/services/web", 400, "namespace: must consist of lower-case letters"),
        ("/api/v1/namespaces/prod/services/Web", 400, "service_name: must consist of"),
        ("/api/v1/namespaces/-/services", 400, "namespace: must begin and end"),
        ("/api/v1/services?namespace=prod", 400, "unknown field `namespace`"),
    ] {
        let answer = running.get(path).await;
        assert_eq!(answer.status, status, "{path}");
        let json = answer.json();
        let err = json["error"].as_str().expect("a text");
        assert!(err.contains(word), "{path}: {err}");
    }
    running.stop().await;
}

/// Some 3 MB of JSON: far more than the buffers of the server and the kernel for one connection.
fn many() -> Vec<(ServiceKey, Service)> {
    (0..20_000).map(|number| service("prod", &format!("web-{number:05}"), 1)).collect()
}

#[tokio::test]
async fn long_list_is_complete() {
    let running = TestAdmin::with(many()).await;
    let list = running.get("/api/v1/services").await.json();
    let services = list["services"].as_array().expect("a list");
    assert_eq!(services.len(), 20_000);
    assert_eq!(services[19_999]["name"], "web-19999");
    running.stop().await;
}

#[tokio::test]
async fn hosts_of_others_are_refused_but_for_probes() {
    let admin = TestAdmin::with(vec![service("prod", "web", 1)]).await;
    let status = async |target: &str, host: &str| {
        let mut stream =
            admin.send(&format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")).await;
        HttpResponse::read(&mut stream).await.status
    };
    for path in
        ["/", "/metrics", "/api/v1/replica", "/api/v1/services", "/api/v1/namespaces/prod/services/web", "/none"]
    {
        assert_eq!(status(path, "evil.example:9153").await, 421, "{path}");
    }
    assert_eq!(status("http://evil.example/metrics", "127.0.0.1").await, 421, "the target takes precedence");
    assert_eq!(status("/metrics", "admin.example").await, 200);
    for probe in ["/livez", "/readyz"] {
        assert_ne!(status(probe, "evil.example").await, 421, "{probe}");
    }
}

const LIST: &str = "GET /api/v1/services HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";
const LIVEZ: &str = "GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";

/// Reads one answer's first line from a connection that stays open.
async fn first_line(stream: &mut TcpStream) -> String {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.push(timeout(TEST_TIMEOUT, stream.read_u8()).await.expect("an answer in time").expect("an answer"));
    }
    String::from_utf8(line).expect("ASCII")
}

#[tokio::test]
async fn stop_closes_idle_unread_and_half_sent_connections() {
    let grace = Duration::from_millis(50);
    let running = TestAdmin::start(AdminLimits { grace, ..AdminLimits::default() }, many(), Phase::Ready).await;
    let mut idle = running.send(LIVEZ).await;
    assert_eq!(first_line(&mut idle).await, "HTTP/1.1 200 OK\r\n");
    let mut unread = running.send(LIST).await;
    assert_eq!(first_line(&mut unread).await, "HTTP/1.1 200 OK\r\n");
    let mut half = running.send("GET /livez HTT").await;
    assert_eq!(running.get("/livez").await.status, 200, "the others are served meanwhile");
    running.stop().await;
    let mut rest = Vec::new();
    half.read_to_end(&mut rest).await.expect("closed in an orderly way");
    assert_eq!(rest, b"");
}

#[tokio::test]
async fn slowly_sent_request_closes_the_connection() {
    let request = Duration::from_millis(50);
    let running = TestAdmin::start(AdminLimits { request, ..AdminLimits::default() }, vec![], Phase::Ready).await;
    let began = Instant::now();
    let mut half = running.send("GET /livez HTT").await;
    let mut rest = Vec::new();
    let _ = timeout(TEST_TIMEOUT, half.read_to_end(&mut rest)).await.expect("closed in time");
    assert!(began.elapsed() >= request, "not before its time");
    // An idle connection has the same time for its next request.
    let mut idle = running.send(LIVEZ).await;
    let _ = timeout(TEST_TIMEOUT, idle.read_to_end(&mut rest)).await.expect("closed in time");
    assert!(String::from_utf8_lossy(&rest).contains("alive"), "it was answered first");
    running.stop().await;
}

#[tokio::test]
async fn unread_response_closes_the_connection() {
    let unread = Duration::from_millis(100);
    let limits = AdminLimits { unread, connections: 1, ..AdminLimits::default() };
    let running = TestAdmin::start(limits, many(), Phase::Ready).await;
    let mut stuck = running.send(LIST).await;
    assert_eq!(first_line(&mut stuck).await, "HTTP/1.1 200 OK\r\n");
    // The stuck connection has the only place, so the next request is served only after its end.
    assert_eq!(running.get("/livez").await.status, 200);
    running.stop().await;
}

#[tokio::test]
async fn full_listener_closes_the_idlest_connection() {
    let running =
        TestAdmin::start(AdminLimits { connections: 1, ..AdminLimits::default() }, vec![], Phase::Ready).await;
    let mut first = running.send(LIVEZ).await;
    assert_eq!(first_line(&mut first).await, "HTTP/1.1 200 OK\r\n");
    let mut second = running.send(LIVEZ).await;
    assert_eq!(first_line(&mut second).await, "HTTP/1.1 200 OK\r\n");
    let mut rest = Vec::new();
    let closed = timeout(TEST_TIMEOUT, first.read_to_end(&mut rest)).await.expect("closed in time");
    assert!(closed.is_ok() || closed.is_err_and(|err| err.kind() == io::ErrorKind::ConnectionReset));
    drop(second);
    running.stop().await;
}
