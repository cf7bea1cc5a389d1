//! Real queries to a server on a free port whose answers each test defines.

use std::str::FromStr as _;

use hickory_proto::{
    op::{Edns, Message, MessageType, ResponseCode},
    rr::{
        RData, Record,
        rdata::{
            A, SRV,
            opt::{EdnsCode, EdnsOption, NSIDPayload},
        },
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, UdpSocket},
    task::JoinSet,
};

use super::*;
use crate::cli::output::NONE;

fn name(text: &str) -> Name {
    Name::from_str(text).expect("a name")
}

/// Returns the answer to a query, which came over TCP or UDP.
type AnswerFn = fn(question: Message, tcp: bool) -> Message;

/// A server that answers over UDP and TCP until it is dropped.
struct FakeDnsServer {
    address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl FakeDnsServer {
    async fn start(answer_fn: AnswerFn) -> Self {
        let tcp = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = tcp.local_addr().expect("bound");
        let udp = UdpSocket::bind(address).await.expect("the same port for UDP");
        let mut tasks = JoinSet::new();
        let answer = move |octets: &[u8], tcp| {
            answer_fn(Message::from_vec(octets).expect("a question"), tcp).to_vec().expect("an answer")
        };
        tasks.spawn(async move {
            let mut datagram = [0; 4096];
            while let Ok((octets, peer)) = udp.recv_from(&mut datagram).await {
                udp.send_to(&answer(&datagram[..octets], false), peer).await.expect("sent");
            }
        });
        tasks.spawn(async move {
            while let Ok((mut stream, _)) = tcp.accept().await {
                let mut octets = vec![0; usize::from(stream.read_u16().await.expect("a length"))];
                stream.read_exact(&mut octets).await.expect("a question");
                let octets = answer(&octets, true);
                stream.write_u16(u16::try_from(octets.len()).expect("short")).await.expect("sent");
                stream.write_all(&octets).await.expect("sent");
            }
        });
        Self { address, _tasks: tasks }
    }

    async fn report(&self, questions: &[(&str, RecordType)]) -> ResolveReport {
        let mut asked = Vec::new();
        for (text, kind) in questions {
            let name = name(text);
            let reply = query::query(self.address, &name, *kind, false).await.expect("an answer");
            asked.push(AnsweredQuestion { name, kind: *kind, reply, via: None });
        }
        ResolveReport { server: self.address, via: None, asked, names: Vec::new() }
    }

    /// One question to this server, and to another one.
    async fn report_via(&self, via: SocketAddr, kind: RecordType) -> ResolveReport {
        let mut report = self.report(&[("web.prod.svc.cluster.local.", kind)]).await;
        report.via = Some(via);
        let asked = &mut report.asked[0];
        asked.via = Some(query::query(via, &asked.name, kind, false).await);
        report
    }
}

fn answer(question: &Message, rcode: ResponseCode) -> Message {
    let mut message = Message::response(question.metadata.id, question.metadata.op_code);
    message.metadata.response_code = rcode;
    message.metadata.authoritative = true;
    message.add_queries(question.queries.clone());
    message
}

/// Three SRV records, one of them behind, and the addresses of two targets.
fn of_ports(question: Message, _tcp: bool) -> Message {
    let mut message = answer(&question, ResponseCode::NoError);
    let owner = question.queries[0].name().clone();
    for (host, priority, weight) in [("a", 0, 100), ("b", 0, 300), ("c", 10, 100)] {
        let target = name(&format!("{host}.web.prod.svc.cluster.local."));
        message.add_answer(Record::from_rdata(owner.clone(), 5, RData::SRV(SRV::new(priority, weight, 8080, target))));
    }
    for (host, last) in [("a", 1), ("b", 2)] {
        let target = name(&format!("{host}.web.prod.svc.cluster.local."));
        message.add_additional(Record::from_rdata(target, 5, RData::A(A::new(10, 0, 0, last))));
    }
    assert!(question.edns.expect("EDNS").option(EdnsCode::NSID).is_some(), "NSID is asked for");
    let mut edns = Edns::new();
    edns.options_mut().insert(EdnsOption::NSID(NSIDPayload::new(*b"node-1").expect("short")));
    message.set_edns(edns);
    message
}

#[tokio::test]
async fn srv_shows_share_port_and_address() {
    let server = FakeDnsServer::start(of_ports).await;
    let report = server.report(&[("_http._tcp.web.prod.svc.cluster.local.", RecordType::SRV)]).await;
    let text = report.view().tables(None);
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["TYPE", "TTL", "SHARE", "PORT", "ANSWER"]);
    assert_eq!(rows[1], ["SRV", "5", "25%", "8080", "10.0.0.1"]);
    assert_eq!(rows[2], ["SRV", "5", "75%", "8080", "10.0.0.2"]);
    assert_eq!(rows[3], ["SRV", "5", "0%", "8080", "c.web.prod.svc.cluster.local."]);
    assert_eq!(rows[6][1..5], ["SRV", "NOERROR", "udp", "node-1"]);
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    assert_eq!(report.result(), Ok(()));
}

#[tokio::test]
async fn truncated_answer_is_asked_for_again_over_tcp() {
    let server = FakeDnsServer::start(|question, tcp| {
        let mut message = answer(&question, ResponseCode::NoError);
        message.metadata.truncation = !tcp;
        if tcp {
            let owner = question.queries[0].name().clone();
            message.add_answer(Record::from_rdata(owner, 5, RData::A(A::new(10, 0, 0, 1))));
        }
        message
    })
    .await;
    let report = server.report(&[("web.prod.svc.cluster.local.", RecordType::A)]).await;
    assert!(report.asked[0].reply.tcp);
    assert_eq!(report.asked[0].reply.message.answers.len(), 1);
}

#[tokio::test]
async fn answer_to_another_query_is_ignored() {
    let server = FakeDnsServer::start(|question, _| {
        let mut message = answer(&question, ResponseCode::NoError);
        message.metadata.id = question.metadata.id.wrapping_add(1);
        message
    })
    .await;
    let asked = query::query(server.address, &name("web."), RecordType::A, true).await;
    assert!(matches!(asked, Err(QueryError::InvalidAnswer(_))), "{asked:?}");
    let server = FakeDnsServer::start(|question, _| {
        let mut message = answer(&question, ResponseCode::NoError);
        message.metadata.message_type = MessageType::Query;
        message
    })
    .await;
    let asked = query::query(server.address, &name("web."), RecordType::A, true).await;
    assert!(matches!(asked, Err(QueryError::InvalidAnswer(_))), "{asked:?}");
}

/// Two addresses, the first with this TTL.
fn two_addresses(question: &Message, ttl: u32, second: u8) -> Message {
    let mut message = answer(question, ResponseCode::NoError);
    let owner = question.queries[0].name().clone();
    for (last, ttl) in [(second, 5), (1, ttl)] {
        message.add_answer(Record::from_rdata(owner.clone(), ttl, RData::A(A::new(10, 0, 0, last))));
    }
    message
}

#[tokio::test]
async fn what_differs_through_another_server_is_marked() {
    let direct = FakeDnsServer::start(|question, _| two_addresses(&question, 5, 2)).await;
    let rows = |report: &ResolveReport| {
        let text = report.view().tables(None);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        let cells = text.lines().map(|line| line.split("   ").map(str::trim).filter(|cell| !cell.is_empty()));
        cells.map(|cells| cells.map(str::to_owned).collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    // The same records in another order, as from a cache.
    let via = FakeDnsServer::start(|question, _| two_addresses(&question, 3, 2)).await;
    let report = direct.report_via(via.address, RecordType::A).await;
    let shown = rows(&report);
    assert_eq!(shown[0], ["TYPE", "TTL", "VIA", "DIFFERS", "SHARE", "PORT", "ANSWER"]);
    assert_eq!(shown[1], ["A", "5", "5", NONE, NONE, NONE, "10.0.0.2"]);
    assert_eq!(shown[2], ["A", "5", "3", "ttl", NONE, NONE, "10.0.0.1"]);
    assert_eq!(report.result(), Ok(()), "a TTL is no failure");

    let via = FakeDnsServer::start(|question, _| two_addresses(&question, 5, 3)).await;
    let report = direct.report_via(via.address, RecordType::A).await;
    let shown = rows(&report);
    assert_eq!(shown[1], ["A", "5", NONE, "not via", NONE, NONE, "10.0.0.2"]);
    assert_eq!(shown[3], ["A", NONE, "5", "only via", NONE, NONE, "10.0.0.3"]);
    let failure = report.result().expect_err("other records");
    assert!(failure.to_string().contains("other records"), "{failure}");
    assert_eq!(failure.kind, ErrorKind::Failed);

    let via = FakeDnsServer::start(|question, _| {
        let mut message = answer(&question, ResponseCode::NXDomain);
        let mut edns = Edns::new();
        edns.options_mut().insert(EdnsOption::NSID(NSIDPayload::new(*b"coredns-1").expect("short")));
        message.set_edns(edns);
        message
    })
    .await;
    let report = direct.report_via(via.address, RecordType::A).await;
    let shown = rows(&report);
    assert_eq!(shown[6][2..], ["NXDOMAIN", "udp", "coredns-1", &shown[6][5], "rcode,nsid"]);
    let json = serde_json::to_value(report.view()).expect("JSON");
    assert_eq!(json["questions"][0]["via"]["differences"], serde_json::json!(["rcode", "records", "nsid"]));
    assert!(report.result().expect_err("no such name").to_string().contains("another response code"));

    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
    let unused = socket.local_addr().expect("bound");
    drop(socket);
    let report = direct.report_via(unused, RecordType::A).await;
    assert_eq!(rows(&report)[6].last().map(String::as_str), Some("no answer"));
    let failure = report.result().expect_err("no server listens");
    assert!(failure.to_string().contains(&unused.to_string()), "{failure}");
}

#[tokio::test]
async fn rcodes_have_their_exit_codes() {
    for (answer_fn, kind, word) in [
        ((|question, _| answer(&question, ResponseCode::NXDomain)) as AnswerFn, ErrorKind::NotFound, "does not exist"),
        (|question, _| answer(&question, ResponseCode::NoError), ErrorKind::NotFound, "has no A or AAAA record"),
        (|question, _| answer(&question, ResponseCode::ServFail), ErrorKind::Failed, "SERVFAIL"),
        (|question, _| answer(&question, ResponseCode::Refused), ErrorKind::Failed, "REFUSED"),
        (|question, _| answer(&question, ResponseCode::NotImp), ErrorKind::Failed, "NOTIMP"),
    ] {
        let server = FakeDnsServer::start(answer_fn).await;
        let questions =
            [("web.prod.svc.cluster.local.", RecordType::A), ("web.prod.svc.cluster.local.", RecordType::AAAA)];
        let failure = server.report(&questions).await.result().expect_err("nothing was found");
        assert_eq!(failure.kind, kind, "{failure}");
        assert!(failure.to_string().contains(word), "{failure}");
    }
}

#[tokio::test]
async fn unreachable_server_fails_at_once() {
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
    let unused = socket.local_addr().expect("bound");
    drop(socket);
    let err = query::query(unused, &name("web."), RecordType::A, false).await.expect_err("no server listens");
    let failure = query_failed(unused, &name("web."), RecordType::A, &err);
    assert_eq!(failure.kind, ErrorKind::Failed);
    assert!(failure.to_string().contains("Connection refused"), "{failure}");
    assert!(failure.to_string().contains("gangplank serve"), "{failure}");
}

#[test]
fn target_decides_the_queried_types() {
    let kinds = |text, types: &[RecordType], ports: &[PortName]| {
        let target = QueryTarget::complete(text, "prod", "cluster.local").expect(text);
        let all = questions(&target, types, ports).expect("questions");
        all.into_iter().map(|(name, kind)| format!("{name} {kind}")).collect::<Vec<_>>()
    };
    let web = "web.prod.svc.cluster.local.";
    assert_eq!(kinds("web", &[], &[]), [format!("{web} A"), format!("{web} AAAA")]);
    let ports = [port_name("http").expect("a name"), port_name("dns/udp").expect("a name")];
    let srv = [format!("_http._tcp.{web} SRV"), format!("_dns._udp.{web} SRV")];
    assert_eq!(kinds("web", &[], &ports)[2..], srv);
    assert_eq!(kinds("_http._tcp.web", &[], &[]), srv[..1]);
    assert_eq!(kinds("10.0.0.1", &[], &[]), ["1.0.0.10.in-addr.arpa. PTR"]);
    assert_eq!(kinds("web", &[RecordType::TXT], &[]), [format!("{web} TXT")]);
}

#[test]
fn arguments_are_parsed() {
    assert_eq!(dns_server("10.96.0.10"), Ok("10.96.0.10:53".parse().expect("an address")));
    assert_eq!(dns_server("[::1]:1053"), Ok("[::1]:1053".parse().expect("an address")));
    assert!(dns_server("localhost").is_err());
    assert_eq!(record_type("srv"), Ok(RecordType::SRV));
    for bad in ["", "/udp", "http/icmp"] {
        assert!(port_name(bad).is_err(), "{bad:?}");
    }
}
