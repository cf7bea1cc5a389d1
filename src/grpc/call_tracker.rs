//! Around every call: the cap on calls that are open at once, and what is counted.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{
    Code, Status,
    body::Body,
    codegen::{
        Body as HttpBody, Bytes, Service,
        http::{HeaderMap, Request, Response},
    },
    service::Routes,
};

use crate::metrics::{Method, Metrics};

/// The routes, each call of which takes one of a number of permits until its answer is sent.
#[derive(Debug, Clone)]
pub(super) struct TrackedRoutes {
    routes: Routes,
    permits: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

impl TrackedRoutes {
    /// Shares `permits` with the other listeners.
    pub(super) fn new(routes: Routes, permits: Arc<Semaphore>, metrics: Arc<Metrics>) -> Self {
        Self { routes: routes.prepare(), permits, metrics }
    }
}

impl Service<Request<Body>> for TrackedRoutes {
    type Response = Response<TrackedBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<Request<Body>>::poll_ready(&mut self.routes, cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let method = Method::of(request.uri().path());
        let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else {
            self.metrics.grpc.streams_rejected.inc();
            let call = OpenCall::new(method, Arc::clone(&self.metrics), None);
            return Box::pin(async move {
                let status = Status::resource_exhausted("the server has as many calls open as it may; try again later");
                Ok(call.follow(status.into_http()))
            });
        };
        let call = OpenCall::new(method, Arc::clone(&self.metrics), Some(permit));
        let answered = self.routes.call(request);
        Box::pin(async move { answered.await.map(|response| call.follow(response)) })
    }
}

/// A call that is open. Dropped before its end it was given up by the client.
#[derive(Debug)]
struct OpenCall {
    method: Method,
    metrics: Arc<Metrics>,
    began: Instant,
    ended: bool,
    permit: Option<OwnedSemaphorePermit>,
}

impl OpenCall {
    fn new(method: Method, metrics: Arc<Metrics>, permit: Option<OwnedSemaphorePermit>) -> Self {
        if permit.is_some() {
            metrics.grpc.streams.inc();
        }
        Self { method, metrics, began: Instant::now(), ended: false, permit }
    }

    /// Waits in the body for the status, or takes it where it stands in the head already.
    fn follow(mut self, response: Response<Body>) -> Response<TrackedBody> {
        if response.headers().contains_key(Status::GRPC_STATUS) {
            self.end(response.headers());
        }
        response.map(|body| TrackedBody { body, call: self })
    }

    fn end(&mut self, trailers: &HeaderMap) {
        if let Some(status) = Status::from_header_map(trailers) {
            self.count(status.code());
        }
    }

    fn count(&mut self, code: Code) {
        if !self.ended {
            self.ended = true;
            self.metrics.grpc.ended(self.method, code_name(code), self.began.elapsed());
        }
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        self.count(Code::Cancelled);
        if self.permit.is_some() {
            self.metrics.grpc.streams.dec();
        }
    }
}

/// As the gRPC libraries spell codes in their metrics.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Canceled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}

/// An answer on its way, with the call that it belongs to.
#[derive(Debug)]
pub(super) struct TrackedBody {
    body: Body,
    call: OpenCall,
}

impl HttpBody for TrackedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(trailers) = frame.trailers_ref()
        {
            self.call.end(trailers);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}
