//! A raw HTTP/1.1 GET.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
};

use super::WAIT_TIMEOUT;

/// The status code and the body of `path`.
pub(crate) fn get(server: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(server).expect("the server's port is open");
    stream.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a timeout above zero");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n\r\n").expect("the server reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer in UTF-8 comes");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a blank line ends the head");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
    (status, body.to_owned())
}
