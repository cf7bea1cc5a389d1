//! Goes through the frames of one file, past what is damaged.
//!
//! It judges nothing: whether octets that are no frame are a torn tail or damage is decided by
//! who has seen the whole file. It holds a window of the file and not the file.

use std::{io, ops::Range};

use super::{
    files::File,
    frame::{BadHeader, FRAME_LEN, Frame, HEADER_LEN, Header, Place},
};

/// Octets read at a time.
const WINDOW: usize = 1 << 20;

/// What comes next in a file.
#[derive(Debug)]
pub(super) enum Piece<'w> {
    /// A valid frame.
    Frame {
        /// Where it begins and ends.
        at: Range<u64>,
        /// What it says.
        frame: Frame,
        /// What it carries.
        payload: &'w [u8],
    },
    /// Octets that are no frame, up to the next valid one or the end of the file.
    Bad(Range<u64>),
}

/// A reader of one file.
#[derive(Debug)]
pub(super) struct Walk<'f> {
    file: &'f dyn File,
    place: Place,
    /// The file ends here for this reader.
    len: u64,
    /// Where the next piece begins.
    at: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl<'f> Walk<'f> {
    /// Begins behind the header and ends at `len`.
    pub(super) fn new(file: &'f dyn File, place: Place, len: u64) -> Self {
        Self { file, place, len, at: HEADER_LEN as u64, window: Vec::new(), window_at: 0 }
    }

    /// The next piece, or `None` at the end.
    pub(super) fn next(&mut self) -> io::Result<Option<Piece<'_>>> {
        if self.at >= self.len {
            return Ok(None);
        }
        let from = self.at;
        if let Some((frame, length)) = self.frame_at(from)? {
            self.at = from + length as u64;
            let start = self.in_window(from);
            let payload = &self.window[start + FRAME_LEN..start + length];
            return Ok(Some(Piece::Frame { at: from..self.at, frame, payload }));
        }
        // Lengths cannot be trusted here: every later octet may begin a frame, and its checksum
        // covers its offset, so none is found where it does not belong.
        self.at += 1;
        while self.at < self.len && self.frame_at(self.at)?.is_none() {
            self.at += 1;
        }
        Ok(Some(Piece::Bad(from..self.at)))
    }

    /// The frame that is valid at `at`, with its length in octets.
    fn frame_at(&mut self, at: u64) -> io::Result<Option<(Frame, usize)>> {
        if !self.fill(at, FRAME_LEN)? {
            return Ok(None);
        }
        let start = self.in_window(at);
        if !Frame::may_begin(&self.window[start..]) {
            return Ok(None);
        }
        let Some(payload) = Frame::claimed(&self.window[start..]) else {
            return Ok(None);
        };
        let length = FRAME_LEN + payload;
        if !self.fill(at, length)? {
            return Ok(None);
        }
        let start = self.in_window(at);
        let frame = Frame::decode(&self.window[start..start + length], self.place, at);
        Ok(frame.map(|frame| (frame, length)))
    }

    fn in_window(&self, at: u64) -> usize {
        usize::try_from(at - self.window_at).expect("fill() put it there")
    }

    /// Has the window hold `length` octets from `at`; false when the file ends before that.
    fn fill(&mut self, at: u64, length: usize) -> io::Result<bool> {
        let end = at + length as u64;
        if end > self.len {
            return Ok(false);
        }
        if at < self.window_at || end > self.window_at + self.window.len() as u64 {
            let wanted = (self.len - at).min(length.max(WINDOW) as u64);
            self.window.resize(usize::try_from(wanted).expect("bounded by WINDOW and MAX_PAYLOAD"), 0);
            self.window_at = at;
            read_exact(self.file, at, &mut self.window)?;
        }
        Ok(true)
    }
}

/// Reads the header of the file in `place`; the outer error is the disk's, the inner the file's.
pub(super) fn read_header(file: &dyn File, place: Place) -> io::Result<Result<Header, BadHeader>> {
    let mut bytes = [0; HEADER_LEN];
    if file.len()? < HEADER_LEN as u64 {
        return Ok(Err(BadHeader::Damaged));
    }
    read_exact(file, 0, &mut bytes)?;
    Ok(Header::decode(&bytes, place))
}

/// Fills `into` from `offset`.
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
