//! The identity in a client certificate: as Kubernetes reads it, or a SPIFFE ID.
//!
//! The chain and the dates were checked in the handshake; here is only what the certificate says.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::pki_types::CertificateDer;
use x509_parser::{extensions::GeneralName, prelude::X509Certificate, time::ASN1Time, x509::X509Name};

use super::{ANONYMOUS_USER, Identity, IdentitySource, LOOPBACK_USER, Unauthenticated, is_name};

/// How a SPIFFE ID begins (SPIFFE ID specification, §2).
const SPIFFE: &str = "spiffe://";

/// Most groups of one certificate. Each is compared with each rule.
const MAX_GROUPS: usize = 64;

/// The user is the SPIFFE ID if the certificate has one, else the common name; the groups are the organizations
/// (Kubernetes, "Authenticating", X.509 client certificates).
pub(super) fn identity(der: &CertificateDer<'_>) -> Result<Identity, Unauthenticated> {
    let bad = |reason: &str| Unauthenticated::Certificate(reason.into());
    let certificate = x509_parser::parse_x509_certificate(der).map_err(|_| bad("cannot be read"))?.1;
    let user = match spiffe_id(&certificate).map_err(bad)? {
        Some(id) => id,
        None => common_name(certificate.subject()).map_err(bad)?,
    };
    let groups = groups(certificate.subject()).map_err(bad)?;
    let seconds = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
    // Far beyond what the clock can say: no end.
    let expires = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    Ok(Identity { user: user.into(), groups, source: IdentitySource::Certificate, expires })
}

/// What of a certificate a renewal depends on.
pub(super) struct Facts {
    pub(super) user: Arc<str>,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
    /// In DER (SubjectPublicKeyInfo).
    pub(super) public_key: Vec<u8>,
}

/// `None` when it cannot be read.
pub(super) fn facts(der: &CertificateDer<'_>) -> Option<Facts> {
    let (rest, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    let time = |time: ASN1Time| {
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0)))
    };
    let user = common_name(certificate.subject()).ok()?.into();
    let (not_before, not_after) = (time(certificate.validity().not_before)?, time(certificate.validity().not_after)?);
    let public_key = certificate.public_key().raw.to_vec();
    rest.is_empty().then_some(Facts { user, not_before, not_after, public_key })
}

/// The URI among the subject's alternative names. X.509-SVID §2: exactly one URI, which is the SPIFFE ID.
fn spiffe_id<'a>(certificate: &'a X509Certificate<'_>) -> Result<Option<&'a str>, &'static str> {
    let names = certificate.subject_alternative_name().map_err(|_| "has alternative names that cannot be read")?;
    let names = names.iter().flat_map(|extension| &extension.value.general_names);
    let mut uris = names.filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.next()) {
        (None, _) => Ok(None),
        (Some(uri), None) if !has_spiffe_scheme(uri) => Ok(None),
        // The scheme in small letters: rules name the ID as it is written.
        (Some(uri), None) if uri.starts_with(SPIFFE) && uri.len() > SPIFFE.len() && is_name(uri) => Ok(Some(uri)),
        (Some(_), None) => Err("has an invalid SPIFFE ID"),
        (Some(_), Some(_)) => Err("has more than one URI, where a SPIFFE ID is the only one"),
    }
}

fn has_spiffe_scheme(text: &str) -> bool {
    text.get(..SPIFFE.len()).is_some_and(|scheme| scheme.eq_ignore_ascii_case(SPIFFE))
}

fn common_name<'a>(subject: &'a X509Name<'_>) -> Result<&'a str, &'static str> {
    let mut names = subject.iter_common_name();
    match (names.next(), names.next()) {
        (None, _) => Err("has neither a common name (CN) nor a SPIFFE ID"),
        (Some(_), Some(_)) => Err("has more than one common name (CN)"),
        (Some(name), None) => match name.as_str() {
            Ok(name) if has_spiffe_scheme(name) => Err("has a SPIFFE ID as its common name (CN), not as a URI"),
            Ok(LOOPBACK_USER | ANONYMOUS_USER) => Err("has a common name (CN) that is a plaintext connection's"),
            Ok(name) if is_name(name) => Ok(name),
            _ => Err("has an invalid common name (CN)"),
        },
    }
}

fn groups(subject: &X509Name<'_>) -> Result<Arc<[Box<str>]>, &'static str> {
    let mut groups = Vec::new();
    for organization in subject.iter_organization() {
        match organization.as_str() {
            Ok(name) if is_name(name) && groups.len() < MAX_GROUPS => groups.push(name.into()),
            Ok(name) if is_name(name) => return Err("has too many organizations (O): at most 64"),
            _ => return Err("has an invalid organization (O)"),
        }
    }
    Ok(groups.into())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

    use super::*;

    fn identify(names: &[(DnType, &str)], uris: &[&str]) -> Result<Identity, String> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for (kind, name) in names {
            params.distinguished_name.push(kind.clone(), *name);
        }
        let uri = |uri: &&str| SanType::URI((*uri).try_into().expect("ASCII"));
        params.subject_alt_names = uris.iter().map(uri).collect();
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        identity(certificate.der()).map_err(|err| err.to_string())
    }

    #[test]
    fn user_is_the_common_name_and_groups_are_the_organizations() {
        let found = identify(&[(DnType::OrganizationName, "web"), (DnType::CommonName, "vm-1")], &[]).expect("valid");
        assert_eq!((&*found.user, &*found.groups[0], found.groups.len()), ("vm-1", "web", 1));
        assert!(found.expires.is_some());
    }

    #[test]
    fn spiffe_id_comes_before_the_common_name() {
        let found = identify(&[(DnType::CommonName, "vm-1")], &["spiffe://example.org/web"]).expect("valid");
        assert_eq!(&*found.user, "spiffe://example.org/web");
        let found = identify(&[(DnType::CommonName, "vm-1")], &["https://example.org/"]).expect("valid");
        assert_eq!(&*found.user, "vm-1", "not a SPIFFE ID");
    }

    #[test]
    fn certificate_that_does_not_say_one_name_is_refused() {
        let refused = |names: &[(DnType, &str)], uris: &[&str], why: &str| {
            let err = identify(names, uris).expect_err("refused");
            assert!(err.contains(why), "{err:?} should contain {why:?}");
        };
        let cn = |name| [(DnType::CommonName, name)];
        refused(&[(DnType::OrganizationName, "web")], &[], "neither a common name");
        refused(&cn(""), &[], "invalid common name");
        refused(&cn("vm-1\n"), &[], "invalid common name");
        refused(&cn("vm-1\u{202e}"), &[], "invalid common name");
        refused(&cn("SPIFFE://example.org/web"), &[], "not as a URI");
        refused(&cn("system:anonymous"), &[], "a plaintext connection's");
        refused(&cn("gangplank:loopback"), &[], "a plaintext connection's");
        refused(&cn("vm-1"), &["SPIFFE://example.org/web"], "invalid SPIFFE ID");
        refused(&cn("vm-1"), &["spiffe://a/b", "spiffe://a/c"], "more than one URI");
        refused(&cn("vm-1"), &["spiffe://"], "invalid SPIFFE ID");
        refused(&[(DnType::CommonName, "vm-1"), (DnType::OrganizationName, "\u{7}")], &[], "invalid organization");
    }

    #[test]
    fn octets_that_are_no_certificate_are_refused() {
        for der in [&b""[..], b"\x30\x03\x02\x01\x01", &[0xff; 64]] {
            assert!(identity(&CertificateDer::from(der)).is_err());
        }
    }
}
