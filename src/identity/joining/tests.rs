//! A server's side of joining, attacked.

use std::os::unix::fs::PermissionsExt as _;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::*;
use crate::{identity::CertificateAuthority, metrics::Metrics, model::hex};

const HOUR: Duration = Duration::from_secs(3600);

/// By which machines know the server.
const HASH: PublicKeyHash = [7; 32];

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn open(dir: &Path) -> Arc<RegistrantStore> {
    let ca = CurrentCa::in_directory(CertificateAuthority::open(dir, now()).expect("a CA"));
    let addresses = ServerAddress::parse_list("10.0.0.1:9080");
    let config = RegistrantsConfig { ca, signs_servers: true, addresses };
    RegistrantStore::open(dir, config, Metrics::new().joining).expect("readable")
}

fn scope() -> Scope {
    let spec = ScopeSpec { namespace: "shop".into(), service: "web".into(), ..ScopeSpec::default() };
    Scope::parse(&spec).expect("valid")
}

impl RegistrantStore {
    async fn token(&self, uses: u32) -> JoinToken {
        self.create_token(scope(), "ada", (HOUR, uses), Some(HASH), &[], now()).await.expect("created").0
    }

    async fn use_token(&self, token: &JoinToken, request: &[u8]) -> Result<Joined, JoiningError> {
        self.join(token.id, token.secret.expose(), request, "vm", b"", now()).await
    }
}

#[tokio::test]
async fn machine_joins_and_renews_until_it_is_revoked() {
    let dir = tempfile::tempdir().expect("a directory");
    let registrants = open(dir.path());
    let (key, request) = new_request().expect("a key");
    let joined = registrants.use_token(&registrants.token(1).await, &request).await.expect("joined");
    assert!(joined.user.starts_with("gangplank:registrant:") && joined.scope == scope());
    assert_eq!(registrants.check(&joined.user), Ok(()));

    // After a restart, and a week after the certificate has expired.
    drop(registrants);
    let registrants = open(dir.path());
    let late = now() + CERTIFICATE_LIFETIME + RENEWAL_GRACE;
    let again = request_with(&key).expect("the key");
    let renewed = registrants.renew(&joined.certificate, &again, late).await.expect("renewed");
    assert_eq!(renewed.user, joined.user);
    let too_late = registrants.renew(&joined.certificate, &again, late + Duration::from_secs(1)).await;
    assert!(matches!(too_late, Err(JoiningError::Expired)), "{too_late:?}");

    assert!(registrants.revoke(&joined.user, late).await.expect("stored"));
    let revoked = registrants.renew(&renewed.certificate, &again, late).await;
    assert!(matches!(revoked, Err(JoiningError::Revoked)), "{revoked:?}");
    assert_eq!(registrants.check(&joined.user), Err(Unauthenticated::Revoked));
    assert!(!registrants.revoke("gangplank:registrant:0", late).await.expect("stored"), "there is none");
}

#[tokio::test]
async fn certificate_has_the_name_that_the_server_gives_and_no_other() {
    let dir = tempfile::tempdir().expect("a directory");
    let registrants = open(dir.path());
    // A request that asks for all: the server's name, other names, and to be a CA.
    let mut params = CertificateParams::new(vec!["gangplank.example.com".into(), "10.0.0.1".into()]).expect("names");
    params.distinguished_name.push(DnType::CommonName, "gangplank");
    params.distinguished_name.push(DnType::OrganizationName, "system:masters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate().expect("a key");
    let request = params.serialize_request(&key).expect("a request");
    let joined = registrants.use_token(&registrants.token(1).await, request.der()).await.expect("joined");

    let (_, signed) = X509Certificate::from_der(&joined.certificate).expect("readable");
    assert_eq!(signed.subject().to_string(), format!("CN={}", joined.user));
    assert!(!signed.is_ca() && signed.subject_alternative_name().expect("readable").is_none());
    let usage = signed.extended_key_usage().expect("readable").expect("there").value;
    assert!(usage.client_auth && !usage.server_auth && !usage.any);
    assert!(!signed.key_usage().expect("readable").expect("there").value.key_cert_sign());
    let identity = certificate::identity(&joined.certificate).expect("one name");
    assert!(identity.groups.is_empty());
}

#[tokio::test]
async fn what_is_not_good_is_refused_and_uses_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let registrants = open(dir.path());
    let (_, request) = new_request().expect("a key");
    let token = registrants.token(1).await;
    let wrong = JoinToken { secret: Secret::generate(), ..token.clone() };
    let refused = |attempt: Result<Joined, JoiningError>| attempt.expect_err("refused").result();
    assert_eq!(refused(registrants.use_token(&wrong, &request).await), JoinResult::UnknownToken);
    let other = JoinToken { id: TokenId::generate(), ..token.clone() };
    assert_eq!(refused(registrants.use_token(&other, &request).await), JoinResult::UnknownToken);
    assert_eq!(refused(registrants.use_token(&token, b"junk").await), JoinResult::InvalidRequest);
    let control = registrants.join(token.id, token.secret.expose(), &request, "vm\n", b"", now()).await;
    assert_eq!(refused(control), JoinResult::InvalidRequest);
    let late = registrants.join(token.id, token.secret.expose(), &request, "vm", b"", now() + HOUR).await;
    assert_eq!(refused(late), JoinResult::ExpiredToken);
    assert!(registrants.registrants().expect("listed").is_empty());
    registrants.use_token(&token, &request).await.expect("its one use is still there");
    assert_eq!(refused(registrants.use_token(&token, &request).await), JoinResult::UsedToken);
    let revoked = registrants.token(1).await;
    assert!(registrants.revoke_token(revoked.id, now()).await.expect("stored"));
    assert_eq!(refused(registrants.use_token(&revoked, &request).await), JoinResult::UnknownToken);
    for (ttl, uses) in [(Duration::ZERO, 1), (MAX_TTL + HOUR, 1), (HOUR, 0), (HOUR, MAX_USES + 1)] {
        assert!(
            registrants.create_token(scope(), "ada", (ttl, uses), Some(HASH), &[], now()).await.is_err(),
            "{ttl:?} {uses}"
        );
    }
}

#[tokio::test]
async fn only_the_holder_of_the_key_renews_a_certificate_of_this_ca() {
    let (dir, elsewhere) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
    let (registrants, foreign) = (open(dir.path()), open(elsewhere.path()));
    let (_, request) = new_request().expect("a key");
    let joined = registrants.use_token(&registrants.token(1).await, &request).await.expect("joined");
    let refused = async |certificate: &[u8], request: &[u8]| {
        registrants.renew(certificate, request, now()).await.expect_err("refused").to_string()
    };
    let (_, of_thief) = new_request().expect("a key");
    assert!(refused(&joined.certificate, &of_thief).await.contains("for another key"));
    let mut forged = request.clone();
    let last = forged.len() - 1;
    forged[last] ^= 1;
    assert!(refused(&joined.certificate, &forged).await.contains("not signed with the key in it"));
    let of_other_ca = foreign.use_token(&foreign.token(1).await, &request).await.expect("joined");
    assert!(refused(&of_other_ca.certificate, &request).await.contains("has not signed it"));
    assert!(refused(b"junk", &request).await.contains("has not signed it"));
    assert!(refused(&vec![0; MAX_CERTIFICATE_BYTES + 1], &request).await.contains("more than 4 KiB"));
    // The server's own certificate is of this CA, and no registrant's.
    let own = registrants
        .ca
        .get()
        .expect("there is one")
        .issue_server(&crate::identity::ServerNames::default(), now())
        .expect("issued");
    let own = <CertificateDer<'_> as rustls::pki_types::pem::PemObject>::from_pem_slice(own.chain.as_bytes());
    assert!(refused(&own.expect("a certificate"), &request).await.contains("the registrant is unknown"));
}

#[tokio::test(flavor = "multi_thread")]
async fn token_with_uses_left_is_used_as_often_by_many_at_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let registrants = open(dir.path());
    let token = registrants.token(3).await;
    let requests: Vec<_> = (0..12).map(|_| new_request().expect("a key").1).collect();
    let joined = requests.iter().map(|request| registrants.use_token(&token, request));
    let joined = futures::future::join_all(joined).await.into_iter().filter(Result::is_ok).count();
    assert_eq!((joined, registrants.registrants().expect("listed").len()), (3, 3));
}

#[tokio::test]
async fn no_secret_is_stored_and_what_is_stored_is_private() {
    let dir = tempfile::tempdir().expect("a directory");
    let registrants = open(dir.path());
    let token = registrants.token(1).await;
    let path = dir.path().join(directory::STATE_FILE);
    let stored = std::fs::read_to_string(&path).expect("readable");
    assert!(stored.contains(&token.id.to_string()) && !stored.contains(&hex::encode(token.secret.expose())));
    assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
    let shown = format!("{registrants:?} {token:?}");
    assert!(!shown.contains("PRIVATE KEY") && !shown.contains(&token.to_string()), "{shown}");
    // A disk that is full: nothing is acknowledged that is not stored.
    std::fs::remove_file(&path).expect("removed");
    std::fs::create_dir_all(path.join("in the way")).expect("a directory");
    let failed = registrants.create_token(scope(), "ada", (HOUR, 1), Some(HASH), &[], now()).await;
    assert!(matches!(failed, Err(JoiningError::Store { .. })), "{failed:?}");
    assert_eq!(registrants.tokens().expect("listed").len(), 1);
}

#[tokio::test]
async fn machine_that_joins_again_keeps_its_name_if_it_has_the_key_and_was_not_revoked() {
    let dir = tempfile::tempdir().expect("a directory");
    let registrants = open(dir.path());
    let join = async |request: &[u8], previous: &[u8], at| {
        let token = registrants.create_token(scope(), "ada", (HOUR, 1), Some(HASH), &[], at).await.expect("created").0;
        registrants.join(token.id, token.secret.expose(), request, "vm", previous, at).await.expect("joined")
    };
    let (_, request) = new_request().expect("a key");
    let first = join(&request, b"", now()).await;
    // Too late to be renewed.
    let late = now() + CERTIFICATE_LIFETIME + 2 * RENEWAL_GRACE;
    let again = join(&request, &first.certificate, late).await;
    assert_eq!(again.user, first.user);
    let (_, of_thief) = new_request().expect("a key");
    assert_ne!(join(&of_thief, &first.certificate, late).await.user, first.user, "without the key");
    assert_ne!(join(&request, b"junk", late).await.user, first.user);
    assert!(registrants.revoke(&first.user, late).await.expect("stored"));
    assert_ne!(join(&request, &first.certificate, late).await.user, first.user, "revoked");
    assert_eq!(registrants.check(&first.user), Err(Unauthenticated::Revoked));
}
