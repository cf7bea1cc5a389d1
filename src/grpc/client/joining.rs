//! The client's side of joining, and what a machine keeps of it in its configuration directory.
//!
//! ```text
//! client.key      the key, which never leaves the machine
//! client.crt      the certificate; replaced when it is renewed
//! server-ca.crt   the CA of the server
//! client.json     where the server is, and as what the machine joined; written last
//! ```

use std::{
    fmt, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use tonic::{service::interceptor::InterceptedService, transport::Channel};

use super::{CONNECT_TIMEOUT, ClientError, ClientTls, call, refused, servers::innermost, token::ShowToken};
use crate::{
    grpc::proto::gangplank::join::v1::{
        CreateTokenRequest, JoinRequest, JoinResponse, ListRegistrantsRequest, ListTokensRequest, Registrant,
        RenewRequest, RenewResponse, RevokeRegistrantRequest, RevokeRegistrantResponse, RevokeTokenRequest, Scope,
        Token, joining_client::JoiningClient, registrants_client::RegistrantsClient,
    },
    identity::{
        joining::{
            ClientCertificate, InvalidToken, JoinToken, ScopeSpec, TokenId, certificates_from_pem, new_request,
            request_with,
        },
        private_file,
    },
    model::ServerAddress,
    net::tls::{certificate_to_pem, fetch_pinned_ca},
};

const KEY_FILE: &str = "client.key";
const CERTIFICATE_FILE: &str = "client.crt";
const CA_FILE: &str = "server-ca.crt";
const CONFIG_FILE: &str = "client.json";

/// The version of `client.json` that is written.
const VERSION: u32 = 1;

/// Most bytes of each file.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// How long a renewal may take that another command waits for.
const RENEWAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a machine has not joined, or cannot use what it has.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The text is no token.
    #[error(transparent)]
    Token(#[from] InvalidToken),
    /// No server of the token could be reached, or each is another one.
    #[error("no server of the token could be verified: {}", .0.join("; "))]
    NotVerified(Vec<String>),
    /// The server refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A file cannot be read or written.
    #[error("{path}: {err}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        err: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {reason}", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong. Never a part of the file.
        reason: String,
    },
    /// No key could be made.
    #[error("no key could be made: {0}")]
    Key(String),
}

/// `client.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct StoredConfig {
    version: u32,
    servers: Vec<String>,
    registrant: String,
    namespace: String,
    service: String,
}

/// What a machine that joined has.
#[derive(Clone)]
pub struct JoinedMachine {
    dir: PathBuf,
    config: StoredConfig,
    ca: String,
    key: String,
    certificate_pem: String,
    certificate: ClientCertificate,
}

impl fmt::Debug for JoinedMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the key.
        f.debug_struct("JoinedMachine").field("dir", &self.dir).field("config", &self.config).finish_non_exhaustive()
    }
}

impl JoinedMachine {
    /// Joins a server with a token, and writes what it gets into `dir`. The token's secret is told to a server that was
    /// verified by the hash in the token, and to no other.
    ///
    /// # Errors
    /// When no server can be verified, the server refuses, or a file cannot be written.
    pub async fn join(token: &str, host: &str, dir: &Path) -> Result<Self, JoinError> {
        let token: JoinToken = token.parse()?;
        // First, so that a token is not used up for nothing.
        let probe = dir.join(CONFIG_FILE);
        private_file::create_dir(dir).map_err(|err| file(&probe, err))?;
        let foreign = [KEY_FILE, CERTIFICATE_FILE, CA_FILE].map(|name| dir.join(name));
        // Without `client.json` they are of somebody else, who needs them.
        if !probe.exists()
            && let Some(foreign) = foreign.iter().find(|path| path.exists())
        {
            return Err(invalid(foreign, "is not of `gangplank join`: name another directory by --config-dir"));
        }
        let writable = dir.join("client.key.new");
        private_file::write(&writable, b"")
            .and_then(|()| std::fs::remove_file(&writable))
            .map_err(|err| file(&writable, err))?;
        // What it has from an earlier time, if it can be read.
        let earlier = Self::load(dir).ok().flatten();
        let (mut reasons, mut unavailable) = (Vec::new(), None);
        for address in &token.addresses {
            let ca = match verified_ca(address, &token).await {
                Ok(ca) => ca,
                Err(reason) => {
                    reasons.push(format!("{address}: {reason}"));
                    continue;
                }
            };
            let url = format!("https://{address}");
            // A machine that joins the same server again keeps its key, and with it its name.
            let earlier = earlier.as_ref().filter(|earlier| earlier.trusts(&ca));
            let kept = earlier.and_then(|earlier| Some((earlier.key.clone(), request_with(&earlier.key).ok()?)));
            let (key, request) = match kept {
                Some(kept) => kept,
                None => new_request().map_err(|err| JoinError::Key(err.to_string()))?,
            };
            let message = JoinRequest {
                token_id: token.id.to_string(),
                secret: token.secret.expose().to_vec(),
                certificate_request: request,
                host: host.to_owned(),
                previous: earlier.map(|earlier| earlier.certificate.der.clone()).unwrap_or_default(),
            };
            let joined = async {
                let channel = super::dial(&url, &ClientTls::new(ca.clone().into_bytes(), None)).await?;
                JoiningClient::new(channel).join(call(message)).await.map_err(|status| refused(&url, status))
            };
            let joined = match joined.await {
                Ok(joined) => joined,
                Err(err) if err.is_of_one_server() => {
                    unavailable = Some(err);
                    continue;
                }
                Err(err) => return Err(err.into()),
            };
            let JoinResponse { registrant, certificate, scope, server_ca } = joined.into_inner();
            let ca = valid_ca(server_ca).unwrap_or(ca);
            let Scope { namespace, service, .. } = scope.unwrap_or_default();
            let mut servers: Vec<String> = token.addresses.iter().map(|address| format!("https://{address}")).collect();
            // The one that was reached comes first.
            servers.retain(|other| *other != url);
            servers.insert(0, url);
            let config = StoredConfig { version: VERSION, servers, registrant, namespace, service };
            return Self::save(dir, config, ca, key, certificate_to_pem(&certificate));
        }
        // One that was verified and could not let it join says more than those that could not be reached.
        Err(unavailable.map_or(JoinError::NotVerified(reasons), JoinError::from))
    }

    fn save(
        dir: &Path,
        config: StoredConfig,
        ca: String,
        key: String,
        certificate_pem: String,
    ) -> Result<Self, JoinError> {
        // In this order: `load` asks for `client.json` first, so a join that was cut off before it counts as none.
        let json = serde_json::to_string_pretty(&config).expect("texts can be written") + "\n";
        for (name, text) in
            [(KEY_FILE, &key), (CERTIFICATE_FILE, &certificate_pem), (CA_FILE, &ca), (CONFIG_FILE, &json)]
        {
            let path = dir.join(name);
            write(&path, text)?;
        }
        let certificate = client_certificate(dir, &certificate_pem)?;
        Ok(Self { dir: dir.to_owned(), config, ca, key, certificate_pem, certificate })
    }

    /// Reads what a machine has in `dir`; `None` if it did not join.
    ///
    /// # Errors
    /// When a file cannot be read or understood.
    pub fn load(dir: &Path) -> Result<Option<Self>, JoinError> {
        let read = |name: &str| {
            let path = dir.join(name);
            let bytes = private_file::read(&path, MAX_FILE_BYTES).map_err(|err| file(&path, err))?;
            bytes.map(|bytes| String::from_utf8(bytes).map_err(|_| invalid(&path, "is not UTF-8"))).transpose()
        };
        let Some(json) = read(CONFIG_FILE)? else { return Ok(None) };
        let path = dir.join(CONFIG_FILE);
        let config: StoredConfig = serde_json::from_str(&json).map_err(|err| invalid(&path, err.to_string()))?;
        if config.version != VERSION {
            return Err(invalid(&path, format!("is of version {}, and this program reads {VERSION}", config.version)));
        }
        let needed = |name: &str| read(name)?.ok_or_else(|| invalid(&dir.join(name), "is missing: join again"));
        let (ca, key, certificate_pem) = (needed(CA_FILE)?, needed(KEY_FILE)?, needed(CERTIFICATE_FILE)?);
        let certificate = client_certificate(dir, &certificate_pem)?;
        Ok(Some(Self { dir: dir.to_owned(), config, ca, key, certificate_pem, certificate }))
    }

    /// Whether it trusts this CA, in PEM.
    fn trusts(&self, ca: &str) -> bool {
        let known = certificates_from_pem(&self.ca).unwrap_or_default();
        certificates_from_pem(ca).is_some_and(|all| all.iter().any(|ca| known.contains(ca)))
    }

    /// The URLs of the server.
    #[must_use]
    pub fn servers(&self) -> &[String] {
        &self.config.servers
    }

    /// The user in its certificate.
    #[must_use]
    pub fn registrant(&self) -> &str {
        &self.config.registrant
    }

    /// The namespace of its scope; `None` for all.
    #[must_use]
    pub fn namespace(&self) -> Option<&str> {
        Some(self.config.namespace.as_str()).filter(|name| !name.is_empty())
    }

    /// The service of its scope; `None` for all.
    #[must_use]
    pub fn service(&self) -> Option<&str> {
        Some(self.config.service.as_str()).filter(|name| !name.is_empty())
    }

    /// When its certificate ends.
    #[must_use]
    pub const fn expires(&self) -> SystemTime {
        self.certificate.not_after
    }

    /// Whether two thirds of its certificate's life are over.
    #[must_use]
    pub fn is_due(&self, now: SystemTime) -> bool {
        self.certificate.is_due(now)
    }

    /// What it trusts and shows.
    #[must_use]
    pub fn tls(&self) -> ClientTls {
        let identity = (self.certificate_pem.clone().into_bytes(), self.key.clone().into_bytes());
        ClientTls::new(self.ca.clone().into_bytes(), Some(identity))
    }

    /// Gets a new certificate for its key, and writes it. Without showing the old one in the handshake, which may have expired:
    /// the request is signed with its key.
    ///
    /// # Errors
    /// When no server answers, or one refuses.
    pub async fn renew(&mut self) -> Result<(), JoinError> {
        let request =
            request_with(&self.key).map_err(|_| invalid(&self.dir.join(KEY_FILE), "is no private key in PEM"))?;
        let message = RenewRequest { certificate: self.certificate.der.clone(), certificate_request: request };
        let tls = ClientTls::new(self.ca.clone().into_bytes(), None);
        let mut last = None;
        for url in &self.config.servers {
            let renewed = timeout(RENEWAL_TIMEOUT, async {
                let channel = super::dial(url, &tls).await?;
                JoiningClient::new(channel).renew(call(message.clone())).await.map_err(|status| refused(url, status))
            });
            match renewed.await.unwrap_or_else(|late| Err(ClientError::late(url, late))) {
                Ok(renewed) => {
                    let RenewResponse { certificate, server_ca } = renewed.into_inner();
                    let pem = certificate_to_pem(&certificate);
                    // Read before it is written: an answer that is no certificate must not replace the one that works.
                    self.certificate = client_certificate(&self.dir, &pem)?;
                    write(&self.dir.join(CERTIFICATE_FILE), &pem)?;
                    self.certificate_pem = pem;
                    // Before the server's certificate is replaced by one of another CA, it tells that.
                    if let Some(ca) = valid_ca(server_ca).filter(|ca| *ca != self.ca) {
                        write(&self.dir.join(CA_FILE), &ca)?;
                        self.ca = ca;
                    }
                    return Ok(());
                }
                Err(err) if err.is_of_one_server() => last = Some(err),
                Err(err) => return Err(err.into()),
            }
        }
        let none = || ClientError::InvalidResponse("client.json names no server".into());
        Err(last.unwrap_or_else(none).into())
    }
}

/// The CA of a server, in PEM, if its key is the one that the token names and it has signed the server's certificate.
async fn verified_ca(address: &ServerAddress, token: &JoinToken) -> Result<String, String> {
    let fetched = timeout(CONNECT_TIMEOUT, fetch_pinned_ca(&address.host(), address.port(), token.ca)).await;
    match fetched {
        Ok(Ok(ca)) => Ok(certificate_to_pem(&ca)),
        Ok(Err(err)) => Err(innermost(&err)),
        Err(_) => Err("no answer".into()),
    }
}

/// The CAs that a server has told, if they are some.
fn valid_ca(pem: String) -> Option<String> {
    certificates_from_pem(&pem).is_some().then_some(pem)
}

fn write(path: &Path, text: &str) -> Result<(), JoinError> {
    private_file::write(path, text.as_bytes()).map_err(|err| file(path, err))
}

fn client_certificate(dir: &Path, pem: &str) -> Result<ClientCertificate, JoinError> {
    ClientCertificate::from_pem(pem).ok_or_else(|| invalid(&dir.join(CERTIFICATE_FILE), "holds no certificate in PEM"))
}

fn file(path: &Path, err: io::Error) -> JoinError {
    JoinError::File { path: path.to_owned(), err }
}

fn invalid(path: &Path, reason: impl Into<String>) -> JoinError {
    JoinError::Invalid { path: path.to_owned(), reason: reason.into() }
}

/// A join token, as an operator sees it.
#[derive(Debug, Clone, Serialize)]
pub struct TokenView {
    /// Its id.
    pub id: String,
    /// What it allows.
    #[serde(flatten)]
    pub scope: ScopeSpec,
    /// Who created it.
    pub created_by: String,
    /// When.
    #[serde(serialize_with = "rfc3339")]
    pub created: SystemTime,
    /// From when on it is refused.
    #[serde(serialize_with = "rfc3339")]
    pub expires: SystemTime,
    /// How often it may be used in all.
    pub uses: u32,
    /// How often it was used.
    pub used: u32,
}

/// A registrant, as an operator sees it.
#[derive(Debug, Clone, Serialize)]
pub struct RegistrantView {
    /// The user in its certificate.
    pub name: String,
    /// What it may do.
    #[serde(flatten)]
    pub scope: ScopeSpec,
    /// What it called itself.
    pub host: String,
    /// With which token it joined.
    pub token: String,
    /// When.
    #[serde(serialize_with = "rfc3339")]
    pub joined: SystemTime,
    /// When its last certificate ends.
    #[serde(serialize_with = "rfc3339")]
    pub expires: SystemTime,
    /// When it was revoked.
    #[serde(serialize_with = "optional_rfc3339", skip_serializing_if = "Option::is_none")]
    pub revoked: Option<SystemTime>,
}

fn rfc3339<S: serde::Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_rfc3339_seconds(*time))
}

fn optional_rfc3339<S: serde::Serializer>(time: &Option<SystemTime>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => rfc3339(time, serializer),
        None => serializer.serialize_none(),
    }
}

fn system_time(time: Option<prost_types::Timestamp>) -> SystemTime {
    time.and_then(|time| SystemTime::try_from(time).ok()).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn scope_spec(scope: Option<Scope>) -> ScopeSpec {
    let Scope { namespace, service, verbs, addresses } = scope.unwrap_or_default();
    ScopeSpec { namespace, service, verbs, addresses }
}

fn token_view(Token { id, scope, created_by, created, expires, uses, used }: Token) -> TokenView {
    let (created, expires) = (system_time(created), system_time(expires));
    TokenView { id, scope: scope_spec(scope), created_by, created, expires, uses, used }
}

fn registrant_view(Registrant { name, scope, host, token_id, joined, expires, revoked }: Registrant) -> RegistrantView {
    let revoked = revoked.map(|time| system_time(Some(time)));
    let (scope, joined, expires) = (scope_spec(scope), system_time(joined), system_time(expires));
    RegistrantView { name, scope, host, token: token_id, joined, expires, revoked }
}

/// The operator's calls.
#[derive(Debug, Clone)]
pub(super) struct RegistrantCalls(RegistrantsClient<InterceptedService<Channel, ShowToken>>);

impl RegistrantCalls {
    pub(super) fn new(channel: Channel, show: ShowToken) -> Self {
        Self(RegistrantsClient::with_interceptor(channel, show))
    }
}

impl super::Client {
    /// Creates a token: its text, and what it is. A time or a number of 0 means the server's default.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn create_token(
        &mut self,
        scope: ScopeSpec,
        ttl: Duration,
        uses: u32,
    ) -> Result<(String, TokenView), ClientError> {
        let ScopeSpec { namespace, service, verbs, addresses } = scope;
        let scope = Some(Scope { namespace, service, verbs, addresses });
        let request = CreateTokenRequest { scope, ttl_seconds: ttl.as_secs(), uses };
        let answered = self.registrants.0.create_token(call(request)).await;
        let answer = answered.map_err(|status| refused(&self.url, status))?.into_inner();
        Ok((answer.token, token_view(answer.description.unwrap_or_default())))
    }

    /// The tokens of a namespace, or all.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn tokens(&mut self, namespace: Option<&str>) -> Result<Vec<TokenView>, ClientError> {
        let request = ListTokensRequest { namespace: namespace.unwrap_or_default().to_owned() };
        let answered = self.registrants.0.list_tokens(call(request)).await;
        let answer = answered.map_err(|status| refused(&self.url, status))?.into_inner();
        Ok(answer.tokens.into_iter().map(token_view).collect())
    }

    /// Revokes a token.
    ///
    /// # Errors
    /// When there is none, or the call fails.
    pub async fn revoke_token(&mut self, id: TokenId) -> Result<(), ClientError> {
        let answered = self.registrants.0.revoke_token(call(RevokeTokenRequest { id: id.to_string() })).await;
        answered.map(drop).map_err(|status| refused(&self.url, status))
    }

    /// The registrants of a namespace, or all.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn registrants(&mut self, namespace: Option<&str>) -> Result<Vec<RegistrantView>, ClientError> {
        let request = ListRegistrantsRequest { namespace: namespace.unwrap_or_default().to_owned() };
        let answered = self.registrants.0.list_registrants(call(request)).await;
        let answer = answered.map_err(|status| refused(&self.url, status))?.into_inner();
        Ok(answer.registrants.into_iter().map(registrant_view).collect())
    }

    /// Revokes a registrant. Returns the token with which it joined, if that can be used again.
    ///
    /// # Errors
    /// When there is none, or the call fails.
    pub async fn revoke_registrant(&mut self, name: &str) -> Result<Option<String>, ClientError> {
        let request = RevokeRegistrantRequest { name: name.to_owned() };
        let answered = self.registrants.0.revoke_registrant(call(request)).await;
        let RevokeRegistrantResponse { token_id } = answered.map_err(|status| refused(&self.url, status))?.into_inner();
        Ok(Some(token_id).filter(|id| !id.is_empty()))
    }
}
