//! The calls that need no identity, and the limits that take the place of one: whoever reaches a listener can make them.

use std::{convert::Infallible, net::IpAddr, sync::Arc, time::Duration};

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
use crate::{identity::joining::Registrants, metrics::JoinResult};

/// The calls, by path.
const PATHS: [&str; 2] = ["/gangplank.join.v1.Joining/Join", "/gangplank.join.v1.Joining/Renew"];

/// Such calls at once. Each checks one signature and syncs one file.
const MAX_CALLS: usize = 64;

/// How long one may take, from its headers to its answer. A client sends its one message at once.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The limits, shared by all connections.
#[derive(Debug)]
pub(in crate::grpc) struct OpenCalls {
    registrants: Option<Arc<Registrants>>,
    places: Semaphore,
}

impl OpenCalls {
    pub(in crate::grpc) fn new(registrants: Option<Arc<Registrants>>) -> Self {
        Self { registrants, places: Semaphore::new(MAX_CALLS) }
    }

    /// Whether a call needs no identity.
    pub(in crate::grpc) fn contains(path: &str) -> bool {
        PATHS.contains(&path)
    }

    /// Makes the call, if `peer` may make another one now.
    pub(in crate::grpc) async fn call(
        &self,
        peer: IpAddr,
        mut routes: Routes,
        request: Request<Body>,
    ) -> Result<Response<Body>, Infallible> {
        let Some(registrants) = &self.registrants else { return Ok(no_ca().into_http()) };
        if !registrants.admit(peer) {
            return Ok(Status::resource_exhausted("too many calls without an identity: try again later").into_http());
        }
        let Ok(_place) = self.places.try_acquire() else {
            registrants.count(JoinResult::RateLimited);
            let busy = "too many machines join at once: try again later";
            return Ok(Status::resource_exhausted(busy).into_http());
        };
        timeout(CALL_TIMEOUT, routes.call(request)).await.unwrap_or_else(|_| {
            registrants.count(JoinResult::Timeout);
            Ok(Status::deadline_exceeded(format!("not complete after {CALL_TIMEOUT:?}")).into_http())
        })
    }
}
