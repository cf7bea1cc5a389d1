//! A CA and what it signs.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use tonic::transport::Identity;

pub(crate) struct TestCa {
    pub(crate) pem: String,
    pub(crate) issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, in PEM.
pub(crate) struct Credential {
    pub(crate) cert: String,
    pub(crate) key: String,
}

impl Credential {
    pub(crate) fn identity(&self) -> Identity {
        Identity::from_pem(&self.cert, &self.key)
    }
}

impl TestCa {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    /// With what `change` makes of its certificate.
    pub(crate) fn with(change: impl FnOnce(&mut CertificateParams)) -> Self {
        let (mut params, key) = ca_params("test CA");
        change(&mut params);
        let pem = params.self_signed(&key).expect("a CA").pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    pub(crate) fn sign(&self, user: &str, groups: &[&str]) -> Credential {
        self.sign_for(user, groups, -3600, 3600)
    }

    /// Valid from `begin` to `end`, in seconds from now.
    pub(crate) fn sign_for(&self, user: &str, groups: &[&str], begin: i64, end: i64) -> Credential {
        let mut params = CertificateParams::new(vec!["localhost".into()]).expect("a name");
        params.distinguished_name = name(user, groups);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = from_now(begin).into();
        params.not_after = from_now(end).into();
        let key = KeyPair::generate().expect("a key");
        let cert = params.signed_by(&key, &self.issuer).expect("signed").pem();
        Credential { cert, key: key.serialize_pem() }
    }
}

/// A name of its own: one that trusts another CA of the same name finds a bad signature instead.
pub(super) fn ca_params(kind: &str) -> (CertificateParams, KeyPair) {
    let mut params = CertificateParams::default();
    params.distinguished_name = name(&format!("{kind} {:x}", fastrand::u64(..)), &[]);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    (params, KeyPair::generate().expect("a key"))
}

pub(crate) fn from_now(seconds: i64) -> SystemTime {
    let by = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 { SystemTime::now() - by } else { SystemTime::now() + by }
}

pub(crate) fn name(user: &str, groups: &[&str]) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, user);
    // One attribute each: rcgen keeps one of a type, so one group is what a test can have.
    assert!(groups.len() <= 1, "one group at most");
    groups.iter().for_each(|group| name.push(DnType::OrganizationName, *group));
    name
}
