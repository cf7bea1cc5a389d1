//! `gangplank check` against a real chain: a gangplank that mirrors into a real API server, and a real CoreDNS. First
//! everything is as it should be; then each fault in turn.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Command, Output, Stdio},
};

use hickory_proto::rr::RecordType;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    identity::pki::TestCa,
    mirror::ClusterLock,
    support::{
        cluster::{CONTEXT, Cluster, Who},
        coredns::CoreDns,
        dns::{Over, answers},
        free_ports, http, secrets,
        server::{BINARY, Process, Server},
        small_disk::SmallDisk,
        tools, wait_until,
    },
};

/// What one run found: its exit code, and the finding of each id.
#[derive(Debug)]
struct Found {
    code: Option<i32>,
    findings: BTreeMap<String, Value>,
}

impl Found {
    fn of(output: &Output) -> Self {
        let view: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|err| panic!("{err}: {}", String::from_utf8_lossy(&output.stderr)));
        let checks = view["checks"].as_array().expect("a list").iter();
        let findings = checks.map(|one| (one["id"].as_str().expect("an id").to_owned(), one.clone())).collect();
        Self { code: output.status.code(), findings }
    }

    fn result(&self, id: &str) -> &str {
        let finding = self.findings.get(id).unwrap_or_else(|| panic!("no {id} in {self:#?}"));
        finding["result"].as_str().expect("a result")
    }

    /// This is found, with a cause and a fix, and the exit code is that of the worst.
    fn assert(&self, id: &str, result: &str) {
        assert_eq!(self.result(id), result, "{:#}", self.findings[id]);
        if ["failed", "warning"].contains(&result) {
            assert!(self.findings[id]["cause"].is_string() && self.findings[id]["fix"].is_string());
        }
        let failed = self.findings.values().any(|one| one["result"] == "failed");
        assert_eq!(self.code, Some(i32::from(failed)), "{self:#?}");
    }

    /// Nothing but these, and what the disk of this machine says.
    fn assert_no_other_fault(&self, but: &[&str]) {
        for (id, finding) in &self.findings {
            let fault = finding["result"] == "failed" || finding["result"] == "warning";
            assert!(!fault || id == "store-space" || but.contains(&id.as_str()), "{finding:#}");
        }
    }
}

fn check(server: SocketAddr, flags: &[&str]) -> Output {
    Command::new(BINARY)
        .args(["check", "--server", &format!("http://{server}")])
        .args(flags)
        .env_remove("KUBECONFIG")
        .env("HOME", "/nonexistent")
        .stdin(Stdio::null())
        .output()
        .expect("the binary can be run")
}

/// A Corefile of a cluster, in a ConfigMap, with gangplank in it or not.
fn config_map(cluster: &Cluster, namespace: &str, corefile: &str) {
    let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "coredns"},
        "data": {"Corefile": corefile}});
    let path = format!("/api/v1/namespaces/{namespace}/configmaps");
    let (status, answer) = cluster.request(Who::Admin, "POST", &path, Some(&object)).expect("the API server runs");
    assert_eq!(status, 201, "{answer}");
}

/// The chain: gangplank, Kubernetes, CoreDNS.
struct Chain<'a> {
    cluster: &'a Cluster,
    namespace: &'static str,
    gangplank: Server,
    coredns: CoreDns,
}

impl<'a> Chain<'a> {
    fn start(cluster: &'a Cluster, namespace: &'static str) -> Option<Self> {
        let program = tools::require("coredns")?;
        cluster.create_namespace(namespace);
        let kubeconfig = cluster.kubeconfig_for_gangplank();
        let gangplank = Server::start_with(&["--kubeconfig", kubeconfig.to_str().expect("UTF-8")]);
        wait_until("it writes", || (http::get(gangplank.admin, "/readyz/registrations").0 == 200).then_some(()));
        wait_until("it is registered", || {
            let port = ["register", "web", "10.94.0.1", "--port", "http=8080", "-n", namespace];
            gangplank.run(&port).status.success().then_some(())
        });
        let [port] = free_ports();
        let corefile = format!(
            ".:{port} {{\n    bind 127.0.0.1\n    errors\n    kubernetes cluster.local in-addr.arpa ip6.arpa {{\n        kubeconfig {} \
             {CONTEXT}\n        fallthrough in-addr.arpa ip6.arpa\n    }}\n    cache 30\n    reload\n}}\n",
            cluster.kubeconfig_admin().display()
        );
        config_map(cluster, namespace, &corefile);
        let key = format!("{namespace}/coredns");
        let applied = Command::new(BINARY)
            .args(["coredns", "--server", &gangplank.dns.to_string(), "--apply", "--yes", "--configmap", &key])
            .arg("--kubeconfig")
            .arg(cluster.kubeconfig_admin())
            .output()
            .expect("the binary can be run");
        assert!(applied.status.success(), "{applied:?}");
        let map = cluster.get_json(&format!("/api/v1/namespaces/{namespace}/configmaps/coredns"));
        let text = map["data"]["Corefile"].as_str().expect("text");
        let coredns = CoreDns::start_at(&program, SocketAddr::from(([127, 0, 0, 1], port)), text);
        let chain = Self { cluster, namespace, gangplank, coredns };
        wait_until("CoreDNS has read the cluster", || {
            let name = format!("web.{namespace}.svc.cluster.local.");
            (answers(chain.coredns.address, Over::Udp, &name, RecordType::A) == ["10.94.0.1"]).then_some(())
        });
        Some(chain)
    }

    fn flags(&self) -> Vec<String> {
        [
            ["--admin", &format!("http://{}", self.gangplank.admin)],
            ["--dns", &self.gangplank.dns.to_string()],
            ["--via", &self.coredns.address.to_string()],
            ["--kubeconfig", self.cluster.kubeconfig_admin().to_str().expect("UTF-8")],
            ["--configmap", &format!("{}/coredns", self.namespace)],
        ]
        .map(|flag| flag.map(str::to_owned))
        .concat()
    }

    /// The check with other flags in place of those of the same names, and more.
    fn check(&self, other: &[(&str, &str)], more: &[&str]) -> Output {
        let mut flags = self.flags();
        for (name, value) in other {
            match flags.iter().position(|flag| flag == name) {
                Some(at) => flags[at + 1] = (*value).to_owned(),
                None => flags.extend([(*name).to_owned(), (*value).to_owned()]),
            }
        }
        flags.extend(more.iter().map(|&flag| flag.to_owned()));
        check(self.gangplank.grpc, &flags.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn found(&self, other: &[(&str, &str)]) -> Found {
        Found::of(&self.check(other, &["-o", "json"]))
    }
}

const PASSED: [&str; 20] = [
    "server-reachable",
    "versions-equal",
    "process-ready",
    "store-writable",
    "clock",
    "api-reachable",
    "writer",
    "mirror-lag",
    "rights-namespaces",
    "rights-services",
    "rights-endpointslices",
    "rights-servicecidrs",
    "rights-events",
    "rights-leases",
    "rights-reviews",
    "dns-answers",
    "coredns-wired",
    "zone",
    "answers-equal",
    "no-cache",
];

#[test]
fn whole_chain_is_well_and_each_fault_is_found() {
    let Some(lock) = ClusterLock::take() else { return };
    let Some(mut chain) = Chain::start(lock.cluster, "checked") else { return };
    // Other tests may have left much to write.
    wait_until("nothing is left to write", || {
        let status: Value = serde_json::from_str(&http::get(chain.gangplank.admin, "/api/v1/status").1).expect("JSON");
        (status["services_behind"] == 0).then_some(())
    });
    let well = chain.found(&[]);
    for id in PASSED {
        well.assert(id, "passed");
    }
    well.assert_no_other_fault(&[]);
    for id in ["replicas-equal", "rights-secrets", "rights-endpoints", "server-certificate", "machine-certificate"] {
        assert_eq!(well.result(id), "skipped", "{id}");
        assert!(well.findings[id]["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{id}");
    }
    let text = String::from_utf8(chain.check(&[], &[]).stdout).expect("UTF-8");
    println!("{text}");
    assert!(text.starts_with("process\n√ server-reachable      1 server answered\n") && !text.contains('×'), "{text}");

    // A canary goes the whole way, and nothing is left of it.
    let canary = Found::of(&chain.check(&[], &["--e2e", "-n", chain.namespace, "-o", "json"]));
    for id in ["e2e-registered", "e2e-direct", "e2e-endpointslice", "e2e-coredns", "e2e-removed"] {
        canary.assert(id, "passed");
        assert!(canary.findings[id]["observed"].as_str().is_some_and(|took| took.ends_with(" ms")), "{canary:#?}");
    }
    let left = chain.gangplank.run(&["ls", "-n", chain.namespace, "-o", "name"]);
    assert_eq!(String::from_utf8_lossy(&left.stdout), "checked/web\n");
    let refused = Found::of(&chain.check(&[], &["--e2e", "-n", "no-such-namespace", "-o", "json"]));
    refused.assert("e2e-registered", "failed");
    refused.assert("e2e-removed", "passed");

    rights_are_checked_one_by_one(&chain);

    // CoreDNS does not forward to gangplank.
    chain.cluster.create_namespace("checked-unwired");
    config_map(chain.cluster, "checked-unwired", ".:53 {\n    kubernetes cluster.local\n}\n");
    let unwired = chain.found(&[("--configmap", "checked-unwired/coredns")]);
    unwired.assert("coredns-wired", "warning");
    unwired.assert_no_other_fault(&["coredns-wired"]);
    let missing = chain.found(&[("--configmap", "checked-unwired/other")]);
    missing.assert("coredns-wired", "warning");

    // A cache between CoreDNS and who asks.
    let program = tools::require("coredns").expect("it runs already");
    let front = format!(".:53 {{\n    forward . {}\n    cache 30\n}}\n", chain.coredns.address);
    let cache = CoreDns::start(&program, &front);
    let cached = chain.found(&[("--via", &cache.address.to_string())]);
    cached.assert("no-cache", "warning");
    cached.assert_no_other_fault(&["no-cache"]);

    // Another zone than the cluster's.
    let other = Server::start_with(&["--zone", "other.example"]);
    other.register("prod", "web", "10.94.1.1", "http=8080");
    let wrong = Found::of(&check(
        other.grpc,
        &[
            "--admin",
            &other.admin.to_string(),
            "--dns",
            &other.dns.to_string(),
            "--via",
            &chain.coredns.address.to_string(),
            "-o",
            "json",
        ],
    ));
    wrong.assert("zone", "failed");
    assert_eq!(wrong.code, Some(1));
    assert_eq!(wrong.result("writer"), "skipped", "without Kubernetes");
    wrong.assert_no_other_fault(&["zone", "answers-equal"]);

    // gangplank is away: what is mirrored is still answered.
    chain.gangplank.kill9();
    let away = chain.found(&[]);
    for id in ["server-reachable", "process-ready", "dns-answers"] {
        away.assert(id, "failed");
    }
    away.assert_no_other_fault(&["server-reachable", "process-ready", "dns-answers", "answers-equal"]);
    let short = String::from_utf8(chain.check(&[], &["-o", "short"]).stdout).expect("UTF-8");
    assert!(short.starts_with("× server-reachable") && !short.contains('√'), "{short}");
}

fn rights_are_checked_one_by_one(chain: &Chain<'_>) {
    let user = "system:serviceaccount:checked:partly";
    let nobody = chain.found(&[("--as", user)]);
    for id in PASSED.iter().filter(|id| id.starts_with("rights-")) {
        nobody.assert(id, "failed");
    }
    chain.cluster.kubectl(&[
        "create",
        "clusterrole",
        "check-partly",
        "--verb=get,list,watch,create,update",
        "--resource=services",
    ]);
    chain.cluster.kubectl(&[
        "create",
        "clusterrolebinding",
        "check-partly",
        "--clusterrole=check-partly",
        "--serviceaccount=checked:partly",
    ]);
    wait_until("the role is known", || {
        let partly = chain.found(&[("--as", user)]);
        partly.assert("rights-services", "failed");
        (partly.findings["rights-services"]["cause"] == "no role gives it: delete services").then_some(())
    });
}

#[test]
fn stopped_api_server_is_found_and_waited_for() {
    let Some(mut cluster) = Cluster::private() else { return };
    let kubeconfig = cluster.kubeconfig_for_gangplank();
    let admin = cluster.kubeconfig_admin();
    let gangplank = Server::start_with(&["--kubeconfig", kubeconfig.to_str().expect("UTF-8")]);
    wait_until("it writes", || (http::get(gangplank.admin, "/readyz/registrations").0 == 200).then_some(()));
    cluster.stop_api_server();
    let (admin_address, dns) = (gangplank.admin.to_string(), gangplank.dns.to_string());
    let flags = [
        ["--admin", &admin_address],
        ["--dns", &dns],
        ["--kubeconfig", admin.to_str().expect("UTF-8")],
        ["-o", "json"],
    ]
    .concat();
    let found = Found::of(&check(gangplank.grpc, &flags));
    found.assert("api-reachable", "failed");
    found.assert("dns-answers", "passed");
    for id in ["rights-services", "zone", "answers-equal"] {
        assert_eq!(found.result(id), "skipped", "{id}");
    }

    // Told once, and over when it answers again.
    let mut waiting = Command::new(BINARY)
        .args(["check", "--wait", "--server", &format!("http://{}", gangplank.grpc)])
        .args(&flags)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary can be run");
    let mut lines =
        BufReader::new(waiting.stderr.take().expect("it is piped")).lines().map(|line| line.expect("UTF-8"));
    let first = lines.find(|line| line.contains("api-reachable")).expect("it tells the fault");
    assert!(first.starts_with("× api-reachable failing since "), "{first}");
    cluster.start_api_server();
    let rest: Vec<String> = lines.collect();
    assert!(rest.iter().any(|line| line == "√ api-reachable"), "{rest:?}");
    assert!(!rest.iter().any(|line| line.starts_with("× api-reachable")), "{rest:?}");
    let ended = waiting.wait_with_output().expect("it ends");
    assert!(ended.status.success(), "{ended:?}");
    Found::of(&ended).assert("api-reachable", "passed");
}

#[test]
fn full_disk_is_found() {
    let Some(disk) = SmallDisk::mount() else { return };
    let process = Process::serve(disk.path(), &["--drain", "0s"]);
    let (_, [grpc, dns, admin]) = process.ready();
    let (dns, admin) = (dns.to_string(), admin.to_string());
    let found = || Found::of(&check(grpc, &["--admin", &admin, "--dns", &dns, "-o", "json"]));
    let register = |address: &str| {
        Command::new(BINARY)
            .args(["register", "web", address, "-n", "prod", "--server", &format!("http://{grpc}"), "--timeout", "0s"])
            .output()
            .expect("the binary can be run")
            .status
            .success()
    };
    found().assert("store-writable", "passed");
    fs::write(disk.path().join("filler"), vec![1; 1 << 20]).expect_err("the disk is full");
    found().assert("store-space", "failed");
    wait_until("nothing can be stored", || (!register(&format!("10.0.0.{}", fastrand::u8(1..)))).then_some(()));
    let full = found();
    full.assert("store-writable", "failed");
    full.assert("process-ready", "failed");
    full.assert("dns-answers", "passed");
    assert_eq!(full.code, Some(1));
}

#[test]
fn expired_certificate_is_found() {
    let files = TempDir::new().expect("a directory");
    let ca = TestCa::new();
    let own = ca.sign_for("gangplank", &[], -60, 6);
    secrets::remember(&own.key);
    let write = |name: &str, text: &str| {
        let path = files.path().join(name);
        fs::write(&path, text).expect("a file");
        path.to_str().expect("UTF-8").to_owned()
    };
    let (cert, key, ca) = (write("server.crt", &own.cert), write("server.key", &own.key), write("ca.crt", &ca.pem));
    let policy = write("policy.toml", "[[rule]]\nusers = [\"*\"]\nnamespaces = [\"prod\"]\nverbs = [\"get\"]\n");
    let tls = ["--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &ca, "--authorization-policy", &policy];
    let server = Server::start_with(&tls);
    let url = format!("https://localhost:{}", server.grpc.port());
    let found = || {
        let flags =
            ["--cacert", &ca, "--admin", &server.admin.to_string(), "--dns", &server.dns.to_string(), "-o", "json"];
        let output = Command::new(BINARY)
            .args(["check", "--server", &url])
            .args(flags)
            .env("HOME", Path::new("/nonexistent"))
            .output();
        Found::of(&output.expect("the binary can be run"))
    };
    found().assert("ca-certificate", "passed");
    wait_until("the certificate has expired", || (found().result("server-certificate") == "failed").then_some(()));
    let expired = found();
    expired.assert("server-certificate", "failed");
    expired.assert("server-reachable", "failed");
    expired.assert("process-ready", "passed");
}

#[test]
fn without_anything_else_the_rest_is_skipped_with_its_reason() {
    let server = Server::start();
    let output = check(server.grpc, &["--admin", &server.admin.to_string(), "--dns", &server.dns.to_string()]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}");
    for line in [
        "- api-reachable         skipped: no kubeconfig: --kubeconfig FILE",
        "- coredns-wired         skipped: no kubeconfig: --kubeconfig FILE",
        "- zone                  skipped: no --via is given",
        "- writer                skipped: the server runs without --kubernetes",
    ] {
        assert!(text.contains(line), "no {line} in\n{text}");
    }
    let output = check(server.grpc, &["--kubeconfig", "/nonexistent"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let output = check(server.grpc, &["--admin", "http://a b"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}
