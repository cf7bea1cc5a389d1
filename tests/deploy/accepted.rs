//! What the API server says of what is rendered.

use std::{fs, path::Path};

use serde_json::{Value, json};

use super::{Values, id, kustomize, of_kind, rendered};
use crate::support::{
    cluster::Cluster,
    tools::{self, ROOT},
    wait_until,
};

/// Values of which each object is accepted. The operator's ServiceMonitor and PrometheusRule are in one of them.
const SETS: [Values<'static>; 6] = [
    &[],
    &["replicas=1", "persistence.enabled=true", "persistence.storageClassName=fast"],
    &[
        "replicas=3",
        "grpc.service.type=LoadBalancer",
        "grpc.service.loadBalancerSourceRanges={10.1.0.0/16,2001:db8::/32}",
        "grpc.service.loadBalancerClass=example.com/internal",
        "grpc.service.annotations.example\\.com/name=a",
        "grpc.advertise={gangplank.example.com}",
        "dns.service.clusterIP=10.96.7.53",
        "networkPolicy.grpcFrom[0].ipBlock.cidr=10.1.0.0/16",
        "networkPolicy.grpcFrom[0].ipBlock.except={10.1.9.0/24}",
        "networkPolicy.grpcFrom[1].namespaceSelector.matchLabels.team=ci",
    ],
    &[
        "grpc.service.type=NodePort",
        "grpc.service.nodePort=30980",
        "tls.secretName=server",
        "tls.clientCASecretName=clients",
        "tls.serverCASecretName=ca",
        "createNamespaces=true",
        "endpointsObject=true",
    ],
    &[
        "serviceMonitor.enabled=true",
        "serviceMonitor.labels.release=prometheus",
        "alerts.enabled=true",
        "alerts.labels.release=prometheus",
        "dashboard.enabled=true",
        "dashboard.labels.team=dns",
        "metricsReaders[0].name=prometheus",
        "metricsReaders[0].namespace=monitoring",
        "admin.hosts={gangplank.example.com}",
    ],
    &[
        "tls.secretName=server",
        "serviceMonitor.enabled=true",
        "serviceMonitor.tokenSecretName=token",
        "serviceMonitor.serverName=gangplank.example.com",
        "fullnameOverride=other",
        "image.digest=sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "imagePullSecrets[0].name=registry",
        "priorityClassName=system-cluster-critical",
        "nodeSelector.disk=fast",
        "tolerations[0].operator=Exists",
        "affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution=null",
        "podAnnotations.a=b",
        "podLabels.c=d",
        "serviceAccount.annotations.e=f",
        "extraArgs={--drain=5s}",
    ],
];

/// A namespace that admits pods without any right on their node, and nothing else.
fn restricted_namespace(cluster: &Cluster, name: &str) {
    cluster.apply(
        &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {
            "pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/enforce-version": "latest",
        }}})
        .to_string(),
    );
}

/// The API server validates `object`, with every field known, and stores nothing.
fn dry_run(cluster: &Cluster, object: &Value) -> Result<String, String> {
    let arguments = ["apply", "--dry-run=server", "--validate=strict", "-f", "-"];
    cluster.kubectl_as(&cluster.kubeconfig_admin(), &arguments, &object.to_string())
}

/// The pods of Deployments and Jobs. Their own admission is not one of pods.
fn pods(objects: &[Value], namespace: &str) -> Vec<Value> {
    let makers = [of_kind(objects, "Deployment"), of_kind(objects, "Job")].concat();
    let pod = |maker: &Value| {
        let template = &maker["spec"]["template"];
        let mut spec = template["spec"].clone();
        // The test's API server knows no classes.
        spec.as_object_mut().expect("a map").remove("priorityClassName");
        json!({"apiVersion": "v1", "kind": "Pod", "spec": spec, "metadata": {
            "name": maker["metadata"]["name"], "namespace": namespace, "labels": template["metadata"]["labels"]}})
    };
    makers.into_iter().map(pod).collect()
}

#[test]
fn every_rendered_object_is_accepted_in_a_restricted_namespace() {
    let (Some(cluster), Some(_)) = (Cluster::shared(), tools::require("helm")) else { return };
    for kind in ["servicemonitors", "prometheusrules"] {
        let definition = Path::new(ROOT).join(format!("target/tools/{kind}.yaml"));
        let definition = fs::read_to_string(definition).expect("it was installed with Helm");
        // With less than `apply` adds, which would be too long for an annotation.
        let _ = cluster.kubectl_as(&cluster.kubeconfig_admin(), &["create", "-f", "-"], &definition);
        wait_until("the operator's objects are served", || {
            cluster.kubectl_as(&cluster.kubeconfig_admin(), &["get", kind, "-A"], "").ok()
        });
    }
    let namespace = "deploy-accepted";
    restricted_namespace(cluster, namespace);
    for values in SETS {
        let objects = rendered("gangplank", namespace, values).expect("Helm is there");
        let pods = pods(&objects, namespace);
        assert!(!pods.is_empty());
        for object in objects.iter().chain(&pods) {
            let said =
                dry_run(cluster, object).unwrap_or_else(|err| panic!("{values:?}: {}: {err}\n{object}", id(object)));
            assert!(said.contains("server dry run") && !said.contains("Warning"), "{said}");
        }
    }
    // Each of these fails if it is broken.
    let objects = rendered("gangplank", namespace, &[]).expect("Helm is there");
    let mut pod = pods(&objects, namespace).remove(0);
    pod["spec"]["containers"][0]["securityContext"]["capabilities"]["drop"] = json!([]);
    let said = dry_run(cluster, &pod).expect_err("it keeps rights");
    assert!(said.contains("violates PodSecurity \"restricted"), "{said}");
    let mut deployment = of_kind(&objects, "Deployment")[0].clone();
    deployment["spec"]["replicaz"] = json!(2);
    let said = dry_run(cluster, &deployment).expect_err("there is no such field");
    assert!(said.contains("unknown field \"spec.replicaz\""), "{said}");
}

#[test]
fn kustomize_base_is_accepted() {
    let Some(cluster) = Cluster::shared() else { return };
    for object in kustomize(cluster, "kustomize") {
        dry_run(cluster, &object).unwrap_or_else(|err| panic!("{}: {err}", id(&object)));
    }
}
