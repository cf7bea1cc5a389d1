//! A DNS server on loopback that answers as the test says, or answers wrong.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use hickory_proto::{
    op::{Message, MessageType, Query, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{CNAME, SOA},
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
    time::Instant,
};

/// Octets of a UDP answer that needs no TCP, as the question's EDNS says.
const MAX_UDP: usize = 1232;

/// How a question came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Over {
    Udp,
    Tcp,
}

/// A question that the server was asked.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) name: String,
    pub(super) kind: RecordType,
    pub(super) id: u16,
    pub(super) from: SocketAddr,
    pub(super) at: Instant,
}

/// What a server does with a question: the messages that it sends, in order. None is silence; over TCP the connection is
/// closed after the last one.
pub(super) type Reaction = Vec<Vec<u8>>;

type React = dyn FnMut(&Message, Over) -> Reaction + Send;

struct Shared {
    react: Mutex<Box<React>>,
    asked: Mutex<Vec<Asked>>,
    keeps_record: AtomicBool,
}

impl Shared {
    fn react(&self, octets: &[u8], over: Over, from: SocketAddr) -> Reaction {
        let question = Message::from_vec(octets).expect("a question of hickory");
        let query = question.queries.first().expect("with a question");
        let name = query.name().to_string();
        let asked = Asked { name, kind: query.query_type(), id: question.metadata.id, from, at: Instant::now() };
        if self.keeps_record.load(Ordering::Relaxed) {
            self.asked.lock().expect("no panic").push(asked);
        }
        (self.react.lock().expect("no panic"))(&question, over)
    }
}

pub(super) struct Server {
    pub(super) address: SocketAddr,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

impl Server {
    pub(super) async fn start(react: impl FnMut(&Message, Over) -> Reaction + Send + 'static) -> Self {
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("loopback");
            // The port may be taken for TCP.
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().expect("bound")).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().expect("bound");
        let shared =
            Arc::new(Shared { react: Mutex::new(Box::new(react)), asked: Mutex::default(), keeps_record: true.into() });
        let mut tasks = JoinSet::new();
        let state = Arc::clone(&shared);
        tasks.spawn(async move {
            let mut octets = [0; 2048];
            loop {
                let (len, from) = udp.recv_from(&mut octets).await.expect("a datagram");
                for answer in state.react(&octets[..len], Over::Udp, from) {
                    // The one who asked may be gone.
                    let _sent = udp.send_to(&answer, from).await;
                }
            }
        });
        let state = Arc::clone(&shared);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, from) = tcp.accept().await.expect("a connection");
                let state = Arc::clone(&state);
                connections.spawn(async move {
                    let _closed = answer_over_tcp(stream, from, &state).await;
                });
            }
        });
        Self { address, shared, _tasks: tasks }
    }

    /// Answers from `zone`, which the test may change.
    pub(super) async fn of(zone: &Arc<Mutex<Zone>>) -> Self {
        let zone = Arc::clone(zone);
        Self::start(move |question, over| zone.lock().expect("no panic").react(question, over)).await
    }

    /// From now on it reacts so.
    pub(super) fn set(&self, react: impl FnMut(&Message, Over) -> Reaction + Send + 'static) {
        *self.shared.react.lock().expect("no panic") = Box::new(react);
    }

    /// Forgets what it is asked from now on.
    pub(super) fn keep_no_record(&self) {
        self.shared.keeps_record.store(false, Ordering::Relaxed);
    }

    pub(super) fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().expect("no panic").clone()
    }
}

async fn answer_over_tcp(mut stream: TcpStream, from: SocketAddr, state: &Shared) -> std::io::Result<()> {
    let mut octets = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut octets).await?;
    for answer in state.react(&octets, Over::Tcp, from) {
        stream.write_u16(u16::try_from(answer.len()).expect("at most 64 KiB")).await?;
        stream.write_all(&answer).await?;
    }
    stream.shutdown().await
}

/// What names have.
#[derive(Debug, Clone, Default)]
pub(super) struct Zone {
    pub(super) records: Vec<Record>,
    /// Whether an answer follows aliases, as that of a resolver. An authoritative server gives the first only.
    pub(super) recursive: bool,
    /// Whether answers without records have a SOA record.
    pub(super) soa: bool,
}

impl Zone {
    pub(super) fn new(records: &[(&str, u32, &str)]) -> Self {
        let records = records.iter().map(|&(name, ttl, data)| record(name, ttl, data)).collect();
        Self { records, recursive: true, soa: true }
    }

    pub(super) fn shared(records: &[(&str, u32, &str)]) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self::new(records)))
    }

    /// The answer; truncated over UDP where it does not fit.
    pub(super) fn react(&self, question: &Message, over: Over) -> Reaction {
        let whole = self.answer(question);
        let octets = whole.to_vec().expect("it can be encoded");
        if over == Over::Udp && octets.len() > MAX_UDP {
            let mut truncated = reply(question);
            truncated.metadata.truncation = true;
            return vec![truncated.to_vec().expect("it can be encoded")];
        }
        vec![octets]
    }

    pub(super) fn answer(&self, question: &Message) -> Message {
        let query = &question.queries[0];
        let mut answer = reply(question);
        let mut name = query.name().clone();
        // A resolver gives up on a loop, too.
        for _ in 0..=30 {
            let at = |kind| self.records.iter().filter(move |one| one.record_type() == kind);
            let addresses = at(query.query_type()).filter(|one| one.name == name);
            let addresses: Vec<Record> = addresses.cloned().collect();
            let alias = at(RecordType::CNAME).find(|one| one.name == name);
            if let Some(alias) = alias {
                answer.answers.push(alias.clone());
                let RData::CNAME(target) = &alias.data else { unreachable!("by its type") };
                name = target.0.clone();
                if self.recursive {
                    continue;
                }
                return answer;
            }
            if addresses.is_empty() {
                if !self.records.iter().any(|one| one.name == name) {
                    answer.metadata.response_code = ResponseCode::NXDomain;
                }
                if self.soa {
                    let contact = Name::from_ascii("hostmaster.test.").expect("a name");
                    let soa = SOA::new(contact.clone(), contact, 1, 60, 60, 60, 30);
                    answer.authorities.push(Record::from_rdata(name.base_name(), 90, RData::SOA(soa)));
                }
            }
            answer.answers.extend(addresses);
            break;
        }
        answer
    }
}

pub(super) fn record(name: &str, ttl: u32, data: &str) -> Record {
    let data = match (data.parse::<Ipv4Addr>(), data.parse::<std::net::Ipv6Addr>()) {
        (Ok(v4), _) => RData::A(v4.into()),
        (_, Ok(v6)) => RData::AAAA(v6.into()),
        _ => RData::CNAME(CNAME(Name::from_ascii(data).expect("a name"))),
    };
    Record::from_rdata(Name::from_ascii(name).expect("a name"), ttl, data)
}

/// An empty answer, NOERROR.
pub(super) fn reply(question: &Message) -> Message {
    let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
    answer.metadata.message_type = MessageType::Response;
    answer.metadata.recursion_available = true;
    answer.add_queries(question.queries.iter().cloned());
    answer
}

/// An answer without records, with this response code.
pub(super) fn failing(question: &Message, code: ResponseCode) -> Reaction {
    let mut answer = reply(question);
    answer.metadata.response_code = code;
    vec![answer.to_vec().expect("it can be encoded")]
}

/// A good answer to another question.
pub(super) fn for_another_name(zone: &Zone, question: &Message) -> Vec<u8> {
    let mut answer = zone.answer(question);
    answer.queries = vec![Query::query(Name::from_ascii("other.test.").expect("a name"), RecordType::A)];
    answer.to_vec().expect("it can be encoded")
}
