//! How long the certificates of a connection are valid.

use http::Uri;
use tokio::time::timeout;

use super::{CONNECT_TIMEOUT, ClientTls, servers::innermost};
pub use crate::net::tls::Validity;

/// The port of an https URL without one.
const HTTPS_PORT: u16 = 443;

/// That of the certificate which the server at `url` shows; `None` for a URL that is not https.
///
/// # Errors
/// Says why no certificate was shown.
pub async fn shown_certificate(url: &str) -> Result<Option<Validity>, String> {
    let uri: Uri = url.parse().map_err(|_| format!("{url:?} is not a URL"))?;
    let Some(host) = uri.host().filter(|_| uri.scheme_str() == Some("https")) else { return Ok(None) };
    let shown = Validity::shown_by(host.trim_matches(['[', ']']), uri.port_u16().unwrap_or(HTTPS_PORT));
    match timeout(CONNECT_TIMEOUT, shown).await {
        Ok(Ok(validity)) => Ok(Some(validity)),
        Ok(Err(err)) => Err(innermost(&err)),
        Err(_) => Err("no answer".into()),
    }
}

impl ClientTls {
    /// Of the CAs that it trusts; `None` without one that can be read.
    #[must_use]
    pub fn ca_validity(&self) -> Option<Vec<Validity>> {
        Validity::of_pem(&self.pem()?.ca)
    }

    /// Of the certificate that it shows; `None` without one that can be read.
    #[must_use]
    pub fn own_validity(&self) -> Option<Validity> {
        let (certificate, _) = self.pem()?.identity.as_ref()?;
        Validity::of_pem(certificate)?.first().copied()
    }
}
