//! The registrants' service: one instance per call, or a stream of them.

mod confirmation;
mod conversation;

use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

pub(super) use conversation::Conversation;

use confirmation::Confirmation;

use super::{
    Services, convert,
    proto::registry::{
        RegistrationMsg, RegistrationResponse, RegistrationResult, RegistrationType, ServiceInfo,
        service_registry_server::ServiceRegistry,
    },
};
use crate::{
    metrics::{Metrics, RefusalReason, RegistrationKind},
    model::UnixMillis,
    registry::{Ack, Command, Outcome, Unavailable},
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
        let (echo, command) = convert::parse(message, &self.services.validator, UnixMillis::now());
        let mut unavailable = None;
        let response = match command {
            Err(refusal) => echo.refused(refusal),
            Ok(command) => match self.submit_one(command).await {
                Ok((outcome, generation, mirrored)) => echo.carried_out(outcome, generation, mirrored),
                Err(err) => {
                    unavailable = Some(err);
                    echo.unavailable(err)
                }
            },
        };
        count(&self.services.metrics, &response, unavailable);
        convert::result(response)
    }

    /// What became of it, in which generation, and whether Kubernetes has it.
    async fn submit_one(&self, command: Command) -> Result<(Outcome, u64, bool), Unavailable> {
        let registry = &self.services.registry;
        let confirmation = Confirmation::of(&command, registry);
        let Ack { generation, outcomes } = registry.submit(vec![command]).await?.await?;
        // One outcome per command; a missing one cannot be called done.
        let outcome = outcomes.first().copied().ok_or(Unavailable::ShuttingDown)?;
        let mirrored = confirmation.wait(registry, outcome, generation).await;
        Ok((outcome, generation, mirrored))
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

/// Counts an answer that is given; `unavailable` is why the registry did not take it, if so.
fn count(metrics: &Metrics, response: &RegistrationResponse, unavailable: Option<Unavailable>) {
    let refused = match unavailable {
        Some(Unavailable::NotReady) => Some(RefusalReason::NotReady),
        Some(Unavailable::ShuttingDown) => Some(RefusalReason::ShuttingDown),
        Some(Unavailable::StorageFailed) => Some(RefusalReason::StorageFailed),
        None => (response.status == convert::AnswerStatus::Invalid.code()).then_some(RefusalReason::Invalid),
    };
    if let Some(reason) = refused {
        metrics.registry.refused(reason);
    }
    let kind = match RegistrationType::try_from(response.r#type) {
        Ok(RegistrationType::Register) => RegistrationKind::Register,
        Ok(RegistrationType::Unregister) => RegistrationKind::Unregister,
        Ok(RegistrationType::Heartbeat | RegistrationType::Drain) | Err(_) => RegistrationKind::Other,
    };
    metrics.grpc.registration(kind, response.status);
}
