//! JSON answers of any length, written piece by piece.
//!
//! A list of a million services takes seconds to write and hundreds of megabytes to hold. It is
//! made on a thread for blocking work, at most [`MAX_CHUNKS`] pieces ahead of what the peer has read;
//! when the peer goes away the next piece has nowhere to go, and the thread ends.

use std::{io, mem};

use axum::{
    body::{Body, Bytes},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use futures::stream;
use serde::Serialize;
use tokio::{
    sync::mpsc,
    task::{JoinHandle, spawn_blocking},
};

/// Bytes in one piece.
const CHUNK_BYTES: usize = 64 * 1024;

/// ChunkWriter that wait for the peer.
const MAX_CHUNKS: usize = 4;

/// Answers with what `make` returns, 200. `make` may block.
pub(super) fn respond<T: Serialize>(make: impl FnOnce() -> T + Send + 'static) -> Response {
    let (pieces, ready) = mpsc::channel(MAX_CHUNKS);
    let writing = spawn_blocking(move || -> io::Result<()> {
        let mut writer = ChunkWriter { pieces, piece: Vec::new() };
        serde_json::to_writer(&mut writer, &make())?;
        io::Write::write_all(&mut writer, b"\n")?;
        writer.send()
    });
    let body = Body::from_stream(stream::unfold(Some((ready, writing)), next_piece));
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// Answers that something is wrong: `{"error": "…"}`.
pub(super) fn error(status: StatusCode, err: &str) -> Response {
    (status, axum::Json(serde_json::json!({ "error": err }))).into_response()
}

type Source = (mpsc::Receiver<Bytes>, JoinHandle<io::Result<()>>);

/// The next piece, or at the end what kept the writer from finishing: half an answer must not
/// look like a whole one.
async fn next_piece(source: Option<Source>) -> Option<(io::Result<Bytes>, Option<Source>)> {
    let (mut pieces, writing) = source?;
    if let Some(piece) = pieces.recv().await {
        return Some((Ok(piece), Some((pieces, writing))));
    }
    let outcome = writing.await.map_err(io::Error::other).flatten();
    outcome.err().map(|err| (Err(err), None))
}

/// Collects what is written into pieces and sends each on.
struct ChunkWriter {
    pieces: mpsc::Sender<Bytes>,
    piece: Vec<u8>,
}

impl ChunkWriter {
    fn send(&mut self) -> io::Result<()> {
        let piece = mem::take(&mut self.piece);
        self.pieces.blocking_send(piece.into()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl io::Write for ChunkWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.piece.capacity() == 0 {
            self.piece.reserve(CHUNK_BYTES);
        }
        self.piece.extend_from_slice(bytes);
        if self.piece.len() >= CHUNK_BYTES {
            self.send()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
