//! Sends the outbox to the process that writes, as long as that is another one.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};
use tracing::{debug, info, warn};

use super::{MAX_WAIT, MAX_WORDS, REQUEST_TIMEOUT};
use crate::{
    grpc::{
        MAX_MESSAGE_BYTES,
        client::ClientTls,
        convert,
        proto::gangplank::internal::v1::{
            HandOverRequest, HandOverResponse, Result as WireResult, WordResult, hand_over_client::HandOverClient,
        },
    },
    metrics::{HandOverResult, Metrics},
    model::Stamp,
    net::{
        backoff::{Backoff, jittered},
        tls::{ClientPem, ServerTls},
    },
    registry::{LeaseHolder, OutboxPage, OutboxWord, RegistryHandle, Unavailable},
};

/// How long a connection may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Between two rounds while words are left, longer each time without progress. Each is spread at random from half of it to
/// the whole.
const MIN_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// How often an empty outbox is looked at: a take-over that is given up fills it again.
const IDLE_INTERVAL: Duration = Duration::from_secs(10);

/// Bytes of words in one request, of those that a message may have.
const MAX_REQUEST_BYTES: usize = MAX_MESSAGE_BYTES / 4 * 3;

/// Words that are read from the outbox at once: each time all of it is searched.
const MAX_PAGE: usize = 16_384;

/// Most different reasons for which words wait that are remembered, to log each once.
const MAX_REASONS: usize = 64;

/// Hands words over whenever another process writes, until `stop`.
pub async fn run(
    registry: RegistryHandle,
    metrics: Arc<Metrics>,
    tls: Option<Arc<ServerTls>>,
    stop: CancellationToken,
) {
    let holder = registry.status().watch_holder();
    let sender = Sender { registry, metrics, tls, holder, reported: BTreeSet::new() };
    // An error means that the registry has ended, which reports itself why.
    let _ = stop.run_until_cancelled(sender.run()).await;
    stop.cancelled().await;
}

struct Sender {
    registry: RegistryHandle,
    metrics: Arc<Metrics>,
    /// With TLS, the certificate that this process shows the other.
    tls: Option<Arc<ServerTls>>,
    holder: watch::Receiver<Option<Arc<LeaseHolder>>>,
    /// Why words wait, as far as it was logged.
    reported: BTreeSet<String>,
}

/// How a round ended.
#[derive(Debug, Default, PartialEq, Eq)]
struct HandOverRound {
    /// Words that left the outbox.
    done: usize,
    /// Words that stay.
    left: usize,
}

impl Sender {
    async fn run(mut self) -> Result<(), Unavailable> {
        let mut backoff = Backoff::new(MIN_BACKOFF, MAX_BACKOFF);
        loop {
            let holder = self.holder.borrow_and_update().clone();
            let addressed = holder.filter(|holder| !holder.addresses.is_empty());
            let pause = match addressed {
                None => None,
                Some(holder) => {
                    let round = self.round(&holder).await?;
                    if round.done > 0 {
                        let HandOverRound { done, left } = round;
                        info!(holder = holder.name, done, left, "words that Kubernetes lacked were handed over");
                        backoff.reset();
                    }
                    Some(if round.left == 0 {
                        backoff.reset();
                        jittered(IDLE_INTERVAL)
                    } else {
                        backoff.next_pause()
                    })
                }
            };
            tokio::select! {
                changed = self.holder.changed() => {
                    // The sender is part of the registry's handle.
                    if changed.is_err() {
                        return Ok(());
                    }
                    backoff.reset();
                }
                () = sleep(pause.unwrap_or_default()), if pause.is_some() => {}
            }
        }
    }

    /// Sends every word of the outbox once.
    async fn round(&mut self, holder: &LeaseHolder) -> Result<HandOverRound, Unavailable> {
        let (mut round, mut after) = (HandOverRound::default(), None::<Stamp>);
        let mut client = None;
        loop {
            let OutboxPage { words, total } = self.registry.outbox(after, MAX_PAGE).await?;
            round.left = total;
            let Some(last) = words.last() else { break };
            after = Some(last.stamp);
            let connected = match &mut client {
                Some(client) => client,
                None => match connect(holder, self.tls.as_deref()).await {
                    Some(channel) => client.insert(HandOverClient::new(channel)),
                    None => break,
                },
            };
            // With many words, all are sent before Kubernetes is waited for.
            let wait = if total <= MAX_WORDS { MAX_WAIT } else { Duration::ZERO };
            for request in requests(words, wait) {
                match self.send(connected, request).await? {
                    Ok(done) => (round.done, round.left) = (round.done + done, round.left.saturating_sub(done)),
                    Err(status) => {
                        debug!(holder = holder.name, code = ?status.code(), status = status.message(), "no hand-over");
                        return Ok(round);
                    }
                }
                // Another writer: what is left goes there.
                if self.holder.has_changed().unwrap_or(true) {
                    return Ok(round);
                }
            }
        }
        Ok(round)
    }

    /// Sends some words. Returns how many have left the outbox.
    async fn send(
        &mut self,
        client: &mut HandOverClient<Channel>,
        (words, request): (Vec<OutboxWord>, HandOverRequest),
    ) -> Result<Result<usize, Status>, Unavailable> {
        let sent = timeout(REQUEST_TIMEOUT, client.send(request)).await;
        let HandOverResponse { results } = match sent.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer"))) {
            Ok(response) => response.into_inner(),
            Err(status) => return Ok(Err(status)),
        };
        // Results are matched by position. Of a list of another length none can be believed.
        if results.len() != words.len() {
            return Ok(Err(Status::internal("not one result for each word")));
        }
        let mut done = words;
        let mut results = results.into_iter();
        done.retain(|word| results.next().is_some_and(|result| self.is_done(word, result)));
        let count = done.len();
        if count > 0 {
            self.registry.handed_over(done).await?;
        }
        Ok(Ok(count))
    }

    /// Counts the answer to a word, and returns whether the word leaves the outbox.
    fn is_done(&mut self, word: &OutboxWord, WordResult { result, details }: WordResult) -> bool {
        let result = match WireResult::try_from(result) {
            Ok(WireResult::Confirmed) => HandOverResult::Confirmed,
            Ok(WireResult::Outranked) => HandOverResult::Outranked,
            Ok(WireResult::TooOld) => HandOverResult::TooOld,
            // What a newer peer answers and this version does not know keeps the word, which is safe.
            Ok(WireResult::NotYet | WireResult::Unspecified) | Err(_) => HandOverResult::NotYet,
        };
        self.metrics.registry.count_handed_over(result, 1);
        let OutboxWord { service, id, stamp, .. } = word;
        match result {
            HandOverResult::Confirmed | HandOverResult::Outranked => true,
            HandOverResult::TooOld => {
                warn!(%service, instance = %id, %stamp, "the process that writes refuses a registration: {details}");
                true
            }
            HandOverResult::NotYet => {
                // Each reason once: thousands of words may wait for the same one.
                let is_new =
                    !details.is_empty() && self.reported.len() < MAX_REASONS && self.reported.insert(details.clone());
                if is_new {
                    warn!(
                        %service, instance = %id, %stamp,
                        "the process that writes does not take a word now: {details}; it is kept and sent again"
                    );
                }
                false
            }
        }
    }
}

/// With TLS, as a client that shows the certificate of this server, to a server of the same CA.
async fn connect(holder: &LeaseHolder, tls: Option<&ServerTls>) -> Option<Channel> {
    let scheme = if tls.is_some() { "https" } else { "http" };
    for address in &holder.addresses {
        let mut endpoint =
            Endpoint::from_shared(format!("{scheme}://{address}")).ok()?.connect_timeout(CONNECT_TIMEOUT);
        if let Some(tls) = tls {
            let ClientPem { cert, key, ca } = tls.as_client()?;
            let tls = ClientTls::new(ca, Some((cert, key)));
            endpoint = endpoint.tls_config(tls.config()?).ok()?;
        }
        match timeout(CONNECT_TIMEOUT, endpoint.connect()).await {
            Ok(Ok(channel)) => return Some(channel),
            Ok(Err(err)) => debug!(%address, %err, "no connection for the hand-over"),
            Err(_) => debug!(%address, "no connection for the hand-over: timed out"),
        }
    }
    None
}

/// Requests with all of `words`, in order, each as large as it may be.
fn requests(words: Vec<OutboxWord>, wait: Duration) -> Vec<(Vec<OutboxWord>, HandOverRequest)> {
    let wait_millis = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
    let mut requests: Vec<(Vec<OutboxWord>, HandOverRequest)> = Vec::new();
    let mut bytes = 0;
    for word in words {
        let message = convert::word_to_proto(&word);
        // With tag and length of the repeated field.
        let size = prost::Message::encoded_len(&message) + 8;
        let fits = bytes + size <= MAX_REQUEST_BYTES;
        bytes = if fits { bytes + size } else { size };
        match requests.last_mut().filter(|(words, _)| fits && words.len() < MAX_WORDS) {
            Some((words, request)) => {
                words.push(word);
                request.words.push(message);
            }
            None => {
                bytes = size;
                requests.push((vec![word], HandOverRequest { words: vec![message], wait_millis }));
            }
        }
    }
    requests
}
