//! A server without certificate files that listens beyond loopback: it has a CA of its own.

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command};

use tempfile::TempDir;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{
    joining::{Machine, connect_to, token_of},
    streams::LongStream,
};
use crate::support::{
    server::{BINARY, Process, Server},
    wait_until,
};

/// Beside loopback, where the tests connect.
pub(super) const FLAGS: [&str; 4] = ["--grpc-listen", "0.0.0.0:0", "--advertise", "gangplank.example.com"];

/// A connection that trusts the CA in the server's data directory, and expects `name` in the certificate.
async fn connect(server: &Server, ca: &str, name: &str) -> Result<Channel, tonic::transport::Error> {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)).domain_name(name);
    Endpoint::from_shared(format!("https://127.0.0.1:{}", server.grpc.port()))?.tls_config(tls)?.connect().await
}

fn read(server: &Server, file: &str) -> String {
    fs::read_to_string(server.data_dir().join(file)).expect("a file")
}

#[tokio::test(flavor = "multi_thread")]
async fn server_without_files_has_a_certificate_of_its_own_ca() {
    let server = Server::start_with(&FLAGS);
    let mode = fs::metadata(server.data_dir().join("ca.key")).expect("a key").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let ca = read(&server, "ca.crt");
    for name in ["127.0.0.1", "localhost", "gangplank.example.com"] {
        let channel = connect(&server, &ca, name).await.unwrap_or_else(|err| panic!("{name}: {err:?}"));
        let refused = HealthClient::new(channel).check(HealthCheckRequest::default()).await.expect_err("no identity");
        assert_eq!(refused.code(), tonic::Code::Unauthenticated, "{name}: {refused}");
    }
    assert!(connect(&server, &ca, "other.example.com").await.is_err(), "not a name of this server");
    assert!(connect(&server, &super::TestCa::new().pem, "localhost").await.is_err(), "not the CA of this server");
    // Loopback plaintext stays as it is.
    server.register("shop", "web", "10.1.0.1", "80");

    let server = server.restart();
    assert_eq!(read(&server, "ca.crt"), ca, "the CA is the same after a restart");
}

/// A certificate of the server lives for 90 days; here for 460 s, of which it has 160 s left when it is made: it is renewed at two
/// thirds, after some 7 s, again and again.
#[tokio::test(flavor = "multi_thread")]
async fn stream_is_held_while_the_certificate_of_the_server_is_renewed() {
    let data = TempDir::new().expect("a directory");
    let server =
        Process::serve_with_variable(("GANGPLANK_TEST_SERVER_LIFETIME_S", "460"), data.path(), &super::joining::FLAGS);
    let (_, [grpc, ..]) = server.ready();
    let mut create = Command::new(BINARY);
    create.args(["token", "create", "-n", "shop"]).env("GANGPLANK_SERVER", format!("http://{grpc}"));
    let machine = Machine::joined(&token_of(&create.output().expect("the binary can be run")));
    let mut stream = LongStream::on(connect_to(grpc, machine.tls()).await).await.expect("a good stream");
    let renewals = || server.stderr().matches("the certificate, the key or the client CA has changed").count();
    for renewal in 1..=2 {
        wait_until("the certificate is renewed", || (renewals() >= renewal).then_some(()));
        assert_eq!(stream.say(&format!("10.1.0.{}", renewal + 1)).await.expect("the stream goes on"), 201);
        let new = connect_to(grpc, machine.tls()).await;
        LongStream::on(new).await.expect("a new connection has the new one");
    }
}

#[test]
fn server_whose_ca_is_damaged_does_not_start() {
    let data = Server::start_with(&FLAGS).into_data();
    fs::remove_file(data.path().join("ca.key")).expect("removed");
    let mut process = Process::serve(data.path(), &FLAGS);
    assert!(!process.exit().success());
    assert!(process.stderr().contains("ca.key: is missing"), "{}", process.stderr());
}
