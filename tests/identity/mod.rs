//! Who may call what: a real server with certificates and a policy, and every call that it has.

mod addresses;
pub(crate) mod admin;
mod command_line;
pub(crate) mod joining;
mod matrix;
mod own_ca;
mod own_certificate;
pub(crate) mod ownership;
pub(crate) mod pki;
mod quotas;
mod rbac;
mod shared;
mod streams;
mod trust;
mod walk;

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use rcgen::{CertificateParams, Issuer, KeyPair};
use tempfile::TempDir;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use self::pki::{Credential, TestCa};
use crate::support::{secrets, server::Server};

/// The policy of the tests: `vm-1` owns shop/web at addresses of 10.1.0.0/16, the group `ops` may read all.
const POLICY: &str = "\
[[rule]]
users = ['vm-1']
namespaces = ['shop']
services = ['web']
verbs = ['create', 'delete', 'get', 'watch']
addresses = ['10.1.0.0/16']

[[rule]]
groups = ['ops']
namespaces = ['*']
verbs = ['get', 'list', 'watch']
";

/// A server with TLS and a policy, and the CA that it trusts.
pub(crate) struct SecuredServer {
    pub(crate) server: Server,
    pub(crate) ca: TestCa,
    pub(crate) files: TempDir,
}

impl SecuredServer {
    pub(crate) fn start() -> Self {
        Self::start_with(POLICY)
    }

    fn start_with(policy: &str) -> Self {
        Self::start_with_flags(policy, &[])
    }

    pub(crate) fn start_with_flags(policy: &str, more: &[&str]) -> Self {
        let (ca, files) = (TestCa::new(), tempfile::tempdir().expect("a directory"));
        let flags = security_flags(&ca, files.path(), policy);
        let flags: Vec<&str> = flags.iter().map(String::as_str).chain(more.iter().copied()).collect();
        Self { server: Server::start_with(&flags), ca, files }
    }

    /// With certificates and without a policy.
    fn start_without_policy(more: &[&str]) -> Self {
        let (ca, files) = (TestCa::new(), tempfile::tempdir().expect("a directory"));
        let flags = tls_flags(&ca, files.path());
        let flags: Vec<&str> = flags.iter().map(String::as_str).chain(more.iter().copied()).collect();
        Self { server: Server::start_with(&flags), ca, files }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.file(name);
        fs::write(&path, text).expect("a file");
        path.to_str().expect("UTF-8").to_owned()
    }

    fn url(&self) -> String {
        url(self.server.grpc)
    }

    async fn connect(&self, credential: Option<&Credential>) -> Result<Channel, tonic::transport::Error> {
        connect(self.server.grpc, &self.ca, credential).await
    }
}

impl TestCa {
    /// One whose certificate and key somebody has.
    fn stolen(cert: &str, key: &str) -> Self {
        let key = KeyPair::from_pem(key).expect("a key");
        Self { pem: cert.to_owned(), issuer: Issuer::from_ca_cert_pem(cert, key).expect("a CA") }
    }

    /// A CA that this one has signed, with what `change` makes of its certificate.
    fn intermediate_with(&self, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let (mut params, key) = pki::ca_params("intermediate CA");
        change(&mut params);
        let pem = params.signed_by(&key, &self.issuer).expect("signed").pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// The same with this one as the intermediate certificate.
    fn sign_with_chain(&self, user: &str, groups: &[&str]) -> Credential {
        let Credential { cert, key } = self.sign(user, groups);
        Credential { cert: format!("{cert}{}", self.pem), key }
    }

    /// A CA that this one has signed, valid from `begin` to `end`, in seconds from now.
    fn intermediate(&self, begin: i64, end: i64) -> Self {
        self.intermediate_with(|params| {
            params.not_before = pki::from_now(begin).into();
            params.not_after = pki::from_now(end).into();
        })
    }
}

fn url(server: SocketAddr) -> String {
    format!("https://localhost:{}", server.port())
}

/// The flags of a server with a certificate of `ca`, whose clients have one too, and with this policy.
pub(crate) fn security_flags(ca: &TestCa, files: &Path, policy: &str) -> Vec<String> {
    let mut flags = tls_flags(ca, files);
    flags.extend(["--authorization-policy".to_owned(), flag_file(files, "policy.toml", policy)]);
    flags
}

/// The same without a policy.
fn tls_flags(ca: &TestCa, files: &Path) -> Vec<String> {
    let own = ca.sign("gangplank", &[]);
    secrets::remember(&own.key);
    [
        ["--tls-cert".to_owned(), flag_file(files, "server.crt", &own.cert)],
        ["--tls-key".to_owned(), flag_file(files, "server.key", &own.key)],
        ["--tls-client-ca".to_owned(), flag_file(files, "ca.crt", &ca.pem)],
    ]
    .concat()
}

fn flag_file(files: &Path, name: &str, text: &str) -> String {
    let path = files.join(name);
    fs::write(&path, text).expect("a file");
    path.to_str().expect("UTF-8").to_owned()
}

/// A connection that shows `credential`. Fails if the handshake does.
pub(crate) async fn connect(
    to: SocketAddr,
    ca: &TestCa,
    credential: Option<&Credential>,
) -> Result<Channel, tonic::transport::Error> {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&ca.pem));
    let tls = match credential {
        Some(credential) => {
            secrets::remember(&credential.key);
            tls.identity(credential.identity())
        }
        None => tls,
    };
    Endpoint::from_shared(url(to))?.tls_config(tls)?.connect().await
}
