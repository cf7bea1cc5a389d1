//! The certificates and keys of one control plane, and the kubeconfig files that carry them.
//!
//! Everything is created for each cluster, in its folder: an authority, the server's
//! certificate for loopback, the administrator's (`O=system:masters`), and the key pair that
//! signs the tokens of ServiceAccounts.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    sync::Arc,
};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::json;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig, crypto::ring, pki_types::PrivateKeyDer};

/// The name of cluster, user and context in every kubeconfig file here.
pub(crate) const CONTEXT: &str = "test";

/// Paths of the files, and what a client in this process needs.
pub(super) struct Pki {
    /// The authority's certificate.
    pub(super) ca: PathBuf,
    /// The API server's certificate.
    pub(super) server: PathBuf,
    /// The key of that certificate.
    pub(super) server_key: PathBuf,
    /// The key that signs tokens of ServiceAccounts.
    pub(super) accounts_key: PathBuf,
    /// The key that verifies them.
    pub(super) accounts_public: PathBuf,
    /// The authority's certificate, as PEM.
    pub(super) ca_pem: String,
    /// TLS as the administrator.
    pub(super) admin: Arc<ClientConfig>,
    /// TLS without a client certificate: the client sends a token instead.
    pub(super) anonymous: Arc<ClientConfig>,
    /// TLS for a server that stands in for the API server.
    pub(super) serving: Arc<ServerConfig>,
    admin_pem: String,
    admin_key_pem: String,
}

impl Pki {
    /// Creates everything and writes the files that the programs read into `folder`.
    pub(super) fn create(folder: &Path) -> Self {
        let mut authority = params("gangplank test authority", None);
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let authority_key = generate();
        let ca = authority.self_signed(&authority_key).expect("the authority signs itself");
        let issuer = Issuer::new(authority, authority_key);
        let signed = |params: &CertificateParams| {
            let key = generate();
            (params.signed_by(&key, &issuer).expect("the authority signs"), key)
        };

        let mut server = params("kube-apiserver", None);
        server.subject_alt_names = vec![
            SanType::IpAddress(IpAddr::from(Ipv4Addr::LOCALHOST)),
            SanType::DnsName("localhost".try_into().expect("ASCII")),
        ];
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let (server, server_key) = signed(&server);
        let mut admin = params("test-admin", Some("system:masters"));
        admin.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let (admin, admin_key) = signed(&admin);
        let accounts = generate();

        let mut roots = RootCertStore::empty();
        roots.add(ca.der().clone()).expect("the authority is one");
        let identity = |certificate: &Certificate, key: &KeyPair| {
            let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a PKCS #8 key");
            (vec![certificate.der().clone()], key)
        };
        let provider = Arc::new(ring::default_provider());
        let client = || {
            ClientConfig::builder_with_provider(Arc::clone(&provider))
                .with_safe_default_protocol_versions()
                .expect("ring speaks TLS 1.3")
                .with_root_certificates(roots.clone())
        };
        let (chain, key) = identity(&admin, &admin_key);
        let as_admin = client().with_client_auth_cert(chain, key).expect("certificate and key fit");
        let (chain, key) = identity(&server, &server_key);
        let serving = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .expect("ring speaks TLS 1.3")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .expect("certificate and key fit");
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).expect("the cluster's folder can be written");
            path
        };
        Self {
            ca: write("ca.crt", &ca.pem()),
            server: write("server.crt", &server.pem()),
            server_key: write("server.key", &server_key.serialize_pem()),
            accounts_key: write("accounts.key", &accounts.serialize_pem()),
            accounts_public: write("accounts.pub", &accounts.public_key_pem()),
            ca_pem: ca.pem(),
            admin: Arc::new(as_admin),
            anonymous: Arc::new(client().with_no_client_auth()),
            serving: Arc::new(serving),
            admin_pem: admin.pem(),
            admin_key_pem: admin_key.serialize_pem(),
        }
    }

    /// Writes the administrator's kubeconfig.
    pub(super) fn write_admin_kubeconfig(&self, path: &Path, server: &str) {
        let user = json!({
            "client-certificate-data": base64(self.admin_pem.as_bytes()),
            "client-key-data": base64(self.admin_key_pem.as_bytes()),
        });
        self.write_kubeconfig(path, server, &user);
    }

    /// Writes the kubeconfig of whoever has this token.
    pub(super) fn write_token_kubeconfig(&self, path: &Path, server: &str, token: &str) {
        self.write_kubeconfig(path, server, &json!({ "token": token }));
    }

    fn write_kubeconfig(&self, path: &Path, server: &str, user: &serde_json::Value) {
        let cluster = json!({ "server": server, "certificate-authority-data": base64(self.ca_pem.as_bytes()) });
        // JSON is YAML.
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": CONTEXT,
            "clusters": [{ "name": CONTEXT, "cluster": cluster }],
            "users": [{ "name": CONTEXT, "user": user }],
            "contexts": [{ "name": CONTEXT, "context": { "cluster": CONTEXT, "user": CONTEXT, "namespace": "gangplank" } }],
        });
        fs::write(path, config.to_string()).expect("the cluster's folder can be written");
    }
}

fn generate() -> KeyPair {
    KeyPair::generate().expect("the machine has random numbers")
}

fn params(name: &str, organization: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, name);
    if let Some(organization) = organization {
        params.distinguished_name.push(DnType::OrganizationName, organization);
    }
    params.use_authority_key_identifier_extension = true;
    params
}

/// Base64 with padding (RFC 4648 §4), which is how a kubeconfig holds PEM.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0_u32, |group, &byte| group << 8 | u32::from(byte)) << (8 * (3 - chunk.len()));
        for sextet in 0..4 {
            let index = (group >> (18 - 6 * sextet) & 63) as usize;
            text.push(if sextet <= chunk.len() { char::from(ALPHABET[index]) } else { '=' });
        }
    }
    text
}
