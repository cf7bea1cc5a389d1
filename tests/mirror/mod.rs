//! Registrations are mirrored into Kubernetes and restored from it: a real gangplank under its own
//! ServiceAccount, with the rights and the policy of `deploy/`, and a real API server.

mod addresses;
mod api_server_accepts;
mod api_server_outage;
mod basics;
mod dns_probe;
mod external_changes;
mod faults;
mod figures;
mod followers;
mod handover;
mod kill_cycles;
mod late_writes;
mod lease;
mod names;
mod ownership;
mod quotas;
mod replica;
mod replicas_command;
mod reregistered;
mod seen_by_coredns;
mod several_servers;
mod staleness;
mod tombstones;
mod trial;
mod upgrade;
mod write_counts;
mod writer_events;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use hickory_proto::{op::ResponseCode, rr::RecordType};
use serde_json::Value;

use crate::support::{
    cluster::{Cluster, Who},
    dns::{Over, answers, ask},
    http,
    proxy::Proxy,
    server::Server,
    stream::Stream,
    wait_until,
};

/// A gangplank that mirrors into a cluster. One at a time: a second one would wait on standby.
struct MirrorHarness {
    server: Server,
    cluster: &'static Cluster,
    _lock: ClusterLock,
}

/// The right to run a gangplank on a cluster.
pub(crate) struct ClusterLock {
    /// That cluster.
    pub(crate) cluster: &'static Cluster,
    _guard: MutexGuard<'static, ()>,
}

impl ClusterLock {
    /// Waits for it. `None` without a control plane, which is reported.
    pub(crate) fn take() -> Option<Self> {
        static MUTEX: Mutex<()> = Mutex::new(());
        Some(Self::at(Cluster::shared()?, &MUTEX))
    }

    fn at(cluster: &'static Cluster, mutex: &'static Mutex<()>) -> Self {
        // A test that failed leaves nothing behind that disturbs the next one.
        Self { cluster, _guard: mutex.lock().unwrap_or_else(PoisonError::into_inner) }
    }
}

impl MirrorHarness {
    /// With more flags for `serve`. `None` without a control plane, which is reported.
    fn start(flags: &[&str]) -> Option<Self> {
        let lock = ClusterLock::take()?;
        Some(Self { server: serve(lock.cluster, flags), cluster: lock.cluster, _lock: lock })
    }

    /// The same by way of a proxy that can be told what to do.
    fn behind_a_proxy() -> Option<(Self, Proxy)> {
        let lock = ClusterLock::take()?;
        let proxy = Proxy::start(lock.cluster);
        Some((Self { server: serve_by(proxy.kubeconfig(), &[]), cluster: lock.cluster, _lock: lock }, proxy))
    }

    /// The same before a cluster with the controllers that a real one has: garbage is collected,
    /// namespaces end, pods get slices.
    fn with_controllers(flags: &[&str]) -> Option<Self> {
        static CLUSTER: OnceLock<Option<Cluster>> = OnceLock::new();
        static MUTEX: Mutex<()> = Mutex::new(());
        let cluster = CLUSTER.get_or_init(|| Cluster::private().map(Cluster::with_controllers)).as_ref()?;
        let lock = ClusterLock::at(cluster, &MUTEX);
        Some(Self { server: serve(cluster, flags), cluster, _lock: lock })
    }

    /// Creates a namespace and waits until gangplank knows it.
    fn create_namespace(&self, name: &str) {
        self.cluster.create_namespace(name);
        wait_until("the namespace is a name in DNS", || {
            let answer = ask(self.server.dns, Over::Udp, &format!("{name}.svc.cluster.local."), RecordType::A);
            (answer.response_code == ResponseCode::NoError).then_some(())
        });
    }

    /// Kills the server, and starts another on an empty data directory that reaches the API server
    /// as `kubeconfig` says.
    fn restart_empty_with(&mut self, kubeconfig: &Path, flags: &[&str]) {
        self.server.kill9();
        self.cluster.release_lease();
        self.server = serve_by(kubeconfig, flags);
    }

    /// The value of one series of a scrape.
    fn metric(&self, series: &str) -> f64 {
        let (status, text) = http::get(self.server.admin, "/metrics");
        assert_eq!(status, 200);
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().expect("a number")
    }

    /// Kills the server and starts it with an empty data directory.
    fn restart_empty(&mut self, flags: &[&str]) {
        self.server.kill9();
        self.server = serve(self.cluster, flags);
    }

    /// Registers through the command line and returns the exit code and what it printed.
    fn register(&self, namespace: &str, service: &str, address: &str, port: &str) -> (Option<i32>, String) {
        let output = self.server.run(&["register", service, address, "--port", port, "-n", namespace]);
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(said).expect("UTF-8"))
    }

    fn deregister(&self, namespace: &str, service: &str, address: &str) -> (Option<i32>, String) {
        let output = self.server.run(&["deregister", service, address, "-n", namespace]);
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(said).expect("UTF-8"))
    }
}

/// A gangplank with a new data directory that mirrors into `cluster`.
fn serve(cluster: &Cluster, flags: &[&str]) -> Server {
    serve_by(&cluster.kubeconfig_for_gangplank(), flags)
}

/// The same by way of what a kubeconfig names.
fn serve_by(kubeconfig: &Path, flags: &[&str]) -> Server {
    let mut all = vec!["--kubeconfig", kubeconfig.to_str().expect("a path in UTF-8")];
    all.extend(flags);
    Server::start_with(&all)
}

/// The EndpointSlices of a service, those of others too, without that of tombstones.
fn slices(cluster: &Cluster, namespace: &str, service: &str) -> Vec<Value> {
    let mut slices = every_slice(cluster, namespace, service);
    slices.retain(|slice| slice["metadata"]["annotations"]["gangplank.dev/tombstones"].is_null());
    slices
}

/// All EndpointSlices of a service.
fn every_slice(cluster: &Cluster, namespace: &str, service: &str) -> Vec<Value> {
    let path = format!(
        "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices?labelSelector=kubernetes.io/service-name%3D{service}"
    );
    let list = cluster.get_json(&path);
    list["items"].as_array().expect("a list").clone()
}

/// Where the slices of a namespace are, or one of them.
fn slice_path(namespace: &str, name: &str) -> String {
    let path = format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices");
    if name.is_empty() { path } else { format!("{path}/{name}") }
}

/// Where the Services of a namespace are, or one of them.
fn service_path(namespace: &str, name: &str) -> String {
    let path = format!("/api/v1/namespaces/{namespace}/services");
    if name.is_empty() { path } else { format!("{path}/{name}") }
}

/// The addresses in all of them, sorted.
fn addresses(cluster: &Cluster, namespace: &str, service: &str) -> Vec<String> {
    let slices = slices(cluster, namespace, service);
    let endpoints = slices.iter().filter_map(|slice| slice["endpoints"].as_array()).flatten();
    let mut addresses: Vec<String> = endpoints
        .filter_map(|endpoint| endpoint["addresses"].as_array())
        .flatten()
        .map(|address| address.as_str().expect("text").to_owned())
        .collect();
    addresses.sort();
    addresses
}

/// Waits until the slices of a service hold exactly these addresses.
fn wait_for_addresses(cluster: &Cluster, namespace: &str, service: &str, wanted: &[&str]) {
    wait_until(&format!("{namespace}/{service} has {wanted:?}"), || {
        (addresses(cluster, namespace, service) == wanted).then_some(())
    });
}

/// An object, or `None` when it does not exist.
fn object(cluster: &Cluster, path: &str) -> Option<Value> {
    let (status, object) = cluster.request(Who::Admin, "GET", path, None).expect("the API server runs");
    assert!(matches!(status, 200 | 404), "{path}: {status} {object}");
    (status == 200).then_some(object)
}

/// Until the guard is dropped, no other test runs a control plane of its own: each takes 300 MB,
/// and a second one would disturb what is measured.
fn private_cluster_lock() -> MutexGuard<'static, ()> {
    static MUTEX: Mutex<()> = Mutex::new(());
    // A test that failed leaves nothing behind that disturbs the next one.
    MUTEX.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The sorted addresses in all slices of a namespace, by service; services without one are left out.
fn every_address(cluster: &Cluster, namespace: &str) -> BTreeMap<String, Vec<String>> {
    let list = cluster.get_json(&format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"));
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for slice in list["items"].as_array().expect("a list") {
        let service = slice["metadata"]["labels"]["kubernetes.io/service-name"].as_str().expect("it says whose it is");
        let addresses = slice["endpoints"].as_array().into_iter().flatten();
        let addresses = addresses.flat_map(|endpoint| endpoint["addresses"].as_array().into_iter().flatten());
        let addresses = addresses.map(|address| address.as_str().expect("text").to_owned());
        all.entry(service.to_owned()).or_default().extend(addresses);
    }
    all.retain(|_, addresses| !addresses.is_empty());
    all.values_mut().for_each(|addresses| addresses.sort());
    all
}

/// Makes a namespace and waits until gangplank knows it: then the service `first` has 10.9.9.9, there and here.
fn make_namespace(cluster: &Cluster, stream: &mut Stream, namespace: &str) {
    cluster.create_namespace(namespace);
    wait_until("the namespace is known and the first instance mirrored", || {
        let (status, _) = stream.register(namespace, "first", "10.9.9.9");
        assert!(matches!(status, 200 | 201 | 202 | 404), "{status}");
        matches!(status, 200 | 201).then_some(())
    });
    wait_for_addresses(cluster, namespace, "first", &["10.9.9.9"]);
}

fn dns_name(namespace: &str, service: &str) -> String {
    format!("{service}.{namespace}.svc.cluster.local.")
}

/// The addresses of a service in our own DNS.
fn resolve(server: &Server, namespace: &str, service: &str) -> Vec<String> {
    answers(server.dns, Over::Tcp, &dns_name(namespace, service), RecordType::A)
}

/// The Events with this reason in a namespace: what each is about, and its note.
fn events(cluster: &Cluster, namespace: &str, reason: &str) -> Vec<(String, String)> {
    let list = cluster.get_json(&format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events"));
    let events = list["items"].as_array().expect("a list").iter().filter(|event| event["reason"] == reason);
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    events
        .map(|event| {
            let about = &event["regarding"];
            (format!("{} {}", text(&about["kind"]), text(&about["name"])), text(&event["note"]))
        })
        .collect()
}
