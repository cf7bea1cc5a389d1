//! What the tests have in common in which something goes wrong for a while.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use hickory_proto::rr::RecordType;

use super::wait_for_addresses;
use crate::support::{
    cluster::Cluster,
    dns::{Over, answers},
    server::Server,
    stream::Stream,
    wait_until,
};

/// Until it is dropped, no other test has a control plane of its own: each takes 300 MB, and what
/// is measured here minds company.
pub(super) fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    // A test that failed leaves nothing behind that the next one minds.
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The sorted addresses in all slices of a namespace, by service; services without one are left out.
pub(super) fn every_address(cluster: &Cluster, namespace: &str) -> BTreeMap<String, Vec<String>> {
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
pub(super) fn make_namespace(cluster: &Cluster, stream: &mut Stream, namespace: &str) {
    cluster.create_namespace(namespace);
    wait_until("the namespace is known and the first instance mirrored", || {
        let (status, _) = stream.register(namespace, "first", "10.9.9.9");
        assert!(matches!(status, 200 | 201 | 202 | 404), "{status}");
        matches!(status, 200 | 201).then_some(())
    });
    wait_for_addresses(cluster, namespace, "first", &["10.9.9.9"]);
}

pub(super) fn name(namespace: &str, service: &str) -> String {
    format!("{service}.{namespace}.svc.cluster.local.")
}

/// The addresses of a service in our own DNS.
pub(super) fn resolve(server: &Server, namespace: &str, service: &str) -> Vec<String> {
    answers(server.dns, Over::Tcp, &name(namespace, service), RecordType::A)
}

/// Asks DNS for one name again and again while something else goes wrong.
pub(super) struct Steady {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(usize, Duration)>,
}

impl Steady {
    /// The service `first` of [`make_namespace`].
    pub(super) fn start(dns: SocketAddr, namespace: &str) -> Self {
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
    pub(super) fn end(self) {
        self.stop.store(true, SeqCst);
        let (asked, slowest) = self.thread.join().expect("every answer was right");
        println!("{asked} questions meanwhile, the slowest answer after {slowest:?}");
        assert!(asked > 0 && slowest < Duration::from_secs(2), "{asked} questions, {slowest:?}");
    }
}
