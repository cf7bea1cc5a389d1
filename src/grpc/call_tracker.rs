//! Wraps every call: limits the open calls, counts the ended ones, and charges responses to the
//! connection's memory.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tonic::{
    Code, Status,
    body::Body,
    codegen::{
        Body as HttpBody, Bytes, Service,
        http::{HeaderMap, Request, Response},
    },
};

use super::{
    authentication::AuthenticatedRoutes,
    handover,
    incoming::ConnectionInfo,
    memory::{BudgetTimer, Responses},
    metered_request::MeteredRequest,
};
use crate::{
    metrics::{Method, Metrics},
    net::InUse,
    registry::ListPermit,
};

/// Calls whose client may send any number of messages, at any time. All others send one message, at once.
const REQUEST_STREAMS: [&str; 3] = [
    "/registry.ServiceRegistry/RegistrationEvent",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

/// The routes. Each call takes one permit until its response is sent.
#[derive(Debug, Clone)]
pub(super) struct TrackedRoutes {
    routes: AuthenticatedRoutes,
    permits: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

impl TrackedRoutes {
    /// Shares `permits` with the other listeners.
    pub(super) fn new(routes: AuthenticatedRoutes, permits: Arc<Semaphore>, metrics: Arc<Metrics>) -> Self {
        Self { routes, permits, metrics }
    }
}

impl Service<Request<Body>> for TrackedRoutes {
    type Response = Response<TrackedBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<Request<Body>>::poll_ready(&mut self.routes, cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let method = Method::of(request.uri().path());
        // Before the permit: a refused call is a use of its connection, too.
        let in_use = request.extensions().get::<ConnectionInfo>().map(|info| info.handle.begin_use());
        // Refused, not queued: a queue would hold the memory of every waiting call, and the client's deadline runs
        // anyway.
        let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else {
            self.metrics.grpc.streams_rejected.inc();
            let call = TrackedCall::new(method, Arc::clone(&self.metrics), None, in_use);
            return Box::pin(async move {
                let status = Status::resource_exhausted("the server has as many calls open as it may; try again later");
                Ok(call.follow(status.into_http()))
            });
        };
        let mut call = TrackedCall::new(method, Arc::clone(&self.metrics), Some(permit), in_use);
        let request = match request.extensions().get::<ConnectionInfo>().map(|info| Arc::clone(&info.memory)) {
            Some(memory) => {
                // Registration streams charge their messages to the same memory.
                request.extensions_mut().insert(Arc::clone(&memory));
                call.responses = Some(memory.responses());
                let is_stream = REQUEST_STREAMS.contains(&request.uri().path());
                request.map(|body| Body::new(MeteredRequest::new(body, memory, is_stream)))
            }
            None => request,
        };
        // Streams have none: they last as long as their client wants.
        let deadline = handover::deadline(request.uri().path());
        let answered = self.routes.call(request);
        let Some(deadline) = deadline else {
            return Box::pin(async move { answered.await.map(|response| call.follow(response)) });
        };
        Box::pin(async move {
            let late = |_| Ok(Status::deadline_exceeded("the request took too long").into_http());
            timeout(deadline, answered).await.unwrap_or_else(late).map(|response| call.follow(response))
        })
    }
}

/// An open call. If it is dropped before its end, the client has cancelled it.
#[derive(Debug)]
struct TrackedCall {
    method: Method,
    metrics: Arc<Metrics>,
    began: Instant,
    ended: bool,
    permit: Option<OwnedSemaphorePermit>,
    /// The account of its responses; `None` without a connection, in tests.
    responses: Option<Responses>,
    /// The permit to send as much as a list, held to the end of the call.
    _list_permit: Option<Arc<ListPermit>>,
    /// Keeps the connection from being closed as idle.
    _in_use: Option<InUse>,
}

impl TrackedCall {
    fn new(method: Method, metrics: Arc<Metrics>, permit: Option<OwnedSemaphorePermit>, in_use: Option<InUse>) -> Self {
        if permit.is_some() {
            metrics.grpc.streams.inc();
        }
        Self {
            method,
            metrics,
            began: Instant::now(),
            ended: false,
            permit,
            responses: None,
            _list_permit: None,
            _in_use: in_use,
        }
    }

    /// Counts the call with its status, which is in the trailers, or in the headers of a response without
    /// a body.
    fn follow(mut self, mut response: Response<Body>) -> Response<TrackedBody> {
        self._list_permit = response.extensions_mut().remove::<Arc<ListPermit>>();
        if response.headers().contains_key(Status::GRPC_STATUS) {
            self.end(response.headers());
        }
        response.map(|body| TrackedBody { body, call: self, budget_timer: BudgetTimer::default() })
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

impl Drop for TrackedCall {
    fn drop(&mut self) {
        // Does nothing if the status was seen: `count` counts once.
        self.count(Code::Cancelled);
        if self.permit.is_some() {
            self.metrics.grpc.streams.dec();
        }
    }
}

/// The spelling of the gRPC libraries in their metrics.
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

/// The body of a response, and its call.
#[derive(Debug)]
pub(super) struct TrackedBody {
    body: Body,
    call: TrackedCall,
    budget_timer: BudgetTimer,
}

impl TrackedBody {
    /// Waits for memory, which bounds the responses that the peer leaves unread.
    fn poll_budget(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(responses) = &self.call.responses else { return Poll::Ready(()) };
        self.budget_timer.poll_until(cx, |waker| responses.may_encode(waker))
    }
}

impl HttpBody for TrackedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Status>>> {
        // Before the service is asked for more: what is not encoded takes no memory.
        ready!(self.poll_budget(cx));
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(trailers) = frame.trailers_ref()
        {
            self.call.end(trailers);
        }
        let frame = match (frame, &self.call.responses) {
            (Some(Ok(frame)), Some(responses)) => Some(Ok(frame.map_data(|bytes| responses.charged(bytes)))),
            (frame, _) => frame,
        };
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}
