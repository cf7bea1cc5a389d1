//! The CAs of client certificates, and which of them has signed one.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{
    Error, RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, UnixTime},
    server::{VerifierBuilderError, WebPkiClientVerifier, danger::ClientCertVerifier},
};

use super::verifier::ShortChains;

/// Which CA has signed a client's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CertificateSigner {
    /// One of `--tls-client-ca`.
    ClientCa,
    /// That of gangplank itself, which signs for machines that join.
    OwnCa,
}

/// The certificates that a client has shown. They were checked against the CAs of the handshake.
#[derive(Debug, Clone)]
pub struct PeerCertificates {
    /// Its own first, then the intermediate ones, in DER. Not empty.
    pub chain: Arc<[CertificateDer<'static>]>,
    /// Which CA has signed them.
    pub signer: CertificateSigner,
}

impl PeerCertificates {
    /// The first time after `time` at which one of the certificates has ended. Then they may be good no longer: not each needs to be
    /// one of those by which the CA was found.
    #[must_use]
    pub fn next_end(&self, time: SystemTime) -> Option<SystemTime> {
        let ends = self.chain.iter().filter_map(|certificate| {
            let parsed = x509_parser::parse_x509_certificate(certificate).ok()?.1;
            let seconds = u64::try_from(parsed.validity().not_after.timestamp()).ok()?;
            // RFC 5280 §4.1.2.5: its last second is one of its life.
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds.checked_add(1)?))
        });
        ends.filter(|end| *end > time).min()
    }
}

/// The CAs of a listener's clients.
pub(super) struct Signers {
    /// Of all CAs. `None` without one.
    any: Option<Arc<dyn ClientCertVerifier>>,
    client: Option<Arc<dyn ClientCertVerifier>>,
    own: Option<Arc<dyn ClientCertVerifier>>,
}

impl Signers {
    pub(super) fn new(
        client: Option<RootCertStore>,
        own: Option<RootCertStore>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, VerifierBuilderError> {
        let verifier = |roots: RootCertStore| {
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
                // A client without a certificate may show a token; who shows neither is refused with UNAUTHENTICATED.
                .allow_unauthenticated()
                .build()
                .map(|verifier| Arc::new(ShortChains(verifier)) as Arc<dyn ClientCertVerifier>)
        };
        let all: Vec<_> = client.iter().chain(&own).flat_map(|store| store.roots.iter().cloned()).collect();
        let any = if all.is_empty() { None } else { Some(verifier(RootCertStore { roots: all })?) };
        Ok(Self { any, client: client.map(verifier).transpose()?, own: own.map(verifier).transpose()? })
    }

    /// Accepts what any of the CAs has signed. `None` without a CA.
    pub(super) fn verifier(&self) -> Option<Arc<dyn ClientCertVerifier>> {
        self.any.clone()
    }

    /// Which CA has signed certificates that [`Signers::verifier`] has accepted. What both have signed is of the own CA, which
    /// gives fewer rights.
    ///
    /// # Errors
    /// When neither has: a certificate has ended a moment ago. Then it is not known whose they are.
    pub(super) fn of(&self, chain: &[CertificateDer<'static>]) -> Result<PeerCertificates, Error> {
        let of = |signer| PeerCertificates { chain: chain.into(), signer };
        let (own, client) = (of(CertificateSigner::OwnCa), of(CertificateSigner::ClientCa));
        match (&self.own, &self.client) {
            (Some(_), None) => Ok(own),
            (Some(_), Some(_)) if self.check(&own).is_ok() => Ok(own),
            (Some(_), Some(_)) => self.check(&client).map(|()| client),
            (None, _) => Ok(client),
        }
    }

    /// Checks certificates again, against the CA that has signed them.
    pub(super) fn check(&self, certificates: &PeerCertificates) -> Result<(), Error> {
        let verifier = match certificates.signer {
            CertificateSigner::ClientCa => &self.client,
            CertificateSigner::OwnCa => &self.own,
        };
        verify(verifier.as_ref().ok_or(Error::NoCertificatesPresented)?, &certificates.chain)
    }
}

fn verify(verifier: &Arc<dyn ClientCertVerifier>, chain: &[CertificateDer<'static>]) -> Result<(), Error> {
    let (own, intermediates) = chain.split_first().ok_or(Error::NoCertificatesPresented)?;
    verifier.verify_client_cert(own, intermediates, UnixTime::now()).map(|_| ())
}
