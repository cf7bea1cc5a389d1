//! Where a TLS listener has its certificate from, and what that must hold.

use std::{
    fmt, fs, io,
    io::Read as _,
    path::{Path, PathBuf},
};

use rustls::{
    RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    sign::CertifiedKey,
};
use tokio::sync::watch;

/// Most bytes of one file. A CA bundle of 150 certificates has some 250 KiB.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Where certificate, key and client CA are, each in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// `--tls-cert`: the server's certificate, and the intermediate ones after it.
    pub cert: PathBuf,
    /// `--tls-key`: the key of the certificate.
    pub key: PathBuf,
    /// `--tls-client-ca`: the certificates that sign those of clients. `None`: no client certificate is accepted.
    pub client_ca: Option<PathBuf>,
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
        /// What is wrong. Never a part of the file.
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
        Ok(TlsContents { cert: read("--tls-cert", &self.cert)?, key: read("--tls-key", &self.key)?, client_ca })
    }

    fn invalid(&self, part: TlsPart, reason: String) -> TlsFileError {
        let (flag, path) = match part {
            TlsPart::Certificate => ("--tls-cert", Some(&self.cert)),
            TlsPart::Key => ("--tls-key", Some(&self.key)),
            TlsPart::ClientCa => ("--tls-client-ca", self.client_ca.as_ref()),
        };
        invalid(flag, path.map_or_else(|| Path::new(""), PathBuf::as_path), reason)
    }
}

/// The server's certificate with its key, and the CAs of clients.
pub(super) fn parse(
    source: &dyn TlsSource,
    contents: &TlsContents,
    provider: &CryptoProvider,
) -> Result<(CertifiedKey, Option<RootCertStore>), TlsFileError> {
    let bad = |part, reason: &dyn fmt::Display| source.invalid(part, reason.to_string());
    let chain = certificates(&contents.cert).map_err(|reason| bad(TlsPart::Certificate, &reason))?;
    let key =
        PrivateKeyDer::from_pem_slice(&contents.key).map_err(|_| bad(TlsPart::Key, &"holds no private key in PEM"))?;
    // Also compares the key with the certificate.
    let certified = CertifiedKey::from_der(chain, key, provider).map_err(|err| match err {
        rustls::Error::InconsistentKeys(_) => bad(TlsPart::Key, &"is not the key of the certificate"),
        other => bad(TlsPart::Certificate, &other),
    })?;
    let Some(ca) = &contents.client_ca else { return Ok((certified, None)) };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ca).map_err(|reason| bad(TlsPart::ClientCa, &reason))? {
        roots.add(certificate).map_err(|err| bad(TlsPart::ClientCa, &err))?;
    }
    Ok((certified, Some(roots)))
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
