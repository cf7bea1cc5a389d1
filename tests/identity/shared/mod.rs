//! Several gangplanks with one CA, whose tokens and registrants are Secrets of a real API server.

mod ca;
mod matrix;
mod outage;
mod own_certificate;
mod registrants;
mod rights;
mod tokens;

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use gangplank::identity::joining::JoinToken;
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use super::joining::{Machine, token_of};
use crate::{
    mirror::ClusterLock,
    support::{
        cluster::{Cluster, Who, in_namespace},
        http,
        server::{BINARY, Process},
        wait_until,
    },
};

/// A namespace of a test's own, in which its gangplanks have their Lease and their Secrets.
struct Shared {
    cluster: &'static Cluster,
    namespace: String,
    kubeconfig: PathBuf,
    _lock: ClusterLock,
}

/// One of the gangplanks, which listens beyond loopback too.
struct Replica {
    process: Process,
    /// Over loopback: plaintext and TLS.
    grpc: SocketAddr,
    dns: SocketAddr,
    admin: SocketAddr,
    data: TempDir,
}

fn empty() -> TempDir {
    TempDir::new().expect("a directory")
}

impl Shared {
    /// `None` without a control plane, which is reported.
    fn start(namespace: &str) -> Option<Self> {
        let shared = Self::without_the_right(namespace)?;
        shared.grant();
        Some(shared)
    }

    /// The account may do all but have Secrets.
    fn without_the_right(namespace: &str) -> Option<Self> {
        let lock = ClusterLock::take()?;
        let cluster = lock.cluster;
        cluster.create_namespace(namespace);
        cluster.apply(&in_namespace(include_str!("../../../deploy/kustomize/rbac.yaml"), namespace));
        cluster.release_lease_in(namespace);
        let (namespace, kubeconfig) = (namespace.to_owned(), cluster.kubeconfig_for_gangplank());
        Some(Self { cluster, namespace, kubeconfig, _lock: lock })
    }

    fn grant(&self) {
        self.cluster.apply(&in_namespace(include_str!("../../../deploy/kustomize/rbac-own-ca.yaml"), &self.namespace));
    }

    fn flags(&self, kubeconfig: &Path) -> Vec<String> {
        let kubeconfig = kubeconfig.to_str().expect("UTF-8");
        let flags = ["--kubeconfig", kubeconfig, "--lease-namespace", &self.namespace, "--drain", "1s"];
        [&flags[..], &super::joining::FLAGS].concat().into_iter().map(str::to_owned).collect()
    }

    /// Starts a process, and does not wait until it is ready.
    fn begin(&self, kubeconfig: &Path, data: TempDir) -> Replica {
        self.begin_with(kubeconfig, data, 0)
    }

    /// The same with the clock shifted by so many milliseconds.
    fn begin_with(&self, kubeconfig: &Path, data: TempDir, offset: i64) -> Replica {
        let process = Process::serve_with_clock(offset, data.path(), &self.flags(kubeconfig));
        let [grpc, dns, admin] = process.listening();
        Replica { process, grpc, dns, admin, data }
    }

    /// Starts a process, and waits until it answers and knows who joined.
    fn replica(&self) -> Replica {
        let replica = self.begin(&self.kubeconfig, empty());
        replica.wait_until_ready();
        replica
    }

    /// The one that writes, and one that follows it.
    fn writer_and_follower(&self) -> (Replica, Replica) {
        let writer = self.replica();
        writer.wait_until_it_writes();
        (writer, self.replica())
    }

    fn path(&self, name: &str) -> String {
        let path = format!("/api/v1/namespaces/{}/secrets", self.namespace);
        if name.is_empty() { path } else { format!("{path}/{name}") }
    }

    /// The Secrets of a kind.
    fn secrets(&self, kind: &str) -> Vec<Value> {
        let list = self.cluster.get_json(&format!("{}?labelSelector=gangplank.dev/joining%3D{kind}", self.path("")));
        list["items"].as_array().expect("a list").clone()
    }

    fn admin(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        self.cluster.request(Who::Admin, method, path, body).expect("the API server runs")
    }

    /// Changes the JSON in a Secret, as somebody does who may.
    fn edit(&self, name: &str, key: &str, change: impl Fn(&mut Value)) {
        let mut secret = self.cluster.get_json(&self.path(name));
        let mut stored: Value = serde_json::from_slice(&decoded(&secret, key)).expect("JSON");
        change(&mut stored);
        secret["data"][key] = STANDARD.encode(stored.to_string()).into();
        let (status, answer) = self.admin("PUT", &self.path(name), Some(&secret));
        assert_eq!(status, 200, "{answer}");
    }

    /// The CA in its Secret, in PEM.
    fn ca(&self) -> String {
        let secret = self.cluster.get_json(&self.path("gangplank-ca"));
        String::from_utf8(decoded(&secret, "tls.crt")).expect("PEM")
    }
}

/// What a Secret holds under a key.
fn decoded(secret: &Value, key: &str) -> Vec<u8> {
    STANDARD.decode(secret["data"][key].as_str().expect("it is there")).expect("base64")
}

impl Replica {
    fn wait_until_ready(&self) {
        wait_until("it answers and knows who joined", || {
            let listed = self.metric("gangplank_kubernetes_lists_total{resource=\"secrets\"}") >= 1;
            (listed && http::get(self.admin, "/readyz").0 == 200).then_some(())
        });
    }

    fn wait_until_it_writes(&self) {
        wait_until("it writes", || (http::get(self.admin, "/readyz/registrations").0 == 200).then_some(()));
    }

    fn metric(&self, series: &str) -> u64 {
        let text = http::get(self.admin, "/metrics").1;
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().expect("a number")
    }

    /// What an operator on its machine types.
    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(BINARY);
        command.args(arguments).env("GANGPLANK_SERVER", format!("http://{}", self.grpc)).stdin(Stdio::null());
        command.output().expect("the binary can be run")
    }

    fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    fn fail(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(!output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stderr).expect("UTF-8")
    }

    fn create_token(&self, arguments: &[&str]) -> JoinToken {
        let created = self.run(&[&["token", "create"], arguments].concat());
        token_of(&created).parse().expect("a token")
    }

    /// A machine that joined by this process, and knows no other.
    fn joined(&self, arguments: &[&str]) -> Machine {
        let mut token = self.create_token(arguments);
        token.addresses.truncate(1);
        Machine::joined(&token.to_string())
    }

    /// Completes a handshake as a client that trusts `ca`.
    async fn handshake(&self, ca: &str) -> Result<Channel, tonic::transport::Error> {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca));
        Endpoint::from_shared(format!("https://localhost:{}", self.grpc.port()))?.tls_config(tls)?.connect().await
    }

    fn log(&self) -> String {
        self.process.stderr()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.data.path().join(name)
    }

    /// Sends SIGKILL, and returns the data directory.
    fn kill(self) -> TempDir {
        // Dropping a process kills it.
        drop(self.process);
        self.data
    }
}

/// The registrants, by name, in order of joining.
fn names(replica: &Replica) -> Vec<String> {
    let listed = replica.succeed(&["registrants", "ls", "-A", "-o", "name"]);
    listed.lines().map(str::to_owned).collect()
}

/// Points a machine to servers, in this order.
fn lead(machine: &Machine, servers: &[SocketAddr]) {
    let mut config: Value = serde_json::from_str(&machine.file("client.json")).expect("JSON");
    config["servers"] =
        json!(servers.iter().map(|one| format!("https://localhost:{}", one.port())).collect::<Vec<_>>());
    fs::write(machine.0.path().join("client.json"), config.to_string()).expect("written");
}
