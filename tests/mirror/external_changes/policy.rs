//! An admission policy of the cluster that refuses gangplank's objects.

use std::time::Instant;

use hickory_proto::rr::RecordType;
use serde_json::json;

use super::MirrorHarness;
use crate::{
    mirror::wait_for_addresses,
    support::{
        cluster::{Cluster, Who},
        dns::{Over, answers},
        proxy::{Fault, Proxy},
        stream::Stream,
        wait_until,
    },
};

/// Refuses slices in one namespace, and waits until it does.
fn refuse(cluster: &Cluster, namespace: &str, reason: &str) {
    let policy = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
            "metadata": {"name": namespace},
            "spec": {"matchConstraints": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                "resourceRules": [{"apiGroups": ["discovery.k8s.io"], "apiVersions": ["v1"],
                    "resources": ["endpointslices"], "operations": ["CREATE", "UPDATE"]}]},
                "validations": [{"expression": "false", "message": "no slices here", "reason": reason}]}},
        {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
            "metadata": {"name": namespace}, "spec": {"policyName": namespace, "validationActions": ["Deny"]}}]});
    cluster.apply(&policy.to_string());
    let probe = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "probe"}, "endpoints": []});
    let path = format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices?dryRun=All");
    wait_until("the policy is in force", || {
        let (_, answer) = cluster.request(Who::Admin, "POST", &path, Some(&probe)).expect("the API server runs");
        answer["message"].as_str()?.contains("no slices here").then_some(())
    });
}

#[test]
fn objects_refused_by_a_policy_are_retried_slowly_and_reported() {
    let Some(mut harness) = MirrorHarness::with_controllers(&[]) else { return };
    let cluster = harness.cluster;
    let proxy = Proxy::start(cluster);
    harness.restart_empty_with(proxy.kubeconfig(), &[]);
    let cases =
        [("policy-422", "Invalid", "invalid", "Refused"), ("policy-403", "Forbidden", "forbidden", "Forbidden")];
    let gauge = |shown| harness.metric(&format!("gangplank_mirror_services_blocked{{reason=\"{shown}\"}}"));
    for (namespace, reason, ..) in cases {
        harness.create_namespace(namespace);
        refuse(cluster, namespace, reason);
    }
    let begun = Instant::now();
    for (namespace, _, shown, event) in cases {
        let before = gauge(shown);
        let (code, said) = harness.register(namespace, "web", "10.50.0.1", "http=8080");
        assert!(code == Some(0) && said.contains("accepted, not in Kubernetes yet"), "{said}");
        let name = format!("web.{namespace}.svc.cluster.local.");
        assert_eq!(answers(harness.server.dns, Over::Udp, &name, RecordType::A), ["10.50.0.1"], "DNS serves it");
        wait_until("the metric shows it", || (gauge(shown) > before).then_some(()));
        wait_until("an event shows it", || {
            let said = cluster.kubectl(&["describe", "service", "web", "-n", namespace]);
            (said.contains(event) && said.contains("no slices here")).then_some(())
        });
    }
    // A hanging request for an event does not delay other services.
    cluster.create_namespace("policy-hang");
    refuse(cluster, "policy-hang", "Invalid");
    let hung = proxy.inject(Fault::Hang, |call| call.is("create", "events"));
    harness.register("policy-hang", "web", "10.50.1.1", "http=8080");
    hung.wait_hits(1);
    cluster.create_namespace("policy-none");
    wait_until("the namespace is known", || {
        (harness.register("policy-none", "web", "10.50.2.1", "http=8080").0 == Some(0)).then_some(())
    });
    harness.mirrored("policy-none", "web", "10.50.2.2", "http=8080");
    hung.lift();

    for namespace in ["policy-422", "policy-403", "policy-hang"] {
        cluster.kubectl(&["delete", "validatingadmissionpolicybinding,validatingadmissionpolicy", namespace]);
    }
    for (namespace, _, shown, _) in cases {
        wait_for_addresses(cluster, namespace, "web", &["10.50.0.1"]);
        wait_until("the metric is down again", || (gauge(shown) == 0.0).then_some(()));
        let tries = proxy.count(|call| call.is("create", "endpointslices") && call.namespace == namespace);
        // The backoff doubles from a second to half a minute.
        let most = 7 + usize::try_from(begun.elapsed().as_secs() / 30).expect("small");
        assert!((2..=most).contains(&tries), "{tries} tries within {:?}", begun.elapsed());
    }
}

/// A webhook that cannot be reached and fails closed, for slices in one namespace; waits until it is asked.
fn break_webhook(cluster: &Cluster, namespace: &str) {
    let webhook = json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": namespace},
        "webhooks": [{"name": "slices.example.org", "failurePolicy": "Fail", "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
            // Nothing listens on port 1.
            "clientConfig": {"url": "https://127.0.0.1:1/"},
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
            "rules": [{"apiGroups": ["discovery.k8s.io"], "apiVersions": ["v1"],
                "resources": ["endpointslices"], "operations": ["CREATE", "UPDATE"]}]}]});
    cluster.apply(&webhook.to_string());
    let probe = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "probe"}, "endpoints": []});
    let path = format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices?dryRun=All");
    wait_until("the webhook is asked", || {
        let (status, answer) = cluster.request(Who::Admin, "POST", &path, Some(&probe)).expect("the API server runs");
        (status == 500 && answer["message"].as_str()?.contains("failed calling webhook")).then_some(())
    });
}

#[test]
fn failing_webhook_blocks_its_own_objects_only() {
    let Some(mut harness) = MirrorHarness::with_controllers(&[]) else { return };
    let cluster = harness.cluster;
    let proxy = Proxy::start(cluster);
    harness.restart_empty_with(proxy.kubeconfig(), &[]);
    harness.create_namespace("webhook-none");
    harness.create_namespace("webhook");
    break_webhook(cluster, "webhook");
    let gauge = || harness.metric("gangplank_mirror_services_blocked{reason=\"webhook\"}");
    let begun = Instant::now();
    let mut stream = Stream::open(harness.server.grpc);
    for n in 0..20 {
        assert_eq!(stream.register("webhook", &format!("s{n}"), "10.51.0.1").0, 202);
    }
    wait_until("the metric shows them", || (gauge() == 20.0).then_some(()));
    wait_until("an event shows it", || {
        let said = cluster.kubectl(&["describe", "service", "s0", "-n", "webhook"]);
        (said.contains("WebhookFailed") && said.contains("failed calling webhook")).then_some(())
    });
    for n in 0..50 {
        let (status, took) = stream.register("webhook-none", "web", &format!("10.51.1.{n}"));
        assert_eq!(status, 201, "after {took:?}");
    }
    cluster.kubectl(&["delete", "validatingwebhookconfiguration", "webhook"]);
    for n in 0..20 {
        wait_for_addresses(cluster, "webhook", &format!("s{n}"), &["10.51.0.1"]);
    }
    wait_until("the metric is down again", || (gauge() == 0.0).then_some(()));
    let tries = proxy.count(|call| call.is("create", "endpointslices") && call.namespace == "webhook");
    let most = 20 * (7 + usize::try_from(begun.elapsed().as_secs() / 30).expect("small"));
    assert!((40..=most).contains(&tries), "{tries} tries within {:?}", begun.elapsed());
}
