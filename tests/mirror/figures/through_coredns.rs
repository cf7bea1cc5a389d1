//! gangplank through CoreDNS, as pods ask it, beside CoreDNS' kubernetes plugin on the slices that gangplank writes: questions
//! a second, CPU time of both, and from the acknowledgement of a registration until it is answered.

use std::{
    net::{SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, Query},
    rr::{Name, RecordType},
};

use super::{load::median, percentiles, rounds, seen};
use crate::{
    mirror::{make_namespace, serve_by},
    support::{
        WAIT_TIMEOUT,
        cluster::{CONTEXT, Cluster},
        coredns::CoreDns,
        cpu_seconds,
        stream::Stream,
        tools,
    },
};

/// Clients that ask at once, each one question after the other.
const CLIENTS: usize = 4;

/// Questions of each client, for each round.
const QUESTIONS_PER_ROUND: usize = 100;

const TURNS: usize = 3;

#[test]
fn questions_and_registrations_through_coredns() {
    let Some(program) = tools::require("coredns") else { return };
    let Some(cluster) = Cluster::private() else { return };
    let server = serve_by(&cluster.kubeconfig_for_gangplank(), &[]);
    let mut stream = Stream::open(server.grpc);
    make_namespace(&cluster, &mut stream, "figures");
    let dns = server.dns.to_string();
    let printed = server.run(&["coredns", "--wiring", "stub-domain", "-n", "figures", "--server", &dns]).stdout;
    let front = CoreDns::start(&program, &String::from_utf8(printed).expect("UTF-8"));
    let plugin = CoreDns::with_kubernetes(&program, &cluster.kubeconfig_admin(), CONTEXT);
    for asked in [front.address, plugin.address] {
        seen(asked, "first", "10.9.9.9", Instant::now());
    }

    let ways = [
        ("gangplank alone", server.dns, vec![server.pid()]),
        ("CoreDNS, then gangplank", front.address, vec![front.pid(), server.pid()]),
        ("CoreDNS' kubernetes plugin", plugin.address, vec![plugin.pid()]),
    ];
    let mut rates = [const { Vec::new() }; 3];
    let mut cpu = [const { Vec::new() }; 3];
    for turn in 0..TURNS * ways.len() {
        let which = turn % ways.len();
        let (_, address, processes) = &ways[which];
        let used = || processes.iter().map(|pid| cpu_seconds(*pid)).sum::<f64>();
        let before = used();
        let questions = (CLIENTS * QUESTIONS_PER_ROUND * rounds()) as f64;
        rates[which].push(questions / ask_all(*address, QUESTIONS_PER_ROUND * rounds()).as_secs_f64());
        cpu[which].push((used() - before) / questions * 1e6);
    }
    let (rates, cpu) = (rates.map(median), cpu.map(median));
    for (((name, ..), rate), cpu) in ways.iter().zip(rates).zip(cpu) {
        println!("{name}: {rate:.0} questions a second, {cpu:.0} µs of CPU each");
    }
    println!(
        "through CoreDNS ÷ its kubernetes plugin: {:.2} questions, {:.2} CPU",
        rates[1] / rates[2],
        cpu[1] / cpu[2]
    );

    // One at a time, in turns: whoever is asked has the machine for itself.
    let mut times = [const { Vec::new() }; 2];
    for round in 0..2 * rounds() {
        let (service, address) = (format!("seen-{round}"), format!("10.52.{}.{}", round / 250, round % 250));
        let (status, _) = stream.register("figures", &service, &address);
        let acknowledged = Instant::now();
        assert!(matches!(status, 201 | 202), "{status}");
        let asked = [front.address, plugin.address][round % 2];
        times[round % 2].push(seen(asked, &service, &address, acknowledged));
    }
    let [ours, theirs] = times;
    percentiles("acknowledged, then answered through CoreDNS", ours);
    percentiles("acknowledged, then answered by CoreDNS from the slice", theirs);
}

/// All clients ask for the first service. Returns how long they took.
fn ask_all(server: SocketAddr, questions: usize) -> Duration {
    let mut question = Message::query();
    question
        .add_query(Query::query(Name::from_ascii("first.figures.svc.cluster.local.").expect("a name"), RecordType::A));
    let question = question.to_vec().expect("a question");
    let begun = Instant::now();
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
                socket.connect(server).expect("an address");
                socket.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a timeout above zero");
                let mut answer = [0; 512];
                for _ in 0..questions {
                    socket.send(&question).expect("it listens");
                    let octets = socket.recv(&mut answer).expect("an answer");
                    assert!(octets > question.len(), "it has records");
                }
            });
        }
    });
    begun.elapsed()
}
