//! A request of a former writer that is carried out late: what it says and nobody else knew is merged, not overwritten.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hickory_proto::rr::RecordType;
use serde_json::{Value, json};

use super::{
    ClusterLock, MirrorHarness, dns_name, every_slice, make_namespace, resolve, serve_by, slice_path, slices,
    wait_for_addresses,
};
use crate::support::{
    cluster::{Cluster, Who},
    dns::{Over, answers},
    http,
    proxy::{Call, Fault, Proxy},
    stream::Stream,
    wait_until,
};

const INSTANCES: &str = "gangplank.dev/instances";
const TOMBSTONES: &str = "gangplank.dev/tombstones";
const TERM: &str = "gangplank.dev/term";

/// The stamp of a word that the former writer said so long ago.
fn ago(term: u64, time: Duration) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    json!([u64::try_from((now - time).as_micros()).expect("fits"), term, 1_700_000_000])
}

/// Adds an entry to an annotation that is JSON.
fn add(slice: &mut Value, annotation: &str, key: &str, entry: Value) {
    let text = slice["metadata"]["annotations"][annotation].as_str().expect("it is there");
    let mut entries: Value = serde_json::from_str(text).expect("JSON");
    entries[key] = entry;
    slice["metadata"]["annotations"][annotation] = entries.to_string().into();
}

/// The slice as the writer of the term before would have written it. Returns that term.
fn of_the_term_before(slice: &mut Value) -> u64 {
    let term: u64 = slice["metadata"]["annotations"][TERM].as_str().expect("it is there").parse().expect("a number");
    slice["metadata"]["annotations"][TERM] = (term - 1).to_string().into();
    term - 1
}

/// Adds an instance with this age to a slice.
fn add_instance(slice: &mut Value, address: &str, term: u64, age: Duration) {
    let mut endpoint = slice["endpoints"][0].clone();
    endpoint["addresses"] = json!([address]);
    if endpoint["hostname"].is_string() {
        endpoint["hostname"] = address.replace('.', "-").into();
    }
    slice["endpoints"].as_array_mut().expect("a list").push(endpoint);
    add(slice, INSTANCES, address, json!({ "registered": 1_700_000_000_000_u64, "stamp": ago(term, age) }));
}

/// Carries out the request of the former writer.
fn carry_out(cluster: &Cluster, namespace: &str, slice: &Value, creates: bool) {
    let mut slice = slice.clone();
    let meta = slice["metadata"].as_object_mut().expect("an object");
    for field in ["resourceVersion", "uid", "creationTimestamp", "generation", "managedFields"] {
        meta.remove(field);
    }
    let name = meta["name"].as_str().expect("it has one").to_owned();
    let (method, path, done) =
        if creates { ("POST", slice_path(namespace, ""), 201) } else { ("PUT", slice_path(namespace, &name), 200) };
    let (status, said) = cluster.request(Who::Admin, method, &path, Some(&slice)).expect("the API server runs");
    assert_eq!(status, done, "{said}");
}

fn only(slices: Vec<Value>) -> Value {
    <[Value; 1]>::try_from(slices).map(|[slice]| slice).expect("one slice")
}

const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn late_write_that_the_watch_shows_is_merged_by_its_stamps() {
    const SPACE: &str = "late-watched";
    let Some((mut harness, proxy)) = MirrorHarness::behind_a_proxy() else { return };
    let cluster = harness.cluster;
    let mut stream = Stream::open(harness.server.grpc);
    make_namespace(cluster, &mut stream, SPACE);
    assert_eq!(stream.register(SPACE, "web", "10.20.0.1").0, 201);
    let mut late = only(slices(cluster, SPACE, "web"));
    let term = of_the_term_before(&mut late);

    // Accepted by the former writer with 202, and known to nobody else; and one that is older than removals are remembered.
    add_instance(&mut late, "10.20.0.2", term, MINUTE);
    let word = late.clone();
    add_instance(&mut late, "10.20.0.5", term, 25 * 60 * MINUTE);
    carry_out(cluster, SPACE, &late, false);
    let two = ["10.20.0.1", "10.20.0.2"];
    wait_until("it is answered", || (resolve(&harness.server, SPACE, "web") == two).then_some(()));
    wait_for_addresses(cluster, SPACE, "web", &two);
    let merged = only(slices(cluster, SPACE, "web"));
    assert_ne!(merged["metadata"]["annotations"][TERM], late["metadata"]["annotations"][TERM], "written again");
    let stamp = |slice: &Value| {
        let text = slice["metadata"]["annotations"][INSTANCES].as_str().expect("it is there");
        serde_json::from_str::<Value>(text).expect("JSON")["10.20.0.2"]["stamp"].clone()
    };
    assert_eq!(stamp(&merged), stamp(&word), "it keeps its stamp");
    assert!(harness.metric("gangplank_registry_refused_words_total") >= 1.0);

    // It is in the journal: a start that reaches nobody answers it.
    let away = proxy.inject(Fault::Drop, |_| true);
    drop(stream);
    harness.server = harness.server.restart();
    assert_eq!(resolve(&harness.server, SPACE, "web"), two);
    away.lift();
    let mut stream = Stream::open(harness.server.grpc);
    wait_until("it writes", || (stream.register(SPACE, "web", "10.20.0.1").0 == 200).then_some(()));
    assert_eq!(stream.remove(SPACE, "web", "10.20.0.2").0, 204);

    // The same request again: it is older than the removal.
    carry_out(cluster, SPACE, &word, false);
    wait_for_addresses(cluster, SPACE, "web", &two[..1]);
    assert_eq!(resolve(&harness.server, SPACE, "web"), &two[..1]);

    // Its removals count, too.
    let is_of_tombstones = |slice: &Value| slice["metadata"]["annotations"][TOMBSTONES].is_string();
    let mut removals =
        every_slice(cluster, SPACE, "web").into_iter().find(is_of_tombstones).expect("one is remembered");
    let term = of_the_term_before(&mut removals);
    add(&mut removals, TOMBSTONES, "10.20.0.1:8080", ago(term, Duration::ZERO));
    carry_out(cluster, SPACE, &removals, false);
    wait_for_addresses(cluster, SPACE, "web", &[]);
    assert_eq!(resolve(&harness.server, SPACE, "web"), Vec::<String>::new());
}

/// The watch is behind: a write of the mirror meets the late one.
#[test]
fn late_write_that_the_mirror_meets_is_merged_before_it_is_replaced() {
    const SPACE: &str = "late-met";
    let Some(lock) = ClusterLock::take() else { return };
    let cluster = lock.cluster;
    let proxy = Proxy::start(cluster);
    let harness =
        MirrorHarness { server: serve_by(proxy.kubeconfig(), &["--service-linger", "0s"]), cluster, _lock: lock };
    let mut stream = Stream::open(harness.server.grpc);
    make_namespace(cluster, &mut stream, SPACE);
    for (service, address) in [("web", "10.21.0.1"), ("gone", "10.21.0.2"), ("lost", "10.21.0.3")] {
        assert_eq!(stream.register(SPACE, service, address).0, 201);
    }
    let [mut web, mut gone, mut lost] = ["web", "gone", "lost"].map(|service| only(slices(cluster, SPACE, service)));
    assert_eq!(stream.remove(SPACE, "gone", "10.21.0.2").0, 204);
    wait_until("the slice is gone", || slices(cluster, SPACE, "gone").is_empty().then_some(()));
    let answered = |service: &str| answers(harness.server.dns, Over::Udp, &dns_name(SPACE, service), RecordType::A);

    let is_update = |call: &Call| call.is("update", "endpointslices") && call.namespace == SPACE;
    let silent = proxy.inject(Fault::Stall, |call| call.is("watch", "endpointslices"));
    // 409 for a PUT.
    let term = of_the_term_before(&mut web);
    add_instance(&mut web, "10.21.0.11", term, MINUTE);
    carry_out(cluster, SPACE, &web, false);
    proxy.forget_calls();
    assert_eq!(stream.register(SPACE, "web", "10.21.0.21").0, 201);
    assert!(proxy.count(|call| is_update(call) && call.status == Some(409)) >= 1, "{:?}", proxy.calls());
    assert_eq!(answered("web"), ["10.21.0.1", "10.21.0.11", "10.21.0.21"]);
    wait_for_addresses(cluster, SPACE, "web", &["10.21.0.1", "10.21.0.11", "10.21.0.21"]);

    // 409 for a POST. The instance that the slice held before was removed since.
    of_the_term_before(&mut gone);
    add_instance(&mut gone, "10.21.0.12", term, MINUTE);
    gone["metadata"].as_object_mut().expect("an object").remove("ownerReferences");
    carry_out(cluster, SPACE, &gone, true);
    assert_eq!(stream.register(SPACE, "gone", "10.21.0.22").0, 201);
    assert_eq!(answered("gone"), ["10.21.0.12", "10.21.0.22"]);
    wait_for_addresses(cluster, SPACE, "gone", &["10.21.0.12", "10.21.0.22"]);

    // A PUT without an answer, and the late write before it is read again.
    let unknown = proxy.inject(Fault::Drop, is_update);
    let registered = stream.register(SPACE, "lost", "10.21.0.23").0;
    assert_eq!(registered, 202);
    of_the_term_before(&mut lost);
    add_instance(&mut lost, "10.21.0.13", term, MINUTE);
    carry_out(cluster, SPACE, &lost, false);
    unknown.lift();
    wait_for_addresses(cluster, SPACE, "lost", &["10.21.0.13", "10.21.0.23", "10.21.0.3"]);
    assert_eq!(answered("lost"), ["10.21.0.13", "10.21.0.23", "10.21.0.3"]);
    silent.lift();
}

/// Another process may have the Lease, and this one may not know it; or a hand did it.
#[test]
fn slice_of_a_higher_term_deposes_the_writer_until_its_own_is_higher() {
    const SPACE: &str = "higher-term";
    let Some((harness, proxy)) = MirrorHarness::behind_a_proxy() else { return };
    let cluster = harness.cluster;
    make_namespace(cluster, &mut Stream::open(harness.server.grpc), SPACE);
    let register = |address: &str| Stream::open(harness.server.grpc).register(SPACE, "web", address).0;
    assert_eq!(register("10.23.0.1"), 201);
    let mut slice = only(slices(cluster, SPACE, "web"));
    let term = |slice: &Value| -> u64 {
        slice["metadata"]["annotations"][TERM].as_str().expect("it is there").parse().expect("a number")
    };
    let higher = term(&slice) + 5;
    slice["metadata"]["annotations"][TERM] = higher.to_string().into();
    let takes = || http::get(harness.server.admin, "/readyz/registrations").0 == 200;

    // It cannot learn who has the Lease, and holds it safely for some seconds more.
    let silent = proxy.inject(Fault::Drop, |call| call.resource == "leases");
    carry_out(cluster, SPACE, &slice, false);
    wait_until("it takes no registrations", || (!takes()).then_some(()));
    assert_eq!(register("10.23.0.2"), 503);
    assert_eq!(term(&only(slices(cluster, SPACE, "web"))), higher, "it is left alone");
    assert_eq!(resolve(&harness.server, SPACE, "web"), ["10.23.0.1"]);
    let said = harness.server.stderr();
    assert!(said.contains("a slice has a higher term than this process"), "{said}");

    // The Lease names it: nobody else has written.
    silent.lift();
    wait_until("it writes again", || takes().then_some(()));
    assert_eq!(register("10.23.0.2"), 201);
    wait_for_addresses(cluster, SPACE, "web", &["10.23.0.1", "10.23.0.2"]);
    assert!(term(&only(slices(cluster, SPACE, "web"))) > higher);
}
