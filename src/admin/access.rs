//! Who may see a page. Whatever is not open to everybody needs an identity, and that the right to the path.
//!
//! The path that is decided on is the one that is routed: neither is decoded or cleaned. So what is written in another
//! way (`//metrics`, `/%6detrics`) is another path, of which there is no page.

use std::{sync::Arc, time::SystemTime};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};

use super::pages;
use crate::{
    identity::{Access, AccessResource, AccessVerb, Credentials, Identity, NotAllowed, PageAccess, Unauthenticated},
    security::{Peer, Security, take_token},
};

/// Most bytes of a path. The longest of a page has some 180, and each that is asked for is remembered for a while.
const MAX_PATH_BYTES: usize = 512;

/// Seconds after which to try again what could not be decided: the pause after a failed review ends after 5 s at most.
const RETRY_AFTER: &str = "5";

const HOW_TO_IDENTIFY: &str = "Show a client certificate, or `Authorization: Bearer TOKEN`: \
                               kubectl create token ACCOUNT --audience gangplank";

const HOW_TO_ALLOW: &str = "What allows it: a rule of --authorization-policy with the path in paths; with Kubernetes a \
                            ClusterRole with the path in nonResourceURLs and the verb get, and for a page that shows \
                            instances the right to list or get instances.gangplank.dev";

/// Passes on what may be seen; the peer is in the extensions of the request.
pub(super) async fn check(State(security): State<Arc<Security>>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    if pages::is_open(&path) {
        return next.run(request).await;
    }
    if path.len() > MAX_PATH_BYTES || !path.bytes().all(|byte| byte.is_ascii_graphic()) {
        return (StatusCode::NOT_FOUND, "404: no page has such a path\n").into_response();
    }
    let Some(peer) = request.extensions().get::<Arc<Peer>>().cloned() else {
        return (StatusCode::INTERNAL_SERVER_ERROR, "500: the request has no connection\n").into_response();
    };
    // Before the method: whoever has no identity learns nothing, not even which methods there are.
    let identity = match identify(&security, &peer, request.headers_mut()).await {
        Ok(identity) => identity,
        Err(err) => {
            security.unauthenticated(&peer, &path, &err);
            return unauthenticated(&err);
        }
    };
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let allow = [(header::ALLOW, "GET, HEAD")];
        return (StatusCode::METHOD_NOT_ALLOWED, allow, "405: pages are read only\n").into_response();
    }
    // A page that shows instances needs the same right as the call that returns them.
    let instances = pages::instances_at(&path).map(|(namespace, service)| Access {
        resource: AccessResource::Instances,
        verb: if service.is_some() { AccessVerb::Get } else { AccessVerb::List },
        namespace,
        service,
        address: None,
        peer: peer.address,
    });
    let page = PageAccess { path: &path, instances, peer: peer.address };
    match security.authorizer.decide_page(&identity, &page).await {
        Ok(()) => next.run(request).await,
        Err(NotAllowed::Denied(denied)) => {
            (StatusCode::FORBIDDEN, format!("403: {denied}\n{HOW_TO_ALLOW}\n")).into_response()
        }
        Err(NotAllowed::Undecided(err)) => undecided(&format!("whether this is allowed: {err}")),
    }
}

/// A token that is shown counts, whatever else the connection has shown.
async fn identify(security: &Security, peer: &Peer, headers: &mut HeaderMap) -> Result<Arc<Identity>, Unauthenticated> {
    match take_token(headers)? {
        None => peer.identity(),
        Some(token) => {
            let credentials = Credentials::Token { token, peer: peer.address };
            security.authenticator.identify(&credentials, SystemTime::now()).await
        }
    }
}

fn unauthenticated(err: &Unauthenticated) -> Response {
    if err.is_unknown() {
        return undecided(&err.to_string());
    }
    // RFC 9110 §11.6.1: a 401 has to name a way to authenticate.
    let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
    (StatusCode::UNAUTHORIZED, challenge, format!("401: {err}\n{HOW_TO_IDENTIFY}\n")).into_response()
}

fn undecided(reason: &str) -> Response {
    let retry = [(header::RETRY_AFTER, RETRY_AFTER)];
    (StatusCode::SERVICE_UNAVAILABLE, retry, format!("503: {reason}\n")).into_response()
}
