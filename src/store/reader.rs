//! Reads the frames of one file and skips what is corrupt.
//!
//! Whether bytes that are no frame are a torn write or corruption is decided in
//! [`recover`](super::recover), which has seen the whole file. Memory: one window of the file.

use std::{io, ops::Range};

use super::{
    disk::File,
    frame::{FRAME_LEN, FileId, Frame, HEADER_LEN, Header, HeaderError},
};

/// Bytes read at a time.
const WINDOW: usize = 1 << 20;

/// What comes next in a file.
#[derive(Debug)]
pub(super) enum ScanItem<'w> {
    /// A valid frame.
    Frame {
        /// Offsets of its first byte and past its last.
        at: Range<u64>,
        frame: Frame,
        payload: &'w [u8],
    },
    /// Bytes that are no frame, up to the next valid frame or the end of the file.
    Garbage(Range<u64>),
}

/// Reads one file frame by frame.
#[derive(Debug)]
pub(super) struct FrameReader<'f> {
    file: &'f dyn File,
    file_id: FileId,
    /// Nothing is read past this offset.
    len: u64,
    /// Offset of the next item.
    at: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl<'f> FrameReader<'f> {
    /// Reads from the end of the header to `len`.
    pub(super) fn new(file: &'f dyn File, file_id: FileId, len: u64) -> Self {
        Self { file, file_id, len, at: HEADER_LEN as u64, window: Vec::new(), window_at: 0 }
    }

    /// `None` at the end.
    pub(super) fn next(&mut self) -> io::Result<Option<ScanItem<'_>>> {
        if self.at >= self.len {
            return Ok(None);
        }
        let from = self.at;
        if let Some((frame, length)) = self.frame_at(from)? {
            self.at = from + length as u64;
            let start = self.in_window(from);
            let payload = &self.window[start + FRAME_LEN..start + length];
            return Ok(Some(ScanItem::Frame { at: from..self.at, frame, payload }));
        }
        // The length of a corrupt frame cannot be trusted, so every later byte may begin a frame.
        // A checksum covers the offset: a copy of a frame elsewhere is not taken for one.
        self.at += 1;
        while self.at < self.len && self.frame_at(self.at)?.is_none() {
            self.at += 1;
        }
        Ok(Some(ScanItem::Garbage(from..self.at)))
    }

    /// The frame that is valid at `at`, with its length in bytes.
    fn frame_at(&mut self, at: u64) -> io::Result<Option<(Frame, usize)>> {
        if !self.fill(at, FRAME_LEN)? {
            return Ok(None);
        }
        let start = self.in_window(at);
        if !Frame::starts_with_magic(&self.window[start..]) {
            return Ok(None);
        }
        let Some(payload) = Frame::claimed_payload_len(&self.window[start..]) else {
            return Ok(None);
        };
        let length = FRAME_LEN + payload;
        if !self.fill(at, length)? {
            return Ok(None);
        }
        let start = self.in_window(at);
        let frame = Frame::decode(&self.window[start..start + length], self.file_id, at);
        Ok(frame.map(|frame| (frame, length)))
    }

    fn in_window(&self, at: u64) -> usize {
        usize::try_from(at - self.window_at).expect("fill() put it there")
    }

    /// Moves the window so that it holds `length` bytes from `at`; false when the file ends before that.
    fn fill(&mut self, at: u64, length: usize) -> io::Result<bool> {
        let end = at + length as u64;
        if end > self.len {
            return Ok(false);
        }
        if at < self.window_at || end > self.window_at + self.window.len() as u64 {
            // A whole window, however small the frame: small frames then cost one read per mebibyte.
            let wanted = (self.len - at).min(length.max(WINDOW) as u64);
            self.window.resize(usize::try_from(wanted).expect("bounded by WINDOW and MAX_PAYLOAD"), 0);
            self.window_at = at;
            read_exact(self.file, at, &mut self.window)?;
        }
        Ok(true)
    }
}

/// Reads a file's header. The outer error is the disk's, the inner one the header's.
pub(super) fn read_header(file: &dyn File, file_id: FileId) -> io::Result<Result<Header, HeaderError>> {
    let mut bytes = [0; HEADER_LEN];
    if file.len()? < HEADER_LEN as u64 {
        return Ok(Err(HeaderError::Corrupt));
    }
    read_exact(file, 0, &mut bytes)?;
    Ok(Header::decode(&bytes, file_id))
}

/// Fills `into` from `offset`; [`io::ErrorKind::UnexpectedEof`] when the file is too short.
pub(super) fn read_exact(file: &dyn File, offset: u64, into: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(offset + done as u64, &mut into[done..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => done += read,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
    Ok(())
}
