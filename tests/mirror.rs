//! What is registered stands in Kubernetes, and comes back from it: a real gangplank under its own
//! ServiceAccount with the rights and the policy of `deploy/`, before a real API server.

mod basics;
mod bulk;
mod cycles;
mod faults;
mod outage;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use hickory_proto::rr::RecordType;
use serde_json::Value;

use crate::support::{
    cluster::{Cluster, Who},
    dns::{Over, answers},
    http,
    server::Server,
    stream::Stream,
    wait_until,
};

/// A gangplank before the shared cluster. One at a time: two would each take the other's slices
/// for their own.
struct World {
    server: Server,
    cluster: &'static Cluster,
    _turn: MutexGuard<'static, ()>,
}

impl World {
    /// With more flags for `serve`. `None` without a control plane, which it says.
    fn start(flags: &[&str]) -> Option<Self> {
        let cluster = Cluster::shared()?;
        let turn = turn();
        Some(Self { server: serve(cluster, flags), cluster, _turn: turn })
    }

    /// Kills the server and starts it with an empty data directory.
    fn lose_the_disk(&mut self, flags: &[&str]) {
        self.server.kill9();
        self.server = serve(self.cluster, flags);
    }

    /// Registers through the command line and gives the exit code and what it printed.
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

/// Until it is dropped, no other test of the mirror runs.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    // A test that failed leaves nothing behind that the next one minds.
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
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

/// The EndpointSlices of a service, those of others too.
fn slices(cluster: &Cluster, namespace: &str, service: &str) -> Vec<Value> {
    let path = format!(
        "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices?labelSelector=kubernetes.io/service-name%3D{service}"
    );
    let list = cluster.get_json(&path);
    list["items"].as_array().expect("a list").clone()
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

fn name(namespace: &str, service: &str) -> String {
    format!("{service}.{namespace}.svc.cluster.local.")
}

/// The addresses of a service in our own DNS.
fn resolve(server: &Server, namespace: &str, service: &str) -> Vec<String> {
    answers(server.dns, Over::Tcp, &name(namespace, service), RecordType::A)
}

/// The value of a metric without labels.
fn metric(server: &Server, name: &str) -> f64 {
    let (status, text) = http::get(server.admin, "/metrics");
    assert_eq!(status, 200, "{text}");
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in {text}")).parse().expect("a number")
}

/// Asks DNS for one name again and again while something else goes wrong.
struct Steady {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(usize, Duration)>,
}

impl Steady {
    /// The service `first` of [`make_namespace`].
    fn start(dns: SocketAddr, namespace: &str) -> Self {
        let (stop, name) = (Arc::new(AtomicBool::new(false)), name(namespace, "first"));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let (mut asked, mut slowest) = (0, Duration::ZERO);
            while !stopped.load(SeqCst) {
                let begun = Instant::now();
                assert_eq!(answers(dns, Over::Udp, &name, RecordType::A), ["10.9.9.9"]);
                (asked, slowest) = (asked + 1, slowest.max(begun.elapsed()));
                thread::park_timeout(Duration::from_millis(5));
            }
            (asked, slowest)
        });
        Self { stop, thread }
    }

    /// Every answer was right and came at once.
    fn end(self) {
        self.stop.store(true, SeqCst);
        let (asked, slowest) = self.thread.join().expect("every answer was right");
        println!("{asked} questions meanwhile, the slowest answer after {slowest:?}");
        assert!(asked > 0 && slowest < Duration::from_secs(1), "{asked} questions, {slowest:?}");
    }
}
