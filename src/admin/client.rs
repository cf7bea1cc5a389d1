//! The client side of the pages, for `gangplank check`: one request on a connection of its own.

use std::{io, time::Duration};

use axum::body::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{
    Request,
    client::conn::http1,
    header::{AUTHORIZATION, HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};

pub use super::{
    readiness::{Check as ReadinessCheck, Readiness},
    status::{DiskSpace, KubernetesFlags, ProcessStatus},
};
use crate::net::tls::{ClientCredentials, connect_tls};

/// How long one page may take, from the connection to its last octet.
const PAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// Most bytes of a page that is read.
const MAX_PAGE_BYTES: usize = 1024 * 1024;

/// Where the pages are, and as whom they are asked for.
#[derive(Debug, Clone)]
pub struct AdminClient {
    /// `http` or `https`, host and port.
    pub url: http::Uri,
    /// What the server is known by and shown, for https.
    pub pem: Option<ClientCredentials>,
    /// A token to show. Sent over https, and to loopback.
    pub authorization: Option<HeaderValue>,
}

/// Why a page was not read.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// No server listens there, or one of both does not trust the other.
    #[error("{0}")]
    Unreachable(#[from] io::Error),
    /// What answers speaks no HTTP.
    #[error("no HTTP answer: {0}")]
    Http(#[from] hyper::Error),
    /// No complete answer in time.
    #[error("no answer within {} s", PAGE_TIMEOUT.as_secs())]
    Timeout,
    /// The server does not show the page.
    #[error("{status}: {text}")]
    Refused {
        /// The status of the answer.
        status: u16,
        /// What it says.
        text: String,
    },
    /// It is no such page.
    #[error("the page cannot be read: {0}")]
    Invalid(String),
}

impl AdminClient {
    /// Whether it answers registrations, and if not, why not. An answer of 503 is a page like that of 200.
    ///
    /// # Errors
    /// When the page cannot be read.
    pub async fn readiness(&self) -> Result<Readiness, PageError> {
        let (status, body) = self.get("/readyz/registrations?format=json").await?;
        parse(status, &body, &[200, 503])
    }

    /// What the process says of itself.
    ///
    /// # Errors
    /// When the page cannot be read.
    pub async fn status(&self) -> Result<ProcessStatus, PageError> {
        let (status, body) = self.get("/api/v1/status").await?;
        parse(status, &body, &[200])
    }

    async fn get(&self, path: &str) -> Result<(u16, Bytes), PageError> {
        timeout(PAGE_TIMEOUT, self.exchange(path)).await.unwrap_or(Err(PageError::Timeout))
    }

    async fn exchange(&self, path: &str) -> Result<(u16, Bytes), PageError> {
        let missing = |what: &str| PageError::Invalid(format!("the URL has no {what}"));
        let host = self.url.host().ok_or_else(|| missing("host"))?.trim_matches(['[', ']']);
        let port = self.url.port_u16().ok_or_else(|| missing("port"))?;
        let stream = TcpStream::connect((host, port)).await?;
        if self.url.scheme_str() == Some("https") {
            let Some(pem) = &self.pem else {
                return Err(PageError::Invalid("https needs the CA of the server: give --cacert FILE".into()));
            };
            let stream = connect_tls(host, stream, pem).await?;
            self.over(stream, path).await
        } else {
            self.over(stream, path).await
        }
    }

    async fn over(&self, stream: impl AsyncRead + AsyncWrite + Unpin, path: &str) -> Result<(u16, Bytes), PageError> {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let authority = self.url.authority().map_or("", http::uri::Authority::as_str);
        let mut request = Request::get(path).header(HOST, authority);
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|err| PageError::Invalid(err.to_string()))?;
        let answer = async {
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = Limited::new(body, MAX_PAGE_BYTES).collect().await;
            let body = body.map_err(|err| PageError::Invalid(err.to_string()))?;
            Ok((head.status.as_u16(), body.to_bytes()))
        };
        // The connection makes progress only while it is polled, and ends with what is sent over it.
        tokio::pin!(answer);
        tokio::select! {
            answered = &mut answer => answered,
            ended = connection => {
                ended?;
                answer.await
            }
        }
    }
}

fn parse<T: serde::de::DeserializeOwned>(status: u16, body: &[u8], expected: &[u16]) -> Result<T, PageError> {
    if !expected.contains(&status) {
        let text = String::from_utf8_lossy(body);
        let text = text.lines().next().unwrap_or_default();
        let code = format!("{status}: ");
        return Err(PageError::Refused { status, text: text.strip_prefix(&code).unwrap_or(text).to_owned() });
    }
    serde_json::from_slice(body).map_err(|err| PageError::Invalid(err.to_string()))
}
