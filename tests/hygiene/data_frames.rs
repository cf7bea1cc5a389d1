//! DATA frames that carry little or nothing: what they cost the server, and for how long.

use std::{
    io::{BufReader, Read, Write as _},
    net::TcpStream,
    thread,
};

use super::{LISTS, STREAM, Target, flood, sized};
use crate::support::WAIT_TIMEOUT;

/// What a connection without work holds of the budget, at most.
const RELEASED: f64 = 4096.0;

/// A frame of HTTP/2 on the first stream (RFC 9113 §4.1).
fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    frame_on(1, kind, flags, payload)
}

fn frame_on(stream: u8, kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let [.., a, b, c] = payload.len().to_be_bytes();
    [&[a, b, c, kind, flags, 0, 0, 0, stream], payload].concat()
}

/// The preface, and the head of a registration stream that stays open.
fn open_stream() -> Vec<u8> {
    [flood::PREFACE, &head(1, STREAM)].concat()
}

/// The head of a call whose request has no end yet.
fn head(stream: u8, path: &str) -> Vec<u8> {
    // RFC 7541 §6: POST and http by their index, the rest as literals, with indexed names where there are any.
    let mut head = vec![0x83, 0x86, 0x04];
    let literal = |head: &mut Vec<u8>, text: &str| {
        head.push(u8::try_from(text.len()).expect("short"));
        head.extend(text.bytes());
    };
    literal(&mut head, path);
    head.extend([0x0f, 0x10]);
    literal(&mut head, "application/grpc");
    head.push(0);
    literal(&mut head, "te");
    literal(&mut head, "trailers");
    const END_HEADERS: u8 = 4;
    frame_on(stream, HEADERS, END_HEADERS, &head)
}

const HEADERS: u8 = 1;
const END_STREAM: u8 = 1;

const DATA: u8 = 0;
const PADDED: u8 = 8;

#[test]
fn empty_data_frames_close_the_connection_and_do_not_delay_others() {
    let closed =
        flood::others_go_on("empty DATA frames", |target| target.server.grpc, &open_stream(), &frame(DATA, 0, &[]));
    assert!(closed > 0, "each connection is closed");
}

#[test]
fn frames_of_padding_close_the_connection_and_do_not_delay_others() {
    let padding = [&[255], &[0; 255][..]].concat();
    let of = |target: &Target| target.server.grpc;
    assert!(flood::others_go_on("frames of padding", of, &open_stream(), &frame(DATA, PADDED, &padding)) > 0);
}

/// Sends a frame so often, as fast as the windows of stream and connection allow (RFC 9113 §6.9), or until the server
/// ends the call: a message may take ten seconds, which this one needs on a busy machine.
fn send_within_windows(peer: &mut TcpStream, frame: &[u8], times: usize) {
    const WINDOW_UPDATE: u8 = 8;
    let mut answers = BufReader::new(peer.try_clone().expect("descriptors are left"));
    let octets = frame.len() - 9;
    // Of the connection, of the stream.
    let mut windows = [65_535, 32 * 1024];
    for _ in 0..times {
        while windows.iter().any(|window| *window < octets) {
            let mut head = [0; 9];
            answers.read_exact(&mut head).expect("the server reads on");
            let [a, b, c, kind, flags, _, _, _, stream] = head;
            let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
            answers.read_exact(&mut payload).expect("whole frames");
            if kind == HEADERS && flags & END_STREAM != 0 {
                return;
            }
            if kind == WINDOW_UPDATE {
                let increment = u32::from_be_bytes(payload[..].try_into().expect("four octets"));
                windows[usize::from(stream)] += increment as usize;
            }
        }
        peer.write_all(frame).expect("the server reads");
        windows.iter_mut().for_each(|window| *window -= octets);
    }
}

/// A message of 60 kB that comes one byte a frame, each with 255 bytes of padding. The call reads all of
/// them, so nothing is held but what there is of the message.
#[test]
fn padding_that_was_read_holds_no_memory() {
    let target = Target::with_services(0);
    let frames = sized(5_000, 59_000);
    let byte = frame(DATA, PADDED, &[&[255, 7], &[0; 255][..]].concat());
    let length = frame(DATA, 0, &[0, 0, 0, 0xea, 0x60]);
    let open = || {
        let mut peer = TcpStream::connect(target.server.grpc).expect("it listens");
        peer.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a timeout above zero");
        peer.write_all(&[open_stream(), length.clone()].concat()).expect("it reads");
        send_within_windows(&mut peer, &byte, frames);
        peer
    };
    let peers: Vec<TcpStream> = thread::scope(|scope| {
        let opening: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
        opening.into_iter().map(|peer| peer.join().expect("a peer")).collect()
    });
    let begun = (peers.len() * (frames + 5)) as f64;
    target.wait_metric("gangplank_grpc_buffered_bytes", |held| held < begun + RELEASED);
    target.check("padding", LISTS);
    drop(peers);
    target.wait_metric("gangplank_grpc_buffered_bytes", |held| held < RELEASED);
}

/// Reads frames until one is of this kind and has these bits in its flags.
fn wait_for_frame(answers: &mut impl Read, kind: u8, flags: u8) {
    loop {
        let mut head = [0; 9];
        answers.read_exact(&mut head).expect("the server answers");
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        answers.read_exact(&mut payload).expect("whole frames");
        if head[3] == kind && head[4] & flags == flags {
            return;
        }
    }
}

/// A peer goes on to send on a call that the server has ended, while another call of the connection is open.
#[test]
fn frames_of_an_ended_call_hold_no_budget() {
    const PING: u8 = 6;
    const ACK: u8 = 1;
    let target = Target::with_services(0);
    let mut peer = TcpStream::connect(target.server.grpc).expect("it listens");
    peer.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a timeout above zero");
    let mut answers = BufReader::new(peer.try_clone().expect("descriptors are left"));
    peer.write_all(&[open_stream(), head(3, "/no.such/Method")].concat()).expect("it reads");
    wait_for_frame(&mut answers, HEADERS, END_STREAM);
    peer.write_all(&frame_on(3, DATA, 0, &[0]).repeat(2_000)).expect("it reads");
    peer.write_all(&frame_on(0, PING, 0, &[0; 8])).expect("it reads");
    wait_for_frame(&mut answers, PING, ACK);
    let held = target.metric("gangplank_grpc_buffered_bytes");
    println!("2 000 frames of an ended call hold {held} bytes");
    assert_eq!(target.metric("gangplank_grpc_streams"), 1.0, "the other call is open");
    assert!(held < RELEASED, "{held} bytes");
}
