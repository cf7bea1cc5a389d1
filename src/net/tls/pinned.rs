//! The client's side of a server that is known only by the hash of its CA's public key, as in `kubeadm join`.

use std::{
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};
use sha2::{Digest as _, Sha256};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::Alpn;

/// Most certificates with the key of the CA that are tried.
const MAX_PINNED: usize = 4;

/// Completes a handshake with the server at `host` and `port`, and returns the CA's certificate that it shows, in DER: the
/// one whose public key (SubjectPublicKeyInfo) has this SHA-256, after the server's certificate was checked against it.
///
/// # Errors
/// When the server cannot be reached, or is another one.
pub async fn fetch_pinned_ca(host: &str, port: u16, hash: [u8; 32]) -> io::Result<CertificateDer<'static>> {
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(PinnedCa { hash, provider: Arc::clone(&provider), found: Mutex::default() });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(&verifier) as Arc<dyn ServerCertVerifier>)
        .with_no_client_auth();
    config.alpn_protocols = vec![Alpn::Http2.id().to_vec()];
    let stream = TcpStream::connect((host, port)).await?;
    TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    let found = verifier.found.lock().unwrap_or_else(PoisonError::into_inner).take();
    found.ok_or_else(|| io::Error::other("the server has shown no certificate"))
}

/// Takes the CA with one public key, and no other.
struct PinnedCa {
    hash: [u8; 32],
    provider: Arc<CryptoProvider>,
    found: Mutex<Option<CertificateDer<'static>>>,
}

impl fmt::Debug for PinnedCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinnedCa").finish_non_exhaustive()
    }
}

impl PinnedCa {
    fn is_pinned(&self, certificate: &CertificateDer<'_>) -> bool {
        let parsed = ParsedCertificate::try_from(certificate);
        parsed.is_ok_and(|parsed| Sha256::digest(parsed.subject_public_key_info())[..] == self.hash)
    }
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let mut err = Error::InvalidCertificate(CertificateError::UnknownIssuer);
        // Two CAs may have one key, for instance one that another CA has signed, too.
        for ca in intermediates.iter().filter(|certificate| self.is_pinned(certificate)).take(MAX_PINNED) {
            let mut roots = RootCertStore::empty();
            roots.add(ca.clone())?;
            let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
                .build()
                .map_err(|err| Error::General(err.to_string()))?;
            match verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
                Ok(verified) => {
                    *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(ca.clone().into_owned());
                    return Ok(verified);
                }
                Err(refused) => err = refused,
            }
        }
        Err(err)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
