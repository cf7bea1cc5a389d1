//! The operator's calls: tokens, and the machines that joined with them.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use prost_types::Timestamp;
use tonic::{Code, Request, Response, Status};
use tracing::info;

use super::{registrants, scope_from_proto, scope_to_proto, status};
use crate::{
    grpc::{
        ServerContext,
        caller::Caller,
        proto::gangplank::join::v1::{
            CreateTokenRequest, CreateTokenResponse, ListRegistrantsRequest, ListRegistrantsResponse,
            ListTokensRequest, ListTokensResponse, Registrant as WireRegistrant, RevokeRegistrantRequest,
            RevokeRegistrantResponse, RevokeTokenRequest, RevokeTokenResponse, Token as WireToken,
            registrants_server::Registrants,
        },
    },
    identity::{
        AccessResource, AccessVerb, PublicKeyHash,
        joining::{JoinedRegistrant, RegistrantStore, Scope, Token, TokenId},
    },
    model::{Namespace, ServerAddress, wall_clock},
};

/// How long a token is good, unless its creator says otherwise.
const DEFAULT_TTL_SECONDS: u64 = 3600;

/// `gangplank.join.v1.Registrants`.
#[derive(Debug)]
pub(in crate::grpc) struct RegistrantsService {
    context: ServerContext,
}

impl RegistrantsService {
    pub(in crate::grpc) const fn new(context: ServerContext) -> Self {
        Self { context }
    }

    fn table(&self) -> Result<Arc<RegistrantStore>, Status> {
        registrants(&self.context.security)
    }

    /// By what machines know this server. `None` while it has no certificate.
    ///
    /// # Errors
    /// When no machine would, because the certificate is for other names.
    fn server_hash(&self, own: &[ServerAddress], others: &[ServerAddress]) -> Result<Option<PublicKeyHash>, Status> {
        let Some((tls, ca)) = self.context.security.tls.as_ref().and_then(|tls| Some((tls, tls.server_ca()?))) else {
            return Ok(None);
        };
        let is_for = |address: &ServerAddress| tls.is_for(&address.host());
        if own.is_empty() || own.iter().chain(others).any(is_for) {
            return Ok(Some(ca.hash));
        }
        Err(Status::failed_precondition(format!(
            "machines would refuse this server: its certificate is not for {}. Start it with --advertise NAME, a name in the \
             certificate",
            ServerAddress::choice(own)
        )))
    }

    /// What is to be deleted, if the caller may delete it. Only who may delete all learns that it is not there, and nobody else
    /// whose it is.
    async fn deletable<T: Send + Sync>(
        caller: &Caller,
        resource: AccessResource,
        found: Option<T>,
        scope: impl Fn(&T) -> &Scope + Send,
        missing: &str,
    ) -> Result<T, Status> {
        let within = found.as_ref().map(scope);
        let (namespace, service) = (within.and_then(Scope::namespace), within.and_then(Scope::service));
        let allowed = caller.may_administer(resource, AccessVerb::Delete, namespace, service).await;
        allowed.map_err(|status| match status.code() {
            Code::PermissionDenied => {
                let err =
                    format!("{} may not delete {} of that name, if there is one", caller.identity(), resource.as_str());
                Status::permission_denied(err)
            }
            _ => status,
        })?;
        found.ok_or_else(|| Status::not_found(missing))
    }
}

/// The namespace of a list; `None` for all.
fn listed(namespace: &str) -> Result<Option<&str>, Status> {
    if namespace.is_empty() {
        return Ok(None);
    }
    Namespace::parse(namespace).map_err(|err| Status::invalid_argument(format!("namespace: {err}")))?;
    Ok(Some(namespace))
}

fn timestamp(time: SystemTime) -> Timestamp {
    time.into()
}

fn token_to_proto(id: TokenId, token: &Token) -> WireToken {
    WireToken {
        id: id.to_string(),
        scope: Some(scope_to_proto(&token.scope)),
        created_by: token.created_by.clone(),
        created: Some(timestamp(token.created)),
        expires: Some(timestamp(token.expires)),
        uses: token.uses,
        used: token.used,
    }
}

fn registrant_to_proto(name: String, registrant: &JoinedRegistrant) -> WireRegistrant {
    WireRegistrant {
        name,
        scope: Some(scope_to_proto(&registrant.scope)),
        host: registrant.host.clone(),
        token_id: registrant.token.to_string(),
        joined: Some(timestamp(registrant.joined)),
        expires: Some(timestamp(registrant.expires)),
        revoked: registrant.revoked.map(timestamp),
    }
}

#[tonic::async_trait]
impl Registrants for RegistrantsService {
    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Result<Response<CreateTokenResponse>, Status> {
        let caller = Caller::of(&request)?;
        let CreateTokenRequest { scope, ttl_seconds, uses } = request.into_inner();
        let scope = scope_from_proto(scope.unwrap_or_default())?;
        let (namespace, service) = (scope.namespace(), scope.service());
        caller.may_administer(AccessResource::Tokens, AccessVerb::Create, namespace, service).await?;
        // Nobody gives more than they have.
        for verb in scope.verbs() {
            caller.may_administer(AccessResource::Instances, *verb, namespace, service).await?;
        }
        let table = self.table()?;
        let ttl = Duration::from_secs(if ttl_seconds == 0 { DEFAULT_TTL_SECONDS } else { ttl_seconds });
        let creator = caller.identity().to_string();
        // A machine that joins by this process looks for the one that writes when this one is gone.
        let writer = self.context.registry.status().watch_holder().borrow().clone();
        let others = writer.as_ref().map_or(&[][..], |writer| &writer.addresses);
        let server = self.server_hash(table.addresses(), others)?;
        let created = table.create_token(scope, &creator, (ttl, uses.max(1)), server, others, wall_clock()).await;
        let (token, description) = created.map_err(status)?;
        info!(user = %caller.identity(), token = %token.id, scope = %description.scope, uses = description.uses, "created a join token");
        let description = token_to_proto(token.id, &description);
        Ok(Response::new(CreateTokenResponse { token: token.to_string(), description: Some(description) }))
    }

    async fn list_tokens(&self, request: Request<ListTokensRequest>) -> Result<Response<ListTokensResponse>, Status> {
        let caller = Caller::of(&request)?;
        let ListTokensRequest { namespace } = request.into_inner();
        let namespace = listed(&namespace)?;
        caller.may_administer(AccessResource::Tokens, AccessVerb::List, namespace, None).await?;
        let tokens = self.table()?.tokens().map_err(status)?;
        let tokens =
            tokens.iter().filter(|(_, token)| namespace.is_none_or(|one| token.scope.namespace() == Some(one)));
        Ok(Response::new(ListTokensResponse { tokens: tokens.map(|(id, token)| token_to_proto(*id, token)).collect() }))
    }

    async fn revoke_token(
        &self,
        request: Request<RevokeTokenRequest>,
    ) -> Result<Response<RevokeTokenResponse>, Status> {
        let caller = Caller::of(&request)?;
        let RevokeTokenRequest { id } = request.into_inner();
        let tokens = self.table().map_or_else(|_| Ok(Vec::new()), |table| table.tokens()).map_err(status)?;
        let found = tokens.into_iter().find(|(known, _)| known.to_string() == id);
        let (id, _) = Self::deletable(
            &caller,
            AccessResource::Tokens,
            found,
            |(_, token)| &token.scope,
            "id: there is no such token",
        )
        .await?;
        let table = self.table()?;
        table.revoke_token(id, wall_clock()).await.map_err(status)?;
        info!(user = %caller.identity(), token = %id, "revoked a join token");
        Ok(Response::new(RevokeTokenResponse {}))
    }

    async fn list_registrants(
        &self,
        request: Request<ListRegistrantsRequest>,
    ) -> Result<Response<ListRegistrantsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let ListRegistrantsRequest { namespace } = request.into_inner();
        let namespace = listed(&namespace)?;
        caller.may_administer(AccessResource::Registrants, AccessVerb::List, namespace, None).await?;
        let all = self.table()?.registrants().map_err(status)?.into_iter();
        let listed = all.filter(|(_, one)| namespace.is_none_or(|namespace| one.scope.namespace() == Some(namespace)));
        let registrants = listed.map(|(name, one)| registrant_to_proto(name, &one)).collect();
        Ok(Response::new(ListRegistrantsResponse { registrants }))
    }

    async fn revoke_registrant(
        &self,
        request: Request<RevokeRegistrantRequest>,
    ) -> Result<Response<RevokeRegistrantResponse>, Status> {
        let caller = Caller::of(&request)?;
        let RevokeRegistrantRequest { name } = request.into_inner();
        let all = self.table().map_or_else(|_| Ok(Vec::new()), |table| table.registrants()).map_err(status)?;
        let found = all.into_iter().find(|(known, _)| *known == name);
        let missing = "name: there is no such registrant";
        let (_, revoked) =
            Self::deletable(&caller, AccessResource::Registrants, found, |(_, one)| &one.scope, missing).await?;
        let (table, now) = (self.table()?, wall_clock());
        table.revoke(&name, now).await.map_err(status)?;
        // Whoever has the token can join again, under another name.
        let token_id = if table.is_usable(revoked.token, now) { revoked.token.to_string() } else { String::new() };
        info!(user = %caller.identity(), registrant = name, usable_token = token_id, "revoked a registrant");
        Ok(Response::new(RevokeRegistrantResponse { token_id }))
    }
}
