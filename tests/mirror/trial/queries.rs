//! Queries at a steady rate, whose lost answers are counted.

use std::{
    collections::HashMap,
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{Name, RecordType},
};

use crate::mirror::dns_name;

/// An answer that takes longer is lost, as for a resolver that then asks another server.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Between two bursts.
const TICK: Duration = Duration::from_millis(2);

/// What became of the queries.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Answers {
    pub(super) asked: usize,
    pub(super) lost: usize,
    /// Answers that are not the one address.
    pub(super) wrong: usize,
    pub(super) slowest: Duration,
    pub(super) took: Duration,
}

/// Asks one server until it is ended.
pub(super) struct Queries {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Answers>,
}

impl Queries {
    /// For the service `first` of a namespace, which has one address; so many a second.
    pub(super) fn start(dns: SocketAddr, namespace: &str, per_second: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let name = Name::from_ascii(dns_name(namespace, "first")).expect("a name");
        let mut question = Message::new(0, MessageType::Query, OpCode::Query);
        question.add_query(Query::query(name, RecordType::A));
        let packet = question.to_vec().expect("a question can be encoded");
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || ask(dns, packet, per_second, &stopped));
        Self { stop, thread }
    }

    /// Waits for the last answers.
    pub(super) fn end(self) -> Answers {
        self.stop.store(true, SeqCst);
        self.thread.join().expect("no panic")
    }
}

fn ask(dns: SocketAddr, mut packet: Vec<u8>, per_second: u32, stop: &AtomicBool) -> Answers {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    socket.connect(dns).expect("loopback is there");
    socket.set_read_timeout(Some(TICK)).expect("a timeout above zero");
    let mut answers = Answers::default();
    let mut open: HashMap<u16, Instant> = HashMap::new();
    let (mut id, mut reply) = (0_u16, [0; 512]);
    let begun = Instant::now();
    loop {
        let stopped = stop.load(SeqCst);
        let due = begun.elapsed().as_secs_f64() * f64::from(per_second);
        while !stopped && (answers.asked as f64) < due {
            id = id.wrapping_add(1);
            packet[..2].copy_from_slice(&id.to_be_bytes());
            // An answer to the last use of this number is awaited for longer than the timeout.
            answers.lost += usize::from(open.insert(id, Instant::now()).is_some());
            answers.asked += 1;
            // A server that is gone refuses; the query is lost, then.
            let _ = socket.send(&packet);
            if answers.asked.is_multiple_of(32) {
                break;
            }
        }
        if !stopped {
            answers.took = begun.elapsed();
        }
        let until = Instant::now() + TICK;
        loop {
            match socket.recv(&mut reply) {
                Ok(octets) if octets >= 12 => {
                    let id = u16::from_be_bytes([reply[0], reply[1]]);
                    let Some(sent) = open.remove(&id) else { continue };
                    answers.slowest = answers.slowest.max(sent.elapsed());
                    // NOERROR, and one record.
                    answers.wrong += usize::from(reply[3] & 15 != 0 || reply[6..8] != [0, 1]);
                }
                Err(err) if matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
                Ok(_) | Err(_) => {}
            }
            if Instant::now() >= until {
                break;
            }
        }
        let before = open.len();
        if stopped || answers.asked.is_multiple_of(1024) {
            open.retain(|_, sent| sent.elapsed() < TIMEOUT);
        }
        answers.lost += before - open.len();
        if stopped && open.is_empty() {
            return answers;
        }
    }
}
