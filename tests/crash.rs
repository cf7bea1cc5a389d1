//! Acknowledged registrations survive `kill -9`: nothing is lost, nothing comes back.
//!
//! Four streams register, update and remove instances of their own as fast as they can, and note
//! what was acknowledged. At a random number of acknowledgements the server is killed and started
//! again on the same directory. What it then serves must be, for every instance, what was last
//! acknowledged, or what one of the messages that were still unanswered asked for: nothing else.
//!
//! `GANGPLANK_CRASH_CYCLES` sets the number of cycles; `make crash` runs the long form.

use std::{
    collections::{HashMap, VecDeque},
    env,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
        mpsc as std_mpsc,
    },
    thread,
};

use gangplank::grpc::proto::{
    gangplank::v1::{ListServicesRequest, discovery_client::DiscoveryClient},
    registry::{NamedPort, RegistrationMsg, RegistrationType, service_registry_client::ServiceRegistryClient},
};
use hickory_proto::rr::RecordType;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};

use crate::support::{
    dns::{Over, answers},
    server::Server,
};

/// Cycles where nothing else is said: enough for CI.
const CYCLES: usize = 20;

const STREAMS: usize = 4;

/// Instances of one stream, over this many services.
const INSTANCES: usize = 60;
const SERVICES: usize = 6;

/// Messages of one stream that may be unanswered.
const WINDOW: usize = 256;

/// What an instance is: absent, or registered with this weight.
type State = Option<f32>;

/// What one stream knows of its instances.
#[derive(Debug)]
struct Ledger {
    /// As last acknowledged.
    acknowledged: Vec<State>,
    /// Sent, not answered, in order.
    unanswered: VecDeque<(usize, State)>,
}

impl Ledger {
    /// Every state in which `instance` may be found after a crash.
    fn allowed(&self, instance: usize) -> Vec<State> {
        let later = self.unanswered.iter().filter(|(which, _)| *which == instance).map(|(_, state)| *state);
        std::iter::once(self.acknowledged[instance]).chain(later).collect()
    }
}

fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().expect("no stream panics")
}

fn service(stream: usize, instance: usize) -> String {
    format!("s{stream}-{}", instance % SERVICES)
}

fn address(stream: usize, instance: usize) -> String {
    format!("10.{stream}.0.{instance}")
}

fn message(stream: usize, instance: usize, state: State) -> RegistrationMsg {
    let kind = if state.is_some() { RegistrationType::Register } else { RegistrationType::Unregister };
    RegistrationMsg {
        r#type: kind.into(),
        namespace: "crash".into(),
        service_name: service(stream, instance),
        ipaddress: address(stream, instance),
        ports: vec![NamedPort { port: 8080, name: "http".into(), ..NamedPort::default() }],
        weight: state,
        ..RegistrationMsg::default()
    }
}

/// Registers and removes at random until the server is gone.
async fn registrant(
    to: SocketAddr,
    stream: usize,
    ledger: Arc<Mutex<Ledger>>,
    count: Arc<AtomicUsize>,
    killer: std_mpsc::Sender<()>,
    after: usize,
) {
    let mut client = ServiceRegistryClient::connect(format!("http://{to}")).await.expect("it listens");
    let (sender, messages) = mpsc::channel(WINDOW);
    let mut answers = match client.registration_event(ReceiverStream::new(messages)).await {
        Ok(answers) => answers.into_inner(),
        // Killed by what the other streams had acknowledged.
        Err(_) => return,
    };
    let send = async {
        loop {
            let instance = fastrand::usize(..INSTANCES);
            let state = fastrand::bool().then(|| f32::from(fastrand::u16(1..=655)));
            // Noted before it is sent: what is sent may be carried out.
            lock(&ledger).unanswered.push_back((instance, state));
            if sender.send(message(stream, instance, state)).await.is_err() {
                return;
            }
        }
    };
    let receive = async {
        while let Some(Ok(answer)) = answers.next().await {
            let mut ledger = lock(&ledger);
            let (instance, state) = ledger.unanswered.pop_front().expect("one answer per message");
            let expected: &[u32] = if state.is_some() { &[200, 201] } else { &[204, 404] };
            assert!(expected.contains(&answer.status), "{answer:?}");
            ledger.acknowledged[instance] = state;
            drop(ledger);
            if count.fetch_add(1, Ordering::Relaxed) + 1 == after {
                killer.send(()).expect("the test waits for this");
            }
        }
    };
    tokio::select! { () = send => {} () = receive => {} }
}

/// Everything that the server says is registered, by address.
async fn registered(to: SocketAddr) -> HashMap<String, f32> {
    let mut client = DiscoveryClient::connect(format!("http://{to}")).await.expect("it listens");
    let request = ListServicesRequest { namespace: "crash".into() };
    let mut list = client.list_services(request).await.expect("it lists").into_inner();
    let mut found = HashMap::new();
    while let Some(answer) = list.next().await {
        for instance in answer.expect("the list goes on").service.expect("every answer has one").instances {
            assert_eq!(found.insert(instance.address, instance.weight), None, "an instance is listed once");
        }
    }
    found
}

/// Compares what is served with what may be, and takes it as the truth from now on.
fn check(cycle: usize, server: &Server, ledgers: &[Arc<Mutex<Ledger>>], runtime: &tokio::runtime::Runtime) {
    let found = runtime.block_on(registered(server.grpc));
    for (stream, ledger) in ledgers.iter().enumerate() {
        let mut ledger = lock(ledger);
        for instance in 0..INSTANCES {
            let address = address(stream, instance);
            let state = found.get(&address).copied();
            let allowed = ledger.allowed(instance);
            assert!(allowed.contains(&state), "cycle {cycle}: {address} is {state:?} and may be {allowed:?}");
            ledger.acknowledged[instance] = state;
        }
        ledger.unanswered.clear();
        for number in 0..SERVICES {
            let name = format!("{}.crash.svc.cluster.local.", service(stream, number));
            let mut expected: Vec<String> = (number..INSTANCES)
                .step_by(SERVICES)
                .filter(|instance| ledger.acknowledged[*instance].is_some())
                .map(|instance| address(stream, instance))
                .collect();
            expected.sort();
            assert_eq!(answers(server.dns, Over::Tcp, &name, RecordType::A), expected, "cycle {cycle}: {name}");
        }
    }
}

#[test]
fn acknowledged_registrations_survive_kill_9() {
    let cycles = env::var("GANGPLANK_CRASH_CYCLES").map_or(CYCLES, |text| text.parse().expect("a number of cycles"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let new = || Ledger { acknowledged: vec![None; INSTANCES], unanswered: VecDeque::new() };
    let ledgers: Vec<_> = (0..STREAMS).map(|_| Arc::new(Mutex::new(new()))).collect();
    // Small segments, so that the kill also meets rotations and compactions.
    let mut server = Server::start_with(&["--segment-octets", "65536"]);
    let mut acknowledged = 0;
    for cycle in 0..cycles {
        let after = fastrand::usize(1..20_000);
        let (killer, killed) = std_mpsc::channel();
        let count = Arc::new(AtomicUsize::new(0));
        let (to, streams) = (server.grpc, ledgers.clone());
        let load = thread::spawn({
            let (handle, count) = (runtime.handle().clone(), Arc::clone(&count));
            move || {
                handle.block_on(async {
                    let mut tasks = JoinSet::new();
                    for (stream, ledger) in streams.into_iter().enumerate() {
                        tasks.spawn(registrant(to, stream, ledger, Arc::clone(&count), killer.clone(), after));
                    }
                    while let Some(ended) = tasks.join_next().await {
                        ended.expect("no stream panics");
                    }
                });
            }
        });
        killed.recv().expect("the streams get that far");
        server.kill9();
        load.join().expect("no stream panics");
        acknowledged += count.load(Ordering::Relaxed);
        server = server.restart();
        check(cycle, &server, &ledgers, &runtime);
    }
    println!("{cycles} kills, {acknowledged} acknowledgements, 0 lost, 0 back");
}
