//! TLS of a listener: certificate, key and client CA from files or a CA of this process, read again when they change,
//! and handshakes within limits.
//!
//! 1. A connection keeps the configuration with which it was accepted, so that no stream is dropped when the
//!    files change. [`ServerTls::changes`] tells when the client CA has changed: [`ServerTls::check`] then says
//!    whether a client's certificate is still good.
//! 2. No session is resumed: a resumed one would bring back a certificate that was checked earlier.
//! 3. A client may send 32 KiB before its handshake is complete. With more than 1 024 handshakes of one protocol at once, the
//!    oldest is given up: a client that answers at once is done long before. A chain has at most three intermediate
//!    certificates.
//! 4. While the source has nothing yet, no handshake is begun.
//!
//! Which names a certificate holds, and what they may do, is not decided here.

mod client;
mod files;
mod handshake;
mod pinned;
mod signers;
mod verifier;

use std::{
    convert::Infallible,
    fmt,
    future::pending,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use rustls::{
    ServerConfig,
    client::verify_server_name,
    pki_types::{CertificateDer, ServerName},
    server::{NoServerSessionStorage, ParsedCertificate},
    version::{TLS12, TLS13},
};
use tokio::{net::TcpStream, sync::watch, time::sleep};
use tokio_rustls::server::TlsStream;
use tracing::{info, warn};

pub use client::{ClientCredentials, Validity, connect_tls};
pub use files::{ServerCa, TlsContents, TlsFileError, TlsFiles, TlsPart, TlsSource, certificate_to_pem};
pub use pinned::fetch_pinned_ca;
pub use signers::{CertificateSigner, PeerCertificates};

use self::{
    files::{CaEnds, ParsedContents},
    handshake::{Handshakes, LimitedStream},
    signers::Signers,
};
use crate::metrics::{ConnectionMetrics, HandshakeFailure};

/// How often the files are read. A kubelet replaces the files of a Secret within about a minute.
const RELOAD_INTERVAL: Duration = Duration::from_secs(5);

/// Handshakes at once, of all listeners of one protocol.
const MAX_HANDSHAKES: usize = 1024;

/// Most bytes that a client may send before its handshake is complete. A chain of three certificates takes some
/// 4 KiB, one with RSA keys of 4096 bits some 8 KiB.
const MAX_HANDSHAKE_BYTES: usize = 32 * 1024;

/// What is spoken after the handshake (ALPN, RFC 7301).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alpn {
    /// gRPC's.
    Http2,
    /// The operator's.
    Http1,
}

impl Alpn {
    /// Its identifier (RFC 9113 §3.2, RFC 7301 §6).
    const fn id(self) -> &'static [u8] {
        match self {
            Self::Http2 => b"h2",
            Self::Http1 => b"http/1.1",
        }
    }
}

/// One of each protocol, so that the handshakes of one do not take the places of the other.
struct PerAlpn<T> {
    http2: T,
    http1: T,
}

impl<T> PerAlpn<T> {
    fn new(of: impl Fn(Alpn) -> T) -> Self {
        Self { http2: of(Alpn::Http2), http1: of(Alpn::Http1) }
    }

    const fn at(&self, alpn: Alpn) -> &T {
        match alpn {
            Alpn::Http2 => &self.http2,
            Alpn::Http1 => &self.http1,
        }
    }
}

/// A stream whose handshake is complete.
pub type ServerTlsStream = TlsStream<LimitedStream<TcpStream>>;

/// What a TLS listener serves with; shared by all its connections.
pub struct ServerTls {
    source: Box<dyn TlsSource>,
    /// `None` while the source has nothing yet.
    state: ArcSwapOption<TlsState>,
    contents: Mutex<Option<TlsContents>>,
    changes: watch::Sender<u64>,
    handshakes: PerAlpn<Handshakes>,
    metrics: Arc<ConnectionMetrics>,
}

struct TlsState {
    configs: PerAlpn<Arc<ServerConfig>>,
    signers: Signers,
    certificate: Option<CertificateDer<'static>>,
    server_ca: Option<ServerCa>,
    ends: CaEnds,
}

/// What [`ServerTls::as_client`] returns.
pub struct ClientPem {
    /// The certificate, and the intermediate ones after it.
    pub cert: Vec<u8>,
    /// Its key.
    pub key: Vec<u8>,
    /// The CA of the other side.
    pub ca: Vec<u8>,
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the contents of the files: one is a key.
        f.debug_struct("ServerTls").field("source", &self.source).finish_non_exhaustive()
    }
}

impl ServerTls {
    /// Reads the source, which may have nothing yet.
    ///
    /// # Errors
    /// Names the file that cannot be read, or that does not hold what it should.
    pub fn load(source: impl TlsSource + 'static, metrics: Arc<ConnectionMetrics>) -> Result<Arc<Self>, TlsFileError> {
        let tls = Self {
            source: Box::new(source),
            state: ArcSwapOption::empty(),
            contents: Mutex::default(),
            changes: watch::Sender::new(0),
            handshakes: PerAlpn::new(|_| Handshakes::new(MAX_HANDSHAKES)),
            metrics,
        };
        tls.reload()?;
        Ok(Arc::new(tls))
    }

    /// Reads the source again at intervals, for ever. When they change and are valid, new connections get what they
    /// hold; else the last valid contents stay in use, and the error is logged once.
    pub async fn follow_files(self: Arc<Self>) -> Infallible {
        let mut reported = None;
        let mut changes = self.source.changes();
        loop {
            let tls = Arc::clone(&self);
            // Files on a network may block.
            let reloaded = tokio::task::spawn_blocking(move || tls.reload()).await;
            match reloaded {
                Ok(Ok(changed)) => {
                    reported = None;
                    if changed {
                        info!(source = %self.source, "TLS: the certificate, the key or the client CA has changed; new connections use it");
                    }
                }
                Ok(Err(err)) => {
                    let err = err.to_string();
                    if reported.as_ref() != Some(&err) {
                        warn!(error = err, "TLS: what has changed is invalid; what was read before stays in use");
                        self.metrics.tls_reload_errors.inc();
                        reported = Some(err);
                    }
                }
                Err(err) => warn!(error = %err, "TLS: reading the files panicked"),
            }
            tokio::select! {
                () = sleep(RELOAD_INTERVAL) => {}
                () = changed(&mut changes) => {}
            }
        }
    }

    /// Reads the source once. Returns whether it has changed.
    fn reload(&self) -> Result<bool, TlsFileError> {
        let now = SystemTime::now();
        // First: whatever can be read.
        self.drop_ended_cas(now)?;
        let read = match self.source.read() {
            Err(TlsFileError::Pending(_)) => return Ok(false),
            read => read?,
        };
        let mut contents = self.contents();
        if contents.as_ref() == Some(&read) {
            return Ok(false);
        }
        self.put_in_use(&read, now)?;
        let ca_changed = contents
            .as_ref()
            .is_some_and(|contents| contents.client_ca != read.client_ca || contents.own_ca != read.own_ca);
        *contents = Some(read);
        if ca_changed {
            self.changes.send_modify(|count| *count += 1);
        }
        Ok(true)
    }

    /// Goes on without the CAs of clients that have ended.
    fn drop_ended_cas(&self, now: SystemTime) -> Result<(), TlsFileError> {
        let differ = self.state.load().as_ref().is_some_and(|state| state.ends.differ(now));
        let contents = self.contents();
        if differ && let Some(contents) = &*contents {
            self.put_in_use(contents, now)?;
            self.changes.send_modify(|count| *count += 1);
        }
        Ok(())
    }

    fn put_in_use(&self, contents: &TlsContents, now: SystemTime) -> Result<(), TlsFileError> {
        let state = TlsState::new(&*self.source, contents, now)?;
        if state.ends.ended > 0 {
            warn!(count = state.ends.ended, source = %self.source, "TLS: CAs of clients have expired; what they have signed is refused");
        }
        self.state.store(Some(Arc::new(state)));
        Ok(())
    }

    fn contents(&self) -> MutexGuard<'_, Option<TlsContents>> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The certificate of this server, without the intermediate ones; `None` while there is none.
    #[must_use]
    pub fn certificate(&self) -> Option<CertificateDer<'static>> {
        self.state.load().as_ref()?.certificate.clone()
    }

    /// By what machines that join know this server. `None` where nobody joins, and while there is no certificate.
    #[must_use]
    pub fn server_ca(&self) -> Option<ServerCa> {
        self.state.load().as_ref()?.server_ca.clone()
    }

    /// Whether the certificate of this server is for `host`, a name or an address.
    #[must_use]
    pub fn is_for(&self, host: &str) -> bool {
        let (Some(certificate), Ok(name)) = (self.certificate(), ServerName::try_from(host)) else { return false };
        ParsedCertificate::try_from(&certificate).is_ok_and(|parsed| verify_server_name(&parsed, &name).is_ok())
    }

    /// Certificate, key and client CA, each in PEM, as they were read last: what a replica shows another, and trusts.
    /// `None` without a client CA, and while the source has nothing.
    #[must_use]
    pub fn as_client(&self) -> Option<ClientPem> {
        let contents = self.contents();
        let TlsContents { cert, key, client_ca, .. } = contents.as_ref()?;
        Some(ClientPem { cert: cert.clone(), key: key.clone(), ca: client_ca.clone()? })
    }

    /// Changes whenever the client CA does, after which open connections should be checked again.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Checks a client's certificates against the CA that has signed them and the clock, as a new handshake would.
    ///
    /// # Errors
    /// Says what is wrong with them.
    pub fn check(&self, certificates: &PeerCertificates) -> Result<(), rustls::Error> {
        let state = self.state.load();
        state.as_ref().ok_or(rustls::Error::NoCertificatesPresented)?.signers.check(certificates)
    }

    fn not_ready(&self) -> HandshakeError {
        let detail = self.source.read().err().map_or_else(|| "no certificate yet".into(), |err| err.to_string());
        HandshakeError { reason: HandshakeFailure::NotReady, detail }
    }

    /// Completes the handshake of an accepted connection within `deadline`. A client may name no protocol, but not only
    /// others. Returns the stream, and what certificates the client has shown, if any.
    ///
    /// # Errors
    /// When the handshake fails; counted.
    pub async fn accept(
        &self,
        stream: TcpStream,
        alpn: Alpn,
        deadline: Duration,
    ) -> Result<(ServerTlsStream, Option<PeerCertificates>), HandshakeError> {
        let state = self.state.load_full();
        let accepted = match &state {
            Some(state) => {
                let config = Arc::clone(state.configs.at(alpn));
                let accepted = self.handshakes.at(alpn).run(stream, config, deadline).await;
                // By the CAs of this handshake: others may be in use meanwhile.
                accepted.and_then(|stream| state.with_certificates(stream))
            }
            None => Err(self.not_ready()),
        };
        match &accepted {
            Ok(_) => {
                self.metrics.handshakes.inc();
            }
            Err(err) => {
                self.metrics.handshakes_failed.at(err.reason).inc();
            }
        }
        accepted
    }
}

/// Ready when what `changes` follows has changed; never without it.
pub async fn changed(changes: &mut Option<watch::Receiver<u64>>) {
    if let Some(changes) = changes
        && changes.changed().await.is_ok()
    {
        return;
    }
    pending::<()>().await;
}

impl TlsState {
    fn new(source: &dyn TlsSource, contents: &TlsContents, now: SystemTime) -> Result<Self, TlsFileError> {
        let invalid = |part, err: &dyn fmt::Display| source.invalid(part, err.to_string());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let ParsedContents { certified, client_roots, own_roots, server_ca, ends } =
            files::parse(source, contents, &provider, now)?;
        let certificate = certified.cert.first().cloned();
        let signers =
            Signers::new(client_roots, own_roots, &provider).map_err(|err| invalid(TlsPart::ClientCa, &err))?;
        let builder = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13, &TLS12])
            .map_err(|err| invalid(TlsPart::Certificate, &err))?;
        let builder = match signers.verifier() {
            Some(verifier) => builder.with_client_cert_verifier(verifier),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certified)));
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let configs = PerAlpn::new(|alpn| {
            let mut config = config.clone();
            config.alpn_protocols = vec![alpn.id().to_vec()];
            Arc::new(config)
        });
        Ok(Self { configs, signers, certificate, server_ca, ends })
    }

    /// The stream of a complete handshake, and what certificates the client has shown in it.
    fn with_certificates(
        &self,
        stream: ServerTlsStream,
    ) -> Result<(ServerTlsStream, Option<PeerCertificates>), HandshakeError> {
        let shown = stream.get_ref().1.peer_certificates().filter(|chain| !chain.is_empty());
        let certificates = shown.map(|chain| self.signers.of(chain)).transpose();
        let bad =
            |err: rustls::Error| HandshakeError { reason: HandshakeFailure::BadCertificate, detail: err.to_string() };
        let certificates = certificates.map_err(bad)?;
        Ok((stream, certificates))
    }
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
#[error("{detail}")]
pub struct HandshakeError {
    /// The kind, as it is counted.
    pub reason: HandshakeFailure,
    /// The explanation, for logs.
    pub detail: String,
}

#[cfg(test)]
mod tests;
