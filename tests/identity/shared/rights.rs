//! The account lacks the right.

use std::{
    fs,
    process::{Command, Stdio},
};

use hickory_proto::rr::RecordType;

use super::{Machine, Shared, empty};
use crate::support::{
    dns::{Over, answers},
    http,
    server::BINARY,
    wait_until,
};

#[test]
fn missing_right_is_named_and_all_else_works() {
    let Some(shared) = Shared::without_the_right("no-secrets-right") else { return };
    shared.cluster.create_namespace("no-secrets-shop");
    let replica = shared.begin(&shared.kubeconfig, empty());
    replica.wait_until_it_writes();
    wait_until("a plaintext client registers", || {
        replica.run(&["register", "web", "10.17.5.1", "-n", "no-secrets-shop"]).status.success().then_some(())
    });
    let found = answers(replica.dns, Over::Udp, "web.no-secrets-shop.svc.cluster.local.", RecordType::A);
    assert_eq!(found, ["10.17.5.1"]);
    let right = "does not let this account get secrets in the namespace no-secrets-right, which deploy/kustomize/rbac-own-ca.yaml grants";
    assert!(replica.log().contains(right), "{}", replica.log());
    let said = replica.fail(&["token", "create"]);
    assert!(said.contains(right), "{said}");
    wait_until("the watch says so", || {
        replica.log().contains("does not let this account list and watch secrets").then_some(())
    });
    assert!(replica.fail(&["token", "ls"]).contains("are not listed yet"));
    assert_eq!(http::get(replica.admin, "/readyz").0, 200);
    shared.grant();
    wait_until("it goes on by itself", || replica.run(&["token", "create"]).status.success().then_some(()));
}

/// A Role in Kubernetes says who lets machines join, for who shows a token of Kubernetes.
#[test]
fn role_says_who_creates_join_tokens() {
    let Some(shared) = Shared::start("token-role") else { return };
    let replica = shared.replica();
    shared.cluster.apply(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: ada, namespace: token-role}\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: Role\nmetadata: {name: ada, namespace: token-role}\n\
         rules:\n- {apiGroups: [gangplank.dev], resources: [tokens], verbs: [create]}\n\
         - {apiGroups: [gangplank.dev], resources: [instances], verbs: [create, get]}\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: RoleBinding\nmetadata: {name: ada, namespace: token-role}\n\
         roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: ada}\n\
         subjects: [{kind: ServiceAccount, name: ada, namespace: token-role}]\n",
    );
    let token = ["create", "token", "ada", "-n", "token-role", "--audience", "gangplank"];
    let files = empty();
    let [token_file, ca_file] = ["token", "ca.crt"].map(|name| files.path().join(name));
    fs::write(&token_file, shared.cluster.kubectl(&token)).expect("written");
    fs::write(&ca_file, shared.ca()).expect("written");
    let create = |namespace: &str, verbs: &str| {
        let mut command = Command::new(BINARY);
        command.args(["token", "create", "-n", namespace, "--verb", verbs, "--server"]);
        command.arg(format!("https://localhost:{}", replica.grpc.port())).arg("--token-file").arg(&token_file);
        command.arg("--cacert").arg(&ca_file).stdin(Stdio::null()).output().expect("the binary can be run")
    };
    let said = |output: std::process::Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let created = crate::identity::joining::token_of(&create("token-role", "create,get"));
    let user = "system:serviceaccount:token-role:ada";
    assert!(said(create("other", "create")).contains(&format!("{user} may not create tokens of the namespace other")));
    let more = said(create("token-role", "delete"));
    assert!(more.contains(&format!("{user} may not delete instances of the namespace token-role")), "{more}");
    let machine = Machine::joined(&created);
    wait_until("the namespace is known", || {
        machine.run(&["register", "web", "10.17.6.1"]).status.success().then_some(())
    });
    assert!(machine.fail(&["deregister", "web", "10.17.6.1"]).contains("its join token does not allow it"));
}
