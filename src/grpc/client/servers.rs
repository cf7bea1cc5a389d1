//! Several servers, of which one takes registrations and all answer readers.
//!
//! A server on standby refuses with 503 and names the one that writes. A mutation asks the servers in their order, and
//! first the ones that a refusal names, until one takes it. When none does and they are replicas, it asks all again after
//! a pause: another replica takes over within 15 s. The servers that a refusal names are asked in that round only.
//!
//! A refusal says where a server is, not whether it speaks TLS there. All replicas are alike, and one speaks plaintext at its
//! loopback address only, unless told otherwise: so a client that reached one there, in plaintext, may need TLS for the others.

use std::{
    collections::{HashSet, VecDeque},
    iter,
    net::IpAddr,
    time::Duration,
};

use http::Uri;
use tokio::time::{Instant, sleep, timeout};

use super::{Client, ClientError, ClientTls, MutationResponse};
use crate::{
    model::{InstanceSpec, ServerAddress},
    net::backoff::Backoff,
};

/// Most servers of one round that refusals name. A wrong hint costs a connection each.
const MAX_HINTS: usize = 8;

/// How long one of several servers may take. A server that is alive answers within a second and a sync of its disk.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);

/// What it may take however little time is left: the last round asks each server, too.
const MIN_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);

/// Pauses between rounds. Each is shortened by a random part of up to one half, so that clients which lost the same
/// server do not come back at one moment.
const MIN_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// A server that did not take a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// Its URL.
    pub url: String,
    /// Why not: its refusal, or the error of the connection.
    pub reason: String,
}

/// The servers that a call may go to.
#[derive(Debug, Clone)]
pub struct Servers {
    urls: Vec<String>,
    tls: ClientTls,
    /// How long a mutation looks for a server that takes it.
    patience: Duration,
}

/// What a mutation asks for.
#[derive(Debug, Clone, Copy)]
enum Mutation {
    Register,
    Unregister,
}

/// One round: each server once.
#[derive(Debug, Default)]
struct AttemptRound {
    attempts: Vec<Attempt>,
    /// Whether a server answered, and refused.
    refused: bool,
    /// Those that refusals name.
    hints: HashSet<String>,
}

impl Servers {
    /// The servers at `urls`, each like `http://127.0.0.1:9080`, in the order in which they are asked. A mutation looks for
    /// a server that takes it for `patience`.
    #[must_use]
    pub const fn new(urls: Vec<String>, tls: ClientTls, patience: Duration) -> Self {
        Self { urls, tls, patience }
    }

    /// The URLs, as given.
    #[must_use]
    pub fn urls(&self) -> &[String] {
        &self.urls
    }

    /// What they are known by, and shown.
    #[must_use]
    pub const fn tls(&self) -> &ClientTls {
        &self.tls
    }

    /// Registers one instance, as [`Client::register`].
    ///
    /// # Errors
    /// When no server takes the call.
    pub async fn register(
        &self,
        namespace: &str,
        name: &str,
        spec: &InstanceSpec,
    ) -> Result<MutationResponse, ClientError> {
        self.mutate(Mutation::Register, namespace, name, spec).await
    }

    /// Removes instances, as [`Client::unregister`].
    ///
    /// # Errors
    /// When no server takes the call.
    pub async fn unregister(
        &self,
        namespace: &str,
        name: &str,
        spec: &InstanceSpec,
    ) -> Result<MutationResponse, ClientError> {
        self.mutate(Mutation::Unregister, namespace, name, spec).await
    }

    /// Calls the servers one after the other until one answers.
    ///
    /// # Errors
    /// When none answers, or one refuses for a reason that the others share.
    pub async fn read<T>(&self, call: impl AsyncFn(&mut Client) -> Result<T, ClientError>) -> Result<T, ClientError> {
        let mut attempts = Vec::new();
        for url in &self.urls {
            let called = async { call(&mut Client::connect(url, &self.tls).await?).await };
            match called.await {
                Err(err) if self.urls.len() > 1 && err.is_of_one_server() => {
                    attempts.push(Attempt { url: url.clone(), reason: innermost(&err) });
                }
                result => return result,
            }
        }
        Err(ClientError::NoneAnswered { attempts })
    }

    async fn mutate(
        &self,
        mutation: Mutation,
        namespace: &str,
        name: &str,
        spec: &InstanceSpec,
    ) -> Result<MutationResponse, ClientError> {
        let deadline = Instant::now() + self.patience;
        let mut backoff = Backoff::new(MIN_BACKOFF, MAX_BACKOFF);
        loop {
            let mut round = AttemptRound::default();
            if let Some(ended) = self.round(&mut round, deadline, mutation, namespace, name, spec).await {
                return ended;
            }
            let AttemptRound { attempts, refused, .. } = round;
            let pause = backoff.next_pause();
            // Where nobody answers at all, nobody will take over.
            if !refused || Instant::now() + pause >= deadline {
                return Err(ClientError::NoneAnswered { attempts });
            }
            sleep(pause).await;
        }
    }

    /// Asks each server once. Returns the result of the call unless another server may take it.
    async fn round(
        &self,
        round: &mut AttemptRound,
        deadline: Instant,
        mutation: Mutation,
        namespace: &str,
        name: &str,
        spec: &InstanceSpec,
    ) -> Option<Result<MutationResponse, ClientError>> {
        let mut pending: VecDeque<String> = self.urls.iter().cloned().collect();
        let mut asked = HashSet::new();
        while let Some(url) = pending.pop_front() {
            // Two hints may name one server, or a hint a server that was given.
            if !asked.insert(url.clone()) {
                continue;
            }
            let call = async {
                let mut client = Client::connect(&url, &self.tls).await?;
                match mutation {
                    Mutation::Register => client.register(namespace, name, spec).await,
                    Mutation::Unregister => client.unregister(namespace, name, spec).await,
                }
            };
            // A single server gets its whole timeout and its own error: there is nobody else to turn to.
            let alone = self.urls.len() == 1 && asked.len() == 1;
            let answered = if alone {
                call.await
            } else {
                let left = deadline.saturating_duration_since(Instant::now());
                let left = left.clamp(MIN_ATTEMPT_TIMEOUT, ATTEMPT_TIMEOUT);
                timeout(left, call).await.unwrap_or_else(|late| Err(ClientError::late(&url, late)))
            };
            let reason = match answered {
                // A single server that names nobody else has said all there is: its own words are the answer.
                Ok(response) if response.status == 503 && !(alone && response.writers.is_empty()) => {
                    round.refused = true;
                    // Reversed, because each is pushed to the front: they are asked in the order in which the server
                    // named them.
                    let writers = response.writers.iter().flat_map(|writer| urls_of(writer, &url, &self.tls));
                    for writer in writers.collect::<Vec<_>>().into_iter().rev() {
                        if round.hints.len() < MAX_HINTS && !asked.contains(&writer) {
                            round.hints.insert(writer.clone());
                            pending.push_front(writer);
                        }
                    }
                    response.details
                }
                Err(err) if !alone && err.is_of_one_server() => {
                    let may_need_tls = scheme(&url) == "http" && round.hints.contains(&url) && !is_loopback_ip(&url);
                    innermost(&err) + if may_need_tls { NEEDS_TLS } else { "" }
                }
                // Another URL may do. That one is what a refusal has named.
                Err(err @ ClientError::TokenInPlaintext { .. }) if round.hints.contains(&url) => {
                    err.to_string() + NEEDS_TLS
                }
                ended => return Some(ended),
            };
            round.attempts.push(Attempt { url, reason });
        }
        None
    }
}

/// Where a server may be reached that another one, at `url`, has named: what to try first comes first.
pub(super) fn urls_of(named: &ServerAddress, url: &str, tls: &ClientTls) -> Vec<String> {
    let (http, https) = (format!("http://{named}"), format!("https://{named}"));
    if scheme(url) == "https" {
        vec![https]
    } else if tls.config().is_none() || is_loopback_ip(&http) {
        vec![http]
    } else {
        vec![https, http]
    }
}

/// Whether this is the URL of a loopback address, at which a server speaks plaintext.
fn is_loopback_ip(url: &str) -> bool {
    let uri = url.parse::<Uri>().ok();
    let host = uri.as_ref().and_then(Uri::host).unwrap_or_default();
    host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// What to do about a server that does not answer in plaintext.
const NEEDS_TLS: &str = "; beyond loopback a gangplank speaks TLS, unless it runs with --insecure: give its CA with --cacert FILE, and \
                         --server https://HOST:PORT";

/// The scheme of a URL.
fn scheme(url: &str) -> &str {
    if url.starts_with("https:") { "https" } else { "http" }
}

/// The error and its innermost cause: hyper and tonic wrap the cause several times, and only the innermost is short.
pub(super) fn innermost(err: &dyn std::error::Error) -> String {
    let innermost = iter::successors(err.source(), |cause| cause.source()).last();
    innermost.map_or_else(|| err.to_string(), ToString::to_string)
}
