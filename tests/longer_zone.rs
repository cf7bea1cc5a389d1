//! RFC 1035 §2.3.4: a data directory under a longer `--zone`, with names that do not fit any more.

use std::time::Instant;

use hickory_proto::rr::RecordType;

use crate::support::{
    WAIT_TIMEOUT,
    dns::{Over, answers},
    http,
    server::{Process, Server},
};

#[test]
fn only_names_up_to_255_octets_are_served_in_a_longer_zone() {
    let host = "h".repeat(60);
    let zone = format!("{0}.{0}.{1}.local", "z".repeat(63), "z".repeat(50));
    let server = Server::start();
    let long = ["register", "web", "10.0.0.1", "--port", "http=80", "--host-name", &host, "-n", "prod"];
    let registered = server.run(&long);
    assert!(registered.status.success(), "{registered:?}");
    server.register("prod", "web", "10.0.0.2", "http=80");

    let data = server.into_data();
    let process = Process::serve(data.path(), &["--zone", &zone]);
    let (_, [_, dns, admin]) = process.ready();
    let web = format!("web.prod.svc.{zone}.");
    let mut addresses = answers(dns, Over::Udp, &web, RecordType::A);
    addresses.sort();
    assert_eq!(addresses, ["10.0.0.1", "10.0.0.2"]);
    let srv = answers(dns, Over::Udp, &format!("_http._tcp.{web}"), RecordType::SRV);
    assert_eq!(srv, [format!("0 100 80 10-0-0-2.{web}")]);

    let (_, scrape) = http::get(admin, "/metrics");
    assert!(scrape.contains("\ngangplank_registry_unservable_instances 1\n"), "{scrape}");
    let begun = Instant::now();
    while !process.stderr().contains("those names are not served instances=1 example=\"prod/web 10.0.0.1:80\"") {
        // The log comes through a pipe of its own and may be read later than the answers.
        assert!(begun.elapsed() < WAIT_TIMEOUT, "{}", process.stderr());
        http::get(admin, "/livez");
    }
}
