//! Clients that ask for `web.shop`, one question after the other, each from a socket of its own, and count.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RecordType},
};

const CLIENTS: usize = 2;
/// As long as glibc waits before it asks again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two questions of a client: the rest of the machine has to get something done, too.
const PAUSE: Duration = Duration::from_millis(2);

/// What the clients of one server saw.
#[derive(Debug, Default)]
pub(super) struct Seen {
    server: &'static str,
    answered: usize,
    /// No datagram within [`ANSWER_TIMEOUT`], or one that says that the port is closed.
    lost: usize,
    /// SERVFAIL: the client asks again, or another server.
    failed: usize,
    /// Any other answer than the address: also that the name does not exist.
    wrong: usize,
    slowest: Duration,
}

/// Running clients.
pub(super) struct Queries {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Seen>>,
}

/// What all clients saw.
pub(super) struct Totals(Vec<Seen>);

impl Queries {
    pub(super) fn start(servers: &[(&'static str, SocketAddr)]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let clients = servers.iter().flat_map(|&server| [server; CLIENTS]).map(|(name, address)| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || ask_until(&stop, name, address))
        });
        Self { clients: clients.collect(), stop }
    }

    pub(super) fn stop(self, during: &str) -> Totals {
        self.stop.store(true, Ordering::Relaxed);
        let mut totals: Vec<Seen> = Vec::new();
        for client in self.clients {
            let seen = client.join().expect("no client panics");
            match totals.iter_mut().find(|total| total.server == seen.server) {
                Some(total) => {
                    total.answered += seen.answered;
                    total.lost += seen.lost;
                    total.failed += seen.failed;
                    total.wrong += seen.wrong;
                    total.slowest = total.slowest.max(seen.slowest);
                }
                None => totals.push(seen),
            }
        }
        for Seen { server, answered, lost, failed, wrong, slowest } in &totals {
            println!(
                "{during}: {server}: {answered} answers, {lost} lost, {failed} SERVFAIL, {wrong} wrong, the slowest took {:.0} ms",
                slowest.as_secs_f64() * 1000.0
            );
        }
        Totals(totals)
    }
}

impl Totals {
    pub(super) fn assert_none_lost(&self) {
        self.assert_none_wrong();
        for Seen { server, lost, failed, .. } in &self.0 {
            assert_eq!((*lost, *failed), (0, 0), "lost, and SERVFAIL, of {server}");
        }
    }

    pub(super) fn assert_none_wrong(&self) {
        for Seen { server, answered, wrong, .. } in &self.0 {
            assert!(*answered > 20, "{server}: {answered} answers");
            assert_eq!(*wrong, 0, "wrong answers of {server}");
        }
    }
}

fn ask_until(stop: &AtomicBool, server: &'static str, address: SocketAddr) -> Seen {
    let mut seen = Seen { server, ..Seen::default() };
    let name = Name::from_ascii("web.shop.svc.cluster.local.").expect("a name");
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let mut question = Message::new(fastrand::u16(..), MessageType::Query, OpCode::Query);
        question.add_query(Query::query(name.clone(), RecordType::A));
        match exchange(address, &question.to_vec().expect("a question can be encoded")) {
            None => seen.lost += 1,
            Some(answer) => {
                let addresses: Vec<String> = answer.answers.iter().map(|record| record.data.to_string()).collect();
                match answer.response_code {
                    ResponseCode::NoError if addresses == ["10.250.1.2"] => seen.answered += 1,
                    ResponseCode::ServFail => seen.failed += 1,
                    code => {
                        println!("{server}: {code}: {addresses:?}");
                        seen.wrong += 1;
                    }
                }
            }
        }
        seen.slowest = seen.slowest.max(begun.elapsed());
        thread::park_timeout(PAUSE);
    }
    seen
}

fn exchange(server: SocketAddr, question: &[u8]) -> Option<Message> {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a free port");
    socket.set_read_timeout(Some(ANSWER_TIMEOUT)).expect("a timeout above zero");
    socket.connect(server).expect("there is a route");
    socket.send(question).ok()?;
    let mut octets = [0; 4096];
    let length = socket.recv(&mut octets).ok()?;
    Message::from_vec(&octets[..length]).ok()
}
