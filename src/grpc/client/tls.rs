//! How a client trusts a server with an `https` URL, and shows who it is.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use http::HeaderValue;
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use super::token::{ShowToken, TokenError};
use crate::net::tls::ClientCredentials;

/// The files of a client, each in PEM except the token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientTlsFiles {
    /// The CAs of the server.
    pub ca: Option<PathBuf>,
    /// The client's certificate, with the intermediate ones after it.
    pub cert: Option<PathBuf>,
    /// The key of the certificate.
    pub key: Option<PathBuf>,
    /// A token that is shown with each call. Read again for each.
    pub token: Option<PathBuf>,
}

/// What a client trusts and shows. The default speaks plaintext only.
#[derive(Clone, Default)]
pub struct ClientTls {
    pem: Option<ClientCredentials>,
    token: ShowToken,
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without what it holds: a key is in it.
        f.debug_struct("ClientTls").field("https", &self.pem.is_some()).finish_non_exhaustive()
    }
}

/// Why TLS cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ClientTlsError {
    /// A file cannot be read.
    #[error("{path} cannot be read", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A certificate without its key, or the other way round.
    #[error("a client certificate needs its key, and a key its certificate: give --cert and --key")]
    Incomplete,
    /// A certificate, but nothing to know the server by.
    #[error("a client certificate needs the CA of the server: give --cacert")]
    NoCa,
}

impl ClientTls {
    /// Reads the files.
    ///
    /// # Errors
    /// Names the file that cannot be read or is missing.
    pub fn load(files: &ClientTlsFiles) -> Result<Self, ClientTlsError> {
        let ClientTlsFiles { ca, cert, key, token } = files;
        let token = ShowToken::from_file(token.clone());
        let identity = match (cert, key) {
            (None, None) => None,
            (Some(cert), Some(key)) => Some((read(cert)?, read(key)?)),
            (Some(_), None) | (None, Some(_)) => return Err(ClientTlsError::Incomplete),
        };
        let Some(ca) = ca else {
            return if identity.is_some() { Err(ClientTlsError::NoCa) } else { Ok(Self { pem: None, token }) };
        };
        Ok(Self { token, ..Self::new(read(ca)?, identity) })
    }

    /// Trusts the CAs in `ca`, in PEM, and shows the certificate and key of `identity`, in PEM too.
    pub(in crate::grpc) fn new(ca: Vec<u8>, identity: Option<(Vec<u8>, Vec<u8>)>) -> Self {
        Self { pem: Some(ClientCredentials { ca, identity }), token: ShowToken::default() }
    }

    /// The configuration for `https`; `None` if there is no CA to know a server by.
    pub(in crate::grpc) fn config(&self) -> Option<ClientTlsConfig> {
        let ClientCredentials { ca, identity } = self.pem.as_ref()?;
        let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca));
        Some(match identity {
            Some((cert, key)) => config.identity(Identity::from_pem(cert, key)),
            None => config,
        })
    }

    /// The same for other protocols.
    #[must_use]
    pub const fn pem(&self) -> Option<&ClientCredentials> {
        self.pem.as_ref()
    }

    /// The value of `Authorization` that shows the token; `None` without one.
    ///
    /// # Errors
    /// When the token cannot be read.
    pub fn authorization(&self) -> Result<Option<HeaderValue>, TokenError> {
        self.token.header()
    }

    pub(super) const fn token(&self) -> &ShowToken {
        &self.token
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ClientTlsError> {
    fs::read(path).map_err(|source| ClientTlsError::Unreadable { path: path.to_owned(), source })
}
