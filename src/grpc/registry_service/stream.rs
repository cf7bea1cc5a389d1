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

use futures::{Stream, future::Either};
use tokio::time::{Sleep, sleep};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::Status;

use super::{MirrorWait, authorized, count};
use crate::{
    grpc::{
        ServerContext,
        convert::{self, Refusal, ResponseBuilder},
        memory::ConnectionMemory,
        proto::registry::{RegistrationMsg, RegistrationResponse},
        security::Caller,
        writer_hint,
    },
    model::UnixMillis,
    registry::{Ack, Command, MAX_COMMANDS, Outcome, StoodDown, Unavailable},
};

/// Unanswered batches of one stream; with more, the stream is not read.
const MAX_IN_FLIGHT: usize = 4;

/// Bytes of memory of the unanswered messages of one stream. The check comes before a message is read, so
/// one more message (at most 64 KiB on the wire) may exceed the limit.
const MAX_STREAM_BYTES: usize = 1024 * 1024;

type AckFuture = Pin<Box<dyn Future<Output = Result<Ack, Unavailable>> + Send>>;
type SubmitFuture = Pin<Box<dyn Future<Output = Result<AckFuture, Unavailable>> + Send>>;

/// The response to a message that was read, with its wait for Kubernetes, or with the reason why the
/// message was not submitted.
type PendingResponse = (ResponseBuilder, Result<MirrorWait, Refusal>);

/// Messages that were read together and are one submission to the registry.
struct InFlightBatch {
    responses: Vec<PendingResponse>,
    bytes: usize,
    stage: Stage,
}

enum Stage {
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
        for batch in &mut self.in_flight {
            if let Stage::Submitting(submission) = &mut batch.stage {
                match submission.as_mut().poll(cx) {
                    Poll::Ready(Ok(acknowledgement)) => batch.stage = Stage::Submitted(acknowledgement),
                    Poll::Ready(Err(err)) => batch.stage = Stage::Completed(Err(err)),
                    // Only the newest batch can be pending: no further batch is read before it is submitted.
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
        // The stop takes effect between batches only, so that every message that was read is answered.
        if self.stop.as_mut().poll(cx).is_ready() {
            self.inbound_state = InboundState::Failed(Status::unavailable("shutting down"));
            return true;
        }
        if let Poll::Ready(StoodDown { holder, storage_failed }) = self.deposed.as_mut().poll(cx) {
            let reason = if storage_failed {
                "this gangplank cannot write its journal and has given up the Lease gangplank-writer"
            } else {
                "another gangplank has taken the Lease gangplank-writer"
            };
            let status = Status::unavailable(format!("{reason}{}", holder.hint()));
            self.inbound_state = InboundState::Failed(writer_hint::with(status, &holder));
            return true;
        }
        let now = UnixMillis::now();
        let (mut responses, mut commands, mut bytes) = (Vec::new(), Vec::new(), 0);
        let mut ended = false;
        while responses.len() < MAX_COMMANDS && self.may_read(bytes) && self.poll_message_wait(cx).is_ready() {
            match Pin::new(&mut self.inbound).poll_next(cx) {
                Poll::Ready(Some(Ok(message))) => {
                    self.caller.count_message();
                    let message_bytes = convert::bytes(&message);
                    self.memory.charge_unanswered(message_bytes);
                    bytes += message_bytes;
                    let (response, command) =
                        convert::parse(message, &self.context.validator, now, self.caller.requester());
                    let registry = &self.context.registry;
                    let authorized =
                        command.map_err(Refusal::from).and_then(|command| authorized(&self.caller, command, registry));
                    responses.push((
                        response,
                        authorized.map(|command| {
                            let mirror_wait = MirrorWait::of(&command, registry);
                            commands.push(command);
                            mirror_wait
                        }),
                    ));
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
        if responses.is_empty() {
            return ended;
        }
        self.bytes += bytes;
        self.in_flight.push_back(InFlightBatch { responses, bytes, stage: self.submit(commands) });
        true
    }

    fn submit(&self, commands: Vec<Command>) -> Stage {
        if commands.is_empty() {
            // Every message was invalid: the registry has nothing to do.
            return Stage::Completed(Ok(Ack { generation: 0, outcomes: Vec::new() }));
        }
        let registry = self.context.registry.clone();
        Stage::Submitting(Box::pin(async move {
            let acknowledgement = registry.submit(commands).await?;
            Ok(Box::pin(acknowledgement) as AckFuture)
        }))
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
            Stage::Submitting(_) => return Poll::Pending,
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
                && this.may_read(0)
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
