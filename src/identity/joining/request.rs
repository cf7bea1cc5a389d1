//! Requests for a certificate (PKCS #10): made by a machine that joins, checked by the server. Only the key in it counts: the
//! name, the purpose and the extensions of the certificate are the server's to choose.

use rcgen::{CertificateParams, DistinguishedName, KeyPair, SubjectPublicKeyInfo};
use x509_parser::{certification_request::X509CertificationRequest, prelude::FromDer as _};

/// Most bytes of a request. One with an RSA key of 4096 bits has some 1 700.
const MAX_REQUEST_BYTES: usize = 8 * 1024;

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("certificate_request: {0}")]
pub struct InvalidRequest(&'static str);

/// A request whose signature is that of the key in it.
#[derive(Debug)]
pub(super) struct VerifiedRequest {
    pub(super) public_key: SubjectPublicKeyInfo,
    /// The key in DER (SubjectPublicKeyInfo).
    pub(super) der: Vec<u8>,
}

impl VerifiedRequest {
    pub(super) fn parse(der: &[u8]) -> Result<Self, InvalidRequest> {
        if der.len() > MAX_REQUEST_BYTES {
            return Err(InvalidRequest("must have at most 8 KiB"));
        }
        let unreadable = InvalidRequest("is not PKCS #10 in DER");
        let (rest, request) = X509CertificationRequest::from_der(der).map_err(|_| unreadable.clone())?;
        if !rest.is_empty() {
            return Err(unreadable);
        }
        // Whoever asks has the key.
        request.verify_signature().map_err(|_| InvalidRequest("is not signed with the key in it"))?;
        let der = request.certification_request_info.subject_pki.raw.to_vec();
        let unsupported = InvalidRequest("has a kind of key that is not supported: take ECDSA with P-256");
        let public_key = SubjectPublicKeyInfo::from_der(&der).map_err(|_| unsupported)?;
        Ok(Self { public_key, der })
    }
}

/// A new key in PEM, and a request for a certificate of it in DER.
///
/// # Errors
/// When the key cannot be made.
pub fn new_request() -> Result<(String, Vec<u8>), rcgen::Error> {
    let key = KeyPair::generate()?;
    Ok((key.serialize_pem(), request(&key)?))
}

/// A request for a further certificate of a key in PEM.
///
/// # Errors
/// When it is no key.
pub fn request_with(key: &str) -> Result<Vec<u8>, rcgen::Error> {
    request(&KeyPair::from_pem(key)?)
}

fn request(key: &KeyPair) -> Result<Vec<u8>, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    Ok(params.serialize_request(key)?.der().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_for_the_same_key_has_the_same_key() {
        let (key, first) = new_request().expect("a key");
        let again = request_with(&key).expect("the same key");
        let parsed = [first, again].map(|der| VerifiedRequest::parse(&der).expect("valid"));
        assert_eq!(parsed[0].der, parsed[1].der);
    }

    #[test]
    fn request_that_is_damaged_or_too_large_is_refused() {
        let (_, der) = new_request().expect("a key");
        let whole = VerifiedRequest::parse(&der).map(|request| request.der);
        assert!(whole.is_ok());
        for at in 0..der.len() {
            let mut damaged = der.clone();
            damaged[at] ^= 1;
            // What is not signed, such as the number of unused bits, changes nothing that counts.
            let key = VerifiedRequest::parse(&damaged).map(|request| request.der);
            assert!(key.as_ref().is_err() || key == whole, "byte {at}");
        }
        assert!(VerifiedRequest::parse(&[&der[..], b"x"].concat()).is_err());
        assert!(VerifiedRequest::parse(&[]).is_err());
        let err = VerifiedRequest::parse(&vec![0x30; MAX_REQUEST_BYTES + 1]).expect_err("refused");
        assert_eq!(err.to_string(), "certificate_request: must have at most 8 KiB");
    }
}
