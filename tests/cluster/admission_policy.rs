//! What gangplank's account cannot write, whatever RBAC allows.

use serde_json::{Value, json};

use super::{create, gangplank, owned, service, services as services_of, slice, slices as slices_of};
use crate::support::cluster::{Cluster, in_namespace};

#[test]
fn admission_policy_limits_the_account_to_labelled_objects() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.create_namespace("policy");
    let [services, slices] = [services_of("policy"), slices_of("policy")];
    let denied = |method: &str, path: &str, body: Option<&Value>, err: &str| {
        let (status, said) = gangplank(cluster, method, path, body);
        assert_eq!(status, 403, "{method} {path}: {said}");
        assert!(said.contains("ValidatingAdmissionPolicy 'gangplank.dev'") && said.contains(err), "{said}");
    };
    let allowed = |method: &str, path: &str, body: Option<&Value>| {
        let (status, said) = gangplank(cluster, method, path, body);
        assert!(status == 200 || status == 201, "{method} {path}: {status} {said}");
    };
    // Creating.
    let may_write = "gangplank may write services only with the label gangplank.dev/service: owned";
    denied("POST", &services, Some(&service("bare", &json!({}))), may_write);
    denied("POST", &services, Some(&service("bare", &json!({"gangplank.dev/service": "joined"}))), may_write);
    allowed("POST", &services, Some(&service("web", &owned())));
    let may_write = "gangplank may write endpointslices only with the label endpointslice.kubernetes.io/managed-by";
    denied("POST", &slices, Some(&slice("web-2", "endpointslice-controller.k8s.io", "10.0.0.2")), may_write);
    allowed("POST", &slices, Some(&slice("web-1", "gangplank.dev", "10.0.0.1")));
    let endpoints = |labels: Value| {
        json!({"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "web", "labels": labels},
            "subsets": [{"addresses": [{"ip": "10.0.0.1"}]}]})
    };
    let all_endpoints = "/api/v1/namespaces/policy/endpoints";
    denied("POST", all_endpoints, Some(&endpoints(json!({}))), "gangplank may write endpoints only");
    allowed("POST", all_endpoints, Some(&endpoints(owned())));
    // Changing: neither what belongs to others, nor handing over what belongs to it.
    create(cluster, &services, &service("native", &json!({"app": "native"})));
    create(cluster, &slices, &slice("web-native", "somebody-else", "10.0.0.3"));
    let foreign = "and this one does not";
    denied("PUT", &format!("{services}/native"), Some(&service("native", &owned())), foreign);
    denied("PUT", &format!("{slices}/web-native"), Some(&slice("web-native", "gangplank.dev", "10.6.6.6")), foreign);
    let handed_over = slice("web-1", "somebody-else", "10.0.0.1");
    denied("PUT", &format!("{slices}/web-1"), Some(&handed_over), may_write);
    let outside = slice("web-1", "writer.gangplank.dev", "10.0.0.1");
    denied("PUT", &format!("{slices}/web-1"), Some(&outside), may_write);
    allowed("PUT", &format!("{slices}/web-1"), Some(&slice("web-1", "gangplank.dev", "10.0.0.9")));
    // Deleting.
    denied("DELETE", &format!("{services}/native"), None, foreign);
    denied("DELETE", &format!("{slices}/web-native"), None, foreign);
    // The API server deletes the Endpoints of a deleted Service by itself.
    for path in [format!("{slices}/web-1"), format!("{all_endpoints}/web"), format!("{services}/web")] {
        allowed("DELETE", &path, None);
    }
    // Others are not concerned, and the message reaches whoever uses the account by hand.
    assert_eq!(cluster.get_json(&format!("{slices}/web-native"))["endpoints"][0]["addresses"][0], "10.0.0.3");
    let yaml = service("bare", &json!({})).to_string();
    let arguments = ["create", "--dry-run=server", "--namespace=policy", "-f", "-"];
    let said = cluster.kubectl_as(&cluster.kubeconfig_for_gangplank(), &arguments, &yaml).expect_err("it is denied");
    assert!(said.contains("gangplank may write services only with the label gangplank.dev/service: owned"), "{said}");
}

/// What gangplank's account cannot write even with its own labels, so that nobody's traffic can be led elsewhere.
#[test]
fn admission_policy_admits_headless_objects_only() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.create_namespace("policy-kinds");
    let [services, slices] = [services_of("policy-kinds"), slices_of("policy-kinds")];
    let denied = |method: &str, path: &str, body: Option<&Value>, err: &str| {
        let (status, said) = gangplank(cluster, method, path, body);
        assert!(status == 403 && said.contains(err), "{method} {path}: {status} {said}");
    };
    let headless = "only headless Services without selector and externalIPs";
    let edits: [(&str, Value); 6] = [
        ("clusterIP", json!("")),
        ("selector", json!({"app": "web"})),
        ("externalIPs", json!(["192.0.2.7"])),
        ("type", json!("LoadBalancer")),
        ("type", json!("NodePort")),
        ("type", json!("ExternalName")),
    ];
    for (field, value) in edits {
        let mut service = service("web", &owned());
        if matches!(value.as_str(), Some("LoadBalancer" | "NodePort" | "ExternalName")) {
            service["spec"].as_object_mut().expect("a map").remove("clusterIP");
            service["spec"]["externalName"] = (value == "ExternalName").then_some("example.com").into();
        }
        service["spec"][field] = value;
        denied("POST", &services, Some(&service), headless);
    }
    let mut visible = slice("web-1", "gangplank.dev", "10.0.0.1");
    visible["metadata"]["labels"].as_object_mut().expect("a map").remove("service.kubernetes.io/headless");
    denied("POST", &slices, Some(&visible), "only EndpointSlices with the label service.kubernetes.io/headless");

    let reserved = "nothing in kube-system, and nothing of default/kubernetes";
    let of_api_server = |namespace: &str| {
        let mut slice = slice("kubernetes-1", "gangplank.dev", "10.0.0.1");
        slice["metadata"]["labels"]["kubernetes.io/service-name"] = "kubernetes".into();
        denied("POST", &slices_of(namespace), Some(&slice), reserved);
    };
    of_api_server("default");
    denied("POST", &services_of("kube-system"), Some(&service("web", &owned())), reserved);
    denied("POST", &slices_of("kube-system"), Some(&slice("web-1", "gangplank.dev", "10.0.0.1")), reserved);

    // Somebody typed the label on a Service that gangplank did not make.
    let mut native = service("native", &owned());
    native["spec"]["selector"] = json!({"app": "native"});
    create(cluster, &services, &native);
    let path = format!("{services}/native");
    denied("DELETE", &path, None, "only if it made them");
    denied("PUT", &path, Some(&service("native", &owned())), "only if it made them");
}

/// Whoever has the account writes Secrets of gangplank's own only, and not the CA that is there.
#[test]
fn admission_policy_limits_the_account_to_its_own_secrets() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.create_namespace("policy-secrets");
    let rights = include_str!("../../deploy/kustomize/rbac-own-ca.yaml");
    cluster.apply(&in_namespace(rights, "policy-secrets"));
    let secrets = "/api/v1/namespaces/policy-secrets/secrets";
    let secret = |name: &str, kind: &str| {
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name,
            "labels": {"gangplank.dev/joining": kind}}, "stringData": {"a": "b"}})
    };
    let denied = |method: &str, name: &str, body: Option<&Value>, err: &str| {
        let path = if method == "POST" { secrets.to_owned() } else { format!("{secrets}/{name}") };
        let (status, said) = gangplank(cluster, method, &path, body);
        assert!(status == 403 && said.contains(err), "{method} {name}: {status} {said}");
    };
    let label = "gangplank may write secrets only with the label gangplank.dev/joining: ca";
    denied("POST", "", Some(&secret("gangplank-token-1", "other")), label);
    denied("POST", "", Some(&secret("registry-password", "token")), "only Secrets with a name of its own");
    denied("POST", "", Some(&secret("gangplank-token-1", "ca")), "a CA only as gangplank-ca");
    for (name, kind) in [("gangplank-ca", "ca"), ("gangplank-token-1", "token")] {
        let (status, said) = gangplank(cluster, "POST", secrets, Some(&secret(name, kind)));
        assert_eq!(status, 201, "{said}");
    }
    let ca = "and neither change nor delete it";
    denied("PUT", "gangplank-ca", Some(&secret("gangplank-ca", "ca")), ca);
    denied("DELETE", "gangplank-ca", None, ca);
    create(cluster, secrets, &json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "foreign"}}));
    denied("DELETE", "foreign", None, "and this one does not");
    denied("PUT", "foreign", Some(&secret("foreign", "token")), "and this one does not");
    let (status, said) = gangplank(cluster, "DELETE", &format!("{secrets}/gangplank-token-1"), None);
    assert_eq!(status, 200, "{said}");
}
