//! The token that a client shows with each call.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use http::{HeaderValue, Uri};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::Interceptor,
};

/// Most bytes of a token file: the server takes 16 KiB of headers.
const MAX_TOKEN_BYTES: usize = 12 * 1024;

/// Why a token cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error("--token-file {path}: cannot be read", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It does not hold a token.
    #[error("--token-file {path}: holds no token: one line of visible characters, 12 KiB at most", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
    },
}

/// Adds the token in a file to each call. The file is read for each: a kubelet replaces tokens before they expire.
#[derive(Debug, Clone, Default)]
pub(super) struct ShowToken(Option<Arc<Path>>);

impl ShowToken {
    pub(super) fn from_file(path: Option<PathBuf>) -> Self {
        Self(path.map(Arc::from))
    }

    /// Whether there is a token, and the file holds one now.
    ///
    /// # Errors
    /// When there is one that cannot be shown.
    pub(super) fn is_there(&self) -> Result<bool, TokenError> {
        Ok(self.read()?.is_some())
    }

    /// The value of `Authorization` for HTTP.
    pub(super) fn header(&self) -> Result<Option<HeaderValue>, TokenError> {
        let Some(value) = self.read()? else { return Ok(None) };
        let mut value = HeaderValue::from_bytes(value.as_bytes()).expect("metadata in ASCII is a header");
        value.set_sensitive(true);
        Ok(Some(value))
    }

    /// The value of `authorization`. A file of a few hundred bytes in memory, so that reading it blocks nobody.
    fn read(&self) -> Result<Option<MetadataValue<Ascii>>, TokenError> {
        let Some(path) = &self.0 else { return Ok(None) };
        let text =
            fs::read_to_string(path).map_err(|source| TokenError::Unreadable { path: path.to_path_buf(), source })?;
        // Editors and `kubectl create token >file` end a file with a line feed.
        let token = text.trim();
        let valid = !token.is_empty() && token.len() <= MAX_TOKEN_BYTES && token.bytes().all(|b| b.is_ascii_graphic());
        let value = valid.then(|| format!("Bearer {token}").parse::<MetadataValue<Ascii>>().ok()).flatten();
        let mut value = value.ok_or_else(|| TokenError::Invalid { path: path.to_path_buf() })?;
        // Kept out of Debug output and of the tables of header compression (RFC 7541 §7.1.3).
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

impl Interceptor for ShowToken {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = self.read().map_err(|err| Status::unauthenticated(err.to_string()))? {
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

/// Whether what is sent to `uri` stays on this machine (RFC 6761 §6.3 for the name).
pub(super) fn is_loopback(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    // Canonical, because `::ffff:127.0.0.1` is this machine too.
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Result<Option<String>, String> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        fs::write(file.path(), text).expect("written");
        let mut show = ShowToken::from_file(Some(file.path().to_owned()));
        let request = show.call(Request::new(())).map_err(|status| status.message().to_owned())?;
        Ok(request.metadata().get("authorization").map(|value| value.to_str().expect("ASCII").to_owned()))
    }

    #[test]
    fn file_is_read_for_each_call() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let mut show = ShowToken::from_file(Some(file.path().to_owned()));
        for token in ["one", "two"] {
            fs::write(file.path(), token).expect("written");
            let request = show.call(Request::new(())).expect("a token");
            let value = request.metadata().get("authorization").expect("there");
            assert_eq!(value.to_str().expect("ASCII"), format!("Bearer {token}"));
            assert!(!format!("{request:?}").contains(token), "{request:?}");
        }
        drop(file);
        assert!(show.call(Request::new(())).expect_err("no file").message().contains("--token-file"));
    }

    #[test]
    fn only_a_token_is_shown() {
        assert_eq!(shown("abc.def\n"), Ok(Some("Bearer abc.def".into())));
        for bad in ["", "\n", "a b", "a\nb", "\u{e4}"] {
            assert!(shown(bad).expect_err(bad).ends_with("12 KiB at most"), "{bad:?}");
        }
        assert!(shown(&"x".repeat(MAX_TOKEN_BYTES + 1)).is_err());
        let mut none = ShowToken::default();
        assert!(none.call(Request::new(())).expect("nothing to show").metadata().is_empty());
    }

    #[test]
    fn loopback_is_this_machine() {
        for (url, expected) in [
            ("http://127.0.0.1:9080", true),
            ("http://127.9.9.9:9080", true),
            ("http://[::1]:9080", true),
            ("http://localhost:9080", true),
            ("http://10.0.0.1:9080", false),
            ("http://[2001:db8::1]:9080", false),
            ("http://localhost.example.com:9080", false),
            ("http://127.0.0.1.example.com:9080", false),
        ] {
            assert_eq!(is_loopback(&url.parse().expect("a URL")), expected, "{url}");
        }
    }
}
