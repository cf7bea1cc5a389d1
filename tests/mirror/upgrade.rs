//! From a version that knows neither the Lease nor stamps, and back, as `docs/kubernetes.md` says.
//!
//! `tests/fixtures/unstamped` holds what such a version left: a data directory, and the objects of its namespace. With
//! `GANGPLANK_OLD_BINARY`, a binary of that version (commit 2510dac), the whole way is gone with it; `GANGPLANK_FIXTURE` then
//! names the directory for a new fixture.

use std::{
    collections::HashMap,
    env, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use hickory_proto::rr::RecordType;
use serde_json::Value;
use tempfile::TempDir;

use super::{
    addresses, dns_name, every_slice, make_namespace, private_cluster_lock, replica::Replica, service_path, slice_path,
    wait_for_addresses,
};
use crate::support::{
    cluster::{Cluster, Who},
    dns::{Over, answers},
    proxy::{Fault, Proxy},
    server::Process,
    stream::Stream,
    tools::ROOT,
    wait_until,
};

const NAMESPACE: &str = "before";

/// Instances of `many`: more than fit into one slice.
const MANY: usize = 120;

/// What the old version has acknowledged of `web`, and what of that Kubernetes has.
const ACKNOWLEDGED: [&str; 3] = ["10.80.0.1", "10.80.0.2", "10.80.0.4"];
const MIRRORED: [&str; 3] = ["10.80.0.1", "10.80.0.2", "10.80.0.3"];

fn empty() -> TempDir {
    TempDir::new().expect("a temporary directory can be made")
}

fn a(dns: SocketAddr, service: &str) -> Vec<String> {
    answers(dns, Over::Tcp, &dns_name(NAMESPACE, service), RecordType::A)
}

/// The first start of a version with the Lease finds none.
fn delete_lease(cluster: &Cluster) {
    cluster.kubectl(&["delete", "lease", "gangplank-writer", "-n", "gangplank", "--ignore-not-found"]);
}

/// Starts a process that has to wait for a new Lease, and waits until everything is compared and written.
fn upgraded(kubeconfig: &Path, data: TempDir) -> Replica {
    settled(Replica::start(kubeconfig, data))
}

fn settled(new: Replica) -> Replica {
    wait_until("it has the Lease and has read the slices", || {
        new.stderr().contains("this process writes").then_some(())
    });
    new.wait_until_it_writes();
    wait_until("everything is mirrored", || {
        let of = |series| new.metric(series);
        (of("gangplank_mirror_services_behind") == 0.0 && of("gangplank_registry_outbox_words") == 0.0).then_some(())
    });
    new
}

/// DNS and slices have this of `web`, and all of `many`.
fn holds(cluster: &Cluster, replica: &Replica, web: &[&str]) {
    assert_eq!(a(replica.dns, "web"), web);
    assert_eq!(a(replica.dns, "many").len(), MANY);
    wait_for_addresses(cluster, NAMESPACE, "web", web);
    assert_eq!(addresses(cluster, NAMESPACE, "many").len(), MANY);
}

/// The annotation of every slice of `web`.
fn annotations(cluster: &Cluster, key: &str) -> Vec<String> {
    let slices = every_slice(cluster, NAMESPACE, "web");
    slices.iter().filter_map(|slice| slice["metadata"]["annotations"][key].as_str().map(str::to_owned)).collect()
}

/// A cluster with the objects of the fixture.
fn cluster_of_fixture() -> Option<Cluster> {
    let cluster = Cluster::private()?;
    cluster.create_namespace(NAMESPACE);
    let objects = fs::read_to_string(fixture().join("objects.json")).expect("it is in the repository");
    let objects: Value = serde_json::from_str(&objects).expect("JSON");
    let mut uids: HashMap<String, Value> = HashMap::new();
    for object in objects["items"].as_array().expect("a list").iter().cloned() {
        let mut object = object;
        let is_service = object["kind"] == "Service";
        let metadata = object["metadata"].as_object_mut().expect("it has metadata");
        for key in ["uid", "resourceVersion", "managedFields", "creationTimestamp"] {
            metadata.remove(key);
        }
        let name = metadata["name"].as_str().expect("a name").to_owned();
        // The list has Services first.
        if let Some(owner) = metadata.get_mut("ownerReferences").map(|owners| &mut owners[0]) {
            owner["uid"] = uids[owner["name"].as_str().expect("a name")].clone();
        }
        let path = if is_service { service_path(NAMESPACE, "") } else { slice_path(NAMESPACE, "") };
        let (status, created) = cluster.request(Who::Admin, "POST", &path, Some(&object)).expect("it runs");
        assert_eq!(status, 201, "{created}");
        if is_service {
            uids.insert(name, created["metadata"]["uid"].clone());
        }
    }
    assert_eq!(addresses(&cluster, NAMESPACE, "web"), MIRRORED);
    Some(cluster)
}

fn fixture() -> PathBuf {
    Path::new(ROOT).join("tests/fixtures/unstamped")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for file in fs::read_dir(from).expect("a directory") {
        let file = file.expect("an entry");
        if file.file_name() != "LOCK" {
            fs::copy(file.path(), to.join(file.file_name())).expect("copied");
        }
    }
}

#[test]
fn directory_and_slices_without_stamps_are_taken() {
    let _lock = private_cluster_lock();
    let Some(cluster) = cluster_of_fixture() else { return };
    let data = empty();
    copy(&fixture().join("store"), data.path());
    let kubeconfig = cluster.kubeconfig_for_gangplank();
    delete_lease(&cluster);
    let new = Replica::start(&kubeconfig, data);
    // It waits for its new Lease, and serves what it has meanwhile.
    new.wait_until_it_writes();
    assert_eq!(a(new.dns, "web"), ACKNOWLEDGED);
    let early = new.register(NAMESPACE, "web", "10.80.0.6");
    println!("a registration while the Lease is awaited: {early}");
    let new = settled(new);
    assert_eq!(new.remove(NAMESPACE, "web", "10.80.0.6"), 204);
    holds(&cluster, &new, &ACKNOWLEDGED);
    assert_eq!(new.register(NAMESPACE, "web", "10.80.0.5"), 201);
    let instances = annotations(&cluster, "gangplank.dev/instances").concat();
    let instances: Value = serde_json::from_str(&instances).expect("one slice with endpoints");
    assert!(instances["10.80.0.1"]["stamp"].is_null(), "what is not said again gets no stamp: {instances}");
    assert!(instances["10.80.0.5"]["stamp"].is_array(), "{instances}");
    assert_eq!(new.remove(NAMESPACE, "web", "10.80.0.1"), 204);
    new.terminate();
    let again = upgraded(&kubeconfig, empty());
    holds(&cluster, &again, &["10.80.0.2", "10.80.0.4", "10.80.0.5"]);
}

#[test]
fn slices_without_stamps_are_taken_when_the_directory_is_lost() {
    let _lock = private_cluster_lock();
    let Some(cluster) = cluster_of_fixture() else { return };
    let kubeconfig = cluster.kubeconfig_for_gangplank();
    delete_lease(&cluster);
    let new = Replica::start(&kubeconfig, empty());
    assert_eq!(new.register(NAMESPACE, "web", "10.80.0.6"), 503);
    let new = settled(new);
    holds(&cluster, &new, &MIRRORED);
}

#[test]
fn version_without_stamps_is_upgraded_and_taken_back() {
    let Some(old) = env::var_os("GANGPLANK_OLD_BINARY").map(PathBuf::from) else { return };
    let Some(cluster) = Cluster::private() else { return };
    let proxy = Proxy::start(&cluster);
    let direct = cluster.kubeconfig_for_gangplank();
    let by = |kubeconfig: &Path| ["--kubeconfig".to_owned(), kubeconfig.to_str().expect("UTF-8").to_owned()];
    delete_lease(&cluster);
    let data = empty();
    let mut process = Process::serve_binary(&old, data.path(), &by(proxy.kubeconfig()));
    let (_, [grpc, dns, _]) = process.ready();
    let mut stream = Stream::open(grpc);
    make_namespace(&cluster, &mut stream, NAMESPACE);
    for address in MIRRORED {
        assert_eq!(stream.register(NAMESPACE, "web", address).0, 201);
    }
    (0..MANY).for_each(|n| assert_eq!(stream.register(NAMESPACE, "many", &format!("10.81.0.{n}")).0, 201));
    let lost = proxy.inject(Fault::Drop, |call| call.resource == "endpointslices" && call.is_write());
    assert_eq!(stream.register(NAMESPACE, "web", "10.80.0.4").0, 202);
    assert_eq!(stream.remove(NAMESPACE, "web", "10.80.0.3").0, 202);
    assert_eq!(a(dns, "web"), ACKNOWLEDGED);
    drop(stream);
    assert!(process.terminate().success());
    drop(lost);
    if let Some(to) = env::var_os("GANGPLANK_FIXTURE").map(PathBuf::from) {
        copy(data.path(), &to.join("store"));
        let objects = cluster.kubectl(&["get", "services,endpointslices", "-n", NAMESPACE, "-o", "json"]);
        fs::write(to.join("objects.json"), objects).expect("written");
    }
    let slept = empty();
    copy(data.path(), slept.path());

    let new = upgraded(&direct, data);
    holds(&cluster, &new, &ACKNOWLEDGED);
    assert_eq!(new.remove(NAMESPACE, "web", "10.80.0.2"), 204);
    assert_eq!(new.register(NAMESPACE, "web", "10.80.0.5"), 201);
    let data = new.terminate();
    assert_eq!(annotations(&cluster, "gangplank.dev/tombstones").len(), 1);

    // Back with the directory: refused.
    let mut back = Process::serve_binary(&old, data.path(), &by(&direct));
    assert!(!back.exit().success());
    assert!(back.stderr().contains("was written by a newer gangplank"), "{}", back.stderr());
    // With an empty one, and with one that slept: everything is read from the slices.
    for directory in [empty(), slept] {
        let mut back = Process::serve_binary(&old, directory.path(), &by(&direct));
        let (_, [_, dns, _]) = back.ready();
        assert_eq!(a(dns, "web"), ["10.80.0.1", "10.80.0.4", "10.80.0.5"]);
        wait_until("it has deleted the slice of removals", || {
            annotations(&cluster, "gangplank.dev/tombstones").is_empty().then_some(())
        });
        assert!(back.terminate().success());
    }
    let directory = empty();
    let mut back = Process::serve_binary(&old, directory.path(), &by(&direct));
    let (_, [grpc, ..]) = back.ready();
    let mut stream = Stream::open(grpc);
    assert_eq!(stream.register(NAMESPACE, "web", "10.80.0.6").0, 201);
    assert_eq!(stream.remove(NAMESPACE, "web", "10.80.0.1").0, 204);
    drop(stream);
    back.terminate();

    // Once more to the new version, on the directory that it had.
    let new = upgraded(&direct, data);
    holds(&cluster, &new, &["10.80.0.4", "10.80.0.5", "10.80.0.6"]);
}
