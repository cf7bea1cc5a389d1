//! What registrants said to several processes, and what may be registered after that.

use std::{
    collections::{BTreeSet, HashSet},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use fastrand::Rng;
use gangplank::grpc::proto::registry::{
    NamedPort, ServiceInfo, service_registry_client::ServiceRegistryClient as Client,
};
use tokio::{
    runtime::Runtime,
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};
use tonic::transport::{Channel, Endpoint};

pub(super) const SERVICES: usize = 4;

/// Instances of each service.
const INSTANCES: usize = 12;

/// For each process. Most of the time one waits for Kubernetes.
const REGISTRANTS: usize = 8;

/// Each registrant says a word this often, at most.
const INTERVAL: Duration = Duration::from_millis(4);

/// A paused process does not answer.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Between two words on an instance: they are stamped by different processes, in milliseconds.
const MIN_DISTANCE: Duration = Duration::from_millis(5);

/// Where a process takes words, and which data directory it has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Target {
    pub(super) grpc: SocketAddr,
    pub(super) directory: usize,
}

/// What an answer promises.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Promise {
    /// 200, 201, 204, 404: Kubernetes has it.
    Confirmed,
    /// 202: it counts as long as this data directory is not lost.
    Durable { directory: usize },
    /// There was no answer: it may count, at any later time.
    None,
}

#[derive(Debug)]
struct Word {
    registered: bool,
    promise: Promise,
}

/// The words on one instance, in order, from the last confirmed one on; and when the last was said.
#[derive(Debug, Default)]
struct Instance(Vec<Word>, Option<Instant>);

impl Instance {
    fn add(&mut self, registered: bool, promise: Promise) {
        if promise == Promise::Confirmed {
            self.0.retain(|word| word.promise == Promise::None);
        }
        self.0.push(Word { registered, promise });
    }

    /// The states that keep every promise.
    fn allowed(&self, lost: &HashSet<usize>) -> BTreeSet<bool> {
        let unanswered = self.0.iter().filter(|word| word.promise == Promise::None).map(|word| word.registered);
        let mut allowed: BTreeSet<bool> = unanswered.collect();
        for word in self.0.iter().rev() {
            match word.promise {
                Promise::None => {}
                Promise::Durable { directory } if lost.contains(&directory) => drop(allowed.insert(word.registered)),
                Promise::Durable { .. } | Promise::Confirmed => {
                    allowed.insert(word.registered);
                    return allowed;
                }
            }
        }
        allowed.insert(false);
        allowed
    }
}

/// All words.
#[derive(Debug)]
pub(super) struct Words {
    instances: Vec<tokio::sync::Mutex<Instance>>,
    /// Directories that do not exist any more, or went back to an older copy.
    lost: Mutex<HashSet<usize>>,
    answered: AtomicUsize,
    durable: AtomicUsize,
    /// When the last word was answered with a promise, and the longest time between two of them.
    gap: Mutex<(Option<Instant>, Duration)>,
}

/// Registrants that go on until they are joined.
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    registrants: Vec<JoinHandle<()>>,
}

impl Load {
    pub(super) fn join(self, runtime: &Runtime) {
        self.stop.store(true, SeqCst);
        for registrant in self.registrants {
            runtime.block_on(registrant).expect("no panic");
        }
    }
}

fn place(index: usize) -> (String, String) {
    let (service, instance) = (index % SERVICES, index / SERVICES);
    (format!("s{service}"), format!("10.200.{service}.{}", instance + 1))
}

impl Words {
    pub(super) fn new() -> Self {
        let instances = (0..SERVICES * INSTANCES).map(|_| tokio::sync::Mutex::default()).collect();
        let (answered, durable) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self { instances, lost: Mutex::default(), answered, durable, gap: Mutex::default() }
    }

    pub(super) fn lose(&self, directory: usize) {
        self.lost.lock().expect("no panic").insert(directory);
    }

    /// Words that were answered with a promise; and those with 202.
    pub(super) fn answered(&self) -> (usize, usize) {
        (self.answered.load(SeqCst), self.durable.load(SeqCst))
    }

    /// The longest time between two answers with a promise since the last call, whoever gave them.
    pub(super) fn take_gap(&self) -> Duration {
        std::mem::take(&mut self.gap.lock().expect("no panic").1)
    }

    /// Registrants for each target, which go to whatever process is there.
    pub(super) fn run(
        self: &Arc<Self>,
        namespace: &'static str,
        targets: &[Arc<Mutex<Option<Target>>>],
        runtime: &Runtime,
    ) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let registrant = |target: &Arc<Mutex<Option<Target>>>| {
            let (words, target, stop) = (Arc::clone(self), Arc::clone(target), Arc::clone(&stop));
            let mut rng = Rng::with_seed(fastrand::u64(..));
            runtime.spawn(async move {
                let mut ticks = interval(INTERVAL);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                let mut client = None;
                while !stop.load(SeqCst) {
                    ticks.tick().await;
                    let Some(target) = *target.lock().expect("no panic") else { continue };
                    words.one(namespace, target, rng.usize(..words.instances.len()), rng.bool(), &mut client).await;
                }
            })
        };
        let registrants = targets.iter().cycle().take(targets.len() * REGISTRANTS).map(registrant).collect();
        Load { stop, registrants }
    }

    /// Says one word, unless another registrant is about to say one on this instance. Returns whether it was confirmed.
    async fn one(
        &self,
        namespace: &str,
        target: Target,
        index: usize,
        registered: bool,
        client: &mut Option<(SocketAddr, Client<Channel>)>,
    ) -> bool {
        let Ok(mut instance) = self.instances[index].try_lock() else { return false };
        if instance.1.is_some_and(|last| last.elapsed() < MIN_DISTANCE) {
            return false;
        }
        if client.as_ref().is_none_or(|(to, _)| *to != target.grpc) {
            let endpoint = Endpoint::try_from(format!("http://{}", target.grpc)).expect("an address");
            let Ok(Ok(channel)) = timeout(TIMEOUT, endpoint.connect()).await else { return false };
            *client = Some((target.grpc, Client::new(channel)));
        }
        let Some((_, connected)) = client else { return false };
        let (service_name, ipaddress) = place(index);
        let info = ServiceInfo {
            namespace: namespace.into(),
            service_name,
            ipaddress,
            ports: vec![NamedPort { port: 8080, name: "http".into(), ..NamedPort::default() }],
            ..ServiceInfo::default()
        };
        let call =
            async { if registered { connected.register(info).await } else { connected.un_register(info).await } };
        let answer = timeout(TIMEOUT, call).await;
        instance.1 = Some(Instant::now());
        let promise = match answer {
            Ok(Ok(result)) => match result.into_inner().status {
                200 | 201 | 204 | 404 => Promise::Confirmed,
                202 => Promise::Durable { directory: target.directory },
                _ => return false,
            },
            Ok(Err(_)) | Err(_) => {
                *client = None;
                Promise::None
            }
        };
        instance.add(registered, promise);
        if promise != Promise::None {
            self.answered.fetch_add(1, SeqCst);
            let mut gap = self.gap.lock().expect("no panic");
            let before = gap.0.replace(Instant::now());
            gap.1 = gap.1.max(before.map_or(Duration::ZERO, |before| before.elapsed()));
        }
        self.durable.fetch_add(usize::from(matches!(promise, Promise::Durable { .. })), SeqCst);
        promise == Promise::Confirmed
    }

    /// Compares the addresses of the services with what was promised. Returns what is wrong.
    pub(super) fn check(&self, found: &[BTreeSet<String>], runtime: &Runtime) -> Vec<String> {
        let lost = self.lost.lock().expect("no panic");
        let mut wrong = Vec::new();
        for (index, instance) in self.instances.iter().enumerate() {
            let instance = runtime.block_on(instance.lock());
            let (service, address) = place(index);
            let is_found = found[index % SERVICES].contains(&address);
            if !instance.allowed(&lost).contains(&is_found) {
                wrong.push(format!("{service} {address} is found: {is_found}; {:?}", instance.0));
            }
        }
        wrong
    }

    /// Says another word on each instance with a word that was never answered, so that its state is known again. Returns whether all
    /// are.
    pub(super) fn settle(&self, namespace: &str, writer: Target, runtime: &Runtime) -> bool {
        let mut client = None;
        let mut settled = true;
        for index in 0..self.instances.len() {
            let open = |instance: &Instance| instance.0.iter().any(|word| word.promise == Promise::None);
            if runtime.block_on(async { open(&*self.instances[index].lock().await) }) {
                let confirmed = runtime.block_on(self.one(namespace, writer, index, fastrand::bool(), &mut client));
                if confirmed {
                    let mut instance = runtime.block_on(self.instances[index].lock());
                    instance.0.retain(|word| word.promise != Promise::None);
                }
                settled &= confirmed;
            }
        }
        settled
    }
}
