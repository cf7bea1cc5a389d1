//! The readers' service: lists and watches of the registered services.
//!
//! The service reads immutable values and a ring of changes, so it cannot delay the writer.

mod cursor;
mod selection;
mod watch;

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt as _, stream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use self::{
    cursor::Cursor,
    selection::{Filter, Messages},
    watch::FeedWatch,
};
use super::{
    ServerContext,
    caller::Caller,
    convert::{self, MAX_INSTANCES_PER_MESSAGE},
    proto::gangplank::v1::{
        GetNamesRequest, GetNamesResponse, GetReplicaRequest, GetReplicaResponse, GetServiceRequest,
        GetServiceResponse, GetServicesByMethodRequest, GetServicesByMethodResponse, ListServicesRequest,
        ListServicesResponse, WatchRequest, WatchResponse, discovery_server::Discovery, restart::Reason,
    },
    writer_hint,
};
use crate::{
    identity::AccessVerb,
    model::{Field, InvalidInstance, Namespace, Service, ServiceKey},
    registry::{ListError, ListPermit, Phase, Unavailable},
};

type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// `gangplank.v1.Discovery`.
#[derive(Debug)]
pub(super) struct DiscoveryService {
    context: ServerContext,
    stop: CancellationToken,
}

impl DiscoveryService {
    pub(super) fn new(context: ServerContext, stop: CancellationToken) -> Self {
        Self { context, stop }
    }

    /// Fails until the recovery is complete: before, a stored service would be reported as missing.
    fn ready(&self) -> Result<(), Status> {
        let status = self.context.registry.status();
        match status.phase() {
            Phase::Recovering | Phase::Restoring => Err(Status::unavailable(Unavailable::NotReady.to_string())),
            // Readers are served on standby: they are why there are several processes.
            Phase::Standby(_) if status.is_readable() => Ok(()),
            Phase::Standby(holder) => {
                let err = Unavailable::Standby(Arc::clone(&holder));
                Err(writer_hint::with(Status::unavailable(err.to_string()), &holder))
            }
            Phase::Ready | Phase::StorageFailed(_) | Phase::Draining => Ok(()),
        }
    }

    fn service(&self, namespace: &str, name: &str) -> Result<ServiceKey, Status> {
        self.context.validator.service(namespace, name).map_err(|InvalidInstance { field, reason }| {
            // The field is `name` in these requests, and `service_name` in registrations.
            let field = if field == Field::ServiceName { "name".into() } else { field.to_string() };
            Status::invalid_argument(format!("{field}: {reason}"))
        })
    }

    /// A permit for one message about all instances of a service, which may be as large as a list.
    async fn permit_for(&self, service: &Service) -> Result<Option<Arc<ListPermit>>, Status> {
        Ok(match service.instances.len() {
            ..=MAX_INSTANCES_PER_MESSAGE => None,
            _ => Some(Arc::new(self.context.registry.snapshots().permit().await.map_err(list_error)?)),
        })
    }

    fn filter(&self, namespace: String, service: &str) -> Result<Filter, Status> {
        match (namespace.as_str(), service) {
            ("", "") => Ok(Filter::All),
            ("", _) => Err(Status::invalid_argument("namespace: must be given with a service")),
            (namespace, "") => Namespace::parse(namespace)
                .map(|namespace| Filter::Namespace(namespace.as_str().into()))
                .map_err(|err| Status::invalid_argument(format!("namespace: {err}"))),
            (namespace, service) => self.service(namespace, service).map(Filter::Service),
        }
    }
}

/// A response that holds its permit until the client has read it: `TrackedRoutes` takes it out.
fn with_permit<T>(message: T, permit: Option<Arc<ListPermit>>) -> Response<T> {
    let mut response = Response::new(message);
    permit.map(|permit| response.extensions_mut().insert(permit));
    response
}

/// The status of a list that cannot be sent now. The client may retry.
fn list_error(err: ListError) -> Status {
    match err {
        ListError::Overloaded => Status::resource_exhausted(err.to_string()),
        ListError::Lagged(_) => Status::aborted(err.to_string()),
        ListError::Failed(_) => Status::internal(err.to_string()),
    }
}

#[tonic::async_trait]
impl Discovery for DiscoveryService {
    async fn get_service(&self, request: Request<GetServiceRequest>) -> Result<Response<GetServiceResponse>, Status> {
        self.ready()?;
        let caller = Caller::of(&request)?;
        let GetServiceRequest { namespace, name } = request.into_inner();
        let key = self.service(&namespace, &name)?;
        caller.may_call(AccessVerb::Get, Some(key.namespace()), Some(key.name())).await?;
        let catalog = self.context.registry.catalog();
        // Read before the service: everything up to it is in the service. A change in between shows its own generation,
        // which is taken below.
        let generation = catalog.generation();
        let service =
            catalog.get(&key).ok_or_else(|| Status::not_found(format!("nothing is registered under {key}")))?;
        let generation = generation.max(service.generation);
        let permit = self.permit_for(&service).await?;
        let service = Some(convert::service_to_proto(&key, &service));
        Ok(with_permit(GetServiceResponse { service, generation }, permit))
    }

    async fn get_names(&self, request: Request<GetNamesRequest>) -> Result<Response<GetNamesResponse>, Status> {
        self.ready()?;
        let caller = Caller::of(&request)?;
        let GetNamesRequest { namespace, name } = request.into_inner();
        let key = self.service(&namespace, &name)?;
        caller.may_call(AccessVerb::Get, Some(key.namespace()), Some(key.name())).await?;
        let registry = &self.context.registry;
        let Some(service) = registry.catalog().get(&key) else {
            return Ok(Response::new(GetNamesResponse::default()));
        };
        let permit = self.permit_for(&service).await?;
        let statuses = registry.names().statuses_of(&service).into_iter();
        let names = statuses.map(|(name, status)| convert::name_to_proto(&name, &status)).collect();
        Ok(with_permit(GetNamesResponse { names }, permit))
    }

    async fn get_services_by_method(
        &self,
        request: Request<GetServicesByMethodRequest>,
    ) -> Result<Response<GetServicesByMethodResponse>, Status> {
        Caller::of(&request)?.may_call(AccessVerb::List, None, None).await?;
        Err(Status::unimplemented("registrations carry no methods yet, so there is nothing to find by them"))
    }

    async fn get_replica(&self, _request: Request<GetReplicaRequest>) -> Result<Response<GetReplicaResponse>, Status> {
        let replica = self.context.registry.status().describe(&self.context.metrics);
        Ok(Response::new(convert::replica_to_proto(&replica)))
    }

    type ListServicesStream = ResponseStream<ListServicesResponse>;

    async fn list_services(
        &self,
        request: Request<ListServicesRequest>,
    ) -> Result<Response<Self::ListServicesStream>, Status> {
        self.ready()?;
        let caller = Caller::of(&request)?;
        let filter = self.filter(request.into_inner().namespace, "")?;
        let (namespace, service) = filter.scope();
        caller.may_call(AccessVerb::List, namespace, service).await?;
        let list = self.context.registry.snapshots().list().await.map_err(list_error)?;
        let generation = list.generation();
        let messages = Messages::new(list, &filter);
        let messages = messages.map(move |part| Ok(ListServicesResponse { service: Some(part), generation }));
        Ok(Response::new(stream::iter(messages).boxed()))
    }

    type WatchStream = ResponseStream<WatchResponse>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.ready()?;
        let caller = Caller::of(&request)?;
        let WatchRequest { namespace, service, cursor } = request.into_inner();
        let filter = self.filter(namespace, &service)?;
        let (scope, named) = filter.scope();
        caller.may_call(AccessVerb::Watch, scope, named).await?;
        let registry = &self.context.registry;
        let watch = if cursor.is_empty() {
            FeedWatch::from_snapshot(&self.context, filter, self.stop.clone()).await?
        } else {
            match Cursor::decode(&cursor, registry.feed().epoch(), registry.catalog().generation()) {
                Some(cursor) => FeedWatch::resume(&self.context, filter, cursor, self.stop.clone()),
                None => FeedWatch::ended(
                    &self.context,
                    Reason::UnknownCursor,
                    "the cursor is not of this run of the server; watch again without one",
                ),
            }
        };
        Ok(Response::new(watch.into_stream().boxed()))
    }
}
