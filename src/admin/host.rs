//! The names by which the listener may be asked.
//!
//! A web page of a stranger can point a name of its own at a loopback address (DNS rebinding), and read with the
//! browser of an operator what only the operator may reach. Such a request names the stranger's host.

use std::{net::IpAddr, sync::Arc};

use axum::{
    extract::{Request, State},
    http::{HeaderValue, StatusCode, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse as _, Response},
};

use super::pages;

/// IP addresses, `localhost`, and the names that are configured.
#[derive(Debug, Clone)]
pub(super) struct AllowedHosts(Arc<[String]>);

impl AllowedHosts {
    pub(super) fn new(names: &[String]) -> Self {
        Self(names.into())
    }

    fn allows(&self, authority: &Authority) -> bool {
        let host = authority.host();
        // IPv6 has brackets in an authority (RFC 3986 §3.2.2).
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        // A name may end in the dot of the root.
        let name = host.strip_suffix('.').unwrap_or(host);
        // A page that asks by address is of another origin than the answer, which the browser does not let it read.
        bare.parse::<IpAddr>().is_ok()
            || name.eq_ignore_ascii_case("localhost")
            || self.0.iter().any(|allowed| name.eq_ignore_ascii_case(allowed))
    }
}

/// Answers 421 (RFC 9110 §15.5.20) to a request that names another host. One without a host is of no browser.
pub(super) async fn check(State(allowed): State<AllowedHosts>, request: Request, next: Next) -> Response {
    // The host of an absolute target takes precedence (RFC 9112 §3.2.2).
    let target = request.uri().authority().map(|authority| Ok(authority.clone()));
    let header = || request.headers().get(header::HOST).map(parse);
    let refused = match target.or_else(header) {
        None => false,
        Some(host) => !host.is_ok_and(|host| allowed.allows(&host)),
    };
    // Probes ask by any name.
    if refused && !pages::is_open(request.uri().path()) {
        let text = "421: the request names a host that is not one of this listener's; give --admin-host NAME\n";
        return (StatusCode::MISDIRECTED_REQUEST, text).into_response();
    }
    next.run(request).await
}

fn parse(host: &HeaderValue) -> Result<Authority, axum::http::Error> {
    Ok(Authority::try_from(host.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_compared_without_port_case_and_last_dot() {
        let allowed = AllowedHosts::new(&["gangplank.gangplank.svc".to_owned()]);
        let allows = |host: &str| allowed.allows(&host.parse().expect("an authority"));
        for host in ["127.0.0.1", "127.0.0.1:9153", "[::1]:9153", "192.0.2.7", "localhost:9153", "LOCALHOST."] {
            assert!(allows(host), "{host}");
        }
        assert!(allows("Gangplank.gangplank.svc:9153"));
        for host in ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "gangplank.gangplank"] {
            assert!(!allows(host), "{host}");
        }
        assert!(!allows("127.0.0.1@evil.example"), "what is before @ is no host");
    }
}
