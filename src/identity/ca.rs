//! A CA of gangplank's own: a key in the data directory, which signs the server's certificate and those of registrants
//! that join.
//!
//! ```text
//! ca.key   its key, readable by the user of the process only
//! ca.crt   its certificate; made anew from the key if it is missing
//! ```

use std::{
    fmt, io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData as _, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::private_file;

const KEY_FILE: &str = "ca.key";
const CERTIFICATE_FILE: &str = "ca.crt";

/// Most bytes of either file.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// How long the CA's certificate is valid. Its end ends every certificate that it has signed.
const CA_LIFETIME: Duration = days(3650);

/// How long a certificate of the server is valid. It is renewed at two thirds of this.
const SERVER_LIFETIME: Duration = days(90);

/// How much earlier than now a certificate begins: the clocks of clients differ.
const MAX_CLOCK_SKEW: Duration = Duration::from_secs(300);

/// The user in the server's own certificates. No registrant gets this name.
pub(super) const SERVER_USER: &str = "gangplank";

/// Bytes of a serial number, of which the first bit is 0 (RFC 5280 §4.1.2.2: positive, at most 20 octets).
const SERIAL_BYTES: usize = 16;

const fn days(count: u64) -> Duration {
    Duration::from_secs(count * 24 * 60 * 60)
}

/// SHA-256 of a CA's public key (SubjectPublicKeyInfo, in DER), as kubeadm's discovery token CA cert hash.
pub type PublicKeyHash = [u8; 32];

/// Why the CA cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file cannot be read or written.
    #[error("{path}: {err}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        err: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {reason}", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong. Never a part of the file.
        reason: String,
    },
    /// A certificate cannot be made.
    #[error("a certificate cannot be made: {0}")]
    Sign(rcgen::Error),
}

/// A certificate that was signed, in DER, and its time.
#[derive(Debug, Clone)]
pub struct Signed {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// When it ends.
    pub not_after: SystemTime,
}

/// A certificate of the server, with its key.
#[derive(Clone)]
pub struct ServerCertificate {
    /// The certificate and the CA's, in PEM. With the CA's, a client that knows only its hash can check the server.
    pub chain: String,
    /// Its key, in PEM.
    pub key: String,
    renew_at: SystemTime,
}

impl fmt::Debug for ServerCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerCertificate").field("renew_at", &self.renew_at).finish_non_exhaustive()
    }
}

impl ServerCertificate {
    /// Whether two thirds of its life are over.
    #[must_use]
    pub fn is_due(&self, now: SystemTime) -> bool {
        now >= self.renew_at
    }
}

/// When a certificate that is valid for `lifetime` from `begin` on is renewed: at two thirds.
#[must_use]
pub fn renewal_time(begin: SystemTime, lifetime: Duration) -> SystemTime {
    begin + lifetime * 2 / 3
}

/// The CA.
pub struct CertificateAuthority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
    hash: PublicKeyHash,
}

impl fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the key.
        f.debug_struct("CertificateAuthority").field("pem", &self.pem).finish_non_exhaustive()
    }
}

impl CertificateAuthority {
    /// Reads the CA in `dir`, or creates one. The caller has the lock of the directory.
    ///
    /// # Errors
    /// Names the file that cannot be read or written, or that does not hold what it should.
    pub fn open(dir: &Path, now: SystemTime) -> Result<Self, CaError> {
        let (key_path, path) = (dir.join(KEY_FILE), dir.join(CERTIFICATE_FILE));
        let text = |path: &Path| {
            let bytes = private_file::read(path, MAX_FILE_BYTES).map_err(|err| io_error(path, err))?;
            bytes.map(|bytes| String::from_utf8(bytes).map_err(|_| invalid(path, "is not PEM"))).transpose()
        };
        let key = match (text(&key_path)?, text(&path)?) {
            (Some(pem), _) => KeyPair::from_pem(&pem).map_err(|_| invalid(&key_path, "holds no private key in PEM"))?,
            (None, None) => {
                let key = KeyPair::generate().map_err(CaError::Sign)?;
                private_file::write(&key_path, key.serialize_pem().as_bytes())
                    .map_err(|err| io_error(&key_path, err))?;
                key
            }
            (None, Some(_)) => {
                let reason =
                    "is missing. Put it back; or remove ca.crt too, after which every registrant has to join again";
                return Err(invalid(&key_path, reason));
            }
        };
        let pem = match text(&path)? {
            Some(pem) => pem,
            None => {
                let pem = ca_params(&key, now).self_signed(&key).map_err(CaError::Sign)?.pem();
                private_file::write(&path, pem.as_bytes()).map_err(|err| io_error(&path, err))?;
                pem
            }
        };
        Self::new(key, pem).map_err(|reason| invalid(&path, reason))
    }

    fn new(key: KeyPair, pem: String) -> Result<Self, &'static str> {
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| "holds no certificate in PEM")?;
        let parsed = x509_parser::parse_x509_certificate(&certificate).map_err(|_| "cannot be read")?.1;
        let public_key = parsed.public_key().raw;
        if public_key != key.subject_public_key_info() {
            return Err("is not the certificate of the key in ca.key");
        }
        if !parsed.is_ca() {
            return Err("is not the certificate of a CA");
        }
        let hash = Sha256::digest(public_key).into();
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|_| "cannot be used")?;
        Ok(Self { issuer, certificate, pem, hash })
    }

    /// Its certificate, in PEM.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Its certificate, in DER.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The hash of its public key, by which a client knows it.
    #[must_use]
    pub const fn public_key_hash(&self) -> &PublicKeyHash {
        &self.hash
    }

    /// Makes a key and a certificate for a server with these names.
    ///
    /// # Errors
    /// When a name cannot be in a certificate.
    pub fn issue_server(&self, names: &ServerNames, now: SystemTime) -> Result<ServerCertificate, CaError> {
        let begin = now - MAX_CLOCK_SKEW;
        let mut params = leaf_params(SERVER_USER, begin, begin + SERVER_LIFETIME);
        // A server is a client of its replicas, too.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let names_of = names.dns.iter().map(|name| name.as_str().try_into().map(SanType::DnsName));
        params.subject_alt_names = names_of.collect::<Result<_, _>>().map_err(CaError::Sign)?;
        params.subject_alt_names.extend(names.ip.iter().copied().map(SanType::IpAddress));
        let key = KeyPair::generate().map_err(CaError::Sign)?;
        let signed = params.signed_by(&key, &self.issuer).map_err(CaError::Sign)?;
        Ok(ServerCertificate {
            chain: format!("{}{}", signed.pem(), self.pem),
            key: key.serialize_pem(),
            renew_at: renewal_time(begin, SERVER_LIFETIME),
        })
    }

    /// Signs a certificate with which the holder of `public_key` is `user`: for clients only, without other names,
    /// whatever was asked for.
    ///
    /// # Errors
    /// When the kind of key is not supported.
    pub fn sign_client(
        &self,
        public_key: &SubjectPublicKeyInfo,
        user: &str,
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<Signed, CaError> {
        let not_after = now + lifetime;
        let mut params = leaf_params(user, now - MAX_CLOCK_SKEW, not_after);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let signed = params.signed_by(public_key, &self.issuer).map_err(CaError::Sign)?;
        Ok(Signed { certificate: signed.der().clone(), not_after })
    }

    /// Whether this CA has signed a certificate, whatever its dates.
    #[must_use]
    pub fn has_signed(&self, certificate: &CertificateDer<'_>) -> bool {
        let Ok((rest, parsed)) = X509Certificate::from_der(certificate) else { return false };
        let Ok((_, ca)) = X509Certificate::from_der(&self.certificate) else { return false };
        rest.is_empty() && parsed.issuer() == ca.subject() && parsed.verify_signature(Some(ca.public_key())).is_ok()
    }
}

/// The names of a server's certificate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerNames {
    /// DNS names.
    pub dns: Vec<String>,
    /// Addresses.
    pub ip: Vec<IpAddr>,
}

fn ca_params(key: &KeyPair, now: SystemTime) -> CertificateParams {
    let begin = now - MAX_CLOCK_SKEW;
    // Each key has another name, so that a certificate of another CA is of an unknown issuer, and not forged.
    let [a, b, c, d, ..]: PublicKeyHash = Sha256::digest(key.subject_public_key_info()).into();
    let name = format!("gangplank CA {:08x}", u32::from_be_bytes([a, b, c, d]));
    let mut params = leaf_params(&name, begin, begin + CA_LIFETIME);
    // It signs no other CA.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn leaf_params(name: &str, not_before: SystemTime, not_after: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = not_before.into();
    params.not_after = not_after.into();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    let mut serial = super::random::<SERIAL_BYTES>();
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params
}

fn io_error(path: &Path, err: io::Error) -> CaError {
    CaError::Io { path: path.to_owned(), err }
}

fn invalid(path: &Path, reason: impl Into<String>) -> CaError {
    CaError::Invalid { path: path.to_owned(), reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + days(20_000)
    }

    fn names() -> ServerNames {
        ServerNames { dns: vec!["localhost".into()], ip: vec!["10.0.0.1".parse().expect("an address")] }
    }

    #[test]
    fn ca_is_the_same_after_a_restart_and_its_key_is_private() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = CertificateAuthority::open(dir.path(), now()).expect("created");
        let again = CertificateAuthority::open(dir.path(), now() + days(1)).expect("read");
        assert_eq!((first.pem(), first.public_key_hash()), (again.pem(), again.public_key_hash()));
        for file in [KEY_FILE, CERTIFICATE_FILE] {
            let mode = fs::metadata(dir.path().join(file)).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
        // A crash between the two files.
        fs::remove_file(dir.path().join(CERTIFICATE_FILE)).expect("removed");
        let repaired = CertificateAuthority::open(dir.path(), now()).expect("made from the key");
        assert_eq!(repaired.public_key_hash(), first.public_key_hash());
        let signed = first.issue_server(&names(), now()).expect("signed");
        let certificate = CertificateDer::from_pem_slice(signed.chain.as_bytes()).expect("a certificate");
        assert!(repaired.has_signed(&certificate));
        assert!(!format!("{first:?} {signed:?}").contains("PRIVATE"));
    }

    #[test]
    fn files_that_do_not_belong_together_are_refused() {
        let (dir, other) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        let ca = CertificateAuthority::open(dir.path(), now()).expect("created");
        let foreign = CertificateAuthority::open(other.path(), now()).expect("created");
        let leaf = foreign.issue_server(&names(), now()).expect("signed");
        assert!(!ca.has_signed(&CertificateDer::from_pem_slice(leaf.chain.as_bytes()).expect("a certificate")));

        let refused = |why: &str| {
            let err = CertificateAuthority::open(dir.path(), now()).expect_err("refused").to_string();
            assert!(err.contains(why), "{err:?} should contain {why:?}");
        };
        fs::copy(other.path().join(KEY_FILE), dir.path().join(KEY_FILE)).expect("copied");
        refused("ca.crt: is not the certificate of the key in ca.key");
        fs::write(dir.path().join(KEY_FILE), &leaf.key).expect("written");
        fs::write(dir.path().join(CERTIFICATE_FILE), &leaf.chain).expect("written");
        refused("ca.crt: is not the certificate of a CA");
        fs::write(dir.path().join(KEY_FILE), "junk").expect("written");
        refused("ca.key: holds no private key in PEM");
        fs::remove_file(dir.path().join(KEY_FILE)).expect("removed");
        refused("ca.key: is missing");
    }

    #[test]
    fn certificate_of_a_server_is_due_at_two_thirds_of_its_life() {
        let dir = tempfile::tempdir().expect("a directory");
        let ca = CertificateAuthority::open(dir.path(), now()).expect("created");
        let issued = ca.issue_server(&names(), now()).expect("signed");
        assert!(!issued.is_due(now() + SERVER_LIFETIME * 2 / 3 - MAX_CLOCK_SKEW - Duration::from_secs(1)));
        assert!(issued.is_due(now() + SERVER_LIFETIME * 2 / 3));
    }
}
