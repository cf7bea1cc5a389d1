//! The files of a TLS listener, and what they must hold.

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

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsFileError {
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

/// What the files held when they were read.
#[derive(PartialEq, Eq)]
pub(super) struct FileContents {
    pub(super) cert: Vec<u8>,
    pub(super) key: Vec<u8>,
    pub(super) client_ca: Option<Vec<u8>>,
}

impl fmt::Display for TlsFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.cert.display(), self.key.display())?;
        self.client_ca.as_ref().map_or(Ok(()), |ca| write!(f, ", {}", ca.display()))
    }
}

impl TlsFiles {
    pub(super) fn read(&self) -> Result<FileContents, TlsFileError> {
        let client_ca = self.client_ca.as_ref().map(|path| read("--tls-client-ca", path)).transpose()?;
        Ok(FileContents { cert: read("--tls-cert", &self.cert)?, key: read("--tls-key", &self.key)?, client_ca })
    }

    /// The server's certificate with its key, and the CAs of clients.
    pub(super) fn parse(
        &self,
        contents: &FileContents,
        provider: &CryptoProvider,
    ) -> Result<(CertifiedKey, Option<RootCertStore>), TlsFileError> {
        let chain = certificates(&contents.cert).map_err(|reason| self.invalid_cert(&reason))?;
        let key = PrivateKeyDer::from_pem_slice(&contents.key)
            .map_err(|_| invalid("--tls-key", &self.key, "holds no private key in PEM"))?;
        // Also compares the key with the certificate.
        let certified = CertifiedKey::from_der(chain, key, provider).map_err(|err| match err {
            rustls::Error::InconsistentKeys(_) => {
                invalid("--tls-key", &self.key, format!("is not the key of the certificate in {}", self.cert.display()))
            }
            other => self.invalid_cert(&other),
        })?;
        let Some(ca) = &contents.client_ca else { return Ok((certified, None)) };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(ca).map_err(|reason| self.invalid_client_ca(&reason))? {
            roots.add(certificate).map_err(|err| self.invalid_client_ca(&err))?;
        }
        Ok((certified, Some(roots)))
    }

    pub(super) fn invalid_cert(&self, reason: &dyn fmt::Display) -> TlsFileError {
        invalid("--tls-cert", &self.cert, reason)
    }

    pub(super) fn invalid_client_ca(&self, reason: &dyn fmt::Display) -> TlsFileError {
        let path = self.client_ca.as_deref().unwrap_or_else(|| Path::new(""));
        invalid("--tls-client-ca", path, reason)
    }
}

fn invalid(flag: &'static str, path: &Path, reason: impl fmt::Display) -> TlsFileError {
    TlsFileError::Invalid { flag, path: path.to_owned(), reason: reason.to_string() }
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, TlsFileError> {
    let mut bytes = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes));
    match read {
        Ok(_) if bytes.len() as u64 > MAX_FILE_BYTES => Err(invalid(flag, path, "is larger than 1 MiB")),
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
