//! Handing over, between processes of one gangplank: `gangplank.internal.v1.HandOver`.
//!
//! A process that stopped writing has words that Kubernetes was never seen to have. Its [`sender`] sends them to the process
//! that writes until each is confirmed, outranked or refused; this service takes them.

mod sender;

use std::{sync::Arc, time::Duration};

use futures::future;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout, timeout_at},
};
use tonic::{Request, Response, Status, service::Interceptor};

pub use sender::run as hand_over;

use super::{
    ServerContext,
    call_limiter::{CallLimiter, CallPermit},
    caller::Caller,
    convert,
    incoming::ConnectionInfo,
    memory::ConnectionMemory,
    proto::gangplank::internal::v1::{
        HandOverRequest, HandOverResponse, Result as WireResult, Word, WordResult, hand_over_server::HandOver,
    },
    writer_hint,
};
use crate::{
    identity::AccessVerb,
    model::UnixMillis,
    registry::{KubernetesRefusal, MergeAck, MergeOutcome, OutboxWord, Unavailable},
};

/// Most words of one request.
const MAX_WORDS: usize = 256;

/// How long an answer waits for Kubernetes at most.
const MAX_WAIT: Duration = Duration::from_secs(2);

/// How long a word waits whose stamp is ahead of the clock. One that is further ahead is refused: by then it would undo whatever was
/// said meanwhile.
const MAX_CLOCK_WAIT: Duration = Duration::from_secs(3600);

/// How long a request may wait until its words are merged. The sender's patience has to cover this and [`MAX_WAIT`].
const MERGE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long one request may take, for both sides: both waits, and some time for everything else.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Requests that wait for Kubernetes at the same time; others are answered at once, and sent again.
const MAX_WAITING: usize = 64;

/// Requests that are read and merged at once, of one peer and of all. A process hands over one request at a time, and several may be
/// behind one address. Bounds the memory of requests that wait, and how long the last of them waits.
const MAX_PER_PEER: usize = 4;
const MAX_PERMITS: usize = 64;

/// The path of the call.
const SEND: &str = "/gangplank.internal.v1.HandOver/Send";

/// How long a call may take until it is answered; `None` for calls that are no hand-over. It holds its permit from its begin on,
/// and may send its request as slowly as it likes.
pub(super) fn deadline(path: &str) -> Option<Duration> {
    (path == SEND).then_some(REQUEST_TIMEOUT)
}

/// The right that a call needs before it takes a permit and its body is read: whoever may not hand over keeps nobody else out.
pub(super) fn needed(path: &str) -> Option<AccessVerb> {
    (path == SEND).then_some(AccessVerb::HandOver)
}

/// Gives each request its permit before its body is read. So those that are refused cost no memory and next to no time.
#[derive(Debug, Clone)]
pub(super) struct HandOverLimiter(CallLimiter);

impl HandOverLimiter {
    pub(super) fn new() -> Self {
        Self(CallLimiter::new(MAX_PER_PEER, MAX_PERMITS))
    }
}

impl Interceptor for HandOverLimiter {
    /// Puts a [`CallPermit`] into the extensions of a request, or refuses the request.
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let peer = request.extensions().get::<ConnectionInfo>().map(|connection| connection.handle.peer());
        let permit = self.0.acquire(peer).ok_or_else(busy)?;
        request.extensions_mut().insert(Arc::new(permit));
        Ok(request)
    }
}

fn busy() -> Status {
    Status::resource_exhausted("other words are being taken over; try again later")
}

/// Takes the words of other processes.
#[derive(Debug)]
pub(super) struct HandOverService {
    context: ServerContext,
    waiting: Semaphore,
}

/// Charges the words of a request until it is answered.
struct Charge {
    memory: Option<Arc<ConnectionMemory>>,
    bytes: usize,
}

impl Charge {
    fn new(memory: Option<Arc<ConnectionMemory>>, words: &[Word]) -> Result<Self, Status> {
        if memory.as_ref().is_some_and(|memory| !memory.may_submit()) {
            return Err(Status::resource_exhausted("too many registrations are unanswered; try again later"));
        }
        let bytes = words.iter().filter_map(|word| word.message.as_deref()).map(convert::bytes).sum();
        memory.iter().for_each(|memory| memory.charge_unanswered(bytes));
        Ok(Self { memory, bytes })
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.memory.iter().for_each(|memory| memory.release_unanswered(self.bytes));
    }
}

impl HandOverService {
    pub(super) fn new(context: ServerContext) -> Self {
        Self { context, waiting: Semaphore::new(MAX_WAITING) }
    }

    /// Waits for Kubernetes to have the merged ones of `words`. Returns one result per word.
    async fn results(
        &self,
        words: Vec<Result<OutboxWord, String>>,
        MergeAck { generation, outcomes }: MergeAck,
        wait: Duration,
    ) -> Vec<WordResult> {
        let registry = &self.context.registry;
        // Without room the answer is "not yet": the sender repeats the words, which costs less than a call that waits.
        let waiting = self.waiting.try_acquire();
        let until = Instant::now() + if waiting.is_ok() { wait } else { Duration::ZERO };
        let mut outcomes = outcomes.into_iter();
        let results = words.into_iter().map(|word| {
            let answer = match word {
                // As long as this process is as strict as that. The word may be registered again meanwhile.
                Err(invalid) => WordAnswer::Now(WireResult::NotYet, invalid),
                Ok(word) => match outcomes.next() {
                    Some(outcome) => WordAnswer::to(&word, outcome),
                    None => WordAnswer::Now(WireResult::NotYet, String::new()),
                },
            };
            async move {
                let (result, details) = match answer {
                    WordAnswer::Now(result, details) => (result, details),
                    WordAnswer::Mirrored(result, word) => {
                        let address = word.id.address.clone();
                        let confirmed = registry.mirror_progress().confirmed(&word.service, generation, address);
                        match timeout_at(until, confirmed).await {
                            Ok(()) => (result, String::new()),
                            Err(_) => (WireResult::NotYet, String::new()),
                        }
                    }
                };
                WordResult { result: result.into(), details }
            }
        });
        future::join_all(results).await
    }
}

/// How a word is answered.
enum WordAnswer {
    Now(WireResult, String),
    /// When Kubernetes has the service of the word.
    Mirrored(WireResult, OutboxWord),
}

impl WordAnswer {
    fn to(word: &OutboxWord, outcome: MergeOutcome) -> Self {
        let not_yet = |details: String| Self::Now(WireResult::NotYet, details);
        match outcome {
            MergeOutcome::Merged => Self::Mirrored(WireResult::Confirmed, word.clone()),
            // The later word may be in the journal only: then the sender keeps its own until it is not.
            MergeOutcome::Outranked => Self::Mirrored(WireResult::Outranked, word.clone()),
            MergeOutcome::TooOld => Self::Now(
                WireResult::TooOld,
                "too old to count, because its removal may have been forgotten; it has to be registered again".into(),
            ),
            MergeOutcome::Refused(err) => {
                let details = match err {
                    KubernetesRefusal::Reserved => "it is the cluster's own",
                    KubernetesRefusal::NamespaceAbsent => "the namespace does not exist",
                    KubernetesRefusal::ForeignService => "the Service is not managed by gangplank",
                };
                not_yet(format!("{}: {details}", word.service))
            }
            MergeOutcome::Full { limit } => not_yet(format!("the server holds {limit} instances, which is its limit")),
            MergeOutcome::ClockAhead(lead) if lead > MAX_CLOCK_WAIT => Self::Now(
                WireResult::TooOld,
                format!(
                    "its stamp is {lead:?} ahead of the clock of the process that writes, so nobody knows how old it is; it has to \
                     be said again"
                ),
            ),
            MergeOutcome::ClockAhead(lead) => {
                not_yet(format!("its stamp is {lead:?} ahead of the clock of the process that writes"))
            }
        }
    }
}

#[tonic::async_trait]
impl HandOver for HandOverService {
    async fn send(&self, mut request: Request<HandOverRequest>) -> Result<Response<HandOverResponse>, Status> {
        // The words may be of any instance. It was asked before, and costs nothing now.
        Caller::of(&request)?.may_call(AccessVerb::HandOver, None, None).await?;
        if !self.context.registry.mirror_progress().is_mirrored() {
            return Err(Status::failed_precondition("this process does not write to Kubernetes"));
        }
        let permit = request.extensions_mut().remove::<Arc<CallPermit>>();
        let memory = request.extensions_mut().remove::<Arc<ConnectionMemory>>();
        let HandOverRequest { words, wait_millis } = request.into_inner();
        if words.len() > MAX_WORDS {
            let words = words.len();
            return Err(Status::invalid_argument(format!("words: {words} given, a request has at most {MAX_WORDS}")));
        }
        let _charge = Charge::new(memory, &words)?;
        let now = UnixMillis::now();
        let validator = &self.context.validator;
        let words: Vec<_> = words.into_iter().map(|word| convert::word_from_proto(word, validator, now)).collect();
        // The others keep their places in `words`: results are matched by position.
        let valid = words.iter().filter_map(|word| word.as_ref().ok()).cloned().collect();
        let merged = timeout(MERGE_TIMEOUT, self.context.registry.merge(valid)).await.map_err(|_| busy())?;
        // The words are merged: others may be read. Waiting for Kubernetes has a limit of its own.
        drop(permit);
        let wait = Duration::from_millis(wait_millis.into()).min(MAX_WAIT);
        match merged {
            Ok(ack) => Ok(Response::new(HandOverResponse { results: self.results(words, ack, wait).await })),
            Err(err) => {
                let status = Status::unavailable(err.to_string());
                Err(match err {
                    Unavailable::Standby(holder) => writer_hint::with(status, &holder),
                    _ => status,
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{InstanceId, PortSet, Stamp, testing::VALIDATOR};

    #[test]
    fn word_from_the_future_waits_for_an_hour_at_most() {
        let address = VALIDATOR.address("10.0.0.1").expect("valid");
        let id = InstanceId { address, ports: PortSet::default() };
        let service = VALIDATOR.service("prod", "web").expect("valid");
        let word = OutboxWord { service, id, instance: None, stamp: Stamp::default() };
        let result = |seconds| match WordAnswer::to(&word, MergeOutcome::ClockAhead(Duration::from_secs(seconds))) {
            WordAnswer::Now(result, _) => Some(result),
            WordAnswer::Mirrored(..) => None,
        };
        assert_eq!([3_600, 3_601].map(result), [Some(WireResult::NotYet), Some(WireResult::TooOld)]);
    }
}
