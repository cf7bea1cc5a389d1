//! Clients under load that record what was acknowledged.
//!
//! Four streams register, update and remove instances of their own as fast as they can. Each records
//! a message before it sends it, and each acknowledgement. After a crash the server must serve, for
//! every instance, the state that was last acknowledged, or the state of a message that was still
//! unanswered, and nothing else.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
};

use gangplank::grpc::proto::{
    gangplank::v1::{ListServicesRequest, discovery_client::DiscoveryClient},
    registry::{NamedPort, RegistrationMsg, RegistrationType, service_registry_client::ServiceRegistryClient},
};
use hickory_proto::rr::RecordType;
use tokio::{
    runtime::{Builder, Handle, Runtime},
    sync::mpsc,
    task::JoinSet,
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};

use super::{
    dns::{Over, answers},
    server::Server,
    wait_until,
};

const STREAMS: usize = 4;

/// Instances of one stream, over this many services.
const INSTANCES: usize = 60;
const SERVICES: usize = 6;

/// Messages of one stream that may be unanswered.
const WINDOW: usize = 256;

/// Absent, or registered with this weight.
type InstanceState = Option<f32>;

/// The instances of one stream.
#[derive(Debug)]
struct Ledger {
    /// As last acknowledged.
    acknowledged: Vec<InstanceState>,
    /// Sent, not answered, in order.
    unanswered: VecDeque<(usize, InstanceState)>,
}

impl Ledger {
    fn new() -> Self {
        Self { acknowledged: vec![None; INSTANCES], unanswered: VecDeque::new() }
    }

    /// Every state in which `instance` may be found after a crash.
    fn allowed(&self, instance: usize) -> Vec<InstanceState> {
        let later = self.unanswered.iter().filter(|(which, _)| *which == instance).map(|(_, state)| *state);
        std::iter::once(self.acknowledged[instance]).chain(later).collect()
    }
}

fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().expect("no stream panics")
}

/// All clients, in a namespace of their own.
pub(crate) struct Clients {
    namespace: &'static str,
    mirrored: bool,
    runtime: Runtime,
    ledgers: Vec<Arc<Mutex<Ledger>>>,
}

impl Clients {
    /// `mirrored` says whether 202 is an answer: durable and served, and not in Kubernetes yet.
    pub(crate) fn new(namespace: &'static str, mirrored: bool) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
        let ledgers = (0..STREAMS).map(|_| Arc::new(Mutex::new(Ledger::new()))).collect();
        Self { namespace, mirrored, runtime, ledgers }
    }

    /// Runs all of them against a server, until it is gone or [`Load::stop`] is called.
    pub(crate) fn run(&self, to: SocketAddr) -> Load {
        let shared = Arc::new(LoadCounters::default());
        let (namespace, mirrored, ledgers) = (self.namespace, self.mirrored, self.ledgers.clone());
        let (handle, counted): (Handle, _) = (self.runtime.handle().clone(), Arc::clone(&shared));
        let thread = thread::spawn(move || {
            handle.block_on(async {
                let mut tasks = JoinSet::new();
                for (number, ledger) in ledgers.into_iter().enumerate() {
                    let shared = Arc::clone(&counted);
                    tasks.spawn(Registrant { namespace, mirrored, number, ledger, shared }.run(to));
                }
                while let Some(ended) = tasks.join_next().await {
                    ended.expect("no stream panics");
                }
            });
        });
        Load { shared, thread }
    }

    /// Compares what is served with the allowed states, and takes it as acknowledged from now on.
    pub(crate) fn check(&self, when: &str, server: &Server) {
        let found = self.runtime.block_on(registered(server.grpc, self.namespace));
        for (stream, ledger) in self.ledgers.iter().enumerate() {
            let mut ledger = lock(ledger);
            for instance in 0..INSTANCES {
                let address = address(stream, instance);
                let state = found.get(&address).copied();
                let allowed = ledger.allowed(instance);
                assert!(allowed.contains(&state), "{when}: {address} is {state:?} and may be {allowed:?}");
                ledger.acknowledged[instance] = state;
            }
            ledger.unanswered.clear();
        }
        for (service, expected) in self.addresses() {
            let name = format!("{service}.{}.svc.cluster.local.", self.namespace);
            assert_eq!(answers(server.dns, Over::Tcp, &name, RecordType::A), expected, "{when}: {name}");
        }
    }

    /// The addresses of every service as acknowledged, sorted; none is left out.
    pub(crate) fn addresses(&self) -> BTreeMap<String, Vec<String>> {
        let mut all = BTreeMap::new();
        for (stream, ledger) in self.ledgers.iter().enumerate() {
            let ledger = lock(ledger);
            for instance in 0..INSTANCES {
                let addresses: &mut Vec<String> = all.entry(service(stream, instance)).or_default();
                addresses.extend(ledger.acknowledged[instance].map(|_| address(stream, instance)));
            }
        }
        all.values_mut().for_each(|addresses| addresses.sort());
        all
    }

    /// Whether `found`, addresses by service without those that have none, is what was acknowledged.
    pub(crate) fn agree_with(&self, found: &BTreeMap<String, Vec<String>>) -> Option<()> {
        let is_ours = |service: &str| service.starts_with('s');
        let wanted = self.addresses();
        let wanted = wanted.iter().filter(|(_, addresses)| !addresses.is_empty());
        wanted.eq(found.iter().filter(|(service, _)| is_ours(service))).then_some(())
    }
}

/// Clients at work.
pub(crate) struct Load {
    shared: Arc<LoadCounters>,
    thread: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct LoadCounters {
    acknowledged: AtomicUsize,
    /// Of these, with 202.
    accepted: AtomicUsize,
    stop: AtomicBool,
}

impl Load {
    /// Waits until so many were acknowledged.
    pub(crate) fn wait_acknowledged(&self, count: usize) {
        wait_until(&format!("{count} acknowledgements"), || {
            (self.shared.acknowledged.load(SeqCst) >= count).then_some(())
        });
    }

    /// Waits until something more was acknowledged that Kubernetes does not have.
    pub(crate) fn wait_accepted(&self) {
        let before = self.shared.accepted.load(SeqCst);
        wait_until("an answer 202", || (self.shared.accepted.load(SeqCst) > before).then_some(()));
    }

    /// Stops sending, and waits for the answers to everything that was sent. Returns how much
    /// was acknowledged.
    pub(crate) fn stop(self) -> usize {
        self.shared.stop.store(true, SeqCst);
        self.join()
    }

    /// Waits until every stream has ended because the server has. Returns how much was acknowledged.
    pub(crate) fn join(self) -> usize {
        self.thread.join().expect("no stream panics");
        self.shared.acknowledged.load(SeqCst)
    }
}

fn service(stream: usize, instance: usize) -> String {
    format!("s{stream}-{}", instance % SERVICES)
}

fn address(stream: usize, instance: usize) -> String {
    format!("10.{stream}.0.{instance}")
}

/// One stream.
struct Registrant {
    namespace: &'static str,
    mirrored: bool,
    number: usize,
    ledger: Arc<Mutex<Ledger>>,
    shared: Arc<LoadCounters>,
}

impl Registrant {
    /// Registers and removes at random until the server is gone, or it was told to stop and all is answered.
    async fn run(self, to: SocketAddr) {
        // The server may be killed before this stream connects.
        let Ok(mut client) = ServiceRegistryClient::connect(format!("http://{to}")).await else { return };
        let (sender, messages) = mpsc::channel(WINDOW);
        let Ok(answers) = client.registration_event(ReceiverStream::new(messages)).await else { return };
        let mut answers = answers.into_inner();
        let send = async {
            while !self.shared.stop.load(SeqCst) {
                // Recorded once there is room to send, and before sending: a message that was sent may be committed.
                let Ok(permit) = sender.reserve().await else { return };
                let instance = fastrand::usize(..INSTANCES);
                let state = fastrand::bool().then(|| f32::from(fastrand::u16(1..=655)));
                lock(&self.ledger).unanswered.push_back((instance, state));
                permit.send(self.message(instance, state));
            }
            drop(sender);
        };
        let receive = async {
            while let Some(Ok(answer)) = answers.next().await {
                let mut ledger = lock(&self.ledger);
                let (instance, state) = ledger.unanswered.pop_front().expect("one answer per message");
                let expected: &[u32] = if state.is_some() { &[200, 201] } else { &[204, 404] };
                let accepted = self.mirrored && answer.status == 202;
                assert!(accepted || expected.contains(&answer.status), "{answer:?}");
                ledger.acknowledged[instance] = state;
                drop(ledger);
                self.shared.accepted.fetch_add(usize::from(accepted), SeqCst);
                self.shared.acknowledged.fetch_add(1, SeqCst);
            }
        };
        // The end of the answers ends the stream: the server is gone, or has answered everything.
        let send = async {
            send.await;
            std::future::pending::<()>().await;
        };
        tokio::select! { () = send => {} () = receive => {} }
    }

    fn message(&self, instance: usize, state: InstanceState) -> RegistrationMsg {
        let kind = if state.is_some() { RegistrationType::Register } else { RegistrationType::Unregister };
        RegistrationMsg {
            r#type: kind.into(),
            namespace: self.namespace.into(),
            service_name: service(self.number, instance),
            ipaddress: address(self.number, instance),
            ports: vec![NamedPort { port: 8080, name: "http".into(), ..NamedPort::default() }],
            weight: state,
            ..RegistrationMsg::default()
        }
    }
}

/// Everything that the server says is registered in a namespace, by address.
async fn registered(to: SocketAddr, namespace: &str) -> HashMap<String, f32> {
    let mut client = DiscoveryClient::connect(format!("http://{to}")).await.expect("it listens");
    let request = ListServicesRequest { namespace: namespace.into() };
    let mut list = client.list_services(request).await.expect("it lists").into_inner();
    let mut found = HashMap::new();
    while let Some(answer) = list.next().await {
        for instance in answer.expect("the list goes on").service.expect("every answer has one").instances {
            assert_eq!(found.insert(instance.address, instance.weight), None, "an instance is listed once");
        }
    }
    found
}
