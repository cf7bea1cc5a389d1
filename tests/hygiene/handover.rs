//! Strangers on the RPCs that processes of one gangplank use among themselves, `HandOver.Send` and `Discovery.GetReplica`:
//! they take no memory, delay no registrant, and keep no true hand-over out.
//!
//! The strangers come from 127.0.0.2, all others from 127.0.0.1.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use gangplank::grpc::proto::{
    gangplank::{
        internal::v1::{HandOverRequest, Stamp, Word},
        v1::GetReplicaRequest,
    },
    registry::RegistrationType,
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{ALL, DEFAULT_WINDOW, MIB, NO_WINDOW, Peer, Target, framed, runtime, sized};
use crate::{
    mirror::ClusterLock,
    support::{
        http,
        proxy::{Fault, Proxy},
        server::{Process, Server},
        stream::{Stream, message},
        wait_until,
    },
};

const SEND: &str = "/gangplank.internal.v1.HandOver/Send";
const GET_REPLICA: &str = "/gangplank.v1.Discovery/GetReplica";

const STRANGERS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// Of the strangers' words, and of a registrant beside them.
const NAMESPACE: &str = "attacked";

/// Of the word that is truly handed over.
const HANDED_OVER: &str = "handed-over";

/// Words of the largest request.
const WORDS: u64 = 256;

/// What a stranger does with its calls, one after the other on a connection.
#[derive(Debug, Clone, Copy)]
enum Stranger {
    /// Words that count, each new, and every answer is read.
    Words,
    /// The same words; answers are not read, and calls are reset.
    Reset,
    /// The largest message, of words without content.
    Empty,
    /// The begin of the largest message, which never ends.
    Endless,
    /// Questions for the state of the process, whose answers are not read.
    Replica,
}

const KINDS: [Stranger; 5] = [Stranger::Words, Stranger::Reset, Stranger::Empty, Stranger::Endless, Stranger::Replica];

/// As many valid words as a request may have, each on an instance of a service of its own, and never the same twice.
fn words(next: &AtomicU64) -> Bytes {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_micros();
    let clock = u64::try_from(clock).expect("not that late");
    let words = (0..WORDS).map(|n| {
        let generation = next.fetch_add(1, Ordering::Relaxed);
        Word {
            message: Some(Box::new(message(RegistrationType::Register, NAMESPACE, &format!("s{n}"), "10.20.0.1"))),
            stamp: Some(Stamp { clock, term: 1, generation }),
            registered_millis: 1,
            every_port: false,
            registrant: String::new(),
        }
    });
    framed([&HandOverRequest { words: words.collect(), wait_millis: 2000 }])
}

/// A message of as many octets as one may have, all of them empty words.
fn empty_words() -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put_u8(0);
    bytes.put_u32(64 * 1024);
    // Field 1, of length 0.
    (0..32 * 1024).for_each(|_| bytes.put_slice(&[0x0a, 0]));
    bytes.freeze()
}

/// One connection after the other, until `stop`.
async fn attack(kind: Stranger, to: SocketAddr, next: Arc<AtomicU64>, stop: CancellationToken) {
    let empty = empty_words();
    while !stop.is_cancelled() {
        let window = if matches!(kind, Stranger::Replica | Stranger::Reset) { NO_WINDOW } else { DEFAULT_WINDOW };
        let mut peer = Peer::connect_from(STRANGERS, to, window).await;
        for _ in 0..10_000 {
            if stop.is_cancelled() {
                return;
            }
            let began = match kind {
                Stranger::Words | Stranger::Reset => peer.call(SEND, words(&next), true).await,
                Stranger::Empty => peer.call(SEND, empty.clone(), true).await,
                Stranger::Endless => peer.call(SEND, empty.slice(..60_000), false).await,
                Stranger::Replica => peer.call(GET_REPLICA, framed([&GetReplicaRequest::default()]), true).await,
            };
            if !began {
                break;
            }
            match kind {
                Stranger::Words => {
                    if !peer.answered().await {
                        break;
                    }
                    peer.calls.clear();
                }
                // Late enough for the server to have begun it.
                Stranger::Reset => {
                    peer.drive(Duration::from_millis(2)).await;
                    peer.calls.clear();
                }
                Stranger::Empty | Stranger::Endless | Stranger::Replica => {
                    peer.drive(Duration::from_millis(1)).await;
                    if peer.calls.len() >= 150 {
                        peer.calls.clear();
                    }
                }
            }
        }
    }
}

/// How long a registrant waits for each of so many answers, sorted.
fn latencies(target: &Target, service: &str) -> Vec<Duration> {
    let mut stream = Stream::open(target.server.grpc);
    let mut took: Vec<Duration> = (0..sized(50, 500))
        .map(|n| {
            let address = format!("10.21.{}.{}", n >> 8, n & 255);
            let (status, took) = stream.register(NAMESPACE, service, &address);
            assert!(matches!(status, 201 | 202), "{status}");
            took
        })
        .collect();
    took.sort_unstable();
    took
}

/// A directory with one word that Kubernetes lacks.
fn directory_with_a_word(lock: &ClusterLock) -> tempfile::TempDir {
    let proxy = Proxy::start(lock.cluster);
    let server = Server::start_with(&["--kubeconfig", proxy.kubeconfig().to_str().expect("a path in UTF-8")]);
    let mut stream = Stream::open(server.grpc);
    wait_until("the namespace is known", || (stream.register(HANDED_OVER, "web", "10.22.0.1").0 != 404).then_some(()));
    proxy.inject(Fault::Drop, |call| call.resource == "endpointslices" && call.is_write());
    assert_eq!(stream.register(HANDED_OVER, "web", "10.22.0.2").0, 202);
    server.into_data()
}

#[test]
fn strangers_on_the_rpcs_of_replicas_keep_no_hand_over_out() {
    let Some(lock) = ClusterLock::take() else { return };
    [NAMESPACE, HANDED_OVER].into_iter().for_each(|name| lock.cluster.create_namespace(name));
    let data = directory_with_a_word(&lock);
    let kubeconfig = lock.cluster.kubeconfig_for_gangplank();
    let flags = ["--kubeconfig", kubeconfig.to_str().expect("a path in UTF-8")];
    let target = Target::of(Server::start_with(&flags));
    let at = |took: &[Duration], percent: usize| took[(took.len() - 1) * percent / 100];
    let idle = latencies(&target, "idle");
    println!("idle: p50 {:.2?}, p99 {:.2?}", at(&idle, 50), at(&idle, 99));

    let next = Arc::new(AtomicU64::new(1));
    let each = sized(2, 20);
    for kind in KINDS {
        let (stop, runtime) = (CancellationToken::new(), runtime());
        let mut strangers = JoinSet::new();
        let (to, handle) = (target.server.grpc, runtime.handle().clone());
        for _ in 0..each {
            strangers.spawn_on(attack(kind, to, Arc::clone(&next), stop.clone()), &handle);
        }
        let attacked = latencies(&target, &format!("{kind:?}").to_lowercase());
        println!(
            "{kind:?} from {each} connections: p50 {:.2?}, p99 {:.2?}, ÷ idle {:.1} and {:.1}; peak +{} MiB",
            at(&attacked, 50),
            at(&attacked, 99),
            at(&attacked, 50).as_secs_f64() / at(&idle, 50).as_secs_f64(),
            at(&attacked, 99).as_secs_f64() / at(&idle, 99).as_secs_f64(),
            target.peak_above_rest() / MIB,
        );
        stop.cancel();
        runtime.block_on(strangers.join_all());
        target.wait_metric("gangplank_mirror_services_behind", |behind| behind == 0.0);
    }

    // All at once, and a process that has something to hand over.
    let (stop, runtime) = (CancellationToken::new(), runtime());
    let strangers: JoinSet<()> = {
        let mut strangers = JoinSet::new();
        for kind in KINDS {
            for _ in 0..each {
                strangers.spawn_on(attack(kind, target.server.grpc, Arc::clone(&next), stop.clone()), runtime.handle());
            }
        }
        strangers
    };
    let begun = Instant::now();
    let sender = Process::serve(data.path(), &flags);
    let [_, _, admin] = sender.listening();
    wait_until("nothing is left to hand over", || {
        let (_, text) = http::get(admin, "/metrics");
        let count = |series: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
            value.map_or(0.0, |value| value.parse::<f64>().expect("a number"))
        };
        (count("gangplank_registry_handed_over_words_total{result=\"confirmed\"}") >= 1.0
            && count("gangplank_registry_outbox_words") == 0.0)
            .then_some(())
    });
    println!(
        "handed over {:.1?} after the start, beside {} connections of strangers",
        begun.elapsed(),
        strangers.len()
    );
    stop.cancel();
    runtime.block_on(strangers.join_all());
    target.wait_metric("gangplank_grpc_buffered_bytes", |bytes| bytes < 4096.0);
    let peak = target.peak_above_rest();
    println!("peak +{} MiB in all", peak / MIB);
    assert!(peak <= ALL * MIB, "{} MiB above rest", peak / MIB);
}
