//! A process whose clock is wrong leaves the Lease to others, and follows. The rounds do the same under load.

use super::{ClusterLock, empty, plan::FAR_OFF};
use crate::{
    mirror::{make_namespace, replica::Replica},
    support::{http, stream::Stream, wait_until},
};

#[test]
fn process_with_a_wrong_clock_does_not_take_a_free_lease() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    for offset in [FAR_OFF, -FAR_OFF] {
        let wrong = Replica::start_with_clock(&kubeconfig, empty(), &[], offset);
        wait_until("it says that its clock is wrong", || {
            wrong.stderr().contains("more than a second from the API server's").then_some(())
        });
        let right = Replica::start(&kubeconfig, empty());
        right.wait_until_it_writes();
        wrong.wait_until_it_follows();
        // Nobody else wants it now.
        right.terminate();
        let lease = || {
            let lease =
                lock.cluster.get_json("/apis/coordination.k8s.io/v1/namespaces/gangplank/leases/gangplank-writer");
            lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned()
        };
        assert_eq!(lease(), "", "it was released");
        let again = Replica::start(&kubeconfig, empty());
        again.wait_until_it_writes();
        assert_eq!(http::get(wrong.admin, "/readyz").0, 200, "its DNS answers");
        assert!(!wrong.stderr().contains("this process writes"), "{}", wrong.stderr());
        again.terminate();
    }
}

/// The Lease still names it, and nobody else wants it. What it accepted would be stamped in the future.
#[test]
fn killed_writer_with_a_wrong_clock_takes_no_registrations_when_it_is_back() {
    let Some(lock) = ClusterLock::take() else { return };
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let writer = Replica::start(&kubeconfig, empty());
    writer.wait_until_it_writes();
    make_namespace(lock.cluster, &mut Stream::open(writer.grpc), "wrong-clock");
    let data = writer.kill();
    let back = Replica::start_with_clock(&kubeconfig, data, &[], FAR_OFF);
    // It would go on with what is stored after 5 s without a Lease.
    wait_until("its DNS is ready", || (http::get(back.admin, "/readyz").0 == 200).then_some(()));
    for _ in 0..20 {
        assert_eq!(back.register("wrong-clock", "web", "10.0.0.1"), 503, "{}", back.stderr());
    }
    let said = back.stderr();
    assert!(
        said.contains("more than a second from the API server's") && !said.contains("this process writes"),
        "{said}"
    );
}
