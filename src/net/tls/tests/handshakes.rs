//! Handshakes that are slow, too many, or none.

use super::*;

#[tokio::test]
async fn silent_and_half_open_handshakes_end_at_the_deadline() {
    let server = Server::start();
    for begun in [&b""[..], &[22, 3, 1]] {
        let (listener, address) = listen().await;
        let mut client = TcpStream::connect(address).await.expect("it listens");
        client.write_all(begun).await.expect("sent");
        let (stream, _) = listener.accept().await.expect("a connection");
        let err = server.tls.accept(stream, Alpn::Http2, Duration::from_millis(50)).await.expect_err("too slow");
        assert_eq!(err.reason, HandshakeFailure::Timeout);
    }
}

#[tokio::test]
async fn oldest_of_too_many_handshakes_is_given_up() {
    let server = Server::start();
    let (listener, address) = listen().await;
    let handshakes = Handshakes::new(2);
    let config = Arc::clone(&server.tls.state.load_full().expect("loaded").configs.http2);
    let half_open = async || {
        let mut client = TcpStream::connect(address).await.expect("it listens");
        client.write_all(&[22]).await.expect("sent");
        (client, listener.accept().await.expect("a connection").0)
    };
    let (first, second, third) = (half_open().await, half_open().await, half_open().await);
    let run = |stream| handshakes.run(stream, Arc::clone(&config), DEADLINE);
    let (mut oldest, mut middle, mut newest) =
        (Box::pin(run(first.1)), Box::pin(run(second.1)), Box::pin(run(third.1)));
    let err = tokio::select! {
        biased;
        ended = &mut oldest => ended,
        ended = &mut middle => ended,
        ended = &mut newest => ended,
    };
    assert_eq!(err.expect_err("given up").reason, HandshakeFailure::Evicted);
    drop(first.0);
    drop(second.0);
    let err = middle.await.expect_err("its client has gone");
    assert_eq!(err.reason, HandshakeFailure::Closed);
}

#[tokio::test]
async fn handshake_that_is_too_long_or_no_tls_fails() {
    let server = Server::start();
    for (octets, reason) in [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), HandshakeFailure::NotTls),
        // A ClientHello of 65 535 octets, one in each record.
        (one_by_one(&[1, 0, 0xff, 0xff]), HandshakeFailure::TooLarge),
        // One of 65 793.
        (one_by_one(&[1, 1, 1, 1]), HandshakeFailure::TooLarge),
    ] {
        let (listener, address) = listen().await;
        let client = async {
            let mut client = TcpStream::connect(address).await.expect("it listens");
            // The server may close the connection before it has read all.
            let _ = client.write_all(&octets).await;
            let _ = client.read(&mut [0]).await;
        };
        let accept = async {
            let (stream, _) = listener.accept().await.expect("a connection");
            server.tls.accept(stream, Alpn::Http2, DEADLINE).await.map(|_| ()).expect_err("no handshake")
        };
        let (err, ()) = tokio::join!(accept, client);
        assert_eq!(err.reason, reason, "{err}");
    }
}

/// A handshake message that begins with `head`, one octet in each record.
fn one_by_one(head: &[u8]) -> Vec<u8> {
    let message = head.iter().copied().chain(std::iter::repeat(0)).take(MAX_HANDSHAKE_BYTES);
    message.flat_map(|octet| [22, 3, 1, 0, 1, octet]).collect()
}

#[tokio::test]
async fn no_session_is_resumed() {
    let server = Server::start();
    let vm = server.ca.sign("vm-1", VALID);
    let connector = server.client(Some(&vm));
    for _ in 0..2 {
        let (listener, address) = listen().await;
        let client = async {
            let stream = TcpStream::connect(address).await.expect("it listens");
            connector.connect(ServerName::try_from("localhost").expect("a name"), stream).await.expect("a handshake")
        };
        let accept = async {
            let (stream, _) = listener.accept().await.expect("a connection");
            server.tls.accept(stream, Alpn::Http2, DEADLINE).await.expect("a handshake").0
        };
        let (mut accepted, mut client) = tokio::join!(accept, client);
        // A ticket would come with the first data.
        accepted.write_all(b"!").await.expect("sent");
        accepted.flush().await.expect("sent");
        assert_eq!(client.read_u8().await.expect("received"), b'!');
        assert_eq!(client.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Full));
    }
}
