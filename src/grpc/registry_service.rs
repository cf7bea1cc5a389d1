//! The registrants' service: one instance per call, or a stream of them.

mod conversation;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use conversation::Conversation;

use super::{
    Services, convert,
    proto::registry::{
        RegistrationMsg, RegistrationResponse, RegistrationResult, RegistrationType, ServiceInfo,
        service_registry_server::ServiceRegistry,
    },
};
use crate::{
    metrics::{Metrics, RegistrationKind},
    model::UnixMillis,
    registry::{Ack, Unavailable},
};

/// `registry.ServiceRegistry`.
#[derive(Debug)]
pub(super) struct RegistryService {
    services: Services,
    stop: CancellationToken,
}

impl RegistryService {
    pub(super) fn new(services: Services, stop: CancellationToken) -> Self {
        Self { services, stop }
    }

    /// Carries out one message. A call that is dropped meanwhile tears nothing: once handed in,
    /// the registry carries it out.
    async fn carry_out(&self, message: RegistrationMsg) -> RegistrationResult {
        let (echo, command) = convert::parse(message, &self.services.door, UnixMillis::now());
        let response = match command {
            Err(refusal) => echo.refused(refusal),
            Ok(command) => match self.submit_one(command).await {
                Ok(Ack { generation, outcomes }) => match outcomes.first() {
                    Some(outcome) => echo.carried_out(*outcome, generation),
                    None => echo.unavailable(Unavailable::ShuttingDown),
                },
                Err(why) => echo.unavailable(why),
            },
        };
        count(&self.services.metrics, &response);
        convert::result(response)
    }

    async fn submit_one(&self, command: crate::registry::Command) -> Result<Ack, Unavailable> {
        self.services.registry.submit(vec![command]).await?.await
    }
}

#[tonic::async_trait]
impl ServiceRegistry for RegistryService {
    async fn register(&self, request: Request<ServiceInfo>) -> Result<Response<RegistrationResult>, Status> {
        let message = convert::message(RegistrationType::Register, request.into_inner());
        Ok(Response::new(self.carry_out(message).await))
    }

    async fn un_register(&self, request: Request<ServiceInfo>) -> Result<Response<RegistrationResult>, Status> {
        let message = convert::message(RegistrationType::Unregister, request.into_inner());
        Ok(Response::new(self.carry_out(message).await))
    }

    type RegistrationEventStream = Conversation<Streaming<RegistrationMsg>>;

    async fn registration_event(
        &self,
        request: Request<Streaming<RegistrationMsg>>,
    ) -> Result<Response<Self::RegistrationEventStream>, Status> {
        let stop = self.stop.clone().cancelled_owned();
        Ok(Response::new(Conversation::new(request.into_inner(), self.services.clone(), stop)))
    }
}

/// Counts an answer that is given.
fn count(metrics: &Arc<Metrics>, response: &RegistrationResponse) {
    let kind = match RegistrationType::try_from(response.r#type) {
        Ok(RegistrationType::Register) => RegistrationKind::Register,
        Ok(RegistrationType::Unregister) => RegistrationKind::Unregister,
        Ok(RegistrationType::Heartbeat | RegistrationType::Drain) | Err(_) => RegistrationKind::Other,
    };
    metrics.grpc.registration(kind, response.status);
}
