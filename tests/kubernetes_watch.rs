//! Objects in Kubernetes are restored at the start and watched from then on, through outages of the
//! API server and faults of the watches.

use std::time::Duration;

use hickory_proto::rr::RecordType;
use serde_json::{Value, json};

use crate::support::{
    cluster::{Cluster, Who},
    dns::{Over, answers},
    http,
    proxy::{Call, Fault, Proxy},
    server::Server,
    wait_until,
};

/// Makes an object in the namespace `prod`, as the administrator.
fn create(cluster: &Cluster, path: &str, object: &Value) {
    let created = cluster.request(Who::Admin, "POST", path, Some(object)).expect("the API server runs");
    assert_eq!(created.0, 201, "{}", created.1);
}

const SERVICES: &str = "/api/v1/namespaces/prod/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/prod/endpointslices";

/// The answer to a registration.
const ABSENT: &str = "does not exist in Kubernetes";
const FOREIGN: &str = "is not managed by gangplank";

/// A headless Service; `label` says what gangplank is to it.
fn service(name: &str, label: Option<&str>) -> Value {
    let labels = label.map(|value| match value {
        // As gangplank itself makes it.
        "owned" => json!({ "gangplank.dev/service": value, "service-type": "external" }),
        _ => json!({ "gangplank.dev/service": value }),
    });
    json!({ "metadata": { "name": name, "labels": labels }, "spec": { "clusterIP": "None" } })
}

/// A slice of `service`.
fn slice(service: &str, name: &str, manager: &str, addresses: &[&str]) -> Value {
    let endpoint = |address| json!({ "addresses": [address], "conditions": { "ready": true } });
    json!({
        "metadata": {
            "name": name,
            "labels": {
                "kubernetes.io/service-name": service, "endpointslice.kubernetes.io/managed-by": manager,
            },
            "annotations": { "gangplank.dev/term": "7", "gangplank.dev/generation": "9" },
        },
        "addressType": "IPv4",
        "endpoints": addresses.iter().map(endpoint).collect::<Vec<_>>(),
        "ports": [{ "name": "http", "port": 80, "protocol": "TCP" }],
    })
}

fn addresses(server: &Server, service: &str) -> Vec<String> {
    answers(server.dns, Over::Udp, &format!("{service}.prod.svc.cluster.local."), RecordType::A)
}

fn wait_addresses(server: &Server, service: &str, wanted: &[&str]) {
    wait_until(&format!("{service} is {wanted:?}"), || (addresses(server, service) == wanted).then_some(()));
}

/// Registers until it succeeds, or until it is refused with `refusal`.
fn wait_registration(server: &Server, namespace: &str, service: &str, refusal: Option<&str>) {
    let mut said = String::new();
    let what = format!("registering {namespace}/{service}: {refusal:?}");
    wait_until(&what, || {
        let output = server.run(&["register", service, "10.9.9.9", "--port", "80", "-n", namespace]);
        let now = String::from_utf8_lossy(&[&*output.stdout, &*output.stderr].concat()).into_owned();
        if now != said {
            eprintln!("{now}");
            said = now;
        }
        let done = match refusal {
            Some(refusal) => said.contains(refusal),
            None => output.status.success(),
        };
        done.then_some(())
    });
}

fn metric(server: &Server, line: &str) -> Option<u64> {
    let (_, text) = http::get(server.admin, "/metrics");
    let value = text.lines().find_map(|said| said.strip_prefix(line))?;
    Some(value.trim().parse().expect("a count"))
}

fn wait_metric(server: &Server, line: &str, value: u64) {
    wait_until(&format!("{line} {value}"), || (metric(server, line) == Some(value)).then_some(()));
}

fn wait_line(server: &Server, words: &str) {
    wait_until(&format!("the log says {words:?}"), || server.stderr().contains(words).then_some(()));
}

#[test]
fn existing_slices_are_restored_and_watched() {
    let Some(mut cluster) = Cluster::private() else { return };
    cluster.create_namespace("prod");
    cluster.create_namespace("doomed");
    create(&cluster, SERVICES, &service("web", Some("owned")));
    create(&cluster, SERVICES, &service("shop", Some("joined")));
    create(&cluster, SERVICES, &service("db", None));
    // Kubernetes takes 240/4, a registration does not.
    create(&cluster, SLICES, &slice("web", "web-0123456789", "gangplank.dev", &["10.0.0.1", "240.0.0.1"]));
    create(&cluster, SLICES, &slice("shop", "shop-a", "someone", &["10.1.0.1"]));

    let kubeconfig = cluster.kubeconfig_for_gangplank();
    let server = Server::start_with(&["--kubeconfig", kubeconfig.to_str().expect("UTF-8")]);
    wait_metric(&server, "gangplank_kubernetes_synced ", 1);
    wait_addresses(&server, "web", &["10.0.0.1"]);
    wait_line(&server, "prod/web: slice web-0123456789: 240.0.0.1: ");
    assert!(metric(&server, "gangplank_kubernetes_skipped_endpoints_total") >= Some(1));

    // Who may register what.
    wait_registration(&server, "nowhere", "web", Some(ABSENT));
    wait_registration(&server, "prod", "db", Some(FOREIGN));
    cluster.kubectl(&["delete", "service", "db", "-n", "prod"]);
    wait_registration(&server, "prod", "db", None);
    cluster.create_namespace("late");
    wait_registration(&server, "late", "web", None);
    wait_registration(&server, "doomed", "web", None);
    // There is no controller that would finish it.
    cluster.kubectl(&["delete", "namespace", "doomed", "--wait=false"]);
    wait_registration(&server, "doomed", "web2", Some(ABSENT));

    // Pods beside what is registered.
    wait_addresses(&server, "shop", &["10.1.0.1"]);
    create(&cluster, SLICES, &slice("shop", "shop-b", "someone", &["10.1.0.1", "10.1.0.2"]));
    wait_addresses(&server, "shop", &["10.1.0.1", "10.1.0.2"]);
    wait_metric(&server, "gangplank_kubernetes_watches{resource=\"joined\"}", 1);
    cluster.kubectl(&["label", "service", "shop", "-n", "prod", "gangplank.dev/service-"]);
    wait_addresses(&server, "shop", &[]);
    wait_metric(&server, "gangplank_kubernetes_watches{resource=\"joined\"}", 0);
    wait_registration(&server, "prod", "shop", Some(FOREIGN));
    cluster.kubectl(&["label", "service", "shop", "-n", "prod", "gangplank.dev/service=joined"]);
    wait_addresses(&server, "shop", &["10.1.0.1", "10.1.0.2"]);

    // The API server is killed, and comes back with a change that no watch saw.
    cluster.kill_api_server();
    wait_metric(&server, "gangplank_kubernetes_watches{resource=\"services\"}", 0);
    wait_line(&server, "names are answered as before");
    assert_eq!(addresses(&server, "shop"), ["10.1.0.1", "10.1.0.2"]);
    cluster.start_api_server();
    cluster.kubectl(&["delete", "endpointslice", "shop-a", "shop-b", "-n", "prod"]);
    create(&cluster, SLICES, &slice("shop", "shop-c", "someone", &["10.1.0.3"]));
    wait_addresses(&server, "shop", &["10.1.0.3"]);
    wait_line(&server, "answers again");
    for resource in ["namespaces", "services", "slices", "joined"] {
        wait_metric(&server, &format!("gangplank_kubernetes_watches{{resource=\"{resource}\"}}"), 1);
    }
    let warned = server.stderr().matches("names are answered as before").count();
    assert_eq!(warned, 1, "one line for all watches:\n{}", server.stderr());
}

#[test]
fn watches_survive_drops_expiry_and_silence() {
    let Some(cluster) = Cluster::private() else { return };
    cluster.create_namespace("prod");
    let proxy = Proxy::start(&cluster);
    let server = Server::start_with(&["--kubeconfig", proxy.kubeconfig().to_str().expect("UTF-8")]);
    wait_metric(&server, "gangplank_kubernetes_synced", 1);
    let lists = |resource: &'static str| proxy.count(move |call| call.is("list", resource));
    let restarts = |resource, reason| {
        let labels = format!("resource=\"{resource}\",reason=\"{reason}\"");
        format!("gangplank_kubernetes_watch_restarts_total{{{labels}}}")
    };
    wait_metric(&server, "gangplank_kubernetes_watches{resource=\"services\"}", 1);
    assert_eq!((lists("services"), lists("namespaces")), (1, 1));

    // A broken connection: the watch resumes, without a new list.
    proxy.drop_connections();
    create(&cluster, SERVICES, &service("one", None));
    wait_registration(&server, "prod", "one", Some(FOREIGN));
    assert_eq!((lists("services"), lists("namespaces")), (1, 1));

    // Expired: one list, however the API server reports it.
    proxy.inject_first(1, Fault::ErrorEvent(410), |call| call.is("watch", "services"));
    proxy.inject_first(1, Fault::answer(410), |call| call.is("watch", "namespaces"));
    proxy.drop_connections();
    wait_metric(&server, &restarts("services", "expired"), 1);
    wait_metric(&server, &restarts("namespaces", "expired"), 1);
    create(&cluster, SERVICES, &service("two", None));
    wait_registration(&server, "prod", "two", Some(FOREIGN));
    cluster.create_namespace("late");
    wait_registration(&server, "late", "web", None);
    assert_eq!((lists("services"), lists("namespaces")), (2, 2));

    // Accepted and never answered.
    proxy.inject_first(1, Fault::Hang, |call| call.is("watch", "services"));
    proxy.drop_connections();
    wait_metric(&server, &restarts("services", "silent"), 1);
    create(&cluster, SERVICES, &service("three", None));
    wait_registration(&server, "prod", "three", Some(FOREIGN));
    assert_eq!(lists("services"), 2);

    // A right is missing: a person must act.
    proxy.inject(Fault::answer(403), |call| call.is("watch", "services"));
    proxy.drop_connections();
    wait_line(&server, "does not let this account list and watch services");
    wait_metric(&server, &restarts("services", "forbidden"), 1);
    cluster.create_namespace("later");
    wait_registration(&server, "later", "web", None);
}

#[test]
fn joined_services_share_one_watch() {
    const JOINED: usize = 20;
    let Some(cluster) = Cluster::private() else { return };
    cluster.create_namespace("prod");
    cluster.create_namespace("stage");
    let proxy = Proxy::start(&cluster);
    let server = Server::start_with(&["--kubeconfig", proxy.kubeconfig().to_str().expect("UTF-8")]);
    wait_metric(&server, "gangplank_kubernetes_synced ", 1);
    let joined: Vec<String> = (0..JOINED).map(|at| format!("joined-{at}")).collect();
    for (at, name) in joined.iter().enumerate() {
        create(&cluster, SERVICES, &service(name, Some("joined")));
        create(&cluster, SLICES, &slice(name, &format!("{name}-a"), "someone", &[&format!("10.2.0.{at}")]));
    }
    // A Service of the same name elsewhere, which did not join.
    let elsewhere = slice("joined-0", "elsewhere", "someone", &["10.3.0.1"]);
    create(&cluster, "/apis/discovery.k8s.io/v1/namespaces/stage/endpointslices", &elsewhere);
    for (at, name) in joined.iter().enumerate() {
        wait_addresses(&server, name, &[&format!("10.2.0.{at}")]);
    }
    wait_metric(&server, "gangplank_kubernetes_watches{resource=\"joined\"}", 1);
    let of_others = |call: &Call| call.resource == "endpointslices" && call.path.contains("service-name");
    let lists = proxy.count(|call| call.verb == "list" && of_others(call));
    assert!(lists <= JOINED / 2, "{lists} lists for {JOINED} Services that joined one after the other");

    // Events of the shared watch, and a Service that leaves it.
    create(&cluster, SLICES, &slice("joined-0", "joined-0-b", "someone", &["10.2.1.0"]));
    wait_addresses(&server, "joined-0", &["10.2.0.0", "10.2.1.0"]);
    cluster.kubectl(&["label", "service", "joined-1", "-n", "prod", "gangplank.dev/service-"]);
    wait_addresses(&server, "joined-1", &[]);
    assert_eq!(addresses(&server, "joined-2"), ["10.2.0.2"]);
    wait_metric(&server, "gangplank_kubernetes_watches{resource=\"joined\"}", 1);
}

#[test]
fn retry_after_header_delays_the_next_list() {
    let Some(cluster) = Cluster::private() else { return };
    cluster.create_namespace("prod");
    let proxy = Proxy::start(&cluster);
    let busy = proxy.inject_first(1, Fault::answer(429).retry_after(4), |call| call.is("list", "services"));
    let server = Server::start_with(&["--kubeconfig", proxy.kubeconfig().to_str().expect("UTF-8")]);
    wait_metric(&server, "gangplank_kubernetes_synced ", 1);
    assert_eq!(busy.hits(), 1);
    let lists: Vec<_> =
        proxy.calls().into_iter().filter(|call| call.is("list", "services")).map(|call| call.at).collect();
    let waited = lists[1].duration_since(lists[0]);
    assert!(waited >= Duration::from_secs(4), "{waited:?}");
}
