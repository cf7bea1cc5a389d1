//! What RBAC allows, and what the server does.

use std::time::Instant;

use gangplank::grpc::proto::{
    gangplank::v1::{GetServiceRequest, ListServicesRequest, WatchRequest},
    registry::ServiceInfo,
};
use tonic::{Code, Status};

use super::{
    super::matrix::{END_TIMEOUT, call_with, request},
    ROLE, RbacServer,
};
use crate::{mirror::ClusterLock, support::cluster::Who};

/// Readers of the whole namespace, and of all.
const READERS: &str = "\
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: read, namespace: NAMESPACE}
rules: [{apiGroups: [gangplank.dev], resources: [instances], verbs: [get, list, watch]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: read, namespace: NAMESPACE}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: read}
subjects: [{kind: User, name: vm-1}, {kind: Group, name: NAMESPACE-readers}]
";

fn info(namespace: &str, service: &str) -> ServiceInfo {
    ServiceInfo {
        namespace: namespace.into(),
        service_name: service.into(),
        ipaddress: "10.1.0.1".into(),
        ..ServiceInfo::default()
    }
}

/// Whether an answer says that the act was allowed.
fn allowed(status: u32) -> bool {
    assert!(matches!(status, 200 | 201 | 202 | 204 | 403 | 404), "{status}");
    status != 403
}

fn read<T>(answer: Result<T, Status>) -> bool {
    match answer {
        Ok(_) => true,
        Err(status) if status.code() == Code::NotFound => true,
        Err(status) => {
            assert_eq!(status.code(), Code::PermissionDenied, "{status}");
            false
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn server_and_can_i_agree() {
    let Some(rbac) = RbacServer::start("rights-shop", &[]) else { return };
    rbac.cluster.kubectl(&["create", "serviceaccount", "reader", "-n", "rights-shop"]);
    rbac.cluster.create_namespace("rights-other");
    rbac.cluster.apply(
        &READERS
            .replace("NAMESPACE", "rights-shop")
            .replace("User, name: vm-1", "User, name: system:serviceaccount:rights-shop:reader"),
    );
    let groups = ["system:serviceaccounts", "system:serviceaccounts:rights-shop", "system:authenticated"];
    let mut allowed_acts = 0;
    for account in ["web", "reader"] {
        let token = rbac.token(account, "gangplank");
        let (mut registry, mut discovery) = (rbac.registry(&token).await, rbac.discovery(&token).await);
        for namespace in ["rights-shop", "rights-other"] {
            for service in ["web", "api"] {
                let created = registry.register(info(namespace, service)).await.expect("answered").into_inner();
                let deleted = registry.un_register(info(namespace, service)).await.expect("answered").into_inner();
                let named = GetServiceRequest { namespace: namespace.into(), name: service.into() };
                let watched = WatchRequest { namespace: namespace.into(), service: service.into(), cursor: Vec::new() };
                let acts = [
                    ("create", service, allowed(created.status)),
                    ("delete", service, allowed(deleted.status)),
                    ("get", service, read(discovery.get_service(named).await)),
                    ("watch", service, read(discovery.watch(watched).await)),
                ];
                for (verb, service, done) in acts {
                    let may = rbac.can_i(&rbac.user(account), &groups, verb, namespace, service);
                    assert_eq!(done, may, "{account}: {verb} {namespace}/{service}");
                    allowed_acts += usize::from(done);
                }
            }
            let listed = discovery.list_services(ListServicesRequest { namespace: namespace.into() }).await;
            let may = rbac.can_i(&rbac.user(account), &groups, "list", namespace, "");
            assert_eq!(read(listed), may, "{account}: list {namespace}");
        }
        let all = discovery.list_services(ListServicesRequest { namespace: String::new() }).await;
        assert_eq!(read(all), rbac.can_i(&rbac.user(account), &groups, "list", "", ""), "{account}: list all");
    }
    assert_eq!(allowed_acts, 6, "web: create and delete; reader: get and watch of two services");
    let list = ["auth", "can-i", "--list", "-n", "rights-shop", "--as", "system:serviceaccount:rights-shop:web"];
    let rules = rbac.cluster.kubectl(&list);
    let ours: Vec<&str> = rules.lines().filter(|line| line.starts_with("instances.gangplank.dev")).collect();
    assert!(matches!(ours[..], [one] if one.contains("[web]") && one.contains("[create delete]")), "{rules}");
}

#[test]
fn kubectl_can_ask_for_one_service() {
    let Some(lock) = ClusterLock::take() else { return };
    let cluster = lock.cluster;
    cluster.create_namespace("rights-ask");
    cluster.apply(&ROLE.replace("namespace: shop", "namespace: rights-ask"));
    cluster.apply(include_str!("../../../deploy/instances-crd.yaml"));
    cluster.kubectl(&["wait", "--for=condition=Established", "crd/instances.gangplank.dev", "--timeout=60s"]);
    let ask = |verb: &str, service: &str| {
        let resource = format!("instances.gangplank.dev/{service}");
        let user = "system:serviceaccount:rights-ask:web";
        let asked = ["auth", "can-i", verb, &resource, "-n", "rights-ask", "--as", user];
        // `no` is a failure of the command, and its whole output.
        cluster.kubectl_as(&cluster.kubeconfig_admin(), &asked, "")
    };
    assert_eq!(ask("create", "web").as_deref().map(str::trim), Ok("yes"));
    for (verb, service) in [("create", "api"), ("override", "web"), ("list", "web")] {
        let no = ask(verb, service).expect_err("it may not");
        assert!(no.starts_with("no") && !no.contains("doesn't have a resource"), "{no}");
    }
    // Nothing is stored.
    let object = serde_json::json!({"apiVersion": "gangplank.dev/v1", "kind": "Instance", "metadata": {"name": "web"}});
    let path = "/apis/gangplank.dev/v1/namespaces/rights-ask/instances";
    let (status, refused) = cluster.request(Who::Admin, "POST", path, Some(&object)).expect("it runs");
    assert!(status == 422 && refused.to_string().contains("are registered with gangplank"), "{status} {refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_have_the_rights_of_their_user_and_groups() {
    let Some(rbac) = RbacServer::start("rights-vm", &[]) else { return };
    rbac.cluster.apply(&READERS.replace("NAMESPACE", "rights-vm"));
    let (secured, list) = (&rbac.secured, "/gangplank.v1.Discovery/ListServices");
    // `namespace` is field 1.
    let message = [&[0x0a, 9][..], b"rights-vm"].concat();
    for (user, groups, may) in [
        ("vm-1", &[][..], true),
        ("vm-2", &["rights-vm-readers"], true),
        ("vm-2", &["vm-1"], false),
        ("vm-2", &[], false),
    ] {
        let channel = secured.connect(Some(&secured.ca.sign(user, groups))).await.expect("a handshake");
        let answered = call_with(&channel, &[], list, message.clone()).await;
        assert_eq!(read(answered), may, "{user} in {groups:?}");
        let all = [groups, &["system:authenticated"]].concat();
        assert_eq!(rbac.can_i(user, &all, "list", "rights-vm", ""), may, "{user} in {groups:?}");
    }
    // Replicas show each other the certificate of the server.
    let send = "/gangplank.internal.v1.HandOver/Send";
    let replica = secured.connect(Some(&secured.ca.sign("gangplank", &[]))).await.expect("a handshake");
    call_with(&replica, &[], send, request(send)).await.expect("it may hand over");
    let vm = secured.connect(Some(&secured.ca.sign("vm-1", &[]))).await.expect("a handshake");
    let denied = call_with(&vm, &[], send, request(send)).await.expect_err("nobody else may");
    assert_eq!(denied.message(), "vm-1 may not handover instances of all namespaces");
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_needs_rights_with_authorization_kubernetes_only() {
    let Some(rbac) = RbacServer::start("rights-plain", &[]) else { return };
    rbac.secured.server.register("rights-plain", "any", "10.1.0.1", "80");
    drop(rbac);
    let Some(rbac) = RbacServer::start("rights-plain2", &["--authorization", "kubernetes"]) else { return };
    let denied = rbac.secured.server.run(&["register", "any", "10.1.0.1", "-n", "rights-plain2"]);
    let said = String::from_utf8_lossy(&denied.stderr).into_owned();
    assert!(said.contains("gangplank:loopback may not create instances of rights-plain2/any"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_end_when_their_right_is_withdrawn() {
    let Some(rbac) = RbacServer::start("rights-gone", &[]) else { return };
    rbac.cluster.apply(
        &READERS
            .replace("NAMESPACE", "rights-gone")
            .replace("User, name: vm-1", "User, name: system:serviceaccount:rights-gone:web"),
    );
    let token = rbac.token("web", "gangplank");
    let mut stream = rbac.open(&token).await;
    assert_eq!(stream.register("web", "10.1.0.1").await, 201);
    assert_eq!(stream.register("api", "10.1.0.1").await, 403, "a message may fail, and the stream goes on");
    let request = WatchRequest { namespace: "rights-gone".into(), service: String::new(), cursor: Vec::new() };
    let mut watch = rbac.discovery(&token).await.watch(request).await.expect("answered").into_inner();
    watch.message().await.expect("a snapshot");

    rbac.cluster.kubectl(&["delete", "rolebinding", "register-web", "-n", "rights-gone"]);
    let withdrawn = Instant::now();
    let status = tokio::time::timeout(2 * END_TIMEOUT, stream.end()).await.expect("it ends");
    let expected = "system:serviceaccount:rights-gone:web may not create instances of rights-gone/web";
    assert_eq!((status.code(), status.message()), (Code::PermissionDenied, expected));
    assert!(withdrawn.elapsed() < END_TIMEOUT, "after {:?}", withdrawn.elapsed());

    rbac.cluster.kubectl(&["delete", "rolebinding", "read", "-n", "rights-gone"]);
    let withdrawn = Instant::now();
    let status = loop {
        match tokio::time::timeout(2 * END_TIMEOUT, watch.message()).await.expect("it ends") {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended without a status"),
            Err(status) => break status,
        }
    };
    let expected = "system:serviceaccount:rights-gone:web may not watch instances of the namespace rights-gone";
    assert_eq!((status.code(), status.message()), (Code::PermissionDenied, expected));
    assert!(withdrawn.elapsed() < END_TIMEOUT, "after {:?}", withdrawn.elapsed());
}
