//! The client's side: a connection to a server by its CA, and what certificate a server shows.

use std::{
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::Alpn;

/// What a client trusts and shows, in PEM.
#[derive(Clone)]
pub struct ClientCredentials {
    /// The CAs of the server.
    pub ca: Vec<u8>,
    /// The client's certificate, with intermediate ones after it, and its key.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl fmt::Debug for ClientCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the key.
        f.debug_struct("ClientCredentials").field("identity", &self.identity.is_some()).finish_non_exhaustive()
    }
}

/// From when until when a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// When it begins.
    pub not_before: SystemTime,
    /// When it ends.
    pub not_after: SystemTime,
}

impl Validity {
    fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let validity = x509_parser::parse_x509_certificate(certificate).ok()?.1.validity().clone();
        let time = |time: x509_parser::time::ASN1Time| {
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0)))
        };
        Some(Self { not_before: time(validity.not_before)?, not_after: time(validity.not_after)? })
    }

    /// Of every certificate of a text in PEM, in its order; `None` if there is none, or one cannot be read.
    #[must_use]
    pub fn of_pem(pem: &[u8]) -> Option<Vec<Self>> {
        let all: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().ok()?;
        let all: Vec<Self> = all.iter().map(Self::of).collect::<Option<_>>()?;
        (!all.is_empty()).then_some(all)
    }

    /// That of the certificate which the server at `host` and `port` shows, whoever has signed it and whether or not it
    /// has expired. Nothing is sent to the server: the handshake ends when the certificate is known.
    ///
    /// # Errors
    /// When the server cannot be reached, or does not speak TLS.
    pub async fn shown_by(host: &str, port: u16) -> io::Result<Self> {
        let name = server_name(host)?;
        let shown = Arc::new(Shown { certificate: Mutex::default(), provider: provider() });
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&shown) as Arc<dyn ServerCertVerifier>)
            .with_no_client_auth();
        config.alpn_protocols = vec![Alpn::Http2.id().to_vec()];
        let stream = TcpStream::connect((host, port)).await?;
        let ended = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
        let certificate = shown.certificate.lock().unwrap_or_else(PoisonError::into_inner).take();
        match certificate {
            Some(certificate) => {
                Self::of(&certificate).ok_or_else(|| io::Error::other("its certificate cannot be read"))
            }
            None => Err(ended.err().unwrap_or_else(|| io::Error::other("the server has shown no certificate"))),
        }
    }
}

/// Completes a handshake over `stream` with the server that is called `host`, to speak HTTP/1.1.
///
/// # Errors
/// When the PEM cannot be used, or one side does not trust the other.
pub async fn connect_tls(host: &str, stream: TcpStream, pem: &ClientCredentials) -> io::Result<TlsStream<TcpStream>> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("{what} cannot be read"));
    let certificates = |pem: &[u8]| CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let mut roots = RootCertStore::empty();
    for ca in certificates(&pem.ca).map_err(|_| invalid("the CA of the server"))? {
        roots.add(ca).map_err(io::Error::other)?;
    }
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots);
    let mut config = match &pem.identity {
        None => config.with_no_client_auth(),
        Some((cert, key)) => {
            let chain = certificates(cert).map_err(|_| invalid("the client's certificate"))?;
            let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| invalid("the client's key"))?;
            config.with_client_auth_cert(chain, key).map_err(io::Error::other)?
        }
    };
    config.alpn_protocols = vec![Alpn::Http1.id().to_vec()];
    TlsConnector::from(Arc::new(config)).connect(server_name(host)?, stream).await
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn server_name(host: &str) -> io::Result<ServerName<'static>> {
    ServerName::try_from(host.to_owned()).map_err(io::Error::other)
}

/// Remembers the certificate, and ends the handshake.
struct Shown {
    certificate: Mutex<Option<CertificateDer<'static>>>,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shown").finish_non_exhaustive()
    }
}

impl ServerCertVerifier for Shown {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        *self.certificate.lock().unwrap_or_else(PoisonError::into_inner) = Some(end_entity.clone().into_owned());
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    // Neither is reached: no certificate is verified.
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
