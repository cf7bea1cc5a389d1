//! Raw HTTP/1.1 over TLS: what is sent is exactly what the test says, odd targets too.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Arc,
};

use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};

use super::WAIT_TIMEOUT;

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Status line and headers.
    pub(crate) head: String,
    pub(crate) body: String,
}

/// A client that trusts one CA, and shows one certificate or none.
#[derive(Debug, Clone)]
pub(crate) struct HttpsClient {
    config: Arc<ClientConfig>,
}

/// An open connection.
pub(crate) struct HttpsConnection(StreamOwned<ClientConnection, TcpStream>);

impl HttpsClient {
    /// `shown` is a certificate and its key. Everything is in PEM.
    pub(crate) fn new(ca: &str, shown: Option<(&str, &str)>) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).expect("a certificate")).expect("a CA");
        let config = ClientConfig::builder().with_root_certificates(roots);
        let mut config = match shown {
            None => config.with_no_client_auth(),
            Some((cert, key)) => {
                let chain = CertificateDer::pem_slice_iter(cert.as_bytes()).collect::<Result<_, _>>().expect("PEM");
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
                config.with_client_auth_cert(chain, key).expect("a certificate")
            }
        };
        // As a browser does.
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Self { config: Arc::new(config) }
    }

    /// Connects, and completes the client's part of the handshake.
    pub(crate) fn connect(&self, server: SocketAddr) -> io::Result<HttpsConnection> {
        let mut socket = TcpStream::connect(server)?;
        socket.set_read_timeout(Some(WAIT_TIMEOUT))?;
        let name = ServerName::try_from("localhost").expect("a name");
        let mut session = ClientConnection::new(Arc::clone(&self.config), name).map_err(io::Error::other)?;
        while session.is_handshaking() {
            session.complete_io(&mut socket)?;
        }
        Ok(HttpsConnection(StreamOwned::new(session, socket)))
    }

    /// GET on a connection of its own, with these headers.
    pub(crate) fn get(&self, server: SocketAddr, path: &str, headers: &[(&str, &str)]) -> io::Result<Answer> {
        self.connect(server)?.last(&format!("GET {path}"), headers)
    }
}

impl HttpsConnection {
    /// The protocol that was agreed on.
    pub(crate) fn alpn(&self) -> Option<&[u8]> {
        self.0.conn.alpn_protocol()
    }

    /// Sends one request, `METHOD TARGET`, the last one of the connection.
    pub(crate) fn last(mut self, request: &str, headers: &[(&str, &str)]) -> io::Result<Answer> {
        self.send(request, &[headers, &[("Connection", "close")]].concat())?;
        let mut answer = Vec::new();
        match self.0.read_to_end(&mut answer) {
            // Without the end of TLS: whether the answer is whole, its head says.
            Err(err) if err.kind() != io::ErrorKind::UnexpectedEof => Err(err),
            _ => parse(&answer),
        }
    }

    /// Sends one request, and reads an answer that has a length.
    pub(crate) fn ask(&mut self, request: &str, headers: &[(&str, &str)]) -> io::Result<Answer> {
        self.send(request, headers)?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            let mut one = [0];
            self.0.read_exact(&mut one)?;
            answer.push(one[0]);
        }
        let head = String::from_utf8_lossy(&answer).to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        let mut body = vec![0; length.ok_or(io::ErrorKind::InvalidData)?];
        self.0.read_exact(&mut body)?;
        answer.extend(body);
        parse(&answer)
    }

    fn send(&mut self, request: &str, headers: &[(&str, &str)]) -> io::Result<()> {
        let mut head = format!("{request} HTTP/1.1\r\nHost: localhost\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        self.0.write_all((head + "\r\n").as_bytes())
    }
}

fn parse(answer: &[u8]) -> io::Result<Answer> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Answer { status, head: head.to_owned(), body: body.to_owned() })
}
