//! One HTTPS request to the API server: a hundredth of the cost of kubectl, for tests that poll.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    sync::Arc,
};

use serde_json::Value;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, StreamOwned};

use crate::support::WAIT_TIMEOUT;

/// Status code and JSON of the answer; a body that is not JSON becomes a JSON string.
pub(super) fn request(
    port: u16,
    tls: &Arc<ClientConfig>,
    token: Option<&str>,
    (method, path): (&str, &str),
    body: Option<&Value>,
) -> io::Result<(u16, Value)> {
    let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    socket.set_read_timeout(Some(WAIT_TIMEOUT))?;
    let name = Ipv4Addr::LOCALHOST.into();
    let session = ClientConnection::new(Arc::clone(tls), name).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(session, socket);
    let body = body.map(Value::to_string).unwrap_or_default();
    let authorization = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    // HTTP/1.0: the answer comes in one piece, and ends with the connection.
    let head = format!(
        "{method} {path} HTTP/1.0\r\nHost: localhost\r\nAccept: application/json\r\n{authorization}\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
    Ok((status, serde_json::from_str(body).unwrap_or_else(|_| Value::from(body))))
}
