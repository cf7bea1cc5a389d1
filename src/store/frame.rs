//! What a file of the store is, octet by octet: version 1. Numbers are little-endian.
//!
//! ```text
//! file   = header frame*
//! header = magic(8) version(4) store-id(16) number(8) previous-len(8) crc(4)           48 octets
//! frame  = magic(4) crc(4) length(4) flags(4) generation(8) synced(8) payload(length)
//! ```
//!
//! - Every octet is under a CRC-32C. That of a frame also covers which file it is in and at
//!   which offset, so a frame is valid in its own place only; it does not cover the store id, so
//!   frames can still be read when the header of their file is gone.
//! - `synced` is the offset below which everything in this file was known to be on the disk when
//!   the frame was written. `previous-len` of a segment says the same of the whole segment
//!   before it. These two tell a torn tail from damage; see [`recover`](super::recover).
//! - Flags that this version does not know were set by a later one, and are not ignored. A later
//!   version keeps the layout of the header and raises its number.
//!
//! What a payload holds is [`format`](super::format)'s.

use super::format::Entry;

/// The version that is written, and the latest that is understood.
const VERSION: u32 = 1;

/// Octets of a file's header.
pub(super) const HEADER_LEN: usize = 48;

/// Octets of a frame before its payload.
pub(super) const FRAME_LEN: usize = 32;

/// Most octets in a payload. It bounds what a reader must hold; a larger batch takes several frames.
pub(super) const MAX_PAYLOAD: usize = 4 << 20;

/// Each frame begins with this. None of it can stand in a name, so a search meets few others.
const FRAME_MAGIC: [u8; 4] = [0xF7, b'g', b'p', 0x1A];

/// The next frame belongs to the same batch.
const MORE: u32 = 1;

/// The last frame of a snapshot.
const END: u32 = 2;

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A segment of the journal.
    Journal,
    /// Everything that stood at the end of a segment.
    Snapshot,
}

impl Kind {
    fn magic(self) -> [u8; 8] {
        match self {
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

/// Which file: segment `number`, or the snapshot of everything up to the end of that segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) kind: Kind,
    pub(super) number: u64,
}

impl Place {
    pub(super) fn journal(number: u64) -> Self {
        Self { kind: Kind::Journal, number }
    }

    pub(super) fn snapshot(number: u64) -> Self {
        Self { kind: Kind::Snapshot, number }
    }

    /// The file's name.
    pub(super) fn name(self) -> String {
        format!("{}{:010}", self.kind.prefix(), self.number)
    }

    /// The place that has this name, if it is one of ours.
    pub(super) fn of(name: &str) -> Option<Self> {
        [Kind::Journal, Kind::Snapshot].into_iter().find_map(|kind| {
            let place = Self { kind, number: name.strip_prefix(kind.prefix())?.parse().ok()? };
            (place.name() == name).then_some(place)
        })
    }

    /// What the checksum of a frame at `offset` begins with.
    pub(super) fn seed(self, offset: u64) -> u32 {
        let file = crc32c::crc32c_append(crc32c::crc32c(&self.kind.magic()), &self.number.to_le_bytes());
        crc32c::crc32c_append(file, &offset.to_le_bytes())
    }
}

/// Drawn once for each data directory, so that a file of another one is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StoreId([u8; 16]);

impl StoreId {
    pub(super) fn draw() -> Self {
        Self(fastrand::u128(..).to_le_bytes())
    }
}

/// The beginning of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) id: StoreId,
    pub(super) place: Place,
    /// Of a segment: octets of the segment before it, all of them synced. Otherwise 0.
    pub(super) previous_len: u64,
}

/// Why a header was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BadHeader {
    /// Octets are not what was written.
    Damaged,
    /// A later version wrote it.
    Newer(u32),
    /// It is the header of another file.
    Elsewhere,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&self.place.kind.magic());
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..28].copy_from_slice(&self.id.0);
        bytes[28..36].copy_from_slice(&self.place.number.to_le_bytes());
        bytes[36..44].copy_from_slice(&self.previous_len.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..44]);
        bytes[44..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the header of the file in `place`.
    pub(super) fn decode(bytes: &[u8; HEADER_LEN], place: Place) -> Result<Self, BadHeader> {
        if u32_at(bytes, 44) != crc32c::crc32c(&bytes[..44]) {
            return Err(BadHeader::Damaged);
        }
        if bytes[..8] != place.kind.magic() || u64_at(bytes, 28) != place.number {
            return Err(BadHeader::Elsewhere);
        }
        match u32_at(bytes, 8) {
            VERSION => {}
            other => return Err(BadHeader::Newer(other)),
        }
        let id = StoreId(bytes[12..28].try_into().expect("16 octets"));
        Ok(Self { id, place, previous_len: u64_at(bytes, 36) })
    }
}

/// What a frame says beside its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    /// The next frame belongs to the same batch.
    pub(super) more: bool,
    /// Nothing comes after it: the end of a snapshot.
    pub(super) end: bool,
    /// Bits that this version does not know.
    pub(super) unknown_flags: u32,
    /// The batch that it is of.
    pub(super) generation: u64,
    /// Everything in the file below this offset was on the disk when the frame was written.
    pub(super) synced: u64,
}

impl Frame {
    /// The payload length that the frame beginning with `bytes` claims, if it is a frame at all.
    pub(super) fn claimed(bytes: &[u8]) -> Option<usize> {
        let length = u32_at(bytes, 8) as usize;
        (bytes[..4] == FRAME_MAGIC && length <= MAX_PAYLOAD).then_some(length)
    }

    /// Whether `bytes` could begin a frame: a cheap check before the others.
    pub(super) fn may_begin(bytes: &[u8]) -> bool {
        bytes.starts_with(&FRAME_MAGIC)
    }

    /// Reads a whole frame, which must be valid at `offset` of the file in `place`.
    pub(super) fn decode(bytes: &[u8], place: Place, offset: u64) -> Option<Self> {
        let crc = crc32c::crc32c_append(place.seed(offset), &bytes[8..]);
        if u32_at(bytes, 4) != crc {
            return None;
        }
        let flags = u32_at(bytes, 12);
        Some(Self {
            more: flags & MORE != 0,
            end: flags & END != 0,
            unknown_flags: flags & !(MORE | END),
            generation: u64_at(bytes, 16),
            synced: u64_at(bytes, 24),
        })
    }
}

/// A frame that is being written.
#[derive(Debug)]
pub(super) struct FrameBuffer(Vec<u8>);

impl FrameBuffer {
    pub(super) fn new() -> Self {
        Self(vec![0; FRAME_LEN])
    }

    /// Begins another frame. Memory that an unusually large one took is given back.
    pub(super) fn clear(&mut self) {
        self.0.truncate(FRAME_LEN);
        self.0.shrink_to(1 << 20);
    }

    /// Octets of the payload so far.
    pub(super) fn payload_len(&self) -> usize {
        self.0.len() - FRAME_LEN
    }

    /// Adds an entry to the payload.
    pub(super) fn push(&mut self, entry: &Entry) {
        entry.append_to(&mut self.0);
    }

    /// Adds octets as they are.
    #[cfg(test)]
    pub(super) fn extend_raw(&mut self, payload: &[u8]) {
        self.0.extend_from_slice(payload);
    }

    /// Fills in the frame's beginning for `offset` of the file in `place` and gives the whole.
    pub(super) fn seal(&mut self, frame: &Frame, place: Place, offset: u64) -> &[u8] {
        debug_assert!(self.payload_len() <= MAX_PAYLOAD, "a writer closes a frame long before");
        let length = u32::try_from(self.payload_len()).expect("a frame is closed before MAX_PAYLOAD");
        let flags = if frame.more { MORE } else { 0 } | if frame.end { END } else { 0 };
        self.0[..4].copy_from_slice(&FRAME_MAGIC);
        self.0[8..12].copy_from_slice(&length.to_le_bytes());
        self.0[12..16].copy_from_slice(&flags.to_le_bytes());
        self.0[16..24].copy_from_slice(&frame.generation.to_le_bytes());
        self.0[24..32].copy_from_slice(&frame.synced.to_le_bytes());
        let crc = crc32c::crc32c_append(place.seed(offset), &self.0[8..]);
        self.0[4..8].copy_from_slice(&crc.to_le_bytes());
        &self.0
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 octets"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 octets"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_places_and_back() {
        for (name, place) in [
            ("journal-0000000001", Some(Place::journal(1))),
            ("snapshot-0000000042", Some(Place::snapshot(42))),
            ("journal-10000000000", Some(Place::journal(10_000_000_000))),
            ("journal-1", None),
            ("journal-0000000001.tmp", None),
            ("journal-+000000001", None),
            ("LOCK", None),
        ] {
            assert_eq!(Place::of(name), place, "{name}");
            if let Some(place) = place {
                assert_eq!(place.name(), name);
            }
        }
    }
}
