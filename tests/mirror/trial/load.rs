//! Registrants that say words to processes: half of them by unary calls, half by streams.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use fastrand::Rng;
use gangplank::grpc::proto::registry::{
    NamedPort, RegistrationMsg, RegistrationResponse, RegistrationType, ServiceInfo,
    service_registry_client::ServiceRegistryClient as Client,
};
use tokio::{
    runtime::Runtime,
    sync::{MutexGuard, mpsc},
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};

use super::words::{Attributes, Instance, PORT_NAMES, Promise, State, Target, Word, Words, place};

/// A paused process does not answer.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Words that a stream sends before it waits for the answers.
const MAX_PIPELINED: usize = 4;

/// A process that refuses is asked again after so many times the interval: it costs time that the others need.
const REFUSED_INTERVALS: usize = 4;

/// Who says how much.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// At each process at first.
    pub(super) registrants: usize,
    /// Of each registrant, at least.
    pub(super) interval: Duration,
    /// Whether a registrant that is refused goes on to the next process.
    pub(super) roams: bool,
}

/// Registrants that go on until they are joined.
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    registrants: Vec<JoinHandle<()>>,
}

pub(super) type SharedTarget = Arc<Mutex<Option<Target>>>;

impl Load {
    /// Starts registrants for each target, which go to whatever process is there. The same seed gives the same words.
    pub(super) fn start(
        words: &Arc<Words>,
        (namespace, targets): (&'static str, &[SharedTarget]),
        pace: Pace,
        seed: u64,
        runtime: &Runtime,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let registrant = |number: usize| {
            let registrant = Registrant {
                words: Arc::clone(words),
                namespace,
                streams: (number / targets.len()).is_multiple_of(2),
                rng: Rng::with_seed(seed.wrapping_add(number as u64)),
                connection: None,
            };
            let (targets, stop) = (targets.to_vec(), Arc::clone(&stop));
            runtime.spawn(registrant.run(targets, number, pace, stop))
        };
        let registrants = (0..targets.len() * pace.registrants).map(registrant).collect();
        Self { stop, registrants }
    }

    pub(super) fn join(self, runtime: &Runtime) {
        self.stop.store(true, SeqCst);
        for registrant in self.registrants {
            runtime.block_on(registrant).expect("no panic");
        }
    }
}

struct Connection {
    to: SocketAddr,
    client: Client<Channel>,
    stream: Option<(mpsc::Sender<RegistrationMsg>, Streaming<RegistrationResponse>)>,
}

/// A word that is about to be said.
type Draft<'w> = (usize, State, MutexGuard<'w, Instance>);

pub(super) struct Registrant {
    words: Arc<Words>,
    namespace: &'static str,
    streams: bool,
    rng: Rng,
    connection: Option<Connection>,
}

impl Registrant {
    /// One that uses unary calls, for single words.
    pub(super) fn new(words: &Arc<Words>, namespace: &'static str, seed: u64) -> Self {
        let (words, rng) = (Arc::clone(words), Rng::with_seed(seed));
        Self { words, namespace, streams: false, rng, connection: None }
    }

    async fn run(mut self, targets: Vec<SharedTarget>, mut at: usize, pace: Pace, stop: Arc<AtomicBool>) {
        let mut ticks = interval(pace.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut rest = 0;
        while !stop.load(SeqCst) {
            ticks.tick().await;
            if rest > 0 {
                rest -= 1;
                continue;
            }
            let count = if self.streams { self.rng.usize(1..=MAX_PIPELINED) } else { 1 };
            let draws: Vec<_> =
                (0..count).map(|_| (self.rng.usize(..self.words.instances.len()), self.draw())).collect();
            let target = *targets[at % targets.len()].lock().expect("no panic");
            let accepted = match target {
                Some(target) => self.say(target, &draws).await,
                None => false,
            };
            // As many words as unary calls would say.
            rest = if accepted { count - 1 } else { REFUSED_INTERVALS };
            if !accepted && pace.roams {
                (at, rest) = (at + 1, 0);
            }
        }
    }

    fn draw(&mut self) -> State {
        let priority = self.rng.u16(..);
        let attributes =
            Attributes { priority, weight: self.rng.u16(1..=600), port_name: PORT_NAMES[self.rng.usize(..2)] };
        self.rng.bool().then_some(attributes)
    }

    /// Says a word on one instance, drawn. Returns whether it was confirmed.
    pub(super) async fn one(&mut self, target: Target, index: usize) -> bool {
        let (before, state) = (self.words.promised(), self.draw());
        self.say(target, &[(index, state)]).await;
        self.words.promised() > before && self.words.instances[index].lock().await.is_confirmed()
    }

    /// Says these words, except those on an instance on which somebody else is about to say one. Returns false if none of them
    /// was taken.
    async fn say(&mut self, target: Target, draws: &[(usize, State)]) -> bool {
        let words = Arc::clone(&self.words);
        let free = |&(index, state): &(usize, State)| {
            let instance = words.instances[index].try_lock().ok()?;
            instance.is_free().then_some((index, state, instance))
        };
        let mut drafts: Vec<Draft<'_>> = draws.iter().filter_map(free).collect();
        if drafts.is_empty() {
            return true;
        }
        if self.connection.as_ref().is_none_or(|connection| connection.to != target.grpc) {
            self.connection = None;
            let endpoint = Endpoint::try_from(format!("http://{}", target.grpc)).expect("an address");
            let Ok(Ok(channel)) = timeout(TIMEOUT, endpoint.connect()).await else { return false };
            self.connection = Some(Connection { to: target.grpc, client: Client::new(channel), stream: None });
        }
        let said = Instant::now();
        let statuses = if self.streams { self.by_stream(&drafts).await } else { vec![self.by_call(&drafts[0]).await] };
        if statuses.contains(&None) {
            self.connection = None;
        }
        let answered = Instant::now();
        let mut taken = false;
        for ((_, state, instance), status) in drafts.iter_mut().zip(statuses) {
            let Some(promise) = words.note(state.is_some(), status) else { continue };
            taken |= promise != Promise::None;
            let (directory, apart) = (target.directory, words.apart());
            instance.add(Word { state: *state, promise, directory, said, answered, apart });
        }
        taken
    }

    /// The status; `None` without an answer.
    async fn by_call(&mut self, (index, state, _): &Draft<'_>) -> Option<u32> {
        let message = message(self.namespace, *index, *state);
        let info = ServiceInfo {
            namespace: message.namespace,
            service_name: message.service_name,
            ipaddress: message.ipaddress,
            ports: message.ports,
            weight: message.weight,
            priority: message.priority,
            ..ServiceInfo::default()
        };
        let client = &mut self.connection.as_mut()?.client;
        let call = async { if state.is_some() { client.register(info).await } else { client.un_register(info).await } };
        Some(timeout(TIMEOUT, call).await.ok()?.ok()?.into_inner().status)
    }

    /// A status for each word; `None` for those that the stream ended without.
    async fn by_stream(&mut self, drafts: &[Draft<'_>]) -> Vec<Option<u32>> {
        let mut statuses = vec![None; drafts.len()];
        let Some(connection) = self.connection.as_mut() else { return statuses };
        if connection.stream.is_none() {
            let (sender, messages) = mpsc::channel(MAX_PIPELINED);
            let opened = timeout(TIMEOUT, connection.client.registration_event(ReceiverStream::new(messages))).await;
            let Ok(Ok(opened)) = opened else { return statuses };
            connection.stream = Some((sender, opened.into_inner()));
        }
        let Some((sender, answers)) = connection.stream.as_mut() else { return statuses };
        for (index, state, _) in drafts {
            if sender.send(message(self.namespace, *index, *state)).await.is_err() {
                break;
            }
        }
        for status in &mut statuses {
            match timeout(TIMEOUT, answers.next()).await {
                Ok(Some(Ok(answer))) => *status = Some(answer.status),
                // It ended, or nobody answers.
                _ => break,
            }
        }
        statuses
    }
}

fn message(namespace: &str, index: usize, state: State) -> RegistrationMsg {
    let (service_name, ipaddress) = place(index);
    let kind = if state.is_some() { RegistrationType::Register } else { RegistrationType::Unregister };
    // A removal names the port by its number.
    let name = state.map_or(PORT_NAMES[0], |attributes| attributes.port_name);
    RegistrationMsg {
        r#type: kind.into(),
        namespace: namespace.into(),
        service_name,
        ipaddress,
        ports: vec![NamedPort { port: 8080, name: name.into(), ..NamedPort::default() }],
        weight: state.map(|attributes| f32::from(attributes.weight)),
        priority: state.map_or(0, |attributes| u32::from(attributes.priority)),
        ..RegistrationMsg::default()
    }
}
