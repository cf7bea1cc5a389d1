//! The calls that need no identity, and the limits that take the place of one: whoever reaches a listener can make them.
//!
//! A call is begun when its message is there: who sends none holds one of the few permits of its address, and none of those for calls with a message.

use std::{convert::Infallible, net::IpAddr, sync::Arc, time::Duration};

use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use tokio::{sync::Semaphore, time::timeout};
use tonic::{
    Status,
    body::Body,
    codegen::{
        Service,
        http::{Request, Response},
    },
    service::Routes,
};

use super::no_ca;
use crate::{grpc::call_limiter::CallLimiter, identity::joining::RegistrantStore, metrics::JoinResult};

/// The calls, by path.
const JOIN: &str = "/gangplank.join.v1.Joining/Join";
const RENEW: &str = "/gangplank.join.v1.Joining/Renew";

/// Such calls at once. Each checks one signature and syncs one file.
const MAX_CALLS: usize = 64;

/// Calls whose message has not come, of one address, or of one IPv6 /64, and of all.
const MAX_UNREAD_PER_ADDRESS: usize = 16;
const MAX_UNREAD: usize = 1024;

/// Most bytes of a message with its prefix. A certificate and a request have some 500 each.
const MAX_MESSAGE_BYTES: usize = 16 * 1024;

/// How long one may take, from its headers to its answer. A client sends its one message at once.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The limits, shared by all connections.
#[derive(Debug)]
pub(in crate::grpc) struct UnauthenticatedCalls {
    registrants: Option<Arc<RegistrantStore>>,
    /// Of calls whose message has not come.
    unread: CallLimiter,
    calls: Semaphore,
}

impl UnauthenticatedCalls {
    pub(in crate::grpc) fn new(registrants: Option<Arc<RegistrantStore>>) -> Self {
        Self {
            registrants,
            unread: CallLimiter::new(MAX_UNREAD_PER_ADDRESS, MAX_UNREAD),
            calls: Semaphore::new(MAX_CALLS),
        }
    }

    /// Whether a call needs no identity.
    pub(in crate::grpc) fn contains(path: &str) -> bool {
        path == JOIN || path == RENEW
    }

    /// Makes the call, if `peer` may make another one now.
    pub(in crate::grpc) async fn call(
        &self,
        peer: IpAddr,
        mut routes: Routes,
        request: Request<Body>,
    ) -> Result<Response<Body>, Infallible> {
        let Some(registrants) = &self.registrants else { return Ok(no_ca().into_http()) };
        let is_renewal = request.uri().path() == RENEW;
        let admitted = if is_renewal { registrants.admit_renewal(peer) } else { registrants.admit(peer) };
        if !admitted {
            return Ok(Status::resource_exhausted("too many calls without an identity: try again later").into_http());
        }
        let busy = || {
            registrants.count(JoinResult::RateLimited);
            Ok(Status::resource_exhausted("too many machines join at once: try again later").into_http())
        };
        let answered = timeout(CALL_TIMEOUT, async {
            let (head, body) = request.into_parts();
            let message = {
                let Some(_unread) = self.unread.acquire(Some(peer)) else { return busy() };
                Limited::new(body, MAX_MESSAGE_BYTES).collect().await
            };
            let message = match message {
                Ok(message) => message,
                Err(err) => {
                    registrants.count(JoinResult::InvalidRequest);
                    return Ok(if err.is::<LengthLimitError>() {
                        let err = format!("the message has more than {MAX_MESSAGE_BYTES} bytes");
                        Status::out_of_range(err).into_http()
                    } else {
                        Status::cancelled("the message was not sent to its end").into_http()
                    });
                }
            };
            let Ok(_permit) = self.calls.try_acquire() else { return busy() };
            routes.call(Request::from_parts(head, Body::new(message))).await
        });
        answered.await.unwrap_or_else(|_| {
            registrants.count(JoinResult::Timeout);
            Ok(Status::deadline_exceeded(format!("not complete after {CALL_TIMEOUT:?}")).into_http())
        })
    }
}
