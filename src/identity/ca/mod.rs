//! A CA of gangplank's own, which signs the server's certificate and those of registrants that join. Its key is in the
//! data directory (`directory`), or, with Kubernetes, in a Secret that all processes share (`cluster`).

mod cluster;
mod current;
mod directory;

use std::{
    env, fmt, io,
    net::IpAddr,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData as _, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, X509Certificate};

pub use self::{cluster::ClusterCa, current::CurrentCa};

/// How long the CA's certificate is valid. Its end ends every certificate that it has signed.
const CA_LIFETIME: Duration = days(3650);

/// How long a certificate of the server is valid. It is renewed at two thirds of this.
const SERVER_LIFETIME: Duration = days(90);

/// Names the seconds of [`SERVER_LIFETIME`] for a test, in a debug build.
const TEST_SERVER_LIFETIME: &str = "GANGPLANK_TEST_SERVER_LIFETIME_S";

/// How much earlier than now a certificate begins: the clocks of clients differ.
const MAX_CLOCK_SKEW: Duration = Duration::from_secs(300);

/// The user in the server's own certificates. No registrant gets this name.
pub const SERVER_USER: &str = "gangplank";

/// Bytes of a serial number, of which the first bit is 0 (RFC 5280 §4.1.2.2: positive, at most 20 octets).
const SERIAL_BYTES: usize = 16;

const fn days(count: u64) -> Duration {
    Duration::from_secs(count * 24 * 60 * 60)
}

fn server_lifetime() -> Duration {
    let of_test = || env::var(TEST_SERVER_LIFETIME).ok().and_then(|text| text.parse().ok()).map(Duration::from_secs);
    if cfg!(debug_assertions) { of_test().unwrap_or(SERVER_LIFETIME) } else { SERVER_LIFETIME }
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
    /// The Secret does not hold what it should.
    #[error(
        "the Secret {secret} {reason}. Put the right one back, or delete it: then a new CA is made, and every registrant has to \
         join again"
    )]
    Secret {
        /// Its namespace and name.
        secret: String,
        /// What is wrong. Never a part of what it holds.
        reason: String,
    },
    /// A certificate cannot be made.
    #[error("a certificate cannot be made: {0}")]
    Sign(rcgen::Error),
    /// The CA is not known yet.
    #[error("the CA of this gangplank is not known yet: {0}")]
    Pending(String),
}

/// A certificate that was signed, in DER, and its time.
#[derive(Debug, Clone)]
pub struct SignedCertificate {
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

/// Key and certificate of a CA in PEM, as they are stored.
#[derive(Clone, PartialEq, Eq)]
struct CaPem {
    key: String,
    certificate: String,
}

impl fmt::Debug for CaPem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the key.
        f.debug_struct("CaPem").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

impl CaPem {
    /// A new key, and its certificate.
    fn generate(now: SystemTime) -> Result<Self, CaError> {
        let key = new_key()?;
        let certificate = certificate_of(&key, now)?;
        Ok(Self { key: key.serialize_pem(), certificate })
    }
}

fn new_key() -> Result<KeyPair, CaError> {
    KeyPair::generate().map_err(CaError::Sign)
}

/// The certificate of a CA with this key, in PEM.
fn certificate_of(key: &KeyPair, now: SystemTime) -> Result<String, CaError> {
    Ok(ca_params(key, now).self_signed(key).map_err(CaError::Sign)?.pem())
}

/// What is wrong with key or certificate of a CA.
enum InvalidCa {
    Key(&'static str),
    Certificate(&'static str),
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
    fn parse(CaPem { key, certificate: pem }: CaPem) -> Result<Self, InvalidCa> {
        let key = KeyPair::from_pem(&key).map_err(|_| InvalidCa::Key("holds no private key in PEM"))?;
        Self::new(key, pem).map_err(InvalidCa::Certificate)
    }

    fn new(key: KeyPair, pem: String) -> Result<Self, &'static str> {
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| "holds no certificate in PEM")?;
        let parsed = x509_parser::parse_x509_certificate(&certificate).map_err(|_| "cannot be read")?.1;
        let public_key = parsed.public_key().raw;
        if public_key != key.subject_public_key_info() {
            return Err("is not the certificate of the key");
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
        let (begin, lifetime) = (now - MAX_CLOCK_SKEW, server_lifetime());
        let mut params = leaf_params(SERVER_USER, begin, begin + lifetime);
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
            renew_at: renewal_time(begin, lifetime),
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
    ) -> Result<SignedCertificate, CaError> {
        let not_after = now + lifetime;
        let mut params = leaf_params(user, now - MAX_CLOCK_SKEW, not_after);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let signed = params.signed_by(public_key, &self.issuer).map_err(CaError::Sign)?;
        Ok(SignedCertificate { certificate: signed.der().clone(), not_after })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificate_of_a_server_is_due_at_two_thirds_of_its_life() {
        let now = SystemTime::UNIX_EPOCH + days(20_000);
        let ca = CaPem::generate(now).expect("generated");
        let ca = CertificateAuthority::parse(ca).ok().expect("valid");
        let issued = ca.issue_server(&ServerNames::default(), now).expect("signed");
        assert!(!issued.is_due(now + SERVER_LIFETIME * 2 / 3 - MAX_CLOCK_SKEW - Duration::from_secs(1)));
        assert!(issued.is_due(now + SERVER_LIFETIME * 2 / 3));
    }
}
