//! Where a TLS listener has its certificate from, and what that must hold.

use std::{
    fmt, fs, io,
    io::Read as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustls::{
    RootCertStore,
    client::verify_server_cert_signed_by_trust_anchor,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _},
    server::ParsedCertificate,
    sign::CertifiedKey,
};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use x509_parser::prelude::{X509Certificate, X509Version};

/// Most bytes of one file. A CA bundle of 150 certificates has some 250 KiB.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Most bytes of the CAs of the server, which every machine that joins keeps. Three of RSA 4096 have some 6 KiB.
const MAX_SERVER_CA_BYTES: usize = 32 * 1024;

/// Characters of a line in PEM (RFC 7468 §2).
const PEM_LINE: usize = 64;

/// Where certificate, key and client CA are, each in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// `--tls-cert`: the server's certificate, and the intermediate ones after it.
    pub cert: PathBuf,
    /// `--tls-key`: the key of the certificate.
    pub key: PathBuf,
    /// `--tls-client-ca`: the certificates that sign those of clients. `None`: no client certificate is accepted.
    pub client_ca: Option<PathBuf>,
    /// `--tls-server-ca`: the CAs by which machines that join know the server. `None`: nobody joins.
    pub server_ca: Option<PathBuf>,
}

/// Certificate, key and client CA, from files or from a CA of this process. Asked again at intervals.
pub trait TlsSource: fmt::Debug + fmt::Display + Send + Sync {
    /// What there is now. May block.
    ///
    /// # Errors
    /// When a part cannot be had.
    fn read(&self) -> Result<TlsContents, TlsFileError>;

    /// The error of a part that was read and is invalid.
    fn invalid(&self, part: TlsPart, reason: String) -> TlsFileError;

    /// Changes when the source should be read again at once. `None`: it says nothing.
    fn changes(&self) -> Option<watch::Receiver<u64>> {
        None
    }
}

/// A part of what a [`TlsSource`] has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsPart {
    /// The certificate of the server.
    Certificate,
    /// Its key.
    Key,
    /// The CA of clients.
    ClientCa,
    /// The CA of the server.
    ServerCa,
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsFileError {
    /// The own CA cannot issue a certificate.
    #[error("the server's own CA cannot issue a certificate: {0}")]
    Own(String),
    /// There is nothing yet.
    #[error("{0}")]
    Pending(String),
    /// It cannot be read.
    #[error("{flag} {path}: cannot be read: {err}", path = path.display())]
    Unreadable {
        /// The flag that names the file.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        err: io::Error,
    },
    /// It does not hold what it should.
    #[error("{flag} {path}: {reason}", path = path.display())]
    Invalid {
        /// The flag that names the file.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong. Of the file never more than the name in a certificate.
        reason: String,
    },
}

/// What a source had when it was read, each in PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct TlsContents {
    /// The certificate of the server, and the intermediate ones after it.
    pub cert: Vec<u8>,
    /// Its key.
    pub key: Vec<u8>,
    /// The CA of clients.
    pub client_ca: Option<Vec<u8>>,
    /// The CA that signs for machines that join. It may be the client CA.
    pub own_ca: Option<Vec<u8>>,
    /// The CAs of which one has signed the server's certificate: what machines that join trust.
    pub server_ca: Option<Vec<u8>>,
}

impl fmt::Debug for TlsContents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the contents: one is a key.
        f.debug_struct("TlsContents").finish_non_exhaustive()
    }
}

impl fmt::Display for TlsFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.cert.display(), self.key.display())?;
        self.client_ca.as_ref().map_or(Ok(()), |ca| write!(f, ", {}", ca.display()))
    }
}

impl TlsSource for TlsFiles {
    fn read(&self) -> Result<TlsContents, TlsFileError> {
        let client_ca = self.client_ca.as_ref().map(|path| read("--tls-client-ca", path)).transpose()?;
        let server_ca = self.server_ca.as_ref().map(|path| read("--tls-server-ca", path)).transpose()?;
        let (cert, key) = (read("--tls-cert", &self.cert)?, read("--tls-key", &self.key)?);
        Ok(TlsContents { cert, key, client_ca, own_ca: None, server_ca })
    }

    fn invalid(&self, part: TlsPart, reason: String) -> TlsFileError {
        let (flag, path) = match part {
            TlsPart::Certificate => ("--tls-cert", Some(&self.cert)),
            TlsPart::Key => ("--tls-key", Some(&self.key)),
            TlsPart::ClientCa => ("--tls-client-ca", self.client_ca.as_ref()),
            TlsPart::ServerCa => ("--tls-server-ca", self.server_ca.as_ref()),
        };
        invalid(flag, path.map_or_else(|| Path::new(""), PathBuf::as_path), reason)
    }
}

/// What a listener serves with.
pub(super) struct ParsedContents {
    /// The certificate with its key. After the intermediate ones comes the CA, if it is known.
    pub(super) certified: CertifiedKey,
    /// `None` also if all of them have ended.
    pub(super) client_roots: Option<RootCertStore>,
    /// As `client_roots`. They may be the same file: then they are here only.
    pub(super) own_roots: Option<RootCertStore>,
    pub(super) server_ca: Option<ServerCa>,
    pub(super) ends: CaEnds,
}

/// When the CAs of clients end. rustls does not look at it (RFC 5280 §6.1: a trust anchor is a name and a key).
#[derive(Default)]
pub(super) struct CaEnds {
    /// How many have.
    pub(super) ended: usize,
    /// When the last of these did, in seconds since 1970.
    last: Option<u64>,
    /// When the next one does.
    next: Option<u64>,
}

impl CaEnds {
    fn count(&mut self, end: u64, now: u64) {
        if end < now {
            self.ended += 1;
            self.last = self.last.max(Some(end));
        } else {
            self.next = Some(self.next.map_or(end, |next| next.min(end)));
        }
    }

    /// Whether others have ended at `now`. Also fewer: the clock may be set back.
    pub(super) fn differ(&self, now: SystemTime) -> bool {
        let now = seconds(now);
        self.next.is_some_and(|end| end < now) || self.last.is_some_and(|end| end >= now)
    }
}

/// By what a machine that joins knows the server.
#[derive(Debug, Clone)]
pub struct ServerCa {
    /// SHA-256 of the public key (SubjectPublicKeyInfo, in DER) of the CA that has signed the server's certificate.
    pub hash: [u8; 32],
    /// What the machine trusts from then on, in PEM: this CA, and others that may take its place.
    pub pem: String,
}

/// Checks what a source has.
pub(super) fn parse(
    source: &dyn TlsSource,
    contents: &TlsContents,
    provider: &CryptoProvider,
    now: SystemTime,
) -> Result<ParsedContents, TlsFileError> {
    let bad = |part, reason: &dyn fmt::Display| source.invalid(part, reason.to_string());
    let TlsContents { cert, key, client_ca, own_ca, server_ca } = contents;
    let mut chain = certificates(cert).map_err(|reason| bad(TlsPart::Certificate, &reason))?;
    let server_ca = match server_ca {
        Some(pem) => {
            let (ca, anchor) = server_ca_of(&chain, pem, provider).map_err(|reason| bad(TlsPart::ServerCa, &reason))?;
            // Who knows only its hash has to see it.
            if !chain.contains(&anchor) {
                chain.push(anchor);
            }
            Some(ca)
        }
        None => None,
    };
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| bad(TlsPart::Key, &"holds no private key in PEM"))?;
    // Also compares the key with the certificate.
    let certified = CertifiedKey::from_der(chain, key, provider).map_err(|err| match err {
        rustls::Error::InconsistentKeys(_) => bad(TlsPart::Key, &"is not the key of the certificate"),
        other => bad(TlsPart::Certificate, &other),
    })?;
    let mut ends = CaEnds::default();
    let mut roots = |pem: &Vec<u8>| {
        let roots = client_roots(pem, seconds(now), &mut ends).map_err(|reason| bad(TlsPart::ClientCa, &reason))?;
        Ok(Some(roots).filter(|roots| !roots.is_empty()))
    };
    let client_roots = client_ca.as_ref().filter(|client_ca| own_ca.as_ref() != Some(client_ca));
    let client_roots = client_roots.map(&mut roots).transpose()?.flatten();
    let own_roots = own_ca.as_ref().map(&mut roots).transpose()?.flatten();
    Ok(ParsedContents { certified, client_roots, own_roots, server_ca, ends })
}

/// The CAs in `pem` that have not ended at `now`, in seconds since 1970.
fn client_roots(pem: &[u8], now: u64, ends: &mut CaEnds) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for ca in authorities(pem)? {
        let (_, end) = life(&ca).unwrap_or((now, now));
        ends.count(end, now);
        if end < now {
            continue;
        }
        roots.add(ca).map_err(|err| err.to_string())?;
    }
    Ok(roots)
}

/// The CA in `pem` that has signed a server's certificates.
fn server_ca_of(
    chain: &[CertificateDer<'static>],
    pem: &[u8],
    provider: &CryptoProvider,
) -> Result<(ServerCa, CertificateDer<'static>), String> {
    if pem.len() > MAX_SERVER_CA_BYTES {
        return Err(
            "is larger than 32 KiB: every machine that joins keeps it, so name the CA of this server only".into()
        );
    }
    let (leaf, intermediates) = chain.split_first().ok_or("there is no certificate that it could have signed")?;
    let parsed = ParsedCertificate::try_from(leaf).map_err(|err| err.to_string())?;
    // An expired certificate is refused by clients, and does not keep the server from its start.
    let at = UnixTime::since_unix_epoch(within_life(leaf, UnixTime::now().as_secs()));
    let algorithms = provider.signature_verification_algorithms.all;
    let mut last = rustls::Error::General("no certificate".into());
    let all = authorities(pem)?;
    for ca in &all {
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone()).map_err(|err| err.to_string())?;
        match verify_server_cert_signed_by_trust_anchor(&parsed, &roots, intermediates, at, algorithms) {
            Ok(()) => {
                let public_key = ParsedCertificate::try_from(ca).map_err(|err| err.to_string())?;
                let hash = Sha256::digest(public_key.subject_public_key_info()).into();
                // Written anew: whatever else is in the file, a key perhaps, is told to nobody.
                let pem = all.iter().map(|ca| certificate_to_pem(ca)).collect();
                return Ok((ServerCa { hash, pem }, ca.clone()));
            }
            Err(err) => last = err,
        }
    }
    Err(format!(
        "none of its CAs has signed the certificate of --tls-cert, with the intermediate ones after it: {last}"
    ))
}

/// The time in a certificate's life that is next to `now`, in seconds since 1970.
fn within_life(certificate: &CertificateDer<'_>, now: u64) -> Duration {
    let (begin, end) = life(certificate).unwrap_or((now, now));
    Duration::from_secs(now.min(end).max(begin))
}

/// The first and the last second of a certificate's life, since 1970. `None` if it cannot be read.
fn life(certificate: &CertificateDer<'_>) -> Option<(u64, u64)> {
    let parsed = x509_parser::parse_x509_certificate(certificate).ok()?.1;
    let of = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    Some((of(parsed.validity().not_before), of(parsed.validity().not_after)))
}

/// Seconds since 1970.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn invalid(flag: &'static str, path: &Path, reason: String) -> TlsFileError {
    TlsFileError::Invalid { flag, path: path.to_owned(), reason }
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, TlsFileError> {
    let mut bytes = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes));
    match read {
        Ok(_) if bytes.len() as u64 > MAX_FILE_BYTES => Err(invalid(flag, path, "is larger than 1 MiB".into())),
        Ok(_) => Ok(bytes),
        Err(err) => Err(TlsFileError::Unreadable { flag, path: path.to_owned(), err }),
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|err| format!("is not valid PEM: {err}"))?;
    if all.is_empty() { Err("holds no certificate in PEM".into()) } else { Ok(all) }
}

/// The certificates in `pem`, each of a CA. rustls does not look: whoever had the key of any other certificate here could sign
/// for everybody.
fn authorities(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all = certificates(pem)?;
    for certificate in &all {
        let parsed =
            x509_parser::parse_x509_certificate(certificate).map_err(|_| "holds a certificate that cannot be read")?.1;
        check_authority(&parsed)
            .map_err(|reason| format!("holds the certificate of {}, {reason}", parsed.subject()))?;
    }
    Ok(all)
}

/// Whether a certificate may sign others (RFC 5280 §4.2.1.9 and §4.2.1.3).
fn check_authority(certificate: &X509Certificate<'_>) -> Result<(), &'static str> {
    // One of version 1 cannot say so. No server and no client has one: rustls refuses them.
    let is_old = certificate.version() == X509Version::V1 && certificate.subject() == certificate.issuer();
    if !is_old && !certificate.is_ca() {
        return Err("which is not one of a CA (basicConstraints without CA:TRUE)");
    }
    match certificate.key_usage() {
        Ok(Some(usage)) if !usage.value.key_cert_sign() => {
            Err("whose key may not sign others (keyUsage without keyCertSign)")
        }
        Ok(_) => Ok(()),
        Err(_) => Err("whose keyUsage cannot be read"),
    }
}

/// A certificate in PEM (RFC 7468).
#[must_use]
pub fn certificate_to_pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(PEM_LINE) {
        pem.extend(line.iter().copied().map(char::from));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}
