//! Certificates as PEM (RFC 7468), as a client keeps them.

use std::time::{Duration, SystemTime};

use rustls::pki_types::{CertificateDer, pem::PemObject as _};

use crate::identity::certificate;

/// The certificates of a text in PEM. `None` if there is none, or one cannot be read.
#[must_use]
pub fn certificates_from_pem(pem: &str) -> Option<Vec<CertificateDer<'static>>> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().ok()?;
    (!all.is_empty()).then_some(all)
}

/// A client's certificate, and its time.
#[derive(Debug, Clone)]
pub struct ClientCertificate {
    /// In DER.
    pub der: Vec<u8>,
    /// When it begins.
    pub not_before: SystemTime,
    /// When it ends.
    pub not_after: SystemTime,
}

impl ClientCertificate {
    /// The first certificate of a text in PEM; `None` if there is none that can be read.
    #[must_use]
    pub fn from_pem(pem: &str) -> Option<Self> {
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
        let facts = certificate::facts(&der)?;
        Some(Self { der: der.to_vec(), not_before: facts.not_before, not_after: facts.not_after })
    }

    /// Whether two thirds of its life are over.
    #[must_use]
    pub fn is_due(&self, now: SystemTime) -> bool {
        let lifetime = self.not_after.duration_since(self.not_before).unwrap_or(Duration::ZERO);
        now >= crate::identity::renewal_time(self.not_before, lifetime)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::tls::certificate_to_pem;

    #[test]
    fn certificate_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let ca = crate::identity::CertificateAuthority::open(dir.path(), now).expect("a CA");
        assert_eq!(certificate_to_pem(ca.certificate()), ca.pem().replace("\r\n", "\n"));
        let read = ClientCertificate::from_pem(ca.pem()).expect("readable");
        assert_eq!(read.der, ca.certificate().as_ref());
        let life = read.not_after.duration_since(read.not_before).expect("a life");
        assert!(!read.is_due(read.not_before + life / 2) && read.is_due(read.not_before + life * 2 / 3));
        assert!(ClientCertificate::from_pem("junk").is_none());
    }
}
