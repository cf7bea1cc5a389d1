//! The layer that every call passes: no call without an identity reaches a service, and no response goes on when its
//! identity or its right has ended. The exceptions are the calls of machines that join, see [`super::joining`].

use std::{
    convert::Infallible,
    future::Future,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::SystemTime,
};

use tonic::{
    Status,
    body::Body,
    codegen::{
        Body as HttpBody, Bytes, Service,
        http::{HeaderMap, Request, Response},
    },
    service::Routes,
};
use tracing::warn;

use super::{
    caller::{Caller, unauthenticated},
    handover,
    incoming::ConnectionInfo,
    joining::UnauthenticatedCalls,
};
use crate::{
    identity::{Credentials, Identity, Unauthenticated},
    security::{Peer, Security, take_token},
};

/// Most bytes of a call's path in the log: those that exist are shorter.
const MAX_LOGGED_PATH: usize = 100;

/// The routes, behind the check of who calls.
#[derive(Debug, Clone)]
pub(super) struct AuthenticatedRoutes {
    routes: Routes,
    security: Arc<Security>,
    unauthenticated_calls: Arc<UnauthenticatedCalls>,
}

impl AuthenticatedRoutes {
    pub(super) fn new(routes: Routes, security: Arc<Security>) -> Self {
        let unauthenticated_calls = UnauthenticatedCalls::new(security.registrants.clone());
        Self { routes: routes.prepare(), security, unauthenticated_calls: Arc::new(unauthenticated_calls) }
    }

    fn refuse(&self, peer: &Peer, path: &str, err: &Unauthenticated) -> Response<Body> {
        self.security.unauthenticated(peer, shown(path), err);
        unauthenticated(err).into_http()
    }

    /// Passes the call on. Its response ends when `identity_end` is ready, or when a right of the call is withdrawn.
    fn answer<F>(
        mut self,
        mut request: Request<Body>,
        peer: &Peer,
        identity: Arc<Identity>,
        identity_end: Option<F>,
    ) -> impl Future<Output = Result<Response<Body>, Infallible>> + Send + use<F>
    where
        F: Future<Output = Unauthenticated> + Send + 'static,
    {
        let caller = Caller::new(identity, peer.address, &self.security);
        if let Err(status) = &caller {
            self.security.log.refused(|suppressed| {
                let (call, error) = (shown(request.uri().path()), status.message());
                warn!(peer = %peer.address, call, error, suppressed, "refused");
            });
        }
        async move {
            let caller = match caller {
                Ok(caller) => caller,
                Err(status) => return Ok(status.into_http()),
            };
            if let Some(verb) = handover::needed(request.uri().path())
                && let Err(status) = caller.may_call(verb, None, None).await
            {
                return Ok(status.into_http());
            }
            let end = caller.end(identity_end);
            request.extensions_mut().insert(caller);
            let Some(end) = end else { return self.routes.call(request).await };
            let mut end = Box::pin(end);
            // The end counts from the begin: a call may wait for its message longer than its identity lasts.
            // Biased: of an end and a response that are ready at once, the end counts.
            let response = tokio::select! {
                biased;
                status = &mut end => return Ok(status.into_http()),
                response = self.routes.call(request) => response?,
            };
            Ok(response.map(|body| Body::new(EndingBody { body, end, ended: false })))
        }
    }
}

impl Service<Request<Body>> for AuthenticatedRoutes {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<Request<Body>>::poll_ready(&mut self.routes, cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let Some(peer) = request.extensions().get::<ConnectionInfo>().map(|info| Arc::clone(&info.peer)) else {
            let status = Status::internal("the call has no connection");
            return Box::pin(async move { Ok(status.into_http()) });
        };
        if UnauthenticatedCalls::contains(request.uri().path()) {
            let unauthenticated_calls = Arc::clone(&self.unauthenticated_calls);
            let routes = self.routes.clone();
            return Box::pin(async move { unauthenticated_calls.call(peer.address, routes, request).await });
        }
        // The clone is kept for the next call: this one is ready.
        let next = self.clone();
        let this = mem::replace(self, next);
        match take_token(request.headers_mut()) {
            // Without a token nothing is waited for.
            Ok(None) => match peer.identity() {
                Ok(identity) => {
                    let end = peer.end();
                    Box::pin(this.answer(request, &peer, identity, end))
                }
                Err(err) => {
                    let refused = this.refuse(&peer, request.uri().path(), &err);
                    Box::pin(async move { Ok(refused) })
                }
            },
            Ok(Some(token)) => Box::pin(async move {
                let credentials = Credentials::Token { token: token.clone(), peer: peer.address };
                let authenticator = this.security.authenticator.clone();
                let identity = match authenticator.identify(&credentials, SystemTime::now()).await {
                    Ok(identity) => identity,
                    Err(err) => return Ok(this.refuse(&peer, request.uri().path(), &err)),
                };
                let end = authenticator.token_end(token, Arc::clone(&identity));
                this.answer(request, &peer, identity, Some(end)).await
            }),
            Err(err) => {
                let refused = this.refuse(&peer, request.uri().path(), &err);
                Box::pin(async move { Ok(refused) })
            }
        }
    }
}

/// A path for the log. All octets of one are ASCII (RFC 9110 §4.1).
fn shown(path: &str) -> &str {
    path.get(..MAX_LOGGED_PATH).unwrap_or(path)
}

/// A response that ends when its caller may not have it any more.
struct EndingBody<F> {
    body: Body,
    end: Pin<Box<F>>,
    ended: bool,
}

impl<F: Future<Output = Status> + Send> HttpBody for EndingBody<F> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if let Poll::Ready(status) = self.end.as_mut().poll(cx) {
            self.ended = true;
            // Ends the call at its service, too.
            self.body = Body::empty();
            let mut trailers = HeaderMap::new();
            return Poll::Ready(Some(status.add_header(&mut trailers).map(|()| http_body::Frame::trailers(trailers))));
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.body.is_end_stream()
    }
}
