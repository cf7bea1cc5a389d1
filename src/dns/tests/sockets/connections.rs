//! Connections of DNS over TCP on loopback: the order of answers, limits, and the end. Tests wait for an
//! event, never for a time to pass.

use super::*;

#[test]
fn pipelined_questions_are_answered_in_order() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], TcpLimits { pipelined: 16, ..limits() }));
    let mut stream = server.connect();
    let mut writer = stream.try_clone().expect("clones");
    let asking = std::thread::spawn(move || {
        let all: Vec<u8> = (0..1000).flat_map(|id| framed(&TestQuery { id, ..query_for(WEB, A) }.packet())).collect();
        writer.write_all(&all).expect("sent");
        writer.shutdown(Shutdown::Write).expect("half closed");
    });
    for id in 0..1000u16 {
        assert_eq!(receive(&mut stream).expect("an answer")[..2], id.to_be_bytes());
    }
    assert!(drained(&mut stream).is_empty());
    asking.join().expect("sent");
    server.end().expect("ends well");
}

#[test]
fn fragmented_message_is_answered() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], limits()));
    let mut stream = server.connect();
    stream.set_nodelay(true).expect("sets");
    for octet in framed(&query_for(WEB, A).packet()) {
        stream.write_all(&[octet]).expect("sent");
    }
    let octets = receive(&mut stream).expect("an answer");
    assert_eq!(Message::from_vec(&octets).expect("parses").answers.len(), 2);
    server.end().expect("ends well");
}

/// Asked over TCP, each of these would cost work for nothing, as fast as a peer can send.
#[test]
fn frames_that_are_no_question_close_the_connection() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], limits()));
    let packet = query_for(WEB, A).packet();
    let mut response = packet.clone();
    response[2] |= 0x80;
    for (closed, frame) in [&b""[..], &packet[..11], &response].into_iter().enumerate() {
        let mut stream = server.connect();
        stream.write_all(&[framed(&packet), framed(frame), framed(&packet)].concat()).expect("sent");
        receive(&mut stream).expect("the question before is answered");
        assert!(drained(&mut stream).is_empty(), "the question behind is not");
        assert_eq!(server.closed("malformed"), closed as f64 + 1.0);
    }
    server.end().expect("ends well");
}

/// Answers `question` times on a connection of its own, one after the other.
fn answered_in_turn(server: &Running, questions: u16) {
    let mut stream = server.connect();
    for id in 0..questions {
        send(&mut stream, &TestQuery { id, ..query_for(WEB, A) }.packet());
        assert_eq!(receive(&mut stream).expect("an answer")[..2], id.to_be_bytes());
    }
}

/// One worker, which a connection that never has to wait for its peer must not keep for itself.
#[test]
fn flood_of_one_connection_does_not_starve_another() {
    let world = sample_zone();
    let config = DnsConfig { threads: NonZeroUsize::MIN, ..dns_config(&["127.0.0.1:0"], limits()) };
    let server = Running::start(&world, &config);
    let done = Arc::new(AtomicBool::new(false));
    // The cheapest frames that are questions: another opcode, answered by a header.
    let mut frame = [0; 12];
    frame[2] = 0x20;
    let frames = framed(&frame).repeat(4096);
    let floods: Vec<_> = (0..4)
        .map(|_| {
            let mut stream = server.connect();
            let mut reader = stream.try_clone().expect("clones");
            let (frames, done) = (frames.clone(), Arc::clone(&done));
            let reading = std::thread::spawn(move || {
                let mut answers = vec![0; 1 << 16];
                let mut octets = 0;
                while let Ok(read @ 1..) = reader.read(&mut answers) {
                    octets += read;
                }
                octets / 14
            });
            let writing = std::thread::spawn(move || {
                while !done.load(Ordering::Relaxed) && stream.write_all(&frames).is_ok() {}
                let _ = stream.shutdown(Shutdown::Write);
            });
            (writing, reading)
        })
        .collect();
    answered_in_turn(&server, 500);
    done.store(true, Ordering::Relaxed);
    for (writing, reading) in floods {
        writing.join().expect("written");
        assert!(reading.join().expect("read") >= 4096, "the flood was one");
    }
    server.end().expect("ends well");
}

#[test]
fn connections_of_one_peer_are_limited() {
    let world = sample_zone();
    let tcp = TcpLimits { per_peer: Some(2), ..limits() };
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], tcp));
    let packet = query_for(WEB, A).packet();
    let mut kept: Vec<TcpStream> = (0..2).map(|_| server.connect()).collect();
    for stream in &mut kept {
        send(stream, &packet);
        receive(stream).expect("an answer");
    }
    assert!(drained(&mut server.connect()).is_empty(), "the third is closed");
    assert_eq!(server.closed("peer_full"), 1.0);
    let mut first = kept.swap_remove(0);
    send(&mut first, &packet);
    receive(&mut first).expect("an answer");
    first.shutdown(Shutdown::Write).expect("closed");
    assert!(drained(&mut first).is_empty());
    server.wait_open(1.0);
    let mut next = server.connect();
    send(&mut next, &packet);
    receive(&mut next).expect("an answer");
    server.end().expect("ends well");
}

#[test]
fn full_server_closes_the_idlest_connection_for_a_new_one() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], TcpLimits { connections: 2, ..limits() }));
    let packet = query_for(WEB, A).packet();
    let mut kept: Vec<TcpStream> = (0..2).map(|_| server.connect()).collect();
    for index in [1, 0] {
        send(&mut kept[index], &packet);
        receive(&mut kept[index]).expect("an answer");
    }
    let mut third = server.connect();
    send(&mut third, &packet);
    receive(&mut third).expect("the new one is answered");
    assert_eq!(server.closed("evicted"), 1.0);
    assert!(drained(&mut kept[1]).is_empty(), "the idlest is closed");
    send(&mut kept[0], &packet);
    receive(&mut kept[0]).expect("the other is served");
    server.end().expect("ends well");
}

/// An address that takes every place loses some of its own: 127.0.0.1 against 127.0.0.2.
#[test]
fn peer_with_most_connections_makes_room_for_others() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["0.0.0.0:0"], TcpLimits { connections: 50, ..limits() }));
    let packet = query_for(WEB, A).packet();
    let port = server.address().port();
    let connect = |from: [u8; 4]| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::from((from, 0)).into()).expect("an address of loopback");
        socket.connect(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into()).expect("connects");
        let stream: TcpStream = socket.into();
        stream.set_read_timeout(Some(LONG)).expect("a timeout");
        stream
    };
    let mut quiet = connect([127, 0, 0, 2]);
    send(&mut quiet, &packet);
    receive(&mut quiet).expect("an answer");
    let flood: Vec<TcpStream> = (0..300).map(|_| connect([127, 0, 0, 1])).collect();
    send(&mut quiet, &packet);
    receive(&mut quiet).expect("the quiet one is older than all of the flood, and stays");
    let mut another = connect([127, 0, 0, 3]);
    send(&mut another, &packet);
    receive(&mut another).expect("and others get in");
    assert_eq!(server.closed("full"), 0.0);
    drop(flood);
    server.end().expect("ends well");
}

#[test]
fn tcp_idle_connection_is_closed() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], TcpLimits { idle: SHORT, ..limits() }));
    let mut fresh = server.connect();
    let mut used = server.connect();
    send(&mut used, &query_for(WEB, A).packet());
    receive(&mut used).expect("an answer");
    assert!(drained(&mut fresh).is_empty());
    assert!(drained(&mut used).is_empty());
    assert_eq!(server.closed("idle"), 2.0);
    server.end().expect("ends well");
}

/// One octet at a time keeps no connection open: the clock is the message's, not the octet's.
#[test]
fn slowly_sent_message_closes_the_connection() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], TcpLimits { message: SHORT, ..limits() }));
    let mut stream = server.connect();
    stream.set_nodelay(true).expect("sets");
    stream.set_read_timeout(Some(SHORT / 10)).expect("a timeout");
    let begun = std::time::Instant::now();
    let mut ended = false;
    // The pause between two octets is the wait for an answer that does not come.
    for _ in 0..1000 {
        ended = stream.write_all(&[9]).is_err()
            || match stream.read(&mut [0; 16]) {
                Ok(len) => len == 0,
                Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
            };
        if ended {
            break;
        }
    }
    assert!(ended && begun.elapsed() >= SHORT);
    assert_eq!(server.closed("slow_request"), 1.0);
    server.end().expect("ends well");
}

/// A peer that asks and never reads: its answers do not pile up, and it loses its connection.
#[test]
fn peer_that_reads_no_answers_is_closed() {
    let mut world = TestZone::new(config());
    for n in 0..1000u32 {
        world.add("web.prod", &spec(&Ipv4Addr::from_bits(0x0a00_0000 + n).to_string(), &[]));
    }
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], TcpLimits { message: SHORT, ..limits() }));
    let mut stream = server.connect();
    let question = framed(&query_for(WEB, A).packet());
    // 16 KB each: far more than the buffers of both sides hold.
    let questions = question.repeat(64);
    while stream.write_all(&questions).is_ok() {}
    assert_eq!(server.closed("slow_reader"), 1.0);
    server.end().expect("ends well");
}

#[test]
fn questions_before_the_stop_are_answered() {
    let world = sample_zone();
    let server = Running::start(&world, &dns_config(&["127.0.0.1:0"], limits()));
    let mut idle = server.connect();
    let mut stream = server.connect();
    for stream in [&mut idle, &mut stream] {
        send(stream, &query_for(WEB, A).packet());
        receive(stream).expect("an answer");
    }
    // Loopback delivers before the call returns, so that this is there when the server stops.
    send(&mut stream, &TestQuery { id: 99, ..query_for(WEB, A) }.packet());
    let address = server.address();
    server.end().expect("ends well");
    assert_eq!(receive(&mut stream).expect("an answer")[..2], [0, 99]);
    assert!(drained(&mut stream).is_empty());
    assert!(drained(&mut idle).is_empty());
    // Everything is let go of.
    assert!(TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok());
}
