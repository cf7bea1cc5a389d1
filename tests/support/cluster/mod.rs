//! A real Kubernetes control plane: etcd and kube-apiserver, and the controller manager where a
//! test needs it, as child processes on free ports of loopback.
//!
//! RBAC is on, certificates are real, and gangplank's account has the rights of `deploy/` and no
//! others: every cluster here has the rights applied and `admission-policy.yaml` in force.
//! There is no kubelet, so that pods stay Pending, and no ServiceAccount admission, so that a
//! namespace can be used as soon as it is made. Without the controller manager nothing collects
//! garbage and a deleted namespace stays Terminating.
//!
//! - [`Cluster::shared`] is one for all tests. A test uses a namespace of its own, and cannot stop
//!   anything: stopping needs `&mut`.
//! - [`Cluster::private`] is for tests that stop programs. It costs several seconds and 300 MB, a third more with controllers.
//!
//! Both die with the test process, however that ends (see [`daemon`]).

mod client;
mod daemon;
mod pki;

use std::{
    env, fs,
    io::{self, Write as _},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use serde_json::{Value, json};
use tokio_rustls::rustls::{ClientConfig, ServerConfig};

pub(crate) use self::pki::CONTEXT;
use self::{
    daemon::{Daemon, Watchdog},
    pki::Pki,
};
use super::{
    free_ports,
    tools::{self, ROOT},
    wait_until,
};

/// The controllers that work without nodes.
const CONTROLLERS: &str = "namespace-controller,serviceaccount-controller,endpointslice-controller,\
    endpointslice-mirroring-controller,garbage-collector-controller,cronjob-controller,job-controller";

/// A control plane that runs until it is dropped.
pub(crate) struct Cluster {
    // Fields are dropped in this order, and the watchdog goes last.
    controllers: Option<Daemon>,
    api_server: Option<Daemon>,
    etcd: Daemon,
    programs: Programs,
    pki: Pki,
    etcd_port: u16,
    port: u16,
    token: String,
    files: AtomicU32,
    watchdog: Watchdog,
}

/// The account of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    /// `system:masters`: may do everything.
    Admin,
    /// The ServiceAccount of `deploy/kustomize/rbac.yaml`.
    Gangplank,
}

/// The programs of one Kubernetes release.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    release: String,
    bin: PathBuf,
}

impl Programs {
    /// The release that `GANGPLANK_TEST_KUBERNETES` names, 1.36 unless set.
    fn require() -> Option<Self> {
        let release = env::var("GANGPLANK_TEST_KUBERNETES").unwrap_or_else(|_| "1.36".to_owned());
        let bin = Path::new(ROOT).join(format!("target/tools/kubernetes-{release}/bin"));
        let needed = ["etcd", "kube-apiserver", "kube-controller-manager", "kubectl"];
        if let Some(missing) = needed.iter().find(|name| !bin.join(name).exists()) {
            tools::not_run(&format!(
                "{missing} of Kubernetes {release} is missing: `tests/tools/install.sh kubernetes` builds it, with Go"
            ));
            return None;
        }
        Some(Self { release, bin })
    }

    fn command(&self, name: &str) -> Command {
        Command::new(self.bin.join(name))
    }
}

impl Cluster {
    /// The cluster that all tests share, started by the first caller. `None` if the programs are
    /// missing; that the calling test did not run is then reported.
    pub(crate) fn shared() -> Option<&'static Self> {
        static SHARED: OnceLock<Cluster> = OnceLock::new();
        let programs = Programs::require()?;
        Some(SHARED.get_or_init(|| Self::start(programs)))
    }

    /// A cluster for the calling test alone; `None` as with [`Cluster::shared`].
    pub(crate) fn private() -> Option<Self> {
        Programs::require().map(Self::start)
    }

    /// Adds the controller manager: garbage collection, the end of namespaces, slices of Services
    /// with a selector, Endpoints mirroring, jobs.
    pub(crate) fn with_controllers(mut self) -> Self {
        let mut command = self.programs.command("kube-controller-manager");
        let flag = |name: &str, value: &Path| format!("--{name}={}", value.display());
        command
            .arg(flag("kubeconfig", &self.kubeconfig_admin()))
            .arg(flag("service-account-private-key-file", &self.pki.accounts_key))
            .arg(flag("root-ca-file", &self.pki.ca))
            .arg(format!("--controllers={CONTROLLERS}"))
            .args(["--leader-elect=false", "--secure-port=0"]);
        self.controllers = Some(Daemon::start("kube-controller-manager", &mut command, &self.watchdog));
        self
    }

    fn start(programs: Programs) -> Self {
        let watchdog = Watchdog::start();
        let pki = Pki::create(watchdog.folder());
        let [etcd_port, peer_port, port] = free_ports();
        let client = format!("http://127.0.0.1:{etcd_port}");
        let peer = format!("http://127.0.0.1:{peer_port}");
        let mut command = programs.command("etcd");
        command
            .arg("--data-dir")
            .arg(watchdog.folder().join("etcd"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .args(["--unsafe-no-fsync", "--log-level", "error"]);
        let etcd = Daemon::start("etcd", &mut command, &watchdog);
        let mut cluster = Self {
            controllers: None,
            api_server: None,
            etcd,
            programs,
            pki,
            etcd_port,
            port,
            token: String::new(),
            files: AtomicU32::new(0),
            watchdog,
        };
        cluster.pki.write_admin_kubeconfig(&cluster.kubeconfig_admin(), &cluster.api_server_url());
        cluster.start_api_server();
        cluster.install_gangplank();
        cluster
    }

    /// Does what an operator does: applies `deploy/`, and creates a token of the account.
    fn install_gangplank(&mut self) {
        let deploy = Path::new(ROOT).join("deploy/kustomize");
        for file in ["rbac.yaml", "endpoints-object/rbac.yaml", "rbac-own-ca.yaml", "admission-policy.yaml"] {
            self.apply(&fs::read_to_string(deploy.join(file)).expect("it is in the repository"));
        }
        let token = self.kubectl(&["create", "token", "gangplank", "--namespace=gangplank", "--duration=24h"]);
        self.token = token.trim().to_owned();
        // A policy is in force some time after the API server has stored it.
        let foreign = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "foreign"},
            "spec": {"clusterIP": "None"}});
        let path = "/api/v1/namespaces/default/services?dryRun=All";
        wait_until("the admission policy is in force", || {
            let (_, answer) = self.request(Who::Gangplank, "POST", path, Some(&foreign)).expect("the API server runs");
            answer["message"].as_str()?.contains("ValidatingAdmissionPolicy").then_some(())
        });
    }

    /// Starts the API server, on the same port as ever and on what etcd has, and waits until it is ready.
    pub(crate) fn start_api_server(&mut self) {
        assert!(self.api_server.is_none(), "it runs already");
        let flag = |name: &str, value: &Path| format!("--{name}={}", value.display());
        let mut command = self.programs.command("kube-apiserver");
        command
            .arg(format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port))
            .arg(format!("--secure-port={}", self.port))
            .arg(flag("cert-dir", self.watchdog.folder()))
            .arg(flag("tls-cert-file", &self.pki.server))
            .arg(flag("tls-private-key-file", &self.pki.server_key))
            .arg(flag("client-ca-file", &self.pki.ca))
            .arg(flag("service-account-key-file", &self.pki.accounts_public))
            .arg(flag("service-account-signing-key-file", &self.pki.accounts_key))
            .args(["--bind-address=127.0.0.1", "--authorization-mode=RBAC"])
            // A loopback address is invalid in the slice of default/kubernetes; this one is for documentation (RFC 5737).
            .arg("--advertise-address=192.0.2.1")
            .args([
                "--service-account-issuer=https://kubernetes.default.svc",
                "--service-cluster-ip-range=10.96.0.0/16",
            ])
            // That plugin wants an account `default` in every namespace, which a controller makes.
            .arg("--disable-admission-plugins=ServiceAccount");
        let mut daemon = Daemon::start("kube-apiserver", &mut command, &self.watchdog);
        wait_until("the API server is ready", || {
            if let Some(status) = daemon.ended() {
                panic!("kube-apiserver: {status}; {}\n{}", daemon.log_tail(), self.etcd.log_tail());
            }
            matches!(self.request(Who::Admin, "GET", "/readyz", None), Ok((200, _))).then_some(())
        });
        self.api_server = Some(daemon);
    }

    /// Stops the API server (SIGTERM) and waits for its exit.
    pub(crate) fn stop_api_server(&mut self) {
        let daemon = self.api_server.take().expect("it runs");
        daemon.signal("TERM");
        daemon.wait(&self.watchdog);
    }

    /// Sends SIGKILL and waits for the exit.
    pub(crate) fn kill_api_server(&mut self) {
        let daemon = self.api_server.take().expect("it runs");
        daemon.signal("KILL");
        daemon.wait(&self.watchdog);
    }

    /// Freezes the API server (SIGSTOP): connections are accepted and never answered.
    pub(crate) fn pause_api_server(&mut self) {
        self.api_server.as_ref().expect("it runs").signal("STOP");
    }

    /// Resumes it (SIGCONT).
    pub(crate) fn resume_api_server(&mut self) {
        self.api_server.as_ref().expect("it runs").signal("CONT");
    }

    /// The process id of the API server.
    pub(crate) fn api_server_pid(&self) -> u32 {
        self.api_server.as_ref().expect("it runs").pid()
    }

    /// Where it listens.
    pub(crate) fn api_server_url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// Its port on 127.0.0.1.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Where etcd listens, over HTTP.
    pub(crate) fn etcd(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.etcd_port))
    }

    /// TLS to it without a client certificate.
    pub(crate) fn tls(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.pki.anonymous)
    }

    /// TLS for a server on 127.0.0.1 that stands in for it, with its certificate.
    pub(crate) fn serving_tls(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.pki.serving)
    }

    /// The certificate of its authority.
    pub(crate) fn ca_pem(&self) -> &str {
        &self.pki.ca_pem
    }

    /// The Kubernetes release that was asked for, as `1.36`.
    pub(crate) fn release(&self) -> &str {
        &self.programs.release
    }

    /// The administrator's kubeconfig.
    pub(crate) fn kubeconfig_admin(&self) -> PathBuf {
        self.watchdog.folder().join("admin.kubeconfig")
    }

    /// The kubeconfig of gangplank's account.
    pub(crate) fn kubeconfig_for_gangplank(&self) -> PathBuf {
        self.kubeconfig_for_gangplank_at(&self.api_server_url())
    }

    /// The same for a server in between, such as a [`Proxy`](super::proxy::Proxy): `server` is its
    /// `https://` URL.
    pub(crate) fn kubeconfig_for_gangplank_at(&self, server: &str) -> PathBuf {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        let path = self.watchdog.folder().join(format!("gangplank-{number}.kubeconfig"));
        self.pki.write_token_kubeconfig(&path, server, &self.token);
        self.release_lease();
        path
    }

    /// A kubeconfig of whoever has this token.
    pub(crate) fn kubeconfig_with_token(&self, token: &str) -> PathBuf {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        let path = self.watchdog.folder().join(format!("token-{number}.kubeconfig"));
        self.pki.write_token_kubeconfig(&path, &self.api_server_url(), token);
        path
    }

    /// Releases the Lease of a gangplank that was killed, so that the next test need not wait until it has expired.
    /// Does nothing while the API server is away.
    pub(crate) fn release_lease(&self) {
        self.release_lease_in("gangplank");
    }

    /// The same with the Lease in another namespace.
    pub(crate) fn release_lease_in(&self, namespace: &str) {
        let leases = format!("/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases");
        let path = format!("{leases}/gangplank-writer");
        let Ok((status, mut lease)) = self.request(Who::Admin, "GET", &path, None) else { return };
        let (method, path) = match status {
            200 => ("PUT", path.as_str()),
            _ => ("POST", leases.as_str()),
        };
        if status == 404 {
            lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "gangplank-writer"}});
        }
        lease["spec"]["holderIdentity"] = json!("");
        // A conflict is a gangplank that still ends.
        let _ = self.request(Who::Admin, method, path, Some(&lease));
    }

    /// Creates a namespace, which must not exist yet.
    pub(crate) fn create_namespace(&self, name: &str) {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        let created = self.request(Who::Admin, "POST", "/api/v1/namespaces", Some(&namespace));
        let (status, answer) = created.expect("the API server runs");
        assert_eq!(status, 201, "{answer}");
    }

    /// Runs kubectl as the administrator; a failure fails the test.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> String {
        self.kubectl_as(&self.kubeconfig_admin(), arguments, "")
            .unwrap_or_else(|error| panic!("kubectl {arguments:?}: {error}"))
    }

    /// Applies YAML as the administrator.
    pub(crate) fn apply(&self, yaml: &str) {
        self.kubectl_as(&self.kubeconfig_admin(), &["apply", "-f", "-"], yaml)
            .unwrap_or_else(|error| panic!("kubectl apply: {error}\n{yaml}"));
    }

    /// Runs kubectl as whoever that kubeconfig is for: what it printed, or what it complained about.
    pub(crate) fn kubectl_as(&self, kubeconfig: &Path, arguments: &[&str], stdin: &str) -> Result<String, String> {
        let mut command = self.kubectl_command(kubeconfig);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("kubectl can be run");
        // A kubectl that does not read stdin closes the pipe, which is no error.
        let _ = child.stdin.take().expect("stdin is piped").write_all(stdin.as_bytes());
        let output = child.wait_with_output().expect("kubectl ends");
        let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        if output.status.success() { Ok(stdout) } else { Err(format!("{stdout}{stderr}")) }
    }

    /// Where the programs are, kubectl among them.
    pub(crate) fn kubectl_folder(&self) -> PathBuf {
        self.programs.bin.clone()
    }

    /// A kubectl without arguments.
    pub(crate) fn kubectl_command(&self, kubeconfig: &Path) -> Command {
        let mut command = self.programs.command("kubectl");
        command.env("KUBECONFIG", kubeconfig).env("KUBECACHEDIR", self.watchdog.folder().join("cache"));
        command
    }

    /// One request, straight to the API server: status code and answer. `Err` while it is away.
    pub(crate) fn request(&self, who: Who, method: &str, path: &str, body: Option<&Value>) -> io::Result<(u16, Value)> {
        let (tls, token) = match who {
            Who::Admin => (&self.pki.admin, None),
            Who::Gangplank => (&self.pki.anonymous, Some(self.token.as_str())),
        };
        client::request(self.port, tls, token, (method, path), body)
    }

    /// What the administrator reads at a path; anything but 200 fails the test.
    pub(crate) fn get_json(&self, path: &str) -> Value {
        let (status, answer) = self.request(Who::Admin, "GET", path, None).expect("the API server runs");
        assert_eq!(status, 200, "{path}: {answer}");
        answer
    }
}

/// The Roles of a manifest of `deploy/`, and their bindings, in another namespace; the account stays where it is.
pub(crate) fn in_namespace(manifest: &str, namespace: &str) -> String {
    let metadata = format!("  namespace: {namespace}\n");
    let roles = manifest.split("\n---\n").filter(|one| one.contains("\nkind: Role"));
    roles.map(|one| one.replacen("  namespace: gangplank\n", &metadata, 1)).collect::<Vec<_>>().join("\n---\n")
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The watchdog kills too, but a child that nobody waits for stays a zombie.
        for daemon in [&mut self.controllers, &mut self.api_server].into_iter().flatten().chain([&mut self.etcd]) {
            daemon.kill();
        }
    }
}
