//! `deploy/`: the Helm chart and the Kustomize base render the same, the API server takes what they render, and the
//! account has with it what gangplank needs, and no more.

mod accepted;
mod machine;
mod rights;

use std::{
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
};

use serde::Deserialize as _;
use serde_json::Value;

use crate::support::{
    cluster::Cluster,
    server::BINARY,
    tools::{self, ROOT},
};

/// Chart values, each as `key=value` of `helm --set`.
type Values<'a> = &'a [&'a str];

/// The labels that say that Helm has installed an object.
const LABELS_OF_HELM: [&str; 2] = ["app.kubernetes.io/managed-by", "helm.sh/chart"];

/// What the chart renders, or what Helm complains about. `None` without Helm, which is reported.
fn helm(release: &str, namespace: &str, values: Values<'_>) -> Option<Result<Vec<Value>, String>> {
    let chart = Path::new(ROOT).join("deploy/helm/gangplank");
    let mut command = Command::new(tools::require("helm")?);
    command.args(["template", release]).arg(chart).args(["--namespace", namespace]);
    command.args(values.iter().flat_map(|value| ["--set", value])).stdin(Stdio::null());
    let output = command.output().expect("Helm can be run");
    let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).expect("UTF-8"));
    Some(if output.status.success() { Ok(objects(&stdout)) } else { Err(stderr) })
}

/// What the chart renders.
fn rendered(release: &str, namespace: &str, values: Values<'_>) -> Option<Vec<Value>> {
    Some(helm(release, namespace, values)?.unwrap_or_else(|err| panic!("{values:?}: {err}")))
}

/// What Helm says of values that it refuses.
fn refused(values: Values<'_>) -> Option<String> {
    Some(helm("gangplank", "gangplank", values)?.expect_err(&values.join(" ")))
}

/// What a folder of `deploy/` renders.
fn kustomize(cluster: &Cluster, folder: &str) -> Vec<Value> {
    let folder = Path::new(ROOT).join("deploy").join(folder);
    objects(&cluster.kubectl(&["kustomize", folder.to_str().expect("a path in UTF-8")]))
}

fn objects(yaml: &str) -> Vec<Value> {
    let documents = serde_yaml_ng::Deserializer::from_str(yaml);
    let objects = documents.map(|document| Value::deserialize(document).expect("YAML"));
    objects.filter(|object| !object.is_null()).collect()
}

/// Kind, namespace and name.
fn id(object: &Value) -> String {
    let metadata = &object["metadata"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    [text(&object["kind"]), text(&metadata["namespace"]), text(&metadata["name"])].join(" ")
}

/// The objects of a kind.
fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

fn names(objects: &[Value], kind: &str) -> Vec<String> {
    of_kind(objects, kind)
        .iter()
        .map(|object| object["metadata"]["name"].as_str().expect("a name").to_owned())
        .collect()
}

/// What gangplank is run with.
fn arguments(objects: &[Value]) -> Vec<String> {
    let container = &of_kind(objects, "Deployment")[0]["spec"]["template"]["spec"]["containers"][0];
    let arguments = container["args"].as_array().expect("a list");
    arguments.iter().map(|one| one.as_str().expect("text").to_owned()).collect()
}

#[test]
fn chart_and_kustomize_base_render_the_same() {
    let Some(cluster) = Cluster::shared() else { return };
    let Some(mut chart) = rendered("gangplank", "gangplank", &[]) else { return };
    for object in &mut chart {
        let labels = object["metadata"]["labels"].as_object_mut().expect("every object has labels");
        for label in LABELS_OF_HELM {
            labels.remove(label).unwrap_or_else(|| panic!("{label} is missing"));
        }
    }
    // The release's namespace is not the chart's to make.
    let mut base = kustomize(cluster, "kustomize");
    let namespace = base.iter().position(|object| object["kind"] == "Namespace").expect("it makes one");
    let namespace = base.remove(namespace);
    assert_eq!(namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "restricted");
    for objects in [&mut chart, &mut base] {
        objects.sort_by_key(id);
    }
    assert_eq!(chart.iter().map(id).collect::<Vec<_>>(), base.iter().map(id).collect::<Vec<_>>());
    for (chart, base) in chart.iter().zip(&base) {
        assert_eq!(chart, base, "{}", id(chart));
    }
}

#[test]
fn component_of_endpoints_is_the_value_of_the_chart() {
    let Some(cluster) = Cluster::shared() else { return };
    let Some(chart) = rendered("gangplank", "gangplank", &["endpointsObject=true"]) else { return };
    let folder = tempfile::tempdir_in(Path::new(ROOT).join("target")).expect("a directory");
    let overlay = "resources: [../../deploy/kustomize]\ncomponents: [../../deploy/kustomize/endpoints-object]\n";
    std::fs::write(folder.path().join("kustomization.yaml"), overlay).expect("written");
    let overlay = objects(&cluster.kubectl(&["kustomize", folder.path().to_str().expect("UTF-8")]));
    let sorted = |objects: &[Value]| {
        let mut arguments = arguments(objects);
        arguments.sort();
        arguments
    };
    assert_eq!(sorted(&overlay), sorted(&chart));
    let rules = |objects: &[Value]| {
        let role = objects.iter().find(|object| id(object) == "ClusterRole  gangplank-endpoints-object");
        role.expect("it is there")["rules"].clone()
    };
    assert_eq!(rules(&overlay), rules(&chart));
}

#[test]
fn component_of_monitoring_is_the_values_of_the_chart() {
    let Some(cluster) = Cluster::shared() else { return };
    let values: Values<'_> = &["alerts.enabled=true", "dashboard.enabled=true"];
    let Some(chart) = rendered("gangplank", "gangplank", values) else { return };
    let folder = tempfile::tempdir_in(Path::new(ROOT).join("target")).expect("a directory");
    let overlay = "resources: [../../deploy/kustomize]\ncomponents: [../../deploy/monitoring]\n";
    std::fs::write(folder.path().join("kustomization.yaml"), overlay).expect("written");
    let overlay = objects(&cluster.kubectl(&["kustomize", folder.path().to_str().expect("UTF-8")]));
    let file =
        |name: &str| std::fs::read_to_string(Path::new(ROOT).join("deploy/monitoring").join(name)).expect("text");
    let alerts: Value = serde_yaml_ng::from_str(&file("alerts.yaml")).expect("YAML");
    let plain = rendered("gangplank", "gangplank", &[]).expect("Helm is there");
    for (objects, from) in [(&chart, "the chart"), (&overlay, "the overlay")] {
        let find = |wanted: &str| objects.iter().find(|object| id(object) == wanted);
        let rules = find("PrometheusRule gangplank gangplank").unwrap_or_else(|| panic!("{from} has the alerts"));
        assert_eq!(rules["spec"], alerts, "{from}");
        let dashboard = find("ConfigMap gangplank gangplank-dashboard").unwrap_or_else(|| panic!("{from} has it"));
        assert_eq!(dashboard["metadata"]["labels"]["grafana_dashboard"], "1", "{from}");
        assert_eq!(
            dashboard["data"]["gangplank.json"].as_str().map(str::trim_end),
            Some(file("dashboard.json").trim_end())
        );
    }
    assert!(names(&plain, "PrometheusRule").is_empty() && names(&plain, "ConfigMap").is_empty(), "only on wish");
    let runbook = ["alerts.enabled=true", "alerts.runbook=https://wiki.example.com/ops"];
    let linked = rendered("gangplank", "gangplank", &runbook).expect("Helm is there");
    let rules = of_kind(&linked, "PrometheusRule")[0]["spec"].to_string();
    assert!(rules.contains("https://wiki.example.com/ops#gangplankdown") && !rules.contains("docs/operations.md"));
}

#[test]
fn unknown_and_contradictory_values_are_refused() {
    let unknown = [
        "replicaz=2",
        "image.name=x",
        "persistence.volume=x",
        "dns.service.type=LoadBalancer",
        "grpc.tls=true",
        "grpc.service.externalIPs=x",
        "tls.secret=x",
        "admin.host=x",
        "log.level=debug",
        "serviceMonitor.scheme=http",
        "alerts.runbookUrl=x",
        "dashboard.folder=x",
        "networkPolicy.from=x",
        "networkPolicy.grpcFrom[0].cidr=10.1.0.0/16",
        "networkPolicy.grpcFrom[0].ipBlock.cidrs=10.1.0.0/16",
        "rbac.enabled=true",
        "admissionPolicy.enabled=true",
        "serviceAccount.name=x",
        "podDisruptionBudget.minAvailable=1",
        "resources.request.cpu=1",
        "affinity.node=x",
        "check.enabled=true",
        "metricsReaders[0].account=x",
    ];
    for value in unknown {
        let Some(said) = refused(&[value]) else { return };
        assert!(said.contains("not allowed"), "{value}: {said}");
    }
    let invalid = [
        "replicas=0",
        "replicas=two",
        "ttl=3601",
        "alerts.runbook=docs/operations.md",
        "image.pullPolicy=Sometimes",
        "grpc.service.type=ExternalName",
        "networkPolicy.grpcFrom[0].ipBlock.cidr=10.1.0.0",
        "resources.limits.memory=much",
        // What the chart sets, and what has a value that also adds the right.
        "extraArgs={--zone=example.org}",
        "extraArgs={--create-namespaces}",
        "extraArgs={--endpoints-object}",
        "extraArgs={--tls-cert=/x}",
        "extraArgs={drain}",
        "grpc.advertise={192.0.2.1}",
    ];
    for value in invalid {
        let said = refused(&[value]).expect("Helm is there");
        assert!(said.contains("values don't meet the specifications of the schema"), "{value}: {said}");
    }
    let contradictory: [(Values<'_>, &str); 5] = [
        (&["persistence.enabled=true"], "a data directory has one process"),
        (&["replicas=1", "persistence.existingClaim=x"], "means nothing without persistence.enabled=true"),
        (&["tls.clientCASecretName=x"], "mean nothing without tls.secretName"),
        (&["grpc.service.nodePort=30080"], "mean nothing with type ClusterIP"),
        (&["grpc.service.type=NodePort", "grpc.service.loadBalancerClass=x"], "means nothing with type NodePort"),
    ];
    for (values, err) in contradictory {
        let said = refused(values).expect("Helm is there");
        assert!(said.contains(err), "{values:?}: {said}");
    }
    // Nothing of the schema is open but maps, whose keys are the user's.
    let schema = std::fs::read_to_string(Path::new(ROOT).join("deploy/helm/gangplank/values.schema.json"));
    let schema: Value = serde_json::from_str(&schema.expect("it is there")).expect("JSON");
    let mut open = Vec::new();
    open_objects(&schema, "", &mut open);
    let affinity = |kind: &str| format!("/properties/affinity/properties/{kind}");
    let expected = [affinity("nodeAffinity"), affinity("podAffinity"), affinity("podAntiAffinity")];
    assert_eq!(open, [&expected[..], &["/properties/global".to_owned()]].concat());
}

/// The objects of a schema that take any key with any value.
fn open_objects(schema: &Value, path: &str, open: &mut Vec<String>) {
    if let Value::Object(fields) = schema {
        if schema["type"] == "object" && schema.get("additionalProperties").is_none() {
            open.push(path.to_owned());
        }
        for (key, value) in fields {
            open_objects(value, &format!("{path}/{key}"), open);
        }
    }
}

#[test]
fn values_choose_between_a_rolling_update_and_a_volume() {
    let Some(two) = rendered("gangplank", "gangplank", &[]) else { return };
    let of = |values| rendered("gangplank", "gangplank", values).expect("Helm is there");
    let strategy = |objects: &[Value]| of_kind(objects, "Deployment")[0]["spec"]["strategy"].clone();
    assert_eq!(strategy(&two)["rollingUpdate"]["maxUnavailable"], 0);
    assert_eq!(names(&two, "PodDisruptionBudget"), ["gangplank"]);
    assert!(names(&two, "PersistentVolumeClaim").is_empty());
    let one = of(&["replicas=1"]);
    assert_eq!(strategy(&one)["type"], "RollingUpdate");
    assert!(names(&one, "PodDisruptionBudget").is_empty());
    let kept = of(&["replicas=1", "persistence.enabled=true"]);
    assert_eq!(strategy(&kept)["type"], "Recreate");
    assert!(names(&kept, "PodDisruptionBudget").is_empty());
    assert_eq!(names(&kept, "PersistentVolumeClaim"), ["gangplank"]);
    let existing = of(&["replicas=1", "persistence.enabled=true", "persistence.existingClaim=mine"]);
    assert!(names(&existing, "PersistentVolumeClaim").is_empty());
    let spec = &of_kind(&existing, "Deployment")[0]["spec"]["template"]["spec"];
    assert_eq!(spec["volumes"][0]["persistentVolumeClaim"]["claimName"], "mine");
}

#[test]
fn network_policy_lets_in_who_is_named() {
    let vms = "networkPolicy.grpcFrom[0].ipBlock.cidr=10.1.0.0/16";
    let Some(open) = rendered("gangplank", "gangplank", &[vms]) else { return };
    let closed = rendered("gangplank", "gangplank", &[]).expect("Helm is there");
    let from = |objects: &[Value], port: &str| {
        let rules = of_kind(objects, "NetworkPolicy")[0]["spec"]["ingress"].as_array().expect("a list").clone();
        let rule = rules.into_iter().find(|rule| rule["ports"][0]["port"] == port).expect("a rule");
        rule["from"].as_array().expect("a list").clone()
    };
    assert_eq!(from(&closed, "grpc").len(), 1, "its own pods");
    assert_eq!(from(&open, "grpc")[1]["ipBlock"]["cidr"], "10.1.0.0/16");
    assert_eq!(from(&open, "dns"), from(&closed, "dns"));
    let off = rendered("gangplank", "gangplank", &["networkPolicy.enabled=false"]).expect("Helm is there");
    assert!(names(&off, "NetworkPolicy").is_empty());
    // An empty list is nobody, and not everybody.
    let nobody = rendered("gangplank", "gangplank", &["networkPolicy.dnsFrom=null"]).expect("Helm is there");
    let rules = of_kind(&nobody, "NetworkPolicy")[0]["spec"]["ingress"].as_array().expect("a list").clone();
    assert!(rules.iter().all(|rule| rule["ports"][0]["port"] != "dns"), "{rules:?}");
}

/// Every flag is one that this gangplank knows.
/// For DNS `[::]` is IPv6 alone, and a pod may have either family, or both.
#[test]
fn dns_is_answered_over_either_family() {
    let Some(chart) = rendered("gangplank", "gangplank", &[]) else { return };
    let listen: Vec<SocketAddr> = arguments(&chart)
        .iter()
        .filter_map(|argument| argument.strip_prefix("--dns-listen="))
        .map(|address| address.parse().expect("an address and a port"))
        .collect();
    assert!(listen.iter().all(|address| address.ip().is_unspecified() && address.port() == 1053), "{listen:?}");
    assert!([true, false].iter().all(|&ipv4| listen.iter().any(|address| address.is_ipv4() == ipv4)), "{listen:?}");
}

#[test]
fn flags_of_the_chart_are_known() {
    let values: Values<'_> = &[
        "createNamespaces=true",
        "endpointsObject=true",
        "tls.secretName=a",
        "tls.clientCASecretName=b",
        "tls.serverCASecretName=c",
        "admin.hosts={a.example.com}",
        "grpc.advertise={a.example.com,b.example.com:99}",
        "log.filter=debug",
        "log.format=json",
        "extraArgs={--drain=5s}",
    ];
    let Some(all) = rendered("gangplank", "gangplank", values) else { return };
    let arguments = arguments(&all);
    assert!(
        arguments.contains(&"--advertise=a.example.com,b.example.com:99,$(POD_IPS),gangplank.gangplank.svc".to_owned())
    );
    // Flags before --help are parsed.
    let help = Command::new(BINARY).args(&arguments).arg("--help").output().expect("the binary can be run");
    assert!(help.status.success(), "{help:?}");
    let wrong = Command::new(BINARY).args(&arguments).args(["--unheard-of", "--help"]).output().expect("it can be run");
    assert_eq!(wrong.status.code(), Some(2));
}
