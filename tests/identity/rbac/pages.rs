//! Pages of the admin listener, by token and by RBAC.

use std::time::{Duration, Instant};

use super::{
    super::{
        admin::{BEYOND, ODD_PATHS, assert_challenged, beyond, client, pages},
        matrix::END_TIMEOUT,
    },
    RbacServer,
};
use crate::support::{http, https::Answer, proxy::Fault, wait_until};

/// Who scrapes.
const SCRAPER: &str = include_str!("../../../deploy/metrics-reader.yaml");

/// Who reads the instances of the namespace.
const READER: &str = "\
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: read, namespace: NAMESPACE}
rules: [{apiGroups: [gangplank.dev], resources: [instances], verbs: [get, list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: read, namespace: NAMESPACE}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: read}
subjects: [{kind: ServiceAccount, name: reader, namespace: NAMESPACE}]
";

/// The subject of a binding that is a user.
const SUBJECT: &str = "  - kind: ServiceAccount\n    name: prometheus\n    namespace: monitoring";

fn with_accounts(namespace: &str, flags: &[&str]) -> Option<RbacServer> {
    let rbac = RbacServer::start(namespace, &[&BEYOND[..], flags].concat())?;
    for account in ["prometheus", "reader", "gone"] {
        rbac.cluster.kubectl(&["create", "serviceaccount", account, "-n", namespace]);
    }
    rbac.cluster.apply(&READER.replace("NAMESPACE", namespace));
    allow(&rbac, "account", "");
    Some(rbac)
}

/// The ClusterRole, whose name ends in `name`, for a user; without one for the account.
fn allow(rbac: &RbacServer, name: &str, user: &str) {
    let role = if user.is_empty() {
        SCRAPER.replace("namespace: monitoring", &format!("namespace: {}", rbac.namespace))
    } else {
        SCRAPER.replace(SUBJECT, &format!("  - kind: User\n    name: {user}"))
    };
    assert!(role.contains(if user.is_empty() { &rbac.namespace } else { user }), "{role}");
    rbac.cluster.apply(&role.replace("gangplank-metrics-reader", &binding(rbac, name)));
}

fn binding(rbac: &RbacServer, name: &str) -> String {
    format!("{}-{name}", rbac.namespace)
}

fn get(rbac: &RbacServer, path: &str, token: Option<&str>) -> Answer {
    let shown = token.map(|token| format!("Bearer {token}"));
    let headers: Vec<_> = shown.iter().map(|shown| ("Authorization", shown.as_str())).collect();
    client(&rbac.secured.ca, None).get(beyond(&rbac.secured.server), path, &headers).expect("answered")
}

#[test]
fn pages_are_shown_to_whom_rbac_allows_them() {
    let Some(rbac) = with_accounts("pages-matrix", &[]) else { return };
    let token = |account: &str| rbac.token(account, "gangplank");
    let (prometheus, reader, web) = (token("prometheus"), token("reader"), token("web"));
    let bad = [
        ("another audience", rbac.token("prometheus", "https://kubernetes.default.svc")),
        ("a deleted account", token("gone")),
        ("no token", "nonsense".into()),
        ("another signature", prometheus[..prometheus.len() - 8].to_owned() + "AAAAAAAA"),
    ];
    rbac.cluster.kubectl(&["delete", "serviceaccount", "gone", "-n", "pages-matrix"]);
    let groups = ["system:serviceaccounts", "system:serviceaccounts:pages-matrix", "system:authenticated"];
    let mut shown = Vec::new();
    for (page, open) in pages() {
        let path = page.replace("/shop/", "/pages-matrix/");
        if open {
            assert_eq!(get(&rbac, &path, None).status, 200, "{path}");
            continue;
        }
        assert_challenged(&get(&rbac, &path, None), &path);
        for (what, token) in &bad {
            assert_challenged(&get(&rbac, &path, Some(token)), &format!("{path}: {what}"));
        }
        for (account, token) in [("prometheus", &prometheus), ("reader", &reader), ("web", &web)] {
            let user = rbac.user(account);
            let instances = |verb, service| rbac.can_i(&user, &groups, verb, "pages-matrix", service);
            let may_read = match path.strip_prefix("/api/v1/") {
                Some("services") => rbac.can_i(&user, &groups, "list", "", ""),
                Some("namespaces/pages-matrix/services") => instances("list", ""),
                Some("namespaces/pages-matrix/services/web") => instances("get", "web"),
                _ => true,
            };
            let may = rbac.can_get(&user, &groups, &path) && may_read;
            let answer = get(&rbac, &path, Some(token));
            assert_eq!(matches!(answer.status, 200 | 404), may, "{account}: {path}: {answer:?}");
            assert!(may || answer.status == 403, "{account}: {path}: {answer:?}");
            shown.extend(may.then(|| format!("{account} {page}")));
        }
    }
    let expected = [
        "prometheus /metrics",
        // Of these every account of a cluster may get the path: the ClusterRole system:discovery.
        "prometheus /api/v1/replica",
        "reader /api/v1/replica",
        "web /api/v1/replica",
        "prometheus /api/v1/status",
        "reader /api/v1/status",
        "web /api/v1/status",
        "reader /api/v1/namespaces/shop/services",
        "reader /api/v1/namespaces/shop/services/web",
    ];
    assert_eq!(shown, expected);
    assert!(rbac.can_get(&rbac.user("web"), &groups, "/api/v1/services"), "as every account of every cluster");
    for path in ODD_PATHS {
        for token in [&prometheus, &reader, &web] {
            assert_eq!(get(&rbac, path, Some(token)).status, 403, "{path}");
        }
    }
    // Most of the lines were left out: ten a second are written.
    let line = "denied: get /metrics user=system:serviceaccount:pages-matrix:web peer=127.0.0.1";
    wait_until("a refusal is logged", || {
        assert_eq!(get(&rbac, "/metrics", Some(&web)).status, 403);
        rbac.secured.server.stderr().contains(line).then_some(())
    });
    let said = rbac.secured.server.stderr();
    assert!(said.contains("a token is refused"), "{said}");
    assert!(rbac.metric("gangplank_unauthenticated_calls_total{reason=\"bad_token\"}") >= 4.0 * 6.0);
    assert!(rbac.metric("gangplank_unauthenticated_calls_total{reason=\"no_credentials\"}") >= 6.0);
    assert!(rbac.metric("gangplank_authorization_decisions_total{result=\"denied\"}") >= 12.0);
}

#[test]
fn certificate_has_the_rights_of_its_user_and_a_machine_that_joined_none() {
    let Some(rbac) = with_accounts("pages-cert", &["--authorization", "kubernetes"]) else { return };
    let (server, ca) = (&rbac.secured.server, &rbac.secured.ca);
    let joined = "gangplank:registrant:0123456789abcdef";
    for (name, user) in [("vm", "vm-1"), ("joined", joined)] {
        allow(&rbac, name, user);
        assert!(rbac.can_get(user, &["system:authenticated"], "/metrics"), "{user}");
    }
    for (user, status) in [("vm-1", 200), ("vm-2", 403), (joined, 403)] {
        let who = client(ca, Some(&ca.sign(user, &[])));
        assert_eq!(who.get(beyond(server), "/metrics", &[]).expect("answered").status, status, "{user}");
    }
    // With --authorization loopback needs rights, too.
    let (status, said) = http::get(server.admin, "/metrics");
    assert!(status == 403 && said.contains("gangplank:loopback may not get /metrics"), "{status}: {said}");
    assert_eq!(http::get(server.admin, "/readyz").0, 200);
    allow(&rbac, "loopback", "gangplank:loopback");
    wait_until("the right counts", || (http::get(server.admin, "/metrics").0 == 200).then_some(()));
}

#[test]
fn right_that_is_withdrawn_and_account_that_is_deleted_see_nothing_more() {
    let Some(rbac) = with_accounts("pages-gone", &[]) else { return };
    allow(&rbac, "vm", "vm-1");
    let token = rbac.token("prometheus", "gangplank");
    let authorization = format!("Bearer {token}");
    let mut connection = client(&rbac.secured.ca, None).connect(beyond(&rbac.secured.server)).expect("a handshake");
    let mut ask = || {
        let answer = connection.ask("GET /metrics", &[("Authorization", &authorization)]);
        answer.expect("the connection stays open").status
    };
    assert_eq!(ask(), 200);
    rbac.cluster.kubectl(&["delete", "clusterrolebinding", &binding(&rbac, "account")]);
    let withdrawn = Instant::now();
    wait_until("it is denied", || (ask() == 403).then_some(()));
    assert!(withdrawn.elapsed() < END_TIMEOUT, "after {:?}", withdrawn.elapsed());

    allow(&rbac, "account", "");
    wait_until("it is allowed again", || (ask() == 200).then_some(()));
    rbac.cluster.kubectl(&["delete", "serviceaccount", "prometheus", "-n", "pages-gone"]);
    let deleted = Instant::now();
    wait_until("it is refused", || (ask() == 401).then_some(()));
    // The API server remembers a token for 10 s, and so does gangplank.
    assert!(deleted.elapsed() < Duration::from_secs(20), "after {:?}", deleted.elapsed());
}

#[test]
fn nothing_is_shown_while_nobody_can_say_who_may_see_it() {
    let Some(rbac) = with_accounts("pages-outage", &[]) else { return };
    allow(&rbac, "vm", "vm-1");
    let (server, ca) = (&rbac.secured.server, &rbac.secured.ca);
    let [known, other] = ["vm-1", "vm-2"].map(|user| client(ca, Some(&ca.sign(user, &[]))));
    let status = |who: &crate::support::https::HttpsClient| who.get(beyond(server), "/metrics", &[]).expect("answered");
    assert_eq!(status(&known).status, 200);
    let prometheus = rbac.token("prometheus", "gangplank");
    let away = rbac.proxy.inject(Fault::Drop, |_| true);
    for answer in [status(&other), get(&rbac, "/metrics", Some(&prometheus))] {
        assert_eq!(answer.status, 503, "{answer:?}");
        assert!(answer.head.to_ascii_lowercase().contains("\r\nretry-after: "), "{answer:?}");
        assert!(answer.body.contains("Kubernetes cannot be asked now"), "{answer:?}");
    }
    assert_eq!(get(&rbac, "/livez", None).status, 200);
    // What was decided holds for longer than reviews count else.
    let begun = Instant::now();
    wait_until("a while", || {
        assert_eq!(status(&known).status, 200, "after {:?}", begun.elapsed());
        (begun.elapsed() > Duration::from_secs(12)).then_some(())
    });
    assert!(rbac.metric("gangplank_stale_decisions_total") >= 1.0);
    away.lift();
    wait_until("it is decided", || (status(&other).status == 403).then_some(()));
    wait_until("it is reviewed", || (get(&rbac, "/metrics", Some(&prometheus)).status == 200).then_some(()));
}
