//! Servers with certificates of the operator's CA, whose machines have theirs of the CA in the Secret.

use super::{Machine, Replica, Shared, empty, lead, names};
use crate::{
    identity::{TestCa, flag_file, joining::token_of, tls_flags},
    support::{server::Process, wait_until},
};

#[test]
fn machine_joins_one_of_them_and_is_known_to_the_other() {
    let Some(shared) = Shared::start("files-ca") else { return };
    shared.cluster.create_namespace("files-ca-shop");
    let (ca, files) = (TestCa::new(), empty());
    let start = || {
        let data = empty();
        let mut flags = shared.flags(&shared.kubeconfig);
        flags.extend(tls_flags(&ca, files.path()));
        flags.extend(["--tls-server-ca".into(), flag_file(files.path(), "server-ca.crt", &ca.pem)]);
        let process = Process::serve(data.path(), &flags);
        let [grpc, dns, admin] = process.listening();
        let replica = Replica { process, grpc, dns, admin, data };
        replica.wait_until_ready();
        replica
    };
    let writer = start();
    writer.wait_until_it_writes();
    let follower = start();
    assert_ne!(shared.ca(), ca.pem, "the CA of gangplank's own, which signs for machines");
    let created = follower.run(&["token", "create", "-n", "files-ca-shop", "--service", "web"]);
    let machine = Machine::joined(&token_of(&created));
    assert_eq!(machine.file("server-ca.crt"), ca.pem);
    lead(&machine, &[writer.grpc]);
    machine.succeed(&["renew", "--now"]);
    wait_until("the namespace is known", || {
        machine.run(&["register", "web", "10.17.7.1"]).status.success().then_some(())
    });
    assert!(machine.fail(&["register", "api", "10.17.7.1"]).contains("its join token does not allow it"));
    let name = names(&writer).remove(0);
    follower.succeed(&["registrants", "revoke", &name]);
    wait_until("the other one knows", || machine.fail(&["ls", "web"]).contains("was revoked").then_some(()));
}
