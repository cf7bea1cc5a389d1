//! The account with the rights of the chart, for the flags of the chart.

use std::{
    net::SocketAddr,
    process::{Command, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

use super::{Values, arguments, id, of_kind, rendered};
use crate::{
    identity::joining::Machine,
    mirror::ClusterLock,
    support::{
        http, secrets,
        server::{BINARY, Process},
        tools, wait_until,
    },
};

/// The rules of all roles, a line for each: the role, the resources, the verbs.
fn rules(objects: &[Value]) -> Vec<String> {
    let words = |rule: &Value, key: &str| {
        let words = rule[key].as_array().into_iter().flatten().filter_map(Value::as_str);
        words.collect::<Vec<_>>().join(",")
    };
    let mut rules = Vec::new();
    for role in [of_kind(objects, "ClusterRole"), of_kind(objects, "Role")].concat() {
        for rule in role["rules"].as_array().expect("a list") {
            let [groups, resources, names, urls, verbs] =
                ["apiGroups", "resources", "resourceNames", "nonResourceURLs", "verbs"].map(|key| words(rule, key));
            let what = if urls.is_empty() { format!("{groups}/{resources} {names}") } else { urls };
            rules.push(format!("{}: {}: {verbs}", id(role), what.trim_end()));
        }
    }
    rules.sort();
    rules
}

#[test]
fn roles_have_the_verbs_of_the_chosen_flags_and_no_others() {
    let Some(with_files) = rendered("gangplank", "gangplank", &["tls.secretName=server"]) else { return };
    let of = |values| rules(&rendered("gangplank", "gangplank", values).expect("Helm is there"));
    let least = [
        "ClusterRole  gangplank: /namespaces: list,watch",
        "ClusterRole  gangplank: /services: get,list,watch,create,update,delete",
        "ClusterRole  gangplank: discovery.k8s.io/endpointslices: get,list,watch,create,update,delete",
        "ClusterRole  gangplank: events.k8s.io/events: create,patch",
        "ClusterRole  gangplank: networking.k8s.io/servicecidrs: list,watch",
        "Role gangplank gangplank: coordination.k8s.io/leases gangplank-writer: get,watch,update",
        "Role gangplank gangplank: coordination.k8s.io/leases: create",
    ];
    assert_eq!(rules(&with_files), least);
    let added = |values| {
        let all: Vec<String> = of(values);
        assert!(
            values.contains(&"createNamespaces=true") || least.iter().all(|rule| all.contains(&(*rule).to_owned()))
        );
        all.into_iter().filter(|rule| !least.contains(&rule.as_str())).collect::<Vec<_>>()
    };
    let secrets = "Role gangplank gangplank-own-ca: /secrets: get,list,watch,create,update,delete";
    assert_eq!(added(&[]), [secrets]);
    assert_eq!(added(&["tls.secretName=server", "tls.serverCASecretName=ca"]), [secrets]);
    assert_eq!(
        added(&["tls.secretName=server", "endpointsObject=true"]),
        ["ClusterRole  gangplank-endpoints-object: /endpoints: get,list,watch,create,update,delete"]
    );
    assert_eq!(
        added(&["tls.secretName=server", "createNamespaces=true"]),
        ["ClusterRole  gangplank: /namespaces: list,watch,create"]
    );
    assert_eq!(
        added(&["tls.secretName=server", "metricsReaders[0].name=p", "metricsReaders[0].namespace=m"]),
        ["ClusterRole  gangplank-metrics-reader: /metrics: get"]
    );
    assert_eq!(of(&["rbac.create=false"]), [""; 0]);
    // Whom each role is bound to. The one of Kubernetes lets the account ask it of others.
    let bindings = rendered("gangplank", "gangplank", &["endpointsObject=true"]).expect("Helm is there");
    let bindings = [of_kind(&bindings, "ClusterRoleBinding"), of_kind(&bindings, "RoleBinding")].concat();
    let mut roles = Vec::new();
    for binding in bindings {
        assert_eq!(binding["subjects"].as_array().expect("a list").len(), 1);
        assert_eq!(binding["subjects"][0]["name"], "gangplank");
        assert_eq!(binding["subjects"][0]["namespace"], "gangplank");
        roles.push(binding["roleRef"]["name"].as_str().expect("a role"));
    }
    roles.sort_unstable();
    assert_eq!(
        roles,
        ["gangplank", "gangplank", "gangplank-endpoints-object", "gangplank-own-ca", "system:auth-delegator"]
    );
}

/// Gangplank with the flags that a chart renders, and with the account, the rights and the policy that it renders.
struct Installed {
    process: Process,
    lock: ClusterLock,
    grpc: SocketAddr,
    /// Of the objects.
    name: String,
    namespace: String,
    _data: TempDir,
}

/// An object of the chart, with another name if it is the policy's: that of the other tests stays.
fn with_own_policy(object: &Value, namespace: &str) -> Value {
    let mut object = object.clone();
    if object["metadata"]["name"] == "gangplank.dev" {
        let name = Value::from(format!("{namespace}.gangplank.dev"));
        if object["spec"].get("policyName").is_some() {
            object["spec"]["policyName"] = name.clone();
        }
        object["metadata"]["name"] = name;
    }
    object
}

impl Installed {
    /// Installs a release in a namespace of its own. Listeners and the data directory are those of tests; every
    /// other flag is the chart's.
    fn start(namespace: &str, values: Values<'_>) -> Option<Self> {
        tools::require("helm")?;
        let lock = ClusterLock::take()?;
        let cluster = lock.cluster;
        let objects = rendered(namespace, namespace, values)?;
        cluster.create_namespace(namespace);
        let kinds = ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "Service"];
        let kinds = kinds.into_iter().chain(["ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"]);
        for object in kinds.flat_map(|kind| of_kind(&objects, kind)) {
            cluster.apply(&with_own_policy(object, namespace).to_string());
        }
        let name = of_kind(&objects, "Deployment")[0]["metadata"]["name"].as_str().expect("a name").to_owned();
        let token = cluster.kubectl(&["create", "token", &name, "--namespace", namespace]);
        let kubeconfig = cluster.kubeconfig_with_token(token.trim());
        cluster.release_lease_in(namespace);
        let mut flags = vec![
            "--kubeconfig".to_owned(),
            kubeconfig.display().to_string(),
            // That of the account, in a pod.
            "--lease-namespace".to_owned(),
            namespace.to_owned(),
            "--drain=1s".to_owned(),
        ];
        let of_tests = ["serve", "--kubernetes", "--grpc-listen=127.0.0.1:9081", "--data-dir=/data"];
        flags.extend(arguments(&objects).into_iter().filter(|flag| !of_tests.contains(&flag.as_str())).filter_map(
            |flag| match flag.split_once('=').map_or(flag.as_str(), |(name, _)| name) {
                "--dns-listen" | "--admin-listen" => None,
                "--grpc-listen" => Some("--grpc-listen=0.0.0.0:0".to_owned()),
                // The address is one for documentation (RFC 5737).
                _ => Some(flag.replace("$(POD_IPS)", "localhost,192.0.2.10")),
            },
        ));
        let data = TempDir::new().expect("a directory");
        let process = Process::serve(data.path(), &flags);
        let [grpc, _, admin] = process.listening();
        let installed = Self { process, lock, grpc, name, namespace: namespace.to_owned(), _data: data };
        wait_until("it writes", || (http::get(admin, "/readyz/registrations").0 == 200).then_some(()));
        Some(installed)
    }

    /// Runs what must succeed, on its machine.
    fn succeed(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(BINARY);
        command.args(arguments).env("GANGPLANK_SERVER", format!("http://{}", self.grpc)).stdin(Stdio::null());
        let output = command.output().expect("the binary can be run");
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    fn get(&self, path: &str) -> Value {
        self.lock.cluster.get_json(path)
    }

    /// Everything was allowed.
    fn assert_nothing_was_forbidden(&self) {
        let log = self.process.stderr();
        for word in ["forbidden", "Forbidden", "may not", "does not let"] {
            assert!(!log.contains(word), "{log}");
        }
    }
}

#[test]
fn rights_of_the_chart_suffice_for_its_flags() {
    let values: Values<'_> = &["createNamespaces=true", "endpointsObject=true", "extraArgs={--service-linger=0s}"];
    let Some(installed) = Installed::start("gangplank-rights", values) else { return };
    let (namespace, name) = (&installed.namespace, &installed.name);
    // A Service, its slice, the Endpoints object and the namespace.
    let said = installed.succeed(&["register", "web", "10.33.0.1", "--port", "http=8080", "-n", "rights-made"]);
    assert!(said.contains("registered, generation"), "{said}");
    let endpoints = "/api/v1/namespaces/rights-made/endpoints/web";
    wait_until("the Endpoints object is there", || {
        (installed.get(endpoints)["subsets"][0]["addresses"][0]["ip"] == "10.33.0.1").then_some(())
    });
    installed.succeed(&["register", "web", "10.33.0.2", "--port", "http=8080", "-n", "rights-made"]);
    // A token, and a machine that joins with it.
    let created = installed.succeed(&["token", "create", "-n", "rights-made", "--service", "web"]);
    let token = created.split_whitespace().last().expect("a token").to_owned();
    secrets::remember(&token);
    let machine = Machine::joined(&token);
    machine.succeed(&["register", "web", "10.33.0.3", "--port", "http=8080"]);
    for address in ["10.33.0.1", "10.33.0.2", "10.33.0.3"] {
        installed.succeed(&["deregister", "web", address, "-n", "rights-made"]);
    }
    // The Service goes, its slice of removals stays.
    let path = "/apis/discovery.k8s.io/v1/namespaces/rights-made/endpointslices";
    wait_until("the removals are written, and the Service is gone", || {
        let services = installed.get("/api/v1/namespaces/rights-made/services");
        let slices = installed.get(path);
        let slices = slices["items"].as_array().expect("a list");
        let tombstones =
            slices.iter().all(|slice| slice["metadata"]["annotations"]["gangplank.dev/tombstones"].is_string());
        (services["items"].as_array().expect("a list").is_empty() && slices.len() == 1 && tombstones).then_some(())
    });
    // Its own Service leads to it, and an Event says that it writes.
    let slice = format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices/{name}-gangplank-ipv4");
    wait_until("the Service of gRPC leads to it", || {
        (installed.get(&slice)["endpoints"][0]["addresses"][0] == "192.0.2.10").then_some(())
    });
    wait_until("the Event is there", || {
        let events = installed.get(&format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events"));
        events["items"].as_array().expect("a list").iter().any(|event| event["reason"] == "WriterChanged").then_some(())
    });
    installed.assert_nothing_was_forbidden();
}

#[test]
fn policy_of_the_chart_limits_its_account() {
    let Some(installed) = Installed::start("gangplank-limits", &[]) else { return };
    let cluster = installed.lock.cluster;
    let token = cluster.kubectl(&["create", "token", &installed.name, "--namespace", &installed.namespace]);
    let kubeconfig = cluster.kubeconfig_with_token(token.trim());
    let service =
        r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "foreign"}, "spec": {"clusterIP": "None"}}"#;
    let arguments = ["create", "--dry-run=server", "--namespace=default", "--validate=false", "-f", "-"];
    wait_until("the policy is in force", || {
        let said = cluster.kubectl_as(&kubeconfig, &arguments, service).err()?;
        assert!(said.contains("gangplank-limits.gangplank.dev"), "{said}");
        Some(())
    });
    installed.assert_nothing_was_forbidden();
}
