//! One registration stream: messages in, exactly one answer each, in order.
//!
//! There is no task behind it. The transport polls for the next answer, and only when the client
//! takes answers; every poll first reads what has arrived and hands it in, then gives out what is
//! answered. So a client that does not read its answers is not read either, and what a stream can
//! hold is bounded: [`MAX_IN_FLIGHT`] submissions and [`MAX_COST`] octets of messages.
//!
//! Order holds by construction: flights are a queue, a flight's messages are a list, refused
//! messages keep their place in it, and no flight is handed in before the one ahead of it is.
//!
//! A client that goes away drops this value: what was handed in is carried out by the writer, and
//! a flight that still waits for a place in the writer's queue is not carried out at all.

use std::{
    collections::VecDeque,
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
    vec,
};

use futures::{Stream, future::Either};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::Status;

use super::{Confirmation, count};
use crate::{
    grpc::{
        Services,
        convert::{self, Echo, Refusal},
        proto::registry::{RegistrationMsg, RegistrationResponse},
    },
    model::UnixMillis,
    registry::{Ack, Command, MAX_COMMANDS, Outcome, Unavailable},
};

/// Submissions of one stream that may be with the registry, or wait for Kubernetes, while more is
/// read.
const MAX_IN_FLIGHT: usize = 4;

/// Octets of memory that the messages of one stream may take until they are answered. One more
/// message is read beyond it, which is at most 64 KiB on the wire.
const MAX_COST: usize = 1024 * 1024;

type Acked = Pin<Box<dyn Future<Output = Result<Ack, Unavailable>> + Send>>;
type HandedIn = Pin<Box<dyn Future<Output = Result<Acked, Unavailable>> + Send>>;

/// A message in its place: what its answer repeats, and, if it went to the registry, what it
/// waits for afterwards.
type Place = (Echo, Result<Confirmation, Refusal>);

/// What was read together.
struct Flight {
    places: Vec<Place>,
    cost: usize,
    stage: Stage,
}

enum Stage {
    /// Waits for a place in the registry's queue.
    Waiting(HandedIn),
    /// With the registry.
    Flying(Acked),
    /// The registry has nothing more to say.
    Landed(Result<Ack, Unavailable>),
}

/// Answers that are being given out.
#[derive(Default)]
struct Landed {
    places: vec::IntoIter<Place>,
    outcomes: vec::IntoIter<Outcome>,
    generation: u64,
    refused: Option<Unavailable>,
    /// The next answer, which waits for Kubernetes.
    held: Option<Held>,
    cost: usize,
}

/// An answer that says whether Kubernetes has it, once that is known.
struct Held {
    echo: Echo,
    outcome: Outcome,
    mirrored: Pin<Box<dyn Future<Output = bool> + Send>>,
}

impl Landed {
    /// What became of the next command.
    fn outcome(&mut self) -> Result<Outcome, Unavailable> {
        match self.refused {
            Some(err) => Err(err),
            // One outcome per command; a missing one cannot be called done.
            None => self.outcomes.next().ok_or(Unavailable::ShuttingDown),
        }
    }
}

/// Where the reading side stands.
#[derive(Debug)]
enum Reading {
    Open,
    /// The client said all it has to say.
    Ended,
    /// No more is read; after the answers the stream ends so.
    Failed(Status),
}

/// The answers to a stream of messages, as a stream.
pub(in crate::grpc) struct Conversation<S> {
    inbound: S,
    services: Services,
    stop: Pin<Box<WaitForCancellationFutureOwned>>,
    reading: Reading,
    flights: VecDeque<Flight>,
    landed: Landed,
    /// Of all flights and of what has landed.
    cost: usize,
}

impl<S> std::fmt::Debug for Conversation<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Conversation").field("reading", &self.reading).field("flights", &self.flights.len()).finish()
    }
}

impl<S> Conversation<S>
where
    S: Stream<Item = Result<RegistrationMsg, Status>> + Unpin,
{
    pub(in crate::grpc) fn new(inbound: S, services: Services, stop: WaitForCancellationFutureOwned) -> Self {
        Self {
            inbound,
            services,
            stop: Box::pin(stop),
            reading: Reading::Open,
            flights: VecDeque::new(),
            landed: Landed::default(),
            cost: 0,
        }
    }

    /// Moves every flight on as far as it goes. Gives back whether the newest is handed in, so
    /// that another may follow.
    fn advance(&mut self, cx: &mut Context<'_>) -> bool {
        for flight in &mut self.flights {
            if let Stage::Waiting(handed_in) = &mut flight.stage {
                match handed_in.as_mut().poll(cx) {
                    Poll::Ready(Ok(acked)) => flight.stage = Stage::Flying(acked),
                    Poll::Ready(Err(err)) => flight.stage = Stage::Landed(Err(err)),
                    // What is behind it was not handed in yet: only the newest ever waits.
                    Poll::Pending => return false,
                }
            }
        }
        true
    }

    /// Reads what has arrived, as one flight. Gives back whether there was anything.
    fn read(&mut self, cx: &mut Context<'_>) -> bool {
        // The stop is looked at between flights: what is read is answered.
        if self.stop.as_mut().poll(cx).is_ready() {
            self.reading = Reading::Failed(Status::unavailable("shutting down"));
            return true;
        }
        let now = UnixMillis::now();
        let (mut places, mut commands, mut cost) = (Vec::new(), Vec::new(), 0);
        let mut news = false;
        while places.len() < MAX_COMMANDS && self.cost + cost < MAX_COST {
            match Pin::new(&mut self.inbound).poll_next(cx) {
                Poll::Ready(Some(Ok(message))) => {
                    cost += convert::cost(&message);
                    let (echo, command) = convert::parse(message, &self.services.validator, now);
                    let registry = &self.services.registry;
                    places.push((
                        echo,
                        command.map(|command| {
                            let confirmation = Confirmation::of(&command, registry);
                            commands.push(command);
                            confirmation
                        }),
                    ));
                }
                Poll::Ready(Some(Err(status))) => {
                    self.reading = Reading::Failed(status);
                    news = true;
                    break;
                }
                Poll::Ready(None) => {
                    self.reading = Reading::Ended;
                    news = true;
                    break;
                }
                Poll::Pending => break,
            }
        }
        if places.is_empty() {
            return news;
        }
        self.cost += cost;
        self.flights.push_back(Flight { places, cost, stage: self.hand_in(commands) });
        true
    }

    fn hand_in(&self, commands: Vec<Command>) -> Stage {
        if commands.is_empty() {
            return Stage::Landed(Ok(Ack { generation: 0, outcomes: Vec::new() }));
        }
        let registry = self.services.registry.clone();
        Stage::Waiting(Box::pin(async move {
            let acked = registry.submit(commands).await?;
            Ok(Box::pin(acked) as Acked)
        }))
    }

    /// The next answer of the flight that has landed; `None` when it has none left.
    fn answer(&mut self, cx: &mut Context<'_>) -> Poll<Option<RegistrationResponse>> {
        let held = match self.landed.held.take() {
            Some(held) => held,
            None => {
                let Some((echo, place)) = self.landed.places.next() else {
                    self.cost -= mem::take(&mut self.landed.cost);
                    return Poll::Ready(None);
                };
                let confirmation = match place {
                    Err(refusal) => return self.counted(echo.refused(refusal), None),
                    Ok(confirmation) => confirmation,
                };
                let outcome = match self.landed.outcome() {
                    Err(err) => return self.counted(echo.unavailable(err), Some(err)),
                    Ok(outcome) => outcome,
                };
                let generation = self.landed.generation;
                match confirmation.wait(&self.services.registry, outcome, generation) {
                    Either::Left(_) => return self.counted(echo.carried_out(outcome, generation, true), None),
                    Either::Right(mirrored) => Held { echo, outcome, mirrored: Box::pin(mirrored) },
                }
            }
        };
        let Held { echo, outcome, mut mirrored } = held;
        match mirrored.as_mut().poll(cx) {
            Poll::Ready(mirrored) => {
                let generation = self.landed.generation;
                self.counted(echo.carried_out(outcome, generation, mirrored), None)
            }
            Poll::Pending => {
                self.landed.held = Some(Held { echo, outcome, mirrored });
                Poll::Pending
            }
        }
    }

    fn counted(
        &self,
        response: RegistrationResponse,
        unavailable: Option<Unavailable>,
    ) -> Poll<Option<RegistrationResponse>> {
        count(&self.services.metrics, &response, unavailable);
        Poll::Ready(Some(response))
    }

    /// Takes the oldest flight when the registry has answered it.
    fn land(&mut self, cx: &mut Context<'_>) -> Poll<Option<()>> {
        let Some(oldest) = self.flights.front_mut() else { return Poll::Ready(None) };
        let result = match &mut oldest.stage {
            Stage::Waiting(_) => return Poll::Pending,
            Stage::Flying(acked) => ready!(acked.as_mut().poll(cx)),
            Stage::Landed(result) => mem::replace(result, Err(Unavailable::ShuttingDown)),
        };
        let Some(flight) = self.flights.pop_front() else { return Poll::Ready(None) };
        let (generation, outcomes, refused) = match result {
            Ok(Ack { generation, outcomes }) => (generation, outcomes, None),
            Err(err) => (0, Vec::new(), Some(err)),
        };
        self.landed = Landed {
            places: flight.places.into_iter(),
            outcomes: outcomes.into_iter(),
            generation,
            refused,
            held: None,
            cost: flight.cost,
        };
        Poll::Ready(Some(()))
    }
}

impl<S> Stream for Conversation<S>
where
    S: Stream<Item = Result<RegistrationMsg, Status>> + Unpin,
{
    type Item = Result<RegistrationResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            let held = match this.answer(cx) {
                Poll::Ready(Some(response)) => return Poll::Ready(Some(Ok(response))),
                Poll::Ready(None) => false,
                Poll::Pending => true,
            };
            // Hand in first, answer then: the registry works while answers are encoded.
            while this.advance(cx)
                && matches!(this.reading, Reading::Open)
                && this.flights.len() < MAX_IN_FLIGHT
                && this.cost < MAX_COST
                && this.read(cx)
            {}
            if held {
                return Poll::Pending;
            }
            match this.land(cx) {
                Poll::Ready(Some(())) => {}
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => {
                    return match mem::replace(&mut this.reading, Reading::Ended) {
                        Reading::Open => {
                            this.reading = Reading::Open;
                            Poll::Pending
                        }
                        Reading::Ended => Poll::Ready(None),
                        Reading::Failed(status) => Poll::Ready(Some(Err(status))),
                    };
                }
            }
        }
    }
}
