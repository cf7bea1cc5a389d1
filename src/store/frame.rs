//! The layout of the store's files, version 1. Numbers are little-endian.
//!
//! ```text
//! file   = header frame*
//! header = magic(8) version(4) store-id(16) number(8) previous-len(8) crc(4)           48 bytes
//! frame  = magic(4) crc(4) length(4) flags(4) generation(8) synced(8) payload(length)
//! ```
//!
//! - A CRC-32C covers every byte. The checksum of a frame also covers its file and its offset,
//!   so a frame is valid at one position only. It does not cover the store id, so frames can
//!   still be read when the header of their file is corrupt.
//! - `synced` is the offset up to which the file was durable when the frame was written.
//!   `previous-len` of a segment is the length of the segment before it, all of it durable.
//!   These two tell a torn write from corruption; see [`recover`](super::recover).
//! - Unknown flags were set by a later version and are refused. A later version keeps the layout
//!   of the header and increases its version number.
//!
//! The payload is defined in [`format`](super::format).

use super::format::Entry;

/// The version that is written, and the latest that can be read.
const VERSION: u32 = 1;

/// Length of a file's header in bytes.
pub(super) const HEADER_LEN: usize = 48;

/// Length of a frame without its payload, in bytes.
pub(super) const FRAME_LEN: usize = 32;

/// Largest payload in bytes, which bounds a reader's memory. A larger batch takes several frames.
pub(super) const MAX_PAYLOAD: usize = 4 << 20;

/// The first bytes of a frame. None of them can occur in a name, so a search finds few other matches.
const FRAME_MAGIC: [u8; 4] = [0xF7, b'g', b'p', 0x1A];

/// Flag: the next frame belongs to the same batch.
const FLAG_MORE: u32 = 1;

/// Flag: the last frame of a snapshot.
const FLAG_END: u32 = 2;

/// The kinds of files that consist of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    /// A segment of the journal.
    Journal,
    /// Every instance at the end of a segment.
    Snapshot,
}

impl FileKind {
    fn magic(self) -> [u8; 8] {
        match self {
            // As in PNG: beyond ASCII and with a line feed, so that a copy that was made as text does not pass for the
            // file.
            Self::Journal => *b"\x89GPjrnl\n",
            Self::Snapshot => *b"\x89GPsnap\n",
        }
    }

    fn prefix(self) -> &'static str {
        match self {
            Self::Journal => "journal-",
            Self::Snapshot => "snapshot-",
        }
    }
}

/// Identifies a file: segment `number`, or the snapshot of everything up to the end of that segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId {
    pub(super) kind: FileKind,
    pub(super) number: u64,
}

impl FileId {
    pub(super) fn journal(number: u64) -> Self {
        Self { kind: FileKind::Journal, number }
    }

    pub(super) fn snapshot(number: u64) -> Self {
        Self { kind: FileKind::Snapshot, number }
    }

    pub(super) fn file_name(self) -> String {
        // With zeros, so that `ls` lists them in order.
        format!("{}{:010}", self.kind.prefix(), self.number)
    }

    /// `None` for a name that the store does not use.
    pub(super) fn parse(name: &str) -> Option<Self> {
        [FileKind::Journal, FileKind::Snapshot].into_iter().find_map(|kind| {
            let file_id = Self { kind, number: name.strip_prefix(kind.prefix())?.parse().ok()? };
            // One spelling only: `journal-1` and `journal-+0000000001` parse too, and are not of the store.
            (file_id.file_name() == name).then_some(file_id)
        })
    }

    /// The initial value of the checksum of a frame at `offset`.
    pub(super) fn seed(self, offset: u64) -> u32 {
        let file = crc32c::crc32c_append(crc32c::crc32c(&self.kind.magic()), &self.number.to_le_bytes());
        crc32c::crc32c_append(file, &offset.to_le_bytes())
    }
}

/// Identifies a data directory, so that a file of another one is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StoreId(pub(super) [u8; 16]);

impl StoreId {
    pub(super) fn random() -> Self {
        Self(fastrand::u128(..).to_le_bytes())
    }
}

/// The header of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) id: StoreId,
    pub(super) file_id: FileId,
    /// Length in bytes of the segment before it, all of it durable. 0 in a snapshot.
    pub(super) previous_len: u64,
}

/// Why a header cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HeaderError {
    /// The checksum does not match.
    Corrupt,
    /// A later version wrote it.
    Newer(u32),
    /// It belongs to another file.
    Misplaced,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&self.file_id.kind.magic());
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..28].copy_from_slice(&self.id.0);
        bytes[28..36].copy_from_slice(&self.file_id.number.to_le_bytes());
        bytes[36..44].copy_from_slice(&self.previous_len.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..44]);
        bytes[44..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the header of the file in `place`.
    pub(super) fn decode(bytes: &[u8; HEADER_LEN], file_id: FileId) -> Result<Self, HeaderError> {
        // The checksum before the version, as in the clean-stop file.
        if u32_at(bytes, 44) != crc32c::crc32c(&bytes[..44]) {
            return Err(HeaderError::Corrupt);
        }
        if bytes[..8] != file_id.kind.magic() || u64_at(bytes, 28) != file_id.number {
            return Err(HeaderError::Misplaced);
        }
        match u32_at(bytes, 8) {
            VERSION => {}
            other => return Err(HeaderError::Newer(other)),
        }
        let id = StoreId(bytes[12..28].try_into().expect("16 bytes"));
        Ok(Self { id, file_id, previous_len: u64_at(bytes, 36) })
    }
}

/// A frame without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    /// The next frame belongs to the same batch.
    pub(super) more: bool,
    /// It is the last frame of a snapshot.
    pub(super) end: bool,
    /// Flags that this version does not know.
    pub(super) unknown_flags: u32,
    /// The generation of its batch.
    pub(super) generation: u64,
    /// The file was durable up to this offset when the frame was written.
    pub(super) synced: u64,
}

impl Frame {
    /// The payload length in the frame that begins with `bytes`, unverified; `None` if no frame does.
    pub(super) fn claimed_payload_len(bytes: &[u8]) -> Option<usize> {
        // Bounded before anything is allocated: in corrupt bytes the length may be any number.
        let length = u32_at(bytes, 8) as usize;
        (bytes[..4] == FRAME_MAGIC && length <= MAX_PAYLOAD).then_some(length)
    }

    /// Whether `bytes` may begin a frame: a cheap check before the others.
    pub(super) fn starts_with_magic(bytes: &[u8]) -> bool {
        bytes.starts_with(&FRAME_MAGIC)
    }

    /// Reads a whole frame, which must be valid at `offset` of the file in `place`.
    pub(super) fn decode(bytes: &[u8], file_id: FileId, offset: u64) -> Option<Self> {
        let crc = crc32c::crc32c_append(file_id.seed(offset), &bytes[8..]);
        if u32_at(bytes, 4) != crc {
            return None;
        }
        let flags = u32_at(bytes, 12);
        Some(Self {
            more: flags & FLAG_MORE != 0,
            end: flags & FLAG_END != 0,
            unknown_flags: flags & !(FLAG_MORE | FLAG_END),
            generation: u64_at(bytes, 16),
            synced: u64_at(bytes, 24),
        })
    }
}

/// A frame being written. The allocation is reused.
#[derive(Debug)]
pub(super) struct FrameBuffer(Vec<u8>);

impl FrameBuffer {
    pub(super) fn new() -> Self {
        Self(vec![0; FRAME_LEN])
    }

    /// Begins another frame, and frees what an unusually large one allocated.
    pub(super) fn clear(&mut self) {
        self.0.truncate(FRAME_LEN);
        self.0.shrink_to(1 << 20);
    }

    /// Length of the payload so far, in bytes.
    pub(super) fn payload_len(&self) -> usize {
        self.0.len() - FRAME_LEN
    }

    pub(super) fn push(&mut self, entry: &Entry) {
        entry.append_to(&mut self.0);
    }

    #[cfg(test)]
    pub(super) fn extend_raw(&mut self, payload: &[u8]) {
        self.0.extend_from_slice(payload);
    }

    /// Fills in the frame's beginning for `offset` of the file in `place` and returns the whole.
    pub(super) fn finish(&mut self, frame: &Frame, file_id: FileId, offset: u64) -> &[u8] {
        debug_assert!(self.payload_len() <= MAX_PAYLOAD, "a writer finishes a frame long before");
        let length = u32::try_from(self.payload_len()).expect("a frame is finished before MAX_PAYLOAD");
        let flags = if frame.more { FLAG_MORE } else { 0 } | if frame.end { FLAG_END } else { 0 };
        self.0[..4].copy_from_slice(&FRAME_MAGIC);
        self.0[8..12].copy_from_slice(&length.to_le_bytes());
        self.0[12..16].copy_from_slice(&flags.to_le_bytes());
        self.0[16..24].copy_from_slice(&frame.generation.to_le_bytes());
        self.0[24..32].copy_from_slice(&frame.synced.to_le_bytes());
        // Last: it covers everything behind itself.
        let crc = crc32c::crc32c_append(file_id.seed(offset), &self.0[8..]);
        self.0[4..8].copy_from_slice(&crc.to_le_bytes());
        &self.0
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_are_parsed_back_to_file_ids() {
        for (name, file_id) in [
            ("journal-0000000001", Some(FileId::journal(1))),
            ("snapshot-0000000042", Some(FileId::snapshot(42))),
            ("journal-10000000000", Some(FileId::journal(10_000_000_000))),
            ("journal-1", None),
            ("journal-0000000001.tmp", None),
            ("journal-+000000001", None),
            ("LOCK", None),
        ] {
            assert_eq!(FileId::parse(name), file_id, "{name}");
            if let Some(file_id) = file_id {
                assert_eq!(file_id.file_name(), name);
            }
        }
    }
}
