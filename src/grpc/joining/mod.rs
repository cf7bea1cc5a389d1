//! Joining: the two calls that need no identity, within limits, and those with which an operator says who may use them.

mod registrants;
mod unauthenticated_calls;

use std::{net::IpAddr, sync::Arc};

use tonic::{Request, Response, Status};
use tracing::{info, warn};

pub(super) use self::{registrants::RegistrantsService, unauthenticated_calls::UnauthenticatedCalls};
use super::{
    ServerContext,
    incoming::ConnectionInfo,
    proto::gangplank::join::v1::{
        JoinRequest, JoinResponse, RenewRequest, RenewResponse, Scope as WireScope, joining_server::Joining,
    },
};
use crate::{
    identity::{
        CaError,
        joining::{InvalidScope, Joined, JoiningError, RegistrantStore, Scope, ScopeSpec, TokenId, TokenRefused},
    },
    metrics::JoinResult,
    model::wall_clock,
    security::Security,
};

/// `gangplank.join.v1.Joining`.
#[derive(Debug)]
pub(super) struct JoiningService {
    context: ServerContext,
}

impl JoiningService {
    pub(super) const fn new(context: ServerContext) -> Self {
        Self { context }
    }

    /// Counts and logs how a call ended.
    fn tell(&self, peer: IpAddr, result: Result<Joined, JoiningError>, done: JoinResult) -> Result<Joined, Status> {
        let security = &self.context.security;
        let counted = result.as_ref().map_or_else(JoiningError::result, |_| done);
        if let Some(registrants) = &security.registrants {
            registrants.count(counted);
        }
        match result {
            Ok(joined) => Ok(joined),
            Err(err) => {
                security.log.refused(
                    |suppressed| warn!(peer = %peer, error = %err, suppressed, "refused: it did not join or renew"),
                );
                Err(status(err))
            }
        }
    }
}

/// The registrants of a server that has a CA of its own.
fn registrants(security: &Security) -> Result<Arc<RegistrantStore>, Status> {
    security.registrants.clone().ok_or_else(no_ca)
}

fn no_ca() -> Status {
    Status::failed_precondition(
        "this server has no CA of its own, so nobody joins it: it has --tls-cert without --tls-server-ca, or listens on loopback only",
    )
}

fn peer<T>(request: &Request<T>) -> Result<IpAddr, Status> {
    let info = request.extensions().get::<ConnectionInfo>();
    info.map(|info| info.peer.address).ok_or_else(|| Status::internal("the call has no connection"))
}

fn status(err: JoiningError) -> Status {
    let text = err.to_string();
    match err {
        JoiningError::Token(TokenRefused::Unknown | TokenRefused::Expired | TokenRefused::Used)
        | JoiningError::Certificate(_)
        | JoiningError::Expired => Status::unauthenticated(text),
        JoiningError::Revoked => Status::permission_denied(text),
        JoiningError::Request(_) | JoiningError::Field { .. } => Status::invalid_argument(text),
        JoiningError::Full(_) | JoiningError::TooMany => Status::resource_exhausted(text),
        JoiningError::NoAddress => Status::failed_precondition(text),
        JoiningError::Unavailable(_) | JoiningError::Ca(CaError::Pending(_)) => Status::unavailable(text),
        JoiningError::Damaged { .. } | JoiningError::Store { .. } | JoiningError::Ca(_) => Status::internal(text),
    }
}

/// What a machine that joined trusts, in PEM.
fn server_ca(security: &Security) -> String {
    let ca = security.tls.as_ref().and_then(|tls| tls.server_ca());
    ca.map(|ca| ca.pem).unwrap_or_default()
}

fn scope_from_proto(WireScope { namespace, service, verbs, addresses }: WireScope) -> Result<Scope, Status> {
    let spec = ScopeSpec { namespace, service, verbs, addresses };
    Scope::parse(&spec).map_err(|err: InvalidScope| Status::invalid_argument(format!("scope.{err}")))
}

fn scope_to_proto(scope: &Scope) -> WireScope {
    let ScopeSpec { namespace, service, verbs, addresses } = scope.spec();
    WireScope { namespace, service, verbs, addresses }
}

#[tonic::async_trait]
impl Joining for JoiningService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let (peer, registrants) = (peer(&request)?, registrants(&self.context.security)?);
        let JoinRequest { token_id, secret, certificate_request, host, previous } = request.into_inner();
        // An id of another form is that of no token.
        let joined = match token_id.parse::<TokenId>() {
            Err(_) => Err(TokenRefused::Unknown.into()),
            Ok(id) => registrants.join(id, &secret, &certificate_request, &host, &previous, wall_clock()).await,
        };
        let Joined { user, certificate, scope } = self.tell(peer, joined, JoinResult::Joined)?;
        info!(peer = %peer, registrant = user, host, scope = %scope, "joined");
        let (scope, server_ca) = (Some(scope_to_proto(&scope)), server_ca(&self.context.security));
        Ok(Response::new(JoinResponse { registrant: user, certificate: certificate.to_vec(), scope, server_ca }))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let (peer, registrants) = (peer(&request)?, registrants(&self.context.security)?);
        let RenewRequest { certificate, certificate_request } = request.into_inner();
        let renewed = registrants.renew(&certificate, &certificate_request, wall_clock()).await;
        let Joined { user, certificate, scope: _ } = self.tell(peer, renewed, JoinResult::Renewed)?;
        info!(peer = %peer, registrant = user, "renewed the certificate");
        let server_ca = server_ca(&self.context.security);
        Ok(Response::new(RenewResponse { certificate: certificate.to_vec(), server_ca }))
    }
}
