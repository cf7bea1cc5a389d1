//! The clean-stop file: how long the journal was when it was last closed.
//!
//! After a crash the end of the active segment may be torn, and nothing shows how long it was. A
//! clean stop has synced all of it and records its length. The file is a lower bound, which stays true while the
//! journal grows, is compacted, or the process crashes later: a journal that is shorter has lost
//! acknowledged records. So no start has to invalidate the file, and it covers what was written
//! before the last clean stop even after a crash. Only an accepted loss removes it.
//!
//! ```text
//! magic(8) version(4) store-id(16) segment(8) length(8) generation(8) crc(4)       56 bytes
//! ```

use std::io;

use super::{
    disk::{Directory, TEMP_SUFFIX, write_atomically},
    frame::{HeaderError, StoreId},
    reader::read_exact,
};

/// The file's name.
pub(super) const CLEAN_STOP: &str = "clean-stop";

const MAGIC: [u8; 8] = *b"\x89GPstop\n";
const VERSION: u32 = 1;
const LEN: usize = 56;

/// What a clean stop records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CleanStop {
    pub(super) id: StoreId,
    /// The number of the active segment.
    pub(super) segment: u64,
    /// Its length in bytes, all of it durable.
    pub(super) len: u64,
    /// The highest generation in the journal.
    pub(super) generation: u64,
}

impl CleanStop {
    /// Writes the file. The journal must be durable before.
    pub(super) fn write(&self, files: &dyn Directory) -> io::Result<()> {
        write_atomically::<io::Error>(files, CLEAN_STOP, |file| file.write_at(0, &self.encode())).map(drop)
    }

    /// Reads the file, if there is one. The outer error is the disk's, the inner one the contents'.
    pub(super) fn read(files: &dyn Directory) -> io::Result<Option<Result<Self, HeaderError>>> {
        let file = match files.open(CLEAN_STOP) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        if file.len()? != LEN as u64 {
            return Ok(Some(Err(HeaderError::Corrupt)));
        }
        let mut bytes = [0; LEN];
        read_exact(&*file, 0, &mut bytes)?;
        Ok(Some(Self::decode(&bytes)))
    }

    /// Removes the file durably, if there is one.
    pub(super) fn remove(files: &dyn Directory) -> io::Result<()> {
        match files.remove(CLEAN_STOP) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.and_then(|()| files.sync_dir()),
        }
    }

    /// Whether a crash can leave this file behind while the file is written.
    pub(super) fn is_temporary(name: &str) -> bool {
        name.strip_suffix(TEMP_SUFFIX) == Some(CLEAN_STOP)
    }

    fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..28].copy_from_slice(&self.id.0);
        bytes[28..36].copy_from_slice(&self.segment.to_le_bytes());
        bytes[36..44].copy_from_slice(&self.len.to_le_bytes());
        bytes[44..52].copy_from_slice(&self.generation.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..52]);
        bytes[52..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; LEN]) -> Result<Self, HeaderError> {
        let u32_at = |at| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        // The checksum first: a version that was read from corrupt bytes would be blamed on a newer gangplank.
        if u32_at(52) != crc32c::crc32c(&bytes[..52]) {
            return Err(HeaderError::Corrupt);
        }
        if bytes[..8] != MAGIC {
            return Err(HeaderError::Misplaced);
        }
        match u32_at(8) {
            VERSION => {}
            other => return Err(HeaderError::Newer(other)),
        }
        let id = StoreId(bytes[12..28].try_into().expect("16 bytes"));
        Ok(Self { id, segment: u64_at(28), len: u64_at(36), generation: u64_at(44) })
    }
}
