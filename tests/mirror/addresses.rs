//! Addresses are rights: not those of the cluster's Services, and in a namespace those that its annotation allows.

use tempfile::TempDir;

use super::{MirrorHarness, events};
use crate::{
    identity::{
        connect,
        ownership::{Registrant, TEAM_POLICY},
        pki::TestCa,
        security_flags,
    },
    support::{stream::Stream, wait_until},
};

#[test]
fn addresses_of_services_and_outside_the_annotation_are_refused_to_identities() {
    let (ca, files) = (TestCa::new(), TempDir::new().expect("a temporary directory can be made"));
    let flags = security_flags(&ca, files.path(), TEAM_POLICY);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let Some(harness) = MirrorHarness::start(&flags) else { return };
    harness.create_namespace("addressed");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let credential = ca.sign("vm-1", &["web"]);
    let channel = runtime.block_on(connect(harness.server.grpc, &ca, Some(&credential))).expect("a handshake");
    let mut vm = Registrant::new(channel, "addressed");
    let mut register = |address: &str| runtime.block_on(vm.register(address, 1.0));
    // 503 until the ranges are known.
    wait_until("an identity may register", || (register("10.72.0.1").0 < 300).then_some(()));

    let kubectl = |arguments: &[&str]| harness.cluster.kubectl(arguments);
    let cluster_ip = kubectl(&["get", "service", "kubernetes", "-n", "default", "-o", "jsonpath={.spec.clusterIP}"]);
    let (status, details) = register(&cluster_ip);
    assert!(status == 403 && details.contains("a range of the cluster's own Services"), "{status} {details}");
    assert_eq!(
        Stream::open(harness.server.grpc).register("addressed", "web", &cluster_ip).0,
        201,
        "in plaintext as before"
    );
    harness.cluster.apply(
        "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata:\n  name: more\nspec:\n  cidrs: [10.72.9.0/24]\n",
    );
    wait_until("the new range is known", || (register("10.72.9.1").0 == 403).then_some(()));
    assert!(register("10.72.9.1").1.contains("it is in 10.72.9.0/24"));
    kubectl(&["delete", "servicecidr", "more", "--wait=false"]);

    let annotate = |value: &str| {
        let value = format!("gangplank.dev/addresses{value}");
        kubectl(&["annotate", "namespace", "addressed", "--overwrite", &value]);
    };
    annotate("=10.72.1.0/24, own");
    wait_until("the annotation counts", || (register("10.72.2.1").0 == 403).then_some(()));
    let said = "ipaddress: 10.72.2.1 may not be registered: the annotation gangplank.dev/addresses of addressed allows \
                \"10.72.1.0/24, own\" only";
    assert_eq!(register("10.72.2.1"), (403, said.into()));
    assert_eq!(register("10.72.1.1").0, 201);
    annotate("=10.72.1.0/99");
    wait_until("an invalid one allows nothing", || (register("10.72.1.2").0 == 403).then_some(()));
    let (status, details) = register("10.72.1.1");
    assert!(status == 403 && details.contains("is invalid: \"10.72.1.0/99\""), "{status} {details}");
    let log = harness.server.stderr();
    assert!(log.contains("the annotation is invalid") && log.contains("gangplank.dev/addresses"), "{log}");
    let event = wait_until("an Event tells the namespace's owner", || {
        events(harness.cluster, "addressed", "InvalidAnnotation").pop()
    });
    assert_eq!(event.0, "Namespace addressed");
    assert!(event.1.contains("gangplank.dev/addresses is invalid"), "{}", event.1);
    annotate("-");
    wait_until("no limit", || (register("10.72.3.1").0 < 300).then_some(()));
}
