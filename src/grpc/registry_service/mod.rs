//! The registrants' service: one instance per call, or a stream of them.

mod mirror_wait;
mod stream;

use std::{future::Future, net::IpAddr, pin::Pin, sync::Arc};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

pub(super) use stream::RegistrationStream;

use mirror_wait::MirrorWait;

use super::{
    ServerContext,
    caller::Caller,
    convert::{self, Refusal},
    memory::ConnectionMemory,
    proto::registry::{
        RegistrationMsg, RegistrationResponse, RegistrationResult, RegistrationType, ServiceInfo,
        service_registry_server::ServiceRegistry,
    },
    writer_hint,
};
use crate::{
    identity::{AccessVerb, NotAllowed},
    metrics::{Metrics, RefusalReason, RegistrationKind, RegistrationStatus},
    model::UnixMillis,
    registry::{Ack, Command, Outcome, Phase, RegistryHandle, Unavailable},
};

/// `registry.ServiceRegistry`.
#[derive(Debug)]
pub(super) struct RegistryService {
    context: ServerContext,
    stop: CancellationToken,
}

impl RegistryService {
    pub(super) fn new(context: ServerContext, stop: CancellationToken) -> Self {
        Self { context, stop }
    }

    /// Carries out one message. If the call is cancelled meanwhile, the registry still carries out a
    /// submitted command as a whole.
    async fn carry_out(&self, caller: &Caller, message: RegistrationMsg) -> Response<RegistrationResult> {
        // Asked again after each wait: other calls of the identity use the same allowance.
        while let Some(wait) = caller.message_wait() {
            sleep(wait).await;
        }
        caller.count_message();
        let (response, command) =
            convert::parse(message, &self.context.validator, UnixMillis::now(), caller.requester());
        let mut unavailable = None;
        let authorized = match command.map_err(Refusal::from) {
            Ok(command) => authorize(caller, command, &self.context.registry).decided().await,
            Err(refusal) => Err(refusal),
        };
        let response = match authorized {
            Err(refusal) => response.refused(refusal),
            Ok(command) => match self.submit_one(command).await {
                Ok((outcome, generation, mirrored)) => response.completed(outcome, generation, mirrored),
                Err(err) => {
                    let response = response.unavailable(&err);
                    unavailable = Some(err);
                    response
                }
            },
        };
        count(&self.context.metrics, &response, unavailable.as_ref());
        let mut response = Response::new(convert::result(response));
        if let Some(Unavailable::Standby(holder)) = unavailable {
            writer_hint::add(response.metadata_mut(), &holder);
        }
        response
    }

    /// Returns the outcome, its generation, and whether Kubernetes has the change.
    async fn submit_one(&self, command: Command) -> Result<(Outcome, u64, bool), Unavailable> {
        let registry = &self.context.registry;
        let mirror_wait = MirrorWait::of(&command, registry);
        let Ack { generation, outcomes } = registry.submit(vec![command]).await?.await?;
        // One outcome per command; without one the command must not be reported as done.
        let outcome = outcomes.into_iter().next().ok_or(Unavailable::ShuttingDown)?;
        let mirrored = mirror_wait.wait(registry, &outcome, generation).await;
        Ok((outcome, generation, mirrored))
    }
}

#[tonic::async_trait]
impl ServiceRegistry for RegistryService {
    async fn register(&self, request: Request<ServiceInfo>) -> Result<Response<RegistrationResult>, Status> {
        let caller = Caller::of(&request)?;
        let message = convert::message(RegistrationType::Register, request.into_inner());
        Ok(self.carry_out(&caller, message).await)
    }

    async fn un_register(&self, request: Request<ServiceInfo>) -> Result<Response<RegistrationResult>, Status> {
        let caller = Caller::of(&request)?;
        let message = convert::message(RegistrationType::Unregister, request.into_inner());
        Ok(self.carry_out(&caller, message).await)
    }

    type RegistrationEventStream = RegistrationStream<Streaming<RegistrationMsg>>;

    async fn registration_event(
        &self,
        request: Request<Streaming<RegistrationMsg>>,
    ) -> Result<Response<Self::RegistrationEventStream>, Status> {
        let caller = Caller::of(&request)?;
        let stop = self.stop.clone().cancelled_owned();
        let memory = request.extensions().get::<Arc<ConnectionMemory>>().map(Arc::clone);
        let memory = memory.ok_or_else(|| Status::internal("the connection has no account of its memory"))?;
        let mut responses =
            Response::new(RegistrationStream::new(request.into_inner(), caller, self.context.clone(), stop, memory));
        if let Phase::Standby(holder) = self.context.registry.status().phase() {
            writer_hint::add(responses.metadata_mut(), &holder);
        }
        Ok(responses)
    }
}

/// Whether a command may be given.
enum Authorized {
    /// The command, or why not.
    Known(Result<Command, Refusal>),
    /// Kubernetes has to be asked.
    Asking(Pin<Box<dyn Future<Output = Result<Command, Refusal>> + Send>>),
}

impl Authorized {
    async fn decided(self) -> Result<Command, Refusal> {
        match self {
            Self::Known(known) => known,
            Self::Asking(asking) => asking.await,
        }
    }
}

/// Decides whether `caller` may give `command`.
fn authorize(caller: &Caller, command: Command, registry: &RegistryHandle) -> Authorized {
    let (verb, address) = needed(&command);
    let service = command.service();
    // Decided without a future where possible: on a stream this runs for each message.
    match caller.known(verb, Some(service.namespace()), Some(service.name()), address) {
        Some(Ok(())) => {}
        Some(Err(err)) => return Authorized::Known(Err(err.into())),
        None => return ask(caller, command, registry),
    }
    if !registry.changes_others_instance(&command) {
        return Authorized::Known(Ok(command));
    }
    match caller.known(AccessVerb::Override, Some(service.namespace()), Some(service.name()), None) {
        Some(overrides) => Authorized::Known(with_overrides(command, overrides)),
        None => Authorized::Asking(Box::pin(overriding(caller.clone(), command))),
    }
}

/// The same, where Kubernetes has to be asked.
fn ask(caller: &Caller, command: Command, registry: &RegistryHandle) -> Authorized {
    let (caller, registry) = (caller.clone(), registry.clone());
    Authorized::Asking(Box::pin(async move {
        let (verb, address) = needed(&command);
        let service = command.service();
        caller.may(verb, Some(service.namespace()), Some(service.name()), address).await?;
        if !registry.changes_others_instance(&command) {
            return Ok(command);
        }
        overriding(caller, command).await
    }))
}

/// The command, with the right to override if the caller has it.
async fn overriding(caller: Caller, command: Command) -> Result<Command, Refusal> {
    let service = command.service();
    let overrides = caller.may(AccessVerb::Override, Some(service.namespace()), Some(service.name()), None).await;
    with_overrides(command, overrides)
}

/// The right that every command of its kind needs, and for which address.
fn needed(command: &Command) -> (AccessVerb, Option<IpAddr>) {
    match command {
        Command::Register { instance, .. } => (AccessVerb::Create, instance.address().ip()),
        Command::Unregister { .. } | Command::SetReady { .. } => (AccessVerb::Delete, None),
    }
}

/// Most callers only change their own, so the right to override is asked for where it would be needed now. The writer
/// decides: if another identity registers the instance meanwhile, the answer is 409 once, and the right one when the caller
/// asks again.
fn with_overrides(mut command: Command, overrides: Result<(), NotAllowed>) -> Result<Command, Refusal> {
    match overrides {
        Ok(()) => command.set_overrides(true),
        Err(NotAllowed::Denied(_)) => command.set_overrides(false),
        Err(err @ NotAllowed::Undecided(_)) => return Err(err.into()),
    }
    Ok(command)
}

/// Counts a response; `unavailable` is the reason if the registry did not accept the message.
fn count(metrics: &Metrics, response: &RegistrationResponse, unavailable: Option<&Unavailable>) {
    let status = convert::response_status(response);
    let refused = match unavailable {
        Some(Unavailable::NotReady) => Some(RefusalReason::NotReady),
        Some(Unavailable::Standby(_)) => Some(RefusalReason::Standby),
        Some(Unavailable::ShuttingDown) => Some(RefusalReason::ShuttingDown),
        Some(Unavailable::StorageFailed) => Some(RefusalReason::StorageFailed),
        None => (status == Some(RegistrationStatus::Invalid)).then_some(RefusalReason::Invalid),
    };
    if let Some(reason) = refused {
        metrics.registry.refused(reason);
    }
    let kind = match RegistrationType::try_from(response.r#type) {
        Ok(RegistrationType::Register) => RegistrationKind::Register,
        Ok(RegistrationType::Unregister) => RegistrationKind::Unregister,
        Ok(RegistrationType::Heartbeat | RegistrationType::Drain) | Err(_) => RegistrationKind::Other,
    };
    if let Some(status) = status {
        metrics.grpc.registration(kind, status);
    }
}
