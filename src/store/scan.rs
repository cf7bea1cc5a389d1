//! Checks the files of the directory before any record is used: which are there, which frames are
//! intact, and what is missing.
//!
//! # Torn write or corruption
//!
//! Bytes that are no valid frame are a *torn write* if nothing shows that they were ever durable:
//! they are in the active segment, and no later frame has a `synced` offset past them. After a
//! crash only a batch that was not acknowledged looks like this, because pages may reach the disk
//! in any order. A torn write is cut off from the beginning of its batch, and reported.
//!
//! Everything else is *corruption*: acknowledged records are lost, and the start is refused until
//! somebody accepts the loss. Then everything that can be read is merged into a new snapshot, and
//! the corrupt files are set aside.
//!
//! A clean stop leaves no torn write: the [`clean_stop`](super::clean_stop) file has the length of
//! the active segment.

use std::{ops::Range, path::Path};

use super::{
    Corruption, StoreError,
    clean_stop::CleanStop,
    compaction::superseded,
    disk::{Directory, File, TEMP_SUFFIX},
    error::IoContext,
    frame::{FileId, FileKind, HEADER_LEN, Header, HeaderError, StoreId},
    reader::{FrameReader, ScanItem, read_header},
};

/// The files of the directory: live ones, and obsolete ones, which a snapshot has replaced.
#[derive(Debug, Default)]
pub(super) struct FileSet {
    pub(super) snapshot: Option<u64>,
    /// Later than the snapshot, in order.
    pub(super) segments: Vec<u64>,
    pub(super) obsolete: Vec<String>,
}

impl FileSet {
    pub(super) fn of(names: Vec<String>) -> Self {
        let mut set = Self::default();
        let ids: Vec<FileId> = names.iter().filter_map(|name| FileId::parse(name)).collect();
        set.snapshot =
            ids.iter().filter(|file_id| file_id.kind == FileKind::Snapshot).map(|file_id| file_id.number).max();
        let obsolete = |file_id: FileId| set.snapshot.is_some_and(|newest| superseded(file_id, newest));
        let segments = ids.iter().filter(|file_id| file_id.kind == FileKind::Journal && !obsolete(**file_id));
        set.segments = segments.map(|file_id| file_id.number).collect();
        set.segments.sort_unstable();
        set.obsolete = names
            .into_iter()
            .filter(|name| match name.strip_suffix(TEMP_SUFFIX) {
                // Another `.tmp` is somebody else's file, and stays.
                Some(stem) => FileId::parse(stem).is_some() || CleanStop::is_temporary(name),
                None => FileId::parse(name).is_some_and(obsolete),
            })
            .collect();
        set
    }
}

/// Bytes of a file that are no frame, with the generations of the frames around them.
#[derive(Debug)]
struct CorruptRange {
    bytes: Range<u64>,
    after: Option<u64>,
    before: Option<u64>,
}

impl CorruptRange {
    fn loss(&self) -> String {
        match (self.after, self.before) {
            (Some(after), Some(before)) => format!("what changed after generation {after} and before {before}"),
            (Some(after), None) => format!("what changed after generation {after}"),
            (None, Some(before)) => format!("what changed before generation {before}"),
            (None, None) => "everything in the file".into(),
        }
    }
}

/// The result of scanning one file.
#[derive(Debug)]
pub(super) struct FileScan {
    pub(super) file_id: FileId,
    pub(super) file: Box<dyn File>,
    len: u64,
    pub(super) header: Result<Header, HeaderError>,
    corrupt: Vec<CorruptRange>,
    /// The file was durable up to this offset at some time.
    pub(super) synced: u64,
    /// End of the last whole batch before any corrupt range.
    last_batch_end: u64,
    /// End of the last valid frame.
    last_frame_end: u64,
    /// The last frame of a snapshot is there.
    complete: bool,
    /// The generation of the last valid frame.
    generation: Option<u64>,
    /// Records are replayed up to this offset; 0 for none.
    pub(super) replay_end: u64,
}

impl FileScan {
    /// Whether the file is intact up to its durable offset.
    fn has_torn_tail(&self) -> bool {
        // What is corrupt behind the durable offset was never acknowledged.
        self.corrupt.first().map_or(self.last_batch_end, |range| range.bytes.start) >= self.synced
    }

    /// Reads a file once to check its frames, not its records.
    pub(super) fn read(files: &dyn Directory, dir: &Path, file_id: FileId) -> Result<Self, StoreError> {
        let path = dir.join(file_id.file_name());
        let file = files.open(&file_id.file_name()).io_context("open", &path)?;
        let len = file.len().io_context("read", &path)?;
        let header = read_header(&*file, file_id).io_context("read", &path)?;
        if let Err(HeaderError::Newer(version)) = header {
            return Err(StoreError::Newer { path, what: format!("format version {version}") });
        }
        let start = HEADER_LEN as u64;
        let (mut corrupt, mut synced, mut last_batch_end, mut last_frame_end, mut complete) =
            (Vec::<CorruptRange>::new(), start, start, start, false);
        let mut last = None;
        let mut frames = FrameReader::new(&*file, file_id, len);
        while let Some(item) = frames.next().io_context("read", &path)? {
            match item {
                ScanItem::Garbage(bytes) => corrupt.push(CorruptRange { bytes, after: last, before: None }),
                ScanItem::Frame { frame, .. } if frame.unknown_flags != 0 => {
                    return Err(StoreError::Newer { path, what: format!("frame flags {:#x}", frame.unknown_flags) });
                }
                ScanItem::Frame { at, frame, .. } => {
                    if let Some(range) = corrupt.last_mut() {
                        range.before.get_or_insert(frame.generation);
                    } else if !frame.more {
                        // Only before any corrupt range: a torn write is cut off from here on, with
                        // whatever of its batch reached the disk behind the hole.
                        last_batch_end = at.end;
                    }
                    synced = synced.max(frame.synced);
                    // Bytes behind the last frame would be lost silently, so they make the snapshot incomplete.
                    complete = frame.end && at.end == len;
                    last_frame_end = at.end;
                    last = Some(frame.generation);
                }
            }
        }
        drop(frames);
        Ok(Self {
            file_id,
            file,
            len,
            header,
            corrupt,
            synced,
            last_batch_end,
            last_frame_end,
            complete,
            generation: last,
            replay_end: len,
        })
    }
}

/// Distinguishes corruption from torn writes.
pub(super) fn classify(
    dir: &Path,
    scans: &mut [FileScan],
    id: StoreId,
    clean_stop: Option<CleanStop>,
    corruptions: &mut Vec<Corruption>,
    repairs: &mut Vec<String>,
) {
    for index in 0..scans.len() {
        // This file's length by the header of the next one; 0 when that header cannot be read.
        let next = scans.get(index + 1).map(|next| match &next.header {
            Ok(header) if header.id == id => header.previous_len,
            _ => 0,
        });
        let scan = &mut scans[index];
        let newest = scan.file_id.kind == FileKind::Journal && next.is_none();
        let path = dir.join(scan.file_id.file_name());
        let clean_stop = clean_stop.filter(|stop| newest && stop.segment == scan.file_id.number);
        if let Some(stop) = clean_stop {
            scan.synced = scan.synced.max(stop.len);
        }
        let mut found = |bytes: Option<Range<u64>>, what: &str, loss: String| {
            corruptions.push(Corruption { path: path.clone(), bytes, what: what.into(), loss });
        };
        match &scan.header {
            Ok(header) if header.id == id => {}
            Ok(_) => {
                found(None, "belongs to the data directory of another gangplank", "everything in the file".into());
                scan.replay_end = 0;
                continue;
            }
            Err(_) => {
                let end = scan.len.min(HEADER_LEN as u64);
                found(Some(0..end), "the header is corrupt", "nothing if the rest is intact".into());
            }
        }
        if newest && scan.has_torn_tail() {
            let (cut, kept) = (scan.len.saturating_sub(scan.last_batch_end), scan.last_batch_end);
            if cut > 0 {
                repairs.push(format!(
                    "{}: cut {cut} bytes from offset {kept} on: they look like a batch that was being written when \
                     gangplank or the machine stopped, and nothing shows that it was acknowledged; kept the \
                     {kept} bytes before it",
                    path.display(),
                ));
            }
            scan.replay_end = kept;
            continue;
        }
        if newest {
            // If the loss is accepted, everything valid is replayed and the rest is cut off.
            scan.replay_end = scan.last_frame_end;
        }
        for range in &scan.corrupt {
            found(Some(range.bytes.clone()), "the checksum does not match", range.loss());
        }
        if let Some(stop) = clean_stop
            && scan.len < stop.len
        {
            let loss =
                format!("what changed after generation {} and up to {}", scan.generation.unwrap_or(0), stop.generation);
            found(
                Some(scan.len..stop.len),
                "bytes are missing at the end that were there at the last clean stop",
                loss,
            );
        }
        match (scan.file_id.kind, next) {
            (FileKind::Snapshot, _) if !scan.complete => found(
                Some(scan.len..scan.len),
                "the snapshot ends too early",
                "the instances after that, in order of namespace and name".into(),
            ),
            (FileKind::Journal, Some(closed @ 1..)) if scan.len < closed => {
                found(Some(scan.len..closed), "bytes are missing at the end", "what they held".into());
            }
            (FileKind::Journal, Some(closed @ 1..)) if scan.len > closed => {
                let beyond = "there are bytes after the end at which it was closed";
                found(Some(closed..scan.len), beyond, "nothing acknowledged".into());
                scan.replay_end = closed;
            }
            _ => {}
        }
    }
}

/// The segments that are missing.
pub(super) fn missing_segments(set: &FileSet, clean_stop: Option<CleanStop>, dir: &Path) -> Vec<Corruption> {
    if set.snapshot.is_none() && set.segments.is_empty() && clean_stop.is_none() {
        return Vec::new(); // a new directory
    }
    let mut expected = set.snapshot.unwrap_or(0) + 1;
    let mut missing = Vec::new();
    // There is always a segment after a snapshot: it is created first.
    let end = set.segments.last().map_or(expected + 1, |last| last + 1);
    let end = end.max(clean_stop.map_or(0, |stop| stop.segment + 1));
    // `end` is one past what has to be there, so that a gap after the last file shows as well.
    for number in set.segments.iter().copied().chain([end]) {
        if number > expected {
            let what = match number - expected {
                1 => "is missing".into(),
                more => format!("is missing, and so are the {} segments after it", more - 1),
            };
            let path = dir.join(FileId::journal(expected).file_name());
            missing.push(Corruption { path, bytes: None, what, loss: "everything in it".into() });
        }
        expected = number + 1;
    }
    missing
}
