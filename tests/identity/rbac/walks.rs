//! The walk of a CI job that registers with the token of its ServiceAccount, each step as the documentation says it.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use hickory_proto::rr::RecordType;

use super::RbacServer;
use crate::support::{
    coredns::{CoreDns, corefile},
    dns::{Over, answers},
    server::BINARY,
    tools, wait_until,
};

/// How long the job may take from its token to the answer of CoreDNS.
const MAX_TIME: Duration = Duration::from_secs(10);

#[test]
fn ci_job_registers_with_the_token_of_its_account() {
    let Some(coredns) = tools::require("coredns") else { return };
    let Some(rbac) = RbacServer::start("walk-ci", &[]) else { return };
    let coredns = CoreDns::start(
        &coredns,
        &corefile("stub-domain.Corefile", rbac.secured.server.dns).replace("prod.svc", "walk-ci.svc"),
    );
    let begun = Instant::now();
    let token = rbac.secured.write("token", &rbac.token("web", "gangplank"));
    let job = |arguments: &[&str]| {
        let mut command = Command::new(BINARY);
        command.args(arguments).args(["-n", "walk-ci", "--server", &rbac.secured.url(), "--token-file", &token]);
        let ca = rbac.secured.file("ca.crt");
        let output = command.arg("--cacert").arg(ca).env_remove("GANGPLANK_SERVER").output();
        output.expect("the binary can be run")
    };
    let done = job(&["register", "web", "10.1.0.1"]);
    assert!(done.status.success(), "{done:?}");
    wait_until("the name is there", || {
        let found = answers(coredns.address, Over::Udp, "web.walk-ci.svc.cluster.local.", RecordType::A);
        (found == ["10.1.0.1"]).then_some(())
    });
    let took = begun.elapsed();
    println!("from the request for a token to an answer of CoreDNS: {took:?}");
    assert!(took < MAX_TIME, "{took:?}");
    // The Role is for one service.
    let refused = job(&["register", "api", "10.1.0.1"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    let expected = "system:serviceaccount:walk-ci:web may not create instances of walk-ci/api";
    assert!(!refused.status.success() && said.contains(expected), "{said}");
    assert!(job(&["deregister", "web", "10.1.0.1"]).status.success());
}
