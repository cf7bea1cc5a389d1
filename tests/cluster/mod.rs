//! The control plane of the other tests: it is real and of the configured release, gangplank's account
//! has its rights and no others, and the proxy injects the faults that it is told to.

mod admission_policy;

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use hickory_proto::rr::RecordType;
use k8s_openapi::api::core::v1::Service;
use kube::{
    Api, Client, Config,
    api::PostParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};

use crate::support::{
    WAIT_TIMEOUT,
    cluster::{CONTEXT, Cluster, Who},
    coredns::CoreDns,
    dns::{Over, answers},
    proxy::{Fault, Proxy},
    tools::{self, ROOT},
    wait_until,
};

/// A headless Service, of ours if it carries the label.
fn service(name: &str, labels: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "labels": labels},
        "spec": {"clusterIP": "None", "ports": [{"name": "http", "port": 8080}]}})
}

/// A slice of the Service `web` with one address.
fn slice(name: &str, manager: &str, address: &str) -> Value {
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "labels": {
            "kubernetes.io/service-name": "web", "endpointslice.kubernetes.io/managed-by": manager,
            "service.kubernetes.io/headless": ""}},
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]})
}

fn owned() -> Value {
    json!({"gangplank.dev/service": "owned"})
}

fn services(namespace: &str) -> String {
    format!("/api/v1/namespaces/{namespace}/services")
}

fn slices(namespace: &str) -> String {
    format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices")
}

/// A request of gangplank's account: status code and message.
fn gangplank(cluster: &Cluster, method: &str, path: &str, body: Option<&Value>) -> (u16, String) {
    let (status, answer) = cluster.request(Who::Gangplank, method, path, body).expect("the API server runs");
    (status, answer["message"].as_str().unwrap_or_default().to_owned())
}

fn create(cluster: &Cluster, path: &str, object: &Value) -> Value {
    let (status, answer) = cluster.request(Who::Admin, "POST", path, Some(object)).expect("the API server runs");
    assert_eq!(status, 201, "{answer}");
    answer
}

#[test]
fn control_plane_runs_the_configured_release() {
    let Some(cluster) = Cluster::shared() else { return };
    let module = Path::new(ROOT).join("tests/tools/kubernetes").join(cluster.release()).join("go.mod");
    let module = fs::read_to_string(module).expect("the release has a module");
    let pinned =
        module.lines().find_map(|line| line.trim().strip_prefix("k8s.io/kubernetes ")).expect("it is required");
    assert_eq!(cluster.get_json("/version")["gitVersion"], pinned);
    let said = cluster.kubectl(&["version"]);
    assert_eq!(said.matches(pinned).count(), 2, "client and server: {said}");
    assert!(cluster.ca_pem().starts_with("-----BEGIN CERTIFICATE-----"));
    assert!(fs::read_to_string(cluster.kubeconfig_admin()).expect("a file").contains(&cluster.api_server_url()));
}

#[test]
fn service_account_has_the_rights_it_needs_and_no_others() {
    let Some(cluster) = Cluster::shared() else { return };
    let kubeconfig = cluster.kubeconfig_for_gangplank();
    let can = |verb: &str, resource: &str| {
        let said = cluster.kubectl_as(&kubeconfig, &["auth", "can-i", verb, resource, "--all-namespaces"], "");
        said.map_or_else(|said| !said.starts_with("no"), |said| said.starts_with("yes"))
    };
    // One review of all rules says more than a question for each; two questions show that both agree.
    assert!(can("update", "endpointslices.discovery.k8s.io") && !can("patch", "services"));
    let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": "default"}});
    let path = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews";
    let (status, review) = cluster.request(Who::Gangplank, "POST", path, Some(&review)).expect("the API server runs");
    assert_eq!(status, 201, "{review}");
    let mut rules: Vec<String> = review["status"]["resourceRules"]
        .as_array()
        .expect("a list of rules")
        .iter()
        .map(|rule| {
            let words = |key: &str| {
                let words = rule[key].as_array().into_iter().flatten().filter_map(Value::as_str);
                words.collect::<Vec<_>>().join(" ")
            };
            format!("{}/{}: {}", words("apiGroups"), words("resources"), words("verbs"))
        })
        // What every account may: ask about itself.
        .filter(|rule| !rule.starts_with("authorization.k8s.io/") && !rule.starts_with("authentication.k8s.io/"))
        .collect();
    rules.sort();
    assert_eq!(
        rules,
        [
            "/endpoints: get list watch create update delete",
            "/namespaces: list watch",
            "/services: get list watch create update delete",
            "discovery.k8s.io/endpointslices: get list watch create update delete",
            "events.k8s.io/events: create patch",
            "networking.k8s.io/servicecidrs: list watch",
        ]
    );
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"},
        "spec": {"containers": [{"name": "one", "image": "none"}]}});
    let (status, said) = gangplank(cluster, "POST", "/api/v1/namespaces/default/pods", Some(&pod));
    assert_eq!(status, 403, "{said}");
    assert!(said.contains("cannot create resource \"pods\""), "{said}");
    // Those of its own namespace, with a CA of its own; no others.
    for (path, wanted) in [("/api/v1/secrets", 403), ("/api/v1/namespaces/kube-system/secrets", 403)] {
        let (status, said) = gangplank(cluster, "GET", path, None);
        assert_eq!(status, wanted, "{path}: {said}");
    }
    let (status, said) = gangplank(cluster, "GET", "/api/v1/namespaces/gangplank/secrets", None);
    assert_eq!(status, 200, "{said}");
}

#[test]
fn coredns_kubernetes_plugin_answers_from_the_cluster() {
    let (Some(cluster), Some(program)) = (Cluster::shared(), tools::require("coredns")) else { return };
    cluster.create_namespace("plugin");
    create(cluster, &services("plugin"), &service("web", &owned()));
    create(cluster, &slices("plugin"), &slice("web-1", "gangplank.dev", "10.0.0.1"));
    let coredns = CoreDns::with_kubernetes(&program, &cluster.kubeconfig_admin(), CONTEXT);
    let ask = |name: &str, rtype| answers(coredns.address, Over::Udp, name, rtype);
    let a = || ask("web.plugin.svc.cluster.local.", RecordType::A);
    wait_until("CoreDNS has the Service", || (a() == ["10.0.0.1"]).then_some(()));
    assert_eq!(
        ask("_http._tcp.web.plugin.svc.cluster.local.", RecordType::SRV),
        ["0 100 8080 10-0-0-1.web.plugin.svc.cluster.local."]
    );
    assert_eq!(ask("1.0.0.10.in-addr.arpa.", RecordType::PTR), ["10-0-0-1.web.plugin.svc.cluster.local."]);
    create(cluster, &slices("plugin"), &slice("web-2", "gangplank.dev", "10.0.0.2"));
    wait_until("CoreDNS has the second slice", || (a() == ["10.0.0.1", "10.0.0.2"]).then_some(()));
}

#[test]
fn api_server_keeps_its_state_across_a_restart() {
    let Some(mut cluster) = Cluster::private() else { return };
    let url = cluster.api_server_url();
    cluster.create_namespace("prod");
    let before = create(&cluster, &services("prod"), &service("web", &owned()));
    let kubeconfig = cluster.kubeconfig_for_gangplank();
    for stop in [Cluster::stop_api_server, Cluster::kill_api_server] {
        let pid = cluster.api_server_pid();
        stop(&mut cluster);
        cluster.request(Who::Admin, "GET", "/readyz", None).expect_err("nobody listens");
        cluster.start_api_server();
        assert_ne!(cluster.api_server_pid(), pid);
        assert_eq!((cluster.api_server_url(), &cluster.get_json(&(services("prod") + "/web"))), (url.clone(), &before));
        // The account's token outlives the server, too.
        let seen = cluster.kubectl_as(&kubeconfig, &["get", "services", "-n", "prod", "-o", "name"], "");
        assert_eq!(seen.as_deref(), Ok("service/web\n"));
    }
    cluster.pause_api_server();
    let limited = ["get", "--raw=/readyz", "--request-timeout=1s"];
    cluster.kubectl_as(&cluster.kubeconfig_admin(), &limited, "").expect_err("it says nothing");
    cluster.resume_api_server();
    assert_eq!(cluster.kubectl(&["get", "--raw=/readyz"]), "ok");
}

#[test]
fn controllers_collect_garbage_and_end_namespaces() {
    let Some(cluster) = Cluster::private() else { return };
    let cluster = cluster.with_controllers();
    cluster.create_namespace("gone");
    let owner = create(&cluster, &services("gone"), &service("web", &owned()));
    let mut slice = slice("web-1", "gangplank.dev", "10.0.0.1");
    let uid = &owner["metadata"]["uid"];
    slice["metadata"]["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "Service", "name": "web", "uid": uid}]);
    create(&cluster, &slices("gone"), &slice);
    cluster.kubectl(&["delete", "service", "web", "--namespace=gone"]);
    let absent = |path: &str| match cluster.request(Who::Admin, "GET", path, None) {
        Ok((404, _)) => Some(()),
        _ => None,
    };
    wait_until("the slice follows its Service", || absent(&(slices("gone") + "/web-1")));
    cluster.kubectl(&["delete", "namespace", "gone", "--wait=false"]);
    wait_until("the namespace is gone", || absent("/api/v1/namespaces/gone"));
}

#[test]
fn proxy_forwards_and_counts_requests() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.create_namespace("proxied");
    let proxy = Proxy::start(cluster);
    assert!(fs::read_to_string(proxy.kubeconfig()).expect("a file").contains(&proxy.url()));
    let kubectl = |arguments: &[&str], stdin: &str| cluster.kubectl_as(proxy.kubeconfig(), arguments, stdin);
    let web = service("web", &owned()).to_string();
    kubectl(&["create", "--namespace=proxied", "-f", "-"], &web).expect("it is created");
    let replaced = slice("web-1", "gangplank.dev", "10.0.0.1").to_string();
    kubectl(&["create", "--namespace=proxied", "-f", "-"], &replaced).expect("it is created");
    kubectl(&["replace", "--namespace=proxied", "-f", "-"], &replaced).expect("it is replaced");
    // What the API server refuses comes through as it said it.
    let said = kubectl(&["get", "pods", "--namespace=proxied"], "").expect_err("it is forbidden");
    assert!(said.contains("cannot list resource \"pods\""), "{said}");
    let one = |verb, resource| proxy.count(|call| call.is(verb, resource) && call.namespace == "proxied") == 1;
    assert!(one("create", "services") && one("update", "endpointslices") && one("list", "pods"), "{:?}", proxy.calls());
    let update = proxy.calls().into_iter().find(|call| call.verb == "update").expect("it was counted");
    assert_eq!((update.name.as_str(), update.status), ("web-1", Some(200)), "{}", update.path);
    assert!(update.at < Instant::now());
    assert_eq!(proxy.count(|call| call.is_write() && !call.resource.starts_with("selfsubject")), 3);
    proxy.forget_calls();
    assert_eq!(proxy.calls(), []);
}

#[test]
fn proxy_injects_refusals_drops_and_hangs() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.create_namespace("faults");
    let proxy = Proxy::start(cluster);
    let path = format!("{}/web", services("faults"));
    let kubectl = |arguments: &[&str]| cluster.kubectl_as(proxy.kubeconfig(), arguments, "");
    // kubectl itself obeys Retry-After, so that a refusal costs it a second and it gets through.
    let hurry = proxy.inject_first(1, Fault::answer(429).retry_after(1), |call| call.path == "/version");
    let begun = Instant::now();
    assert!(kubectl(&["get", "--raw=/version"]).expect("the second attempt passes").contains("gitVersion"));
    assert!(begun.elapsed().as_secs() >= 1 && hurry.hits() == 1, "{hurry:?} after {:?}", begun.elapsed());
    assert_eq!(proxy.calls().iter().map(|call| call.status).collect::<Vec<_>>(), [Some(429), Some(200)]);
    // Refusals that reach nobody.
    for (code, reason) in [(409, "Conflict"), (410, "Expired"), (500, "InternalError"), (503, "ServiceUnavailable")] {
        let refused = proxy.inject(Fault::answer(code), |call| call.is("create", "services"));
        let said = create_through(cluster, &proxy, "web").expect_err("it is refused");
        assert!(said.contains(reason), "{said}");
        refused.lift();
    }
    assert!(!exists(cluster, &path));
    // Dropped before it was carried out, and after.
    let dropped = proxy.inject_first(1, Fault::Drop, |call| call.is("create", "services"));
    create_through(cluster, &proxy, "web").expect_err("the connection closes");
    assert_eq!((dropped.hits(), exists(cluster, &path)), (1, false));
    proxy.inject_first(1, Fault::DropAfter, |call| call.is("create", "services"));
    create_through(cluster, &proxy, "web").expect_err("the connection closes");
    assert!(exists(cluster, &path), "it was carried out all the same");
    // The same for answers that never come.
    for (fault, name, done) in [(Fault::Hang, "hung", false), (Fault::HangAfter, "lost", true)] {
        let path = format!("{}/{name}", services("faults"));
        let injected = proxy.inject(fault, |call| call.is("create", "services"));
        thread::scope(|scope| {
            let asking = scope.spawn(|| create_through(cluster, &proxy, name));
            injected.wait_hits(1);
            if done {
                wait_until("it is carried out", || exists(cluster, &path).then_some(()));
            }
            assert!(!asking.is_finished(), "nobody answers");
            injected.lift();
            asking.join().expect("it does not panic").expect_err("the connection closes without an answer");
        });
        assert_eq!((injected.hits(), exists(cluster, &path)), (1, done));
    }
}

/// Creates a Service by way of the proxy, and says what kubectl said.
fn create_through(cluster: &Cluster, proxy: &Proxy, name: &str) -> Result<String, String> {
    let arguments = ["create", "--namespace=faults", "--validate=false", "-f", "-"];
    cluster.kubectl_as(proxy.kubeconfig(), &arguments, &service(name, &owned()).to_string())
}

fn exists(cluster: &Cluster, path: &str) -> bool {
    let (status, answer) = cluster.request(Who::Admin, "GET", path, None).expect("the API server runs");
    assert!(matches!(status, 200 | 404), "{answer}");
    status == 200
}

#[test]
fn kube_client_works_through_the_proxy_and_gets_its_faults() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.create_namespace("client");
    create(cluster, &services("client"), &service("web", &owned()));
    let proxy = Proxy::start(cluster);
    let refused = proxy.inject_first(1, Fault::answer(409), |call| call.is("update", "services"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
    runtime.block_on(async {
        let kubeconfig = Kubeconfig::read_from(proxy.kubeconfig()).expect("a kubeconfig");
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
        let client = Client::try_from(config.expect("it has a context")).expect("TLS can be set up");
        let api: Api<Service> = Api::namespaced(client, "client");
        let web = api.get("web").await.expect("it is there");
        let params = PostParams::default();
        let replace = || api.replace("web", &params, &web);
        let error = replace().await.expect_err("the first is refused");
        assert!(matches!(&error, kube::Error::Api(status) if status.is_conflict()), "{error}");
        replace().await.expect("the second passes");
    });
    assert_eq!(refused.hits(), 1);
}

#[test]
fn proxy_streams_watches_and_injects_their_faults() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.create_namespace("watched");
    let proxy = Proxy::start(cluster);
    let path = format!("{}?watch=true", services("watched"));
    let watch = || Watch::start(cluster, &proxy, &path);
    let add = |name: &str| create(cluster, &services("watched"), &service(name, &owned()));
    let seen = watch();
    add("one");
    assert_eq!(seen.next().as_deref(), Some("ADDED one"));
    // Silence, on a watch that runs already; what was held back comes later.
    let stalled = proxy.inject(Fault::Stall, |call| call.verb == "watch");
    add("two");
    stalled.wait_hits(1);
    assert!(seen.is_quiet());
    stalled.lift();
    assert_eq!(seen.next().as_deref(), Some("ADDED two"));
    assert_eq!(proxy.count(|call| call.is("watch", "services") && call.namespace == "watched"), 1);
    // Every connection closes.
    proxy.drop_connections();
    assert_eq!(seen.next(), None);
    // 410 in the middle of a watch.
    let expired = proxy.inject_first(1, Fault::ErrorEvent(410), |call| call.verb == "watch");
    let seen = watch();
    assert_eq!(seen.next().as_deref(), Some("ERROR Expired"));
    assert_eq!((seen.next(), expired.hits()), (None, 1));
    // The next one passes, from the beginning.
    let seen = watch();
    let mut all = [seen.next(), seen.next()].map(Option::unwrap_or_default);
    all.sort();
    assert_eq!(all, ["ADDED one", "ADDED two"]);
}

/// A watch that kubectl keeps open, until it is dropped.
struct Watch {
    kubectl: Child,
    events: Receiver<String>,
}

impl Watch {
    fn start(cluster: &Cluster, proxy: &Proxy, path: &str) -> Self {
        let mut command = cluster.kubectl_command(proxy.kubeconfig());
        command.args(["get", "--raw", path]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut kubectl = command.spawn().expect("kubectl can be run");
        let lines = BufReader::new(kubectl.stdout.take().expect("stdout is piped")).lines();
        let (sender, events) = mpsc::channel();
        // Ends with kubectl's end of the pipe.
        thread::spawn(move || {
            let events = lines.map_while(Result::ok).map(|line| {
                let event: Value = serde_json::from_str(&line).expect("an event a line");
                let object = &event["object"];
                let what = object["metadata"]["name"].as_str().or_else(|| object["reason"].as_str());
                format!("{} {}", event["type"].as_str().unwrap_or_default(), what.unwrap_or_default())
            });
            for event in events {
                let _ = sender.send(event);
            }
        });
        Self { kubectl, events }
    }

    /// The next event; `None` if the watch ends instead.
    fn next(&self) -> Option<String> {
        match self.events.recv_timeout(WAIT_TIMEOUT) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("the watch neither says anything nor ends"),
        }
    }

    /// Whether it stays open and says nothing for a moment.
    fn is_quiet(&self) -> bool {
        self.events.recv_timeout(Duration::from_millis(200)) == Err(RecvTimeoutError::Timeout)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.kubectl.kill();
        let _ = self.kubectl.wait();
    }
}
