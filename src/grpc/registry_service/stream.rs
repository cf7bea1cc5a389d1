//! One registration stream: messages in, exactly one response each, in order.
//!
//! A stream has no task of its own. The transport polls for the next response, and only while the client
//! reads responses. Each poll first reads and submits the messages that have arrived, then returns the
//! next response. So the server does not read from a client that does not read its responses, and the
//! memory of a stream is bounded: [`MAX_IN_FLIGHT`] batches and [`MAX_STREAM_BYTES`] of messages. While
//! the memory of the connection is spent, a stream reads one message at a time.
//!
//! Responses keep the order of the messages, because batches are a queue, the messages of a batch are a
//! list, invalid messages keep their place in that list, and batches are submitted in order.
//!
//! When a client disconnects, its stream is dropped: the writer carries out submitted batches, and a batch
//! that still waits for the writer's queue is discarded as a whole.

use std::{
    collections::VecDeque,
    future::Future,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    vec,
};

use futures::{
    Stream,
    future::{self, Either},
};
use tokio::time::{Sleep, sleep};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::Status;

use super::{Authorized, MirrorWait, authorize, count};
use crate::{
    grpc::{
        ServerContext,
        caller::Caller,
        convert::{self, Refusal, ResponseBuilder},
        memory::ConnectionMemory,
        proto::registry::{RegistrationMsg, RegistrationResponse},
        writer_hint,
    },
    model::UnixMillis,
    registry::{Ack, Command, MAX_COMMANDS, Outcome, RegistryHandle, StoodDown, Unavailable},
};

/// Unanswered batches of one stream; with more, the stream is not read.
const MAX_IN_FLIGHT: usize = 4;

/// Bytes of memory of the unanswered messages of one stream. The check comes before a message is read, so
/// one more message (at most 64 KiB on the wire) may exceed the limit.
const MAX_STREAM_BYTES: usize = 1024 * 1024;

type AckFuture = Pin<Box<dyn Future<Output = Result<Ack, Unavailable>> + Send>>;
type AuthorizeFuture = Pin<Box<dyn Future<Output = Vec<Result<Command, Refusal>>> + Send>>;
type SubmitFuture = Pin<Box<dyn Future<Output = Result<AckFuture, Unavailable>> + Send>>;

/// The response to a message that was read, with its wait for Kubernetes, or with the reason why the
/// message was not submitted.
type PendingResponse = (ResponseBuilder, Result<MirrorWait, Refusal>);

/// A message that was read, and its bytes.
struct ReadMessage {
    response: ResponseBuilder,
    authorized: Authorized,
    bytes: usize,
}

/// Messages that are being read as one batch. Those about which Kubernetes has to be asked are in a batch of their own,
/// with those that follow them.
#[derive(Default)]
struct ReadBatch {
    responses: Vec<PendingResponse>,
    commands: Vec<Command>,
    asking: Vec<(ResponseBuilder, Authorized)>,
    bytes: usize,
}

impl ReadBatch {
    fn len(&self) -> usize {
        self.responses.len() + self.asking.len()
    }

    /// Adds a message, or returns it if it begins the next batch.
    fn push(&mut self, message: ReadMessage, registry: &RegistryHandle) -> Option<ReadMessage> {
        let ReadMessage { response, authorized, bytes } = message;
        match authorized {
            Authorized::Known(known) if self.asking.is_empty() => {
                self.responses.push(pending_response(response, known, registry, &mut self.commands));
            }
            Authorized::Asking(_) if !self.responses.is_empty() => {
                return Some(ReadMessage { response, authorized, bytes });
            }
            _ => self.asking.push((response, authorized)),
        }
        self.bytes += bytes;
        None
    }
}

/// The response to a message; adds its command to `commands`.
fn pending_response(
    response: ResponseBuilder,
    authorized: Result<Command, Refusal>,
    registry: &RegistryHandle,
    commands: &mut Vec<Command>,
) -> PendingResponse {
    let pending = authorized.map(|command| {
        let mirror_wait = MirrorWait::of(&command, registry);
        commands.push(command);
        mirror_wait
    });
    (response, pending)
}

/// Messages that were read together and are one submission to the registry.
struct InFlightBatch {
    responses: Vec<PendingResponse>,
    bytes: usize,
    stage: Stage,
}

enum Stage {
    /// Kubernetes is asked whether some of its messages are allowed.
    Authorizing(Vec<ResponseBuilder>, AuthorizeFuture),
    /// Waits for room in the registry's queue.
    Submitting(SubmitFuture),
    /// In the registry's queue, or being carried out.
    Submitted(AckFuture),
    /// The registry has answered.
    Completed(Result<Ack, Unavailable>),
}

/// The oldest batch, whose responses are being returned.
#[derive(Default)]
struct CompletedBatch {
    responses: vec::IntoIter<PendingResponse>,
    outcomes: vec::IntoIter<Outcome>,
    generation: u64,
    unavailable: Option<Unavailable>,
    /// The next response, when it waits for Kubernetes.
    awaiting_mirror: Option<AwaitingMirror>,
    bytes: usize,
}

/// A response whose status depends on whether Kubernetes has the change.
struct AwaitingMirror {
    response: ResponseBuilder,
    outcome: Outcome,
    mirrored: Pin<Box<dyn Future<Output = bool> + Send>>,
}

impl CompletedBatch {
    /// The outcome of the next command.
    fn next_outcome(&mut self) -> Result<Outcome, Unavailable> {
        match &self.unavailable {
            Some(err) => Err(err.clone()),
            // One outcome per command; without one the command must not be reported as done.
            None => self.outcomes.next().ok_or(Unavailable::ShuttingDown),
        }
    }
}

/// Whether more messages are read.
#[derive(Debug)]
enum InboundState {
    Open,
    /// The client closed its side.
    Ended,
    /// No more messages are read; the stream ends with this status after the last response.
    Failed(Status),
}

/// The responses to a stream of messages, as a stream.
pub(in crate::grpc) struct RegistrationStream<S> {
    inbound: S,
    caller: Caller,
    context: ServerContext,
    stop: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Until the identity may send another message.
    message_wait: Option<Pin<Box<Sleep>>>,
    /// Completes when this process has stopped writing to Kubernetes.
    deposed: Pin<Box<dyn Future<Output = StoodDown> + Send>>,
    inbound_state: InboundState,
    in_flight: VecDeque<InFlightBatch>,
    /// A message that was read, and about which Kubernetes has to be asked: the first of the next batch, so that those
    /// before it do not wait.
    next: Option<ReadMessage>,
    completed: CompletedBatch,
    /// Bytes of all batches, including the completed one. Charged to `memory`.
    bytes: usize,
    memory: Arc<ConnectionMemory>,
}

impl<S> Drop for RegistrationStream<S> {
    fn drop(&mut self) {
        self.memory.release_unanswered(self.bytes);
    }
}

impl<S> std::fmt::Debug for RegistrationStream<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistrationStream")
            .field("inbound_state", &self.inbound_state)
            .field("in_flight", &self.in_flight.len())
            .finish_non_exhaustive()
    }
}

impl<S> RegistrationStream<S>
where
    S: Stream<Item = Result<RegistrationMsg, Status>> + Unpin,
{
    pub(in crate::grpc) fn new(
        inbound: S,
        caller: Caller,
        context: ServerContext,
        stop: WaitForCancellationFutureOwned,
        memory: Arc<ConnectionMemory>,
    ) -> Self {
        Self {
            inbound,
            caller,
            message_wait: None,
            deposed: Box::pin(context.registry.status().deposed()),
            context,
            stop: Box::pin(stop),
            inbound_state: InboundState::Open,
            in_flight: VecDeque::new(),
            next: None,
            completed: CompletedBatch::default(),
            bytes: 0,
            memory,
        }
    }

    /// Whether another message may be read; `bytes` are those of the current batch. A stream without
    /// unanswered messages may always read one: no response of it could release memory and wake it.
    fn may_read(&self, bytes: usize) -> bool {
        match self.bytes + bytes {
            0 => true,
            held => held < MAX_STREAM_BYTES && self.memory.may_submit(),
        }
    }

    /// Polls every batch that is not in the registry's queue yet. Returns whether the newest is,
    /// so that another may follow.
    fn poll_submissions(&mut self, cx: &mut Context<'_>) -> bool {
        let registry = &self.context.registry;
        for batch in &mut self.in_flight {
            // Only the newest batch can be pending: no further batch is read before it is submitted.
            if let Stage::Authorizing(responses, authorized) = &mut batch.stage {
                let Poll::Ready(authorized) = authorized.as_mut().poll(cx) else { return false };
                let (responses, mut commands) = (mem::take(responses), Vec::new());
                let pending = responses.into_iter().zip(authorized);
                let pending =
                    pending.map(|(response, known)| pending_response(response, known, registry, &mut commands));
                batch.responses = pending.collect();
                batch.stage = submit(registry, commands);
            }
            if let Stage::Submitting(submission) = &mut batch.stage {
                match submission.as_mut().poll(cx) {
                    Poll::Ready(Ok(acknowledgement)) => batch.stage = Stage::Submitted(acknowledgement),
                    Poll::Ready(Err(err)) => batch.stage = Stage::Completed(Err(err)),
                    Poll::Pending => return false,
                }
            }
        }
        true
    }

    /// Waits while the identity has sent as many messages in this second as it may. The client is not refused: it is not
    /// read, as if the server were slow.
    fn poll_message_wait(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if let Some(wait) = &mut self.message_wait {
                ready!(wait.as_mut().poll(cx));
                self.message_wait = None;
            }
            match self.caller.message_wait() {
                None => return Poll::Ready(()),
                Some(wait) => self.message_wait = Some(Box::pin(sleep(wait))),
            }
        }
    }

    /// Reads the messages that have arrived as one batch. Returns whether anything was read, the
    /// end of the stream included.
    fn read_batch(&mut self, cx: &mut Context<'_>) -> bool {
        let mut batch = ReadBatch::default();
        if let Some(first) = self.next.take() {
            // Counted again with its batch.
            self.bytes -= first.bytes;
            batch.push(first, &self.context.registry);
        } else if let Some(status) = self.poll_stop(cx) {
            // The stop takes effect between batches only, so that every message that was read is answered.
            self.inbound_state = InboundState::Failed(status);
            return true;
        }
        let now = UnixMillis::now();
        let mut ended = false;
        while batch.len() < MAX_COMMANDS && self.may_read(batch.bytes) && self.poll_message_wait(cx).is_ready() {
            match Pin::new(&mut self.inbound).poll_next(cx) {
                Poll::Ready(Some(Ok(message))) => {
                    self.caller.count_message();
                    let bytes = convert::bytes(&message);
                    self.memory.charge_unanswered(bytes);
                    let (response, command) =
                        convert::parse(message, &self.context.validator, now, self.caller.requester());
                    let authorized = match command {
                        Ok(command) => authorize(&self.caller, command, &self.context.registry),
                        Err(invalid) => Authorized::Known(Err(invalid.into())),
                    };
                    let message = ReadMessage { response, authorized, bytes };
                    self.next = batch.push(message, &self.context.registry);
                    if let Some(next) = &self.next {
                        self.bytes += next.bytes;
                        break;
                    }
                }
                Poll::Ready(Some(Err(status))) => {
                    self.inbound_state = InboundState::Failed(status);
                    ended = true;
                    break;
                }
                Poll::Ready(None) => {
                    self.inbound_state = InboundState::Ended;
                    ended = true;
                    break;
                }
                Poll::Pending => break,
            }
        }
        if batch.len() == 0 {
            return ended;
        }
        let ReadBatch { responses, commands, asking, bytes } = batch;
        self.bytes += bytes;
        let stage = if asking.is_empty() {
            submit(&self.context.registry, commands)
        } else {
            let (responses, authorized): (Vec<_>, Vec<_>) = asking.into_iter().unzip();
            let authorized = future::join_all(authorized.into_iter().map(Authorized::decided));
            Stage::Authorizing(responses, Box::pin(authorized))
        };
        self.in_flight.push_back(InFlightBatch { responses, bytes, stage });
        true
    }

    /// Why the stream ends, if the server stops or this process does not write to Kubernetes any more.
    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Option<Status> {
        if self.stop.as_mut().poll(cx).is_ready() {
            return Some(Status::unavailable("shutting down"));
        }
        let Poll::Ready(StoodDown { holder, storage_failed }) = self.deposed.as_mut().poll(cx) else { return None };
        let reason = if storage_failed {
            "this gangplank cannot write its journal and has given up the Lease gangplank-writer"
        } else {
            "another gangplank has taken the Lease gangplank-writer"
        };
        let status = Status::unavailable(format!("{reason}{}", holder.hint()));
        Some(writer_hint::with(status, &holder))
    }

    /// The next response of the completed batch; `None` when it has none left.
    fn poll_response(&mut self, cx: &mut Context<'_>) -> Poll<Option<RegistrationResponse>> {
        let awaiting = match self.completed.awaiting_mirror.take() {
            Some(awaiting) => awaiting,
            None => {
                let Some((response, pending)) = self.completed.responses.next() else {
                    // Before its bytes are released: an iterator keeps its buffer after the last item, and a
                    // stream may have no other batch for hours.
                    let CompletedBatch { bytes, .. } = mem::take(&mut self.completed);
                    self.bytes -= bytes;
                    self.memory.release_unanswered(bytes);
                    return Poll::Ready(None);
                };
                let mirror_wait = match pending {
                    Err(refusal) => return self.counted(response.refused(refusal), None),
                    Ok(mirror_wait) => mirror_wait,
                };
                let outcome = match self.completed.next_outcome() {
                    Err(err) => return self.counted(response.unavailable(&err), Some(&err)),
                    Ok(outcome) => outcome,
                };
                let generation = self.completed.generation;
                match mirror_wait.wait(&self.context.registry, &outcome, generation) {
                    Either::Left(_) => return self.counted(response.completed(outcome, generation, true), None),
                    Either::Right(mirrored) => AwaitingMirror { response, outcome, mirrored: Box::pin(mirrored) },
                }
            }
        };
        let AwaitingMirror { response, outcome, mut mirrored } = awaiting;
        match mirrored.as_mut().poll(cx) {
            Poll::Ready(mirrored) => {
                let generation = self.completed.generation;
                self.counted(response.completed(outcome, generation, mirrored), None)
            }
            Poll::Pending => {
                self.completed.awaiting_mirror = Some(AwaitingMirror { response, outcome, mirrored });
                Poll::Pending
            }
        }
    }

    fn counted(
        &self,
        response: RegistrationResponse,
        unavailable: Option<&Unavailable>,
    ) -> Poll<Option<RegistrationResponse>> {
        count(&self.context.metrics, &response, unavailable);
        Poll::Ready(Some(response))
    }

    /// Waits for the registry's answer to the oldest batch, then starts on its responses.
    fn poll_oldest(&mut self, cx: &mut Context<'_>) -> Poll<Option<()>> {
        let Some(oldest) = self.in_flight.front_mut() else { return Poll::Ready(None) };
        let result = match &mut oldest.stage {
            Stage::Authorizing(..) | Stage::Submitting(_) => return Poll::Pending,
            Stage::Submitted(acknowledgement) => ready!(acknowledgement.as_mut().poll(cx)),
            Stage::Completed(result) => mem::replace(result, Err(Unavailable::ShuttingDown)),
        };
        let Some(batch) = self.in_flight.pop_front() else { return Poll::Ready(None) };
        let (generation, outcomes, unavailable) = match result {
            Ok(Ack { generation, outcomes }) => (generation, outcomes, None),
            Err(err) => (0, Vec::new(), Some(err)),
        };
        self.completed = CompletedBatch {
            responses: batch.responses.into_iter(),
            outcomes: outcomes.into_iter(),
            generation,
            unavailable,
            awaiting_mirror: None,
            bytes: batch.bytes,
        };
        Poll::Ready(Some(()))
    }
}

fn submit(registry: &RegistryHandle, commands: Vec<Command>) -> Stage {
    if commands.is_empty() {
        // No message is for the registry: each was invalid, or is not allowed.
        return Stage::Completed(Ok(Ack { generation: 0, outcomes: Vec::new() }));
    }
    let registry = registry.clone();
    Stage::Submitting(Box::pin(async move {
        let acknowledgement = registry.submit(commands).await?;
        Ok(Box::pin(acknowledgement) as AckFuture)
    }))
}

impl<S> Stream for RegistrationStream<S>
where
    S: Stream<Item = Result<RegistrationMsg, Status>> + Unpin,
{
    type Item = Result<RegistrationResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            let awaits_mirror = match this.poll_response(cx) {
                Poll::Ready(Some(response)) => return Poll::Ready(Some(Ok(response))),
                Poll::Ready(None) => false,
                Poll::Pending => true,
            };
            // Submit before the next batch is answered: the registry works while responses are encoded.
            while this.poll_submissions(cx)
                && matches!(this.inbound_state, InboundState::Open)
                && this.in_flight.len() < MAX_IN_FLIGHT
                && (this.next.is_some() || this.may_read(0))
                && this.read_batch(cx)
            {}
            if awaits_mirror {
                return Poll::Pending;
            }
            match this.poll_oldest(cx) {
                Poll::Ready(Some(())) => {}
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => {
                    return match mem::replace(&mut this.inbound_state, InboundState::Ended) {
                        InboundState::Open => {
                            this.inbound_state = InboundState::Open;
                            Poll::Pending
                        }
                        InboundState::Ended => Poll::Ready(None),
                        InboundState::Failed(status) => Poll::Ready(Some(Err(status))),
                    };
                }
            }
        }
    }
}
